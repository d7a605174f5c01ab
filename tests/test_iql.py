"""IQL: its losses by hand, what each gradient reaches, V between mean and maximum, training, whole runs.

IQL_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, load
from torch.distributions import Normal

OBS, ACT, B = 3, 2, 12
TINY = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 --device cpu "
TINY += "--offline-steps 20 --online-steps 60 --eval-every 1000 "


@pytest.fixture(scope="module")
def iql():
    """iql_baseline.py"""
    return load("iql_baseline", Path(os.environ.get("IQL_SCRIPT", ROOT / "iql_baseline.py")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)


def make_agent(iql, num_critics=2):
    """An agent with target critics of their own, in float64, its parameters spread out."""
    agent = iql.Agent(OBS, ACT, iql.Args(hidden_sizes=(8, 8), num_critics=num_critics)).double()
    with torch.no_grad():
        for p in (*agent.critic.parameters(), *agent.target_critic.parameters(), *agent.value.parameters()):
            p.mul_(2).add_(0.1 * torch.randn_like(p))
        for i, mlp in enumerate((agent.actor.net, agent.critic.net, agent.target_critic.net, agent.value)):
            mlp.mean[:OBS] = torch.linspace(-0.3, 0.1 * i, OBS)
            mlp.std[:OBS] = torch.linspace(0.7, 1 + 0.1 * i, OBS)
    return agent


def make_batch():
    draw = lambda *shape: torch.randn(B, *shape, dtype=torch.float64)
    return dict(observations=draw(OBS), actions=torch.tanh(draw(ACT)), rewards=draw(),
                next_observations=draw(OBS), terminations=(torch.arange(B) % 3 == 0).double())  # fmt: skip


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


# === The losses by hand ====================================================================================


def test_expectile_loss_of_three_advantages_by_hand(iql):
    # 0.7 * 4, 0.3 * 1, 0.7 * 9: mean of 2.8, 0.3, 6.3
    close(iql.expectile_loss(torch.tensor([2.0, -1.0, 3.0]), 0.7), 9.4 / 3)
    close(iql.expectile_loss(torch.tensor([2.0, -1.0, 3.0]), 0.5), (4 + 1 + 9) / 6)


def test_advantage_weights_by_hand_and_clipped(iql):
    advantage = torch.tensor([0.0, 1.0, -2.0, 1.5, 2.0, 1000.0], requires_grad=True)
    weights = iql.advantage_weights(advantage, 3.0, 100.0)
    close(weights, [1.0, 20.085537, 0.002478752, 90.017131, 100.0, 100.0])  # exp(3), exp(-6), exp(4.5)
    assert not weights.requires_grad, "the actor's loss moves neither Q nor V"
    close(iql.advantage_weights(advantage, 0.0, 100.0), torch.ones(6))


def test_beta_takes_the_scale_of_the_rewards(iql):
    """exp(beta A) is what it would be, had the rewards been multiplied by return_range / (max - min)."""
    args = iql.Args(inverse_temperature=3.0, return_range=1000.0)
    data = SimpleNamespace(returns=np.array([-100.0, 50.0, 400.0]), reward=lambda raw: raw - 5)
    assert iql.scaled_beta(data, args) == pytest.approx(3 * 1000 / 500)
    assert iql.scaled_beta(data, iql.Args()) == 3.0, "off by default"
    data.reward = lambda raw: 10 * raw - 5  # the losses see 10 times as much: A too
    assert iql.scaled_beta(data, args) == pytest.approx(3 * 1000 / 5000)
    data.returns = np.array([7.0, 7.0])  # nothing to scale by
    assert iql.scaled_beta(data, args) == 3.0


# === The update ============================================================================================


@pytest.mark.parametrize("num_critics, actor", [(2, True), (3, True), (2, False)])
def test_gradients_equal_each_loss_alone(iql, num_critics, actor):
    """Each loss by plain formulas, its gradient by itself: none leaks into another loss's network."""
    agent, batch = make_agent(iql, num_critics), make_batch()
    value = lambda s: agent.value(s)[0, :, 0]
    s, a, s2 = (batch[name] for name in ("observations", "actions", "next_observations"))
    with torch.no_grad():
        smallest = agent.target_critic(s, a).min(dim=0).values
        weights = torch.exp(1.5 * (smallest - value(s)))
        clip = weights.median().item()
        y = batch["rewards"] + 0.9 * torch.where(batch["terminations"] == 1, 0.0, value(s2))
        weights = torch.where(weights > clip, clip, weights)
    metrics = iql.iql_gradients(
        agent, batch, 1.5, iql.Args(gamma=0.9, expectile=0.8, weight_clip=clip), actor
    )
    difference = smallest - value(s)
    loss_v = torch.where(difference > 0, 0.8 * difference**2, 0.2 * difference**2).mean()
    loss_q = torch.stack([((q - y) ** 2).mean() for q in agent.critic(s, a)]).mean()
    mean, log_std = agent.actor(s)
    log_prob = (Normal(mean, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum(-1)
    loss_pi = -(weights * log_prob).mean()
    cases = [("value_loss", loss_v, agent.value), ("critic_loss", loss_q, agent.critic)]
    for name, loss, network in cases + [("actor_loss", loss_pi, agent.actor)] * actor:
        close(metrics[name], loss)
        expected = torch.autograd.grad(loss, list(network.parameters()))
        for grad, other in zip(gradients(network), expected, strict=True):
            assert other.abs().sum() > 0
            close(grad, other)
    if actor:
        close(metrics["clipped_weights"], 7 / 12)  # from the median of 12 on
    else:
        assert set(gradients(agent.actor)) == {None} and "actor_loss" not in metrics
    assert set(gradients(agent.target_critic)) == {None} and agent.log_alpha.grad is None
    assert not any(metric.requires_grad for metric in metrics.values())


def test_log_probability_at_the_bounds_is_finite(iql):
    """atanh(1) is infinite."""
    actor, s = iql.Actor(OBS, ACT, (8, 8)), torch.randn(B, OBS)
    for bound in (1.0, -1.0):
        log_prob, _ = iql.action_log_prob(actor, s, torch.full((B, ACT), bound))
        log_prob.sum().backward()
        assert log_prob.isfinite().all() and all(g.isfinite().all() for g in gradients(actor))


def test_every_network_is_stepped_and_the_targets_follow(iql):
    agent, batch = make_agent(iql), make_batch()
    args = iql.Args(tau=0.25, actor_lr=0.01, critic_lr=0.1)
    optimizers = iql.make_optimizers(agent, "adam", args)
    old = {name: p.clone() for name, p in agent.named_parameters()}
    iql.iql_gradients(agent, batch, 1.0, args, True)
    iql.apply_gradients(agent, optimizers, args)
    for name, p in agent.named_parameters():
        if name.startswith("target_critic"):
            source = agent.get_parameter(name.removeprefix("target_"))
            close(p, 0.75 * old[name] + 0.25 * source)
        else:  # Adam's first step is the learning rate
            length = 0.01 if name.startswith("actor") else 0.0 if name == "log_alpha" else 0.1
            assert (p - old[name]).abs().max().item() == pytest.approx(length, rel=1e-3), name
    assert set(gradients(agent)) == {None}, "no gradient is left for the next update"


def test_v_is_the_expectile_of_the_recorded_actions_values(iql):
    """One state, three recorded actions, Qbar known: V learns the mean at 0.5 and nears the best at 0.99."""
    batch = {name: column.float() for name, column in make_batch().items()}
    batch["observations"] = torch.ones(B, OBS)
    values = torch.tensor([0.0, 1.0, 5.0]).repeat(B // 3)
    for expectile, expected in ((0.5, 2.0), (0.99, 4.96 / 1.01)):  # 0.01 (2 m - 1) = 0.99 (5 - m)
        args = iql.Args(hidden_sizes=(8, 8), expectile=expectile, critic_lr=0.05)
        agent = iql.Agent(OBS, ACT, args)
        agent.target_critic.forward = lambda s, a: torch.stack([values, values + 1])
        optimizers = iql.make_optimizers(agent, "adam", args)
        for _ in range(300):
            iql.iql_gradients(agent, batch, 1.0, args, False)
            iql.apply_gradients(agent, optimizers, args)
        assert agent.value(torch.ones(1, OBS)).item() == pytest.approx(expected, abs=0.05)


# === Whole runs ============================================================================================


def test_the_actors_learning_rate_falls_along_a_cosine_offline_alone(iql, monkeypatch, tmp_path):
    rates, step = [], torch.optim.Adam.step
    watch = lambda adam: rates.append([group["lr"] for group in adam.param_groups]) or step(adam)
    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    inside(iql, TINY, tmp_path)
    actor, critic = np.array(rates).T
    assert len(actor) == 20 + 60 - 16 and (critic == 3e-4).all() and (actor[20:] == 3e-4).all()
    np.testing.assert_allclose(actor[:20], [3e-4 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)])


@pytest.mark.parametrize("fraction, old", [(0.25, 8), (-1, 32)])
def test_online_batches_and_which_update_moves_the_actor(iql, monkeypatch, tmp_path, fraction, old):
    """A quarter of each batch is recorded, or, by size (15,200 recorded rows, 60 own), nearly all of it."""
    gradients, seen = iql.iql_gradients, []
    monkeypatch.setattr(iql, "iql_gradients", lambda *x: seen.append(x) or gradients(*x))
    words = f"--utd-ratio 3 --offline-fraction {fraction} --inverse-temperature 4"
    assert inside(iql, TINY + words, tmp_path).code == 0
    online, data = seen[20:], iql.Dataset("smac/pendulum/medium-replay-v0")
    first = 24 if fraction > 0 else 32  # no batch holds more online rows than there are
    assert len(online) == 3 * (60 - first) and [x[-1] for x in online[:6]] == [False, False, True] * 2
    recorded = {row.tobytes() for row in data.columns["observations"]}
    for _, batch, *_ in online[::20]:
        found = [row.numpy().tobytes() in recorded for row in batch["observations"]]
        assert found == [True] * old + [False] * (32 - old)
    agent = seen[0][0]
    assert agent.log_alpha.item() == pytest.approx(-math.log(4)), "of a fine-tuner alone"
    assert agent.value.mean.abs().sum() > 0, "the observations' statistics"


@pytest.mark.parametrize("phase, updates", [("offline", 15), ("online", 20 + 200)])
def test_a_resumed_run_ends_as_if_never_stopped(iql, monkeypatch, tmp_path, phase, updates):
    words = TINY + "--online-steps 230 --checkpoint-every 0 --offline-optimizer muon"
    whole, gradients, calls = inside(iql, words, tmp_path / "whole"), iql.iql_gradients, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == updates:
            raise SystemExit("killed")
        return gradients(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(iql, "iql_gradients", stopping)
        run = inside(iql, words, tmp_path / "stopped")
    assert run.code == "killed" and run.state("last.pt")["phase"] == phase
    assert inside(iql, f"--resume {run.directory}", tmp_path / "stopped").code == 0
    assert run.rows() == whole.rows()
    ours, theirs = (result.state()["parts"]["agent"] for result in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and "value.weights.0" in ours


def test_it_beats_the_recording_and_behaviour_cloning(iql, monkeypatch, tmp_path):
    """700 updates of IQL and of behaviour cloning (beta 0) on Pendulum, then the same start states."""
    monkeypatch.chdir(tmp_path)
    returns = []
    for beta in (0.0, 3.0):
        args = iql.Args(env_id="pendulum-medium-replay", hidden_sizes=(32, 32), batch_size=128, actor_lr=2e-3,
                        critic_lr=5e-3, tau=0.05, gamma=0.9, offline_steps=700, eval_every=700,
                        inverse_temperature=beta, device="cpu")  # fmt: skip
        run = iql.Run(args)
        agent = iql.train_offline(run)
        returns.append(np.array([run.rows[-1][f"return_{i}"] for i in range(20)]))
    difference = returns[1] - returns[0]
    standard_error = difference.std(ddof=1) / 20**0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"
    assert returns[1].mean() > run.data.returns.mean() + 200
    s, a = (torch.as_tensor(run.data.columns[name]) for name in ("observations", "actions"))
    lowest = run.data.columns["rewards"].min() / (1 - 0.9)  # the worst reward for ever
    assert lowest < agent.critic(s, a).mean() < 0 and lowest < agent.value(s).mean() < 0
