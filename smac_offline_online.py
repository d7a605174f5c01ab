"""SMAC, Score-Matched Actor-Critic: offline pre-training made for a handover to online SAC.

de Lara and Shkurti 2026, arXiv 2602.17632. The maximum-entropy optimum is pi*(a|s) ~ exp(Q*(s,a) / alpha), so
grad_a Q*(s,a) = alpha grad_a log pi*(a|s). SMAC holds the offline critic to this. In place of the unknown
pi* it takes p(a|s,w), the dataset's actions given an outcome w, whose score a diffusion model estimates:

    score(s,a,w) = -(sqrt(abar_1) / sigma_1) eps_omega(s, sqrt(abar_1) a, w, 1),  eps predicts the NOISE
    L(theta)  = E[(Q(s,a) - y)^2] + kappa E|| grad_a Q(s,a) - alpha score(s,a,w) ||^2
    L_pi(phi) = E[alpha log pi(a|s) - Q(s,a)],    a ~ pi(.|s)

w is the advantage, return-to-go minus V(s); the critic is given a high w. Muon steps the hidden-to-hidden
weights, Adam the rest. Online it is plain SAC. The published form: docs/smac_offline_online.md.

    python smac_offline_online.py --env-id hopper-medium-replay      # the main job, data included
    python smac_offline_online.py --env-id pendulum-medium-replay    # a first look, 1.5 minutes
    python smac_offline_online.py --env-id mujoco/hopper/medium-v0 --download    # any flat Minari dataset
    python smac_offline_online.py --resume runs/NAME                 # go on with a run that was stopped

Writes runs/NAME/: metrics.csv, offline.pt, last.pt, final.pt, learning_curve.png and TensorBoard events.
"""

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
    resume: str | None = None  # run directory to go on with: its last.pt and settings; device given anew
    checkpoint_every: float = 5.0  # minutes between writes of last.pt (online: at the next episode's end)
    # networks
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    num_critics: int = 4  # critics in the ensemble; the actor follows the minimum of 2, the mean of more
    target_critics: int = 2  # target critics drawn for each batch, whose minimum is the target; 0: all
    critic_activation: Literal["relu", "silu"] = "silu"  # with ReLU grad_a Q has jumps
    critic_layer_norm: bool = True  # LayerNorm before the activation of the critics' hidden layers
    # optimiser
    offline_optimizer: Literal["muon", "adam"] = "muon"  # for hidden-to-hidden weights; Adam does the rest
    online_optimizer: Literal["muon", "adam"] = "muon"  # the same online; its state starts fresh
    muon_lr: float = 1e-3  # Muon's learning rate, times 0.2 sqrt(max(rows, cols)) to match Adam's step
    actor_lr: float = 3e-4  # Adam's learning rate for the actor and the temperature
    critic_lr: float = 3e-4  # Adam's learning rate for the critics and alpha_psi
    batch_size: int = 256  # transitions of a gradient update
    gamma: float = 0.99  # discount
    tau: float = 0.05  # step of the target critics towards the critics; if small, Q learns slowly
    target_entropy: float = -1.0  # entropy that the automatic temperature holds, per action dimension
    # SMAC
    score_steps: int = 40_000  # gradient updates of the score estimator
    score_lr: float = 3e-3  # Adam's learning rate for the estimator, falling to 0 along a cosine
    score_hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the score estimator's hidden layers
    score_sigma: float = 0.1  # sigma_1, the noise of level 1 of 5, in units of actions that fill [-1, 1]
    advantage: float | None = 2.0  # w for the critic, in standard deviations; None: each row's return-to-go
    offline_steps: int = 250_000  # gradient updates of the offline phase
    offline_alpha: float = 0.2  # temperature, held through the offline phase; 0: automatic there too
    kappa: float = 1.0  # weight of the score-matching term; 0 leaves it out (plain offline SAC)
    policy_share: float = 0.5  # share of each batch matched at the policy's action, not the recorded one
    alpha_psi: Literal["learned", "temperature"] = "temperature"  # factor on the score: a network, or alpha
    score_control: Literal["none", "zero", "shuffled"] = "none"  # control: 0, or another row's score
    # online phase
    online_steps: int = 250_000  # environment steps of the online phase
    online_rate: float = 0.3  # learning rates online, as a multiple of those offline
    offline_fraction: float = 0.5  # share of offline data in online batches
    utd_ratio: int = 1  # critic updates, each on a fresh batch, per environment step and actor update
    eval_every: int = 5_000  # updates (offline) or environment steps (online) between evaluations
    handover_eval_every: int = 1_000  # the same in the first 20% of online updates, at least 2,000
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds, by the deterministic policy


