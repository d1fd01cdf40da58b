"""Guarantees of the pool: every task ends once, whatever dies on the way, and a dead cluster is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import PATHS, PATIENCE

from launch.pool import Flight, GivenUp, Pool
from launch.run.progress import Progress, ProgressReader, ProgressWriter, read_progress


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task of these tests; ``attempt`` as its worker sees it."""

    name: str
    folder: Path
    cpus: float = 1.0
    gpus: float = 0.0
    attempt: int = 1

    @property
    def progress_path(self) -> Path:
        return self.folder / "progress" / f"{self.name}.{self.attempt}.json"

    def again(self) -> Job:
        return replace(self, attempt=self.attempt + 1)


@dataclass(frozen=True)
class Done:
    """The outcome of a task of these tests."""

    name: str
    bad_node: str | None = None


@dataclass
class Driven:
    """Reports of a pool."""

    ends: dict[str, Done | GivenUp] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    flying: list[int] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, str]:
        return {name: end.reason for name, end in self.ends.items() if isinstance(end, GivenUp)}

    def happened(self, kind: str) -> list[tuple[str, int]]:
        return sorted((event["task"], event["attempt"]) for event in self.events if event["event"] == kind)


def make_jobs(folder: Path, count: int, **needs: float) -> list[Job]:
    return [Job(name=f"s{i}", folder=folder, **needs) for i in range(count)]


def drive(ray, jobs: list[Job], task: Callable[[Job], Done], on_look=None, **options) -> Driven:
    driven = Driven()

    def look(flights: list[Flight]):
        driven.flying.append(len(flights))
        if on_look is not None:
            on_look(flights)

    def event(kind, **facts):
        driven.events.append({"event": kind, **facts})

    pool = Pool(ray=ray, task=task, on_look=look, on_event=event, **({"retries": 0} | options))
    for job, end in pool.run(jobs):
        assert job.name not in driven.ends
        driven.ends[job.name] = end
    return driven


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_task_that_raises_is_tried_again_then_given_up(ray, tmp_path):
    def task(job):
        if job.name == "s1":
            raise ValueError("no such luck")
        if job.name == "s2":
            raise RuntimeError("A" * 5000 + "\n\nModuleNotFoundError: No module named 'torch'")
        return Done(job.name)

    driven = drive(ray, make_jobs(tmp_path, 4), task, retries=1)
    assert set(driven.ends) == {"s0", "s1", "s2", "s3"}
    assert sorted(driven.reasons) == ["s1", "s2"]
    assert driven.reasons["s1"] == "gave up after 2 attempts: ValueError: no such luck"
    assert driven.reasons["s2"].startswith("gave up after 2 attempts: RuntimeError: AAA")
    assert driven.reasons["s2"].endswith("A ModuleNotFoundError: No module named 'torch'")
    assert len(driven.reasons["s2"]) < 500
    assert driven.happened("task_again") == [("s1", 1), ("s2", 1)]


def test_a_worker_that_dies_is_replaced(ray, tmp_path):
    """A poisoned task, which kills every worker, is given up after its retries; the others go on."""

    def task(job):
        if job.name == "s1" or (job.name == "s0" and job.attempt < 3):
            os._exit(1)
        (job.folder / f"{job.name}.{job.attempt}").touch()
        return Done(job.name)

    driven = drive(ray, make_jobs(tmp_path, 3), task, retries=2)
    assert list(driven.reasons) == ["s1"]
    assert driven.reasons["s1"].startswith("gave up after 3 attempts: WorkerCrashedError: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0.3", "s2.1"]
    assert driven.happened("task_again") == [("s0", 1), ("s0", 2), ("s1", 1), ("s1", 2)]


def test_the_watchdog_ends_only_what_hangs(ray, tmp_path):
    """All four CPUs for one task: the second waits in Ray's queue for longer than a stall, which is no stall."""

    def task(job):
        writer = ProgressWriter(job.progress_path, start=0)
        writer.write(0, force=True)
        if job.name == "s1" and job.attempt == 1:
            (job.folder / "hung").write_text(str(os.getpid()))
            time.sleep(600)
        for epoch in range(1, 7 if job.name == "s0" else 2):
            time.sleep(0.4)
            writer.write(epoch, force=True)
        return Done(job.name)

    driven = drive(ray, make_jobs(tmp_path, 2, cpus=4.0), task, stall_minutes=1.5 / 60, retries=20)
    assert driven.reasons == {}
    assert ("s1", 1) in driven.happened("task_again")
    assert driven.events[0]["reason"] == "no epoch finished for 0.025 minutes"
    hung = int((tmp_path / "hung").read_text())
    wait_for(lambda: not alive(hung), "the end of the hung worker")


