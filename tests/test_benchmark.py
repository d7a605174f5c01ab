"""The benchmark counts products rightly, times what it says, and its tables follow from its csv."""

import csv
import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, load


@pytest.fixture(scope="module")
def benchmark():
    return load("benchmark", ROOT / "benchmark.py")


def test_products_are_counted_with_their_operations(benchmark):
    a, b, c = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6), torch.randn(3, 4, 5)
    with benchmark.Products() as products:
        (a @ b).sum().backward()  # and one for the gradient of a
        torch.baddbmm(torch.zeros(3, 1, 6), c, b.expand(3, -1, -1))
        (a * a).sum()  # no product
    assert sum(products.counts.values()) == 3
    assert products.flop() == 2 * (4 * 5 * 6) * 2 + 2 * 3 * 4 * 5 * 6


def test_products_of_an_update_are_those_of_the_mathematics(benchmark, smac):
    """Forward, gradient by the input and gradient by the weights of each layer, and nothing twice."""
    obs, act, hidden, batch = 11, 3, 32, 16
    agent = smac.Agent(obs, act, (hidden, hidden), 2, "relu")
    draw = {
        n: torch.rand(batch, w) if w else torch.rand(batch)
        for n, w in smac.transition_widths(obs, act).items()
    }
    with benchmark.Products() as products:
        smac.critic_gradients(agent, draw, 0.99)
        smac.actor_gradients(agent, draw)
    # the critics' heads are dot products, so a critic is two layers and the actor three
    critic, actor = [(obs + act) * hidden, hidden * hidden], [obs * hidden, hidden * hidden, hidden * 2 * act]
    target = sum(actor) + 2 * sum(critic)
    td = 2 * (sum(critic) + sum(critic) + critic[1])  # forward, by the weights, by the hidden layer
    policy = (
        sum(actor) + sum(actor) + sum(actor[1:]) + 2 * (sum(critic) + sum(critic))
    )  # critics: by the action
    assert products.flop() == 2 * batch * (target + td + policy)


def test_muon_costs_fifteen_products_a_matrix(benchmark, smac):
    agent = smac.Agent(3, 1, (16, 16), 2, "silu")
    muon = smac.make_optimizers(agent, "muon", smac.Args())[0]
    for p in agent.parameters():
        p.grad = torch.randn_like(p)
    with benchmark.Products() as products:
        muon.step()
    assert products.flop() == 15 * 3 * 2 * 16**3  # five times three products, two critics and an actor


def test_each_product_is_timed_as_often_as_it_ran(benchmark):
    key = (((64, 64), (64, 1)), ((64, 64), (64, 1)))
    once = [benchmark.product_timer({("mm", key): 1}, "cpu")() for _ in range(9)]
    often = [benchmark.product_timer({("mm", key): 50}, "cpu")() for _ in range(9)]
    assert 20 < np.median(often) / np.median(once) < 125


