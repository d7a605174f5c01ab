"""Record a replay dataset in Minari's format: every transition a SAC agent sees until it is "medium" good.

SAC (Haarnoja et al. 2018) learns a Gymnasium environment from scratch. Every transition it collects is kept,
from the first random action to the first evaluation (20 fixed-seed episodes, deterministic policy) whose
normalised score, 100 (R - R_random) / (R_expert - R_random), lies in [33, 60]. That is what "medium-replay"
means on this shelf.

The two recordings that ship in `datasets/` were made by exactly these commands (CPU, one thread):

    OMP_NUM_THREADS=1 python make_dataset.py record --env-id Hopper-v5 \
        --dataset-id smac/hopper/medium-replay-v0 --min-steps 100000 --max-steps 150000 --seed 1
    OMP_NUM_THREADS=1 python make_dataset.py record --env-id Pendulum-v1 \
        --dataset-id smac/pendulum/medium-replay-v0 --max-steps 30000 --hidden-sizes 64 64 --batch-size 64 \
        --actor-lr 3e-5 --critic-lr 1e-4 --random-steps 2000 --eval-every 200 --seed 1

Actions of environments whose bounds are not [-1, 1] are rescaled at the boundary (Gymnasium's RescaleAction):
the recording and everything trained on it live in [-1, 1]. Observations are stored as float32.
"""

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# === Arguments =============================================================================================


@dataclass
class RecordArgs:
    """Train SAC on a Gymnasium environment and record its replay as a Minari dataset."""

    env_id: str
    """Gymnasium environment to record, e.g. Hopper-v5"""
    dataset_id: str
    """Minari id of the result, e.g. smac/hopper/medium-replay-v0"""
    out: Path = Path(__file__).resolve().parent / "datasets"
    """folder that receives the dataset (a Minari root)"""
    seed: int = 1
    """seed of networks, exploration, sampling and environment"""
    device: str = "cpu"
    """cpu or cuda"""

    min_score: float = 33.0
    """stop at the first evaluation with at least this normalised score ..."""
    max_score: float = 60.0
    """... and at most this one"""
    ref_min_score: float | None = None
    """return of a random policy (score 0); default: the table REFERENCE_SCORES"""
    ref_max_score: float | None = None
    """return of an expert policy (score 100); default: the table REFERENCE_SCORES"""
    min_steps: int = 0
    """evaluations before this many environment steps do not stop the recording"""
    max_steps: int = 150_000
    """stop here at the latest, whatever the score"""
    eval_every: int = 5_000
    """environment steps between evaluations; each waits for the end of the running episode"""
    eval_episodes: int = 20
    """episodes of an evaluation, with fixed seeds"""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of actor and critics"""
    batch_size: int = 256
    """transitions of a gradient update"""
    actor_lr: float = 3e-4  # rlkit's and RLPD's value
    """Adam learning rate of the actor and the temperature"""
    critic_lr: float = 3e-4  # rlkit's and RLPD's value
    """Adam learning rate of the critics"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """step of the target critics towards the critics"""
    random_steps: int = 5_000  # CleanRL's learning_starts
    """environment steps with uniformly random actions before the first update"""


# === Tasks and data ========================================================================================

# Return of a random policy, return of an expert: what the normalised scores 0 and 100 stand for.
REFERENCE_SCORES = {
    "Hopper-v5": (-20.272305, 3234.3),  # D4RL (d4rl/infos.py)
    "Pendulum-v1": (-1230.0, -150.0),  # random: mean of 1,000 episodes; expert: SAC after 30,000 steps
}


def fail(message: str):
    """End the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {message}")


