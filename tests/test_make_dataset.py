"""make_dataset.py: recording, importing, cutting, and the wrappers that datasets name in their env_spec."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

HOPPER = "d4rl-original/hopper/medium-replay-v2"
KITCHEN = ["microwave", "kettle", "bottom burner", "light switch"]
PENDULUM = "smac/pendulum/medium-replay-v0"


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """Home, cache and Minari's root of each test; no network."""
    folders = dict(HOME="home", XDG_CACHE_HOME="cache", MINARI_DATASETS_PATH="minari")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    for name, value in ({name: str(tmp_path / folder) for name, folder in folders.items()} | nowhere).items():
        monkeypatch.setenv(name, value)


def sentence(call, *args, **kwargs) -> str:
    """The one line with which `call` ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*args, **kwargs)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message.strip()
    return message


def metadata_of(root, dataset_id) -> dict:
    return json.loads((root / dataset_id / "data/metadata.json").read_text())


def nothing_written(tmp_path) -> bool:
    return not [path for path in (tmp_path / "minari").rglob("*") if path.is_file()]


def columns(dataset_id) -> dict:
    """What a training script reads through Minari, with the episodes' lengths."""
    episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
    assert all(e.terminations[-1] or e.truncations[-1] for e in episodes)
    assert not any((e.terminations[:-1] | e.truncations[:-1]).any() for e in episodes)
    names = ("actions", "rewards", "terminations")
    read = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in names}
    read["observations"] = np.concatenate([e.observations[:-1] for e in episodes])
    read["next_observations"] = np.concatenate([e.observations[1:] for e in episodes])
    return read | {"lengths": [len(e.rewards) for e in episodes]}


def test_the_same_seed_records_the_same_bytes(tmp_path):
    words = "record --env-id Pendulum-v1 --dataset-id tests/pendulum-v0 --max-steps 250 --random-steps 50 "
    words += "--hidden-sizes 16 16 --batch-size 32 --eval-episodes 2 --eval-every 200 --seed 3 --out"
    for out in ("one", "two"):
        command = [sys.executable, ROOT / "make_dataset.py", *words.split(), tmp_path / out]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folders = [tmp_path / out / "tests/pendulum-v0/data" for out in ("one", "two")]
    contents = [(folder / "main_data.hdf5").read_bytes() for folder in folders]
    metadata, dataset = metadata_of(tmp_path / "one", "tests/pendulum-v0"), minari.MinariDataset(folders[0])
    assert contents[0] == contents[1] and metadata["data_checksum"] == hashlib.sha256(contents[0]).hexdigest()
    assert [metadata[n] for n in ("horizon", "ref_min_score", "ref_max_score")] == [200, -1230, -150]
    assert [len(e.actions) for e in dataset.iterate_episodes()] == [200, 50]
    env = dataset.recover_environment(eval_env=True)  # Pendulum's actions, of [-2, 2], are rescaled
    assert env.action_space.high == 1 and os.listdir(tmp_path / "one") == ["tests"]


def test_terminations_are_recorded_as_terminations(recorder):
    sizes = dict(max_steps=90, random_steps=80, batch_size=4, eval_episodes=1, hidden_sizes=(4, 4))
    args = recorder.Record("Hopper-v5", "tests/t-v0", critic_layer_norm=True, **sizes)
    (*episodes, cut), scores = args.collect(0.0, 1.0)
    assert sum(len(e["rewards"]) for e in (*episodes, cut)) == 90 and len(scores) == 1
    assert not cut["terminations"].any() and np.flatnonzero(cut["truncations"]) == len(cut["rewards"]) - 1
    for e in episodes:
        fallen = (e["observations"][1:, 0] <= 0.7) | (np.abs(e["observations"][1:, 1]) >= 0.2)
        assert e["terminations"].tolist() == fallen.tolist() and fallen[-1] and not e["truncations"].any()


