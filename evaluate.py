"""Plays many episodes with the policy of a checkpoint, in the evaluation environment of its dataset.

    python evaluate.py runs/NAME/final.pt                       # 100 episodes: mean, error, range
    python evaluate.py runs/NAME/final.pt --stochastic          # actions drawn from the policy, as SAC acts
    python evaluate.py runs/NAME/final.pt --video hopper.mp4    # and a film from the first seed (or .gif)

Episode i starts from seed 1000 + i. Of 20 or more the first 20 are the scripts' own, to the last bit.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import imageio.v3 as imageio
import minari
import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

# === Arguments =============================================================================================


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # offline.pt, last.pt or final.pt of a run
    episodes: int = 100  # episodes to play
    seed: int = 1000  # seed of the first episode, the next one's is one more; also of --stochastic
    stochastic: bool = False  # draw the actions from the policy instead of taking tanh(mean)
    video: Path | None = None  # file for a film from the first seed, .mp4 or .gif


# === Tasks and data ========================================================================================


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


class Task(NamedTuple):
    """What a policy is measured by: the evaluation environment and the reference returns of its dataset."""

    dataset: minari.MinariDataset
    low: float  # the return that scores 0
    high: float  # the return that scores 100

    def score(self, returns):
        """Normalised score 100 (R - R_random) / (R_expert - R_random)."""
        return 100 * (returns - self.low) / (self.high - self.low or 1)

    def make_env(self, **options) -> gym.Env:
        """The evaluation environment with actions in [-1, 1], as the training scripts make it."""
        env = self.dataset.recover_environment(eval_env=True, **options)
        box, one = env.action_space, np.ones(env.action_space.shape, np.float32)
        unit = np.array_equal(box.low, -one) and np.array_equal(box.high, one)
        return env if unit else gym.wrappers.RescaleAction(env, -one, one)


@lru_cache
def load_task(dataset_id: str) -> Task:
    """The task of a Minari dataset, which lies in datasets/ beside this script or in Minari's own folder."""
    bundled = Path(__file__).resolve().parent / "datasets" / dataset_id / "data"
    try:
        dataset = minari.MinariDataset(bundled) if bundled.exists() else minari.load_dataset(dataset_id)
        scores = [dataset.storage.metadata.get(name) for name in ("ref_min_score", "ref_max_score")]
        if None in scores:  # then the data's own range, as in the training scripts
            last = dataset.storage.metadata.get("return") == "last reward"
            returns = [float(e.rewards[-1] if last else e.rewards.sum()) for e in dataset.iterate_episodes()]
            scores = [s if s is not None else end(returns) for s, end in zip(scores, (min, max))]
    except Exception as error:  # Minari and h5py raise many kinds
        fail(f"dataset {dataset_id!r}, with the environment, can't be read ({error}): "
             "fetch it with a training script's --download")  # fmt: skip
    return Task(dataset, *scores)


# === Policies ==============================================================================================

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # CleanRL, sac_continuous_action.py


def load_policy(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A checkpoint's content, and the arrays of the policy in it: weights.i, biases.i, mean, std."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        agent = state["parts"]["agent"].items()
        net = {key[10:]: x.numpy() for key, x in agent if key[:10] == "actor.net."}
        assert net and all(np.isfinite(x).all() for x in net.values()), "it holds no finite policy"
    except Exception as error:  # torch raises many kinds on damaged files
        fail(f"{path} can't be read as a checkpoint ({str(error)[:200]}): take another one")
    return state, net


@torch.no_grad()
def gaussian(net: dict[str, np.ndarray], observations: np.ndarray) -> tuple[Tensor, Tensor]:
    """mean and log std (B, A) of the policy before its tanh, as the training scripts' Actor has them."""
    tensors, last = {key: torch.as_tensor(x) for key, x in net.items()}, (len(net) - 2) // 2 - 1
    x = (torch.as_tensor(observations, dtype=torch.float32)[None] - tensors["mean"]) / tensors["std"]
    for i in range(last + 1):
        x = torch.baddbmm(tensors[f"biases.{i}"], x, tensors[f"weights.{i}"])
        x = torch.relu(x) if i < last else x
    mean, log_std = x[0].chunk(2, dim=-1)
    return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)


