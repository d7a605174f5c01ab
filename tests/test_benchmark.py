"""The verdict by hand, old and new csvs, what a plan runs and does not run again, stored numbers, speed."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load

BENCHMARK = [sys.executable, str(ROOT / "benchmark.py")]


@pytest.fixture(scope="module")
def benchmark():
    return load("benchmark", ROOT / "benchmark.py")


# === The verdict ===========================================================================================


def evaluations(*rows, phase="online") -> pd.DataFrame:
    """Rows (step, updates, returns ...) of a metrics.csv; scores are returns."""
    names = ["step", "updates", *(f"return_{i}" for i in range(len(rows[0]) - 2))]
    found = pd.DataFrame(rows, columns=names).assign(phase=phase)
    return found.assign(score=found.filter(like="return_").mean(axis=1))


def test_the_measures_by_hand(benchmark):
    before = evaluations(*((step, step, score) for step, score in enumerate((0, 0, 40, 50, 60, 70, 80))),
                         phase="offline")  # fmt: skip
    after = evaluations((0, 0, 80), (200, 100, 50), (400, 300, 46), (600, 500, 45), (800, 700, 48),
                        (1000, 900, 61), (2000, 2900, 120), (2500, 3400, 7), (3000, 3900, 90))  # fmt: skip
    result = benchmark.judge(pd.concat([before, after]), 20, 1000)
    assert result["offline"] == 60  # the mean of the last five, not the last one
    assert result["drop"] == pytest.approx(60 - (50 + 46 + 45 + 48 + 61) / 5)
    assert result["lowest"] == pytest.approx((46 + 45 + 48) / 3)
    assert result["final"] == pytest.approx((61 + 120 + 90) / 3)  # steps 1000, 2000 and 3000
    assert result["regret"] == pytest.approx((0.39 + 0.0 + 0.1) / 3)  # scores end at 100
    assert result["smooth"] is False
    alone = benchmark.judge(after, 20, 7000)  # from scratch; no evaluation is regular
    assert alone["offline"] == 80 and alone["final"] == (48 + 61 + 120 + 7 + 90) / 5
    assert np.isnan(alone["regret"]) and benchmark.judge(before, 20, 1000) == {"offline": 60}
    assert benchmark.judge(pd.concat([before, after[:1]]), 20, 1000) == {"offline": 60}  # no update yet


@pytest.mark.parametrize("change, smooth", [
    (dict(level=45), True),
    (dict(level=44), False),  # a drop of 6 is over a tenth of 50
    (dict(levels=(24, 24, 24, 90, 99)), False),  # a collapse, over before the window ends
    (dict(levels=(25, 25, 25, 90, 99)), True),
    (dict(final=49), False),  # ends below the offline score
    (dict(mean=55), True),
    (dict(mean=56), False),  # the offline policy is not worth keeping
])  # fmt: skip
def test_what_is_smooth(benchmark, change, smooth):
    case = SimpleNamespace(**dict(level=50, levels=(), final=60, mean=20) | change)
    low = [(100 * i, 100 * i, level) for i, level in enumerate(case.levels or [case.level] * 3, 1)]
    rows = evaluations((0, 0, 50), *low, (10_000, 10_000, case.final))
    assert benchmark.judge(rows, case.mean, 1000)["smooth"] is smooth


@pytest.mark.parametrize("last, drop", [
    (4_000, 30),  # the window is 2,000 updates at least: the evaluation at 1,900 is in it
    (9_000, 30),
    (10_500, 40),  # and a fifth of them: 2,100 holds the one at 2,050, too
])  # fmt: skip
def test_the_window_of_the_drop(benchmark, last, drop):
    rows = evaluations((0, 0, 50), (1, 1_900, 20), (2, 2_050, 0), (3, 3_500, -90), (4, last, 60))
    assert benchmark.judge(rows, 10, 1000)["drop"] == drop


# === Reading ===============================================================================================


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)


@pytest.fixture
def recording(benchmark, monkeypatch):
    """Every dataset has the returns 10 and 30; `asked` tells which were read."""
    asked = []

    def read(dataset_id):
        asked.append(dataset_id)
        return benchmark.Recording(np.array([10.0, 30.0]), 0.0, 100.0)

    monkeypatch.setattr(benchmark, "load_recording", read)
    return asked


def test_csvs_and_run_directories(benchmark, recording, tmp_path):
    rows = pd.concat([evaluations((0, 0, 5, 5), (8, 8, 40, 40), phase="offline").assign(cosine=0.5),
                      evaluations((0, 0, 40, 40), (1000, 900, 50, 50))])  # fmt: skip
    new = dict(variant="b", flags="", seed=4, dataset_id="some/data-v0")
    write_rows(tmp_path / "task" / "b__4.csv", rows.assign(**new, eval_every=1000))
    directory = tmp_path / "runs" / "task__smac_offline_online__5__20260101-000000"
    write_rows(directory / "metrics.csv", rows)
    config = dict(args=dict(seed=5, eval_every=1000), dataset_id="other/data-v0", device="cpu")
    (directory / "config.json").write_text(json.dumps(config))

    b = benchmark.read_run(tmp_path / "task" / "b__4.csv")
    c = benchmark.read_run(directory / "metrics.csv")
    assert recording == ["some/data-v0", "other/data-v0"]
    for run, name in ((b, "b"), (c, directory.name)):
        assert run["variant"] == name and run["offline"] == 22.5 and run["drop"] == -27.5
        assert run["final"] == 50 and run["regret"] == 0.5 and run["cosine"] == 0.5
    assert c["task"] == "task" and c["seed"] == 5
    for folder in (tmp_path / "runs", directory):
        found = benchmark.read_study(benchmark.ReportArgs(folder))
        assert list(found.variant) == [directory.name] and found.smooth[0] == True  # noqa: E712


def test_bundled_data_gives_returns_and_scores(benchmark):
    whole = benchmark.load_recording("smac/pendulum/medium-replay-v0")
    assert len(whole.returns) == 76 and whole.returns.mean() == pytest.approx(-1271.02, abs=0.01)
    assert whole.score(whole.low) == 0 and whole.score(whole.high) == 100
    with pytest.raises(SystemExit, match="no/such-v0 of these runs can't be read"):
        benchmark.load_recording("no/such-v0")


def test_a_return_is_the_last_reward_where_the_data_say_so(benchmark, monkeypatch):
    episodes = [SimpleNamespace(rewards=np.float32([1, 2, 3])), SimpleNamespace(rewards=np.float32([1, 1]))]
    data = SimpleNamespace(iterate_episodes=lambda: episodes,
                           storage=SimpleNamespace(metadata={"return": "last reward"}))  # fmt: skip
    monkeypatch.setattr(benchmark.minari, "load_dataset", lambda name: data)
    assert benchmark.load_recording("my/kitchen-v0").returns.tolist() == [3, 1]


# === Running ===============================================================================================

# A script that leaves what the real ones leave, at once; it notes how it was called in --log.
SCRIPT = """
import json, shutil, sys, time
from pathlib import Path