def stream_seed(seed: int, phase: str, index: int = 0) -> int:
    """Seed of a random stream, from (seed, phase, index) alone: a phase is the same in every script."""
    digest = hashlib.sha256(f"{seed}/{phase}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31


def transition_widths(obs_dim: int, act_dim: int) -> dict[str, int]:
    """Columns of a transition and their sizes, 0 for a scalar."""
    sizes = (obs_dim, act_dim, 0, obs_dim, 0)
    return dict(zip(("observations", "actions", "rewards", "next_observations", "terminations"), sizes))


def dataset_checksum(folder: Path) -> str:
    """SHA-256 over the data files of a Minari dataset (all but metadata.json; often only main_data.hdf5)."""
    digest = hashlib.sha256()
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file() and path.name != "metadata.json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


class ReplayBuffer:
    """Transitions as rows of one float32 matrix, so that one gather fetches a batch; widths as above."""

    def __init__(self, widths: dict[str, int], capacity: int, device: torch.device | str = "cpu"):
        self.widths, self.size = widths, 0
        self.rows = torch.zeros(capacity, sum(max(width, 1) for width in widths.values()), device=device)
        self.filled = torch.zeros((), dtype=torch.float64, device=device)  # `size`, for CUDA graphs

    def add(self, *columns) -> None:
        """Append a transition, or T of them as arrays (T, ...), columns in the order of `widths`."""
        parts = [torch.as_tensor(column, dtype=torch.float32) for column in columns]
        rows = torch.cat([p.reshape(-1, max(w, 1)) for p, w in zip(parts, self.widths.values())], dim=1)
        if self.size + len(rows) > len(self.rows):
            raise IndexError(f"the buffer holds {len(self.rows)} transitions and is full")
        self.rows[self.size : self.size + len(rows)] = rows
        self.size += len(rows)
        self.filled.fill_(self.size)

    def sample_rows(self, count: int) -> Tensor:
        """`count` rows drawn uniformly with replacement, (count, columns)."""
        if self.filled.is_cuda:  # no Python number: a captured update has to see the buffer grow
            uniform = torch.rand(count, dtype=torch.float64, device="cuda")
            return self.rows[(uniform * self.filled).long()]
        return self.rows[torch.randint(self.size, (count,))]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (B, columns) as named tensors: (B, width), or (B,) for a scalar."""
        parts = rows.split([max(width, 1) for width in self.widths.values()], dim=1)
        return {n: p if w else p.squeeze(1) for (n, w), p in zip(self.widths.items(), parts)}


# === Networks ==============================================================================================

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # CleanRL, sac_continuous_action.py


class MLP(nn.Module):
    """N independent multilayer perceptrons, evaluated together by one batched product a layer.

    Input (B, I), the same for all, or (N, B, I); output (N, B, O); weights (N, fan_in, fan_out), drawn as by
    nn.Linear. `mean` and `std` normalise the inputs by the dataset's observation statistics (0 and 1 for what
    is no observation): part of the network, so that a saved policy can't lose them.
    """

    def __init__(self, n: int, sizes: list[int], activation: str = "relu", layer_norm: bool = False):
        super().__init__()
        self.n, self.activation = n, {"relu": torch.relu_, "silu": F.silu}[activation]
        draw = lambda fan_in, *shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.weights = nn.ParameterList([draw(i, n, i, o) for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([draw(i, n, 1, o) for i, o in pairwise(sizes)])
        normed = sizes[1:-1] if layer_norm else []  # LayerNorm stands before the activation
        self.gains = nn.ParameterList([torch.ones(n, 1, o) for o in normed])
        self.shifts = nn.ParameterList([torch.zeros(n, 1, o) for o in normed])
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("std", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).expand(self.n, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights[:-1], self.biases[:-1])):
            x = torch.baddbmm(bias, x, weight)  # (N, B, H)
            if self.gains:
                x = F.layer_norm(x, x.shape[-1:]) * self.gains[i] + self.shifts[i]
            x = self.activation(x)
        if self.weights[-1].shape[-1] == 1:  # a scalar is a dot product, for which a matrix product is slow
            return (x * self.weights[-1].mT).sum(-1, keepdim=True) + self.biases[-1]
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])


def squashed_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density of a = tanh(u), u ~ N(mean, std^2), from u, never from atanh(a). (B, A) -> (B,).

    log pi(a|s) = sum_k [ log N(u_k; mean_k, std_k) - log(1 - tanh(u_k)^2) ], and the last term is
    2 (log 2 - u - softplus(-2u)), exact also where 1 - tanh(u)^2 underflows.
    """
    gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class Actor(nn.Module):
    """Squashed Gaussian policy: a = tanh(u), u ~ N(mean(s), std(s)^2); actions lie in [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = MLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """mean (B, A) and log std (B, A) of the Gaussian before the tanh."""
        mean, log_std = self.net(observations).squeeze(0).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A), differentiable, and their log-probabilities (B,)."""
        mean, log_std = self(observations)
        u = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(u), squashed_gaussian_log_prob(u, mean, log_std)

    def mode(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean), (B, A)."""
        return torch.tanh(self(observations)[0])


class Critic(nn.Module):
    """N critics Q_i(s, a) as one stacked ensemble."""

    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden_sizes, activation: str, layer_norm=False):
        super().__init__()
        self.net = MLP(n, [obs_dim + act_dim, *hidden_sizes, 1], activation, layer_norm)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """q (N, B) for observations (B, O) and actions (B, A), or (N, B, A): one action for each critic."""
        observations = observations.expand(*actions.shape[:-1], -1)
        return self.net(torch.cat([observations, actions], dim=-1)).squeeze(-1)


class Agent(nn.Module):
    """What is handed from offline to online: actor, critics, target critics and the temperature alpha."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes, num_critics=2, critic_activation="relu",
                 critic_layer_norm=False, target_critics=0, target_entropy=-1.0):  # fmt: skip
        super().__init__()
        critic = (num_critics, obs_dim, act_dim, hidden_sizes, critic_activation, critic_layer_norm)
        self.actor = Actor(obs_dim, act_dim, hidden_sizes)
        self.critic, self.target_critic = Critic(*critic), Critic(*critic).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = target_entropy * act_dim
        self.target_critics = target_critics or num_critics


