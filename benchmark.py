"""Measures how fast the scripts of the shelf are; runs studies of many runs and draws their tables.

    python benchmark.py speed                                    this machine; half an hour on two cores
    python benchmark.py speed --cleanrl FOLDER --corl FOLDER     also CleanRL's own SAC update and CORL's own
                                                                 Cal-QL update, from clones
    python benchmark.py speed --device cuda --together 1 2 4 8   eager, CUDA graphs, runs that share a GPU
    python benchmark.py table results/speed                      the tables again, nothing measured
    python benchmark.py run --scripts smac_offline_online.py calql_baseline.py --finetune own sac td3 td3bc \\
        --env-ids hopper-medium-replay --seeds 11 12 13 --out results/NAME
    python benchmark.py run results/choices --seeds 1 2 3        what is missing of a study's plan.toml
    python benchmark.py report results/choices                   its tables, from the csvs
    python benchmark.py report results/NAME --statistics         with intervals, over tasks, and curves
    python benchmark.py imitate results/choices --seeds 1 2 3    two policies without a critic beside them

SPEED. Every measurement is a fresh process that runs a script's own main() on its own data and times its
loops as they are: sampling, logging and, online, the environment included; evaluations are not. Cases take
turns, so that a machine whose speed drifts is fair to all, and medians over the turns are reported.

The bound: all matrix products of one step are recorded with their shapes, and each is timed alone in the
same process. A step that did nothing else would take their sum; the share says how near the script comes.

Writes OUT/speed.csv (one row per case, turn and phase, with hardware and versions), which `table` reads.

STUDIES. OUT/plan.toml names the variants of each task with their flags, which may begin with the script that
runs; `{seed}` in them stands for the run's seed, `{checkpoints}` for the folder where every run leaves its
offline.pt and final.pt, as TASK/VARIANT__SEED_offline.pt. `seeds = [11, 12]` among a task's variants are
those that run if the command names none. A run that takes another one's checkpoint waits for it. `--scripts`
writes the plan of a grid: the offline phase of each script once a task and seed, then each fine-tuner from
its offline.pt.

Every run leaves OUT/TASK/VARIANT__SEED.csv: its metrics.csv with flags, seed, device, code version, dataset
checksum and its own checksum in every row. That is SHA-256 over task, seed, the flags as the plan has them,
the script's code (without comments, docstrings and layout) and the same of the run whose checkpoint it takes
(but for --online-steps if that is an offline.pt); data, device, threads and libraries are not in it. What
has a csv with this checksum is not run again (an older csv, without one, counts if its flags are the plan's),
what was cut goes on from its directory in OUT/runs, what failed is tried once more, then reported with its
last words.

STATISTICS. Means over seeds; over all runs of all tasks the interquartile mean and the probability that a run
of one variant ends above one of another, as Agarwal et al. 2021 (arXiv 2108.13264) define them; in brackets
95% intervals of 10,000 bootstrap samples of the seeds, drawn within each task. Over tasks a variant counts
with the seeds that it has on every task. Updates per second are those of the whole phase, evaluations
included. Writes OUT/statistics.md, OUT/statistics.csv and OUT/TASK_curves.png.

IMITATION. What imitating the recording gives without any critic, on the same network sizes: behaviour cloning
by maximum likelihood, and the score estimator itself sampled as a policy, given a high outcome (diffusion
RvS). Their csvs lie beside the study's.
"""

import ast
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Literal, Union

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent

# === Arguments =============================================================================================


@dataclass
class Speed:
    """Measure; write OUT/speed.csv; print the tables."""

    scripts: tuple[str, ...] = ("smac_offline_online.py",)
    """scripts to measure, all their phases"""
    env_id: str = "hopper-medium-replay"
    """task, as the scripts take it"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """on a GPU the cases are eager and CUDA graphs, on a CPU 1 and 2 threads"""
    repeats: int = 5
    """turns; the median is reported"""
    seconds: float = 4.0
    """time measured in each phase of a turn"""
    sizes: tuple[tuple[int, int], ...] = ((256, 256), (128, 128))
    """width of the two hidden layers and batch, pair after pair; none: what --cleanrl and --corl add alone"""
    growth: bool = True
    """also other widths, other batches and ten times the data"""
    together: tuple[int, ...] = (1, 2)
    """runs side by side on this machine (on one GPU: 1 2 4 8)"""
    cleanrl: str | None = None
    """folder with a clone of CleanRL, whose SAC update is then timed beside ours on one core"""
    corl: str | None = None
    """folder with a clone of CORL, whose Cal-QL update is then timed beside ours on one core"""
    out: str = "results/speed"
    """folder of speed.csv"""


@dataclass
class Table:
    """Print the tables from OUT/speed.csv."""

    out: tyro.conf.Positional[str] = "results/speed"
    """folder of speed.csv"""


@dataclass
class Study:
    """Run what is missing of a study: a csv for every task, variant and seed of its plan or grid."""

    folder: tyro.conf.Positional[str] = ""
    """folder of the study, results/NAME"""
    out: str = ""
    """the same as a flag, for the end of the line"""
    scripts: tuple[str, ...] = ()
    """grid: offline scripts, each as `script flags` or `label=script flags`; OUT/plan.toml is written"""
    finetune: tuple[str, ...] = ("sac",)
    """who takes the grid's checkpoints online: sac, td3, td3bc, own (the script's own online phase) or
    `label=script flags`"""
    seeds: tuple[int, ...] = ()
    """1 to 3 to tune on, 11 and up to report; the plan's of each task if none is named, or 1 2 3"""
    env_ids: tuple[str, ...] = ()
    """the grid's tasks; some of a plan's, all if none is named"""
    variants: tuple[str, ...] = ()
    """some of the plan's variants"""
    workers: int = os.cpu_count() or 1
    """runs at the same time on this machine"""
    engine: Literal["local", "ray"] = "local"
    """ray (pip install ray) also runs on a cluster whose machines share this folder"""
    ray_address: str | None = None
    """cluster to join, `auto` or HOST:PORT; if none is named, Ray on this machine alone"""
    cpus_per_run: int = 1
    """threads of a run, and the cores that Ray keeps for it"""
    gpus_per_run: float = 0.0
    """GPUs, or the share of one, that Ray keeps for a run"""
    keep: bool = False
    """count a csv of the same flags as complete, whatever code it is of"""
    script: str = "smac_offline_online.py"
    """script of the variants whose flags name none"""
    work: str | None = None
    """folder of the run directories; OUT/runs if none is named"""
    checkpoints: str | None = None
    """folder to keep the runs' offline.pt and final.pt in; OUT/runs/checkpoints if none is named"""

    def __post_init__(self):
        self.out = self.out or self.folder


@dataclass
class Imitate:
    """Behaviour cloning and diffusion RvS: offline scores beside those of a study."""

    out: tyro.conf.Positional[str]
    """folder of the study, results/NAME"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """1 to 3 to tune on, 11 and up to report"""
    env_ids: tuple[str, ...] = ("pendulum-medium-replay", "hopper-medium-replay")
    """tasks, as the scripts take them"""
    best_episodes: tuple[float, ...] = (1.0, 0.1)
    """shares of the recording, its episodes with the highest returns"""
    quantiles: tuple[float, ...] = (0.5, 0.9, 0.99)
    """outcomes that the sampled policies ask for, quantiles of the recording's"""
    script: str = "smac_offline_online.py"
    """script with the networks, the recording and the score estimator"""


@dataclass
class StudyReport:
    """Print a study's tables from its csvs."""

    out: tyro.conf.Positional[str]
    """folder of the study, results/NAME"""
    seeds: tuple[int, ...] = ()
    """only these; all if none is named"""
    variants: tuple[str, ...] = ()
    """only these"""
    brief: bool = False
    """without the flags and the diagnostics"""
    cross: bool = False
    """a row an offline algorithm, a column an online one, in the place of a row a variant"""
    statistics: bool = False
    """intervals, aggregates over tasks and curves in the place of the tables"""
    against: str | None = None
    """variant whose final scores the others are compared with; the first with any if none is named"""
    script: str = "smac_offline_online.py"
    """script whose summary is taken"""


@dataclass
class Probe:
    """One measurement in this process, printed as JSON (what `speed` starts)."""

    case: tyro.conf.Positional[str]
    """the case as JSON"""


