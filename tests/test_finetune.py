"""SAC and TD3 online: TD3's equations, starts from a checkpoint and from scratch, settings, kills."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, inside, load
from torch import nn

SAME = "--hidden-sizes 8 8 --batch-size 8 --eval-episodes 2 --online-steps 24 --eval-every 12 --seed 3 "
SMAC = SAME + "--env-id pendulum-medium-replay --score-hidden-sizes 8 8 --score-steps 5 --offline-steps 6 "
sac, td3 = (load(f"{name}_finetune", ROOT / f"{name}_finetune.py") for name in ("sac", "td3"))
BOTH = pytest.mark.parametrize("script", [sac, td3], ids=["sac", "td3"])


@pytest.fixture(scope="session")
def whole(smac, tmp_path_factory):
    """SMAC, then SAC, in one run."""
    return inside(smac, SMAC, tmp_path_factory.mktemp("whole"))


def assert_same_end(one, other):
    """The same numbers to the last bit; `other` may have trained more networks."""
    assert one.code == other.code == 0 and one.rows() == other.rows()
    theirs = other.agent()
    assert not [name for name, tensor in one.agent().items() if not torch.equal(tensor, theirs[name])]


# === TD3's equations =======================================================================================


class Lines(nn.Module):
    """Critics Q_i(s,a) = slope_i a + offset_i."""

    def __init__(self, *lines):
        super().__init__()
        self.lines = nn.Parameter(torch.tensor(lines))

    def forward(self, observations, actions):
        return self.lines[:, :1] * actions[:, 0] + self.lines[:, 1:]


def test_target_and_critic_loss_by_hand(monkeypatch):
    """mu'(s') = s'/2 = 0.7, 0.5, 0.1; noise 0.2 (5, 1, -5), clipped to 0.5: a' = 1 (not 1.2), 0.7, -0.4.

    Qbar_1 = 2a + 1 = 3, 2.4, 0.2;  Qbar_2 = 2 - a = 1, 1.3, 2.4;  minimum 1, 1.3, 0.2
    y = r + 0.9 (1 - terminal) min = 1 + 0.9, 2 (terminal), 3 + 0.18
    Q = (0.5, -0.5, 1), (4, 4, 4);  L_Q = sum (Q_i - y)^2 / 6;  dL_Q / d offset_i = sum_b (Q_i - y) / 3
    """
    column = lambda *values: torch.tensor(values)[:, None]
    halved, negated = (SimpleNamespace(mode=lambda s, gain=gain: gain * s) for gain in (0.5, -1.0))
    agent = SimpleNamespace(actor=negated, target_actor=halved)
    agent.critic, agent.target_critic = Lines((1.0, 0.0), (0.0, 4.0)), Lines((2.0, 1.0), (-1.0, 2.0))
    batch = dict(observations=column(0.0, 0.0, 0.0), actions=column(0.5, -0.5, 1.0),
                 rewards=torch.tensor([1.0, 2.0, 3.0]), next_observations=column(1.4, 1.0, 0.2),
                 terminations=torch.tensor([0.0, 1.0, 0.0]))  # fmt: skip
    monkeypatch.setattr(td3.torch, "randn_like", lambda actions: column(5.0, 1.0, -5.0))
    args = td3.Args(gamma=0.9, policy_noise=0.2, noise_clip=0.5)
    q, y = torch.tensor([[0.5, -0.5, 1.0], [4.0, 4.0, 4.0]]), torch.tensor([1.9, 2.0, 3.18])
    torch.testing.assert_close(td3.td3_target(agent, batch, args), y)
    metrics = td3.td3_critic_gradients(agent, batch, args)
    torch.testing.assert_close(metrics["critic_loss"], ((q - y) ** 2).sum() / 6)
    torch.testing.assert_close(agent.critic.lines.grad[:, 1], (q - y).sum(1) / 3)
    assert agent.target_critic.lines.grad is None


@pytest.mark.parametrize("count, chances", [(0, [1.0, 0, 0, 0, 0]), (2, [0.4, 0.3, 0.2, 0.1, 0])])
def test_target_critics_are_drawn_without_replacement(count, chances):
    """5 critics say 0 to 4: the minimum of all is 0, that of 2 is 0, 1, 2, 3 in 4, 3, 2, 1 of 10 pairs."""
    still = SimpleNamespace(mode=lambda s: s)
    agent = SimpleNamespace(target_actor=still, target_critic=Lines(*[(0.0, float(i)) for i in range(5)]))
    zero = dict(rewards=torch.zeros(3), terminations=torch.zeros(3), next_observations=torch.zeros(3, 1))
    args = td3.Args(gamma=1.0, target_critics=count)
    torch.manual_seed(0)
    drawn = torch.stack([td3.td3_target(agent, zero, args) for _ in range(1_000)])  # (draws, B)
    assert (drawn == drawn[:, :1]).all()  # the same critics for the whole batch
    shares = torch.bincount(drawn[:, 0].long(), minlength=5) / 1_000
    torch.testing.assert_close(shares, torch.tensor(chances), atol=0.06, rtol=0)  # standard deviation 0.015


def test_td3_bc_by_hand():
    """Q_1 = 1, -3: mean -1, mean |Q_1| 2, lambda = 2.5 / 2 = 1.25; (mu - a)^2 = 0.25, 0.25, 0.25, 1."""
    q = torch.tensor([[1.0, -3.0], [-9.0, -9.0]], requires_grad=True)  # Q_2 would win any minimum
    actions = torch.tensor([[0.5, -0.5], [1.0, 0.0]], requires_grad=True)
    loss = td3.td3_actor_loss(q, actions, torch.tensor([[0.0, 0.0], [0.5, 1.0]]), 2.5)
    loss.backward()
    assert loss.item() == 1.25 + 1.75 / 4
    assert q.grad.tolist() == [[-0.625, -0.625], [0, 0]]  # -lambda / 2, lambda a constant
    assert actions.grad.tolist() == [[0.25, -0.25], [0.25, -0.5]]  # 2 (mu - a) / 4


@pytest.mark.parametrize("bc_alpha", [0.0, 2.5])
def test_the_actors_gradient_reaches_nothing_else(bc_alpha):
    args = td3.Args(hidden_sizes=(8, 8), bc_alpha=bc_alpha)
    agent, s, a = td3.Agent(3, 2, args), torch.randn(16, 3), torch.rand(16, 2)
    td3.td3_actor_gradients(agent, dict(observations=s, actions=a), args)
    mu = torch.tanh(agent.actor.net(s)[0, :, :2])
    q = agent.critic(s, mu)[0]
    plain = -q.mean() if bc_alpha == 0 else (mu - a).square().mean() - 2.5 * q.mean() / q.abs().mean().item()
    expected = torch.autograd.grad(plain, list(agent.actor.parameters()))
    torch.testing.assert_close([p.grad for p in agent.actor.parameters()], list(expected))
    others = [*agent.critic.parameters(), *agent.target_critic.parameters(), agent.log_alpha]
    assert expected[0].abs().sum() > 0 and all(p.grad is None for p in others)


@pytest.mark.parametrize("delay, utd", [(2, 1), (2, 2), (3, 2)])
def test_actor_and_targets_move_at_every_nth_critic_update(whole, monkeypatch, tmp_path, delay, utd):
    seen, gradients = [], td3.td3_critic_gradients

    def watched(agent, *rest):
        flat = lambda name: nn.utils.parameters_to_vector(agent.get_submodule(name).parameters())
        names = ("actor", "critic", "target_actor", "target_critic")
        seen.append({name: flat(name).detach().clone() for name in names})
        return gradients(agent, *rest)

    monkeypatch.setattr(td3, "td3_critic_gradients", watched)
    words = f"--checkpoint {whole.directory}/offline.pt --online-steps 11 --batch-size 8 --eval-episodes 1 "
    words += f"--policy-delay {delay} --utd-ratio {utd} --tau 0.25"
    assert inside(td3, words, tmp_path).code == 0
    assert len(seen) == utd * 7  # half of a batch of 8 comes from the environment: the first 4 steps wait
    assert torch.equal(seen[0]["target_actor"], seen[0]["actor"])
    for n, (before, after) in enumerate(pairwise(seen), start=1):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({*before} if n % delay == 0 else {"critic"}), n
        for name in ("critic", "actor") if n % delay == 0 else ():
            target = before[f"target_{name}"].lerp(after[name], 0.25)
            torch.testing.assert_close(after[f"target_{name}"], target)


# === From a checkpoint =====================================================================================


def test_sac_from_the_checkpoint_is_smacs_own_online_phase(whole, tmp_path):
    assert_same_end(inside(sac, f"{SAME} --checkpoint {whole.directory}/offline.pt", tmp_path), whole)


def test_td3_starts_where_the_offline_phase_ended(whole, tmp_path):
    run = inside(td3, f"{SAME} --checkpoint {whole.directory}/offline.pt", tmp_path)
    assert run.code == 0 and (run.directory / "learning_curve.png").exists()
    assert run.rows()[:3] == whole.rows()[:3] and run.rows() != whole.rows()  # offline 0 and 6, online 0
    assert run.agent()["log_alpha"] == whole.agent("offline.pt")["log_alpha"] != whole.agent()["log_alpha"]


@BOTH
def test_from_a_final_checkpoint_come_networks_and_temperature(whole, monkeypatch, tmp_path, script):
    given, train_online = [], script.train_online
    watched = lambda run, agent: given.append(copy.deepcopy(agent)) or train_online(run, agent)
    monkeypatch.setattr(script, "train_online", watched)
    words = f"--checkpoint {whole.directory}/final.pt --online-steps 5 --eval-episodes 3"
    run = inside(script, words, tmp_path)
    assert run.code == 0 and [row["phase"] for row in run.rows()] == ["online", "online"]
    assert run.rows()[0]["return_1"] == whole.rows()[-1]["return_1"]
    theirs = whole.agent()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in given[0].state_dict().items())


@BOTH
def test_flag_then_checkpoint_then_task_then_default(tmp_path, script):
    """Networks, gamma and the task are the checkpoint's, nothing else; a flag wins over all."""
    path = str(tmp_path / "a.pt")
    saved = dict(env_id="pendulum-medium-replay", gamma=0.9, hidden_sizes=(8, 8), num_critics=3,
                 critic_activation="relu", critic_layer_norm=True)  # fmt: skip
    rest = dict(seed=7, tau=0.5, batch_size=9, online_steps=5, muon_lr=1.0, target_critics=1, kappa=1.0)
    torch.save({"args": saved | rest}, path)
    with command_line(script, f"--checkpoint {path}"):
        assert script.parse_args() == script.Args(**script.TINY | saved, checkpoint=path)
    with command_line(script, f"--checkpoint {path} --gamma 0.5 --hidden-sizes 4 --batch-size 3"):
        saved |= dict(gamma=0.5, hidden_sizes=(4,), batch_size=3)
        assert script.parse_args() == script.Args(**script.TINY | saved, checkpoint=path)


