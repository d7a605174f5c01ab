"""Data: what a Minari recording becomes in memory, what can't be used, the buffers, NaN."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, inside
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

OWN = "tests/own-v0"
TINY = "--hidden-sizes 8 8 --score-hidden-sizes 8 8 --batch-size 8 --eval-episodes 1 --score-steps 4 "
TINY += "--offline-steps 9 --online-steps 20 --eval-every 3 --device cpu "

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None")  # Minari, of authors and the like


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Minari's root of each test; nothing reaches the network."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def episode(number: int, length: int, terminated=False, **columns) -> EpisodeBuffer:
    draw, end = np.random.default_rng(number), np.arange(length) == length - 1
    made = dict(observations=np.float32(draw.normal(size=(length + 1, 3))),
                actions=np.float32(draw.uniform(-2, 2, size=(length, 1))), rewards=draw.normal(size=length),
                terminations=end & terminated, truncations=end & (not terminated))  # fmt: skip
    return EpisodeBuffer(id=number, **made | columns)


def write(episodes=None, metadata=None, **settings) -> Path:
    """A small Minari dataset of Pendulum under the test's root; the folder of its files."""
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    episodes = episodes or [episode(0, 6), episode(1, 4, terminated=True)]
    minari.create_dataset_from_buffers(OWN, episodes, env=env, eval_env=env, description="tests", **settings)
    path = Path(minari.storage.datasets_root_dir.get_dataset_path(OWN)) / "data/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (metadata or {})))
    return path.parent