def test_a_policy_is_recorded_as_it_acts(recorder, smac, tmp_path):
    actor, path, id_ = smac.Actor(3, 1, (8, 8)), tmp_path / "final.pt", "me/p-v0"
    actor.net.mean += 0.3
    about = dict(script="iql", phase="online", step=7, dataset_id="d", args=dict(seed=4, hidden_sizes=(8, 8)))
    parts = {"agent": torch.nn.ModuleDict({"actor": actor}).state_dict()}
    torch.save(about | dict(obs_dim=3, act_dim=1, parts=parts), path)
    for out in ("again", "minari"):
        recorder.Record("Pendulum-v1", id_, tmp_path / out, path, 5, max_steps=250, eval_episodes=1).run()
    read, env = columns(id_), minari.load_dataset(id_).recover_environment()
    first, second = (metadata_of(tmp_path / out, id_) for out in ("again", "minari"))
    assert first == second and read["lengths"] == [200, 50] and "iql's policy, seed 4" in first["description"]
    torch.manual_seed(recorder.stream_seed(5, "record"))
    drawn = [actor.sample(s[None])[0][0].tolist() for s in torch.as_tensor(read["observations"])]
    assert read["actions"] == pytest.approx(np.array(drawn), abs=1e-6)
    for i, part in enumerate([slice(200), slice(200, 250)]):
        env.reset(seed=recorder.stream_seed(5, "record", i))
        assert [env.step(a)[1] for a in read["actions"][part]] == read["rewards"][part].tolist()
    assert "(3, 1), not (11, 3)" in sentence(recorder.Record("Hopper-v5", "me/h-v0", policy=path).run)


