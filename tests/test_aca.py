"""aca_baseline.py: SAC+ML and its baseline, the alignment, what the aligned critic is, whole runs.

ACA_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load, returns_of
from test_pipeline import Result, assert_equal, assert_same_run, is_sentence, own_cache  # noqa: F401
from torch import nn
from torch.distributions import Normal

OBS, ACT = 4, 2
TINY = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 "
TINY += "--offline-steps 10 --online-steps 40 --eval-every 1000 "


@pytest.fixture(scope="module")
def aca():
    """aca_baseline.py"""
    return load("aca_baseline", Path(os.environ.get("ACA_SCRIPT", ROOT / "aca_baseline.py")))


@pytest.fixture(scope="module")
def sac():
    """sac_finetune.py"""
    return load("sac_finetune", ROOT / "sac_finetune.py")


@pytest.fixture
def inside(monkeypatch, capfd):
    """Runs a script's main() in this process, in a folder of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, words: str, cwd: Path) -> Result:
        cwd.mkdir(exist_ok=True, parents=True)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script.__file__, *words.split()])
        try:
            script.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return Result(code, capfd.readouterr().out, next((cwd / "runs").glob("*"), None))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def close(actual, expected, **tolerances):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **(tolerances or dict(rtol=1e-5, atol=1e-6)))


def make_agent(aca, num_critics=2):
    """An agent and a baseline in float64 whose parameters are spread out, alpha 0.5."""
    torch.manual_seed(0)
    agent = aca.Agent(OBS, ACT, (16, 16), num_critics, "silu").double()
    baseline = aca.MLP(num_critics, [OBS, 16, 16, 1], "silu").double()
    with torch.no_grad():
        for p in [*agent.critic.parameters(), *agent.target_critic.parameters(), *baseline.parameters()]:
            p.mul_(2).add_(0.1 * torch.randn_like(p))
        agent.actor.net.biases[-1].add_(0.5 * torch.randn(2 * ACT))
        agent.log_alpha.fill_(math.log(0.5))
        for i, mlp in enumerate((agent.actor.net, agent.critic.net, agent.target_critic.net, baseline)):
            mlp.mean[:OBS] = torch.linspace(-0.3, 0.1 * i, OBS)
            mlp.std[:OBS] = torch.linspace(0.7, 1 + 0.1 * i, OBS)
    return agent, baseline


def make_batch(size=64):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    terminations = (torch.arange(size) % 3 == 0).double()
    return dict(observations=draw(size, OBS), actions=torch.tanh(draw(size, ACT)), rewards=draw(size),
                next_observations=draw(size, OBS), terminations=terminations)  # fmt: skip


def log_density(actor, observations, actions):
    """log pi(a|s) by torch.distributions and the change of variables a = tanh(u), and the Normal of u."""
    mean, log_std = actor(observations)
    gaussian = Normal(mean, log_std.exp())
    return (gaussian.log_prob(actions.atanh()) - (1 - actions**2).log()).sum(-1), gaussian


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


# === The soft clip =========================================================================================


def test_soft_clip_is_the_identity_far_above_the_floor_and_the_floor_far_below(aca):
    floor = torch.tensor([-10.0, 3.0], dtype=torch.float64)
    close(aca.soft_clip(floor + 40, floor), floor + 40)
    close(aca.soft_clip(floor - 40, floor), floor)
    close(aca.soft_clip(floor, floor), floor + math.log(2))


def test_soft_clip_is_smooth_between(aca):
    x = torch.linspace(-30, 10, 400, dtype=torch.float64, requires_grad=True)
    clipped = aca.soft_clip(x, torch.tensor(-10.0, dtype=torch.float64))
    (slope,) = torch.autograd.grad(clipped.sum(), x)
    close(slope, torch.sigmoid(x.detach() + 10))
    assert (clipped > x).all() and (clipped > -10).all()


@pytest.mark.parametrize("beta", [3.0, 7.0, 15.0])
def test_the_floor_lies_below_the_density_at_the_mean_for_every_policy(aca, beta):
    """Also for a standard deviation of e^2, the largest, where the Jacobian's floor lies far above it."""
    log_std = torch.linspace(aca.LOG_STD_MIN, aca.LOG_STD_MAX, 50, dtype=torch.float64)[:, None]
    mean = torch.zeros_like(log_std)
    floor = aca.density_floor(log_std, beta)
    at_mean, beside = (aca.squashed_gaussian_log_prob(u, mean, log_std) for u in (mean, beta * log_std.exp()))
    assert (floor < at_mean).all()
    close(floor, Normal(mean, log_std.exp()).log_prob(beta * log_std.exp()).sum(-1))
    assert beside[-1] > at_mean[-1]


