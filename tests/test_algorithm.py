"""The equations: every loss, gradient, network and optimiser step against numbers known from elsewhere."""

import contextlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.utils.flop_counter import FlopCounterMode

OBS, ACT = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-6, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


def make_agent(smac, num_critics=2, hidden_sizes=(8, 8), activation="silu"):
    """Small networks, with a temperature and target critics of their own."""
    agent = smac.Agent(OBS, ACT, hidden_sizes, num_critics, activation)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.5))
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return agent


def make_batch(size=16, dtype=torch.float32):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)
    terminations = (torch.arange(size) % 3 == 0).to(dtype)
    return dict(observations=draw(size, OBS), actions=torch.tanh(draw(size, ACT)), rewards=draw(size),
                next_observations=draw(size, OBS), terminations=terminations, outcomes=draw(size),
                scores=draw(size, ACT))  # fmt: skip


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


# === Orthogonalisation =====================================================================================


@pytest.mark.parametrize("rows, cols", [(256, 23), (23, 256), (64, 64)])
def test_orthogonalize_maps_each_singular_value_and_keeps_the_singular_vectors(smac, rows, cols):
    rank = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, rank, dtype=torch.float64))[0]
    s = torch.logspace(0, -1, rank, dtype=torch.float64)
    x = s / s.norm()  # all above 1%
    assert x.min() > 1e-2
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    result = smac.orthogonalize((u @ torch.diag(s) @ v.T)[None].float())[0].double()
    close(result, u @ torch.diag(x) @ v.T, atol=1e-4)
    # the exact polar factor U V^T, by SVD: singular values 1 where Newton-Schulz promises [0.68, 1.134]
    left, _, right = torch.linalg.svd(u @ torch.diag(s) @ v.T, full_matrices=False)
    assert torch.linalg.matrix_norm(result - left @ right, ord=2) < 0.32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.68 and values.max() < 1.135


def test_orthogonalize_is_equivariant_under_transposition(smac):
    g = torch.randn(2, 24, 40)
    close(smac.orthogonalize(g.mT), smac.orthogonalize(g).mT, atol=1e-5)


def test_orthogonalize_is_invariant_to_the_scale_of_the_gradient(smac):
    g = torch.randn(2, 24, 40)
    for factor in (1e-3, 1e3):
        close(smac.orthogonalize(factor * g), smac.orthogonalize(g), rtol=1e-3, atol=1e-4)


def test_orthogonalize_treats_each_matrix_of_a_stack_on_its_own(smac):
    g = torch.randn(3, 24, 40) * torch.tensor([1e-2, 1.0, 1e2])[:, None, None]
    close(smac.orthogonalize(g), torch.cat([smac.orthogonalize(matrix[None]) for matrix in g]), atol=1e-5)


def test_orthogonalize_works_on_the_smaller_gram_matrix(smac):
    """Tall matrices are transposed: the same result without that, but at 20 times the cost here."""
    flops = []
    for shape in ((1, 10, 200), (1, 200, 10)):
        with FlopCounterMode(display=False) as counter:
            smac.orthogonalize(torch.randn(shape))
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] == flops[1] <= 5 * (4 * 10 * 10 * 200 + 2 * 10**3)  # X X^T, A A and B X, five times


