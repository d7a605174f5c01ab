"""The comparison: its plan, what is run again and what isn't, cut and failed runs, engines, statistics."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load

BENCHMARK = [sys.executable, str(ROOT / "benchmark.py")]

# A script that leaves what the shelf's scripts leave, at once; it notes how it was called in --log.
SCRIPT = '''
"""A docstring."""
import json, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np

TASKS = {"task": ("dataset", "Env-v0", {}), "other": ("dataset", "Env-v0", {})}
load_dataset = lambda name: SimpleNamespace(returns=lambda: np.array([10.0, 30.0]), score=lambda x: x)
select_episodes = lambda data, best, share, seed: SimpleNamespace(
    returns=lambda: best * share * data.returns(), score=lambda x: x)
Args = SimpleNamespace(online_steps=9)
write_atomically = lambda path, write: write(path)
load_checkpoint, sealed = (lambda path: {"text": path.read_text()}), dict
summarize = lambda rows, data, every: dict(
    offline=rows[0]["score"], drop=1.5, final=rows[-1]["score"], regret=0.25, smooth=rows[-1]["score"] > 15)

def main():
    words = sys.argv[1:] if "--resume" not in sys.argv else json.loads(Path("words.json").read_text())
    Path("words.json").write_text(json.dumps(words))
    flags = dict(zip(words[::2], words[1::2]))
    with open(flags["--log"], "a") as file:
        resumed = " resumed" * ("--resume" in sys.argv)
        took = Path(flags["--checkpoint"]).name if "--checkpoint" in flags else ""
        print(f"{Path.cwd().name.rsplit('__', 1)[0]} {took}{resumed}", file=file)
    if "--checkpoint" in flags:
        assert Path(flags["--checkpoint"]).exists()  # what it takes is there
    directory = Path("runs/one")
    directory.mkdir(parents=True, exist_ok="--resume" in sys.argv)
    how = flags.get("--how", "")
    if how == "cut" and "--resume" not in sys.argv:
        (directory / "last.pt").write_text("half")
        raise SystemExit(1)
    if how == "fail":
        raise SystemExit("error: it broke here")
    if how == "long":
        def stop(*_):
            (directory / "last.pt").write_text("half")
            raise SystemExit(143)
        signal.signal(signal.SIGTERM, stop)
        print("waiting", flush=True)
        time.sleep(60)
    settings = dict(eval_every=500, dataset_id=None, best_episodes=float(flags.get("--best", 1)))
    config = dict(resolved_device="cpu", dataset_checksum="c" * 64, dataset_id="dataset", args=settings)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "offline.pt").write_text("networks")
    rows = ["phase,step,updates,seconds,score", f"offline,0,0,1.0,0", f"offline,8,8,3.0,{flags['--seed']}"]
    rows += [] if flags.get("--online-steps") == "0" else ["online,0,0,3.0,7.5", "online,9,6,5.0,4.5"]
    (directory / "metrics.csv").write_text("\\n".join(rows) + "\\n")

if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def benchmark():
    return load("benchmark", ROOT / "benchmark.py")


@pytest.fixture
def fake(benchmark, tmp_path):
    """Makes Study arguments with a stand-in script, logging in `log`."""
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(SCRIPT)
    log.touch()

    def study(finetune=("x",), how="", out="grid", **settings):
        labelled = lambda name, flags="": f"{name}={script} --log {log} {flags}".strip()
        tuners = tuple(labelled(name) if len(name) == 1 else name for name in finetune)
        how = dict(scripts=(labelled("a"), labelled("b", how)), finetune=tuners, env_ids=("task",),
                   seeds=(1,), script=str(script), workers=2) | settings  # fmt: skip
        return benchmark.Study(out=str(tmp_path / out), **how)

    return SimpleNamespace(study=study, script=script, log=log, out=tmp_path / "grid")


def todo(benchmark, study) -> list[str]:
    """Names of the runs that are to do, without task and seed."""
    study.variants = benchmark.write_grid(study)
    return [job["variant"] for job in benchmark.missing(study, benchmark.plan(study))]


# === The plan ==============================================================================================


def test_a_grid_is_written_as_a_plan(benchmark, tmp_path):
    scripts = ("smac_offline_online.py --kappa 3 --online-steps 70", "cql=calql_baseline.py --no-calibrate")
    tuners = ("td3bc", "w=sac_finetune.py --warmup-steps 9")
    study = benchmark.Study(
        str(tmp_path), scripts=scripts, finetune=tuners, env_ids=("pendulum-medium-replay",)
    )
    names = benchmark.write_grid(study)
    start = "--checkpoint {checkpoints}/pendulum-medium-replay/"
    expected = {
        "smac": "smac_offline_online.py --kappa 3 --online-steps 0",
        "smac+td3bc": f"td3_finetune.py --bc-alpha 2.5 {start}smac__{{seed}}_offline.pt",
        "smac+w": f"sac_finetune.py --warmup-steps 9 {start}smac__{{seed}}_offline.pt",
        "cql": "calql_baseline.py --no-calibrate --online-steps 0",
        "cql+td3bc": f"td3_finetune.py --bc-alpha 2.5 {start}cql__{{seed}}_offline.pt",
        "cql+w": f"sac_finetune.py --warmup-steps 9 {start}cql__{{seed}}_offline.pt",
    }
    assert names == tuple(expected)
    assert tomllib.loads((tmp_path / "plan.toml").read_text()) == {"pendulum-medium-replay": expected}
    # what never goes online has no such flag
    study.scripts, study.env_ids = ("bc_baseline.py",), ("walker2d-medium-replay",)
    assert benchmark.write_grid(study)[0] == "bc"
    rows = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert rows.pop("walker2d-medium-replay")["bc"] == "bc_baseline.py" and rows
    (tmp_path / "plan.toml").unlink()
    study.scripts, study.env_ids = scripts, ("pendulum-medium-replay",)
    benchmark.write_grid(study)
    # a second grid stands beside the first; own: the script's online phase in the same run
    study.finetune, study.scripts, study.env_ids = ("own",), scripts[:1], ("hopper-medium-replay",)
    assert benchmark.write_grid(study) == ("smac",)
    written = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert written == {"pendulum-medium-replay": expected, "hopper-medium-replay": {"smac": scripts[0]}}


@pytest.mark.parametrize("wrong, says", [
    (dict(scripts=("no_such_script.py",)), "no_such_script.py' is no `script flags`"),
    (dict(scripts=("",)), "'' is no `script flags`"),
    (dict(finetune=("td4",)), "'td4' is no `script flags` or `label=script flags`; a fine-tuner is one of"),
    (dict(scripts=("aca_baseline.py", "aca_baseline.py --seed 3")), r"labels have to differ \(aca, aca\)"),
    (dict(env_ids=("no-task",)), "tasks among hopper-medium-replay, walker2d-medium-replay, pendulum-m"),
    (dict(env_ids=()), "--scripts needs --env-ids"),
])  # fmt: skip
def test_a_wrong_grid_is_one_sentence_and_writes_nothing(benchmark, tmp_path, wrong, says):
    right = dict(scripts=("aca_baseline.py",), env_ids=("hopper-medium-replay",))
    with pytest.raises(SystemExit, match=says):
        benchmark.run_study(benchmark.Study(str(tmp_path / "out"), **right | wrong))
    assert not (tmp_path / "out").exists()


def test_a_plan_written_by_hand_is_left_alone(benchmark, fake, tmp_path):
    study = fake.study()
    fake.out.mkdir()
    (fake.out / "plan.toml").write_text("# mine\n[task]\n")
    with pytest.raises(SystemExit, match="written by hand: name another --out"):
        benchmark.run_study(study)
    assert (fake.out / "plan.toml").read_text() == "# mine\n[task]\n"


@pytest.mark.parametrize("folders", [{}, dict(folder="one", out="two")])
def test_a_study_has_one_folder(benchmark, folders):
    with pytest.raises(SystemExit, match="name one folder: run"):
        benchmark.run_study(benchmark.Study(**folders))


def test_a_run_that_waits_for_itself_is_one_sentence(benchmark, fake):
    fake.out.mkdir()
    take = "--checkpoint {checkpoints}/task/%s__{seed}_offline.pt"
    (fake.out / "plan.toml").write_text(f'[task]\na = "{take % "b"}"\nb = "{take % "a"}"\n')
    with pytest.raises(SystemExit, match="a__1 waits for its own checkpoint"):
        benchmark.plan(fake.study(scripts=()))


# === What is run ===========================================================================================


def test_each_offline_phase_runs_once_and_before_its_fine_tuners(benchmark, fake, capsys):
    study = fake.study(finetune=("x", "y"), workers=4, seeds=(1, 2))
    benchmark.run_study(study)
    log = [line.strip() for line in fake.log.read_text().splitlines()]
    assert sorted(log) == sorted(
        f"{label}{end}" for label in "ab" for s in (1, 2)
        for end in (f"__{s}", f"+x__{s} {label}__{s}_offline.pt", f"+y__{s} {label}__{s}_offline.pt")
    )  # fmt: skip
    for label, seed in (("a", 1), ("b", 2)):
        begun = log.index(f"{label}__{seed}")
        assert all(begun < log.index(f"{label}+{t}__{seed} {label}__{seed}_offline.pt") for t in "xy")
    text = capsys.readouterr().out
    assert "12 of the plan's 12 runs are to do\n" in text and "12/12 task/" in text
    with open(fake.out / "task" / "a__2.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["flags"].endswith("--online-steps 0") and len(row["checksum"]) == 16
    assert (fake.out / "runs" / "checkpoints" / "task" / "a__2_offline.pt").exists()
    # and a second time there is nothing to do
    benchmark.run_study(fake.study(finetune=("x", "y"), workers=4, seeds=(1, 2)))
    assert "0 of the plan's 12 runs are to do\n" in capsys.readouterr().out
    assert len(fake.log.read_text().splitlines()) == 12


def test_what_changed_is_run_again_and_nothing_else(benchmark, fake):
    benchmark.run_study(fake.study())
    assert todo(benchmark, fake.study()) == []
    assert todo(benchmark, fake.study(how="--kappa 2")) == ["b", "b+x"]  # flags, and what goes on from there
    assert todo(benchmark, fake.study(finetune=("own", "x"))) == ["a", "b"]  # the offline phases stay
    assert todo(benchmark, fake.study(finetune=("x", "y"))) == ["a+y", "b+y"]
    assert todo(benchmark, fake.study(seeds=(1, 2))) == ["a", "a+x", "b", "b+x"]
    text = fake.script.read_text()
    for other, again in (
        (text.replace('"""A docstring."""', '"""Another one."""\n# with a comment'), []),
        (text.replace("drop=1.5", "drop=2.5"), ["a", "a+x", "b", "b+x"]),
    ):
        fake.script.write_text(other)
        benchmark.code_of.cache_clear()
        assert todo(benchmark, fake.study()) == again
        assert todo(benchmark, fake.study(keep=True)) == []
        assert todo(benchmark, fake.study(keep=True, how="--kappa 2")) == ["b"]  # its csv has other flags


def test_a_csv_without_checksum_counts_at_its_flags(benchmark, fake):
    benchmark.run_study(fake.study())
    path = fake.out / "task" / "b__1.csv"
    with open(path, newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "checksum"} for row in csv.DictReader(file)]
    benchmark.write_csv(path, rows)
    assert todo(benchmark, fake.study()) == []
    benchmark.write_csv(path, [row | {"flags": "others"} for row in rows])
    assert todo(benchmark, fake.study()) == ["b"]


def test_a_checkpoint_that_is_lacking_is_made_again(benchmark, fake):
    study = fake.study()
    benchmark.run_study(study)
    (fake.out / "runs" / "checkpoints" / "task" / "a__1_offline.pt").unlink()
    assert todo(benchmark, study) == []  # nobody needs it
    (fake.out / "task" / "a+x__1.csv").unlink()
    assert todo(benchmark, study) == ["a", "a+x"]
    study.variants = ("a+x",)  # what a chosen variant needs is run though it wasn't chosen
    assert [j["variant"] for j in benchmark.missing(study, benchmark.plan(study))] == ["a", "a+x"]


def test_another_study_s_checkpoint_is_not_taken(benchmark, fake):
    """Two studies with a common --checkpoints: what has this name is not always this run's."""
    common = str(fake.out.parent / "common")
    study = lambda **other: fake.study(checkpoints=common, **other)
    benchmark.run_study(study())
    (fake.out / "task" / "b+x__1.csv").unlink()
    assert todo(benchmark, study()) == ["b+x"]
    benchmark.run_study(study(out="another", how="--kappa 2", finetune=()))  # its b is another b
    assert todo(benchmark, study()) == ["b", "b+x"]
    assert todo(benchmark, study(keep=True)) == ["b+x"]
    (fake.out.parent / "common" / "task" / "b__1_offline.pt").write_bytes(b"half")  # cut while it was written
    assert todo(benchmark, study(keep=True)) == ["b", "b+x"]