@pytest.fixture(scope="module")
def measured(benchmark, tmp_path_factory):
    """speed.csv of the quickest measurement there is, and what was printed."""
    out = tmp_path_factory.mktemp("speed")
    flags = "--env-id pendulum-medium-replay --device cpu --repeats 1 --seconds 0.2 --no-growth --together 2"
    words = [
        sys.executable,
        str(ROOT / "benchmark.py"),
        "speed",
        *flags.split(),
        "--sizes",
        "16",
        "16",
        "--out",
        str(out),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_speed_measures_every_phase_and_mode(measured):
    with open(measured[0] / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {"score", "offline", "online"}
    assert len(rows) == 3 * 4  # one thread, two threads, Adam, two at once
    for row in rows:
        assert float(row["updates_per_second"]) > 1
        assert 0 < float(row["share"]) < 1
        assert 0.2 < float(row["first_update"]) < 60 and 100 < float(row["memory_mb"]) < 5_000
        assert row["torch"] == torch.__version__ and row["cpu"]


def test_the_table_follows_from_the_csv(benchmark, measured, tmp_path):
    assert benchmark.tables(measured[0]).strip() in measured[1]
    header = (
        "turn,phase,script,width,batch,threads,optimizer,graphs,together,copies,commit,updates_per_second,"
    )
    header += "product_ms,share,first_update,memory_mb,cpu,gpu,torch,python\n"
    rows = [f"{turn},{phase},s.py,256,64,2,muon,False,1,10,,{rate},{1e3 / rate},0.5,3,100,chip,,2.13,3.11\n"
            for turn, rate in ((1, 20), (2, 90), (3, 40)) for phase in ("offline", "online")]  # fmt: skip
    (tmp_path / "speed.csv").write_text(header + "".join(rows))
    text = benchmark.tables(tmp_path)
    assert (
        text.startswith("chip; torch 2.13, Python 3.11\n") and "updates per second: offline, online" in text
    )
    row = (
        "| 2x256, 64 | muon | 2 threads, 10 times the data | 40 / 40 | 40 / 40 | 50% / 50% | 3.0 s | 100 MB |"
    )
    assert row in text


def test_a_failed_measurement_ends_with_its_last_words(benchmark):
    case = dict(script="no_such_script.py", threads=1)
    with pytest.raises(SystemExit, match="no_such_script"):
        benchmark.finish(benchmark.start(case))


def test_the_readme_shows_the_tables_of_the_committed_measurement(benchmark):
    folder = ROOT / "results" / "speed"
    readme = (ROOT / "README.md").read_text()
    for line in benchmark.tables(folder).splitlines():
        assert line.strip() in readme, line


CLEANRL = """
import os
from dataclasses import dataclass
import torch.nn as nn

@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)
    buffer_size: int = 10
    learning_starts: int = 0

class Buffer:
    def __init__(self, size):
        self.size, self.added = size, 0
    def add(self, *columns):
        self.added += 1
    def sample(self, number):
        os.environ["SAMPLED"] += f"{number} of {self.added} in {self.size};"

if __name__ == "__main__":
    args = None
    actor = nn.Linear(envs.single_observation_space.shape[0], 1)
    rb = Buffer(args.buffer_size)
    for global_step in range(10):
        if global_step < args.learning_starts:
            raise RuntimeError
        if global_step > args.learning_starts:
            rb.sample(global_step + actor.in_features)
            writer.add_scalar("x", 1, global_step)
    envs.close()
"""


def test_the_update_of_a_clone_is_run_as_it_stands(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLED", "")
    (tmp_path / "cleanrl").mkdir()
    (tmp_path / "cleanrl" / "sac_continuous_action.py").write_text(CLEANRL)
    update = benchmark.cleanrl_update(tmp_path, 40, 2)
    update()
    update()
    assert os.environ["SAMPLED"] == "41 of 10000 in 10000;42 of 10000 in 10000;"


CORL = """
import d4rl, gym, pyrallis, wandb
import numpy as np
import torch.nn as nn
from dataclasses import dataclass

@dataclass
class TrainConfig:
    device: str = "cuda"
    qf_lr: float = 1e-3
    policy_lr: float = 1e-3
    cql_alpha: float = 7.0

FullyConnectedQFunction = lambda o, a, orthogonal, layers: nn.Linear(o + a, 1)
TanhGaussianPolicy = lambda o, a, most, orthogonal_init: nn.Linear(o, a)
compute_mean_std = lambda states, eps: (states.mean(0), states.std(0) + eps)
normalize_states = lambda states, mean, std: (states - mean) / std

class ReplayBuffer:
    def __init__(self, state_dim, action_dim, size):
        self.sizes = (state_dim, action_dim, size)
    def load_d4rl_dataset(self, data):
        assert abs(data["observations"].mean()) < 1e-3 and data["mc_returns"].std() > 1
        self.sizes += (len(data["terminals"]),)
    def sample(self, number):
        return (number, *self.sizes)

class CalQL:
    seen = []
    def __init__(self, *networks, bc_steps, cql_alpha, cql_max_target_backup, **rates):
        self.seen.append((len(networks), bc_steps, cql_alpha, cql_max_target_backup))
    def train(self, batch):
        self.seen.append(batch)

@pyrallis.wrap()
def train(config: gym.Env):
    raise RuntimeError("the main function is not run")
"""


def test_corls_class_is_run_as_it_stands(benchmark, tmp_path):
    (tmp_path / "algorithms" / "finetune").mkdir(parents=True)
    (tmp_path / "algorithms" / "finetune" / "cal_ql.py").write_text(CORL)
    shelf = benchmark.load_script(ROOT / "calql_baseline.py")
    update = benchmark.corl_update(tmp_path, shelf)
    update()
    count = shelf.load_dataset(shelf.TASKS["hopper-medium-replay"][0]).ends[-1]
    assert sys.modules["corl_cal_ql"].CalQL.seen == [(7, 0, 7.0, True), (256, 11, 3, count, count)]
    assert not {"d4rl", "wandb", "pyrallis"} & sys.modules.keys()


def test_our_calql_update_beside_it_is_one_of_the_script(benchmark):
    shelf = benchmark.load_script(ROOT / "calql_baseline.py")
    update, seen = benchmark.shelf_calql_update(shelf), []
    shelf.calql_update = lambda agent, multiplier, batch, optimizers, args, actor: seen.append((batch, args))
    update()
    ((batch, args),) = seen
    assert args.cql_actions == 10 and args.cql_max_target and args.calibrate and args.alpha_cql == 5
    assert batch["returns_to_go"].shape == (256,) and batch["returns_to_go"].isfinite().all()


# === Studies ===============================================================================================

SCRIPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np

TASKS = {"task": ("dataset", "Env-v0", {})}
load_dataset = lambda name: SimpleNamespace(returns=lambda: np.array([10.0, 30.0]), score=lambda x: x)
select_episodes = lambda data, best, share, seed: data
summarize = lambda rows, data, every: dict(
    offline=rows[0]["score"], drop=1.5, final=rows[-1]["score"], regret=0.25, smooth=rows[-1]["score"] > 3)

if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    with open(flags["--log"], "a") as file:
        file.write(flags["--seed"] + "\\n")
    tries = open(flags["--log"]).read().split().count(flags["--seed"])
    if flags.get("--fail") == "always" or (flags.get("--fail") == "once" and tries < 2):
        print("it broke here")
        raise SystemExit(1)
    directory = Path("runs/one")
    directory.mkdir(parents=True)
    config = dict(resolved_device="cpu", dataset_checksum="c" * 64, args=dict(eval_every=500))
    (directory / "config.json").write_text(json.dumps(config))
    names = "phase,step,score,cosine_dataset,cosine_policy,q_policy,alpha,alpha_psi"
    rows = [f"offline,8,{flags['--seed']},0.5,0.25,-3.25,0.125,nan", "online,9,4.123456789,0,0,0,0,nan"]
    (directory / "metrics.csv").write_text("\\n".join([names, *rows]) + "\\n")
"""


@pytest.fixture
def study(benchmark, tmp_path):
    """Runs a study with these flags by variant; returns its folder."""

    def start(**variants):
        (tmp_path / "script.py").write_text(SCRIPT)
        lines = [f'{name} = "{flags} --log {tmp_path / name}.log"' for name, flags in variants.items()]
        (tmp_path / "plan.toml").write_text("\n".join(["[task]", *lines]) + "\n")
        script = str(tmp_path / "script.py")
        benchmark.run_study(benchmark.Study(str(tmp_path), seeds=(2, 6), workers=2, script=script))
        return tmp_path

    return start


def test_a_study_leaves_a_csv_with_its_origin_for_every_run(benchmark, study, capsys):
    folder = study(plain="", other="--kappa 0")
    assert {path.name for path in folder.glob("task/*")} == {
        f"{variant}__{seed}.csv" for variant in ("plain", "other") for seed in (2, 6)
    }
    with open(folder / "task" / "other__6.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["offline", "online"]
    for row in rows:
        origin = [row[key] for key in ("variant", "seed", "device", "dataset", "eval_every")]
        assert origin == ["other", "6", "cpu", "c" * 16, "500"]
        assert row["code"] and row["flags"].startswith("--kappa 0 ")
    text = capsys.readouterr().out
    assert "| 2 6 | 4.0 ± 2.0 | 1.5 ± 0.0 | 4.1 ± 0.0 | 0.250 ± 0.000 | 2 of 2 | 0.50 ± 0.00 |" in text
    assert text.index("| plain |") < text.index("| other |")  # in the plan's order
    assert (folder / "task.png").stat().st_size > 10_000


def test_a_study_goes_on_where_it_was_stopped(study):
    folder = study(plain="")
    (folder / "task" / "plain__6.csv").unlink()
    study(plain="")
    assert sorted((folder / "plain.log").read_text().split()) == ["2", "6", "6"]


def test_a_failed_run_is_tried_again_and_then_reported(study, capsys):
    with pytest.raises(SystemExit, match="2 runs failed"):
        study(broken="--fail always", plain="")
    text = capsys.readouterr().out
    assert "it broke here" in text and "broken__2.csv: FAILED" in text
    folder = study(shaky="--fail once")
    assert (
        sorted((folder / "shaky.log").read_text().split()) == ["2", "2", "6", "6"]
        and (folder / "task" / "plain__2.csv").exists()
    )


def test_a_study_without_a_plan_is_one_sentence(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="a study begins with its plan"):
        benchmark.run_study(benchmark.Study(str(tmp_path)))


def test_the_run_s_seed_and_checkpoints(benchmark, smac, tmp_path):
    """{seed} in a variant's flags, and checkpoints kept without optimiser states."""
    short = "--score-steps 1 --offline-steps 2 --online-steps 2 --hidden-sizes 4 --eval-episodes 1"
    then = "td3_finetune.py --checkpoint {checkpoints}/pendulum-medium-replay/short__{seed}_offline.pt"
    lines = ["[pendulum-medium-replay]", f'short = "{short}"', f'then = "{then}"']
    (tmp_path / "plan.toml").write_text("\n".join(lines))
    study = benchmark.Study(str(tmp_path), seeds=(7,), workers=1, checkpoints=str(tmp_path / "kept"))
    job, _ = benchmark.plan(study).values()
    assert job["words"] == short.split() and job["file"].name == "short__7.csv"
    benchmark.run_study(study)
    with open(tmp_path / "pendulum-medium-replay" / "then__7.csv", newline="") as file:
        assert next(csv.DictReader(file))["flags"] == then
    assert (tmp_path / "kept" / job["task"] / "then__7_final.pt").exists()
    for name in ("offline", "final"):
        state = smac.load_checkpoint(tmp_path / "kept" / job["task"] / f"short__7_{name}.pt")
        assert state["seed"] == 7 and state["optimizers"] == [] and "actor.net.weights.0" in state["agent"]


def test_sampled_actions_have_the_distribution_of_the_data(benchmark, smac):
    """Data N(m(w), s^2): the best denoiser is known, and so are mean and spread of what it should draw."""
    net, spread = smac.ScoreNet(1, 1, (4,), 30, 0.05), 0.1

    def best(observations, noised, w, levels):  # E[e | a_t]
        t, mean = net.sigma[levels, None], 0.3 * w[:, None]
        return t * (noised - (1 - t**2).sqrt() * mean) / ((1 - t**2) * spread**2 + t**2)

    net.forward = best
    torch.manual_seed(0)
    for w in (-1.0, 2.0):
        actions = benchmark.sampled_policy(net, torch.zeros(20_000, 1), w)
        assert abs(actions.mean() - 0.3 * w) < 0.01
        assert abs(actions.std() - spread) < 0.02


def test_imitation_leaves_csvs_beside_the_study(benchmark, tmp_path, monkeypatch, capsys):
    script = benchmark.load_script(ROOT / "smac_offline_online.py")
    short = dict(hidden_sizes=(8,), score_hidden_sizes=(8,), score_steps=2, offline_steps=3, eval_episodes=2)
    monkeypatch.setitem(script.TASK_DEFAULTS, "pendulum-medium-replay", short)
    monkeypatch.setattr(benchmark, "load_script", lambda path: script)
    benchmark.imitate(benchmark.Imitate(str(tmp_path), (5,), ("pendulum-medium-replay",), (0.5,), (0.9,)))
    found = {path.name for path in (tmp_path / "pendulum-medium-replay").iterdir()}
    assert found == {"best-0.5-behaviour-cloning__5.csv", "best-0.5-rvs-90__5.csv"}
    (tmp_path / "plan.toml").write_text("")
    text = benchmark.study_report(benchmark.StudyReport(str(tmp_path)))
    assert "| best-0.5-rvs-90 | `--best-episodes 0.5` | 5 | " in text


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/*/README.md"))]
REPORTS = [
    (page, command)
    for page in PAGES
    for command in re.findall(r"^ +python benchmark.py report (.+?)(?: +#.*)?$", page.read_text(), re.M)
]


@pytest.mark.parametrize("page, command", REPORTS)
def test_the_tables_of_a_page_follow_from_the_csvs(benchmark, monkeypatch, tmp_path, page, command):
    """Every `report` command that a page shows makes the tables that stand there."""
    for name in ("picture", "curves"):
        monkeypatch.setattr(benchmark, name, lambda *_: None)
    args = tyro.cli(benchmark.StudyReport, args=command.split())
    for path in (ROOT / args.out).iterdir():  # what it writes is written elsewhere
        if path.is_dir() or path.name == "plan.toml":
            (tmp_path / path.name).symlink_to(path)
    text = benchmark.study_report(dataclasses.replace(args, out=str(tmp_path)))
    assert text.count("|") > 20
    for line in text.splitlines():
        assert line in page.read_text(), line
