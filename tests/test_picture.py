"""picture_critic.py: its densities and arrows by hand, the picture itself, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from matplotlib.figure import Figure

CHECKPOINTS = [ROOT / f"results/checkpoints/pendulum-medium-replay_smac_{x}.pt" for x in ("offline", "final")]


@pytest.fixture(scope="module")
def picture():
    return load("picture_critic", ROOT / "picture_critic.py")


def test_a_density_integrates_to_one(picture):
    x = torch.linspace(-1, 1, 401)
    found = picture.density(-(x**2) / 0.02 + 300, x)  # a Gaussian of deviation 0.1
    np.testing.assert_allclose(found[200], 1 / (0.1 * (2 * np.pi) ** 0.5), rtol=1e-4)


def test_recorded_actions_at_the_bounds_count_as_others(picture):
    x = torch.linspace(-1, 1, 401)
    found = picture.kernel_density(np.random.default_rng(1).uniform(-1, 1, 20_000).astype("f4"), x)
    np.testing.assert_allclose(found, 0.5, atol=0.05)


def test_arrows_point_where_the_values_do(picture):
    axes = Figure().subplots()
    picture.draw_arrows(axes, torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([5.0, -100.0, 0.0]), -1, "red")
    arrows = axes.collections[0]
    np.testing.assert_allclose(arrows.U, [0.225, -0.45, 0])  # half, and the most: 0.9 of the gap
    assert not arrows.V.any()


def test_the_networks_are_those_of_the_scripts(picture, smac):
    """Policy, Q and score, to rounding, of a checkpoint with LayerNorm; and the data."""
    state = torch.load(CHECKPOINTS[0], weights_only=True)
    args, data = smac.Args(**state["args"]), smac.Dataset(state["dataset_id"])
    agent = smac.Agent(3, 1, args, smac.ScoreNet(3, 1, args))
    agent.load_state_dict(state["parts"]["agent"])
    column, actions = picture.Column(CHECKPOINTS[0]), torch.linspace(-1, 1, 7)[:, None]
    observations, recorded = picture.load_transitions(state["dataset_id"])
    assert np.array_equal(observations, data.columns["observations"])
    assert np.array_equal(recorded, data.columns["actions"])
    s = torch.as_tensor(observations[[5]])
    with torch.no_grad():
        for ours, theirs in zip(column.gaussian(s), agent.actor(s)):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(column.q(s, actions), agent.critic(s, actions).mean(dim=0))
        score = agent.score_net.score(s.expand(7, -1), actions, torch.full((7,), args.advantage))
        torch.testing.assert_close(column.score(s, actions), score)
    assert picture.nearest(observations, observations[7])[0] == 7


def test_the_picture(picture, tmp_path):
    figure = picture.draw(picture.Args(tuple(CHECKPOINTS), labels=("SMAC", "after SAC"), states=2))
    panels = figure.axes
    assert len(panels) == 4 and [axes.get_title() for axes in panels[:2]] == ["SMAC", "after SAC"]
    for line in (line for axes in panels for line in axes.lines if len(line.get_xdata())):
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=0.02)
    figure.savefig(tmp_path / "critic.png")
    assert (tmp_path / "critic.png").stat().st_size > 10_000


def test_what_it_refuses_is_one_sentence(picture, tmp_path):
    other = ROOT / "results/checkpoints/hopper-medium-replay_smac_offline.pt"
    state = torch.load(CHECKPOINTS[0], weights_only=True)
    state["parts"]["agent"] = {k: x for k, x in state["parts"]["agent"].items() if "critic" not in k}
    torch.save(state, tmp_path / "aligned.pt")
    torch.save({"model": 1}, tmp_path / "other.pt")
    for change, says in [
        (dict(checkpoints=()), "all of the same task"),
        (dict(checkpoints=(CHECKPOINTS[0], other)), "all of the same task"),
        (dict(checkpoints=(tmp_path / "aligned.pt",)), "no actor and critics of the common form"),
        (dict(labels=("a", "b")), "2 labels for 1 checkpoints"),
        (dict(action=1), "the actions have 1 dimensions"),
        (dict(states=0), "1 to 15,200 states"),
        (dict(checkpoints=(tmp_path / "other.pt",)), "holds no networks of these scripts"),
    ]:
        with pytest.raises(SystemExit, match=says):
            picture.draw(picture.Args(**dict(checkpoints=(CHECKPOINTS[0],)) | change))