# === Tasks and data ========================================================================================

SMALL = dict(hidden_sizes=(128, 128), batch_size=128, offline_steps=10_000,
             online_steps=10_000, eval_every=1_000, handover_eval_every=200)  # fmt: skip
TINY = dict(hidden_sizes=(64, 64), batch_size=128, score_steps=10_000, offline_steps=8_000,
            online_steps=4_000, eval_every=500, handover_eval_every=200, kappa=0.01)  # poor data  # fmt: skip
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


def parse_args() -> Args:
    """Settings: those of the run that is resumed, or: flag given > the task's own in TASKS > Args."""
    given = tyro.cli(Args, description=__doc__)
    if given.resume:
        saved = load_checkpoint(Path(given.resume) / "last.pt")["args"]
        if saved.keys() != asdict(given).keys():
            fail(f"{given.resume} is a run of another script, or of another version of this one: start again")
        return Args(**saved | {"resume": given.resume, "device": given.device})
    return tyro.cli(Args, description=__doc__, default=Args(**TASKS.get(given.env_id, ("", {}))[1]))


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


def returns_to_go(rewards: np.ndarray, terminations: np.ndarray, ends: np.ndarray, gamma: float):
    """G_t = r_t + gamma G_(t+1) within each episode, (T,); rewards (T,) as the TD target sees them.

    After a termination comes 0, after a truncation mean(last 20 rewards) / (1 - gamma): a zero there would
    make the last steps of every episode that ran out of time look like the best ones (or the worst).
    """
    result = np.zeros(len(rewards))
    for start, end in zip(np.r_[0, ends[:-1]], ends):
        tail = 0.0 if terminations[end - 1] else rewards[max(start, end - 20) : end].mean() / (1 - gamma)
        for t in range(end - 1, start - 1, -1):
            result[t] = tail = rewards[t] + gamma * tail
    return result


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


class ScoreNet(nn.Module):
    """eps_omega(s, a_t, w, t), the denoiser of a variance-preserving diffusion; level 1 has index 0.

    a_t = sqrt(abar_t) a + sigma_t e, e ~ N(0, I), sigma_t = sqrt(1 - abar_t), growing geometrically.
    """

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        self.net = MLP(1, [obs_dim + act_dim + 1 + 16, *args.score_hidden_sizes, act_dim], "silu")
        sigma = np.geomspace(args.score_sigma, 0.9, self.embedding.num_embeddings)
        self.register_buffer("sigma", torch.tensor(sigma, dtype=torch.float32))

    def forward(self, observations: Tensor, noised: Tensor, outcomes: Tensor, levels: Tensor) -> Tensor:
        """The predicted noise (B, A) in a_t = `noised` (B, A), given outcomes w (B,) and levels (B,)."""
        inputs = (observations, noised, outcomes[:, None], self.embedding(levels))
        return self.net(torch.cat(inputs, dim=-1)).squeeze(0)

    def score(self, observations: Tensor, actions: Tensor, outcomes: Tensor) -> Tensor:
        """grad_a log p_1(a|s,w) (B, A) at the point a, p_1 the data's density smoothed at sigma_1."""
        sigma, level_1 = self.sigma[0], torch.zeros_like(outcomes, dtype=torch.long)
        sqrt_abar = (1 - sigma**2).sqrt()
        # eps predicts the NOISE, which points away from the data: hence the minus sign
        return -(sqrt_abar / sigma) * self(observations, sqrt_abar * actions, outcomes, level_1)


