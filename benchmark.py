"""Runs studies of many runs, and reports them: handover drop, regret, verdict, tables, intervals, curves.

    python benchmark.py run results/comparison                   what the study's plan.toml still lacks
    python benchmark.py run results/choices --seeds 1 2 3 --variants default kappa-0
    python benchmark.py run results/NAME --scripts smac_offline_online.py calql_baseline.py --finetune sac td3
        --env-ids hopper-medium-replay --seeds 11 12 13          a grid, whose plan.toml it writes
    python benchmark.py report results/choices                   a row a variant, means and standard errors
    python benchmark.py report results/comparison --cross        offline by online algorithms
    python benchmark.py report results/comparison --statistics   95% intervals, over tasks, and curves
    python benchmark.py report runs                              the runs that the scripts left in runs/

A plan names the variants of each task, as flags that may begin with a script (smac_offline_online.py if not):

    ["hopper-medium-replay"]
    seeds = [11, 12, 13]                                         # run if the command names none
    "smac" = "--kappa 1"
    "smac+td3" = "td3_finetune.py --checkpoint {checkpoints}/hopper-medium-replay/smac__{seed}_offline.pt"

`{checkpoints}` is the folder where every run leaves TASK/VARIANT__SEED_offline.pt and ..._final.pt, and a run
that takes one waits for the run that makes it. A line `small = "--batch-size 64"` of a table [names] is what
`{small}` stands for. A run leaves FOLDER/TASK/VARIANT__SEED.csv: its metrics.csv, its origin in every row,
less single episodes' returns (return_0, ...), which stay with its run directory in FOLDER/runs/.
What has its csv is not run again; what was broken off goes on from its last.pt in FOLDER/runs/.
"""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import minari
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# === Arguments =============================================================================================


@dataclass
class RunArgs:
    """Run what a study still lacks: a csv for every task, variant and seed of its plan."""

    folder: tyro.conf.Positional[Path]  # folder of the study, results/NAME, or the plan.toml in it
    seeds: tuple[int, ...] = ()  # none: those of each task in the plan, or 1 2 3
    env_ids: tuple[str, ...] = ()  # some of the plan's tasks; those of the grid
    variants: tuple[str, ...] = ()  # some of the plan's variants
    scripts: tuple[str, ...] = ()  # grid: `script flags` or `label=script flags`; writes plan.toml
    finetune: tuple[str, ...] = ("sac",)  # of the grid: sac, td3, td3bc or `label=script flags`
    workers: int = os.cpu_count() or 1  # runs at the same time on this machine
    checkpoints: Path | None = None  # folder that studies may share; FOLDER/runs/checkpoints if none is named
    ray_address: str | None = None  # Ray cluster that shares this folder, `auto` or HOST:PORT
    gpus_per_run: float = 0.0  # GPUs, or the share of one, that Ray keeps for a run


@dataclass
class ReportArgs:
    """Print a study's tables from its csvs, and draw its figures beside them."""

    folder: tyro.conf.Positional[Path]  # folder of a study, results/NAME, or of run directories, runs
    seeds: tuple[int, ...] = ()  # only these
    variants: tuple[str, ...] = ()  # only these
    brief: bool = False  # without flags, diagnostics and lowest
    cross: bool = False  # rows: offline algorithms, columns: online ones
    statistics: bool = False  # intervals, aggregates and curves; also FOLDER/statistics.md and .csv
    against: str | None = None  # variant that --statistics compares with; the first if none


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


# === The plan ==============================================================================================

FINETUNERS = {"sac": "sac_finetune.py", "td3": "td3_finetune.py",
              "td3bc": "td3_finetune.py --bc-alpha 2.5"}  # fmt: skip


class Job(NamedTuple):
    """One run of a plan."""

    name: str  # TASK/VARIANT__SEED
    task: str
    variant: str
    seed: int
    flags: str  # as the plan has them
    command: list[str]  # script and flags
    csv: Path
    folder: Path  # of its log and of its run directory
    kept: str  # its checkpoints without _offline.pt and _final.pt
    takes: list[str]  # checkpoints that its flags name


