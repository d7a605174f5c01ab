# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.11.0", "tyro==1.0.17",
#     "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Pictures of reward in parameter space: is there a valley between the offline and the online policy?

SMAC's explanation of smooth handovers (de Lara and Shkurti 2026, arXiv 2602.17632) is a picture: its offline
and online optimum lie on one hill, while between those of other algorithms lies a valley of low reward. This
draws it for any checkpoints of the shelf. All parameters theta of the deterministic policy are moved:

    line    theta(x) = (1 - x) theta_offline + x theta_online
            valley depth = min(ends) - min(path), the path being x in [0, 1]
    plane   theta(u, v) = theta_A + u e_1 + v e_2,  e_1 ~ B - A, e_2 ~ C - A without its part along e_1
    path    the snapshots of runs along their first two principal components, and by t-SNE

A pair; several seeds and algorithms in one picture (pairs of one label: their mean, error over the pairs)
    python reward_landscape.py line runs/NAME/offline.pt runs/NAME/final.pt
    python reward_landscape.py line A1.pt B1.pt A2.pt B2.pt C1.pt D1.pt --labels SMAC SMAC Cal-QL
Two pre-trainings with other seeds, their hidden units matched first (Git Re-Basin)
    python reward_landscape.py line runs/ONE/offline.pt runs/OTHER/offline.pt --align
The plane through three policies with a run's way through it; two policies and a random direction
    python reward_landscape.py plane A.pt B.pt C.pt --path runs/NAME
    python reward_landscape.py plane runs/NAME/offline.pt runs/NAME/final.pt
The way of runs that were made with --snapshot-every (t-SNE needs scikit-learn)
    python reward_landscape.py path runs/NAME runs/OTHER

Writes line.png, plane.png or path.png into --out, beside it a csv with all that is drawn, every episode's
return included, and evaluations.jsonl with all evaluations so far: a command that was stopped goes on where
it was, and one that is given again evaluates nothing.
"""

import copy
import csv
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, Union

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

# === Arguments =============================================================================================


@dataclass(kw_only=True)
class Common:
    out: Path = Path("runs/landscape")
    """folder of the picture, its csv and the evaluations"""
    episodes: int = 20
    """episodes of an evaluation, with the seeds of the scripts' own evaluations (which have 20)"""
    workers: int = os.cpu_count() or 1
    """processes that evaluate"""


@dataclass(kw_only=True)
class Line(Common):
    """Reward along the straight line between two policies, for one or several pairs."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """OFFLINE ONLINE, and more such pairs"""
    labels: tuple[str, ...] = ()
    """one for each pair, pairs of one label make one curve; default: the algorithms in the checkpoints"""
    points: int = 21
    """policies from x = 0 to x = 1, both included"""
    beyond: float = 0.1
    """how far the line goes on behind both ends"""
    align: bool = False
    """match the hidden units of each pair first"""


@dataclass(kw_only=True)
class Plane(Common):
    """Reward on the plane through three policies, or through two along a random direction."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """A B C, or A B"""
    path: Path | None = None
    """run whose snapshots are projected onto the plane"""
    grid: int = 15
    """policies along each side"""
    margin: float = 0.2
    """how far the plane goes on around what is marked, as a share of its extent"""
    seed: int = 1
    """seed of the random direction"""
    align: bool = False
    """match the hidden units of all others to A's first"""


@dataclass(kw_only=True)
class Way(Common):
    """The way of runs through parameter space: principal components and t-SNE of their snapshots."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, made with --snapshot-every"""
    perplexity: float = 30.0
    """of t-SNE, at most a third of the number of policies"""
    seed: int = 1
    """seed of t-SNE"""


# === Tasks and data ========================================================================================


def fail(message: str):
    """End the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {message}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary file in the same folder), which takes the place of `path` once it is on disk."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flattened(space: gym.Space, observations) -> np.ndarray:
    """Observations (..., O); the parts of a Dict side by side, in the order of their names."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flattened(space[key], observations[key]) for key in sorted(space)]
        return np.concatenate(parts, axis=-1)
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        raise ValueError(f"its observations are {space}; the scripts read flat float Box, or Dict of these")
    return observations


