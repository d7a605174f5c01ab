"""Pictures of reward in parameter space: is there a valley between the offline and the online policy?

SMAC's explanation of smooth handovers (de Lara and Shkurti 2026, arXiv 2602.17632) is a picture: its offline
and online optimum lie on one hill, while between those of other algorithms lies a valley of low reward. This
draws it for any checkpoints of this collection. All parameters theta of the deterministic policy are moved:

    line    theta(x) = (1 - x) theta_offline + x theta_online
            valley depth = min(ends) - min(path), the path being x in [0, 1]
    plane   theta(u, v) = theta_A + u e_1 + v e_2,  e_1 ~ B - A, e_2 ~ C - A without its part along e_1
    path    any checkpoints along their first two principal components

    python reward_landscape.py line runs/NAME/offline.pt runs/NAME/final.pt
    python reward_landscape.py line A1.pt B1.pt A2.pt B2.pt C1.pt D1.pt --labels SMAC SMAC Cal-QL
    python reward_landscape.py line runs/ONE/offline.pt runs/OTHER/offline.pt --align    # match hidden units
    python reward_landscape.py plane A.pt B.pt C.pt
    python reward_landscape.py plane runs/NAME/offline.pt runs/NAME/final.pt    # and a random direction
    python reward_landscape.py path runs/ONE/offline.pt runs/ONE/final.pt runs/OTHER/final.pt

Writes line.png, plane.png or path.png into --out, beside it a csv with every episode's return, and
evaluations.jsonl with all evaluations so far: the same command given again goes on where it was stopped.
"""

import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

# === Arguments =============================================================================================


@dataclass(kw_only=True)
class Common:
    out: Path = Path("runs/landscape")  # folder of the picture, its csv and the evaluations
    episodes: int = 20  # episodes of an evaluation, with the seeds of the scripts' own (which have 20)
    workers: int = os.cpu_count() or 1  # processes that evaluate

    def label(self) -> str:
        return f"normalised score, mean of {self.episodes} episodes"


@dataclass(kw_only=True)
class Line(Common):
    """Reward along the straight line between two policies, for one or several pairs."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # OFFLINE ONLINE, and more such pairs
    labels: tuple[str, ...] = ()  # one a pair, pairs of one label make one curve; default: the scripts' names
    points: int = 21  # policies from x = 0 to x = 1, both included
    beyond: float = 0.1  # how far the line goes beyond both ends
    align: bool = False  # match the hidden units of each pair first


@dataclass(kw_only=True)
class Plane(Common):
    """Reward on the plane through three policies, or through two along a random direction."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # A B C, or A B
    grid: int = 15  # policies along each side
    margin: float = 0.2  # how far the plane goes beyond the checkpoints, as a share of its extent
    seed: int = 1  # seed of the random direction
    align: bool = False  # first match all others' hidden units to A's


@dataclass(kw_only=True)
class Way(Common):
    """Checkpoints along their first two principal components, those of one folder connected."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # three or more, a folder's in the order to connect


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


class Policy(NamedTuple):
    """A checkpoint's policy, or another one with its sizes and statistics."""

    path: Path
    state: dict  # the checkpoint
    net: dict[str, np.ndarray]

    def moving(self) -> list[str]:
        """Names of the parameters, which the observation statistics are not."""
        return [key for key in self.net if key not in ("mean", "std")]

    def theta(self) -> np.ndarray:
        """All parameters (P,)."""
        return np.concatenate([self.net[key].ravel() for key in self.moving()], dtype=float)

    def at(self, theta: np.ndarray) -> "Policy":
        """The same with the parameters theta (P,)."""
        sizes = [self.net[key].size for key in self.moving()]
        parts = zip(self.moving(), np.split(theta.astype(np.float32), np.cumsum(sizes)[:-1]))
        return self._replace(net=self.net | {key: x.reshape(self.net[key].shape) for key, x in parts})

    def origin(self) -> dict:
        """Where it comes from, for the csv."""
        state, checksum = self.state, zlib.crc32(self.theta().tobytes())
        return dict(file=self.path, checksum=checksum, seed=state["args"]["seed"], phase=state["phase"],
                    step=state["step"])  # fmt: skip


