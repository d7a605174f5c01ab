"""Cal-QL and CQL: a critic that is pessimistic offline, calibrated so that little has to be unlearned online.

Kumar et al. 2020 (CQL), arXiv 2006.04779; Nakamoto et al. 2023 (Cal-QL), arXiv 2303.05479. CQL pushes the
values of all actions down, through a soft maximum, and those of the recorded actions up. Cal-QL stops pushing
at an action of the policy whose value is below V_mu(s), the return-to-go of the recorded behaviour:

    L_Q   = mean_i E[(Q_i(s,a) - y)^2] + alpha_cql mean_i E[log sum_k exp(Q~_i(s,a_k)) / mu_k - Q_i(s,a)]
            a_k: n actions each from the uniform distribution, pi(.|s) and pi(.|s'), drawn with density mu_k
            Q~ = max(Q(s,a_k), V_mu(s)) where a_k comes from the policy, Q(s,a_k) where it is uniform
    y     = r + gamma (1 - terminal) max_k min_j Qbar_j(s',a'_k),   n actions a'_k ~ pi(.|s')
    L_pi  = E[alpha log pi(a|s) - Q(s,a)],   a ~ pi(.|s)

The same losses go on online, on batches of offline and online data. V_mu(s) is known there once an episode
has ended. Public codes differ in many details: each choice made here is named at its line, with theirs.

    python calql_baseline.py --env-id hopper-medium-replay      # the main job, data included
    python calql_baseline.py --env-id pendulum-medium-replay    # a first look, two minutes
    python calql_baseline.py --no-calibrate                     # CQL
    python calql_baseline.py --cql-lagrange --cql-gap 0.8       # weight adapted to a gap, as for antmaze
    python calql_baseline.py --env-id mujoco/hopper/medium-v0 --download    # any flat Minari dataset
    python calql_baseline.py --resume runs/NAME                 # go on with a run that was stopped
    python sac_finetune.py --checkpoint runs/NAME/offline.pt    # SAC continues from Cal-QL

Writes runs/{env_id}__calql_baseline__{seed}__{time}/: config.json, a copy of this script, TensorBoard events,
metrics.csv (a row per evaluation, every episode's return), offline.pt, last.pt, final.pt, learning_curve.png.
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
    num_critics: int = 2  # critics in the ensemble; the actor follows the minimum of 2, the mean of more
    target_critics: int = 2  # target critics drawn for each batch, whose minimum is the target; 0: all
    critic_activation: Literal["relu", "silu"] = "relu"  # of the hidden layers; ReLU in all public codes
    critic_layer_norm: bool = False  # LayerNorm before the activation of the critics' hidden layers
    # optimiser
    offline_optimizer: Literal["muon", "adam"] = "adam"  # of the hidden weights; Adam in all public codes
    online_optimizer: Literal["muon", "adam"] = "adam"  # the same online; its state starts fresh
    muon_lr: float = 1e-3  # Muon's learning rate, times 0.2 sqrt(max(rows, cols)) to match Adam's step
    actor_lr: float = 1e-4  # Adam's for the actor and the temperature; official, WSRL
    critic_lr: float = 3e-4  # Adam's for the critics and alpha'; official, CORL, WSRL
    batch_size: int = 256  # transitions of a gradient update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target critics towards the critics
    target_entropy: float = -1.0  # entropy that the automatic temperature holds, per action dimension
    # Cal-QL
    offline_steps: int = 250_000  # gradient updates of the offline phase; WSRL, locomotion and kitchen
    calibrate: bool = True  # push no value of the policy's actions below the return-to-go; without: CQL
    alpha_cql: float = 5.0  # weight of the CQL term; WSRL 5, official antmaze 5, adroit 1, CORL locomotion 10
    cql_actions: int = 10  # n actions each from uniform, pi(.|s) and pi(.|s'); all public codes
    cql_temperature: float = 1.0  # temperature of the soft maximum over actions; all public codes
    cql_importance_sampling: bool = True  # divide by each action's density; public codes, not for kitchen
    cql_max_target: bool = True  # best of n target actions, not 1; official, WSRL (CORL: antmaze, adroit)
    cql_clip: tuple[float, float] = (-math.inf, math.inf)  # bounds of a gap, no gradient beyond; official
    cql_lagrange: bool = False  # multiply alpha_cql by alpha', which learns to hold the gap; antmaze: on
    cql_gap: float = 0.8  # the mean CQL gap that alpha' holds; antmaze, all public codes
    backup_entropy: bool = False  # count the policy's entropy in the target; public codes don't, SAC does
    # online phase
    online_steps: int = 250_000  # environment steps of the online phase
    offline_fraction: float = 0.5  # share of offline data in online batches
    utd_ratio: int = 1  # critic updates, each on a fresh batch, per environment step and actor update
    warmup_steps: int = 0  # steps before the first online update, by the policy; offline_steps 0: uniform
    eval_every: int = 5_000  # updates (offline) or environment steps (online) between evaluations
    handover_eval_every: int = 1_000  # the same in the first 20% of online updates, at least 2,000
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds, by the deterministic policy


# === Tasks and data ========================================================================================

# the comparison's networks, and rates at which the temperature settles; Args: published values
SMALL = dict(hidden_sizes=(128, 128), num_critics=4, critic_layer_norm=True, tau=0.05, actor_lr=3e-4,
             alpha_cql=10.0, offline_optimizer="muon", online_optimizer="muon", batch_size=128,
             offline_steps=10_000, online_steps=10_000, eval_every=1_000,
             handover_eval_every=200)  # fmt: skip
TINY = SMALL | dict(hidden_sizes=(64, 64), offline_steps=8_000, alpha_cql=1.0, online_steps=4_000,
                    eval_every=500)  # fmt: skip
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


class Agent(nn.Module):
    """All that a run trains. All of it goes online, and to a fine-tuner all but log_alpha_prime."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target_critic = Critic(obs_dim, act_dim, args).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.log_alpha_prime = nn.Parameter(torch.ones(()))  # alpha' starts at e: Cal-QL, CORL; WSRL: 1


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


