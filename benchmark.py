"""Measures how fast the scripts of the shelf are; runs studies of many runs and draws their tables.

    python benchmark.py speed                                    this machine; half an hour on two cores
    python benchmark.py speed --cleanrl FOLDER                   also CleanRL's own SAC update, from a clone
    python benchmark.py speed --device cuda --together 1 2 4 8   eager, CUDA graphs, runs that share a GPU
    python benchmark.py table results/speed                      the tables again, nothing measured
    python benchmark.py run results/choices --seeds 1 2 3        what is missing of a study's plan.toml
    python benchmark.py report results/choices                   its tables, from the csvs
    python benchmark.py imitate results/choices --seeds 1 2 3    two policies without a critic beside them

SPEED. Every measurement is a fresh process that runs a script's own main() on its own data and times its
loops as they are: sampling, logging and, online, the environment included; evaluations are not. Cases take
turns, so that a machine whose speed drifts is fair to all, and medians over the turns are reported.

The bound: all matrix products of one step are recorded with their shapes, and each is timed alone in the
same process. A step that did nothing else would take their sum; the share says how near the script comes.

Writes OUT/speed.csv (one row per case, turn and phase, with hardware and versions), which `table` reads.

STUDIES. OUT/plan.toml names the variants of each task with their flags. Every run leaves
OUT/TASK/VARIANT__SEED.csv: the run's metrics.csv with flags, seed, device, code version and dataset
checksum in every row. What is there is not run again, so a study can be stopped and gone on with. A failed
run is reported with its last words. A variant's flags may begin with the script that it runs; `{seed}` in
them stands for the run's seed, `{checkpoints}` for the folder that --checkpoints names.

IMITATION. What imitating the recording gives without any critic, on the same network sizes: behaviour cloning
by maximum likelihood, and the score estimator itself sampled as a policy, given a high outcome (diffusion
RvS). Their csvs lie beside the study's.
"""

import ast
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
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
    """width of the two hidden layers and batch, pair after pair"""
    growth: bool = True
    """also other widths, other batches and ten times the data"""
    together: tuple[int, ...] = (1, 2)
    """runs side by side on this machine (on one GPU: 1 2 4 8)"""
    cleanrl: str | None = None
    """folder with a clone of CleanRL, whose SAC update is then timed beside ours on one core"""
    out: str = "results/speed"
    """folder of speed.csv"""


@dataclass
class Table:
    """Print the tables from OUT/speed.csv."""

    out: tyro.conf.Positional[str] = "results/speed"
    """folder of speed.csv"""


@dataclass
class Study:
    """Run what is missing of the study OUT/plan.toml: a csv for every task, variant and seed."""

    out: tyro.conf.Positional[str]
    """folder of the study, results/NAME"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """1 to 3 to tune on, 11 and up to report"""
    env_ids: tuple[str, ...] = ()
    """some of the plan's tasks; all if none is named"""
    variants: tuple[str, ...] = ()
    """some of the plan's variants"""
    workers: int = os.cpu_count() or 1
    """runs at the same time, each with one thread"""
    script: str = "smac_offline_online.py"
    """script of the shelf"""
    checkpoints: str | None = None
    """folder to keep the runs' offline.pt and final.pt in, as TASK/VARIANT__SEED_offline.pt"""


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


# === CleanRL's update beside ours ==========================================================================


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