class HealthyRewardAtFall(gym.Wrapper):
    """Hopper and Walker2d as in Gym's v2 to v4: the healthy reward of 1 is paid on the falling step, too."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward + float(terminated), terminated, truncated, info


class BinaryReward(gym.Wrapper):
    """Adroit as in AWAC and Cal-QL: -1 a step, 0 on the step that succeeds, which ends the episode."""

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        success = bool(info["success"])
        return observation, success - 1.0, terminated or success, truncated, info


class LatchedKitchen(gym.Wrapper):
    """D4RL's kitchen: joints and objects (30,) without velocities; reward: tasks done so far (latched)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (30,), np.float32)

    def view(self, observation: dict) -> np.ndarray:
        full = observation["observation"]  # 9 joints, their velocities, 21 object coordinates, theirs
        return np.r_[full[:9], full[18:39]].astype(np.float32)

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return self.view(observation), info

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        done = info["episode_task_completions"]
        return self.view(observation), float(len(done)), terminated, truncated, info


WRAPPERS = {wrapper.__name__: wrapper for wrapper in (HealthyRewardAtFall, BinaryReward, LatchedKitchen)}


def make_env(spec: str | gym.envs.registration.EnvSpec, wrappers: Sequence[str] = (), **kwargs) -> gym.Env:
    """The environment in the named wrappers, with flat observations and actions in [-1, 1]."""
    env = gym.make(spec, **kwargs)
    for name in wrappers:
        env = WRAPPERS[name](env)
    if isinstance(env.observation_space, gym.spaces.Dict):
        flat = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(env.observation_space),), np.float32)
        env = gym.wrappers.TransformObservation(env, partial(flattened, env.observation_space), flat)
    one = np.ones(env.action_space.shape, np.float32)
    unit = (env.action_space.low == -one).all() and (env.action_space.high == one).all()
    return env if unit else gym.wrappers.RescaleAction(env, -one, one)


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


# === Evaluation, logging, checkpoints ======================================================================

FORMAT = 2  # of a checkpoint
# what a checkpoint and the run that goes on from it have to agree on
FIXED = ("env_id", "env", "obs_dim", "act_dim", "flattening", "action_bounds", "log_std_bounds",
         "hidden_sizes", "num_critics", "critic_activation", "critic_layer_norm", "gamma", "reward_scale",
         "reward_bias", "dataset_checksum")  # fmt: skip
PHASES = ("score", "offline", "alignment", "online")


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