def play(envs: list[gym.Env], act: Callable[[np.ndarray], Tensor], seed: int = 1000) -> list[float]:
    """Returns of an episode in each environment, episode i from seed + i; act: observations -> actions."""
    now = {i: env.reset(seed=seed + i)[0] for i, env in enumerate(envs)}  # of the episodes still going
    rewards = [[] for _ in envs]
    while now:  # they share one forward pass
        for i, action in zip([*now], act(np.stack([*now.values()])).numpy()):
            now[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(reward)
            if terminated or truncated:
                del now[i]
    return [float(np.sum(episode)) for episode in rewards]


# === Main ==================================================================================================


def film(env: gym.Env, act: Callable[[np.ndarray], Tensor], seed: int, path: Path) -> None:
    """Writes one episode to `path`, in real time with at most 30 frames a second."""
    rate = env.metadata.get("render_fps", 30)
    every = -(-rate // 30)  # steps from one frame to the next
    observation, frames, step, done = env.reset(seed=seed)[0], [], 0, False
    while not done:
        if step % every == 0:
            frames.append(env.render())
        observation, _, terminated, truncated, _ = env.step(act(observation[None])[0].numpy())
        step, done = step + 1, terminated or truncated
    if path.suffix == ".gif":
        imageio.imwrite(path, frames, duration=1000 * every / rate, loop=0)
    else:
        imageio.imwrite(path, frames, fps=rate / every, macro_block_size=2)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.video and args.video.suffix not in (".mp4", ".gif"):
        fail(f"--video {args.video}: its name has to end in .mp4 or .gif")
    if args.episodes < 1 or args.seed < 0:
        fail(f"--episodes {args.episodes} --seed {args.seed}: at least 1 episode and seed 0 are needed")
    gym.logger.min_level = gym.logger.ERROR  # its warnings are about old versions and float64 bounds
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # as the training scripts evaluate
    torch.manual_seed(args.seed)
    state, net = load_policy(args.checkpoint)
    task = load_task(state["dataset_id"])

    def act(observations: np.ndarray) -> Tensor:
        mean, log_std = gaussian(net, observations)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if args.stochastic else mean)

    try:
        envs = [task.make_env() for _ in range(min(20, args.episodes))]
    except Exception as error:  # an environment may come from any package
        fail(f"the environment of {state['dataset_id']} can't be made ({error}): install its package")
    returns = []
    for first in tqdm(range(0, args.episodes, len(envs)), unit=f" x {len(envs)} episodes", disable=None):
        returns += play(envs[: args.episodes - first], act, args.seed + first)
    kind = "stochastic" if args.stochastic else "deterministic"
    print(f"{state['script']}, seed {state['args']['seed']}, {state['phase']} step {state['step']:,}")
    print(f"{args.episodes} episodes of {envs[0].spec.id}, {kind} policy")
    print(f"{'':<18}{'mean':>10}{'std. error':>12}{'std. dev.':>12}{'min':>10}{'max':>10}")
    for name, x in {"return": np.array(returns), "normalised score": task.score(np.array(returns))}.items():
        deviation = x.std(ddof=1) if len(x) > 1 else np.nan
        error = deviation / len(x) ** 0.5
        print(f"{name:<18}{x.mean():10.2f}{error:12.2f}{deviation:12.2f}{x.min():10.2f}{x.max():10.2f}")
    if args.video:
        try:
            film(task.make_env(render_mode="rgb_array"), act, args.seed, args.video)
        except Exception as error:  # a renderer may fail in any way
            fail(f"no film could be made ({str(error)[:200]}): without a display try "
                 "MUJOCO_GL=egl or MUJOCO_GL=osmesa, for .mp4 pip install imageio-ffmpeg")  # fmt: skip
        print(f"video: {args.video}")


if __name__ == "__main__":
    main()