@BOTH
@pytest.mark.parametrize("case", ["--hidden-sizes 8 4", "--num-critics 3", "--env-id hopper-medium-replay",
                                  "no critics", "damaged", "missing"])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_sentence(whole, tmp_path, script, case):
    path, state = tmp_path / "copy.pt", whole.state("offline.pt")
    if case == "no critics":
        agent = state["parts"]["agent"]
        state["parts"]["agent"] = {key: agent[key] for key in agent if not key.startswith("critic")}
    if case != "missing":
        torch.save(state, path)
    if case == "damaged":
        path.write_bytes(path.read_bytes()[:2_000])
    run = inside(script, f"--checkpoint {path} {case * case.startswith('--')}", tmp_path)
    assert isinstance(run.code, str) and run.code.startswith(f"error: {path} ") and "\n" not in run.code


# === In the environment ====================================================================================


class Dots:
    """Episodes of 20 steps, ended by truncation and termination in turn; observed are seed and time."""

    episodes = 0

    def reset(self, *, seed):
        self.seed, self.t, self.episodes = seed % 997 / 997, 0, self.episodes + 1
        return np.float32([self.seed, 0, 0]), {}

    def step(self, action):
        self.t += 1
        over, odd = self.t == 20, self.episodes % 2 == 1
        return np.float32([self.seed, self.t / 20, 0]), float(action[0]), over and not odd, over and odd, {}