def test_the_floor_sums_over_the_dimensions_of_the_action(aca):
    log_std = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    close(aca.density_floor(log_std, 2.0), [-2 - 2 - 1 - math.log(2 * math.pi)])


# === log pi of given actions ===============================================================================


def test_log_prob_of_recorded_actions_is_that_of_the_distribution(aca):
    agent, _ = make_agent(aca)
    batch = make_batch()
    found, mean, log_std = aca.action_log_prob(agent.actor, batch["observations"], batch["actions"])
    expected, gaussian = log_density(agent.actor, batch["observations"], batch["actions"])
    close(found, expected)
    close(mean, gaussian.mean)
    close(log_std.exp(), gaussian.stddev)


def test_log_prob_of_recorded_actions_at_the_bounds_is_finite_and_so_is_its_gradient(aca):
    torch.manual_seed(0)
    actor, actions = aca.Actor(OBS, ACT, (8, 8)), torch.tensor([[1.0, -1.0], [1.0, 0.3], [-1.0, 1.0]])
    log_prob, _, _ = aca.action_log_prob(actor, torch.randn(3, OBS), actions)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in actor.parameters())


# === Offline: SAC+ML and the baseline ======================================================================


def test_sacml_actor_loss_by_hand(aca):
    q = torch.tensor([[-1.0, 5.0], [-3.0, 2.0]])
    log_prob, recorded = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, -2.5])
    # min Q = -3, 2: E|Q| = 2.5, lam = 10 / 2.5 = 4.  E[0.5 log pi - Q] = ((-0.5 + 3) + (1 - 2)) / 2 = 0.75
    # 4 * 0.75 - (0.5 - 2.5) / 2 = 4
    close(aca.sacml_actor_loss(q, log_prob, recorded, torch.tensor(0.5), 10.0), 4.0)


def test_lambda_has_no_gradient(aca):
    q = torch.tensor([[-1.0, 5.0], [-3.0, 2.0]], requires_grad=True)
    aca.sacml_actor_loss(q, torch.zeros(2), torch.zeros(2), torch.tensor(0.5), 10.0).backward()
    close(q.grad, [[0.0, 0.0], [-2.0, -2.0]])  # -lam / B at the minimum, lam = 4


def test_sacml_actor_gradients_reach_the_actor_and_the_temperature_alone(aca):
    agent, _ = make_agent(aca)
    batch = make_batch()
    torch.manual_seed(1)
    aca.sacml_actor_gradients(agent, batch, 30.0)
    torch.manual_seed(1)
    actions, log_prob = agent.actor.sample(batch["observations"])
    q = agent.critic(batch["observations"], actions).amin(dim=0)
    lam = 30 / q.abs().mean().item()
    recorded, _ = log_density(agent.actor, batch["observations"], batch["actions"])
    loss = lam * (0.5 * log_prob - q).mean() - recorded.mean()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    for grad, other in zip(gradients(agent.actor), expected, strict=True):
        close(grad, other)
    close(agent.log_alpha.grad, -0.5 * (log_prob.detach() - ACT).mean())
    assert agent.target_entropy == -ACT
    for critic in (agent.critic, agent.target_critic):
        assert gradients(critic) == [None] * len(gradients(critic))


def test_baseline_target_by_hand_masks_terminals_and_bootstraps_the_rest(aca):
    rewards, terminations = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    next_z, next_log_prob = (
        torch.tensor([[10.0, 20.0, -4.0], [12.0, 18.0, -6.0]]),
        torch.tensor([-1.0, 5.0, 2]),
    )
    # 1 + 0.9 (-1 + 10 + 0.5) = 9.55;  terminal: 2;  3 + 0.9 (2 - 6 - 1) = -1.5
    y = aca.baseline_target(rewards, terminations, next_z, next_log_prob, torch.tensor(0.5), 0.9)
    close(y, [9.55, 2.0, -1.5])


