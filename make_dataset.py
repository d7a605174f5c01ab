"""Record a replay dataset in Minari's format, or bring D4RL's files and one's own episodes into it.

    python make_dataset.py record --env-id Hopper-v5 --dataset-id me/hopper/medium-replay-v0
    python make_dataset.py d4rl hopper-medium-replay    # downloads the file, or takes it with --file
    python make_dataset.py numpy episodes.npz --env-id my_package:MyEnv-v0 --dataset-id me/myenv/first-v0 \
        --ref-min-score 0 --ref-max-score 100
    python make_dataset.py awac door2_sparse.npy door_bc_sparse4.npy

`record`: SAC (Haarnoja et al. 2018) learns a Gymnasium environment from scratch. Every transition it collects
is kept, from the first random action to the first evaluation (20 fixed-seed episodes, deterministic policy)
whose normalised score, 100 (R - R_random) / (R_expert - R_random), lies in [33, 60]. That is what
"medium-replay" means on this shelf. The others are described in `python make_dataset.py COMMAND --help`.

The recordings that ship in `datasets/` were made by exactly these commands (CPU, one thread):

    OMP_NUM_THREADS=1 python make_dataset.py record --env-id Hopper-v5 \
        --dataset-id smac/hopper/medium-replay-v0 --min-steps 100000 --max-steps 150000 --seed 1
    OMP_NUM_THREADS=1 python make_dataset.py record --env-id Pendulum-v1 \
        --dataset-id smac/pendulum/medium-replay-v0 --max-steps 30000 --hidden-sizes 64 64 --batch-size 64 \
        --actor-lr 3e-5 --critic-lr 1e-4 --random-steps 2000 --eval-every 200 --seed 1
    OMP_NUM_THREADS=1 python make_dataset.py record --env-id Walker2d-v5 \
        --dataset-id smac/walker2d/medium-replay-v0 --critic-layer-norm --hidden-sizes 128 128 \
        --batch-size 128 --critic-lr 1e-3 --min-steps 100000 --max-steps 400000 --seed 1

Actions of environments whose bounds are not [-1, 1] are rescaled at the boundary (Gymnasium's RescaleAction):
the recording and everything trained on it live in [-1, 1]. Observations are stored as float32.
"""

import copy
import difflib
import errno
import hashlib
import http.client
import importlib
import math
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.registration import EnvSpec
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
    critic_layer_norm: bool = False
    """LayerNorm before every activation of the critics"""
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


@dataclass
class D4rlArgs:
    """Bring an original D4RL file into Minari's format, as d4rl-original/ENVIRONMENT/DATA."""

    name: tyro.conf.Positional[str]
    """D4RL's name, with or without its version: hopper-medium-replay-v2, kitchen-mixed, pen-human"""
    file: Path | None = None
    """the file if it is on this machine; default: it is downloaded from where D4RL published it"""
    verify: bool = True
    """compare the file with the published SHA-256; --no-verify imports another file of the same layout"""
    settle: bool = False
    """settle contradictions instead of refusing them: a row that is terminal and timeout at once is a
    termination, and an episode is cut (a truncation) where next_observations isn't the next observation"""
    out: Path | None = None
    """folder that receives the dataset; default: Minari's, where the scripts look"""


@dataclass
class NumpyArgs:
    """Bring one's own episodes into Minari's format.

    Every FILE is an .npz (numpy.savez) of N transitions of one or E episodes, one after the other:
    observations (N, O), actions (N, A), rewards (N,), terminations (N,), truncations (N,): row t is what
    was seen, done and got, and whether the environment ended the episode by itself or time (or anything
    else) cut it; final_observations (E, O), or (O,): what was seen behind each episode's last action.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """.npz files"""
    env_id: str
    """environment of the episodes: Gymnasium id, module:Id-v0 (which the module registers) or module:Class"""
    dataset_id: str
    """Minari id of the result, e.g. me/myenv/first-v0"""
    ref_min_score: float
    """return of a random policy (score 0)"""
    ref_max_score: float
    """return of an expert policy (score 100)"""
    max_episode_steps: int | None = None
    """time limit of the environment; default: the registered one"""
    out: Path | None = None
    """folder that receives the dataset; default: Minari's, where the scripts look"""


@dataclass
class AwacArgs:
    """Bring the "binary" adroit data of AWAC (pen, door, relocate) into Minari's format, as Cal-QL reads it.

    Trajectories without a success are dropped, the others cut behind their last one; the reward is
    success - 1, and every success terminates: what follows one within a trajectory is an episode of its own.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """demonstrations and rollouts of one task, e.g. door2_sparse.npy door_bc_sparse4.npy"""
    dataset_id: str = ""
    """Minari id of the result; default: awac/TASK/binary-v0"""
    settle: bool = False
    """cut an episode where next_observations isn't the next observation, instead of refusing the file"""
    out: Path | None = None
    """folder that receives the dataset; default: Minari's, where the scripts look"""


# === Tasks and data ========================================================================================

# Return of a random policy, return of an expert: what the normalised scores 0 and 100 stand for.
REFERENCE_SCORES = {
    "Hopper-v5": (-20.272305, 3234.3),  # D4RL (d4rl/infos.py)
    "Walker2d-v5": (1.629008, 4592.3),  # the same
    "Pendulum-v1": (-1230.0, -150.0),  # random: mean of 1,000 episodes; expert: SAC, 10,000 steps or more
}