class Agent(nn.Module):
    """All that a run trains. Actor, critics, target critics and temperature alpha are what goes online."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, score_net: ScoreNet | None = None):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target_critic = Critic(obs_dim, act_dim, args).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.score_scale = MLP(1, [obs_dim, 64, 1], "silu")  # alpha_psi(s), before its softplus
        self.score_net = score_net


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


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """L_pi = E[alpha log pi(a|s) - Q(s, a)], Q the minimum of 2 critics, the mean of more; q (N, B)."""
    return (alpha * log_prob - (q.mean(dim=0) if len(q) > 2 else q.amin(dim=0))).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """L_alpha = -alpha E[log pi(a|s) + target entropy]: alpha rises while the entropy is below its target."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def denoising_loss(score_net: ScoreNet, batch: dict[str, Tensor], levels: Tensor) -> Tensor:
    """E|| e - eps_omega(s, a_t, w, t) ||^2, summed over actions, mean over the batch; levels t (B,)."""
    sigma, e = score_net.sigma[levels, None], torch.randn_like(batch["actions"])
    noised = (1 - sigma**2).sqrt() * batch["actions"] + sigma * e
    predicted = score_net(batch["observations"], noised, batch["outcomes"], levels)
    return ((e - predicted) ** 2).sum(-1).mean()


def score_matching_loss(grad_q: Tensor, score: Tensor, scale: Tensor) -> Tensor:
    """E|| grad_a Q(s,a) - alpha_psi(s) score(s,a,w) ||^2: vectors (B, A), alpha_psi = scale (B, 1) or ()."""
    return ((grad_q - scale * score) ** 2).sum(-1).mean()


@torch.no_grad()
def bellman_target(agent: Agent, batch: dict[str, Tensor], args: Args) -> Tensor:
    """The soft Bellman target (B,) of a batch, with a' ~ pi(.|s') and the target critics."""
    next_actions, next_log_prob = agent.actor.sample(batch["next_observations"])
    next_q = agent.target_critic(batch["next_observations"], next_actions)
    if 0 < args.target_critics < len(next_q):  # REDQ: the minimum of some, drawn without replacement
        next_q = next_q[torch.rand(len(next_q), device=next_q.device).topk(args.target_critics).indices]
    alpha = agent.log_alpha.exp()
    return td_target(batch["rewards"], batch["terminations"], next_q, next_log_prob, alpha, args.gamma)


def critic_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradient of the soft Bellman error, SAC's critic loss, into the critics' `.grad`."""
    q = agent.critic(batch["observations"], batch["actions"])
    loss = td_loss(q, bellman_target(agent, batch, args))
    loss.backward(inputs=list(agent.critic.parameters()))
    return {"critic_loss": loss.detach(), "q": q.detach().mean()}


def smac_critic_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradient of L_Q + kappa L_SM into `.grad` of the critics and of alpha_psi."""
    observations, actions = batch["observations"], batch["actions"]
    sampled = round(args.policy_share * len(actions))  # rows whose point is the policy's action
    with torch.no_grad():
        points = torch.cat([agent.actor.sample(observations[:sampled])[0], actions[sampled:]])
        score = agent.score_net.score(observations, points, batch["outcomes"])
    copies = points.expand(args.num_critics, -1, -1)  # one per critic, to receive its gradient
    q, pullback = torch.func.vjp(lambda a: agent.critic(observations, a), copies)  # Q_i at the points, (N, B)
    grad_q = pullback(torch.ones_like(q))[0].mean(dim=0)  # of the critics' mean, (B, A)
    q = agent.critic(observations, actions)
    score = {"none": score, "zero": 0 * score, "shuffled": score.roll(1, dims=0)}[args.score_control]
    alpha_psi = F.softplus(agent.score_scale(observations)).squeeze(0)  # (B, 1)
    alpha_psi = agent.log_alpha.exp().detach() if args.alpha_psi == "temperature" else alpha_psi
    loss_td = td_loss(q, bellman_target(agent, batch, args))
    loss_sm = score_matching_loss(grad_q, score, alpha_psi)
    (loss_td + args.kappa * loss_sm).backward()  # reaches the critics and alpha_psi, nothing else
    metrics = dict(critic_loss=loss_td, score_matching_loss=loss_sm, q=q, alpha_psi=alpha_psi,
                   grad_q=grad_q.norm(dim=-1), cosine=F.cosine_similarity(grad_q, score, dim=-1))  # fmt: skip
    return {name: value.detach().mean() for name, value in metrics.items()}


