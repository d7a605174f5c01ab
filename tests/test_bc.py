"""Behaviour cloning: the likelihood, fresh critics in the checkpoint, whole runs, learning.

BC_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, load
from torch.distributions import Normal

TINY = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 --device cpu "
TINY += "--offline-steps 40 --eval-every 20 --num-critics 3 "


@pytest.fixture(scope="module")
def bc():
    """bc_baseline.py"""
    return load("bc_baseline", Path(os.environ.get("BC_SCRIPT", ROOT / "bc_baseline.py")))


@pytest.fixture(scope="module")
def whole(bc, tmp_path_factory):
    """A run that nothing stopped."""
    return inside(bc, TINY, tmp_path_factory.mktemp("whole"))


def test_log_probability_by_hand(bc):
    """A policy of mean 0 and log std -1.5, the middle of its range, at a = tanh(0.1)."""
    actor = bc.Actor(3, 1, (8, 8))
    torch.nn.init.zeros_(actor.net.weights[-1])
    torch.nn.init.zeros_(actor.net.biases[-1])
    log_prob, log_std = bc.action_log_prob(actor, torch.randn(1, 3), torch.tensor([[0.0996680]]))
    # -0.5 (0.1 / exp(-1.5))^2 + 1.5 - 0.5 log(2 pi) - log(1 - 0.0996680^2)
    assert log_prob.item() == pytest.approx(-0.1004277 + 1.5 - 0.9189385 + 0.0099834, abs=1e-5)
    assert log_std.item() == pytest.approx(-1.5)


def test_gradient_equals_the_density_of_torch_distributions(bc):
    torch.manual_seed(0)
    actor = bc.Actor(3, 2, (8, 8)).double()
    s, a = torch.randn(9, 3).double(), torch.tanh(torch.randn(9, 2)).double()
    mean, log_std = actor(s)
    loss = -(Normal(mean, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum(-1).mean()
    expected = torch.autograd.grad(loss, list(actor.parameters()))
    for p in actor.parameters():
        p.grad = torch.ones_like(p)  # of an earlier update
    old = [p.clone() for p in actor.parameters()]
    adam = torch.optim.Adam(actor.parameters(), lr=0.01)
    metrics = bc.cloning_update(actor, adam, dict(observations=s, actions=a))
    torch.testing.assert_close(metrics["actor_loss"], loss.detach())
    for p, before, grad in zip(actor.parameters(), old, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
        torch.testing.assert_close(p, before - 0.01 * grad.sign(), rtol=0, atol=1e-5)  # Adam's first step


def test_a_run_trains_the_actor_and_leaves_the_critics_as_they_were_drawn(bc, whole):
    """So it does the temperature. A fine-tuner takes the checkpoint."""
    assert whole.code == 0
    assert [(row["phase"], row["step"]) for row in whole.rows()] == [("offline", str(i)) for i in (0, 20, 40)]
    assert not (whole.directory / "final.pt").exists()
    saved, args = whole.state("offline.pt")["parts"]["agent"], bc.Args(hidden_sizes=(16, 16), num_critics=3)
    torch.manual_seed(bc.stream_seed(1, "offline"))
    drawn = bc.Agent(3, 1, args)
    bc.set_statistics(drawn, bc.Dataset("smac/pendulum/medium-replay-v0"))
    for name, tensor in drawn.state_dict().items():
        trained = name.startswith(("actor.net.weights", "actor.net.biases"))
        assert torch.equal(tensor, saved[name]) != trained, name
    sac = load("sac_finetune", ROOT / "sac_finetune.py")
    sac_args = sac.Args(hidden_sizes=(16, 16), num_critics=3)
    sac.Agent(3, 1, sac_args).load_state_dict(saved)


def test_a_resumed_run_ends_as_if_never_stopped(bc, whole, monkeypatch, tmp_path):
    update, calls = bc.cloning_update, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 25:
            raise SystemExit("killed")
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bc, "cloning_update", stopped)
        run = inside(bc, TINY + "--checkpoint-every 0", tmp_path)
    assert run.code == "killed" and run.state("last.pt")["step"] == 24
    assert inside(bc, f"--resume {run.directory}", tmp_path).code == 0 and run.rows() == whole.rows()
    ours, theirs = (result.state("offline.pt")["parts"]["agent"] for result in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_tenth_is_cloned_to_a_better_policy(bc, monkeypatch, tmp_path):
    """On Pendulum, 1,000 updates each: all episodes give about the recording's mean, the best ones more."""
    monkeypatch.chdir(tmp_path)
    returns = {}
    for count in (76, 8):  # episodes, of 200 transitions each
        run = bc.Run(bc.Args(env_id="pendulum-medium-replay", hidden_sizes=(32, 32), batch_size=128,
                             actor_lr=1e-3, offline_steps=1_000, eval_every=1_000, device="cpu"))  # fmt: skip
        best = np.argsort(-run.data.returns)[:count]
        rows = np.concatenate([np.arange(200 * i, 200 * i + 200) for i in np.sort(best)])
        run.data.columns = {name: column[rows] for name, column in run.data.columns.items()}
        bc.train_offline(run)
        returns[count] = np.array([run.rows[-1][f"return_{i}"] for i in range(20)])
    difference = returns[8] - returns[76]  # the same start states
    standard_error = difference.std(ddof=1) / 20**0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"
    assert returns[8].mean() > run.data.returns.mean() + 100