ADROIT = "gymnasium_robotics.envs.adroit_hand.adroit_"
ENTRY_POINTS = {  # as gymnasium-robotics registers them: to import data that package isn't needed
    "AdroitHandDoor-v1": ADROIT + "door:AdroitHandDoorEnv",
    "AdroitHandPen-v1": ADROIT + "pen:AdroitHandPenEnv",
    "AdroitHandRelocate-v1": ADROIT + "relocate:AdroitHandRelocateEnv",
    "FrankaKitchen-v1": "gymnasium_robotics.envs.franka_kitchen:KitchenEnv",
}


class Environment(NamedTuple):
    """What data was recorded in: a Gymnasium environment, and what it takes to be the one of the data.

    The training scripts know the wrappers by name. HealthyRewardAtFall: + 1.0 on a terminated step;
    BinaryReward: reward success - 1, success terminates; LatchedKitchen: the reward counts the tasks ever
    completed in the episode, observations are positions of robot and objects.
    """

    env_id: str
    kwargs: dict
    horizon: int
    sizes: tuple[int, int]  # of an observation and an action
    references: tuple[float, float]  # returns that stand for the scores 0 and 100
    wrappers: tuple[str, ...] = ()
    reward: tuple[float, float] = (1.0, 0.0)  # scale and bias for the losses
    last_reward: bool = False  # an episode counts its last reward, not their sum
    note: str = ""

    def spec(self) -> EnvSpec:
        """The Gymnasium environment below the wrappers; its package need not be installed."""
        entry_point = ENTRY_POINTS.get(self.env_id) or gym.spec(self.env_id).entry_point
        return EnvSpec(self.env_id, entry_point, max_episode_steps=self.horizon, kwargs=self.kwargs)


def kitchen(*tasks: str) -> Environment:
    """D4RL's kitchen: four tasks, noise 0.1. Reward of the losses: tasks - 4 (WSRL)."""
    kwargs = dict(tasks_to_complete=list(tasks), object_noise_ratio=0.1, robot_noise_ratio=0.1)
    kwargs |= dict(terminate_on_tasks_completed=True, remove_task_when_completed=False)
    note = (
        "observations are the first 30 of D4RL's 60, positions of robot (9) and objects (21), which are "
        "[0:9] and [18:39] of FrankaKitchen-v1's; the goal behind them is left out; a reward counts the "
        "tasks done up to the row's own observation"
    )
    return Environment("FrankaKitchen-v1", kwargs, 280, (30, 9), (0.0, 4.0), ("LatchedKitchen",), (1.0, -4.0),
                       True, note)  # fmt: skip