def test_orthogonalize_of_zero_is_zero(smac):
    close(smac.orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


# === Muon ==================================================================================================


def muon_steps(smac, start, grads, **settings):
    """Stacks (N, fan_in, fan_out) after Muon steps on the gradients, a list per step."""
    params = [nn.Parameter(p.clone()) for p in start]
    muon = smac.Muon(params, **settings)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = None if g is None else g.clone()
        muon.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("fan_in, fan_out", [(256, 64), (64, 256), (256, 256)])
def test_muon_steps_like_torch_muon(smac, fan_in, fan_out, scale):
    settings = dict(lr=0.02, weight_decay=2.0)
    start = 0.3 * torch.randn(2, fan_in, fan_out)
    grads = [torch.randn(2, fan_in, fan_out) for _ in range(3)]
    theirs = [nn.Parameter(matrix.T.clone()) for matrix in start]  # (out, in)
    reference = torch.optim.Muon(theirs, adjust_lr_fn=scale, **settings)
    for g in grads:
        for p, matrix in zip(theirs, g):
            p.grad = matrix.T.clone()
        reference.step()
    ours = muon_steps(smac, [start], [[g] for g in grads], scale=scale, **settings)[0]
    expected = torch.stack([p.detach().T for p in theirs])
    assert relative_error(ours - start, expected - start) < 2e-2  # torch's Newton-Schulz is in bfloat16


def test_muon_update_before_orthogonalisation_is_nesterov_momentum(smac, monkeypatch):
    seen = []
    monkeypatch.setattr(smac, "orthogonalize", lambda u, *_: seen.append(u.clone()) or u)
    start, grads = torch.randn(2, 6, 4), torch.randn(4, 2, 6, 4)
    w = muon_steps(smac, [start], [[g] for g in grads], lr=0.1, weight_decay=0.5)[0]
    m, expected = torch.zeros(2, 6, 4), start
    for g, u in zip(grads, seen, strict=True):
        m = 0.95 * m + 0.05 * g
        close(u, 0.05 * g + 0.95 * m)
        # decay by the plain lr, step by lr * 0.2 sqrt(max(fan_in, fan_out))
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(6) * u
    close(w, expected)


def test_muon_original_scale_comes_from_fan_out_over_fan_in(smac, monkeypatch):
    monkeypatch.setattr(smac, "orthogonalize", lambda u, *_: torch.ones_like(u))
    for (fan_in, fan_out), s in {(4, 16): 2.0, (16, 4): 1.0}.items():  # sqrt(max(1, fan_out / fan_in))
        start = [torch.zeros(1, fan_in, fan_out)]
        w = muon_steps(smac, start, [[torch.randn(1, fan_in, fan_out)]], lr=0.1, scale="original")[0]
        close(w, torch.full_like(w, -0.1 * s))


def test_muon_steps_a_stack_like_its_matrices_one_by_one(smac):
    start, grads = torch.randn(3, 16, 24), torch.randn(3, 3, 16, 24)
    together = muon_steps(smac, [start], [[g] for g in grads], lr=0.02)[0]
    apart = [
        muon_steps(smac, [start[i : i + 1]], [[g[i : i + 1]] for g in grads], lr=0.02)[0] for i in range(3)
    ]
    close(together, torch.cat(apart), atol=1e-5)


def test_muon_steps_critics_and_actor_together_as_apart(smac):
    shapes = [(2, 16, 16), (1, 16, 16), (2, 16, 24), (1, 24, 16)]
    start = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    together = muon_steps(smac, start, grads, lr=0.02)
    for i, w in enumerate(together):
        close(w, muon_steps(smac, [start[i]], [[step[i]] for step in grads], lr=0.02)[0], atol=1e-5)


def test_muon_leaves_a_parameter_without_gradient_alone(smac):
    start = [torch.randn(1, 8, 8), torch.randn(1, 8, 8)]
    g = [torch.randn(1, 8, 8), torch.randn(1, 8, 8)]
    settings = dict(lr=0.02, weight_decay=0.5)
    one_step = muon_steps(smac, start, [g], **settings)
    then_only_first = muon_steps(smac, start, [g, [g[0], None]], **settings)
    assert not torch.equal(then_only_first[0], one_step[0])
    assert torch.equal(then_only_first[1], one_step[1])  # neither stale momentum nor decay


def test_muon_leaves_the_gradients_as_they_are(smac):
    p, g = nn.Parameter(torch.randn(1, 8, 8)), torch.randn(1, 8, 8)
    p.grad = g.clone()
    smac.Muon([p], lr=0.02).step()
    assert torch.equal(p.grad, g)


# === Which parameter goes to which optimiser ===============================================================


def identities(params):
    return sorted(map(id, params))


@pytest.mark.parametrize("kind", ["muon", "adam"])
@pytest.mark.parametrize("hidden_sizes, middle", [((8,), []), ((8, 8), [1]), ((8, 8, 8), [1, 2])])
def test_optimizers_split_the_parameters_between_muon_and_adam(smac, kind, hidden_sizes, middle):
    args = smac.Args(muon_lr=0.1, actor_lr=0.2, critic_lr=0.3)
    agent, score_scale = make_agent(smac, hidden_sizes=hidden_sizes), smac.MLP(1, [OBS, 4, 4, 1])
    optimizers = smac.make_optimizers(agent, kind, args, score_scale.parameters())

    nets = agent.critic.net, agent.actor.net
    hidden = [net.weights[i] for net in nets for i in middle] if kind == "muon" else []
    found, rates = {smac.Muon: [], torch.optim.Adam: []}, {}
    for optimizer in optimizers:
        assert not any(optimizer.state.values())  # fresh
        for group in optimizer.param_groups:
            found[type(optimizer)] += group["params"]
            rates |= {id(p): group["lr"] for p in group["params"]}
            assert group["weight_decay"] == 0
    assert identities(found[smac.Muon]) == identities(hidden)

    slow, fast = [*agent.actor.parameters(), agent.log_alpha], [*agent.critic.parameters()]
    fast += score_scale.parameters()
    trained = found[smac.Muon] + found[torch.optim.Adam]
    assert identities(trained) == identities(slow + fast)  # nothing twice, nothing forgotten, no target
    for params, lr in ((slow, 0.2), (fast, 0.3)):
        assert {rates[id(p)] for p in params if id(p) not in map(id, hidden)} == {lr}
    assert {rates[id(p)] for p in hidden} <= {0.1}
    if hidden:
        assert [g["scale"] for o in optimizers for g in o.param_groups if type(o) is smac.Muon] == [
            "match_rms_adamw"
        ]


# === Losses, by hand =======================================================================================


def test_td_target_by_hand(smac):
    rewards, terminations = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    next_q = torch.tensor([[10.0, 20.0, -4.0], [12.0, 18.0, -6.0]])
    next_log_prob = torch.tensor([-1.0, 5.0, 2.0])
    # 1 + 0.9 (10 + 0.5 * 1) = 10.45;  terminal: 2;  3 + 0.9 (-6 - 0.5 * 2) = -3.3
    y = smac.td_target(rewards, terminations, next_q, next_log_prob, torch.tensor(0.5), 0.9)
    close(y, [10.45, 2.0, -3.3])


def test_td_loss_by_hand(smac):
    q, y = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]]), torch.tensor([2.0, 0.0, 3.0])
    # critic 1: (1 + 4 + 0) / 3, critic 2: (4 + 0 + 4) / 3, mean 13 / 6
    close(smac.td_loss(q, y), 13 / 6)


