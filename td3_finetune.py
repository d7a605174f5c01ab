"""TD3 online, or TD3+BC: from a checkpoint of any script of the collection, or from scratch.

Fujimoto et al. 2018, arXiv 1802.09477; with --bc-alpha TD3+BC, Fujimoto and Gu 2021, arXiv 2106.06860. The
deterministic policy is mu(s) = tanh(mean(s)) of the stochastic one; its target mu' is a copy made at the
handover. Actor and all targets move at every second critic update (--policy-delay).

    a'    = clip(mu'(s') + clip(policy_noise e, -noise_clip, noise_clip), -1, 1),   e ~ N(0, I)
    y     = r + gamma (1 - terminal) min_j Qbar_j(s',a')
    L_Q   = mean_i E[(Q_i(s,a) - y)^2]
    L_mu  = -E[Q_1(s,mu(s))]                                TD3
    L_mu  = -lambda E[Q_1(s,mu(s))] + E[(mu(s) - a)^2]      TD3+BC,   lambda = bc_alpha / E|Q_1(s,mu(s))|

A checkpoint brings its task, its networks and gamma; flags win over it.
    python td3_finetune.py --checkpoint results/checkpoints/hopper-medium-replay_smac_offline.pt
    python td3_finetune.py --checkpoint runs/NAME/offline.pt --bc-alpha 2.5
From scratch; going on with a run that was stopped
    python td3_finetune.py --offline-fraction 0 --warmup-steps 5000 --online-optimizer adam --online-rate 1
    python td3_finetune.py --resume runs/NAME

Writes runs/{env_id}__td3_finetune__{seed}__{time}/: config.json, a copy of this script, TensorBoard events,
metrics.csv (a row per evaluation, the checkpoint's offline ones first), last.pt, final.pt, learning curve.
"""

import copy
import difflib
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-replay"  # task (a name in TASKS) or the id of any Minari dataset
    seed: int = 1  # two runs with the same seed are identical to the last bit on the same CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    compile: bool = False  # torch.compile the update steps; pays on a GPU
    download: bool = False  # allow the network: fetch a dataset that is not on this machine
    checkpoint: str | None = None  # offline.pt or final.pt to start from; none: from scratch
    resume: str | None = None  # run directory to go on with: its last.pt and settings; device given anew
    checkpoint_every: float = 5.0  # minutes between writes of last.pt (online: at the next episode's end)
    # networks
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    num_critics: int = 4  # critics in the ensemble; the actor follows the first
    target_critics: int = 2  # target critics drawn for each batch, whose minimum is the target; 0: all
    critic_activation: Literal["relu", "silu"] = "silu"  # with ReLU grad_a Q has jumps
    critic_layer_norm: bool = True  # LayerNorm before the activation of the critics' hidden layers
    # optimiser
    online_optimizer: Literal["muon", "adam"] = "muon"  # for hidden-to-hidden weights; Adam does the rest
    muon_lr: float = 1e-3  # Muon's learning rate, times 0.2 sqrt(max(rows, cols)) to match Adam's step
    actor_lr: float = 3e-4  # Adam's for the actor
    critic_lr: float = 3e-4  # Adam's learning rate for the critics
    batch_size: int = 256  # transitions of a gradient update
    gamma: float = 0.99  # discount
    tau: float = 0.05  # step of all targets towards their networks
    # TD3
    policy_delay: int = 2  # critic updates for one update of the actor and of all targets
    policy_noise: float = 0.2  # standard deviation of the noise on the target policy's actions
    noise_clip: float = 0.5  # largest noise on the target policy's actions
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions in the environment
    bc_alpha: float = 0.0  # TD3+BC's weight of Q against imitation, 2.5 in the paper; 0 is TD3
    # online phase
    online_steps: int = 250_000  # environment steps of the online phase
    online_rate: float = 0.3  # multiplies all learning rates; from scratch take 1
    offline_fraction: float = 0.5  # share of offline data in online batches
    utd_ratio: int = 1  # critic updates, each on a fresh batch, per environment step
    warmup_steps: int = 0  # steps before the first update, by the policy; from scratch uniform
    eval_every: int = 5_000  # environment steps between evaluations
    handover_eval_every: int = 1_000  # the same in the first 20% of online updates, at least 2,000
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds, by the deterministic policy


