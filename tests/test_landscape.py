"""Lines, planes and ways through parameter space: what is evaluated, kept, drawn and refused."""

import ast
import contextlib
import csv
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, returns_of
from test_finetune import TINY, inside
from test_pipeline import is_sentence, own_cache, requirements  # noqa: F401

FEW = "--episodes 2 --workers 1 "
SHIPPED = ROOT / "results" / "checkpoints"


@pytest.fixture(scope="session")
def landscape():
    return load("reward_landscape", ROOT / "reward_landscape.py")


@pytest.fixture(scope="module")
def run(smac, tmp_path_factory):
    """A tiny run's directory, with snapshots."""
    run = inside(smac, TINY + "--snapshot-every 6", tmp_path_factory.mktemp("run"))
    assert run.code == 0, run.output
    return run.directory


@pytest.fixture(scope="module")
def other(smac, tmp_path_factory):
    """offline.pt of another seed."""
    words = TINY.replace("--seed 3", "--seed 4").replace("--online-steps 24", "--online-steps 0")
    return inside(smac, words, tmp_path_factory.mktemp("other")).directory / "offline.pt"


@pytest.fixture
def draw(landscape, tmp_path, monkeypatch):
    """Runs a command in this process: exit code, output, and the rows of the csv it left in `out`."""
    monkeypatch.chdir(tmp_path)

    def command(words: str, few=FEW) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["reward_landscape.py", *f"{words} {few}--out out".split()])
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                landscape.main()
                code = 0
            except SystemExit as ended:
                code = ended.code
        path, rows = tmp_path / "out" / f"{words.split()[0]}.csv", []
        if code == 0:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        return SimpleNamespace(code=code, output=output.getvalue(), rows=rows)

    return command


@pytest.fixture
def counted(landscape, monkeypatch):
    """Policies that were evaluated, in their order."""
    seen, evaluate = [], landscape.evaluate
    monkeypatch.setattr(landscape, "evaluate", lambda actor, *of: seen.append(actor) or evaluate(actor, *of))
    return seen


def returns(row: dict) -> list[float]:
    return [float(value) for name, value in row.items() if re.fullmatch(r"return_\d+", name) and value]


def edited(landscape, path, new, edit) -> str:
    """A checkpoint with its content changed and its checksum right; edit(state)."""
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(landscape.sealed(state), new)
    return str(new)


def shuffled(landscape, path, new) -> str:
    """A checkpoint whose actor computes the same with its hidden units in another order."""

    def edit(state):
        weights = {name: state["agent"][f"actor.net.{name}"] for name in
                   ("weights.0", "weights.1", "weights.2", "biases.0", "biases.1")}  # fmt: skip
        for layer in (0, 1):
            order = torch.from_numpy(np.random.default_rng(layer).permutation(weights["biases.0"].shape[-1]))
            for name in (f"weights.{layer}", f"biases.{layer}"):
                weights[name].copy_(weights[name][..., order].clone())
            weights[f"weights.{layer + 1}"].copy_(weights[f"weights.{layer + 1}"][:, order].clone())

    return edited(landscape, path, new, edit)


# === Lines =================================================================================================


def test_the_ends_score_what_the_run_measured_to_the_last_bit(landscape, smac, draw, run):
    done = draw(f"line {run}/offline.pt {run}/final.pt --points 5")
    assert done.code == 0, done.code
    assert [float(row["x"]) for row in done.rows] == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    states = [smac.load_checkpoint(run / f"{name}.pt") for name in ("offline", "final")]
    for row, state in zip((done.rows[1], done.rows[5]), states):
        last = state["rows"][-1]
        assert returns(row) == [last["return_0"], last["return_1"]]
        assert float(row["return_mean"]) == pytest.approx(last["return_mean"], rel=1e-12)
        assert float(row["score_mean"]) == pytest.approx(last["score"], rel=1e-9)
    actors = [smac.restore(state)[0].actor for state in states]
    with torch.no_grad():
        for a, b in zip(actors[0].parameters(), actors[1].parameters()):
            a.copy_(0.25 * a.double() + 0.75 * b.double())
    envs = [smac.make_env("Pendulum-v1") for _ in range(2)]
    assert returns(done.rows[4]) == returns_of(smac, actors[0], envs, "cpu").tolist()
    label, checksum = done.rows[0]["label"], done.rows[0]["online_checksum"]
    assert (label, checksum) == ("SMAC, then SAC", str(states[1]["checksum"]))