def test_actor_loss_takes_the_minimum_of_two_critics(smac):
    q, log_prob = torch.tensor([[1.0, 5.0], [3.0, 2.0]]), torch.tensor([-1.0, 2.0])
    # (0.5 * -1 - 1 + 0.5 * 2 - 2) / 2 = (-1.5 - 1) / 2
    close(smac.actor_loss(q, log_prob, torch.tensor(0.5)), -1.25)


def test_actor_loss_takes_the_mean_of_three_critics(smac):
    q, log_prob = torch.tensor([[1.0, 5.0], [3.0, 2.0], [5.0, 2.0]]), torch.tensor([-1.0, 2.0])
    # (0.5 * -1 - 3 + 0.5 * 2 - 3) / 2 = (-3.5 - 2) / 2
    close(smac.actor_loss(q, log_prob, torch.tensor(0.5)), -2.75)


def test_temperature_loss_by_hand(smac):
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    # -0.5 ((1 - 2) + (4 - 2)) / 2 = -0.25
    close(smac.temperature_loss(log_alpha, torch.tensor([1.0, 4.0]), -2.0), -0.25)


@pytest.mark.parametrize("log_prob, rises", [(3.0, True), (1.0, False)])  # entropy -3 and -1, target -2
def test_temperature_rises_exactly_while_the_entropy_is_below_its_target(smac, log_prob, rises):
    log_alpha = torch.zeros((), requires_grad=True)
    log_prob = torch.tensor([log_prob], requires_grad=True)
    smac.temperature_loss(log_alpha, log_prob, -2.0).backward()
    assert (log_alpha.grad < 0) == rises  # descent goes against the gradient
    assert log_prob.grad is None  # the policy does not follow this loss


def test_denoising_loss_by_hand(smac):
    predicted, noise = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, -1.0]])
    # ((1 + 4) + (9 + 1)) / 2: sum over actions, mean over the batch
    close(smac.denoising_loss(predicted, noise), 7.5)


def test_score_matching_loss_by_hand(smac):
    grad_q, score = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    # row 1: (1 - 2)^2 + (2 + 2)^2 = 17;  row 2: (3 - 1)^2 + (4 - 0.25)^2 = 18.0625;  mean 17.53125
    close(smac.score_matching_loss(grad_q, score, torch.tensor([[2.0], [0.5]])), 17.53125)


# === Whose gradient goes where =============================================================================


def test_bellman_target_uses_next_observations_target_critics_and_the_temperature(smac):
    agent, batch = make_agent(smac), make_batch()
    torch.manual_seed(1)
    target = smac.bellman_target(agent, batch, 0.9)
    torch.manual_seed(1)
    actions, log_prob = agent.actor.sample(batch["next_observations"])
    q = agent.target_critic(batch["next_observations"], actions)
    future = torch.minimum(q[0], q[1]) - 0.5 * log_prob  # alpha = 0.5
    close(target, batch["rewards"] + 0.9 * (1 - batch["terminations"]) * future)
    assert not target.requires_grad


def test_critic_gradients_are_those_of_the_bellman_error_and_reach_the_critics_alone(smac):
    agent, batch = make_agent(smac), make_batch()
    torch.manual_seed(1)
    smac.critic_gradients(agent, batch, 0.9)
    torch.manual_seed(1)
    y = smac.bellman_target(agent, batch, 0.9)
    q = agent.critic(batch["observations"], batch["actions"])
    expected = torch.autograd.grad(((q - y) ** 2).mean(), list(agent.critic.parameters()))
    for grad, other in zip(gradients(agent.critic), expected, strict=True):
        close(grad, other)
    assert gradients(agent.actor) == [None] * len(gradients(agent.actor))
    assert gradients(agent.target_critic) == [None] * len(gradients(agent.target_critic))
    assert agent.log_alpha.grad is None


@pytest.mark.parametrize("num_critics", [2, 3])
def test_actor_gradients_are_those_of_the_actor_loss_and_reach_no_critic(smac, num_critics):
    agent, batch = make_agent(smac, num_critics), make_batch()
    torch.manual_seed(1)
    smac.actor_gradients(agent, batch)
    torch.manual_seed(1)
    actions, log_prob = agent.actor.sample(batch["observations"])
    q = agent.critic(batch["observations"], actions)
    q = torch.minimum(q[0], q[1]) if num_critics == 2 else (q[0] + q[1] + q[2]) / 3
    expected = torch.autograd.grad((0.5 * log_prob - q).mean(), list(agent.actor.parameters()))
    for grad, other in zip(gradients(agent.actor), expected, strict=True):
        close(grad, other)
    assert gradients(agent.critic) == [None] * len(gradients(agent.critic))
    assert gradients(agent.target_critic) == [None] * len(gradients(agent.target_critic))


def test_temperature_is_not_trained_by_the_actor_loss(smac):
    agent, batch = make_agent(smac), make_batch()
    torch.manual_seed(1)
    smac.actor_gradients(agent, batch)
    torch.manual_seed(1)
    log_prob = agent.actor.sample(batch["observations"])[1]
    # d/d log_alpha of -alpha E[log pi + target entropy]; target entropy -|A|
    close(agent.log_alpha.grad, -0.5 * (log_prob.mean() - ACT))