def actor_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradients of L_pi and L_alpha into `.grad`: one sample of actions serves both."""
    actions, log_prob = agent.actor.sample(batch["observations"])
    alpha = agent.log_alpha.exp()
    loss_pi = actor_loss(agent.critic(batch["observations"], actions), log_prob, alpha.detach())
    loss_alpha = temperature_loss(agent.log_alpha, log_prob, args.target_entropy * actions.shape[-1])
    learned = [p for p in (*agent.actor.parameters(), agent.log_alpha) if p.requires_grad]
    (loss_pi + loss_alpha).backward(inputs=learned)
    return {"actor_loss": loss_pi.detach(), "alpha": alpha.detach(), "entropy": -log_prob.detach().mean()}


def update(agent: Agent, optimizers: dict, batch: dict, args: Args, critic=critic_gradients, actor=True):
    """Steps the critics, with `actor` also actor and temperature, then targets: Qbar += tau (Q - Qbar)."""
    metrics = critic(agent, batch, args) | (actor_gradients(agent, batch, args) if actor else {})
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    for target, source in zip(agent.target_critic.parameters(), agent.critic.parameters()):
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


def with_outcomes(data: Dataset, args: Args) -> dict[str, np.ndarray]:
    """The dataset's columns and w (T,): return-to-go G or advantage G - V(s), mean 0, deviation 1."""
    w = returns_to_go(data.columns["rewards"], data.columns["terminations"], data.ends, args.gamma)
    w = torch.as_tensor(w)  # not numpy, whose last bits depend on its number of threads
    if args.kappa > 0 and args.advantage is not None:  # V(s): ridge regression on random features x (T, 256)
        s = torch.as_tensor(data.columns["observations"], dtype=torch.float64)
        s = F.pad((s - s.mean(0)) / (s.std(0) + 1e-3) / s.shape[1] ** 0.5, (0, 1), value=1.0)
        x = (s @ torch.as_tensor(np.random.default_rng(0).standard_normal((s.shape[1], 256)))).tanh_()
        w -= w.mean() + x @ torch.linalg.solve(x.T @ x + 1e-6 * len(x) * torch.eye(256), x.T @ (w - w.mean()))
    return data.columns | {"outcomes": ((w - w.mean()) / (w.std(correction=0) + 1e-6)).numpy()}