def check_alike(policies: list[Policy]) -> None:
    """One sentence and exit where policies can't lie on one line: other sizes or observation statistics."""
    first = policies[0]
    for other in policies[1:]:
        both = f"{first.path} and {other.path} can't be put together"
        sizes, others = (policy.state["args"]["hidden_sizes"] for policy in (first, other))
        if sizes != others:
            fail(f"{both}: their hidden sizes are {sizes} and {others}")
        if not all(np.array_equal(first.net[key], other.net[key]) for key in ("mean", "std")):
            fail(f"{both}: their observation statistics differ, they were trained on two recordings")


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


def permuted(policy: Policy, layer: int, order: np.ndarray) -> Policy:
    """The same function, with unit order[k] of a hidden layer in the place of unit k."""
    incoming = {name: policy.net[name][..., order] for name in (f"weights.{layer}", f"biases.{layer}")}
    outgoing = {f"weights.{layer + 1}": policy.net[f"weights.{layer + 1}"][:, order]}
    return policy._replace(net=policy.net | incoming | outgoing)


def matched(policy: Policy, other: Policy) -> Policy:
    """`other` with its hidden units in the order that brings its theta' near to the policy's theta.

    Weight matching (Ainsworth et al. 2023, Git Re-Basin): |theta - theta'| is smallest where <theta, theta'>
    is largest, an assignment in one layer while the others are held; layer by layer until none gains.
    There are two starts, `other` as it is and matched from the input on by incoming weights alone (this finds
    every permutation of a copy); the better result counts.
    """

    def products(other: Policy, layer: int, parts: int = 3) -> np.ndarray:
        """Inner products (H, H) of the units' incoming weights, biases and outgoing weights."""
        nets = [(net[f"weights.{layer}"][0].T, net[f"biases.{layer}"][0].T, net[f"weights.{layer + 1}"][0])
                for net in (policy.net, other.net)]  # fmt: skip
        ours, theirs = (np.concatenate(net[:parts], axis=1, dtype=float) for net in nets)
        return ours @ theirs.T

    assignment = lambda value: linear_sum_assignment(value, maximize=True)[1]
    hidden, start, results = range(len(policy.state["args"]["hidden_sizes"])), other, []
    for layer in hidden:
        start = permuted(start, layer, assignment(products(start, layer, parts=2)))
    for result in (other, start):
        layers = [*hidden]
        while layers:  # that may gain
            layer = layers.pop(0)
            value = products(result, layer)
            order = assignment(value)
            if value[range(len(order)), order].sum() - value.trace() > 1e-9 * np.abs(value).sum():
                result = permuted(result, layer, order)
                layers += [k for k in (layer - 1, layer + 1) if k in hidden]
        results.append(result)
    return max(results, key=lambda result: policy.theta() @ result.theta())


def align_policies(first: Policy, others: list[Policy]) -> list[Policy]:
    """The policies with their hidden units matched to the first's; lines say how much nearer they are."""
    moved = [matched(first, other) for other in others]
    for other, new in zip(others, moved):
        before, after = (np.linalg.norm(policy.theta() - first.theta()) for policy in (other, new))
        print(f"aligned {other.path}: distance {after:.4g}, {before:.4g} before")
    return moved


# === Evaluations ===========================================================================================


@lru_cache
def environments(dataset_id: str, episodes: int) -> list[gym.Env]:
    """The environments of this process, one an episode."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # as the training scripts evaluate
    return [load_task(dataset_id).make_env() for _ in range(episodes)]


def evaluate_policy(job: tuple[dict[str, np.ndarray], str, int]) -> list[float]:
    """Every episode's return of the deterministic policy tanh(mean(s))."""
    net, *bench = job
    return play(environments(*bench), lambda observations: torch.tanh(gaussian(net, observations)[0]))