def test_apply_gradients_steps_then_moves_the_target_by_tau(smac):
    agent, batch, tau = make_agent(smac), make_batch(), 0.25
    critic = [p.detach().clone() for p in agent.critic.parameters()]
    target = [p.detach().clone() for p in agent.target_critic.parameters()]
    optimizers = smac.make_optimizers(agent, "muon", smac.Args())
    smac.critic_gradients(agent, batch, 0.9)
    smac.apply_gradients(optimizers)
    for old, new in zip(target, agent.target_critic.parameters()):
        assert torch.equal(old, new)
    smac.polyak_update(agent.target_critic, agent.critic, tau)
    for before, now, old, new in zip(
        critic, agent.critic.parameters(), target, agent.target_critic.parameters()
    ):
        assert not torch.equal(now, before)
        close(new, (1 - tau) * old + tau * now)
    assert all(p.grad is None for p in agent.parameters())  # no gradient is stepped twice


def test_agent_starts_with_equal_targets_and_target_entropy_minus_act_dim(smac):
    agent = smac.Agent(OBS, ACT, (8, 8), 2, "silu")
    for p, target in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True):
        assert torch.equal(p, target) and not target.requires_grad
    assert agent.target_entropy == -ACT and agent.log_alpha.exp() == 1


# === The gradient of the critics' loss, score term included ================================================


def double_setup(smac, num_critics=2):
    """Networks and batch in float64; the policy is its mode, so no test depends on the order of draws."""
    agent = make_agent(smac, num_critics, hidden_sizes=(5, 5)).double()
    agent.actor.sample = lambda s: (agent.actor.mode(s), (s**2).sum(-1))
    score_scale = smac.MLP(1, [OBS, 4, 1], "silu").double()
    score_net = smac.ScoreNet(OBS, ACT, (6,), 3, 0.3).double().requires_grad_(False)
    return agent, score_scale, score_net, make_batch(size=6, dtype=torch.float64)


def smac_gradients(smac, setup, args):
    agent, score_scale = setup[:2]
    agent.zero_grad(set_to_none=True)
    score_scale.zero_grad(set_to_none=True)
    smac.smac_critic_gradients(*setup, args)
    zero_if_none = lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return [zero_if_none(p) for p in [*agent.critic.parameters(), *score_scale.parameters()]]


def test_gradient_of_the_score_term_agrees_with_finite_differences(smac):
    setup = agent, score_scale, _, batch = double_setup(smac)
    plain = smac.Args(kappa=0.0, score_actions="dataset")
    matched = smac.Args(kappa=1.0, score_actions="dataset")
    without, with_term = smac_gradients(smac, setup, plain), smac_gradients(smac, setup, matched)
    h = 1e-4

    @torch.no_grad()
    def loss() -> float:  # L_SM without any automatic differentiation
        observations, actions = batch["observations"], batch["actions"]
        q = lambda shift: agent.critic(observations, actions + shift).mean(dim=0)
        grad_q = torch.stack([(q(h * e) - q(-h * e)) / (2 * h) for e in torch.eye(ACT).double()], dim=1)
        alpha_psi = F.softplus(score_scale(observations)[0])
        return ((grad_q - alpha_psi * batch["scores"]) ** 2).sum(1).mean()

    params = [*agent.critic.parameters(), *score_scale.parameters()]
    for p, g0, g1 in zip(params, without, with_term, strict=True):
        entries = p.data.view(-1)
        for i in range(0, len(entries), max(1, len(entries) // 5)):
            value = entries[i].item()
            entries[i] = value + h
            above = loss()
            entries[i] = value - h
            below = loss()
            entries[i] = value
            close((g1 - g0).view(-1)[i], (above - below) / (2 * h), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["dataset", "policy"])
@pytest.mark.parametrize("num_critics", [2, 3])
def test_smac_critic_gradients_are_those_of_the_loss_plainly_written(smac, num_critics, where):
    setup = agent, score_scale, score_net, batch = double_setup(smac, num_critics)
    args = smac.Args(num_critics=num_critics, kappa=3.0, gamma=0.9, score_actions=where)
    found = smac_gradients(smac, setup, args)

    s, a = batch["observations"], batch["actions"]
    points, score = a, batch["scores"]
    if where == "policy":
        points, level_1 = agent.actor.mode(s).detach(), torch.zeros(len(s), dtype=torch.long)
        score = score_net.score(s, points, batch["outcomes"], level_1)
    points = points.clone().requires_grad_(True)
    mean_q = agent.critic(s, points).mean(dim=0)
    grad_q = torch.autograd.grad(mean_q.sum(), points, create_graph=True)[0]
    l_sm = ((grad_q - F.softplus(score_scale(s)[0]) * score) ** 2).sum(1).mean()

    next_q = agent.target_critic(batch["next_observations"], agent.actor.mode(batch["next_observations"]))
    entropy_term = 0.5 * (batch["next_observations"] ** 2).sum(-1)
    future = next_q.amin(dim=0) - entropy_term
    y = (batch["rewards"] + 0.9 * (1 - batch["terminations"]) * future).detach()
    l_ac = ((agent.critic(s, a) - y) ** 2).mean()

    params = [*agent.critic.parameters(), *score_scale.parameters()]
    expected = torch.autograd.grad(l_ac + 3.0 * l_sm, params)
    for grad, other in zip(found, expected, strict=True):
        close(grad, other, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in [*agent.actor.parameters(), agent.log_alpha])


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(alpha_psi="temperature"), dict(score_control="zero"), dict(score_control="shuffled"),
     dict(score_control="shuffled", alpha_psi="temperature")],
)  # fmt: skip
@pytest.mark.parametrize("layer_norm", [False, True])
def test_variants_and_controls_are_the_loss_with_one_thing_changed(smac, settings, layer_norm):
    agent, score_scale, _, batch = setup = double_setup(smac)
    if layer_norm:
        agent.critic = smac.Critic(2, OBS, ACT, (5, 5), "silu", layer_norm=True).double()
        agent.target_critic.load_state_dict(agent.critic.state_dict(), strict=False)
    args = smac.Args(kappa=1.0, **settings)
    found = smac_gradients(smac, setup, args)
    found = [b - a for a, b in zip(smac_gradients(smac, setup, smac.Args(kappa=0.0)), found, strict=True)]

    s, points = batch["observations"], batch["actions"].clone().requires_grad_(True)
    mean_q = agent.critic(s, points).mean(dim=0)
    grad_q = torch.autograd.grad(mean_q.sum(), points, create_graph=True)[0]
    score = batch["scores"]
    if settings.get("score_control") == "zero":
        score = torch.zeros_like(score)
    if settings.get("score_control") == "shuffled":
        score = torch.cat([score[-1:], score[:-1]])  # every transition gets another's
    scale = F.softplus(score_scale(s)[0])
    scale = 0.5 if "alpha_psi" in settings else scale  # the agent's temperature, which L_SM doesn't train
    l_sm = ((grad_q - scale * score) ** 2).sum(1).mean()
    params = [*agent.critic.parameters(), *score_scale.parameters()]
    expected = torch.autograd.grad(l_sm, params, allow_unused=True)
    for p, grad, other in zip(params, found, expected, strict=True):
        close(grad, torch.zeros_like(p) if other is None else other, rtol=1e-6, atol=1e-8)
    assert agent.log_alpha.grad is None