def read_plan(folder: Path) -> dict[str, dict]:
    """FOLDER/plan.toml: {task: {variant: flags}}, and in the tasks that have them {"seeds": list}."""
    path = folder / "plan.toml"
    try:
        tasks = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} can't be read ({error}): a study begins with its plan")
    for task, variants in tasks.items():
        if not isinstance(variants, dict):
            fail(f"in {path} {task} stands outside a task: write a line [TASK] above it")
        for name, value in variants.items():
            if not isinstance(value, list if name == "seeds" else str):
                fail(f"in {path} {task}'s {name} is {value!r}: flags are a string, seeds a list of numbers")
    names = tasks.pop("names", {})
    for variants in tasks.values():
        for variant, flags in variants.items():
            if variant != "seeds":
                variants[variant] = re.sub(r"\{([\w-]+)\}", lambda m: names.get(m[1], m[0]), flags)
    return tasks


def write_grid(args: RunArgs) -> None:
    """FOLDER/plan.toml of --scripts x --finetune: LABEL+FINETUNER goes on from LABEL's offline.pt."""

    def labelled(entry: str) -> tuple[str, str]:
        found = re.fullmatch(r"(?:([\w.-]+)=)?((\w+)\.py.*)", FINETUNERS.get(entry, entry))
        if not found or not (ROOT / f"{found[3]}.py").exists():
            fail(f"{entry!r} is not `script flags`, `label=script flags`, {', '.join(FINETUNERS)}")
        return found[1] or (entry if entry in FINETUNERS else found[3].split("_")[0]), found[2]

    offline = [labelled(entry) for entry in args.scripts]
    online = [labelled(entry) for entry in args.finetune]
    if len(dict(offline)) < len(offline) or len(dict(online)) < len(online) or not args.env_ids:
        fail("a grid needs --env-ids, and labels that differ: write label=script flags")
    rows = []
    for task in args.env_ids:
        rows += [f"[{json.dumps(task)}]"] + [f"seeds = {[*args.seeds]}"] * bool(args.seeds)
        for label, command in offline:
            start = f"--checkpoint {{checkpoints}}/{task.replace('/', '-')}/{label}__{{seed}}_offline.pt"
            named = {label: command} | {f"{label}+{name}": f"{how} {start}" for name, how in online}
            rows += [f"{json.dumps(name)} = {json.dumps(flags)}" for name, flags in named.items()]
    path, text = args.folder / "plan.toml", "\n".join(rows) + "\n"
    if path.exists() and path.read_text() != text:
        fail(f"{path} is another plan: leave --scripts out, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def plan_jobs(args: RunArgs) -> dict[str, Job]:
    """All runs of the plan by name, seed by seed."""
    folder, jobs, rows = args.folder.resolve(), {}, []
    checkpoints = (args.checkpoints or folder / "runs" / "checkpoints").resolve()
    for task, variants in read_plan(args.folder).items():
        seeds = args.seeds or variants.pop("seeds", (1, 2, 3))
        rows += [(seed, task, *item) for seed, item in product(seeds, variants.items()) if item[0] != "seeds"]
    for seed, task, variant, flags in sorted(rows, key=lambda row: row[0]):
        words = [word.replace("{seed}", str(seed)) for word in flags.split()]
        words = [word.replace("{checkpoints}", str(checkpoints)) for word in words]
        script = words.pop(0) if words and words[0].endswith(".py") else "smac_offline_online.py"
        takes = [word.split("=")[-1] for word in words if str(checkpoints) in word]
        name = f"{task.replace('/', '-')}/{variant}__{seed}"  # a Minari id has slashes
        command = [str(ROOT / script), "--env-id", task, "--seed", str(seed), *words]
        jobs[name] = Job(name, task, variant, seed, flags, command, folder / f"{name}.csv",
                         folder / "runs" / name, str(checkpoints / name), takes)  # fmt: skip
    return jobs


def is_checkpoint_of(path: str, job: Job | None) -> bool:
    """Whether this file is a whole checkpoint, and made by the job's script."""
    import torch  # only here: a report needs none

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # missing or damaged: torch raises many kinds
        return False
    return job is None or state.get("script") == Path(job.command[0]).stem


def missing(args: RunArgs, jobs: dict[str, Job]) -> dict[str, Job]:
    """The jobs that are asked for and have no csv, behind those that make the checkpoints they lack."""
    makers = {f"{job.kept}_{which}.pt": job for job in jobs.values() for which in ("offline", "final")}
    todo = {}

    def add(job: Job, behind: tuple[str, ...] = ()) -> None:
        if job.name in behind:
            fail(f"{job.name} waits for its own checkpoint")
        for path in job.takes:
            maker = makers.get(path)
            if (maker and not maker.csv.exists()) or not is_checkpoint_of(path, maker):
                if maker is None:
                    fail(f"{job.name} takes {path}: run the study that makes it, with these --checkpoints")
                add(maker, (*behind, job.name))
        todo[job.name] = job

    for job in jobs.values():
        if job.task in (args.env_ids or [job.task]) and job.variant in (args.variants or [job.variant]):
            if not job.csv.exists():
                add(job)
    return todo


# === Runs ==================================================================================================

processes: list[subprocess.Popen] = []  # all that were started here


def work(job: Job) -> str:
    """One run in a folder of its own, from where it was broken off; "" or what went wrong."""
    runs, command = job.folder / "runs", job.folder / "command.txt"
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "a+") as log:
        try:  # the script inherits the log, and with it the lock, even if this process dies
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"it is running already, in {job.folder}: wait for it or stop it first"
        broken_off = [*runs.glob("*/last.pt")]
        if broken_off and command.exists() and command.read_text() == " ".join(job.command):
            words = [job.command[0], "--resume", str(broken_off[0].parent)]
        else:
            words = job.command
            shutil.rmtree(runs, ignore_errors=True)
            command.write_text(" ".join(words))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        how = dict(cwd=job.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        process = subprocess.Popen([sys.executable, *words], **how)
        processes.append(process)
        if status := process.wait():
            return f"{last_words(job) or f'exit status {status}'} (log: {log.name})"
    try:
        keep_results(job)
    except (OSError, ValueError, KeyError) as error:  # no run directory, a full disk
        return f"its results can't be kept ({error!r})"
    return ""


def last_words(job: Job) -> str:
    """The last line of its log; of tyro's box around a wrong flag the first."""
    path = job.folder / "log.txt"
    text = path.read_text(errors="replace").rstrip() if path.exists() else ""
    lines = text.rpartition("╭")[2].split("\n")[1:2] if text.endswith("╯") else text.split("\n")
    return next((line.strip("│ ") for line in reversed(lines) if line.strip()), "").removeprefix("error: ")


def keep_results(job: Job) -> None:
    """Copies a run's checkpoints to where others take them, and its metrics.csv, with its origin in it."""
    (directory,) = (job.folder / "runs").iterdir()
    config = json.loads((directory / "config.json").read_text())
    for which in ("offline", "final"):
        if (path := directory / f"{which}.pt").exists():
            Path(job.kept).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, f"{job.kept}_{which}.pt")
    git = "git describe --always --dirty --abbrev=12 '--exclude=*'"  # in a shell, as git may be missing
    code = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    origin = dict(variant=job.variant, flags=job.flags, seed=job.seed, code=code or "unknown",
                  device=config["device"], dataset_id=config["dataset_id"],
                  eval_every=config["args"]["eval_every"])  # fmt: skip
    rows = pd.read_csv(directory / "metrics.csv").filter(regex="^(?!return_)").assign(**origin)
    write_csv(job.csv, rows[[*origin, *rows.columns.drop([*origin])]])
    (directory / "last.pt").unlink(missing_ok=True)