@pytest.mark.parametrize("env_id, dataset_id, low, high, named", [
    ("MountainCarContinuous-v0", "tests/t-v0", None, None, "--ref-min-score"),
    ("CartPole-v1", "tests/t-v0", 0.0, 500.0, "CartPole-v1"),
    ("Pendulum-v1", "no version!", None, None, "no version!"),
    ("Pendulum-v1", "tests/t-v0", 5.0, 5.0, "--ref-min-score 5.0 has to be below --ref-max-score 5.0"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_one_sentence(recorder, tmp_path, env_id, dataset_id, low, high, named):
    args = recorder.Record(env_id, dataset_id, tmp_path / "o", ref_min_score=low, ref_max_score=high)
    assert named in sentence(args.run) and not (tmp_path / "o").exists()


def transitions(lengths, sizes=(11, 3), dtype=np.float64, seed=0) -> dict:
    """Rows of episodes of these lengths, and `last`: is this the last row of an episode?"""
    draw, steps = np.random.default_rng(seed), sum(lengths)
    walks = [draw.normal(size=(length + 1, sizes[0])).astype(dtype) for length in lengths]
    rows = dict(observations=np.concatenate([walk[:-1] for walk in walks]))
    rows["next_observations"] = np.concatenate([walk[1:] for walk in walks])
    rows["actions"] = draw.uniform(-1, 1, size=(steps, sizes[1])).astype(dtype)
    rows["rewards"] = draw.normal(size=steps).astype(dtype)
    return rows | {"last": np.isin(np.arange(steps), np.cumsum(lengths) - 1)}


def flagged(lengths=(5, 1, 7, 4), cut=(1, 2), **settings) -> dict:
    """D4RL's columns: terminals, timeouts in the episodes `cut`."""
    rows = transitions(lengths, **settings)
    last = rows.pop("last")
    timeouts = np.isin(np.arange(len(last)), (np.cumsum(lengths) - 1)[list(cut)])
    return rows | dict(terminals=last & ~timeouts, timeouts=timeouts)


def d4rl(recorder, tmp_path, rows, name="hopper-medium-replay", **settings):
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        for column, values in rows.items():
            file[column] = values
    recorder.D4rl(name, tmp_path / "f.hdf5", **{"verify": False} | settings).run()


def test_locomotion_is_read_to_the_last_row(recorder, tmp_path):
    rows = flagged()
    d4rl(recorder, tmp_path, rows)
    read, metadata = columns(HOPPER), metadata_of(tmp_path / "minari", HOPPER)
    assert read["lengths"] == [5, 1, 7, 4]  # a timeout is the end of an episode, no row is lost to it
    for name in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(np.float32(read[name]), np.float32(rows[name]))
    assert np.flatnonzero(read["terminations"]).tolist() == [4, 16]
    assert [metadata[n] for n in ("ref_min_score", "ref_max_score", "horizon")] == [-20.272305, 3234.3, 1000]
    assert "exists already" in sentence(d4rl, recorder, tmp_path, rows)


def test_kitchen_demonstrations_end_where_all_is_done(recorder, tmp_path):
    rows, dataset_id = transitions((6, 4, 5), (60, 9), np.float32), "d4rl-original/kitchen/mixed-v0"
    rewards = np.float32([0, 1, 4, 3, 4, 4, 0, 1, 0, 2, 0, 2, 3, 2, 4])
    rows |= dict(rewards=rewards, terminals=rows.pop("last"))
    d4rl(recorder, tmp_path, rows, "kitchen-mixed")
    read, metadata = columns(dataset_id), metadata_of(tmp_path / "minari", dataset_id)
    # done in the third row of six; never in four, whose last has no successor; in the last of five
    assert read["lengths"] == [3, 3, 5] and np.flatnonzero(read["terminations"]).tolist() == [2, 10]
    np.testing.assert_array_equal(read["observations"], rows["observations"][np.r_[0:3, 6:9, 10:15], :30])
    assert read["rewards"].tolist() == [0, 1, 4, 0, 1, 1, 0, 2, 3, 3, 4]  # what was done stays done
    real, after = np.r_[0:2, 3:10], np.r_[1:3, 7:10, 11:15]  # of terminated rows none is needed
    np.testing.assert_array_equal(read["next_observations"][real], rows["observations"][after, :30])
    assert (metadata["reward_scale"], metadata["reward_bias"], metadata["return"]) == (1, -4, "last reward")
    specs = [EnvSpec.from_json(metadata[name]) for name in ("env_spec", "eval_env_spec")]
    assert [spec.additional_wrappers[0].kwargs["increments"] for spec in specs] == [False, True]
    assert specs[0].kwargs["tasks_to_complete"] == KITCHEN


CONTRADICTIONS = {
    "a jump": (lambda r: r["next_observations"].__setitem__(2, 0.0), "--settle"),
    "no end": (lambda r: r.update(terminals=np.zeros(17), timeouts=np.zeros(17)), "where its episodes end"),
    "beyond float32": (lambda r: r["next_observations"].__setitem__(16, 1e300), "next_observations hold"),
    "out of bounds": (lambda r: r["actions"].__setitem__(3, 1.001), "1 actions lie out of bounds"),
    "a row too few": (lambda r: r.update(rewards=r["rewards"][:-1]), "lengths"),
    "no rewards": (lambda r: r.pop("rewards"), "rewards"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_contradiction_is_refused(recorder, tmp_path, contradiction):
    (edit, named), rows = CONTRADICTIONS[contradiction], flagged()
    edit(rows)
    message = sentence(d4rl, recorder, tmp_path, rows)
    assert named in message and "f.hdf5" in message and nothing_written(tmp_path)


def test_a_jump_can_be_settled(recorder, tmp_path, capsys):
    rows = flagged()
    rows["timeouts"][[4, 12]] = True, False  # a terminal as well; where the third episode ends
    d4rl(recorder, tmp_path, rows, settle=True)
    assert columns(HOPPER)["lengths"] == [5, 1, 7, 4] and "note: 1 rows" in capsys.readouterr().out


def test_other_files_and_names_are_one_sentence(recorder, tmp_path):
    assert "--no-verify" in sentence(d4rl, recorder, tmp_path, flagged(), verify=True)
    assert "hopper-medium-replay-v2" in sentence(d4rl, recorder, tmp_path, {}, "hoper-medium-replay-v2")
    (tmp_path / "g.hdf5").write_text("no data")
    assert "g.hdf5" in sentence(recorder.D4rl("hopper-medium", tmp_path / "g.hdf5", verify=False).run)
    assert "--file" in sentence(recorder.D4rl("hopper-medium").run) and nothing_written(tmp_path)


def npz(path, lengths=(3, 4), seed=0, **changes) -> Path:
    """Episodes of Pendulum's shapes; the last is cut, the others terminate."""
    rows = transitions(lengths, (3, 1), np.float32, seed)
    last = rows.pop("last")
    rows["final_observations"] = rows.pop("next_observations")[last]
    rows["truncations"] = np.arange(len(last)) == len(last) - 1
    rows |= dict(terminations=last & ~rows["truncations"], actions=2 * rows["actions"]) | changes
    np.savez(path, **{name: column for name, column in rows.items() if column is not None})
    return path


def own(recorder, *files, **settings):
    recorder.Numpy(files, "Pendulum-v1", "me/own-v0", -1230.0, -150.0, **settings).run()


def test_ones_own_episodes(recorder, tmp_path):
    paths = [npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz", (2,), seed=1)]
    own(recorder, *paths, max_episode_steps=50)
    read, files = columns("me/own-v0"), [np.load(path) for path in paths]
    assert read["lengths"] == [3, 4, 2] and np.flatnonzero(read["terminations"]).tolist() == [2]
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(read[name], np.concatenate([file[name] for file in files]))
    finals = np.concatenate([file["final_observations"] for file in files])
    np.testing.assert_array_equal(read["next_observations"][[2, 6, 8]], finals)
    assert minari.load_dataset("me/own-v0").recover_environment().spec.max_episode_steps == 50


@pytest.mark.parametrize("changes, named", [
    (dict(truncations=np.zeros(7, bool)), "ends within an episode"),
    (dict(rewards=np.array([{}] * 7)), "pickle"),
])  # fmt: skip
def test_a_faulty_npz_is_refused(recorder, tmp_path, changes, named):
    assert named in sentence(own, recorder, npz(tmp_path / "a.npz", **changes)) and nothing_written(tmp_path)
    assert "no file" in sentence(own, recorder)


def trajectories(demonstrations=False, rewards=((-1, -1, 0, 0, -1), (-1, -1, -1), (-1, 0)), sizes=(39, 28)):
    """AWAC's rollouts, or demonstrations: there observations are dicts, and rewards one too many."""
    result = [transitions([len(r)], sizes, seed=len(r)) | {"rewards": np.float64(r)} for r in rewards]
    for t in result if demonstrations else ():
        for name in ("observations", "next_observations"):
            t[name] = [{"state_observation": o, "state_desired_goal": o[:3]} for o in t[name]]
        t["rewards"] = np.r_[t["rewards"], -1]
    return result


def test_awac_is_read_as_calql_reads_it(recorder, tmp_path, capsys):
    np.save(tmp_path / "door2.npy", np.array(trajectories(True), dtype=object), allow_pickle=True)
    (tmp_path / "door_bc.npy").write_bytes(pickle.dumps(trajectories(), 2))
    recorder.Awac((tmp_path / "door2.npy", tmp_path / "door_bc.npy")).run()
    read, metadata = columns("awac/door/binary-v0"), metadata_of(tmp_path / "minari", "awac/door/binary-v0")
    assert read["lengths"] == [3, 1, 2] * 2 and read["terminations"].sum() == 6
    np.testing.assert_array_equal(read["rewards"], read["terminations"])
    for name in ("observations", "next_observations", "actions"):
        np.testing.assert_array_equal(read[name][:4], np.float32(trajectories()[0][name][:4]))
    assert (metadata["reward_bias"], metadata["reward_scale"]) == (-5.0, 10.0)  # Cal-QL: -5, success: 5
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0.0, 1.0)
    assert "3 trajectories, 1 without a success dropped" in capsys.readouterr().out


ARRAYS = [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"), np.float64(2.5),
          np.array([True, False]), np.array(["a", "bc"]), np.zeros((0, 3), np.float32)]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_kind_are_read_as_they_are(recorder, tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": (*ARRAYS, {"y": [1, None, "text"]})}, protocol))
    *read, rest = recorder.unpickled(tmp_path / "a.pkl")["x"]
    for one, other in zip(read, ARRAYS, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert rest == {"y": [1, None, "text"]}


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("content", [
    pickle.dumps([*trajectories(), {"x": Bomb()}]),
    b"cbuiltins\neval\n(Vopen('exploded', 'w')\ntR.",
    b"cnumpy\nsave\n(Vexploded\n(I1\nltR.",  # not everything in an allowed package is allowed
    pickle.dumps(np.zeros(2, [("a", "O"), ("b", "f8")])),
])  # fmt: skip
def test_a_pickle_that_would_run_code_is_refused(recorder, monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(content)
    assert "plain" in sentence(recorder.Awac((Path("a.npy"),)).run) and nothing_written(tmp_path)
    assert not list(tmp_path.glob("exploded*"))


@pytest.mark.parametrize("content, named", [
    (trajectories(rewards=[[-1, -1]]), "none of its trajectories"),
    (trajectories(sizes=(46, 26)), "(46, 26)"),
    ([1, 2], "can't be imported"),
])  # fmt: skip
def test_faulty_trajectories_are_refused(recorder, tmp_path, content, named):
    (tmp_path / "a.npy").write_bytes(pickle.dumps(content))
    assert named in sentence(recorder.Awac((tmp_path / "a.npy",)).run) and nothing_written(tmp_path)


class Scripted(gym.Env):
    """Plays back four steps; the observation is as FrankaKitchen's, in a Dict with another Dict."""

    goal = Dict(z=Box(-9, 9, (1,)), a=Box(-9, 9, (2,)))
    observation_space = Dict(observation=Box(-99, 99, (59,), np.float64), goal=goal)
    action_space = Box(-1, 1, (1,))
    seen: ClassVar = dict(observation=np.arange(59.0), goal=dict(z=np.float32([-1]), a=np.float32([-3, -2])))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.done = [0, 1, 1, 4]
        return self.seen, {}

    def step(self, action):
        done = self.done.pop(0)
        info = {"episode_task_completions": KITCHEN[:done], "success": done == 4}
        return self.seen, 7.0, done == 4, False, info


VIEW, FLAT = [*range(9), *range(18, 39)], [-3, -2, -1, *range(59)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, kwargs, rewards, view", [
    ("HealthyRewardAtFall", {}, [7, 7, 7, 8], None), ("BinaryReward", {}, [0, 0, 0, 1], None),
    ("LatchedKitchen", {"increments": False}, [0, 1, 1, 4], VIEW),
    ("LatchedKitchen", {"increments": True}, [0, 1, 0, 3], VIEW),
    ("FlattenByName", {}, [7, 7, 7, 7], FLAT),
])  # fmt: skip
def test_a_wrapper_gives_its_numbers_after_a_round_trip(recorder, name, kwargs, rewards, view):
    """As in Minari: the spec as JSON, and gym.make, which imports make_dataset by name."""
    wrapper = getattr(recorder, name).wrapper_spec(**kwargs)
    assert wrapper.entry_point == f"make_dataset:{name}"
    spec = EnvSpec("Scripted-v0", f"{__name__}:Scripted", additional_wrappers=(wrapper,), max_episode_steps=9)
    env = gym.make(EnvSpec.from_json(spec.to_json()))
    env = gym.make(EnvSpec.from_json(env.spec.to_json()))  # and the spec of what was made
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        if view is not None:
            assert env.observation_space.contains(observation) and observation.tolist() == view
        steps = [env.step(np.zeros(1, np.float32)) for _ in rewards]
        assert [s[1] for s in steps] == rewards and [s[2] for s in steps] == [False] * 3 + [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("robot", ["hopper", "walker2d"])
def test_v5_with_the_healthy_reward_is_v4(recorder, tmp_path, robot):
    """What D4RL's data was recorded in, made from a dataset: the numbers of Gymnasium's v4."""
    d4rl(recorder, tmp_path, flagged(sizes=recorder.D4RL_ENVIRONMENTS[robot].sizes), f"{robot}-medium")
    ours = minari.load_dataset(f"d4rl-original/{robot}/medium-v2").recover_environment(eval_env=True)
    theirs = gym.make(f"{robot.capitalize()}-v4")
    for episode in range(3):
        (a, _), (b, _), ended = ours.reset(seed=episode), theirs.reset(seed=episode), False
        while not ended:
            np.testing.assert_array_equal(a, b)
            action = ours.action_space.sample()
            (a, reward, ended, *_), (b, expected, same, *_) = ours.step(action), theirs.step(action)
            assert ended == same and reward == pytest.approx(expected, abs=1e-12)


def test_robotics_environments_fit_their_data(recorder):
    pytest.importorskip("gymnasium_robotics")
    for described in (recorder.D4RL_ENVIRONMENTS["kitchen-mixed"], *recorder.AWAC_ENVIRONMENTS.values()):
        env = gym.make(EnvSpec.from_json(described.specs[1].to_json()))
        observation, _ = env.reset(seed=0)
        assert (*observation.shape, *env.action_space.shape) == described.sizes
        assert env.step(env.action_space.sample())[1] == 0


def test_select_keeps_the_best_and_a_random_share(recorder, tmp_path):
    returns = lambda root, id_: [float(e.rewards.sum()) for e in minari.MinariDataset(root / id_ / "data")]
    whole = returns(ROOT / "datasets", PENDULUM)
    for i, (best, fraction, seed) in enumerate([(0.1, 1, 1), (1, 0.5, 1), (1, 0.5, 1), (1, 0.5, 2)]):
        recorder.Select(PENDULUM, f"me/{i}-v0", best, fraction, seed).run()
    best, *shares = (returns(tmp_path / "minari", f"me/{i}-v0") for i in range(4))
    assert sorted(best) == sorted(whole)[-8:] and best == [r for r in whole if r in best]  # in their order
    assert shares[0] == shares[1] != shares[2] and len(shares[0]) == 38 and set(shares[0]) < set(whole)
    old, new = metadata_of(ROOT / "datasets", PENDULUM), metadata_of(tmp_path / "minari", "me/0-v0")
    names = ("env_spec", "eval_env_spec", "ref_min_score", "ref_max_score", "author", "action_space")
    assert [new[name] for name in names] == [old[name] for name in names]
    assert (new["total_episodes"], new["selection"]["best"], new["dataset_id"]) == (8, 0.1, "me/0-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_select_flattens_dict_observations_and_fixes_the_scale(recorder, tmp_path):
    spec = EnvSpec("Scripted-v0", f"{__name__}:Scripted", max_episode_steps=9)
    tiled = {key: np.tile(value, (3, 1)) for key, value in Scripted.seen["goal"].items()}
    tiled = {"observation": np.tile(Scripted.seen["observation"], (3, 1)), "goal": tiled}
    ends = dict(terminations=np.array([False, True]), truncations=np.array([False, False]))
    episodes = [EpisodeBuffer(id=i, observations=tiled, actions=np.zeros((2, 1), np.float32),
                              rewards=np.array([0.0, i]), **ends) for i in range(4)]  # fmt: skip
    (tmp_path / "minari").mkdir()
    minari.create_dataset_from_buffers("own/dict-v0", episodes, env=gym.make(spec), description="d")
    recorder.Select("own/dict-v0", "own/flat-v0", best=0.5).run()
    read, metadata = columns("own/flat-v0"), metadata_of(tmp_path / "minari", "own/flat-v0")
    assert read["rewards"].tolist() == [0, 2, 0, 3] and read["observations"][0].tolist() == FLAT
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0.0, 3.0)  # of all four episodes
    for eval_env in (False, True):
        assert minari.load_dataset("own/flat-v0").recover_environment(eval_env).reset()[0].tolist() == FLAT


def test_what_cannot_be_selected_is_one_sentence(recorder, tmp_path):
    assert "--best 10" in sentence(recorder.Select(PENDULUM, "me/b-v0", best=10).run)
    message = sentence(recorder.Select("smac/pendulum/medium-replay-v1", "me/b-v0").run)
    assert PENDULUM in message and "--download" in message and nothing_written(tmp_path)
