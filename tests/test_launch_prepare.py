"""``htnet prepare`` over Ray: the same bytes however it was disturbed, every damaged clip listed, exit codes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_htnet_adapters import clips, read

from htnet.data.frames import list_frames
from htnet.data.store import open_store
from htnet.data.synth import generate
from launch import cli

DATASETS = ("casme2", "samm")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "raw"
    generate(out, datasets=DATASETS, subjects=5, clips=2, seed=1, image_size=96)
    return out


def configured(folder: Path, raw: Path, **prepare) -> Path:
    sources = [{"adapter": name, "root": str(raw / name)} for name in DATASETS]
    path = folder / "c.yaml"
    plain = {"prepare": {"sources": sources, "working_size": 64, **prepare}, "data": {"store": str(folder / "store")}}
    path.write_text(yaml.safe_dump(plain))
    return path


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli.main(["prepare", str(configured(folder, raw))]) == 0
    return content(folder / "store")


def damage_one_clip(raw: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the data with 1 of 20 clips damaged, and the damaged file."""
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    clip = clips(read(copy / "samm", "samm"))[3]
    path = list_frames(clip.frames)[clip.apex]
    path.write_bytes(path.read_bytes()[:500])
    return copy, path


@pytest.mark.slow
def test_a_damaged_clip_is_listed_and_the_rest_is_prepared(raw, tmp_path, capsys):
    copy, path = damage_one_clip(raw, tmp_path)
    config = str(configured(tmp_path, copy))
    assert cli.main(["prepare", config]) == 1
    out = capsys.readouterr().out
    assert f"FAILED: samm/007/007_1_2: {path}: unreadable picture" in out
    assert "left out by rule: unreadable_frames: 1 clips" in out
    store = open_store(tmp_path / "store")
    assert len(store.rows) == 19
    with (store.path / "left_out.csv").open(newline="") as file:
        assert [(row["clip"], row["rule"]) for row in csv.DictReader(file)] == [
            ("samm/007/007_1_2", "unreadable_frames")
        ]
    report = json.loads((tmp_path / "store.prepare.json").read_text())
    assert report["seconds_by_stage"]["flow"] > 0
    assert report["subjects"]["samm/007"]["clips"] == 1
    # a store with a gap is up to date until the input changes
    assert cli.main(["prepare", config]) == 0
    shutil.rmtree(store.path)
    assert cli.main(["prepare", config, "--strict"]) == 2
    assert f"htnet prepare: {path}: unreadable picture" in capsys.readouterr().err
    assert not list(tmp_path.glob(".store*"))
    assert not store.path.exists()


@pytest.mark.slow
def test_killed_at_random_moments_the_store_is_the_same_to_the_last_byte(raw, tmp_path, undisturbed):
    config = configured(tmp_path, raw)
    command = [sys.executable, "-m", "launch.cli", "prepare", str(config)]
    rng = np.random.default_rng()
    halfway = 0
    for _ in range(3):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        parts = tmp_path / ".store.partial" / "parts"
        deadline = time.monotonic() + 60
        before = len(list(parts.glob("*.json")))
        while process.poll() is None and len(list(parts.glob("*.json"))) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.1)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        halfway += 0 < len(list(parts.glob("*.json"))) < 10
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".store.partial").rglob("*.tar")}
    assert halfway, "no kill fell into the work"
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert len(done) == 10 or "clips were done before" in finished.stdout
    assert content(tmp_path / "store") == undisturbed
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.tar")}
    assert all(times[name] == shards[name] for name in shards), "a subject was made twice"
    assert not list(tmp_path.glob(".store*"))


def test_a_list_says_what_there_is_and_decodes_nothing(raw, tmp_path, capsys):
    copy, _ = damage_one_clip(raw, tmp_path)
    shutil.rmtree(clips(read(copy / "casme2", "casme2"))[0].frames)
    assert cli.main(["prepare", str(configured(tmp_path, copy)), "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines() if line.strip().startswith("all")] == [["10", "19"]]
    assert "samm/006" in out
    assert "FAILED: casme2/sub01/EP01_01f: no such folder of frames" in out
    assert not (tmp_path / "store").exists()


def test_an_official_list_that_differs_stops_before_any_work(raw, tmp_path, capsys):
    path = tmp_path / "list.csv"
    entries = [clip for name in DATASETS for clip in clips(read(raw / name, name))]
    lines = [f"{clip.id.dataset},{clip.id.subject},{clip.id.clip},{clip.label}" for clip in entries]
    path.write_text("\n".join(lines))
    config = str(configured(tmp_path, raw, official_list=str(path)))
    assert cli.main(["prepare", config, "--dry-run"]) == 0
    assert cli.main(["prepare", config, "--list"]) == 0
    assert "official list: agrees" in capsys.readouterr().out
    path.write_text("\n".join(lines[1:]))
    assert cli.main(["prepare", config]) == 2
    assert "1 differences between the official list and the sources: casme2/sub01/" in capsys.readouterr().err
    assert cli.main(["prepare", config, "--list"]) == 0
    assert "official list: 1 differences" in capsys.readouterr().out