def write_csv(path: Path, rows: pd.DataFrame) -> None:
    """The rows with six digits, put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path.with_suffix(".part"), index=False, float_format="%.6g", lineterminator="\n")
    path.with_suffix(".part").replace(path)


def submitter(args: RunArgs) -> Callable[[Job], Future]:
    """Starts jobs on this machine, `workers` at a time, or on a Ray cluster."""
    if args.ray_address:
        try:
            import ray
        except ImportError:
            fail("--ray-address needs Ray, which requirements.txt leaves out: pip install ray")
        ray.init(args.ray_address, log_to_driver=False)
        remote = ray.remote(num_cpus=1, num_gpus=args.gpus_per_run, max_retries=0)(work)
        return lambda job: remote.remote(job).future()
    pool = ThreadPoolExecutor(args.workers)
    return lambda job: pool.submit(work, job)


def run_jobs(args: RunArgs, todo: dict[str, Job]) -> None:
    """Runs the jobs, each behind those whose checkpoints it takes; stops at the first that fails."""
    submit, waiting, running, began = submitter(args), dict(todo), {}, time.monotonic()
    bar = tqdm(total=len(todo), unit="run", dynamic_ncols=True, disable=None)
    try:
        while waiting or running:
            unfinished = [job.kept for job in (*waiting.values(), *running.values())]
            for job in list(waiting.values()):
                ready = not any(path.startswith(f"{kept}_") for path in job.takes for kept in unfinished)
                if ready and len(running) < (math.inf if args.ray_address else args.workers):
                    running[submit(waiting.pop(job.name))] = job
            for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception() or future.result():
                    fail(f"{job.name} failed: {error}; the same command goes on")
                done, minutes = len(todo) - len(waiting) - len(running), (time.monotonic() - began) / 60
                left = minutes / done * (len(todo) - done)
                tqdm.write(f"{done}/{len(todo)}  {job.name}  {minutes:.0f} minutes, about {left:.0f} left")
                bar.update()
            bar.set_postfix_str(" | ".join(filter(None, map(last_words, running.values()))))
    finally:  # nothing is lost: what runs is stopped, and goes on from its last.pt
        bar.close()
        for future in running:
            future.cancel()
        for process in processes:
            process.terminate()


def run_study(args: RunArgs) -> None:
    """Runs what a study still lacks, then its report."""
    args.folder = args.folder.parent if args.folder.suffix == ".toml" else args.folder
    if args.scripts:
        write_grid(args)
    if args.workers < 1:
        fail(f"--workers {args.workers}: at least 1 is needed")
    jobs = plan_jobs(args)
    known = {name: None for job in jobs.values() for name in (job.task, job.variant)}
    if unknown := [name for name in (*args.env_ids, *args.variants) if name not in known]:
        fail(f"{' '.join(unknown)} is not in the plan, which has {', '.join(known)}")
    todo, made = missing(args, jobs), [job for job in jobs.values() if job.csv.exists()]
    print(f"{len(todo)} of the plan's {len(jobs)} runs are to do; logs: {args.folder}/runs/TASK/RUN/log.txt")
    if others := [job for job in made if read_rows(job.csv)["flags"][0] != job.flags]:
        print(f"note: {len(others)} csvs have other flags than the plan's, such as {others[0].csv}: "
              "delete those that are to run again")  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_jobs(args, todo)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on")
    report(ReportArgs(args.folder))


# === The verdict ===========================================================================================


class Recording(NamedTuple):
    """What a verdict needs of the data: every episode's return (E,), and the returns of scores 0 and 100."""

    returns: np.ndarray
    low: float
    high: float

    def score(self, returns):
        """Normalised score 100 (R - R_random) / (R_expert - R_random)."""
        return 100 * (returns - self.low) / (self.high - self.low or 1)


