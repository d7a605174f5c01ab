"""Data: what is bundled, what becomes of it in memory, the cache, damaged and missing data, recording."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = {
    "smac/hopper/medium-replay-v0": (100_000, 150_000),
    "smac/walker2d/medium-replay-v0": (100_000, 150_000),
    "smac/pendulum/medium-replay-v0": (1, 30_000),
}
TINY = "tests/tiny-v0"
NETWORK_FREE_S = 2.0  # Minari itself retries for 24 seconds


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path, shared_cache):
    """Home, cache and Minari's root of these tests; the bundled data is found beside the script."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def bundled(monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(ROOT / "datasets"))


def sentence(call, *args, **kwargs) -> str:
    """The one line with which `call` ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*args, **kwargs)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message.strip()
    return message


def episode(length=6, obs_dim=3, truncated=True, seed=0) -> EpisodeBuffer:
    draw = np.random.default_rng(seed)
    end = np.arange(length) == length - 1
    return EpisodeBuffer(
        id=seed,
        observations=draw.normal(size=(length + 1, obs_dim)).astype(np.float32),
        actions=draw.uniform(-1, 1, size=(length, 1)).astype(np.float32),
        rewards=draw.normal(size=length),
        terminations=end & (not truncated),
        truncations=end & truncated,
    )


def write_dataset(monkeypatch, root, episodes=None, bound=1.0, dataset_id=TINY, **changes) -> Path:
    """A small Minari dataset of Pendulum's shapes under `root`; its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    Path(root).mkdir(parents=True, exist_ok=True)
    episodes = episodes or [episode(seed=0), episode(4, truncated=False, seed=1)]
    env, width = gym.make("Pendulum-v1"), episodes[0].observations.shape[1]
    settings = dict(
        env=env,
        eval_env=env,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (width,), np.float32),
        action_space=gym.spaces.Box(-bound, bound, (1,), np.float32),
        ref_min_score=-1230.0,
        ref_max_score=-150.0,
        num_episodes_average_score=1,
        algorithm_name="none",
        author="tests",
        author_email="none",
        code_permalink="none",
        description="made by a test",
    )
    minari.create_dataset_from_buffers(dataset_id, episodes, **settings | changes)
    return Path(root) / dataset_id


def change(folder: Path, name: str, edit) -> None:
    """Replaces a column of the first episode by edit(column)."""
    with h5py.File(folder / "data/main_data.hdf5", "r+") as file:
        column = file["episode_0"][name][()]
        del file["episode_0"][name]
        file["episode_0"][name] = edit(column)


def put(value):
    """An edit that overwrites the column's third row."""
    return lambda column: np.where(
        np.arange(len(column)).reshape(-1, *[1] * (column.ndim - 1)) == 2, value, column
    )


# === What is bundled =======================================================================================


@pytest.mark.parametrize("dataset_id", BUNDLED)
def test_bundled_data_is_complete_for_minari(bundled, dataset_id):
    dataset, (fewest, most) = minari.load_dataset(dataset_id), BUNDLED[dataset_id]
    assert fewest <= dataset.total_steps <= most
    metadata = json.loads((ROOT / "datasets" / dataset_id / "data/metadata.json").read_text())
    for key in ("env_spec", "eval_env_spec", "ref_min_score", "ref_max_score", "horizon", "algorithm_name",
                "seed", "description", "code_version", "author", "code_permalink"):  # fmt: skip
        assert metadata.get(key) not in (None, "", []), key
    assert "dirty" not in metadata["code_version"]
    for e in dataset.iterate_episodes():
        assert e.observations.dtype == e.actions.dtype == np.float32
        assert np.isfinite(e.observations).all() and np.isfinite(e.rewards).all()
        assert np.abs(e.actions).max() <= 1
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1].any() or e.truncations[:-1].any())
    env = dataset.recover_environment(eval_env=True)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == metadata["horizon"]


def test_bundled_data_fits_in_30_megabytes():
    assert sum(path.stat().st_size for path in (ROOT / "datasets").rglob("*") if path.is_file()) <= 30e6


# === In memory =============================================================================================


