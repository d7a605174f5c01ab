"""Behaviour cloning: the likelihood, fresh critics in the checkpoint, fine-tuners that take it, whole runs.

BC_SCRIPT names another copy, to see the tests fail on a line broken on purpose.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, returns_of
from test_iql import inside  # noqa: F401
from test_pipeline import assert_equal, is_sentence, own_cache  # noqa: F401
from torch.distributions import Normal

TINY = "--env-id pendulum-medium-replay --hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 "
TINY += "--offline-steps 40 --eval-every 20 "
WHOLE = TINY + "--snapshot-every 30"


@pytest.fixture(scope="module")
def bc():
    """bc_baseline.py"""
    return load("bc_baseline", Path(os.environ.get("BC_SCRIPT", ROOT / "bc_baseline.py")))


@pytest.fixture(scope="module")
def whole(bc, inside):  # noqa: F811
    """A run that nothing stopped."""
    result = inside(bc, WHOLE)
    assert result.code == 0, result.code
    return result


# === The loss ==============================================================================================


def test_likelihood_loss_by_hand(bc):
    log_prob = torch.tensor([-1.0, 0.5, -2.5], requires_grad=True)
    loss = bc.likelihood_loss(log_prob)
    assert loss.item() == 1.0
    loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_gradient_equals_the_density_of_torch_distributions(bc):
    torch.manual_seed(0)
    actor = bc.Actor(3, 2, (8, 8)).double()
    s, a = torch.randn(9, 3).double(), torch.tanh(torch.randn(9, 2)).double()
    metrics = bc.cloning_gradients(actor, dict(observations=s, actions=a))
    mean, log_std = actor(s)
    log_prob = (Normal(mean, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum(-1)
    torch.testing.assert_close(metrics["actor_loss"], -log_prob.mean().detach())
    expected = torch.autograd.grad(-log_prob.mean(), list(actor.parameters()))
    for p, grad in zip(actor.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_actions_at_the_bounds_have_a_finite_gradient(bc):
    actor = bc.Actor(3, 1, (8, 8))
    for bound in (-1.0, 1.0):
        batch = dict(observations=torch.randn(9, 3), actions=torch.full((9, 1), bound))
        metrics = bc.cloning_gradients(actor, batch)
        assert metrics["actor_loss"].isfinite() and all(p.grad.isfinite().all() for p in actor.parameters())


# === Whole runs ============================================================================================


def test_a_run_from_the_first_update_to_the_table(whole):
    assert "updates per second, offline" in whole.output
    assert [(row["phase"], row["step"]) for row in whole.rows()] == [("offline", str(i)) for i in (0, 20, 40)]
    files = {path.name for path in whole.directory.iterdir()}
    assert files >= {"config.json", "offline.pt", "learning_curve.png", "bc_baseline.py"}
    assert "final.pt" not in files
    likelihoods = [float(row["log_prob_recorded"]) for row in whole.rows()]
    assert likelihoods[0] < likelihoods[1] < likelihoods[2]
    state = whole.state("offline.pt")
    assert state["algorithm"] == "BC" and state["optimizers"]
    assert list(state["optimizers"][0]["state"]) == list(range(6)), "the actor's parameters alone are stepped"


def test_the_critics_are_as_they_were_drawn(bc, whole):
    """So is the temperature; the actor isn't."""
    state = whole.state("offline.pt")
    torch.manual_seed(bc.stream_seed(1, "offline"))
    drawn = bc.make_agent(state)
    bc.set_statistics(drawn, bc.load_dataset("smac/pendulum/medium-replay-v0"))
    for name, tensor in drawn.state_dict().items():
        trained = name.startswith(("actor.net.weights", "actor.net.biases"))
        assert torch.equal(tensor, state["agent"][name]) != trained, name


def test_diagnostics_are_of_recorded_actions_and_leave_training_alone(bc, inside, whole):  # noqa: F811
    seldom = inside(bc, TINY + "--eval-every 40")
    assert_equal(whole.state("offline.pt")["agent"], seldom.state("offline.pt")["agent"])
    agent, _ = bc.restore(whole.state("offline.pt"))
    columns = bc.load_dataset("smac/pendulum/medium-replay-v0").columns
    data = SimpleNamespace(columns=columns, ends=np.array([15_200]))
    found = bc.diagnose(SimpleNamespace(data=data, device="cpu"), {"agent": agent}, [])
    assert found["log_prob_recorded"] == float(whole.rows()[-1]["log_prob_recorded"])
    s, a = (torch.as_tensor(columns[name]) for name in ("observations", "actions"))
    with torch.no_grad():
        everywhere = bc.action_log_prob(agent.actor, s, a)[0].mean().item()
    assert found["log_prob_recorded"] == pytest.approx(everywhere, abs=0.1)