# === Losses ================================================================================================


def td_target(rewards, terminations, next_q, next_log_prob, alpha, gamma: float) -> Tensor:
    """y = r + gamma (1 - terminal) (min_j Qbar_j(s', a') - alpha log pi(a'|s')). A truncation bootstraps.

    next_q (N, B), all others (B,) -> (B,).
    """
    return rewards + gamma * (1 - terminations) * (next_q.amin(dim=0) - alpha * next_log_prob)


def drawn(next_q: Tensor, count: int) -> Tensor:
    """`count` of the N critics' values, (count, B), drawn without replacement (REDQ); next_q (N, B)."""
    if count == len(next_q):
        return next_q
    return next_q[torch.rand(len(next_q), device=next_q.device).topk(count).indices]


def td_loss(q: Tensor, y: Tensor) -> Tensor:
    """L_AC = mean_i E[(Q_i(s, a) - y)^2], q (N, B), y (B,)."""
    return ((q - y) ** 2).mean()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """L_pi = E[alpha log pi(a|s) - Q(s, a)], Q the minimum of 2 critics, the mean of more; q (N, B)."""
    return (alpha * log_prob - (q.mean(dim=0) if len(q) > 2 else q.amin(dim=0))).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """L_alpha = -alpha E[log pi(a|s) + target entropy]: alpha rises while the entropy is below its target."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


# === Update steps ==========================================================================================


def bellman_target(agent: Agent, batch: dict[str, Tensor], gamma: float) -> Tensor:
    """The soft Bellman target (B,) of a batch, with a' ~ pi(.|s') and the target critics."""
    with torch.no_grad():
        next_actions, next_log_prob = agent.actor.sample(batch["next_observations"])
        next_q = agent.target_critic(batch["next_observations"], next_actions)
        next_q, alpha = drawn(next_q, agent.target_critics), agent.log_alpha.exp()
        return td_target(batch["rewards"], batch["terminations"], next_q, next_log_prob, alpha, gamma)


def critic_gradients(agent: Agent, batch: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """Puts the gradient of the soft Bellman error, SAC's critic loss, into the critics' `.grad`."""
    q = agent.critic(batch["observations"], batch["actions"])
    loss = td_loss(q, bellman_target(agent, batch, gamma))
    loss.backward(inputs=list(agent.critic.parameters()))
    return {"critic_loss": loss.detach(), "q": q.detach().mean()}


def actor_gradients(agent: Agent, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the gradients of L_pi and L_alpha into `.grad`: one sample of actions serves both."""
    actions, log_prob = agent.actor.sample(batch["observations"])
    alpha = agent.log_alpha.exp()
    loss_pi = actor_loss(agent.critic(batch["observations"], actions), log_prob, alpha.detach())
    loss_alpha = temperature_loss(agent.log_alpha, log_prob, agent.target_entropy)
    (loss_pi + loss_alpha).backward(inputs=[*agent.actor.parameters(), agent.log_alpha])
    return {"actor_loss": loss_pi.detach(), "temperature_loss": loss_alpha.detach(),
            "alpha": alpha.detach(), "entropy": -log_prob.detach().mean()}  # fmt: skip


