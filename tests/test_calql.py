"""Cal-QL and CQL: the loss against plain loops, the calibration, the returns-to-go, a short training, a run.

CALQL_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import csv
import itertools
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

OBS, ACT, B, N_ACTIONS = 3, 2, 6, 4
LN2 = math.log(2)


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


def make_agent(calql, num_critics=2, hidden_sizes=(8, 8), activation="relu", layer_norm=False):
    """Small networks with observation statistics, a temperature and target critics of their own."""
    agent = calql.Agent(OBS, ACT, hidden_sizes, num_critics, activation, layer_norm)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.5))
        for p in (*agent.critic.parameters(), *agent.actor.parameters()):
            p.mul_(2)  # values that differ between actions
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
        mean, std = torch.randn(OBS), 0.5 + torch.rand(OBS)
        for mlp in (m for m in agent.modules() if isinstance(m, calql.MLP)):
            mlp.mean[:OBS], mlp.std[:OBS] = mean, std
    return agent


def make_multiplier(value=0.3):
    return nn.ParameterDict({"log_alpha_prime": torch.tensor(value)})


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
    critic = calql.Critic(2, 1, 1, (16,), "relu")
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


def test_calibration_never_lowers_a_value_and_minus_infinity_bounds_nothing(calql):
    q, bounds = torch.randn(2, 5, B, requires_grad=True), torch.randn(B)
    raised = calql.calibrated(q, bounds)
    assert (raised >= q).all() and (raised >= bounds).all() and ((raised == q) | (raised == bounds)).all()
    raised.sum().backward()
    assert torch.equal(q.grad, (q > bounds).float()), "a bounded value is pushed no further"
    assert torch.equal(calql.calibrated(q, torch.full((B,), -math.inf)), q)


@pytest.mark.parametrize("unknown", [True, False])
def test_unknown_returns_make_cal_ql_cql(calql, unknown):
    agent, batch, found = make_agent(calql), make_batch(), []
    batch["returns_to_go"] = torch.full((B,), -math.inf if unknown else 100.0)
    for calibrate in (True, False):
        agent.zero_grad()
        torch.manual_seed(1)
        args = calql.Args(calibrate=calibrate, cql_actions=N_ACTIONS)
        metrics = calql.calql_critic_gradients(agent, make_multiplier(), batch, args)
        found.append((metrics, gradients(agent.critic)))
        assert metrics["below_return"] == (0.0 if unknown else 1.0)
    (one, grads), (other, other_grads) = found
    same = all(torch.equal(one[k], other[k]) for k in one)
    same &= all(torch.equal(g, h) for g, h in zip(grads, other_grads))
    assert same == unknown


def test_drawn_actions_carry_the_density_they_were_drawn_from(calql):
    agent, batch, n = make_agent(calql), make_batch(3), 5_000
    actions, log_density = calql.drawn_actions(agent.actor, batch, n)
    assert actions.shape == (3 * n, 3, ACT) and log_density.shape == (3 * n, 3)
    assert actions.abs().max() <= 1 and not actions.requires_grad and not log_density.requires_grad
    close(log_density[:n], torch.full((n, 3), -2 * LN2))
    close(actions[:n].mean(dim=0), torch.zeros(3, ACT), atol=0.05)
    close(actions[:n].var(dim=0), torch.full((3, ACT), 1 / 3), atol=0.02)
    for i, name in ((1, "observations"), (2, "next_observations")):
        mean, log_std = agent.actor(batch[name])
        mine = actions[i * n : (i + 1) * n]
        inside = (mine.abs() < 0.999).all(dim=-1)
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
        expected = policy.log_prob(mine.clamp(-0.9999, 0.9999)).sum(-1)
        close(log_density[i * n : (i + 1) * n][inside], expected[inside], rtol=1e-2, atol=1e-2)
        close(mine.mean(dim=0), policy.sample((50_000,)).mean(dim=0), atol=0.05)


# === The whole loss, in plain loops ========================================================================


def plain_q(net, i, row):
    """Q of critic i at one row (observation, action), layer by layer."""
    x = (row - net.mean) / net.std
    for j, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = x @ weight[i] + bias[i, 0]
        if j < len(net.weights) - 1:
            x = torch.clamp(x, min=0)
    return x[0]


def plain_loss(agent, log_alpha_prime, batch, actions, log_density, args):
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
            for source in ("uniform", "policy", "next policy"):
                for k in range(n):
                    row = ("uniform", "policy", "next policy").index(source) * n + k
                    q = plain_q(critics, i, torch.cat([s, actions[row, b]]))
                    if args.calibrate and source != "uniform" and q < batch["returns_to_go"][b]:
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
    alpha_prime = log_alpha_prime.exp()
    of_critics = mean(td) + alpha_prime.detach() * args.alpha_cql * mean(gaps)
    return of_critics, -alpha_prime * args.alpha_cql * (mean(gaps).detach() - args.cql_gap)


SWITCHES = ("calibrate", "cql_importance_sampling", "cql_max_target", "cql_lagrange")
CASES = [dict(zip(SWITCHES, on)) for on in itertools.product([True, False], repeat=4)]
CASES += [dict(cql_clip=(3.4, 3.9)), dict(backup_entropy=True), dict(cql_temperature=0.5)]
CASES += [dict(backup_entropy=True, cql_max_target=False), dict(cql_clip=(3.4, 3.9), cql_lagrange=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_the_loss_and_its_gradient_equal_plain_loops(calql, case, monkeypatch):
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda x, **kw: losses.append(x.detach()) or backward(x, **kw)
    )
    for seed, num_critics in ((1, 2), (2, 3)):
        torch.manual_seed(seed)
        agent, batch, multiplier = make_agent(calql, num_critics), make_batch(), make_multiplier()
        args = calql.Args(cql_actions=N_ACTIONS, gamma=0.9, alpha_cql=2.0, **case)
        torch.manual_seed(3)
        actions, log_density = calql.drawn_actions(agent.actor, batch, N_ACTIONS)
        q = torch.stack([agent.critic(batch["observations"], x) for x in actions[N_ACTIONS:]], dim=1)
        batch["returns_to_go"][1] = (
            q[:, :, 1].median().item() + 1e-4
        )  # a bound that holds for half of the values
        torch.manual_seed(3)
        metrics = calql.calql_critic_gradients(agent, multiplier, batch, args)
        assert 0 < metrics["below_return"] < 1
        log_alpha_prime = multiplier["log_alpha_prime"]
        of_critics, of_alpha = plain_loss(agent, log_alpha_prime, batch, actions, log_density, args)
        close(losses.pop(), of_critics + of_alpha, rtol=1e-5)
        assert not losses, "one backward pass serves all"
        expected = torch.autograd.grad(of_critics, list(agent.critic.parameters()))
        for grad, other in zip(gradients(agent.critic), expected, strict=True):
            close(grad, other, rtol=1e-4, atol=1e-5)
        if args.cql_lagrange:
            close(log_alpha_prime.grad, torch.autograd.grad(of_alpha, log_alpha_prime)[0], rtol=1e-5)
        else:
            assert log_alpha_prime.grad is None


def test_gradients_reach_the_critics_and_the_multiplier_alone(calql):
    agent, multiplier = make_agent(calql), make_multiplier()
    args = calql.Args(cql_actions=N_ACTIONS, cql_lagrange=True, backup_entropy=True)
    calql.calql_critic_gradients(agent, multiplier, make_batch(), args)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(agent.critic)[:-1])
    assert multiplier["log_alpha_prime"].grad is not None
    for module in (agent.actor, agent.target_critic):
        assert set(gradients(module)) == {None}
    assert agent.log_alpha.grad is None


@pytest.mark.parametrize("gap, rises", [(5.0, True), (0.5, False)])
def test_alpha_prime_rises_exactly_while_the_gap_is_above_its_target(calql, gap, rises):
    log_alpha_prime, gap = torch.zeros((), requires_grad=True), torch.tensor(gap, requires_grad=True)
    loss = calql.alpha_prime_loss(log_alpha_prime, gap, 5.0, 0.8)
    close(loss, -5.0 * (gap - 0.8))
    loss.backward()
    assert (log_alpha_prime.grad < 0) == rises  # descent goes against the gradient
    assert gap.grad is None, "the critics do not follow this loss"


def test_a_lagrange_step_moves_alpha_prime_towards_the_gap(calql):
    for target, rises in ((-50.0, True), (50.0, False)):
        agent, multiplier = make_agent(calql), make_multiplier()
        args = calql.Args(cql_actions=N_ACTIONS, cql_lagrange=True, cql_gap=target)
        optimizers = calql.make_optimizers(agent, "adam", args, multiplier.parameters())
        calql.calql_update(agent, multiplier, make_batch(), optimizers, args, True)
        assert (multiplier["log_alpha_prime"].item() > 0.3) == rises


# === The split first layer =================================================================================


@pytest.mark.parametrize("activation, layer_norm", [("relu", False), ("silu", False), ("relu", True)])
@pytest.mark.parametrize("hidden_sizes", [(16,), (16, 8), (16, 8, 12)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_values_of_many_actions_equal_the_plain_critic(calql, activation, layer_norm, hidden_sizes, share):
    critic = make_agent(calql, 3, hidden_sizes, activation, layer_norm).critic
    s, a = torch.randn(7, OBS), 2 * torch.rand(5, 7, ACT) - 1
    weight = torch.randn(3, 5, 7) * (torch.rand(3, 5, 7) < share)  # rows without gradient are left out
    q, plain = calql.q_of_actions(critic, s, a), torch.stack([critic(s, x) for x in a], dim=1)
    close(q, plain)
    parameters = list(critic.parameters())
    expected = torch.autograd.grad((weight * plain).sum(), parameters)
    for grad, other in zip(torch.autograd.grad((weight * q).sum(), parameters), expected, strict=True):
        close(grad, other, rtol=1e-4, atol=1e-5)


def test_states_in_several_parts_give_the_same(calql):
    """Large enough that the states are taken in parts of unequal size."""
    critic = calql.Critic(2, OBS, ACT, (256, 256), "relu")
    s, a = torch.randn(70, OBS), 2 * torch.rand(60, 70, ACT) - 1
    q, plain = calql.q_of_actions(critic, s, a), torch.stack([critic(s, x) for x in a], dim=1)
    assert s.shape[0] * a.shape[0] * 512 > 2**21
    close(q, plain, rtol=1e-4)
    weight = torch.randn_like(q) * (torch.rand_like(q) < 0.3)
    grads = [torch.autograd.grad((weight * x).sum(), list(critic.parameters())) for x in (q, plain)]
    for grad, other in zip(*grads, strict=True):
        close(grad, other, rtol=1e-3, atol=1e-3)


# === Returns-to-go =========================================================================================


def stored(calql, rewards, terminated, truncated):
    """A buffer that got the transitions one by one, as online."""
    widths = calql.transition_widths(1, 1) | dict(returns_to_go=0, ends=0)
    buffer = calql.ReplayBuffer(widths, 100)
    for reward, termination, truncation in zip(rewards, terminated, truncated):
        buffer.add([0.0], [0.0], reward, [0.0], termination, -math.inf, termination or truncation)
    return buffer


def returns_of_rows(buffer):
    return buffer.split(buffer.rows[: buffer.size])["returns_to_go"]


def test_returns_are_unknown_until_the_episode_ends(calql):
    buffer = stored(calql, [1.0, 2.0, 4.0], [0, 0, 0], [0, 0, 0])
    calql.complete_returns(buffer, 0, 0.5)
    assert (returns_of_rows(buffer) == -math.inf).all(), "never 0"


def test_returns_at_termination_and_truncation_by_hand(calql):
    # terminated: 4, 2 + 2 = 4, 1 + 2 = 3; truncated after -1, -1, -1: -1 / (1 - 0.5) = -2 for ever; under way
    rewards, terminated = [1.0, 2.0, 4.0, -1.0, -1.0, -1.0, 7.0], [0, 0, 1, 0, 0, 0, 0]
    buffer = stored(calql, rewards, terminated, [0, 0, 0, 0, 0, 1, 0])
    expected = [3, 4, 4, -2, -2, -2, -math.inf]
    calql.complete_returns(buffer, 0, 0.5)
    assert returns_of_rows(buffer).tolist() == expected
    buffer.split(buffer.rows)["returns_to_go"][3:] = -math.inf  # the same, when the second episode ends
    buffer.size = 6
    calql.complete_returns(buffer, 3, 0.5)
    assert returns_of_rows(buffer).tolist() == expected[:6]


def test_the_recordings_returns_are_those_of_the_rewards_that_the_target_sees(calql):
    columns = {name: np.zeros((4, 1), np.float32) for name in ("observations", "actions")}
    columns |= dict(rewards=np.float32([1, 0, 1, 1]), next_observations=np.zeros((4, 1), np.float32),
                    terminations=np.float32([0, 1, 0, 0]))  # fmt: skip
    data = calql.Dataset(columns, np.array([2, 4]), dict(reward_scale=10.0, reward_bias=-5.0), "")
    run = SimpleNamespace(data=data, args=SimpleNamespace(gamma=0.5), device="cpu",
                          spec=dict(obs_dim=1, act_dim=1))  # fmt: skip
    batch = calql.recorded_transitions(run)
    named = batch.split(batch.rows)
    assert named["rewards"].tolist() == [5, -5, 5, 5]
    assert named["returns_to_go"].tolist() == [2.5, -5, 10, 10]  # 5 - 0.5 * 5; 5 / (1 - 0.5)
    assert named["ends"].tolist() == [0, 1, 0, 1]


# === Does it learn? ========================================================================================


@pytest.fixture(scope="module")
def train(calql):
    """Trains on the Pendulum recording: (agent, buffer)."""
    dataset_id, _, _ = calql.TASKS["pendulum-medium-replay"]
    data = calql.load_dataset(dataset_id)

    def trained(steps, **settings):
        torch.manual_seed(1)
        args = calql.Args(batch_size=64, actor_lr=1e-3, critic_lr=3e-3, tau=0.1, gamma=0.8, cql_actions=4,
                          alpha_cql=20.0, **settings)  # fmt: skip
        spec = dict(obs_dim=3, act_dim=1)
        run = SimpleNamespace(data=data, args=args, device="cpu", spec=spec)
        agent, buffer = calql.Agent(3, 1, (32, 32)), calql.recorded_transitions(run)
        calql.set_statistics(agent, data)
        multiplier = make_multiplier()
        optimizers = calql.make_optimizers(agent, "adam", args, multiplier.parameters())
        for _ in range(steps):
            batch = buffer.split(buffer.sample_rows(64))
            calql.calql_update(agent, multiplier, batch, optimizers, args, True)
        return agent, buffer

    return trained


@torch.no_grad()
def values(calql, agent, buffer):
    """Mean Q at recorded, random and the policy's actions, and mean return-to-go, on 4,000 transitions."""
    batch = buffer.split(buffer.sample_rows(4_000))
    actions, _ = calql.drawn_actions(agent.actor, batch, 1)
    q = calql.q_of_actions(agent.critic, batch["observations"], torch.cat([actions, batch["actions"][None]]))
    random, policy, _, data = q.mean(dim=(0, 2)).tolist()
    return data, random, policy, batch["returns_to_go"].mean().item()


