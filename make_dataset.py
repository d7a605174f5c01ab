"""Make datasets in Minari's format: record one, bring in D4RL's, AWAC's or one's own, or cut one down.

    python make_dataset.py record --env-id Hopper-v5 --dataset-id me/hopper/medium-replay-v0
    python make_dataset.py d4rl hopper-medium-replay    # downloads the file, or takes it with --file
    python make_dataset.py numpy episodes.npz --env-id my_package:MyEnv-v0 --dataset-id me/myenv/first-v0 \
        --ref-min-score 0 --ref-max-score 100
    python make_dataset.py awac door2_sparse.npy door_bc_sparse4.npy
    python make_dataset.py select smac/hopper/medium-replay-v0 --best 0.1 --dataset-id me/hopper/best-tenth-v0

Observations are flat float32 vectors. The wrappers below stand in a dataset's env_spec by name, so
`gym.make(env_spec)` puts them on wherever this file can be imported, as it can beside the training scripts.
"""

import copy
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import re
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.spaces import Box, Dict
from gymnasium.utils import RecordConstructorArgs
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from torch import Tensor, nn

# === Wrappers: what makes an environment the one of the data ===============================================


class TaskWrapper(gym.Wrapper, RecordConstructorArgs):
    """A wrapper with arguments that an env_spec can hold: gym.make(env.spec) puts it on again."""

    def __init__(self, env: gym.Env, **kwargs):
        RecordConstructorArgs.__init__(self, **kwargs)
        gym.Wrapper.__init__(self, env)


class HealthyRewardAtFall(TaskWrapper):
    """Hopper and Walker2d as in Gym's v2 to v4: the healthy reward of 1 is paid on the falling step, too."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward + float(terminated), terminated, truncated, info


class BinaryReward(TaskWrapper):
    """Adroit as in AWAC and Cal-QL: 1 on the step that succeeds, which ends the episode, and 0 before."""

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        success = bool(info["success"])
        return observation, float(success), terminated or success, truncated, info


class LatchedKitchen(TaskWrapper, gym.ObservationWrapper):
    """D4RL's kitchen: positions of 9 joints and 21 object coordinates; the reward is the tasks done so far.

    With `increments` it is the tasks that the step adds: an episode's rewards sum to the tasks done.
    """

    def __init__(self, env: gym.Env, increments: bool = False):
        super().__init__(env, increments=increments)
        self.increments, self.done = increments, 0
        self.observation_space = Box(-np.inf, np.inf, (30,))

    def observation(self, observation: dict) -> np.ndarray:
        full = observation["observation"]  # 9 joints, their velocities, 21 object coordinates, theirs
        return np.r_[full[:9], full[18:39]].astype(np.float32)

    def reset(self, **kwargs):
        self.done = 0
        return super().reset(**kwargs)

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        before, self.done = self.done, len(info["episode_task_completions"])
        return observation, float(self.done - self.increments * before), terminated, truncated, info


class FlattenByName(TaskWrapper, gym.ObservationWrapper):
    """The parts of a Dict observation side by side, in the order of their names."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = flat_space(env.observation_space)

    def observation(self, observation: dict) -> np.ndarray:
        return flattened(observation)


def flattened(observations) -> np.ndarray:
    """Observations (..., O) in float32; the parts of a Dict side by side, in the order of their names."""
    if isinstance(observations, dict):
        return np.concatenate([flattened(observations[key]) for key in sorted(observations)], axis=-1)
    return np.asarray(observations, np.float32)