@pytest.mark.parametrize("task", ["pendulum", "hopper"])
def test_a_shipped_checkpoint_scores_what_the_script_measures(landscape, smac, draw, task):
    path = SHIPPED / f"{task}-medium-replay_smac_final.pt"
    done = draw(f"line {path} {path} --points 2 --beyond 0")
    state = smac.load_checkpoint(path)
    envs = [smac.make_env(state["env"]) for _ in range(2)]
    expected = returns_of(smac, smac.restore(state)[0].actor, envs, "cpu").tolist()
    assert returns(done.rows[0]) == expected


def test_the_line_through_two_copies_is_flat(draw, run, counted, tmp_path):
    shutil.copy(run / "offline.pt", tmp_path / "copy.pt")
    done = draw(f"line {run}/offline.pt copy.pt --points 4")
    assert len(done.rows) == 6 and len({tuple(returns(row)) for row in done.rows}) == 1
    assert {(row["depth"], row["depth_error"]) for row in done.rows} == {("0.0", "0.0")}
    assert len(counted) == 1  # what is the same is played once


def test_the_depth_and_its_error_by_hand(landscape):
    x = np.array([-0.5, 0, 0.5, 1, 1.5])
    # means -9, 10, 4, 8, -9: the path is from x = 0 to 1, its lower end 8, its lowest 4
    scores = np.array([[-9, -9, -9], [10, 10, 10], [2, 4, 6], [8, 7, 9], [-9, -9, -9]])
    depth, error, low = landscape.valley(x, scores)
    # differences of the episodes 6, 3, 3: mean 4, standard deviation sqrt 3, error sqrt 3 / sqrt 3
    assert (depth, low) == (4, 2) and error == pytest.approx(1)
    assert landscape.valley(x, scores[::-1])[::2] == (4, 2)  # the other end is lower
    rising = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]])
    assert landscape.valley(x, rising) == (0, 0, 1)
    assert math.isnan(landscape.valley(x, scores[:, :1])[1])


def test_pairs_of_one_label_make_one_curve(landscape, draw, run, other, monkeypatch):
    dips = np.tile([0, 0, 1, 1, 1, 1, 0, 0], 3)[:, None]  # between the ends of three pairs
    made_up = np.random.default_rng(0).normal(-1000 * dips, 100, (24, 2))
    monkeypatch.setattr(landscape, "evaluate_all", lambda policies, args: made_up)
    pairs = f"{run}/offline.pt {run}/final.pt {run}/final.pt {other} {run}/offline.pt {other}"
    done = draw(f"line {pairs} --points 6 --labels one other one")
    assert [row["label"] for row in done.rows] == 16 * ["one"] + 8 * ["other"]
    found = {(row["label"], row["online_phase"]): float(row["depth"]) for row in done.rows}
    for (label, phase), depth in found.items():
        rows = [row for row in done.rows if (row["label"], row["online_phase"]) == (label, phase)]
        path = [float(row["score_mean"]) for row in rows if 0 <= float(row["x"]) <= 1]
        assert depth == pytest.approx(min(path[0], path[-1]) - min(path), abs=1e-9) and depth > 1
    depths = [found["one", "online"], found["one", "offline"]]
    error = abs(depths[0] - depths[1]) / 2  # of a mean of two
    assert f"one, 2 pairs: valley depth {sum(depths) / 2:.1f} ± {error:.1f}\n" in done.output
    assert "other, seed 4: ends " in done.output and "other, 1 pairs" not in done.output


