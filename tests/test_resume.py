"""Killed at any moment and gone on with, a run ends with the numbers of one that was never stopped.

    python -m pytest -m slow tests/test_resume.py      20 kills at random moments over all phases

A kill is SIGKILL, sent by a timer to the process itself: a few random milliseconds into a random step of a
phase, or while a checkpoint is written. Processes are forked from a server that has imported torch already.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, load

SIZES = "--env-id pendulum-medium-replay --device cpu --hidden-sizes 8 8 --batch-size 16 --eval-episodes 2 "
SIZES += "--checkpoint-every 0.0005 --eval-every 50 --handover-eval-every 100 --online-steps 410 "  # 30 ms
OFFLINE = SIZES + "--offline-steps 80 "
# name: (script, flags, steps of each phase); FROM is SMAC's offline.pt
RUNS = {
    "smac": ("smac_offline_online", OFFLINE + "--score-hidden-sizes 8 8 --score-steps 80",
             dict(score=80, offline=80, online=410)),
    "calql": ("calql_baseline", OFFLINE, dict(offline=80, online=410)),
    "aca": ("aca_baseline", OFFLINE, dict(offline=80, online=410)),
    "aca from": ("aca_baseline", SIZES + "--alignment-steps 80 --checkpoint FROM",
                 dict(alignment=80, online=410)),
}  # fmt: skip
PHASES = [(name, phase) for name, (_, _, steps) in RUNS.items() for phase in steps]

processes = multiprocessing.get_context("forkserver")
PRELOAD = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg", "minari", "tyro"]
processes.set_forkserver_preload(PRELOAD)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(script: str, words: str, cwd: Path, kill: tuple) -> None:
    """main() in this process, which `kill` ends: (phase, step, seconds) or (file, n-th writing)."""
    os.chdir(cwd)
    for descriptor in (1, 2):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    module, replace, written = load("killed", ROOT / f"{script}.py"), os.replace, []

    def steps(numbers, phase, disable):
        for step in numbers:
            if kill[:2] == (phase, step):
                threading.Timer(kill[2], die).start()
            yield step

    def half(temporary, path):
        written.append(path.name)
        if kill == (path.name, written.count(path.name)):  # written, not yet in its place
            os.truncate(temporary, temporary.stat().st_size // 2)
            die()
        replace(temporary, path)

    steps.write, module.tqdm, os.replace = print, steps, half
    sys.argv = [f"{script}.py", *words.split()]
    module.main()


def run(script: str, words: str, cwd: Path, kill: tuple = ()) -> int:
    """Exit code of the script; -9 if it was killed."""
    process = processes.Process(target=child, args=(script, words, cwd, kill))
    process.start()
    process.join(120)
    return process.exitcode


def ended(cwd: Path) -> Result:
    return Result(0, (cwd / "log").read_text(), next(cwd.glob("runs/*")))


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A function: the run of this name that nothing stopped, and its flags."""
    done = {}

    def get(name: str) -> tuple[Result, str]:
        if name not in done:
            script, words, _ = RUNS[name]
            if "FROM" in words:
                words = words.replace("FROM", str(get("smac")[0].directory / "offline.pt"))
            cwd = tmp_path_factory.mktemp("never_stopped")
            assert run(script, words, cwd) == 0, (cwd / "log").read_text()
            done[name] = ended(cwd), words
        return done[name]

    return get