def test_a_checkpoint_is_waited_for_however_the_flag_is_written(benchmark, fake):
    study = fake.study()
    todo(benchmark, study)
    text = (fake.out / "plan.toml").read_text()
    (fake.out / "plan.toml").write_text(text.replace("--checkpoint ", "--checkpoint="))
    assert benchmark.plan(study)["task/b+x__1"]["needs"] == {"task/b__1": "offline"}


def test_a_script_that_changes_while_a_study_runs_is_not_begun(benchmark, fake):
    study = fake.study(finetune=())
    todo(benchmark, study)
    job = benchmark.plan(study)["task/a__1"]
    fake.script.write_text(fake.script.read_text() + "# a comment\n")
    assert benchmark.work(job)[0] == ""
    job["file"].unlink()
    fake.script.write_text(fake.script.read_text() + "x = 1\n")
    assert "fake.py was changed since the study began" in benchmark.work(job)[0]
    assert not job["file"].exists()


@pytest.mark.parametrize("wrong, says", [
    (dict(variants=("a", "no-such")), "--variants no-such: .*plan.toml has a, b$"),
    (dict(env_ids=("no-task",), scripts=()), "--env-ids no-task: .*plan.toml has task$"),
    (dict(workers=0), "--workers has to be at least 1"),
])  # fmt: skip
def test_a_name_that_the_plan_lacks_is_one_sentence(benchmark, fake, wrong, says):
    benchmark.write_grid(fake.study(finetune=()))
    with pytest.raises(SystemExit, match=says):
        benchmark.run_study(fake.study(finetune=(), **wrong))
    assert fake.log.read_text() == ""


