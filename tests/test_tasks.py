"""Environments and data beyond the bundled two: wrappers, Dict observations, tasks that are not here."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import ROOT
from minari.data_collector.episode_buffer import EpisodeBuffer

QUICK = """--score-steps 4 --offline-steps 4 --online-steps 12 --eval-every 4 --handover-eval-every 4
--eval-episodes 2 --batch-size 8 --hidden-sizes 8 8 --score-hidden-sizes 8 8 --device cpu""".split()
KITCHEN = ["microwave", "kettle", "light switch", "slide cabinet"]
ROBOTICS = {
    "kitchen-partial": ("FrankaKitchen-v1", dict(tasks_to_complete=KITCHEN), ["LatchedKitchen"], 30),
    "door-binary": ("AdroitHandDoor-v1", {}, ["BinaryReward"], 39),
    "pen-binary": ("AdroitHandPen-v1", {}, ["BinaryReward"], 45),
    "relocate-binary": ("AdroitHandRelocate-v1", {}, ["BinaryReward"], 39),
}  # fmt: skip


def record(env: gym.Env, episodes: int, seed=0) -> list[EpisodeBuffer]:
    """Episodes of random actions."""
    env.action_space.seed(seed)
    recorded = []
    for i in range(episodes):
        observation, _ = env.reset(seed=seed + i)
        columns = SimpleNamespace(observations=[observation], actions=[], rewards=[], ends=[])
        while not columns.ends or not any(columns.ends[-1]):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            columns.observations.append(observation)
            columns.actions.append(action)
            columns.rewards.append(reward)
            columns.ends.append((terminated, truncated))
        ends = np.array(columns.ends)
        recorded.append(EpisodeBuffer(
            id=i, observations=stack(columns.observations), actions=np.array(columns.actions),
            rewards=np.array(columns.rewards), terminations=ends[:, 0], truncations=ends[:, 1]))  # fmt: skip
    return recorded


def stack(items):
    if isinstance(items[0], dict):
        return {key: stack([item[key] for item in items]) for key in items[0]}
    return np.array(items)


def write(monkeypatch, tmp_path, dataset_id, env, episodes, base=None, **metadata) -> None:
    """A Minari dataset under tmp_path with further metadata, for the scripts to find."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "d"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    (tmp_path / "d").mkdir(exist_ok=True)
    minari.create_dataset_from_buffers(
        dataset_id, episodes, env=base or env, eval_env=base or env, observation_space=env.observation_space,
        action_space=env.action_space, algorithm_name="none", author="tests", author_email="none",
        code_permalink="none", description="made by a test")  # fmt: skip
    path = tmp_path / "d" / dataset_id / "data/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | metadata))


def run(smac, monkeypatch, directory, *flags):
    """main() in `directory`; the run's directory."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["smac_offline_online.py", *flags, *QUICK])
    smac.main()
    return max((directory / "runs").iterdir())


# === Environments ==========================================================================================


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("robot, kwargs", [("Hopper", {}), ("Walker2d", dict(xml_file="walker2d.xml"))])
def test_v5_with_the_healthy_reward_is_v4(smac, robot, kwargs):
    """What D4RL's data was recorded in: same observations, rewards and ends as Gymnasium's v4."""
    ours = smac.make_env(f"{robot}-v5", ["HealthyRewardAtFall"], **kwargs)
    theirs, falls = gym.make(f"{robot}-v4"), 0
    ours.action_space.seed(3)
    for episode in range(5):
        same = ours.reset(seed=episode)[0], theirs.reset(seed=episode)[0]
        ended = False
        while not ended:
            np.testing.assert_array_equal(*same)
            action = ours.action_space.sample()
            (a, reward, terminated, truncated, _), b = ours.step(action), theirs.step(action)
            same = a, b[0]
            assert (terminated, truncated) == b[2:4] and reward == pytest.approx(b[1], abs=1e-12)
            ended, falls = terminated or truncated, falls + terminated
    assert falls == 5


class Scripted(gym.Env):
    """Plays back (info, reward) of each step; observations as FrankaKitchen's, or a plain vector."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, steps, observation=None):
        self.steps, self.observation = steps, np.zeros(3) if observation is None else observation

    def reset(self, **kwargs):
        self.left = list(self.steps)
        return self.observation, {}

    def step(self, action):
        info, terminated = self.left.pop(0)
        return self.observation, 7.0, terminated, False, info


def test_a_binary_task_ends_where_it_succeeds(smac):
    env = smac.BinaryReward(Scripted([({"success": False}, False), ({"success": np.bool_(True)}, False)]))
    env.reset()
    assert env.step(None)[1:4] == (-1.0, False, False)
    assert env.step(None)[1:4] == (0.0, True, False)