def apply_gradients(optimizers: list[torch.optim.Optimizer]) -> None:
    """Steps every parameter that has a gradient."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Target parameters take a step towards the source's: Qbar <- Qbar + tau (Q - Qbar)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# === Evaluation, logging, checkpoints ======================================================================


@torch.no_grad()
def evaluate(actor: Actor, envs: list[gym.Env], device: torch.device | str) -> list[np.ndarray]:
    """Rewards (T,) of the deterministic policy, one episode in each of E environments.

    Episode i starts from seed 1000 + i in every script: comparisons are paired. All episodes that are still
    going share one forward pass.
    """
    observations = [env.reset(seed=1000 + i)[0] for i, env in enumerate(envs)]
    rewards, active = [[] for _ in envs], list(range(len(envs)))
    while active:
        batch = np.stack([observations[i] for i in active])
        actions = actor.mode(torch.as_tensor(batch, dtype=torch.float32, device=device)).cpu().numpy()
        if not np.isfinite(actions).all():
            fail("the policy's actions are not finite: training diverged; lower the learning rates")
        for i, action in zip(tuple(active), actions):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(reward)
            if terminated or truncated:
                active.remove(i)
    return [np.array(episode) for episode in rewards]


def code_version() -> str:
    """The git commit of this script, marked -dirty after edits; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def compress(path: Path) -> None:
    """Rewrite Minari's HDF5 file in place, contents unchanged: gzip, and HDF5's compact newer layout."""
    import h5py

    packed = path.with_suffix(".packed")
    with h5py.File(path, "r") as source, h5py.File(packed, "w", libver="latest") as target:
        for name in sorted(source, key=lambda name: int(name.split("_")[1])):
            undated = h5py.h5p.create(
                h5py.h5p.GROUP_CREATE
            )  # no time stamps: the same recording, the same bytes
            undated.set_obj_track_times(False)
            group = h5py.Group(h5py.h5g.create(target.id, name.encode(), gcpl=undated))
            group.attrs.update(source[name].attrs)
            for key, column in source[name].items():
                if column.nbytes < 2048:  # inside the object header: a chunk would cost more than the data
                    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                    layout.set_layout(h5py.h5d.COMPACT)
                    layout.set_obj_track_times(False)
                    kind = h5py.h5t.py_create(column.dtype, logical=True)
                    space = h5py.h5s.create_simple(column.shape)
                    compact = h5py.h5d.create(group.id, key.encode(), kind, space, layout)
                    compact.write(h5py.h5s.ALL, h5py.h5s.ALL, column[()])
                else:
                    chunks = dict(chunks=column.shape, compression="gzip", compression_opts=9, shuffle=True)
                    group.create_dataset(key, data=column[()], **chunks)
    os.replace(packed, path)


