# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.11.0", "minari[hdf5,hf]==0.5.4",
#     "h5py==3.16.0", "pillow==13.0.0", "tyro==1.0.17", "tqdm==4.70.1", "tensorboard==2.21.0",
#     "matplotlib==3.11.2", "gymnasium-robotics==1.4.2",
# ]
# ///
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
has ended; while it is under way -inf stands for it, no bound. Public codes differ in many details: each
choice made here is named at its line, with theirs.

First run, data included, no network needed
    python calql_baseline.py --env-id hopper-medium-replay
    python calql_baseline.py --env-id pendulum-medium-replay
GPU scale
    python calql_baseline.py --env-id hopper-medium-replay --hidden-sizes 256 256 --batch-size 256 \
        --offline-steps 250000 --online-steps 250000 --eval-every 5000 \
        --handover-eval-every 1000
CQL; weight of the CQL term adapted to a gap, as for antmaze; SAC's backup; no offline data online
    python calql_baseline.py --no-calibrate
    python calql_baseline.py --cql-lagrange --cql-gap 0.8
    python calql_baseline.py --no-cql-max-target --backup-entropy
    python calql_baseline.py --offline-fraction 0
Plain SAC takes over from Cal-QL
    python calql_baseline.py --online-steps 0
    python sac_finetune.py --checkpoint runs/NAME/offline.pt
Any Minari dataset with flat Box observations and bounded Box actions; going on with a stopped run
    python calql_baseline.py --env-id mujoco/hopper/medium-v0 --download
    python calql_baseline.py --resume runs/NAME

