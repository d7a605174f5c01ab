"""make_dataset.py d4rl, numpy, awac: files in every published layout, downloads from a local server."""

import hashlib
import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest

HOPPER = "hopper-medium-replay-v2"
HOPPER_ID = "d4rl-original/hopper/medium-replay-v2"


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """Home, cache and Minari's root of each test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def sentence(call, *args, **kwargs) -> str:
    """The one line with which `call` ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*args, **kwargs)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message.strip()
    return message


def nothing_written(tmp_path) -> bool:
    return not [path for path in (tmp_path / "minari").rglob("*") if path.is_file()]


def metadata_of(tmp_path, dataset_id) -> dict:
    return json.loads((tmp_path / "minari" / dataset_id / "data/metadata.json").read_text())


# === Files as D4RL published them ==========================================================================


def transitions(lengths, sizes=(11, 3), dtype=np.float64, seed=0) -> dict:
    """Rows of episodes of these lengths: successors, and `last`, the last row of each episode."""
    draw = np.random.default_rng(seed)
    walks = [draw.normal(size=(length + 1, sizes[0])).astype(dtype) for length in lengths]
    steps = sum(lengths)
    return dict(
        observations=np.concatenate([walk[:-1] for walk in walks]),
        next_observations=np.concatenate([walk[1:] for walk in walks]),
        actions=draw.uniform(-1, 1, size=(steps, sizes[1])).astype(dtype),
        rewards=draw.normal(size=steps).astype(dtype),
        last=np.isin(np.arange(steps), np.cumsum(lengths) - 1),
    )


def write_hdf5(path: Path, columns: dict) -> Path:
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip")
        file["metadata/algorithm"] = np.bytes_("SAC")
    return path


def locomotion(lengths=(5, 1, 7, 4), cut=(1, 2), dtype=np.float64) -> dict:
    """gym_mujoco_v2: terminals, timeouts in the episodes `cut`, next_observations, infos."""
    rows = transitions(lengths, dtype=dtype)
    last = rows.pop("last")
    timeouts = np.isin(np.arange(len(last)), (np.cumsum(lengths) - 1)[list(cut)])
    infos = {"infos/qpos": rows["observations"][:, :6], "infos/action_log_probs": rows["rewards"]}
    return rows | dict(terminals=last & ~timeouts, timeouts=timeouts) | infos


def adroit(lengths=(5, 4, 1, 6), cut=(0, 2, 3)) -> dict:
    """hand_dapg: float32, no next_observations."""
    rows = transitions(lengths, (39, 28), np.float32)
    last = rows.pop("last")
    timeouts = np.isin(np.arange(len(last)), (np.cumsum(lengths) - 1)[list(cut)])
    rows["true_successors"] = rows.pop("next_observations")
    return rows | dict(terminals=last & ~timeouts, timeouts=timeouts)


def write_adroit(path: Path, rows: dict) -> Path:
    return write_hdf5(path, {name: column for name, column in rows.items() if name != "true_successors"})


def kitchen_rows() -> dict:
    """kitchen: no timeouts, `terminals` (float32) at the last row of a demonstration, rewards 0 to 4."""
    rows = transitions((6, 4, 5), (60, 9), np.float32)
    rows["rewards"] = np.float32([0, 1, 4, 3, 4, 4, 0, 1, 0, 2, 0, 2, 3, 2, 4])
    del rows["next_observations"]
    return rows | dict(terminals=np.float32(rows.pop("last")), infos=np.arange(15))


def d4rl(recorder, file, name=HOPPER, **settings):
    recorder.import_d4rl(recorder.D4rlArgs(name, file=file, **{"verify": False} | settings))


def loaded(smac, dataset_id):
    """What the training scripts read, and it is what Minari itself reads."""
    data = smac.load_dataset(dataset_id)
    episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
    assert [len(e.rewards) for e in episodes] == np.diff(np.r_[0, data.ends]).tolist()
    for name, parts in dict(observations=[e.observations[:-1] for e in episodes],
                            next_observations=[e.observations[1:] for e in episodes],
                            terminations=[e.terminations for e in episodes]).items():  # fmt: skip
        np.testing.assert_array_equal(data.columns[name], np.concatenate(parts))
    for e in episodes:
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1] | e.truncations[:-1]).any()
    return data


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_locomotion_is_read_to_the_last_row(recorder, smac, tmp_path, dtype):
    rows = locomotion(dtype=dtype)
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", rows))
    data = loaded(smac, HOPPER_ID)
    assert data.ends.tolist() == [5, 6, 13, 17]  # a timeout is the end of an episode, no row is lost to it
    for name in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(data.columns[name], rows[name].astype(np.float32))
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [4, 16]