def test_a_task_s_own_seeds_run_where_the_command_names_none(benchmark, fake):
    benchmark.write_grid(fake.study(finetune=(), env_ids=("task", "other")))
    path = fake.out / "plan.toml"
    path.write_text(path.read_text().replace('["task"]', '["task"]\nseeds = [12, 11]'))
    for _ in range(2):  # a grid that grows keeps them
        runs = lambda **how: [*benchmark.plan(fake.study(**how))]
        names = [f"task/{variant}__{seed}" for seed in (11, 12) for variant in "ab"]
        others = [f"other/{variant}__{seed}" for seed in (1, 2, 3) for variant in "ab"]
        assert runs(seeds=()) == others + names
        assert runs(seeds=(5,)) == [f"{task}/{v}__5" for task in ("task", "other") for v in "ab"]
        benchmark.write_grid(fake.study(finetune=()))
    benchmark.run_study(fake.study(scripts=(), env_ids=("task",), seeds=()))
    assert {x.name for x in fake.out.glob("*/*.csv")} == {f"{v}__{s}.csv" for v in "ab" for s in (11, 12)}


@pytest.mark.parametrize("lines, says", [
    ('["task"]\nseeds = 11', "task's seeds has to be a list of numbers, not 11$"),
    ('["task"]\nseeds = []', r"task's seeds has to be a list of numbers, not \[\]$"),
    ('["task"]\nseeds = ["11"]', r"task's seeds has to be a list of numbers, not \['11'\]$"),
    ('["task"]\na = 3', "task's a has to be a string of flags, not 3$"),
    ('a = "--kappa 0"', "plan.toml a stands outside a task"),
])  # fmt: skip
def test_a_plan_of_another_form_is_one_sentence(benchmark, fake, lines, says):
    fake.out.mkdir()
    (fake.out / "plan.toml").write_text(lines)
    with pytest.raises(SystemExit, match=says):
        benchmark.run_study(fake.study(scripts=()))