def play(script, words, folder) -> tuple[dict, dict, list]:
    """A run in Dots: its agent, what it put into the online buffer (T, ...), and what it sampled."""
    added, sampled, kind = [], [], script.ReplayBuffer
    add, sample_rows = kind.add, kind.sample_rows
    kept = lambda buffer, **columns: added.append(columns) or add(buffer, **columns)
    drawn = lambda buffer, n: sampled.append((int(buffer.size), n)) or sample_rows(buffer, n)
    words += " --env-id pendulum-medium-replay --hidden-sizes 8 8 --batch-size 8 --eval-episodes 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "add", kept)
        patch.setattr(kind, "sample_rows", drawn)
        patch.setattr(script, "make_env", lambda data, eval_env=False: Dots())
        run = inside(script, words, folder)
    assert run.code == 0, run.code
    return run.agent(), {key: np.stack([row[key] for row in added[1:]]) for key in added[0]}, sampled


@BOTH
@pytest.mark.parametrize("flags, utd, old, waits", [
    ("--offline-fraction 0.3", 1, 2, 6),  # round(2.4) of 8 rows; the other 6 have to be there
    ("--offline-fraction 0.7 --warmup-steps 9", 3, 6, 9),  # round(5.6); 2 rows are there long before
    ("--offline-fraction 0 --num-critics 10 --target-critics 2 --critic-layer-norm", 20, 0, 8),
])  # fmt: skip
def test_every_batch_has_its_offline_share(tmp_path, script, flags, utd, old, waits):
    _, _, sampled = play(script, f"{flags} --utd-ratio {utd} --online-steps 13", tmp_path)
    assert sampled == [s for n in range(waits + 1, 14) for s in utd * [(15_200, old), (n, 8 - old)]]