# === Tasks and data ========================================================================================

SMALL = dict(hidden_sizes=(128, 128), batch_size=128, online_steps=10_000, eval_every=1_000,
             handover_eval_every=200)  # fmt: skip
TINY = dict(hidden_sizes=(64, 64), batch_size=128, online_steps=4_000, eval_every=500,
            handover_eval_every=200)  # fmt: skip
# name: (Minari dataset, settings that differ from Args; a flag on the command line wins over both)
TASKS = {
    "hopper-medium-replay": ("smac/hopper/medium-replay-v0", SMALL),
    "hopper-medium": ("smac/hopper/medium-v0", SMALL),
    "walker2d-medium-replay": ("smac/walker2d/medium-replay-v0", SMALL),
    "walker2d-medium": ("smac/walker2d/medium-v0", SMALL),
    "pendulum-medium-replay": ("smac/pendulum/medium-replay-v0", TINY),
}


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


FROM_CHECKPOINT = ("env_id", "gamma", "hidden_sizes", "num_critics", "critic_activation", "critic_layer_norm")


def parse_args() -> Args:
    """Settings: those of the run that is resumed, or: flag given > the checkpoint's > the task's > Args."""
    given = tyro.cli(Args, description=__doc__)
    if given.resume:
        saved = load_checkpoint(Path(given.resume) / "last.pt")["args"]
        if saved.keys() != asdict(given).keys():
            fail(f"{given.resume} is a run of another script, or of another version of this one: start again")
        return Args(**saved | {"resume": given.resume, "device": given.device})
    saved = load_checkpoint(Path(given.checkpoint)).get("args") if given.checkpoint else {}
    if saved is None:
        fail(f"{given.checkpoint} was not written by one of these scripts: take an offline.pt or a final.pt")
    own = {name: saved[name] for name in FROM_CHECKPOINT if name in saved}
    settings = TASKS.get(tyro.cli(Args, default=Args(**own)).env_id, ("", {}))[1] | own
    return tyro.cli(Args, description=__doc__, default=Args(**settings))


class Dataset:
    """A Minari recording as float32 arrays (T, ...), actions in [-1, 1]; `download` allows the network."""

    def __init__(self, dataset_id: str, download: bool = False):
        bundled = Path(__file__).resolve().parent / "datasets" / dataset_id / "data"
        here = bundled.exists()
        try:
            self.minari = minari.MinariDataset(bundled) if here else minari.load_dataset(dataset_id, download)
            episodes = list(self.minari.iterate_episodes())
        except Exception as error:  # Minari, h5py and the network raise many kinds
            near = difflib.get_close_matches(dataset_id, [*TASKS, *minari.list_local_datasets()], 3, 0.0)
            fail(f"no data {dataset_id!r} ({error}): take one of {near}, or --download fetches others")
        space, box = self.minari.observation_space, self.minari.action_space
        if not (len(space.shape or ()) == len(box.shape or ()) == 1 and box.is_bounded()):
            fail(f"{dataset_id}: observations {space}, actions {box}, but flat and bounded ones are needed")
        middle, half = (box.high + box.low) / 2, (box.high - box.low) / 2
        parts = {
            "observations": [e.observations[:-1] for e in episodes],  # T + 1 rows: the last successor is real
            "actions": [(e.actions - middle) / half for e in episodes],
            "rewards": [e.rewards for e in episodes],
            "next_observations": [e.observations[1:] for e in episodes],
            "terminations": [e.terminations for e in episodes],  # 0 at a truncation
        }
        self.columns = {name: np.concatenate(part).astype(np.float32) for name, part in parts.items()}
        self.ends = np.cumsum([len(e.actions) for e in episodes])  # (E,) one past each episode's last row
        self.metadata = self.minari.storage.metadata
        rewards = np.split(self.columns["rewards"].astype(np.float64), self.ends[:-1])
        total = (lambda r: r[-1]) if self.metadata.get("return") == "last reward" else np.sum
        self.returns = np.array([total(r) for r in rewards])  # (E,) of the environment's own rewards
        self.columns["rewards"] = self.reward(self.columns["rewards"])
        print(f"{dataset_id}: {len(rewards)} episodes, mean score {self.score(self.returns.mean()):.1f}")

    def reward(self, raw):
        """The reward as every loss sees it: the recording's linear transform of the environment's own."""
        return self.metadata.get("reward_scale", 1.0) * raw + self.metadata.get("reward_bias", 0.0)

    def score(self, returns):
        """Normalised score 100 (R - R_random) / (R_expert - R_random), by default in the data's range."""
        low = self.metadata.get("ref_min_score", self.returns.min())
        high = self.metadata.get("ref_max_score", self.returns.max())
        return 100 * (returns - low) / (high - low or 1)