def test_the_shipped_comparison_has_every_run_of_its_plan(benchmark):
    jobs = benchmark.plan(benchmark.Study(str(ROOT / "results" / "comparison"))).values()
    assert {len([j for j in jobs if j["task"].startswith(robot)]) for robot in ("hopper", "pend")} == {
        102,
        170,
    }
    assert [job["name"] for job in jobs if not benchmark.complete(job, keep=True)] == []


def test_a_run_is_judged_by_the_data_it_saw(benchmark, fake):
    """Its csv says which, not its flags: a fine-tuner's come from the checkpoint."""
    benchmark.run_study(fake.study(finetune=(), how="--best 0.5"))
    found = benchmark.summaries(fake.out, str(fake.script))
    assert {v: runs[0]["mean"] for (_, v), runs in found.items()} == {"a": 20.0, "b": 10.0}
    path = fake.out / "task" / "b__1.csv"  # a csv that doesn't say it: flags, of the default data
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["dataset_id"] == "dataset" and "data_fraction" not in rows[0]  # what the script has
    for row in rows:
        del row["best_episodes"], row["dataset_id"]
        row["flags"] = "--best-episodes 0.25"
    benchmark.write_csv(path, rows)
    assert benchmark.summaries(fake.out, str(fake.script))["task", "b"][0]["mean"] == 5.0


def test_variants_of_a_grid_can_be_chosen(benchmark, fake):
    benchmark.run_study(fake.study(variants=("b",)))
    assert fake.log.read_text() == "b__1 \n"


# === Cut and failed runs ===================================================================================


def test_a_cut_run_goes_on_from_its_directory(benchmark, fake, capsys):
    benchmark.run_study(fake.study(finetune=(), how="--how cut"))
    assert sorted(fake.log.read_text().splitlines()) == ["a__1 ", "b__1 ", "b__1  resumed"]
    assert "task/b__1.csv: failed, is tried once more" in capsys.readouterr().out


def test_a_run_that_did_not_come_to_a_checkpoint_begins_anew(benchmark, fake):
    study = fake.study(finetune=())
    todo(benchmark, study)
    job = benchmark.plan(study)["task/a__1"]
    (job["folder"] / "runs" / "other").mkdir(parents=True)
    (job["folder"] / "runs" / "other" / ".7.last.pt").write_text("half-written")
    assert benchmark.work(job)[0] == ""
    assert fake.log.read_text() == "a__1 \n" and job["file"].exists()


