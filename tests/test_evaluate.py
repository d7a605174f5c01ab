"""Many episodes with a checkpoint's policy: the numbers, the film, the refusals."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

PENDULUM, HOPPER = (ROOT / "results" / "checkpoints" / f"{task}-medium-replay_smac_final.pt"
                    for task in ("pendulum", "hopper"))  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load("evaluate", ROOT / "evaluate.py")


@pytest.fixture
def evaluate(script, monkeypatch, capsys):
    """Runs a command in this process: its output and the two rows of its table."""

    def command(words: str) -> tuple[str, dict[str, list[float]]]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
        script.main()
        output = capsys.readouterr().out
        rows = re.findall(r"^(return|normalised score) +(.*)$", output, re.M)
        return output, {name: [float(x) for x in numbers.split()] for name, numbers in rows}

    return command


def test_the_first_episodes_are_the_runs_own(evaluate):
    last = torch.load(PENDULUM, weights_only=True)["rows"][-1]
    output, table = evaluate(f"{PENDULUM} --episodes 20")
    returns = np.array([last[f"return_{i}"] for i in range(20)])
    deviation = returns.std(ddof=1)
    expected = [returns.mean(), deviation / 20**0.5, deviation, returns.min(), returns.max()]
    np.testing.assert_allclose(table["return"], expected, atol=0.02)
    assert table["normalised score"][0] == pytest.approx(last["score"], abs=0.02)
    assert "20 episodes of Pendulum-v1, deterministic" in output


def test_seeds_go_on_and_actions_are_drawn(script, evaluate):
    played, play = [], script.play
    state, net = script.load_policy(PENDULUM)
    task = script.load_task(state["dataset_id"])
    envs = [task.make_env() for _ in range(20)]
    act = lambda observations: torch.tanh(script.gaussian(net, observations)[0])
    for first, count in ((7, 20), (27, 3)):
        played += play(envs[:count], act, first)
    _, table = evaluate(f"{PENDULUM} --episodes 23 --seed 7")
    np.testing.assert_allclose(table["return"][::4], [np.mean(played), max(played)], atol=0.01)
    drawn, again = (evaluate(f"{PENDULUM} --episodes 23 --seed 7 --stochastic")[1] for _ in range(2))
    assert drawn == again != table


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_film_of_the_first_episode(script, evaluate, monkeypatch, tmp_path, suffix):
    if suffix == "mp4":
        pytest.importorskip("imageio_ffmpeg")

    def make_env(task, render_mode=None):  # no renderer is needed
        env, random = task.dataset.recover_environment(eval_env=True), np.random.default_rng(0)
        env.render = lambda: random.integers(0, 255, (64, 64, 3), np.uint8)
        return env

    monkeypatch.setattr(script.Task, "make_env", make_env)
    path = tmp_path / f"film.{suffix}"
    output, _ = evaluate(f"{PENDULUM} --episodes 1 --video {path}")
    assert len(script.imageio.imread(path)) == 200 and f"video: {path}" in output


def test_what_goes_wrong_is_one_sentence(script, evaluate, monkeypatch, tmp_path):
    def no_renderer(*arguments):
        raise RuntimeError("no display\nhere")

    monkeypatch.setattr(script, "film", no_renderer)
    for words, sentence in {
        "missing.pt": "missing.pt can't be read as a checkpoint",
        f"{PENDULUM} --episodes 0": "at least 1",
        f"{PENDULUM} --video film.avi": "has to end in .mp4 or .gif",
        f"{HOPPER} --episodes 1 --video {tmp_path}/film.gif": "no film could be made (no display here)",
    }.items():
        with pytest.raises(SystemExit) as ended:
            evaluate(words)
        assert str(ended.value).startswith("error: ") and sentence in str(ended.value), ended.value
        assert "\n" not in str(ended.value)