@lru_cache
def load_recording(dataset_id: str) -> Recording:
    """The returns of a Minari dataset."""
    bundled = ROOT / "datasets" / dataset_id / "data"
    try:
        dataset = minari.MinariDataset(bundled) if bundled.exists() else minari.load_dataset(dataset_id)
        rewards = [np.asarray(e.rewards, np.float64) for e in dataset.iterate_episodes()]
    except Exception as error:  # Minari and h5py raise many kinds
        fail(f"the dataset {dataset_id} of these runs can't be read ({error}): a verdict needs its returns")
    known = dataset.storage.metadata
    returns = np.array([r[-1] if known.get("return") == "last reward" else r.sum() for r in rewards])
    low, high = known.get("ref_min_score", returns.min()), known.get("ref_max_score", returns.max())
    return Recording(returns, low, high)


def judge(rows: pd.DataFrame, mean_of_data: float, eval_every: int) -> dict[str, float]:
    """What a run's metrics.csv says of its handover, in score points; means, for single evaluations jump.

    offline  mean of the last 5 offline evaluations; the first online one where there are none
    drop     offline minus the mean over the window, the first 20% of the online updates, at least 2,000
    lowest   lowest mean of 3 evaluations in a row in the window
    final    mean of the last 5 regular evaluations, those at multiples of `eval_every` online steps
    regret   mean of 1 - score / 100, scores clipped to [0, 100], over the regular evaluations
    smooth   drop at most 10% of offline, lowest at least half of it (a collapse that is over before the
             window ends leaves no drop), final not below it, and offline worth keeping: at least 90% of
             the recording's mean score
    """
    offline, online = (rows[rows.phase == phase] for phase in ("offline", "online"))
    level = (offline if len(offline) else online.iloc[:1]).score.iloc[-5:].mean()
    if not (online.updates > 0).any():  # nothing has been learnt online yet
        return dict(offline=level)
    window = online[online.updates.between(1, max(2_000, 0.2 * online.updates.iloc[-1]))].score
    window = window if len(window) else online.score
    regular = online[(online.step % eval_every == 0) & (online.step > 0)].score
    drop, lowest = level - window.mean(), window.rolling(min(3, len(window))).mean().min()
    final = (regular if len(regular) else online.score).iloc[-5:].mean()
    regret = (1 - regular.clip(0, 100) / 100).mean()
    kept = drop <= 0.1 * level and lowest >= 0.5 * level and final >= level
    smooth = bool(kept and level >= 0.9 * mean_of_data)
    return dict(offline=level, drop=drop, lowest=lowest, final=final, regret=regret, smooth=smooth)