def test_a_kept_checkpoint_is_replaced_whole(benchmark, smac, fake, monkeypatch):
    study = fake.study(finetune=())
    todo(benchmark, study)
    job = benchmark.plan(study)["task/a__1"]
    assert benchmark.work(job)[0] == ""
    (kept,) = job["kept"].parent.iterdir()
    before, load_script = kept.read_bytes(), benchmark.load_script

    def with_the_shelf_s_writing(path):
        module = load_script(path)
        module.write_atomically = smac.write_atomically
        return module

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(benchmark, "load_script", with_the_shelf_s_writing)
    monkeypatch.setattr(benchmark.torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        benchmark.keep_results(job)
    assert [*job["kept"].parent.iterdir()] == [kept] and kept.read_bytes() == before


def test_failed_runs_are_not_hidden(fake, tmp_path):
    """The command itself: last words, what could not begin, exit status; the other runs are done."""
    words = ["--scripts", f"a={fake.script} --log {fake.log}", f"b={fake.script} --log {fake.log} --how fail"]
    words += ["--finetune", f"x={fake.script} --log {fake.log}", "--env-ids", "task", "--seeds", "1"]
    words += ["--workers", "2", "--script", str(fake.script), "--out", str(fake.out)]
    done = subprocess.run([*BENCHMARK, "run", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILED: task/b__1\n" in done.stdout and done.stdout.count("error: it broke here") == 2  # tries
    assert "FAILED: task/b+x__1\nnot begun: it takes the checkpoint of task/b__1, which failed" in done.stdout
    assert done.stderr == "error: 2 runs failed; see above, then run the same command again\n"
    assert (fake.out / "task" / "a+x__1.csv").exists() and "| a+x | 1 | " in done.stdout
    assert sorted(fake.log.read_text().split()) == ["a+x__1", "a__1", "a__1_offline.pt", "b__1", "b__1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_write_their_checkpoints(fake, tmp_path, number):
    words = ["--scripts", f"a={fake.script} --log {fake.log} --how long", "--env-ids", "task", "--seeds", "1"]
    words += ["--script", str(fake.script), "--out", str(fake.out)]
    how = dict(stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background job
    process = subprocess.Popen([*BENCHMARK, "run", *words], **how)
    until = time.time() + 60
    while not any("waiting" in path.read_text() for path in fake.out.glob("runs/task/*/log.txt")):
        assert time.time() < until
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert output.endswith("stopping: the runs write their checkpoints\nstopped; the same command goes on\n")
    assert len([*fake.out.glob("runs/task/*/runs/one/last.pt")]) == 1


def test_a_run_in_use_is_not_begun_twice(benchmark, fake):
    study = fake.study(finetune=(), how="--how long")
    todo(benchmark, study)
    job = benchmark.plan(study)["task/b__1"]
    stop = benchmark.threading.Event()
    with benchmark.ThreadPoolExecutor(1) as pool:
        first = pool.submit(benchmark.work, job, stop)
        while "waiting" not in (job["folder"] / "log.txt").read_text() if job["folder"].exists() else True:
            time.sleep(0.05)
        assert "in use by another process" in benchmark.work(job)[0]
        stop.set()
        assert first.result()[0] == "waiting\n"  # the last words of a run that was stopped


def test_progress_tells_phase_score_and_time_left(benchmark, tmp_path):
    job = dict(name="task/a__1", folder=tmp_path)
    assert benchmark.progress(job, 0.0) == "starting"
    (tmp_path / "runs" / "one").mkdir(parents=True)
    settings = dict(score_steps=50, offline_steps=1_000, online_steps=2_000)
    (tmp_path / "runs" / "one" / "config.json").write_text(json.dumps({"args": settings}))
    log = "process 7\nscore    step        50   held-out loss by level 0.5 (knowing nothing: 1)\n"
    (tmp_path / "log.txt").write_text(log)
    assert benchmark.progress(job, 100.0) == "score 50/50"
    line = "offline  step       {}   return    -950.0   score  20.5\n"
    (tmp_path / "log.txt").write_text(log := log + line.format(0))
    assert benchmark.progress(job, 110.0) == "offline 0/1,000  score 20.5"
    (tmp_path / "log.txt").write_text(log + line.format("400") + "a last line\n")
    # 400 steps in 60 seconds: 600 and 2,000 more take 390
    assert benchmark.progress(job, 170.0) == "offline 400/1,000  score 20.5  6.5 minutes left"
    assert benchmark.progress(job, 200.0) == "offline 400/1,000  score 20.5  6.0 minutes left"
    # it failed and began anew, below what is in its log
    (tmp_path / "log.txt").write_text(log := log + line.format("400") + "it broke\n" + line.format(0))
    assert benchmark.progress(job, 210.0) == "offline 0/1,000  score 20.5"
    (tmp_path / "log.txt").write_text(log + line.format("100"))
    assert benchmark.progress(job, 220.0) == "offline 100/1,000  score 20.5  4.8 minutes left"


def test_the_view_is_redrawn_on_a_terminal_and_printed_once_a_minute_elsewhere(benchmark, tmp_path, capsys):
    (tmp_path / "log.txt").touch()
    jobs = [dict(name="task/a__1", folder=tmp_path), dict(name="not begun", folder=tmp_path / "none")]
    view = benchmark.View()
    view.draw(jobs)
    assert capsys.readouterr().out == ""  # not a minute yet
    view.printed -= 61
    view.draw(jobs)
    view.draw(jobs)
    assert capsys.readouterr().out == "  task/a__1  starting\n"
    view.terminal = True
    view.draw(jobs)
    view.draw(jobs)
    view.say("done")
    line = "  task/a__1  starting\n"
    assert capsys.readouterr().out == f"{line}\x1b[1F\x1b[J{line}\x1b[1F\x1b[Jdone\n"


# === Engines ===============================================================================================

TINY = "--hidden-sizes 8 8 --batch-size 16 --eval-episodes 1 --score-hidden-sizes 8 --score-steps 4 "
TINY += "--offline-steps 6 --eval-every 3"


def test_two_runs_on_this_machine(benchmark, tmp_path, capsys):
    study = benchmark.Study(out=str(tmp_path), scripts=(f"smac_offline_online.py {TINY}",), seeds=(5,),
                            finetune=("td3=td3_finetune.py --online-steps 24",), workers=1,
                            env_ids=("pendulum-medium-replay",))  # fmt: skip
    benchmark.run_study(study)
    with open(tmp_path / "pendulum-medium-replay" / "smac+td3__5.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["phase"] == "offline"] == ["0", "3", "6"]
    assert rows[-1]["phase"] == "online" and rows[-1]["step"] == "24"
    text = capsys.readouterr().out
    assert "2/2 pendulum-medium-replay/smac+td3__5.csv: done" in text and "wall time" in text
    assert "### All tasks" in text and (tmp_path / "statistics.md").read_text() in text
    with open(tmp_path / "statistics.csv", newline="") as file:
        found = {(r["variant"], r["measure"]): r for r in csv.DictReader(file) if r["task"] != "all"}
    assert float(found["smac+td3", "final"]["value"]) == pytest.approx(float(rows[-1]["score"]), rel=1e-4)
    assert found["smac+td3", "final"]["low"] == "nan"  # one seed has no interval
    assert (tmp_path / "pendulum-medium-replay_curves.png").stat().st_size > 10_000


def test_without_ray_one_sentence_says_how_to_get_it(benchmark, fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install ray"):
        benchmark.run_study(fake.study(engine="ray"))


@pytest.mark.parametrize("address", [None, "auto"])
def test_what_ray_is_asked_for(benchmark, fake, monkeypatch, address):
    """With a stand-in that runs a job when it is submitted: what is asked of Ray, and that it is let go."""
    calls = []

    def remote(**asked):
        def run(job):
            result = benchmark.Future()
            result.set_result(benchmark.work(job))
            return SimpleNamespace(future=lambda: result)

        calls.append(("remote", asked))
        return lambda function: SimpleNamespace(remote=run)

    note = lambda name: lambda *of, **how: calls.append((name, how))
    stand_in = SimpleNamespace(remote=remote, **{n: note(n) for n in ("init", "cancel", "wait", "shutdown")})
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    settings = dict(engine="ray", ray_address=address, cpus_per_run=3, gpus_per_run=0.25)
    benchmark.run_study(fake.study(**settings))
    (_, where), (_, asked) = calls[:2]
    assert where.get("address") == address and where.get("num_cpus") == (
        None if address else 6
    )  # two workers
    assert asked == dict(num_cpus=3, num_gpus=0.25, max_retries=0)
    assert [name for name, _ in calls[2:]] == ["cancel"] * 4 + ["wait", "shutdown"]
    assert len(fake.log.read_text().splitlines()) == 4 and (fake.out / "task" / "b+x__1.csv").exists()


@pytest.mark.slow
def test_ray_runs_the_same_plan(fake, tmp_path, monkeypatch):
    """On one machine: cut runs go on, failures are told, Ctrl-C stops what is running."""
    pytest.importorskip("ray")
    monkeypatch.setenv(
        "RAY_raylet_start_wait_time_s", "240"
    )  # a loaded machine takes longer than Ray expects
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "240000")
    call = f"{fake.script} --log {fake.log}"
    words = ["--finetune", f"x={call}", "--env-ids", "task", "--seeds", "1", "2"]
    words += ["--script", str(fake.script), "--workers", "2", "--engine", "ray"]
    rows = ["--scripts", f"a={call}", f"b={call} --how cut", f"c={call} --how fail", "--out", "all"]
    done = subprocess.run([*BENCHMARK, "run", *words, *rows], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "4 runs failed" in done.stderr, done.stderr
    assert "error: it broke here" in done.stdout and "FAILED: task/c+x__2\nnot begun" in done.stdout
    took = lambda label, seed: f"{label}+x__{seed} {label}__{seed}_offline.pt"
    expected = [line for s in (1, 2) for line in (f"a__{s}", took("a", s), f"b__{s}", f"b__{s}  resumed",
                                                  took("b", s), f"c__{s}", f"c__{s}")]  # fmt: skip
    assert sorted(line.strip() for line in fake.log.read_text().splitlines()) == sorted(expected)
    command = [*BENCHMARK, "run", *words, "--scripts", f"a={call} --how long", "--out", "long"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    while not any("waiting" in path.read_text() for path in tmp_path.glob("long/runs/task/*/log.txt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "stopped; the same command goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 130 and [*tmp_path.glob("long/runs/task/*/runs/one/last.pt")]


@pytest.mark.slow
def test_a_stopped_grid_ends_with_the_same_numbers(tmp_path):
    """SIGTERM in the middle of the offline phase; the same command goes on, to the last bit."""
    words = ["--scripts", f"smac_offline_online.py {TINY} --offline-steps 1500 --eval-every 100"]
    words += ["--finetune", "sac=sac_finetune.py --online-steps 60", "--env-ids", "pendulum-medium-replay"]
    words += ["--seeds", "5", "--workers", "1"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = lambda out: [*BENCHMARK, "run", *words, "--out", str(tmp_path / out)]
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, env=environment)
    until = time.time() + 120
    while not any("step       300" in p.read_text() for p in tmp_path.glob("cut/runs/*/*/log.txt")):
        assert time.time() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130 and [*tmp_path.glob("cut/runs/*/*/runs/*/last.pt")]
    subprocess.run(command("cut"), check=True, capture_output=True, env=environment)
    for name in ("smac__5", "smac+sac__5"):
        found = []
        for out in ("whole", "cut"):
            with open(tmp_path / out / "pendulum-medium-replay" / f"{name}.csv", newline="") as file:
                found.append([{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)])
        assert found[0] == found[1]


# === Statistics ============================================================================================


def test_the_interquartile_mean_is_that_of_the_middle_half(benchmark):
    one = lambda *values: [np.array(values, float)]
    assert benchmark.interquartile_mean(one(100, 1, 2, 3, 4, 5, 6, -50)) == (2 + 3 + 4 + 5) / 4
    assert benchmark.interquartile_mean(one(9, 1, 2, 3, 4)) == 3  # five values lose one at each end
    assert benchmark.interquartile_mean(one(1, 2, 9)) == 4  # three lose none
    assert benchmark.interquartile_mean(one(1, 2) + one(30, 40)) == 16  # over the tasks' runs together
    assert benchmark.interquartile_mean([np.array([[1, 2], [3, 4]])]).tolist() == [1.5, 3.5]


def test_the_probability_of_improvement_counts_pairs(benchmark):
    x, y = [np.array([1.0, 3.0])], [np.array([2.0, 3.0])]
    assert benchmark.improvement(x, y) == 1.5 / 4  # 3 > 2, and 3 = 3 counts one half
    assert benchmark.improvement(y, x) == 2.5 / 4
    # tasks count alike, whatever their number of seeds
    assert benchmark.improvement([*x, np.array([5.0])], [*y, np.ones(4)]) == (1.5 / 4 + 1) / 2


def test_intervals_are_percentiles_of_the_bootstrap(benchmark):
    # two runs: the mean of a sample is 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4
    assert benchmark.estimate(benchmark.mean, [np.array([0.0, 1.0])]) == (0.5, 0.0, 1.0)
    # many runs: mean +- 1.96 standard errors
    x = np.random.default_rng(1).standard_normal(400) + 3
    value, low, high = benchmark.estimate(benchmark.mean, [x])
    assert value == x.mean()
    assert high - value == pytest.approx(1.96 * x.std() / 20, rel=0.08)
    assert value - low == pytest.approx(1.96 * x.std() / 20, rel=0.08)
    assert (value, low, high) == benchmark.estimate(benchmark.mean, [x])  # the same every time
    # drawn within each task: what differs between tasks alone does not widen it
    assert benchmark.estimate(benchmark.mean, [np.zeros(3), np.full(3, 9.0)]) == (4.5, 4.5, 4.5)
    # of two groups each is drawn by itself: P is 0, 1/2 or 1 with 1/16 for each end
    both = [np.array([0.0, 1.0])]
    assert benchmark.estimate(benchmark.improvement, both, both) == (0.5, 0.0, 1.0)
    value, low, high = benchmark.estimate(benchmark.mean, [np.array([2.0])])
    assert value == 2 and math.isnan(low) and math.isnan(high)


def test_rates_are_updates_over_seconds_of_a_phase(benchmark):
    row = lambda phase, updates, seconds: dict(phase=phase, updates=updates, seconds=seconds)
    rows = [row("offline", 0.0, 10.0), row("offline", 300.0, 16.0), row("online", 0.0, 16.5)]
    assert benchmark.rate(rows, "offline") == 50
    assert math.isnan(benchmark.rate(rows, "online")) and math.isnan(benchmark.rate(rows, "none"))


@pytest.fixture
def results(benchmark, fake):
    """csvs as runs leave them: final scores by (task, variant), one a seed."""

    def write(**finals):
        order = {"task": {}, "other": {}}
        for name, scores in finals.items():
            task, variant = name.split("_")
            order[task][variant.replace("0", "+")] = scores
        fake.out.mkdir()
        lines = [f"[{task}]\n" + "".join(f'"{v}" = ""\n' for v in order[task]) for task in order]
        (fake.out / "plan.toml").write_text("".join(lines))
        for task, variants in order.items():
            for variant, scores in variants.items():
                for seed, score in enumerate(scores, 11):
                    row = dict(variant=variant, flags="", seed=seed, eval_every=500, phase="offline", step=0)
                    rows = [row | dict(updates=0, seconds=1.0, score=3.0)]
                    rows += [row | dict(step=80, updates=80, seconds=3.0, score=20.0 + seed)]
                    if score is not None:
                        rows += [row | dict(phase="online", updates=0, seconds=3.5, score=20.0 + seed)]
                        rows += [row | dict(phase="online", step=9, updates=9, seconds=4.5, score=score)]
                    benchmark.write_csv(fake.out / task / f"{variant}__{seed}.csv", rows)
        return benchmark.StudyReport(str(fake.out), script=str(fake.script), statistics=True)

    return write


def test_the_statistics_of_a_study_by_hand(benchmark, results, fake, capsys):
    args = results(task_a=[None, None], task_a0x=[10, 20], task_b0x=[30, 40], task_c=[1, 2],
                   other_a0x=[50, 60], other_b0x=[55, 65], other_c=[None, None])  # fmt: skip
    text = benchmark.study_report(args)
    assert capsys.readouterr().out == text + "\n" and (fake.out / "statistics.md").read_text() == text
    assert text.index("### other") < text.index("### task") < text.index("### All tasks")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[-1].startswith("| c | 2 | ") and rows[-1].endswith(
        " |  |  |  |  |"
    )  # final on one task alone
    rows = rows[:-1]
    # (the stand-in's offline score of a run is that of its first row, and of an offline phase its last)
    assert "| a | 11 12 | 31.5 [31.0, 32.0] |  |  |  | 40 [40, 40] |  |" in rows
    assert (
        "| a+x | 11 12 | 3.0 [3.0, 3.0] | 1.5 [1.5, 1.5] | 15.0 [10.0, 20.0] | 0.250 [0.250, 0.250] " in text
    )
    assert rows[-1].startswith("| b+x | 2 | 11 12 | 3.0 [3.0, 3.0] | 1.5 [1.5, 1.5] | 47.5 [")
    assert rows[-2].startswith("| a+x | 2 | 11 12 | ") and rows[-2].endswith(" |  |")  # c and a lack a task
    # b+x above a+x: 4 of 4 pairs on task; 55 > 50, 65 > 50, 65 > 60 on other: (1 + 3/4) / 2
    assert "| 0.88 [0." in rows[-1] and "P(final score above a+x's)" in text
    with open(fake.out / "statistics.csv", newline="") as file:
        found = {(r["task"], r["variant"], r["measure"], r["statistic"]): r for r in csv.DictReader(file)}
    assert found["all", "b+x", "final", "IQM"]["value"] == "47.5"  # of 30, 40, 55, 65 the middle two
    assert found["all", "b+x", "final", "P(above a+x)"]["value"] == "0.875"
    row = found["task", "b+x", "final", "mean"]
    assert [row[k] for k in ("value", "low", "high", "runs")] == ["35", "30", "40", "2"]
    assert (fake.out / "task_curves.png").stat().st_size > 10_000
    args.against = "b+x"
    text = benchmark.study_report(args)
    assert text.splitlines()[-3].endswith(" |  |") and "P(final score above b+x's)" in text
    args.against = "c"  # final scores on one task alone
    with pytest.raises(SystemExit, match=r"--against takes a variant with final scores on every task: a\+x"):
        benchmark.study_report(args)


def test_a_task_with_more_seeds_does_not_weigh_more(benchmark, results):
    args = results(task_a=[0, 0], other_a=[100, 100, 100, 100])
    row = benchmark.study_report(args).splitlines()[-2]
    assert row.startswith("| a | 2 | 11 12 | ") and "| 50.0 [50.0, 50.0] |" in row  # not 100 or 66.7


def test_a_report_without_flag_is_as_it_was(benchmark, results, fake):
    args = results(task_a0x=[10, 20])
    args.statistics = False
    assert "| a+x |  | 11 12 | 3.0 ± 0.0 | 1.5 ± 0.0 | 15.0 ± 5.0 | " in benchmark.study_report(args)
    assert not (fake.out / "statistics.md").exists()


def test_what_a_run_does_not_have_is_an_empty_cell(benchmark, results, fake):
    """Behaviour cloning has no critic, a run from a final.pt no offline phase; a variant may be called 3."""
    args = results(task_3=[10], task_a0x=[10, 20])
    args.statistics = False
    for path in fake.out.glob("task/a+x__*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        benchmark.write_csv(path, [row | {"alpha": "0.5"} for row in rows if row["phase"] == "online"])
    path = fake.out / "task" / "3__11.csv"
    with open(path, newline="") as file:
        benchmark.write_csv(path, [row | {"alpha": "", "q_policy": ""} for row in csv.DictReader(file)])
    lines = benchmark.study_report(args).splitlines()
    assert lines[4] == "| 3 |  | 11 | 3.0 | 1.5 | 10.0 | 0.250 | 0 of 1 |  |  |  |  |  |"
    assert lines[5].startswith("| a+x |  | 11 12 | 31.5 ± 0.5 | ") and " | 0.500 ± 0.000 |" in lines[5]


def test_a_row_of_different_runs_is_announced(benchmark, results, fake, capsys):
    args = results(task_a=[10, 20], task_b=[10, 20])
    benchmark.study_report(args)
    assert capsys.readouterr().err == ""
    path = fake.out / "task" / "a__12.csv"
    path.write_text(path.read_text().replace("a,,12", "a,--kappa 2,12"))
    benchmark.study_report(args)
    assert capsys.readouterr().err == "note: task/a has runs of different flags in one row: ; --kappa 2\n"


def test_the_cross_table_by_hand(benchmark, results, capsys):
    args = results(task_a=[None, None], task_a0x=[10, 20], task_b0w=[7], task_b=[5, 9])
    args.statistics, args.cross = False, True
    text = benchmark.study_report(args)
    assert capsys.readouterr().out == text + "\n"
    assert text.splitlines() == [
        "### task",
        "",
        "| offline algorithm | offline score | own | w | x |",
        "| --- | --- | --- | --- | --- |",
        "| a | 31.5 ± 0.5 |  |  | 1.5 ± 0.0; 15.0 ± 5.0; 1 of 2 |",
        "| b | 3.0 | 1.5 ± 0.0; 7.0 ± 2.0; 0 of 2 | 1.5; 7.0; 0 of 1 |  |",
        "",
    ]


def test_curves_have_a_panel_for_each_fine_tuner(benchmark, results, fake, monkeypatch):
    args = results(task_a=[None, None], task_a0x=[10, 20], task_b=[5, 6], task_b0x=[30, 40])
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    benchmark.study_report(args)
    (figure,) = drawn
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert sorted(panels) == ["own online phase", "x"]
    assert len(panels["x"].get_lines()) == 5  # two phases of two algorithms, and the handover
    assert len(panels["own online phase"].get_lines()) == 3  # a, from which a+x goes on, is no curve there
    offline, online = panels["x"].get_lines()[:2]
    assert offline.get_xdata().tolist() == [-80, 0] and offline.get_ydata().tolist() == [3, 31.5]
    assert online.get_xdata().tolist() == [0, 9] and online.get_ydata().tolist() == [31.5, 15]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "handover"]


def test_no_two_of_thirty_curves_look_alike(benchmark, results, monkeypatch):
    names = [first + second for first in "abc" for second in "abcdefghij"]
    args = results(**{f"task_{name}": [1, 2] for name in names})
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    benchmark.study_report(args)
    *handles, _ = drawn[0].legends[0].get_lines()
    looks = [(line.get_color(), line.get_linestyle()) for line in handles]
    assert len(set(looks)) == len(looks) == 30
    offline = drawn[0].axes[0].get_lines()[:-1:2]  # each is followed by its online phase
    assert [(line.get_color(), line.get_linestyle()) for line in offline] == looks
