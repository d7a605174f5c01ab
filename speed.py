"""Measures how many updates a second the scripts make, beside the time of their matrix products alone.

    python speed.py                                         this machine; half an hour on two cores
    python speed.py --cleanrl ../cleanrl                    also CleanRL's own SAC update, from a clone
    python speed.py --device cuda --together 1 2 4 8        eager, compiled, and runs that share a GPU
    python speed.py --table                                 the tables again, nothing measured

Every measurement is a fresh process that runs a script's own main() and times its loops as they are:
sampling, logging and, online, the environment included; evaluations are not. Cases take turns, so that a
machine whose speed drifts is fair to all, and medians over the turns are reported.

The bound: all matrix products of one step are recorded with their shapes, and each is timed alone in the same
process; the share says how near the script comes to their sum. Inside compiled steps nothing can be recorded.

CleanRL's update is run as it stands in a clone of its repository, on one thread at its own sizes: 2x256 ReLU
networks, batch 256, Adam. Beside it stands our SAC, the offline phase at kappa 0, with these settings.
"""

import ast
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro
from gymnasium.spaces import Box
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parent


@dataclass
class Args:
    folder: Path = Path("results/speed")  # folder of speed.csv: a row per case, turn and phase
    table: bool = False  # print the tables of FOLDER/speed.csv and measure nothing
    scripts: tuple[str, ...] = ("smac_offline_online.py",)  # scripts to measure, all their phases
    env_id: str = "hopper-medium-replay"  # task, as the scripts take it
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: eager and compiled; cpu: 1 and 2 threads
    repeats: int = 5  # turns
    seconds: float = 4.0  # time measured in each phase of a turn
    widths: tuple[int, ...] = (256, 128)  # of the two hidden layers, and batch sizes; none: CleanRL's alone
    growth: bool = True  # also other widths and other batches
    together: tuple[int, ...] = (1, 2)  # runs side by side on this machine
    cleanrl: Path | None = None  # clone of github.com/vwxyzjn/cleanrl


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
            total += 2 * math.prod(batch) * rows * inner * columns * count
        return total


def product_timer(counts: Counter, device: str) -> Callable[[], float]:
    """A function that runs all these products alone and gives the seconds one step's worth takes."""
    timers = []
    for (name, key), count in counts.items():
        operands = []
        for shape, stride in key:
            expanded = any(step == 0 and size > 1 for size, step in zip(shape, stride))  # as biases are
            operand = torch.empty_strided(shape, stride, device=device)
            operands.append((torch.empty(shape, device=device) if expanded else operand).normal_())
        what = dict(globals={"run": partial(getattr(torch, name), *operands)})
        timers.append((Timer("run()", **what, num_threads=torch.get_num_threads()), count))
    return lambda: sum(count * timer.timeit(10).mean for timer, count in timers)


def timed_steps(steps: Iterator[int], phase: str, case: dict, found: dict) -> Iterator[int]:
    """A phase's steps until some seconds of steady state are over, whose figures are left in `found`.

    Blocks of steps and runs of the products alone take turns, so that the share compares neighbours in time.
    """
    wait = torch.cuda.synchronize if case["device"] == "cuda" else lambda: None
    first = case["batch"] if phase == "online" else 0  # online no update comes before that many steps
    heaviest, rates, alone = Products(), [], []
    for step in steps:
        if step == first + 2:
            wait()
            first_update = time.time() - case["started"]
        if step > first + 20:
            break
        with contextlib.nullcontext() if case["compile"] else Products() as products:
            yield step
        heaviest = max(heaviest, products or heaviest, key=Products.flop)
    products_alone = product_timer(heaviest.counts, case["device"])
    for _ in range(8):
        wait()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < case["seconds"] / 8:
            yield step
            step, done = next(steps), done + 1
        wait()
        rates.append(done / (time.perf_counter() - began))
        alone.append(products_alone())
    found[phase] = dict(updates_per_second=statistics.median(rates), gflop=heaviest.flop() / 1e9,
                        product_ms=1e3 * statistics.median(alone), first_update=first_update,
                        share=statistics.median(r * a for r, a in zip(rates, alone)))  # fmt: skip