def test_ten_percent_cloning_sees_the_best_episodes_alone(bc, inside, monkeypatch):  # noqa: F811
    update, seen = bc.cloning_gradients, []
    monkeypatch.setattr(bc, "cloning_gradients", lambda *x: seen.append(x[1]) or update(*x))
    run = inside(bc, TINY + "--best-episodes 0.1")
    assert run.code == 0 and run.state("offline.pt")["algorithm"] == "10% BC"
    data = bc.load_dataset("smac/pendulum/medium-replay-v0")
    best = np.argsort(-data.returns())[:8]  # of 76 episodes of 200 transitions
    rows = np.concatenate([np.arange(200 * i, 200 * i + 200) for i in best])
    allowed = {row.tobytes() for row in data.columns["observations"][rows]}
    met = {row.numpy().tobytes() for batch in seen for row in batch["observations"]}
    assert met <= allowed and len(met) > 500


def test_a_resumed_run_ends_as_if_never_stopped(bc, inside, whole, monkeypatch, tmp_path):  # noqa: F811
    update, calls = bc.cloning_gradients, []

    def stop(*arguments):
        if calls.append(1) or len(calls) == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bc, "cloning_gradients", stop)
        run = inside(bc, WHOLE, tmp_path)
    assert run.code == 130 and run.state("last.pt")["step"] == 25
    run = inside(bc, f"--resume {run.directory}", tmp_path)
    assert run.code == 0 and run.rows() == whole.rows()
    for name in ("agent", "optimizers", "random_states", "extras"):
        assert_equal(run.state("offline.pt")[name], whole.state("offline.pt")[name], name)


@pytest.fixture(scope="module")
def best_tenth(bc, inside):  # noqa: F811
    """offline.pt of 10% BC, with three critics for the fine-tuner."""
    run = inside(bc, TINY + "--best-episodes 0.1 --num-critics 3 --critic-activation relu")
    return run.directory / "offline.pt"


@pytest.mark.parametrize("script", ["sac_finetune.py", "td3_finetune.py", "aca_baseline.py"])
def test_fine_tuners_take_its_checkpoint(inside, best_tenth, script):  # noqa: F811
    words = f"--checkpoint {best_tenth} --online-steps 60 --warmup-steps 20 --eval-every 60 "
    words += "--alignment-steps 5" if script == "aca_baseline.py" else ""
    taken = inside(load(script[:-3], ROOT / script), words)
    assert taken.code == 0, taken.code
    rows, state = taken.rows(), taken.state("final.pt")
    assert [row["phase"] for row in rows] == ["offline"] * 3 + ["online"] * 2
    assert rows[2]["return_mean"] == rows[3]["return_mean"], "it starts from the cloned policy"
    assert state["num_critics"] == 3 and state["best_episodes"] == 0.1 and state["algorithm"] == "10% BC"
    before = torch.load(best_tenth)["agent"]
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], state["agent"][name])}
    assert {"actor", "critic", "target_critic"} <= moved


def test_a_policy_can_be_filmed(bc, inside, whole, monkeypatch):  # noqa: F811
    filmed = []
    monkeypatch.setattr(bc, "film", lambda actor, *_, **__: filmed.append(actor) or "")
    assert inside(bc, f"--checkpoint {whole.directory / 'offline.pt'} --video-only").code == 0
    returns = returns_of(bc, filmed[0], [bc.make_env("Pendulum-v1") for _ in range(2)], "cpu")
    np.testing.assert_allclose(returns, [float(whole.rows()[-1][f"return_{i}"]) for i in range(2)], rtol=1e-6)


def test_bad_settings_are_one_sentence(bc, inside, whole):  # noqa: F811
    for words, said in (
        ("--best-episodes 1.5", "--best-episodes"),
        ("--batch-size 0", "--batch-size"),
        ("--checkpoint absent.pt", "absent.pt"),
        (f"--checkpoint {whole.directory / 'offline.pt'}", "sac_finetune.py"),
    ):
        refused = inside(bc, TINY + words)
        assert is_sentence(refused.code) and said in refused.code and refused.directory is None


# === Does it learn? ========================================================================================


def test_the_best_tenth_is_cloned_to_a_better_policy(bc, tmp_path):
    """On Pendulum, 1,000 updates each: all episodes give about the recording's mean, the best ones more."""
    dataset_id, env_id, _ = bc.TASKS["pendulum-medium-replay"]
    whole, env, returns = bc.load_dataset(dataset_id), bc.make_env(env_id), {}
    for share in (1.0, 0.1):
        args = bc.Args(env_id="pendulum-medium-replay", hidden_sizes=(32, 32), batch_size=128, actor_lr=1e-3,
                       offline_steps=1_000, eval_every=1_000)  # fmt: skip
        data = bc.select_episodes(whole, share, 1.0, args.seed)
        (directory := tmp_path / str(share)).mkdir()
        spec = vars(args) | dict(obs_dim=3, act_dim=1)
        run = bc.Run(args, directory, data, env.spec, spec, torch.device("cpu"), {})
        returns[share] = returns_of(bc, bc.train_offline_bc(run).actor, run.envs, "cpu")
    difference = returns[0.1] - returns[1.0]  # the same start states
    standard_error = difference.std(ddof=1) / len(difference) ** 0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"
    assert returns[0.1].mean() > whole.returns().mean() + 100