# === One measurement =======================================================================================


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside, by name, shapes and strides."""

    names = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in self.names:
            key = tuple((tuple(x.shape), x.stride()) for x in args if isinstance(x, torch.Tensor))
            self.counts[name, key] += 1
        return function(*args, **kwargs or {})

    def flop(self) -> int:
        """Floating-point operations: 2 rows inner columns for each product; what is added is not counted."""
        total = 0
        for (_, key), count in self.counts.items():
            (*batch, rows, inner), (*_, columns) = key[-2][0], key[-1][0]
            total += 2 * int(np.prod(batch)) * rows * inner * columns * count
        return total


def load_script(path: str | Path) -> ModuleType:
    """A script of the shelf as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def product_timer(counts: Counter, device: str) -> Callable[[], float]:
    """A function that runs all these products alone and gives the seconds one step's worth takes."""
    blocks = []
    for (name, key), count in counts.items():
        operands = []
        for shape, stride in key:
            expanded = any(step == 0 and size > 1 for size, step in zip(shape, stride))  # as biases are
            operand = torch.empty_strided(shape, stride, device=device)
            operands.append((torch.empty(shape, device=device) if expanded else operand).normal_())
        run, block = partial(getattr(torch, name), *operands), None
        if device == "cuda":  # without the launches
            graph = torch.cuda.CUDAGraph()
            run()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(10):
                    run()
            block = graph.replay
        blocks.append((block or (lambda run=run: [run() for _ in range(10)]), count))

    def once() -> float:
        total = 0.0
        for block, count in blocks:
            block()
            synchronize(device)
            began = time.perf_counter()
            block()
            synchronize(device)
            total += count * (time.perf_counter() - began) / 10
        return total

    return once


def synchronize(device: str) -> None:
    """Waits for the GPU, if that is where the work is."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(steps: Callable, seconds: float, started: float, found: dict) -> Callable:
    """`Run.steps`, but each phase ends after `seconds` of steady state and leaves its figures in `found`.

    Blocks of steps and runs of the products alone take turns, so that the share compares neighbours in time.
    """

    def wrapper(run, phase, total, modules, optimizers) -> Iterator[int]:
        device, heaviest, first = run.device.type, Products(), None
        source = steps(run, phase, total, modules, optimizers)
        for step in source:
            updates = step - 1 if phase != "online" else run.updates  # done so far
            if updates > 0 and first is None:
                synchronize(device)
                first = time.time() - started
            if updates >= 20:
                break
            with (products := Products()):  # warm-up; online also the steps before the first update
                yield step
            heaviest = max(heaviest, products, key=Products.flop)
        products, rates, shares, seconds_alone = product_timer(heaviest.counts, device), [], [], []
        for _ in range(8):
            synchronize(device)
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < seconds / 8:
                yield step
                step, done = next(source), done + 1
            synchronize(device)
            rates.append(done / (time.perf_counter() - began))
            seconds_alone.append(products())
            shares.append(rates[-1] * seconds_alone[-1])
        utd = run.args.utd_ratio if phase == "online" else 1
        found[phase] = dict(
            updates_per_second=utd * statistics.median(rates), steps_per_second=statistics.median(rates),
            gflop=heaviest.flop() / 1e9, product_ms=1e3 * statistics.median(seconds_alone),
            share=statistics.median(shares) if utd == 1 else math.nan, first_update=first)  # fmt: skip

    return wrapper


def probe(case: dict) -> dict:
    """Figures of one case by phase: runs the script's main() with `Run.steps` timed."""
    module, found = load_script(case["script"]), {}
    module.Run.steps = timed(module.Run.steps, case["seconds"], case["started"], found)
    module.report = lambda *_: None
    if case["copies"] > 1:  # the same recording several times over
        load = module.load_dataset

        def copies(*arguments):
            data = load(*arguments)
            columns = {name: np.concatenate([x] * case["copies"]) for name, x in data.columns.items()}
            ends = [data.ends + i * data.ends[-1] for i in range(case["copies"])]
            return data._replace(columns=columns, ends=np.concatenate(ends))

        module.load_dataset = copies
    flags = dict(env_id=case["env_id"], device=case["device"], batch_size=case["batch"], eval_episodes=1,
                 score_steps=10**5, offline_steps=10**5, online_steps=10**5, eval_every=10**9,
                 handover_eval_every=10**9, offline_optimizer=case["optimizer"],
                 online_optimizer=case["optimizer"])  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--hidden-sizes", *[str(case["width"])] * 2, "--compile" if case["graphs"] else "--no-compile"]
    sys.argv = [case["script"], *words]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    gpu = torch.cuda.max_memory_allocated() / 2**20 if case["device"] == "cuda" else 0
    return {phase: figures | dict(memory_mb=memory, gpu_mb=gpu) for phase, figures in found.items()}


# === Updates of others beside ours =========================================================================

PEERS = {"cleanrl": ("CleanRL", "cleanrl/sac_continuous_action.py", "github.com/vwxyzjn/cleanrl"),
         "corl": ("CORL", "algorithms/finetune/cal_ql.py", "github.com/tinkoff-ai/CORL")}  # fmt: skip


def cleanrl_update(folder: Path, obs_dim: int, act_dim: int) -> Callable[[], None]:
    """CleanRL's SAC update from a clone, unmodified: the body of its `if global_step > learning_starts`.

    The classes and the statements that build networks, optimisers and replay are executed as they stand; the
    environment is two Box spaces, the replay holds 10,000 random transitions, the writer writes nothing.
    """
    import gymnasium as gym

    sys.path.insert(0, str(folder))
    tree = ast.parse((folder / "cleanrl/sac_continuous_action.py").read_text())
    top = [node for node in tree.body if not isinstance(node, ast.If)]
    main = next(node for node in tree.body if isinstance(node, ast.If)).body
    text = lambda node: ast.unparse(node)
    first = next(i for i, node in enumerate(main) if text(node).startswith("actor = "))
    last = next(i for i, node in enumerate(main) if text(node).startswith("rb = "))
    loop = next(node for node in main if isinstance(node, ast.For))
    body = next(node for node in loop.body if "rb.sample" in text(node)).body
    code = lambda nodes: compile(ast.Module(nodes, []), "cleanrl", "exec")
    space = {"__name__": "cleanrl_sac", "__file__": "sac_continuous_action.py"}
    sys.modules["cleanrl_sac"] = ModuleType("cleanrl_sac")
    exec(code(top), space)
    box = lambda n: gym.spaces.Box(-1.0, 1.0, (n,), np.float32)
    spaces = SimpleNamespace(single_observation_space=box(obs_dim), single_action_space=box(act_dim))
    space |= dict(args=space["Args"](buffer_size=10_000), device=torch.device("cpu"), envs=spaces,
                  writer=SimpleNamespace(add_scalar=lambda *_: None), start_time=time.time())  # fmt: skip
    exec(code(main[first : last + 1]), space)
    rng, rb = np.random.default_rng(0), space["rb"]
    for _ in range(10_000):
        observation, successor = rng.standard_normal((2, 1, obs_dim)).astype(np.float32)
        rb.add(observation, successor, rng.uniform(-1, 1, (1, act_dim)).astype(np.float32),
               rng.standard_normal(1), np.zeros(1), [{}])  # fmt: skip
    update, steps = code(body), iter(range(1, 10**9))

    def call():
        space["global_step"] = next(steps)
        exec(update, space)

    return call


def shelf_update(module: ModuleType, obs_dim: int, act_dim: int) -> Callable[[], None]:
    """The same SAC update with the shelf's blocks: ReLU networks of 2x256, batch 256, Adam."""
    args = module.Args(batch_size=256, online_optimizer="adam")
    agent = module.Agent(obs_dim, act_dim, (256, 256), 2, "relu")
    buffer = module.ReplayBuffer(module.transition_widths(obs_dim, act_dim), 10_000)
    draw = lambda width: np.random.default_rng(0).uniform(-1, 1, (10_000, width) if width else 10_000)
    buffer.add(*(np.zeros(10_000) if n == "terminations" else draw(w) for n, w in buffer.widths.items()))
    optimizers = module.make_optimizers(agent, "adam", args)

    def call():
        batch = buffer.split(buffer.sample_rows(args.batch_size))
        module.critic_gradients(agent, batch, args.gamma)
        module.actor_gradients(agent, batch)
        module.apply_gradients(optimizers)
        module.polyak_update(agent.target_critic, agent.critic, args.tau)

    return call