DIAGNOSTICS = {"q": 1, "cosine": 2, "entropy": 2, "alpha": 3, "alpha_psi": 3}  # and their digits in a report


def read_rows(path: Path) -> pd.DataFrame:
    """A run's csv, or the metrics.csv of a run directory with its origin from config.json beside it."""
    try:
        rows = pd.read_csv(path, dtype={"flags": str, "variant": str, "code": str})
        if path.name == "metrics.csv":
            config = json.loads((path.parent / "config.json").read_text())
            origin = {name: config["args"][name] for name in ("seed", "eval_every")}
            rows = rows.assign(variant=path.parent.name, flags="", dataset_id=config["dataset_id"], **origin)
        return rows.assign(flags=rows["flags"].fillna(""), seed=int(rows.seed[0]))
    except (OSError, ValueError, KeyError) as error:
        fail(f"{path} can't be read as a run's ({error!r}): delete it, or move it elsewhere")


def read_run(path: Path) -> dict:
    """Scores, verdict and, from its first phase's last evaluation, diagnostics of a run from its csv."""
    rows = read_rows(path)
    first, recording = rows.iloc[0], load_recording(rows.dataset_id[0])
    mean_of_data = recording.score(recording.returns.mean())
    last = rows[rows.phase == rows.phase.min()].iloc[-1]  # "offline" comes before "online"
    run = dict(task=path.parent.name.split("__")[0], variant=first.variant, seed=int(first.seed),
               flags=first["flags"], rows=rows, mean_of_data=mean_of_data)  # fmt: skip
    return run | judge(rows, mean_of_data, first.eval_every) | {name: last.get(name) for name in DIAGNOSTICS}


def read_study(args: ReportArgs) -> pd.DataFrame:
    """A row a run of a study: tasks by name, variants in the plan's order, seeds in order."""
    study = (args.folder / "plan.toml").exists()  # else run directories, or the folder of one run
    own = (args.folder / "metrics.csv").exists()
    paths = args.folder.glob("metrics.csv" if own else "*/*.csv" if study else "*/metrics.csv")
    found = [run for run in map(read_run, sorted(paths)) if run["seed"] in (args.seeds or [run["seed"]])]
    found = [run for run in found if run["variant"] in (args.variants or [run["variant"]])]
    if not found:
        fail(f"{args.folder} holds no such runs: name a study's folder, or runs, and its seeds and variants")
    runs = pd.DataFrame(found)
    runs = runs.reindex(columns=runs.columns.union([*MEASURES, "smooth"], sort=False))
    plan = read_plan(args.folder) if study else {}
    plan = {task.replace("/", "-"): variants for task, variants in plan.items()}
    place = [[*plan.get(task, ()), name].index(name) for task, name in zip(runs.task, runs.variant)]
    runs = runs.assign(place=place).sort_values(["task", "place", "variant", "seed"], ignore_index=True)
    for (task, variant), group in runs.groupby(["task", "variant"], sort=False):
        if group["flags"].nunique() > 1:
            print(f"note: {task}/{variant} has runs of different flags in one row: "
                  + "; ".join(sorted(set(group["flags"]))), file=sys.stderr)  # fmt: skip
    return runs


