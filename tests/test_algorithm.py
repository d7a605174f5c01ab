"""The equations: every loss, gradient, network and optimiser step against numbers known from elsewhere."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

OBS, ACT = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-6, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


SMALL = dict(hidden_sizes=(8, 8), gamma=0.9, score_hidden_sizes=(6,), score_sigma=0.3, num_critics=2)
SMALL |= dict(target_critics=0, critic_layer_norm=False, advantage=None, policy_share=0.0)
SMALL |= dict(alpha_psi="learned")


def make_agent(smac, **settings):
    """Small networks, with a temperature of 0.5 and target critics of their own: (agent, args)."""
    args = smac.Args(**SMALL | settings)
    agent = smac.Agent(OBS, ACT, args, smac.ScoreNet(OBS, ACT, args).requires_grad_(False))
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.5))
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for p in [*agent.critic.net.gains, *agent.critic.net.shifts]:
            p.add_(torch.rand_like(p))
    return agent, args


def make_batch(size=16, dtype=torch.float32):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)
    terminations = (torch.arange(size) % 3 == 0).to(dtype)
    return dict(observations=draw(size, OBS), actions=torch.tanh(draw(size, ACT)), outcomes=draw(size),
                next_observations=draw(size, OBS), terminations=terminations, rewards=draw(size))  # fmt: skip


# === Orthogonalisation and Muon ============================================================================


@pytest.mark.parametrize("rows, cols", [(256, 23), (23, 256), (64, 64)])
def test_orthogonalize_maps_each_singular_value_and_keeps_the_singular_vectors(smac, rows, cols):
    rank = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, rank, dtype=torch.float64))[0]
    s = torch.logspace(0, -1, rank, dtype=torch.float64)
    x = s / s.norm()  # all above 1%
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    result = smac.orthogonalize((u @ torch.diag(s) @ v.T)[None].float())[0].double()
    close(result, u @ torch.diag(x) @ v.T, atol=1e-4)
    assert torch.linalg.matrix_norm(result - u @ v.T, ord=2) < 0.32  # the exact polar factor is U V^T


def test_orthogonalize_takes_each_matrix_of_a_stack_on_its_own_at_any_scale(smac):
    g = torch.randn(3, 24, 40)
    alone = torch.cat([smac.orthogonalize(matrix[None]) for matrix in g])
    close(smac.orthogonalize(g * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]), alone, 1e-3, 1e-4)
    close(smac.orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def muon_steps(smac, groups, grads):
    """Stacks (N, fan_in, fan_out) after Muon steps; groups: (stack, settings), grads: a list per step."""
    params = [nn.Parameter(start.clone()) for start, _ in groups]
    muon = smac.Muon([{"params": [p]} | settings for p, (_, settings) in zip(params, groups)], lr=0.0)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        muon.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("fan_in, fan_out", [(256, 64), (64, 256), (128, 128)])
def test_muon_steps_every_matrix_of_a_stack_like_torch_muon(smac, fan_in, fan_out):
    start, grads = 0.3 * torch.randn(2, fan_in, fan_out), torch.randn(3, 2, fan_in, fan_out)
    grads[:, 1] *= 100
    theirs = [nn.Parameter(matrix.T.clone()) for matrix in start]  # (out, in)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for g in grads:
        for p, matrix in zip(theirs, g):
            p.grad = matrix.T.clone()
        reference.step()
    ours = muon_steps(smac, [(start, dict(lr=0.02))], [[g] for g in grads])[0]
    for matrix, before, p in zip(ours, start, theirs):
        assert relative_error(matrix - before, p.detach().T - before) < 2e-2  # theirs is in bfloat16


def test_muon_steps_each_group_along_its_nesterov_momentum(smac, monkeypatch):
    monkeypatch.setattr(smac, "orthogonalize", lambda u: u)
    start, grads = torch.randn(2, 6, 4), torch.randn(4, 2, 2, 6, 4)
    settings = dict(lr=0.1), dict(lr=0.3, momentum=0.5)  # 0.95 by default
    found = muon_steps(smac, [(start, group) for group in settings], [list(g) for g in grads])
    for i, (lr, mu) in enumerate([(0.1, 0.95), (0.3, 0.5)]):
        m, expected = torch.zeros(2, 6, 4), start
        for g in grads[:, i]:
            m = mu * m + (1 - mu) * g
            expected = expected - lr * 0.2 * math.sqrt(6) * ((1 - mu) * g + mu * m)
        close(found[i], expected)


def test_muon_leaves_a_parameter_without_gradient_alone(smac):
    groups, g = [(torch.randn(1, 8, 8), dict(lr=0.02)) for _ in range(2)], list(torch.randn(2, 1, 8, 8))
    one_step, then_first = muon_steps(smac, groups, [g]), muon_steps(smac, groups, [g, [g[0], None]])
    assert not torch.equal(then_first[0], one_step[0])
    assert torch.equal(then_first[1], one_step[1])  # no step along the old momentum


@pytest.mark.parametrize("kind", ["muon", "adam"])
@pytest.mark.parametrize("hidden_sizes, middle", [((8,), []), ((8, 8), [1]), ((8, 8, 8), [1, 2])])
def test_optimizers_split_the_parameters_between_muon_and_adam(smac, kind, hidden_sizes, middle):
    settings = dict(muon_lr=0.1, actor_lr=0.2, critic_lr=0.3, critic_layer_norm=True)
    agent, args = make_agent(smac, hidden_sizes=hidden_sizes, **settings)
    nets = agent.critic.net, agent.actor.net
    muon = {id(net.weights[i]) for net in nets for i in middle if kind == "muon"}
    slow, fast = [*agent.actor.parameters(), agent.log_alpha], [*agent.critic.parameters()]
    fast += agent.score_scale.parameters()  # no target critic, no score estimator
    expected = {id(p): ("adam", lr) for params, lr in ((slow, 0.1), (fast, 0.15)) for p in params}
    expected |= {identity: ("muon", 0.05) for identity in muon}
    optimizers = smac.make_optimizers(agent, kind, args, rate=0.5)
    found = [(id(p), (name, group["lr"]))
             for name, optimizer in optimizers.items()
             for group in optimizer.param_groups
             for p in group["params"]]  # fmt: skip
    assert dict(found) == expected and len(found) == len(expected)  # nothing twice, nothing forgotten
    assert all(type(optimizer).__name__.lower() == name for name, optimizer in optimizers.items())


# === Losses, by hand =======================================================================================


def test_td_target_bootstraps_unless_terminated(smac):
    rewards, terminations = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    next_q = torch.tensor([[10.0, 20.0, -4.0], [12.0, 18.0, -6.0]])
    next_log_prob = torch.tensor([-1.0, 5.0, 2.0])
    # 1 + 0.9 (10 + 0.5 * 1) = 10.45;  terminated: 2;  3 + 0.9 (-6 - 0.5 * 2) = -3.3
    y = smac.td_target(rewards, terminations, next_q, next_log_prob, torch.tensor(0.5), 0.9)
    close(y, [10.45, 2.0, -3.3])


def test_td_loss_by_hand(smac):
    q, y = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]]), torch.tensor([2.0, 0.0, 3.0])
    # critic 1: (1 + 4 + 0) / 3, critic 2: (4 + 0 + 4) / 3, mean 13 / 6
    close(smac.td_loss(q, y), 13 / 6)


@pytest.mark.parametrize("num_critics, expected", [(1, -1.0 - 1.75), (2, -1.25), (3, -2.75)])
def test_actor_loss_takes_the_minimum_of_two_critics_and_the_mean_of_three(smac, num_critics, expected):
    q, log_prob = torch.tensor([[1.0, 5.0], [3.0, 2.0], [5.0, 2.0]]), torch.tensor([-1.0, 2.0])
    # entropy part (-0.5 + 1) / 2 = 0.25; Q part: (1 + 5) / 2; (1 + 2) / 2; (3 + 3) / 2
    close(smac.actor_loss(q[:num_critics], log_prob, torch.tensor(0.5)), expected)


@pytest.mark.parametrize("log_probs, expected", [([1.0, 4.0], -0.25), ([1.0, 1.0], 0.5)])
def test_temperature_rises_exactly_while_the_entropy_is_below_its_target(smac, log_probs, expected):
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    log_prob = torch.tensor(log_probs, requires_grad=True)
    loss = smac.temperature_loss(log_alpha, log_prob, -2.0)
    close(loss, expected)  # entropy -2.5: -0.5 ((1 - 2) + (4 - 2)) / 2; entropy -1: -0.5 (1 - 2)
    loss.backward()
    close(log_alpha.grad, expected)  # of -alpha (...), along which descent raises log alpha at entropy -2.5
    assert log_prob.grad is None  # the policy does not follow this loss


def test_score_matching_loss_by_hand(smac):
    grad_q, score = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    # row 1: (1 - 2)^2 + (2 + 2)^2 = 17;  row 2: (3 - 1)^2 + (4 - 0.25)^2 = 18.0625;  mean 17.53125
    close(smac.score_matching_loss(grad_q, score, torch.tensor([[2.0], [0.5]])), 17.53125)


# === Whose gradient goes where =============================================================================


def expected_gradients(smac, agent, batch, args):
    """What SAC puts into `.grad`, by name, each from its own loss; the rest has none."""
    torch.manual_seed(1)
    y = smac.bellman_target(agent, batch, args)
    critic = ((agent.critic(batch["observations"], batch["actions"]) - y) ** 2).mean()
    actions, log_prob = agent.actor.sample(batch["observations"])
    q = agent.critic(batch["observations"], actions)
    q = torch.minimum(q[0], q[1]) if len(q) == 2 else (q[0] + q[1] + q[2]) / 3
    actor = (0.5 * log_prob - q).mean()
    temperature = -agent.log_alpha.exp() * (log_prob.mean().detach() - ACT)  # target entropy -|A|
    result = {}
    for loss, prefix in ((critic, "critic."), (actor, "actor."), (temperature, "log_alpha")):
        params = {name: p for name, p in agent.named_parameters() if name.startswith(prefix)}
        result |= zip(params, torch.autograd.grad(loss, list(params.values())))
    return result


@pytest.mark.parametrize("num_critics, actor", [(2, True), (2, False), (3, True)])
def test_an_update_takes_every_gradient_before_any_step_and_then_moves_the_targets(smac, num_critics, actor):
    (agent, args), batch = make_agent(smac, tau=0.25, num_critics=num_critics), make_batch()
    grads = expected_gradients(smac, agent, batch, args)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    torch.manual_seed(1)
    halves = [agent.critic.parameters(), [*agent.actor.parameters(), agent.log_alpha]]
    optimizers = {str(i): torch.optim.SGD(half, lr=0.5) for i, half in enumerate(halves)}
    metrics = smac.update(agent, optimizers, batch, args, actor=actor)
    assert ("critic_loss" in metrics) and ("actor_loss" in metrics) == actor
    for name, p in agent.named_parameters():
        assert p.grad is None  # no gradient is stepped twice
        stepped = name in grads and (actor or name.startswith("critic."))
        expected = before[name] - 0.5 * grads[name] if stepped else before[name]
        if name.startswith("target_critic."):
            source = dict(agent.named_parameters())[name.removeprefix("target_")]
            expected = 0.75 * before[name] + 0.25 * source
        close(p, expected)


def test_an_agent_starts_with_equal_targets_and_a_temperature_of_1(smac):
    agent = smac.Agent(OBS, ACT, smac.Args(hidden_sizes=(8, 8)))
    for p, target in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True):
        assert torch.equal(p, target) and not target.requires_grad
    assert agent.log_alpha.exp() == 1


# === The gradient of the critics' loss, score term included ================================================


def double_setup(smac, **settings):
    """Networks and batch in float64; the policy is its mode, so no test depends on the order of draws."""
    agent, args = make_agent(smac, **dict(hidden_sizes=(5, 5)) | settings)
    agent.double().actor.sample = lambda s: (agent.actor.mode(s), (s**2).sum(-1))
    return agent, make_batch(size=6, dtype=torch.float64), args


def smac_gradients(smac, agent, batch, args):
    """Gradients of the critics and of alpha_psi, which are the only ones."""
    agent.zero_grad()
    smac.smac_critic_gradients(agent, batch, args)
    params = [*agent.critic.parameters(), *agent.score_scale.parameters()]
    assert all(p.grad is None or any(p is q for q in params) for p in agent.parameters())
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def test_gradient_of_the_score_term_agrees_with_finite_differences(smac):
    agent, batch, args = double_setup(smac, kappa=1.0)
    params, matched = smac_gradients(smac, agent, batch, args)
    args.kappa = 0.0
    without, h = smac_gradients(smac, agent, batch, args)[1], 1e-4

    @torch.no_grad()
    def loss() -> float:  # L_SM without any automatic differentiation
        q = lambda shift: agent.critic(batch["observations"], batch["actions"] + shift).mean(dim=0)
        grad_q = torch.stack([(q(h * e) - q(-h * e)) / (2 * h) for e in torch.eye(ACT).double()], dim=1)
        alpha_psi = F.softplus(agent.score_scale(batch["observations"])[0])
        score = agent.score_net.score(batch["observations"], batch["actions"], batch["outcomes"])
        return ((grad_q - alpha_psi * score) ** 2).sum(1).mean()

    for p, g0, g1 in zip(params, without, matched, strict=True):
        direction, values = torch.randn_like(p), []
        for sign in (1, -1):
            p.data += sign * h * direction
            values.append(loss())
            p.data -= sign * h * direction
        close(((g1 - g0) * direction).sum(), (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-6)


POLICY, HALF, TIED = dict(policy_share=1.0), dict(policy_share=0.5), dict(alpha_psi="temperature")
ZERO, SHUFFLED = dict(score_control="zero"), dict(score_control="shuffled")
VARIANTS = [{}, POLICY, TIED, ZERO, SHUFFLED, POLICY | TIED | SHUFFLED, dict(num_critics=3), HALF | TIED]
VARIANTS += [POLICY | dict(num_critics=3, critic_layer_norm=True), dict(critic_layer_norm=True)]
VARIANTS += [dict(critic_activation="relu", hidden_sizes=(4, 5, 6)), dict(num_critics=1, hidden_sizes=(5,))]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_smac_critic_gradients_are_those_of_the_loss_plainly_written(smac, settings):
    agent, batch, args = double_setup(smac, kappa=3.0, **settings)
    params, found = smac_gradients(smac, agent, batch, args)
    s, a = batch["observations"], batch["actions"]
    own = int(6 * settings.get("policy_share", 0))
    points = torch.cat([agent.actor.mode(s[:own]).detach(), a[own:]])
    score = agent.score_net.score(s, points, batch["outcomes"])
    score = score * 0 if settings.get("score_control") == "zero" else score
    if settings.get("score_control") == "shuffled":
        score = torch.cat([score[-1:], score[:-1]])  # every transition gets another's
    points = points.clone().requires_grad_(True)
    grad_q = torch.autograd.grad(agent.critic(s, points).mean(dim=0).sum(), points, create_graph=True)[0]
    alpha_psi = 0.5 if "alpha_psi" in settings else F.softplus(agent.score_scale(s)[0])
    l_sm = ((grad_q - alpha_psi * score) ** 2).sum(1).mean()
    next_s = batch["next_observations"]
    future = agent.target_critic(next_s, agent.actor.mode(next_s)).amin(dim=0) - 0.5 * (next_s**2).sum(-1)
    y = (batch["rewards"] + 0.9 * (1 - batch["terminations"]) * future).detach()
    l_ac = ((agent.critic(s, a) - y) ** 2).mean()
    expected = torch.autograd.grad(l_ac + 3.0 * l_sm, params, allow_unused=True)
    for p, grad, other in zip(params, found, expected, strict=True):
        close(grad, torch.zeros_like(p) if other is None else other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor, sign", [(0.8, -1), (1.0, 0), (1.25, 1)])
def test_alpha_psi_is_led_to_the_least_squares_scale_of_the_score(smac, factor, sign):
    agent, batch, args = double_setup(smac)
    points = batch["actions"].clone().requires_grad_(True)
    q = agent.critic(batch["observations"], points).mean(dim=0).sum()
    grad_q, noise = torch.autograd.grad(q, points)[0], torch.randn(6, ACT).double()
    score = grad_q / 2 + 0.1 * grad_q.std() * noise
    agent.score_net.score = lambda s, a, w: score
    best = (grad_q * score).sum() / (score**2).sum()
    for p in agent.score_scale.parameters():
        nn.init.zeros_(p)
    nn.init.constant_(agent.score_scale.biases[-1], torch.log(torch.expm1(factor * best)))  # softplus^-1
    smac_gradients(smac, agent, batch, args)
    slope = agent.score_scale.biases[-1].grad.item()
    assert np.sign(slope if abs(slope) > 1e-9 else 0) == sign


@pytest.mark.slow
@pytest.mark.parametrize("kind, critic", [("muon", "smac_critic_gradients"), ("adam", "critic_gradients")])
def test_a_compiled_update_gives_the_numbers_of_the_plain_one(smac, kind, critic):
    agent, args = make_agent(smac, policy_share=0.5)
    agents, batch, losses = [agent, copy.deepcopy(agent)], make_batch(), []
    for one, step in zip(
        agents, (smac.update, torch.compile(smac.update, options={"fallback_random": True}))
    ):
        optimizers = smac.make_optimizers(one, kind, args)
        for seed in range(5):
            torch.manual_seed(seed)
            metrics = step(one, optimizers, batch, args, getattr(smac, critic))
        losses.append(metrics["critic_loss"])
    close(losses[1], losses[0], rtol=1e-4)
    for p, q in zip(*(one.parameters() for one in agents), strict=True):
        close(p, q, rtol=1e-4, atol=1e-5)


# === The score estimator ===================================================================================


def exact_denoiser(mean, variance):
    """The best eps for actions from N(mean, variance): a_t ~ N(c mean, c^2 variance + sigma^2)."""

    def forward(self, observations, noised, outcomes, levels):
        sigma = self.sigma[levels, None]
        c = (1 - sigma**2).sqrt()
        return sigma * (noised - c * mean) / (c**2 * variance + sigma**2)

    return forward


def test_denoising_loss_sums_over_actions_at_the_noise_of_each_level(smac, monkeypatch):
    net, batch, seen = make_agent(smac)[0].score_net, make_batch(9_000), []
    close(net.sigma, [0.3 * 3 ** (level / 4) for level in range(5)])  # geometric, up to 0.9

    def wrong(self, observations, noised, outcomes, levels):  # by 1 and -2, at any noise
        assert observations is batch["observations"] and outcomes is batch["outcomes"]
        sigma = self.sigma[levels, None]
        seen.append((noised - (1 - sigma**2).sqrt() * batch["actions"]) / sigma)
        return seen[-1] + torch.tensor([1.0, -2.0])

    monkeypatch.setattr(smac.ScoreNet, "forward", wrong)
    close(smac.denoising_loss(net, batch, torch.arange(9_000) % 5), 5.0, rtol=1e-4)
    for noise in (seen[0][level::5] for level in range(5)):
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_score_of_a_perfect_denoiser_is_the_smoothed_score_of_a_gaussian(smac, monkeypatch):
    mean, variance = torch.tensor([0.6, -0.3]), torch.tensor([0.04, 0.01])
    monkeypatch.setattr(smac.ScoreNet, "forward", exact_denoiser(mean, variance))
    actions = 2 * torch.rand(30, ACT) - 1
    score = make_agent(smac)[0].score_net.score(torch.zeros(30, OBS), actions, torch.zeros(30))
    # at the clean action's point, not at its shrunken copy: a variance of sigma^2 / (1 - sigma^2) around a
    close(score, -(actions - mean) / (variance + 0.09 / 0.91), rtol=1e-5, atol=1e-5)


def estimate(smac, observations, actions, rewards, **settings):
    """The score estimator fitted to episodes of one step, and the columns that it was fitted to."""
    count = len(rewards)
    columns = dict(observations=observations, actions=actions, rewards=rewards, terminations=np.ones(count))
    data = SimpleNamespace(columns=columns, ends=np.arange(1, count + 1))
    sizes = dict(obs_dim=observations.shape[1], act_dim=actions.shape[1], device="cpu")
    rest = dict.fromkeys(["restore", "log", "autosave"], lambda *_, **__: 0)
    run = SimpleNamespace(args=smac.Args(**SMALL | settings), data=data, **sizes, **rest)
    columns = smac.with_outcomes(data, run.args)
    return smac.fit_score_estimator(run, columns), columns


def test_a_fitted_score_agrees_with_a_gaussian_mixture(smac):
    rng, std, count = np.random.default_rng(0), 0.1, 5_000
    rewards = rng.uniform(-1, 1, count)
    centers = np.stack([-0.6 + 0.2 * rewards, 0.5 + 0.2 * rewards], axis=1)  # two modes that move with w
    actions = centers[np.arange(count), rng.integers(2, size=count), None] + std * rng.normal(size=(count, 1))
    data = rng.normal(size=(count, 1)), actions, rewards
    settings = dict(score_hidden_sizes=(64, 64), score_steps=2_000, score_lr=3e-3)
    net, columns = estimate(smac, *data, **settings)
    inputs = (columns[name] for name in ("observations", "actions", "outcomes"))
    score = net.score(*(torch.as_tensor(column, dtype=torch.float32) for column in inputs))
    variance = std**2 + 0.09 / 0.91
    offsets = torch.as_tensor(centers - actions)  # (T, 2)
    share = torch.softmax(-(offsets**2) / (2 * variance), dim=1)
    expected = (share * offsets).sum(1) / variance
    assert relative_error(score.squeeze(1), expected) < 0.15


def test_the_estimator_learns_with_half_of_each_batch_at_level_1_on_19_of_20_episodes(smac, monkeypatch):
    calls, rates, step = [], [], torch.optim.Adam.step

    def loss(net, batch, levels):
        calls.append((set(batch["rewards"].tolist()), levels))
        return sum(p.sum() for p in net.parameters())

    monkeypatch.setattr(smac, "denoising_loss", loss)
    record = lambda adam: rates.append(adam.param_groups[0]["lr"]) or step(adam)
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    data = np.zeros((45, OBS)), np.zeros((45, ACT)), np.arange(45.0)
    net = estimate(smac, *data, score_steps=100, batch_size=40, score_lr=0.1)[0]
    assert not any(p.requires_grad for p in net.parameters())
    np.testing.assert_allclose(rates, [0.05 * (1 + math.cos(math.pi * i / 100)) for i in range(1, 101)])
    *training, (held_out, _) = calls
    assert held_out == {10, 30} and set().union(*(seen for seen, _ in training)) == {*range(45)} - held_out
    levels = torch.stack([levels for _, levels in training])
    assert (levels[:, :20] == 0).all() and torch.bincount(levels[:, 20:].flatten()).min() > 300  # of 400


# === Policy and networks ===================================================================================


@pytest.mark.parametrize("value", [20.0, -20.0])
def test_log_prob_is_exact_where_tanh_saturates(smac, value):
    u = torch.tensor([[value]], requires_grad=True)
    log_prob = smac.squashed_gaussian_log_prob(u, torch.zeros(1, 1), torch.zeros(1, 1))
    log_prob.sum().backward()
    # log N(u; 0, 1) - log(1 - tanh(u)^2), the last term 2 log 2 - 2 |u| up to e^(-40)
    close(log_prob, [-(value**2) / 2 - 0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * abs(value)])
    close(u.grad, [[-value + 2 * math.copysign(1, value)]])


def test_actor_samples_with_the_log_prob_of_its_own_distribution(smac):
    actor, observations = smac.Actor(OBS, ACT, (8,)).double(), torch.randn(500, OBS).double()
    mean, log_std = actor(observations)
    actions, log_prob = actor.sample(observations)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    close(log_prob, reference.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)
    z = (torch.atanh(actions) - mean) / log_std.exp()
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    close(actor.mode(observations), torch.tanh(mean))
    actions.sum().backward()  # reparametrised: the mean and the std both follow the action
    assert (actor.net.biases[-1].grad != 0).all()


def test_log_std_stays_within_its_bounds(smac):
    actor = smac.Actor(OBS, ACT, (8,))
    for output, bound in ((-100.0, -5.0), (100.0, 2.0)):
        actor.net.biases[-1].data[..., ACT:] = output
        close(actor(torch.randn(4, OBS))[1], torch.full((4, ACT), bound))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name, layer, outputs", [("relu", nn.ReLU, 2), ("silu", nn.SiLU, 1)])
def test_a_stack_equals_separate_networks_on_normalised_inputs(smac, name, layer, outputs, layer_norm):
    sizes, n = [4, 6, 5, outputs], 3
    mlp, x = smac.MLP(n, sizes, name, layer_norm), torch.randn(n, 7, 4)
    mlp.mean.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
    mlp.std.copy_(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    for p in [*mlp.gains, *mlp.shifts]:
        p.data = torch.randn_like(p)
    for i in range(n):
        modules = []
        for k, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            modules.append(nn.Linear(fan_in, fan_out))
            modules[-1].weight.data, modules[-1].bias.data = mlp.weights[k][i].T, mlp.biases[k][i, 0]
            if k < 2 and layer_norm:  # before the activation
                modules.append(nn.LayerNorm(fan_out))
                modules[-1].weight.data, modules[-1].bias.data = mlp.gains[k][i, 0], mlp.shifts[k][i, 0]
            modules += [layer()] if k < 2 else []
        alone = nn.Sequential(*modules)
        close(mlp(x)[i], alone((x[i] - mlp.mean) / mlp.std), atol=1e-5)
        close(mlp(x[0])[i], alone((x[0] - mlp.mean) / mlp.std), atol=1e-5)  # (B, I): the same for all


def test_weights_and_biases_are_drawn_as_by_nn_linear(smac):
    mlp = smac.MLP(2, [16, 400, 100])
    for i, fan_in in enumerate([16, 400]):
        bound = fan_in**-0.5
        for p in (mlp.weights[i], mlp.biases[i]):
            assert 0.9 * bound < p.abs().max() <= bound
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.15
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])


def test_every_critic_is_its_own_network_of_observation_and_action(smac):
    critic = smac.Critic(OBS, ACT, smac.Args(num_critics=3, hidden_sizes=(8, 8)))
    observations, actions = torch.randn(5, OBS), torch.randn(3, 5, ACT)
    expected = critic.net(torch.cat([observations.expand(3, 5, OBS), actions], dim=-1))[..., 0]
    close(critic(observations, actions), expected)
    close(critic(observations, actions[1])[1], expected[1])  # one action for all


def test_every_network_is_given_the_statistics_of_the_observations_and_no_others(smac):
    observations = np.array([[1.0, 5.0, -2.0], [3.0, 5.0, 0.0]], np.float32)
    agent, _ = make_agent(smac)
    smac.set_statistics(agent, SimpleNamespace(columns=dict(observations=observations)))
    for module in (agent.actor, agent.critic, agent.target_critic, agent.score_scale, agent.score_net):
        mlp = getattr(module, "net", module)
        others = len(mlp.mean) - OBS
        close(mlp.mean, [2.0, 5.0, -1.0] + [0.0] * others)
        close(mlp.std, [1.001, 0.001, 1.001] + [1.0] * others)
    assert {"net.mean", "net.std"} <= agent.actor.state_dict().keys()  # saved with the policy


# === Replay, seeds, returns ================================================================================


def test_a_replay_buffer_gives_back_the_rows_as_added_and_no_other(smac):
    observations, rewards = np.arange(12.0).reshape(4, 3), np.arange(4.0) - 9
    columns = dict(observations=observations, rewards=rewards, actions=np.ones((4, 1)))
    buffer = smac.ReplayBuffer(columns, "cpu", capacity=9)
    buffer.add(**columns)
    buffer.add(observations=np.full(3, 7.0), actions=np.full(1, 2.0), rewards=-1.5)  # a single transition
    batch = buffer.split(buffer.rows[: buffer.size])
    close(batch["observations"], np.r_[observations, np.full((1, 3), 7.0)])
    close(batch["rewards"], np.r_[rewards, -1.5])
    close(batch["actions"], np.array([[1.0], [1.0], [1.0], [1.0], [2.0]]))
    filled = smac.ReplayBuffer(columns, "cpu")
    assert filled.size == 4 and torch.equal(filled.rows, buffer.rows[:4])
    drawn, counts = buffer.split(buffer.sample_rows(5_000))["rewards"].unique(return_counts=True)
    assert drawn.tolist() == [-9, -8, -7, -6, -1.5] and counts.min() > 850  # 1000 each


def test_stream_seed_is_stable_and_differs_between_phases_seeds_and_indices(smac):
    assert smac.stream_seed(1, "offline") == 940925759  # SHA-256 of "1/offline/0"
    keys = [(seed, phase, i) for seed in range(5) for phase in ("score", "online") for i in range(5)]
    assert len({smac.stream_seed(*key) for key in keys}) == len(keys)


def test_a_truncated_episode_goes_on_at_the_mean_of_its_last_20_rewards(smac):
    # reward -1 for ever: -1 / (1 - 0.99) = -100 at every step
    g = smac.returns_to_go(np.full(150, -1.0), np.zeros(150), np.array([150]), 0.99)
    np.testing.assert_allclose(g, -100)
    rewards = np.r_[np.full(30, 5.0), np.full(10, 1.0), np.full(10, 3.0)]
    g = smac.returns_to_go(rewards, np.zeros(50), np.array([50]), 0.9)
    np.testing.assert_allclose(g[-1], 3 + 0.9 * 2 / 0.1)


@pytest.mark.parametrize("second_terminates", [True, False])
def test_a_terminated_episode_sums_its_rewards_and_none_leaks_into_the_one_before(smac, second_terminates):
    first, second = np.array([1.0, 2.0, 4.0]), np.array([100.0, 100.0])
    terminations = np.array([0.0, 0.0, 0.0, 0.0, float(second_terminates)])
    rewards, ends = np.r_[first, second], np.array([3, 5])
    g = smac.returns_to_go(rewards, terminations, ends, 0.5)
    # truncated: tail 7/3 / 0.5; 4 + 7/3 = 19/3, 2 + 19/6 = 31/6, 1 + 31/12 = 43/12
    np.testing.assert_allclose(g[:3], [43 / 12, 31 / 6, 19 / 3])
    np.testing.assert_allclose(g[3:], [150, 100] if second_terminates else [200, 200])
    columns = dict(rewards=rewards, terminations=terminations)
    args = smac.Args(gamma=0.5, advantage=None)
    w = smac.with_outcomes(SimpleNamespace(columns=columns, ends=ends), args)["outcomes"]
    np.testing.assert_allclose(w, (g - g.mean()) / g.std(), atol=1e-6)


def test_the_advantage_is_what_the_state_does_not_foretell(smac):
    rng, count = np.random.default_rng(1), 4_000
    observations, luck = rng.normal(size=(count, 2)).astype(np.float32), rng.normal(size=count)
    rewards = 3 * np.sin(observations[:, 0]) + observations[:, 1] ** 2 + 0.5 * luck  # episodes of one step
    columns = dict(observations=observations, rewards=rewards, terminations=np.ones(count))
    data = SimpleNamespace(columns=columns, ends=np.arange(1, count + 1))
    w = smac.with_outcomes(data, smac.Args(advantage=2.0))["outcomes"]
    np.testing.assert_allclose([w.mean(), w.std()], [0, 1], atol=1e-4)
    assert np.corrcoef(w, luck)[0, 1] > 0.9