Writes runs/{env_id}__calql_baseline__{seed}__{time}/: config.json, a copy of this script, TensorBoard events,
metrics.csv (a row per evaluation, every episode's return), offline.pt, final.pt, learning_curve.png.
"""

import difflib
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# === Arguments =============================================================================================


@dataclass
class Args:
    # experiment
    env_id: str = "hopper-medium-replay"
    """task (a name in TASKS) or the id of any Minari dataset"""
    dataset_id: str | None = None
    """Minari dataset to put under the task in place of its own"""
    seed: int = 1
    """two runs with the same seed are identical to the last bit on the same CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    compile: bool = True
    """on a GPU, replay each update as one CUDA graph"""
    download: bool = False
    """allow the network: fetch a dataset that is not on this machine"""
    resume: str | None = None
    """run directory to go on with, from its last.pt and with its own settings"""
    checkpoint_every: float = 10.0
    """minutes between two writings of last.pt (online: at the next end of an episode)"""
    snapshot_every: int = 0
    """steps between thin copies of the policy in snapshots/; 0 for none"""
    video: bool = False
    """at the end, one episode of the final policy as episode.gif"""
    checkpoint: str | None = None
    """file of a policy for --video-only"""
    video_only: bool = False
    """write an episode of --checkpoint beside it, and nothing else"""

    # networks
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of actor and critics"""
    num_critics: int = 2
    """critics in the ensemble; the actor follows the minimum of 2, the mean of more"""
    target_critics: int = 0
    """target critics drawn for each batch, whose minimum is the target; 0: all of them"""
    critic_activation: Literal["relu", "silu"] = "relu"  # all public codes
    """activation of the critics' hidden layers"""
    critic_layer_norm: bool = False
    """LayerNorm before the activation of the critics' hidden layers"""

    # optimiser
    offline_optimizer: Literal["muon", "adam"] = "adam"  # all public codes
    """optimiser of the hidden weight matrices offline; all other parameters take Adam"""
    online_optimizer: Literal["muon", "adam"] = "adam"
    """the same online; optimiser states start fresh at the handover"""
    muon_lr: float = 1e-3
    """Muon learning rate, in the convention 0.2 sqrt(max(rows, cols)) that matches Adam's step size"""
    actor_lr: float = 1e-4  # official, WSRL; 3e-5 in CORL, locomotion
    """Adam learning rate of the actor and the temperature"""
    critic_lr: float = 3e-4  # official, CORL, WSRL
    """Adam learning rate of the critics and of alpha'"""
    batch_size: int = 256
    """transitions of a gradient update"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """step of the target critics towards the critics"""
    target_entropy: float = -1.0
    """entropy that the automatic temperature holds, per action dimension"""

    # Cal-QL
    offline_steps: int = 250_000  # WSRL, locomotion and kitchen
    """gradient updates of the offline phase; 0: nothing is pre-trained"""
    calibrate: bool = True
    """push no value of the policy's actions below the return-to-go: Cal-QL; without: CQL"""
    alpha_cql: float = 5.0  # WSRL locomotion, kitchen; official antmaze (adroit 1); CORL locomotion: 10
    """weight of the CQL term"""
    cql_actions: int = 10  # all public codes
    """n, actions drawn from each of uniform, pi(.|s) and pi(.|s')"""
    cql_temperature: float = 1.0  # all public codes
    """temperature of the soft maximum over actions"""
    cql_importance_sampling: bool = True  # all public codes; kitchen, official and WSRL: off
    """divide by the density of each drawn action: the soft maximum is over all actions alike"""
    cql_max_target: bool = True  # official, WSRL; CORL: antmaze and adroit only
    """the target takes the best of n actions of the policy; without: one action"""
    cql_clip: tuple[float, float] = (-math.inf, math.inf)  # official; CORL's antmaze, adroit: -200, inf
    """bounds of a transition's CQL gap, beyond which it has no gradient"""
    cql_lagrange: bool = False  # antmaze: on in all public codes
    """multiply the weight of the CQL term by alpha', which learns to hold the gap at --cql-gap"""
    cql_gap: float = 0.8  # antmaze, all public codes
    """the mean CQL gap that alpha' holds"""
    backup_entropy: bool = False  # all public codes; SAC's own backup has it
    """count the policy's entropy in the target"""
    best_episodes: float = 1.0
    """share of the recording's episodes to keep, those with the highest returns"""
    data_fraction: float = 1.0
    """share of these episodes to keep, at random"""

    # online phase
    online_steps: int = 250_000
    """environment steps of the online phase"""
    offline_fraction: float = 0.5
    """share of offline data in online batches; -1: by size"""
    utd_ratio: int = 1
    """critic updates per environment step, each on a fresh batch; the last also updates the actor"""
    warmup_steps: int = 0
    """environment steps before the first online update, acted by the loaded policy"""

    # evaluation
    eval_every: int = 5_000
    """updates (offline) or environment steps (online) between evaluations"""
    handover_eval_every: int = 1_000
    """the same right after the handover: the first 20% of the online updates, at least 2,000"""
    eval_episodes: int = 20
    """episodes of an evaluation, with fixed seeds, by the deterministic policy"""


# === Tasks and data ========================================================================================

# name: (Minari dataset, Gymnasium environment, its arguments). The dataset's metadata hold horizon, wrappers,
# reward transform and reference scores, and the environment where None stands here.
TASKS = {
    "hopper-medium-replay": ("smac/hopper/medium-replay-v0", "Hopper-v5", {}),
    "walker2d-medium-replay": ("smac/walker2d/medium-replay-v0", "Walker2d-v5", {}),
    "pendulum-medium-replay": ("smac/pendulum/medium-replay-v0", "Pendulum-v1", {}),
    # brought by `python make_dataset.py d4rl`
    **{
        f"d4rl-{robot}-{level}": (f"d4rl-original/{robot}/{level}-v2", None, {})
        for robot in ("hopper", "walker2d", "halfcheetah")
        for level in ("medium", "medium-replay", "medium-expert")
    },
    "kitchen-complete": ("d4rl-original/kitchen/complete-v0", None, {}),
    "kitchen-partial": ("d4rl-original/kitchen/partial-v0", None, {}),
    "kitchen-mixed": ("d4rl-original/kitchen/mixed-v0", None, {}),
    # by `python make_dataset.py awac`
    "door-binary": ("awac/door/binary-v0", None, {}),
    "pen-binary": ("awac/pen/binary-v0", None, {}),
    "relocate-binary": ("awac/relocate/binary-v0", None, {}),
}

# What differs from Args for a task; a flag on the command line wins over both.
TASK_DEFAULTS = {
    # optimisers and alpha_cql of these two: results/calql
    **{f"{robot}-medium-replay": dict(
        hidden_sizes=(128, 128), offline_optimizer="muon", online_optimizer="muon", batch_size=128,
        offline_steps=15_000, online_steps=10_000, eval_every=1_000,
        handover_eval_every=200) for robot in ("hopper", "walker2d")},
    "pendulum-medium-replay": dict(
        hidden_sizes=(64, 64), offline_optimizer="muon", online_optimizer="muon", batch_size=128,
        offline_steps=8_000, alpha_cql=1.0, online_steps=4_000, eval_every=500, handover_eval_every=200),
    # WSRL, and the official run_kitchen.sh but for its share of offline data, 0.25; 512x3 in both networks
    **{f"kitchen-{level}": dict(hidden_sizes=(512, 512, 512), cql_importance_sampling=False)
       for level in ("complete", "partial", "mixed")},
    # official run_adroit.sh; its actor has 512x2
    **{f"{hand}-binary": dict(hidden_sizes=(512, 512, 512), alpha_cql=1.0, offline_steps=20_000,
                              eval_every=2_000) for hand in ("door", "pen", "relocate")},
}  # fmt: skip


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


class Dataset(NamedTuple):
    """Transitions as float32 arrays (T, ...) by name, with what else the recording says of itself."""

    columns: dict[str, np.ndarray]
    ends: np.ndarray  # (E,) index behind the last transition of each episode
    metadata: dict
    checksum: str

    def episode_return(self, rewards: np.ndarray) -> float:
        """What an episode of rewards (T,), the environment's own, counts: their sum, undiscounted.

        Where the metadata say so it is the last of them: kitchen's tasks done, a binary task's success.
        """
        return float(rewards[-1] if self.metadata.get("return") == "last reward" else rewards.sum())

    def returns(self) -> np.ndarray:
        """What every episode counts, (E,)."""
        episodes = np.split(self.columns["rewards"].astype(np.float64), self.ends[:-1])
        return np.array([self.episode_return(rewards) for rewards in episodes])

    def reward(self, raw):
        """The reward as every loss sees it: the recording's linear transform of the environment's own."""
        return self.metadata.get("reward_scale", 1.0) * raw + self.metadata.get("reward_bias", 0.0)

    def score(self, returns):
        """Normalised score 100 (R - R_random) / (R_expert - R_random)."""
        low, high = self.metadata["ref_min_score"], self.metadata["ref_max_score"]
        return 100 * (returns - low) / (high - low)


def find_dataset(dataset_id: str, download: bool) -> Path:
    """Folder of a dataset: $MINARI_DATASETS_PATH, datasets/ beside this script, Minari's home, network."""
    home, found = Path.home() / ".minari" / "datasets", {}
    own = Path(os.environ.get("MINARI_DATASETS_PATH") or home)
    for root in (home, Path(__file__).resolve().parent / "datasets", own):
        found |= {
            str(path.relative_to(root).parents[1]): path.parents[1]
            for path in root.rglob("data/metadata.json")
        }
    source, _, name = dataset_id.partition("/")
    if dataset_id not in found and source in ("d4rl-original", "awac"):
        command = {
            "d4rl-original": "d4rl " + name.replace("/", "-"),
            "awac": "awac {0}2_sparse.npy {0}_bc_sparse4.npy".format(name.split("/")[0]),
        }
        fail(f"{dataset_id} is not on this machine: `python make_dataset.py {command[source]}` brings it "
             "(README, Data)")  # fmt: skip
    elif dataset_id not in found and download:
        try:
            socket.getaddrinfo("huggingface.co", 443)  # without a network Minari would retry for 24 seconds
            import minari

            minari.download_dataset(dataset_id)
        except Exception as error:  # its type depends on Minari's backend
            fail(f"{dataset_id} could not be downloaded ({error}): check the id and the network")
    elif dataset_id not in found:
        near = ", ".join(difflib.get_close_matches(dataset_id, [*TASKS, *found], n=3, cutoff=0.0))
        fail(f"there is no task or dataset {dataset_id!r} on this machine, the nearest names are: {near}. "
             "Bundled recordings come with a clone of the repository, others with --download")  # fmt: skip
    return found.get(dataset_id, own / dataset_id)


def flattened(space: gym.Space, observations) -> np.ndarray:
    """Observations (..., O); the parts of a Dict side by side, in the order of their names."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flattened(space[key], observations[key]) for key in sorted(space)]
        return np.concatenate(parts, axis=-1)
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        raise ValueError(f"its observations are {space}; the scripts read flat float Box, or Dict of these")
    return observations


def read_episodes(folder: Path) -> dict[str, np.ndarray]:
    """All transitions of a Minari dataset, and `ends`. ValueError where it is damaged."""
    import minari

    dataset = minari.MinariDataset(folder / "data")
    box = dataset.action_space
    if (
        not isinstance(box, gym.spaces.Box)
        or box.dtype.kind != "f"
        or not box.is_bounded()
        or len(box.shape) != 1
    ):
        raise ValueError(f"its actions are {box}; the scripts need a flat float Box with finite bounds")
    low, high = box.low, box.high
    episodes = list(dataset.iterate_episodes())
    if not episodes:
        raise ValueError("it holds no episode")
    observations = [flattened(dataset.observation_space, e.observations) for e in episodes]
    for e, rows in zip(episodes, observations):
        lengths = [len(x) for x in (rows, e.actions, e.rewards, e.terminations)]
        if lengths[1] == 0 or lengths != [lengths[1] + 1] + 3 * [lengths[1]]:
            raise ValueError(f"episode {e.id} has {lengths} observations, actions, rewards, terminations")
    parts = dict(
        observations=[rows[:-1] for rows in observations],  # T + 1 rows: the last successor is real
        actions=[(e.actions - (high + low) / 2) / ((high - low) / 2) for e in episodes],  # to [-1, 1]
        rewards=[e.rewards for e in episodes],
        next_observations=[rows[1:] for rows in observations],
        terminations=[e.terminations for e in episodes],  # a truncation is none
    )
    columns = {name: np.concatenate(part).astype(np.float32) for name, part in parts.items()}
    for name, column in columns.items():
        if not np.isfinite(column).all():
            raise ValueError(f"{name} hold NaN or infinite values")
    return columns | {"ends": np.cumsum([len(e.actions) for e in episodes])}


def load_dataset(dataset_id: str, download: bool = False) -> Dataset:
    """The dataset, from a float32 cache if this content was read before; one sentence and exit if damaged."""
    folder = find_dataset(dataset_id, download)
    try:
        metadata, checksum = json.loads((folder / "data/metadata.json").read_text()), dataset_checksum(folder)
        assert metadata.get("data_checksum", checksum) == checksum, "its data have another checksum"
        how = inspect.getsource(read_episodes) + inspect.getsource(flattened)
        how += str([metadata.get("observation_space"), metadata.get("action_space")])
        reader = zlib.crc32(how.encode())  # another reader or other bounds, another file
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smac"
        cache /= f"{checksum}-{reader:08x}.npz"
        try:
            cached = np.load(cache)
            columns = {name: cached[name] for name in (*transition_widths(1, 1), "ends")}
        except Exception:  # none yet, or a damaged one
            columns, cached = read_episodes(folder), None
        scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        assert all(x is None or math.isfinite(x) for x in scores), "its reference scores are no numbers"
        assert None in scores or scores[0] < scores[1], "its lower reference score is not the lower one"
    except Exception as error:  # h5py, Minari and zip files raise many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fail(f"dataset {folder} can't be read ({reason}): restore or record it again")
    try:
        if cached is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda path: np.savez(path.open("wb"), **columns))
    except OSError as error:
        print(f"note: no cache written ({error}); the next start loads as slowly as this one")
    data = Dataset(columns, columns.pop("ends"), metadata, checksum)
    if None in scores:
        low, high = float(data.returns().min()), float(data.returns().max())
        metadata |= dict(ref_min_score=low, ref_max_score=high if high > low else low + 1)
        print(
            f"note: {dataset_id} names no reference scores: 0 and 100 stand for its lowest and highest return"
        )
    return data


def select_episodes(data: Dataset, best: float, share: float, seed: int) -> Dataset:
    """The dataset cut to its share `best` of highest returns, and of these to a random `share`."""
    if best == share == 1:
        return data
    order = np.argsort(-data.returns(), kind="stable")[: max(1, round(best * len(data.ends)))]
    random = np.random.default_rng(stream_seed(seed, "selection"))
    kept = np.sort(random.permutation(order)[: max(1, round(share * len(order)))])
    starts = np.r_[0, data.ends[:-1]]
    rows = np.concatenate([np.arange(starts[i], data.ends[i]) for i in kept])
    columns = {name: column[rows] for name, column in data.columns.items()}
    return data._replace(columns=columns, ends=np.cumsum(data.ends[kept] - starts[kept]))


def returns_to_go(rewards, terminations, ends, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_(t+1) within each episode, (T,); rewards (T,) as the TD target sees them.

    Behind a termination comes 0, behind a truncation mean(last 20 rewards) / (1 - gamma): a zero there would
    call the last steps of every episode that time cut off the best ones (or the worst).
    """
    if gamma == 1 and not all(terminations[end - 1] for end in ends):
        fail("--gamma 1 gives episodes that time cut off an infinite return: take one below 1")
    result = np.zeros(len(rewards))
    for start, end in zip(np.r_[0, ends[:-1]], ends):
        tail = 0.0 if terminations[end - 1] else rewards[max(start, end - 20) : end].mean() / (1 - gamma)
        for t in range(end - 1, start - 1, -1):
            result[t] = tail = rewards[t] + gamma * tail
    return result


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


class ActionValues(torch.autograd.Function):
    """q (N, K, B) of ReLU critics at K actions (K, B, A) of each state (B, O); gradient in parameters only.

    The first layer is linear: h_1 = f(z_s + a W_a) with z_s = s W_s + b_1 computed once a state, not once an
    action. Backward, g_L = q' w^T * f'(z_L), g_(l-1) = g_l W_l^T * f'(z_(l-1)), dW_l = h_(l-1)^T g_l and
    db_l = sum g_l, over those rows alone that have a gradient q' at all. In the CQL term many have none:
    values below the return-to-go, and actions to which the soft maximum gives the weight 0.
    """

    @staticmethod
    def forward(ctx, observations: Tensor, actions: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        weight_s, weight_a = weights[0].split([observations.shape[1], actions.shape[2]], dim=1)
        # so many states at a time that a hidden layer, 4 MB, stays in the cache
        parts = 1 if actions.is_cuda else math.ceil(actions[..., 0].numel() * biases[0].numel() / 2**20)
        ctx.weights, ctx.parts, values = weights, [], []
        for s, a in zip(observations.chunk(parts), actions.chunk(parts, dim=1)):
            z_s = torch.baddbmm(biases[0], s.expand(len(weight_s), -1, -1), weight_s)  # (N, b, H)
            z = a.flatten(0, 1) @ weight_a  # (N, K b, H)
            z.unflatten(1, a.shape[:2]).add_(z_s[:, None])
            hidden = [z.relu_()]
            for weight, bias in zip(weights[1:-1], biases[1:-1]):
                hidden.append(torch.baddbmm(bias, hidden[-1], weight).relu_())
            q = (hidden[-1] * weights[-1].mT).sum(-1) + biases[-1].squeeze(-1)  # (N, K b)
            values.append(q.unflatten(1, a.shape[:2]))
            inputs = torch.cat([s.expand(len(a), -1, -1), a], dim=-1).flatten(0, 1)  # (K b, O + A)
            ctx.parts.append((inputs, hidden))
        return torch.cat(values, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        grad_weights = [torch.zeros_like(w) for w in ctx.weights]
        grad_biases = [torch.zeros_like(w[:, :1]) for w in ctx.weights]
        for (inputs, hidden), grad_q in zip(ctx.parts, grad.chunk(len(ctx.parts), dim=2)):
            for i, g in enumerate(grad_q.flatten(1)):  # critic i, (K b,)
                # a CUDA graph can't hold a product whose size depends on the data: there all rows
                rows = slice(None) if g.is_cuda else g.nonzero().squeeze(1)  # R of them
                layers, g = [inputs[rows], *(h[i][rows] for h in hidden)], g[rows, None]  # (R, H), (R, 1)
                for j in reversed(range(len(layers))):
                    grad_weights[j][i] += (g.T @ layers[j]).T
                    grad_biases[j][i] += g.sum(dim=0)
                    if j > 0:  # f' is 0 where h = f(z) is 0, and 1 elsewhere
                        g = torch.ops.aten.threshold_backward(g @ ctx.weights[j][i].T, layers[j], 0)
        return None, None, *grad_weights, *grad_biases


def q_of_actions(critic: Critic, observations: Tensor, actions: Tensor) -> Tensor:
    """q (N, K, B) of K actions (K, B, A) in each of B states (B, O): critic(s, a_k), in less time."""
    net, (count, batch, _), obs_dim = critic.net, actions.shape, observations.shape[1]
    if net.gains or net.activation is not torch.relu_:
        return critic(observations.repeat(count, 1), actions.flatten(0, 1)).unflatten(1, (count, batch))
    s = (observations - net.mean[:obs_dim]) / net.std[:obs_dim]
    a = (actions - net.mean[obs_dim:]) / net.std[obs_dim:]
    return ActionValues.apply(s, a, *net.weights, *net.biases)


def q_and_action_gradient(critic: Critic, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, B) and grad_a Q_i(s, a) (N, B, A) by the chain rule, both differentiable in the parameters.

    h_l = f(z_l), z_l = h_(l-1) W_l + b_l, q = h_L w + b:  g_L = w^T,  g_(l-1) = (g_l * f'(z_l)) W_l^T.
    The same numbers as autograd through its own backward pass, in three quarters of the time.
    """
    net, slopes = critic.net, []
    if net.gains or type(critic) is not Critic:  # LayerNorm, or more than a network: by autograd
        q, pullback = torch.func.vjp(partial(critic, observations), actions.expand(net.n, -1, -1))
        return q, pullback(torch.ones_like(q))[0]
    x = ((torch.cat([observations, actions], dim=-1) - net.mean) / net.std).expand(net.n, -1, -1)
    for weight, bias in zip(net.weights[:-1], net.biases[:-1]):
        z = torch.baddbmm(bias, x, weight)
        s = (z > 0).float() if net.activation is torch.relu_ else torch.sigmoid(z)
        x = z * s  # f(z) = z s(z), s a step (ReLU) or the sigmoid (SiLU): f' = s + f (1 - s)
        slopes.append(s + x * (1 - s))
    gradient = net.weights[-1].mT  # (N, 1, H)
    for weight, slope in zip(reversed(net.weights[:-1]), reversed(slopes)):
        gradient = (gradient * slope) @ weight.mT  # (N, B, fan_in)
    q = (x * net.weights[-1].mT).sum(-1) + net.biases[-1].squeeze(-1)
    return q, (gradient / net.std)[..., -actions.shape[-1] :]


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


def make_agent(settings: dict) -> Agent:
    """Fresh networks as a run's or a checkpoint's settings describe them."""
    names = ("obs_dim", "act_dim", "hidden_sizes", "num_critics", "critic_activation", "critic_layer_norm",
             "target_critics", "target_entropy")  # fmt: skip
    return Agent(*(settings[name] for name in names))


class ScoreNet(nn.Module):
    """eps_omega(s, a_t, w, t), the denoiser of a variance-preserving diffusion; level 1 is index 0 of T.

    a_t = sqrt(abar_t) a + sigma_t e, e ~ N(0, I), sigma_t = sqrt(1 - abar_t), growing geometrically.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes, levels: int, sigma_1: float):
        super().__init__()
        self.embedding = nn.Embedding(levels, 16)
        self.net = MLP(1, [obs_dim + act_dim + 1 + 16, *hidden_sizes, act_dim], "silu")
        self.register_buffer("sigma", torch.tensor(np.geomspace(sigma_1, 0.9, levels), dtype=torch.float32))

    def forward(self, observations: Tensor, noised: Tensor, outcomes: Tensor, levels: Tensor) -> Tensor:
        """The predicted noise (B, A) in a_t = `noised` (B, A), given outcomes w (B,) and levels (B,)."""
        inputs = (observations, noised, outcomes[:, None], self.embedding(levels))
        return self.net(torch.cat(inputs, dim=-1)).squeeze(0)

    def noise(self, actions: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and the noise e in it, both (B, A)."""
        sigma, e = self.sigma[levels, None], torch.randn_like(actions)
        return (1 - sigma**2).sqrt() * actions + sigma * e, e

    def score(self, observations: Tensor, actions: Tensor, outcomes: Tensor, levels: Tensor) -> Tensor:
        """grad_a log p_t(a|s,w) (B, A) at the point a, p_t the data's density smoothed at sigma_t.

        score = -(sqrt(abar_t) / sigma_t) eps_omega(s, sqrt(abar_t) a, w, t): eps predicts the NOISE, which
        points away from the data, hence the minus sign.
        """
        sigma = self.sigma[levels, None]
        scale = (1 - sigma**2).sqrt()
        return -(scale / sigma) * self(observations, scale * actions, outcomes, levels)


# === Muon ==================================================================================================


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz (Jordan et al. 2024): nearly the polar factor of each matrix in (K, rows, cols).

    X = U / ||U||_F, then five times X <- a X + (b A + c A A) X with A = X X^T. Singular values above 1% of
    the Frobenius norm end within [0.68, 1.13], smaller ones below.
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

    M <- lerp(M, G, 1 - momentum);  U = lerp(G, M, momentum);  W <- W (1 - lr wd) - lr s orthogonalize(U)
    s = 0.2 sqrt(max(fan_in, fan_out)), which makes steps as long as Adam's ("match_rms_adamw"), or
    sqrt(max(1, fan_out / fan_in)) ("original"). Matrices of one shape, critics' and actor's, share one
    batched chain. What has no gradient is not stepped: stale momentum would make a step of full size.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, scale="match_rms_adamw"):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            for fan_in, fan_out in dict.fromkeys(tuple(p.shape[1:]) for p in stepped):
                params = [p for p in stepped if p.shape[1:] == (fan_in, fan_out)]
                for p in (p for p in params if "momentum" not in self.state[p]):
                    self.state[p]["momentum"] = torch.zeros_like(p)
                gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                u = torch.cat(gradients).lerp(torch.cat(momenta), group["momentum"])  # (K, fan_in, fan_out)
                original = group["scale"] == "original"
                s = max(1, fan_out / fan_in) ** 0.5 if original else 0.2 * max(fan_in, fan_out) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                directions = orthogonalize(u).split([len(p) for p in params])
                torch._foreach_add_(params, directions, alpha=-group["lr"] * s)


def make_optimizers(agent: Agent, kind: str, args: Args, score_scale: Iterable[Tensor] = ()) -> list:
    """Fresh optimisers: Muon for the hidden-to-hidden weights if `kind` says so, Adam for everything else."""
    nets = (agent.critic.net, agent.actor.net) if kind == "muon" else ()
    hidden = [w for net in nets for w in net.weights[1:-1]]
    rest = lambda params: [p for p in params if all(p is not h for h in hidden)]
    slow = {"params": rest([*agent.actor.parameters(), agent.log_alpha]), "lr": args.actor_lr}
    fast = {"params": rest([*agent.critic.parameters(), *score_scale]), "lr": args.critic_lr}
    adam = torch.optim.Adam([slow, fast], fused=True, capturable=True)
    return [Muon(hidden, args.muon_lr), adam] if hidden else [adam]


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


def calibrated(q: Tensor, returns_to_go: Tensor) -> Tensor:
    """max(Q(s, a), V_mu(s)), without gradient where the bound is higher. q (N, K, B), returns_to_go (B,).

    -inf bounds nothing and stands for a return not known yet. (CORL stores 0, too high a bound where rewards
    are negative, and gives calibration up online.)
    """
    return torch.maximum(q, returns_to_go)


def cql_gap(q: Tensor, q_data: Tensor, log_density: Tensor | None, temperature: float) -> Tensor:
    """T log sum_k exp(q_k / T) / mu_k - Q(s, a_D), (N, B): soft maximum over actions minus recorded action.

    q (N, K, B) of K actions; q_data (N, B); log_density (K, B), log mu_k of each, makes the sum K times an
    unbiased estimate of the integral of exp(Q / T) over all actions. Its -T log K is left out as in CQL,
    Cal-QL and CORL: published gaps refer to that. They divide log mu_k by T, too: the same at T = 1. Without
    densities (None) Q(s, a_D) joins the sum, as in these codes and in WSRL, which takes T log(K + 1) off.
    """
    if log_density is None:
        values = torch.cat([q, q_data[:, None]], dim=1) / temperature
    else:
        values = q / temperature - log_density
    return temperature * values.logsumexp(dim=1) - q_data


def alpha_prime(log_alpha_prime: Tensor) -> Tensor:
    """alpha' = exp(log alpha'), at most 1e6, as in Cal-QL and CORL; WSRL takes a softplus."""
    return log_alpha_prime.exp().clamp(max=1e6)


def alpha_prime_loss(log_alpha_prime: Tensor, gap: Tensor, alpha_cql: float, target_gap: float) -> Tensor:
    """L_alpha' = -alpha' alpha_cql (gap - target gap): alpha' rises while the gap is above its target.

    The factor alpha_cql as in Cal-QL and CORL, not in WSRL. The gap () is detached: in CORL this loss fills
    the critics' gradients as well, and only a reset before their own loss undoes that.
    """
    return -alpha_prime(log_alpha_prime) * alpha_cql * (gap.detach() - target_gap)


# === Update steps ==========================================================================================


@torch.no_grad()
def drawn_actions(actor: Actor, batch: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """n actions each from the uniform distribution, pi(.|s) and pi(.|s'), (3n, B, A); log densities (3n, B).

    Each density is the one that its action was drawn from. Without gradient, which would teach the policy.
    """
    shape, device = (n, *batch["actions"].shape), batch["actions"].device
    uniform = 2 * torch.rand(shape, device=device) - 1  # actions fill [-1, 1]: make_env, read_episodes
    log_uniform = torch.full(shape[:2], -math.log(2) * shape[2], device=device)
    both = torch.cat([batch["observations"], batch["next_observations"]])  # one pass, not one an action
    mean, log_std = (x.unflatten(0, (2, 1, -1)) for x in actor(both))  # (2, 1, B, A)
    u = mean + log_std.exp() * torch.randn(2, *shape, device=device)  # (2, n, B, A)
    log_prob = squashed_gaussian_log_prob(u, mean, log_std)
    actions = torch.cat([uniform, torch.tanh(u).flatten(0, 1)])
    return actions, torch.cat([log_uniform, log_prob.flatten(0, 1)])


@torch.no_grad()
def calql_target(agent: Agent, batch: dict[str, Tensor], actions, log_prob, args: Args) -> Tensor:
    """The target (B,): a' is the best by min_j Qbar_j(s', a') of actions (n, B, A) ~ pi(.|s')."""
    q = drawn(q_of_actions(agent.target_critic, batch["next_observations"], actions), agent.target_critics)
    # best by Q alone, then the entropy, as in Cal-QL, CORL and WSRL's CQL; WSRL's SAC: best of the sum
    best = q.amin(dim=0).argmax(dim=0, keepdim=True)  # (1, B)
    next_q = q.gather(1, best.expand(len(q), 1, -1)).squeeze(1)  # (N, B)
    alpha = agent.log_alpha.exp() * args.backup_entropy
    next_log_prob = log_prob.gather(0, best).squeeze(0)
    return td_target(batch["rewards"], batch["terminations"], next_q, next_log_prob, alpha, args.gamma)


def calql_critic_gradients(agent: Agent, multiplier: nn.Module, batch: dict[str, Tensor], args: Args) -> dict:
    """Puts the gradient of L_Q into `.grad` of the critics, that of L_alpha' into the multiplier's."""
    n, bound, log_alpha_prime = args.cql_actions, batch["returns_to_go"], multiplier["log_alpha_prime"]
    actions, log_density = drawn_actions(agent.actor, batch, n)
    # target and CQL term share the actions of pi(.|s'): the same expectations; public codes draw twice
    ours = slice(2 * n, None if args.cql_max_target else 2 * n + 1)
    y = calql_target(agent, batch, actions[ours], log_density[ours], args)
    # every action at s, those of pi(.|s') too, as in CQL, Cal-QL, CORL and WSRL; unifloral: at s'
    actions = torch.cat([actions, batch["actions"][None]])
    q = q_of_actions(agent.critic, batch["observations"], actions)  # (N, 3n + 1, B)
    q_random, q_policy, q_data = q[:, :n], q[:, n : 3 * n], q[:, 3 * n]
    # the uniform actions stay unbounded, as in Cal-QL and CORL
    q_bounded = calibrated(q_policy, bound) if args.calibrate else q_policy
    log_density = log_density if args.cql_importance_sampling else None
    gap = cql_gap(torch.cat([q_random, q_bounded], dim=1), q_data, log_density, args.cql_temperature)
    # clipped with and without alpha', as in Cal-QL and CORL; WSRL: without only
    clipped_gap = gap.clamp(*args.cql_clip).mean()
    loss_td, loss_prime = td_loss(q_data, y), 0.0
    weight, metrics = args.alpha_cql, {}
    if args.cql_lagrange:
        scale = alpha_prime(log_alpha_prime).detach()
        weight, metrics = args.alpha_cql * scale, {"alpha_prime": scale}
        loss_prime = alpha_prime_loss(log_alpha_prime, clipped_gap, args.alpha_cql, args.cql_gap)
    # both terms are means over the critics; public codes sum both
    loss = loss_td + weight * clipped_gap + loss_prime
    loss.backward(inputs=[*agent.critic.parameters(), *multiplier.parameters()])
    metrics |= {"critic_loss": loss_td, "cql_gap": gap.mean(), "q": q_data.mean(),
                "q_policy": q_policy.mean(), "q_random": q_random.mean(),
                "below_return": (q_policy < bound).float().mean()}  # fmt: skip
    return {name: value.detach() for name, value in metrics.items()}


def calql_update(agent, multiplier, batch, optimizers, args: Args, with_actor: bool) -> dict[str, Tensor]:
    """One step of the critics and, with_actor, of actor and temperature: all gradients before any step."""
    metrics = calql_critic_gradients(agent, multiplier, batch, args)
    if with_actor:  # CORL takes the actor's first, from the same networks
        metrics |= actor_gradients(agent, batch)
    apply_gradients(optimizers)
    polyak_update(agent.target_critic, agent.critic, args.tau)
    return metrics


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


def captured(update: Callable, optimizers: list[torch.optim.Optimizer], enabled: bool) -> Callable:
    """`update`, from its fourth call on replayed as a CUDA graph: one launch in place of hundreds.

    What it reads has to stay in place, what it returns is overwritten by the next call. Three ordinary calls
    come first: they make the optimiser states and the libraries' workspaces.
    """
    calls, graph, result = 0, None, None

    def call():
        nonlocal calls, graph, result, enabled
        calls += 1
        if enabled and calls == 4:
            try:
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                    result = update()
            except RuntimeError as error:
                print(f"note: no CUDA graph here, every kernel is launched by itself ({error})")
                enabled = False
                for optimizer in optimizers:  # what the capture left in .grad is no gradient
                    optimizer.zero_grad()
        if not enabled or calls < 4:
            return update()
        graph.replay()
        return result

    return call


# === Evaluation, logging, checkpoints ======================================================================

FORMAT = 2  # of a checkpoint
# what a checkpoint and the run that goes on from it have to agree on
FIXED = ("env_id", "env", "obs_dim", "act_dim", "flattening", "action_bounds", "log_std_bounds",
         "hidden_sizes", "num_critics", "critic_activation", "critic_layer_norm", "gamma", "reward_scale",
         "reward_bias", "dataset_checksum")  # fmt: skip
# settings that a run does not take from a checkpoint
OWN = {"device", "compile", "download", "resume", "checkpoint", "checkpoint_every", "snapshot_every", "video",
       "video_only", "online_steps"}  # fmt: skip
PHASES = ("score", "offline", "alignment", "online")
LOG_EVERY = 500  # steps of a phase between TensorBoard scalars
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari")  # their versions go into checkpoints


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


def restore(state: dict, device: torch.device | str = "cpu") -> tuple[Agent, ScoreNet | None]:
    """The agent of a checkpoint, and its score estimator where it has one."""
    try:
        agent, score_net = make_agent(state).to(device), None
    except Exception as error:  # what the settings can be, a damaged file decides
        fail(f"the checkpoint describes no networks ({type(error).__name__}: {error}): take another one")
    if "agent" in state:
        fill(agent, state["agent"], "agent")
    else:  # a snapshot holds no more than the policy
        fill(agent.actor, state.get("actor"), "actor")
    if state.get("score_net"):
        sizes = (state["obs_dim"], state["act_dim"], state["score_hidden_sizes"])
        score_net = ScoreNet(*sizes, state["score_levels"], state["score_sigma"]).to(device)
        fill(score_net, state["score_net"], "score estimator")
        score_net.requires_grad_(False)
    return agent, score_net


def film(actor: Actor, make: Callable[..., gym.Env], path: Path, device: torch.device | str = "cpu") -> str:
    """The first episode of every evaluation (seed 1000) as a GIF at `path`; "" or why there is none."""
    from PIL import Image

    try:
        env = make(render_mode="rgb_array")
        observation, done = env.reset(seed=1000)[0], False
        frames = [env.render()]
        while not done:
            row = torch.as_tensor(observation, dtype=torch.float32, device=device)[None]
            with torch.no_grad():
                action = actor.mode(row)[0].cpu().numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            frames.append(env.render())
        fps = env.metadata.get("render_fps", 30)
        every = max(1, round(fps / 25))  # viewers of GIFs show about 25 frames a second
        first, *rest = (Image.fromarray(frame) for frame in frames[::every])
    except Exception as error:  # a renderer may fail in any way
        return (f"the environment can't be rendered here ({error}): without a display try MUJOCO_GL=egl or "
                "MUJOCO_GL=osmesa, for Pendulum install pygame")  # fmt: skip
    options = dict(format="gif", save_all=True, append_images=rest, duration=1000 * every / fps, loop=0)
    write_atomically(path, lambda temporary: first.save(temporary, **options))
    return ""


def film_checkpoint(args: Args) -> None:
    """--video-only: the GIF beside the checkpoint."""
    if not args.checkpoint:
        fail("--video-only needs --checkpoint FILE, the policy to film")
    path, state = Path(args.checkpoint).with_suffix(".gif"), load_checkpoint(Path(args.checkpoint))
    make = partial(make_env, state["env"], state.get("wrappers", ()), **state["env_kwargs"])
    if reason := film(restore(state)[0].actor, make, path):
        fail(reason)
    print(f"video: {path}")


@torch.no_grad()
def diagnose(run: "Run", modules: dict[str, nn.Module], rewards: list[np.ndarray]) -> dict[str, float]:
    """What the mechanism shows, on 2,000 transitions of episodes that the score estimator has not seen.

    cosine_*: mean cosine between grad_a Q(s,a), Q the critics' mean, and score(s,a,w), at recorded and at the
    policy's actions; grad_q_*: mean |grad_a Q|; q_*: mean Q; q_start: mean Q(s_0, tanh mean) where the
    evaluation began, and discounted_return: mean sum_t gamma^t r_t it then got; entropy: -E[log pi(a|s)].
    """
    agent, score_net = modules["agent"], modules.get("score_net")
    columns, device = run.data.columns, run.device
    rows = np.flatnonzero(held_out(run.data)) if held_out(run.data).any() else np.arange(len(run.outcomes))
    rows = rows[np.linspace(0, len(rows) - 1, 2_000).astype(int)]
    tensor = lambda array: torch.as_tensor(array, dtype=torch.float32, device=device)
    s, a, w = (tensor(x[rows]) for x in (columns["observations"], columns["actions"], run.outcomes))
    with torch.random.fork_rng():  # training draws the same numbers with and without evaluations
        policy_actions, log_prob = agent.actor.sample(s)
    starts = tensor(np.stack([env.reset(seed=1000 + i)[0] for i, env in enumerate(run.envs)]))
    discounted = [np.sum(run.data.reward(r) * run.args.gamma ** np.arange(len(r))) for r in rewards]
    found = {"alpha": agent.log_alpha.exp(), "alpha_psi": math.nan, "entropy": -log_prob.mean(),
             "q_start": agent.critic(starts, agent.actor.mode(starts)).mean(),
             "discounted_return": np.mean(discounted)}  # fmt: skip
    if "score_scale" in modules and isinstance(score_net, ScoreNet):
        tied = run.args.alpha_psi == "temperature"
        found["alpha_psi"] = found["alpha"] if tied else F.softplus(modules["score_scale"](s)).mean()
    for where, actions in (("dataset", a), ("policy", policy_actions)):
        q, grad_q = q_and_action_gradient(agent.critic, s, actions)
        grad_q = grad_q.mean(dim=0)
        found |= {f"q_{where}": q.mean(), f"grad_q_{where}": grad_q.norm(dim=-1).mean()}
        found[f"cosine_{where}"] = math.nan
        if isinstance(score_net, ScoreNet):
            score = score_net.score(s, actions, w, torch.zeros(len(s), dtype=torch.long, device=device))
            found[f"cosine_{where}"] = F.cosine_similarity(grad_q, score, dim=-1).mean()
    return {name: float(value) for name, value in found.items()}


class Run:
    """A run's directory and all that is written there; `state` is the checkpoint it goes on from, or {}."""

    def __init__(self, args: Args, directory: Path, data: Dataset, env_spec, spec: dict, device, state: dict):
        self.args, self.directory, self.data = args, directory, data
        self.make_env = partial(make_env, env_spec, data.metadata.get("wrappers", ()))
        self.spec, self.device, self.state, self.rows = spec, device, state, state.get("rows", [])
        self.lock = open(directory / "lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds no lock
        except OSError:
            fail(
                f"{directory} is in use by another process (see its lock file): wait for it or stop it first"
            )
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.lock, flush=True)
        for path in directory.glob(".*.*"):  # half-written by a process that was killed
            path.unlink()
        self.envs = [self.make_env() for _ in range(args.eval_episodes)]
        self.saved_at, self.began = time.monotonic(), time.monotonic() - state.get("seconds", 0.0)
        self.metrics, self.rates, self.updates, self.evaluating, self.stopping = {}, {}, 0, 0.0, 0
        self.boundary, self.extras = True, {}  # online: between two episodes? where in which episode?
        self.outcomes = outcomes(data, args.gamma)
        self.online, self.stored, self.crc = None, 0, 0  # replay; rows and checksum of online_buffer.bin
        self.handlers = [signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)]

    def on_signal(self, number, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = number
        tqdm.write("stopping: last.pt is being written (once more to leave without it)")

    def close(self) -> None:
        """Lets go of the directory."""
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), self.handlers):
            signal.signal(number, handler)
        if hasattr(self, "writer"):
            self.writer.close()
        self.lock.close()

    def good(self) -> str:
        """The newest checkpoint, for messages."""
        files = [self.directory / name for name in ("last.pt", "previous.pt", "offline.pt")]
        newest = next((path for path in files if path.exists()), None)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def steps(self, phase: str, total: int, modules: dict, optimizers: list) -> Iterator[int]:
        """Yields 1 to total, or goes on where a run stopped; behind each step logs, evaluates, saves."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.phase, self.modules, args = phase, modules, self.args
        later = PHASES.index(self.state.get("phase", "score")) - PHASES.index(phase)
        done = 0 if not self.state or later < 0 else total if later else self.state["step"]
        saved = self.state | self.state["extras"] if done else {}
        for key in modules.keys() & saved.keys():
            fill(modules[key], saved[key], key)
        if done and not later:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(saved["random_states"][0])
            torch.cuda.set_rng_state_all(saved["random_states"][1:])
        # a folder for each phase: steps begin anew, and a resumed phase drops what it is about to repeat
        self.writer = SummaryWriter(
            self.directory / "tensorboard" / phase, purge_step=done + 1 if done else None
        )
        style = dict(unit="step", dynamic_ncols=True, disable=None)  # a bar on terminals only
        self.bar = tqdm(range(done + 1, total + 1), phase, initial=done, total=total, **style)
        if done == 0 and not any(row["phase"] == phase and row["step"] == 0 for row in self.rows):
            self.evaluate(0)
        began, self.evaluating, earlier = time.monotonic(), 0.0, self.updates
        for step in self.bar:
            yield step
            if step % LOG_EVERY == 0:
                self.log(step, self.metrics)
            dense = phase == "online" and 0 < self.updates <= self.window  # right after the handover
            grid = step % args.eval_every == 0 or (dense and step % args.handover_eval_every == 0)
            if grid or step == total:
                self.evaluate(step)
            if args.snapshot_every and step % args.snapshot_every == 0 and phase != "score":
                self.save(f"snapshots/{phase}_{step:09d}.pt", step, {"actor": modules["agent"].actor}, [])
            late = time.monotonic() - self.saved_at > 60 * args.checkpoint_every
            if self.stopping or (self.boundary and late):
                self.save("last.pt", step, modules, optimizers)
                self.saved_at = time.monotonic()
            if self.stopping:
                self.bar.close()
                print(f"stopped; go on with: python {Path(__file__).name} --resume {self.directory}")
                raise SystemExit(128 + self.stopping)
        updates = self.updates - earlier if phase == "online" else total - done
        self.rates[phase] = updates / (time.monotonic() - began - self.evaluating)
        self.writer.close()
        name = {"offline": "offline.pt", "online": "final.pt"}.get(phase)
        if name and later <= 0 and not (self.directory / name).exists():
            self.save(name, total, modules, optimizers)

    def evaluate(self, step: int) -> None:
        """Evaluates the policy: a row in metrics.csv, a line on the screen, two scalars in TensorBoard."""
        if self.phase in ("score", "alignment"):  # the policy stays what it is
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # updates under way are not the evaluation's time
        began = time.monotonic()
        rewards = evaluate(self.modules["agent"].actor, self.envs, self.device)
        returns = [self.data.episode_return(episode) for episode in rewards]
        found = diagnose(self, self.modules, rewards)
        mean, score = float(np.mean(returns)), self.data.score(float(np.mean(returns)))
        row = dict(phase=self.phase, step=step, updates=self.updates, return_mean=mean, score=score)
        row |= {"seconds": round(began - self.began, 1)} | found
        row |= {f"return_{i}": r for i, r in enumerate(returns)}
        self.rows = [*self.rows, row]
        names = dict.fromkeys(name for r in self.rows for name in r)  # a checkpoint may have other columns
        values = ([r.get(name, "") for name in names] for r in self.rows)
        lines = [",".join(map(str, line)) + "\n" for line in (names, *values)]
        write_atomically(self.directory / "metrics.csv", lambda path: path.write_text("".join(lines)))
        new = {k: x for k, x in found.items() if not (math.isnan(x) or k in self.metrics)}
        self.log(step, {"return": mean, "normalised_score": score} | new)
        self.bar.write(f"{self.phase:<8} step {step:>9,}   return {mean:9.1f}   score {score:6.1f}")
        self.bar.set_postfix_str(f"score {score:.1f}")
        self.evaluating += time.monotonic() - began

    def log(self, step: int, metrics: dict) -> None:
        """Scalars phase/name for TensorBoard. The only place where an update's numbers leave the device."""
        for name, value in ((name, float(value)) for name, value in metrics.items()):
            if not math.isfinite(value):
                at = f"{name} is {value} at {self.phase} step {step}"
                fail(f"{at}, training diverged: lower the learning rates; {self.good()}")
            self.writer.add_scalar(f"{self.phase}/{name}", value, step)

    def save(self, name: str, step: int, modules: dict[str, nn.Module], optimizers: list) -> None:
        """Writes a checkpoint of the shelf's format; an earlier last.pt becomes previous.pt."""
        path, extras = self.directory / name, dict(self.extras)
        try:
            path.parent.mkdir(exist_ok=True)
            if name == "last.pt" and self.online:  # new transitions go to the end of online_buffer.bin
                new = self.online.rows[self.stored : self.online.size].cpu().numpy().tobytes()
                with open(self.directory / "online_buffer.bin", "ab" if self.stored else "wb") as file:
                    file.write(new)
                self.stored, self.crc = self.online.size, zlib.crc32(new, self.crc)
                extras |= {"online_rows": self.stored, "online_crc": self.crc}
            state = dict(self.spec, format=FORMAT, phase=self.phase, step=step, rows=self.rows, extras=extras)
            for key, module in modules.items():  # what only this algorithm knows goes under extras
                (state if key in ("agent", "actor", "score_net") else extras)[key] = module.state_dict()
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            state["random_states"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            state["seconds"] = time.monotonic() - self.began
            for key, tensor in (
                (k, t) for module in modules.values() for k, t in module.state_dict().items()
            ):
                if not tensor.isfinite().all():  # what is saved is good
                    fail(f"{key} is not finite at {self.phase} step {step}, training diverged: lower the "
                         f"learning rates; {self.good()}")  # fmt: skip

            def write(temporary: Path) -> None:
                torch.save(sealed(state), temporary)
                if name == "last.pt" and path.exists():  # only now, with the new one complete
                    os.replace(path, path.with_name("previous.pt"))

            write_atomically(path, write)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OSError(f"{path} can't be written ({error})") from error

    def recall(self, online: ReplayBuffer, env: gym.Env) -> np.ndarray:
        """The observation to start from online. A resumed run gets its transitions back and plays the episode
        under way again: every reset is seeded from (seed, episode)."""
        self.online, self.extras = online, {"episode": 0, "start": 0}
        if "online_rows" in self.state.get("extras", {}):
            saved, path = self.state["extras"], self.directory / "online_buffer.bin"
            self.extras = {key: saved[key] for key in self.extras}
            self.stored, self.crc = saved["online_rows"], saved["online_crc"]
            content = path.read_bytes()[: self.stored * online.rows.shape[1] * 4]
            if zlib.crc32(content) != self.crc:
                fail(f"{path} is damaged: its checksum is not the one in last.pt")
            os.truncate(path, len(content))
            rows = torch.frombuffer(bytearray(content), dtype=torch.float32).view(self.stored, -1)
            online.add(*online.split(rows).values())
        observation, _ = env.reset(seed=stream_seed(self.args.seed, "online", self.extras["episode"]))
        played = online.split(online.rows[self.extras["start"] : online.size])
        for action in played["actions"].cpu().numpy():
            observation = env.step(action)[0]
        return observation

    def act(self, env: gym.Env, action: np.ndarray) -> tuple:
        """env.step; one sentence and exit where the environment fails or returns what is not finite."""
        try:
            observation, reward, terminated, truncated, _ = env.step(action)
        except Exception as error:  # an environment may come from anywhere
            fail(f"the environment failed ({type(error).__name__}: {error}); {self.good()}")
        if not (math.isfinite(reward) and np.isfinite(observation).all()):
            fail(f"the environment returned a reward or observation that is not finite; {self.good()}")
        return observation, reward, terminated, truncated


def episode_returns(row: dict) -> list[float]:
    """The episodes' returns in a row of metrics.csv."""
    return [value for name, value in row.items() if re.fullmatch(r"return_\d+", name)]


def summarize(rows: list[dict], data: Dataset, eval_every: int) -> dict[str, float]:
    """Handover drop, regret and verdict from the rows of metrics.csv, in normalised score points.

    The offline score is that of online step 0. Window: the first 20% of the online updates, at least 2,000.
    Drop: offline score minus lowest mean of 3 consecutive evaluations in it. Smooth: a drop of at most 10%
    (or of two standard errors of the paired difference, if these are at most 10 points), an offline return
    above the dataset's mean (or no worse than its best, where every episode is), and a final score not below
    the offline one. Regret: mean of 1 - score / 100, in [0, 1], over regular evaluations.
    """
    online = [row for row in rows if row["phase"] == "online"]
    offline = online[0]
    end = max(2_000, 0.2 * online[-1]["updates"])
    window = [row for row in online if 0 < row["updates"] <= end] or online
    scores = lambda row: data.score(np.array(episode_returns(row)))
    triples = [window[i : i + 3] for i in range(max(1, len(window) - 2))]
    lowest = min(triples, key=lambda triple: np.mean([row["score"] for row in triple]))
    paired = scores(offline) - np.mean([scores(row) for row in lowest], axis=0)  # (episodes,)
    errors = 2 * paired.std() / max(1, len(paired) - 1) ** 0.5
    small = paired.mean() <= max(0.1 * offline["score"], errors if errors <= 10 else 0)
    returns, reached = data.returns(), offline["return_mean"]
    good = reached > returns.mean() or reached >= returns.max()
    kept = good and online[-1]["score"] >= offline["score"]
    grid = [row["score"] for row in online if row["step"] % eval_every == 0 and row["step"] > 0]
    regret = np.mean(1 - np.clip(grid, 0, 100) / 100) if grid else math.nan
    return dict(offline=offline["score"], drop=paired.mean(), final=online[-1]["score"], regret=regret,
                smooth=bool(small and kept))  # fmt: skip


def report(run: Run, agent: Agent) -> None:
    """learning_curve.png (both phases, handover marked, middle half of the episodes shaded) and table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    mean = run.data.score(run.data.returns().mean())
    for phase in ("offline", "online"):
        if rows := [row for row in run.rows if row["phase"] == phase]:
            handover = rows[-1]["step"] if phase == "offline" else 0
            steps = [row["step"] - handover for row in rows]
            scores = run.data.score(np.array([episode_returns(row) for row in rows]))  # (rows, episodes)
            axes.plot(steps, scores.mean(axis=1), ".-", label=f"{phase}, mean of the episodes")
            axes.fill_between(steps, *np.percentile(scores, [25, 75], axis=1), alpha=0.2)
    axes.axvline(0, color="black", ls="--", lw=1, label="handover")
    axes.axhline(mean, color="gray", ls=":", label="mean of the dataset")
    axes.set_xlabel("offline gradient updates (left), online environment steps (right)")
    axes.set_ylabel("normalised score (shaded: middle half)")
    algorithms = f"{run.spec['algorithm']}, then {run.spec['online_algorithm']}"
    axes.set_title(f"{run.args.env_id}: {algorithms}; seed {run.args.seed}")
    axes.legend(fontsize=8)
    write_atomically(run.directory / "learning_curve.png", partial(figure.savefig, dpi=120, format="png"))
    plt.close(figure)

    lines = {"mean score of the dataset": f"{mean:.1f}"}
    if run.rows and run.rows[-1]["phase"] == "online":
        s = summarize(run.rows, run.data, run.args.eval_every)
        share = f" ({100 * s['drop'] / s['offline']:.0f}%)" if s["offline"] >= 10 else ""
        lines |= {"offline score": f"{s['offline']:.1f}", "handover drop": f"{s['drop']:.1f} points{share}",
                  "final score": f"{s['final']:.1f}", "smooth": "yes" if s["smooth"] else "no",
                  f"regret over {run.args.online_steps:,} online steps": f"{s['regret']:.3f}"}  # fmt: skip
    lines |= {f"updates per second, {phase}": f"{rate:,.0f}" for phase, rate in run.rates.items() if rate}
    lines |= {"learning curve": run.directory / "learning_curve.png", "all files": run.directory}
    if run.args.video:
        video = run.directory / "episode.gif"
        lines["video"] = film(agent.actor, run.make_env, video, run.device) or video
    print("\n" + "\n".join(f"{key:<36}  {value}" for key, value in lines.items()))


# === The phases ============================================================================================


def set_statistics(network: nn.Module, data: Dataset) -> None:
    """Puts the dataset's observation mean and standard deviation (plus 1e-3, as CORL) into every MLP."""
    observations = data.columns["observations"].astype(np.float64)
    for mlp in (module for module in network.modules() if isinstance(module, MLP)):
        mlp.mean[: observations.shape[1]] = torch.as_tensor(observations.mean(axis=0))
        mlp.std[: observations.shape[1]] = torch.as_tensor(observations.std(axis=0) + 1e-3)


def outcomes(data: Dataset, gamma: float) -> np.ndarray:
    """w: every transition's return-to-go, normalised over the dataset, (T,)."""
    w = returns_to_go(data.reward(data.columns["rewards"]), data.columns["terminations"], data.ends, gamma)
    return (w - w.mean()) / (w.std() + 1e-6)


def held_out(data: Dataset) -> np.ndarray:
    """Which transitions belong to the episodes that the score estimator does not see, every 20th, (T,)."""
    episode = np.searchsorted(data.ends, np.arange(data.ends[-1]), side="right")
    return episode % 20 == (min(10, len(data.ends) - 1) or -1)


def transitions(data: Dataset) -> list[np.ndarray]:
    """The columns of `transition_widths`, with the rewards that the losses see."""
    return [data.reward(c) if name == "rewards" else c for name, c in data.columns.items()]


def complete_returns(buffer: ReplayBuffer, start: int, gamma: float) -> None:
    """Writes the returns-to-go from row `start`, where an episode begins, on; -inf in one under way."""
    columns = buffer.split(buffer.rows[start : buffer.size])  # views
    rewards, terminations, ends = (columns[n].cpu().numpy() for n in ("rewards", "terminations", "ends"))
    ends = 1 + np.flatnonzero(ends)
    known = ends.max(initial=0)
    found = returns_to_go(rewards[:known], terminations[:known], ends, gamma)
    columns["returns_to_go"].fill_(-math.inf)
    columns["returns_to_go"][:known] = torch.as_tensor(found, dtype=torch.float32)


def calql_buffer(run: Run, capacity: int) -> ReplayBuffer:
    """An empty buffer of transitions with two columns more: the return-to-go, and 1 where an episode ends."""
    widths = transition_widths(run.spec["obs_dim"], run.spec["act_dim"])
    return ReplayBuffer(widths | dict(returns_to_go=0, ends=0), capacity, run.device)


def recorded_transitions(run: Run) -> ReplayBuffer:
    """The dataset with its returns-to-go, of the rewards that the target sees (scale and bias: its metadata).

    Actions stay as recorded. Public codes clip them at 0.99999 for an atanh, which no loss here takes.
    """
    count = run.data.ends[-1]
    buffer, ends = calql_buffer(run, count), np.zeros(count)
    ends[run.data.ends - 1] = 1
    buffer.add(*transitions(run.data), np.zeros(count), ends)
    complete_returns(buffer, 0, run.args.gamma)
    return buffer


def train_offline_calql(run: Run) -> tuple[Agent, nn.Module]:
    """Cal-QL, or CQL without calibration, on the recording."""
    args = run.args
    torch.manual_seed(stream_seed(args.seed, "offline"))
    agent = make_agent(run.spec).to(run.device)
    set_statistics(agent, run.data)
    # log alpha' starts at 1, as in Cal-QL and CORL; in WSRL alpha' does
    multiplier = nn.ParameterDict({"log_alpha_prime": torch.ones((), device=run.device)})
    optimizers = make_optimizers(agent, args.offline_optimizer, args, multiplier.parameters())
    buffer = recorded_transitions(run)

    def update() -> dict[str, Tensor]:
        batch = buffer.split(buffer.sample_rows(args.batch_size))
        return calql_update(agent, multiplier, batch, optimizers, args, True)

    update = captured(update, optimizers, args.compile)
    modules = {"agent": agent, "multiplier": multiplier, "score_net": nn.Module()}
    for step in run.steps("offline", args.offline_steps, modules, optimizers):
        run.metrics, run.updates = update(), step
    return agent, multiplier


def train_online(run: Run, agent: Agent, multiplier: nn.Module) -> None:
    """The same losses in the environment, calibrated by the returns-to-go of the episodes that have ended."""
    args, data, device = run.args, run.data, run.device
    torch.manual_seed(stream_seed(args.seed, "online"))
    optimizers = make_optimizers(agent, args.online_optimizer, args, multiplier.parameters())
    modules = {"agent": agent, "multiplier": multiplier, "score_net": nn.Module()}
    offline, online = recorded_transitions(run), calql_buffer(run, args.online_steps)
    env = run.make_env()
    observation = run.recall(online, env)
    complete_returns(online, 0, args.gamma)  # of a resumed run: what was saved in mid-episode has none
    # no batch holds more online rows than there are: the first update waits for that many steps
    share = max(args.offline_fraction, 0)
    first_update = max(args.warmup_steps, args.batch_size - round(args.batch_size * share))
    run.window = max(2_000, 0.2 * args.utd_ratio * (args.online_steps - first_update))
    if first_update >= args.online_steps:
        print(f"note: no update in {args.online_steps:,} steps: the first waits for {first_update:,}")
    run.metrics, run.updates = {}, args.utd_ratio * max(0, online.size - first_update)

    def update(old: int, last: bool) -> dict[str, Tensor]:
        rows = [offline.sample_rows(old), online.sample_rows(args.batch_size - old)]
        batch = online.split(torch.cat(rows))  # a fresh one for each update of a step, mixed alike
        return calql_update(agent, multiplier, batch, optimizers, args, last)

    updates = lru_cache(2)(lambda *of: captured(partial(update, *of), optimizers, args.compile))
    row = torch.zeros(1, len(observation), device=device)  # the observation to act on
    act = captured(lambda: agent.actor.sample(row)[0][0], [], args.compile)

    for step in run.steps("online", args.online_steps, modules, optimizers):
        with torch.no_grad():
            row.copy_(torch.as_tensor(observation)[None])
            action = act().cpu().numpy()
        if step <= first_update and not (args.checkpoint or args.offline_steps):  # nothing was trained yet
            action = (2 * torch.rand(len(action)) - 1).numpy()
        next_observation, reward, terminated, truncated = run.act(env, action)
        observed = (observation, action, data.reward(reward), next_observation, terminated)
        run.boundary = terminated or truncated
        online.add(*observed, -math.inf, run.boundary)  # the return-to-go is not known yet
        observation = next_observation
        if run.boundary:
            complete_returns(online, run.extras["start"], args.gamma)
            run.extras = {"episode": run.extras["episode"] + 1, "start": online.size}
            observation, _ = env.reset(seed=stream_seed(args.seed, "online", run.extras["episode"]))
        run.updates = args.utd_ratio * max(0, step - first_update)
        if args.offline_fraction < 0:
            share = offline.size / (offline.size + step)
        old = round(args.batch_size * share)
        for left in reversed(range(args.utd_ratio if run.updates else 0)):
            run.metrics = updates(old, left == 0)()


# === Main ==================================================================================================


# allowed values of the settings
AT_LEAST_ONE = ("hidden_sizes", "score_hidden_sizes", "batch_size", "num_critics", "utd_ratio", "eval_every",
                "handover_eval_every", "eval_episodes", "policy_delay", "score_levels", "cql_actions",
                "alignment_decay", "weight_clip")  # fmt: skip
AT_LEAST_ZERO = ("score_steps", "offline_steps", "online_steps", "warmup_steps", "snapshot_every", "kappa",
                 "checkpoint_every", "muon_lr", "actor_lr", "critic_lr", "score_lr", "bc_alpha",
                 "policy_noise", "noise_clip", "exploration_noise", "alignment_steps", "top_episodes",
                 "inverse_temperature", "return_range")  # fmt: skip
SHARES = ("gamma", "tau", "best_episodes", "data_fraction", "expectile")  # from 0 to 1


def parse_args() -> Args:
    """Settings: flag given > the resumed run's or the checkpoint's own > TASK_DEFAULTS > Args."""
    words = [part for word in sys.argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = dict(pairwise(words))
    settings = TASK_DEFAULTS.get(given.get("--env-id", given.get("--env_id", Args.env_id)), {})
    if "--resume" in given:
        try:
            settings = json.loads((Path(given["--resume"]) / "config.json").read_text())["args"]
        except (OSError, ValueError, KeyError) as error:
            fail(f"{given['--resume']} is not a run directory that can be resumed ({error})")
        if settings.keys() != vars(Args()).keys():
            fail(f"{given['--resume']} is of another script or version: resume it with the copy in it")
    elif "--checkpoint" in given:
        state = load_checkpoint(Path(given["--checkpoint"]))
        own = {key: state[key] for key in vars(Args()).keys() & state.keys() - OWN}
        settings = TASK_DEFAULTS.get(state["env_id"], {}) | own
    default = Args(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    args = tyro.cli(Args, description=__doc__, default=default)
    changed = {key for key, value in vars(args).items() if value != vars(default)[key]}
    if args.resume and changed - {"resume", "device", "compile", "checkpoint_every"}:
        fail(f"--resume takes the run's own settings: leave out {', '.join(sorted(changed - {'resume'}))}")
    limits = dict.fromkeys(AT_LEAST_ONE, (1, math.inf)) | dict.fromkeys(AT_LEAST_ZERO, (0, math.inf))
    limits |= dict.fromkeys(SHARES, (0, 1)) | {"score_sigma": (1e-3, 0.9), "offline_fraction": (-1, 1)}
    for name, (low, high) in limits.items():
        values = getattr(args, name, low)
        for value in values if isinstance(values, tuple) else [values]:
            if not low <= value <= high or (name == "offline_fraction" and -1 < value < 0):
                bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                bounds = "-1 or from 0 to 1" if low == -1 else bounds
                fail(f"--{name.replace('_', '-')} {value} is out of range: it has to be {bounds}")
    if not 0 <= args.target_critics <= args.num_critics:
        fail(f"--target-critics {args.target_critics} is out of range: there are {args.num_critics} critics")
    return args


def open_run(args: Args, algorithm: str, online_algorithm: str) -> Run:
    """Device, data, environment and directory of a new or a resumed run.

    `run.origin` is the checkpoint that goes online in the place of an own pre-training; {}: there is none.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small products need no more
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch finds no GPU here: use --device cpu")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    args.compile = args.compile and device.type == "cuda"
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can't be captured
    task_dataset, env_spec, kwargs = TASKS.get(args.env_id, (args.env_id, None, {}))
    dataset_id = args.dataset_id or task_dataset
    data = load_dataset(dataset_id, args.download)
    data = select_episodes(data, args.best_episodes, args.data_fraction, args.seed)
    if args.batch_size > data.ends[-1]:
        fail(f"--batch-size {args.batch_size} is larger than the data: {data.ends[-1]} transitions")
    wrappers = data.metadata.get("wrappers", [])
    try:
        if env_spec is None:  # a Minari dataset knows its own environment
            import minari

            folder = find_dataset(dataset_id, download=False)
            env_spec = minari.MinariDataset(folder / "data").recover_environment(eval_env=True).spec
        plain = gym.make(env_spec, **kwargs)
        env, env_spec = make_env(plain.spec, wrappers), plain.spec
    except Exception as error:  # an environment may come from any package
        fail(f"the environment of {dataset_id} can't be made ({error}): install its package (kitchen, Adroit "
             "and mazes: pip install gymnasium-robotics==1.4.2)")  # fmt: skip
    entry_point = env_spec.entry_point if isinstance(env_spec.entry_point, str) else "gymnasium"
    package = re.split("[.:]", entry_point)[0]  # importing it registers the environment
    env_id = env_spec.id if package == "gymnasium" else f"{package}:{env_spec.id}"
    env_kwargs, known = env_spec.kwargs | kwargs, gym.registry.get(env_spec.id)
    if known and known.max_episode_steps != env_spec.max_episode_steps:  # the recording's own time limit
        env_kwargs |= {"max_episode_steps": env_spec.max_episode_steps}
    flattening = "by name" if isinstance(plain.observation_space, gym.spaces.Dict) else "none"
    shapes = [data.columns[name].shape[1:] for name in ("observations", "actions")]

    directory, state, origin = Path(args.resume or run_name(args)), {}, {}
    if args.resume:
        names, newest = ("final.pt", "last.pt", "previous.pt", "offline.pt"), None
        for name in (name for name in names if (directory / name).exists()):
            found, reason = read_checkpoint(directory / name)
            if reason:
                print(f"note: {reason}")
            elif not newest or (PHASES.index(found["phase"]), found["step"]) > newest:
                newest, state = (PHASES.index(found["phase"]), found["step"]), found
        if not state:
            fail(f"{directory} holds no checkpoint to go on from: start that run again")
        if state["dataset_checksum"] != data.checksum:
            fail(f"{directory} comes from other data than {dataset_id} holds now: restore them")
        if state["online_algorithm"] != online_algorithm:
            fail(f"{directory} goes online with {state['online_algorithm']}: resume it with its own script")
    if args.checkpoint:
        if args.online_steps == 0:
            fail("--online-steps 0 leaves nothing to do after --checkpoint: name a number of steps")
        origin = state or load_checkpoint(Path(args.checkpoint))
        algorithm = origin["algorithm"]
        if "agent" not in origin:
            fail(f"{args.checkpoint} holds a policy without critics: take an offline.pt or a final.pt")
        if not state and "pi_0" in origin["extras"]:
            fail(
                f"{args.checkpoint} holds ACA's aligned critics, no run starts from them: take an offline.pt"
            )
    spec = vars(args) | dict(algorithm=algorithm, online_algorithm=online_algorithm, env=env_id,
                             env_kwargs=env_kwargs, wrappers=wrappers, dataset_id=dataset_id,
                             counts=data.metadata.get("return", "sum of rewards"),
                             flattening=flattening,
                             dataset_checksum=data.checksum, obs_dim=shapes[0][0], act_dim=shapes[1][0],
                             log_std_bounds=(LOG_STD_MIN, LOG_STD_MAX), action_bounds=(-1.0, 1.0),
                             reward_bias=data.reward(0.0), reward_scale=data.reward(1.0) - data.reward(0.0),
                             versions={name: version(name) for name in PACKAGES})  # fmt: skip
    for name in FIXED if origin else ():
        if origin[name] != spec[name]:
            fail(f"{args.checkpoint} contradicts this run: its {name} is {origin[name]}, not {spec[name]}")
    if shapes != [env.observation_space.shape, env.action_space.shape]:
        fail(f"observations and actions have shapes {shapes} in {dataset_id}, others in {env_id}")
    if not args.resume:
        config = dict(spec, args=vars(args), resolved_device=str(device), command=sys.argv)
        try:
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps(config, indent=2))
            shutil.copy(__file__, directory)
        except OSError as error:
            fail(f"the run directory {directory} can't be made ({error})")
    mean = data.returns().mean()
    print(f"{dataset_id}: {data.ends[-1]:,} transitions, {len(data.ends):,} episodes, mean return {mean:.1f}"
          f" (score {data.score(mean):.1f})\nrun directory: {directory}")  # fmt: skip
    run = Run(args, directory, data, env_spec, spec, device, state)
    run.origin = origin and origin | {name: spec[name] for name in ("target_critics", "target_entropy")}
    if origin and not state and origin["phase"] == "offline":  # its evaluations come first in metrics.csv
        run.rows, run.began = origin["rows"], run.began - origin["seconds"]
    return run


def run_name(args: Args) -> str:
    """runs/{env_id}__{script}__{seed}__{start time}, ids with - for /."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    return f"runs/{name.replace('/', '-')}"


def main() -> None:
    args = parse_args()
    if args.video_only:
        return film_checkpoint(args)
    if args.checkpoint:
        fail("--checkpoint goes with --video-only here; sac_finetune.py and td3_finetune.py take one online")
    # one freed block of 31 MB, and glibc keeps freed memory from then on: no page faults, 20% faster
    torch.empty(31 << 18)
    name = "Cal-QL" if args.calibrate else "CQL"
    run = open_run(args, name, name)
    try:
        agent, multiplier = train_offline_calql(run)
        if args.online_steps > 0:
            train_online(run, agent, multiplier)
        report(run, agent)
    except OSError as error:
        fail(f"{error}: if the disk is full, free some space, then --resume {run.directory}; {run.good()}")
    finally:
        run.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