def make_env(data: Dataset, eval_env: bool = False) -> gym.Env:
    """The recording's environment, in the wrappers that its spec names, with actions in [-1, 1]."""
    try:
        env = data.minari.recover_environment(eval_env)
    except Exception as error:  # no spec, or its package is missing
        fail(f"the environment of {data.minari.id} can't be made (is its package in PYTHONPATH?): {error}")
    unit = (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    return env if unit else gym.wrappers.RescaleAction(env, -1.0, 1.0)


class ReplayBuffer(nn.Module):
    """Transitions as rows of one matrix: one gather fetches a batch. Saved and restored like a network."""

    def __init__(self, columns: dict[str, np.ndarray], device: str, capacity: int = 0):
        """Holds `columns`, arrays (T, ...); with a capacity it is empty, and they only say what a row is."""
        super().__init__()
        self.widths = {name: math.prod(c.shape[1:]) for name, c in columns.items()}
        self.scalars = [name for name, c in columns.items() if c.ndim == 1]
        shape = (capacity or len(columns["actions"]), sum(self.widths.values()))
        self.register_buffer("rows", torch.zeros(shape, device=device))
        self.register_buffer("size", torch.tensor(0))
        self.register_buffer("episodes", torch.tensor(0))  # that have ended: the index of the next seed
        if not capacity:
            self.add(**columns)

    def add(self, **columns) -> None:
        """Appends a transition, or T of them as arrays (T, ...)."""
        rows = np.concatenate([np.reshape(columns[n], (-1, w)) for n, w in self.widths.items()], axis=1)
        self.rows[self.size : self.size + len(rows)] = torch.as_tensor(rows, dtype=torch.float32)
        self.size += len(rows)

    def sample_rows(self, count: int) -> Tensor:
        """`count` rows drawn uniformly with replacement, (count, columns)."""
        return self.rows[torch.randint(int(self.size), (count,), device=self.rows.device)]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (B, columns) as named tensors: (B, width), or (B,) for a scalar."""
        parts = dict(zip(self.widths, rows.split(list(self.widths.values()), dim=1)))
        return {name: part.squeeze(1) if name in self.scalars else part for name, part in parts.items()}


# === Networks and optimiser ================================================================================

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # CleanRL, sac_continuous_action.py


class MLP(nn.Module):
    """N independent multilayer perceptrons, evaluated together by one batched product a layer.

    Input (B, I), the same for all, or (N, B, I); output (N, B, O); weights (N, fan_in, fan_out). `mean` and
    `std` normalise observations by the dataset's (other inputs by 0 and 1): a saved policy can't lose them.
    """

    def __init__(self, n: int, sizes: list[int], activation: str = "relu", layer_norm: bool = False):
        super().__init__()
        self.n, self.activation = n, {"relu": torch.relu_, "silu": F.silu}[activation]
        draw = lambda fan_in, *shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.weights = nn.ParameterList([draw(i, n, i, o) for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([draw(i, n, 1, o) for i, o in pairwise(sizes)])
        self.layer_norm, normed = layer_norm, sizes[1:-1] if layer_norm else []
        self.gains = nn.ParameterList([torch.ones(n, 1, o) for o in normed])
        self.shifts = nn.ParameterList([torch.zeros(n, 1, o) for o in normed])
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("std", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).expand(self.n, -1, -1)
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases)
        for i, (weight, bias) in enumerate(hidden):
            x = torch.baddbmm(bias, x, weight)  # (N, B, H)
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:]) * self.gains[i] + self.shifts[i]
            x = self.activation(x)
        if last_weight.shape[-1] == 1:  # a scalar is a dot product, for which a matrix product is slow
            return (x * last_weight.mT).sum(-1, keepdim=True) + last_bias
        return torch.baddbmm(last_bias, x, last_weight)


def squashed_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density of a = tanh(u), u ~ N(mean, std^2), given u. (B, A) -> (B,).

    sum_k [log N(u_k; mean_k, std_k) - log(1 - tanh(u_k)^2)], the last as 2 (log 2 - u - softplus(-2u)).
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

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim + act_dim, *args.hidden_sizes, 1]
        self.net = MLP(args.num_critics, sizes, args.critic_activation, args.critic_layer_norm)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q (N, B) for observations (B, O) and actions (B, A), or (N, B, A): one action for each critic."""
        observations = observations.expand(*actions.shape[:-1], -1)
        return self.net(torch.cat([observations, actions], dim=-1)).squeeze(-1)


class Agent(nn.Module):
    """All that a run trains: actor, critics, target critics and the temperature alpha."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target_critic = Critic(obs_dim, act_dim, args).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz (Jordan et al. 2024): nearly the polar factor of each matrix in (K, rows, cols).

    X = U / ||U||_F, then five times X <- a X + (b A + c A A) X with A = X X^T: singular values come near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for stacks of hidden weight matrices (N, fan_in, fan_out), each matrix on its own.

    M <- lerp(M, G, 1 - momentum);  U = lerp(G, M, momentum);  W <- W - lr s orthogonalize(U)
    s = 0.2 sqrt(max(fan_in, fan_out)) makes steps as long as Adam's. Weights without a gradient stay.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                u = p.grad.lerp(momentum, group["momentum"])
                p.add_(orthogonalize(u), alpha=-group["lr"] * 0.2 * max(p.shape[1:]) ** 0.5)


def make_optimizers(agent: Agent, kind: str, args: Args, rate: float = 1.0) -> dict:
    """Fresh optimisers: Muon for the hidden-to-hidden weights if `kind` says so, Adam for all the rest."""
    hidden = [w for net in (agent.critic.net, agent.actor.net) for w in net.weights[1:-1] if kind == "muon"]
    without = lambda taken, params: [p for p in params if p.requires_grad and all(p is not t for t in taken)]
    actor = without(hidden, [*agent.actor.parameters(), agent.log_alpha])
    rest = without([*hidden, *actor], agent.parameters())
    groups = [dict(params=actor, lr=rate * args.actor_lr), dict(params=rest, lr=rate * args.critic_lr)]
    muon = {"muon": Muon(hidden, rate * args.muon_lr)} if hidden else {}
    return muon | {"adam": torch.optim.Adam(groups, fused=True)}


# === Losses and updates ====================================================================================


def td_target(rewards, terminations, next_q, next_log_prob, alpha, gamma: float) -> Tensor:
    """y = r + gamma (1 - terminal) (min_j Qbar_j(s', a') - alpha log pi(a'|s')), (B,); next_q (N, B)."""
    return rewards + gamma * (1 - terminations) * (next_q.amin(dim=0) - alpha * next_log_prob)


def td_loss(q: Tensor, y: Tensor) -> Tensor:
    """L_Q = mean_i E[(Q_i(s, a) - y)^2], q (N, B), y (B,)."""
    return ((q - y) ** 2).mean()


def td3_actor_loss(q: Tensor, actions: Tensor, recorded: Tensor, bc_alpha: float) -> Tensor:
    """L_mu = -E[Q_1(s, mu(s))], or -lambda E[Q_1] + E[(mu(s) - a)^2], mean over batch and action dimensions.

    lambda = bc_alpha / E|Q_1|, without gradient. q (N, B) at actions = mu(s) (B, A); recorded a (B, A).
    """
    if bc_alpha == 0:
        return -q[0].mean()
    scale = bc_alpha / q[0].detach().abs().mean()
    return -scale * q[0].mean() + ((actions - recorded) ** 2).mean()


@torch.no_grad()
def td3_target(agent: Agent, batch: dict[str, Tensor], args: Args) -> Tensor:
    """TD3's target (B,), with a' = clip(mu'(s') + clip(policy_noise e, -noise_clip, noise_clip), -1, 1)."""
    next_actions = agent.target_actor.mode(batch["next_observations"])
    noise = args.policy_noise * torch.randn_like(next_actions)
    next_actions = (next_actions + noise.clamp(-args.noise_clip, args.noise_clip)).clamp(-1, 1)
    next_q = agent.target_critic(batch["next_observations"], next_actions)
    if 0 < args.target_critics < len(next_q):  # REDQ: the minimum of some, drawn without replacement
        next_q = next_q[torch.rand(len(next_q), device=next_q.device).topk(args.target_critics).indices]
    # a deterministic policy: SAC's target without the entropy
    return td_target(batch["rewards"], batch["terminations"], next_q, 0.0, 0.0, args.gamma)


def td3_critic_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradient of TD3's critic loss into the critics' `.grad`."""
    q = agent.critic(batch["observations"], batch["actions"])
    loss = td_loss(q, td3_target(agent, batch, args))
    loss.backward(inputs=list(agent.critic.parameters()))
    return {"critic_loss": loss.detach(), "q": q.detach().mean()}