def fingerprint(value, crc: int = 0) -> int:
    """CRC-32 of all that a checkpoint holds: tensors by their bytes, everything else by its text."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            crc = fingerprint(value[key], zlib.crc32(str(key).encode(), crc))
    elif isinstance(value, (list, tuple)):
        for item in value:
            crc = fingerprint(item, crc)
    elif isinstance(value, Tensor):
        crc = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    else:
        crc = zlib.crc32(repr(value).encode(), crc)
    return crc


def sealed(state: dict) -> dict:
    """The checkpoint with its checksum inside."""
    content = {key: value for key, value in state.items() if key != "checksum"}
    return content | {"checksum": fingerprint(content)}


def read_checkpoint(path: Path) -> tuple[dict, str]:
    """The content of a checkpoint and "", or {} and a sentence that says why it can't be taken."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"] if isinstance(state, dict) else type(state).__name__
        intact = found != FORMAT or sealed(state)["checksum"] == state["checksum"]
    except FileNotFoundError:
        return {}, f"there is no checkpoint {path}"
    except Exception as error:  # torch raises many kinds on damaged files
        return {}, f"{path} is not a readable checkpoint ({type(error).__name__}): take another one"
    if found != FORMAT:
        return {}, f"{path} is a checkpoint of format {found}; this script reads format {FORMAT}"
    if not intact or {*FIXED, "phase", "rows"} - state.keys():
        return {}, f"{path} is damaged: its content does not have the checksum inside; take another one"
    return state, ""


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint; one sentence and exit if it is missing, damaged or of another format."""
    state, reason = read_checkpoint(path)
    if reason:
        fail(reason)
    return state


def fill(module: nn.Module, saved: dict[str, Tensor], name: str) -> None:
    """load_state_dict; one sentence and exit where the shapes don't fit or a number isn't finite."""
    try:
        module.load_state_dict(saved)
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values()), "it is not finite"
    except Exception as error:  # torch lists every key, line by line
        fail(f"the {name} in the checkpoint can't be taken ({' '.join(str(error).split())[:200]})")


# === The policies ==========================================================================================

# what policies in one picture have in common; and on one line, or plane
TASK = ("env", "env_kwargs", "wrappers", "counts")
SIZES = ("obs_dim", "act_dim", "hidden_sizes", "flattening", "action_bounds")


class Policy(NamedTuple):
    path: Path
    state: dict  # the checkpoint
    actor: Actor

    def theta(self) -> np.ndarray:
        """All parameters (P,), which the observation statistics are not."""
        return parameters_to_vector(self.actor.parameters()).double().numpy()

    def at(self, theta: np.ndarray) -> "Policy":
        """The same with the parameters theta (P,)."""
        actor = copy.deepcopy(self.actor)
        vector_to_parameters(torch.as_tensor(theta, dtype=torch.float32), actor.parameters())
        return self._replace(actor=actor)

    def algorithm(self) -> str:
        online = f", then {self.state['online_algorithm']}" if self.state["phase"] == "online" else ""
        return self.state["algorithm"] + online

    def origin(self) -> dict:
        return {"file": self.path} | {key: self.state[key] for key in ("checksum", "seed", "phase", "step")}


def read_policy(path: Path) -> Policy:
    """The policy of a checkpoint or of a snapshot; one sentence and exit where there is none."""
    state = load_checkpoint(path)
    if missing := {"env_kwargs", "seed", "step", "algorithm", "online_algorithm"} - state.keys():
        fail(f"{path} does not say its {', '.join(sorted(missing))}: take a checkpoint of a run")
    try:
        actor = Actor(*(state[name] for name in ("obs_dim", "act_dim", "hidden_sizes")))
    except Exception as error:  # what the settings can be, a damaged file decides
        fail(f"{path} describes no networks ({type(error).__name__}: {error}): take another one")
    agent = state.get("agent", {})  # a snapshot holds the actor alone
    saved = {name.removeprefix("actor."): x for name, x in agent.items() if name.startswith("actor.")}
    fill(actor, state.get("actor", saved), f"actor of {path}")
    return Policy(path, state, actor.requires_grad_(False))


def read_run(directory: Path) -> list[Policy]:
    """What a run left of its policy, in order: snapshots and the ends of its phases."""
    paths = [*directory.glob("snapshots/[a-z]*.pt")]
    if not paths:
        fail(f"{directory} holds no snapshots: make the run with --snapshot-every N")
    found = {}
    for policy in map(read_policy, [*paths, *directory.glob("offline.pt"), *directory.glob("final.pt")]):
        found.setdefault((PHASES.index(policy.state["phase"]), policy.state["step"]), policy)
    return [found[place] for place in sorted(found)]


def check_alike(policies: list[Policy], names: tuple[str, ...] = TASK + SIZES) -> None:
    """One sentence and exit where policies differ in `names`; or, if these are all, in their statistics."""
    first = policies[0]
    for other in policies[1:]:
        both = f"{first.path} and {other.path} can't be put together"
        for name in names:
            older = {"wrappers": [], "counts": "sum of rewards"}.get(name)  # of files that don't say it
            values = [policy.state.get(name, older) for policy in (first, other)]
            if values[0] != values[1]:
                fail(f"{both}: their {name} is {values[0]} and {values[1]}")
        same = all(torch.equal(a, b) for a, b in zip(first.actor.buffers(), other.actor.buffers()))
        if names != TASK and not same:
            fail(f"{both}: their observation statistics differ, they were trained on other recordings")


# === Directions ============================================================================================


def line_points(points: int, beyond: float) -> np.ndarray:
    """x (K,): `points` from 0 to 1, both exact, and on behind both ends at the same distances."""
    more = math.ceil(round(beyond * (points - 1), 9))
    return np.arange(-more, points + more) / (points - 1)


def plane_axes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Gram-Schmidt: e_1 = (b - a) / |b - a|, e_2 = r / |r|, r = (c - a) - <c - a, e_1> e_1; (2, P)."""
    axes = []
    for d in (b - a, c - a):
        r = d
        for e in 2 * axes:  # twice: what rounding left the first time goes, too
            r = r - (r @ e) * e
        if np.linalg.norm(r) <= 1e-6 * np.linalg.norm(d):
            fail("these checkpoints lie on one line or are the same: there is no plane through them")
        axes.append(r / np.linalg.norm(r))
    return np.array(axes)