def test_algorithms_are_the_default_labels(draw, run, tmp_path):
    td3 = load("td3_finetune", ROOT / "td3_finetune.py")
    words = f"--checkpoint {run}/offline.pt --online-steps 24 --eval-every 12 --handover-eval-every 12"
    online = inside(td3, words, tmp_path / "td3").directory / "final.pt"
    done = draw(f"line {run}/offline.pt {run}/final.pt {run}/offline.pt {online} --points 2 --beyond 0")
    assert [row["label"] for row in done.rows] == 2 * ["SMAC, then SAC"] + 2 * ["SMAC, then TD3"]


def test_without_two_evaluations_returns_are_drawn(landscape):
    row = lambda mean, score: dict(return_mean=mean, score=score)
    policy = lambda *rows: landscape.Policy("", dict(rows=rows), None)
    assert landscape.score_scale([policy(row(-100, 10), row(0, 20), row(100, 30))]) == (
        0.1, 20, "normalised score")  # fmt: skip
    for unknown in ([policy()], [policy(row(5, 1))], [policy(row(0, 0), row(1, 1), row(2, 5))]):
        assert landscape.score_scale(unknown) == (1, 0, "return")


# === Matching hidden units =================================================================================


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_assignment_is_the_best_of_all(landscape, n):
    for seed in range(20):
        value = np.random.default_rng(seed).standard_normal((n, n))
        if seed % 2:
            value = value.round()  # ties
        best = max(sum(value[range(n), order]) for order in itertools.permutations(range(n)))
        order = landscape.assignment(value)
        assert sorted(order) == [*range(n)]
        assert value[range(n), order].sum() == pytest.approx(best)


def test_the_assignment_of_many_units_finds_the_permutation(landscape):
    rows = np.random.default_rng(0).standard_normal((200, 5))
    order = np.random.default_rng(1).permutation(200)
    value = rows @ rows[order].T  # row order[k] stands in column k
    assert np.array_equal(order[landscape.assignment(value)], range(200))


def test_permuting_hidden_units_changes_nothing(landscape):
    torch.manual_seed(0)
    actor, s = landscape.Actor(3, 2, (16, 12)).requires_grad_(False), torch.randn(7, 3)
    for layer, width in ((0, 16), (1, 12)):
        moved = landscape.permuted(actor, layer, np.roll(np.arange(width), 5))
        torch.testing.assert_close(moved.mode(s), actor.mode(s))
        differ = [
            name for name, x in moved.state_dict().items() if not torch.equal(x, actor.state_dict()[name])
        ]
        assert differ == [f"net.weights.{layer}", f"net.weights.{layer + 1}", f"net.biases.{layer}"]


@pytest.mark.parametrize("task", ["hopper", "pendulum"])  # Hopper's needs the start from the input on
def test_matching_undoes_a_permutation(landscape, task):
    one = landscape.read_policy(SHIPPED / f"{task}-medium-replay_smac_final.pt")
    moved, width = one.actor, one.state["hidden_sizes"][0]
    for layer in (0, 1):
        moved = landscape.permuted(moved, layer, np.random.default_rng(layer).permutation(width))
    assert np.linalg.norm(one._replace(actor=moved).theta() - one.theta()) > 10
    back = one._replace(actor=landscape.matched(one.actor, moved))
    assert np.array_equal(back.theta(), one.theta())


def test_matching_only_brings_nearer(landscape):
    torch.manual_seed(0)
    one, two = (landscape.Actor(3, 2, (32, 24)).requires_grad_(False) for _ in range(2))
    theta = lambda actor: landscape.Policy("", {}, actor).theta()
    near = landscape.matched(one, two)
    assert np.linalg.norm(theta(near) - theta(one)) < 0.95 * np.linalg.norm(theta(two) - theta(one))
    s = torch.randn(7, 3)
    torch.testing.assert_close(near.mode(s), two.mode(s))
    step = landscape.Policy("", {}, one).at(theta(one) + 1e-3 * theta(two)).actor  # a few updates later
    assert np.array_equal(theta(landscape.matched(one, step)), theta(step))