def test_kitchen_counts_what_was_ever_done_without_velocities(smac):
    full = np.arange(59.0)
    done = [{"episode_task_completions": KITCHEN[:n]} for n in (0, 1, 1, 4)]
    env = Scripted([(info, i == 3) for i, info in enumerate(done)], {"observation": full})
    env = smac.LatchedKitchen(env)
    observation, _ = env.reset()
    assert observation.dtype == np.float32
    np.testing.assert_array_equal(observation, [*range(9), *range(18, 39)])
    steps = [env.step(None) for _ in range(4)]
    assert [step[1] for step in steps] == [0.0, 1.0, 1.0, 4.0]
    assert [step[2] for step in steps] == [False, False, False, True]


def test_an_episode_counts_its_sum_or_its_last_reward(smac):
    columns = {"rewards": np.array([1.0, 2.0, 0.0, 1.0, 3.0], np.float32)}
    data = smac.Dataset(columns, np.array([2, 5]), {"ref_min_score": 0.0, "ref_max_score": 4.0}, "")
    assert data.returns().tolist() == [3.0, 4.0]
    last = data._replace(metadata=data.metadata | {"return": "last reward"})
    assert last.returns().tolist() == [2.0, 3.0]
    assert last.score(last.returns()).tolist() == [50.0, 75.0]


# === Each family through the pipeline ======================================================================


@pytest.mark.parametrize("name", ROBOTICS)
def test_a_robotics_task_trains(smac, monkeypatch, tmp_path, name):
    env_id, kwargs, wrappers, width = ROBOTICS[name]
    env_id, kwargs = f"gymnasium_robotics:{env_id}", kwargs | dict(max_episode_steps=8)
    pytest.importorskip("gymnasium_robotics")
    base = gym.make(env_id, **kwargs)
    env = smac.make_env(env_id, wrappers, **kwargs)
    assert env.observation_space.shape == (width,)
    dataset_id = smac.TASKS[name][0]
    write(monkeypatch, tmp_path, dataset_id, env, record(env, 3), base=base, wrappers=wrappers,
          ref_min_score=-1.0, ref_max_score=4.0, reward_scale=10.0, reward_bias=5.0,
          **{"return": "last reward"})  # fmt: skip
    directory = run(smac, monkeypatch, tmp_path, "--env-id", name)
    state = smac.load_checkpoint(directory / "final.pt")
    assert state["env"] == env_id and state["wrappers"] == wrappers and state["reward_bias"] == 5.0
    assert state["counts"] == "last reward"
    again = smac.make_env(state["env"], state["wrappers"], **state["env_kwargs"])  # what --video-only makes
    assert again.observation_space.shape == (width,) and again.spec.max_episode_steps == 8
    rows = state["rows"]
    assert all(-1 <= row["return_mean"] <= 4 for row in rows), "the last reward, not the sum of 8"
    assert smac.load_dataset(dataset_id).reward(-1.0) == -5.0


@pytest.mark.parametrize("table", ["D4RL_ENVIRONMENTS", "AWAC_ENVIRONMENTS"])
def test_what_an_import_names_is_an_environment_of_the_same_sizes(smac, recorder, table):
    """The metadata of `make_dataset.py d4rl` and `awac` lead to an environment that fits their data."""
    pytest.importorskip("gymnasium_robotics")
    for name, described in getattr(recorder, table).items():
        env = smac.make_env(described.spec(), described.wrappers)
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        assert sizes == described.sizes, name
        assert env.spec.max_episode_steps == described.horizon
        observation, _ = env.reset(seed=0)
        assert observation.shape == sizes[:1] and env.step(env.action_space.sample())[0].shape == sizes[:1]


class Nested(gym.Env):
    """A Dict in a Dict; its parts come in the order of their names."""

    observation_space = gym.spaces.Dict(
        b=gym.spaces.Box(-9, 9, (2,), np.float64),
        a=gym.spaces.Dict(
            z=gym.spaces.Box(-9, 9, (1,), np.float32), y=gym.spaces.Box(-9, 9, (3,), np.float32)
        ),
    )
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def view(self):
        values = self.np_random.uniform(-1, 1, 6)
        return {"b": values[:2], "a": {"z": np.float32(values[2:3]), "y": np.float32(values[3:])}}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.view(), {}

    def step(self, action):
        return self.view(), float(action[0]), False, False, {}


