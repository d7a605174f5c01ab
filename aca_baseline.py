"""ACA, Actor-Critic Alignment: online, Q is rebuilt from the offline policy; offline data are optional there.

Yu and Zhang, ICML 2023. Offline SAC+ML trains SAC with a likelihood term and, beside it, a baseline Z(s). At
the handover the offline Q is thrown away and made anew of Z and pi_0, a frozen copy of the policy:

    L_pi = lam E[alpha log pi(a|s) - Q(s,a)] - E[log pi(a_D|s)],   lam = 30 / E|Q|,   a ~ pi(.|s)
    L_Z  = E[(softclip(log pi(a_D|s)) + Z_i(s) - y_Z)^2]    (the official code does not clip here)
    y_Z  = r + gamma (1 - terminal) (log pi(a'|s') + min_j Z_j(s') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    Q_i(s,a) = R_i(s,a) + weight softclip(log pi_0(a|s)),   R_i := Z_i,   alpha := 1    (at the handover)

SAC's actor loss, then E[KL(pi || pi_0) - Z(s)], starts at its minimum where the clip does not bite and the
weight is 1 (a higher one asks for a narrower policy). Plain SAC follows on this Q, while the weight falls.

    python aca_baseline.py --env-id pendulum-medium-replay           # a first look
    python aca_baseline.py --checkpoint runs/NAME/offline.pt         # align another algorithm's policy
    python aca_baseline.py --resume runs/NAME                        # go on with a run that was stopped

Writes runs/{env_id}__aca_baseline__{seed}__{time}/: config.json, a copy of this script, TensorBoard events,
metrics.csv (a row per evaluation, every episode's return), offline.pt (before the alignment, for the
fine-tuners; not with --checkpoint), final.pt (R in place of critics: for none), learning_curve.png.
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
    resume: str | None = None  # run directory to go on with: its last.pt and settings; device given anew
    checkpoint_every: float = 5.0  # minutes between writes of last.pt (online: at the next episode's end)
    checkpoint: str | None = None  # another run's checkpoint, whose policy is aligned; nothing is pre-trained
    # networks
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    num_critics: int = 2  # critics in the ensemble; the actor follows the minimum of 2, the mean of more
    target_critics: int = 2  # target critics drawn for each batch, whose minimum is the target; 0: all
    critic_activation: Literal["relu", "silu"] = "silu"  # with ReLU grad_a Q has jumps
    critic_layer_norm: bool = False  # LayerNorm before the activation of the critics' hidden layers
    # optimiser
    offline_optimizer: Literal["muon", "adam"] = "muon"  # for hidden-to-hidden weights; Adam does the rest
    online_optimizer: Literal["muon", "adam"] = "adam"  # Muon's step does not shrink with a clipped gradient
    muon_lr: float = 1e-3  # Muon's learning rate, times 0.2 sqrt(max(rows, cols)) to match Adam's step
    actor_lr: float = 3e-4  # Adam's learning rate for the actor and the temperature
    critic_lr: float = 3e-4  # Adam's for the critics and Z; the official code has Adam at 3e-4 for everything
    batch_size: int = 256  # transitions of a gradient update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target critics towards the critics
    target_entropy: float = -1.0  # entropy that the automatic temperature holds, per action dimension
    # ACA; official values, per kind of data those for medium-replay
    offline_steps: int = 250_000  # gradient updates of the offline phase (500,000 in the paper)
    actor_scale: float = 30.0  # lam E|Q|, the weight of SAC's actor loss against the likelihood offline
    alignment_steps: int = 5_000  # updates that fit Z to the policy of --checkpoint, from its own Z or from 0
    alignment_beta: float = 7.0  # stds from pi_0's mean at the soft clip's floor; 15 for (medium-)expert
    alignment_weight: float = 1.0  # weight of log pi_0 in the aligned Q at the handover
    alignment_decay: float = 40_000.0  # online updates from alignment_weight down to 0; 10,000 for random
    alignment_floor: float = 0.5  # the weight falls no lower than this; (medium-)expert 1, random 0
    actor_grad_norm: float = 0.25  # largest norm of the actor's gradient online
    top_episodes: int = 50  # best recorded episodes that the online buffer starts with; medium, random: 0
    # online phase
    online_steps: int = 250_000  # environment steps of the online phase
    offline_fraction: float = 0.0  # share of offline data in online batches
    utd_ratio: int = 1  # critic updates, each on a fresh batch, per environment step and actor update
    warmup_steps: int = 0  # environment steps before the first online update, acted by the policy
    eval_every: int = 5_000  # updates (offline) or environment steps (online) between evaluations
    handover_eval_every: int = 1_000  # the same in the first 20% of online updates, at least 2,000
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds, by the deterministic policy


# === Tasks and data ========================================================================================

# the collection's comparison; Args has published values
SMALL = dict(hidden_sizes=(128, 128), num_critics=4, critic_layer_norm=True, tau=0.05, eval_every=1_000,
             offline_steps=10_000, online_steps=10_000, batch_size=128, handover_eval_every=200)  # fmt: skip
# Pendulum's |Q| and the errors of R are large beside log pi_0: at weight 1 the policy collapses
TINY = SMALL | dict(hidden_sizes=(64, 64), offline_steps=8_000, online_steps=4_000, actor_scale=300.0,
                    alignment_weight=30.0, alignment_floor=15.0, top_episodes=2, eval_every=500)  # fmt: skip
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


def clip_log_prob(actor: Actor, observations: Tensor, actions: Tensor, beta: float):
    """log pi(a|s), from the action itself, and c + softplus(log pi(a|s) - c), its soft clip, (B,) or (N, B).

    The floor c is the Gaussian's log density at beta standard deviations from its mean, without the tanh's
    Jacobian, which the official code takes in: a wide policy's floor then exceeds the density at the mean.
    """
    mean, log_std = actor(observations)
    u = torch.atanh(actions.clamp(-0.99999, 0.99999))  # atanh(1) is infinite; D4RL's loaders clip there
    log_prob = squashed_gaussian_log_prob(u, mean, log_std)
    floor = (-0.5 * beta**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return log_prob, floor + F.softplus(log_prob - floor)


class AlignedCritic(Critic):
    """Q_i(s, a) = R_i(s, a) + prior(s, a); R is all that is learned."""

    net = property(lambda self: self.residual)  # saved under a name of its own: nobody takes R for Q

    def __init__(self, residual: MLP, prior):
        nn.Module.__init__(self)
        self.residual, self.prior = residual, prior

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return super().forward(observations, actions) + self.prior(observations, actions)


class Agent(nn.Module):
    """All that a run trains; `align` makes R of the critics and adds pi_0 and its weight."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target_critic = Critic(obs_dim, act_dim, args).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.baseline = Critic(obs_dim, 0, args).net  # Z_i(s), (N, B, 1)

    @torch.no_grad()
    def align(self, args: Args) -> None:
        """The handover: Q_i := R_i + weight softclip(log pi_0), R_i := Z_i, pi_0 := pi, alpha := 1."""
        self.pi_0, z = copy.deepcopy(self.actor).requires_grad_(False), self.baseline.requires_grad_(False)
        self.register_buffer("weight", torch.full_like(self.log_alpha, args.alignment_weight))
        prior = lambda s, a: self.weight * clip_log_prob(self.pi_0, s, a, args.alignment_beta)[1]
        for name in ("critic", "target_critic"):
            net, n = getattr(self, name).net, len(z.mean)
            net.mean[:n], net.std[:n] = z.mean, z.std
            for r, own in zip(net.parameters(), z.parameters()):
                r.zero_()[:, : own.shape[1]] = own  # R starts with 0 for the actions, without a gradient in a
            setattr(self, name, AlignedCritic(net, prior))
        self.log_alpha.zero_()


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