@pytest.mark.parametrize("activation, f", [("relu", torch.relu), ("silu", F.silu)])
@pytest.mark.parametrize("hidden_sizes", [(5,), (5, 7), (4, 5, 6)])
@pytest.mark.parametrize("num_critics", [1, 2, 4])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_chain_rule_equals_autograd_through_its_backward_pass(
    smac, layer_norm, num_critics, hidden_sizes, activation, f
):
    critic = smac.Critic(num_critics, OBS, ACT, hidden_sizes, activation, layer_norm).double()
    for p in [*critic.net.gains, *critic.net.shifts]:
        p.data = 1 + torch.rand_like(p)
    critic.net.mean[:OBS], critic.net.std[:] = 0.7, torch.linspace(0.5, 2.0, OBS + ACT)
    s, a = torch.randn(9, OBS).double(), torch.randn(9, ACT).double()
    found = smac.q_and_action_gradient(critic, s, a)

    points = a.clone().requires_grad_(True)
    x = ((torch.cat([s, points], -1) - critic.net.mean) / critic.net.std).expand(num_critics, -1, -1)
    for i, (weight, bias) in enumerate(zip(critic.net.weights[:-1], critic.net.biases[:-1])):
        x = x @ weight + bias
        if layer_norm:
            centred = x - x.mean(-1, keepdim=True)
            x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            x = x * critic.net.gains[i] + critic.net.shifts[i]
        x = f(x)
    q = (x @ critic.net.weights[-1] + critic.net.biases[-1]).squeeze(-1)
    gradients = [torch.autograd.grad(q_i.sum(), points, create_graph=True)[0] for q_i in q]
    for value, plain in zip(found, (q, torch.stack(gradients)), strict=True):
        close(value, plain, rtol=1e-10, atol=1e-12)
    # and so do the derivatives of a loss of both, by every parameter
    losses = [(q**2).mean() + (g**3).sum() for q, g in (found, (q, torch.stack(gradients)))]
    ours, plain = (torch.autograd.grad(x, list(critic.parameters()), allow_unused=True) for x in losses)
    for g, h in zip(ours, plain, strict=True):
        close(g, h, rtol=1e-9, atol=1e-11)


# === Captured updates ======================================================================================