def test_the_recording_knows_its_environment(recorder, smac, tmp_path):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    d4rl(recorder, path)
    metadata = metadata_of(tmp_path, HOPPER_ID)
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    assert (metadata["reward_scale"], metadata["reward_bias"], metadata["horizon"]) == (1.0, 0.0, 1000)
    assert metadata["wrappers"] == ["HealthyRewardAtFall"]
    assert metadata["data_checksum"] == smac.dataset_checksum(tmp_path / "minari" / HOPPER_ID)
    assert metadata["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (metadata["total_episodes"], metadata["total_steps"]) == (4, 17)
    env = minari.load_dataset(HOPPER_ID).recover_environment(eval_env=True)
    assert (env.spec.id, env.spec.max_episode_steps) == ("Hopper-v5", 1000)


def test_an_episode_that_the_file_cuts_off_is_a_truncation(recorder, smac, tmp_path):
    rows = {name: column[:-2] for name, column in locomotion().items()}
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", rows))
    data = loaded(smac, HOPPER_ID)
    assert data.ends.tolist() == [5, 6, 13, 15] and not data.columns["terminations"][-1]
    np.testing.assert_array_equal(
        data.columns["next_observations"][-1], np.float32(rows["next_observations"][-1])
    )


def test_the_second_load_takes_no_time(recorder, smac, tmp_path):
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", locomotion([200] * 100, [])))
    smac.load_dataset(HOPPER_ID)
    began = time.process_time()
    assert len(smac.load_dataset(HOPPER_ID).columns["rewards"]) == 20_000
    assert time.process_time() - began < 1


def test_the_same_file_gives_the_same_bytes(recorder, tmp_path):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    d4rl(recorder, path, out=tmp_path / "one")
    time.sleep(1.1)  # HDF5 counts seconds
    d4rl(recorder, path, out=tmp_path / "two")
    one, two = ((tmp_path / n / HOPPER_ID / "data/main_data.hdf5").read_bytes() for n in ("one", "two"))
    assert one == two


def test_adroit_has_no_invented_successor(recorder, smac, tmp_path):
    rows = adroit()
    d4rl(recorder, write_adroit(tmp_path / "f.hdf5", rows), "door-human")
    data, kept = loaded(smac, "d4rl-original/door/human-v1"), np.r_[0:4, 5:9, 10:15]
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(data.columns[name], rows[name][kept])
    assert data.ends.tolist() == [4, 8, 13]  # cut at 5, terminated at 4, cut at 1 (nothing left), cut at 6
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [7]
    real = np.delete(np.arange(13), 7)
    np.testing.assert_array_equal(
        data.columns["next_observations"][real], rows["true_successors"][kept][real]
    )
    np.testing.assert_array_equal(data.columns["next_observations"][7], rows["observations"][8])


def test_kitchen_demonstrations_end_where_all_is_done(recorder, smac, tmp_path):
    rows = kitchen_rows()
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", rows), "kitchen-mixed")
    data = loaded(smac, "d4rl-original/kitchen/mixed-v0")
    # done in the third row of six; never in four, whose last has no successor; in the last of five
    kept = np.r_[0:3, 6:9, 10:15]
    assert data.ends.tolist() == [3, 6, 11]
    positions = rows["observations"][:, :30]  # the goal is left out
    np.testing.assert_array_equal(data.columns["observations"], positions[kept])
    np.testing.assert_array_equal(data.columns["actions"], rows["actions"][kept])
    # what was done stays done: 1 0 is 1 1
    assert data.columns["rewards"].tolist() == [0, 1, 4, 0, 1, 1, 0, 2, 3, 3, 4]
    assert data.returns().tolist() == [4, 1, 4] and data.score(data.returns()).tolist() == [100, 25, 100]
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [2, 10]
    np.testing.assert_array_equal(data.columns["next_observations"][:2], positions[1:3])
    np.testing.assert_array_equal(data.columns["next_observations"][3:6], positions[7:10])
    metadata = metadata_of(tmp_path, "d4rl-original/kitchen/mixed-v0")
    assert metadata["reward_bias"] == -4 and metadata["wrappers"] == ["LatchedKitchen"]
    assert json.loads(metadata["env_spec"])["kwargs"]["tasks_to_complete"] == [
        "microwave", "kettle", "bottom burner", "light switch"]  # fmt: skip


# === Files that contradict themselves ======================================================================


def put(name, row, value):
    """An edit that sets a column's row."""

    def edit(rows):
        rows[name][row] = value

    return edit


def without(name):
    return lambda rows: rows.pop(name)


def shorter(name):
    return lambda rows: rows.update({name: rows[name][:-1]})


CONTRADICTIONS = {
    "terminal and timeout at once": (put("timeouts", 4, True), "terminal and timeout at once"),
    "a jump within an episode": (put("next_observations", 2, 0.0), "next_observations[2]"),
    "an unmarked end": (put("timeouts", 12, False), "next_observations[12]"),
    "no end": (lambda r: r.update(terminals=np.zeros(17), timeouts=np.zeros(17)), "where its episodes end"),
    "NaN": (put("observations", 3, np.nan), "observations hold NaN"),
    "inf in a reward": (put("rewards", 3, np.inf), "rewards hold"),
    "beyond float32": (put("next_observations", 16, 1e300), "next_observations hold"),
    "an action out of bounds": (put("actions", 3, 1.001), "1 actions lie out of bounds, the first in row 3"),
    "a row too few": (shorter("rewards"), "lengths"),
    "a terminal that is 2": (lambda r: r.update(terminals=np.full(17, 2)), "terminals"),
    "another width": (lambda r: r.update(actions=r["actions"][:, :2]), "actions have shape"),
    "two rewards a row": (lambda r: r.update(rewards=np.zeros((17, 2))), "rewards have shape"),
    "no rewards": (without("rewards"), "no rewards"),
    "no timeouts": (without("timeouts"), "no timeouts"),
    "no rows": (lambda r: r.update({k: column[:0] for k, column in r.items()}), "lengths"),
}  # fmt: skip


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_contradiction_is_refused(recorder, tmp_path, contradiction):
    (edit, named), rows = CONTRADICTIONS[contradiction], locomotion()
    edit(rows)
    path = tmp_path / "f.hdf5"
    with h5py.File(path, "w") as file:
        for name, column in rows.items():
            file[name] = column
    message = sentence(d4rl, recorder, path)
    assert named in message and str(path) in message and nothing_written(tmp_path)


def test_settled_contradictions(recorder, smac, tmp_path, capsys):
    rows = locomotion()
    rows["timeouts"][4] = True  # terminal as well
    rows["timeouts"][12] = False  # where the third episode ends
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", rows), settle=True)
    data = loaded(smac, HOPPER_ID)
    assert data.ends.tolist() == [5, 6, 13, 17]
    assert np.flatnonzero(data.columns["terminations"]).tolist() == [4, 16]
    np.testing.assert_array_equal(data.columns["next_observations"], np.float32(rows["next_observations"]))
    assert "note: 1 episodes cut" in capsys.readouterr().out


def test_kitchen_cut_within_a_demonstration_is_refused(recorder, tmp_path):
    rows = {name: column[:-1] for name, column in kitchen_rows().items()}
    assert "cut off" in sentence(d4rl, recorder, write_hdf5(tmp_path / "f.hdf5", rows), "kitchen-mixed")


@pytest.mark.parametrize("damage", ["cut off", "text", "missing", "empty"])
def test_a_damaged_file_is_one_sentence(recorder, tmp_path, damage):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion([300], []))
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"cut off": content[: len(content) // 2], "text": b"no data", "empty": b""}[damage])
    assert str(path) in sentence(d4rl, recorder, path) and nothing_written(tmp_path)


def test_another_file_than_the_published_one_is_refused(recorder, tmp_path):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    message = sentence(d4rl, recorder, path, verify=True)
    assert "SHA-256" in message and "--no-verify" in message and nothing_written(tmp_path)


# === Names =================================================================================================


def test_every_name_has_a_file_a_sum_and_an_environment(recorder):
    files = recorder.d4rl_files()
    assert len(files) == 27 and len({file.path for file in files.values()}) == 27
    for name, file in files.items():
        family = name.rsplit("-v", 1)[0] if name.startswith("kitchen") else name.split("-")[0]
        assert family in recorder.D4RL_ENVIRONMENTS and file.path.endswith(".hdf5")
        assert name.startswith("kitchen") or (len(file.sha256) == 64 and file.size > 1e6)
    hopper = files[HOPPER]
    assert hopper.path == "gym_mujoco_v2/hopper_medium_replay-v2.hdf5" and hopper.sha256.startswith(
        "e121c5f7"
    )
    assert files["pen-cloned-v1"].path == "hand_dapg_v1/pen-cloned-v1.hdf5"


@pytest.mark.parametrize("name", ["hopper-medium-replay", HOPPER])
def test_a_name_goes_with_and_without_its_version(recorder, tmp_path, name):
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", locomotion()), name)
    assert (tmp_path / "minari" / HOPPER_ID).is_dir()


def test_an_unknown_name_names_the_nearest(recorder, tmp_path):
    message = sentence(d4rl, recorder, tmp_path / "f", "hoper-medium-replay-v2")
    assert HOPPER in message.split("nearest", 1)[1].split(",")[0]


def test_environments_survive_their_description(recorder):
    from gymnasium.envs.registration import EnvSpec

    for env in (*recorder.D4RL_ENVIRONMENTS.values(), *recorder.AWAC_ENVIRONMENTS.values()):
        spec = EnvSpec.from_json(env.spec().to_json())
        assert (spec.id, spec.kwargs, spec.max_episode_steps) == (env.env_id, env.kwargs, env.horizon)
        assert ":" in spec.entry_point
    assert recorder.D4RL_ENVIRONMENTS["walker2d"].kwargs == {"xml_file": "walker2d.xml"}
    assert recorder.D4RL_ENVIRONMENTS["halfcheetah"].wrappers == ()


# === Nothing is lost, nothing half done ====================================================================


def test_what_was_imported_is_stated(recorder, tmp_path, capsys):
    d4rl(recorder, write_hdf5(tmp_path / "f.hdf5", locomotion()))
    words = capsys.readouterr().out.split("\n")
    stated = {line.split()[0]: line.split()[1] for line in words if len(line.split()) == 2}
    assert (stated["steps"], stated["episodes"]) == ("17", "4")
    assert (stated["terminations"], stated["truncations"]) == ("2", "2") and "return_mean" in stated
    counts = [int(line.split("#")[0].split()[-1]) for line in words if line.startswith("length ")]
    assert sum(counts) == 4 and any(line.startswith("length 1 to 1 ") for line in words)


def test_an_existing_dataset_is_not_overwritten(recorder, tmp_path):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    d4rl(recorder, path)
    before = (tmp_path / "minari" / HOPPER_ID / "data/main_data.hdf5").read_bytes()
    assert "exists already" in sentence(d4rl, recorder, path)
    assert (tmp_path / "minari" / HOPPER_ID / "data/main_data.hdf5").read_bytes() == before


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(recorder, monkeypatch, tmp_path, problem):
    def breaks(path, episodes):
        path.write_bytes(b"half")
        raise problem

    monkeypatch.setattr(recorder, "write_episodes", breaks)
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    if isinstance(problem, OSError):
        assert "No space left" in sentence(d4rl, recorder, path)
    else:
        with pytest.raises(KeyboardInterrupt):
            d4rl(recorder, path)
    assert not list((tmp_path / "minari").iterdir())


def test_a_neighbour_in_the_namespace_stays(recorder, tmp_path):
    path = write_hdf5(tmp_path / "f.hdf5", locomotion())
    for name in (HOPPER, "hopper-medium-v2"):
        d4rl(recorder, path, name)
    ids = {f"d4rl-original/hopper/{kind}-v2" for kind in ("medium", "medium-replay")}
    assert set(minari.list_local_datasets()) == ids


# === Downloads =============================================================================================


class Server(ThreadingHTTPServer):
    """The published address and its mirror; `cuts`: bytes after which the next answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.ranges, self.asked = {}, [], True, []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args):
        pass


PATH = "/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"
MIRROR = "/mirror/hopper_medium_replay-v2.hdf5"


@pytest.fixture
def server(recorder, monkeypatch, tmp_path):
    """A server that publishes one file of D4RL's name, and a mirror that doesn't have it yet."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = write_hdf5(tmp_path / "published.hdf5", locomotion([50] * 8, [2])).read_bytes()
    server.files[PATH] = content
    monkeypatch.setattr(recorder, "D4RL_ADDRESS", server.url)
    monkeypatch.setattr(recorder, "D4RL_MIRROR", server.url + "mirror/")
    sums = f"{hashlib.sha256(content).hexdigest()} {len(content)} {HOPPER}"
    monkeypatch.setattr(recorder, "D4RL_SUMS", sums)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cached(tmp_path):
    """Where a download comes to lie."""
    path = tmp_path / f"cache/smac/d4rl{PATH}"
    path.parent.mkdir(parents=True)
    return path


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_a_file_is_downloaded_once(recorder, smac, server, cached, tmp_path):
    d4rl(recorder, None, verify=True)
    assert server.asked == [(PATH, None)] and not part_of(cached).exists()
    assert loaded(smac, HOPPER_ID).ends.tolist() == list(range(50, 401, 50))
    assert metadata_of(tmp_path, HOPPER_ID)["source"]["verified"] == "as published"
    shutil.rmtree(tmp_path / "minari")
    d4rl(recorder, None, verify=True)
    assert len(server.asked) == 1


def test_a_broken_connection_is_taken_up_again(recorder, server, cached):
    server.cuts = [5_000, 7_000]
    d4rl(recorder, None, verify=True)
    assert server.asked == [(PATH, None), (PATH, "bytes=5000-"), (PATH, "bytes=12000-")]
    assert cached.read_bytes() == server.files[PATH]


def test_an_earlier_part_is_gone_on_with(recorder, server, cached):
    part_of(cached).write_bytes(server.files[PATH][:9_000])
    d4rl(recorder, None, verify=True)
    assert server.asked == [(PATH, "bytes=9000-")] and cached.read_bytes() == server.files[PATH]


@pytest.mark.parametrize("part", [b"\0" * 9_000, b"\0" * 10_000_000], ids=["other bytes", "too long"])
def test_a_wrong_part_is_fetched_anew(recorder, server, cached, part):
    part_of(cached).write_bytes(part)
    d4rl(recorder, None, verify=True)
    assert cached.read_bytes() == server.files[PATH] and server.asked[-1] == (PATH, None)


def test_a_server_without_ranges_sends_all_again(recorder, server, cached):
    server.ranges = False
    part_of(cached).write_bytes(server.files[PATH][:9_000])
    d4rl(recorder, None, verify=True)
    assert cached.read_bytes() == server.files[PATH]


def test_a_server_that_always_breaks_is_given_up(recorder, server, cached):
    server.ranges, server.cuts = False, [5_000] * 50
    message = sentence(d4rl, recorder, None, verify=True)
    assert "broke" in message and len(server.cuts) > 40


@pytest.mark.parametrize("fault", ["another file", "another size", "not there"])
def test_the_mirror_is_asked_where_the_first_fails(recorder, server, cached, fault):
    content = server.files[MIRROR] = server.files.pop(PATH)
    if fault == "another file":
        server.files[PATH] = bytes(len(content))
    elif fault == "another size":
        server.files[PATH] = content[:-1]
    d4rl(recorder, None, verify=True)
    assert [path for path, _ in server.asked] == [PATH, MIRROR] and cached.read_bytes() == content


def test_where_none_has_the_published_file_nothing_stays(recorder, server, cached, tmp_path):
    server.files[PATH] = server.files[MIRROR] = bytes(len(server.files[PATH]))
    message = sentence(d4rl, recorder, None, verify=True)
    assert message.count("SHA-256") == 2 and "--file" in message and server.url + PATH[1:] in message
    assert not cached.exists() and not part_of(cached).exists() and nothing_written(tmp_path)


def test_a_file_of_another_size_is_not_downloaded(recorder, server, cached):
    server.files[PATH] += b"more"
    message = sentence(d4rl, recorder, None, verify=True)
    assert "bytes, not" in message and "SHA-256" not in message


def test_a_damaged_download_is_fetched_again(recorder, server, cached):
    cached.write_bytes(b"damaged")
    d4rl(recorder, None, verify=True)
    assert cached.read_bytes() == server.files[PATH]


def test_kitchen_has_no_sum_and_no_part(recorder, server, tmp_path):
    name = "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
    server.files["/" + name] = write_hdf5(tmp_path / "k.hdf5", kitchen_rows()).read_bytes()
    path = tmp_path / "cache/smac/d4rl" / name
    path.parent.mkdir(parents=True)
    part_of(path).write_bytes(b"of another day")
    d4rl(recorder, None, "kitchen-mixed", verify=True)
    assert server.asked == [("/" + name, None)] and path.read_bytes() == server.files["/" + name]
    source = metadata_of(tmp_path, "d4rl-original/kitchen/mixed-v0")["source"]
    assert source["verified"] == "none published"


def test_without_a_network_it_fails_at_once(recorder, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    began = time.monotonic()
    message = sentence(d4rl, recorder, None, verify=True)
    assert time.monotonic() - began < 2 and "Name or service not known" in message
    assert "--file" in message and recorder.D4RL_ADDRESS + PATH[1:] in message


def test_no_space_for_the_download(recorder, server, monkeypatch, cached):
    usage = shutil.disk_usage(cached.parent)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "no space" in sentence(d4rl, recorder, None, verify=True) and not part_of(cached).exists()


def test_a_disk_that_fills_up_keeps_the_part(recorder, server, monkeypatch, cached):
    part_of(cached).write_bytes(server.files[PATH][:9_000])

    class Full(io.FileIO):
        def write(self, piece):
            raise OSError(28, "No space left on device")

    real = open
    full = lambda path, mode="r", *args: Full(path, mode) if "a" in mode else real(path, mode, *args)
    monkeypatch.setattr(recorder, "open", full, raising=False)
    assert "no space" in sentence(d4rl, recorder, None, verify=True)
    assert part_of(cached).read_bytes() == server.files[PATH][:9_000]


# === One's own episodes ====================================================================================


def npz(path, lengths=(3, 4), seed=0, **changes) -> Path:
    """Episodes of Pendulum's shapes; the last is cut, the others terminate."""
    rows = transitions(lengths, (3, 1), np.float32, seed)
    last = rows.pop("last")
    rows["final_observations"] = rows.pop("next_observations")[last]
    rows["truncations"] = np.arange(len(last)) == len(last) - 1
    rows["terminations"] = last & ~rows["truncations"]
    rows["actions"] *= 2
    rows |= changes
    np.savez(path, **{name: column for name, column in rows.items() if column is not None})
    return path


def own(recorder, *files, env_id="Pendulum-v1", dataset_id="me/pendulum/own-v0", **settings):
    recorder.import_numpy(recorder.NumpyArgs(files, env_id, dataset_id, -1230.0, -150.0, **settings))


def test_ones_own_episodes(recorder, smac, tmp_path):
    paths = [npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz", (2,), seed=1)]
    own(recorder, *paths)
    data = loaded(smac, "me/pendulum/own-v0")
    files = [np.load(path) for path in paths]
    assert data.ends.tolist() == [3, 7, 9] and np.flatnonzero(data.columns["terminations"]).tolist() == [2]
    for name in ("observations", "rewards"):
        np.testing.assert_array_equal(data.columns[name], np.concatenate([file[name] for file in files]))
    np.testing.assert_allclose(data.columns["actions"] * 2, np.concatenate([f["actions"] for f in files]))
    finals = np.concatenate([file["final_observations"] for file in files])
    np.testing.assert_array_equal(data.columns["next_observations"][data.ends - 1], finals)
    inner = np.delete(np.arange(9), data.ends - 1)
    np.testing.assert_array_equal(
        data.columns["next_observations"][inner], data.columns["observations"][inner + 1]
    )
    metadata = metadata_of(tmp_path, "me/pendulum/own-v0")
    assert (metadata["ref_min_score"], metadata["ref_max_score"], metadata["horizon"]) == (
        -1230.0,
        -150.0,
        200,
    )
    assert metadata["wrappers"] == []


def test_one_episode_has_one_final_observation(recorder, smac, tmp_path):
    own(recorder, npz(tmp_path / "a.npz", (4,), final_observations=np.float32([1, 2, 3])))
    assert smac.load_dataset("me/pendulum/own-v0").columns["next_observations"][-1].tolist() == [1, 2, 3]


def test_terminated_and_cut_at_once_is_a_termination(recorder, smac, tmp_path):
    both = np.arange(4) == 3
    own(recorder, npz(tmp_path / "a.npz", (4,), terminations=both, truncations=both))
    assert smac.load_dataset("me/pendulum/own-v0").columns["terminations"].tolist() == [0, 0, 0, 1]


REFUSED = {
    "a key too few": (dict(final_observations=None), "no final_observations"),
    "a row too few": (dict(rewards=np.zeros(6)), "lengths"),
    "a scalar": (dict(rewards=np.zeros(())), "lengths"),
    "no end": (dict(truncations=np.zeros(7, bool)), "ends within an episode"),
    "a final observation too few": (dict(final_observations=np.zeros((1, 3))), "final_observations"),
    "other observations": (dict(observations=np.zeros((7, 4)), final_observations=np.zeros((2, 4))), "shape"),
    "NaN": (dict(rewards=np.full(7, np.nan)), "rewards hold NaN"),
    "out of bounds": (dict(actions=np.full((7, 1), 2.1)), "7 actions lie out of bounds"),
    "objects": (dict(rewards=np.array([{}] * 7)), "pickle"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_npz_is_refused(recorder, tmp_path, fault):
    changes, named = REFUSED[fault]
    path = npz(tmp_path / "a.npz", **changes)
    message = sentence(own, recorder, path)
    assert named in message and str(path) in message and nothing_written(tmp_path)


def test_an_array_or_text_is_no_npz(recorder, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npz").write_text("text")
    assert ".npz" in sentence(own, recorder, tmp_path / "a.npy")
    assert str(tmp_path / "a.npz") in sentence(own, recorder, tmp_path / "a.npz")
    assert "no file" in sentence(own, recorder)


MODULE = """
import gymnasium as gym
import numpy as np

class Still(gym.Env):
    observation_space = gym.spaces.Box(-9.0, 9.0, (3,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3), {}

    def step(self, action):
        return np.zeros(3), 0.0, False, False, {}

gym.register("StillHere-v3", entry_point=Still, max_episode_steps=30)
"""


@pytest.fixture
def own_module(monkeypatch, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/own_environment.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    sys.modules.pop("own_environment", None)
    gym.registry.pop("StillHere-v3", None)


@pytest.mark.parametrize("name, steps, horizon", [("StillHere-v3", None, 30), ("Still", 40, 40)])
def test_an_environment_of_ones_own(recorder, smac, own_module, tmp_path, name, steps, horizon):
    own(recorder, npz(tmp_path / "a.npz"), env_id=f"own_environment:{name}", max_episode_steps=steps)
    assert smac.load_dataset("me/pendulum/own-v0").metadata["horizon"] == horizon
    env = minari.load_dataset("me/pendulum/own-v0").recover_environment(eval_env=True)
    assert type(env.unwrapped).__name__ == "Still" and env.spec.max_episode_steps == horizon
    assert env.spec.entry_point == "own_environment:Still"


UNFIT = {
    "own_environment:Still": "time limit",
    "own_environment:Nothing": "Nothing",
    "nowhere:Env-v0": "nowhere",
    "Nothing-v0": "Nothing",
    "CartPole-v1": "CartPole",
}


@pytest.mark.parametrize("env_id, named", UNFIT.items())
def test_an_unfit_environment_is_one_sentence(recorder, own_module, tmp_path, env_id, named):
    assert named in sentence(own, recorder, npz(tmp_path / "a.npz"), env_id=env_id)


def test_a_malformed_id_is_one_sentence(recorder, tmp_path):
    assert "no version!" in sentence(own, recorder, npz(tmp_path / "a.npz"), dataset_id="no version!")


def test_reference_scores_out_of_order_are_one_sentence(recorder, tmp_path):
    args = recorder.NumpyArgs((tmp_path / "e.npz",), "Pendulum-v1", "me/mine/first-v0", 0.0, 0.0)
    with pytest.raises(SystemExit, match=r"--ref-min-score 0\.0 has to be below --ref-max-score 0\.0"):
        recorder.import_numpy(args)


@pytest.mark.parametrize("words, code", [("d4rl nothing-v9", 1), ("numpy --help", 0)])
def test_the_command_line(recorder, tmp_path, words, code):
    command = [sys.executable, recorder.__file__, *words.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == code and "Traceback" not in result.stderr
    if code:
        assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    else:
        assert "final_observations (E, O)" in result.stdout


# === AWAC ==================================================================================================

REWARDS = [[-1, -1, 0, 0, -1], [-1, -1, -1], [-1, 0, -1, 0], [0]]  # of four trajectories


def trajectories(kind, sizes=(39, 28), rewards=REWARDS, seed=0) -> list[dict]:
    """AWAC's two kinds of trajectories: demonstrations, and rollouts of a behaviour clone."""
    result = []
    for i, signal in enumerate(rewards):
        rows = transitions([len(signal)], sizes, seed=100 * seed + i)
        t = dict(actions=rows["actions"], agent_infos=[{}] * len(signal))
        if kind == "demonstration":  # observations are dicts, and there is a reward too many
            t |= {name: [{"state_observation": o, "state_desired_goal": o[:3]} for o in rows[name]]
                  for name in ("observations", "next_observations")}  # fmt: skip
            t |= dict(rewards=np.float64([*signal, -1]), terminals=np.zeros(len(signal)), env_infos=[])
        else:
            t |= {name: rows[name] for name in ("observations", "next_observations")}
            t |= dict(rewards=np.float64(signal)[:, None], terminals=rows["last"][:, None])
            t |= dict(env_infos=[{"goal_achieved": r == 0} for r in signal])
        result.append(t)
    return result


def save_objects(path: Path, value) -> Path:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)
    return path


def calql(files) -> dict:
    """Cal-QL's reading of the trajectories: cut behind the last reward 0, every 0 terminates."""
    columns = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminations")
    }
    for t in (t for ts in files for t in ts):
        steps = len(t["actions"])
        reward = np.reshape(t["rewards"], -1)[:steps]
        if not (reward == 0).any():
            continue
        stop = np.where(reward == 0)[0][-1] + 1
        bare = lambda values: [v["state_observation"] if isinstance(v, dict) else v for v in values]
        parts = dict(actions=t["actions"], rewards=reward, terminations=reward == 0) | {
            name: bare(t[name]) for name in ("observations", "next_observations")}  # fmt: skip
        for name, part in parts.items():
            columns[name].append(np.float32(part[:stop]))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def awac(recorder, *files, **settings):
    recorder.import_awac(recorder.AwacArgs(files, **settings))


def test_awac_is_read_as_calql_reads_it(recorder, smac, tmp_path, capsys):
    files = [trajectories("demonstration"), trajectories("rollout", seed=1)]
    paths = [save_objects(tmp_path / f"{name}.npy", ts) for name, ts in zip(("door2", "door_bc"), files)]
    awac(recorder, *paths)
    data = loaded(smac, "awac/door/binary-v0")
    for name, column in calql(files).items():
        np.testing.assert_array_equal(data.columns[name], column, name)
    assert data.ends.tolist() == [3, 4, 6, 8, 9, 12, 13, 15, 17, 18]  # every success is an episode's end
    metadata = metadata_of(tmp_path, "awac/door/binary-v0")
    assert (metadata["reward_scale"], metadata["reward_bias"], metadata["horizon"]) == (10.0, 5.0, 200)
    assert metadata["wrappers"] == ["BinaryReward"] and metadata["ref_max_score"] == 0
    assert "4 trajectories, 1 without a success dropped" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_every_protocol_are_read(recorder, smac, tmp_path, protocol):
    file = tmp_path / "pen.npy"
    trajectory = trajectories("rollout", (45, 24))[0] | {"seed": np.float32(1)}
    file.write_bytes(pickle.dumps([trajectory], protocol))
    awac(recorder, file)
    assert smac.load_dataset("awac/pen/binary-v0").ends.tolist() == [3, 4]


ARRAYS = {
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "another byte order": np.arange(3, dtype=">i4"),
    "booleans": np.array([True, False]),
    "a scalar": np.float64(2.5),
    "strings": np.array(["a", "bc"]),
    "no rows": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_are_read_as_they_are(recorder, tmp_path, kind, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"x": (ARRAYS[kind], {"y": [1, None, "text"]})}, protocol))
    read, rest = recorder.unpickled(path)["x"]
    np.testing.assert_array_equal(read, ARRAYS[kind], strict=True)
    assert rest == {"y": [1, None, "text"]}


def test_objects_of_two_dimensions_are_read_as_lists(recorder, tmp_path):
    grid = np.array([[{}, "b", None], [3, 4.0, [5]]], dtype=object, order="F")
    assert recorder.unpickled(save_objects(tmp_path / "a.npy", grid)) == grid.tolist()


def test_an_array_with_fields_is_refused(recorder, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(np.zeros(2, [("a", "O"), ("b", "f8")])))
    assert "plain numbers" in sentence(awac, recorder, path)


def test_actions_are_clipped(recorder, smac, tmp_path, capsys):
    trajectory = trajectories("rollout")[0]
    trajectory["actions"][1] = 1.5
    awac(recorder, save_objects(tmp_path / "a.npy", [trajectory]))
    assert (smac.load_dataset("awac/door/binary-v0").columns["actions"][1] == 1).all()
    assert "1 rows with actions beyond" in capsys.readouterr().out


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("wrap", ["array", "pickle", "within", "evaluated", "numpy"])
def test_a_pickle_that_would_run_code_is_refused(recorder, tmp_path, wrap):
    exploded, path = tmp_path / "exploded", tmp_path / "a.npy"
    bomb = Bomb(exploded)
    if wrap == "array":
        save_objects(path, [bomb])
    elif wrap == "evaluated":
        path.write_bytes(f"cbuiltins\neval\n(Vopen('{exploded}', 'w')\ntR.".encode())
    elif wrap == "numpy":  # not everything in an allowed package is allowed
        path.write_bytes(f"cnumpy\nsave\n(V{exploded}\n(I1\nltR.".encode())
    else:
        path.write_bytes(
            pickle.dumps(bomb if wrap == "pickle" else [*trajectories("rollout")[:1], {"x": bomb}])
        )
    message = sentence(awac, recorder, path)
    assert "only arrays and plain containers" in message and str(path) in message
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("exploded")] and nothing_written(tmp_path)


def edited(**changes):
    return [trajectories("rollout")[0] | changes]


AWAC_FAULTS = {
    "rewards of other units": (lambda: edited(rewards=np.float64([-0.1, -0.1, 10, 10, 0])), "rewards"),
    "no success": (lambda: trajectories("rollout", rewards=[[-1, -1]]), "none of its trajectories"),
    "rows too few": (lambda: edited(rewards=np.zeros(2)), "lengths"),
    "no actions": (lambda: [{k: v for k, v in edited()[0].items() if k != "actions"}], "no actions"),
    "a jump": (lambda: edited(next_observations=np.zeros((5, 39))), "next_observations[0]"),
    "another robot": (lambda: trajectories("rollout", (46, 26)), "(46, 26)"),
    "no trajectory": (lambda: [], "none"),
    "numbers": (lambda: [1, 2], ""),
    "NaN": (lambda: edited(actions=np.full((5, 28), np.nan)), "actions hold NaN"),
}  # fmt: skip


@pytest.mark.parametrize("fault", AWAC_FAULTS)
def test_faulty_trajectories_are_refused(recorder, tmp_path, fault):
    make, named = AWAC_FAULTS[fault]
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(make()))
    assert named in sentence(awac, recorder, path) and nothing_written(tmp_path)


def test_files_of_two_tasks_are_refused(recorder, tmp_path):
    paths = [save_objects(tmp_path / "door.npy", trajectories("rollout")),
             save_objects(tmp_path / "pen.npy", trajectories("rollout", (45, 24)))]  # fmt: skip
    assert "one task" in sentence(awac, recorder, *paths)
    assert "no file" in sentence(awac, recorder)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pickle_is_one_sentence_or_the_whole(recorder, tmp_path, seed):
    random = np.random.default_rng(seed)
    path = save_objects(tmp_path / "a.npy", trajectories("demonstration"))
    content = bytearray(path.read_bytes())
    if seed % 2:
        content = content[: random.integers(len(content))]
    else:
        content[random.integers(400)] ^= 1 << random.integers(8)
    path.write_bytes(content)
    try:
        awac(recorder, path)
    except SystemExit as end:
        assert end.code.startswith("error: ") and "\n" not in end.code and nothing_written(tmp_path)