resumed = "--resume" in sys.argv
words = json.loads(Path(sys.argv[2], "config.json").read_text())["words"] if resumed else sys.argv[1:]
flags = dict(zip(words[::2], words[1::2]))
with open(flags["--log"], "a") as file:
    took = Path(flags.get("--checkpoint", "")).name
    print(flags["--name"], flags["--seed"], took, "resumed" * resumed, file=file)
assert "--checkpoint" not in flags or Path(flags["--checkpoint"]).exists()
directory = Path("runs/one")
directory.mkdir(parents=True, exist_ok=resumed)
config = dict(args=dict(eval_every=1000, seed=1), dataset_id="some/data-v0", device="cpu", words=words)
(directory / "config.json").write_text(json.dumps(config))
if flags.get("--how") in ("break", "wait") and not resumed:
    (directory / "last.pt").touch()
    print("error: it broke here", flush=True)
    time.sleep(60 if flags["--how"] == "wait" else 0)
    raise SystemExit(1)
for name in ("offline", "final"):
    shutil.copy(Path(sys.argv[0]).with_name("fake.pt"), directory / f"{name}.pt")
rows = ["phase,step,updates,score,return_0", "offline,8,8,40,40", "online,0,0,40,40"]
rows.append("online,1000,900,5.123456789,50")
(directory / "metrics.csv").write_text("\\n".join(rows) + "\\n")
"""


@pytest.fixture
def study(benchmark, recording, tmp_path, monkeypatch):
    """Writes a plan of these variants and runs what is missing of it, with a stand-in script."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    torch.save(dict(script="fake"), tmp_path / "fake.pt")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    log, folder = tmp_path / "log", tmp_path / "my study"  # a blank in the path is no end of a word

    def write(**variants):
        line = '"{0}" = "fake.py --log {1} --name {0} {2}"'
        lines = [line.format(name, log, flags) for name, flags in variants.items()]
        folder.mkdir(exist_ok=True)
        (folder / "plan.toml").write_text("\n".join(["[task]", "seeds = [1]", *lines]) + "\n")

    def run(settings=None, **variants):
        write(**variants)
        log.unlink(missing_ok=True)
        benchmark.run_study(benchmark.RunArgs(folder, **dict(workers=2) | (settings or {})))
        return [" ".join(line.split()) for line in log.read_text().splitlines()] if log.exists() else []

    return SimpleNamespace(run=run, write=write, folder=folder, csv=folder / "task" / "a__1.csv", log=log)