def test_after_aligning_the_line_to_a_permuted_copy_is_flat(landscape, draw, run, tmp_path):
    path = shuffled(landscape, run / "offline.pt", tmp_path / "shuffled.pt")
    line = f"line {run}/offline.pt {path} --points 4 --beyond 0"
    assert len({tuple(returns(row)) for row in draw(line).rows}) >= 3  # a false valley
    done = draw(line + " --align")
    assert len({tuple(returns(row)) for row in done.rows}) == 1
    assert "distance 0," in done.output and {row["aligned"] for row in done.rows} == {"True"}
    both = f"plane {run}/offline.pt {run}/final.pt {path} --grid 2 --align"
    assert is_sentence(draw(both).code)  # C is A then, which makes no plane


# === Planes ================================================================================================


def test_the_axes_are_orthonormal_and_hold_all_three(landscape):
    a, b, c = np.random.default_rng(0).standard_normal((3, 500))
    axes = landscape.plane_axes(a, b, b + 1e-3 * c)  # nearly one direction
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    for theta in (a, b, b + 1e-3 * c):
        np.testing.assert_allclose(a + (axes @ (theta - a)) @ axes, theta, atol=1e-9)
    assert axes[0] @ (b - a) == pytest.approx(np.linalg.norm(b - a)) and axes[1] @ (b - a + c) > 0


def test_the_checkpoints_land_on_their_coordinates(landscape, draw, run, other, counted):
    done = draw(f"plane {run}/offline.pt {run}/final.pt {other} --path {run} --grid 3")
    assert done.code == 0, done.code
    policies = [landscape.read_policy(path) for path in (run / "offline.pt", run / "final.pt", other)]
    a, b, c = (policy.theta() for policy in policies)
    axes = landscape.plane_axes(a, b, c)
    kinds = {
        kind: [row for row in done.rows if row["kind"] == kind] for kind in ("checkpoint", "grid", "path")
    }
    assert [len(rows) for rows in kinds.values()] == [3, 9, 5]
    place = lambda row: np.array([float(row["u"]), float(row["v"])])
    np.testing.assert_allclose([place(row) for row in kinds["checkpoint"]],
                               [(0, 0), (np.linalg.norm(b - a), 0), axes @ (c - a)], atol=1e-9)  # fmt: skip
    for policy, row in zip(policies, kinds["checkpoint"]):
        last = policy.state["rows"][-1]
        assert returns(row) == [last["return_0"], last["return_1"]]
    for row, actor in zip(kinds["grid"], counted[3:]):  # each row is of the policy at its place
        theta = landscape.Policy("", {}, actor).theta()
        np.testing.assert_allclose(theta, a + place(row) @ axes, atol=1e-5)
    low, high = place(kinds["grid"][0]), place(kinds["grid"][-1])
    for row in kinds["checkpoint"] + kinds["path"]:  # all inside, with a margin
        assert (low < place(row)).all() and (place(row) < high).all()
    ends = {(row["phase"], row["step"]): row for row in kinds["path"]}
    assert float(ends["offline", "6"]["off_plane"]) < 1e-9 > float(ends["online", "24"]["off_plane"])
    assert float(ends["online", "12"]["off_plane"]) > 1e-4
    assert f"{run.name}: at most" not in done.output and "C: SMAC (seed 4), offline step 6: " in done.output


