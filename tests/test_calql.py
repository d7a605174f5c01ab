"""Cal-QL and CQL: the loss against plain loops, the calibration, the returns-to-go, a short training, a run.

CALQL_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load

OBS, ACT, B, N_ACTIONS = 3, 2, 6, 4


@pytest.fixture(scope="session")
def calql():
    """calql_baseline.py"""
    return load("calql_baseline", Path(os.environ.get("CALQL_SCRIPT", ROOT / "calql_baseline.py")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)


def make_args(calql, **settings):
    return calql.Args(**dict(hidden_sizes=(8, 8), cql_actions=N_ACTIONS, gamma=0.9) | settings)


def make_agent(calql, args):
    """Small networks with observation statistics, a temperature and target critics of their own."""
    agent = calql.Agent(OBS, ACT, args)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.5))
        agent.log_alpha_prime.fill_(0.3)
        for p in (*agent.critic.parameters(), *agent.actor.parameters()):
            p.mul_(2)  # values that differ between actions
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
        mean, std = torch.randn(OBS), 0.5 + torch.rand(OBS)
        for mlp in (m for m in agent.modules() if isinstance(m, calql.MLP)):
            mlp.mean[:OBS], mlp.std[:OBS] = mean, std
    return agent


def make_batch(size=B):
    """Returns-to-go are unknown for every third transition, terminations every third."""
    bounds = torch.where(torch.arange(size) % 3 == 0, -math.inf, torch.randn(size))
    draw = lambda *shape: torch.randn(size, *shape)
    return dict(observations=draw(OBS), actions=torch.tanh(draw(ACT)), rewards=draw(),
                next_observations=draw(OBS), terminations=(torch.arange(size) % 3 == 1).float(),
                returns_to_go=bounds)  # fmt: skip


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


# === The CQL term ==========================================================================================


def test_gap_of_three_actions_by_hand(calql):
    q = torch.tensor([1.0, 2.0, 0.0]).view(1, 3, 1)
    q_data, log_density = torch.tensor([[1.5]]), torch.log(torch.tensor([0.5, 0.25, 1.0])).view(3, 1)
    # e/0.5 + e^2/0.25 + 1/1 = 5.436564 + 29.556224 + 1 = 35.992788, log = 3.583318
    close(calql.cql_gap(q, q_data, log_density, 1.0), [[3.583318 - 1.5]])
    # T = 2: sqrt(e)/0.5 + e/0.25 + 1 = 3.297443 + 10.873127 + 1 = 15.170570, 2 log = 5.438713
    close(calql.cql_gap(q, q_data, log_density, 2.0), [[5.438713 - 1.5]])
    # without densities the recorded action joins: e + e^2 + 1 + e^1.5 = 15.589027, log = 2.746579
    close(calql.cql_gap(q, q_data, None, 1.0), [[2.746579 - 1.5]])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_importance_weights_make_the_soft_maximum_an_integral_over_actions(calql, temperature):
    """On a fine grid of one action dimension: T log of the integral of exp(Q / T) over [-1, 1]."""
    count = 100_000
    critic = calql.Critic(1, 1, calql.Args(hidden_sizes=(16,)))
    with torch.no_grad():
        critic.net.weights[0].mul_(4)
        critic.net.weights[1].mul_(4)
        actor = calql.Actor(1, 1, (8,))  # wide enough to reach all actions: std about 0.9 before the tanh
        actor.net.weights[-1].mul_(0.1)
        actor.net.biases[-1].copy_(torch.tensor([[[0.2, 0.42]]]))
        s = torch.tensor([[0.7]])
        batch = dict(observations=s, next_observations=-s, actions=torch.zeros(1, 1))
        actions, log_density = calql.drawn_actions(actor, batch, count)
        q = calql.q_of_actions(critic, s, actions)
        gap = calql.cql_gap(q, torch.zeros(2, 1), log_density, temperature)
        grid = torch.linspace(-1, 1, 20_001)[:-1, None] + 5e-5
        exact = (critic(s, grid) / temperature).double().exp().mean(dim=1) * 2
    estimate = gap.squeeze(1) - temperature * math.log(3 * count)  # the sum is K times the integral
    close(estimate, temperature * exact.log().float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("bound, all_below", [(-math.inf, False), (100.0, True)])
def test_unknown_returns_make_cal_ql_cql(calql, bound, all_below):
    found = []
    for calibrate in (True, False):
        torch.manual_seed(1)
        args = make_args(calql, calibrate=calibrate)
        agent, batch = make_agent(calql, args), make_batch()
        batch["returns_to_go"] = torch.full((B,), bound)
        assert calql.calql_gradients(agent, batch, args, True)["below_return"] == all_below
        found.append(gradients(agent.critic))
    assert all(map(torch.equal, *found)) != all_below


# === The whole loss, in plain loops ========================================================================


def plain_q(net, i, row):
    """Q of critic i at one row (observation, action), layer by layer."""
    x = (row - net.mean) / net.std
    for j, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = x @ weight[i] + bias[i, 0]
        if j < len(net.weights) - 1:
            x = torch.clamp(x, min=0)
    return x[0]


def plain_loss(agent, batch, actions, log_density, args):
    """The critics' loss and that of alpha', by loops over transitions, critics, sources and actions."""
    critics, targets = agent.critic.net, agent.target_critic.net
    n, td, gaps = args.cql_actions, [], []
    for b in range(len(batch["rewards"])):
        s, s2, a_data = (batch[k][b] for k in ("observations", "next_observations", "actions"))
        best, best_log_prob = None, None
        for k in range(n if args.cql_max_target else 1):
            a = actions[2 * n + k, b]
            value = min(plain_q(targets, i, torch.cat([s2, a])) for i in range(targets.n))
            if best is None or value > best:
                best, best_log_prob = value, log_density[2 * n + k, b]
        if args.backup_entropy:
            best = best - agent.log_alpha.exp() * best_log_prob
        y = batch["rewards"][b]
        if batch["terminations"][b] == 0:
            y = y + args.gamma * best
        for i in range(critics.n):
            q_data = plain_q(critics, i, torch.cat([s, a_data]))
            td.append((q_data - y.detach()) ** 2)
            total = 0.0
            for row in range(3 * n):  # n uniform actions, then n of pi(.|s) and n of pi(.|s')
                q = plain_q(critics, i, torch.cat([s, actions[row, b]]))
                if args.calibrate and row >= n and q < batch["returns_to_go"][b]:
                    q = batch["returns_to_go"][b]
                density = log_density[row, b].exp() if args.cql_importance_sampling else 1.0
                total = total + torch.exp(q / args.cql_temperature) / density
            if not args.cql_importance_sampling:
                total = total + torch.exp(q_data / args.cql_temperature)
            gap = args.cql_temperature * torch.log(total) - q_data
            low, high = args.cql_clip
            gaps.append(torch.tensor(low) if gap < low else torch.tensor(high) if gap > high else gap)
    mean = lambda values: sum(values) / len(values)
    if not args.cql_lagrange:
        return mean(td) + args.alpha_cql * mean(gaps), torch.zeros(())
    alpha_prime = agent.log_alpha_prime.exp()
    of_critics = mean(td) + alpha_prime.detach() * args.alpha_cql * mean(gaps)
    return of_critics, -alpha_prime * args.alpha_cql * (mean(gaps).detach() - args.cql_gap)


SWITCHES = ("calibrate", "cql_importance_sampling", "cql_max_target", "cql_lagrange")
CASES = [dict(zip(SWITCHES, on)) for on in itertools.product([True, False], repeat=4)]
CASES += [dict(cql_clip=(3.4, 3.9)), dict(backup_entropy=True), dict(cql_temperature=0.5)]
CASES += [dict(backup_entropy=True, cql_max_target=False), dict(cql_clip=(3.4, 3.9), cql_lagrange=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_the_loss_and_its_gradient_equal_plain_loops(calql, case, monkeypatch):
    losses, backward = [], torch.Tensor.backward
    record = lambda x, *of, **more: losses.append(x.detach()) or backward(x, *of, **more)
    monkeypatch.setattr(torch.Tensor, "backward", record)
    for seed, num_critics in ((1, 2), (2, 3)):
        torch.manual_seed(seed)
        args = make_args(calql, num_critics=num_critics, alpha_cql=2.0, **case)
        agent, batch = make_agent(calql, args), make_batch()
        torch.manual_seed(3)
        actions, log_density = calql.drawn_actions(agent.actor, batch, N_ACTIONS)
        q = torch.stack([agent.critic(batch["observations"], x) for x in actions[N_ACTIONS:]], dim=1)
        batch["returns_to_go"][1] = q[:, :, 1].median().item() + 1e-4  # bounds half of the values
        close(log_density[:N_ACTIONS], torch.full((N_ACTIONS, B), -ACT * math.log(2)))
        torch.manual_seed(3)
        losses.clear()
        metrics = calql.calql_gradients(agent, batch, args, False)
        assert 0 < metrics["below_return"] < 1
        of_critics, of_alpha = plain_loss(agent, batch, actions, log_density, args)
        close(losses[0], of_critics + of_alpha)
        expected = torch.autograd.grad(of_critics, list(agent.critic.parameters()))
        for grad, other in zip(gradients(agent.critic), expected, strict=True):
            close(grad, other, rtol=1e-4, atol=1e-5)
        if args.cql_lagrange:
            close(agent.log_alpha_prime.grad, torch.autograd.grad(of_alpha, agent.log_alpha_prime)[0])
        else:
            assert agent.log_alpha_prime.grad is None
        for module in (agent.actor, agent.target_critic):
            assert set(gradients(module)) == {None}, "the CQL term moves the critics alone"
        assert agent.log_alpha.grad is None


@pytest.mark.parametrize("target, rises", [(-50.0, True), (50.0, False)])
def test_a_lagrange_step_moves_alpha_prime_towards_the_gap(calql, target, rises):
    args = make_args(calql, cql_lagrange=True, cql_gap=target)
    agent = make_agent(calql, args)
    optimizers = calql.make_optimizers(agent, "muon", args)
    calql.calql_gradients(agent, make_batch(), args, True)
    calql.apply_gradients(agent, optimizers, args)
    close(agent.log_alpha_prime, 0.3 + (args.critic_lr if rises else -args.critic_lr))  # Adam's first step


# === Returns-to-go =========================================================================================


def test_returns_are_unknown_until_the_episode_ends(calql):
    # terminated: 4, 2 + 2 = 4, 1 + 2 = 3; truncated after -1, -1, -1: -1 / (1 - 0.5) = -2 for ever; under way
    columns = {name: np.zeros((1, 1)) for name in ("observations", "actions", "next_observations")}
    columns |= {name: np.zeros(1) for name in ("rewards", "terminations", "returns_to_go")}
    buffer = calql.ReplayBuffer(columns, "cpu", 100)
    known = lambda: buffer.split(buffer.rows[: buffer.size])["returns_to_go"].tolist()
    for reward, ended in ((1, 0), (2, 0), (4, 1), (-1, 0), (-1, 0), (-1, 0), (7, 0)):
        buffer.add(observations=0, actions=0, next_observations=0, rewards=reward, terminations=ended,
                   returns_to_go=-math.inf)  # fmt: skip
        if int(buffer.size) in (3, 6):
            calql.complete_returns(buffer, int(buffer.size) - 3, 0.5)
        if int(buffer.size) == 4:
            assert known() == [3, 4, 4, -math.inf], "never 0"
    assert known() == [3, 4, 4, -2, -2, -2, -math.inf]


# === Does it learn? ========================================================================================


def test_cql_and_cal_ql_learn_what_they_promise(calql):
    data, found = calql.Dataset(calql.TASKS["pendulum-medium-replay"][0]), []
    for calibrate in (False, True):
        torch.manual_seed(1)
        args = calql.Args(hidden_sizes=(32, 32), batch_size=64, actor_lr=1e-3, critic_lr=3e-3, tau=0.1,
                          gamma=0.8, cql_actions=4, alpha_cql=20.0, calibrate=calibrate)  # fmt: skip
        agent = calql.Agent(3, 1, args)
        calql.set_statistics(agent, data)
        buffer = calql.ReplayBuffer(calql.with_returns(data, args.gamma), "cpu")
        optimizers = calql.make_optimizers(agent, "adam", args)
        for _ in range(300):
            calql.calql_gradients(agent, buffer.split(buffer.sample_rows(64)), args, True)
            calql.apply_gradients(agent, optimizers, args)
        batch = buffer.split(buffer.sample_rows(4_000))
        metrics = calql.calql_gradients(agent, batch, args, False)
        found.append([metrics[name].item() for name in ("q", "q_random", "q_policy")])
    (on_data, random, cql_policy), (_, _, policy) = found
    returns = batch["returns_to_go"].mean()
    assert random < on_data - 0.15, "CQL: random actions end below the recorded ones"
    assert policy > returns, "Cal-QL: values of the policy's actions don't fall below the returns"
    assert policy > cql_policy + 1, "and it is the calibration that holds them up"


# === The whole script ======================================================================================

WORDS = """--env-id pendulum-medium-replay --hidden-sizes 16 --batch-size 32 --eval-episodes 1 --cql-actions 3
    --cql-lagrange --offline-steps 40 --online-steps 650 --eval-every 150 --handover-eval-every 650 """


def test_a_killed_run_goes_on_with_the_returns_it_knew(calql, tmp_path, monkeypatch):
    """Killed in the third episode, whose returns nobody knows yet, it ends as an unbroken run does."""
    raised, evaluate = calql.returns_to_go, calql.Run.evaluate
    monkeypatch.setattr(calql, "returns_to_go", lambda *of: raised(*of) + 1000)  # Q is near 0: so they bound

    def kill(run, phase, step, *more):
        if (phase, step) == ("online", 450):
            raise KeyboardInterrupt
        evaluate(run, phase, step, *more)

    def start(words, ends):
        monkeypatch.setattr(calql.Run, "evaluate", ends)
        monkeypatch.setattr(sys, "argv", [calql.__file__, *words.split()])
        calql.main()

    monkeypatch.chdir(tmp_path)
    start(WORDS, evaluate)
    with pytest.raises(KeyboardInterrupt):
        start(f"{WORDS} --checkpoint-every 0", kill)
    one, two = sorted(Path("runs").iterdir())  # names end with the time
    state = torch.load(two / "last.pt", weights_only=True)
    assert (state["phase"], state["step"]) == ("online", 400)
    rewards, terminations, known = state["parts"]["online"]["rows"][:400, [4, 8, 9]].numpy().T
    expected = calql.returns_to_go(rewards, terminations, np.array([200, 400]), 0.99)
    close(torch.as_tensor(known), expected, rtol=1e-6)
    start(f"--resume {two}", evaluate)
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