def test_two_gpus_in_halves_run_four_tasks_at_a_time(ray, tmp_path):
    def task(job):
        me = tmp_path / f"{job.name}.started"
        me.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        me.with_suffix(".arrived").touch()
        deadline = time.monotonic() + PATIENCE
        while len(list(tmp_path.glob("*.arrived"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        now = {path.name: path.read_text() for path in tmp_path.glob("*.started")}  # one that ends now: tried again
        me.rename(me.with_suffix(".done"))
        (tmp_path / f"{job.name}.seen").write_text(json.dumps([now, os.getpid()]))
        return Done(job.name)

    driven = drive(ray, make_jobs(tmp_path, 5, gpus=0.5, cpus=0.5), task, tasks_per_process=1, retries=9)
    assert len(driven.ends) == 5
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("*.seen")]
    assert max(len(now) for now, _ in seen) == 4
    for now, _ in seen:
        devices = list(now.values())
        assert set(devices) <= {"0", "1"}
        assert max(devices.count(device) for device in ("0", "1")) <= 2
    assert len({process for _, process in seen}) == 5  # a fresh process for every one gives its GPU memory back


def test_no_more_tasks_fly_than_asked_for_or_needed(ray, tmp_path):
    def task(job):
        time.sleep(0.2)
        return Done(job.name)

    assert max(drive(ray, make_jobs(tmp_path, 5), task, max_parallel=2).flying) <= 2
    many = drive(ray, make_jobs(tmp_path, 40), task)
    assert len(many.ends) == 40
    assert max(many.flying) <= 8  # twice the four places
    assert drive(ray, [], task).ends == {}


def test_a_task_without_a_fit_node_is_given_up_as_unfit(ray, tmp_path):
    """On one machine, where there is no other node to go to."""

    def task(job):
        return Done(job.name, bad_node="node x: nowhere: no such store")

    driven = drive(ray, make_jobs(tmp_path, 9), task, retries=3)
    assert set(driven.ends.values()) == {GivenUp("no node is fit: node x: nowhere: no such store", unfit=True)}
    assert [event["event"] for event in driven.events] == ["node_avoided"]


# clusters of several nodes, and their deaths, each in a process of its own

_TWO_NODES = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from launch.pool import Pool
from test_launch_pool import Done, make_jobs

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
blind = cluster.add_node(num_cpus=1, env_vars={"HTNET_TEST_BLIND": "1"})
seeing = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

def task(job):
    import os, time
    (job.folder / f"{job.name}.{job.attempt}").touch()
    if "HTNET_TEST_BLIND" in os.environ:
        return Done(job.name, bad_node="node blind: no such store")
    time.sleep(0.3)
    return Done(job.name)

pool = Pool(ray=ray, task=task, retries=0, on_event=lambda kind, **facts: print(kind, facts.get("reason"), flush=True))
for job, end in pool.run(make_jobs(folder, 9)):
    print("end", job.name, end, flush=True)
    if len(sys.argv) > 2 and seeing is not None:  # the only fit node dies
        cluster.remove_node(seeing, allow_graceful=False)
        seeing = None
ray.shutdown()
cluster.shutdown()
"""


def run_program(text: str, *arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own = plain | {"PYTHONPATH": PATHS, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_a_node_without_the_store_is_avoided(tmp_path):
    """It took 8 of 9 folds within 19 seconds and failed them for good, while the other node did one."""
    done = run_program(_TWO_NODES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("end")) == [
        f"end s{i} Done(name='s{i}', bad_node=None)" for i in range(9)
    ]
    assert "node_avoided node blind: no such store" in lines
    tried = [int(path.name.partition(".")[2]) for path in tmp_path.iterdir()]
    assert max(tried) <= 2  # nobody goes back to the blind node


@pytest.mark.slow
def test_tasks_do_not_wait_for_a_fit_node_that_died(tmp_path):
    done = run_program(_TWO_NODES, str(tmp_path), "remove")
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("end")]
    assert len(ends) == 9
    assert sum("no node is fit: node blind: no such store" in line for line in ends) > 0


_NO_MEMORY = """
import sys
from pathlib import Path
import ray
from launch import retry
from launch.pool import Pool
from test_launch_pool import Done, make_jobs

retry.PAUSE_SECONDS = 0.1
# Ray's monitor sees every machine above this share of its memory
monitor = {"memory_usage_threshold": 0.0, "memory_monitor_refresh_ms": 100}
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=monitor)

def task(job):
    import time
    time.sleep(60)
    return Done(job.name)

pool = Pool(ray=ray, task=task, retries=1, on_event=lambda kind, **facts: print(kind, facts.get("failure"), flush=True))
for job, end in pool.run(make_jobs(Path(sys.argv[1]), 1)):
    print("end", job.name, end, flush=True)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_task_that_ran_out_of_memory_waits_and_says_so(tmp_path):
    """By Ray's own memory monitor, set so that every task has too much."""
    done = run_program(_NO_MEMORY, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "task_again out_of_memory", done.stdout
    assert "end s0 GivenUp" in lines[1]
    assert "gave up after 2 attempts: OutOfMemoryError" in lines[1]


# --- progress


def test_progress_is_read_by_one_scan_and_only_where_it_changed(tmp_path, monkeypatch):
    reader = ProgressReader()
    assert reader.look([tmp_path / "none"]) == {}
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for path, epoch in ((one, 3), (two, 4)):
        ProgressWriter(path, start=1).write(epoch)
    two.with_name(".two.json.x.tmp").write_text("half")
    assert reader.look([tmp_path]) == {one: Progress(epoch=3, start=1), two: Progress(epoch=4, start=1)}
    ProgressWriter(two, start=1).write(5)
    one.chmod(0)
    read = []
    monkeypatch.setattr("launch.run.progress.read_progress", lambda path: read.append(path) or read_progress(path))
    assert reader.look([tmp_path]) == {one: Progress(epoch=3, start=1), two: Progress(epoch=5, start=1)}
    assert read == [two]
    one.unlink()
    assert list(reader.look([tmp_path])) == [two]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"epoch": "x", "start": 0}', "\udc80"])
def test_damaged_progress_is_no_progress_and_no_error(tmp_path, text):
    path = tmp_path / "one.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_progress(path) is None
    assert ProgressReader().look([tmp_path]) == {path: None}