def actor_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradients of L_pi and L_alpha into `.grad`: one sample of actions serves both."""
    actions, log_prob = agent.actor.sample(batch["observations"])
    alpha = agent.log_alpha.exp()
    loss_pi = actor_loss(agent.critic(batch["observations"], actions), log_prob, alpha.detach())
    loss_alpha = temperature_loss(agent.log_alpha, log_prob, args.target_entropy * actions.shape[-1])
    learned = [p for p in (*agent.actor.parameters(), agent.log_alpha) if p.requires_grad]
    (loss_pi + loss_alpha).backward(inputs=learned)
    return {"actor_loss": loss_pi.detach(), "alpha": alpha.detach(), "entropy": -log_prob.detach().mean()}


def baseline_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradient of L_Z into Z's `.grad`. Z has no target network, as in the official code."""
    with torch.no_grad():
        # after another algorithm than SAC+ML a recorded action may be hundreds of nats away: hence the clip
        _, log_prob = clip_log_prob(agent.actor, batch["observations"], batch["actions"], args.alignment_beta)
        _, next_log_prob = agent.actor.sample(batch["next_observations"])
        next_q = next_log_prob + agent.baseline(batch["next_observations"]).squeeze(-1)
        alpha = agent.log_alpha.exp()
        y = td_target(batch["rewards"], batch["terminations"], next_q, next_log_prob, alpha, args.gamma)
    z = agent.baseline(batch["observations"]).squeeze(-1)
    loss = td_loss(log_prob + z, y)
    loss.backward(inputs=list(agent.baseline.parameters()))
    return {"baseline_loss": loss.detach(), "z": z.detach().mean()}


