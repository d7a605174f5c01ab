"""Damaged checkpoints and datasets, 20 of each kind: either one sentence, or what is read is the original."""

import json
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

TIMES = range(20)


def outcome(call):
    """What a call returns, or the sentence with which it ends the program."""
    try:
        return call()
    except SystemExit as end:
        assert isinstance(end.code, str) and end.code.startswith("error: ") and "\n" not in end.code
        assert len(end.code) < 800
        return end.code


# === Damage to any file ====================================================================================


def truncated(path: Path, random: np.random.Generator) -> None:
    os.truncate(path, int(random.integers(0, path.stat().st_size)))


def flipped(path: Path, random: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    for position in random.integers(0, len(content), size=random.integers(1, 4)):
        content[position] ^= 1 << random.integers(8)
    path.write_bytes(content)


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def foreign(path: Path, random: np.random.Generator) -> None:
    things = (Bomb(path.with_name("exploded")), {"format": 2, "agent": Bomb(path.with_name("exploded"))},
              [1, 2, 3], {"format": 2}, "text", np.zeros(3), {"format": [2]}, None)  # fmt: skip
    thing = things[random.integers(len(things))]
    if random.integers(2):
        path.write_bytes(pickle.dumps(thing, protocol=int(random.integers(2, 5))))
    else:
        torch.save(thing, path)


# === Checkpoints ===========================================================================================


@pytest.fixture(scope="module")
def state(smac) -> dict:
    """The least that a checkpoint holds."""
    spec = vars(smac.Args(hidden_sizes=(4, 4), score_hidden_sizes=(4,))) | dict(
        obs_dim=3, act_dim=1, env="Pendulum-v1", env_kwargs={}, flattening="none", action_bounds=(-1.0, 1.0),
        log_std_bounds=(-5.0, 2.0), reward_scale=1.0, reward_bias=0.0, dataset_checksum="c",
        format=smac.FORMAT, phase="offline", rows=[dict(phase="offline", step=1, score=0.5)])  # fmt: skip
    score_net = smac.ScoreNet(3, 1, (4,), spec["score_levels"], spec["score_sigma"])
    networks = dict(agent=smac.make_agent(spec).state_dict(), score_net=score_net.state_dict())
    return smac.sealed(spec | networks)


def wrong_shapes(path, random):
    state = torch.load(path, weights_only=True)
    part = state[("agent", "score_net")[random.integers(2)]]
    name = sorted(part)[random.integers(len(part))]
    if random.integers(3) == 0:
        del part[name]
    else:
        part[name] = torch.zeros(*random.integers(5, 8, size=random.integers(1, 4)))
    return state


def not_finite(path, random):
    state = torch.load(path, weights_only=True)
    part = state[("agent", "score_net")[random.integers(2)]]
    part[sorted(part)[random.integers(len(part))]].view(-1)[0] = (np.nan, np.inf)[random.integers(2)]
    return state


def wrong_settings(path, random):
    state = torch.load(path, weights_only=True)
    wrong = (dict(hidden_sizes=(4, -1)), dict(num_critics=10**9), dict(critic_activation="sine"),
             dict(hidden_sizes="wide"), dict(obs_dim=None), dict(agent=7),
             dict(hidden_sizes=(5, 5)))  # fmt: skip
    return state | wrong[random.integers(len(wrong))]


@pytest.mark.parametrize("damage", [truncated, flipped, foreign, wrong_shapes, not_finite, wrong_settings])
def test_a_damaged_checkpoint_is_one_sentence_or_the_original(smac, state, tmp_path, damage):
    path, refused = tmp_path / "offline.pt", 0
    for seed in TIMES:
        torch.save(state, path)
        if (tampered := damage(path, np.random.default_rng(seed))) is not None:
            torch.save(smac.sealed(tampered), path)  # the file is intact, what it holds is wrong
        found = outcome(lambda: smac.restore(smac.load_checkpoint(path)))
        if isinstance(found, str):
            refused += 1
        else:
            for module, name in zip(found, ("agent", "score_net")):
                for key, tensor in module.state_dict().items():
                    assert torch.equal(tensor, state[name][key])
        assert not (tmp_path / "exploded").exists(), "a foreign pickle was executed"
    assert refused >= (15 if damage is flipped else 20)


# === Datasets ==============================================================================================


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    """A recording of three episodes; a function that writes it afresh returns the path of its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    folder = tmp_path / "minari" / "tests" / "three-v0" / "data"
    folder.mkdir(parents=True)
    source = ROOT / "datasets" / "smac" / "pendulum" / "medium-replay-v0" / "data"
    metadata = json.loads((source / "metadata.json").read_text())
    metadata |= dict(dataset_id="tests/three-v0", total_episodes=3, total_steps=600)
    with h5py.File(source / "main_data.hdf5") as old, h5py.File(tmp_path / "three.hdf5", "w") as new:
        for i in range(3):
            old.copy(f"episode_{i}", new)

    def fresh(smac=None) -> Path:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        shutil.copy(tmp_path / "three.hdf5", folder / "main_data.hdf5")
        checksum = smac.dataset_checksum(folder.parent) if smac else None
        kept = {k: v for k, v in metadata.items() if k != "data_checksum"}
        (folder / "metadata.json").write_text(
            json.dumps(kept | ({"data_checksum": checksum} if smac else {}))
        )
        return folder / "main_data.hdf5"

    return fresh


def other_shapes(path, random):
    with h5py.File(path, "r+") as file:
        episode = file[f"episode_{random.integers(3)}"]
        name = ("observations", "actions", "rewards", "terminations")[random.integers(4)]
        values = episode[name][:]
        cut = (values[:-2], values[:0], np.concatenate([values, values]))[random.integers(3)]
        del episode[name]
        episode[name] = cut


def not_finite_data(path, random):
    with h5py.File(path, "r+") as file:
        values = file[f"episode_{random.integers(3)}"][
            ("observations", "actions", "rewards")[random.integers(3)]
        ]
        row = int(random.integers(len(values)))
        values[row] = values[row] * 0 + (np.nan, np.inf)[random.integers(2)]


@pytest.mark.parametrize("damage", [truncated, flipped, foreign, other_shapes, not_finite_data])
def test_a_damaged_dataset_is_one_sentence_or_the_original(smac, dataset, damage):
    dataset(smac)
    original = smac.load_dataset("tests/three-v0")
    for seed in TIMES:
        checked = damage in (truncated, flipped, foreign)  # the others are wrong from the start
        path = dataset(smac if checked else None)
        before = path.read_bytes()
        damage(path, np.random.default_rng(seed))
        found = outcome(lambda: smac.load_dataset("tests/three-v0"))
        if not isinstance(found, str):
            assert path.read_bytes() == before
            np.testing.assert_equal(found.columns, original.columns)
        assert not path.with_name("exploded").exists(), "a foreign pickle was executed"


def test_one_changed_number_is_noticed_by_the_recordings_checksum(smac, dataset):
    path = dataset(smac)
    with h5py.File(path, "r+") as file:
        file["episode_1/rewards"][3] += 0.5
    found = outcome(lambda: smac.load_dataset("tests/three-v0"))
    assert isinstance(found, str) and "checksum" in found


def test_a_truncated_recording_without_a_checksum_is_one_sentence(smac, dataset):
    for seed in TIMES:
        path = dataset()
        truncated(path, np.random.default_rng(seed))
        assert isinstance(outcome(lambda: smac.load_dataset("tests/three-v0")), str)


@pytest.mark.parametrize("damage", [truncated, flipped, foreign])
def test_a_damaged_cache_is_read_afresh(smac, dataset, tmp_path, damage):
    dataset(smac)
    original = smac.load_dataset("tests/three-v0")
    for seed in TIMES[:5]:
        (cache,) = (tmp_path / "cache").rglob("*.npz")
        damage(cache, np.random.default_rng(seed))
        found = smac.load_dataset("tests/three-v0")
        np.testing.assert_equal(found.columns, original.columns)


def test_damaged_metadata_is_one_sentence(smac, dataset):
    for text in ("", "{", "[]", "7", '{"ref_min_score": 1}', "\x00" * 40, '"x"'):
        path = dataset(smac)
        path.with_name("metadata.json").write_text(text)
        assert isinstance(outcome(lambda: smac.load_dataset("tests/three-v0")), str)