def load_script(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe(case: dict) -> dict:
    """Figures of one case by phase: runs the script's main() with each phase's `tqdm(steps, phase)` timed."""
    module, found = load_script(ROOT / case["script"]), {}
    module.tqdm = lambda steps, phase, **_: timed_steps(iter(steps), phase, case, found)
    module.tqdm.write = lambda *_: None
    module.Run.report = lambda *_: None
    flags = dict(env_id=case["env_id"], device=case["device"], batch_size=case["batch"], eval_episodes=1,
                 score_steps=10**5, offline_steps=10**5, alignment_steps=10**5, online_steps=10**5,
                 eval_every=10**9, handover_eval_every=10**9, checkpoint_every=10**9,
                 offline_optimizer=case["optimizer"], online_optimizer=case["optimizer"])  # fmt: skip
    known = {field.name for field in fields(module.Args)}
    words = [f"--{n.replace('_', '-')}={x}" for n, x in (flags | case["flags"]).items() if n in known]
    words += ["--hidden-sizes", *[str(case["width"])] * 2, *["--compile"] * case["compile"]]
    sys.argv = [case["script"], *words]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        module.main()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    gpu = torch.cuda.max_memory_allocated() / 2**20 if case["device"] == "cuda" else 0
    return {phase: figures | dict(memory_mb=memory, gpu_mb=gpu) for phase, figures in found.items()}


# === CleanRL's update ======================================================================================

CLEANRL = "cleanrl/sac_continuous_action.py"
WIDTHS = dict(observations=11, next_observations=11, actions=3, rewards=1, terminations=1)  # of Hopper
OURS = dict(critic_activation="relu", kappa=0.0, online_steps=0)  # beside it


def cleanrl_update(path: Path, columns: dict[str, np.ndarray]) -> Callable[[], None]:
    """CleanRL's SAC update, unmodified: the body of its `if global_step > learning_starts`.

    The statements that build networks, optimisers and replay are executed as they stand; the environment is
    two Box spaces, the replay holds 10,000 random transitions, the writer writes nothing.
    """
    sys.path.insert(0, str(path.parents[1]))
    space, text = vars(load_script(path)), ast.unparse
    main = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)).body
    first = next(i for i, node in enumerate(main) if text(node).startswith("actor = "))
    last = next(i for i, node in enumerate(main) if text(node).startswith("rb = "))
    loop = next(node for node in main if isinstance(node, ast.For))
    body = next(node for node in loop.body if "rb.sample" in text(node)).body
    box = lambda name: Box(-1.0, 1.0, columns[name].shape[1:], np.float32)
    envs = SimpleNamespace(single_observation_space=box("observations"), single_action_space=box("actions"))
    space |= dict(args=space["Args"](buffer_size=10_000), device=torch.device("cpu"), envs=envs,
                  writer=SimpleNamespace(add_scalar=lambda *_: None), start_time=time.time())  # fmt: skip
    exec(compile(ast.Module(main[first : last + 1], []), str(path), "exec"), space)
    for observation, successor, action, reward, end in zip(*(columns[name] for name in WIDTHS)):
        space["rb"].add(observation[None], successor[None], action[None], reward, end > 1, [{}])
    update, steps = compile(ast.Module(body, []), str(path), "exec"), itertools.count(1)
    return lambda: exec(update, space.update(global_step=next(steps)) or space)


def probe_cleanrl(case: dict) -> dict:
    """Updates per second of CleanRL's update, median of turns of 50, on random transitions."""
    torch.set_num_threads(1)
    rates, draw = [], np.random.default_rng(0).uniform
    columns = {name: draw(-1, 1, (10_000, n)).astype(np.float32) for name, n in WIDTHS.items()}
    update, began = cleanrl_update(Path(case["clone"]) / CLEANRL, columns), time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - began < case["seconds"]:
        turn = time.perf_counter()
        for _ in range(50):
            update()
        rates.append(50 / (time.perf_counter() - turn))
    return {"SAC update, CleanRL": dict(updates_per_second=statistics.median(rates[1:]))}


# === Many measurements =====================================================================================