def td3_actor_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradient of L_mu into the actor's `.grad`."""
    actions = agent.actor.mode(batch["observations"])
    q = agent.critic(batch["observations"], actions)
    loss = td3_actor_loss(q, actions, batch["actions"], args.bc_alpha)
    loss.backward(inputs=list(agent.actor.parameters()))
    return {"actor_loss": loss.detach()}


def td3_update(agent: Agent, optimizers: dict, batch: dict[str, Tensor], args: Args, delayed: bool):
    """One step of the critics and, if it is their turn, of the actor and of all targets."""
    metrics = td3_critic_gradients(agent, batch, args)
    metrics |= td3_actor_gradients(agent, batch, args) if delayed else {}
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    for name in ("critic", "actor") if delayed else ():
        targets = agent.get_submodule(f"target_{name}").parameters()
        for target, source in zip(targets, agent.get_submodule(name).parameters()):
            target.lerp_(source.detach(), args.tau)
    return metrics


# === Evaluation, logging, checkpoints ======================================================================

LOG_EVERY = 500  # steps of a phase between TensorBoard scalars


def stream_seed(seed: int, phase: str, index: int = 0) -> int:
    """Seed of a random stream, from (seed, phase, index) alone: a phase is the same in every script."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{phase}/{index}".encode()).digest()[:4], "little") % 2**31


@torch.no_grad()
def evaluate(actor: Actor, envs: list[gym.Env], device: str) -> list[float]:
    """Returns of the deterministic policy, one episode per environment; episode i has seed 1000 + i."""
    observations = [env.reset(seed=1000 + i)[0] for i, env in enumerate(envs)]
    rewards, active = [[] for _ in envs], list(range(len(envs)))
    while active:  # the episodes that are still going share one forward pass
        batch = np.stack([observations[i] for i in active])
        actions = actor.mode(torch.as_tensor(batch, dtype=torch.float32, device=device)).cpu().numpy()
        for i, action in zip(tuple(active), actions):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(reward)
            if terminated or truncated:
                active.remove(i)
    return [float(np.sum(episode)) for episode in rewards]


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        fail(f"{path} can't be read as a checkpoint ({str(error)[:200]}): take another one, or start again")


class Run:
    """A run's directory and all that is written there; `state`: the checkpoint it goes on from, or {}."""

    def __init__(self, args: Args):
        gym.logger.min_level = gym.logger.ERROR  # its warnings are about old versions and float64 bounds
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small products need no more
        if args.device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda, but torch finds no GPU here: use --device cpu")
        self.args, self.device = args, "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
        self.state = load_checkpoint(Path(args.resume) / "last.pt") if args.resume else {}
        self.rows, self.saved_at = self.state.get("rows", []), time.monotonic()
        self.dataset_id = TASKS.get(args.env_id, (args.env_id,))[0]
        self.data = Dataset(self.dataset_id, args.download)
        self.obs_dim, self.act_dim = (self.data.columns[n].shape[1] for n in ("observations", "actions"))
        self.envs = [make_env(self.data, eval_env=True) for _ in range(args.eval_episodes)]
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{pd.Timestamp.now():%Y%m%d-%H%M%S-%f}"
        self.directory = Path(args.resume or f"runs/{name.replace('/', '-')}")
        if not args.resume:
            self.directory.mkdir(parents=True)
            shutil.copy(__file__, self.directory)
            config = dict(args=asdict(args), dataset_id=self.dataset_id, device=self.device,
                          torch=torch.__version__)  # fmt: skip
            (self.directory / "config.json").write_text(json.dumps(config, indent=2))
        self.writer = SummaryWriter(self.directory)
        print(f"run directory: {self.directory}")

    def restore(self, phase: str, total: int, **parts) -> int:
        """The step to go on from: 0, `total` if the phase is done, or the saved one, whose parts it loads."""
        saved, order = self.state.get("phase", "none"), ("none", "score", "offline", "alignment", "online")
        if saved != phase:
            return total if order.index(saved) > order.index(phase) else 0
        for name, part in parts.items():
            part.load_state_dict(self.state["parts"][name])
        torch.set_rng_state(self.state["random_states"][0])
        torch.cuda.set_rng_state_all(self.state["random_states"][1:])
        return self.state["step"]

    def log(self, phase: str, step: int, metrics: dict[str, Tensor | float]) -> dict[str, float]:
        """TensorBoard scalars phase/name; the only place where an update's numbers leave the device."""
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                fail(f"{name} is {value} at {phase} step {step}: lower the learning rates, or look for NaN "
                     f"in the data; the last good checkpoints are in {self.directory}")  # fmt: skip
            self.writer.add_scalar(f"{phase}/{name}", value, step)
        return metrics

    def evaluate(self, phase: str, step: int, updates: int, agent: Agent, metrics: dict) -> None:
        """Evaluates the policy: a row in metrics.csv, a line on the screen, scalars in TensorBoard."""
        metrics = self.log(phase, step, metrics)  # NaN stops the run here, before the policy is played
        returns = evaluate(agent.actor, self.envs, self.device)
        row = {"score": self.data.score(np.mean(returns)), "return": np.mean(returns)}
        self.rows.append(dict(phase=phase, step=step, updates=updates) | self.log(phase, step, row) | metrics)
        self.rows[-1] |= {f"return_{i}": r for i, r in enumerate(returns)}
        names = sorted(pd.DataFrame(self.rows), key=lambda name: name.startswith("return_"))
        pd.DataFrame(self.rows, columns=names).to_csv(self.directory / "metrics.csv", index=False)
        tqdm.write(f"{phase:<8} step {step:>9,}   return {row['return']:9.1f}   score {row['score']:6.1f}")

    def autosave(self, phase: str, step: int, **parts) -> None:
        """Writes last.pt if it is time."""
        if time.monotonic() - self.saved_at > 60 * self.args.checkpoint_every:
            self.save("last.pt", phase, step, **parts)
            self.saved_at = time.monotonic()

    def save(self, name: str, phase: str, step: int, **parts) -> None:
        """Writes a temporary file, then renames it: a kill leaves the old checkpoint or the new one."""
        state = dict(script=Path(__file__).stem, args=asdict(self.args), dataset_id=self.dataset_id,
                     obs_dim=self.obs_dim, act_dim=self.act_dim, phase=phase, step=step, rows=self.rows,
                     parts={key: part.state_dict() for key, part in parts.items()},
                     random_states=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()])  # fmt: skip
        temporary = self.directory / f"{name}.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / name)

    def report(self) -> None:
        """learning_curve.png, with the handover at 0, and a closing table."""
        mean = self.data.score(self.data.returns.mean())
        print(f"mean score of the data                 {mean:6.1f}")
        axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
        for phase in dict.fromkeys(row["phase"] for row in self.rows):
            curve = np.array([[row["step"], row["score"]] for row in self.rows if row["phase"] == phase])
            print(f"mean score, last 5 {phase + ' evaluations':<19} {curve[-5:, 1].mean():6.1f}")
            curve[:, 0] -= curve[-1, 0] if phase == "offline" else 0
            axes.plot(*curve.T, ".-", label=phase)
        axes.axhline(mean, color="gray", ls=":", label="mean of the data")
        axes.set(xlabel="offline updates (left), online environment steps (right)", ylabel="normalised score")
        axes.legend()
        axes.figure.savefig(self.directory / "learning_curve.png", dpi=120)
        print(f"all files                              {self.directory}")