def with_returns_to_go(module: ModuleType, args) -> tuple:
    """Hopper's bundled recording, and its columns (T, ...) with returns-to-go: where these are high, Cal-QL's
    term has no gradient, and that decides what an update costs."""
    data = module.load_dataset(module.TASKS["hopper-medium-replay"][0])
    rewards, terminations = data.reward(data.columns["rewards"]), data.columns["terminations"]
    bounds = module.returns_to_go(rewards, terminations, data.ends, args.gamma)
    return data, data.columns | {"rewards": rewards, "returns_to_go": bounds}


def corl_update(folder: Path, shelf: ModuleType) -> Callable[[], None]:
    """CORL's Cal-QL update from a clone, unmodified: `train` of its class on batches of its own buffer.

    The file is executed as it stands; packages that only its main function uses are empty stand-ins. Values
    of its TrainConfig (locomotion), but the target takes the best of 10 actions, as the shelf's does.
    """
    path, saved = folder / PEERS["corl"][1], dict(sys.modules)
    empty = dict(
        d4rl={}, gym=dict(Env=object), wandb={}, pyrallis=dict(wrap=lambda: lambda function: function)
    )
    for name, members in empty.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    spec = importlib.util.spec_from_file_location("corl_cal_ql", path)
    corl = sys.modules["corl_cal_ql"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corl)
    for name in empty:
        sys.modules.pop(name)
        sys.modules |= {name: saved[name]} if name in saved else {}
    config = corl.TrainConfig(device="cpu")
    columns = with_returns_to_go(shelf, shelf.Args())[1]
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    critics = [corl.FullyConnectedQFunction(obs_dim, act_dim, True, 2) for _ in range(2)]
    actor = corl.TanhGaussianPolicy(obs_dim, act_dim, 1.0, orthogonal_init=True)
    optimizers = [torch.optim.Adam(net.parameters(), config.qf_lr) for net in critics]
    trainer = corl.CalQL(critics[0], optimizers[0], critics[1], optimizers[1], actor,
                         torch.optim.Adam(actor.parameters(), config.policy_lr), -float(act_dim), bc_steps=0,
                         policy_lr=config.policy_lr, qf_lr=config.qf_lr, cql_alpha=config.cql_alpha,
                         cql_max_target_backup=True)  # fmt: skip
    mean_std = corl.compute_mean_std(columns["observations"], eps=1e-3)
    states = {k: corl.normalize_states(columns[k], *mean_std) for k in ("observations", "next_observations")}
    buffer = corl.ReplayBuffer(obs_dim, act_dim, len(columns["rewards"]))
    buffer.load_d4rl_dataset(
        columns | states | dict(terminals=columns["terminations"], mc_returns=columns["returns_to_go"])
    )
    return lambda: trainer.train(buffer.sample(256))


def shelf_calql_update(module: ModuleType) -> Callable[[], None]:
    """The same Cal-QL update with the shelf's blocks: ReLU networks of 2x256, batch 256, 10 actions, Adam."""
    args = module.Args(batch_size=256, offline_optimizer="adam")
    data, columns = with_returns_to_go(module, args)
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    agent = module.Agent(obs_dim, act_dim, (256, 256), 2, "relu")
    module.set_statistics(agent, data)
    multiplier = torch.nn.ParameterDict({"log_alpha_prime": torch.ones(())})
    optimizers = module.make_optimizers(agent, "adam", args, multiplier.parameters())
    widths = module.transition_widths(obs_dim, act_dim) | {"returns_to_go": 0}
    buffer = module.ReplayBuffer(widths, len(columns["rewards"]))
    buffer.add(*(columns[name] for name in widths))

    def call():
        batch = buffer.split(buffer.sample_rows(args.batch_size))
        module.calql_update(agent, multiplier, batch, optimizers, args, True)

    return call


def beside(case: dict) -> dict:
    """Updates per second of a peer's update and of ours, in turns of 50 in one process with one thread."""
    torch.set_num_threads(1)
    peer = next(peer for peer in PEERS if peer in case)
    name, folder, sizes = PEERS[peer][0], Path(case[peer]), (11, 3)
    times, what = {name: [], "shelf": []}, {"cleanrl": "SAC", "corl": "Cal-QL"}[peer]
    with contextlib.redirect_stdout(io.StringIO()):
        if peer == "cleanrl":
            made = cleanrl_update(folder, *sizes), shelf_update(load_script(case["script"]), *sizes)
        else:
            script = load_script(ROOT / "calql_baseline.py")
            made = corl_update(folder, script), shelf_calql_update(script)
        updates = dict(zip(times, made))
        for _ in range(11):
            for name, update in updates.items():
                began = time.perf_counter()
                for _ in range(50):
                    update()
                times[name].append((time.perf_counter() - began) / 50)
    return {
        f"{what} update, {name}": dict(updates_per_second=1 / statistics.median(t[1:]))
        for name, t in times.items()
    }


# === Many measurements =====================================================================================