def assert_equal(one, other, where: str) -> None:
    """Equal to the last bit, tensors within dicts and lists included."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
    if isinstance(one, (dict, list, tuple)):
        assert len(one) == len(other), where
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_equal(one[key], other[key], f"{where}/{key}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def assert_same_run(one: Result, other: Result) -> None:
    tables = [(result.directory / "metrics.csv").read_text() for result in (one, other)]
    assert tables[0] == tables[1]
    names = sorted(path.name for path in other.directory.glob("*.pt"))
    assert sorted(path.name for path in one.directory.glob("*.pt")) == names
    for name in set(names) - {"last.pt"}:
        states = [result.state(name) for result in (one, other)]
        for state in states:
            state["args"].pop("resume")
        assert_equal(*states, name)


def kill_and_resume(name: str, kill: tuple, cwd: Path, never_stopped) -> None:
    """One trial; where no checkpoint was yet, going on is refused in a sentence, and it begins again."""
    (whole, words), script = never_stopped(name), RUNS[name][0]
    cwd.mkdir(exist_ok=True)
    assert run(script, words, cwd, kill) == -signal.SIGKILL, (cwd / "log").read_text()
    directory = ended(cwd).directory
    began = (directory / "last.pt").exists()
    assert run(script, f"--resume {directory} --device cpu", cwd) == (0 if began else 1), (
        cwd / "log"
    ).read_text()
    text = (cwd / "log").read_text()
    assert "Traceback" not in text
    if began:
        assert_same_run(ended(cwd), whole)
    else:
        assert "error: " in text and not (directory / "last.pt").exists()


def moment(name: str, phase: str, random: np.random.Generator) -> tuple:
    """A random step of the phase and a random time of a few of its steps."""
    return phase, int(random.integers(1, RUNS[name][2][phase] + 1)), random.uniform(0, 0.005)


@pytest.mark.parametrize("name, kill", [
    ("smac", ("offline", 70, 0.001)),
    ("calql", ("online", 300, 0.001)),
    ("smac", ("last.pt", 4)),
    ("aca", ("offline.pt", 1)),
])  # fmt: skip
def test_a_killed_run_ends_as_if_never_stopped(name, kill, never_stopped, tmp_path):
    kill_and_resume(name, kill, tmp_path, never_stopped)


@pytest.mark.parametrize("name", ["smac", "calql", "aca"])
def test_a_lost_offline_pt_is_not_made_of_untrained_networks(name, never_stopped, tmp_path):
    whole, _ = never_stopped(name)
    directory = shutil.copytree(whole.directory, tmp_path / "runs" / "copy")
    (directory / "offline.pt").unlink()
    assert run(RUNS[name][0], f"--resume {directory} --device cpu", tmp_path) == 0
    assert torch.load(directory / "last.pt", weights_only=True)["phase"] == "online"
    assert not (directory / "offline.pt").exists()


@pytest.mark.parametrize("script", ["smac_offline_online", "calql_baseline", "iql_baseline"])
def test_a_run_without_offline_updates_goes_on_as_well(script, tmp_path):
    score = "--score-hidden-sizes 8 8 --score-steps 20" if script == "smac_offline_online" else ""
    assert run(script, f"{SIZES} --offline-steps 0 {score}", tmp_path) == 0
    whole = (ended(tmp_path).directory / "metrics.csv").read_text()
    assert run(script, f"--resume {ended(tmp_path).directory} --device cpu", tmp_path) == 0
    assert (ended(tmp_path).directory / "metrics.csv").read_text() == whole


def test_only_last_pt_sets_back_its_clock(smac, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = smac.Run(smac.Args("pendulum-medium-replay", eval_episodes=1, checkpoint_every=0.1))
    started.saved_at = 7.0
    started.save("offline.pt", "offline", 1)
    assert started.saved_at == 7.0
    started.autosave("offline", 1)
    assert (started.directory / "last.pt").exists() and started.saved_at > 7


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills_at_random_moments(seed, never_stopped, tmp_path):
    """Two in every phase of the three scripts, and one more in two of them."""
    name, phase = PHASES[seed % len(PHASES)]
    kill = moment(name, phase, np.random.default_rng(seed))
    kill_and_resume(name, kill, tmp_path, never_stopped)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def missing(path: Path) -> None:
    path.unlink()


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def foreign(path: Path) -> None:
    torch.save({"args": Bomb()}, path)


@pytest.mark.parametrize("damage", [truncated, empty, missing, foreign])
def test_a_damaged_checkpoint_is_one_sentence(smac, monkeypatch, tmp_path, damage):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": {}, "phase": "offline", "rows": []}, "last.pt")
    damage(tmp_path / "last.pt")
    monkeypatch.setattr(sys, "argv", ["smac_offline_online.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        smac.main()
    message = end.value.code
    assert message.startswith("error: ") and "\n" not in message and str(tmp_path / "last.pt") in message
    assert not (tmp_path / "exploded").exists(), "a foreign pickle was executed"


def test_a_run_of_another_script_or_version_is_one_sentence(smac, monkeypatch, tmp_path):
    torch.save({"args": {"seed": 1, "gone": 2}}, tmp_path / "last.pt")
    monkeypatch.setattr(sys, "argv", ["smac_offline_online.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="is a run of another script, or of another version of this one"):
        smac.main()