def sentence(call, *args) -> str:
    """The one line with which `call` ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*args)
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    return ended.value.code


# === A recording in memory =================================================================================


@pytest.mark.parametrize("name", ["pendulum", "hopper", "walker2d"])
def test_bundled_data_is_complete(monkeypatch, name):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(ROOT / "datasets"))
    dataset = minari.load_dataset(f"smac/{name}/medium-replay-v0")
    assert dataset.storage.metadata["ref_min_score"] < dataset.storage.metadata["ref_max_score"]
    for e in dataset.iterate_episodes():
        assert e.observations.dtype == e.actions.dtype == np.float32
        assert np.isfinite(e.observations).all() and np.isfinite(e.rewards).all()
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1] | e.truncations[:-1]).any()
    env = dataset.recover_environment(eval_env=True)
    assert env.action_space == dataset.action_space
    assert env.observation_space.shape == e.observations[0].shape


def test_columns_equal_the_recorded_episodes(smac):
    episodes = [episode(0, 6), episode(1, 4, terminated=True), episode(2, 1)]
    write(episodes)
    data, start = smac.Dataset(OWN), 0
    for e, end in zip(episodes, data.ends, strict=True):
        rows = {name: column[start:end] for name, column in data.columns.items()}
        np.testing.assert_array_equal(rows["observations"], e.observations[:-1])
        np.testing.assert_array_equal(rows["next_observations"], e.observations[1:])  # the last one too
        np.testing.assert_allclose(rows["actions"], e.actions / 2, atol=1e-6)  # recorded in [-2, 2]
        np.testing.assert_allclose(rows["rewards"], e.rewards, rtol=1e-6)
        start = end
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [9]  # truncations are none
    assert all(column.dtype == np.float32 and len(column) == 11 for column in data.columns.values())
    np.testing.assert_allclose(data.returns, [e.rewards.sum() for e in episodes], rtol=1e-6)


@pytest.mark.parametrize("low, high", [(0.0, 3.0), (-1.0, 0.0), (-1.0, 1.0)])
def test_actions_of_any_box_fill_the_unit_box(smac, low, high):
    unit = np.float32([[-1], [1], [0], [0.5], [-0.5], [1]])
    actions = low + (high - low) * (unit + 1) / 2
    space, scores = Box(low, high, (1,), np.float32), dict(ref_min_score=0.0, ref_max_score=1.0)
    write([episode(0, 6, actions=actions)], scores, action_space=space)
    np.testing.assert_allclose(smac.Dataset(OWN).columns["actions"], unit, atol=1e-6)


def test_the_environment_takes_actions_of_the_unit_box(smac):
    write()
    data, plain = smac.Dataset(OWN), gym.make("Pendulum-v1")
    for eval_env in (False, True):
        env = smac.make_env(data, eval_env)
        assert (env.action_space.low, env.action_space.high) == (-1, 1) and env.spec.max_episode_steps == 5
        for made in (env, plain):
            made.reset(seed=4)
        np.testing.assert_allclose(env.step(np.float32([0.25]))[0], plain.step(np.float32([0.5]))[0])


def test_losses_see_transformed_rewards_and_scores_the_environments_own(smac):
    rewards = np.array([1.0, 2.0, 0.0]), np.array([1.0, 3.0])
    metadata = dict(reward_scale=10.0, reward_bias=-5.0, ref_min_score=1.0, ref_max_score=5.0)
    write([episode(i, len(r), rewards=r) for i, r in enumerate(rewards)], metadata)
    data = smac.Dataset(OWN)
    assert data.columns["rewards"].tolist() == [5, 15, -5, 5, 25] and data.reward(-1.0) == -15
    assert data.returns.tolist() == [3, 4] and data.score(data.returns).tolist() == [50, 75]


def test_an_episode_may_count_its_last_reward_and_the_data_be_its_own_reference(smac):
    rewards = [np.array([1.0, 2.0]), np.array([4.0, 0.0]), np.array([1.0, 3.0])]
    write([episode(i, 2, rewards=r) for i, r in enumerate(rewards)], {"return": "last reward"})
    data = smac.Dataset(OWN)
    assert data.returns.tolist() == [2, 0, 3]
    np.testing.assert_allclose(data.score(data.returns), [200 / 3, 0, 100])
    data.returns = np.array([7.0, 7.0])  # no range: finite scores all the same
    assert data.score(data.returns).tolist() == [0, 0]


# === What can't be used ====================================================================================


@pytest.mark.parametrize("wrong, right", [
    ("hoper-medium-replay", "hopper-medium-replay"), ("tests/owm-v0", OWN), ("pendulum", "pendulum-medium"),
])  # fmt: skip
def test_an_unknown_id_names_near_ones_and_the_way_to_more(smac, wrong, right):
    write()
    message = sentence(smac.Dataset, wrong)
    assert repr(wrong) in message and right in message and "--download" in message


@pytest.mark.parametrize("columns, spaces", [
    (dict(observations={"a": np.zeros((7, 3))}), dict(observation_space=Dict(a=Box(-9, 9, (3,), float)))),
    (dict(observations=np.zeros((7, 3, 1))), dict(observation_space=Box(-9, 9, (3, 1), float))),
    (dict(actions=np.zeros(6, int)), dict(action_space=gym.spaces.Discrete(4))),
    ({}, dict(action_space=Box(-np.inf, np.inf, (1,), np.float32))),
])  # fmt: skip
def test_other_spaces_are_one_sentence(smac, columns, spaces):
    write([episode(0, 6, **columns)], **spaces)
    assert "flat and bounded" in sentence(smac.Dataset, OWN)


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
def test_damaged_data_is_one_sentence(smac, name):
    path = write() / name
    os.truncate(path, path.stat().st_size // 2)
    assert OWN in sentence(smac.Dataset, OWN)


@pytest.mark.parametrize("column, flags, loss", [
    ("observations", "", "denoising_loss is nan at score step 2"),
    ("rewards", "--kappa 0 --eval-every 2", "critic_loss is nan at offline step 2"),
    ("", "--kappa 0 --critic-lr 1e38 --offline-optimizer adam", " at offline step 2"),
])  # fmt: skip
def test_nan_stops_the_run_and_names_loss_and_step(smac, monkeypatch, tmp_path, column, flags, loss):
    e = episode(0, 30)
    if column:
        getattr(e, column)[5:] = np.nan
    write([e], dict(ref_min_score=-9.0, ref_max_score=0.0))
    monkeypatch.setattr(smac, "LOG_EVERY", 2)
    result = inside(smac, f"--env-id {OWN} {TINY} {flags}", tmp_path / "run")
    assert result.code.startswith("error: ") and f"{loss}: lower the learning rates" in result.code
    assert result.directory.name in result.code and not (result.directory / "offline.pt").exists()


# === The buffers ===========================================================================================


def test_a_buffer_gives_back_what_was_added(smac):
    columns = dict(observations=np.arange(12.0).reshape(6, 2), actions=np.arange(6.0)[:, None] / 10,
                   rewards=np.arange(6.0) * 7, terminations=np.arange(6) == 2)  # fmt: skip
    full, online = smac.ReplayBuffer(columns, "cpu"), smac.ReplayBuffer(columns, "cpu", capacity=5)
    rows = lambda which: {name: column[which] for name, column in columns.items()}
    online.add(**rows(0))  # one transition, as the environment's
    online.add(**rows(slice(1, 3)))
    assert (int(full.size), int(online.size), len(online.rows)) == (6, 3, 5)
    for buffer, count in ((full, 6), (online, 3)):
        parts = buffer.split(buffer.rows[:count])
        for name, column in columns.items():
            assert torch.equal(parts[name], torch.as_tensor(column[:count], dtype=torch.float32)), name
    with pytest.raises(RuntimeError):  # there is no room for three more
        online.add(**rows(slice(3)))


def test_samples_are_uniform_over_the_filled_rows(smac):
    columns = dict(actions=np.arange(1.0, 5.0)[:, None], rewards=np.arange(1.0, 5.0))
    buffer = smac.ReplayBuffer(columns, "cpu", capacity=9)
    buffer.add(**columns)
    torch.manual_seed(0)
    rows = buffer.sample_rows(4_000)
    counts = torch.bincount(rows[:, 0].long(), minlength=5)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 110  # four standard deviations


def test_an_environment_that_cannot_be_made_is_one_sentence(smac):
    def recover_environment(eval_env):
        raise ModuleNotFoundError("No module named 'reach'")

    data = SimpleNamespace(minari=SimpleNamespace(id="me/reach-v0", recover_environment=recover_environment))
    with pytest.raises(SystemExit, match=r"of me/reach-v0 can't be made .* No module named 'reach'"):
        smac.make_env(data)