def sacml_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradients of all offline losses into `.grad`: the critics', SAC+ML's L_pi, L_alpha and L_Z."""
    observations, metrics = batch["observations"], critic_gradients(agent, batch, args)
    actions, log_prob = agent.actor.sample(observations)
    recorded, _ = clip_log_prob(agent.actor, observations, batch["actions"], args.alignment_beta)
    q, alpha = agent.critic(observations, actions), agent.log_alpha.exp()
    lam = args.actor_scale / q.detach().amin(dim=0).abs().mean()
    loss_pi = lam * actor_loss(q, log_prob, alpha.detach()) - recorded.mean()
    loss_alpha = temperature_loss(agent.log_alpha, log_prob, args.target_entropy * actions.shape[-1])
    (loss_pi + loss_alpha).backward(inputs=[*agent.actor.parameters(), agent.log_alpha])
    found = dict(actor_loss=loss_pi, alpha=alpha, entropy=-log_prob, log_prob_recorded=recorded)
    metrics |= {name: value.detach().mean() for name, value in found.items()}
    return metrics | baseline_gradients(agent, batch, args)


def clipped_gradients(agent: Agent, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """Puts the gradients of SAC's losses into `.grad`, the actor's with its norm clipped."""
    metrics = critic_gradients(agent, batch, args) | actor_gradients(agent, batch, args)
    norm = nn.utils.clip_grad_norm_(agent.actor.parameters(), args.actor_grad_norm)
    return metrics | {"actor_grad_norm": norm}


def prior_weight(updates: int, args: Args) -> float:
    """Weight of log pi_0 after so many online updates: it falls linearly, down to its floor."""
    floor = min(args.alignment_floor, args.alignment_weight)
    return max(floor, args.alignment_weight * (1 - updates / args.alignment_decay))


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


def take_policy(run: Run, agent: Agent) -> None:
    """Takes the policy and the temperature of --checkpoint, and its Z; where it has none, Z starts at 0."""
    nn.init.zeros_(agent.baseline.weights[-1])
    nn.init.zeros_(agent.baseline.biases[-1])
    origin = load_checkpoint(Path(run.args.checkpoint))
    taken = ("actor.", "log_alpha", "baseline.")  # no critic: the alignment throws them away
    try:
        saved = {name: x for name, x in origin["parts"]["agent"].items() if name.startswith(taken)}
        agent.load_state_dict(saved, strict=False)
    except (KeyError, RuntimeError) as error:  # none, or of another shape
        fail(f"{run.args.checkpoint} doesn't fit this task or these network flags: {str(error)[:200]}")
    run.rows = origin["rows"] if origin["phase"] == "offline" else []  # they come first in metrics.csv


def train_offline(run: Run) -> Agent:
    """SAC+ML and its baseline Z, or with --checkpoint the alignment: Z alone, for the policy in it."""
    args, data = run.args, run.data
    phase, total, gradients = "offline", args.offline_steps, sacml_gradients
    if args.checkpoint:
        phase, total, gradients = "alignment", args.alignment_steps, baseline_gradients
    torch.manual_seed(stream_seed(args.seed, "offline"))
    agent = Agent(run.obs_dim, run.act_dim, args).to(run.device)
    set_statistics(agent, data)
    if args.checkpoint and not run.state:  # a resumed run has all of it in its own last.pt
        take_policy(run, agent)
    optimizers = make_optimizers(agent, args.offline_optimizer, args)
    start = run.restore(phase, total, agent=agent, **optimizers)
    buffer = ReplayBuffer(data.columns, run.device)
    step_networks = torch.compile(update) if args.compile else update
    if not run.state and phase == "offline":
        run.evaluate("offline", 0, 0, agent, {})
    for step in tqdm(range(start + 1, total + 1), phase, disable=None):
        batch = buffer.split(buffer.sample_rows(args.batch_size))
        metrics = step_networks(agent, optimizers, batch, args, gradients, actor=False)
        if phase == "offline" and (step % args.eval_every == 0 or step == total):
            run.evaluate("offline", step, step, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log(phase, step, metrics)
        run.autosave(phase, step, agent=agent, **optimizers)
    if phase == "offline" and run.state.get("phase") != "online":  # else nothing was loaded yet
        run.save("offline.pt", "offline", total, agent=agent)
    return agent


def train_online(run: Run, agent: Agent) -> None:
    """Plain SAC in the environment with the aligned critics; the weight of log pi_0 falls."""
    args, data = run.args, run.data
    agent.align(args)
    torch.manual_seed(stream_seed(args.seed, "online"))
    optimizers = make_optimizers(agent, args.online_optimizer, args)
    best = np.argsort(-data.returns, kind="stable")[: args.top_episodes]
    rows = np.isin(np.searchsorted(data.ends, np.arange(data.ends[-1]), side="right"), best)
    given = int(rows.sum())  # transitions that the online buffer starts with
    offline, online = (ReplayBuffer(data.columns, run.device, n) for n in (0, given + args.online_steps))
    online.add(**{name: column[rows] for name, column in data.columns.items()})
    parts = dict(agent=agent, online=online, **optimizers)
    start = run.restore("online", args.online_steps, **parts)
    offline_rows = round(args.batch_size * args.offline_fraction)
    first_update = max(args.warmup_steps, args.batch_size - offline_rows - given, 0)  # a batch's rows
    window = max(2_000, 0.2 * args.utd_ratio * (args.online_steps - first_update))
    step_networks, metrics = torch.compile(update) if args.compile else update, {}
    if start == 0:
        run.evaluate("online", 0, 0, agent, {})
    env = make_env(data)
    observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    for step in tqdm(range(start + 1, args.online_steps + 1), "online", disable=None):
        with torch.no_grad():
            row = torch.as_tensor(observation, dtype=torch.float32, device=run.device)[None]
            action = agent.actor.sample(row)[0][0].cpu().numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        online.add(observations=observation, actions=action, rewards=data.reward(reward),
                   next_observations=next_observation, terminations=terminated)  # fmt: skip
        observation = next_observation
        updates = args.utd_ratio * max(0, step - first_update)
        for left in reversed(range(args.utd_ratio if updates else 0)):
            agent.weight.fill_(prior_weight(updates - left - 1, args))
            rows = [offline.sample_rows(offline_rows), online.sample_rows(args.batch_size - offline_rows)]
            critic = critic_gradients if left else clipped_gradients  # the last one also moves the actor
            metrics = step_networks(agent, optimizers, online.split(torch.cat(rows)), args, critic, False)
        dense = 0 < updates <= window and step % args.handover_eval_every == 0  # right after the handover
        if dense or step % args.eval_every == 0 or step == args.online_steps:
            run.evaluate("online", step, updates, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("online", step, metrics | {"prior_weight": agent.weight})
        if terminated or truncated:
            online.episodes += 1
            run.autosave("online", step, **parts)  # between episodes: no environment has to be saved
            observation, _ = env.reset(seed=stream_seed(args.seed, "online", int(online.episodes)))
    run.save("final.pt", "online", args.online_steps, agent=agent)


def main() -> None:
    run = Run(parse_args())
    agent = train_offline(run)
    if run.args.online_steps > 0:
        train_online(run, agent)
    run.report()


if __name__ == "__main__":
    main()
