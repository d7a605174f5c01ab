"""IQL: its losses by hand, what each gradient reaches, V between mean and maximum, training, whole runs.

IQL_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import contextlib
import io
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, returns_of
from test_pipeline import Result, assert_same_run, is_sentence, own_cache  # noqa: F401
from torch.distributions import Normal

OBS, ACT, B = 3, 2, 12
TINY = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 "
TINY += "--offline-steps 20 --online-steps 60 --eval-every 1000 "
WHOLE = TINY + "--inverse-temperature 4 --snapshot-every 50 --utd-ratio 2"


@pytest.fixture(scope="module")
def iql():
    """iql_baseline.py"""
    return load("iql_baseline", Path(os.environ.get("IQL_SCRIPT", ROOT / "iql_baseline.py")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """Runs a script's main() in this process, in a folder of its own; scalars every 20 updates."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, words: str, cwd: Path | None = None) -> Result:
        cwd, output = cwd or tmp_path_factory.mktemp("run"), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.chdir(cwd)
            patch.setattr(script, "LOG_EVERY", 20)
            patch.setattr(sys, "argv", [script.__file__, *words.split()])
            try:
                script.main()
                code = 0
            except SystemExit as ended:
                code = ended.code
        return Result(code, output.getvalue(), next((cwd / "runs").glob("*"), None))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(iql, inside):
    """A run that nothing stopped."""
    result = inside(iql, WHOLE)
    assert result.code == 0, result.code
    return result


def close(actual, expected, rtol=1e-5, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)


def make_networks(iql, num_critics=2, target_critics=0):
    """An agent with target critics of their own and a V, in float64, their parameters spread out."""
    agent = iql.Agent(OBS, ACT, (8, 8), num_critics, target_critics=target_critics).double()
    value = iql.MLP(1, [OBS, 8, 8, 1]).double()
    with torch.no_grad():
        for p in (*agent.critic.parameters(), *agent.target_critic.parameters(), *value.parameters()):
            p.mul_(2).add_(0.1 * torch.randn_like(p))
        for i, mlp in enumerate((agent.actor.net, agent.critic.net, agent.target_critic.net, value)):
            mlp.mean[:OBS] = torch.linspace(-0.3, 0.1 * i, OBS)
            mlp.std[:OBS] = torch.linspace(0.7, 1 + 0.1 * i, OBS)
    return agent, value


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