class FakeGraph:
    """A stand-in for torch.cuda.CUDAGraph: what runs inside `with torch.cuda.graph` is kept for replay."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    @contextlib.contextmanager
    def graph(cuda_graph, stream):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(FakeGraph, "replays", 0)


def test_an_update_is_called_three_times_captured_once_and_then_replayed(smac, fake_cuda):
    calls = []
    update = smac.captured(lambda: calls.append(len(calls)) or len(calls), [], True)
    assert [update() for _ in range(3)] == [1, 2, 3] and FakeGraph.replays == 0
    assert [update() for _ in range(5)] == [4] * 5  # the captured call's result stays in place
    assert (
        len(calls) == 4 and FakeGraph.replays == 5
    )  # the capture itself runs nothing: the fourth is replayed too


def test_without_graphs_every_update_is_called(smac, fake_cuda):
    calls = []
    update = smac.captured(lambda: calls.append(0), [], False)
    for _ in range(6):
        update()
    assert len(calls) == 6 and FakeGraph.replays == 0


def test_where_no_graph_can_be_captured_updates_go_on_by_themselves(smac, fake_cuda, capsys):
    parameter = nn.Parameter(torch.zeros(()))
    sgd, calls = torch.optim.SGD([parameter], lr=1.0), []

    def update():
        calls.append(0)
        parameter.backward() if parameter.grad is None else parameter.grad.add_(torch.nan)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")
        sgd.step()
        sgd.zero_grad()

    call = smac.captured(update, [sgd], True)
    for _ in range(6):
        call()
    assert len(calls) == 7 and parameter.item() == -6  # the failed capture left nothing behind
    assert capsys.readouterr().out.count("note: no CUDA graph") == 1


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_replay_buffer_on_a_gpu_draws_every_filled_row_alike(smac, monkeypatch, size):
    buffer = smac.ReplayBuffer({"rewards": 0}, 1000)
    buffer.add(torch.arange(float(size)))
    uniform = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: uniform(*shape, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # take the GPU's branch
    drawn = buffer.sample_rows(300 * size).squeeze(1).long()
    counts = torch.bincount(drawn, minlength=size)
    assert len(counts) == size and counts.min() > 200 and counts.max() < 400
    monkeypatch.setattr(
        torch, "rand", lambda *shape, dtype, device: torch.full(shape, 1 - 2**-53, dtype=dtype)
    )
    assert (buffer.sample_rows(5) == size - 1).all()  # the largest number below 1 is still a row


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_captured_update_gives_the_numbers_of_the_plain_one_on_a_gpu(smac, optimizer):
    device, args = "cuda", smac.Args(batch_size=64)

    def train(enabled):
        torch.manual_seed(0)
        agent = smac.Agent(OBS, ACT, (32, 32), 2, "silu").to(device)
        score_scale = smac.MLP(1, [OBS, 64, 1], "silu").to(device)
        widths = smac.transition_widths(OBS, ACT) | dict(outcomes=0, scores=ACT)
        buffer = smac.ReplayBuffer(widths, 500, device)
        columns = [torch.randn(500, w) if w else torch.rand(500) for w in widths.values()]
        buffer.add(*(c.tanh() if n == "actions" else c for n, c in zip(widths, columns)))
        optimizers = smac.make_optimizers(agent, optimizer, args, score_scale.parameters())

        def update():
            batch = buffer.split(buffer.sample_rows(64))
            metrics = smac.smac_critic_gradients(agent, score_scale, None, batch, args)
            metrics |= smac.actor_gradients(agent, batch)
            smac.apply_gradients(optimizers)
            return metrics

        call = smac.captured(update, optimizers, enabled)
        for _ in range(20):
            metrics = call()
        return [p.detach().cpu() for p in agent.parameters()], float(metrics["critic_loss"])

    with torch.cuda.stream(torch.cuda.Stream()):
        (plain, loss), (fast, fast_loss) = train(False), train(True)
    for p, q in zip(plain, fast, strict=True):
        close(p, q, rtol=1e-3, atol=1e-4)
    assert fast_loss == pytest.approx(loss, rel=1e-3)


# === The score estimator ===================================================================================


def exact_denoiser(mean, variance):
    """The best eps for actions from N(mean, variance): a_t ~ N(c mean, c^2 variance + sigma^2)."""

    def forward(self, observations, noised, outcomes, levels):
        sigma = self.sigma[levels, None]
        c = (1 - sigma**2).sqrt()
        return sigma * (noised - c * mean) / (c**2 * variance + sigma**2)

    return forward


def test_noise_keeps_the_variance_of_the_forward_process(smac):
    net = smac.ScoreNet(OBS, ACT, (8,), 3, 0.3)
    close(net.sigma, [0.3, math.sqrt(0.3 * 0.9), 0.9])  # geometric
    actions, levels = torch.randn(6, ACT), torch.tensor([0, 1, 2, 2, 1, 0])
    noised, noise = net.noise(actions, levels)
    sigma = net.sigma[levels, None]
    close(noised, (1 - sigma**2).sqrt() * actions + sigma * noise)
    noise = net.noise(torch.zeros(20_000, ACT), torch.zeros(20_000, dtype=torch.long))[1]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_score_of_a_perfect_denoiser_is_the_smoothed_score_of_a_gaussian(smac, monkeypatch):
    mean, variance = torch.tensor([0.6, -0.3]), torch.tensor([0.04, 0.01])
    monkeypatch.setattr(smac.ScoreNet, "forward", exact_denoiser(mean, variance))
    net = smac.ScoreNet(OBS, ACT, (8,), 3, 0.3)
    actions, levels = 2 * torch.rand(30, ACT) - 1, torch.arange(30) % 3
    smoothing = net.sigma[levels, None] ** 2 / (1 - net.sigma[levels, None] ** 2)  # its variance around a
    score = net.score(torch.zeros(30, OBS), actions, torch.zeros(30), levels)
    close(score, -(actions - mean) / (variance + smoothing), rtol=1e-5, atol=1e-5)


def test_trained_score_agrees_with_a_gaussian_mixture(smac):
    sigma_1, std = 0.3, 0.1
    centers = lambda w: torch.stack([-0.6 + 0.2 * w, 0.5 + 0.2 * w], dim=-1)  # two modes that move with w

    def draw(size):
        w = 2 * torch.rand(size) - 1
        mode = centers(w).gather(1, torch.randint(2, (size, 1)))
        return torch.randn(size, 1), mode + std * torch.randn(size, 1), w

    net = smac.ScoreNet(1, 1, (64, 64), 3, sigma_1)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 2_000)
    for _ in range(2_000):
        observations, actions, w = draw(256)
        levels = torch.randint(3, (256,)) * (torch.arange(256) >= 128)  # half at level 1
        noised, noise = net.noise(actions, levels)
        adam.zero_grad()
        smac.denoising_loss(net(observations, noised, w, levels), noise).backward()
        adam.step()
        schedule.step()

    observations, actions, w = draw(1_000)
    variance = std**2 + sigma_1**2 / (1 - sigma_1**2)
    offsets = centers(w) - actions  # (B, 2)
    share = torch.softmax(-(offsets**2) / (2 * variance), dim=1)
    expected = (share * offsets).sum(1) / variance
    with torch.no_grad():
        score = net.score(observations, actions, w, torch.zeros(1_000, dtype=torch.long)).squeeze(1)
    assert F.cosine_similarity(score, expected, dim=0) > 0.95
    slope = (score * expected).sum() / (expected**2).sum()
    assert 0.85 < slope < 1.15
    assert relative_error(score, expected) < 0.15


@pytest.mark.parametrize("where", ["dataset", "policy"])
def test_critic_learns_to_point_towards_the_mode_of_the_data(smac, monkeypatch, where):
    """The sign of the score term: eps points away from the data, grad_a Q must point back to it."""
    mode, std = torch.tensor([0.3, -0.4]), 0.2
    monkeypatch.setattr(smac.ScoreNet, "forward", exact_denoiser(mode, std**2))
    score_net = smac.ScoreNet(OBS, ACT, (8,), 2, 0.3)
    agent, score_scale = smac.Agent(OBS, ACT, (32, 32), 2, "silu"), smac.MLP(1, [OBS, 8, 1], "silu")
    agent.actor.net.biases[-1].data[..., ACT:] = 0.3  # a std of 0.6: the policy's actions reach the mode
    args = smac.Args(kappa=1000.0, gamma=0.0, score_actions=where)
    adam = torch.optim.Adam([*agent.critic.parameters(), *score_scale.parameters()], lr=3e-3)
    for _ in range(200):
        batch = make_batch(size=64)
        batch["actions"] = mode + std * torch.randn(64, ACT)
        batch["rewards"] = torch.zeros(64)
        level_1 = torch.zeros(64, dtype=torch.long)
        point = batch["observations"], batch["actions"], batch["outcomes"], level_1
        batch["scores"] = score_net.score(*point)
        smac.smac_critic_gradients(agent, score_scale, score_net, batch, args)
        adam.step()
        adam.zero_grad()

    observations, actions = torch.randn(200, OBS), mode + std * torch.randn(200, ACT)
    actions.requires_grad_(True)
    q = agent.critic(observations, actions).mean(dim=0)
    grad_q = torch.autograd.grad(q.sum(), actions)[0]
    assert F.cosine_similarity(grad_q, mode - actions, dim=1).mean() > 0.6
    away = mode + 0.5 * F.normalize(torch.randn(200, ACT), dim=1)
    at_mode = agent.critic(observations, mode.expand(200, -1)).mean(dim=0)
    assert (at_mode > agent.critic(observations, away).mean(dim=0)).float().mean() > 0.95


# === The policy ============================================================================================


def test_log_prob_agrees_with_torch_distributions(smac):
    mean, log_std = torch.randn(50, ACT).double(), 0.5 * torch.randn(50, ACT).double()
    u = 6 * torch.rand(50, ACT).double() - 3
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    expected = reference.log_prob(torch.tanh(u)).sum(-1)
    close(smac.squashed_gaussian_log_prob(u, mean, log_std), expected, rtol=1e-8, atol=1e-8)


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
    close(log_prob, reference.log_prob(actions).sum(-1), rtol=1e-5, atol=1e-5)
    z = (torch.atanh(actions) - mean) / log_std.exp()
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    close(actor.mode(observations), torch.tanh(mean))
    actions.sum().backward()  # reparametrised: the mean and the std both follow the action
    assert (actor.net.biases[-1].grad != 0).all()


def test_log_std_stays_within_its_bounds(smac):
    actor = smac.Actor(OBS, ACT, (8,))
    for output, bound in ((-100.0, smac.LOG_STD_MIN), (100.0, smac.LOG_STD_MAX)):
        actor.net.biases[-1].data[..., ACT:] = output
        close(actor(torch.randn(4, OBS))[1], torch.full((4, ACT), bound))
    assert (smac.LOG_STD_MIN, smac.LOG_STD_MAX) == (-5.0, 2.0)


# === Networks ==============================================================================================


@pytest.mark.parametrize("name, layer", [("relu", nn.ReLU), ("silu", nn.SiLU)])
def test_stack_equals_separate_networks_on_normalised_inputs(smac, name, layer):
    sizes, n = [4, 6, 5, 2], 3
    mlp = smac.MLP(n, sizes, name)
    mlp.mean.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
    mlp.std.copy_(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    x = torch.randn(n, 7, 4)
    for i in range(n):
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for module, weight, bias in zip(linear, mlp.weights, mlp.biases, strict=True):
            module.weight.data, module.bias.data = weight[i].T, bias[i, 0]
        net = nn.Sequential(linear[0], layer(), linear[1], layer(), linear[2])
        close(mlp(x)[i], net((x[i] - mlp.mean) / mlp.std), atol=1e-5)
        close(mlp(x[0])[i], net((x[0] - mlp.mean) / mlp.std), atol=1e-5)  # (B, I): the same for all


def test_layer_norm_stands_before_the_activation(smac):
    sizes, n = [4, 6, 5, 2], 3
    mlp, x = smac.MLP(n, sizes, "relu", layer_norm=True), torch.randn(7, 4)
    for p in [*mlp.gains, *mlp.shifts]:
        p.data = torch.randn_like(p)
    for i in range(n):
        y = x
        for layer, width in enumerate(sizes[1:-1]):
            norm = nn.LayerNorm(width)
            norm.weight.data, norm.bias.data = mlp.gains[layer][i, 0].data, mlp.shifts[layer][i, 0].data
            y = torch.relu(norm(y @ mlp.weights[layer][i] + mlp.biases[layer][i]))
        close(mlp(x)[i], y @ mlp.weights[2][i] + mlp.biases[2][i], atol=1e-5)


def test_weights_and_biases_are_drawn_as_by_nn_linear(smac):
    mlp, fans = smac.MLP(2, [16, 400, 100]), [16, 400]
    for i, fan_in in enumerate(fans):
        bound = fan_in**-0.5
        for p in (mlp.weights[i], mlp.biases[i]):
            assert 0.9 * bound < p.abs().max() <= bound
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.15
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])


def test_a_saved_network_keeps_its_statistics(smac):
    assert {"mean", "std"} <= smac.MLP(1, [4, 2]).state_dict().keys()


def test_critic_takes_one_action_for_all_or_one_for_each(smac):
    critic = smac.Critic(3, OBS, ACT, (8, 8), "silu")
    observations, actions = torch.randn(5, OBS), torch.randn(3, 5, ACT)
    q = critic(observations, actions)
    assert q.shape == (3, 5)
    for i in range(3):
        shared = critic(observations, actions[i])
        assert shared.shape == (3, 5)
        close(q[i], shared[i])


# === Replay, seeds, returns ================================================================================


def test_replay_buffer_gives_back_the_columns_as_added(smac):
    buffer = smac.ReplayBuffer(dict(observations=3, rewards=0, actions=1), capacity=5)
    observations, rewards, actions = np.arange(12.0).reshape(4, 3), np.arange(4.0) - 9, np.ones((4, 1))
    buffer.add(observations, rewards, actions)
    buffer.add(np.full(3, 7.0), -1.5, np.full(1, 2.0))  # a single transition
    assert buffer.size == 5
    batch = buffer.split(buffer.rows)
    assert list(batch) == ["observations", "rewards", "actions"]
    close(batch["observations"], np.r_[observations, np.full((1, 3), 7.0)])
    close(batch["rewards"], np.r_[rewards, -1.5])
    close(batch["actions"], np.r_[actions, [[2.0]]])
    assert [tuple(column.shape) for column in batch.values()] == [(5, 3), (5,), (5, 1)]


def test_a_full_replay_buffer_raises_and_stays_as_it_was(smac):
    buffer = smac.ReplayBuffer(dict(x=0), capacity=3)
    buffer.add(np.arange(2.0))
    with pytest.raises(IndexError, match="3"):
        buffer.add(np.arange(2.0))
    assert buffer.size == 2
    buffer.add(5.0)
    with pytest.raises(IndexError):
        buffer.add(6.0)
    close(buffer.rows[:, 0], [0.0, 1.0, 5.0])


def test_replay_buffer_samples_all_filled_rows_and_no_other(smac):
    buffer = smac.ReplayBuffer(dict(x=0), capacity=100)
    buffer.add(np.arange(1.0, 11.0))
    x = buffer.split(buffer.sample_rows(5_000))["x"]
    assert x.shape == (5_000,)
    counts = torch.bincount(x.long(), minlength=11)
    assert counts[0] == 0 and len(counts) == 11 and counts[1:].min() > 350  # 500 each


def test_stream_seed_is_stable_and_differs_between_phases_seeds_and_indices(smac):
    assert smac.stream_seed(1, "offline") == 940925759  # SHA-256 of "1/offline/0"
    keys = [(s, p, i) for s in range(5) for p in ("score", "offline", "online") for i in range(5)]
    seeds = [smac.stream_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_fail_ends_with_one_sentence(smac):
    with pytest.raises(SystemExit, match=r"^error: the disk is full$"):
        smac.fail("the disk is full")


def test_a_truncated_episode_goes_on_at_its_last_rewards(smac):
    # reward -1 for ever: -1 / (1 - 0.99) = -100 at every step
    g = smac.returns_to_go(np.full(150, -1.0), np.zeros(150), np.array([150]), 0.99)
    np.testing.assert_allclose(g, -100)


def test_the_tail_of_a_truncated_episode_is_the_mean_of_its_last_20_rewards(smac):
    rewards = np.r_[np.full(30, 5.0), np.full(10, 1.0), np.full(10, 3.0)]
    g = smac.returns_to_go(rewards, np.zeros(50), np.array([50]), 0.9)
    np.testing.assert_allclose(g[-1], 3 + 0.9 * 2 / 0.1)


def test_a_terminated_episode_sums_its_rewards(smac):
    terminations = np.r_[np.zeros(9), 1.0]
    g = smac.returns_to_go(np.ones(10), terminations, np.array([10]), 0.9)
    # 1 + 0.9 + ... + 0.9^(k - 1) = (1 - 0.9^k) / 0.1 with k steps to go
    np.testing.assert_allclose(g, [(1 - 0.9**k) / 0.1 for k in range(10, 0, -1)])


@pytest.mark.parametrize("second_terminates", [True, False])
def test_episodes_do_not_leak_into_each_other(smac, second_terminates):
    first, second = np.array([1.0, 2.0, 4.0]), np.array([100.0, 100.0])
    terminations = np.array([0.0, 0.0, 0.0, 0.0, float(second_terminates)])
    g = smac.returns_to_go(np.r_[first, second], terminations, np.array([3, 5]), 0.5)
    # truncated: tail 7/3 / 0.5; 4 + 7/3 = 19/3, 2 + 19/6 = 31/6, 1 + 31/12 = 43/12
    np.testing.assert_allclose(g[:3], [43 / 12, 31 / 6, 19 / 3])
    np.testing.assert_allclose(g[3:], [150, 100] if second_terminates else [200, 200])
