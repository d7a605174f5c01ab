"""Lines, planes and ways through parameter space: what is evaluated, kept, drawn and refused."""

import csv
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load

FEW = "--episodes 2 --workers 1"
SHIPPED = ROOT / "results" / "checkpoints"
OFFLINE, FINAL = (SHIPPED / f"pendulum-medium-replay_smac_{name}.pt" for name in ("offline", "final"))
HOPPER = SHIPPED / "hopper-medium-replay_smac_offline.pt"


@pytest.fixture(scope="session")
def landscape():
    return load("reward_landscape", ROOT / "reward_landscape.py")


@pytest.fixture
def draw(landscape, tmp_path, monkeypatch, capsys):
    """Runs a command in this process: its output, the rows of its csv, and the policies of all commands."""
    monkeypatch.chdir(tmp_path)
    policies, evaluate_all = [], landscape.evaluate_all
    kept = lambda moved, args: policies.extend(moved) or evaluate_all(moved, args)
    monkeypatch.setattr(landscape, "evaluate_all", kept)

    def command(words: str, few: str = FEW) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["reward_landscape.py", *f"{words} {few} --out out".split()])
        landscape.main()
        path = tmp_path / "out" / f"{words.split()[0]}.csv"
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        with open(path, newline="") as file:
            rows = [*csv.DictReader(file)]
        return SimpleNamespace(output=capsys.readouterr().out, rows=rows, policies=policies)

    return command


@pytest.fixture
def tiny(tmp_path):
    """Writes a checkpoint of a small policy: random weights from a seed, scaled; edit(state) changes it."""

    def write(name: str, seed: int = 0, scale: float = 1.0, edit=lambda state: None) -> str:
        random, sizes = torch.Generator().manual_seed(seed), [3, 8, 8, 2]
        draw = lambda *shape: scale * torch.randn(shape, generator=random)
        net = {f"weights.{i}": draw(1, *sizes[i : i + 2]) for i in range(3)}
        net |= {f"biases.{i}": draw(1, 1, sizes[i + 1]) for i in range(3)}
        net |= {"mean": torch.zeros(3), "std": torch.ones(3)}
        state = torch.load(OFFLINE, weights_only=True)
        state["args"] |= {"hidden_sizes": (8, 8), "seed": seed}
        state["parts"] = {"agent": {f"actor.net.{key}": x for key, x in net.items()}}
        edit(state)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return write


def returns(row: dict) -> list[float]:
    return [float(value) for name, value in row.items() if re.fullmatch(r"return_\d+", name) and value]


def policy_of(landscape, path):
    return landscape.Policy(path, *landscape.load_policy(path))


# === Policies and lines ====================================================================================