# === Tables and figures ====================================================================================

# measure: (its name in tables, digits)
MEASURES = {"offline": ("offline score", 1), "drop": ("drop", 1), "lowest": ("lowest", 1),
            "final": ("final score", 1), "regret": ("regret", 2)}  # fmt: skip


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(runs: pd.DataFrame, name: str, digits: int = 1) -> str:
    """Mean and standard error over seeds, for one run its value; "" where a run has none."""
    values = runs[name].astype(float)
    if values.isna().any():
        return ""
    error = f" ± {values.sem():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def smooth_of(runs: pd.DataFrame) -> str:
    return f"{runs.smooth.eq(True).sum()} of {len(runs)}" if runs["drop"].notna().any() else ""


def plain_report(args: ReportArgs, runs: pd.DataFrame) -> str:
    """A table a task, a row a variant; draws FOLDER/TASK.png, or FOLDER/TASK_brief.png."""
    text = ""
    for task, of_task in runs.groupby("task"):
        rows = []
        for variant, group in of_task.groupby("variant", sort=False):
            flags = group["flags"].iloc[0]
            row = {"variant": variant, "flags": flags and f"`{flags}`"}
            row |= {"seeds": " ".join(map(str, group.seed))}
            row |= {title: cell(group, name, digits) for name, (title, digits) in MEASURES.items()}
            row["smooth"] = smooth_of(group)
            if args.brief:
                row = {name: value for name, value in row.items() if name not in ("flags", "lowest")}
            else:
                row |= {name: cell(group, name, digits) for name, digits in DIAGNOSTICS.items()}
            rows.append(row)
        text += f"### {task}\n\n{markdown(rows)}\n"
        draw_scores(args.folder / f"{task}{'_brief' * args.brief}.png", of_task)
    return text


def cross_report(args: ReportArgs, runs: pd.DataFrame) -> str:
    """A table a task: a row an offline algorithm, a column an online one; mean scores, and smooth ones.

    "46 (38) -> 47, 1 of 5": mean over the window, lowest three evaluations in it, final score, smooth
    handovers. The online one is the part of a variant's name behind its +, "own" where there is none. The
    flags of every other column stand below, so that one sees whether it is one recipe.
    """
    text = ""
    for task, of_task in runs.groupby("task"):
        tuners = ["own", *sorted({v.partition("+")[2] for v in of_task.variant} - {""})]
        empty, table = dict.fromkeys(["offline algorithm", "offline score", *tuners], ""), {}
        for variant, group in of_task.groupby("variant", sort=False):
            label, _, tuner = variant.partition("+")
            row = table.setdefault(label, empty | {"offline algorithm": label})
            row["offline score"] = row["offline score"] or cell(group, "offline")
            if group.final.notna().all():
                level = (group.offline - group["drop"]).mean()
                shown = f"{level:.0f} ({group.lowest.mean():.0f}) -> {group.final.mean():.0f}"
                row[tuner or "own"] = f"{shown}, {smooth_of(group)}"
        text += f"### {task}\n\n{markdown([*table.values()])}\n"
        flags = of_task["flags"].str.replace(r" ?--checkpoint \S+", "", regex=True)
        for tuner, recipes in flags.groupby(of_task.variant.str.partition("+")[2]):
            if tuner not in ("", "own"):
                text += f"- {tuner}: {', '.join(f'`{recipe}`' for recipe in recipes.unique())}\n"
        text += "\n"
    return text