def hardware(device: str) -> dict[str, str]:
    """What the figures depend on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()
        )
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return dict(cpu=f"{model}, {os.cpu_count()} cores", gpu=gpu, torch=torch.__version__,
                python=platform.python_version())  # fmt: skip


def cases(args: Speed, device: str) -> list[dict]:
    """What is measured: two sizes in every mode, then one factor at a time."""
    base = dict(env_id=args.env_id, device=device, seconds=args.seconds, width=256, batch=256, threads=1,
                copies=1, optimizer="muon", graphs=device == "cuda", together=1)  # fmt: skip
    other_mode = dict(graphs=False) if device == "cuda" else dict(threads=2)
    variants = []
    for width, batch in args.sizes:
        size = dict(width=width, batch=batch)
        variants += [size, size | other_mode, size | dict(optimizer="adam")]
        variants += [size | dict(together=n) for n in args.together if n > 1]
    if args.growth and variants:
        variants += [dict(width=w) for w in (64, 128, 512)] + [dict(batch=b) for b in (64, 128, 512)]
        variants += [dict(copies=10)]
    return [base | variant | dict(script=script) for script in args.scripts for variant in variants]


def start(case: dict) -> subprocess.Popen:
    """A process that measures one case."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case["threads"]), "TQDM_DISABLE": "1"}
    script = str((ROOT / case["script"]).resolve())
    words = [sys.executable, __file__, "probe", json.dumps(case | dict(script=script, started=time.time()))]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    """Its figures by phase; its last words and exit if it failed."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"error: a measurement failed:\n{output[-2000:]}{errors[-2000:]}")
    return json.loads(output.splitlines()[-1])


def speed(args: Speed) -> None:
    """Measures all cases in turns and writes speed.csv."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    todo, rows = cases(args, device), []
    for peer, (name, file, address) in PEERS.items():
        if not (folder := getattr(args, peer)):
            continue
        if not (Path(folder) / file).exists():
            raise SystemExit(f"error: {folder} is no clone of {name}: git clone {address}")
        git = ["git", "-C", folder, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
        print(f"{name} at commit {commit}")
        case = cases(replace(args, sizes=((256, 256),)), device)[0]
        todo.append(case | {peer: str(Path(folder).resolve()), "optimizer": "adam", "commit": commit})
    for turn in range(args.repeats):
        for number, case in enumerate(todo):
            figures = [finish(process) for process in [start(case) for _ in range(case["together"])]]
            for phase in figures[0]:
                each = [f[phase] for f in figures]
                total = {
                    k: sum(f[k] for f in each)
                    for k in ("updates_per_second", "steps_per_second")
                    if k in each[0]
                }
                rows.append({"turn": turn + 1, "phase": phase} | case | each[0] | total)
            print(f"turn {turn + 1} of {args.repeats}, case {number + 1} of {len(todo)}", flush=True)
        out = Path(args.out)  # after every turn: nothing is lost when it is stopped
        out.mkdir(parents=True, exist_ok=True)
        known = hardware(device)
        hidden = ("env_id", "device", "seconds", *PEERS)
        names = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in hidden]
        with open(out / "speed.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*names, *known], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            short = lambda x: f"{x:.5g}" if isinstance(x, float) else x
            writer.writerows({k: short(v) for k, v in (row | known).items()} for row in rows)
    tables(out)


# === Tables ================================================================================================


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(folder: str | Path) -> str:
    """The README's tables from folder/speed.csv, medians over the turns; also printed."""
    path = Path(folder) / "speed.csv"
    if not path.exists():
        raise SystemExit(
            f"error: there is no {path}: measure first, with python benchmark.py speed --out {folder}"
        )
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("script", "width", "batch", "threads", "optimizer", "graphs", "together", "copies", "commit")
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    ours, theirs = [], []
    for turns in groups.values():
        case, phases = turns[0], list(dict.fromkeys(turn["phase"] for turn in turns))
        medians = lambda name, turns=turns, phases=phases: [
            statistics.median(float(turn[name]) for turn in turns if turn["phase"] == phase)
            for phase in phases
        ]
        rounded = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        rates = [rounded(rate) for rate in medians("updates_per_second")]
        if case.get("commit"):
            theirs += [{"update": phase, "updates per second": rate} for phase, rate in zip(phases, rates)]
            continue
        mode = f"{case['threads']} thread{'s' * (case['threads'] != '1')}"
        if case["gpu"]:
            mode = "CUDA graphs" if case["graphs"] == "True" else "eager"
        mode += f", {case['together']} runs at once, their sum" * (case["together"] != "1")
        mode += f", {case['copies']} times the data" * (case["copies"] != "1")
        ours.append({
            "networks, batch": f"2x{case['width']}, {case['batch']}", "optimiser": case["optimizer"],
            "mode": mode, f"updates per second: {', '.join(phases)}": " / ".join(rates),
            "products alone": " / ".join(rounded(1e3 / ms) for ms in medians("product_ms")),
            "share": " / ".join(f"{100 * share:.0f}%" for share in medians("share")),
            "first update": f"{medians('first_update')[0]:.1f} s",
            "peak memory": f"{medians('gpu_mb' if case['gpu'] else 'memory_mb')[0]:.0f} MB",
        })  # fmt: skip
    known = rows[0]
    where = f"{known['gpu'] or known['cpu']}; torch {known['torch']}, Python {known['python']}"
    text = "\n".join([where, "", *(markdown(rows) for rows in (ours, theirs) if rows)])
    print(text)
    return text


# === Studies ===============================================================================================

FINETUNERS = {"sac": "sac_finetune.py", "td3": "td3_finetune.py",
              "td3bc": "td3_finetune.py --bc-alpha 2.5"}  # fmt: skip
ONLINE_STEPS = re.compile(r"\s*--online[-_]steps[ =]\S+")
GRID = "# written by `python benchmark.py run --scripts`\n"


def read_plan(folder: str | Path) -> dict[str, dict[str, str]]:
    """OUT/plan.toml: {task: {variant: flags}}, and with the variants of some tasks {"seeds": list}."""
    path = Path(folder) / "plan.toml"
    try:
        tasks = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path} can't be read ({error}): a study begins with its plan") from error
    for task, variants in tasks.items():
        if not isinstance(variants, dict):
            raise SystemExit(f"error: in {path} {task} stands outside a task: write a line [TASK] above it")
        for name, value in variants.items():
            seeds = isinstance(value, list) and value and all(type(seed) is int for seed in value)
            if not (seeds if name == "seeds" else isinstance(value, str)):
                kind = "a list of numbers" if name == "seeds" else "a string of flags"
                raise SystemExit(f"error: in {path} {task}'s {name} has to be {kind}, not {value!r}")
    return tasks


def grid(args: Study) -> dict[str, str]:
    """Variants of `--scripts` x `--finetune`, as a plan has them, `{task}` for the task.

    LABEL is a script by itself, without its online phase unless `own` is asked for, LABEL+FINETUNER what goes
    on from its offline.pt.
    """

    def labelled(entry: str, known: dict[str, str]) -> tuple[str, str]:
        label, command = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", known.get(entry, entry)).groups()
        script = (command.split() or [""])[0]
        if not script.endswith(".py") or not (ROOT / script).exists():
            names = f"; a fine-tuner is one of own, {', '.join(known)} or such an entry" if known else ""
            raise SystemExit(f"error: {entry!r} is no `script flags` or `label=script flags`{names}")
        return label or (entry if entry in known else Path(script).stem.split("_")[0]), command

    offline = [labelled(entry, {}) for entry in args.scripts]
    online = [labelled(entry, FINETUNERS) for entry in args.finetune if entry != "own"]
    for entries in (offline, online):
        if len(dict(entries)) < len(entries):
            names = ", ".join(label for label, _ in entries)
            raise SystemExit(f"error: labels have to differ ({names}): write label=script flags")
    rows = {}
    for label, command in offline:
        rows[label] = command
        goes_online = hasattr(load_script(ROOT / command.split()[0]).Args, "online_steps")
        if "own" not in args.finetune and goes_online:
            rows[label] = ONLINE_STEPS.sub("", command) + " --online-steps 0"
        start = f"--checkpoint {{checkpoints}}/{{task}}/{label}__{{seed}}_offline.pt"
        rows |= {f"{label}+{name}": f"{how} {start}" for name, how in online}
    return rows


def write_grid(args: Study) -> tuple[str, ...]:
    """Puts the grid's variants into OUT/plan.toml, beside those of earlier grids; returns their names."""
    path, known = Path(args.out) / "plan.toml", load_script(ROOT / args.script).TASKS
    rows = grid(args)
    if not args.env_ids or set(args.env_ids) - known.keys():
        raise SystemExit(f"error: --scripts needs --env-ids, tasks among {', '.join(known)}")
    if path.exists() and not path.read_text().startswith(GRID):
        raise SystemExit(f"error: {path} was written by hand: name another --out, or add the variants there")
    tasks = read_plan(args.out) if path.exists() else {}
    for task in args.env_ids:
        tasks.setdefault(task, {}).update({v: f.replace("{task}", task) for v, f in rows.items()})
    text, quoted = GRID, json.dumps  # a JSON string is a TOML string
    for task, variants in tasks.items():
        lines = [f"{quoted(variant)} = {quoted(flags)}\n" for variant, flags in variants.items()]
        text += f"\n[{quoted(task)}]\n{''.join(lines)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)
    return tuple(rows)


@lru_cache
def code_of(script: Path) -> str:
    """A script's code without comments, docstrings and layout."""
    try:
        tree = ast.parse(script.read_text())
    except (OSError, ValueError, SyntaxError) as error:
        raise SystemExit(f"error: the script {script} can't be read ({error})") from error
    said = lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not said(statement)]
    return ast.unparse(tree)


