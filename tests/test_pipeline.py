"""Whole runs: their files, what is evaluated when, repetition, what goes online, wrong settings."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, Result, command_line, inside, load

SIZES = "--env-id pendulum-medium-replay --device cpu --hidden-sizes 8 8 --batch-size 16 --eval-episodes 2 "
NET = SIZES + "--score-hidden-sizes 8 8 "
WHOLE = NET + "--score-steps 30 --offline-steps 50 --online-steps 130 --eval-every 20 "
WHOLE += "--handover-eval-every 15"
TINY = NET + "--score-steps 5 --offline-steps 5 --online-steps 24 --eval-every 1000 "
ONLINE = SIZES + "--online-steps 24 --eval-every 1000"
TRAINERS = {
    "smac_offline_online": TINY,
    "sac_finetune": ONLINE,
    "td3_finetune": ONLINE,
    "calql_baseline": ONLINE + " --offline-steps 5",
    "aca_baseline": ONLINE + " --offline-steps 5",
    "iql_baseline": ONLINE + " --offline-steps 5",
    "bc_baseline": SIZES + "--offline-steps 5",
}


@pytest.fixture(scope="module")
def trainers(smac):
    """The seven training scripts by name."""
    return {name: load(name, ROOT / f"{name}.py") for name in TRAINERS} | {"smac_offline_online": smac}


@pytest.fixture(scope="module")
def whole(smac, tmp_path_factory) -> Result:
    """A run from the first update to the table, through the command line and in a process of its own."""
    cwd = tmp_path_factory.mktemp("whole")
    command = [sys.executable, smac.__file__, *WHOLE.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Result(0, done.stdout, next(cwd.glob("runs/*")))


@pytest.fixture(scope="module")
def tiny(smac, tmp_path_factory) -> Result:
    return inside(smac, TINY, tmp_path_factory.mktemp("tiny"))


def steps(result: Result, phase: str) -> list[int]:
    return [int(row["step"]) for row in result.rows() if row["phase"] == phase]


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# === A whole run ===========================================================================================


@pytest.mark.parametrize("name", TRAINERS)
def test_every_script_ends_well_and_leaves_its_files(trainers, tmp_path, name):
    result = inside(trainers[name], TRAINERS[name], tmp_path)
    assert result.code == 0, result.output
    args = asdict(trainers[name].Args())
    phases = [phase for phase in ("offline", "online") if f"{phase}_steps" in args]
    checkpoints = {dict(offline="offline.pt", online="final.pt")[phase] for phase in phases}
    names = {path.name for path in result.directory.iterdir()}
    files = {"config.json", "metrics.csv", "learning_curve.png", f"{name}.py"} | checkpoints
    assert {n for n in names if not n.startswith("events.out.tfevents")} == files < names
    assert re.fullmatch(rf"pendulum-medium-replay__{name}__1__\d{{8}}-\d{{6}}-\d{{6}}",
                        result.directory.name)  # fmt: skip
    for checkpoint, phase in zip(sorted(checkpoints, reverse=True), phases):
        state = result.state(checkpoint)
        assert (state["script"], state["phase"], state["parts"].keys()) == (name, phase, {"agent"})
        assert state["rows"][-1]["phase"] == phase and state["args"].keys() == args.keys()
        assert all(tensor.isfinite().all() for tensor in state["parts"]["agent"].values())
    assert {row["phase"] for row in result.rows()} == set(phases)
    assert result.output.splitlines()[-2 - len(phases)].startswith("mean score of the data")
    assert result.output.splitlines()[-1].endswith(result.directory.name)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_seed_is_the_same_run_and_another_is_not(trainers, tmp_path, name):
    results = [inside(trainers[name], f"{TRAINERS[name]} --seed {seed}", tmp_path / str(i))
               for i, seed in enumerate((3, 3, 4))]  # fmt: skip
    one, same, other = ((result.directory / "metrics.csv").read_bytes() for result in results)
    assert one == same and one != other


def test_a_file_of_a_run_says_what_was_run(whole, smac):
    config = json.loads((whole.directory / "config.json").read_text())
    assert (config["dataset_id"], config["torch"]) == ("smac/pendulum/medium-replay-v0", torch.__version__)
    assert list(config["args"]) == list(asdict(smac.Args())) and config["args"]["score_steps"] == 30
    assert (whole.directory / Path(smac.__file__).name).read_bytes() == Path(smac.__file__).read_bytes()
    assert (whole.directory / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_every_evaluation(whole):
    rows = whole.rows()
    assert steps(whole, "offline") == [0, 20, 40, 50]
    assert steps(whole, "online") == [0, 15, 20, 30, 40, 45, 60, 75, 80, 90, 100, 105, 120, 130]
    last = next(row for row in rows[::-1] if row["phase"] == "offline")  # the policy that goes online
    assert all(rows[4][name] == last[name] for name in ("return", "score", "return_0", "return_1"))
    names = list(rows[0])
    assert names[:5] == ["phase", "step", "updates", "score", "return"]
    assert names[-2:] == ["return_0", "return_1"] and {"critic_loss", "cosine", "entropy"} < set(names)
    for row in rows:
        assert float(row["return"]) == np.mean([float(row["return_0"]), float(row["return_1"])])
        assert float(row["score"]) == pytest.approx(100 * (float(row["return"]) + 1230) / 1080)
        late = max(0, int(row["step"]) - 8) if row["phase"] == "online" else int(row["step"])
        assert int(row["updates"]) == late  # a batch has 8 online rows: the first update waits for them
        assert (row["critic_loss"] == "") == (row["step"] == "0")
        assert (row["cosine"] != "") == (row["phase"] == "offline" and int(row["step"]) > 0)


def test_a_run_ends_with_its_table(smac, tmp_path, capsys):
    rows = [
        dict(phase=phase, step=step, score=step**2) for phase in ("offline", "online") for step in range(7)
    ]
    run = SimpleNamespace(data=SimpleNamespace(returns=np.array([10.0, 30.0]), score=lambda x: 2 * x),
                          rows=rows[:-1], directory=tmp_path)  # fmt: skip
    smac.Run.report(run)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines] == [
        "40.0",
        "18.0",
        "11.0",
        str(tmp_path),
    ]  # 4 9 16 25 36; 1 4 9 16 25


def test_tensorboard_has_the_rows_and_every_500th_step(smac, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(smac, "LOG_EVERY", 12)
    monkeypatch.setattr(smac.SummaryWriter, "add_scalar", lambda self, *row: logged.append(row))
    result = inside(smac, TINY.replace("--score-steps 5", "--score-steps 25"), tmp_path)
    at = lambda name: [step for logged_name, _, step in logged if logged_name == name]
    assert at("score/denoising_loss") == at("online/actor_loss") == [12, 24]  # once, though 24 is evaluated
    assert at("offline/score_matching_loss") == [5]
    returns = [value for name, value, _ in logged if name == "online/return"]
    assert returns == [float(row["return"]) for row in result.rows() if row["phase"] == "online"]


# === What goes online ======================================================================================


@pytest.mark.parametrize("flags, waits", [("", 8), ("--offline-fraction 0", 16)])
def test_the_first_online_update_waits_for_its_data(smac, tmp_path, flags, waits):
    """No batch holds more online rows than there are transitions."""
    runs = [inside(smac, TINY + f"{flags} --online-steps {waits + i}", tmp_path / str(i)) for i in range(2)]
    assert not differing(runs[0].agent(), runs[0].agent("offline.pt"))
    changed = differing(runs[1].agent(), runs[1].agent("offline.pt"))
    assert {name.split(".")[0] for name in changed} == {"actor", "critic", "target_critic", "log_alpha"}
    assert [int(run.rows()[-1]["updates"]) for run in runs] == [0, 1]


def test_utd_ratio_counts_critic_updates_and_moves_the_actor_once(smac, tmp_path, monkeypatch):
    seen, update = [], smac.update

    def watched(agent, optimizers, batch, args, critic=None, actor=True):
        seen.append(actor)
        return update(agent, optimizers, batch, args, actor=actor)

    monkeypatch.setattr(smac, "update", watched)
    result = inside(smac, TINY + "--kappa 0 --utd-ratio 3 --online-steps 11", tmp_path)
    assert seen[5:] == [False, False, True] * 3 and result.rows()[-1]["updates"] == "9"


def test_evaluations_are_dense_right_after_the_handover(smac, tmp_path, monkeypatch):
    """For the first 2,000 updates, or 20% of all: 20 a step, from step 8 on, are 2,000 at step 108."""
    monkeypatch.setattr(smac, "update", lambda *args, **kwargs: {})
    words = TINY + "--utd-ratio 20 --online-steps 128 --handover-eval-every 25 --eval-every 60"
    assert steps(inside(smac, words, tmp_path), "online") == [0, 25, 50, 60, 75, 100, 120, 128]


def test_every_online_transition_is_stored_as_the_losses_need_it(smac, tmp_path, monkeypatch):
    """Truncated after 5 steps or terminated after 3, in turn; rewards by the recording's transform."""

    class Ends(gym.Wrapper):
        episode, left = 0, 0

        def reset(self, **kwargs):
            seeds.append(kwargs["seed"])
            self.episode, self.left = self.episode + 1, 5 if self.episode % 2 == 0 else 3
            return self.env.reset(**kwargs)

        def step(self, action):
            observation, _, _, _, info = self.env.step(action)
            self.left -= 1
            over = self.left == 0
            even = self.episode % 2 == 0
            return observation, float(self.left), over and even, over and not even, info

    seeds, buffers, make_env, buffer = [], [], smac.make_env, smac.ReplayBuffer

    def own_env(data, eval_env=False):
        data.metadata |= dict(reward_scale=10.0, reward_bias=-1.0)
        return make_env(data, eval_env) if eval_env else Ends(make_env(data))

    class Watched(buffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    monkeypatch.setattr(smac, "make_env", own_env)
    monkeypatch.setattr(smac, "ReplayBuffer", Watched)
    assert inside(smac, TINY + "--kappa 0 --online-steps 18", tmp_path).code == 0
    rows = buffers[-1].split(buffers[-1].rows)
    assert rows["rewards"].tolist() == [39, 29, 19, 9, -1, 19, 9, -1] * 2 + [39, 29]
    assert torch.nonzero(rows["terminations"]).flatten().tolist() == [7, 15]
    assert int(buffers[-1].episodes) == 4 and len(rows["actions"]) == 18
    start = torch.ones(18, dtype=bool)
    start[[0, 5, 8, 13, 16]] = False  # elsewhere an observation is the one before's successor
    observations, successors = rows["observations"], rows["next_observations"]
    assert torch.equal(observations[1:][start[1:]], successors[:-1][start[1:]])
    assert not (observations[1:] == successors[:-1]).all(1)[~start[1:]].any()
    assert seeds == [smac.stream_seed(1, "online", i) for i in range(5)]


def test_without_online_steps_it_ends_after_offline(smac, tmp_path):
    result = inside(smac, TINY + "--online-steps 0", tmp_path)
    assert result.code == 0 and {row["phase"] for row in result.rows()} == {"offline"}
    assert not (result.directory / "final.pt").exists()


def test_kappa_0_trains_no_score_estimator(smac, tmp_path, tiny):
    result = inside(smac, TINY + "--kappa 0", tmp_path / "one")
    torch.rand(1)  # elsewhere in the random stream
    assert result.rows() == inside(smac, TINY + "--kappa 0", tmp_path / "two").rows()
    names = lambda run: {name.split(".")[0] for name in run.agent()}
    assert names(tiny) - names(result) == {"score_net"} and "held-out" not in result.output
    assert "score_matching_loss" not in result.rows()[0] and "score_matching_loss" in tiny.rows()[0]


@pytest.mark.parametrize("switches", [
    "--offline-optimizer adam",
    "--online-optimizer adam",
    "--critic-activation relu",
    "--num-critics 10 --hidden-sizes 8 8 8",
    "--no-critic-layer-norm",
    "--policy-share 1",
    "--alpha-psi learned",
    "--advantage None",
    "--advantage 1",
    "--online-rate 1",
    "--score-control shuffled",
])  # fmt: skip
def test_switches_lead_to_other_numbers(smac, tmp_path, tiny, switches):
    result = inside(smac, TINY + switches, tmp_path)
    assert result.code == 0 and result.rows()[-1] != tiny.rows()[-1]


def test_the_temperature_is_held_offline_and_free_online(smac, tmp_path, tiny):
    alpha = lambda run, file: run.agent(file)["log_alpha"].exp().item()
    assert alpha(tiny, "offline.pt") == pytest.approx(0.2) != alpha(tiny, "final.pt")
    free = inside(smac, TINY + "--offline-alpha 0", tmp_path)
    assert alpha(free, "offline.pt") == pytest.approx(1, abs=0.01) and alpha(free, "offline.pt") != 1


def test_evaluations_leave_training_as_it_is(smac, tmp_path, tiny):
    often = inside(smac, TINY + "--eval-every 3 --handover-eval-every 5", tmp_path)
    assert len(often.rows()) > len(tiny.rows()) and not differing(often.agent(), tiny.agent())


# === Evaluation ============================================================================================


class Walk(gym.Env):
    """Starts at random, ends after 3 to 9 steps by termination or truncation; reward depends on all."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        self.left = self.np_random.integers(3, 10)
        return np.float32(self.place), {}

    def step(self, action):
        self.place, self.left = 0.5 * self.place + action, self.left - 1
        assert self.left >= 0, "stepped behind the end of the episode"
        over = self.left == 0
        return np.float32(self.place), float(self.place.sum()), over and self.place[0] > 0, over, {}


def test_evaluation_equals_a_plain_loop_and_leaves_the_random_state(smac):
    torch.manual_seed(0)
    actor, before = smac.Actor(2, 1, (8, 8)), torch.get_rng_state()
    returns, plain = smac.evaluate(actor, [Walk() for _ in range(8)], "cpu"), np.zeros(8)
    assert torch.equal(torch.get_rng_state(), before)
    for i in range(8):
        env, over = Walk(), False
        observation, _ = env.reset(seed=1000 + i)
        while not over:
            with torch.no_grad():
                action = torch.tanh(actor.net(torch.as_tensor(observation)[None])[0, 0, :1]).numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            plain[i], over = plain[i] + reward, terminated or truncated
    np.testing.assert_allclose(returns, plain, rtol=1e-5)
    assert len(set(returns)) == 8


# === What can't be run =====================================================================================


@pytest.mark.parametrize("flag, named", [
    ("--env-id hoper-medium-replay", "hopper-medium-replay"),
    ("--resume nowhere", "nowhere/last.pt"),
    pytest.param("--device cuda", "--device cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
])  # fmt: skip
def test_what_cannot_be_run_is_one_sentence(smac, tmp_path, flag, named):
    code = inside(smac, TINY + flag, tmp_path).code
    assert code.startswith("error: ") and "\n" not in code and named in code
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_refused(smac, tmp_path, capsys):
    assert inside(smac, TINY + "--no-such-flag 3", tmp_path).code == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_flag_then_task_then_default(smac):
    with command_line(smac, "--env-id pendulum-medium-replay --batch-size 7"):
        args = smac.parse_args()
    assert (args.batch_size, args.hidden_sizes, args.gamma) == (7, (64, 64), 0.99)


def test_help_explains_every_setting(smac, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with command_line(smac, "--help"), pytest.raises(SystemExit):
        smac.parse_args()
    shown = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    source = Path(smac.__file__).read_text().split("class Args:")[1].split("\n\n")[0]
    fields = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))
    assert list(fields) == list(asdict(smac.Args()))
    for name, text in fields.items():
        assert f"--{name.replace('_', '-')}" in shown and text in shown, name
