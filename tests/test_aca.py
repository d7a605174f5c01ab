"""aca_baseline.py: SAC+ML and its baseline, the alignment, what the aligned critic is, whole runs.

ACA_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, load
from torch import nn
from torch.distributions import Normal

OBS, ACT = 4, 2
SAME = "--env-id pendulum-medium-replay --hidden-sizes 8 8 --batch-size 8 --eval-episodes 2 "
TINY = SAME + "--offline-steps 10 --online-steps 40 --top-episodes 1 --checkpoint-every 0 "


@pytest.fixture(scope="module")
def aca():
    return load("aca_baseline", Path(os.environ.get("ACA_SCRIPT", ROOT / "aca_baseline.py")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def make_agent(aca, **settings):
    """An agent in float64 whose parameters are spread out, alpha 0.5, and its settings."""
    args = aca.Args(hidden_sizes=(16, 16), gamma=0.9, alignment_beta=3.0, **settings)
    agent = aca.Agent(OBS, ACT, args).double()
    with torch.no_grad():
        for net in (agent.critic, agent.target_critic, agent.baseline):
            for p in net.parameters():
                p.mul_(2).add_(0.1 * torch.randn_like(p))
        agent.actor.net.biases[-1].add_(0.5 * torch.randn(2 * ACT))
        agent.log_alpha.fill_(math.log(0.5))
        for i, mlp in enumerate((agent.actor.net, agent.critic.net, agent.target_critic.net, agent.baseline)):
            mlp.mean[:OBS] = torch.linspace(-0.3, 0.1 * i, OBS)
            mlp.std[:OBS] = torch.linspace(0.7, 1 + 0.1 * i, OBS)
    return agent, args


def aligned(aca, **settings):
    agent, args = make_agent(aca, **settings)
    agent.align(args)
    return agent, args


def make_batch(size=64):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    terminations = (torch.arange(size) % 3 == 0).double()
    return dict(observations=draw(size, OBS), actions=torch.tanh(draw(size, ACT)), rewards=draw(size),
                next_observations=draw(size, OBS), terminations=terminations)  # fmt: skip


def densities(actor, s, a):
    """log pi(a|s) by torch.distributions and a = tanh(u); the floor at beta 3; the soft clip there."""
    mean, log_std = actor(s)
    gaussian = Normal(mean, log_std.exp())
    log_pi = (gaussian.log_prob(a.atanh()) - (1 - a**2).log()).sum(-1)
    floor = gaussian.log_prob(mean + 3 * gaussian.stddev).sum(-1)
    return log_pi, floor, floor + torch.log1p((log_pi - floor).exp())


def check_gradients(module, loss):
    """`.grad` is that of the loss."""
    expected = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    for p, other in zip(module.parameters(), expected, strict=True):
        close(p.grad, other, rtol=1e-4)


def untouched(*modules):
    return all(p.grad is None for module in modules for p in module.parameters())


@pytest.mark.parametrize("log_std", [-5.0, -2.0, 2.0])
def test_the_clip_is_the_identity_far_above_its_floor_and_the_floor_far_below(aca, log_std):
    """For every policy, also for a standard deviation of e^2: there 7 of them beside the mean lies u = 52."""
    sigmas = torch.tensor([[0.0], [30.0]], dtype=torch.float64)
    u = (sigmas * math.exp(log_std)).clamp(max=6)
    actor = lambda s: (u - sigmas * math.exp(log_std), torch.full_like(u, log_std))
    log_prob, clipped = aca.clip_log_prob(actor, None, u.tanh(), 7.0)
    top = -log_std - 0.5 * math.log(2 * math.pi)
    close(log_prob, top - 0.5 * sigmas[:, 0] ** 2 + 2 * u[:, 0].cosh().log(), rtol=1e-4)
    close(clipped, [top, top - 24.5])


def test_recorded_actions_at_the_bounds_give_finite_numbers_and_gradients(aca):
    actor, actions = aca.Actor(OBS, ACT, (8, 8)), torch.tensor([[1.0, -1.0], [1.0, 0.3], [-1.0, 1.0]])
    log_prob, clipped = aca.clip_log_prob(actor, torch.randn(3, OBS), actions, 7.0)
    (log_prob + clipped).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in actor.parameters())


class Policy(nn.Module):
    """log pi(0|s) is `recorded` at a_D = 0; a sample is `action`, its log-probability `log_prob`."""

    def __init__(self, recorded, log_prob):
        super().__init__()
        self.action, self.log_prob = nn.Parameter(torch.zeros(len(log_prob), 1)), torch.tensor(log_prob)
        self.recorded = nn.Parameter(torch.tensor(recorded)[:, None])

    def forward(self, observations):
        return 0 * self.recorded, -self.recorded - 0.5 * math.log(2 * math.pi)

    def sample(self, observations):
        return self.action, self.log_prob


def test_sacml_actor_loss_by_hand(aca, monkeypatch):
    """min Q = -3, 2: E|Q| = 2.5, lam = 10 / 2.5 = 4.  E[0.5 log pi - Q] = ((-0.5 + 3) + (1 - 2)) / 2 = 0.75

    L_pi = 4 * 0.75 - (0.5 - 2.5) / 2 = 4;  Q = Q_0 + a: dL_pi / da = -lam / 2, which has no gradient itself
    """
    for name in ("critic_gradients", "baseline_gradients"):
        monkeypatch.setattr(aca, name, lambda *_: {})
    agent = SimpleNamespace(actor=Policy([0.5, -2.5], [-1.0, 2.0]))
    agent.log_alpha = nn.Parameter(torch.tensor(math.log(0.5)))
    agent.critic = lambda s, a: torch.tensor([[-1.0, 5.0], [-3.0, 2.0]]) + a[:, 0]
    batch = dict(observations=None, actions=torch.zeros(2, 1))
    metrics = aca.sacml_gradients(agent, batch, aca.Args(actor_scale=10.0))
    close(metrics["actor_loss"], 4.0)
    close(agent.actor.action.grad, [[-2.0], [-2.0]])
    close(agent.actor.recorded.grad, [[-0.5], [-0.5]])
    close(agent.log_alpha.grad, -0.5 * (0.5 - 1))


class Table(nn.Module):
    """Z_i of the states 0, 1, 2, ..."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, states):
        return self.values[:, states].unsqueeze(-1)