def test_cql_and_cal_ql_learn_what_they_promise(calql, train):
    data, random, cql_policy, returns = values(calql, *train(300, calibrate=False))
    assert random < data - 0.15, "CQL: random actions end below the recorded ones"
    _, _, policy, _ = values(calql, *train(300))
    assert policy > returns, "Cal-QL: values of the policy's actions don't fall below the returns"
    assert policy > cql_policy + 1, "and it is the calibration that holds them up"


# === The whole script ======================================================================================

TINY = (
    "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 --cql-actions 3 "
)
TINY += (
    "--offline-steps 40 --online-steps 300 --eval-every 150 --handover-eval-every 50 --snapshot-every 250 "
)
TINY += "--cql-lagrange "


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MINARI_DATASETS_PATH", raising=False)
        yield


class Result:
    def __init__(self, code, cwd):
        self.code, self.directory = code, next((cwd / "runs").glob("*"), None)

    def rows(self):
        with open(self.directory / "metrics.csv") as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    def state(self, name):
        return torch.load(self.directory / name, weights_only=True)


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """Runs a script's main() in this process, in a folder of its own; scalars every 20 updates.

    So few updates leave Q near 0, above all returns: bounds are raised by 1000, so that they hold.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, words, cwd=None):
        cwd = cwd or tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(script, "LOG_EVERY", 20)
            if hasattr(script, "calibrated"):
                calibrated = script.calibrated
                patch.setattr(script, "calibrated", lambda q, bounds: calibrated(q, bounds + 1000))
            patch.setattr(sys, "argv", [script.__file__, *words.split()])
            try:
                script.main()
                code = 0
            except SystemExit as ended:
                code = ended.code
        return Result(code, cwd)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(calql, inside):
    result = inside(calql, TINY)
    assert result.code == 0
    return result


def test_a_run_leaves_rows_checkpoints_and_diagnostics(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = {p: [int(r["step"]) for r in whole.rows() if r["phase"] == p] for p in ("offline", "online")}
    assert steps == {"offline": [0, 40], "online": [*range(0, 301, 50)]}
    names = {path.name for path in whole.directory.iterdir()}
    assert names >= {"config.json", "offline.pt", "final.pt", "learning_curve.png", "calql_baseline.py"}
    assert [path.name for path in (whole.directory / "snapshots").iterdir()] == ["online_000000250.pt"]
    state = whole.state("offline.pt")
    assert state["algorithm"] == state["online_algorithm"] == "Cal-QL"
    assert state["extras"]["multiplier"].keys() == {"log_alpha_prime"}
    events = [EventAccumulator(str(whole.directory / "tensorboard" / phase)).Reload() for phase in steps]
    tags = {tag for found in events for tag in found.Tags()["scalars"]}
    names = ("q", "q_policy", "q_random", "below_return", "cql_gap", "alpha_prime", "critic_loss", "entropy")
    assert {f"{phase}/{name}" for phase in steps for name in names} <= tags


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other))
    return one == other or (one != one and other != other)  # NaN: not known


def test_a_run_stopped_twice_online_ends_as_if_never_stopped(calql, inside, whole, tmp_path, monkeypatch):
    """Both stops lie in an episode, whose returns-to-go were not known when its first part was written."""
    evaluate, run = calql.Run.evaluate, None
    for step in (150, 250):  # the first episode ends at 200

        def stop(self, at, step=step):
            if (self.phase, at) == ("online", step):
                os.kill(os.getpid(), signal.SIGINT)
            evaluate(self, at)

        monkeypatch.setattr(calql.Run, "evaluate", stop)
        run = inside(calql, f"--resume {run.directory}" if run else TINY, tmp_path)
        assert run.code == 130 and run.state("last.pt")["step"] == step
    monkeypatch.setattr(calql.Run, "evaluate", evaluate)
    run = inside(calql, f"--resume {run.directory}", tmp_path)
    assert run.code == 0 and run.rows() == whole.rows()
    for name in ("agent", "extras", "optimizers", "random_states"):
        assert equal(run.state("final.pt")[name], whole.state("final.pt")[name]), name


def test_sac_takes_its_checkpoint_online(whole, inside):
    sac = load("sac_finetune", ROOT / "sac_finetune.py")
    words = (
        f"--checkpoint {whole.directory / 'offline.pt'} --online-steps 60 --eval-every 60 --eval-episodes 2"
    )
    taken = inside(sac, words)
    assert taken.code == 0
    last, first = (r.rows() for r in (whole, taken))
    last = [row for row in last if row["phase"] == "offline"][-1]
    first = next(row for row in first if row["phase"] == "online")
    assert first["return_mean"] == last["return_mean"], "it starts from the policy that was handed over"


def test_settings_out_of_range_are_one_sentence(calql, inside):
    for words in ("--cql-actions 0", "--checkpoint absent.pt"):
        assert str(inside(calql, TINY + words).code).startswith("error: ")