def principal_components(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (K, 2) of theta (K, P) along the two directions of largest variance; their shares (2,)."""
    u, s, _ = np.linalg.svd(theta - theta.mean(axis=0), full_matrices=False)
    return (u * s)[:, :2], s[:2] ** 2 / max((s**2).sum(), 1e-300)


def assignment(value: np.ndarray) -> np.ndarray:
    """The column of each row, (n,), for which the sum of values (n, n) is largest.

    The Hungarian method: one row after the other joins, along the cheapest path of changes to the rows that
    have a column; potentials u, v keep all reduced costs -value_ij - u_i - v_j at 0 or above.
    """
    n = len(value)
    u, v = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # of each column; column n is where a path begins
    for row in range(n):
        row_of[n], column = row, n
        least, before, free = np.full(n, np.inf), np.full(n, n), np.ones(n + 1, bool)
        while row_of[column] >= 0:  # until a column that no row has yet
            free[column] = False
            reduced = -value[row_of[column]] - u[row_of[column]] - v[:n]
            better = free[:n] & (reduced < least)
            least[better], before[better] = reduced[better], column
            column = int(np.where(free[:n], least, np.inf).argmin())
            delta = least[column]
            u[row_of[~free]] += delta
            v[~free] -= delta
            least[free[:n]] -= delta
        while column != n:  # each column on the path takes over the row of the one before
            row_of[column] = row_of[before[column]]
            column = before[column]
    return row_of[:n].argsort()


def permuted(actor: Actor, layer: int, order: np.ndarray) -> Actor:
    """The same function, with unit order[k] of a hidden layer in the place of unit k."""
    moved, order = copy.deepcopy(actor), torch.as_tensor(order)
    for parameter in (moved.net.weights[layer], moved.net.biases[layer]):
        parameter.copy_(parameter[..., order])
    moved.net.weights[layer + 1].copy_(moved.net.weights[layer + 1][:, order])
    return moved


def matched(actor: Actor, other: Actor) -> Actor:
    """`other` with its hidden units in the order that brings its theta' near to the actor's theta.

    Weight matching (Ainsworth et al. 2023, Git Re-Basin): |theta - theta'| is smallest where <theta, theta'>
    is largest, an assignment in one layer while the others are held; layer by layer until none gains.
    There are two starts, `other` as it is and matched from the input on by incoming weights alone (this finds
    every permutation of a copy); the better result counts.
    """

    def value(other: Actor, layer: int, parts: int = 3) -> np.ndarray:
        """Inner products (H, H) of the units' incoming weights, biases and outgoing weights."""
        nets = [(net.weights[layer][0].T, net.biases[layer][0].T, net.weights[layer + 1][0])[:parts]
                for net in (actor.net, other.net)]  # fmt: skip
        ours, theirs = (torch.cat(net, dim=1).double() for net in nets)
        return (ours @ theirs.T).numpy()

    start, results = other, []
    for layer in range(len(other.net.weights) - 1):
        start = permuted(start, layer, assignment(value(start, layer, parts=2)))
    for result in (other, start):
        layers = [*range(len(other.net.weights) - 1)]
        while layers:  # that may gain
            layer = layers.pop(0)
            products = value(result, layer)
            order = assignment(products)
            gain = products[range(len(order)), order].sum() - products.trace()
            if gain > 1e-9 * np.abs(products).sum():
                result = permuted(result, layer, order)
                layers += [k for k in (layer - 1, layer + 1) if 0 <= k < len(other.net.weights) - 1]
        results.append(result)
    return max(results, key=lambda result: Policy("", {}, actor).theta() @ Policy("", {}, result).theta())


def align_policies(first: Policy, others: list[Policy]) -> list[Policy]:
    """The policies with their hidden units matched to the first's; lines say how much nearer they are."""
    moved = [other._replace(actor=matched(first.actor, other.actor)) for other in others]
    for other, new in zip(others, moved):
        before, after = (np.linalg.norm(policy.theta() - first.theta()) for policy in (other, new))
        print(f"aligned {other.path}: distance {after:.4g}, {before:.4g} before")
    return moved


# === Evaluations ===========================================================================================

ENGINES = ("torch", "gymnasium", "mujoco")  # another version may play another episode


@lru_cache
def environments(env: str, settings: str, episodes: int) -> list[gym.Env]:
    """The environments of this process, one an episode; their wrappers and arguments as JSON."""
    return [make_env(env, **json.loads(settings)) for _ in range(episodes)]


def signature(actor: Actor, setting: str) -> str:
    """Name of an evaluation: a checksum of all that its returns follow from."""
    digest = hashlib.sha256(setting.encode())
    for name, tensor in actor.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def cache_line(key: str, returns: list[float]) -> str:
    """A line of evaluations.jsonl, its own CRC-32 in front."""
    record = json.dumps([key, returns])
    return f"{zlib.crc32(record.encode()):08x} {record}\n"


def read_cache(path: Path) -> dict[str, list[float]]:
    """Every episode's return, by signature; damaged lines go, with a note."""
    known, lines, good = {}, path.read_bytes().splitlines() if path.exists() else [], 0
    for line in lines:  # two commands at once may have played the same policy: a key may be there twice
        checksum, _, record = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(record):
            good += 1
            key, known[key] = json.loads(record)
    if good < len(lines):
        print(f"note: {path} is damaged: {good} of its {len(lines)} evaluations are still good")
        text = "".join(cache_line(*item) for item in known.items())
        write_atomically(path, lambda temporary: temporary.write_text(text))
    return known


def play(bench: tuple, packed: bytes) -> tuple[list[float], int]:
    """Every episode's return of a pickled policy, and the environment steps they took."""
    *environment, counts = bench
    rewards = evaluate(pickle.loads(packed), environments(*environment), "cpu")
    returns = [float(r[-1] if counts == "last reward" else r.sum()) for r in rewards]
    return returns, sum(map(len, rewards))


def begin_worker() -> None:
    """Leaves Ctrl-C to the process that started this one, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def played(jobs: dict[str, Actor], bench: tuple, workers: int) -> Iterator[tuple[str, list[float], int]]:
    """Plays all jobs in one or several processes; yields key, returns and steps as they come."""
    packed = {key: pickle.dumps(actor) for key, actor in jobs.items()}  # no file handle a tensor
    if workers == 1:
        yield from ((key, *play(bench, actor)) for key, actor in packed.items())
        return
    # a forked process has libraries and environments at once
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, begin_worker)
    try:
        futures = {pool.submit(play, bench, actor): key for key, actor in packed.items()}
        yield from ((futures[future], *future.result()) for future in as_completed(futures))
    except BrokenProcessPool:
        fail("a process was killed from outside (out of memory?): give the same command with --workers 1")
    except BaseException:  # a stop does not wait for what is under way
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def evaluate_all(policies: list[Policy], args: Common) -> np.ndarray:
    """Returns (K, E) of K policies in E episodes; what --out holds already is not played again."""
    state, path = policies[0].state, args.out / "evaluations.jsonl"
    settings = json.dumps(dict(wrappers=state.get("wrappers", [])) | state["env_kwargs"], sort_keys=True)
    bench = (state["env"], settings, args.episodes, state.get("counts", "sum of rewards"))
    setting = json.dumps([*bench, *map(version, ENGINES)])
    keys, known = [signature(policy.actor, setting) for policy in policies], read_cache(path)
    jobs = {key: policy.actor for key, policy in zip(keys, policies) if key not in known}
    count, workers = len(set(keys)), min(args.workers, len(jobs))
    print(f"{count} policies, {args.episodes} episodes each; {count - len(jobs)} of them are in {path}")
    if not jobs:
        return np.array([known[key] for key in keys])
    try:
        environments(*bench[:3])
    except Exception as error:  # an environment may come from any package
        fail(f"the environment {state['env']} can't be made ({error}): install its package")
    began, total = time.monotonic(), 0
    bar = tqdm(total=len(jobs), unit="policy", dynamic_ncols=True, disable=None)
    try:
        with open(path, "a") as file, bar, closing(played(jobs, bench, workers)) as results:
            for key, returns, steps in results:
                known[key], total = returns, total + steps
                print(cache_line(key, returns), end="", file=file, flush=True)
                bar.update()
                bar.set_postfix_str(f"return {np.mean(returns):.1f}")
    except KeyboardInterrupt as stopped:
        done = sum(key in known for key in jobs)
        print(f"stopped; {done} of {len(jobs)} evaluations are kept: give the same command to go on")
        raise SystemExit(128 + (stopped.args or [signal.SIGINT])[0]) from None
    rate = total / (time.monotonic() - began) / workers
    print(f"{total:,} environment steps, {rate:,.0f} a second and process; processes: {workers}")
    return np.array([known[key] for key in keys])


def score_scale(policies: list[Policy]) -> tuple[float, float, str]:
    """Slope and intercept of the normalised score in the return, as the checkpoints' own evaluations have it.

    (1, 0, "return") where they don't say: fewer than two evaluations, or several reference scores.
    """
    rows = [row for p in policies for row in p.state["rows"] if {"return_mean", "score"} <= row.keys()]
    pairs = [(row["return_mean"], row["score"]) for row in rows] or [(0, 0)]
    (low, worst), (high, best) = min(pairs), max(pairs)
    if high - low > 1e-3:
        slope = (best - worst) / (high - low)
        if all(abs(worst + slope * (r - low) - score) < 1e-3 for r, score in pairs):
            return slope, worst - slope * low, "normalised score"
    return 1.0, 0.0, "return"


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the last axis; NaN of a single value."""
    count = values.shape[-1]
    return values.std(axis=-1, ddof=1) / count**0.5 if count > 1 else values.mean(axis=-1) * math.nan


def valley(x: np.ndarray, scores: np.ndarray) -> tuple[float, float, int]:
    """Depth min(ends) - min(path), its standard error, index of the lowest point; x (K,), scores (K, E).

    The path is x in [0, 1]. Episode i starts alike for every policy: the depth is the mean over episodes of
    the difference between lower end and lowest point, and its error that of these differences, with the two
    points held. (The lowest of many noisy means lies a little too low: a depth within two errors is none.)
    """
    path, means = np.flatnonzero((x >= 0) & (x <= 1)), scores.mean(axis=1)
    end, low = min(path[0], path[-1], key=lambda k: means[k]), path[means[path].argmin()]
    differences = scores[end] - scores[low]  # (E,)
    return float(differences.mean()), float(standard_error(differences)), int(low)


# === Pictures ==============================================================================================


def new_figure(*shape: int, figsize: tuple[float, float], **options):
    """A figure and its axes."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def save(args: Common, name: str, figure, rows: list[dict]) -> None:
    """NAME.png and NAME.csv; a row leaves empty what it doesn't have."""
    names = dict.fromkeys(key for row in rows for key in row)

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    figure.legend(loc="outside lower center", fontsize=9)
    write_atomically(args.out / f"{name}.png", partial(figure.savefig, dpi=120, format="png"))
    write_atomically(args.out / f"{name}.csv", write)
    print(f"picture: {args.out / name}.png\nnumbers: {args.out / name}.csv")


def measured(returns: np.ndarray, scores: np.ndarray) -> dict:
    """Columns of the csv for an evaluation; both (E,)."""
    means = dict(return_mean=returns.mean(), return_error=standard_error(returns),
                 score_mean=scores.mean(), score_error=standard_error(scores))  # fmt: skip
    return means | {f"return_{i}": value for i, value in enumerate(returns)}


def amount(value: float, error: float) -> str:
    """12.3 ± 0.4"""
    return f"{value:.1f}" if math.isnan(error) else f"{value:.1f} ± {error:.1f}"


def draw_line(args: Line) -> None:
    """line.png and line.csv."""
    policies = [read_policy(path) for path in args.checkpoints]
    check_alike(policies, TASK)
    pairs, x, moved = [*zip(policies[::2], policies[1::2])], line_points(args.points, args.beyond), []
    for pair in pairs:
        check_alike(pair)
        a, b = (pair[0], *align_policies(pair[0], pair[1:])) if args.align else pair
        # theta(x) = (1 - x) theta_offline + x theta_online
        moved += [a.at((1 - t) * a.theta() + t * b.theta()) for t in x]
    returns = evaluate_all(moved, args).reshape(len(pairs), len(x), -1)
    slope, intercept, unit = score_scale(policies)
    scores = intercept + slope * returns  # (pairs, K, E)
    labels = args.labels or [b.algorithm() for _, b in pairs]
    figure, axes = new_figure(figsize=(8, 5))
    rows = []
    print(f"valley depth in {unit}, ± over episodes; of several pairs over the pairs")
    for number, label in enumerate(dict.fromkeys(labels)):
        of, depths, color = [k for k, name in enumerate(labels) if name == label], [], f"C{number % 10}"
        for (a, b), s, r in ((pairs[k], scores[k], returns[k]) for k in of):
            depth, error, low = valley(x, s)
            first, last, least = s[x == 0].mean(), s[x == 1].mean(), s[low].mean()
            print(f"{label}, seed {b.state['seed']}: ends {first:.1f} and {last:.1f}, lowest {least:.1f} "
                  f"at x = {x[low]:.2f}, valley depth {amount(depth, error)}")  # fmt: skip
            depths.append(depth)
            pair = dict(label=label, aligned=args.align, depth=depth, depth_error=error, unit=unit)
            pair |= {f"{end}_{key}": value for end, policy in (("offline", a), ("online", b))
                     for key, value in policy.origin().items()}  # fmt: skip
            rows += [pair | {"x": t} | measured(r[k], s[k]) for k, t in enumerate(x)]
        curves = scores[of].mean(axis=2)  # (pairs, K)
        mean, band = curves.mean(axis=0), standard_error(curves.T if len(of) > 1 else scores[of[0]])
        if len(of) > 1:
            error = float(standard_error(np.array(depths)))
            axes.plot(x, curves.T, color=color, lw=0.8, alpha=0.5)
            print(f"{label}, {len(of)} pairs: valley depth {amount(np.mean(depths), error)}")
        seeds = ", ".join(str(pairs[k][1].state["seed"]) for k in of)
        name = f"{label} (seed {seeds}): valley {amount(np.mean(depths), error)}"
        axes.plot(x, mean, ".-", color=color, lw=2, label=name)
        axes.fill_between(x, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    for end in (0, 1):
        axes.axvline(end, color="black", ls="--", lw=1)
    axes.set_xlabel("x, on the straight line from the first checkpoint (0) to the second (1)")
    axes.set_ylabel(f"{unit}, mean of {args.episodes} episodes")
    axes.set_title(policies[0].state["env_id"])
    save(args, "line", figure, rows)


def draw_plane(args: Plane) -> None:
    """plane.png and plane.csv."""
    marked, way = [read_policy(path) for path in args.checkpoints], read_run(args.path) if args.path else []
    check_alike(marked + way)
    first = marked[0]
    if args.align:
        marked = [first, *align_policies(first, marked[1:])]
        way = [policy._replace(actor=matched(first.actor, policy.actor)) for policy in way]
    a, b, *c = (policy.theta() for policy in marked)
    random = np.random.default_rng(args.seed).standard_normal(len(a))
    axes = plane_axes(a, b, c[0] if c else a + random)  # (2, P)
    places = [[axes @ (policy.theta() - a) for policy in policies] for policies in (marked, way)]
    off = [np.linalg.norm(p.theta() - a - at @ axes) for p, at in zip(way, places[1])]
    # along a random direction as far as from A to B, half of it to each side
    half = [] if c else [(0, np.linalg.norm(b - a) / 2), (0, -np.linalg.norm(b - a) / 2)]
    low, high = (function([*places[0], *places[1], *half], axis=0) for function in (np.min, np.max))
    edges = low - args.margin * (high - low), high + args.margin * (high - low)
    u, v = np.linspace(*edges, args.grid).T
    grid = [(x, y) for y in v for x in u]
    # theta(u, v) = theta_A + u e_1 + v e_2
    returns = evaluate_all(marked + [first.at(a + np.array(at) @ axes) for at in grid], args)
    slope, intercept, unit = score_scale(marked + way)
    scores = intercept + slope * returns  # (K, E)

    columns = [*map(measured, returns, scores)]
    rows = [{"kind": "checkpoint", "u": at[0], "v": at[1]} | policy.origin() | own
            for policy, at, own in zip(marked, places[0], columns)]  # fmt: skip
    rows += [{"kind": "grid", "u": at[0], "v": at[1]} | own for at, own in zip(grid, columns[len(marked) :])]
    rows += [{"kind": "path", "u": at[0], "v": at[1], "off_plane": distance} | policy.origin()
             for policy, at, distance in zip(way, places[1], off)]  # fmt: skip
    figure, ax = new_figure(figsize=(8, 6.5))
    heights = scores[len(marked) :].mean(axis=1).reshape(args.grid, args.grid)
    figure.colorbar(ax.contourf(u, v, heights, levels=20), label=f"{unit}, mean of {args.episodes} episodes")
    if way:
        name = f"{args.path.name}: at most {max(off):.3g} off the plane"
        ax.plot(*np.transpose(places[1]), ".-", color="tab:red", mec="white", ms=8, label=name)
    for letter, policy, at, s in zip("ABC", marked, places[0], scores):
        state, height = policy.state, amount(s.mean(), standard_error(s))
        name = (
            f"{policy.algorithm()} (seed {state['seed']}), {state['phase']} step {state['step']:,}: {height}"
        )
        ax.plot(*at, "o", ms=15, color="white", mec="black")
        ax.annotate(letter, at, ha="center", va="center", weight="bold", fontsize=9)
        ax.plot([], [], " ", marker=f"${letter}$", ms=8, color="black", label=name)
        print(f"{letter}: {name}")
    ax.set_xlabel("u, along B - A (distance in parameter space)")
    ax.set_ylabel("v, along C - A, orthogonal to u" if c else f"v, a random direction (seed {args.seed})")
    ax.set_title(first.state["env_id"])
    save(args, "plane", figure, rows)


def draw_way(args: Way) -> None:
    """path.png and path.csv."""
    runs = [read_run(directory) for directory in args.runs]
    policies = [policy for run in runs for policy in run]
    check_alike(policies)
    if len(policies) < 4:
        fail(f"{len(policies)} policies make no picture: make the run with a smaller --snapshot-every")
    theta = np.array([policy.theta() for policy in policies])  # (K, P)
    at, shares = principal_components(theta)
    panels = {f"principal components ({shares[0]:.0%} and {shares[1]:.0%} of the variance)": at}
    try:
        from sklearn.manifold import TSNE

        tsne = TSNE(perplexity=min(args.perplexity, len(theta) / 3), init="pca", random_state=args.seed)
        panels[f"t-SNE (perplexity {tsne.perplexity:.3g})"] = tsne.fit_transform(theta)
    except ImportError as error:
        print(f"note: t-SNE is left out, it needs scikit-learn ({error}): pip install scikit-learn")
    returns = evaluate_all(policies, args)
    slope, intercept, unit = score_scale(policies)
    scores = intercept + slope * returns  # (K, E)

    figure, grid = new_figure(1, len(panels), figsize=(7 * len(panels), 6), squeeze=False)
    for ax, (name, at) in zip(grid[0], panels.items()):
        rest = iter(at)
        for number, (directory, run) in enumerate(zip(args.runs, runs)):
            way, color = [next(rest) for _ in run], f"C{number % 10}"
            label = directory.name if ax is grid[0, 0] else None
            ax.plot(*np.transpose(way), color=color, label=label)
            arrow = dict(arrowstyle="-|>", color=color, mutation_scale=18, shrinkA=0, shrinkB=0)
            for k in {len(way) * quarter // 4 for quarter in (1, 2, 3)} - {len(way) - 1}:
                ax.annotate("", way[k + 1], way[k], arrowprops=arrow, zorder=4)
        dots = ax.scatter(*at.T, c=scores.mean(axis=1), s=30, edgecolors="black", linewidths=0.5, zorder=3)
        ax.set_title(name)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(dots, ax=grid, label=f"{unit}, mean of {args.episodes} episodes")
    figure.suptitle(policies[0].state["env_id"])
    columns = dict(zip(("pc_1", "pc_2", "tsne_1", "tsne_2"), np.concatenate([*panels.values()], axis=1).T))
    rows = [policy.origin() | {name: column[i] for name, column in columns.items()}
            | measured(returns[i], scores[i]) for i, policy in enumerate(policies)]  # fmt: skip
    save(args, "path", figure, rows)


# === Main ==================================================================================================


def read_arguments() -> Line | Plane | Way:
    kinds = dict(line=Line, plane=Plane, path=Way)
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
    args = tyro.cli(Union[tuple(named)], description=__doc__)  # noqa: UP007 (three made in a line)
    least = dict(episodes=1, workers=1, points=2, beyond=0, grid=2, margin=0, perplexity=1)
    for name, low in least.items():
        if getattr(args, name, low) < low:
            fail(f"--{name} {getattr(args, name)} is out of range: it has to be at least {low}")
    count = len(getattr(args, "checkpoints", ()))
    if isinstance(args, Line) and (count == 0 or count % 2):
        fail(f"a line goes from one checkpoint to another: {count} are not pairs")
    if isinstance(args, Line) and len(args.labels) not in (0, count // 2):
        fail(f"--labels names {len(args.labels)} pairs, the checkpoints are {count // 2}")
    if isinstance(args, Plane) and count not in (2, 3):
        fail(f"a plane goes through 3 checkpoints, or through 2 along a random direction, not {count}")
    return args


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # as the scripts evaluate
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        {Line: draw_line, Plane: draw_plane, Way: draw_way}[type(args)](args)
    except OSError as error:
        fail(f"{error}: if the disk is full, free some space and give the same command again; what was "
             f"evaluated is kept in {args.out}")  # fmt: skip


def stop(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except KeyboardInterrupt as stopped:
        raise SystemExit(128 + (stopped.args or [signal.SIGINT])[0]) from None