# === The phases and main ===================================================================================


def set_statistics(network: nn.Module, data: Dataset) -> None:
    """Puts the dataset's observation mean and standard deviation (plus 1e-3, as CORL) into every MLP."""
    observations = data.columns["observations"].astype(np.float64)
    for mlp in (module for module in network.modules() if isinstance(module, MLP)):
        mlp.mean[: observations.shape[1]] = torch.as_tensor(observations.mean(axis=0))
        mlp.std[: observations.shape[1]] = torch.as_tensor(observations.std(axis=0) + 1e-3)


def load_agent(run: Run) -> Agent:
    """The networks and the temperature that go online: those of --checkpoint, or fresh ones."""
    torch.manual_seed(stream_seed(run.args.seed, "offline"))
    agent = Agent(run.obs_dim, run.act_dim, run.args).to(run.device)
    set_statistics(agent, run.data)
    if run.args.checkpoint and not run.state:
        state = load_checkpoint(Path(run.args.checkpoint))
        try:
            saved = state["parts"]["agent"]
            agent.load_state_dict({name: saved[name] for name in agent.state_dict()})
        except (KeyError, RuntimeError) as error:  # a part is missing, or has another shape
            fail(f"{run.args.checkpoint} of {state['dataset_id']} doesn't fit: take one of this task with "
                 f"actor and critics, and no flags for other networks ({str(error)[:200]})")  # fmt: skip
        run.rows += state["rows"] if state["phase"] == "offline" else []
    return agent