@pytest.mark.parametrize("dataset_id", BUNDLED)
def test_columns_equal_the_recorded_episodes(smac, bundled, dataset_id):
    data, start = smac.load_dataset(dataset_id), 0
    episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
    assert len(data.ends) == len(episodes)
    for e, end in zip(episodes, data.ends):
        rows = {name: column[start:end] for name, column in data.columns.items()}
        assert end - start == len(e.actions)
        np.testing.assert_array_equal(rows["observations"], e.observations[:-1])
        np.testing.assert_array_equal(rows["next_observations"], e.observations[1:])  # the last one too
        np.testing.assert_array_equal(rows["actions"], e.actions)
        np.testing.assert_array_equal(rows["rewards"], np.float32(e.rewards))
        np.testing.assert_array_equal(rows["terminations"], np.float32(e.terminations))
        start = end
    assert all(column.dtype == np.float32 and len(column) == start for column in data.columns.values())
    sums = [np.sum(np.float32(e.rewards), dtype=np.float64) for e in episodes]
    np.testing.assert_allclose(data.returns(), sums, rtol=1e-6)


def test_a_truncation_is_no_termination(smac, monkeypatch, tmp_path):
    write_dataset(monkeypatch, tmp_path / "d", [episode(6), episode(4, truncated=False, seed=1)])
    data = smac.load_dataset(TINY)
    assert data.ends.tolist() == [6, 10]
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [9]


def test_actions_are_rescaled_to_the_unit_box(smac, monkeypatch, tmp_path):
    write_dataset(monkeypatch, tmp_path / "unit")
    unit = smac.load_dataset(TINY).columns
    recorded = [episode(seed=0), episode(4, truncated=False, seed=1)]
    wide = [replace(e, actions=2 * e.actions) for e in recorded]
    write_dataset(monkeypatch, tmp_path / "wide", wide, bound=2.0)
    rescaled = smac.load_dataset(TINY).columns
    np.testing.assert_allclose(rescaled["actions"], unit["actions"], atol=1e-6)
    assert rescaled["actions"].dtype == np.float32
    np.testing.assert_array_equal(rescaled["observations"], unit["observations"])


@pytest.mark.parametrize("low, high", [(0.0, 3.0), (0.0, 1.0), (-1.0, 0.0)])
def test_an_asymmetric_action_space_is_rescaled(smac, monkeypatch, tmp_path, low, high):
    unit = np.float32([[-1], [1], [0], [0.5], [-0.5], [1]])
    e = replace(episode(), actions=low + (high - low) * (unit + 1) / 2)
    space = gym.spaces.Box(low, high, (1,), np.float32)
    write_dataset(monkeypatch, tmp_path / "d", [e], action_space=space)
    np.testing.assert_allclose(smac.load_dataset(TINY).columns["actions"], unit, atol=1e-6)


# === The cache =============================================================================================