@pytest.mark.parametrize("path", [FINAL, HOPPER], ids=["pendulum", "hopper"])
def test_the_forward_pass_is_the_training_scripts(landscape, smac, path):
    policy = policy_of(landscape, path)
    actor = smac.Actor(policy.state["obs_dim"], policy.state["act_dim"], policy.state["args"]["hidden_sizes"])
    agent = policy.state["parts"]["agent"].items()
    actor.load_state_dict({key.removeprefix("actor."): x for key, x in agent if key.startswith("actor.")})
    observations = torch.randn(7, policy.state["obs_dim"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(landscape.gaussian(policy.net, observations.numpy()), actor(observations)):
            assert torch.equal(ours, theirs)
    parameters = torch.nn.utils.parameters_to_vector(actor.parameters()).detach().numpy()
    assert np.array_equal(policy.theta(), parameters)
    assert all(np.array_equal(x, policy.net[key]) for key, x in policy.at(policy.theta()).net.items())


def test_the_ends_score_what_the_run_measured(landscape, draw):
    done = draw(f"line {OFFLINE} {FINAL} --points 3 --beyond 0.5", few="--episodes 20 --workers 1")
    a, b = (policy_of(landscape, path).theta() for path in (OFFLINE, FINAL))
    for row, policy in zip(done.rows, done.policies):
        x = float(row["x"])
        np.testing.assert_allclose(policy.theta(), (1 - x) * a + x * b, atol=1e-6)
    assert [float(row["x"]) for row in done.rows] == [-0.5, 0, 0.5, 1, 1.5]
    for row, path in zip(done.rows[1::2], (OFFLINE, FINAL)):
        last = torch.load(path, weights_only=True)["rows"][-1]
        np.testing.assert_allclose(returns(row), [last[f"return_{i}"] for i in range(20)], rtol=1e-3)
        assert float(row["score_mean"]) == pytest.approx(last["score"], rel=1e-3)
    assert done.rows[0]["label"] == "smac_offline_online" and done.rows[0]["online_phase"] == "online"


def test_the_depth_and_its_error_by_hand(landscape):
    x = np.array([-0.5, 0, 0.5, 1, 1.5])
    # means -9, 10, 4, 8, -9: the path is from x = 0 to 1, its lower end 8, its lowest 4
    scores = np.array([[-9, -9, -9], [10, 10, 10], [2, 4, 6], [8, 7, 9], [-9, -9, -9]])
    depth, error, low = landscape.valley(x, scores)
    # differences of the episodes 6, 3, 3: mean 4, standard deviation sqrt 3, error sqrt 3 / sqrt 3
    assert (depth, low) == (4, 2) and error == pytest.approx(1)
    assert landscape.valley(x, scores[::-1])[::2] == (4, 2)  # the other end is lower
    assert landscape.valley(x, np.arange(5).repeat(2).reshape(5, 2)) == (0, 0, 1)  # rising
    assert math.isnan(landscape.valley(x, scores[:, :1])[1])


def test_pairs_of_one_label_make_one_curve(draw, tiny):
    a, b, c = tiny("a.pt", 1), tiny("b.pt", 2), tiny("c.pt", 3)
    done = draw(f"line {a} {b} {b} {c} {a} {c} --points 6 --labels one other one")
    assert [row["label"] for row in done.rows] == 16 * ["one"] + 8 * ["other"]
    depths = []
    for rows in (done.rows[:8], done.rows[8:16], done.rows[16:]):
        path = [float(row["score_mean"]) for row in rows if 0 <= float(row["x"]) <= 1]
        depths.append(float(rows[0]["depth"]))
        assert depths[-1] == pytest.approx(min(path[0], path[-1]) - min(path), abs=1e-9)
    error = abs(depths[0] - depths[1]) / 2  # of a mean of two
    assert f"one, 2 pairs: valley depth {sum(depths[:2]) / 2:.1f} ± {error:.1f}\n" in done.output
    assert "other, seed 3: ends " in done.output and "other, 1 pairs" not in done.output


# === Matching hidden units =================================================================================


@pytest.mark.parametrize("path", [HOPPER, FINAL], ids=["hopper", "pendulum"])
def test_matching_undoes_a_permutation(landscape, path):
    one = policy_of(landscape, path)
    moved, width = one, one.state["args"]["hidden_sizes"][0]
    for layer in (0, 1):
        moved = landscape.permuted(moved, layer, np.random.default_rng(layer).permutation(width))
    assert np.linalg.norm(moved.theta() - one.theta()) > 10
    observations = np.random.default_rng(0).standard_normal((7, one.state["obs_dim"]))
    for ours, theirs in zip(*(landscape.gaussian(policy.net, observations) for policy in (moved, one))):
        torch.testing.assert_close(ours, theirs)  # the same function
    assert np.array_equal(landscape.matched(one, moved).theta(), one.theta())


def test_matching_only_brings_nearer(landscape, tiny):
    one, two = (policy_of(landscape, tiny(f"{seed}.pt", seed)) for seed in (1, 2))
    near = landscape.matched(one, two)
    assert np.linalg.norm(near.theta() - one.theta()) < 0.95 * np.linalg.norm(two.theta() - one.theta())
    step = one.at(one.theta() + 1e-3 * two.theta())  # a few updates later
    assert np.array_equal(landscape.matched(one, step).theta(), step.theta())


def test_after_aligning_the_line_to_a_permuted_copy_is_flat(draw, tiny):
    def shuffle(state):
        agent, order = state["parts"]["agent"], torch.arange(7, -1, -1)
        for name in ("actor.net.weights.0", "actor.net.biases.0"):
            agent[name] = agent[name][..., order].contiguous()
        agent["actor.net.weights.1"] = agent["actor.net.weights.1"][:, order].contiguous()

    line = f"line {tiny('a.pt')} {tiny('b.pt', edit=shuffle)} --points 4 --beyond 0 "
    assert len({tuple(returns(row)) for row in draw(line).rows}) >= 3  # a false valley
    done = draw(line + "--align")
    assert len({tuple(returns(row)) for row in done.rows}) == 1
    assert "distance 0," in done.output and {row["aligned"] for row in done.rows} == {"True"}


# === Planes and ways =======================================================================================


def test_the_axes_are_orthonormal_and_hold_all_three(landscape):
    a, b, c = np.random.default_rng(0).standard_normal((3, 500))
    axes = landscape.plane_axes(a, b, b + 1e-3 * c)  # nearly one direction
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    for theta in (a, b, b + 1e-3 * c):
        np.testing.assert_allclose(a + (axes @ (theta - a)) @ axes, theta, atol=1e-9)


def test_a_plane_through_three(landscape, draw, tiny):
    paths = [tiny(f"{seed}.pt", seed) for seed in (1, 2, 3)]
    done = draw(f"plane {' '.join(paths)} --grid 3")
    a, b, c = (policy_of(landscape, path).theta() for path in paths)
    axes = landscape.plane_axes(a, b, c)
    places = np.array([(float(row["u"]), float(row["v"])) for row in done.rows])
    expected = [(0, 0), (np.linalg.norm(b - a), 0), axes @ (c - a)]
    np.testing.assert_allclose(places[:3], expected, atol=1e-9)
    assert [row["kind"] for row in done.rows] == 3 * ["checkpoint"] + 9 * ["grid"]
    for policy, place in zip(done.policies[3:], places[3:]):  # each row is of the policy at its place
        np.testing.assert_allclose(policy.theta(), a + place @ axes, atol=1e-5)
    assert (places[3] < places[:3]).all() and (places[:3] < places[-1]).all()  # all inside, with a margin
    assert "C: smac_offline_online (seed 3), offline step 8,000: " in done.output


def test_two_checkpoints_and_a_random_direction(landscape, draw, tiny):
    one, two = tiny("1.pt", 1), tiny("2.pt", 2)
    rows = draw(f"plane {one} {two} --grid 3 --margin 0").rows[2:]
    a, b = (policy_of(landscape, path).theta() for path in (one, two))
    across = [np.linalg.norm(b - a) * k for k in (0, 0.5, 1)]
    expected = [(u, v - across[1]) for v in across for u in across]
    np.testing.assert_allclose([(float(row["u"]), float(row["v"])) for row in rows], expected, atol=1e-9)
    other = draw(f"plane {one} {two} --grid 3 --margin 0 --seed 2")
    assert "; 6 of them are not in" in other.output  # all but the middle row: the line itself


def test_a_way_and_its_principal_components(landscape, draw, tiny):
    paths = [tiny("run/1.pt", 1), tiny("run/2.pt", 2), tiny("other/3.pt", 3), tiny("other/4.pt", 4)]
    rows = draw(f"path {' '.join(paths)}").rows
    theta = np.array([policy_of(landscape, path).theta() for path in paths])
    at = np.array([(float(row["pc_1"]), float(row["pc_2"])) for row in rows])
    centred = theta - theta.mean(axis=0)
    np.testing.assert_allclose((at**2).sum(axis=0), np.linalg.eigvalsh(centred @ centred.T)[:-3:-1])


# === What is kept, what is refused =========================================================================


def test_nothing_is_played_twice_and_a_cut_file_costs_one_line(draw, tiny, tmp_path):
    line = f"line {tiny('1.pt', 1)} {tiny('2.pt', 2)} --beyond 0 --points "
    first = draw(line + "3")
    assert "3 policies, 2 episodes each; 3 of them" in first.output
    assert "; 2 of them" in draw(line + "5").output
    path = tmp_path / "out" / "evaluations.jsonl"
    path.write_text(path.read_text()[:-9])  # the last one was being written
    assert "; 1 of them" in draw(line + "5").output
    again = draw(line + "3")
    assert "; 0 of them" in again.output and again.rows == first.rows
    assert len([line for line in path.read_text().splitlines() if line.endswith("]]")]) == 5
    assert "; 3 of them" in draw(line + "3", few="--episodes 3 --workers 1").output
    path.unlink()
    assert draw(line + "3", few="--episodes 2 --workers 2").rows == first.rows
    assert len(json.loads(path.read_text().splitlines()[-1])[1]) == 2


def test_bad_input_is_one_sentence(draw, tiny, tmp_path):
    good, b = tiny("good.pt"), tiny("b.pt", 1)
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:3000])
    tiny("nan.pt", scale=math.nan)
    tiny("statistics.pt", edit=lambda state: state["parts"]["agent"]["actor.net.std"].add_(1))
    tiny("actorless.pt", edit=lambda state: state["parts"].update(agent={}))
    tiny("gone.pt", edit=lambda state: state.update(dataset_id="no/such-v0"))
    for words, sentence in {
        f"line {good} missing.pt": "missing.pt can't be read as a checkpoint",
        f"line {good} text.pt": "text.pt can't be read as a checkpoint",
        f"line {good} cut.pt": "cut.pt can't be read as a checkpoint",
        f"line {good} nan.pt": "it holds no finite policy",
        f"line {good} actorless.pt": "it holds no finite policy",
        "line gone.pt gone.pt": "dataset 'no/such-v0', with the environment, can't be read",
        f"line {good} statistics.pt": "observation statistics differ",
        f"line {good} {OFFLINE}": "their hidden sizes are (8, 8) and (64, 64)",
        f"line {good} {good} {b}": "3 are not pairs",
        f"line {good} {b} --labels one two": "--labels names 2 pairs, the checkpoints are 1",
        f"plane {good}": "not 1",
        f"line {good} {b} --points 1": "--points 1 is too little: at least 2 is needed",
        f"plane {good} {good} {b}": "there is no plane through them",
        f"path {good} {b}": "3 checkpoints or more, not 2",
    }.items():
        with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(sentence)}") as ended:
            draw(words)
        assert "\n" not in ended.value.code, words