def cql_gap(q: Tensor, q_data: Tensor, log_density: Tensor | None, temperature: float) -> Tensor:
    """T log sum_k exp(q_k / T) / mu_k - Q(s, a_D), (N, B): soft maximum over actions minus recorded action.

    q (N, K, B), q_data (N, B), log mu_k (K, B): the sum is K times an unbiased estimate of the integral over
    all actions. -T log K is left out as in CQL, Cal-QL and CORL, but these divide log mu_k by T, too.
    """
    if log_density is None:  # the recorded action joins, as in these codes; WSRL also takes T log(K + 1) off
        values = torch.cat([q, q_data[:, None]], dim=1) / temperature
    else:
        values = q / temperature - log_density
    return temperature * values.logsumexp(dim=1) - q_data


def alpha_prime_loss(log_alpha_prime: Tensor, gap: Tensor, alpha_cql: float, target_gap: float) -> Tensor:
    """L_alpha' = -alpha' alpha_cql (gap - target gap), gap (): alpha' rises while it is above its target."""
    # alpha_cql and the bound 1e6 as in Cal-QL and CORL; WSRL has a softplus and no factor
    return -log_alpha_prime.exp().clamp(max=1e6) * alpha_cql * (gap.detach() - target_gap)


def q_of_actions(critic: Critic, observations: Tensor, actions: Tensor) -> Tensor:
    """Q (N, K, B) of K actions (K, B, A) in each of B states (B, O)."""
    count, batch, _ = actions.shape
    return critic(observations.repeat(count, 1), actions.flatten(0, 1)).unflatten(1, (count, batch))