def test_baseline_loss_by_hand_masks_terminals_and_bootstraps_the_rest(aca):
    """y = 1 + 0.9 (-1 + 10 + 0.5) = 9.55;  terminal: 2;  3 + 0.9 (2 - 6 - 1) = -1.5

    log pi(a_D|s) + Z - y: Z_1: 1 + 1 - 9.55, -1 + 2 - 2, 0 + 3 + 1.5;  Z_2: 1 - 9.55, -1 - 2, 0 + 1.5
    """
    z = Table([[1.0, 2.0, 3.0, 10.0, 20.0, -4.0], [0.0, 0.0, 0.0, 12.0, 18.0, -6.0]])
    actor = Policy([1.0, -1.0, 0.0], [-1.0, 5.0, 2.0])
    agent = SimpleNamespace(actor=actor, baseline=z, log_alpha=torch.tensor(math.log(0.5)))
    batch = dict(observations=torch.arange(3), next_observations=torch.arange(3, 6),
                 actions=torch.zeros(3, 1), rewards=torch.tensor([1.0, 2.0, 3.0]),
                 terminations=torch.tensor([0.0, 1.0, 0.0]))  # fmt: skip
    metrics = aca.baseline_gradients(agent, batch, aca.Args(gamma=0.9, alignment_beta=15.0))
    errors = torch.tensor([[-7.55, -1.0, 4.5], [-8.55, -3.0, 1.5]])
    close(metrics["baseline_loss"], (errors**2).sum() / 6)
    close(z.values.grad, torch.cat([errors / 3, torch.zeros(2, 3)], dim=1))  # none through the target


def test_offline_gradients_are_those_of_the_losses(aca):
    agent, args = make_agent(aca)
    batch = make_batch()
    s, a, next_s = (batch[name] for name in ("observations", "actions", "next_observations"))
    backup = lambda value: (batch["rewards"] + 0.9 * (1 - batch["terminations"]) * value).detach()
    torch.manual_seed(1)
    aca.sacml_gradients(agent, batch, args)
    torch.manual_seed(1)  # the samples come in this order
    next_a, next_log_prob = agent.actor.sample(next_s)
    y = backup(agent.target_critic(next_s, next_a).amin(dim=0) - 0.5 * next_log_prob)
    check_gradients(agent.critic, ((agent.critic(s, a) - y) ** 2).mean())
    sampled, log_prob = agent.actor.sample(s)
    q, (log_pi, _, clip) = agent.critic(s, sampled).amin(dim=0), densities(agent.actor, s, a)
    lam = 30 / q.abs().mean().item()
    check_gradients(agent.actor, lam * (0.5 * log_prob - q).mean() - log_pi.mean())
    close(agent.log_alpha.grad, -0.5 * (log_prob.detach() - ACT).mean())
    next_log_prob, next_z = agent.actor.sample(next_s)[1], agent.baseline(next_s).squeeze(-1)
    y = backup(next_log_prob + torch.minimum(next_z[0], next_z[1]) - 0.5 * next_log_prob)
    z = agent.baseline(s).squeeze(-1)
    check_gradients(agent.baseline, ((clip.detach() + z - y) ** 2).mean())
    assert untouched(agent.target_critic)