def checksum(job: dict, jobs: dict[str, dict], online: bool = True) -> str:
    """Checksum of a run's settings and code, see the top; online=False: of its offline phase."""
    flags = job["flags"] if online else ONLINE_STEPS.sub("", job["flags"])
    parts = [job["task"], str(job["seed"]), job["script"], " ".join(flags.split())]
    parts += [code_of(ROOT / job["script"])]
    parts += [checksum(jobs[name], jobs, kept == "final") for name, kept in job["needs"].items()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def plan(args: Study) -> dict[str, dict]:
    """All runs of OUT/plan.toml by name, TASK/VARIANT__SEED, seed by seed.

    job["needs"] are the runs whose checkpoints a run takes: {name: "offline" or "final"}.
    """
    tasks, out, code, jobs = read_plan(args.out), Path(args.out).resolve(), scripts_version(), {}
    runs = Path(args.work).resolve() if args.work else out / "runs"
    kept = Path(args.checkpoints).resolve() if args.checkpoints else runs / "checkpoints"
    rows = []
    for task, variants in tasks.items():
        own = variants.pop("seeds", (1, 2, 3))
        rows += [(seed, task, *item) for seed, item in product(args.seeds or own, variants.items())]
    for seed, task, variant, flags in sorted(rows, key=lambda row: row[0]):
        filled = lambda word, seed=seed: word.replace("{seed}", str(seed)).replace("{checkpoints}", str(kept))
        words = [filled(word) for word in flags.split()]
        script = words.pop(0) if words and words[0].endswith(".py") else args.script
        name = f"{task}/{variant}__{seed}"
        jobs[name] = dict(name=name, task=task, variant=variant, seed=seed, flags=flags, script=script,
                          words=words, file=out / f"{name}.csv", kept=kept / name, code=code,
                          source=code_of(ROOT / script), threads=args.cpus_per_run)  # fmt: skip
    left = {f"{job['kept']}_{which}.pt": (name, which)
            for name, job in jobs.items() for which in ("offline", "final")}  # fmt: skip
    for job in jobs.values():
        paths = [word.split("=", 1)[-1] for word in job["words"]]  # --checkpoint FILE or --checkpoint=FILE
        job["needs"] = dict(left[path] for path in paths if path in left)
    for name, job in jobs.items():
        try:
            job["checksum"] = checksum(job, jobs)
        except RecursionError as error:
            raise SystemExit(f"error: in {out}/plan.toml {name} waits for its own checkpoint") from error
        job["folder"] = runs / f"{name}__{job['checksum'][:8]}"
    return jobs


def complete(job: dict, keep: bool = False) -> bool:
    """Whether its csv is there, of the same settings and code; of the same flags if it has no checksum."""
    try:
        with open(job["file"], newline="") as file:
            row = next(csv.DictReader(file))
    except (OSError, StopIteration):
        return False
    own = "flags" if keep or "checksum" not in row else "checksum"
    return row.get(own) == job[own]


def kept(job: dict, which: str, keep: bool) -> bool:
    """Whether its checkpoint is there, and is its own: another study may keep one of this name."""
    if not (path := Path(f"{job['kept']}_{which}.pt")).exists():
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged: torch raises many kinds
        return False
    return keep or state.get("run_checksum", job["checksum"]) == job["checksum"]


def missing(args: Study, jobs: dict[str, dict]) -> list[dict]:
    """The jobs that are asked for and not complete, and those whose checkpoints they lack."""
    names = set()

    def add(job: dict) -> None:
        names.add(job["name"])
        for need, which in job["needs"].items():
            there = complete(jobs[need], args.keep) and kept(jobs[need], which, args.keep)
            if not there and need not in names:
                add(jobs[need])

    for job in jobs.values():
        asked = job["task"] in (args.env_ids or (job["task"],))
        if asked and job["variant"] in (args.variants or (job["variant"],)) and not complete(job, args.keep):
            add(job)
    return [job for name, job in jobs.items() if name in names]


def work(job: dict, stop: threading.Event | None = None) -> tuple[str, float]:
    """One run in a folder of its own, from where it was cut.

    Returns "" or the last lines of what a failed run printed, and the seconds it took. Once `stop` is set, or
    Ray cancels it, the run writes its last.pt and ends.
    """
    folder, began, stop = job["folder"], time.monotonic(), stop or threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, open(folder / "log.txt", "a+") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"{folder} is in use by another process: wait for it or stop it first", 0.0
        if code_of.__wrapped__(ROOT / job["script"]) != job["source"]:
            return f"{job['script']} was changed since the study began: give the command again", 0.0
        words = ["--env-id", job["task"], "--seed", str(job["seed"]), *job["words"]]
        if checkpoints := [*folder.glob("runs/*/[!.]*.pt")]:
            words = ["--resume", str(checkpoints[0].parent)]
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)  # cut before its first checkpoint
        threads = {"OMP_NUM_THREADS": str(job["threads"]), "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        how = dict(cwd=folder, env=os.environ | threads, stdout=log, stderr=subprocess.STDOUT)
        # a session of its own: Ctrl-C reaches it from here, once; it holds the lock even if this process dies
        how |= dict(start_new_session=True, pass_fds=[lock.fileno()])
        process = subprocess.Popen([sys.executable, str(ROOT / job["script"]), *words], **how)
        try:
            while process.poll() is None and not stop.wait(0.1):
                pass
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            log.seek(0)
            words = log.read()[-1500:] or f"it printed nothing; exit status {process.returncode}"
            return words, time.monotonic() - began
        keep_results(job)
    return "", time.monotonic() - began


def keep_results(job: dict) -> None:
    """A run's metrics.csv becomes job["file"], with its origin in every row; its checkpoints are kept without
    optimiser states, enough to act and to hand over."""
    (directory,) = (job["folder"] / "runs").iterdir()
    config = json.loads((directory / "config.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for which in ("offline", "final"):
        if (path := directory / f"{which}.pt").exists():
            module = load_script(ROOT / job["script"])
            job["kept"].parent.mkdir(parents=True, exist_ok=True)
            state = module.load_checkpoint(path) | {"optimizers": [], "run_checksum": job["checksum"]}
            kept = Path(f"{job['kept']}_{which}.pt")
            module.write_atomically(kept, partial(torch.save, module.sealed(state)))
    origin = {key: job[key] for key in ("variant", "flags", "seed", "code", "checksum")}
    origin |= dict(device=config["resolved_device"], dataset=config["dataset_checksum"][:16],
                   eval_every=config["args"]["eval_every"])  # fmt: skip
    seen = config["args"] | {"dataset_id": config.get("dataset_id")}  # also what came from a checkpoint
    origin |= {
        name: seen[name] for name in ("dataset_id", "best_episodes", "data_fraction") if seen.get(name)
    }
    short = lambda x: f"{float(x):.6g}" if "." in x else x
    write_csv(job["file"], [origin | {name: short(value) for name, value in row.items()} for row in rows])


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of the same keys, put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def scripts_version() -> str:
    """Commit of the scripts, with a mark if they were changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


@contextlib.contextmanager
def local_engine(args: Study) -> Iterator[Callable[[dict], Future]]:
    """Submits jobs to processes of this machine, `workers` at a time; at the end stops what is running."""
    stop, pool = threading.Event(), ThreadPoolExecutor(args.workers)
    try:
        yield lambda job: pool.submit(work, job, stop)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ray_engine(args: Study) -> Iterator[Callable[[dict], Future]]:
    """The same with Ray: on this machine, or on a cluster whose machines see the same folders."""
    try:
        import ray

        here = dict(num_cpus=args.workers * args.cpus_per_run, include_dashboard=False)
        where = dict(address=args.ray_address) if args.ray_address else here
        ray.init(**where, log_to_driver=False, logging_level="warning")
    except ImportError as error:
        raise SystemExit("error: --engine ray needs Ray, which is optional: pip install ray") from error
    except Exception as error:  # Ray raises many kinds
        hint = "check --ray-address" if args.ray_address else "--engine local needs no Ray"
        raise SystemExit(f"error: Ray does not start ({error}): {hint}") from error
    run, begun = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=0)(work), []

    def submit(job: dict) -> Future:
        begun.append(run.remote(job))
        return begun[-1].future()

    try:
        yield submit
    finally:
        for reference in begun:  # KeyboardInterrupt where it runs, nothing where it has ended
            ray.cancel(reference)
        if begun:
            ray.wait(begun, num_returns=len(begun), timeout=60)
        ray.shutdown()


def progress(job: dict, now: float) -> str:
    """Phase, steps, score and time left of a run under way, from its log and its settings."""
    try:
        log = (job["folder"] / "log.txt").read_text()
        config = json.loads(next(job["folder"].glob("runs/*/config.json")).read_text())["args"]
        phase, step, score = re.findall(r"^(\w+) +step +([\d,]+) .*?(?:score +(\S+))?$", log, re.M)[-1]
    except (OSError, StopIteration, IndexError, ValueError):
        return "starting"
    step, phases = int(step.replace(",", "")), ("score", "offline", "alignment", "online")
    totals = {name: config.get(f"{name}_steps", 0) for name in phases[phases.index(phase) :]}
    seen = job.setdefault("seen", {}).setdefault(phase, [])  # (time, step) as they appeared
    if seen and step < seen[-1][1]:  # it failed and began anew
        seen.clear()
    if not seen or seen[-1][1] != step:
        seen.append((now, step))
    text = f"{phase} {step:,}/{totals[phase]:,}" + f"  score {score}" * bool(score)
    if len(seen) > 1:  # later phases at the pace of this one
        seconds = (seen[-1][0] - seen[0][0]) / (step - seen[0][1]) * (sum(totals.values()) - step)
        text += f"  {max(0, seconds - (now - seen[-1][0])) / 60:.1f} minutes left"
    return text


class View:
    """A line for each run under way: redrawn every second on a terminal, elsewhere printed once a minute."""

    def __init__(self):
        self.terminal, self.lines, self.printed = sys.stdout.isatty(), 0, time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays, above those."""
        print(f"\x1b[{self.lines}F\x1b[J" * (self.lines > 0) + text, flush=True)
        self.lines = 0

    def draw(self, jobs: list[dict]) -> None:
        """Every run that has begun."""
        now, width = time.monotonic(), shutil.get_terminal_size().columns - 1 if self.terminal else None
        begun = [job for job in jobs if (job["folder"] / "log.txt").exists()]
        longest = max((len(job["name"]) for job in begun), default=0)
        lines = [f"  {job['name']:<{longest}}  {progress(job, now)}"[:width] for job in begun]
        if lines and (self.terminal or now - self.printed > 60):
            self.say("\n".join(lines))
            self.lines, self.printed = len(lines) * self.terminal, now


def run_jobs(args: Study, todo: list[dict]) -> dict[str, str]:
    """Runs the jobs, each behind those it needs, a failed one once more; what failed for good, with words."""
    waiting, running, failed, tries = {job["name"]: job for job in todo}, {}, {}, Counter()
    began, took, view = time.monotonic(), [], View()

    def begin(submit: Callable[[dict], Future]) -> None:
        for name, job in list(waiting.items()):
            if broken := [need for need in job["needs"] if need in failed]:
                failed[name] = f"not begun: it takes the checkpoint of {broken[0]}, which failed"
            elif job["needs"].keys() & {*waiting, *(other["name"] for other in running.values())}:
                continue
            else:
                if not tries[name]:
                    (job["folder"] / "log.txt").unlink(missing_ok=True)
                running[submit(job)] = job
            del waiting[name]

    def settle(future: Future) -> None:
        job = running.pop(future)
        try:
            error, seconds = future.result()
        except (Exception, SystemExit) as raised:  # a full disk, a machine that Ray lost
            error, seconds = f"{type(raised).__name__}: {raised}", 0.0
        name = job["name"]
        took.append(seconds)
        tries[name] += 1
        if error and tries[name] == 1:
            waiting[name] = job
            return view.say(f"{name}.csv: failed, is tried once more")
        failed.update({name: f"{error}\n(log: {job['folder']}/log.txt)"} if error else {})
        number = len(todo) - len(waiting) - len(running)
        left = (time.monotonic() - began) / number * (len(todo) - number) / 60
        what = "FAILED" if error else f"done in {seconds / 60:.1f} minutes"
        view.say(f"{number}/{len(todo)} {name}.csv: {what}; {left:.0f} minutes left")

    with {"local": local_engine, "ray": ray_engine}[args.engine](args) as submit:
        try:
            while waiting or running:
                begin(submit)
                view.draw(list(running.values()))
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    settle(future)
        except KeyboardInterrupt:
            view.say("stopping: the runs write their checkpoints")
            raise
    wall = (time.monotonic() - began) / 60
    print(f"wall time {wall:.1f} minutes; the runs' own times add up to {sum(took) / 60:.1f} minutes")
    return failed


def run_study(args: Study) -> None:
    """Runs what is missing of a study; then its report and, if any, its failures."""
    if not args.out or args.folder not in ("", args.out):
        raise SystemExit("error: name one folder: run results/NAME, or run ... --out results/NAME")
    if args.workers < 1:
        raise SystemExit("error: --workers has to be at least 1")
    grid_variants = write_grid(args) if args.scripts else ()
    args.variants = args.variants or grid_variants
    jobs = plan(args)
    for flag, key in (("--variants", "variant"), ("--env-ids", "task")):
        known = dict.fromkeys(job[key] for job in jobs.values())
        if unknown := [name for name in getattr(args, flag[2:].replace("-", "_")) if name not in known]:
            names = f"{' '.join(unknown)}: {args.out}/plan.toml has {', '.join(known)}"
            raise SystemExit(f"error: {flag} {names}")
    todo = missing(args, jobs)
    other = sum(job["file"].exists() and not complete(job, args.keep) for job in todo)
    print(f"{len(todo)} of the plan's {len(jobs)} runs are to do"
          + f", {other} of them since their flags or code changed" * (other > 0))  # fmt: skip
    try:
        failed = run_jobs(args, todo) if todo else {}
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        raise SystemExit(130) from None
    study_report(StudyReport(args.out, script=args.script, statistics=bool(args.scripts)))
    for name, error in failed.items():
        old = "the tables show its csv of earlier flags or code\n" if jobs[name]["file"].exists() else ""
        print(f"\nFAILED: {name}\n{old}{error}")
    if failed:
        raise SystemExit(f"error: {len(failed)} runs failed; see above, then run the same command again")


@torch.no_grad()
def sampled_policy(score_net, observations, outcome: float) -> torch.Tensor:
    """Actions (B, A) drawn from p(a | s, w) by ancestral sampling from level T down to a clean action.

    a_0 estimate x = (a_t - sigma_t eps) / sqrt(abar_t), kept in [-1, 1];  a_(t-1) = sqrt(abar_(t-1)) x +
    sqrt(sigma_(t-1)^2 - v) eps + sqrt(v) z,  v = (sigma_(t-1) / sigma_t)^2 (1 - abar_t / abar_(t-1)).
    """
    sigma, count = score_net.sigma, len(observations)
    noised = torch.randn(count, score_net.net.weights[-1].shape[-1])
    w = torch.full((count,), outcome)
    for t in reversed(range(len(sigma))):
        eps = score_net(observations, noised, w, torch.full((count,), t))
        clean = ((noised - sigma[t] * eps) / (1 - sigma[t] ** 2).sqrt()).clamp(-1, 1)
        if t == 0:
            return clean
        eps = (noised - (1 - sigma[t] ** 2).sqrt() * clean) / sigma[t]  # of the clamped estimate
        v = (sigma[t - 1] / sigma[t]) ** 2 * (1 - (1 - sigma[t] ** 2) / (1 - sigma[t - 1] ** 2))
        noised = (1 - sigma[t - 1] ** 2).sqrt() * clean + (sigma[t - 1] ** 2 - v).sqrt() * eps
        noised = noised + v.sqrt() * torch.randn_like(noised)


def behaviour_cloning(script: ModuleType, run, steps: int) -> torch.nn.Module:
    """The script's actor fitted to all recorded actions: E[-log pi(a|s)], a kept off the bounds by 0.001."""
    torch.manual_seed(script.stream_seed(run.args.seed, "imitation"))
    actor = script.Actor(run.spec["obs_dim"], run.spec["act_dim"], run.args.hidden_sizes)
    script.set_statistics(actor, run.data)
    adam = torch.optim.Adam(actor.parameters(), lr=1e-3)
    observations = torch.as_tensor(run.data.columns["observations"])
    u = torch.atanh(torch.as_tensor(run.data.columns["actions"]).clamp(-0.999, 0.999))
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(u), (run.args.batch_size,))
        loss = -script.squashed_gaussian_log_prob(u[rows], *actor(observations[rows])).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return actor


def imitate(args: Imitate) -> None:
    """A csv with the final scores of behaviour cloning and of the sampled policies, as `work` writes them."""
    script = load_script(ROOT / args.script)
    torch.set_num_threads(1)
    for task, seed, share in (
        (t, s, b) for t in args.env_ids for s in args.seeds for b in args.best_episodes
    ):
        dataset_id, env_id, kwargs = script.TASKS.get(task, (None, None, None))
        if env_id is None:
            raise SystemExit(f"error: imitate knows the bundled tasks alone, not {task}")
        settings = dict(env_id=task, seed=seed, best_episodes=share, device="cpu", compile=False)
        settings = script.Args(**script.TASK_DEFAULTS.get(task, {}) | settings)
        data = script.select_episodes(script.load_dataset(dataset_id), share, 1.0, seed)
        env = script.make_env(env_id, **kwargs)
        spec = {"obs_dim": data.columns["observations"].shape[1], "act_dim": data.columns["actions"].shape[1]}
        with tempfile.TemporaryDirectory() as folder:
            run = script.Run(settings, Path(folder), data, env.spec, spec, torch.device("cpu"), {})
            score_net = script.fit_score_estimator(run)
            policies = {"behaviour-cloning": behaviour_cloning(script, run, settings.offline_steps)}
            for q in args.quantiles:
                act = partial(sampled_policy, score_net, outcome=float(np.quantile(run.outcomes, q)))
                policies[f"rvs-{100 * q:g}"] = SimpleNamespace(mode=act)
            for name, policy in policies.items():
                torch.manual_seed(script.stream_seed(seed, "evaluation"))
                returns = [float(r.sum()) for r in script.evaluate(policy, run.envs, "cpu")]
                origin = dict(variant=name if share == 1 else f"best-{share:g}-{name}",
                              flags="" if share == 1 else f"--best-episodes {share:g}", seed=seed,
                              code=scripts_version(), device="cpu", dataset=data.checksum[:16],
                              eval_every=settings.eval_every, phase="offline", step=settings.offline_steps,
                              updates=settings.offline_steps, return_mean=round(float(np.mean(returns)), 3),
                              score=round(float(data.score(np.mean(returns))), 4))  # fmt: skip
                row = origin | {f"return_{i}": f"{r:.6g}" for i, r in enumerate(returns)}
                write_csv(Path(args.out) / task / f"{origin['variant']}__{seed}.csv", [row])
                print(f"{task} seed {seed}: {origin['variant']:<32} score {origin['score']:6.1f}", flush=True)


def summaries(folder: Path, script: str) -> dict[tuple[str, str], list[dict]]:
    """Offline score, drop, final score, regret, smooth of every run of a study, by (task, variant)."""
    module, found, data = load_script(ROOT / script), {}, {}
    text = ("variant", "flags", "code", "checksum", "dataset", "dataset_id", "device", "phase")
    is_number = re.compile(r"-?[\d.]+(e[-+]?\d+)?").fullmatch
    number = lambda k, x: float(x) if k not in text and is_number(x) else x
    for path in sorted(folder.glob("*/*.csv")):
        with open(path, newline="") as file:
            rows = [{k: number(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
        task, first = path.parent.name, rows[0]
        words = first["flags"].split()  # for a csv that does not say which data its run saw
        given = lambda flag, default, words=words: words[words.index(flag) + 1] if flag in words else default
        dataset_id = first.get("dataset_id") or given("--dataset-id", module.TASKS.get(task, (task,))[0])
        share = [float(first.get(name) or given("--" + name.replace("_", "-"), 1))
                 for name in ("best_episodes", "data_fraction")]  # fmt: skip
        key = dataset_id, *share, int(first["seed"])
        if key not in data:
            data[key] = module.select_episodes(module.load_dataset(dataset_id), *key[1:])
        offline = [row for row in rows if row["phase"] == "offline"]
        online = [row for row in rows if row["phase"] == "online"]
        last = (offline or online[:1])[-1]  # a run from another one's final.pt has no offline phase
        result = dict(offline=last["score"], mean=data[key].score(data[key].returns().mean()))
        if online:
            result |= module.summarize(rows, data[key], first["eval_every"])
        result |= {f"{phase}_rate": rate(rows, phase) for phase in ("offline", "online")}
        shown = ("cosine_dataset", "cosine_policy", "q_policy", "alpha", "alpha_psi")
        result |= {name: last[name] for name in shown if last.get(name, "") != ""}
        found.setdefault((task, first["variant"]), []).append(
            result | dict(seed=int(first["seed"]), rows=rows)
        )
    return found


def picture(path: Path, runs_of: dict[str, list[dict]]) -> None:
    """A row a variant: score at the end of offline, lowest after the handover, at the end; seeds and mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(runs_of)), layout="constrained")
    marks = {"end of offline": ("C0", lambda r: r["offline"]), "lowest after the handover": ("C3", lowest),
             "end of online": ("C2", lambda r: r.get("final", math.nan))}  # fmt: skip
    for label, (color, value) in marks.items():
        for y, runs in enumerate(runs_of.values()):
            values = [value(r) for r in runs]
            axes.plot(values, [y] * len(runs), ".", color=color, alpha=0.4)
            axes.plot(statistics.mean(values), y, "o", color=color, label=None if y else label)
    if means := {round(r["mean"], 1) for runs in runs_of.values() for r in runs}:
        axes.axvline(min(means), color="gray", ls=":", label="mean of the whole recording")
    axes.set_yticks(range(len(runs_of)), runs_of)
    axes.invert_yaxis()
    axes.set_xlabel("normalised score")
    axes.set_title(path.stem.removesuffix("_brief"))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lowest(result: dict) -> float:
    """Lowest mean of three evaluations right after the handover, in score points."""
    return result["offline"] - result["drop"] if "drop" in result else math.nan


def chosen_runs(args: StudyReport) -> dict[str, dict[str, list[dict]]]:
    """{task: {variant: results}} of a study's csvs, variants in the plan's order."""
    tasks, found, chosen = read_plan(args.out), summaries(Path(args.out), args.script), {}
    for task in sorted({task for task, _ in found}):
        order = list(tasks.get(task, {}))
        named = [v for t, v in found if t == task and (not args.variants or v in args.variants)]
        for variant in sorted(named, key=lambda v, order=order: [*order, v].index(v)):
            if runs := [r for r in found[task, variant] if not args.seeds or r["seed"] in args.seeds]:
                chosen.setdefault(task, {})[variant] = runs
                if len(flags := {r["rows"][0]["flags"] for r in runs}) > 1:
                    print(f"note: {task}/{variant} has runs of different flags in one row: "
                          + "; ".join(sorted(flags)), file=sys.stderr)  # fmt: skip
    return chosen


def mean_and_error(runs: list[dict], name: str, digits: int = 1) -> str:
    """Mean and standard error of a result over seeds, of one run its value; "" where a run has none."""
    values = [float(r.get(name, math.nan)) for r in runs]
    if any(map(math.isnan, values)):
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def study_cross(args: StudyReport) -> str:
    """A Markdown table a task: a row an offline algorithm, a column an online one; also printed.

    The online one is the part of a variant's name behind its +, "own" where there is none. A cell has drop,
    final score and number of smooth handovers.
    """
    text = ""
    for task, variants in chosen_runs(args).items():
        tuners = ["own", *sorted({v.partition("+")[2] for v in variants} - {""})]
        empty, table = dict.fromkeys(["offline algorithm", "offline score", *tuners], ""), {}
        for variant, runs in variants.items():
            label, _, tuner = variant.partition("+")
            row = table.setdefault(label, empty | {"offline algorithm": label})
            row["offline score"] = row["offline score"] or mean_and_error(runs, "offline")
            if drop := mean_and_error(runs, "drop"):
                smooth = f"{sum(r['smooth'] for r in runs)} of {len(runs)}"
                row[tuner or "own"] = f"{drop}; {mean_and_error(runs, 'final')}; {smooth}"
        text += f"### {task}\n\n{markdown([*table.values()])}\n"
    print(text)
    return text


def study_report(args: StudyReport) -> str:
    """A Markdown table a task from a study's csvs, means and standard errors over seeds; also printed.

    Beside the csvs it draws OUT/TASK.png, or OUT/TASK_brief.png.
    """
    text, ending = "", "_brief" if args.brief else ""
    if args.statistics or args.cross:
        return study_statistics(args) if args.statistics else study_cross(args)
    for task, variants in chosen_runs(args).items():
        rows = []
        for variant, runs in variants.items():
            cell, flags = partial(mean_and_error, runs), runs[0]["rows"][0]["flags"]
            smooth = sum(r.get("smooth", False) for r in runs)
            row = {"variant": variant, "flags": flags and f"`{flags}`", "seeds": seeds_of(runs),
                   "offline score": cell("offline"), "drop": cell("drop"), "final score": cell("final"),
                   "regret": cell("regret", 3),
                   "smooth": f"{smooth} of {len(runs)}" if "drop" in runs[0] else ""}  # fmt: skip
            if args.brief:
                row.pop("flags")
            else:
                row |= {"cosine, data": cell("cosine_dataset", 2), "cosine, policy": cell("cosine_policy", 2),
                        "Q": cell("q_policy"), "alpha": cell("alpha", 3),
                        "alpha_psi": cell("alpha_psi", 3)}  # fmt: skip
            rows.append(row)
        text += f"### {task}\n\n{markdown(rows)}\n"
        picture(Path(args.out) / f"{task}{ending}.png", variants)
    print(text)
    return text


# === Statistics ============================================================================================

# measure: (its name in tables, digits)
MEASURES = {"offline": ("offline score", 1), "drop": ("handover drop", 1), "final": ("final score", 1),
            "regret": ("regret", 3), "offline_rate": ("offline updates/s", 0),
            "online_rate": ("online updates/s", 0)}  # fmt: skip
STYLES = ("-", "-.", ":")  # of curves: ten colours each


def resampled(strata: list[np.ndarray], seed: int = 0, draws: int = 10_000) -> list[np.ndarray]:
    """Bootstrap samples (draws, n) of each stratum's runs (n,), drawn with replacement."""
    rng = np.random.default_rng(seed)
    return [x[rng.integers(len(x), size=(draws, len(x)))] for x in strata]


def mean(strata: list[np.ndarray]) -> np.ndarray:
    """Mean of all runs of all strata (..., n)."""
    return np.concatenate(strata, axis=-1).mean(axis=-1)


def interquartile_mean(strata: list[np.ndarray]) -> np.ndarray:
    """Mean of the middle half of all runs of all strata (..., n): floor(n / 4) go at each end."""
    x = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(axis=-1)


def improvement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> np.ndarray:
    """P(X > Y): mean over strata (tasks) of the share of pairs of runs with x > y, ties one half."""
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(ours, theirs, strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)) for x, y in pairs], axis=0)


def estimate(statistic: Callable, *groups: list[np.ndarray]) -> tuple[float, float, float]:
    """The statistic and its 95% percentile interval, each group of runs resampled on its own by stratum.

    A single run a stratum has no interval: NaN.
    """
    samples = statistic(*(resampled(strata, seed) for seed, strata in enumerate(groups)))
    low, high = np.percentile(samples, [2.5, 97.5])
    if max(len(x) for strata in groups for x in strata) == 1:
        low = high = math.nan
    return float(statistic(*groups)), float(low), float(high)


def rate(rows: list[dict], phase: str) -> float:
    """Updates per second of a phase, evaluations included; NaN if the run has none."""
    rows = [row for row in rows if row["phase"] == phase and isinstance(row.get("seconds"), float)]
    seconds = rows[-1]["seconds"] - rows[0]["seconds"] if rows else 0
    return (rows[-1]["updates"] - rows[0]["updates"]) / seconds if seconds > 0 else math.nan


def seeds_of(runs: list[dict]) -> str:
    """The seeds of these runs, in order."""
    return " ".join(str(r["seed"]) for r in sorted(runs, key=lambda r: r["seed"]))


def study_statistics(args: StudyReport) -> str:
    """Tables with bootstrap intervals for every task and over tasks, see the top; also printed."""
    folder, chosen, text, found = Path(args.out), chosen_runs(args), "", []

    def column(runs: list[dict], measure: str) -> list[np.ndarray]:
        """The runs as a stratum [(n,)]; [] where one of them has no such value."""
        values = np.array([float(r.get(measure, math.nan)) for r in runs])
        return [values] if np.isfinite(values).all() else []

    def cell(task: str, variant: str, measure: str, name: str, statistic, *groups, digits=None) -> str:
        if not all(groups):
            return ""
        (value, low, high), digits = estimate(statistic, *groups), digits or MEASURES[measure][1]
        found.append(dict(task=task, variant=variant, measure=measure, statistic=name, value=f"{value:.6g}",
                          low=f"{low:.6g}", high=f"{high:.6g}", runs=sum(map(len, groups[0]))))  # fmt: skip
        interval = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{value:.{digits}f}{interval}"

    for task, variants in chosen.items():
        rows = []
        for variant, runs in variants.items():
            row = {"variant": variant, "seeds": seeds_of(runs)}
            rows.append(row | {title: cell(task, variant, m, "mean", mean, column(runs, m))
                               for m, (title, _) in MEASURES.items()})  # fmt: skip
        text += f"### {task}\n\n{markdown(rows)}\n"
        curves(folder / f"{task}_curves.png", task, variants)

    # over tasks: the variants that every task has, with the seeds that they have on every task
    shared = {}  # variant: its runs on each task
    for v in dict.fromkeys(v for variants in chosen.values() for v in variants):
        seeds = [{r["seed"] for r in variants.get(v, ())} for variants in chosen.values()]
        if common := set.intersection(*seeds):
            shared[v] = [[r for r in variants[v] if r["seed"] in common] for variants in chosen.values()]

    def strata(v: str, measure: str) -> list[np.ndarray]:
        columns = [column(runs, measure) for runs in shared[v]]
        return [x for part in columns for x in part] if all(columns) else []

    online, rows = [v for v in shared if strata(v, "final")], []
    against = args.against or next(iter(online), "")
    if args.against and args.against not in online:
        names = ", ".join(online) or "there is none"
        raise SystemExit(f"error: --against takes a variant with final scores on every task: {names}")
    for v, runs in shared.items():
        row = {"variant": v, "tasks": str(len(runs)), "seeds": seeds_of(runs[0])}
        row |= {f"{MEASURES[m][0]}, IQM": cell("all", v, m, "IQM", interquartile_mean, strata(v, m))
                for m in ("offline", "drop", "final", "regret")}  # fmt: skip
        pair = [strata(x, "final") if v in online and v != against else [] for x in (v, against)]
        name, better = f"P(final score above {against}'s)", f"P(above {against})"
        rows.append(row | {name: cell("all", v, "final", better, improvement, *pair, digits=2)})
    if rows:
        text += f"### All tasks\n\n{markdown(rows)}\n"
    (folder / "statistics.md").write_text(text)
    if found:
        write_csv(folder / "statistics.csv", found)
    print(text)
    return text


def curves(path: Path, task: str, variants: dict[str, list[dict]]) -> None:
    """Score against offline updates and online steps, the handover at 0: means and 95% intervals over seeds.

    A panel for each fine-tuner, the part of a variant's name behind its +, a line for each offline algorithm.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    begun = {variant.rsplit("+", 1)[0] for variant in variants if "+" in variant}
    split = {}  # variant: (offline algorithm, fine-tuner)
    for variant, runs in variants.items():
        label, _, tuner = variant.rpartition("+")
        if label or variant not in begun or any("final" in r for r in runs):  # not what others go on from
            split[variant] = (label, tuner) if label else (variant, "own online phase" if begun else "")
    labels, panels = ([*dict.fromkeys(names)] for names in zip(*split.values()))
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 4.5 * len(panels), 4.5), sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    for variant, (label, panel) in split.items():
        runs, axis, color = variants[variant], axes[0, panels.index(panel)], f"C{labels.index(label) % 10}"
        for phase in ("offline", "online"):
            scores = [{r["step"]: r["score"] for r in run["rows"] if r["phase"] == phase} for run in runs]
            if not (steps := sorted(set.intersection(*map(set, scores)))):
                continue
            style = STYLES[labels.index(label) // 10 % len(STYLES)]
            x = np.array(steps) - (steps[-1] if phase == "offline" else 0)
            points = [estimate(mean, [np.array([s[step] for s in scores])]) for step in steps]
            middle, low, high = np.array(points).T
            axis.plot(x, middle, color=color, ls=style, lw=1.5)
            axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    for panel, axis in zip(panels, axes[0]):
        axis.axvline(0, color="black", ls="--", lw=1)
        axis.set_title(panel)
        axis.set_xlabel("offline updates | online steps")
    axes[0, 0].set_ylabel("normalised score")
    handles = [plt.Line2D([], [], color=f"C{i % 10}", ls=STYLES[i // 10 % len(STYLES)], label=label)
               for i, label in enumerate(labels)]  # fmt: skip
    handles += [plt.Line2D([], [], color="black", ls="--", lw=1, label="handover")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    figure.suptitle(f"{task}: mean and 95% interval over seeds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    kinds = dict(speed=Speed, table=Table, run=Study, report=StudyReport, imitate=Imitate,
                 probe=Probe)  # fmt: skip
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
    args = tyro.cli(Union[tuple(named)], description=__doc__)  # noqa: UP007 (three made in a line)
    if isinstance(args, Speed):
        speed(args)
    elif isinstance(args, Table):
        tables(args.out)
    elif isinstance(args, Study):
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job would ignore the first
            signal.signal(number, signal.default_int_handler)
        run_study(args)
    elif isinstance(args, StudyReport):
        study_report(args)
    elif isinstance(args, Imitate):
        imitate(args)
    else:
        case = json.loads(args.case)
        print(json.dumps((beside if PEERS.keys() & case else probe)(case)))


if __name__ == "__main__":
    main()