def flat_space(space: gym.Space) -> Box:
    """The space of `flattened`; ValueError where a part isn't a flat float Box."""
    if isinstance(space, Dict):
        return Box(-np.inf, np.inf, (sum(flat_space(part).shape[0] for part in space.values()),))
    if not isinstance(space, Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        raise ValueError(f"observations are {space}, where flat float Boxes or a Dict of these are needed")
    return Box(-np.inf, np.inf, space.shape)


# === Tasks =================================================================================================

ENTRY_POINTS = {  # as gymnasium-robotics registers them: to import data that package isn't needed
    f"AdroitHand{name}-v1": f"gymnasium_robotics.envs.adroit_hand.adroit_{name.lower()}:AdroitHand{name}Env"
    for name in ("Door", "Pen", "Relocate")
} | {"FrankaKitchen-v1": "gymnasium_robotics.envs.franka_kitchen:KitchenEnv"}


@dataclass
class Environment:
    """What data was recorded in: a Gymnasium environment, and what it takes to be the one of the data."""

    env_id: str
    kwargs: dict
    horizon: int
    sizes: tuple[int, int]  # of an observation and an action
    references: tuple[float, float]  # returns that stand for the scores 0 and 100
    wrappers: tuple[WrapperSpec, ...] = ()
    reward: tuple[float, float] = (1.0, 0.0)  # scale and bias for the losses
    last_reward: bool = False  # kitchen: in the data an episode counts its last reward, not their sum
    note: str = ""

    def __post_init__(self):
        observations, actions = ((size,) for size in self.sizes)
        self.spaces = Box(-np.inf, np.inf, observations), Box(-1, 1, actions)  # float32
        entry_point = ENTRY_POINTS.get(self.env_id) or gym.spec(self.env_id).entry_point
        evaluated = (LatchedKitchen.wrapper_spec(increments=True),) if self.last_reward else self.wrappers
        settings = dict(max_episode_steps=self.horizon, kwargs=self.kwargs)
        self.specs = [EnvSpec(self.env_id, entry_point, additional_wrappers=w, **settings)
                      for w in (self.wrappers, evaluated)]  # fmt: skip

    def save(self, out: Path | None, dataset_id: str, episodes: list[dict], notes: list[str], **metadata):
        """Writes the episodes as a Minari dataset of this environment."""
        metadata |= dict(zip(("ref_min_score", "ref_max_score"), self.references))
        metadata |= dict(zip(("reward_scale", "reward_bias"), self.reward))
        metadata |= {"return": "last reward"} if self.last_reward else {}
        write_dataset(out, dataset_id, episodes, self.spaces, self.specs, notes=notes, **metadata)


def kitchen(*tasks: str) -> Environment:
    """D4RL's kitchen: four tasks, noise 0.1. Reward of the losses: tasks - 4 (WSRL)."""
    kwargs = dict(tasks_to_complete=list(tasks), object_noise_ratio=0.1, robot_noise_ratio=0.1,
                  terminate_on_tasks_completed=True, remove_task_when_completed=False)  # fmt: skip
    note = "observations are the first 30 of D4RL's 60: positions of robot (9) and objects (21), no goal"
    latched = (LatchedKitchen.wrapper_spec(increments=False),)
    return Environment("FrankaKitchen-v1", kwargs, 280, (30, 9), (0, 4), latched, (1.0, -4.0), True, note)


# Environments and reference scores of D4RL (d4rl/infos.py). Its Hopper and Walker2d (Gym's v2) give the
# healthy reward on the falling step too, which v5 doesn't, and Walker2d's feet have walker2d.xml's friction.
FALL = (HealthyRewardAtFall.wrapper_spec(),)
D4RL_ENVIRONMENTS = {
    "hopper": Environment("Hopper-v5", {}, 1000, (11, 3), (-20.272305, 3234.3), FALL),
    "walker2d": Environment(
        "Walker2d-v5", {"xml_file": "walker2d.xml"}, 1000, (17, 6), (1.629008, 4592.3), FALL),
    "halfcheetah": Environment("HalfCheetah-v5", {}, 1000, (17, 6), (-280.178953, 12135.0)),
    "door": Environment(
        "AdroitHandDoor-v1", {"reward_type": "dense"}, 200, (39, 28), (-56.512833, 2880.5693087298737),
        note="gymnasium-robotics 1.4 adds 0.1 |palm - object| to the reward where D4RL's subtracts it"),
    "pen": Environment(
        "AdroitHandPen-v1", {"reward_type": "dense"}, 100, (45, 24), (96.262799, 3076.8331017826877),
        note="D4RL's environment terminates when the pen is dropped, gymnasium-robotics' doesn't"),
    "kitchen-complete": kitchen("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial": kitchen("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed": kitchen("microwave", "kettle", "bottom burner", "light switch"),
}  # fmt: skip
# Returns of a random policy and an expert, of environments to record: what the scores 0 and 100 stand for.
REFERENCE_SCORES = {env.env_id: env.references for env in D4RL_ENVIRONMENTS.values()}
REFERENCE_SCORES["Pendulum-v1"] = (-1230.0, -150.0)  # means of 1,000 random episodes, of SAC at 10,000 steps
# AWAC's sparse tasks: a success is worth 1 and ends the episode, so the score is the rate of success.
# Cal-QL's losses see 10 (success - 1) + 5.
BINARY = dict(references=(0.0, 1.0), wrappers=(BinaryReward.wrapper_spec(),), reward=(10.0, -5.0))
AWAC_ENVIRONMENTS = {
    "door": Environment("AdroitHandDoor-v1", {}, 200, (39, 28), **BINARY),
    "pen": Environment("AdroitHandPen-v1", {}, 100, (45, 24), **BINARY),
    "relocate": Environment("AdroitHandRelocate-v1", {}, 200, (39, 30), **BINARY),
}

D4RL_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # d4rl/infos.py
D4RL_MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # some files there are cut off
D4RL_FILES = {  # path and SHA-256 (tensorflow_datasets/d4rl/*/checksums.tsv, none for kitchen), by name
    "kitchen-complete-v0": ("kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5", None),
    "kitchen-partial-v0": ("kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5", None),
    "kitchen-mixed-v0": ("kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5", None),
}
BUNDLED = Path(__file__).resolve().parent / "datasets"
for line in "".join(sums.read_text() for sums in BUNDLED.glob("d4rl.sha256")).splitlines():
    sha256, path = line.split()
    D4RL_FILES[Path(path).stem.replace("_", "-")] = path, sha256


# === Writing a dataset =====================================================================================


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


@contextmanager
def explained(what: str):
    """One sentence, `what` and the reason, in the place of an exception: damaged files raise many kinds."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {'' if type(error) is ValueError else type(error).__name__ + ': '}{str(error)[:400]}")


def stream_seed(seed: int, phase: str, index: int = 0) -> int:
    """Seed of a random stream, from (seed, phase, index) alone: a phase is the same in every script."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{phase}/{index}".encode()).digest()[:4], "little") % 2**31


def check(out: Path | None, dataset_id: str, low=0.0, high=1.0, files: tuple = ("a file",)) -> Path:
    """Where a new dataset goes; one sentence for no file, a bad or taken id, or scores out of order."""
    if not files:
        fail("no file is given: name one or several")
    if not low < high:
        fail(f"--ref-min-score {low} has to be below --ref-max-score {high}: they are the scores 0 and 100")
    with explained("the dataset can't have this id, which looks like me/hopper/mine-v0"):
        parse_dataset_id(dataset_id)
    folder = (out or get_dataset_path()) / dataset_id
    if folder.exists():
        fail(f"{folder} exists already: remove it or choose another --dataset-id or --out")
    return folder


def write_episodes(path: Path, episodes: list[dict]) -> None:
    """Minari's HDF5 layout, compressed, without time stamps: the same episodes give the same bytes."""
    with h5py.File(path, "w", libver="latest") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            attributes = {"id": i, "seed": episode.get("seed"), "total_steps": len(episode["rewards"])}
            group.attrs.update({name: np.int64(v) for name, v in attributes.items() if v is not None})
            for name in ("actions", "observations", "rewards", "terminations", "truncations"):
                column = np.asarray(episode[name])
                group.create_dataset(name, data=column, chunks=column.shape, compression=9, shuffle=True)


def returns_of(episodes: list[dict], metadata: dict) -> np.ndarray:
    """What every episode counts (E,): the sum of its rewards, or the last where the metadata say so."""
    rewards = [np.float64(np.float32(episode["rewards"])) for episode in episodes]
    return np.array([r[-1] if metadata.get("return") == "last reward" else r.sum() for r in rewards])


def write_dataset(out: Path | None, dataset_id: str, episodes: list[dict], spaces, specs, **metadata) -> None:
    """Writes the episodes as a Minari dataset, complete or not at all, and prints what they are.

    spaces: of observations and actions; specs: of the environment that data comes from, and of evaluations'.
    """
    target, out, returns = check(out, dataset_id), out or get_dataset_path(), returns_of(episodes, metadata)
    sizes = dict(total_episodes=len(episodes), total_steps=sum(len(e["rewards"]) for e in episodes))
    names = "return_min", "return_median", "return_90th_percentile", "return_max"
    statistics = dict(zip(names, np.percentile(returns, (0, 50, 90, 100)).round(2).tolist()))
    statistics |= {"return_mean": round(float(returns.mean()), 2)}
    statistics |= {n: sum(int(e[n][-1]) for e in episodes) for n in ("terminations", "truncations")}
    metadata |= dict(dataset_id=dataset_id, minari_version=minari.__version__, statistics=statistics, **sizes)
    metadata |= dict(eval_env_spec=specs[1].to_json(), horizon=specs[0].max_episode_steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as root:
            data = Path(root) / dataset_id / "data"
            data.parent.mkdir(parents=True)
            MinariStorage.new(data, *spaces, specs[0])
            write_episodes(data / "main_data.hdf5", episodes)
            content = (data / "main_data.hdf5").read_bytes()
            metadata["data_checksum"] = hashlib.sha256(content).hexdigest()
            metadata["dataset_size"] = round(len(content) / 1e6, 1)
            path = data / "metadata.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
            for file in (out / name / "namespace_metadata.json" for name in Path(dataset_id).parents[:-1]):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(file.read_text() if file.exists() else "{}")
            os.replace(data.parent, target)
    except OSError as error:
        fail(f"the dataset can't be written to {out} ({error}), nothing is kept: make room or choose --out")
    lines = [f"{key:<24}{value:>14,}" for key, value in (sizes | statistics).items()]
    lines += [f"note: {note}" for note in metadata.get("notes", ())]
    print(*lines, f"sha256 {metadata['data_checksum']}", f"{dataset_id} is written to {target}", sep="\n")


# === record: SAC and all that it collects ==================================================================


@dataclass
class Record:
    """Train SAC (Haarnoja et al. 2018) on a Gymnasium environment and record its replay.

    Every transition is kept, up to the first evaluation of the deterministic policy whose normalised score,
    100 (R - R_random) / (R_expert - R_random), lies in [33, 60]: "medium-replay" in this collection.
    With --policy nothing is trained: these are episodes of that policy, with its actions drawn.
    """

    env_id: str  # Gymnasium environment to record, e.g. Hopper-v5
    dataset_id: str  # Minari id of the result, e.g. smac/hopper/medium-replay-v0
    out: Path = BUNDLED  # folder that receives the dataset
    policy: Path | None = None  # a training script's final.pt, offline.pt or last.pt: record its policy
    seed: int = 1  # seed of networks, exploration, sampling and environment
    device: Literal["cpu", "cuda"] = "cpu"
    min_score: float = 33.0  # stop at the first evaluation with at least this normalised score ...
    max_score: float = 60.0  # ... and at most this one
    ref_min_score: float | None = None  # return of a random policy (score 0); default: REFERENCE_SCORES
    ref_max_score: float | None = None  # return of an expert policy (score 100); default: REFERENCE_SCORES
    min_steps: int = 0  # evaluations before this many environment steps do not stop the recording
    max_steps: Annotated[int, tyro.conf.arg(aliases=("--total-steps",))] = 150_000  # stop here at the latest
    eval_every: int = 5_000  # environment steps between evaluations; each waits for the end of an episode
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    critic_layer_norm: bool = False  # LayerNorm before every activation of the critics
    batch_size: int = 256  # transitions of a gradient update
    actor_lr: float = 3e-4  # Adam learning rate of the actor and the temperature (rlkit's and RLPD's value)
    critic_lr: float = 3e-4  # Adam learning rate of the critics (rlkit's and RLPD's value)
    random_steps: int = 5_000  # uniformly random actions before the first update (CleanRL's learning_starts)

    def run(self) -> None:
        pairs = zip((self.ref_min_score, self.ref_max_score), REFERENCE_SCORES.get(self.env_id, (None, None)))
        low, high = (known if given is None else given for given, known in pairs)
        if None in (low, high):
            fail(f"no reference scores are known for {self.env_id}: give --ref-min-score and --ref-max-score")
        check(self.out, self.dataset_id, low, high)
        env = flat_env(self.env_id, unit_actions=True)
        spaces = Box(-np.inf, np.inf, env.observation_space.shape), Box(-1, 1, env.action_space.shape)
        source, agent = self.trained(*(space.shape[0] for space in spaces)) if self.policy else ({}, None)
        episodes, scores = self.collect(low, high, agent)
        settings = {key: value for key, value in asdict(self).items() if key not in ("out", "policy")}
        made = dict(source=source) if source else dict(record_settings=settings)
        what = f"Every transition of the replay of a SAC agent learning {self.env_id} from scratch, up to a"
        if source:
            what = "Sampled from {script}'s policy, seed {seed}, {phase} step {step:,}, on {dataset_id}: "
            what += f"mean return {returns_of(episodes, {}).mean():.2f}; without noise it has a"
        what = f"{what} normalised score of {np.mean(scores):.1f} ({self.eval_episodes} episodes)."
        write_dataset(self.out, self.dataset_id, episodes, spaces, (env.spec, env.spec), seed=self.seed,
                      description=what.format(**source), algorithm_name=source.get("script", "SAC"),
                      author=["the authors of this collection"], author_email=["see README.md"],
                      code_permalink="make_dataset.py record", ref_min_score=low, ref_max_score=high,
                      reward_scale=1.0, reward_bias=0.0, final_scores=scores, **made)  # fmt: skip

    def trained(self, *sizes: int) -> tuple[dict, "SAC"]:
        """What --policy says of its making, and its agent, for observations and actions of these sizes."""
        with explained(f"{self.policy} holds no policy for {self.env_id}, take another checkpoint"):
            content = self.policy.read_bytes()
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            net = {name[10:]: x for name, x in state["parts"]["agent"].items() if name[:10] == "actor.net."}
            if (found := (state["obs_dim"], state["act_dim"])) != sizes:
                raise ValueError(f"its observations and actions have sizes {found}, not {sizes}")
            if not all(x.isfinite().all() for x in net.values()):
                raise ValueError("it holds NaN or infinite values")
            self.hidden_sizes = state["args"]["hidden_sizes"]
            agent = SAC(*sizes, self)
            agent.actor.load_state_dict(net)
            source = {name: state[name] for name in ("script", "phase", "step", "dataset_id")}
            source |= dict(seed=state["args"]["seed"], sha256=hashlib.sha256(content).hexdigest())
        return source, agent

    def collect(self, low: float, high: float, trained: "SAC | None" = None) -> tuple[list[dict], list]:
        """Episodes (arrays, T + 1 observations) of SAC, new or trained, and scores of its last evaluation."""
        env, eval_env = (flat_env(self.env_id, unit_actions=True) for _ in range(2))
        torch.manual_seed(stream_seed(self.seed, "record"))
        env.action_space.seed(stream_seed(self.seed, "record-actions"))
        agent = trained or SAC(env.observation_space.shape[0], env.action_space.shape[0], self)
        slow = {"params": [*agent.to(self.device).actor.parameters(), agent.log_alpha], "lr": self.actor_lr}
        adam = torch.optim.Adam([slow, {"params": agent.critic.parameters()}], self.critic_lr, fused=True)
        replay = torch.zeros(self.max_steps, sum(agent.widths), device=self.device)
        episodes, step, next_eval, finished = [], 0, math.inf if trained else self.eval_every, False
        explore = lambda s: env.action_space.sample() if step < self.random_steps else agent.act(s)
        mode = lambda s: agent.act(s, drawn=False)
        while not finished:
            seed, steps = stream_seed(self.seed, "record", len(episodes)), []
            for transition in rollout(env, agent.act if trained else explore, seed, self.max_steps - step):
                steps.append(transition)
                replay[step] = torch.as_tensor(np.hstack(transition[:5]))
                step += 1
                if step > self.random_steps and not trained:
                    agent.update(replay[torch.randint(step, (self.batch_size,))], adam)
            s, actions, rewards, next_s, *ends = map(np.array, zip(*steps))
            episodes.append(dict(actions=actions, rewards=rewards, terminations=ends[0], truncations=ends[1],
                                 observations=np.float32([*s, next_s[-1]]), seed=seed))  # fmt: skip
            finished = step >= self.max_steps
            if step >= next_eval or finished:
                next_eval = (step // self.eval_every + 1) * self.eval_every
                games = [rollout(eval_env, mode, 1000 + i) for i in range(self.eval_episodes)]
                scores = np.array([100 * (sum(row[2] for row in g) - low) / (high - low) for g in games])
                print(f"step {step:>8,}  episodes {len(episodes):>6,}  score {scores.mean():.1f}", flush=True)
                finished |= step >= self.min_steps and self.min_score <= scores.mean() <= self.max_score
        return episodes, scores.tolist()


def rollout(env: gym.Env, act, seed: int, limit: float = math.inf):
    """Transitions of an episode, cut at `limit` steps: s, a, r, s', terminated, truncated."""
    observation, step, over = env.reset(seed=seed)[0], 0, False
    while not over:
        action = act(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        step, over = step + 1, terminated or truncated or step + 1 >= limit
        yield observation, action, reward, following, terminated, over and not terminated
        observation = following


def flat_env(env_id: str, unit_actions: bool = False, **kwargs) -> gym.Env:
    """The environment; one sentence and exit where its spaces aren't flat boxes or it has no time limit."""
    with explained(f"the environment {env_id} can't be made (is its package in PYTHONPATH?)"):
        env = gym.make(env_id, **kwargs)
    box, spaces = env.action_space, (env.observation_space, env.action_space)
    if not all(isinstance(s, Box) and len(s.shape) == 1 for s in spaces) or not box.is_bounded():
        fail(f"flat Box observations and bounded flat Box actions are needed; {env_id} has {spaces}")
    if callable(maker := env.unwrapped.spec.entry_point):  # a dataset holds its name
        env.unwrapped.spec.entry_point = f"{maker.__module__}:{maker.__qualname__}"
    if env.spec.max_episode_steps is None:
        fail(f"{env_id} has no time limit; register it with max_episode_steps")
    rescale = unit_actions and ((box.low != -1).any() or (box.high != 1).any())
    return gym.wrappers.RescaleAction(env, -1.0, 1.0) if rescale else env


class Stack(nn.Module):
    """N multilayer perceptrons, evaluated together: input (B, I), output (N, B, O)."""

    def __init__(self, n: int, sizes: list[int], layer_norm: bool = False):
        super().__init__()
        self.n = n
        draw = lambda fan_in, *shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.weights = nn.ParameterList([draw(i, n, i, o) for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([draw(i, n, 1, o) for i, o in pairwise(sizes)])
        self.gains = nn.ParameterList([torch.ones(n, 1, o) for o in sizes[1:-1] if layer_norm])
        self.shifts = nn.ParameterList([torch.zeros(n, 1, o) for o in sizes[1:-1] if layer_norm])
        self.register_buffer("mean", torch.zeros(sizes[0]))  # of observations, in a trained actor
        self.register_buffer("std", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        x, (*hidden, last) = x.contiguous().expand(self.n, -1, -1), self.weights
        for i, weight in enumerate(hidden):
            x = torch.baddbmm(self.biases[i], x, weight)  # (N, B, H)
            if self.gains:
                x = F.layer_norm(x, x.shape[-1:]) * self.gains[i] + self.shifts[i]
            x = torch.relu_(x)
        return torch.baddbmm(self.biases[-1], x, last)


class SAC(nn.Module):
    """Soft actor-critic: a = tanh(u), u ~ N(mean(s), std(s)^2), two critics and the temperature alpha."""

    def __init__(self, obs_dim: int, act_dim: int, args: Record):
        super().__init__()
        sizes, layer_norm = [obs_dim + act_dim, *args.hidden_sizes, 1], args.critic_layer_norm
        self.args, self.widths = args, [obs_dim, act_dim, 1, obs_dim, 1]  # columns of a transition
        self.actor = Stack(1, [obs_dim, *args.hidden_sizes, 2 * act_dim])
        self.critic, self.target = Stack(2, sizes, layer_norm), Stack(2, sizes, layer_norm)
        self.target.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def policy(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """mean (B, A) and log std (B, A), from -5 to 2, of the Gaussian before the tanh."""
        mean, log_std = self.actor((s - self.actor.mean) / self.actor.std).squeeze(0).chunk(2, dim=-1)
        return mean, -5.0 + 0.5 * 7.0 * (torch.tanh(log_std) + 1)

    def sample(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) and log pi(a|s) (B,) = sum log N(u) - log(1 - tanh(u)^2), without underflow."""
        mean, log_std = self.policy(s)
        u = mean + log_std.exp() * torch.randn_like(mean)
        gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return torch.tanh(u), (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

    def update(self, rows: Tensor, adam: torch.optim.Optimizer) -> None:
        """A gradient step on a batch of transitions (B, columns)."""
        s, a, r, next_s, terminal = rows.split(self.widths, dim=1)
        value = lambda critic, s, a: critic(torch.cat([s, a], dim=-1)).squeeze(-1)  # (N, B)
        q, alpha = value(self.critic, s, a), self.log_alpha.exp().detach()
        with torch.no_grad():  # y = r + gamma (1 - terminal) (min_j Qbar_j(s', a') - alpha log pi(a'|s'))
            next_a, log_prob = self.sample(next_s)
            soft_value = value(self.target, next_s, next_a).amin(dim=0) - alpha * log_prob
            y = r.squeeze(1) + 0.99 * (1 - terminal.squeeze(1)) * soft_value
        ((q - y) ** 2).mean().backward(inputs=list(self.critic.parameters()))
        # L_pi = E[alpha log pi(a|s) - min_i Q_i(s, a)],  L_alpha = -alpha E[log pi(a|s) + target entropy]
        a, log_prob = self.sample(s)
        loss = (alpha * log_prob - value(self.critic, s, a).amin(dim=0)).mean()
        loss = loss - (self.log_alpha.exp() * (log_prob.detach() - a.shape[-1])).mean()
        loss.backward(inputs=[*self.actor.parameters(), self.log_alpha])
        adam.step()
        adam.zero_grad()
        targets, critics = list(self.target.parameters()), [x.detach() for x in self.critic.parameters()]
        torch._foreach_lerp_(targets, critics, 0.005)

    @torch.no_grad()
    def act(self, observation: np.ndarray, drawn: bool = True) -> np.ndarray:
        """Action (A,) for an observation (O,): drawn from the policy, or tanh(mean)."""
        s = torch.as_tensor(observation, dtype=torch.float32, device=self.args.device)[None]
        return (self.sample(s)[0] if drawn else torch.tanh(self.policy(s)[0]))[0].cpu().numpy()


# === Layouts: a file becomes rows ==========================================================================

# Rows are transitions as arrays (T, ...) by name: observations, actions, rewards, next_observations,
# terminations, truncations. A reader says in `notes` what it did to them.


def spans(ends: np.ndarray) -> list[tuple[int, int]]:
    """First row and the row behind the last of every episode; ends (T,): is this the last row of one?"""
    stops = np.flatnonzero(ends) + 1
    return list(zip(np.r_[0, stops[:-1]].tolist(), stops.tolist()))


def columns_of(file, *names: str) -> dict[str, np.ndarray]:
    """The named columns of an HDF5 or .npz file, all of one length."""
    columns = {name: np.atleast_1d(file[name][()]) for name in names}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"its columns have lengths {lengths}")
    return columns


def with_successors(rows: dict, ends: np.ndarray, notes: list[str]) -> dict:
    """next_observations of a file that has none, from the row behind. `ends` (T,): last rows of the episodes.

    The last row of an episode that time (or the file's end) cut has no successor and is dropped: the episode
    ends one row earlier. A terminated row stays, as y = r needs none; its own observation stands in.
    """
    successors = np.concatenate([rows["observations"][1:], rows["observations"][-1:]])
    successors[ends] = rows["observations"][ends]
    unknown = ends & ~rows["terminations"]
    truncations = np.r_[unknown[1:], False] & ~ends & ~rows["terminations"]  # the row before a dropped one
    notes.append(f"{unknown.sum():,} rows dropped, the last of episodes cut by time: they have no successor")
    rows = rows | dict(next_observations=successors, truncations=truncations)
    return {name: column[~unknown] for name, column in rows.items()}


def read_flagged(file, notes: list[str]) -> dict:
    """D4RL's locomotion and adroit: terminals against timeouts, next_observations where they are there."""
    given = ("next_observations",) if "next_observations" in file else ()
    rows = columns_of(file, "observations", "actions", "rewards", "terminals", "timeouts", *given)
    terminals, timeouts = (rows.pop(name).astype(bool).reshape(-1) for name in ("terminals", "timeouts"))
    ends = terminals | timeouts
    if not ends.any():
        raise ValueError("it has neither a terminal nor a timeout: where its episodes end is unknown")
    ends[-1] = True  # a last episode that the file cuts off counts too
    rows |= dict(terminations=terminals, truncations=ends & ~terminals)
    return rows if given else with_successors(rows, ends, notes)


def read_kitchen(file, notes: list[str]) -> dict:
    """D4RL's kitchen: no timeouts, and `terminals` marks the last row of a demonstration, not a termination.

    An episode terminates where all four tasks have been done (WSRL: where the reward first is 4), further
    rows are dropped. A task counts once it was done, as in the environment.
    """
    rows = columns_of(file, "observations", "actions", "rewards", "terminals")
    ends, rewards = rows.pop("terminals").astype(bool).reshape(-1), rows["rewards"].reshape(-1)
    if not ends[-1]:
        raise ValueError("its last row is no terminal: the last demonstration is cut off")
    rows["rewards"] = np.concatenate([np.maximum.accumulate(rewards[a:b]) for a, b in spans(ends)])
    rows["observations"], done = rows["observations"][:, :30], rows["rewards"] == 4
    notes.append(f"{sum(rows['rewards'] > rewards):,} rows in which a task was undone again count it as done")
    again = np.r_[False, done[:-1] & ~ends[:-1]]  # behind a row with all tasks done, in the same episode
    rows |= dict(terminations=done & ~again, behind=done & again)
    rows = with_successors(rows, ends & ~again, notes)
    behind = rows.pop("behind")
    notes.append(f"{behind.sum():,} rows dropped behind the first with all four tasks done")
    return {name: column[~behind] for name, column in rows.items()}


def read_numpy(path: Path) -> dict:
    """One's own episodes, see Numpy."""
    with np.load(path, allow_pickle=False) as file:
        rows = columns_of(file, "observations", "actions", "rewards", "terminations", "truncations")
        final = np.atleast_2d(columns_of(file, "final_observations")["final_observations"])
    rows |= {name: rows[name].astype(bool).reshape(-1) for name in ("terminations", "truncations")}
    ends = rows["terminations"] | rows["truncations"]
    if not ends[-1]:
        raise ValueError("it ends within an episode: set the last of truncations to True")
    if final.shape != (ends.sum(), *rows["observations"].shape[1:]):
        raise ValueError(f"final_observations have shape {final.shape}, and its episodes number {ends.sum()}")
    rows["next_observations"] = np.concatenate([rows["observations"][1:], final[-1:]])
    rows["next_observations"][ends] = final
    return rows


class Said:
    """Stands in for NumPy's objects in a pickle and keeps what is said of them, which NumPy would trust."""

    def __init__(self, *said):
        self.said = said

    def __setstate__(self, state):
        self.said += state


class PlainUnpickler(pickle.Unpickler):
    """Arrays, numbers, strings and plain containers; anything else is refused, not run."""

    known: ClassVar = {
        "numpy.dtype": Said, "numpy.ndarray": Said, "numpy._core.multiarray._reconstruct": Said,
        # as _reconstruct (3 arguments) and what it is then told: version, shape, dtype, Fortran order, bytes
        "numpy._core.multiarray.scalar": lambda dtype, data: Said(0, 0, 0, 1, (), dtype, False, data),
        "numpy._core.numeric._frombuffer": lambda data, dtype, shape, order: Said(
            0, 0, 0, 1, shape, dtype, order == "F", data),
        "_codecs.encode": str.encode, "builtins.set": set, "builtins.bytes": lambda: b"",
        "collections.OrderedDict": dict,
    }  # fmt: skip

    def find_class(self, module, name):
        wanted = f"{module}.{name}".replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        if wanted not in self.known:
            raise ValueError(f"it asks for {wanted}, and only arrays and plain containers are taken")
        return self.known[wanted]


def resolved(value):
    """The same containers with arrays in the place of their stand-ins."""
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    if not isinstance(value, Said):
        return [resolved(item) for item in value] if isinstance(value, (list, tuple)) else value
    shape, dtype, fortran, data = value.said[4:8]
    name, order = dtype.said[0], dtype.said[4]
    if name in ("O", "O8"):  # a list, in C's order always
        return resolved(np.fromiter(data, object).reshape(shape).tolist())
    if not re.fullmatch(r"[biuf]\d\d?|[SU]\d+", name):
        raise ValueError(f"it holds an array of {name!r}, and only plain numbers are taken")
    array = np.frombuffer(data, np.dtype(name).newbyteorder(order))
    return array.reshape(shape, order="F" if fortran else "C")


def unpickled(path: Path):
    """Contents of an .npy of objects, or of a plain pickle."""
    content = path.read_bytes()
    start = content.index(b"\n") + 1 if content[:6] == b"\x93NUMPY" else 0  # an .npy begins with a line
    return resolved(PlainUnpickler(io.BytesIO(content[start:])).load())


def read_awac(path: Path, notes: list[str]) -> dict:
    """AWAC's trajectories, cut and relabelled as Cal-QL does, see Awac. Every success ends an episode."""
    bare = lambda x: x["state_observation"] if isinstance(x, dict) else x
    parts, failures, clipped = [], 0, 0
    for i, trajectory in enumerate(unpickled(path)):
        part = {n: np.array([bare(x) for x in trajectory[n]]) for n in ("observations", "next_observations")}
        actions, rewards = np.array(trajectory["actions"]), np.reshape(trajectory["rewards"], -1)
        steps = len(actions)
        if {len(x) for x in part.values()} != {steps} or len(rewards) not in (steps, steps + 1):
            raise ValueError(f"trajectory {i} has columns of different lengths")
        success = rewards[:steps] == 0  # the demonstrations have a reward too many
        if not (success | (rewards[:steps] == -1)).all():
            raise ValueError(f"trajectory {i} has other rewards than -1 and 0")
        clipped += (np.abs(actions) > 1).any(axis=-1).sum()
        part |= dict(actions=actions.clip(-1, 1), rewards=success.astype(np.float64), terminations=success)
        stop = steps - np.argmax(success[::-1]) if success.any() else 0
        failures += stop == 0
        parts.append({name: column[:stop] for name, column in part.items()})
    if failures == len(parts):
        raise ValueError("none of its trajectories has a success (a reward of 0)")
    rows = {name: np.concatenate([part[name] for part in parts if len(part["rewards"])]) for name in parts[0]}
    notes.append(f"{path.name}: {len(parts):,} trajectories, {failures:,} without a success dropped, "
                 f"{clipped:,} rows with actions beyond [-1, 1] clipped")  # fmt: skip
    return rows | {"truncations": np.zeros(len(rows["rewards"]), bool)}


def to_episodes(rows: dict, spaces: tuple[Box, Box], settle: bool, notes: list[str]) -> list[dict]:
    """Episodes with T + 1 float32 observations; ValueError where the rows can't be what they claim to be."""
    observations, actions = (space.shape for space in spaces)
    sizes = dict(observations=observations, next_observations=observations, actions=actions, rewards=())
    rows["rewards"] = rows["rewards"].squeeze(1) if rows["rewards"].shape[1:] == (1,) else rows["rewards"]
    for name, size in sizes.items():
        if rows[name].shape != (len(rows["actions"]), *size):
            raise ValueError(f"{name} have shape {rows[name].shape}, where rows of shape {size} are needed")
        with np.errstate(over="ignore"):
            rows[name] = rows[name].astype(np.float32) if size else rows[name]
        if not np.isfinite(rows[name]).all():
            raise ValueError(f"{name} hold NaN or infinite values")
    low, high = np.float32(spaces[1].low), np.float32(spaces[1].high)
    beyond = ((rows["actions"] < low) | (rows["actions"] > high)).any(axis=1)
    if beyond.any():
        raise ValueError(f"{beyond.sum():,} actions lie out of bounds, the first in row {np.argmax(beyond)}")
    ends = rows["terminations"] | rows["truncations"]
    jumps = (rows["next_observations"][:-1] != rows["observations"][1:]).any(axis=1) & ~ends[:-1]
    found = f"{jumps.sum():,} rows within episodes whose next_observations isn't the next row's observation"
    if jumps.any() and not settle:
        raise ValueError(f"it has {found}, the first is {np.argmax(jumps)}; --settle ends the episodes there")
    notes += [f"{found}: the episodes end there, as truncations"] if jumps.any() else []
    rows["truncations"][:-1] |= jumps
    episodes = []
    for start, end in spans(rows["terminations"] | rows["truncations"]):
        episode = {n: rows[n][start:end] for n in ("actions", "rewards", "terminations", "truncations")}
        last = rows["next_observations"][end - 1 : end]
        episodes.append(episode | {"observations": np.concatenate([rows["observations"][start:end], last])})
    return episodes


# === d4rl, numpy, awac, select =============================================================================


@dataclass
class D4rl:
    """Bring an original D4RL file into Minari's format, as d4rl-original/ENVIRONMENT/DATA."""

    name: tyro.conf.Positional[str]  # D4RL's, with or without version: hopper-medium-replay, kitchen-mixed
    file: Path | None = None  # the file if it is on this machine; default: it is downloaded
    verify: bool = True  # compare it with the published SHA-256; --no-verify takes others of the same layout
    settle: bool = False  # cut an episode where next_observations isn't the next observation, don't refuse it
    out: Path | None = None  # folder that receives the dataset; default: Minari's, where the scripts look

    def run(self) -> None:
        name = next((name for name in D4RL_FILES if self.name in (name, name[:-3])), None)
        if name is None:
            near = ", ".join(difflib.get_close_matches(self.name, D4RL_FILES, n=3, cutoff=0.0))
            fail(f"D4RL's {self.name!r} isn't among what can be imported, the nearest names are: {near}")
        (published, sha256), task = D4RL_FILES[name], name.rsplit("-v", 1)[0]
        env = D4RL_ENVIRONMENTS.get(task) or D4RL_ENVIRONMENTS[task.split("-")[0]]
        dataset_id = f"d4rl-original/{name.replace('-', '/', 1)}"
        check(self.out, dataset_id)  # before anything is downloaded
        path, notes = self.file or self.download(published, sha256), [env.note] if env.note else []
        with explained(f"{path} can't be imported"):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if self.verify and sha256 not in (None, found):
                raise ValueError(f"its SHA-256 is {found}, D4RL published {sha256}: it is damaged or another "
                                 "file; fetch it again, or take it with --no-verify")  # fmt: skip
            with h5py.File(path) as file:
                read = read_kitchen if task.startswith("kitchen") else read_flagged
                episodes = to_episodes(read(file, notes), env.spaces, self.settle, notes)
        verified = {None: "none published", found: "as published"}.get(sha256, "not as published")
        source = dict(url=D4RL_ADDRESS + published, sha256=found, verified=verified)
        env.save(self.out, dataset_id, episodes, notes, description=f"{name} of D4RL, from {published}.",
                 source=source, author=["the authors of D4RL (arXiv 2004.07219)"])  # fmt: skip

    def download(self, path: str, sha256: str | None) -> Path:
        """The file, downloaded once; its sum, where one is published, is checked."""
        import pooch

        pooch.get_logger().setLevel("WARNING")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smac" / "d4rl"
        urls, reasons = [D4RL_ADDRESS + path, D4RL_MIRROR + Path(path).name], []
        for url in urls[: 2 if sha256 else 1]:  # the mirror is only as good as the sum
            try:
                return Path(pooch.retrieve(url, sha256, path, cache, progressbar=True))
            except Exception as error:  # of the network, the disk, or a sum that differs
                reasons.append(f"{url}: {str(error)[:200]}")
        fail(f"{Path(path).name} could not be downloaded ({'; '.join(reasons)}): fetch {urls[0]} "
             "where there is a network, and give it with --file")  # fmt: skip


@dataclass
class Numpy:
    """Bring one's own episodes into Minari's format.

    Every FILE is an .npz (numpy.savez) of N transitions of one or E episodes, one after the other:
    observations (N, O), actions (N, A), rewards (N,), terminations (N,), truncations (N,): row t is what
    was seen, done and got, and whether the environment ended the episode by itself or time (or anything
    else) cut it; final_observations (E, O), or (O,): what was seen behind each episode's last action.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]  # .npz files
    env_id: str  # environment of the episodes: Gymnasium id, or module:Id-v0 which the module registers
    dataset_id: str  # Minari id of the result, e.g. me/myenv/first-v0
    ref_min_score: float  # return of a random policy (score 0)
    ref_max_score: float  # return of an expert policy (score 100)
    max_episode_steps: int | None = None  # time limit of the environment; default: the registered one
    out: Path | None = None  # folder that receives the dataset; default: Minari's, where the scripts look

    def run(self) -> None:
        check(self.out, self.dataset_id, self.ref_min_score, self.ref_max_score, self.files)
        env, notes, episodes = flat_env(self.env_id, max_episode_steps=self.max_episode_steps), [], []
        spaces = Box(-np.inf, np.inf, env.observation_space.shape), env.action_space
        for path in self.files:
            with explained(f"{path} can't be imported"):
                episodes += to_episodes(read_numpy(path), spaces, False, notes)
        write_dataset(self.out, self.dataset_id, episodes, spaces, (env.spec, env.spec), reward_scale=1.0,
                      reward_bias=0.0, ref_min_score=self.ref_min_score, ref_max_score=self.ref_max_score,
                      description=f"Episodes of {self.env_id}.", notes=notes)  # fmt: skip


@dataclass
class Awac:
    """Bring the "binary" adroit data of AWAC (pen, door, relocate) into Minari's format, as Cal-QL reads it.

    Trajectories without a success are dropped, the others cut behind their last one. The reward is 1 for a
    success, else 0, and every success terminates: what follows within a trajectory is an episode of its own.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]  # demonstrations and rollouts of one task
    dataset_id: str = ""  # Minari id of the result; default: awac/TASK/binary-v0
    settle: bool = False  # cut an episode where next_observations isn't the next observation, don't refuse it
    out: Path | None = None  # folder that receives the dataset; default: Minari's, where the scripts look

    def run(self) -> None:
        check(self.out, self.dataset_id or "awac/task/binary-v0", files=self.files)
        notes, episodes, sums, tasks = [], [], [], dict(AWAC_ENVIRONMENTS)
        for path in self.files:
            with explained(f"{path} can't be imported"):
                rows = read_awac(path, notes)
                sizes = rows["observations"].shape[-1], rows["actions"].shape[-1]
                tasks = {task: env for task, env in tasks.items() if env.sizes == sizes}
                if not tasks:
                    known = {task: env.sizes for task, env in AWAC_ENVIRONMENTS.items()}
                    raise ValueError(f"observations and actions have {sizes} columns; one task has {known}")
                ((task, env),) = tasks.items()
                episodes += to_episodes(rows, env.spaces, self.settle, notes)
                sums.append(f"{path.name} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()})")
        what = f"Sparse-reward adroit trajectories of AWAC, cut at the last success: {', '.join(sums)}."
        authors, dataset_id = ["the authors of AWAC (arXiv 2006.09359)"], f"awac/{task}/binary-v0"
        env.save(self.out, self.dataset_id or dataset_id, episodes, notes, description=what, author=authors)


@dataclass
class Select:
    """Make a dataset of some episodes of another one: the best, a random share, or a share of the best.

    With neither --best nor --fraction it is a copy. Dict observations become flat vectors in any case, so
    this is also how Minari's kitchen, point maze and ant maze data get ready for the training scripts.
    """

    source: tyro.conf.Positional[str]  # Minari id of the dataset to take episodes from
    dataset_id: str  # Minari id of the result, e.g. me/hopper/best-tenth-v0
    best: float = 1.0  # share of the episodes to keep, those with the highest returns
    fraction: float = 1.0  # share of these episodes to keep, at random
    seed: int = 1  # seed of the random choice
    download: bool = False  # allow the network: fetch the source if it is not on this machine
    out: Path | None = None  # folder that receives the dataset; default: Minari's, where the scripts look

    def run(self) -> None:
        for name in ("best", "fraction"):
            if not 0 < getattr(self, name) <= 1:
                fail(f"--{name} {getattr(self, name)} is out of range: it is a share, above 0 and at most 1")
        check(self.out, self.dataset_id)
        source = self.open()
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        metadata = MinariStorage.read_raw_metadata(source.storage.data_path)
        with explained(f"{self.source} can't be used, take another dataset"):
            spaces = flat_space(source.observation_space), source.action_space
            specs = [copy.copy(s) for s in (source.env_spec, source._eval_env_spec or source.env_spec)]
            for spec in specs if isinstance(source.observation_space, Dict) else ():
                spec.additional_wrappers += (FlattenByName.wrapper_spec(),)
            episodes = [{name: getattr(e, name) for name in names} for e in source.iterate_episodes()]
            attributes = source.storage.get_episode_metadata(source.episode_indices)
            for episode, attribute in zip(episodes, attributes):
                episode |= dict(observations=flattened(episode["observations"]), seed=attribute.get("seed"))
            returns = returns_of(episodes, metadata)
            random = np.random.default_rng(stream_seed(self.seed, "selection"))
            order = np.argsort(-returns, kind="stable")[: max(1, round(self.best * len(returns)))]
            kept = np.sort(random.permutation(order)[: max(1, round(self.fraction * len(order)))])
        # a cut keeps the whole's scale of scores where that names none
        scale = dict(ref_min_score=float(returns.min()), ref_max_score=float(returns.max()))
        metadata |= {name: value for name, value in scale.items() if metadata.get(name) is None}
        metadata["selection"] = {n: getattr(self, n) for n in ("source", "best", "fraction", "seed")}
        what = f"{len(kept):,} of the {len(returns):,} episodes of {self.source}."
        metadata["description"] = f"{what} {metadata.get('description', '')}".strip()
        for name in "dataset_id env_spec observation_space action_space data_format jpeg_encoding".split():
            metadata.pop(name, None)
        write_dataset(self.out, self.dataset_id, [episodes[i] for i in kept], spaces, specs, **metadata)

    def open(self) -> minari.MinariDataset:
        """The source: from datasets/ beside this script, Minari's own folder or, if allowed, the network."""
        roots = BUNDLED, get_dataset_path()
        found = [root / self.source / "data" for root in roots if (root / self.source / "data").is_dir()]
        ids = [str(path.parents[1].relative_to(r)) for r in roots for path in r.glob("**/data/metadata.json")]
        near = ", ".join(difflib.get_close_matches(self.source, ids, 3, 0.0))
        with explained(f"{self.source} can't be read, near it are {near}, --download fetches others"):
            if not found:
                return minari.load_dataset(self.source, self.download)
            return minari.MinariDataset(found[0])


# === Main ==================================================================================================

COMMANDS = {"record": Record, "d4rl": D4rl, "numpy": Numpy, "awac": Awac, "select": Select}


def main() -> None:
    warnings.filterwarnings("ignore", message=".*precision lowered.*")  # gymnasium on its own float32 boxes
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS).run()
    except KeyboardInterrupt:
        fail("interrupted: no dataset was written")


if __name__ == "__main__":
    import make_dataset  # under its own name, by which datasets call the wrappers

    make_dataset.main()