def signature(net: dict[str, np.ndarray], task: Task, episodes: int) -> str:
    """Name of an evaluation: a checksum of all that its returns follow from."""
    metadata = task.dataset.storage.metadata
    of = [metadata["env_spec"], metadata.get("eval_env_spec"), episodes]
    of += map(version, ("torch", "gymnasium", "mujoco"))  # another one may play other episodes
    arrays = [f"{key} {x.shape}".encode() + x.tobytes() for key, x in net.items()]
    return hashlib.sha256(json.dumps(of).encode() + b"".join(arrays)).hexdigest()


def read_cache(path: Path) -> dict[str, list[float]]:
    """Every episode's return, by signature."""
    known = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was being written when the program was stopped
            key, known[key] = json.loads(line)
    return known


def each(jobs: list[tuple], workers: int) -> Iterator[list[float]]:
    """evaluate_policy of every job, in order; workers are spawned: a fork may inherit a lock that is held."""
    if workers <= 1:
        yield from (evaluate_policy(job) for job in jobs)
        return
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is the main process's
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), *quiet) as pool:
        yield from pool.map(evaluate_policy, jobs)  # unlike Pool it ends when a worker dies


def evaluate_all(policies: list[Policy], args: Common) -> tuple[np.ndarray, np.ndarray]:
    """Returns and scores (K, E) of K policies in E episodes; what --out holds already is not played again."""
    path, tasks = args.out / "evaluations.jsonl", [load_task(p.state["dataset_id"]) for p in policies]
    keys = [signature(policy.net, task, args.episodes) for policy, task in zip(policies, tasks)]
    known = read_cache(path)
    jobs = {key: (policy.net, policy.state["dataset_id"], args.episodes)
            for key, policy in zip(keys, policies) if key not in known}  # fmt: skip
    print(f"{len({*keys})} policies, {args.episodes} episodes each; {len(jobs)} of them are not in {path}")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        print(file=file)  # ends a line that is incomplete
        results = each(list(jobs.values()), min(args.workers, len(jobs)))
        for key, returns in zip(jobs, tqdm(results, total=len(jobs), unit="policy", disable=None)):
            known[key] = returns
            print(json.dumps([key, returns]), file=file, flush=True)
    returns = np.array([known[key] for key in keys])
    return returns, np.array([task.score(r) for task, r in zip(tasks, returns)])


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