def mean(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of all runs of all strata (..., n)."""
    return np.concatenate(strata, axis).mean(axis)


def interquartile_mean(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all runs of all strata (..., n): floor(n / 4) go at each end."""
    return trim_mean(np.concatenate(strata, axis), 0.25, axis)


def reduction(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
    """By which share the mean of ours (..., n) lies below that of theirs (..., m)."""
    return 1 - ours.mean(axis) / theirs.mean(axis)


def estimate(statistic: Callable, strata: list[np.ndarray]) -> tuple[float, float, float]:
    """The statistic and its 95% percentile interval, each stratum resampled alone.

    NaN below five runs in a stratum: of three, the interval would be their range, which covers the mean far
    less often than it says.
    """
    low = high = math.nan
    if min(map(len, strata)) > 4:
        found = bootstrap(strata, statistic, n_resamples=10_000, vectorized=True, method="percentile", rng=0)
        low, high = found.confidence_interval
    return float(statistic(*strata)), float(low), float(high)


def statistics_report(args: ReportArgs, runs: pd.DataFrame) -> str:
    """Tables with bootstrap intervals for every task and over tasks; statistics.md, .csv and curves.png.

    For every task: by how much a variant's regret lies below that of `--against`, if that is above 0.01. Over
    tasks: offline scores and regrets side by side, and interquartile means (Agarwal et al. 2021, arXiv
    2108.13264) of the variants that every task has, with the seeds that they have on every task.
    """
    text, found, across = "", [], {"offline score": {}, "regret": {}}

    def column(group: pd.DataFrame, measure: str) -> list[np.ndarray]:
        """The runs as a stratum for each task; [] where one of them has no such value."""
        values = group[measure].astype(float)
        return [] if values.isna().any() else [v.to_numpy() for _, v in values.groupby(group.task)]

    def interval(task, variant, measure, name, statistic, strata, others=(), digits=None) -> str:
        if not strata:
            return ""
        value, low, high = estimate(statistic, [*strata, *others])
        found.append(dict(task=task, variant=variant, measure=measure, statistic=name, value=value, low=low,
                          high=high, runs=sum(map(len, strata))))  # fmt: skip
        digits = digits or MEASURES[measure][1]
        return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low == low else "")

    against = args.against or next(iter(runs.variant[runs.final.notna()]), "")
    if args.against and args.against not in {*runs.variant[runs.final.notna()]}:
        fail(f"--against takes a variant with final scores, and {against} is none here")
    for task, of_task in runs.groupby("task"):
        rows, theirs = [], column(of_task[of_task.variant == against], "regret")
        for variant, group in of_task.groupby("variant", sort=False):
            row = {"variant": variant, "seeds": " ".join(map(str, group.seed))}
            for m, (title, _) in MEASURES.items():
                row[title] = interval(task, variant, m, "mean", mean, column(group, m))
            ours = column(group, "regret") if theirs and mean(*theirs) > 0.01 and variant != against else []
            shown = interval(task, variant, "regret", f"below {against}", reduction, ours, theirs, 2)
            rows.append(row | {f"share of {against}'s regret saved": shown})
            for title, table in across.items():
                if row[title] and (title == "regret" or "+" not in variant):
                    blank = {title: variant} | dict.fromkeys(runs.task.unique(), "")
                    table.setdefault(variant, blank)[task] = row[title]
        text += f"### {task}\n\n{markdown(rows)}\n"
    if against:
        draw_curves(args.folder / "curves.png", runs)

    count, rows = runs.task.nunique(), []
    for variant, group in runs.groupby("variant", sort=False):
        group = group[group.groupby("seed").task.transform("nunique") == count]
        if group.empty:
            continue
        row = {"variant": variant, "tasks": str(count), "seeds": " ".join(map(str, sorted({*group.seed})))}
        for m in MEASURES:
            strata = column(group, m)
            row[f"{MEASURES[m][0]}, IQM"] = interval("all", variant, m, "IQM", interquartile_mean, strata)
        rows.append(row)
    text += f"### All tasks\n\n{markdown(rows)}\n" if rows else ""
    for title, table in across.items():
        text += f"### {title.capitalize()}\n\n{markdown([*table.values()])}\n" if table else ""
    (args.folder / "statistics.md").write_text(text)
    write_csv(args.folder / "statistics.csv", pd.DataFrame(found))
    return text


def draw_scores(path: Path, runs: pd.DataFrame) -> None:
    """A row a variant: score at the end of offline, lowest after the handover, at the end; seeds and mean."""
    figure = Figure(figsize=(9, 1.5 + 0.28 * runs.variant.nunique()), layout="constrained")
    axes, names = figure.subplots(), [*runs.variant.unique()]
    values = {"end of offline": ("C0", runs.offline), "end of online": ("C2", runs.final.astype(float)),
              "lowest after the handover": ("C3", runs.lowest.astype(float))}  # fmt: skip
    for label, (color, scores) in values.items():
        axes.plot(scores, runs.variant.map(names.index), ".", color=color, alpha=0.4)
        means = scores.groupby(runs.variant, sort=False).mean()
        axes.plot(means, range(len(names)), "o", color=color, label=label)
    axes.axvline(runs.mean_of_data.min(), color="gray", ls=":", label="mean of the recording")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="normalised score", title=path.stem.removesuffix("_brief"))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def draw_curves(path: Path, runs: pd.DataFrame) -> None:
    """Small multiples: a row a task, a column a fine-tuner, a line an offline algorithm, seven at most.

    The fine-tuner is the part of a variant's name behind its +; the handover is at 0. Means and standard
    errors over seeds of the mean of three evaluations in a row.
    """
    names = runs.variant.str.partition("+")
    runs = runs.assign(label=names[0], tuner=names[2].replace(["", "own"], "own online phase"))
    runs = runs[runs.final.notna()]
    runs = runs[runs.label.isin([*dict.fromkeys(runs.label)][: len(COLOURS)])]
    tasks, tuners, labels = ([*dict.fromkeys(runs[name])] for name in ("task", "tuner", "label"))
    figure = Figure(figsize=(1 + 4 * len(tuners), 0.5 + 2.5 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(tuners), squeeze=False, sharex="row", sharey="row")
    for (task, tuner), group in runs.groupby(["task", "tuner"]):
        axes, ends = panels[tasks.index(task), tuners.index(tuner)], []
        for label, mine in group.groupby("label", sort=False):
            start = pd.Series(dtype=float)
            for phase in ("offline", "online"):
                each = [rows[rows.phase == phase].groupby("step").score.last() for rows in mine.rows]
                smoothed = pd.concat(each, axis=1, join="inner").rolling(3, min_periods=1).mean()
                curve, error = smoothed.mean(axis=1), smoothed.sem(axis=1)  # over seeds, by step
                if phase == "online" and len(start):
                    curve.loc[0] = start.iloc[-1]  # one policy: the smoothed score before the handover
                start = curve
                x = curve.index - (curve.index.max() if phase == "offline" else 0)
                colour = COLOURS[labels.index(label)]
                axes.plot(x, curve, lw=1.2, color=colour)
                axes.fill_between(x, curve - error, curve + error, color=colour, alpha=0.12, lw=0)
            ends.append((curve.iloc[-1], label))
        axes.axvline(0, color="black", ls=":", lw=1)
        axes.axhline(group.mean_of_data.iloc[0], color="gray", ls=":", lw=1)
        axes.margins(x=0)
        place = math.inf
        for end, label in sorted(ends, reverse=True):  # labels at the lines' ends, lower where two meet
            place = min(end, place - 7)
            style = dict(color=COLOURS[labels.index(label)], va="center", fontsize=8)
            axes.annotate(label, (x.max(), place), (4, 0), textcoords="offset points", **style)
    for axes in (axes for axes in panels.flat if not axes.lines):
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    for axes, tuner in zip(panels[0], tuners):
        axes.set_title(tuner)
    for axes, task in zip(panels[:, 0], tasks):
        axes.set_ylabel(f"{task}\nscore")
    figure.supxlabel("offline updates | online steps", fontsize="medium")
    figure.savefig(path, dpi=110)


# === Main ==================================================================================================


def report(args: ReportArgs) -> None:
    kind = cross_report if args.cross else statistics_report if args.statistics else plain_report
    print(kind(args, read_study(args)))


def main() -> None:
    kinds = {"run": RunArgs, "report": ReportArgs}
    args = tyro.extras.subcommand_cli_from_dict(kinds, description=__doc__)
    run_study(args) if isinstance(args, RunArgs) else report(args)


if __name__ == "__main__":
    main()