@BOTH
def test_what_is_stored_of_an_episode(monkeypatch, tmp_path, script):
    """A truncation is no termination, a last successor is the real one, rewards are the losses' own."""
    monkeypatch.setattr(script.Dataset, "reward", lambda data, raw: 2 * raw + 1)
    _, online, _ = play(script, "--online-steps 50 --seed 5", tmp_path)
    assert np.flatnonzero(online["terminations"]).tolist() == [39]
    for key, first in {"observations": 0, "next_observations": 1}.items():
        assert (20 * online[key][:, 1]).round().tolist() == [t % 20 + first for t in range(50)]
    np.testing.assert_allclose(online["rewards"], 2 * online["actions"][:, 0] + 1, rtol=1e-6)
    seeds = [script.stream_seed(5, "online", episode) % 997 / 997 for episode in range(3)]
    np.testing.assert_allclose(online["observations"][::20, 0], seeds, rtol=1e-6)


def acted(script, agent, online) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions taken, the mode of `agent` there, and u standardised by its Gaussian, (T,) each."""
    actor = script.Actor(3, 1, (8, 8))
    actor.load_state_dict({key[6:]: tensor for key, tensor in agent.items() if key[:6] == "actor."})
    with torch.no_grad():
        mean, log_std = actor(torch.as_tensor(online["observations"]))
    u = (torch.atanh(torch.as_tensor(online["actions"])) - mean) / log_std.exp()
    return online["actions"][:, 0], torch.tanh(mean)[:, 0].numpy(), u[:, 0].numpy()


@BOTH
def test_from_scratch_the_first_actions_are_uniform_then_the_policys(tmp_path, script):
    words = "--warmup-steps 300 --online-steps 340 --online-optimizer adam --actor-lr 0 "
    agent, online, _ = play(script, words + "--exploration-noise 0" * (script is td3), tmp_path)
    actions, mode, u = acted(script, agent, online)
    counts = np.histogram(actions[:300], bins=4, range=(-1, 1))[0]
    assert counts.sum() == 300 and (abs(counts - 75) < 30).all()  # standard deviation 7.5
    if script is td3:
        np.testing.assert_allclose(actions[300:], mode[300:], atol=1e-6)
    else:  # u ~ N(0, 1): the mean of 40 absolute values is 0.8 +- 0.1
        assert 0.5 < abs(u[300:]).mean() < 1.1


@pytest.mark.parametrize("script, noise", [(sac, 0), (td3, 0.01), (td3, 5)])
def test_from_a_checkpoint_the_warmup_is_acted_by_the_policy(tmp_path, whole, script, noise):
    words = f"--checkpoint {whole.directory}/offline.pt --online-steps 200 --warmup-steps 200"
    agent, online, _ = play(script, words + f" --exploration-noise {noise}" * (script is td3), tmp_path)
    actions, mode, u = acted(script, agent, online)
    if script is sac:
        assert 0.7 < abs(u).mean() < 0.9  # 0.8 +- 0.04
    elif noise == 0.01:  # +- 0.0005
        assert 0.008 < (actions - mode).std() < 0.012
    else:  # clipped: P(|mode + 5 e| > 1) is about 0.84
        assert abs(actions).max() == 1 and (abs(actions) == 1).mean() > 0.7


# === Killed and gone on with ===============================================================================

KILLED = """
import os, signal, sys
from conftest import ROOT, load
script, replace = load("killed", ROOT / sys.argv.pop(1)), os.replace
def killed(temporary, path):
    if path.exists():  # the second last.pt: half of it is written, and not yet in its place
        os.truncate(temporary, temporary.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)
os.replace = killed
script.main()
"""


@BOTH
def test_killed_and_resumed_is_as_never_stopped(script, whole, tmp_path):
    """Killed at step 400 and gone on with from 200, where TD3's actor and targets wait for their turn."""
    copied = shutil.copy(whole.directory / "offline.pt", tmp_path)
    words = f"--checkpoint {copied} --batch-size 8 --online-steps 430 --eval-every 90 --eval-episodes 2 "
    words += "--checkpoint-every 0" + " --policy-delay 3" * (script is td3)
    never = inside(script, words, tmp_path / "never")
    command = [sys.executable, "-c", KILLED, script.__file__, *words.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (path,) = tmp_path.glob("runs/*/last.pt")
    assert torch.load(path, weights_only=True)["step"] == 200
    os.remove(copied)  # last.pt is enough
    assert_same_end(inside(script, f"--resume {path.parent}", tmp_path), never)