def test_two_checkpoints_and_a_random_direction(landscape, draw, run, counted):
    done = draw(f"plane {run}/offline.pt {run}/final.pt --grid 3 --margin 0")
    a, b = (landscape.read_policy(run / f"{name}.pt").theta() for name in ("offline", "final"))
    length = np.linalg.norm(b - a)
    grid = [(float(row["u"]), float(row["v"])) for row in done.rows if row["kind"] == "grid"]
    across = [length * k for k in (0, 0.5, 1)]
    np.testing.assert_allclose(grid, [(u, v - length / 2) for v in across for u in across], atol=1e-9)
    corner = landscape.Policy("", {}, counted[2]).theta() - a  # (0, -|B - A| / 2)
    assert abs(corner @ (b - a)) < 1e-5 and np.linalg.norm(corner) == pytest.approx(length / 2, rel=1e-4)
    first = len(counted)
    draw(f"plane {run}/offline.pt {run}/final.pt --grid 3 --margin 0")
    assert len(counted) == first
    draw(f"plane {run}/offline.pt {run}/final.pt --grid 3 --margin 0 --seed 2")
    assert len(counted) == first + 6  # all but the middle row: the line itself


# === Ways ==================================================================================================


def stand_in() -> ModuleType:
    """scikit-learn as far as it is needed."""

    class TSNE:
        def __init__(self, perplexity, init, random_state):
            self.perplexity, self.random_state = perplexity, random_state

        def fit_transform(self, theta):
            assert self.perplexity < len(theta)
            return np.full((len(theta), 2), float(self.random_state)) + np.arange(len(theta))[:, None]

    module = ModuleType("sklearn.manifold")
    module.TSNE = TSNE
    return module


@pytest.mark.parametrize("installed", [True, False], ids=["scikit-learn", "without scikit-learn"])
def test_the_way_of_a_run(landscape, draw, run, monkeypatch, installed):
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn") if installed else None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", stand_in() if installed else None)
    done = draw(f"path {run} --seed 7")
    assert done.code == 0, done.code
    steps = [(row["phase"], int(row["step"])) for row in done.rows]
    assert steps == [("offline", 6), ("online", 6), ("online", 12), ("online", 18), ("online", 24)]
    assert ("t-SNE is left out" in done.output) != installed
    assert ([row.get("tsne_1") for row in done.rows] == ["7.0", "8.0", "9.0", "10.0", "11.0"]) == installed
    theta = np.array([landscape.read_policy(path).theta() for path in
                      (run / "offline.pt", *sorted(run.glob("snapshots/online*")))])  # fmt: skip
    at = np.array([(float(row["pc_1"]), float(row["pc_2"])) for row in done.rows])
    centred = theta - theta.mean(axis=0)
    np.testing.assert_allclose((at**2).sum(axis=0), np.linalg.eigvalsh(centred @ centred.T)[:-3:-1])
    state = torch.load(run / "final.pt", weights_only=True)
    assert returns(done.rows[-1]) == [state["rows"][-1][f"return_{i}"] for i in range(2)]


def test_principal_components_by_hand(landscape):
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(random.standard_normal((50, 2)))
    plane = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]])  # already along its components
    at, shares = landscape.principal_components(5 + plane @ axes.T)
    np.testing.assert_allclose(np.abs(at), np.abs(plane), atol=1e-12)
    np.testing.assert_allclose(shares, [18 / 20, 2 / 20])


# === What is kept ==========================================================================================

LINE = "line {run}/offline.pt {run}/final.pt --beyond 0 --points 6"


def test_a_second_call_evaluates_nothing_and_draws_the_same(draw, run, counted):
    first = draw(LINE.format(run=run))
    assert len(counted) == 6
    again = draw(LINE.format(run=run))
    assert len(counted) == 6 and again.rows == first.rows and "6 of them are in" in again.output
    draw(LINE.format(run=run) + " --points 11")
    assert len(counted) == 11  # every second one is known
    draw(LINE.format(run=run), few="--episodes 3 --workers 1 ")
    assert len(counted) == 17