# === The phases ============================================================================================


def recordable_env(env_id: str) -> gym.Env:
    """The environment with actions in [-1, 1]; one sentence and exit where it can't be recorded."""
    try:
        env = gym.make(env_id)
    except gym.error.Error as error:
        fail(f"{error}")
    spaces = (env.observation_space, env.action_space)
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not flat or not env.action_space.is_bounded():
        fail(f"flat Box observations and bounded flat Box actions are needed; {env_id} has {spaces}")
    if env.spec.max_episode_steps is None:
        fail(f"{env_id} has no time limit; register it with max_episode_steps")
    if (env.action_space.low == -1).all() and (env.action_space.high == 1).all():
        return env
    return gym.wrappers.RescaleAction(env, -1.0, 1.0)


def collect(args: RecordArgs, references: tuple[float, float]) -> tuple[list[dict], list[float]]:
    """Train SAC; return its episodes (arrays by name, T + 1 observations) and the last evaluation."""
    env, eval_envs = (
        recordable_env(args.env_id),
        [recordable_env(args.env_id) for _ in range(args.eval_episodes)],
    )
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(stream_seed(args.seed, "record"))
    env.action_space.seed(stream_seed(args.seed, "record-actions"))
    agent = Agent(obs_dim, act_dim, args.hidden_sizes).to(args.device)
    slow = {"params": [*agent.actor.parameters(), agent.log_alpha], "lr": args.actor_lr}
    fast = {"params": agent.critic.parameters(), "lr": args.critic_lr}
    adam = torch.optim.Adam([slow, fast], fused=True)
    buffer = ReplayBuffer(transition_widths(obs_dim, act_dim), args.max_steps, args.device)

    episodes, evaluations, next_eval, finished = [], [], args.eval_every, False
    bar = tqdm(total=args.max_steps, desc=f"recording {args.env_id}", unit="step", dynamic_ncols=True)
    while not finished:
        seed = stream_seed(args.seed, "record", len(episodes))
        observation, _ = env.reset(seed=seed)
        steps, over = [], False
        observations = [observation]
        while not over:
            if buffer.size < args.random_steps:
                action = env.action_space.sample()
            else:
                with torch.no_grad():
                    row = torch.as_tensor(observation, dtype=torch.float32, device=args.device)[None]
                    action = agent.actor.sample(row)[0][0].cpu().numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            buffer.add(observations[-1], action, reward, observation, terminated)
            truncated = truncated or (buffer.size == args.max_steps and not terminated)
            steps.append((action, reward, terminated, truncated))
            observations.append(observation)
            over = terminated or truncated
            bar.update()
            if buffer.size > args.random_steps:
                batch = buffer.split(buffer.sample_rows(args.batch_size))
                critic_gradients(agent, batch, args.gamma)
                actor_gradients(agent, batch)
                apply_gradients([adam])
                polyak_update(agent.target_critic, agent.critic, args.tau)
        actions, rewards, terminations, truncations = map(np.array, zip(*steps))
        episode = dict(rewards=rewards, terminations=terminations, truncations=truncations)
        episode |= dict(observations=np.float32(observations), actions=np.float32(actions))
        episodes.append(episode | {"seed": seed})
        finished = buffer.size >= args.max_steps
        if buffer.size >= next_eval or finished:
            next_eval = (buffer.size // args.eval_every + 1) * args.eval_every
            returns = np.array([r.sum() for r in evaluate(agent.actor, eval_envs, args.device)])
            evaluations = 100 * (returns - references[0]) / (references[1] - references[0])
            score = evaluations.mean()
            bar.write(f"step {buffer.size:>8,}  episodes {len(episodes):>6,}  normalised score {score:6.1f}")
            bar.set_postfix_str(f"score {score:.1f}")
            finished |= buffer.size >= args.min_steps and args.min_score <= score <= args.max_score
    bar.close()
    return episodes, [float(score) for score in evaluations]


def describe(episodes: list[dict]) -> dict[str, float]:
    """What a reader wants to know of a recording: sizes, returns, and how the episodes ended."""
    returns = np.array([episode["rewards"].sum() for episode in episodes])
    return {
        "steps": sum(len(episode["rewards"]) for episode in episodes),
        "episodes": len(episodes),
        "return_mean": round(float(returns.mean()), 2),
        "return_90th_percentile": round(float(np.percentile(returns, 90)), 2),
        "return_max": round(float(returns.max()), 2),
        "terminations": sum(int(episode["terminations"][-1]) for episode in episodes),
        "truncations": sum(int(episode["truncations"][-1]) for episode in episodes),
    }


def record(args: RecordArgs) -> None:
    """Train SAC on a Gymnasium environment and record its replay as a Minari dataset."""
    import minari
    from minari.data_collector import EpisodeBuffer

    table = REFERENCE_SCORES.get(args.env_id, (None, None))
    references = tuple(t if g is None else g for g, t in zip((args.ref_min_score, args.ref_max_score), table))
    target = args.out / args.dataset_id
    if None in references:
        fail(f"no reference scores are known for {args.env_id}: give --ref-min-score and --ref-max-score")
    try:
        minari.dataset.minari_dataset.parse_dataset_id(args.dataset_id)
    except ValueError as error:
        fail(str(error))
    if target.exists():
        fail(f"{target} exists already: remove it or choose another --dataset-id")
    env = recordable_env(args.env_id)
    started = code_version()  # of the code that runs, whatever happens to the file meanwhile
    episodes, final_scores = collect(args, references)

    statistics = describe(episodes)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as root:  # complete, or not there at all
        os.environ["MINARI_DATASETS_PATH"] = root
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(episodes)],
            env=env,
            eval_env=env,
            observation_space=gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
            action_space=gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32),
            algorithm_name="SAC",
            author="the authors of this shelf",
            author_email="see README.md",
            code_permalink=f"make_dataset.py record at {started}",
            ref_min_score=references[0],
            ref_max_score=references[1],
            num_episodes_average_score=args.eval_episodes,
            description=f"Every transition of the replay of a SAC agent learning {args.env_id} from scratch, "
            f"up to a normalised score of {np.mean(final_scores):.1f} ({args.eval_episodes} episodes).",
            requirements=[f"gymnasium=={version('gymnasium')}", f"mujoco=={version('mujoco')}"],
        )
        compress(Path(root) / args.dataset_id / "data" / "main_data.hdf5")
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        dataset.storage.update_metadata({
            "horizon": env.spec.max_episode_steps, "reward_scale": 1.0, "reward_bias": 0.0, "seed": args.seed,
            "code_version": started, "record_settings": settings, "statistics": statistics,
            "data_checksum": dataset_checksum(Path(root) / args.dataset_id),
            "final_scores": final_scores, "dataset_size": round(dataset.storage.get_size(), 1)})  # fmt: skip
        shutil.copytree(root, args.out, dirs_exist_ok=True)

    for key, value in statistics.items():
        print(f"{key:<24}{value:>14,}")
    print(f"{'final normalised score':<24}{np.mean(final_scores):>14.1f}")
    print("sha256 of main_data.hdf5", dataset_checksum(target))
    print(f"written to {target}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*precision lowered.*")  # gymnasium on its own float32 boxes
    try:
        record(tyro.extras.subcommand_cli_from_dict({"record": RecordArgs}))
    except KeyboardInterrupt:
        fail("interrupted: nothing was written")