@torch.no_grad()
def drawn_actions(actor: Actor, batch: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """n actions each from uniform, pi(.|s) and pi(.|s'), (3n, B, A), and the log density of each, (3n, B)."""
    shape, device = (n, *batch["actions"].shape), batch["actions"].device
    uniform = 2 * torch.rand(shape, device=device) - 1
    log_uniform = torch.full(shape[:2], -math.log(2) * shape[2], device=device)
    both = torch.cat([batch["observations"], batch["next_observations"]])  # one pass serves all n actions
    mean, log_std = (x.unflatten(0, (2, 1, -1)) for x in actor(both))  # (2, 1, B, A)
    u = mean + log_std.exp() * torch.randn(2, *shape, device=device)  # (2, n, B, A)
    log_prob = squashed_gaussian_log_prob(u, mean, log_std)
    actions = torch.cat([uniform, torch.tanh(u).flatten(0, 1)])
    return actions, torch.cat([log_uniform, log_prob.flatten(0, 1)])


@torch.no_grad()
def calql_target(agent: Agent, batch: dict[str, Tensor], actions, log_prob, args: Args) -> Tensor:
    """The target (B,): a' is the best by min_j Qbar_j(s', a') of actions (n, B, A) ~ pi(.|s')."""
    q = q_of_actions(agent.target_critic, batch["next_observations"], actions)  # (N, n, B)
    if 0 < args.target_critics < len(q):  # REDQ: the minimum of some, drawn without replacement
        q = q[torch.rand(len(q), device=q.device).topk(args.target_critics).indices]
    # best by Q alone, then the entropy, as in Cal-QL, CORL and WSRL's CQL; WSRL's SAC: best of the sum
    best = q.amin(dim=0).argmax(dim=0, keepdim=True)  # (1, B)
    next_q = q.gather(1, best.expand(len(q), 1, -1)).squeeze(1)  # (N, B)
    next_log_prob, alpha = log_prob.gather(0, best).squeeze(0), agent.log_alpha.exp() * args.backup_entropy
    return td_target(batch["rewards"], batch["terminations"], next_q, next_log_prob, alpha, args.gamma)


def calql_gradients(agent: Agent, batch: dict, args: Args, actor: bool) -> dict[str, Tensor]:
    """Puts the gradients of L_Q and L_alpha' and, with `actor`, those of L_pi and L_alpha into `.grad`."""
    n, bound = args.cql_actions, batch["returns_to_go"]
    actions, log_density = drawn_actions(agent.actor, batch, n)
    # target and CQL term share the actions of pi(.|s'): the same expectations; public codes draw twice
    ours = slice(2 * n, None if args.cql_max_target else 2 * n + 1)
    y = calql_target(agent, batch, actions[ours], log_density[ours], args)
    # every action at s, those of pi(.|s') too, as in CQL, Cal-QL, CORL and WSRL; unifloral: at s'
    actions = torch.cat([actions, batch["actions"][None]])
    with torch.no_grad():
        q = q_of_actions(agent.critic, batch["observations"], actions)  # (N, 3n + 1, B)
    q.requires_grad_()
    q_random, q_policy, q_data = q[:, :n], q[:, n : 3 * n], q[:, 3 * n]
    # no gradient where the return is higher; the uniform actions stay unbounded, as in Cal-QL and CORL
    q_bounded = torch.maximum(q_policy, bound) if args.calibrate else q_policy
    log_density = log_density if args.cql_importance_sampling else None
    gap = cql_gap(torch.cat([q_random, q_bounded], dim=1), q_data, log_density, args.cql_temperature)
    # clipped with and without alpha', as in Cal-QL and CORL; WSRL: without only
    clipped_gap, loss_td = gap.clamp(*args.cql_clip).mean(), td_loss(q_data, y)
    metrics = dict(critic_loss=loss_td, cql_gap=gap, q=q_data, q_policy=q_policy, q_random=q_random,
                   below_return=(q_policy < bound).float())  # fmt: skip
    # both terms are means over the critics, as in WSRL; Cal-QL and CORL: sums
    loss = loss_td + args.alpha_cql * clipped_gap
    if args.cql_lagrange:
        scale = metrics["alpha_prime"] = agent.log_alpha_prime.exp().clamp(max=1e6).detach()
        loss_prime = alpha_prime_loss(agent.log_alpha_prime, clipped_gap, args.alpha_cql, args.cql_gap)
        loss = loss_td + args.alpha_cql * scale * clipped_gap + loss_prime
    loss.backward(inputs=[q, agent.log_alpha_prime])
    # calibration leaves most actions without a gradient: their return-to-go is above Q. Only the others go
    # through the critics again, forward and backward, which takes half the time (of CQL a little more)
    grad_q = q.grad.flatten(1)  # (N, (3n + 1) B)
    rows = grad_q.any(dim=0).nonzero().squeeze(1)  # R of them
    points = batch["observations"][rows % len(y)], actions.flatten(0, 1)[rows]
    agent.critic(*points).backward(grad_q[:, rows], inputs=list(agent.critic.parameters()))
    metrics |= actor_gradients(agent, batch, args) if actor else {}  # CORL computes these first
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


def apply_gradients(agent: Agent, optimizers: dict, args: Args) -> None:
    """One step of every network that has a gradient, then of the targets: Qbar <- Qbar + tau (Q - Qbar)."""
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    for target, source in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        target.lerp_(source.detach(), args.tau)


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


def complete_returns(buffer: ReplayBuffer, start: int, gamma: float) -> None:
    """Writes the returns-to-go of the episode that begins at row `start` and has just ended."""
    columns = buffer.split(buffer.rows[start : buffer.size])  # views
    rewards, terminations = (columns[name].cpu().numpy() for name in ("rewards", "terminations"))
    found = returns_to_go(rewards, terminations, np.array([len(rewards)]), gamma)
    columns["returns_to_go"].copy_(torch.as_tensor(found))


def with_returns(data: Dataset, gamma: float) -> dict[str, np.ndarray]:
    """The dataset's columns and every transition's return-to-go, of the rewards that the target sees."""
    found = returns_to_go(data.columns["rewards"], data.columns["terminations"], data.ends, gamma)
    return data.columns | {"returns_to_go": found}


def train_offline(run: Run) -> Agent:
    """Cal-QL, or CQL without calibration, on the recording."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "offline"))
    agent = Agent(run.obs_dim, run.act_dim, args).to(run.device)
    set_statistics(agent, data)
    optimizers = make_optimizers(agent, args.offline_optimizer, args)
    start = run.restore("offline", args.offline_steps, agent=agent, **optimizers)
    buffer = ReplayBuffer(with_returns(data, args.gamma), run.device)
    gradients = torch.compile(calql_gradients) if args.compile else calql_gradients
    if not run.state:
        run.evaluate("offline", 0, 0, agent, {})
    for step in tqdm(range(start + 1, args.offline_steps + 1), "offline", disable=None):
        metrics = gradients(agent, buffer.split(buffer.sample_rows(args.batch_size)), args, True)
        apply_gradients(agent, optimizers, args)
        if step % args.eval_every == 0 or step == args.offline_steps:
            run.evaluate("offline", step, step, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("offline", step, metrics)
        run.autosave("offline", step, agent=agent, **optimizers)
    if run.state.get("phase") != "online":  # else nothing was loaded yet
        run.save("offline.pt", "offline", args.offline_steps, agent=agent)
    return agent


def train_online(run: Run, agent: Agent) -> None:
    """The same losses in the environment, calibrated by the returns-to-go of the episodes that have ended."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "online"))
    optimizers = make_optimizers(agent, args.online_optimizer, args)
    columns = with_returns(data, args.gamma)
    offline, online = (ReplayBuffer(columns, run.device, size) for size in (0, args.online_steps))
    parts = dict(agent=agent, online=online, **optimizers)
    start = run.restore("online", args.online_steps, **parts)
    offline_rows = round(args.batch_size * args.offline_fraction)
    first_update = max(args.warmup_steps, args.batch_size - offline_rows)  # rows that a batch takes
    window = max(2_000, 0.2 * args.utd_ratio * (args.online_steps - first_update))
    gradients, metrics = torch.compile(calql_gradients) if args.compile else calql_gradients, {}
    if start == 0:
        run.evaluate("online", 0, 0, agent, {})
    env, begin = make_env(data), int(online.size)  # the first row of the episode under way
    observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    for step in tqdm(range(start + 1, args.online_steps + 1), "online", disable=None):
        with torch.no_grad():
            row = torch.as_tensor(observation, dtype=torch.float32, device=run.device)[None]
            action = agent.actor.sample(row)[0][0].cpu().numpy()
        if step <= first_update and not args.offline_steps:  # nothing is trained yet
            action = (2 * torch.rand(len(action)) - 1).numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        # not known yet: -inf bounds nothing. CORL: 0, and no calibration online
        online.add(observations=observation, actions=action, rewards=data.reward(reward),
                   next_observations=next_observation, terminations=terminated,
                   returns_to_go=-math.inf)  # fmt: skip
        observation = next_observation
        if terminated or truncated:  # only now the returns are known
            complete_returns(online, begin, args.gamma)
        updates = args.utd_ratio * max(0, step - first_update)
        for left in reversed(range(args.utd_ratio if updates else 0)):
            rows = [offline.sample_rows(offline_rows), online.sample_rows(args.batch_size - offline_rows)]
            metrics = gradients(agent, online.split(torch.cat(rows)), args, left == 0)
            apply_gradients(agent, optimizers, args)
        dense = 0 < updates <= window and step % args.handover_eval_every == 0  # right after the handover
        if dense or step % args.eval_every == 0 or step == args.online_steps:
            run.evaluate("online", step, updates, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("online", step, metrics)
        if terminated or truncated:
            online.episodes, begin = online.episodes + 1, step
            run.autosave("online", step, **parts)  # between episodes: no environment has to be saved
            observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    run.save("final.pt", "online", args.online_steps, agent=agent)


def main() -> None:
    torch.empty(31 << 18)  # one freed block of 31 MB, and glibc keeps freed memory from then on: 20% faster
    run = Run(parse_args())
    agent = train_offline(run)
    if run.args.online_steps > 0:
        train_online(run, agent)
    run.report()


if __name__ == "__main__":
    main()