def test_behind_the_alignment_the_actor_has_no_gradient_but_the_clips(aca):
    """|grad_a (log pi - Q)| <= (1 - sigmoid(log pi_0 - c)) |grad_a log pi_0| at every sample, alpha 1."""
    agent, _ = aligned(aca)
    s = make_batch(512)["observations"]
    actions = agent.actor.sample(s)[0].detach()
    actions[256:] = 1.98 * torch.rand(256, ACT, dtype=torch.float64) - 0.99  # and where pi_0 hardly is
    actions.requires_grad_(True)
    log_pi, floor, _ = densities(agent.actor, s, actions)
    (score,) = torch.autograd.grad(log_pi.sum(), actions, retain_graph=True)
    bound = (1 - torch.sigmoid(log_pi - floor)) * score.norm(dim=-1)
    for q in agent.critic(s, actions):
        (gradient,) = torch.autograd.grad((log_pi - q).sum(), actions, retain_graph=True)
        assert (gradient.norm(dim=-1) <= bound + 1e-6 * score.norm(dim=-1)).all()
    assert 10 < (log_pi < floor).sum() < 256, "the clip bites at some of the samples"
    assert agent.log_alpha.exp() == 1


def test_behind_the_alignment_q_is_z_and_the_clipped_density_in_all_critics(aca):
    agent, args = aligned(aca, alignment_weight=0.7, num_critics=3, critic_layer_norm=True)
    batch = make_batch()
    s, a = batch["observations"], batch["actions"].requires_grad_(True)
    z, (_, _, clip) = agent.baseline(s).squeeze(-1), densities(agent.actor, s, a)
    for weight, critic in ((0.7, agent.critic), (0.2, agent.target_critic), (0.2, agent.critic)):
        agent.weight.fill_(weight)  # one for all
        close(critic(s, a), z + weight * clip)
        r = critic.net(torch.cat([s, a], dim=-1))
        assert torch.autograd.grad(r.sum(), a)[0].abs().max() == 0
    aca.critic_gradients(agent, batch, args)
    assert agent.critic.net.weights[0].grad[:, OBS:].abs().min() > 0, "R can learn of actions"
    assert untouched(agent.pi_0, agent.baseline, agent.target_critic, agent.actor)


