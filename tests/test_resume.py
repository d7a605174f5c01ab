"""Killed at any moment and gone on with, a run ends with the numbers of one that was never stopped.

    python -m pytest -m slow tests/test_resume.py      20 kills; KILL_LOG=FILE.csv keeps a log of them

A kill is SIGKILL, sent by a timer to the process itself: at a random moment behind a phase's first checkpoint
or while one is written. Processes are forked from a server that has imported torch and the like.
"""

import csv
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load
from test_pipeline import Result, assert_same_run

RUN = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --score-hidden-sizes 16 16 --batch-size 32 "
RUN += "--eval-episodes 2 --score-steps 400 --offline-steps 300 --online-steps 420 --eval-every 200 "
RUN += "--handover-eval-every 100 --checkpoint-every 0.002"
SECONDS = 0.5  # about what a phase takes behind its first checkpoint; later moments fall into the next one

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch", "gymnasium", "minari", "tyro", "matplotlib.pyplot", "test_pipeline"]
)


def child(script: Path, words: str, cwd: Path, log: Path, kill: tuple) -> None:
    """The script's main() in this process, which a kill (what, phase, when) ends."""
    os.chdir(cwd)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    module = load("killed", script)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    what, phase, when = kill
    save, write, started = module.Run.save, module.write_atomically, []

    def timed(run, name, *rest):
        save(run, name, *rest)
        if what == "time" and run.phase == phase and not started:  # from the phase's first checkpoint on
            started.append(threading.Timer(when, die))
            started[0].start()

    def broken(path, writer):
        nonlocal when

        def half(temporary):
            writer(temporary)
            if when < 0:  # written, not yet in place
                os.truncate(temporary, temporary.stat().st_size // 2)
                die()

        when -= what == "write" and path.name == "last.pt"
        write(path, half if what == "write" and path.name == "last.pt" else writer)

    module.Run.save, module.write_atomically = timed, broken
    sys.argv = [str(script), *words.split()]
    try:
        module.main()
    except SystemExit as end:
        print(end.code)
        os._exit(1)


def run(script: Path, words: str, cwd: Path, kill: tuple = ("", "", 0)) -> int:
    """Exit code of the script; -9 if it was killed."""
    process = processes.Process(target=child, args=(script, words, cwd, cwd / "log", kill))
    process.start()
    process.join(120)
    return process.exitcode


def result(cwd: Path) -> Result:
    return Result(0, (cwd / "log").read_text(), next(cwd.glob("runs/*")))


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A run of each script that nothing stopped."""
    done = {}

    def get(script: str) -> Result:
        if script not in done:
            cwd = tmp_path_factory.mktemp("never_stopped")
            assert run(ROOT / script, RUN, cwd) == 0, (cwd / "log").read_text()
            done[script] = result(cwd)
        return done[script]

    return get


def killed_and_resumed(script: str, kill: tuple, cwd: Path, whole: Result) -> dict:
    """One trial: killed, gone on with (begun again where no checkpoint was yet), compared to the last bit."""
    code = run(ROOT / script, RUN, cwd, kill)
    directory = next(cwd.glob("runs/*"), None)
    checkpoints = sorted(path.name for path in directory.glob("*.pt")) if directory else []
    row = dict(script=script, what=kill[0], phase=kill[1], when=round(kill[2], 3), killed=code == -9,
               checkpoints=" ".join(checkpoints))  # fmt: skip
    if code == -9 and checkpoints:
        assert run(ROOT / script, f"--resume {directory}", cwd) == 0, (cwd / "log").read_text()[-1500:]
    elif code == -9:  # nothing to go on from: said in one sentence
        assert directory is None or run(ROOT / script, f"--resume {directory}", cwd) == 1
        assert directory is None or "holds no checkpoint" in (cwd / "log").read_text()
        return row | dict(identical="begun again")
    assert_same_run(result(cwd), whole)
    assert not [path for path in directory.iterdir() if path.name.startswith(".")], (
        "a half-written file stays"
    )
    text = (cwd / "log").read_text()
    assert "Traceback" not in text
    return row | dict(identical="yes")


def kills(count_each: int, writes: int, seed: int) -> list[tuple]:
    """Random moments in each phase, and the n-th writing of last.pt."""
    random = np.random.default_rng(seed)
    timed = [("time", phase, random.uniform(0, SECONDS)) for phase in ("score", "offline", "online")
             for _ in range(count_each)]  # fmt: skip
    return timed + [("write", "", int(random.integers(2, 15))) for _ in range(writes)]


@pytest.mark.parametrize("kill", kills(1, 2, seed=0), ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_killed_run_ends_as_if_never_stopped(kill, never_stopped, tmp_path):
    row = killed_and_resumed(
        "smac_offline_online.py", kill, tmp_path, never_stopped("smac_offline_online.py")
    )
    assert row["killed"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["smac_offline_online.py", "td3_finetune.py"])
def test_twenty_kills(script, never_stopped, tmp_path):
    rows = []
    for i, kill in enumerate(kills(5, 5, seed=time.time_ns() % 2**32)):
        (tmp_path / str(i)).mkdir()
        rows.append(killed_and_resumed(script, kill, tmp_path / str(i), never_stopped(script)))
    if path := os.environ.get("KILL_LOG"):
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
    assert sum(row["killed"] for row in rows) >= 18 and all(row["identical"] for row in rows)