def test_dict_observations_are_flattened_by_name(smac, monkeypatch, tmp_path):
    gym.register("Nested-v0", entry_point="test_tasks:Nested", max_episode_steps=6)
    env = gym.make("Nested-v0")
    episodes = record(env, 4)
    write(monkeypatch, tmp_path, "own/nested-v0", env, episodes)
    data = smac.load_dataset("own/nested-v0")
    parts = [
        episodes[1].observations["a"]["y"],
        episodes[1].observations["a"]["z"],
        episodes[1].observations["b"],
    ]
    rows = np.concatenate(parts, axis=1, dtype=np.float32)
    np.testing.assert_array_equal(data.columns["observations"][6:12], rows[:-1])
    np.testing.assert_array_equal(data.columns["next_observations"][6:12], rows[1:])
    env = smac.make_env("Nested-v0")
    live, _ = env.reset(seed=1)  # as `record` reset the second episode
    np.testing.assert_array_equal(live.astype(np.float32), rows[0])
    state = smac.load_checkpoint(run(smac, monkeypatch, tmp_path, "--env-id", "own/nested-v0") / "final.pt")
    assert (state["obs_dim"], state["flattening"]) == (6, "by name")


def test_a_dataset_without_reference_scores_is_its_own_reference(smac, monkeypatch, tmp_path, capsys):
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    write(monkeypatch, tmp_path, "own/plain-v0", env, record(env, 3))
    data = smac.load_dataset("own/plain-v0")
    assert "names no reference scores" in capsys.readouterr().out
    assert data.score(data.returns().min()) == 0 and data.score(data.returns().max()) == 100


# === What can't be used ====================================================================================


@pytest.mark.parametrize("space, sentence", [
    (dict(observation_space=gym.spaces.Box(0, 255, (3,), np.uint8)), "flat float Box"),
    (dict(observation_space=gym.spaces.Box(-1, 1, (3, 1), np.float32)), "flat float Box"),
    (dict(action_space=gym.spaces.Discrete(4)), "flat float Box with finite bounds"),
    (dict(action_space=gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)), "finite bounds"),
])  # fmt: skip
def test_other_spaces_are_one_sentence(smac, monkeypatch, tmp_path, space, sentence):
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    write(monkeypatch, tmp_path, "own/odd-v0", env, record(env, 2))
    path = tmp_path / "d/own/odd-v0/data/metadata.json"
    from minari.serialization import serialize_space

    edited = {name: json.dumps(json.loads(serialize_space(value))) for name, value in space.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | edited))
    with pytest.raises(SystemExit, match=sentence):
        smac.load_dataset("own/odd-v0")


@pytest.mark.parametrize("task, command", [
    ("d4rl-hopper-medium-replay", "make_dataset.py d4rl hopper-medium-replay"),
    ("kitchen-partial", "make_dataset.py d4rl kitchen-partial"),
    ("door-binary", "make_dataset.py awac door2_sparse.npy"),
    ("walker2d-expert", "nearest names"),
])  # fmt: skip
def test_a_task_without_data_says_at_once_how_to_get_it(smac, monkeypatch, tmp_path, task, command):
    """Nothing is tried on the network, with --download neither: Minari would retry for 24 seconds."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(smac.socket, "getaddrinfo", lambda *a: pytest.fail("the network was tried"))
    began, id_ = time.process_time(), smac.TASKS.get(task, (task,))[0]
    for download in (False, True)[: 2 if id_.count("/") == 2 else 1]:
        with pytest.raises(SystemExit, match=command):
            smac.load_dataset(id_, download)
    assert time.process_time() - began < 1


def test_every_task_name_runs_or_says_what_is_missing(smac):
    """All names of TASKS as a newcomer types them, in one process that only asks for the data."""
    code = """
import smac_offline_online as smac
for name, (dataset_id, env_id, kwargs) in smac.TASKS.items():
    try:
        data = smac.load_dataset(dataset_id)
        print(name, "has", len(data.ends))
    except SystemExit as error:
        assert "make_dataset.py" in str(error), (name, error)
        print(name, "says", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(smac.TASKS) and "hopper-medium-replay has 932" in done.stdout


def test_a_package_that_is_missing_is_named(smac, monkeypatch, tmp_path):
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    write(monkeypatch, tmp_path, "own/gone-v0", env, record(env, 3))
    path = tmp_path / "d/own/gone-v0/data/metadata.json"
    path.write_text(
        path.read_text().replace("gymnasium.envs.classic_control.pendulum", "no_such_package.env")
    )
    with pytest.raises(SystemExit, match=r"no_such_package.*install its package"):
        run(smac, monkeypatch, tmp_path, "--env-id", "own/gone-v0")
    assert h5py.File(tmp_path / "d/own/gone-v0/data/main_data.hdf5").keys()