def beside_cleanrl(case: dict) -> dict:
    """Updates per second of both, in turns of 50 in one process with one thread."""
    torch.set_num_threads(1)
    obs_dim, act_dim, times = 11, 3, {"CleanRL": [], "shelf": []}
    with contextlib.redirect_stdout(io.StringIO()):
        updates = {"CleanRL": cleanrl_update(Path(case["cleanrl"]), obs_dim, act_dim),
                   "shelf": shelf_update(load_script(case["script"]), obs_dim, act_dim)}  # fmt: skip
        for _ in range(11):
            for name, update in updates.items():
                began = time.perf_counter()
                for _ in range(50):
                    update()
                times[name].append((time.perf_counter() - began) / 50)
    return {
        f"SAC update, {name}": dict(updates_per_second=1 / statistics.median(t[1:]))
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
    if args.growth:
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
    if args.cleanrl and not (Path(args.cleanrl) / "cleanrl/sac_continuous_action.py").exists():
        raise SystemExit(
            f"error: {args.cleanrl} is no clone of CleanRL: git clone github.com/vwxyzjn/cleanrl"
        )
    if args.cleanrl:
        git = ["git", "-C", args.cleanrl, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
        print(f"CleanRL at commit {commit}")
        todo.append(
            todo[0] | dict(cleanrl=str(Path(args.cleanrl).resolve()), optimizer="adam", commit=commit)
        )
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
        hidden = ("env_id", "device", "seconds", "cleanrl")
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
    text = f"{where}\n\n{markdown(ours)}" + (f"\n{markdown(theirs)}" if theirs else "")
    print(text)
    return text


# === Studies ===============================================================================================


def plan(args: Study) -> list[dict]:
    """The runs of OUT/plan.toml, a table of {variant = flags} for each task, seed by seed."""
    path = Path(args.out) / "plan.toml"
    try:
        tasks = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SystemExit(f"error: {path} can't be read ({error}): a study begins with its plan") from error
    chosen = {task: tasks[task] for task in args.env_ids or tasks if task in tasks}
    file = lambda task, variant, seed: Path(args.out) / task / f"{variant}__{seed}.csv"
    job = lambda *of: dict(zip(("task", "variant", "seed"), of), file=file(*of))
    kept = str(Path(args.checkpoints).resolve()) if args.checkpoints else "{checkpoints}"
    words = lambda flags, seed: flags.replace("{seed}", str(seed)).replace("{checkpoints}", kept)
    return [job(task, variant, seed) | dict(flags=flags, words=words(flags, seed).split())
            for seed in args.seeds for task, variants in chosen.items() for variant, flags in variants.items()
            if not args.variants or variant in args.variants]  # fmt: skip


def work(job: dict, script: str, checkpoints: str | None = None) -> str:
    """One run in a folder of its own; its metrics.csv becomes job["file"], with its origin in every row.

    Its checkpoints are copied to `checkpoints`, without optimiser states: enough to act and to hand over.
    Returns "" or the last lines of what a failed run printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = job["words"]
        script, words = (words[0], words[1:]) if words and words[0].endswith(".py") else (script, words)
        module = load_script(ROOT / script) if checkpoints else None
        words = ["--env-id", job["task"], "--seed", str(job["seed"]), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        how = dict(cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run([sys.executable, str(ROOT / script), *words], **how)
        if done.returncode:
            return done.stdout[-1500:]
        (directory,) = (Path(folder) / "runs").iterdir()
        config = json.loads((directory / "config.json").read_text())
        with open(directory / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for path in [*directory.glob("offline.pt"), *directory.glob("final.pt")] if checkpoints else ():
            state = module.sealed(module.load_checkpoint(path) | {"optimizers": []})
            kept = Path(checkpoints) / job["task"] / f"{job['variant']}__{job['seed']}_{path.name}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, kept)
    origin = {key: job[key] for key in ("variant", "flags", "seed", "code")}
    origin |= dict(device=config["resolved_device"], dataset=config["dataset_checksum"][:16],
                   eval_every=config["args"]["eval_every"])  # fmt: skip
    short = lambda x: f"{float(x):.6g}" if "." in x else x
    write_csv(job["file"], [origin | {name: short(value) for name, value in row.items()} for row in rows])
    return ""


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


def run_study(args: Study) -> None:
    """Runs what is missing of a study, a few at a time; a failed run is tried once more, then reported."""
    jobs = [job | dict(code=scripts_version()) for job in plan(args)]
    todo = [job for job in jobs if not job["file"].exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them there already; {args.workers} at a time")
    began, failed, how = time.monotonic(), {}, (args.script, args.checkpoints)
    with ThreadPoolExecutor(args.workers) as pool:
        futures = {pool.submit(lambda job: work(job, *how) and work(job, *how), job): job for job in todo}
        for number, future in enumerate(as_completed(futures), 1):
            name, error = str(futures[future]["file"]), future.result()
            left = (time.monotonic() - began) / number * (len(todo) - number) / 60
            print(
                f"{number}/{len(todo)} {name}: {'FAILED' if error else 'done'}; {left:.0f} minutes left",
                flush=True,
            )
            failed |= {name: error} if error else {}
    for name, error in failed.items():
        print(f"\nFAILED twice: {name}\n{error}")
    study_report(StudyReport(args.out, script=args.script))
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
        dataset_id, env_id, kwargs = script.TASKS[task]
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
    number = lambda x: float(x) if re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", x) else x
    for path in sorted(folder.glob("*/*.csv")):
        with open(path, newline="") as file:
            rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]
        task, flags = path.parent.name, rows[0]["flags"].split()
        share = lambda name, flags=flags: float(flags[flags.index(name) + 1]) if name in flags else 1.0
        key = task, share("--best-episodes"), share("--data-fraction"), int(rows[0]["seed"])
        if key not in data:
            data[key] = module.select_episodes(module.load_dataset(module.TASKS[task][0]), *key[1:])
        offline = [row["score"] for row in rows if row["phase"] == "offline"]
        online = [row for row in rows if row["phase"] == "online"]
        result = dict(
            offline=offline[-1], best_offline=max(offline), mean=data[key].score(data[key].returns().mean())
        )
        if online:
            result |= module.summarize(rows, data[key], rows[0]["eval_every"])
        last = [row for row in rows if row["phase"] == "offline"][-1]
        shown = ("cosine_dataset", "cosine_policy", "q_policy", "alpha", "alpha_psi")
        result |= {name: last[name] for name in shown if name in last}
        found.setdefault((task, rows[0]["variant"]), []).append(
            result | dict(seed=int(rows[0]["seed"]), rows=rows)
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


def study_report(args: StudyReport) -> str:
    """A Markdown table a task from a study's csvs, means and standard errors over seeds; also printed.

    Beside the csvs it draws OUT/TASK.png, or OUT/TASK_brief.png.
    """
    folder, text = Path(args.out), ""
    found = summaries(folder, args.script)
    wanted, named = set(args.seeds), set(args.variants)
    ending = "_brief" if args.brief else ""
    for task in sorted({task for task, _ in found}):
        rows, shown = [], {}
        order = list(tomllib.loads((folder / "plan.toml").read_text()).get(task, {}))
        planned = lambda variant, order=order: [*order, variant].index(variant)
        chosen = [v for t, v in found if t == task and (not named or v in named)]
        for variant in sorted(chosen, key=planned):
            runs = [r for r in found[task, variant] if not wanted or r["seed"] in wanted]
            if not runs:
                continue

            def cell(name, digits=1, runs=runs):
                values = [float(r.get(name, math.nan)) for r in runs]
                if any(map(math.isnan, values)):
                    return ""
                if len(values) == 1:
                    return f"{values[0]:.{digits}f}"
                error = statistics.stdev(values) / len(values) ** 0.5
                return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"

            flags = runs[0]["rows"][0]["flags"]
            smooth = sum(r.get("smooth", False) for r in runs)
            row = {"variant": variant, "flags": flags and f"`{flags}`",
                   "seeds": " ".join(str(r["seed"]) for r in sorted(runs, key=lambda r: r["seed"])),
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
            shown[variant] = runs
        if rows:
            text += f"### {task}\n\n{markdown(rows)}\n"
            picture(folder / f"{task}{ending}.png", shown)
    print(text)
    return text


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
        run_study(args)
    elif isinstance(args, StudyReport):
        study_report(args)
    elif isinstance(args, Imitate):
        imitate(args)
    else:
        case = json.loads(args.case)
        print(json.dumps((beside_cleanrl if "cleanrl" in case else probe)(case)))


if __name__ == "__main__":
    main()