def test_the_second_load_comes_from_the_cache(smac, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = smac.load_dataset("smac/hopper/medium-replay-v0")

    def reads(folder):
        raise AssertionError("episodes were read again")

    monkeypatch.setattr("minari.MinariDataset", reads)
    began = time.monotonic()
    second = smac.load_dataset("smac/hopper/medium-replay-v0")
    assert time.monotonic() - began < 3
    assert second.columns.keys() == first.columns.keys() and second.checksum == first.checksum
    np.testing.assert_array_equal(second.ends, first.ends)
    for name, column in first.columns.items():
        np.testing.assert_array_equal(second.columns[name], column)


def test_changed_content_is_read_afresh(smac, monkeypatch, tmp_path):
    folder = write_dataset(monkeypatch, tmp_path / "d")
    before = smac.load_dataset(TINY)
    change(folder, "rewards", put(7.0))
    after = smac.load_dataset(TINY)
    assert after.checksum != before.checksum == before.checksum.lower()
    assert before.columns["rewards"][2] != 7 and after.columns["rewards"][2] == 7


def test_other_bounds_are_read_afresh(smac, monkeypatch, tmp_path):
    """The bounds stand in the metadata: data imported again with others have the same files."""
    folder = write_dataset(monkeypatch, tmp_path / "d", bound=1.0)
    before = smac.load_dataset(TINY)
    metadata = json.loads((folder / "data/metadata.json").read_text())
    space = metadata["action_space"]
    assert space.count("-1.0") == 1 and space.count("1.0") == 2
    edit_metadata(folder, action_space=space.replace("1.0", "2.0"))
    after = smac.load_dataset(TINY)
    assert after.checksum == before.checksum
    np.testing.assert_allclose(2 * after.columns["actions"], before.columns["actions"], rtol=1e-6)


def test_a_cache_that_cannot_be_written_is_only_a_note(smac, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_dataset(monkeypatch, tmp_path / "d")
    assert smac.load_dataset(TINY).ends.tolist() == [6, 10]
    assert "note: " in capsys.readouterr().out


# === Damaged data ==========================================================================================

DAMAGES = {
    "NaN in the observations": (lambda f: change(f, "observations", put(np.nan)), "observations"),
    "inf in the rewards": (lambda f: change(f, "rewards", put(np.inf)), "rewards"),
    "NaN in the actions": (lambda f: change(f, "actions", put(np.nan)), "actions"),
    "a reward too few": (lambda f: change(f, "rewards", lambda column: column[:-1]), "episode 0"),
    "no last observation": (lambda f: change(f, "observations", lambda column: column[:-1]), "episode 0"),
    "an action too many": (
        lambda f: change(f, "actions", lambda column: column[[*range(6), 0]]),
        "episode 0",
    ),
    "no step": (lambda f: [change(f, k, lambda c: c[:0]) for k in ("actions", "rewards")], "episode 0"),
    "hdf5 cut off": (lambda f: os.truncate(f / "data/main_data.hdf5", 1500), ""),
    "no hdf5": (lambda f: (f / "data/main_data.hdf5").unlink(), ""),
    "metadata no JSON": (lambda f: (f / "data/metadata.json").write_text("{,"), "JSON"),
    "no episode": (lambda f: remove_episodes(f), "no episode"),
}


def edit_metadata(folder, remove=(), **changes):
    path = folder / "data/metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if key not in remove}))


def remove_episodes(folder):
    with h5py.File(folder / "data/main_data.hdf5", "r+") as file:
        for name in list(file):
            del file[name]
    edit_metadata(folder, total_episodes=0, total_steps=0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_one_sentence(smac, monkeypatch, tmp_path, damage):
    folder, (break_it, named) = write_dataset(monkeypatch, tmp_path / "d"), DAMAGES[damage]
    break_it(folder)
    message = sentence(smac.load_dataset, TINY)
    assert str(folder) in message and named in message


def test_damaged_metadata_is_noticed_with_a_warm_cache(smac, monkeypatch, tmp_path):
    folder = write_dataset(monkeypatch, tmp_path / "d")
    smac.load_dataset(TINY)
    for score in (math.nan, -1230.0, -2000.0):  # the other one is -1230
        edit_metadata(folder, ref_max_score=score)
        message = sentence(smac.load_dataset, TINY)
        assert str(folder) in message and "reference score" in message


def test_data_of_other_shapes_than_the_environment_is_one_sentence(smac, monkeypatch, tmp_path):
    write_dataset(monkeypatch, tmp_path / "d", [episode(200, obs_dim=4)])
    words = ["--env-id", "pendulum-medium-replay", "--dataset-id", TINY]
    result = subprocess.run(
        [sys.executable, smac.__file__, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert TINY in result.stderr and "shape" in result.stderr
    assert not (tmp_path / "runs").exists()


# === Where data is looked for ==============================================================================


def test_minaris_variable_wins_over_bundled_wins_over_home(smac, monkeypatch, tmp_path):
    roots = [tmp_path / "variable", tmp_path / "script/datasets", tmp_path / "home/.minari/datasets"]
    folders = [write_dataset(monkeypatch, root) for root in roots]
    monkeypatch.setattr(smac, "__file__", str(tmp_path / "script/smac_offline_online.py"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(roots[0]))
    for folder in folders:
        assert smac.find_dataset(TINY, download=False) == folder
        shutil.rmtree(folder)
    assert TINY in sentence(smac.find_dataset, TINY, download=False)


def test_without_minaris_variable_its_home_is_looked_in(smac, monkeypatch, tmp_path):
    folder = write_dataset(monkeypatch, tmp_path / "home/.minari/datasets")
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    assert smac.find_dataset(TINY, download=False) == folder


NEAREST = {
    "hoper-medium-replay": "hopper-medium-replay",
    "smac/pendulum/medium-replay-v1": "smac/pendulum/medium-replay-v0",
}


@pytest.mark.parametrize("wrong, right", NEAREST.items())
def test_an_unknown_id_names_the_nearest(smac, wrong, right):
    message = sentence(smac.load_dataset, wrong)
    assert repr(wrong) in message and right in message.split("nearest", 1)[1].split(",")[0]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_bundled_data_needs_no_network(smac, monkeypatch, no_network, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(smac.load_dataset("smac/pendulum/medium-replay-v0").ends) > 0


def test_missing_data_says_what_to_do_at_once(smac, no_network):
    began = time.monotonic()
    message = sentence(smac.load_dataset, "mujoco/hopper/medium-v0")
    assert "--download" in message and "clone" in message and "network was touched" not in message
    assert time.monotonic() - began < NETWORK_FREE_S


def test_a_download_without_a_network_fails_at_once(smac, no_network):
    began = time.monotonic()
    message = sentence(smac.load_dataset, "mujoco/hopper/medium-v0", download=True)
    assert "mujoco/hopper/medium-v0" in message and "network" in message
    assert time.monotonic() - began < NETWORK_FREE_S


# === Recording =============================================================================================


@pytest.fixture(scope="module")
def recorded(recorder, tmp_path_factory):
    """Two recordings of Pendulum with the same seed: (roots, outputs)."""
    words = "record --env-id Pendulum-v1 --dataset-id tests/pendulum-v0 --max-steps 250 --random-steps 50 "
    words += "--hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 --eval-every 200 --seed 3 --out"
    roots = [tmp_path_factory.mktemp("recorded") for _ in range(2)]
    commands = [[sys.executable, recorder.__file__, *words.split(), str(root)] for root in roots]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(c, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return roots, outputs


def test_the_same_seed_records_the_same_bytes(recorded):
    one, other = ((root / "tests/pendulum-v0/data/main_data.hdf5").read_bytes() for root in recorded[0])
    assert one == other


def test_a_recording_is_a_whole_minari_dataset(recorded, monkeypatch, smac):
    root = recorded[0][0]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    dataset = minari.load_dataset("tests/pendulum-v0")
    assert (dataset.total_steps, dataset.total_episodes) == (250, 2)
    metadata = json.loads((root / "tests/pendulum-v0/data/metadata.json").read_text())
    assert (metadata["horizon"], metadata["seed"]) == (200, 3)
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-1230.0, -150.0)
    assert smac.load_dataset("tests/pendulum-v0").ends.tolist() == [200, 250]
    names = [path.name for path in root.iterdir()]
    assert names == ["tests"], f"a temporary folder was left: {names}"


def test_the_step_limit_within_an_episode_is_a_truncation(recorded, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded[0][0]))
    last = list(minari.load_dataset("tests/pendulum-v0").iterate_episodes())[-1]
    assert len(last.actions) == 50 and last.truncations.tolist() == [False] * 49 + [True]
    assert not last.terminations.any()


def test_the_checksum_printed_is_the_loaders(recorded, smac):
    folder = recorded[0][0] / "tests/pendulum-v0"
    assert smac.dataset_checksum(folder) in recorded[1][0]


def test_an_existing_dataset_is_not_overwritten(recorder, recorded):
    root = recorded[0][0]
    settings = recorder.RecordArgs("Pendulum-v1", "tests/pendulum-v0", out=root)
    assert "exists already" in sentence(recorder.record, settings)


@pytest.mark.parametrize(
    "env_id, dataset_id, scores, named",
    [
        ("MountainCarContinuous-v0", TINY, (None, None), "--ref-min-score"),
        ("CartPole-v1", TINY, (0.0, 500.0), "CartPole-v1"),
        ("NoSuchThing-v0", TINY, (0.0, 1.0), "NoSuchThing"),
        ("Pendulum-v1", "no version!", (None, None), "no version!"),
        ("Pendulum-v1", TINY, (5.0, 5.0), "--ref-min-score 5.0 has to be below --ref-max-score 5.0"),
        ("Pendulum-v1", TINY, (0.0, math.nan), "--ref-max-score nan"),
    ],
)
def test_what_cannot_be_recorded_is_one_sentence(
    recorder, tmp_path, monkeypatch, env_id, dataset_id, scores, named
):
    monkeypatch.setattr(recorder, "collect", lambda *_: pytest.fail("the recording began"))
    low, high = scores
    args = recorder.RecordArgs(env_id, dataset_id, out=tmp_path / "o", ref_min_score=low, ref_max_score=high)
    assert named in sentence(recorder.record, args)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["eval_every", "eval_episodes", "max_steps", "batch_size"])
def test_what_a_recording_needs_is_at_least_one(recorder, tmp_path, name):
    args = recorder.RecordArgs("Pendulum-v1", TINY, out=tmp_path / "o", **{name: 0})
    assert f"--{name.replace('_', '-')} 0 is out of range" in sentence(recorder.record, args)
    assert not (tmp_path / "o").exists()


class Countdown(gym.Env):
    """Ends by itself after 5 steps; the observation counts them."""

    observation_space = gym.spaces.Box(0.0, 5.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.float32([0]), {}

    def step(self, action):
        self.count += 1
        return np.float32([self.count]), 1.0, self.count == 5, False, {}


gym.register("tests/Countdown-v0", entry_point=Countdown, max_episode_steps=9)


@pytest.mark.parametrize("steps, lengths, truncated", [(13, [5, 5, 3], True), (10, [5, 5], False)])
def test_terminations_are_recorded_as_terminations(recorder, steps, lengths, truncated):
    settings = dict(max_steps=steps, random_steps=100, eval_every=100, eval_episodes=1, hidden_sizes=(4, 4))
    episodes, scores = recorder.collect(
        recorder.RecordArgs("tests/Countdown-v0", TINY, **settings), (0.0, 5.0)
    )
    assert [len(e["rewards"]) for e in episodes] == lengths
    for i, e in enumerate(episodes):
        cut, end = truncated and i == len(episodes) - 1, np.arange(lengths[i]) == lengths[i] - 1
        np.testing.assert_array_equal(e["terminations"], end & (not cut))
        np.testing.assert_array_equal(e["truncations"], end & cut)
        np.testing.assert_array_equal(e["observations"][:, 0], np.arange(lengths[i] + 1))
    assert scores == [100.0]


@pytest.mark.parametrize("layer_norm, gains", [(False, 0), (True, 2)])
def test_critic_layer_norm_reaches_the_recorders_critics(recorder, monkeypatch, layer_norm, gains):
    built = []
    monkeypatch.setattr(recorder, "polyak_update", lambda target, source, tau: built.append(source))
    args = dict(critic_layer_norm=layer_norm, max_steps=12, random_steps=5, batch_size=4, eval_episodes=1)
    recorder.collect(recorder.RecordArgs("tests/Countdown-v0", TINY, hidden_sizes=(8, 8), **args), (0.0, 5.0))
    assert len(built[0].net.gains) == gains


def test_compression_leaves_the_contents(recorder, monkeypatch, tmp_path):
    episodes = [episode(2_000), episode(3, truncated=False, seed=1)]  # large columns and small ones
    path = write_dataset(monkeypatch, tmp_path / "d", episodes) / "data/main_data.hdf5"

    def contents():
        with h5py.File(path) as file:
            return {
                name: (dict(group.attrs), {k: v[()] for k, v in group.items()})
                for name, group in file.items()
            }

    before, size = contents(), path.stat().st_size
    recorder.compress(path)
    after = contents()
    assert path.stat().st_size < size and before.keys() == after.keys()
    for name, (attributes, columns) in before.items():
        assert after[name][0] == attributes and after[name][1].keys() == columns.keys()
        for key, column in columns.items():
            assert after[name][1][key].dtype == column.dtype
            np.testing.assert_array_equal(after[name][1][key], column)
    assert [len(e.actions) for e in minari.load_dataset(TINY).iterate_episodes()] == [2_000, 3]


def test_compression_keeps_no_time_of_day(recorder, monkeypatch, tmp_path):
    path = write_dataset(monkeypatch, tmp_path / "d", [episode(2_000)]) / "data/main_data.hdf5"
    other = shutil.copy(path, tmp_path / "later.hdf5")
    recorder.compress(path)
    time.sleep(1.1)  # HDF5 counts seconds
    recorder.compress(other)
    assert other.read_bytes() == path.read_bytes()