def test_online_losses_use_the_aligned_critic_and_the_actors_gradient_is_clipped(aca):
    """Critic loss, its target and the actor loss, written out with R, pi_0 and the weight."""
    agent, args = aligned(aca, actor_grad_norm=0.01)
    batch = make_batch()
    s, next_s = batch["observations"], batch["next_observations"]
    with torch.no_grad():
        for p in [p for net in (agent.critic, agent.target_critic, agent.actor) for p in net.parameters()]:
            p.add_(0.05 * torch.randn_like(p))
        agent.weight.fill_(0.6)
        agent.log_alpha.fill_(math.log(0.5))
    r = lambda critic, s, a: critic.net(torch.cat([s, a], dim=-1)).squeeze(-1)
    q_by_hand = lambda critic, s, a: r(critic, s, a) + 0.6 * densities(agent.pi_0, s, a)[2]
    torch.manual_seed(1)
    aca.clipped_gradients(agent, batch, args)
    torch.manual_seed(1)
    next_a, next_log_prob = agent.actor.sample(next_s)
    next_q = q_by_hand(agent.target_critic, next_s, next_a).amin(dim=0)
    y = batch["rewards"] + 0.9 * (1 - batch["terminations"]) * (next_q - 0.5 * next_log_prob)
    q = q_by_hand(agent.critic, s, batch["actions"])
    check_gradients(agent.critic, ((q - y.detach()) ** 2).mean())
    actions, log_prob = agent.actor.sample(s)
    loss = (0.5 * log_prob - q_by_hand(agent.critic, s, actions).amin(dim=0)).mean()
    gradients = torch.autograd.grad(loss, list(agent.actor.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for p, gradient in zip(agent.actor.parameters(), gradients, strict=True):
        close(p.grad, gradient * 0.01 / norm, rtol=1e-3)
    close(agent.log_alpha.grad, -0.5 * (log_prob.detach() - ACT).mean())


def test_the_weight_falls_to_its_floor(aca):
    weights = lambda *updates, **settings: [aca.prior_weight(n, aca.Args(**settings)) for n in updates]
    assert weights(0, 10_000, 20_000, 30_000) == [1.0, 0.75, 0.5, 0.5]
    assert weights(0, 5_000, 20_000, alignment_decay=10_000, alignment_floor=0.0) == [1.0, 0.5, 0.0]
    assert weights(0, 40_000, alignment_floor=15.0) == [1.0, 1.0], "no floor lifts it"


@pytest.fixture(scope="module")
def start(smac, tmp_path_factory):
    """Flags by the start: an own offline phase, or offline.pt of a SMAC run."""
    words = SAME + "--offline-steps 10 --score-steps 5 --score-hidden-sizes 8 8 --online-steps 0"
    run = inside(smac, words, tmp_path_factory.mktemp("smac"))
    return {"own": "", "checkpoint": f"--alignment-steps 20 --checkpoint {run.directory / 'offline.pt'} "}


def check_handover(run, before):
    """The policy goes online as it is and becomes pi_0; the weight is that of the last update."""
    rows, after = run.rows(), run.state()["parts"]["agent"]
    assert [row["phase"] for row in rows] == ["offline"] * 2 + ["online"] * 3
    assert rows[1]["return_0"] == rows[2]["return_0"] and rows[-1]["updates"] == "440"
    pi_0 = {name: after[name.replace("actor", "pi_0")] for name in before if name.startswith("actor")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pi_0.items())
    assert float(after["weight"]) == pytest.approx(30 * (1 - 0.439))


STOPS = [("own", "offline", 5), ("own", "online", 205), ("checkpoint", "alignment", 7)]


@pytest.mark.parametrize("origin, phase, step", STOPS)
def test_a_resumed_run_ends_as_if_never_stopped(aca, start, monkeypatch, tmp_path, origin, phase, step):
    words = TINY + start[origin] + "--online-steps 220 --alignment-decay 1000 --utd-ratio 2"
    whole = inside(aca, words, tmp_path / "whole")
    before = start[origin].split()[-1] if start[origin] else whole.directory / "offline.pt"
    check_handover(whole, torch.load(before)["parts"]["agent"])
    names = dict(offline="sacml_gradients", alignment="baseline_gradients", online="clipped_gradients")
    calls, update = [], aca.update

    def stop(agent, *arguments, **keywords):
        calls.append(arguments[3].__name__)
        if calls.count(names[phase]) == step:
            raise KeyboardInterrupt
        return update(agent, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(aca, "update", stop)
        inside(aca, words, tmp_path / "stopped")
    last = torch.load(path := next(tmp_path.glob("stopped/runs/*/last.pt")))
    assert (last["phase"], last["step"]) == (phase, 200 if phase == "online" else step - 1)
    if phase == "online":  # where the best recorded episode comes first in the buffer
        assert calls[-3:] == ["clipped_gradients", "critic_gradients", "clipped_gradients"]
        data, online = aca.Dataset("smac/pendulum/medium-replay-v0"), last["parts"]["online"]
        rows = np.split(data.columns["observations"], data.ends[:-1])[data.returns.argmax()]
        assert int(online["size"]) == 400 and np.array_equal(online["rows"][:200, :3], rows)
    run = inside(aca, f"--resume {path.parent}", tmp_path / "stopped")
    assert run.rows() == whole.rows()
    one, other = (r.state()["parts"]["agent"] for r in (run, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_that_are_taken_and_refused(aca, start, tmp_path):
    own, sac = inside(aca, TINY, tmp_path / "own"), load("sac_finetune", ROOT / "sac_finetune.py")
    offline, final = (f"--checkpoint {own.directory / name} " for name in ("offline.pt", "final.pt"))
    before = own.state("offline.pt")["parts"]["agent"]
    for name, flags in (("smac", start["checkpoint"]), ("aca", offline)):
        run = inside(aca, TINY + flags + "--alignment-steps 0", tmp_path / name)
        z = {key: x for key, x in run.state()["parts"]["agent"].items() if key.startswith("baseline.")}
        assert bool(z["baseline.weights.2"].any()) == (name == "aca") and z["baseline.weights.1"].all()
        assert all(torch.equal(z[key], before[key]) for key in z) == (name == "aca")
    words = "--batch-size 8 --eval-episodes 2 --online-steps 40 "
    assert inside(sac, words + offline, tmp_path / "taken").code == 0
    assert "critic.net" in inside(sac, words + final, tmp_path / "refused").code
    hopper = ROOT / "results" / "checkpoints" / "hopper-medium_smac_offline.pt"
    refused = inside(aca, f"--checkpoint {hopper} --env-id pendulum-medium-replay", tmp_path / "misfit")
    assert "doesn't fit" in refused.code
    torch.save({"weight": torch.zeros(1)}, foreign := tmp_path / "foreign.pt")
    for script in (aca, sac):
        assert "was not written by" in inside(script, f"--checkpoint {foreign}", tmp_path / "foreign").code