def test_the_minimum_is_the_mean_at_one_half_and_nears_the_maximum_at_one(iql):
    """The expectile of 0, 1 and 5: m with expectile sum (q - m)+ = (1 - expectile) sum (m - q)+."""
    q = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    found = {}
    for expectile in (0.1, 0.5, 0.7, 0.9, 0.99, 0.9999):
        m = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        steps = torch.optim.LBFGS([m], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def loss(m=m, expectile=expectile, steps=steps):
            steps.zero_grad()
            result = iql.expectile_loss(q - m, expectile)
            result.backward()
            return result

        steps.step(loss)
        found[expectile] = m.item()
    assert found[0.5] == pytest.approx(2.0)  # the mean
    assert found[0.7] == pytest.approx(
        (0.3 * 1 + 0.7 * 5) / 1.3
    )  # with 0 and 1 below: 0.3 (2 m - 1) = 0.7 (5 - m)
    assert found[0.9999] == pytest.approx(5.0, abs=2e-3)
    assert list(found.values()) == sorted(found.values())


def test_advantage_weights_by_hand_and_clipped(iql):
    advantage = torch.tensor([0.0, 1.0, -2.0, 1.5, 2.0, 1000.0], requires_grad=True)
    weights = iql.advantage_weights(advantage, 3.0, 100.0)
    close(weights, [1.0, 20.085537, 0.002478752, 90.017131, 100.0, 100.0])  # exp(3), exp(-6), exp(4.5)
    assert not weights.requires_grad, "the actor's loss moves neither Q nor V"
    close(iql.advantage_weights(advantage, 0.0, 100.0), torch.ones(6))


def test_target_at_termination_and_truncation_by_hand(iql):
    rewards, next_v = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([10.0, 10.0, 4.0])
    # going on, terminated, cut off by time (no termination)
    y = iql.value_target(rewards, torch.tensor([0.0, 1.0, 0.0]), next_v, 0.9)
    close(y, [1 + 9, 1, -2 + 3.6])


def test_weighted_likelihood_by_hand(iql):
    log_prob = torch.tensor([-1.0, 0.5, -2.0], requires_grad=True)
    loss = iql.weighted_likelihood_loss(log_prob, torch.tensor([2.0, 1.0, 0.5]))
    close(loss, (2 - 0.5 + 1) / 3)
    loss.backward()
    close(log_prob.grad, [-2 / 3, -1 / 3, -0.5 / 3])


def test_log_probability_of_recorded_actions(iql):
    """By torch.distributions inside; at the bounds, atanh being infinite, it and its gradient are finite."""
    actor, s = iql.Actor(OBS, ACT, (8, 8)).double(), torch.randn(B, OBS, dtype=torch.float64)
    actions = torch.tanh(torch.randn(B, ACT, dtype=torch.float64))
    mean, log_std = actor(s)
    expected = (Normal(mean, log_std.exp()).log_prob(actions.atanh()) - (1 - actions**2).log()).sum(-1)
    close(iql.action_log_prob(actor, s, actions)[0], expected)
    actor, s = actor.float(), s.float()
    for bound in (1.0, -1.0):
        log_prob, _, _ = iql.action_log_prob(actor, s, torch.full((B, ACT), bound))
        log_prob.sum().backward()
        assert log_prob.isfinite().all() and all(g.isfinite().all() for g in gradients(actor))


# === The update ============================================================================================


@pytest.mark.parametrize("num_critics, with_actor", [(2, True), (3, True), (2, False)])
def test_gradients_equal_each_loss_alone(iql, num_critics, with_actor):
    """Each loss by plain formulas, its gradient by itself: none leaks into another loss's network."""
    (agent, value), batch = make_networks(iql, num_critics), make_batch()
    s, a, s2 = (batch[name] for name in ("observations", "actions", "next_observations"))
    with torch.no_grad():
        smallest = agent.target_critic(s, a).min(dim=0).values
        weights = torch.exp(1.5 * (smallest - value(s)[0, :, 0]))
        clip = weights.median().item()
        y = batch["rewards"] + 0.9 * torch.where(batch["terminations"] == 1, 0.0, value(s2)[0, :, 0])
        weights = torch.where(weights > clip, clip, weights)
    args = iql.Args(gamma=0.9, expectile=0.8, weight_clip=clip)
    metrics = iql.iql_gradients(agent, value, batch, 1.5, args, with_actor)
    difference = smallest - value(s)[0, :, 0]
    loss_v = torch.where(difference > 0, 0.8 * difference**2, 0.2 * difference**2).mean()
    loss_q = torch.stack([((q - y) ** 2).mean() for q in agent.critic(s, a)]).mean()
    mean, log_std = agent.actor(s)
    log_prob = (Normal(mean, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum(-1)
    loss_pi = -(weights * log_prob).mean()
    cases = [("value_loss", loss_v, value), ("critic_loss", loss_q, agent.critic)]
    for name, loss, network in cases + [("actor_loss", loss_pi, agent.actor)] * with_actor:
        close(metrics[name], loss)
        expected = torch.autograd.grad(loss, list(network.parameters()))
        for grad, other in zip(gradients(network), expected, strict=True):
            assert other.abs().sum() > 0
            close(grad, other)
    for name in ("q", "v") + ("weight", "clipped_weights") * with_actor:
        assert metrics[name].isfinite() and not metrics[name].requires_grad
    if with_actor:
        close(metrics["clipped_weights"], 7 / 12)  # from the median of 12 on
    else:
        assert set(gradients(agent.actor)) == {None} and "actor_loss" not in metrics
    assert set(gradients(agent.target_critic)) == {None} and agent.log_alpha.grad is None


def test_v_moves_no_critic_and_the_critics_move_no_v(iql):
    """Where one of the two losses is 0, its network has no gradient, however large the other loss is."""
    (agent, value), batch = make_networks(iql), make_batch()
    args = iql.Args(gamma=0.9)
    with torch.no_grad():
        for critic in (agent.critic, agent.target_critic):
            for output in (critic.net.weights[-1], critic.net.biases[-1]):
                output.zero_()  # Q = Qbar = 0
        for output in (value.weights[-1], value.biases[-1]):
            output.zero_()  # V = 0, as Qbar
    iql.iql_gradients(agent, value, batch, 1.0, args, True)
    assert all(g.abs().max() == 0 for g in gradients(value)) and gradients(agent.critic)[-1].abs().max() > 0
    agent.zero_grad(), value.zero_grad()
    with torch.no_grad():
        value.biases[-1].fill_(5.0)
    batch["rewards"] = -0.9 * 5 * (1 - batch["terminations"])  # y = 0 = Q
    iql.iql_gradients(agent, value, batch, 1.0, args, True)
    assert (
        all(g.abs().max() < 1e-12 for g in gradients(agent.critic)) and gradients(value)[-1].abs().max() > 0
    )


def test_fewer_target_critics_are_drawn(iql):
    """Three critics, one drawn: V follows each of them in turn, not always the smallest."""
    agent, value = make_networks(iql, 3, 1)
    batch, args, found = make_batch(), iql.Args(), set()
    for _ in range(30):
        found.add(iql.iql_gradients(agent, value, batch, 1.0, args, False)["value_loss"].item())
    assert len(found) == 3


def test_v_is_the_expectile_of_the_recorded_actions_values(iql):
    """One state, three recorded actions, Qbar known: V learns the mean at 0.5 and nears the best at 0.99."""
    agent, batch, found = iql.Agent(OBS, ACT, (8, 8)), make_batch(), {}
    batch = {name: column.float() for name, column in batch.items()}
    batch["observations"] = torch.ones(B, OBS)
    values = torch.tensor([0.0, 1.0, 5.0]).repeat(B // 3)
    agent.target_critic.forward = lambda s, a: torch.stack([values, values + 1])
    for expectile in (0.5, 0.99):
        value = iql.MLP(1, [OBS, 8, 1])
        args = iql.Args(expectile=expectile)
        adam = torch.optim.Adam(value.parameters(), lr=0.05)
        for _ in range(300):
            iql.iql_gradients(agent, value, batch, 1.0, args, False)
            iql.apply_gradients([adam])
        found[expectile] = value(torch.ones(1, OBS)).item()
    assert found[0.5] == pytest.approx(2.0, abs=0.05)
    # 0.01 (2 m - 1) = 0.99 (5 - m): m = 4.96 / 1.01
    assert found[0.99] == pytest.approx(4.911, abs=0.05)


def recording(iql, returns, **metadata):
    """One transition an episode, whose reward is the return."""
    columns = dict(rewards=np.float32(returns))
    return iql.Dataset(columns, np.arange(1, len(returns) + 1), metadata, "")


def test_beta_takes_the_scale_of_the_rewards(iql):
    """exp(beta A) is what it would be, had the rewards been multiplied by return_range / (max - min)."""
    args = iql.Args(inverse_temperature=3.0, return_range=1000.0)
    assert iql.scaled_beta(recording(iql, [-100.0, 50.0, 400.0]), args) == pytest.approx(3 * 1000 / 500)
    # what the losses see is 10 times as much: A too
    assert iql.scaled_beta(recording(iql, [0.0, 500.0], reward_scale=10.0, reward_bias=-5.0), args) == (
        pytest.approx(3 * 1000 / 5000)
    )
    assert iql.scaled_beta(recording(iql, [7.0, 7.0]), iql.Args()) == 3.0, "off by default"
    with pytest.raises(SystemExit, match="--return-range"):
        iql.scaled_beta(recording(iql, [7.0, 7.0]), args)


def test_beta_of_the_bundled_tasks(iql):
    """The robots' returns span 2,941 and 2,509; Pendulum's rewards stay as they are."""
    for robot, expected in (("hopper", 10_000 / 2941), ("walker2d", 10_000 / 2509.5), ("pendulum", 3.0)):
        task = f"{robot}-medium-replay"
        args = iql.Args(**iql.TASK_DEFAULTS[task])
        data = iql.load_dataset(iql.TASKS[task][0])
        assert iql.scaled_beta(data, args) == pytest.approx(expected, rel=2e-3)


# === Whole runs ============================================================================================


def test_a_run_from_the_first_update_to_the_table(iql, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "updates per second, online" in whole.output
    assert [row["phase"] for row in whole.rows()] == ["offline"] * 2 + ["online"] * 2
    assert float(whole.rows()[-1]["updates"]) == 2 * (60 - 16), "16 of 32 rows are online ones"
    first, last = ([float(row[f"return_{i}"]) for i in range(2)] for row in whole.rows()[1:3])
    assert first == last, "the policy is handed over as it is"
    assert [path.name for path in (whole.directory / "snapshots").iterdir()] == ["online_000000050.pt"]
    for name in ("offline.pt", "final.pt"):
        state = whole.state(name)
        assert state["algorithm"] == state["online_algorithm"] == "IQL" and not state["score_net"]
        value = iql.MLP(1, [3, 16, 16, 1])
        value.load_state_dict(state["extras"]["value"])
        assert float(state["agent"]["log_alpha"]) == pytest.approx(-math.log(4)), "of a fine-tuner alone"
    for phase in ("offline", "online"):
        events = EventAccumulator(str(whole.directory / "tensorboard" / phase)).Reload()
        names = ("critic_loss", "value_loss", "actor_loss", "q", "v", "log_prob_recorded", "weight",
                 "clipped_weights")  # fmt: skip
        assert {f"{phase}/{name}" for name in names} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("switches", ["", "--no-cosine-actor-lr --offline-optimizer muon"])
def test_the_actors_learning_rate_falls_along_a_cosine_offline_alone(iql, inside, monkeypatch, switches):
    rates, step = [], torch.optim.Adam.step

    def watched(adam):
        rates.append([group["lr"] for group in adam.param_groups])
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    assert inside(iql, TINY + switches).code == 0
    actor, critic = np.array(rates).T
    assert len(actor) == 20 + 60 - 16 and (critic == 3e-4).all() and (actor[20:] == 3e-4).all()
    cosine = [3e-4 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    np.testing.assert_allclose(actor[:20], [3e-4] * 20 if switches else cosine)


@pytest.mark.parametrize("phase, step", [("offline", 5), ("online", 40)])
def test_a_resumed_run_ends_as_if_never_stopped(iql, inside, whole, monkeypatch, tmp_path, phase, step):
    update, calls = iql.iql_gradients, []
    updates = step if phase == "offline" else 20 + 2 * (step - 16)

    def stop(*arguments):
        if calls.append(1) or len(calls) == updates:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(iql, "iql_gradients", stop)
        run = inside(iql, WHOLE, tmp_path)
    assert run.code == 130
    last = run.state("last.pt")
    assert (last["phase"], last["step"]) == (phase, step) and "value" in last["extras"]
    run = inside(iql, f"--resume {run.directory}", tmp_path)
    assert run.code == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("script", ["sac_finetune.py", "td3_finetune.py", "aca_baseline.py"])
def test_fine_tuners_take_its_checkpoint(inside, whole, script):
    words = f"--checkpoint {whole.directory / 'offline.pt'} --online-steps 50 --warmup-steps 20 "
    words += "--alignment-steps 5" if script == "aca_baseline.py" else ""
    taken = inside(load(script[:-3], ROOT / script), words)
    assert taken.code == 0, taken.code
    rows = taken.rows()
    assert [row["phase"] for row in rows] == ["offline"] * 2 + ["online"] * 2
    assert rows[1]["return_mean"] == rows[2]["return_mean"], "it starts from the policy that was handed over"
    assert float(rows[-1]["updates"]) > 0
    assert all(tensor.isfinite().all() for tensor in taken.state("final.pt")["agent"].values())


@pytest.mark.parametrize(
    "switches, updates",
    [
        ("--offline-optimizer muon --online-optimizer muon --utd-ratio 2 --offline-fraction 0", 56),
        ("--num-critics 3 --critic-layer-norm --target-critics 2 --warmup-steps 30 --return-range 1000", 30),
        ("--critic-activation silu --offline-fraction -1 --best-episodes 0.5 --inverse-temperature 0", 28),
        ("--offline-steps 0 --expectile 0.9 --weight-clip 10", 44),
    ],
)
def test_switches(iql, inside, monkeypatch, switches, updates):
    update, networks = iql.iql_gradients, []
    monkeypatch.setattr(iql, "iql_gradients", lambda *x: networks.append(x[:2]) or update(*x))
    run = inside(iql, TINY + switches)
    assert run.code == 0 and int(run.rows()[-1]["updates"]) == updates
    assert all(tensor.isfinite().all() for tensor in run.state("final.pt")["agent"].values())
    agent, value = networks[0]
    assert value.activation is agent.critic.net.activation, "V has the critics' layers"
    assert torch.equal(value.mean, agent.actor.net.mean) and torch.equal(value.std, agent.actor.net.std)
    assert value.mean.abs().sum() > 0, "the observations' statistics"
    assert len(value.gains) == len(agent.critic.net.gains) == 2 * ("--critic-layer-norm" in switches)


def test_online_batches_are_mixed_and_the_last_update_of_a_step_moves_the_actor(iql, inside, monkeypatch):
    """A quarter of each batch is recorded, and all rewards have the transform that the recording names."""
    update, seen = iql.iql_gradients, []
    data = iql.load_dataset("smac/pendulum/medium-replay-v0")
    data = data._replace(metadata=data.metadata | dict(reward_scale=0.1, reward_bias=1.0))
    monkeypatch.setattr(iql, "load_dataset", lambda *_: data)
    monkeypatch.setattr(iql, "iql_gradients", lambda *x: seen.append((x[2], x[-1])) or update(*x))
    assert inside(iql, TINY + "--utd-ratio 3 --offline-fraction 0.25").code == 0
    online = seen[20:]
    assert len(online) == 3 * (60 - 24) and [last for _, last in online[:6]] == [False, False, True] * 2
    recorded = {row.tobytes() for row in data.columns["observations"]}
    for batch, _ in online[::20]:
        old = [row.numpy().tobytes() in recorded for row in batch["observations"]]
        assert old == [True] * 8 + [False] * 24
        (x, y, speed), torque = batch["observations"].T, 2 * batch["actions"][:, 0]
        raw = -(torch.atan2(y, x) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)  # Pendulum's own reward
        close(batch["rewards"], 0.1 * raw + 1, atol=1e-4)


def test_a_policy_can_be_filmed(iql, inside, whole, monkeypatch):
    filmed = []
    monkeypatch.setattr(iql, "film", lambda actor, *_, **__: filmed.append(actor) or "")
    assert inside(iql, f"--checkpoint {whole.directory / 'final.pt'} --video-only").code == 0
    returns = returns_of(iql, filmed[0], [iql.make_env("Pendulum-v1") for _ in range(2)], "cpu")
    np.testing.assert_allclose(returns, [float(whole.rows()[-1][f"return_{i}"]) for i in range(2)], rtol=1e-6)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--expectile 1.5", "--expectile"),
        ("--inverse-temperature -1", "--inverse-temperature"),
        ("--weight-clip 0", "--weight-clip"),
        ("--return-range -1", "--return-range"),
        ("--checkpoint absent.pt", "absent.pt"),
    ],
)
def test_bad_settings_are_one_sentence(iql, inside, words, said):
    run = inside(iql, TINY + words)
    assert is_sentence(run.code) and said in run.code and run.directory is None


def test_it_takes_no_checkpoint_online(iql, inside, whole):
    refused = inside(iql, f"--checkpoint {whole.directory / 'offline.pt'}")
    assert is_sentence(refused.code) and "sac_finetune.py" in refused.code and refused.directory is None


# === Does it learn? ========================================================================================


@pytest.fixture(scope="module")
def trained(iql, tmp_path_factory):
    """700 updates of IQL and of behaviour cloning (beta 0) on the Pendulum recording, by beta."""
    dataset_id, env_id, _ = iql.TASKS["pendulum-medium-replay"]
    data, env, found = iql.load_dataset(dataset_id), iql.make_env(env_id), {}
    for beta in (3.0, 0.0):
        args = iql.Args(env_id="pendulum-medium-replay", hidden_sizes=(32, 32), batch_size=128, actor_lr=2e-3,
                        critic_lr=5e-3, tau=0.05, gamma=0.9, offline_steps=700, eval_every=700,
                        inverse_temperature=beta)  # fmt: skip
        spec = vars(args) | dict(obs_dim=3, act_dim=1)
        run = iql.Run(args, tmp_path_factory.mktemp("run"), data, env.spec, spec, torch.device("cpu"), {})
        found[beta] = SimpleNamespace(run=run, nets=iql.train_offline_iql(run))
    return found


def test_it_beats_the_recording_and_behaviour_cloning(iql, trained):
    returns = {
        beta: returns_of(iql, x.nets[0].actor, x.run.envs, "cpu") for beta, x in trained.items()
    }  # the same start states
    difference = returns[3.0] - returns[0.0]
    standard_error = difference.std(ddof=1) / len(difference) ** 0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"
    data = trained[3.0].run.data
    assert returns[3.0].mean() > data.returns().mean() + 200


def test_values_stay_within_the_possible_returns(iql, trained):
    run, (agent, value) = trained[3.0].run, trained[3.0].nets
    observations, actions = (torch.as_tensor(run.data.columns[k]) for k in ("observations", "actions"))
    with torch.no_grad():
        q, v = agent.critic(observations, actions).amin(dim=0), value(observations).flatten()
    lowest = run.data.columns["rewards"].min() / (1 - run.args.gamma)  # the worst reward for ever
    assert lowest < q.mean() < 0 and lowest < v.mean() < 0
