"""The scripts that go online from a checkpoint: TD3's equations, the handover, the offline share, the GIF."""

import contextlib
import copy
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load
from PIL import Image
from test_pipeline import Result, assert_equal, is_sentence, own_cache, signal_at  # noqa: F401
from torch import nn

TINY = "--env-id pendulum-medium-replay --hidden-sizes 8 8 --score-hidden-sizes 8 8 --batch-size 8 "
TINY += "--eval-episodes 2 --score-steps 5 --offline-steps 6 --online-steps 24 --eval-every 12 --seed 3 "
RECORDED = 15_200  # transitions of pendulum-medium-replay


@pytest.fixture(scope="session")
def scripts(smac):
    """The three scripts by the name of what goes on online."""
    names = dict(sac="sac_finetune", td3="td3_finetune")
    return {"smac": smac} | {key: load(name, ROOT / f"{name}.py") for key, name in names.items()}


@pytest.fixture(scope="session")
def td3(scripts):
    return scripts["td3"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextlib.contextmanager
def called(script, words, report=True):
    """The command line; and the tasks' defaults as the file has them, which parse_args() writes into.

    Without `report` the learning curve, half of the time of a tiny run, is left out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "TASK_DEFAULTS", copy.deepcopy(script.TASK_DEFAULTS))
        patch.setattr(sys, "argv", [script.__file__, *words.split()])
        if not report:
            patch.setattr(script, "report", lambda run, agent: None)
        yield


def inside(script, words, cwd, report=False) -> Result:
    """main() in this process, in a folder of its own, which has to hold no other run."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cwd.mkdir(exist_ok=True, parents=True)
    output = io.StringIO()
    with called(script, words, report), contextlib.chdir(cwd), contextlib.redirect_stdout(output):
        try:
            script.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(code, output.getvalue(), next((cwd / "runs").glob("*"), None))


@pytest.fixture(scope="module")
def whole(smac, tmp_path_factory):
    """SMAC, then SAC, in one run: its offline.pt is the checkpoint of the tests below."""
    run = inside(smac, TINY + "--snapshot-every 6", tmp_path_factory.mktemp("whole"))
    assert run.code == 0, run.output
    return run


@pytest.fixture
def checkpoint(whole):
    return whole.directory / "offline.pt"


def config(run) -> dict:
    return json.loads((run.directory / "config.json").read_text())


def assert_same_end(one, other):
    """The same final.pt to the last bit, whatever the clock, the folder and the flags were."""
    keys = ("agent", "optimizers", "random_states", "step", "extras")
    assert_equal(*({key: run.state("final.pt")[key] for key in keys} for run in (one, other)))


def flat(network) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


# === TD3's equations =======================================================================================


def test_the_targets_noise_is_scaled_then_clipped_and_so_is_the_action(td3):
    args = td3.Args(policy_noise=0.2, noise_clip=0.5)
    # 0.2 e = 0.2, 1.0, -0.8, -2.0, 0.4 -> 0.2, 0.5, -0.5, -0.5, 0.4; the sums 1.2 and -1.1 leave [-1, 1]
    actions, noise = torch.tensor([[0.0, 0.7, -0.6, 0.1, 0.6]]), torch.tensor([[1.0, 5.0, -4.0, -10.0, 2.0]])
    expected = torch.tensor([[0.2, 1.0, -1.0, -0.4, 1.0]])
    torch.testing.assert_close(td3.smoothed(actions, noise, args), expected)


class Lines(nn.Module):
    """Critics Q_i(s,a) = slope_i a + offset_i."""

    def __init__(self, *lines):
        super().__init__()
        self.lines = nn.Parameter(torch.tensor(lines))

    def forward(self, observations, actions):
        return self.lines[:, :1] * actions[:, 0] + self.lines[:, 1:]


@pytest.mark.parametrize(
    "count, expected", [(2, [2.17, 2.0, 2.1]), (1, [3.16, 2.0, 2.1])], ids=["the minimum", "the one drawn"]
)
def test_the_target_by_hand(td3, monkeypatch, count, expected):
    """mu'(s') = s'/2 = 0.5, 0.5, -0.5; noise 0.2 (1, 5, -5), clipped to 0.5: a' = 0.7, 1, -1.

    Qbar_1 = 2a + 1 = 2.4, 3, -1;  Qbar_2 = 2 - a = 1.3, 1, 3;  minimum 1.3, 1, -1
    y = r + 0.9 (1 - terminal) min = 1 + 1.17, 2 (terminal), 3 - 0.9; of Qbar_1 alone 1 + 2.16, 2, 3 - 0.9
    """
    halved, negated = (SimpleNamespace(mode=lambda s, gain=gain: gain * s) for gain in (0.5, -1.0))
    agent = SimpleNamespace(actor=negated, critic=Lines((1.0, 0.0), (0.0, 4.0)), target_critics=count)
    agent.target_critic = Lines((2.0, 1.0), (-1.0, 2.0))
    column = lambda *values: torch.tensor(values)[:, None]
    batch = dict(observations=column(0.0, 0.0, 0.0), actions=column(0.5, -0.5, 1.0),
                 rewards=torch.tensor([1.0, 2.0, 3.0]), next_observations=column(1.0, 1.0, -1.0),
                 terminations=torch.tensor([0.0, 1.0, 0.0]))  # fmt: skip
    seen, td_loss = [], td3.td_loss
    monkeypatch.setattr(td3, "td_loss", lambda q, y: seen.append(y) or td_loss(q, y))
    monkeypatch.setattr(td3, "drawn", lambda q, count: q[:count])
    monkeypatch.setattr(td3.torch, "randn_like", lambda actions: column(1.0, 5.0, -5.0))
    metrics = td3.td3_critic_gradients(agent, halved, batch, td3.Args(gamma=0.9))
    torch.testing.assert_close(seen[0], torch.tensor(expected))
    # Q = (0.5, -0.5, 1), (4, 4, 4); dL/d offset_i = sum_b 2 (Q_i - y) / 6
    q, y = torch.tensor([[0.5, -0.5, 1.0], [4.0, 4.0, 4.0]]), torch.tensor(expected)
    torch.testing.assert_close(metrics["critic_loss"], ((q - y) ** 2).sum() / 6)
    torch.testing.assert_close(agent.critic.lines.grad[:, 1], (q - y).sum(1) / 3)
    assert agent.target_critic.lines.grad is None


def test_the_actors_loss_is_minus_the_first_critic(td3):
    q = torch.tensor([[1.0, 3.0], [-5.0, -7.0]], requires_grad=True)  # the second would win any minimum
    loss = td3.td3_actor_loss(q, torch.ones(2, 2), torch.zeros(2, 2), 0.0)
    loss.backward()
    assert loss.item() == -2 and q.grad.tolist() == [[-0.5, -0.5], [0, 0]]


def test_td3_bc_by_hand(td3):
    """Q_1 = 1, -3: mean -1, mean |Q_1| 2, lambda = 2.5 / 2 = 1.25; (mu - a)^2 = 0.25, 0.25, 0.25, 1."""
    q = torch.tensor([[1.0, -3.0], [9.0, 9.0]], requires_grad=True)
    actions = torch.tensor([[0.5, -0.5], [1.0, 0.0]], requires_grad=True)
    loss = td3.td3_actor_loss(q, actions, torch.tensor([[0.0, 0.0], [0.5, 1.0]]), 2.5)
    loss.backward()
    assert loss.item() == 1.25 + 1.75 / 4
    assert q.grad.tolist() == [[-0.625, -0.625], [0, 0]]  # -lambda / 2, lambda a constant
    assert actions.grad.tolist() == [[0.25, -0.25], [0.25, -0.5]]  # 2 (mu - a) / 4


@pytest.mark.parametrize("bc_alpha", [0.0, 2.5])
def test_the_actors_gradient_reaches_nothing_else(td3, bc_alpha):
    agent, s, a = td3.Agent(3, 2, (8, 8)), torch.randn(16, 3), torch.rand(16, 2)
    td3.td3_actor_gradients(agent, dict(observations=s, actions=a), bc_alpha)
    mu = torch.tanh(agent.actor.net(s)[0, :, :2])
    q = agent.critic(s, mu)[0]
    plain = -q.mean() if bc_alpha == 0 else (mu - a).square().mean() - 2.5 * q.mean() / q.abs().mean().item()
    expected = torch.autograd.grad(plain, list(agent.actor.parameters()))
    torch.testing.assert_close([p.grad for p in agent.actor.parameters()], list(expected))
    others = [*agent.critic.parameters(), *agent.target_critic.parameters(), agent.log_alpha]
    assert expected[0].abs().sum() > 0 and all(p.grad is None for p in others)


def test_all_critics_or_some_of_them_make_the_target(td3):
    q = torch.randn(10, 4)
    assert torch.equal(td3.drawn(q, 10), q)
    rows = torch.arange(10.0)[:, None].expand(10, 4)  # each critic says its number
    draws = torch.stack([td3.drawn(rows, 2) for _ in range(2_000)])
    assert draws.shape == (2_000, 2, 4) and torch.equal(draws, draws[..., :1].expand_as(draws))
    first, second = draws[:, 0, 0], draws[:, 1, 0]
    assert (first != second).all(), "drawn with replacement"
    counts = torch.bincount(draws[..., 0].flatten().long(), minlength=10)
    assert ((counts - 400).abs() < 100).all()  # standard deviation 18
    assert all((td3.drawn(q, 2).amin(0) >= q.amin(0)).all() for _ in range(50))


# === Updates online ========================================================================================


@pytest.mark.parametrize("delay, utd", [(2, 1), (2, 3), (3, 2)])
def test_actor_and_targets_move_at_every_nth_critic_update(
    td3, checkpoint, monkeypatch, tmp_path, delay, utd
):
    seen, gradients = [], td3.td3_critic_gradients

    def watched(agent, target_actor, *rest):
        networks = dict(critic=agent.critic, target_critic=agent.target_critic)
        networks |= dict(actor=agent.actor, target_actor=target_actor)
        seen.append({name: flat(network) for name, network in networks.items()})
        return gradients(agent, target_actor, *rest)

    monkeypatch.setattr(td3, "td3_critic_gradients", watched)
    words = f"--checkpoint {checkpoint} --online-steps 11 --policy-delay {delay} --utd-ratio {utd} --tau 0.25"
    assert inside(td3, words, tmp_path).code == 0
    assert len(seen) == utd * 7  # half of a batch of 8 comes from the environment: the first 4 steps wait
    torch.testing.assert_close(seen[0]["target_actor"], seen[0]["actor"], rtol=0, atol=0)
    for n, (before, after) in enumerate(pairwise(seen), start=1):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({*before} if n % delay == 0 else {"critic"}), n
        for name in ("critic", "actor") if n % delay == 0 else ():
            target = 0.75 * before[f"target_{name}"] + 0.25 * after[name]
            torch.testing.assert_close(after[f"target_{name}"], target)


@pytest.fixture
def sampled(monkeypatch):
    """(capacity, rows in it, rows drawn) for each time that a buffer of `script` is sampled."""

    def watch(script):
        seen, sample = [], script.ReplayBuffer.sample_rows

        def sample_rows(buffer, count):
            rows = sample(buffer, count)
            seen.append((len(buffer.rows), buffer.size, len(rows)))
            return rows

        monkeypatch.setattr(script.ReplayBuffer, "sample_rows", sample_rows)
        return seen

    return watch


@pytest.mark.parametrize("name", ["sac", "td3"])
@pytest.mark.parametrize(
    "flags, utd, old, waits",
    [
        ("--offline-fraction 0.3", 1, 2, 6),  # round(2.4) of 8 rows
        ("--offline-fraction 0.3 --warmup-steps 3", 4, 2, 6),
        ("--offline-fraction 0.7 --warmup-steps 9", 3, 6, 9),  # round(5.6); 2 rows are there long before
        ("--offline-fraction 0", 3, 0, 8),
        ("--offline-fraction 1", 2, 8, 0),
    ],
)
def test_every_minibatch_has_the_offline_share_asked_for(
    scripts, checkpoint, sampled, tmp_path, name, flags, utd, old, waits
):
    seen = sampled(scripts[name])
    words = f"--checkpoint {checkpoint} --online-steps 13 --utd-ratio {utd} {flags}"
    assert inside(scripts[name], words, tmp_path).code == 0
    expected = [
        part
        for step in range(waits + 1, 14)
        for part in utd * [(RECORDED, RECORDED, old), (13, step, 8 - old)]
    ]
    assert seen == expected


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_share_by_size_follows_the_growing_buffer(scripts, checkpoint, sampled, tmp_path, name):
    """One episode of 200 transitions stays of the recording; 200 of 200 + step, also at 2 updates a step."""
    seen = sampled(scripts[name])
    words = f"--checkpoint {checkpoint} --online-steps 60 --utd-ratio 2 --offline-fraction -1 "
    words += "--batch-size 40 --data-fraction 0.01 --eval-every 60 --handover-eval-every 60"
    assert inside(scripts[name], words, tmp_path).code == 0
    shares = [round(40 * 200 / (200 + step)) for step in range(41, 61)]
    assert shares[0] == 33 and shares[-1] == 31
    expected = [
        part
        for step, old in zip(range(41, 61), shares)
        for part in 2 * [(200, 200, old), (60, step, 40 - old)]
    ]
    assert seen == expected


# === The handover ==========================================================================================


@pytest.fixture(scope="module")
def gone_on(scripts, whole, tmp_path_factory):
    """The checkpoint taken online by SAC and by TD3; only the length of a run is its own."""
    runs = {}
    for name in ("sac", "td3"):
        words = f"--checkpoint {whole.directory / 'offline.pt'} --online-steps 24"
        runs[name] = inside(scripts[name], words, tmp_path_factory.mktemp(name), report=True)
        assert runs[name].code == 0, runs[name].output
    return runs


def test_sac_from_the_checkpoint_is_the_run_that_never_stopped(whole, gone_on):
    assert gone_on["sac"].rows() == whole.rows()
    assert_same_end(gone_on["sac"], whole)
    assert not (gone_on["sac"].directory / "offline.pt").exists()
    assert (gone_on["sac"].directory / "learning_curve.png").exists()


def test_sac_with_its_own_pretraining_is_the_same_run_again(scripts, whole, tmp_path):
    run = inside(scripts["sac"], TINY, tmp_path)
    assert run.rows() == whole.rows()
    assert_same_end(run, whole)


def test_td3_draws_the_same_numbers_with_and_without_pretraining_in_its_process(td3, gone_on, tmp_path):
    run = inside(td3, TINY, tmp_path)
    assert run.rows() == gone_on["td3"].rows()
    assert_same_end(run, gone_on["td3"])


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_online_starts_at_the_evaluation_that_offline_ended_with(gone_on, name):
    rows = gone_on[name].rows()
    offline = [row for row in rows if row["phase"] == "offline"][-1]
    online = next(row for row in rows if row["phase"] == "online")
    assert (int(offline["step"]), int(online["step"])) == (6, 0)
    for key in ("return_mean", "score", "return_0", "return_1", "alpha", "q_start", "discounted_return",
                "q_dataset", "grad_q_dataset", "cosine_dataset"):  # fmt: skip
        assert online[key] == offline[key], key


def test_td3_leaves_the_temperature_and_the_final_row_is_its_own(whole, gone_on):
    states = [run.state("final.pt") for run in (whole, gone_on["td3"])]
    assert states[1]["agent"]["log_alpha"] == whole.state("offline.pt")["agent"]["log_alpha"]
    assert states[0]["agent"]["log_alpha"] != states[1]["agent"]["log_alpha"]
    assert [(s["algorithm"], s["online_algorithm"]) for s in states] == [("SMAC", "SAC"), ("SMAC", "TD3")]
    assert "target_actor" in states[1]["extras"]


def test_the_checkpoints_settings_hold_and_a_flag_wins(td3, whole, gone_on, checkpoint, tmp_path):
    ours, theirs = config(gone_on["td3"])["args"], config(whole)["args"]
    for name in ("hidden_sizes", "batch_size", "seed", "eval_episodes", "offline_steps", "eval_every"):
        assert ours[name] == theirs[name], name
    run = inside(td3, f"--checkpoint={checkpoint} --online-steps 9 --seed 4 --bc-alpha 2.5", tmp_path)
    assert run.code == 0 and int(run.rows()[-1]["step"]) == 9
    args = config(run)["args"]
    assert (args["seed"], args["bc_alpha"], args["batch_size"]) == (4, 2.5, 8)
    assert run.state("final.pt")["online_algorithm"] == "TD3+BC"
    with called(td3, f"--checkpoint {checkpoint}"):
        assert td3.parse_args().online_steps == 4_000, "of the task, not of the checkpoint's run"


def test_a_checkpoint_leaves_the_tasks_defaults_as_they_are(td3, checkpoint):
    with called(td3, f"--checkpoint {checkpoint}"):
        before = copy.deepcopy(td3.TASK_DEFAULTS)
        td3.parse_args()
        assert before == td3.TASK_DEFAULTS


@pytest.mark.parametrize("flag, value", [("target_critics", 1), ("target_entropy", -0.5)])
def test_a_flag_wins_where_the_agent_keeps_the_setting(
    scripts, checkpoint, monkeypatch, tmp_path, flag, value
):
    script, agents = scripts["sac"], []
    monkeypatch.setattr(script, "train_online", lambda run, agent, score_net: agents.append(agent))
    words = f"--checkpoint {checkpoint} --{flag.replace('_', '-')} {value}"
    assert inside(script, words, tmp_path).code == 0
    assert getattr(agents[0], flag) == value  # the entropy of one action dimension


@pytest.mark.parametrize("episodes", [1, 3])
def test_metrics_stay_a_table_with_another_number_of_episodes(scripts, checkpoint, tmp_path, episodes):
    words = f"--checkpoint {checkpoint} --online-steps 3 --eval-episodes {episodes}"
    run = inside(scripts["sac"], words, tmp_path)
    assert run.code == 0
    lines = (run.directory / "metrics.csv").read_text().splitlines()
    assert len({line.count(",") for line in lines}) == 1


def test_a_final_checkpoint_starts_with_its_own_online_rows(td3, whole, tmp_path):
    run = inside(td3, f"--checkpoint {whole.directory / 'final.pt'} --online-steps 5", tmp_path)
    assert run.code == 0 and [row["phase"] for row in run.rows()] == ["online", "online"]
    for key in ("return_0", "return_1", "q_dataset"):
        assert run.rows()[0][key] == whole.rows()[-1][key]


def test_a_final_checkpoint_without_steps_is_one_sentence(scripts, whole, tmp_path):
    run = inside(scripts["sac"], f"--checkpoint {whole.directory / 'final.pt'} --online-steps 0", tmp_path)
    assert is_sentence(run.code) and "--online-steps 0 leaves nothing to do" in run.code


def test_resume_with_another_script_is_one_sentence(scripts, gone_on, tmp_path):
    """TD3's settings are SAC's and more; what has run as SAC does not go on as TD3, nor the other way."""
    for ours, other in (("sac", "td3"), ("td3", "sac")):
        run = inside(scripts[other], f"--resume {gone_on[ours].directory}", tmp_path)
        assert is_sentence(run.code) and "of another script or version" in run.code


REFUSED = {
    "--gamma 0.5": "its gamma is 0.99",
    "--hidden-sizes 8 4": "its hidden_sizes is",
    "--env-id hopper-medium-replay": "its env_id is pendulum",
    "--critic-activation relu": "its critic_activation is silu",
    "snapshot": "critics",
    "other data": "its dataset_checksum is",
    "missing": "there is no checkpoint",
    "truncated": "readable",
}


@pytest.mark.parametrize("name", ["sac", "td3"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(scripts, whole, tmp_path, name, case):
    path = tmp_path / "copy.pt"
    content = (whole.directory / "offline.pt").read_bytes()
    if case == "snapshot":
        shutil.copy(whole.directory / "snapshots" / "offline_000000006.pt", path)
    elif case != "missing":
        path.write_bytes(content[: len(content) // 2] if case == "truncated" else content)
    if case == "other data":
        other = whole.state("offline.pt") | {"dataset_checksum": 64 * "0"}
        torch.save(scripts[name].sealed(other), path)
    flag = case if case[:2] == "--" else ""
    run = inside(scripts[name], f"--checkpoint {path} --online-steps 3 {flag}", tmp_path)
    assert is_sentence(run.code) and str(path) in run.code and REFUSED[case] in run.code
    assert not (tmp_path / "runs").exists()


# === In the environment ====================================================================================


@pytest.fixture
def added(monkeypatch):
    """What is added to the online buffer of `script`: (observation, action, reward, successor, terminal)."""

    def watch(script):
        seen, add = [], script.ReplayBuffer.add

        def watched(buffer, *columns):
            if np.ndim(columns[0]) == 1:
                seen.append(columns)
            add(buffer, *columns)

        monkeypatch.setattr(script.ReplayBuffer, "add", watched)
        return seen

    return watch


def acted(script, state, transitions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions taken, the policy's mode and its u standardised by its Gaussian, (T,) each."""
    agent = script.restore(state)[0]
    observations, actions = (torch.as_tensor(np.stack([t[i] for t in transitions])) for i in (0, 1))
    with torch.no_grad():
        mean, log_std = agent.actor(observations.float())
    u = (torch.atanh(actions) - mean) / log_std.exp()
    return actions[:, 0].numpy(), torch.tanh(mean)[:, 0].numpy(), u[:, 0].numpy()


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_from_scratch_the_first_actions_are_uniform_then_the_policys(scripts, added, tmp_path, name):
    seen = added(scripts[name])
    words = TINY + "--offline-steps 0 --offline-fraction 0 --warmup-steps 300 --online-steps 340 "
    words += "--eval-every 340 --handover-eval-every 340 --online-optimizer adam --actor-lr 0 "
    words += "--exploration-noise 0" if name == "td3" else ""
    run = inside(scripts[name], words, tmp_path)
    assert run.code == 0 and "score    step" not in run.output
    rows = run.rows()
    assert [row["phase"] for row in rows] == ["offline", "online", "online"]
    again = inside(scripts[name], f"--resume {run.directory}", tmp_path)
    assert again.code == 0 and again.rows() == rows  # nothing is evaluated once more
    actions, mode, u = acted(scripts[name], run.state("final.pt"), seen)
    counts = np.histogram(actions[:300], bins=4, range=(-1, 1))[0]
    assert counts.sum() == 300 and (abs(counts - 75) < 30).all()  # standard deviation 7.5
    if name == "td3":  # a policy that no update moves
        np.testing.assert_allclose(actions[300:], mode[300:], atol=1e-6)
    else:  # u ~ N(0, 1): the mean of 40 absolute values is 0.8 +- 0.1
        assert 0.5 < abs(u[300:]).mean() < 1.1 and abs(actions[300:]).mean() < 0.4


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_from_a_checkpoint_every_action_is_the_policys(scripts, whole, checkpoint, added, tmp_path, name):
    seen = added(scripts[name])
    words = f"--checkpoint {checkpoint} --offline-steps 0 --warmup-steps 100 --online-steps 100 "
    words += "--eval-every 100 "
    words += "--exploration-noise 0.01" if name == "td3" else ""
    assert inside(scripts[name], words, tmp_path).code == 0
    actions, mode, u = acted(scripts[name], whole.state("offline.pt"), seen)
    assert len(seen) == 100
    if name == "td3":  # 0.01 N(0, 1): the mean of 100 absolute values is 0.008 +- 0.0006
        assert 0.005 < abs(actions - mode).mean() < 0.011
    else:
        assert 0.6 < abs(u).mean() < 1.0


class Dots(gym.Env):
    """Seven steps, ended by truncation and termination in turn; a frame shows the time and the action."""

    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, fps=50, display=True, render_mode=None):
        self.metadata = Dots.metadata | {"render_fps": fps}
        self.render_mode, self.display, self.episodes = render_mode, display, 0

    def observation(self):
        return np.float32([self.seed, self.t, self.episodes % 2])

    def reset(self, *, seed=None, options=None):
        self.seed, self.t, self.row = seed / 1000, 0, 8
        self.episodes += 1
        return self.observation(), {}

    def step(self, action):
        self.t, self.row = self.t + 1, 8 + round(7 * float(action[0]))
        over, odd = self.t == 7, self.episodes % 2 == 1
        return self.observation(), float(self.t), over and not odd, over and odd, {}

    def render(self):
        if not self.display:
            raise RuntimeError("no display")
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[self.row, self.t] = 255
        return frame


@pytest.fixture
def dots(td3, monkeypatch):
    """Dots takes the place of the pendulum, with its recording: `dots(fps=...)`."""
    gym.register("Dots-v0", entry_point=Dots, disable_env_checker=True)

    def put(**kwargs):
        task = ("smac/pendulum/medium-replay-v0", "Dots-v0", kwargs)
        monkeypatch.setitem(td3.TASKS, "pendulum-medium-replay", task)

    yield put
    gym.registry.pop("Dots-v0")


SCRATCH = TINY + "--offline-steps 0 --online-steps 16 --eval-every 16 --handover-eval-every 16 "


def test_a_truncation_is_no_termination_and_its_successor_is_real(td3, dots, added, tmp_path):
    dots()
    seen = added(td3)
    assert inside(td3, SCRATCH, tmp_path).code == 0
    assert [bool(t[4]) for t in seen] == 7 * [False] + 6 * [False] + [True] + 2 * [False]
    assert [int(t[0][1]) for t in seen] == [*range(7), *range(7), 0, 1]
    assert [int(t[3][1]) for t in seen] == [*range(1, 8), *range(1, 8), 1, 2]


# === Episodes as GIFs ======================================================================================


def frames(path) -> tuple[list[tuple[int, int]], set[int]]:
    """(time, row) of each frame of a GIF of Dots, and how long they are shown (ms)."""
    places, durations = [], set()
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            ((row, t),) = np.argwhere(np.asarray(image.convert("L")) > 128)
            places.append((int(t), int(row)))
            durations.add(image.info["duration"])
    return places, durations


def filmed(td3, state) -> list[tuple[int, int]]:
    """(time, row) of every frame of the deterministic policy's episode from seed 1000."""
    actor, env, done = td3.restore(state)[0].actor, Dots(), False
    observation, places = env.reset(seed=1000)[0], [(0, 8)]
    while not done:
        with torch.no_grad():
            action = actor.mode(torch.as_tensor(observation)[None])[0].numpy()
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        places.append((env.t, env.row))
    return places


# 50 frames a second: every second one, 40 ms each; 20: all of them, 50 ms
@pytest.mark.parametrize("fps, every, duration", [(50, 2, 40), (20, 1, 50)])
def test_the_gif_is_an_episode_of_the_policy(td3, dots, tmp_path, fps, every, duration):
    dots(fps=fps)
    run = inside(td3, SCRATCH + "--video", tmp_path, report=True)
    assert run.code == 0 and re.search(r"^video +runs/\S+/episode.gif$", run.output, re.MULTILINE)
    places = filmed(td3, run.state("final.pt"))
    assert len(places) == 8 and len({row for _, row in places}) > 1
    assert frames(run.directory / "episode.gif") == (places[::every], {duration})
    files = {path.name for path in run.directory.iterdir()}
    only = inside(td3, f"--checkpoint {run.directory / 'final.pt'} --video-only", tmp_path)  # fps comes along
    assert only.code == 0 and only.output.strip() == f"video: {run.directory / 'final.gif'}"
    assert frames(run.directory / "final.gif") == (places[::every], {duration})
    assert {path.name for path in run.directory.iterdir()} == files | {"final.gif"}
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_where_nothing_can_be_rendered_the_run_still_ends_well(td3, dots, tmp_path):
    dots(display=False)
    run = inside(td3, SCRATCH + "--video", tmp_path, report=True)
    table = run.output.rsplit("\n\n", 1)[-1]
    assert run.code == 0 and re.search(r"^video +.*can't be rendered.*no display", table, re.MULTILINE)
    assert (run.directory / "final.pt").exists() and not (run.directory / "episode.gif").exists()
    only = inside(td3, f"--checkpoint {run.directory / 'final.pt'} --video-only", tmp_path)
    assert is_sentence(only.code) and "can't be rendered" in only.code
    assert not [*run.directory.glob("*.gif")]


def test_a_snapshot_can_be_filmed(td3, dots, tmp_path):
    dots()
    run = inside(td3, SCRATCH + "--snapshot-every 16", tmp_path)
    path = run.directory / "snapshots" / "online_000000016.pt"
    assert inside(td3, f"--checkpoint {path} --video-only", tmp_path).code == 0
    assert frames(path.with_suffix(".gif"))[0] == filmed(td3, run.state("final.pt"))[::2]


def test_video_only_needs_a_checkpoint(td3, tmp_path):
    run = inside(td3, TINY + "--video-only", tmp_path)
    assert is_sentence(run.code) and "--checkpoint" in run.code and not (tmp_path / "runs").exists()


# === Stopped and gone on with ==============================================================================


@pytest.mark.parametrize("pretrained", [True, False], ids=["own pre-training", "a checkpoint since deleted"])
def test_a_resumed_run_ends_as_if_never_stopped(td3, checkpoint, monkeypatch, tmp_path, pretrained):
    """Stopped behind an odd number of updates (9), when actor and targets are due at the next."""
    copied = shutil.copy(checkpoint, tmp_path)
    words = TINY if pretrained else f"--checkpoint {copied} --online-steps 24 "
    words += "--eval-every 13 --handover-eval-every 13 --policy-noise 0.3"
    never = inside(td3, words, tmp_path / "never")
    with monkeypatch.context() as patch:
        signal_at(td3, patch, "online", 13)
        run = inside(td3, words, tmp_path / "stopped")
    assert run.code == 130 and not (run.directory / "final.pt").exists()
    (tmp_path / "offline.pt").unlink()
    assert int(run.rows()[-1]["updates"]) == 9
    run = inside(td3, f"--resume {run.directory}", tmp_path / "stopped")
    assert run.code == 0, run.code
    assert run.rows() == never.rows()
    assert_same_end(run, never)
    assert run.state("final.pt")["algorithm"] == "SMAC"
    assert not torch.equal(  # a resumed target is a target, not a copy of the actor
        run.state("final.pt")["extras"]["target_actor"]["net.biases.2"],
        run.state("final.pt")["agent"]["actor.net.biases.2"],
    )


# === The commands of the docstrings ========================================================================


def commands(script) -> list[tuple[str, str]]:
    """(script, flags) of every command in a script's docstring."""
    return re.findall(r"python (\w+)\.py (.*)", script.__doc__.replace("\\\n", " "))


def command(script, *words) -> str:
    """The flags of the last command that has all these words."""
    return [flags for _, flags in commands(script) if all(word in flags for word in words)][-1]


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_every_command_of_the_docstring_can_be_given(scripts, checkpoint, name):
    found = commands(scripts[name])
    assert len(found) >= 4
    for stem, flags in found:
        script = {module.__name__: module for module in scripts.values()}[stem]
        flags = re.sub(r"--checkpoint \S+", f"--checkpoint {checkpoint}", flags)
        with called(script, flags):
            script.parse_args()


SMALLER = "--warmup-steps 9 --online-steps 12 --eval-episodes 2 --seed 3"


def test_the_command_of_rlpd_is_rlpd(scripts, sampled, tmp_path):
    seen = sampled(scripts["sac"])
    small = "--env-id pendulum-medium-replay --hidden-sizes 8 8 --batch-size 8"
    run = inside(
        scripts["sac"], f"{command(scripts['sac'], '--utd-ratio 20')} {small} {SMALLER}", tmp_path, True
    )
    assert run.code == 0 and "score    step" not in run.output, run.code
    assert seen == [part for step in (10, 11, 12) for part in 20 * [(RECORDED, RECORDED, 4), (12, step, 4)]]
    state = run.state("final.pt")
    agent = scripts["sac"].restore(state)[0]
    assert (agent.critic.net.n, agent.target_critics, agent.target_entropy) == (10, 2, -0.5)
    assert len(agent.critic.net.gains) == 2 and agent.critic.net.activation is torch.relu_
    assert len(state["optimizers"]) == 1 and state["algorithm"] == "from scratch"
    assert int(run.rows()[-1]["updates"]) == 60


def test_the_commands_of_wsrl_are_wsrl(scripts, sampled, tmp_path):
    first, second = (command(scripts["sac"], words) for words in ("--online-steps 0", "--utd-ratio 4"))
    small = "--env-id pendulum-medium-replay --hidden-sizes 8 8 --batch-size 8 --score-hidden-sizes 8 8 "
    small += "--score-steps 5 --offline-steps 6 --eval-episodes 2 --seed 3"
    offline = inside(scripts["smac"], f"{first} {small}", tmp_path / "offline")
    assert offline.code == 0, offline.code
    seen = sampled(scripts["sac"])
    second = second.replace("runs/NAME/offline.pt", str(offline.directory / "offline.pt"))
    run = inside(scripts["sac"], f"{second} {SMALLER}", tmp_path / "online", report=True)
    assert run.code == 0, run.code
    assert seen == [part for step in (10, 11, 12) for part in 4 * [(RECORDED, RECORDED, 0), (12, step, 8)]]
    state = run.state("final.pt")
    agent = scripts["sac"].restore(state)[0]
    assert (agent.critic.net.n, agent.target_critics, len(agent.critic.net.gains)) == (10, 2, 2)
    (adam,) = state["optimizers"]
    assert [group["lr"] for group in adam["param_groups"]] == [1e-4, 3e-4]
    assert [row["phase"] for row in run.rows()].count("offline") == 2


def test_the_diff_of_the_two_scripts_is_short():
    pair = [ROOT / "sac_finetune.py", ROOT / "td3_finetune.py"]
    lines = subprocess.run(["diff", *pair], capture_output=True, text=True).stdout.splitlines()
    assert 0 < sum(line[:1] in "<>" for line in lines) <= 240


SHIPPED = sorted((ROOT / "results" / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_checkpoint_scores_what_it_says(scripts, path):
    """The first two episodes of its own last evaluation; Hopper is chaotic, and CPUs round differently."""
    script = scripts["sac"]
    state = script.load_checkpoint(path)
    agent, _ = script.restore(state)
    envs = [script.make_env(state["env"], **state["env_kwargs"]) for _ in range(2)]
    rewards = script.evaluate(agent.actor, envs, "cpu")
    expected = [state["rows"][-1][f"return_{i}"] for i in range(2)]
    assert [float(episode.sum()) for episode in rewards] == pytest.approx(expected, rel=0.2)


def test_checkpoints_are_shipped_for_both_tasks_and_both_ends():
    tasks = ("hopper-medium-replay", "pendulum-medium-replay")
    assert {path.stem for path in SHIPPED} == {
        f"{t}_smac_{end}" for t in tasks for end in ("offline", "final")
    }