def cases(args: Args) -> list[dict]:
    """What is measured: each size in every mode, then one factor at a time, then CleanRL beside ours."""
    base = dict(script="", flags={}, env_id=args.env_id, device=args.device, seconds=args.seconds, width=256,
                batch=256, threads=1, optimizer="muon", compile=False, together=1)  # fmt: skip
    other_mode = dict(compile=True) if args.device == "cuda" else dict(threads=2)
    variants = []
    for width in args.widths:
        size = dict(width=width, batch=width)
        variants += [size, size | other_mode, size | dict(optimizer="adam")]
        variants += [size | dict(together=n) for n in args.together if n > 1]
    if args.growth and variants:
        variants += [dict(width=w) for w in (64, 128, 512)] + [dict(batch=b) for b in (64, 128, 512)]
    found = [base | variant | dict(script=script) for script in args.scripts for variant in variants]
    if args.cleanrl:
        if not (args.cleanrl / CLEANRL).exists():
            raise SystemExit(f"error: {args.cleanrl} is no clone of CleanRL: it has no {CLEANRL}")
        git = ["git", "-C", str(args.cleanrl), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
        beside = base | dict(script="smac_offline_online.py", optimizer="adam", commit=commit, device="cpu")
        found.append(beside | dict(clone=str(args.cleanrl.resolve())))
        found.append(beside | dict(flags=OURS, label="SAC update, ours"))
    return found


def measurements(case: dict) -> list[dict]:
    """Figures by phase of the processes that measure a case side by side; exit if one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case["threads"]), "TQDM_DISABLE": "1"}
    words, found = [sys.executable, __file__, "--probe", json.dumps(case | dict(started=time.time()))], []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for process in [subprocess.Popen(words, env=environment, **pipes) for _ in range(case["together"])]:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"error: a measurement failed:\n{output[-2000:]}{errors[-2000:]}")
        found.append(json.loads(output.splitlines()[-1]))
    return found


def measure(args: Args) -> None:
    """Measures all cases in turns and writes speed.csv after each turn."""
    todo, rows, model = cases(args), [], platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    known = dict(cpu=f"{model}, {os.cpu_count()} cores", gpu=gpu, torch=torch.__version__)
    known["python"] = platform.python_version()
    for turn, case in itertools.product(range(1, args.repeats + 1), todo):
        figures = measurements(case)
        for phase in ["offline"] if "label" in case else figures[0]:
            row = dict(turn=turn, phase=case.get("label", phase)) | case | figures[0][phase] | known
            row["updates_per_second"] = sum(f[phase]["updates_per_second"] for f in figures)
            rows.append(row)
        print(
            f"turn {turn} of {args.repeats}: {rows[-1]['updates_per_second']:.0f} a second, {case}",
            flush=True,
        )
        args.folder.mkdir(parents=True, exist_ok=True)
        hidden = ["flags", "env_id", "device", "seconds", "clone", "label"]
        table = pd.DataFrame(rows).drop(columns=hidden, errors="ignore")
        table.to_csv(args.folder / "speed.csv", index=False, float_format="%.5g", lineterminator="\n")


def tables(folder: Path) -> str:
    """The tables of FOLDER/speed.csv as Markdown, medians over the turns."""
    if not (path := folder / "speed.csv").exists():
        raise SystemExit(f"error: there is no {path}: measure first, without --table")
    rows = pd.read_csv(path, dtype={"commit": str, "gpu": str}).fillna({"commit": "", "gpu": ""})
    keys = ["script", "width", "batch", "threads", "optimizer", "compile", "together", "copies", "commit"]
    keys = [key for key in keys if key in rows]
    rounded = lambda x: "-" if not 0 < x < math.inf else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    ours, theirs = [], []
    for key, turns in rows.groupby(keys, sort=False):
        case, gpu = dict(zip(keys, key)), turns.gpu.iloc[0]
        medians = turns.groupby("phase", sort=False).median(numeric_only=True)
        joined = lambda values: " / ".join(map(rounded, values))
        if case["commit"]:
            theirs += [{"update": phase.replace("shelf", "ours"), "updates per second": rounded(rate)}
                       for phase, rate in medians.updates_per_second.items()]  # fmt: skip
            continue
        mode = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
        mode = ("compiled" if case.get("compile") else "eager") if gpu else mode
        mode += f", {case['together']} runs at once, their sum" * (case["together"] > 1)
        mode += f", {case['copies']} times the data" * (case.get("copies", 1) > 1)
        ours.append({
            "networks, batch": f"2x{case['width']}, {case['batch']}", "optimiser": case["optimizer"],
            "mode": mode,
            f"updates per second: {', '.join(medians.index)}": joined(medians.updates_per_second),
            "products alone": joined(1e3 / medians.product_ms),
            "share": " / ".join(f"{share:.0%}" for share in medians.share),
            "first update": f"{medians.first_update.iloc[0]:.1f} s",
            "peak memory": f"{medians['gpu_mb' if gpu else 'memory_mb'].iloc[0]:.0f} MB",
        })  # fmt: skip
    known = rows.iloc[0]
    where = f"{known.gpu or known.cpu}; torch {known.torch}, Python {known.python}"
    text = [where, ""]
    for part in filter(None, (ours, theirs)):
        lines = [list(part[0]), ["---"] * len(part[0]), *(row.values() for row in part)]
        text += [*(f"| {' | '.join(line)} |" for line in lines), ""]
    return "\n".join(text)


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:  # one measurement in this process: a case as JSON in, its figures out
        case = json.loads(sys.argv[2])
        return print(json.dumps((probe_cleanrl if "clone" in case else probe)(case)))
    args = tyro.cli(Args, description=__doc__)
    if not args.table:
        measure(args)
    print(tables(args.folder))


if __name__ == "__main__":
    main()