# Environments and reference scores of D4RL (d4rl/infos.py). Its Hopper and Walker2d (Gym's v2) give the
# healthy reward on the falling step too, which v5 doesn't, and Walker2d's feet have walker2d.xml's friction.
FALL = ("HealthyRewardAtFall",)
SIGN = "gymnasium-robotics 1.4 adds 0.1 |palm - object| to the reward where D4RL's environment subtracts it"
DROP = "D4RL's environment terminates when the pen is dropped, gymnasium-robotics' doesn't"
D4RL_ENVIRONMENTS = {
    "hopper": Environment("Hopper-v5", {}, 1000, (11, 3), (-20.272305, 3234.3), FALL),
    "walker2d": Environment("Walker2d-v5", {"xml_file": "walker2d.xml"}, 1000, (17, 6),
                            (1.629008, 4592.3), FALL),
    "halfcheetah": Environment("HalfCheetah-v5", {}, 1000, (17, 6), (-280.178953, 12135.0)),
    "door": Environment("AdroitHandDoor-v1", {"reward_type": "dense"}, 200, (39, 28),
                        (-56.512833, 2880.5693087298737), note=SIGN),
    "pen": Environment("AdroitHandPen-v1", {"reward_type": "dense"}, 100, (45, 24),
                       (96.262799, 3076.8331017826877), note=DROP),
    "kitchen-complete": kitchen("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial": kitchen("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed": kitchen("microwave", "kettle", "bottom burner", "light switch"),
}  # fmt: skip

# AWAC's sparse tasks. An episode counts its last reward, 0 for a success: the score is the rate of success.
BINARY = dict(references=(-1.0, 0.0), wrappers=("BinaryReward",), last_reward=True,
              reward=(10.0, 5.0))  # Cal-QL's 10 r + 5  # fmt: skip
AWAC_ENVIRONMENTS = {
    "door": Environment("AdroitHandDoor-v1", {}, 200, (39, 28), **BINARY),
    "pen": Environment("AdroitHandPen-v1", {}, 100, (45, 24), **BINARY),
    "relocate": Environment("AdroitHandRelocate-v1", {}, 200, (39, 30), **BINARY),
}

D4RL_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # d4rl/infos.py
D4RL_MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # some files there are cut off
# SHA-256 and bytes of D4RL's files (tensorflow_datasets/d4rl/*/checksums.tsv)
D4RL_SUMS = """
63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054 152525345 hopper-random-v2
5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0 152756557 hopper-medium-v2
e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b 75854457 hopper-medium-replay-v2
9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26 304537315 hopper-medium-expert-v2
56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e 187998921 hopper-full-replay-v2
01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b 152427435 hopper-expert-v2
4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa 216109364 walker2d-random-v2
cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda 232254996 walker2d-medium-v2
e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db 86323963 walker2d-medium-replay-v2
6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04 462197079 walker2d-medium-expert-v2
f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a 285115514 walker2d-full-replay-v2
2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a 230567195 walker2d-expert-v2
25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba 237338037 halfcheetah-random-v2
41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0 237727262 halfcheetah-medium-v2
48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683 59448533 halfcheetah-medium-replay-v2
015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06 474567252 halfcheetah-medium-expert-v2
27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0 291381762 halfcheetah-full-replay-v2
d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f 237464597 halfcheetah-expert-v2
f9691288c3ddf2b4e7b31bdae0d8444b80ba035515495f8a902d60c43ee09370 3121206 door-human-v1
1f6a60ecc4d2a2e5c02f41dd3412be61bb265a33dcf120ceee9e9682d4fe4d48 294356136 door-cloned-v1
66df4cd4e0a1e0b72ea72653ce088e29ecbfa99bac3cd2b52e64092e9a0aaab4 536056678 door-expert-v1
209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f 2040573 pen-human-v1
6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22 155074191 pen-cloned-v1
3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374 262040663 pen-expert-v1
"""
D4RL_KITCHEN = {  # published without a sum
    "kitchen-complete-v0": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-partial-v0": "kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
}


def minari_root() -> Path:
    """Where Minari keeps datasets: $MINARI_DATASETS_PATH or its home folder."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def cache_folder() -> Path:
    """Where the scripts keep what can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smac"


class Published(NamedTuple):
    """A file of D4RL: path below the address, bytes and SHA-256 where they are known."""

    path: str
    size: int | None = None
    sha256: str | None = None


def d4rl_files() -> dict[str, Published]:
    """Every file that can be imported, by D4RL's name of the task."""
    files = {name: Published(f"kitchen/{file}") for name, file in D4RL_KITCHEN.items()}
    for sha256, size, name in map(str.split, D4RL_SUMS.strip().splitlines()):
        mujoco = f"gym_mujoco_v2/{name[:-3].replace('-', '_')}-v2.hdf5"
        path = mujoco if name.endswith("-v2") else f"hand_dapg_v1/{name}.hdf5"
        files[name] = Published(path, int(size), sha256)
    return files


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


def free_folder(out: Path, dataset_id: str) -> Path:
    """Where a new dataset of this id goes; one sentence and exit if the id is malformed or taken."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        fail(str(error))
    if (out / dataset_id).exists():
        fail(f"{out / dataset_id} exists already: remove it or choose another --dataset-id or --out")
    return out / dataset_id


@contextmanager
def new_dataset(out: Path, dataset_id: str) -> Iterator[Path]:
    """A temporary Minari root; the dataset written there moves to `out` in the end: complete or not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as root:
            yield Path(root)
            for namespace in reversed(Path(dataset_id).parents[:-1]):
                (out / namespace).mkdir(exist_ok=True)
                (out / namespace / "namespace_metadata.json").write_text("{}")
            os.replace(Path(root) / dataset_id, out / dataset_id)
    except OSError as error:
        fail(f"the dataset can't be written to {out} ({error}), nothing is left: make room or choose --out")


# === The phases ============================================================================================


def flat_env(env_id: str | EnvSpec) -> gym.Env:
    """The environment; one sentence and exit where its spaces aren't flat boxes or it has no time limit."""
    try:
        env = gym.make(env_id)
    except Exception as error:  # an environment may come from any package
        fail(f"the environment {env_id} can't be made ({error})")
    spaces = (env.observation_space, env.action_space)
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not flat or not env.action_space.is_bounded():
        fail(f"flat Box observations and bounded flat Box actions are needed; {env_id} has {spaces}")
    if env.spec.max_episode_steps is None:
        fail(f"{env_id} has no time limit; register it with max_episode_steps")
    return env


def recordable_env(env_id: str) -> gym.Env:
    """The environment with actions in [-1, 1]; one sentence and exit where it can't be recorded."""
    env = flat_env(env_id)
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
    agent = Agent(obs_dim, act_dim, args.hidden_sizes, critic_layer_norm=args.critic_layer_norm)
    agent.to(args.device)
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


def describe(episodes: list[dict], last_reward: bool = False) -> dict[str, float]:
    """What a reader wants to know of a recording: sizes, returns, and how the episodes ended."""
    returns = np.array([e["rewards"][-1] if last_reward else e["rewards"].sum() for e in episodes])
    return {
        "steps": sum(len(episode["rewards"]) for episode in episodes),
        "episodes": len(episodes),
        "return_mean": round(float(returns.mean()), 2),
        "return_90th_percentile": round(float(np.percentile(returns, 90)), 2),
        "return_max": round(float(returns.max()), 2),
        "terminations": sum(int(episode["terminations"][-1]) for episode in episodes),
        "truncations": sum(int(episode["truncations"][-1]) for episode in episodes),
    }


def check_references(references: tuple[float, float]) -> None:
    """The returns of scores 0 and 100 have to be numbers in this order."""
    low, high = references
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        fail(f"--ref-min-score {low} has to be below --ref-max-score {high}: they are the scores 0 and 100")


def record(args: RecordArgs) -> None:
    """Train SAC on a Gymnasium environment and record its replay as a Minari dataset."""
    import minari
    from minari.data_collector import EpisodeBuffer

    table = REFERENCE_SCORES.get(args.env_id, (None, None))
    references = tuple(t if g is None else g for g, t in zip((args.ref_min_score, args.ref_max_score), table))
    if None in references:
        fail(f"no reference scores are known for {args.env_id}: give --ref-min-score and --ref-max-score")
    check_references(references)
    for name in ("eval_every", "eval_episodes", "max_steps", "batch_size", "hidden_sizes"):
        if np.min(getattr(args, name), initial=1) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: it has to be at least 1")
    target = free_folder(args.out, args.dataset_id)
    env = recordable_env(args.env_id)
    started = code_version()  # of the code that runs, whatever happens to the file meanwhile
    episodes, final_scores = collect(args, references)

    statistics = describe(episodes)
    with new_dataset(args.out, args.dataset_id) as root:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
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
        compress(root / args.dataset_id / "data" / "main_data.hdf5")
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        dataset.storage.update_metadata({
            "horizon": env.spec.max_episode_steps, "reward_scale": 1.0, "reward_bias": 0.0, "seed": args.seed,
            "code_version": started, "record_settings": settings, "statistics": statistics,
            "data_checksum": dataset_checksum(root / args.dataset_id),
            "final_scores": final_scores, "dataset_size": round(dataset.storage.get_size(), 1)})  # fmt: skip

    for key, value in statistics.items():
        print(f"{key:<24}{value:>14,}")
    print(f"{'final normalised score':<24}{np.mean(final_scores):>14.1f}")
    print("sha256 of main_data.hdf5", dataset_checksum(target))
    print(f"written to {target}")


# === Layouts: a file becomes rows ==========================================================================

# Rows are transitions as arrays (T, ...) by name: observations, actions, rewards, next_observations,
# terminations, truncations. A reader raises ValueError where a file isn't what it should be, and says in
# `notes` what it did to the rows.


def flags(values, name: str) -> np.ndarray:
    """0 or 1, of any dtype and shape (T,) or (T, 1), as booleans (T,)."""
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} holds other values than 0 and 1")
    return np.reshape(values, -1).astype(bool)


def columns_of(file, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named columns of an HDF5 or .npz file, all of one length (final_observations excepted)."""
    if missing := [name for name in names if name not in file]:
        raise ValueError(f"it has no {', '.join(missing)}")
    columns = {name: file[name][()] for name in names}
    lengths = {
        name: len(np.atleast_1d(column)) for name, column in columns.items() if name != "final_observations"
    }
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"its columns have lengths {lengths}")
    return columns


def cut_at_jumps(rows: dict, settle: bool, notes: list[str]) -> None:
    """Within an episode a successor is the next row's observation; where not, settling ends the episode."""
    ends = rows["terminations"] | rows["truncations"]
    jumps = (rows["next_observations"][:-1] != rows["observations"][1:]).any(axis=1) & ~ends[:-1]
    if jumps.any() and not settle:
        t, count = np.argmax(jumps), f"{jumps.sum():,} such rows"
        raise ValueError(f"within an episode next_observations[{t}] is not observations[{t + 1}] ({count}); "
                         "--settle ends the episode there, as a truncation")  # fmt: skip
    rows["truncations"][:-1] |= jumps
    if jumps.any():
        notes.append(f"{jumps.sum():,} episodes cut where next_observations isn't the next observation")


def with_successors(rows: dict, ends: np.ndarray, notes: list[str]) -> dict:
    """next_observations of a file that has none, from the row behind. `ends` (T,): last rows of the episodes.

    The last row of an episode that time (or the file's end) cut has no successor and is dropped: the episode
    ends one row earlier. A terminated row stays, as y = r needs none; its own observation takes the place.
    """
    successors = np.concatenate([rows["observations"][1:], rows["observations"][-1:]])
    successors[ends] = rows["observations"][ends]
    unknown = ends & ~rows["terminations"]
    truncations = np.r_[unknown[1:], False] & ~ends & ~rows["terminations"]  # the row before a dropped one
    notes.append(f"{unknown.sum():,} rows dropped, the last of episodes cut by time: they have no successor")
    rows = rows | dict(next_observations=successors, truncations=truncations)
    return {name: column[~unknown] for name, column in rows.items()}


def read_flagged(file, settle: bool, notes: list[str]) -> dict:
    """D4RL's locomotion and adroit: terminals against timeouts, next_observations where they are there."""
    given = ("next_observations",) if "next_observations" in file else ()
    rows = columns_of(file, ("observations", "actions", "rewards", "terminals", "timeouts", *given))
    rows["terminations"] = flags(rows.pop("terminals"), "terminals")
    rows["truncations"] = flags(rows.pop("timeouts"), "timeouts")
    both = rows["terminations"] & rows["truncations"]
    if both.any() and not settle:
        raise ValueError(f"row {np.argmax(both)} is terminal and timeout at once ({both.sum():,} such rows); "
                         "--settle calls it a termination")  # fmt: skip
    rows["truncations"] &= ~both
    ends = rows["terminations"] | rows["truncations"]
    if not ends.any():
        raise ValueError("it has neither a terminal nor a timeout: where its episodes end is unknown")
    ends[-1] = True
    if not given:
        return with_successors(rows, ends, notes)
    rows["truncations"] = ends & ~rows["terminations"]  # a last episode that the file cuts off counts too
    return rows


def read_kitchen(file, settle: bool, notes: list[str]) -> dict:
    """D4RL's kitchen: no timeouts, and `terminals` marks the last row of a demonstration, not a termination.

    An episode terminates where all four tasks have been done (WSRL: where the reward first is 4); its
    further rows are dropped. A task counts once it was done, as in the environment that will be trained in.
    """
    rows = columns_of(file, ("observations", "actions", "rewards", "terminals"))
    ends, rewards = flags(rows.pop("terminals"), "terminals"), rows["rewards"].reshape(-1)
    if not ends[-1]:
        raise ValueError("its last row is no terminal: the last demonstration is cut off")
    rows["rewards"] = np.concatenate([np.maximum.accumulate(rewards[a:b]) for a, b in spans(ends)])
    rows["observations"], done = rows["observations"][:, :30], rows["rewards"] == 4
    undone = (rows["rewards"] > rewards).sum()
    notes.append(f"{undone:,} rows in which a task was undone again count it as done")
    rows["terminations"], rows["behind"] = np.zeros((2, len(ends)), bool)
    for start, end in spans(ends):
        if done[start:end].any():
            first = start + np.argmax(done[start:end])
            rows["terminations"][first], rows["behind"][first + 1 : end] = True, True
    rows = with_successors(rows, ends, notes)
    behind = rows.pop("behind")
    notes.append(f"{behind.sum():,} rows dropped behind the first with all four tasks done")
    return {name: column[~behind] for name, column in rows.items()}


def read_numpy(path: Path) -> dict:
    """One's own episodes, see NumpyArgs."""
    names = ("observations", "actions", "rewards", "terminations", "truncations", "final_observations")
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is no .npz: numpy.savez writes one")
    with file:
        rows = columns_of(file, names)
    rows |= {name: flags(rows[name], name) for name in ("terminations", "truncations")}
    ends = rows["terminations"] | rows["truncations"]
    final = np.atleast_2d(rows.pop("final_observations"))
    if not ends[-1]:
        raise ValueError("it ends within an episode: set the last of truncations to True")
    if final.shape != (ends.sum(), *rows["observations"].shape[1:]):
        raise ValueError(f"final_observations have shape {final.shape}, and its episodes number {ends.sum()}")
    rows["next_observations"] = np.concatenate([rows["observations"][1:], final[-1:]])
    rows["next_observations"][ends] = final
    return rows


class PlainDtype:
    """Stands in for np.dtype in a pickle: numbers, strings and objects; nothing that has fields."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(r"[biuf]\d\d?|[SU]\d+|O8?", name):
            raise ValueError(f"it holds an array of {name!r}, and only plain numbers are taken")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray:
    """Stands in for np.ndarray in a pickle: NumPy's own reader trusts what stands there, and can crash."""

    def __init__(self, *_):
        self.array = np.zeros(0)

    def __setstate__(self, state):
        _, shape, plain, fortran, content = state
        if plain.dtype == object:
            self.array = np.fromiter(content, object).reshape(shape)  # a list, in C's order always
        else:
            self.array = plain_array(content, plain, shape, "F" if fortran else "C")


def plain_array(content: bytes, plain: PlainDtype, shape=(), order: str = "C") -> np.ndarray:
    """An array, or the scalar of shape (), from its bytes, which have to be as many as it needs."""
    return np.frombuffer(content, plain.dtype).reshape(shape, order=order)


def resolved(value):
    """The same containers with arrays in the place of their stand-ins."""
    if isinstance(value, PlainArray):
        return resolved(value.array.tolist()) if value.array.dtype == object else value.array
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    return [resolved(item) for item in value] if isinstance(value, (list, tuple)) else value


PLAIN = {
    "numpy.dtype": PlainDtype, "numpy.ndarray": PlainArray, "numpy._core.multiarray._reconstruct": PlainArray,
    "numpy._core.numeric._frombuffer": plain_array, "_codecs.encode": str.encode, "builtins.set": set,
    "builtins.bytes": lambda: b"",
    "numpy._core.multiarray.scalar": lambda plain, content: plain_array(content, plain),
    "collections.OrderedDict": dict,
}  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Arrays, numbers, strings and plain containers; what else a pickle asks for is refused, unexecuted."""

    def find_class(self, module, name):
        wanted = f"{module}.{name}".replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        if wanted not in PLAIN:
            raise ValueError(f"it asks for {wanted}, and only arrays and plain containers are taken")
        return PLAIN[wanted]


def unpickled(path: Path):
    """Contents of an .npy of objects, or of a plain pickle."""
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":  # version (2 bytes), header's length (2 or 4), header, pickle
            width = 2 if file.read(2)[0] == 1 else 4
            file.seek(int.from_bytes(file.read(width), "little"), os.SEEK_CUR)
        else:
            file.seek(0)
        return resolved(PlainUnpickler(file).load())


def read_awac(path: Path, notes: list[str]) -> dict:
    """AWAC's trajectories, cut and relabelled as Cal-QL does, see AwacArgs. Every success ends an episode."""
    names = ("observations", "next_observations")
    bare = lambda x: x["state_observation"] if isinstance(x, dict) else x
    parts, failures, clipped = [], 0, 0
    for i, trajectory in enumerate(unpickled(path)):
        if missing := {*names, "actions", "rewards"} - set(trajectory):
            raise ValueError(f"trajectory {i} has no {', '.join(sorted(missing))}")
        part = {name: np.array([bare(x) for x in trajectory[name]]) for name in names}
        actions, rewards = np.array(trajectory["actions"]), np.reshape(trajectory["rewards"], -1)
        steps = len(actions)
        if {len(x) for x in part.values()} != {steps} or len(rewards) not in (steps, steps + 1):
            raise ValueError(f"trajectory {i} has columns of different lengths")
        success = rewards[:steps] == 0  # the demonstrations have a reward too many
        if not (success | (rewards[:steps] == -1)).all():
            raise ValueError(f"trajectory {i} has other rewards than -1 and 0")
        clipped += (np.abs(actions) > 1).any(axis=-1).sum()
        part |= dict(actions=actions.clip(-1, 1), rewards=success - 1.0, terminations=success)
        stop = steps - np.argmax(success[::-1]) if success.any() else 0
        failures += stop == 0
        parts.append({name: column[:stop] for name, column in part.items()})
    if failures == len(parts):
        raise ValueError("none of its trajectories has a success (a reward of 0)")
    rows = {name: np.concatenate([part[name] for part in parts if len(part["rewards"])]) for name in parts[0]}
    rows["truncations"] = np.zeros(len(rows["rewards"]), bool)
    notes.append(f"{path.name}: {len(parts):,} trajectories, {failures:,} without a success dropped, "
                 f"{clipped:,} rows with actions beyond [-1, 1] clipped")  # fmt: skip
    return rows


# === Downloads =============================================================================================


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, part: Path, published: Published) -> None:
    """Appends to `part` what it lacks of the file at `url`; OSError or HTTPException where that fails."""
    have = part.stat().st_size if part.exists() else 0
    if have and have == published.size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        have = have if answer.status == 206 else 0  # 200: the whole file comes, whatever was asked for
        total = have + int(answer.headers["Content-Length"])
        if published.size not in (None, total):
            raise OSError(f"the file there has {total:,} bytes, not {published.size:,}")
        if shutil.disk_usage(part.parent).free < total - have:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        label = dict(desc=f"downloading {part.stem}", unit="B", unit_scale=True, dynamic_ncols=True)
        with open(part, "ab" if have else "wb") as file, tqdm(total=total, initial=have, **label) as bar:
            while piece := answer.read(2**20):
                file.write(piece)
                bar.update(len(piece))
    if part.stat().st_size < total:
        raise OSError("the connection broke")


def download(urls: list[str], path: Path, published: Published) -> None:
    """`path` from the first of `urls` that delivers what was published; an earlier part is gone on with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reasons = path.with_name(path.name + ".part"), []
    if published.sha256 is None or (part.exists() and part.stat().st_size > published.size):
        part.unlink(missing_ok=True)  # nothing would tell whether two parts belong together
    for url in urls:
        resumed = part.exists()
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                fetch(url, part, published)
            except (OSError, http.client.HTTPException, TypeError) as error:  # TypeError: no Content-Length
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    fail(f"no space is left in {path.parent} for {path.name}: make room and start again, or "
                         "choose another folder with XDG_CACHE_HOME; what has come is kept")  # fmt: skip
                if published.sha256 and part.exists() and part.stat().st_size > before:
                    continue  # it broke on the way: go on from there
                reasons.append(f"{url}: {error}")
                break
            if published.sha256 in (None, file_checksum(part)):
                os.replace(part, path)
                return
            part.unlink()
            if not resumed:
                reasons.append(f"{url}: its SHA-256 is not the published one")
                break
            resumed = False  # the earlier part may be at fault
    fail(f"{path.name} could not be downloaded ({'; '.join(reasons)}): fetch {urls[0]} where there is a "
         "network, and give it with --file")  # fmt: skip


# === Importing =============================================================================================


def spans(ends: np.ndarray) -> list[tuple[int, int]]:
    """First row and the row behind the last of every episode; ends (T,): is this the last row of one?"""
    stops = np.flatnonzero(ends) + 1
    return list(zip(np.r_[0, stops[:-1]].tolist(), stops.tolist()))


def unit_box(env: Environment) -> gym.spaces.Box:
    """The action space [-1, 1] of every environment of D4RL."""
    return gym.spaces.Box(-1.0, 1.0, env.sizes[1:], np.float32)


def to_episodes(rows: dict, sizes, actions: gym.spaces.Box, settle: bool, notes: list[str]) -> list[dict]:
    """Episodes with T + 1 float32 observations; ValueError where the rows can't be what they claim to be.

    sizes: of an observation and an action.
    """
    if rows["rewards"].shape not in ((len(rows["actions"]),), (len(rows["actions"]), 1)):
        raise ValueError(f"rewards have shape {rows['rewards'].shape}")
    rows["rewards"] = rows["rewards"].reshape(-1)
    for name, size in zip(("observations", "next_observations", "actions"), (sizes[0], *sizes)):
        if rows[name].shape[1:] != (size,):
            raise ValueError(f"{name} have shape {rows[name].shape}, where {size} columns are needed")
        with np.errstate(over="ignore"):
            rows[name] = rows[name].astype(np.float32)
    for name in ("observations", "next_observations", "actions", "rewards"):
        if not np.isfinite(rows[name]).all():
            raise ValueError(f"{name} hold NaN or infinite values")
    low, high = np.float32(actions.low), np.float32(actions.high)
    beyond = ((rows["actions"] < low) | (rows["actions"] > high)).any(axis=1)
    if beyond.any():
        raise ValueError(f"{beyond.sum():,} actions lie out of bounds, the first in row {np.argmax(beyond)}")
    cut_at_jumps(rows, settle, notes)
    episodes = []
    for start, end in spans(rows["terminations"] | rows["truncations"]):
        names = ("actions", "rewards", "terminations", "truncations")
        episode = {name: rows[name][start:end] for name in names}
        last = rows["next_observations"][end - 1 : end]
        episodes.append(episode | {"observations": np.concatenate([rows["observations"][start:end], last])})
    return episodes


def write_episodes(path: Path, episodes: list[dict]) -> None:
    """Minari's HDF5 layout: a group an episode. Its columns stay as they are, rewards in the file's dtype."""
    import h5py

    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs["id"], group.attrs["total_steps"] = i, len(episode["rewards"])
            for name, column in episode.items():
                group[name] = column


def print_statement(episodes: list[dict], statistics: dict, notes: list[str]) -> None:
    """What was imported: statistics, a histogram of the episodes' lengths, what was done to the rows."""
    for key, value in statistics.items():
        print(f"{key:<24}{value:>14,}")
    lengths = [len(episode["rewards"]) for episode in episodes]
    edges = np.unique(np.linspace(min(lengths), max(lengths) + 1, 11).astype(int))
    counts, _ = np.histogram(lengths, edges)
    for count, low, behind in zip(counts, edges, edges[1:]):
        bar = "#" * math.ceil(40 * count / counts.max())
        print(f"{f'length {low} to {behind - 1}':<24}{count:>14,}  {bar}".rstrip())
    for note in notes:
        print(f"note: {note}")


def save_import(out: Path | None, dataset_id: str, episodes: list[dict], env: Environment, spec: EnvSpec,
                actions: gym.spaces.Box, notes: list[str], **metadata) -> None:  # fmt: skip
    """Writes the episodes as a Minari dataset and prints what they are."""
    import minari
    from minari.dataset.minari_storage import MinariStorage

    out = out or minari_root()
    statistics, target = describe(episodes, env.last_reward), free_folder(out, dataset_id)
    code = code_version()
    with new_dataset(out, dataset_id) as root:
        data = root / dataset_id / "data"
        data.parent.mkdir(parents=True)
        observations = gym.spaces.Box(-np.inf, np.inf, env.sizes[:1], np.float32)
        storage = MinariStorage.new(data, observations, actions, spec)
        write_episodes(data / "main_data.hdf5", episodes)
        storage.update_metadata(metadata | {
            "dataset_id": dataset_id, "minari_version": minari.__version__, "eval_env_spec": spec.to_json(),
            "total_episodes": len(episodes), "total_steps": statistics["steps"], "horizon": env.horizon,
            "ref_min_score": env.references[0], "ref_max_score": env.references[1], "statistics": statistics,
            "reward_scale": env.reward[0], "reward_bias": env.reward[1], "wrappers": list(env.wrappers),
            "return": "last reward" if env.last_reward else "sum of rewards", "code_version": code,
            "code_permalink": f"make_dataset.py at {code}",
            "notes": notes, "data_checksum": dataset_checksum(root / dataset_id),
            "dataset_size": round(storage.get_size(), 1)})  # fmt: skip
    print_statement(episodes, statistics, notes)
    print(f"{dataset_id} is written to {target}")


def refuse(path: Path, error: Exception):
    """One sentence for a file that can't be imported."""
    reason = " ".join(str(error).split())[:300]
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    fail(f"{path} can't be imported: {kind}{reason}")


def import_d4rl(args: D4rlArgs) -> None:
    """Bring an original D4RL file into Minari's format."""
    import h5py

    files = d4rl_files()
    name = next((n for n in (args.name, *(f"{args.name}-v{i}" for i in (2, 1, 0))) if n in files), None)
    if name is None:
        near = ", ".join(difflib.get_close_matches(args.name, files, n=3, cutoff=0.0))
        fail(f"D4RL's {args.name!r} isn't among what can be imported, the nearest names are: {near}")
    published, task = files[name], name.rsplit("-v", 1)[0]
    family = task if task in D4RL_ENVIRONMENTS else task.split("-")[0]
    env = D4RL_ENVIRONMENTS[family]
    dataset_id = f"d4rl-original/{name.replace('-', '/', 1)}"
    free_folder(args.out or minari_root(), dataset_id)  # before anything is downloaded

    path = args.file or cache_folder() / "d4rl" / published.path
    urls = [D4RL_ADDRESS + published.path]
    urls += [D4RL_MIRROR + Path(published.path).name] if published.sha256 else []
    if args.file is None and not (path.exists() and published.sha256 in (None, file_checksum(path))):
        download(urls, path, published)
    notes = [env.note] if env.note else []
    try:
        found = file_checksum(path)
        if args.verify and published.sha256 not in (None, found):
            raise ValueError(f"its SHA-256 is {found}, D4RL published {published.sha256}: it is damaged "
                             "or another file; fetch it again, or take it with --no-verify")  # fmt: skip
        with h5py.File(path) as file:
            reader = read_kitchen if family.startswith("kitchen") else read_flagged
            rows = reader(file, args.settle, notes)
        episodes = to_episodes(rows, env.sizes, unit_box(env), args.settle, notes)
    except Exception as error:  # HDF5 raises many kinds
        refuse(path, error)
    verified = {None: "none published", found: "as published"}.get(published.sha256, "not as published")
    if args.file is None:
        notes.append(f"the download {path} isn't needed any more")
    save_import(
        args.out, dataset_id, episodes, env, env.spec(), unit_box(env), notes, algorithm_name="D4RL",
        description=f"{name} of D4RL, from {published.path} (SHA-256 {found}: {verified}).",
        source={"url": urls[0], "sha256": found, "verified": verified},
        author={"the authors of D4RL (arXiv 2004.07219)"})  # fmt: skip


def environment_spec(env_id: str, max_episode_steps: int | None) -> EnvSpec:
    """Gymnasium's description of a registered environment, of module:Id-v0 or of a class, module:Class."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        registered = not module or name in gym.registry
        spec = copy.deepcopy(gym.spec(name)) if registered else EnvSpec(f"{name}-v0", entry_point=env_id)
        if callable(spec.entry_point):  # a dataset holds its name
            spec.entry_point = f"{spec.entry_point.__module__}:{spec.entry_point.__qualname__}"
        spec.max_episode_steps = max_episode_steps or spec.max_episode_steps
    except Exception as error:  # importing a module runs anything
        fail(f"the environment {env_id} can't be found ({error}): install its package, or put its folder "
             "into PYTHONPATH")  # fmt: skip
    return spec


def import_numpy(args: NumpyArgs) -> None:
    """Bring one's own episodes into Minari's format."""
    if not args.files:
        fail("no file is given: name one .npz or several")
    check_references((args.ref_min_score, args.ref_max_score))
    free_folder(args.out or minari_root(), args.dataset_id)
    spec, notes, episodes = environment_spec(args.env_id, args.max_episode_steps), [], []
    flat = flat_env(spec)
    sizes = flat.observation_space.shape[0], flat.action_space.shape[0]
    for path in args.files:
        try:
            episodes += to_episodes(read_numpy(path), sizes, flat.action_space, False, notes)
        except Exception as error:
            refuse(path, error)
    references = (args.ref_min_score, args.ref_max_score)
    env = Environment(spec.id, spec.kwargs, spec.max_episode_steps, sizes, references)
    names = ", ".join(path.name for path in args.files)
    save_import(args.out, args.dataset_id, episodes, env, spec, flat.action_space, notes,
                description=f"Episodes in {args.env_id}, imported from {names}.")  # fmt: skip


def import_awac(args: AwacArgs) -> None:
    """Bring AWAC's "binary" adroit data into Minari's format."""
    if not args.files:
        fail("no file is given: name the .npy of one task")
    notes, episodes, found = [], [], {}
    for path in args.files:
        try:
            rows = read_awac(path, notes)
            sizes = rows["observations"].shape[-1], rows["actions"].shape[-1]
            found |= {task: env for task, env in AWAC_ENVIRONMENTS.items() if env.sizes == sizes}
            if len(found) != 1:
                known = {task: env.sizes for task, env in AWAC_ENVIRONMENTS.items()}
                raise ValueError(
                    f"its observations and actions have {sizes} columns: take files of one task, {known}"
                )
            ((task, env),) = found.items()
            episodes += to_episodes(rows, env.sizes, unit_box(env), args.settle, notes)
        except Exception as error:  # so does a damaged pickle
            refuse(path, error)
    sums = ", ".join(f"{path.name} (SHA-256 {file_checksum(path)})" for path in args.files)
    dataset_id = args.dataset_id or f"awac/{task}/binary-v0"
    save_import(args.out, dataset_id, episodes, env, env.spec(), unit_box(env), notes, algorithm_name="AWAC",
                description=f"Sparse-reward adroit trajectories of AWAC, cut at the last success: {sums}.",
                author={"the authors of AWAC (arXiv 2006.09359)"})  # fmt: skip


COMMANDS = {
    "record": (RecordArgs, record),
    "d4rl": (D4rlArgs, import_d4rl),
    "numpy": (NumpyArgs, import_numpy),
    "awac": (AwacArgs, import_awac),
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*precision lowered.*")  # gymnasium on its own float32 boxes
    try:
        settings = tyro.extras.subcommand_cli_from_dict({name: kind for name, (kind, _) in COMMANDS.items()})
        next(run for kind, run in COMMANDS.values() if isinstance(settings, kind))(settings)
    except KeyboardInterrupt:
        fail("interrupted: no dataset was written; the same command goes on with a download")