def test_a_changed_checkpoint_is_evaluated_anew(landscape, draw, run, counted, tmp_path):
    shutil.copy(run / "final.pt", tmp_path / "b.pt")
    line = f"line {run}/offline.pt b.pt --points 3 --beyond 0"
    first = draw(line)
    edited(landscape, run / "final.pt", tmp_path / "b.pt",
           lambda state: state["agent"]["actor.net.biases.2"].add_(0.1))  # fmt: skip
    again = draw(line)
    assert len(counted) == 5  # the first end is what it was
    assert returns(again.rows[0]) == returns(first.rows[0]) and returns(again.rows[2]) != returns(
        first.rows[2]
    )
    assert first.rows[0]["online_checksum"] != again.rows[0]["online_checksum"]


def test_other_versions_and_statistics_are_other_evaluations(
    landscape, draw, run, counted, monkeypatch, tmp_path
):
    line = f"line {run}/offline.pt {run}/offline.pt --points 2 --beyond 0"
    draw(line)
    monkeypatch.setattr(landscape, "version", lambda name: "another")
    draw(line)
    assert len(counted) == 2
    path = edited(landscape, run / "offline.pt", tmp_path / "b.pt",
                  lambda state: state["agent"]["actor.net.mean"].add_(0.1))  # fmt: skip
    draw(f"line {path} {path} --points 2 --beyond 0")
    assert len(counted) == 3


def test_a_damaged_cache_costs_what_was_damaged(draw, run, counted, tmp_path):
    first = draw(LINE.format(run=run))
    path = tmp_path / "out" / "evaluations.jsonl"
    content = bytearray(path.read_bytes())
    lines = path.read_bytes().splitlines(keepends=True)
    content[len(lines[0]) + 100] ^= 1  # a digit in the second line
    path.write_bytes(content[:-20])  # and the last one was being written
    again = draw(LINE.format(run=run))
    assert "4 of its 6 evaluations are still good" in again.output
    assert len(counted) == 8 and again.rows == first.rows
    assert "damaged" not in draw(LINE.format(run=run)).output and len(counted) == 8
    path.write_bytes(os.urandom(999))
    assert draw(LINE.format(run=run)).rows == first.rows and len(counted) == 14


def test_stopped_and_gone_on_with(landscape, draw, run, counted, monkeypatch):
    evaluate = landscape.evaluate

    def stopping(*of):
        if len(counted) == 4:
            raise KeyboardInterrupt(signal.SIGTERM)
        return evaluate(*of)

    with monkeypatch.context() as patch:
        patch.setattr(landscape, "evaluate", stopping)
        stopped = draw(LINE.format(run=run))
    assert stopped.code == 143 and "stopped; 4 of 6 evaluations are kept" in stopped.output
    assert draw(LINE.format(run=run)).code == 0 and len(counted) == 6


def test_a_stop_does_not_wait_for_what_is_under_way(landscape, draw, run, monkeypatch, tmp_path):
    def slow(*of):
        if (tmp_path / "first").exists():
            time.sleep(100)
        (tmp_path / "first").touch()
        return [np.ones(5), np.ones(5)]

    def stop(*of):
        raise KeyboardInterrupt(signal.SIGINT)

    monkeypatch.setattr(landscape, "evaluate", slow)
    monkeypatch.setattr(landscape, "cache_line", stop)  # at the first result
    began = time.monotonic()
    assert draw(LINE.format(run=run), few="--episodes 2 --workers 2 ").code == 130
    assert time.monotonic() - began < 60