def save(args: Common, name: str, figure: Figure, rows: list[dict], policies: list[Policy]) -> None:
    """NAME.png and NAME.csv; a row leaves empty what it doesn't have."""
    figure.suptitle(", ".join(dict.fromkeys(policy.state["args"]["env_id"] for policy in policies)))
    figure.savefig(args.out / f"{name}.png", dpi=120)
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"picture: {args.out / name}.png\nnumbers: {args.out / name}.csv")


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


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
    policies = [Policy(path, *load_policy(path)) for path in args.checkpoints]
    pairs, x, moved = [*zip(policies[::2], policies[1::2])], line_points(args.points, args.beyond), []
    for pair in pairs:
        check_alike(pair)
        a, b = (pair[0], *align_policies(pair[0], pair[1:])) if args.align else pair
        # theta(x) = (1 - x) theta_offline + x theta_online
        moved += [a.at((1 - t) * a.theta() + t * b.theta()) for t in x]
    returns, scores = (a.reshape(len(pairs), len(x), -1) for a in evaluate_all(moved, args))  # (pairs, K, E)
    labels = args.labels or [b.state["script"] for _, b in pairs]
    figure, rows, ends = Figure((9, 5), layout="constrained"), [], []
    axes = figure.subplots()
    print("valley depth in normalised score, ± over episodes, or over pairs if several")
    for number, label in enumerate(dict.fromkeys(labels)):
        of, depths, color = [k for k, name in enumerate(labels) if name == label], [], COLOURS[number % 7]
        for (a, b), s, r in ((pairs[k], scores[k], returns[k]) for k in of):
            depth, error, low = valley(x, s)
            first, last, least = s[x == 0].mean(), s[x == 1].mean(), s[low].mean()
            print(f"{label}, seed {b.origin()['seed']}: ends {first:.1f} and {last:.1f}, lowest {least:.1f} "
                  f"at x = {x[low]:.2f}, valley depth {amount(depth, error)}")  # fmt: skip
            depths.append(depth)
            if depth > 2 * error:
                axes.plot(x[low], least, "v", ms=10, color=color)  # a valley, and no luck of the episodes
            pair = dict(label=label, aligned=args.align, depth=depth, depth_error=error)
            pair |= {"unit": "normalised score"} | {f"offline_{k}": v for k, v in a.origin().items()}
            pair |= {f"online_{key}": value for key, value in b.origin().items()}
            rows += [pair | {"x": t} | measured(r[k], s[k]) for k, t in enumerate(x)]
        curves = scores[of].mean(axis=2)  # (pairs, K)
        mean = curves.mean(axis=0)
        if len(of) > 1:
            error = float(standard_error(np.array(depths)))
            axes.plot(x, curves.T, color=color, lw=0.8, alpha=0.5)
            print(f"{label}, {len(of)} pairs: valley depth {amount(np.mean(depths), error)}")
        else:
            e = standard_error(scores[of[0]])
            axes.fill_between(x, mean - e, mean + e, color=color, alpha=0.2, lw=0)
        seeds = ", ".join(str(pairs[k][1].origin()["seed"]) for k in of)
        ends.append((mean[-1], f"{label} (seed {seeds})\nvalley {amount(np.mean(depths), error)}", color))
        axes.plot(x, mean, color=color, lw=2)
    place = -math.inf
    for end, name, color in sorted(ends):  # labels at the lines' ends, pushed up where they would overlap
        place = max(end, place + 9)
        look = dict(textcoords="offset points", color=color, va="center", size=9)
        axes.annotate(name, (x[-1], place), (12, 0), **look)
    axes.vlines((0, 1), *axes.get_ylim(), color="black", ls="--", lw=1)
    axes.margins(0)
    axes.set(ylabel=args.label(), xlabel="x, on the line from the first checkpoint (0) to the second (1)")
    save(args, "line", figure, rows, policies)


def draw_plane(args: Plane) -> None:
    """plane.png and plane.csv."""
    policies = [Policy(path, *load_policy(path)) for path in args.checkpoints]
    check_alike(policies)
    if args.align:
        policies = [policies[0], *align_policies(policies[0], policies[1:])]
    a, b, *c = (policy.theta() for policy in policies)
    random = np.random.default_rng(args.seed).standard_normal(len(a))
    axes = plane_axes(a, b, c[0] if c else a + random)  # (2, P)
    places = [axes @ (policy.theta() - a) for policy in policies]
    # along a random direction as far as from A to B, half of it to each side
    half = [] if c else [(0, np.linalg.norm(b - a) / 2), (0, -np.linalg.norm(b - a) / 2)]
    low, high = (function([*places, *half], axis=0) for function in (np.min, np.max))
    edges = low - args.margin * (high - low), high + args.margin * (high - low)
    u, v = np.linspace(*edges, args.grid).T
    grid = [(x, y) for y in v for x in u]
    # theta(u, v) = theta_A + u e_1 + v e_2
    moved = [policies[0].at(a + np.array(at) @ axes) for at in grid]
    returns, scores = evaluate_all(policies + moved, args)  # (K, E)
    columns, count = [*map(measured, returns, scores)], len(policies)
    rows = [{"kind": "checkpoint", "u": at[0], "v": at[1]} | policy.origin() | own
            for policy, at, own in zip(policies, places, columns)]  # fmt: skip
    rows += [{"kind": "grid", "u": at[0], "v": at[1]} | own for at, own in zip(grid, columns[count:])]
    figure = Figure((8, 6.5), layout="constrained")
    ax, heights = figure.subplots(), scores[count:].mean(axis=1).reshape(args.grid, args.grid)
    figure.colorbar(ax.contourf(u, v, heights, levels=20), label=args.label())
    for letter, policy, at, s in zip("ABC", policies, places, scores):
        of, height = policy.origin() | policy.state, amount(s.mean(), standard_error(s))
        name = f"{of['script']} (seed {of['seed']}), {of['phase']} step {of['step']:,}: {height}"
        ax.plot(*at, "o", ms=15, color="white", mec="black")
        ax.annotate(letter, at, ha="center", va="center", weight="bold", fontsize=9)
        ax.plot([], [], " ", marker=f"${letter}$", ms=8, color="black", label=name)
        print(f"{letter}: {name}")
    ax.set_ylabel("v, along C - A, orthogonal to u" if c else f"v, a random direction (seed {args.seed})")
    ax.set(xlabel="u, along B - A (distance in parameter space)")
    figure.legend(loc="outside lower center", fontsize=9)
    save(args, "plane", figure, rows, policies)