TAKE = "--checkpoint {checkpoints}/task/a__{seed}_offline.pt"


def test_a_run_leaves_its_csv_and_its_checkpoints(study, capsys):
    study.run(a="--x {seed}")
    with open(study.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == ["40", "40", "5.12346"]
    origin = dict(variant="a", seed="1", device="cpu", dataset_id="some/data-v0", eval_every="1000")
    assert rows[0].items() >= origin.items() and rows[0]["flags"].endswith("--x {seed}")
    assert "return_0" not in rows[0], "every episode's return is in a study's csvs"
    assert (study.folder / "runs/checkpoints/task/a__1_offline.pt").exists()
    text = capsys.readouterr().out
    assert "1 of the plan's 1 runs are to do" in text
    assert "| 1 | 40.0 | 34.9 | 5.1 | 5.1 | 0.95 | 0 of 1 |" in text


def test_a_task_may_be_a_minari_id(benchmark, study):
    study.write(a="")
    plan = study.folder / "plan.toml"
    plan.write_text(plan.read_text().replace("[task]", '["my/own-v0"]'))
    benchmark.run_study(benchmark.RunArgs(study.folder))
    assert (study.folder / "my-own-v0" / "a__1.csv").exists()
    assert list(benchmark.read_study(benchmark.ReportArgs(study.folder)).task) == ["my-own-v0"]


def test_results_are_kept_where_there_is_no_git(study, monkeypatch):
    monkeypatch.setenv("PATH", "")
    study.run(a="")
    assert pd.read_csv(study.csv).code[0] == "unknown"


def test_one_offline_run_serves_many_and_comes_first(study):
    log = study.run(b=TAKE, c=TAKE, a="", settings=dict(seeds=(2, 3), workers=4))
    assert sorted(log) == ["a 2", "a 3", *(f"{v} {s} a__{s}_offline.pt" for v in "bc" for s in (2, 3))]
    assert all(log.index(f"a {s}") < log.index(f"{v} {s} a__{s}_offline.pt") for v in "bc" for s in (2, 3))


def test_what_is_done_is_not_run_again(study, capsys):
    study.run(a="", b=TAKE)
    assert study.run(a="", b=TAKE) == []
    assert study.run(a="", b=TAKE, c="") == ["c 1"]
    assert study.run(a="", b=TAKE, c="", settings=dict(seeds=(4,), variants=("c",))) == ["c 4"]
    with pytest.raises(SystemExit, match="zz is not in the plan, which has task, a, b"):
        study.run(a="", b=TAKE, settings=dict(variants=("zz",)))
    with pytest.raises(SystemExit, match="--workers 0: at least 1 is needed"):
        study.run(a="", settings=dict(workers=0))
    capsys.readouterr()
    assert study.run(a="--kappa 2", b=TAKE) == []  # nothing is overwritten, but it is said
    assert f"1 csvs have other flags than the plan's, such as {study.csv}" in capsys.readouterr().out
    study.csv.unlink()
    assert study.run(a="--kappa 2", b=TAKE) == ["a 1"]


def test_a_checkpoint_that_is_lacking_or_of_another_script_is_made_again(study, capsys):
    study.run(a="", b=TAKE)
    kept = study.folder / "runs" / "checkpoints" / "task" / "a__1_offline.pt"
    damages = kept.unlink, lambda: kept.write_text("half"), lambda: torch.save(dict(script="other"), kept)
    for damage in damages:
        damage()
        assert study.run(a="", b=TAKE) == []  # nobody needs it
        (study.folder / "task" / "b__1.csv").unlink()
        assert study.run(a="", b=TAKE) == ["a 1", "b 1 a__1_offline.pt"]
    with pytest.raises(SystemExit, match=r"d__1 takes .*z__1_offline.pt: run the study that makes it"):
        study.run(d=TAKE.replace("a__", "z__"))


def test_a_failed_run_is_one_sentence_and_goes_on_where_it_broke(study):
    with pytest.raises(SystemExit, match=r"^error: task/a__1 failed: it broke here \(log: .*\); the same"):
        study.run(a="--how break", b=TAKE)
    assert study.log.read_text().split() == ["a", "1"] and not study.csv.exists()
    assert study.run(a="--how break", b=TAKE) == ["a 1 resumed", "b 1 a__1_offline.pt"]
    study.csv.unlink()
    assert study.run(a="", b=TAKE) == ["a 1"]  # complete once: from the beginning
    with pytest.raises(SystemExit, match="it broke here"):
        study.run(c="--how break")
    assert study.run(c="--how fine") == ["c 1"]  # other flags: from the beginning


def test_a_stopped_study_stops_its_runs_and_goes_on(study, tmp_path):
    study.write(a="--how wait")
    (tmp_path / "benchmark.py").write_text((ROOT / "benchmark.py").read_text())
    words = [sys.executable, str(tmp_path / "benchmark.py"), "run", str(study.folder / "plan.toml")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    waiting = time.monotonic() + 30
    while not [*study.folder.glob("runs/task/a__1/runs/one/last.pt")] and time.monotonic() < waiting:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "error: stopped; the same command goes on" in process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert study.run(a="--how wait") == ["a 1 resumed"]  # and its lock is free: the run has ended


@pytest.mark.parametrize("plan, says", [
    (None, "a study begins with its plan"),
    ("[task", "can't be read"),
    ('a = "x"', "a stands outside a task"),
    ("[task]\na = 3", "task's a is 3: flags are a string"),
    ('[task]\na = "--checkpoint {checkpoints}/task/a__{seed}_final.pt"', "task/a__1 waits for its own"),
])  # fmt: skip
def test_a_wrong_plan_is_one_sentence(benchmark, tmp_path, plan, says):
    if plan:
        (tmp_path / "plan.toml").write_text(plan)
    with pytest.raises(SystemExit, match=says):
        benchmark.run_study(benchmark.RunArgs(tmp_path))


def test_a_grid_is_written_as_a_plan(benchmark, tmp_path):
    args = benchmark.RunArgs(tmp_path, scripts=("aca_baseline.py", "cql=calql_baseline.py --no-calibrate"),
                             finetune=("td3bc", "w=sac_finetune.py --warmup-steps 9"), seeds=(7,),
                             env_ids=("hopper-medium-replay",))  # fmt: skip
    benchmark.write_grid(args)
    start = "--checkpoint {checkpoints}/hopper-medium-replay/"
    assert benchmark.read_plan(tmp_path) == {"hopper-medium-replay": {
        "seeds": [7],
        "aca": "aca_baseline.py",
        "aca+td3bc": f"td3_finetune.py --bc-alpha 2.5 {start}aca__{{seed}}_offline.pt",
        "aca+w": f"sac_finetune.py --warmup-steps 9 {start}aca__{{seed}}_offline.pt",
        "cql": "calql_baseline.py --no-calibrate",
        "cql+td3bc": f"td3_finetune.py --bc-alpha 2.5 {start}cql__{{seed}}_offline.pt",
        "cql+w": f"sac_finetune.py --warmup-steps 9 {start}cql__{{seed}}_offline.pt"}}  # fmt: skip
    benchmark.write_grid(args)  # the same grid again
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "plan.toml").write_text('[names]\nsmall = "--x 8"\n[task]\na = "{small} --y {seed}"\n')
    assert benchmark.read_plan(tmp_path / "a") == {"task": {"a": "--x 8 --y {seed}"}}  # names stand for flags
    wrong = {"is another plan": dict(seeds=(8,)), "'no.py' is no": dict(scripts=("no.py",)),
             "needs --env-ids": dict(env_ids=()), "'td4' is no": dict(finetune=("td4",))}  # fmt: skip
    for says, change in wrong.items():
        with pytest.raises(SystemExit, match=says):
            benchmark.write_grid(benchmark.RunArgs(**vars(args) | change))


# === Reports ===============================================================================================


@pytest.fixture
def results(benchmark, recording, tmp_path):
    """Two tasks, two variants with two seeds each, a third on one task."""
    finals = {("one", "a"): (50, 70), ("one", "b"): (60, 40), ("two", "a"): (90, 95), ("two", "b"): (90, 20),
              ("one", "a+td3"): (1, 2)}  # fmt: skip
    for (task, variant), values in finals.items():
        for seed, final in zip((11, 12), values):
            rows = pd.concat([evaluations((8, 8, 40, 40), phase="offline"),
                              evaluations((0, 0, 40, 40), (1000, 900, final, final))])  # fmt: skip
            origin = dict(variant=variant, flags="--x", seed=seed, eval_every=1000, dataset_id="d")
            write_rows(tmp_path / task / f"{variant}__{seed}.csv", rows.assign(**origin))
    (tmp_path / "plan.toml").write_text('[one]\nb = "--x"\na = "--x"\n')
    return tmp_path


@pytest.mark.parametrize("text", ["", "flags,seed\n"])
def test_a_csv_without_rows_is_one_sentence(benchmark, results, text):
    (results / "one" / "a__12.csv").write_text(text)
    with pytest.raises(SystemExit, match=r"a__12\.csv can't be read as a run's"):
        benchmark.report(benchmark.ReportArgs(results))


def test_a_failed_run_says_why(benchmark, tmp_path):
    job = SimpleNamespace(folder=tmp_path)
    (tmp_path / "log.txt").write_text("a\n╭─ Error ─╮\n│ Wrong: --x │\n│ ... │\n╰─────╯\n")  # tyro's box
    assert benchmark.last_words(job) == "Wrong: --x"


def test_the_plain_and_the_crossed_table(benchmark, results, capsys):
    path = results / "one" / "a__12.csv"
    write_rows(path, pd.read_csv(path).assign(flags="--y"))
    benchmark.report(benchmark.ReportArgs(results, brief=True))
    text, notes = capsys.readouterr()
    assert "one/a has runs of different flags in one row: --x; --y" in notes
    assert "| a | 11 12 | 40.0 ± 0.0 | -20.0 ± 10.0 | 60.0 ± 10.0 | 0.40 ± 0.10 | 2 of 2 |" in text
    assert text.index("| b | 11 12 |") < text.index("| a | 11 12 |")  # in the plan's order
    assert (results / "one_brief.png").stat().st_size > 5_000
    benchmark.report(benchmark.ReportArgs(results, cross=True, seeds=(11,)))
    text = capsys.readouterr().out
    assert "| offline algorithm | offline score | own | td3 |" in text
    assert "| a | 40.0 | 50 (50) -> 50, 1 of 1 | 1 (1) -> 1, 0 of 1 |" in text
    assert "\n- td3: `--x`\n" in text  # the recipe of the column
    with pytest.raises(SystemExit, match="holds no such runs"):
        benchmark.report(benchmark.ReportArgs(results, seeds=(99,)))


def test_the_statistics_by_hand(benchmark, results, capsys):
    benchmark.report(benchmark.ReportArgs(results, statistics=True, against="b"))
    found = pd.read_csv(results / "statistics.csv").set_index(["task", "variant", "measure", "statistic"])
    value, low, high, count = found.loc["one", "a", "final", "mean"]
    assert (value, count) == (60, 2) and np.isnan([low, high]).all()  # two runs have no interval
    assert found.loc[("all", "a", "final", "IQM"), "value"] == 80  # the middle two of 50 70 90 95
    assert found.loc[("one", "a", "regret", "below b"), "value"] == pytest.approx(1 - 0.4 / 0.5)
    assert "all" not in found.loc[(slice(None), "a+td3"), :].reset_index().task.to_numpy()
    assert np.isnan(benchmark.estimate(benchmark.mean, [np.arange(4.0)])[1])
    value, low, high = benchmark.estimate(benchmark.mean, [np.arange(5.0)])
    assert value == 2 and 0 < low < 1.2 and 2.8 < high < 4
    text = (results / "statistics.md").read_text()
    assert "| regret | one | two |\n" in text and "| a | 0.40 | 0.08 |\n| a+td3 | 0.98 |  |" in text
    assert text in capsys.readouterr().out
    assert (results / "curves.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="--against takes a variant with final scores, and c is"):
        benchmark.report(benchmark.ReportArgs(results, statistics=True, against="c"))
    args = benchmark.ReportArgs(results, statistics=True, against="b")
    benchmark.statistics_report(args, benchmark.read_study(args).assign(regret=0.001))
    assert "below b" not in (results / "statistics.csv").read_text()  # a share of nothing


def test_a_curve_goes_on_where_the_offline_one_ends(benchmark, results, monkeypatch):
    figures = []
    monkeypatch.setattr(benchmark.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    benchmark.draw_curves(results / "curves.png", benchmark.read_study(benchmark.ReportArgs(results)))
    offline, online = figures[0].axes[0].lines[:2]  # b on task one: 40 at the handover, then 60 and 40
    assert [*offline.get_xydata()[-1]] == [*online.get_xydata()[0]] == [0, 40]
    assert [*online.get_xydata()[-1]] == [1000, 45]  # seeds: (40 + 60) / 2 and 40
    band = figures[0].axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (40, 50)  # their standard error is 5


def test_curves_have_a_column_for_a_fine_tuner_and_a_label_for_a_line(benchmark, results, monkeypatch):
    figures, runs = [], benchmark.read_study(benchmark.ReportArgs(results))
    monkeypatch.setattr(benchmark.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    benchmark.draw_curves(results / "curves.png", runs.assign(variant=runs.variant.replace("a", "a+own")))
    assert [axes.get_title() for axes in figures[0].axes[:2]] == ["own online phase", "td3"]
    assert sorted(text.get_text() for text in figures[0].axes[0].texts) == ["a", "b"]


@pytest.fixture(scope="module")
def comparison(benchmark, tmp_path_factory):
    """The comparison's runs, from a copy that reports may write to."""
    folder = shutil.copytree(ROOT / "results" / "comparison", tmp_path_factory.mktemp("copy") / "comparison")
    args = benchmark.ReportArgs(folder, against="calql+sac")
    return args, benchmark.read_study(args)


def test_pages_show_what_the_csvs_say(benchmark, comparison):
    """The README's tables, the comparison's tables and its statistics.md."""
    text, page = benchmark.cross_report(*comparison), ROOT / "results" / "comparison" / "README.md"
    assert text.strip() in page.read_text()
    statistics = benchmark.statistics_report(*comparison)
    assert statistics == page.with_name("statistics.md").read_text()
    readme = (ROOT / "README.md").read_text().split("## What was found")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .*", readme, re.MULTILINE)
    assert 14 < len(rows) <= 18 and not [row for row in rows if row not in text + statistics]


@pytest.mark.parametrize("study, page", [("smac", "smac"), ("handover", "smac"), ("tuning", "tuning")])
def test_pages_of_tuning_show_what_the_csvs_say(benchmark, tmp_path, study, page):
    folder = shutil.copytree(ROOT / "results" / study, tmp_path / study)
    args = benchmark.ReportArgs(folder, brief=True)
    text = benchmark.plain_report(args, benchmark.read_study(args))
    shown = (ROOT / "results" / page / "README.md").read_text()
    assert not [row for row in text.splitlines() if row.startswith("|") and row not in shown]


def test_findings_say_what_the_csvs_say(benchmark, comparison):
    """The numbers of the README's findings, each in its sentence."""
    _, runs = comparison
    right_after = lambda rows: rows[(rows.phase == "online") & rows.updates.between(1, 2_000)].score.min()
    runs = runs.assign(lowest=runs.rows.map(right_after))  # single evaluations
    means = runs.groupby(["task", "variant"])[["offline", "drop", "final", "regret"]].mean()
    hopper, walker, pendulum = "hopper-medium", "walker2d-medium", "pendulum-medium-replay"
    replay = "hopper-medium-replay"

    def of(task, measure, *variants, digits=0):
        return [f"{round(means.loc[(task, name), measure], digits) + 0:.{digits}f}" for name in variants]

    def single(variant, task=hopper):
        return runs[(runs.task == task) & (runs.variant == variant)].lowest

    def smooth(name):
        mine = runs[(runs.variant == name) & (runs.task != pendulum)]
        return mine.smooth.eq(True).sum(), len(mine)

    regret = means.regret
    saved = 1 - regret[walker, "smac+sac"] / regret[walker, "calql+sac"]
    deepest = max(single(name, walker).max() for name in ("smac+sac", "calql+sac"))
    assert regret[walker, "calql-sac-target+sac"] > 0.95 * regret[walker, "calql+sac"]
    better = regret[hopper][["calql+td3", "calql-sac-target+sac", "iql", "cql+sac"]]
    assert better.max() < regret[hopper, "smac+sac"] and means["drop"][hopper, "calql+sac"] < 0
    assert regret[replay, "calql-sac-target+sac"] < regret[replay, "smac+sac"]
    claims = [
        "with another transition's score SMAC has {} on `hopper-medium`, with zeros in its place {}.".format(
            *of(hopper, "offline", "shuffled", "zero")),
        "SMAC falls by {} points".format(*of(hopper, "drop", "smac+sac")),
        "and ends at {}.".format(*of(hopper, "final", "smac+sac")),
        "Its lowest evaluation there is {:.0f}, Cal-QL's {:.0f};".format(
            single("smac+sac").min(), single("calql+sac").min()),
        f"On Walker2d both fall below {deepest + 0.5:.0f}.",
        "Of SMAC's {1} handovers to SAC on Hopper and Walker2d {0} are".format(*smooth("smac+sac")),
        "Cal-QL has {}, and SMAC without the term {}.".format(
            smooth("calql+sac")[0], smooth("no-term+sac")[0]),
        f"its regret is {saved:.0%} lower",
        "CQL ({} with SAC,".format(*of(hopper, "regret", "cql+sac", digits=2)),
        "both end at {} to {},".format(*sorted(of(walker, "final", "smac+sac", "calql+sac"))),
        "SMAC scores {} offline, and its regret with SAC is {}.".format(
            *of(pendulum, "offline", "kappa-1"), *of(pendulum, "regret", "kappa-1+sac", digits=2)),
    ]  # fmt: skip
    text = " ".join((ROOT / "README.md").read_text().split())
    assert not [claim for claim in claims if claim not in text]


@pytest.mark.parametrize("plan", sorted(ROOT.glob("results/*/plan.toml")), ids=lambda path: path.parent.name)
def test_plans_name_flags_that_their_scripts_have(benchmark, plan):
    jobs = benchmark.plan_jobs(benchmark.RunArgs(plan.parent)).values()
    for job in jobs:
        arguments = Path(job.command[0]).read_text().split("class Args:")[1].split("\n\n\n")[0]
        for flag in re.findall(r" --(?:no-)?([a-z-]+)", " ".join(job.command)):
            assert re.search(rf"^    {flag.replace('-', '_')}:", arguments, re.M), (job.name, flag)


# === speed.py ==============================================================================================


@pytest.fixture(scope="module")
def speed():
    return load("speed", ROOT / "speed.py")


def test_products_are_counted_with_their_operations(speed):
    a, b, c = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6), torch.randn(3, 4, 5)
    with speed.Products() as products:
        (a @ b).sum().backward()  # and one for the gradient of a
        torch.baddbmm(torch.zeros(3, 1, 6), c, b.expand(3, -1, -1))
        (a * a).sum()  # no product
    assert sum(products.counts.values()) == 3
    assert products.flop() == 2 * (4 * 5 * 6) * 2 + 2 * 3 * 4 * 5 * 6
    once, often = ({key: n * count for key, count in products.counts.items()} for n in (1, 50))
    once, often = ([speed.product_timer(counts, "cpu")() for _ in range(9)] for counts in (once, often))
    assert 20 < np.median(often) / np.median(once) < 125


def test_the_speed_table_follows_from_its_csv(speed, tmp_path):
    header = "turn,phase,script,width,batch,threads,optimizer,graphs,together,copies,commit,"
    header += "updates_per_second,product_ms,share,first_update,memory_mb,cpu,gpu,torch,python\n"
    rows = [f"{turn},{phase},s.py,256,64,2,muon,False,1,10,,{rate},{1e3 / rate},0.5,3,100,chip,,2.13,3.11\n"
            for turn, rate in ((1, 20), (2, 90), (3, 40)) for phase in ("offline", "online")]  # fmt: skip
    (tmp_path / "speed.csv").write_text(header + "".join(rows))
    text = speed.tables(tmp_path)
    assert text.startswith("chip; torch 2.13, Python 3.11\n\n| networks, batch |")
    row = "| 2x256, 64 | muon | 2 threads, 10 times the data | 40 / 40 | 40 / 40 | 50% / 50% | 3.0 s |"
    assert row in text and "updates per second: offline, online" in text


def test_every_phase_is_measured(speed, tmp_path):
    args = speed.Args(tmp_path, env_id="pendulum-medium-replay", repeats=1, seconds=0.2, widths=(16,))
    speed.cases, cases = lambda args: cases(args)[:1], speed.cases
    speed.measure(args)
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert [*rows.phase] == ["score", "offline", "online"] and (rows.updates_per_second > 1).all()
    assert rows.share.between(0, 1).all() and (rows.memory_mb > 100).all()