def fit_score_estimator(run: Run, columns: dict[str, np.ndarray]) -> ScoreNet:
    """Diffusion RvS: eps_omega learns the actions given state and outcome; every 20th episode is held out."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "score"))
    score_net = ScoreNet(run.obs_dim, run.act_dim, args).to(run.device)
    set_statistics(score_net, data)
    adam = torch.optim.Adam(score_net.parameters(), lr=args.score_lr, fused=True)
    held_out = np.searchsorted(data.ends, np.arange(data.ends[-1]), side="right") % 20 == 10
    train, test = (ReplayBuffer({name: column[rows] for name, column in columns.items()}, run.device)
                   for rows in (~held_out, held_out))  # fmt: skip
    start = run.restore("score", args.score_steps, score_net=score_net, adam=adam)
    for step in tqdm(range(start + 1, args.score_steps + 1), "score", disable=None):
        adam.param_groups[0]["lr"] = args.score_lr * 0.5 * (1 + math.cos(math.pi * step / args.score_steps))
        levels = torch.randint(len(score_net.sigma), (args.batch_size,), device=run.device)
        levels[: args.batch_size // 2] = 0  # level 1 is the one the critic meets: at least half of each batch
        loss = denoising_loss(score_net, train.split(train.sample_rows(args.batch_size)), levels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % LOG_EVERY == 0:
            run.log("score", step, {"denoising_loss": loss.detach()})
        run.autosave("score", step, score_net=score_net, adam=adam)
    if held_out.any() and start < args.score_steps:
        loss = denoising_loss(score_net, test.split(test.rows), torch.zeros_like(test.rows[:, 0]).long())
        print(f"estimator: held-out loss at level 1 {loss:.3f} (knowing nothing: {run.act_dim})")
    return score_net.requires_grad_(False)


def train_offline(run: Run, columns: dict[str, np.ndarray], score_net: ScoreNet | None) -> Agent:
    """SMAC: the soft Bellman error and the score-matching term for the critics, SAC's losses for the rest."""
    args = run.args
    torch.manual_seed(stream_seed(args.seed, "offline"))
    agent = Agent(run.obs_dim, run.act_dim, args, score_net).to(run.device)
    set_statistics(agent, run.data)
    if args.offline_alpha:  # automatic, it would drift: the score term gives pi = p at every alpha
        agent.log_alpha.requires_grad_(False).fill_(math.log(args.offline_alpha))
    optimizers = make_optimizers(agent, args.offline_optimizer, args)
    start = run.restore("offline", args.offline_steps, agent=agent, **optimizers)
    asked = {} if args.advantage is None else {"outcomes": np.full_like(columns["rewards"], args.advantage)}
    buffer = ReplayBuffer(columns | asked, run.device)
    critic = smac_critic_gradients if score_net else critic_gradients
    step_networks = torch.compile(update) if args.compile else update
    if start == 0 and run.state.get("phase") != "online":
        run.evaluate("offline", 0, 0, agent, {})
    for step in tqdm(range(start + 1, args.offline_steps + 1), "offline", disable=None):
        batch = buffer.split(buffer.sample_rows(args.batch_size))
        metrics = step_networks(agent, optimizers, batch, args, critic)
        if step % args.eval_every == 0 or step == args.offline_steps:
            run.evaluate("offline", step, step, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("offline", step, metrics)
        run.autosave("offline", step, agent=agent, **optimizers)
    if run.state.get("phase") != "online":  # else nothing was loaded yet
        run.save("offline.pt", "offline", args.offline_steps, agent=agent)
    return agent


def train_online(run: Run, agent: Agent) -> None:
    """Plain SAC in the environment, from the offline networks and temperature; no score term."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "online"))
    agent.log_alpha.requires_grad_(True)
    optimizers = make_optimizers(agent, args.online_optimizer, args, args.online_rate)
    offline, online = (ReplayBuffer(data.columns, run.device, size) for size in (0, args.online_steps))
    parts = dict(agent=agent, online=online, **optimizers)
    start = run.restore("online", args.online_steps, **parts)
    online_rows = round(args.batch_size * (1 - args.offline_fraction))  # of a batch; updates start after them
    window = max(2_000, 0.2 * args.utd_ratio * (args.online_steps - online_rows))
    step_networks, metrics = torch.compile(update) if args.compile else update, {}
    if start == 0:
        run.evaluate("online", 0, 0, agent, {})
    env = make_env(data)
    observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    for step in tqdm(range(start + 1, args.online_steps + 1), "online", disable=None):
        row = torch.as_tensor(observation, dtype=torch.float32, device=run.device)[None]
        action = agent.actor.sample(row)[0][0].detach().cpu().numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        online.add(observations=observation, actions=action, rewards=data.reward(reward),
                   next_observations=next_observation, terminations=terminated)  # fmt: skip
        observation = next_observation
        updates = args.utd_ratio * max(0, step - online_rows)
        for left in reversed(range(args.utd_ratio if updates else 0)):
            rows = [offline.sample_rows(args.batch_size - online_rows), online.sample_rows(online_rows)]
            metrics = step_networks(agent, optimizers, online.split(torch.cat(rows)), args, actor=left == 0)
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
    columns = with_outcomes(run.data, run.args)
    agent = train_offline(run, columns, fit_score_estimator(run, columns) if run.args.kappa > 0 else None)
    if run.args.online_steps > 0:
        train_online(run, agent)
    run.report()


if __name__ == "__main__":
    main()