def ended(group: int) -> bool:
    """No process of a group is left, within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_processes_end_together_and_keep_what_they_have(landscape, run, tmp_path, number, code):
    words = f"line {run}/offline.pt {run}/final.pt --points 200 --workers 2 --out out"
    command = [sys.executable, ROOT / "reward_landscape.py", *words.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-2, text=True, start_new_session=True)
    path = tmp_path / "out" / "evaluations.jsonl"
    try:
        while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            time.sleep(0.05)
        # the terminal's Ctrl-C reaches all of them, a kill the one
        (os.killpg if number == "SIGINT" else os.kill)(process.pid, getattr(signal, number))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in output, output
        assert ended(process.pid), "a process is left behind"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert 3 <= len(landscape.read_cache(path)) < 200
    assert ("evaluations are kept" in output) == (code > 0)


def test_two_commands_may_have_played_the_same_policy(landscape, tmp_path, capsys):
    path = tmp_path / "evaluations.jsonl"
    text = landscape.cache_line("a", [1.0, 2.0]) * 2 + landscape.cache_line("b", [3.0])
    path.write_text(text)
    assert landscape.read_cache(path) == {"a": [1.0, 2.0], "b": [3.0]}
    assert path.read_text() == text and capsys.readouterr().out == ""
    path.write_text(text + "half a li")
    assert len(landscape.read_cache(path)) == 2 and "is damaged: 3 of its 4" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 2


def test_two_processes_find_what_one_finds(draw, run):
    one = draw(LINE.format(run=run))
    shutil.rmtree("out")
    two = draw(LINE.format(run=run), few="--episodes 2 --workers 2 ")
    assert two.code == 0 and two.rows == one.rows and "processes: 2" in two.output


@pytest.mark.parametrize("end, sentence", [("killed", "--workers 1"), ("failed", "not finite")])
def test_what_happens_in_a_process_is_told(landscape, draw, run, monkeypatch, end, sentence):
    diverged = lambda *of: landscape.fail("the policy's actions are not finite")
    monkeypatch.setattr(landscape, "evaluate", diverged if end == "failed" else lambda *of: os._exit(9))
    done = draw(LINE.format(run=run), few="--episodes 2 --workers 2 ")
    assert is_sentence(done.code) and sentence in done.code


# === What is refused =======================================================================================


def test_bad_input_is_one_sentence(landscape, draw, run, other, tmp_path):
    good, hopper = f"{run}/offline.pt", SHIPPED / "hopper-medium-replay_smac_offline.pt"
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes((run / "offline.pt").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    state = torch.load(run / "offline.pt", weights_only=True)
    torch.save(state | {"seed": 5}, tmp_path / "unsealed.pt")
    edit = lambda name, change: edited(landscape, run / "offline.pt", tmp_path / f"{name}.pt", change)
    edit("statistics", lambda state: state["agent"]["actor.net.std"].add_(1))
    edit("nameless", lambda state: state.pop("algorithm"))
    edit("sizes", lambda state: state.update(hidden_sizes=(8, 9)))
    edit("nosizes", lambda state: state.update(hidden_sizes="many"))
    edit("nan", lambda state: state["agent"]["actor.net.biases.0"].fill_(math.nan))
    edit("actorless", lambda state: state.pop("agent"))
    edit("gone", lambda state: state.update(env="NoSuchEnv-v0"))
    edit("wrapped", lambda state: state.update(wrappers=["HealthyRewardAtFall"]))
    pendulum = SHIPPED / "pendulum-medium-replay_smac_offline.pt"
    for words, sentence in {
        f"line {good} missing.pt": "there is no checkpoint missing.pt",
        f"line {good} text.pt": "text.pt is not a readable checkpoint",
        f"line {good} cut.pt": "cut.pt is not a readable checkpoint",
        f"line {good} unsealed.pt": "unsealed.pt is damaged",
        f"line {good} statistics.pt": "observation statistics differ",
        f"line {good} nameless.pt": "nameless.pt does not say its algorithm",
        f"line {good} sizes.pt": "the actor of sizes.pt in the checkpoint can't be taken",
        f"line {good} nosizes.pt": "nosizes.pt describes no networks",
        f"line {good} nan.pt": "it is not finite",
        f"line {good} actorless.pt": "the actor of actorless.pt in the checkpoint can't be taken",
        "line gone.pt gone.pt": "the environment NoSuchEnv-v0 can't be made",
        f"line {good} {hopper}": "their env is Pendulum-v1 and Hopper-v5",
        f"line {good} {good} wrapped.pt wrapped.pt": "their wrappers is [] and ['HealthyRewardAtFall']",
        f"line {good} {good} {hopper} {hopper}": "their env is Pendulum-v1 and Hopper-v5",
        f"line {good} {pendulum}": "their hidden_sizes is (8, 8) and (64, 64)",
        f"line {good}": "1 are not pairs",
        f"line {good} {good} {good}": "3 are not pairs",
        f"line {good} {good} --labels one two": "--labels names 2 pairs, the checkpoints are 1",
        f"line {good} {good} --points 1": "--points 1 is out of range",
        f"line {good} {good} --beyond -1": "--beyond -1.0 is out of range",
        f"plane {good}": "not 1",
        f"plane {good} {good} {good} {good}": "not 4",
        f"plane {good} {good}": "there is no plane through them",
        f"plane {good} {other} {good}": "there is no plane through them",
        f"plane {good} {pendulum}": "their hidden_sizes",
        f"plane {good} {other} --grid 1": "--grid 1 is out of range",
        f"plane {good} {other} --margin -0.1": "--margin -0.1 is out of range",
        f"plane {good} {other} --path empty": "empty holds no snapshots",
        f"plane {good} {other} --path missing": "missing holds no snapshots",
        "path empty": "empty holds no snapshots",
        f"path {run} --perplexity 0": "--perplexity 0.0 is out of range",
    }.items():  # fmt: skip
        done = draw(words)
        assert is_sentence(done.code) and sentence in done.code, (words, done.code)
    for few in ("--episodes 0 ", "--workers 0 "):
        assert "out of range" in draw(f"line {good} {good}", few).code
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    done = draw(f"line {good} {good}")
    assert is_sentence(done.code) and "out" in done.code


def test_few_snapshots_make_no_way(draw, run, tmp_path):
    (tmp_path / "few" / "snapshots").mkdir(parents=True)
    shutil.copy(run / "snapshots" / "online_000000006.pt", tmp_path / "few" / "snapshots")
    assert "1 policies make no picture" in draw("path few").code


def test_a_full_disk_is_one_sentence(landscape, draw, run, monkeypatch):
    def full(*of):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(landscape, "write_atomically", full)
        done = draw(LINE.format(run=run))
    assert is_sentence(done.code) and "No space left" in done.code and "is kept" in done.code
    assert "6 of them are in" in draw(LINE.format(run=run)).output


# === The file ==============================================================================================


def test_every_command_of_the_docstring_can_be_given(landscape, monkeypatch):
    pages = landscape.__doc__ + (ROOT / "README.md").read_text()
    commands = re.findall(r"python reward_landscape\.py (.*)", pages.replace("\\\n", " "))
    assert len(commands) >= 8
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["reward_landscape.py", *words.split()])
        landscape.read_arguments()


def test_it_stands_alone(landscape):
    text = (ROOT / "reward_landscape.py").read_text()
    nodes = [*ast.walk(ast.parse(text))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {path.stem for path in ROOT.glob("*.py")}
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)[1]
    pins = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))["dependencies"]
    assert {*pins} <= requirements()


def test_the_bundled_line_needs_no_recording(draw, monkeypatch, tmp_path):
    """The scale of the score comes with the checkpoint: a file that was sent by a friend is enough."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path = SHIPPED / "pendulum-medium-replay_smac_offline.pt"
    (row,) = draw(f"line {path} {path} --points 2 --beyond 0", few="--episodes 20 --workers 1 ").rows[:1]
    state = torch.load(path, weights_only=True)
    assert float(row["score_mean"]) == pytest.approx(state["rows"][-1]["score"], abs=1)
    assert len(returns(row)) == 20