def test_baseline_loss_by_hand(aca):
    z, log_prob = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, -1.0])
    # critic 1: (1 + 1 - 1)^2, (-1 + 2 - 3)^2;  critic 2: 0, (-1 - 3)^2:  (1 + 4 + 0 + 16) / 4
    close(aca.baseline_loss(z, log_prob, torch.tensor([1.0, 3.0])), 5.25)


def test_baseline_gradients_are_those_of_its_loss_and_reach_it_alone(aca):
    agent, baseline = make_agent(aca)
    batch = make_batch()
    torch.manual_seed(1)
    aca.baseline_gradients(agent, baseline, batch, aca.Args(gamma=0.9, alignment_beta=3.0))
    torch.manual_seed(1)
    _, next_log_prob = agent.actor.sample(batch["next_observations"])
    z, next_z = (baseline(batch[key]).squeeze(-1) for key in ("observations", "next_observations"))
    future = next_log_prob + torch.minimum(next_z[0], next_z[1]) - 0.5 * next_log_prob
    y = batch["rewards"] + 0.9 * (1 - batch["terminations"]) * future
    log_prob, gaussian = log_density(agent.actor, batch["observations"], batch["actions"])
    c = (-0.5 * 3.0**2 - gaussian.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    log_prob = c + torch.log1p((log_prob - c).exp())  # as in the Q that Z will be part of
    loss = ((log_prob.detach() + z - y.detach()) ** 2).mean()
    for grad, other in zip(gradients(baseline), torch.autograd.grad(loss, list(baseline.parameters()))):
        close(grad, other)
    assert gradients(agent) == [None] * len(gradients(agent))


# === The alignment =========================================================================================


def aligned(aca, beta=3.0, weight=1.0):
    """An agent behind the handover, its prior and Z."""
    agent, baseline = make_agent(aca)
    args = aca.Args(alignment_beta=beta, alignment_weight=weight)
    return agent, aca.align(agent, baseline, args), baseline


def test_behind_the_alignment_the_actor_has_no_gradient_but_the_clips(aca):
    """|grad_a (log pi - Q)| <= (1 - sigmoid(log pi_0 - c)) |grad_a log pi_0| at every sample, alpha 1."""
    agent, _, _ = aligned(aca)
    observations = make_batch(512)["observations"]
    actions = agent.actor.sample(observations)[0].detach()
    actions[256:] = 1.98 * torch.rand(256, ACT, dtype=torch.float64) - 0.99  # and where pi_0 hardly is
    actions.requires_grad_(True)
    log_pi, gaussian = log_density(agent.actor, observations, actions)
    c = (-0.5 * 3.0**2 - gaussian.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    (score,) = torch.autograd.grad(log_pi.sum(), actions, retain_graph=True)
    bound = (1 - torch.sigmoid(log_pi - c)) * score.norm(dim=-1)
    for q in agent.critic(observations, actions):
        (gradient,) = torch.autograd.grad((log_pi - q).sum(), actions, retain_graph=True)
        assert (gradient.norm(dim=-1) <= bound + 1e-6 * score.norm(dim=-1)).all()
    assert 10 < (log_pi < c).sum() < 256, "the clip bites at some of the samples"
    assert actions.abs().max() < aca.ACTION_LIMIT, "beyond it log pi_0 is flat in a, as Q is"
    assert agent.log_alpha.exp() == 1


def test_behind_the_alignment_q_is_z_and_the_clipped_density_in_all_critics(aca):
    agent, prior, baseline = aligned(aca, weight=0.7)
    batch = make_batch()
    s, a = batch["observations"], batch["actions"]
    log_pi, gaussian = log_density(agent.actor, s, a)
    c = (-4.5 - gaussian.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    q = baseline(s).squeeze(-1) + 0.7 * (c + torch.log1p((log_pi - c).exp()))
    for critic in (agent.critic, agent.target_critic):
        close(critic(s, a), q)
    prior.weight.fill_(0.2)  # one weight for all
    for critic in (agent.critic, agent.target_critic):
        close(critic(s, a), q - 0.5 * (c + torch.log1p((log_pi - c).exp())))


def test_r_has_no_action_gradient_at_first_and_can_get_one(aca):
    agent, _, baseline = aligned(aca)
    batch = make_batch()
    actions = batch["actions"].requires_grad_(True)
    for net in (agent.critic.net, agent.target_critic.net):
        r = net(torch.cat([batch["observations"], actions], dim=-1))
        assert torch.autograd.grad(r.sum(), actions)[0].abs().max() == 0
        close(r, baseline(batch["observations"]))
    aca.critic_gradients(agent, batch, 0.9)
    assert agent.critic.net.weights[0].grad[:, OBS:].abs().min() > 0


def test_pi_0_stays_when_the_policy_moves(aca):
    agent, prior, _ = aligned(aca)
    batch = make_batch()
    before = prior(batch["observations"], batch["actions"])
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.add_(1)
    assert torch.equal(prior(batch["observations"], batch["actions"]), before)
    assert not any(p.requires_grad for p in prior.parameters())
    assert {id(p) for p in agent.critic.parameters()} == {id(p) for p in agent.critic.net.parameters()}


def test_online_losses_use_the_aligned_critic_throughout(aca):
    """Critic loss, its target and the actor loss, written out with R, pi_0 and the weight."""
    agent, prior, _ = aligned(aca)
    batch = make_batch()
    with torch.no_grad():
        for p in [
            *agent.critic.net.parameters(),
            *agent.target_critic.parameters(),
            *agent.actor.parameters(),
        ]:
            p.add_(0.05 * torch.randn_like(p))
        prior.weight.fill_(0.6)
        agent.log_alpha.fill_(math.log(0.5))

    def q_by_hand(net, s, a):
        log_pi, gaussian = log_density(prior.pi_0, s, a)
        c = (-4.5 - gaussian.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        clipped = c + torch.log1p((log_pi - c).exp())
        return net(torch.cat([s, a], dim=-1)).squeeze(-1) + 0.6 * clipped

    torch.manual_seed(1)
    aca.critic_gradients(agent, batch, 0.9)
    torch.manual_seed(1)
    next_actions, next_log_prob = agent.actor.sample(batch["next_observations"])
    next_q = q_by_hand(agent.target_critic.net, batch["next_observations"], next_actions).amin(dim=0)
    y = batch["rewards"] + 0.9 * (1 - batch["terminations"]) * (next_q - 0.5 * next_log_prob)
    q = q_by_hand(agent.critic.net, batch["observations"], batch["actions"])
    parameters = list(agent.critic.net.parameters())
    expected = torch.autograd.grad(((q - y.detach()) ** 2).mean(), parameters)
    for grad, other in zip(gradients(agent.critic.net), expected, strict=True):
        close(grad, other)

    torch.manual_seed(2)
    aca.actor_gradients(agent, batch)
    torch.manual_seed(2)
    actions, log_prob = agent.actor.sample(batch["observations"])
    q = q_by_hand(agent.critic.net, batch["observations"], actions).amin(dim=0)
    expected = torch.autograd.grad((0.5 * log_prob - q).mean(), list(agent.actor.parameters()))
    for grad, other in zip(gradients(agent.actor), expected, strict=True):
        close(grad, other, rtol=1e-4, atol=1e-6)


def test_diagnostics_see_the_whole_aligned_critic(aca):
    agent, _, _ = aligned(aca)
    batch = make_batch()
    actions = batch["actions"].requires_grad_(True)
    q = agent.critic(batch["observations"], actions)
    found_q, found = aca.q_and_action_gradient(agent.critic, batch["observations"], actions)
    close(found_q, q)
    for i in range(2):
        close(found[i], torch.autograd.grad(q[i].sum(), actions, retain_graph=True)[0])


@pytest.mark.parametrize(
    "settings, weights",
    [
        (dict(), {0: 1.0, 10_000: 0.75, 20_000: 0.5, 30_000: 0.5}),  # medium and medium-replay
        (dict(alignment_decay=10_000, alignment_floor=0.0), {0: 1.0, 5_000: 0.5, 10_000: 0.0, 20_000: 0.0}),
        (dict(alignment_decay=100_000, alignment_floor=1.0), {0: 1.0, 50_000: 1.0}),  # expert
        (dict(alignment_weight=2.0, alignment_decay=100), {0: 2.0, 50: 1.0, 75: 0.5, 80: 0.5}),
        (dict(alignment_weight=1.0, alignment_floor=15.0), {0: 1.0, 40_000: 1.0}),  # no floor lifts it
        (dict(alignment_weight=0.0), {0: 0.0, 40_000: 0.0}),
    ],
)
def test_the_weight_falls_to_its_floor(aca, settings, weights):
    for updates, weight in weights.items():
        assert aca.prior_weight(updates, aca.Args(**settings)) == pytest.approx(weight)


# === The best episodes =====================================================================================


def test_the_best_episodes_are_found_whole(aca):
    lengths = np.array([3, 1, 4, 2])
    columns = dict(rewards=np.repeat([1.0, 9.0, 2.0, 1.5], lengths))  # returns 3, 9, 8, 3
    data = aca.Dataset(columns, np.cumsum(lengths), {}, "")
    assert np.flatnonzero(aca.best_episode_rows(data, 2)).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(aca.best_episode_rows(data, 1)).tolist() == [3]
    assert not aca.best_episode_rows(data, 0).any() and aca.best_episode_rows(data, 9).all()


# === Whole runs ============================================================================================

STARTS = {"own": "", "checkpoint": "--alignment-steps 20 ", "from zero": "--alignment-steps 0 "}


@pytest.fixture(scope="module")
def smac_checkpoint(smac, tmp_path_factory):
    """offline.pt of a tiny SMAC run."""
    cwd = tmp_path_factory.mktemp("smac")
    words = TINY + "--score-steps 10 --score-hidden-sizes 16 16 --online-steps 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [smac.__file__, *words.split()])
        smac.main()
    return next(cwd.glob("runs/*/offline.pt"))


def words_of(start, smac_checkpoint) -> str:
    flags = "" if start == "own" else f"--checkpoint {smac_checkpoint} --offline-fraction 0 "
    return TINY + STARTS[start] + flags + "--top-episodes 1 "


@pytest.mark.parametrize("start", STARTS)
def test_a_run_from_the_first_update_to_the_table(aca, inside, smac_checkpoint, tmp_path, start):
    run = inside(aca, words_of(start, smac_checkpoint), tmp_path)
    assert run.code == 0 and "updates per second, online" in run.output
    assert [row["phase"] for row in run.rows()] == ["offline"] * 2 + ["online"] * 2
    offline = torch.load(smac_checkpoint) if start != "own" else run.state("offline.pt")
    final = run.state("final.pt")
    assert ("baseline" in offline["extras"]) == (start == "own")
    actor = lambda state, prefix: {k: v for k, v in state.items() if k.startswith(prefix)}
    before = actor(offline["agent"], "actor.")
    assert_equal(
        {k.replace("pi_0.", "actor."): v for k, v in final["extras"]["pi_0"].items() if k != "weight"}, before
    )
    for state in (offline, final):
        assert all(tensor.isfinite().all() for tensor in state["agent"].values())
    assert not torch.equal(final["agent"]["log_alpha"], offline["agent"]["log_alpha"])
    assert float(run.rows()[-1]["updates"]) == 40, "the best episode's rows are enough for the first update"
    assert float(final["extras"]["pi_0"]["weight"]) == pytest.approx(30 * (1 - 39 / 40_000))
    first, last = ([float(row[f"return_{i}"]) for i in range(2)] for row in run.rows()[1:3])
    assert first == last, "the policy is handed over as it is"


def test_offline_and_its_baseline_are_the_policys(aca, inside, tmp_path):
    """offline.pt is taken before the alignment: with ordinary critics, Z beside them."""
    run = inside(aca, TINY + "--online-steps 0", tmp_path)
    state = run.state("offline.pt")
    assert not state.get("score_net") and state["algorithm"] == "SAC+ML"
    baseline = aca.MLP(2, [3, 16, 16, 1], "silu")
    baseline.load_state_dict(state["extras"]["baseline"])
    assert not (run.directory / "final.pt").exists()


@pytest.mark.parametrize("script", ["sac_finetune.py", "td3_finetune.py", "aca_baseline.py"])
def test_checkpoints_that_other_scripts_take_and_refuse(aca, inside, tmp_path, script):
    run = inside(aca, TINY, tmp_path / "aca")
    other = load(script[:-3], ROOT / script) if script != "aca_baseline.py" else aca
    words = f"--checkpoint {run.directory / 'offline.pt'} --online-steps 40 "
    words += "--alignment-steps 5" if other is aca else ""
    taken = inside(other, words, tmp_path / "taken")
    assert taken.code == 0 and {row["phase"] for row in taken.rows()} == {"offline", "online"}
    refused = inside(other, f"--checkpoint {run.directory / 'final.pt'}", tmp_path / "refused")
    assert is_sentence(refused.code) and "aligned" in refused.code and refused.directory is None


def test_the_final_policy_can_be_filmed(aca, inside, monkeypatch, tmp_path):
    run, filmed = inside(aca, TINY, tmp_path), []
    monkeypatch.setattr(aca, "film", lambda actor, *_, **__: filmed.append(actor) or "")
    assert inside(aca, f"--checkpoint {run.directory / 'final.pt'} --video-only", tmp_path).code == 0
    returns = returns_of(aca, filmed[0], [aca.make_env("Pendulum-v1") for _ in range(2)], "cpu")
    np.testing.assert_allclose(returns, [float(run.rows()[-1][f"return_{i}"]) for i in range(2)], rtol=1e-6)


def test_a_checkpoint_with_its_own_z_starts_from_it(aca, inside, monkeypatch, tmp_path):
    run, seen = inside(aca, TINY + "--online-steps 0", tmp_path / "one"), []
    align = aca.align
    monkeypatch.setattr(
        aca, "align", lambda agent, z, args: seen.append(z.state_dict()) or align(agent, z, args)
    )
    words = f"--checkpoint {run.directory / 'offline.pt'} --alignment-steps 0 --online-steps 40"
    assert inside(aca, words, tmp_path / "two").code == 0
    assert_equal(dict(seen[0]), dict(run.state("offline.pt")["extras"]["baseline"]))


def test_without_fitting_z_starts_at_zero(aca, inside, smac_checkpoint, monkeypatch, tmp_path):
    seen, align = [], aca.align
    monkeypatch.setattr(aca, "align", lambda agent, z, args: seen.append(z) or align(agent, z, args))
    assert inside(aca, words_of("from zero", smac_checkpoint), tmp_path).code == 0
    assert seen[0](torch.randn(8, 3)).abs().max() == 0
    assert all(weight.abs().min() > 0 for weight in seen[0].weights[:-1]), "it can learn"


STOPS = [
    ("own", "offline", 5),
    ("own", "online", 30),
    ("checkpoint", "alignment", 7),
    ("checkpoint", "online", 30),
]


@pytest.mark.parametrize("start, phase, step", STOPS)
def test_a_resumed_run_ends_as_if_never_stopped(
    aca, inside, smac_checkpoint, monkeypatch, tmp_path, start, phase, step
):
    words = words_of(start, smac_checkpoint) + "--alignment-decay 50 "
    whole = inside(aca, words, tmp_path / "whole")
    names = dict(offline="sacml_actor_gradients", alignment="baseline_gradients", online="actor_gradients")
    update, calls = getattr(aca, names[phase]), []

    def stop(*arguments):
        if calls.append(1) or len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(aca, names[phase], stop)
        run = inside(aca, words, tmp_path / "stopped")
    assert run.code == 130
    last = run.state("last.pt")
    assert (last["phase"], last["step"]) == (phase, step)
    if phase == "online":
        check_the_buffer(aca, run)
        assert float(last["extras"]["pi_0"]["weight"]) == pytest.approx(30 * max(0.5, 1 - 29 / 50))
    run = inside(aca, f"--resume {run.directory}", tmp_path / "stopped")
    assert run.code == 0 and run.rows() == whole.rows()
    compare(run, whole)


def compare(one, other):
    """final.pt and, where there is one, offline.pt are the same to the last bit."""
    if (one.directory / "offline.pt").exists():
        return assert_same_run(one, other)
    states = [run.state("final.pt") for run in (one, other)]
    for state in states:
        del state["seconds"], state["resume"], state["checksum"]
        for row in state["rows"]:
            row.pop("seconds")
    assert_equal(*states)


def check_the_buffer(aca, run):
    """online_buffer.bin starts with the best episode of the recording, then come the 30 steps."""
    rows = np.fromfile(run.directory / "online_buffer.bin", np.float32).reshape(230, -1)
    data = aca.load_dataset("smac/pendulum/medium-replay-v0")
    best = int(data.returns().argmax())
    columns = {name: column[200 * best : 200 * best + 200] for name, column in data.columns.items()}
    np.testing.assert_array_equal(rows[:200, :3], columns["observations"])
    np.testing.assert_array_equal(rows[:200, 4], columns["rewards"])
    assert run.state("last.pt")["extras"]["start"] == 200


def test_the_gradients_norm_is_clipped_for_the_actor_alone(aca, inside, monkeypatch, tmp_path):
    actor_gradients, apply_gradients, checked = aca.actor_gradients, aca.apply_gradients, []

    def before(agent, batch):
        found = actor_gradients(agent, batch)
        checked.append((agent, gradients(agent.actor), gradients(agent.critic), agent.log_alpha.grad.clone()))
        return found

    def after(optimizers):
        if checked and len(checked[-1]) == 4:
            agent, actor, critic, log_alpha = checked.pop()
            norm = torch.stack([g.norm() for g in actor]).norm()
            for grad, unclipped in zip(gradients(agent.actor), actor, strict=True):
                close(grad, unclipped * min(1, 0.01 / norm.item()), rtol=1e-3, atol=1e-8)
            assert all(
                torch.equal(g, other) for g, other in zip(gradients(agent.critic), critic, strict=True)
            )
            assert torch.equal(agent.log_alpha.grad, log_alpha)
            checked.append((norm.item(),))
        apply_gradients(optimizers)

    monkeypatch.setattr(aca, "actor_gradients", before)
    monkeypatch.setattr(aca, "apply_gradients", after)
    assert inside(aca, TINY + "--actor-grad-norm 0.01", tmp_path).code == 0
    assert len(checked) == 40 and max(norm for (norm,) in checked) > 0.01


@pytest.mark.parametrize(
    "switches, updates",
    [
        ("--offline-optimizer muon --online-optimizer muon --utd-ratio 2 --offline-fraction 0", 16),
        (
            "--num-critics 3 --critic-layer-norm --target-critics 2 --offline-fraction 0.5 --warmup-steps 30",
            10,
        ),
        ("--critic-activation relu --offline-fraction -1 --best-episodes 0.5 --top-episodes 2", 40),
        ("--actor-scale 1 --alignment-beta 3 --alignment-weight 0.5 --alignment-floor 0", 8),
    ],
)
def test_switches(aca, inside, tmp_path, switches, updates):
    run = inside(aca, TINY + "--top-episodes 0 " + switches, tmp_path)
    assert run.code == 0 and int(run.rows()[-1]["updates"]) == updates
    assert all(tensor.isfinite().all() for tensor in run.state("final.pt")["agent"].values())


def test_tensorboard_shows_the_weight_and_the_share_of_clipped_states(aca, inside, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(aca, "LOG_EVERY", 20)
    run = inside(aca, TINY, tmp_path)
    events = EventAccumulator(str(run.directory / "tensorboard" / "online"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"online/prior_weight", "online/clipped_share", "online/actor_grad_norm"} <= tags
    assert 0 <= events.Scalars("online/clipped_share")[-1].value <= 1


def test_a_decay_out_of_range_is_one_sentence(aca, inside, tmp_path):
    run = inside(aca, TINY + "--alignment-decay 0", tmp_path)
    assert is_sentence(run.code) and "--alignment-decay" in run.code and run.directory is None


# === Does it learn? ========================================================================================


def test_sacml_beats_the_mean_of_the_recording(aca, tmp_path):
    """On Pendulum with the task's networks, the offline phase shortened to 3,000 updates."""
    settings = aca.TASK_DEFAULTS["pendulum-medium-replay"] | dict(
        env_id="pendulum-medium-replay", offline_steps=3_000, eval_every=3_000
    )
    dataset_id, env_id, _ = aca.TASKS["pendulum-medium-replay"]
    args, data, env = aca.Args(**settings), aca.load_dataset(dataset_id), aca.make_env(env_id)
    spec = vars(args) | dict(obs_dim=3, act_dim=1)
    run = aca.Run(args, tmp_path, data, env.spec, spec, torch.device("cpu"), {})
    agent, baseline = aca.train_offline_sacml(run)
    returns = returns_of(aca, agent.actor, run.envs, "cpu")
    standard_error = returns.std(ddof=1) / len(returns) ** 0.5
    assert returns.mean() > data.returns().mean() + 2 * standard_error
    with torch.no_grad():
        z = baseline(torch.as_tensor(data.columns["observations"])).mean().item()
    assert -16.3 / (1 - args.gamma) < z < 0, "no reward of Pendulum is above 0 or below -16.3"
    assert isinstance(baseline, nn.Module)
