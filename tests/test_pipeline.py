"""The whole script: a run and its files, repeated, stopped and gone on with, every switch, its numbers."""

import ast
import csv
import fcntl
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import returns_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --score-hidden-sizes 16 16 --batch-size 32 "
SMALL += "--eval-episodes 2 "
WHOLE = SMALL + "--score-steps 600 --offline-steps 500 --online-steps 550 --eval-every 120 "
WHOLE += "--handover-eval-every 60 --snapshot-every 500"
TINY = SMALL + "--score-steps 10 --offline-steps 10 --online-steps 40 --eval-every 1000 "


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONUNBUFFERED", "1")  # what a run prints is seen at once
        patch.delenv("MINARI_DATASETS_PATH", raising=False)
        yield


@dataclass
class Result:
    code: int
    output: str
    directory: Path | None

    def rows(self) -> list[dict[str, str]]:
        with open(self.directory / "metrics.csv") as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    def state(self, name: str) -> dict:
        return torch.load(self.directory / name, weights_only=True)


def start(smac, words: str, cwd: Path, stop_at: str | None = None) -> Result:
    """Runs the script by itself; Ctrl-C's signal once it prints a line that starts with `stop_at`."""
    command, lines = [sys.executable, smac.__file__, *words.split()], []
    process = subprocess.Popen(command, cwd=cwd, stdout=-1, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append(line)
        if stop_at and line.startswith(stop_at):
            process.send_signal(signal.SIGINT)
            stop_at = None
    code = process.wait(timeout=60)
    return Result(code, "".join(lines), next(cwd.glob("runs/*"), None))


@pytest.fixture
def inside(smac, monkeypatch, capfd):
    """Runs main() in this process, in a folder of its own: a fraction of the time of a new process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(words: str, cwd: Path) -> Result:
        cwd.mkdir(exist_ok=True, parents=True)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [smac.__file__, *words.split()])
        try:
            smac.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return Result(code, capfd.readouterr().out, next((cwd / "runs").glob("*"), None))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_sentence(code) -> bool:
    return isinstance(code, str) and code.startswith("error: ") and "\n" not in code.strip()


def assert_equal(one, other, where="") -> None:
    """Equal to the last bit, tensors within dicts and lists included."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert one == other or (one != one and other != other), where  # NaN: not known


def assert_same_run(one: Result, other: Result) -> None:
    """The same numbers, whatever the clock and the folder were."""
    assert one.rows() == other.rows()
    for name in ("offline.pt", "final.pt"):
        states = [run.state(name) for run in (one, other)]
        for state in states:
            del state["seconds"], state["resume"], state["checksum"]
            for row in state["rows"]:
                row.pop("seconds")
        assert_equal(*states, name)


# === A whole run ===========================================================================================


@pytest.fixture(scope="module")
def whole(smac, tmp_path_factory):
    """A run from the first update to the table, never stopped."""
    result = start(smac, WHOLE, tmp_path_factory.mktemp("whole"))
    assert result.code == 0, result.output
    return result


def test_a_run_ends_with_its_table(whole):
    table = whole.output.rsplit("\n\n", 1)[-1]
    for line in ("mean score of the dataset", "offline score", "handover drop", "final score", "smooth",
                 "regret over 550 online steps", "updates per second, offline"):  # fmt: skip
        assert re.search(rf"^{line} +\S", table, re.MULTILINE), line
    assert "Traceback" not in whole.output


def test_a_run_leaves_its_files(whole, smac):
    names = {path.name for path in whole.directory.iterdir()}
    assert names >= {
        "config.json",
        "metrics.csv",
        "offline.pt",
        "final.pt",
        "learning_curve.png",
        "snapshots",
        "tensorboard",
    }
    assert (whole.directory / Path(smac.__file__).name).read_bytes() == Path(smac.__file__).read_bytes()
    assert (whole.directory / "learning_curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [name for name in names if name.startswith(".")], "temporary files were left"


def test_the_config_says_what_was_run(whole, smac):
    config = json.loads((whole.directory / "config.json").read_text())
    assert config["dataset_id"] == "smac/pendulum/medium-replay-v0"
    assert config["dataset_checksum"] == smac.dataset_checksum(ROOT / "datasets" / config["dataset_id"])
    assert {"torch", "numpy", "gymnasium", "mujoco", "minari"} <= config["versions"].keys()
    assert config["versions"]["torch"] == torch.__version__
    assert {field.name for field in fields(smac.Args)} <= config["args"].keys()
    assert any(value in ("cpu", "cuda") for key, value in config.items() if "device" in key)


def test_metrics_hold_every_evaluation(whole):
    rows = whole.rows()
    steps = {phase: [int(r["step"]) for r in rows if r["phase"] == phase] for phase in ("offline", "online")}
    assert steps["offline"] == [0, 120, 240, 360, 480, 500]
    assert steps["online"] == [*range(0, 550, 60), 550], "dense right after the handover"
    for row in rows:
        assert float(row["return_mean"]) == np.mean([float(row["return_0"]), float(row["return_1"])])
        assert float(row["score"]) == pytest.approx(100 * (float(row["return_mean"]) + 1230) / 1080)


def test_online_starts_from_the_offline_policy(whole):
    offline = [row for row in whole.rows() if row["phase"] == "offline"][-1]
    online = next(row for row in whole.rows() if row["phase"] == "online")
    for key in ("return_mean", "score", "return_0", "return_1"):
        assert online[key] == offline[key]


def test_tensorboard_holds_the_documented_scalars(whole, smac):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = {
        p: EventAccumulator(str(whole.directory / "tensorboard" / p)) for p in ("score", "offline", "online")
    }
    tags_of = {phase: set(found.Reload().Tags()["scalars"]) for phase, found in events.items()}
    shared = ("critic_loss", "q", "actor_loss", "temperature_loss", "alpha", "entropy", "return")
    tags = {f"{phase}/{name}" for phase in ("offline", "online") for name in (*shared, "normalised_score")}
    tags |= {
        f"offline/{name}" for name in ("score_matching_loss", "cosine_dataset", "cosine_policy", "alpha_psi")
    }
    tags |= {"score/denoising_loss", *(f"score/held_out_loss_level_{t}" for t in range(1, 6))}
    assert tags <= set.union(*tags_of.values())
    assert all(tag.startswith(f"{phase}/") for phase, found in tags_of.items() for tag in found)
    returns = [float(row["return_mean"]) for row in whole.rows() if row["phase"] == "offline"]
    assert [e.value for e in events["offline"].Scalars("offline/return")] == pytest.approx(returns)


@pytest.mark.parametrize("name", ["offline.pt", "final.pt"])
def test_a_checkpoint_rebuilds_an_agent_that_acts(whole, smac, name):
    state = whole.state(name)
    sizes = (state["obs_dim"], state["act_dim"], state["hidden_sizes"], state["num_critics"])
    agent = smac.Agent(*sizes, state["critic_activation"])
    agent.load_state_dict(state["agent"])
    returns = returns_of(smac, agent.actor, [smac.make_env("Pendulum-v1") for _ in range(2)], "cpu")
    last = [row for row in whole.rows() if row["phase"] == ("offline" if name == "offline.pt" else "online")]
    np.testing.assert_allclose(returns, [float(last[-1][f"return_{i}"]) for i in range(2)], rtol=1e-6)


def test_snapshots_are_thin(whole):
    snapshots = sorted((whole.directory / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["offline_000000500.pt", "online_000000500.pt"]
    state = torch.load(snapshots[0], weights_only=True)
    assert "actor" in state and not {"agent", "score_net"} & state.keys() and state["optimizers"] == []
    actor = {k: v for k, v in whole.state("offline.pt")["agent"].items() if k.startswith("actor.")}
    assert_equal({f"actor.{k}": v for k, v in state["actor"].items()}, actor)


def test_the_snippet_of_the_readme_acts(whole, smac, monkeypatch, tmp_path):
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md to take the snippet from")
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "runs/NAME/final.pt" in snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("runs/NAME/final.pt", str(whole.directory / "final.pt")), {})


# === The same again ========================================================================================


def test_the_same_seed_is_the_same_run_and_another_is_not(inside, tmp_path):
    one, same, other = (inside(TINY + f"--seed {s}", tmp_path / str(i)) for i, s in enumerate((1, 1, 2)))
    assert_same_run(one, same)
    assert one.rows() != other.rows()


@pytest.fixture(scope="module")
def stopped(smac, tmp_path_factory):
    """The whole run once more, stopped in each phase and gone on with: four results, three states."""
    cwd, results, states = tmp_path_factory.mktemp("stopped"), [], []
    for stop_at in ("score    step       120", "offline  step       120", "online   step       240"):
        words = f"--resume runs/{results[0].directory.name}" if results else WHOLE
        results.append(start(smac, words, cwd, stop_at))
        assert results[-1].code == 130, results[-1].output
        states.append(results[-1].state("last.pt"))
    results.append(start(smac, f"--resume runs/{results[0].directory.name}", cwd))
    return results, states


def test_a_stopped_run_says_how_to_go_on(stopped):
    results, states = stopped
    assert [state["phase"] for state in states] == ["score", "offline", "online"]
    assert 240 <= states[-1]["step"] < 400, "in the middle of the second episode"
    for result in results[:3]:
        assert f"--resume runs/{result.directory.name}" in result.output.splitlines()[-1]
        assert "Traceback" not in result.output


def test_a_resumed_run_ends_as_if_never_stopped(stopped, whole):
    results, _ = stopped
    assert results[-1].code == 0, results[-1].output
    assert_same_run(results[-1], whole)
    assert (results[-1].directory / "learning_curve.png").exists()


def signal_at(smac, monkeypatch, phase, step):
    """SIGINT during the evaluation at this step."""
    evaluate = smac.Run.evaluate

    def stop(run, at):
        if (run.phase, at) == (phase, step):
            os.kill(os.getpid(), signal.SIGINT)
        evaluate(run, at)

    monkeypatch.setattr(smac.Run, "evaluate", stop)


@pytest.mark.parametrize("phase, step", [("offline", 10), ("online", 40)])
def test_a_run_stopped_at_the_last_step_of_a_phase_is_complete_when_resumed(
    smac, inside, monkeypatch, tmp_path, phase, step
):
    whole = inside(TINY, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_at(smac, patch, phase, step)
        run = inside(TINY, tmp_path / "stopped")
    assert run.code == 130
    run = inside(f"--resume {run.directory}", tmp_path / "stopped")
    assert run.code == 0
    assert_same_run(run, whole)


# === Checkpoints that can't be taken =======================================================================


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of the run that was stopped and gone on with, without its end: last.pt is of the online one."""
    directory = tmp_path / "runs" / "stopped"
    shutil.copytree(stopped[0][-1].directory, directory)
    (directory / "final.pt").unlink()
    return directory


@pytest.mark.parametrize("flag", ["--seed 2", "--gamma 0.9", "--online-steps 600", "--hidden-sizes 8 8"])
def test_resume_refuses_other_settings(copied, inside, tmp_path, flag):
    code = inside(f"--resume {copied} {flag}", tmp_path).code
    assert is_sentence(code) and flag.split()[0].strip("-").replace("-", "_") in code.replace("-", "_")


@pytest.mark.parametrize("change", ["another setting", "another online algorithm"])
def test_resume_refuses_another_scripts_run(smac, copied, inside, tmp_path, change):
    config = json.loads((copied / "config.json").read_text())
    if change == "another setting":
        config["args"]["policy_delay"] = 2
        (copied / "config.json").write_text(json.dumps(config))
    for name in ("last.pt", "previous.pt", "offline.pt"):
        state = torch.load(copied / name, weights_only=True) | {"online_algorithm": "TD3"}
        torch.save(smac.sealed(state), copied / name)
    code = inside(f"--resume {copied}", tmp_path).code
    says = "of another script or version" if change == "another setting" else "goes online with TD3"
    assert is_sentence(code) and says in code


def test_resume_of_what_is_no_run_is_one_sentence(inside, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        code = inside(f"--resume {name}", tmp_path).code
        assert is_sentence(code) and name in code


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def other_format(path):
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)


def no_format(path):
    torch.save({"weights": torch.zeros(3)}, path)


def no_dict(path):
    torch.save(torch.zeros(3), path)


def foreign(path):
    path.write_bytes(pickle.dumps({"format": 1, "path": Path("/")}))


def one_bit(path):
    state = torch.load(path, weights_only=True)
    state["agent"]["actor.net.weights.0"].view(torch.int32)[0, 0, 0] ^= 1
    torch.save(state, path)


def parts_missing(path):
    state = torch.load(path, weights_only=True)
    del state["gamma"]
    torch.save(state, path)


DAMAGES = [cut_off, other_format, no_format, no_dict, foreign, one_bit, parts_missing]


@pytest.mark.parametrize("damage", [cut_off, one_bit])
def test_a_damaged_last_pt_falls_back_to_previous_pt_and_says_so(copied, inside, tmp_path, whole, damage):
    shutil.copy(copied / "last.pt", copied / "previous.pt")
    damage(copied / "last.pt")
    run = inside(f"--resume {copied}", tmp_path)
    assert run.code == 0 and re.search(r"^note: .*last\.pt", run.output, re.MULTILINE)
    assert_same_run(run, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_checkpoint_that_can_be_read_it_is_one_sentence(copied, inside, tmp_path, damage):
    for path in copied.glob("*.pt"):
        damage(path)
    assert is_sentence(inside(f"--resume {copied}", tmp_path).code)


def test_a_complete_run_is_shown_again(whole, inside, tmp_path):
    directory = tmp_path / "runs" / "complete"
    shutil.copytree(whole.directory, directory)
    before = (directory / "final.pt").read_bytes()
    (directory / "learning_curve.png").unlink()
    run = inside(f"--resume {directory}", tmp_path)
    assert run.code == 0 and (directory / "learning_curve.png").exists()
    assert (directory / "final.pt").read_bytes() == before and run.rows() == whole.rows()


def test_a_directory_in_use_is_refused_and_a_dead_process_holds_none(copied, inside, tmp_path):
    with open(copied / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code = inside(f"--resume {copied}", tmp_path).code
        assert is_sentence(code) and "in use" in code
    (copied / "lock").write_text("process 1 on elsewhere")  # left by a process that was killed
    assert inside(f"--resume {copied}", tmp_path).code == 0


def test_sigterm_ends_with_its_own_code_and_a_second_signal_at_once(smac, inside, monkeypatch, tmp_path):
    evaluate = smac.Run.evaluate

    def stop(run, at):
        for _ in range(signals if (run.phase, at) == ("offline", 5) else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run, at)

    monkeypatch.setattr(smac.Run, "evaluate", stop)
    signals = 1
    run = inside(TINY + "--eval-every 5", tmp_path / "once")
    assert run.code == 143 and run.state("last.pt")["step"] == 5
    signals = 2
    with pytest.raises(KeyboardInterrupt):
        inside(TINY + "--eval-every 5", tmp_path / "twice")
    assert not list((tmp_path / "twice").rglob("last.pt"))


@pytest.mark.parametrize("what", ["reward", "observation", "exception"])
def test_a_failing_environment_is_one_sentence(smac, inside, monkeypatch, tmp_path, what):
    class Broken(gym.Wrapper):
        def step(self, action):
            observation, reward, *rest = self.env.step(action)
            if what == "exception":
                raise RuntimeError("the simulator fell over")
            bad = (observation * np.nan, reward) if what == "observation" else (observation, np.inf)
            return *bad, *rest

    make_env, made = smac.make_env, []

    def make(spec, *wrappers, **kwargs):
        made.append(make_env(spec, *wrappers, **kwargs))
        return Broken(made[-1]) if len(made) == 4 else made[-1]  # the data's, two to evaluate, the online one

    monkeypatch.setattr(smac, "make_env", make)
    run = inside(TINY + "--eval-episodes 2", tmp_path)
    assert is_sentence(run.code) and "environment" in run.code and "offline.pt" in run.code


def test_resumed_tensorboard_curves_have_every_step_once(copied, inside, tmp_path):
    """The copy's curves go on behind its last.pt, as those of a killed run do."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert inside(f"--resume {copied}", tmp_path).code == 0
    for phase in ("score", "offline", "online"):
        events = EventAccumulator(str(copied / "tensorboard" / phase)).Reload()
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == sorted(set(steps)), tag


def test_without_last_pt_the_previous_one_is_taken(copied, inside, tmp_path, whole):
    (copied / "previous.pt").unlink(missing_ok=True)
    (copied / "last.pt").rename(copied / "previous.pt")
    run = inside(f"--resume {copied}", tmp_path)
    assert run.code == 0
    assert_same_run(run, whole)


def test_the_newest_checkpoint_is_taken(copied, stopped, inside, tmp_path, whole):
    """last.pt is of the middle of the offline phase, which has ended since."""
    (copied / "previous.pt").unlink(missing_ok=True)
    torch.save(stopped[1][1], copied / "last.pt")
    run = inside(f"--resume {copied}", tmp_path)
    assert run.code == 0 and not re.search(r"^(score|offline) +step", run.output, re.MULTILINE)
    assert_same_run(run, whole)


def test_without_either_it_goes_on_from_offline_pt_and_without_that_says_so(copied, inside, tmp_path, whole):
    for name in ("last.pt", "previous.pt"):
        (copied / name).unlink(missing_ok=True)
    run = inside(f"--resume {copied}", tmp_path)
    assert run.code == 0
    assert_same_run(run, whole)
    for checkpoint in copied.glob("*.pt"):
        checkpoint.unlink()
    code = inside(f"--resume {copied}", tmp_path).code
    assert is_sentence(code) and "holds no checkpoint" in code


def test_a_damaged_online_buffer_is_one_sentence(copied, inside, tmp_path):
    content = bytearray((copied / "online_buffer.bin").read_bytes())
    content[1000] ^= 1
    (copied / "online_buffer.bin").write_bytes(content)
    code = inside(f"--resume {copied}", tmp_path).code
    assert is_sentence(code) and "online_buffer.bin" in code


# === Every switch ==========================================================================================

SWITCHES = {
    "adam, 2 updates a step, own data only": "--offline-optimizer adam --online-optimizer adam "
    "--utd-ratio 2 --offline-fraction 0",
    "policy, warmup, old data only, ensemble": "--score-actions policy --offline-fraction 1 "
    "--warmup-steps 30 --num-critics 3 --critic-activation relu",
    "no score, share by size": "--kappa 0 --offline-fraction -1",
    "ten critics, layer norm, two drawn": "--num-critics 10 --critic-layer-norm --target-critics 2 "
    "--alpha-psi temperature --target-entropy -0.5",
    "shuffled scores, part of the data": "--score-control shuffled --best-episodes 0.5 --data-fraction 0.5",
}


@pytest.mark.parametrize("switches", SWITCHES)
def test_switches(inside, tmp_path, switches):
    run = inside(TINY + SWITCHES[switches], tmp_path)
    assert run.code == 0
    state, before = run.state("final.pt")["agent"], run.state("offline.pt")["agent"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not torch.equal(state["log_alpha"], before["log_alpha"]), "no update was made online"
    assert ("score    step" in run.output) == ("--kappa 0" not in SWITCHES[switches])
    assert (
        int(run.rows()[-1]["updates"])
        == {"no": 8, "adam": 16, "policy": 10, "ten": 24, "shuffled": 24}[switches.split()[0].strip(",")]
    )


def test_diagnostics_are_what_the_readme_says(smac, whole):
    state, row = whole.state("offline.pt"), [r for r in whole.rows() if r["phase"] == "offline"][-1]
    data = smac.load_dataset("smac/pendulum/medium-replay-v0")
    agent = smac.Agent(3, 1, (16, 16), 2, "silu")
    agent.load_state_dict(state["agent"])
    score_net = smac.ScoreNet(3, 1, (16, 16), 5, 0.1)
    score_net.load_state_dict(state["score_net"])
    score_scale = smac.MLP(1, [3, 64, 1], "silu")
    score_scale.load_state_dict(state["extras"]["score_scale"])
    rows = np.flatnonzero(smac.held_out(data))
    assert len(rows) == 4 * 200  # episodes 10, 30, 50 and 70 of 76
    rows = rows[np.linspace(0, len(rows) - 1, 2_000).astype(int)]
    columns = data.columns["observations"], data.columns["actions"], smac.outcomes(data, 0.99)
    s, a, w = (torch.as_tensor(x[rows], dtype=torch.float32) for x in columns)
    a.requires_grad_(True)
    q = agent.critic(s, a).mean(dim=0)
    (grad_q,) = torch.autograd.grad(q.sum(), a)
    score = score_net.score(s, a, w, torch.zeros(len(s), dtype=torch.long))
    expected = dict(q_dataset=q.mean(), grad_q_dataset=grad_q.abs().mean(), alpha=agent.log_alpha.exp())
    expected["cosine_dataset"] = (grad_q * score).sign().mean()  # of one dimension
    expected["alpha_psi"] = torch.log1p(score_scale(s).exp()).mean()
    start = torch.as_tensor(
        np.stack([smac.make_env("Pendulum-v1").reset(seed=1000 + i)[0] for i in range(2)])
    )
    expected["q_start"] = agent.critic(start, agent.actor.mode(start)).mean()
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value.item(), rel=1e-4), name
    log_prob, policys = [], []
    torch.manual_seed(0)
    for _ in range(5):
        actions, log_probs = agent.actor.sample(s)
        log_prob.append(log_probs.mean().item())
        policys.append(agent.critic(s, actions).mean().item())
    assert float(row["entropy"]) == pytest.approx(-np.mean(log_prob), abs=0.05)
    assert float(row["q_policy"]) == pytest.approx(np.mean(policys), rel=0.02)
    discounted = []
    for i in range(2):
        env, total, over, t = smac.make_env("Pendulum-v1"), 0.0, False, 0
        observation, _ = env.reset(seed=1000 + i)
        while not over:
            with torch.no_grad():
                action = agent.actor.mode(torch.as_tensor(observation)[None])[0].numpy()
            observation, reward, _, over, _ = env.step(action)
            total, t = total + 0.99**t * reward, t + 1
        discounted.append(total)
    assert float(row["discounted_return"]) == pytest.approx(np.mean(discounted), rel=1e-4)


OUT_OF_RANGE = {
    "--eval-every 0": "at least 1", "--batch-size 0": "at least 1", "--eval-episodes -1": "at least 1",
    "--hidden-sizes 16 0": "at least 1", "--offline-steps -5": "at least 0", "--kappa -1": "at least 0",
    "--actor-lr nan": "at least 0", "--gamma 1.5": "from 0 to 1", "--tau -0.1": "from 0 to 1",
    "--best-episodes 1.5": "from 0 to 1", "--data-fraction -0.1": "from 0 to 1", "--score-sigma 1": "0.9",
    "--offline-fraction 1.2": "-1 or from 0 to 1", "--offline-fraction -0.5": "-1 or from 0 to 1",
    "--target-critics 3": "2 critics", "--batch-size 15201": "15200", "--num-critics 0": "at least 1",
}  # fmt: skip


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_one_sentence_with_the_range(inside, tmp_path, flag):
    code = inside(TINY + flag, tmp_path).code
    name, *_, value = flag.split()
    assert is_sentence(code) and re.search(rf"{name} {value}(\.0)? is ", code) and OUT_OF_RANGE[flag] in code
    assert not (tmp_path / "runs").exists()


def test_an_unknown_flag_is_named(inside, tmp_path, capfd):
    assert inside(TINY + "--no-such-flag 3", tmp_path).code == 2


@pytest.mark.parametrize("env_id", ["../../outside", "/etc", "a/../../b"])
def test_ids_cannot_leave_the_run_folder(smac, inside, tmp_path, env_id):
    assert "/" not in smac.run_name(smac.Args(env_id=env_id)).removeprefix("runs/")
    assert is_sentence(inside(f"--env-id {env_id}", tmp_path / "inner").code)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def test_a_tied_alpha_psi_is_shown_as_the_temperature(inside, tmp_path):
    row = inside(TINY + "--alpha-psi temperature --online-steps 0", tmp_path).rows()[-1]
    assert row["alpha_psi"] == row["alpha"] != "nan"


def test_evaluations_leave_training_as_it_is(inside, tmp_path):
    often, seldom = (inside(TINY + f"--eval-every {n}", tmp_path / str(n)) for n in (3, 1000))
    assert len(often.rows()) > len(seldom.rows())
    for name in ("offline.pt", "final.pt"):
        assert_equal(often.state(name)["agent"], seldom.state(name)["agent"], name)


def test_selecting_episodes_keeps_the_best_whole(smac):
    lengths = np.array([3, 1, 4, 2])
    rewards = np.repeat([1.0, 9.0, 2.0, 1.5], lengths)  # returns 3, 9, 8, 3
    columns = dict(rewards=rewards, observations=np.arange(10.0)[:, None])
    data = smac.Dataset(columns, np.cumsum(lengths), {}, "")
    assert smac.select_episodes(data, 1.0, 1.0, 1) is data
    best = smac.select_episodes(data, 0.5, 1.0, 1)
    assert best.ends.tolist() == [1, 5] and best.returns().tolist() == [9, 8]
    assert best.columns["observations"][:, 0].tolist() == [3, 4, 5, 6, 7]
    halves = [smac.select_episodes(data, 1.0, 0.5, seed) for seed in range(8)]
    assert all(len(half.ends) == 2 for half in halves)
    assert len({tuple(half.returns()) for half in halves}) > 2  # at random, by the seed
    again = smac.select_episodes(data, 1.0, 0.5, 3)
    assert again.columns["rewards"].tolist() == halves[3].columns["rewards"].tolist()
    assert len(smac.select_episodes(data, 0.01, 0.01, 1).ends) == 1


def test_an_infinite_return_is_one_sentence(inside, tmp_path):
    code = inside(TINY + "--gamma 1", tmp_path).code  # Pendulum's episodes are all cut by time
    assert is_sentence(code) and "--gamma 1 " in code


def test_without_online_steps_it_ends_after_offline(inside, tmp_path):
    run = inside(TINY + "--online-steps 0", tmp_path)
    assert run.code == 0 and (run.directory / "learning_curve.png").exists()
    assert {row["phase"] for row in run.rows()} == {"offline"}
    assert (run.directory / "offline.pt").exists() and not (run.directory / "final.pt").exists()


@pytest.mark.parametrize(
    "flags, waits", [("--offline-fraction 0", 32), ("", 16), ("--warmup-steps 20 --offline-fraction 1", 20)]
)
def test_the_first_online_update_waits_for_its_data(inside, tmp_path, flags, waits):
    """No batch holds more online rows than there are transitions; warmup holds updates back too."""
    runs = [inside(TINY + f"{flags} --online-steps {waits + i}", tmp_path / str(i)) for i in range(2)]
    agents = [run.state("final.pt")["agent"] for run in runs]
    assert_equal(agents[0], runs[0].state("offline.pt")["agent"])
    assert not torch.equal(agents[1]["log_alpha"], agents[0]["log_alpha"])
    assert [int(run.rows()[-1]["updates"]) for run in runs] == [0, 1]
    note = f"note: no update in {waits} steps: the first waits for {waits}\n"
    assert note in runs[0].output and "note: no update" not in runs[1].output


def test_evaluations_are_dense_for_the_first_2000_updates(inside, tmp_path):
    words = (
        TINY + "--hidden-sizes 4 --batch-size 2 --online-optimizer adam --utd-ratio 200 --offline-fraction 1 "
    )
    run = inside(words + "--online-steps 16 --eval-every 5 --handover-eval-every 2", tmp_path)
    assert [int(r["step"]) for r in run.rows() if r["phase"] == "online"] == [0, 2, 4, 5, 6, 8, 10, 15, 16]


@pytest.mark.parametrize("flags", ["--actor-lr 1e30 --critic-lr 1e30", "--kappa 0 --actor-lr 1e30"])
def test_a_run_that_diverges_stops_with_one_sentence(inside, tmp_path, flags):
    run = inside(TINY + flags, tmp_path)
    assert is_sentence(run.code) and "learning rates" in run.code
    assert not (run.directory / "offline.pt").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "last.pt", "offline.pt", "learning_curve.png"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(smac, inside, monkeypatch, tmp_path, name):
    flags = TINY + "--checkpoint-every 0 "  # a last.pt behind every step of the first two phases
    write, seen = smac.write_atomically, []

    def full(path, writer):
        seen.append(path.name)
        if path.name == name and seen.count(name) > (name in ("metrics.csv", "last.pt")):
            raise OSError(28, "No space left on device", str(path))
        write(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(smac, "write_atomically", full)
        run = inside(flags, tmp_path)
    assert is_sentence(run.code) and "No space left" in run.code and str(run.directory.name) in run.code
    assert smac.load_checkpoint(run.directory / "last.pt")["step"] > 0
    assert not list(run.directory.glob(".*")), "no half-written file stays behind"
    assert inside(f"--resume {run.directory}", tmp_path).code == 0


def test_a_run_folder_of_any_name_can_be_resumed(inside, tmp_path):
    run = inside(TINY + "--checkpoint-every 0", tmp_path)
    renamed = run.directory.rename(tmp_path / "runs" / "an_id")
    assert inside(f"--resume={renamed}", tmp_path).code == 0


# === On its own ============================================================================================


@pytest.mark.parametrize("script, words", [("smac", "--help"), ("recorder", "record --help")])
def test_help_explains_every_setting(request, monkeypatch, capsys, script, words):
    module = request.getfixturevalue(script)
    arguments = module.Args if script == "smac" else module.RecordArgs
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [module.__file__, *words.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(module.__file__, run_name="__main__")
    assert ended.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    texts = field_texts(Path(module.__file__), arguments.__name__)
    for field in fields(arguments):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert texts[field.name] in shown, field.name


def field_texts(path: Path, name: str) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    body = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name).body
    pairs = [(a, b) for a, b in pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return {field.target.id: " ".join(text.value.value.split()) for field, text in pairs}


@pytest.mark.parametrize("flag", ["--env-id ", "--env-id=", "--env_id "])
def test_help_shows_the_defaults_of_the_task(smac, monkeypatch, capsys, flag):
    monkeypatch.setenv("COLUMNS", "200")
    words = f"{flag}pendulum-medium-replay --help".split()
    monkeypatch.setattr(sys, "argv", [smac.__file__, *words])
    with pytest.raises(SystemExit):
        smac.parse_args()
    shown = capsys.readouterr().out
    for name, value in smac.TASK_DEFAULTS["pendulum-medium-replay"].items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert re.search(rf"--{name.replace('_', '-')} .*\(default: {text}\)", shown, re.DOTALL), name


def test_flags_win_over_the_tasks_defaults(smac, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [smac.__file__, *"--env-id pendulum-medium-replay --batch-size 7".split()]
    )
    args, task = smac.parse_args(), smac.TASK_DEFAULTS["pendulum-medium-replay"]
    assert args.batch_size == 7 and args.hidden_sizes == task["hidden_sizes"]


def test_copied_alone_it_says_how_to_get_the_data(smac, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    script = shutil.copy(smac.__file__, tmp_path)
    command = [sys.executable, script, "--env-id", "pendulum-medium-replay"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ") and "clone" in result.stderr and "--download" in result.stderr


def requirements() -> set[str]:
    path = ROOT / "requirements.txt"
    if not path.exists():
        pytest.skip("there is no requirements.txt to compare with")
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {line for line in lines if line}


def test_the_inline_dependencies_are_those_of_requirements_txt(smac):
    text = Path(smac.__file__).read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)[1]
    pins = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))["dependencies"]
    assert all("==" in pin for pin in pins)
    assert {pin for pin in requirements() if pin.split("==")[0] not in ("pytest", "ruff", "pycco")} == set(
        pins
    )


@pytest.mark.parametrize("script", ["smac", "recorder"])
def test_scripts_stand_alone(request, script):
    path = Path(request.getfixturevalue(script).__file__)
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    siblings = {other.stem for other in ROOT.glob("*.py")} | {path.stem}
    assert not {name.split(".")[0] for name in names} & (siblings | {"gymnasium_robotics"})


def test_no_line_is_longer_than_110_characters(smac):
    for path in (Path(smac.__file__), *ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        assert max(map(len, path.read_text().splitlines())) <= 110, path.name


# === Its numbers ===========================================================================================


def summary(smac, offline, online, eval_every=1000, mean=0.0):
    """summarize() of an offline evaluation and online ones (step = updates), returns equal scores."""
    row = lambda phase, step, returns: dict(
        phase=phase, step=step, updates=step, return_mean=np.mean(returns), score=np.mean(returns),
        **{f"return_{i}": r for i, r in enumerate(returns)})  # fmt: skip
    online = {0: offline} | online
    rows = [row("online", step, returns) for step, returns in online.items()]
    columns = dict(rewards=np.float32([mean]))
    data = smac.Dataset(columns, np.array([1]), dict(ref_min_score=0.0, ref_max_score=100.0), "")
    return smac.summarize(rows, data, eval_every)


def test_summary_by_hand(smac):
    scores = {0: 50, 500: 45, 1000: 40, 1500: 30, 2000: 20, 2500: 0, 3000: 120}
    online = {step: [score, score] for step, score in scores.items()}
    s = summary(smac, [50, 50], online)
    assert s["drop"] == pytest.approx(50 - (40 + 30 + 20) / 3)  # 2500 is behind the window of 2,000 updates
    assert s["regret"] == pytest.approx(
        (0.6 + 0.8 + 0.0) / 3
    )  # steps 1000, 2000, 3000; a score is cut at 100
    assert (s["offline"], s["final"], s["smooth"]) == (50, 120, False)


def test_the_window_grows_with_the_updates(smac):
    scores = {1000: 50, 2000: 50, 2500: 20, 3000: 20, 3500: 20, 4000: 0, 17500: 60}  # 20% of 17,500: 3,500
    online = {step: [score, score] for step, score in scores.items()}
    assert summary(smac, [50, 50], online)["drop"] == pytest.approx(30)


def test_a_single_low_evaluation_is_a_third_of_a_drop(smac):
    online = {500: [50, 50], 1000: [20, 20], 1500: [50, 50], 2000: [50, 50]}
    assert summary(smac, [50, 50], online)["drop"] == pytest.approx(10)


@pytest.mark.parametrize(
    "online, drop", [({40: [44, 40]}, 8), ({20: [50, 50], 40: [30, 30]}, 10), ({0: [50, 50]}, 0)]
)
def test_fewer_than_three_evaluations_are_averaged(smac, online, drop):
    s = summary(smac, [50, 50], online)
    assert s["drop"] == pytest.approx(drop) and np.isnan(s["regret"])


def test_a_rise_is_a_negative_drop(smac):
    assert summary(smac, [50, 50], {500: [60, 60], 1000: [60, 60], 1500: [70, 70]})["drop"] < 0


@pytest.mark.parametrize(
    "online, mean, smooth",
    [
        ([46, 45, 45, 50], 40, True),  # a drop of 9.3%
        ([44, 44, 44, 50], 40, False),  # a drop of 12%
        ([46, 45, 45, 50], 51, False),  # offline below the mean of the data
        ([46, 45, 45, 49], 40, False),  # the end below offline
        ([46, 45, 45, 50], 50, True),  # every episode of the data is as good: there is no better
    ],
)
def test_smooth_needs_all_three_conditions(smac, online, mean, smooth):
    evaluations = {500 * (i + 1): [score, score] for i, score in enumerate(online)}
    assert summary(smac, [50, 50], evaluations, mean=mean)["smooth"] is smooth


@pytest.mark.parametrize("spread, smooth", [(0.0, False), (9.0, True), (30.0, False)])
def test_a_drop_within_two_standard_errors_is_smooth_unless_they_are_wide(smac, spread, smooth):
    """A drop of 6 of 50 points over four paired episodes: two standard errors are 0, 9 and 30 points."""
    deviations = spread / 2 * np.sqrt(3) * np.array([1, -1, 1, -1])
    evaluations = {500 * (i + 1): list(44 + deviations) for i in range(3)} | {2000: [50] * 4}
    assert summary(smac, [50] * 4, evaluations)["smooth"] is smooth


class Walk(gym.Env):
    """Starts at random, ends after 3 to 9 steps by termination or truncation; reward depends on all."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        self.left = self.np_random.integers(3, 10)
        return np.float32(self.place), {}

    def step(self, action):
        self.place, self.left = 0.5 * self.place + action, self.left - 1
        assert self.left >= 0, "stepped behind the end of the episode"
        over = self.left == 0
        return np.float32(self.place), float(self.place.sum()), over and self.place[0] > 0, over, {}


def test_evaluation_equals_a_plain_loop(smac):
    torch.manual_seed(0)
    actor, envs = smac.Actor(2, 1, (8, 8)), [Walk() for _ in range(8)]
    returns = returns_of(smac, actor, envs, "cpu")
    plain = np.zeros(8)
    for i in range(8):
        env, over = Walk(), False
        observation, _ = env.reset(seed=1000 + i)
        while not over:
            with torch.no_grad():
                action = actor.mode(torch.as_tensor(observation)[None])[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            plain[i], over = plain[i] + reward, terminated or truncated
    np.testing.assert_allclose(returns, plain, rtol=1e-5)
    assert len(set(returns)) == 8


def test_evaluation_repeats_itself_and_leaves_the_random_state(smac):
    torch.manual_seed(0)
    actor, envs = smac.Actor(2, 1, (8, 8)), [Walk() for _ in range(3)]
    before = torch.get_rng_state()
    np.testing.assert_array_equal(returns_of(smac, actor, envs, "cpu"), returns_of(smac, actor, envs, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_with_broken_actions_is_one_sentence(smac):
    actor = smac.Actor(2, 1, (8, 8))
    torch.nn.init.constant_(actor.net.biases[-1], torch.nan)
    with pytest.raises(SystemExit) as ended:
        returns_of(smac, actor, [Walk()], "cpu")
    assert is_sentence(ended.value.code)


def test_a_failed_write_leaves_the_old_file(smac, tmp_path):
    path = tmp_path / "file"
    smac.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        smac.write_atomically(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