def draw_way(args: Way) -> None:
    """path.png and path.csv."""
    policies = [Policy(path, *load_policy(path)) for path in args.checkpoints]
    check_alike(policies)
    at, shares = principal_components(np.array([policy.theta() for policy in policies]))  # (K, 2)
    returns, scores = evaluate_all(policies, args)  # (K, E)
    figure = Figure((8, 6.5), layout="constrained")
    ax, folders = figure.subplots(), [policy.path.parent for policy in policies]
    for folder in dict.fromkeys(folders):
        way = at[[parent == folder for parent in folders]]
        (line,) = ax.plot(*way.T, label=folder.name)
        for start, end in pairwise(way):
            ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=line.get_color()))
    dots = ax.scatter(*at.T, c=scores.mean(axis=1), s=30, edgecolors="black", linewidths=0.5, zorder=3)
    figure.colorbar(dots, label=args.label())
    names = [f"principal component {k + 1} ({share:.0%} of the variance)" for k, share in enumerate(shares)]
    ax.set(xlabel=names[0], ylabel=names[1])
    rows = [policy.origin() | {"pc_1": place[0], "pc_2": place[1]} | measured(r, s)
            for policy, place, r, s in zip(policies, at, returns, scores)]  # fmt: skip
    figure.legend(loc="outside lower center", fontsize=9)
    save(args, "path", figure, rows, policies)


# === Main ==================================================================================================

PICTURES = {"line": (Line, draw_line), "plane": (Plane, draw_plane), "path": (Way, draw_way)}


def read_arguments() -> Line | Plane | Way:
    kinds = {name: kind for name, (kind, _) in PICTURES.items()}
    args = tyro.extras.subcommand_cli_from_dict(kinds, description=__doc__)
    for name, least in dict(points=2, beyond=0, grid=2, margin=0, episodes=1, workers=1).items():
        if getattr(args, name, least) < least:
            fail(f"--{name} {getattr(args, name)} is too little: at least {least} is needed")
    count = len(args.checkpoints)
    if isinstance(args, Line) and (count == 0 or count % 2):
        fail(f"a line goes from one checkpoint to another: {count} are not pairs")
    if isinstance(args, Line) and len(args.labels) not in (0, count // 2):
        fail(f"--labels names {len(args.labels)} pairs, the checkpoints are {count // 2}")
    if isinstance(args, Plane) and count not in (2, 3):
        fail(f"a plane goes through 3 checkpoints, or through 2 along a random direction, not {count}")
    if isinstance(args, Way) and count < 3:
        fail(f"principal components want 3 checkpoints or more, not {count}")
    return args


def main() -> None:
    args = read_arguments()
    next(draw for kind, draw in PICTURES.values() if isinstance(args, kind))(args)


if __name__ == "__main__":
    main()