def train_online(run: Run, agent: Agent) -> None:
    """TD3 in the environment, from the agent's networks."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "online"))
    agent.target_actor = copy.deepcopy(agent.actor).requires_grad_(False)
    optimizers = make_optimizers(agent, args.online_optimizer, args, args.online_rate)
    offline, online = (ReplayBuffer(data.columns, run.device, size) for size in (0, args.online_steps))
    parts = dict(agent=agent, online=online, **optimizers)
    start = run.restore("online", args.online_steps, **parts)
    offline_rows = round(args.batch_size * args.offline_fraction)
    first_update = max(args.warmup_steps, args.batch_size - offline_rows)  # rows that a batch takes
    window = max(2_000, 0.2 * args.utd_ratio * (args.online_steps - first_update))
    step_networks, metrics = torch.compile(td3_update) if args.compile else td3_update, {}
    if start == 0:
        run.evaluate("online", 0, 0, agent, {})
    env = make_env(data)
    observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    for step in tqdm(range(start + 1, args.online_steps + 1), "online", disable=None):
        with torch.no_grad():
            row = torch.as_tensor(observation, dtype=torch.float32, device=run.device)[None]
            action = agent.actor.mode(row)[0]
            action = (action + args.exploration_noise * torch.randn_like(action)).clamp(-1, 1).cpu().numpy()
        if step <= first_update and not args.checkpoint:  # nothing is trained yet
            action = (2 * torch.rand(len(action)) - 1).numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        online.add(observations=observation, actions=action, rewards=data.reward(reward),
                   next_observations=next_observation, terminations=terminated)  # fmt: skip
        observation = next_observation
        updates = args.utd_ratio * max(0, step - first_update)
        for left in reversed(range(args.utd_ratio if updates else 0)):
            rows = [offline.sample_rows(offline_rows), online.sample_rows(args.batch_size - offline_rows)]
            delayed = (updates - left) % args.policy_delay == 0
            metrics |= step_networks(agent, optimizers, online.split(torch.cat(rows)), args, delayed)
        dense = 0 < updates <= window and step % args.handover_eval_every == 0  # right after the handover
        if dense or step % args.eval_every == 0 or step == args.online_steps:
            run.evaluate("online", step, updates, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("online", step, metrics)
        if terminated or truncated:
            online.episodes += 1
            run.autosave("online", step, **parts)  # between episodes: no environment has to be saved
            observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    run.save("final.pt", "online", args.online_steps, agent=agent)


def main() -> None:
    run = Run(parse_args())
    train_online(run, load_agent(run))
    run.report()


if __name__ == "__main__":
    main()
