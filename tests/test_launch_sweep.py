"""Guarantees of a sweep: every fold once, whatever dies on the way, and a run that anyone can take up."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray as installed_ray
from conftest import ROOT
from rich.console import Console

import launch.scheduler
import launch.sweep
from htnet.config import Config, ResourcesConfig
from htnet.config_io import dump_config
from htnet.data.store import open_store
from htnet.data.types import Fold
from htnet.errors import InputError, StartError
from htnet.results import FoldRecord
from launch.cli import main
from launch.fold_task import FoldOutcome, FoldSpec
from launch.live import LiveBoard
from launch.run_folder import checkout, open_run
from launch.scheduler import (
    LONGEST_FOLDER,
    Flight,
    Scheduler,
    _check_fits,
    _not_connected,
    _session_folder,
    usable_cpus,
)
from launch.sweep import finish_run, rescore, sweep

ALL = [f"{dataset}/sub{person:02d}" for dataset in ("casme2", "samm", "smic") for person in range(3)]
RESULTS = ("predictions.csv", "summary.json")


@pytest.fixture(scope="module")
def ray():
    """One small Ray for this file, with two GPUs that exist on paper only."""
    before = signal.getsignal(signal.SIGTERM)
    installed_ray.init(
        address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield installed_ray
    installed_ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@dataclass
class Driven:
    """The reports of a scheduler."""

    outcomes: dict[str, FoldOutcome] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    flying: list[int] = field(default_factory=list)


def make_specs(folder: Path, count: int) -> list[FoldSpec]:
    return [
        FoldSpec(
            config=Config(),
            fold=Fold(subject=f"casme2/s{i}", train=(1,), test=(0,)),
            run_dir=folder,
            config_hash="x",
            attempt=1,
        )
        for i in range(count)
    ]


def drive(ray, specs, task: Callable[[FoldSpec], FoldOutcome], on_poll=None, **resources) -> Driven:
    driven = Driven()

    def finish(outcome):
        assert outcome.fold not in driven.outcomes
        driven.outcomes[outcome.fold] = outcome

    def poll(flights: list[Flight]):
        driven.flying.append(len(flights))
        if on_poll is not None:
            on_poll(flights)

    Scheduler(
        ray=ray,
        resources=ResourcesConfig(**resources),
        on_finish=finish,
        on_poll=poll,
        on_event=lambda kind, **facts: driven.events.append({"event": kind, **facts}),
        task=task,
    ).run(specs)
    return driven


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_task_that_raises_is_tried_again_then_given_up(ray, tmp_path):
    """A task that raises is tried again and then given up, while the others go on."""

    def task(spec):
        if spec.fold.subject == "casme2/s1":
            raise ValueError("no such luck")
        if spec.fold.subject == "casme2/s2":
            raise RuntimeError("A" * 5000 + "\n\nModuleNotFoundError: No module named 'torch'")
        return FoldOutcome(fold=spec.fold.subject, seconds=1.0)

    driven = drive(ray, make_specs(tmp_path, 4), task, retries=1)
    assert set(driven.outcomes) == {f"casme2/s{i}" for i in range(4)}
    reasons = {fold: outcome.reason for fold, outcome in driven.outcomes.items() if outcome.reason}
    assert sorted(reasons) == ["casme2/s1", "casme2/s2"]
    assert reasons["casme2/s1"] == "gave up after 2 attempts: ValueError: no such luck"
    assert reasons["casme2/s2"].startswith("gave up after 2 attempts: RuntimeError: AAA")
    assert reasons["casme2/s2"].endswith("A ModuleNotFoundError: No module named 'torch'")
    assert len(reasons["casme2/s2"]) < 500
    assert sorted((event["event"], event["fold"], event["attempt"]) for event in driven.events) == [
        ("fold_again", "casme2/s1", 1),
        ("fold_again", "casme2/s2", 1),
    ]


def test_a_dead_worker_is_replaced_and_attempts_are_counted(ray, tmp_path):
    """A worker that dies is replaced, and the attempts are counted."""

    def task(spec):
        if spec.fold.subject == "casme2/s0" and spec.attempt < 3:
            os._exit(1)
        if spec.fold.subject == "casme2/s1":
            os._exit(1)
        (spec.run_dir / f"{spec.fold.name}.{spec.attempt}").touch()
        return FoldOutcome(fold=spec.fold.subject, seconds=1.0)

    driven = drive(ray, make_specs(tmp_path, 3), task, retries=2)
    assert {fold: outcome.reason is None for fold, outcome in driven.outcomes.items()} == {
        "casme2/s0": True,
        "casme2/s1": False,
        "casme2/s2": True,
    }
    assert driven.outcomes["casme2/s1"].reason.startswith("gave up after 3 attempts: WorkerCrashedError: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["casme2__s0.3", "casme2__s2.1"]
    assert sorted((event["fold"], event["attempt"]) for event in driven.events) == [
        (f"casme2/s{fold}", attempt) for fold in (0, 1) for attempt in (1, 2)
    ]


def test_the_watchdog_restarts_only_hung_folds(ray, tmp_path):
    """The watchdog starts a hung fold again, but no fold that moves or waits."""
    (tmp_path / "progress").mkdir()

    def task(spec):
        def report(epoch):
            state = {"epoch": epoch, "start": 0, "epochs": 9}
            temporary = spec.progress_path.with_suffix(".tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(spec.progress_path)

        report(0)
        if spec.fold.subject == "casme2/s1" and spec.attempt == 1:
            (spec.run_dir / "hung").write_text(str(os.getpid()))
            time.sleep(600)
        for epoch in range(1, 7 if spec.fold.subject == "casme2/s0" else 2):
            time.sleep(0.4)
            report(epoch)
        return FoldOutcome(fold=spec.fold.subject, seconds=1.0)

    # all four CPUs for one fold: the second waits in Ray's queue for longer than a stall
    started = time.monotonic()
    driven = drive(ray, make_specs(tmp_path, 2), task, cpus_per_fold=4.0, stall_minutes=1.5 / 60, retries=1)
    assert time.monotonic() - started < 60
    assert [outcome.reason for outcome in driven.outcomes.values()] == [None, None]
    assert [(event["fold"], event["attempt"]) for event in driven.events] == [("casme2/s1", 1)]
    assert driven.events[0]["reason"] == "no epoch finished for 0.025 minutes"
    hung = int((tmp_path / "hung").read_text())
    deadline = time.monotonic() + 10
    while alive(hung) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(hung)


def test_two_gpus_in_halves_run_four_folds_at_a_time(ray, tmp_path):
    def task(spec):
        me = tmp_path / f"{spec.fold.name}.started"
        me.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        me.with_suffix(".arrived").touch()
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.arrived"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        now = {path.name: path.read_text() for path in tmp_path.glob("*.started")}
        me.rename(me.with_suffix(".done"))
        (tmp_path / f"{spec.fold.name}.seen").write_text(json.dumps([now, os.getpid()]))
        return FoldOutcome(fold=spec.fold.subject, seconds=1.0)

    driven = drive(ray, make_specs(tmp_path, 5), task, gpus_per_fold=0.5, cpus_per_fold=0.5)
    assert len(driven.outcomes) == 5
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("*.seen")]
    assert max(len(now) for now, _ in seen) == 4
    for now, _ in seen:
        devices = list(now.values())
        assert set(devices) <= {"0", "1"}
        assert max(devices.count(device) for device in ("0", "1")) <= 2
    # a fresh process for every fold gives its GPU memory back for sure
    assert len({process for _, process in seen}) == 5


def test_no_more_folds_fly_than_asked_for(ray, tmp_path):
    def task(spec):
        time.sleep(0.9)
        return FoldOutcome(fold=spec.fold.subject, seconds=0.9)

    assert max(drive(ray, make_specs(tmp_path, 3), task, max_parallel_folds=2).flying) == 2
    assert drive(ray, [], task).outcomes == {}


_INTERRUPTED = """
import os, sys, time
from pathlib import Path
from htnet.config import ResourcesConfig
from launch.scheduler import Scheduler, ray_cluster
from test_launch_sweep import make_specs

folder = Path(sys.argv[1])

def task(spec):
    (spec.run_dir / spec.fold.name).write_text(str(os.getpid()))
    time.sleep(600)

def interrupt(flights):
    if len(list(folder.iterdir())) == 2:
        raise KeyboardInterrupt

resources = ResourcesConfig(cpus_per_fold=0.1)
with ray_cluster(None, resources) as ray:
    Scheduler(
        ray=ray, resources=resources, on_finish=print, on_poll=interrupt, on_event=print, task=task
    ).run(make_specs(folder, 2))
"""


@pytest.mark.slow
def test_an_interrupt_stops_the_folds_that_fly(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt", done.stderr
    pids = [int(path.read_text() or 0) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.fixture
def no_tmpdir(monkeypatch, tmp_path):
    """Neither variable is set, and in place of /tmp is a folder of the test's with a short path."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        monkeypatch.setattr(launch.scheduler, "_LAST_RESORT", folder)
        yield Path(folder)


def test_ray_is_given_the_folder_that_a_user_names(no_tmpdir, monkeypatch, caplog):
    assert _session_folder() == f"{no_tmpdir}/ray"
    named = no_tmpdir / ("x" * (LONGEST_FOLDER - len(str(no_tmpdir)) - 1))
    monkeypatch.setenv("TMPDIR", str(named))
    assert _session_folder() == f"{named}/ray"
    monkeypatch.setenv("RAY_TMPDIR", f"{no_tmpdir}/first")
    assert _session_folder() == f"{no_tmpdir}/first/ray"
    monkeypatch.chdir(no_tmpdir)
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    assert _session_folder() == f"{no_tmpdir}/relative/ray"
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
    assert _session_folder() == f"{no_tmpdir}/ray"
    assert not caplog.records


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize(
    ("below", "rule"),
    [
        ("x" * 200, f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got "),
        ("ä" * 20, f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got "),
        ("file", "cannot be written to: Not a directory"),
        ("file/below", "cannot be written to: Not a directory"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(no_tmpdir, monkeypatch, caplog, name, below, rule):
    (no_tmpdir / "file").touch()
    monkeypatch.setenv(name, f"{no_tmpdir}/{below}")
    assert _session_folder() == f"{no_tmpdir}/ray"
    [record] = caplog.records
    assert record.getMessage().startswith(f"{name}={no_tmpdir}/{below}: {rule}")
    assert record.getMessage().endswith(f"; Ray's sockets and logs are in {no_tmpdir}/ray instead")
    monkeypatch.setattr(launch.scheduler, "_LAST_RESORT", "/proc")
    with pytest.raises(StartError) as caught:
        _session_folder()
    assert f"{name}={no_tmpdir}/{below}: {rule}" in str(caught.value)
    assert str(caught.value).endswith(
        "/proc: cannot be written to: No such file or directory; set TMPDIR to a folder that can be written to, "
        f"with a path of at most {LONGEST_FOLDER} bytes"
    )


def test_patience_is_advised_only_where_it_can_help():
    slow = Exception("The current node timed out during startup. This could happen because\n...")
    assert "; try again when it is less busy; Ray's logs are in /x/session_latest/logs" in str(
        _not_connected(None, slow, "/x")
    )
    assert "busy" not in str(_not_connected(None, OSError(28, "No space left on device"), "/x"))


def test_a_fold_that_fits_nowhere_is_refused(ray):
    _check_fits(ray, ResourcesConfig(cpus_per_fold=4.0, gpus_per_fold=2.0))
    with pytest.raises(InputError, match=r"resources\.cpus_per_fold=5: the cluster has 4 CPU\(s\): no fold can run"):
        _check_fits(ray, ResourcesConfig(cpus_per_fold=5.0))
    with pytest.raises(InputError, match=r"resources\.gpus_per_fold=4: the cluster has 2 GPU\(s\)"):
        _check_fits(ray, ResourcesConfig(gpus_per_fold=4.0))


def test_a_fold_must_fit_into_one_node_not_into_all_together():
    def node(cpus, gpus, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 9.0} | ({"GPU": gpus} if gpus else {})}

    nodes = [node(8.0, 0), node(2.0, 1.0), node(64.0, 8.0, alive=False)]
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 10.0, "GPU": 1.0}, nodes=lambda: nodes)
    _check_fits(cluster, ResourcesConfig(cpus_per_fold=8.0))
    _check_fits(cluster, ResourcesConfig(cpus_per_fold=2.0, gpus_per_fold=1.0))
    with pytest.raises(InputError, match=r"resources\.cpus_per_fold=9: no node has more than 8 CPU\(s\): no fold can"):
        _check_fits(cluster, ResourcesConfig(cpus_per_fold=9.0))
    with pytest.raises(InputError, match=r"cpus_per_fold=4, resources\.gpus_per_fold=0\.5: no single node has as many"):
        _check_fits(cluster, ResourcesConfig(cpus_per_fold=4.0, gpus_per_fold=0.5))


@pytest.mark.parametrize(
    ("quotas", "group", "expected"),
    [
        ({}, "0::/\n", 8),
        ({"": "max 100000"}, "0::/\n", 8),
        ({"": "250000 100000"}, "0::/\n", 2),
        ({"": "50000 100000"}, "0::/\n", 1),
        ({"": "max 100000", "job": "600000 100000", "job/step": "max 100000"}, "0::/job/step\n", 6),
        ({"": "300000 100000"}, "12:cpu:/somewhere\n", 3),
        ({"": "1600000 100000"}, "0::/\n", 8),
        ({"": "nonsense"}, "0::/../elsewhere\n", 8),
    ],
)
def test_cpus_are_those_that_affinity_and_quota_leave(tmp_path, monkeypatch, quotas, group, expected):
    """The CPUs of this machine are those that affinity and quota leave."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for folder, text in quotas.items():
        (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / folder / "cpu.max").write_text(text)
    (tmp_path / "own").write_text(group)
    assert usable_cpus(tmp_path / "cgroup", tmp_path / "own") == expected
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 8


# sweeps of the tiny store


@dataclass
class Swept:
    """A sweep's exit code and what it printed."""

    code: int
    text: str


@pytest.fixture(scope="module")
def run_sweep(ray):
    """Sweeps in this process, on this file's Ray instead of one of their own."""

    def run(config: Config, out: Path) -> Swept:
        text = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch.sweep, "ray_cluster", lambda address, resources: contextlib.nullcontext(ray))
            code = sweep(config, out, None, Console(file=text, width=80))
        return Swept(code, text.getvalue())

    return run


def changed(config: Config, **sections) -> Config:
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config


@pytest.fixture(scope="module")
def sweep_config(tiny_config) -> Config:
    return changed(
        tiny_config,
        train={"epochs": 6},
        score={"validation_subjects": 2},
        resources={"checkpoint_every": 2, "max_parallel_folds": 1},
    )


@pytest.fixture(scope="module")
def reference(run_sweep, sweep_config, tmp_path_factory) -> Path:
    """A finished run, one fold after the other. Do not change it."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = run_sweep(sweep_config, out)
    assert done.code == 0, done.text
    return out


def bytes_of(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def events_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_sweep_leaves_the_run_that_the_contract_describes(reference, sweep_config):
    summary = summary_of(reference)
    assert (summary["folds_total"], summary["folds_done"], summary["folds_failed"]) == (9, 9, [])
    assert summary["samples"] == 30
    assert list(summary["selections"]) == ["final", "validated", "test_selected"]
    assert list(summary["selections"]["final"]) == ["composite", "casme2", "samm", "smic"]
    lines = (reference / "predictions.csv").read_text().splitlines()
    assert lines[0] == "dataset,subject,clip,label,final,validated,test_selected"
    assert len(lines) == 31
    assert sorted(path.stem.replace("__", "/") for path in (reference / "folds").iterdir()) == ALL
    assert (reference / "report.html").stat().st_size > 1000
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["store_digest"] == open_store(Path(sweep_config.data.store)).digest
    kinds = [event["event"] for event in events_of(reference)]
    assert kinds == ["sweep_started", *["fold_done"] * 9, "sweep_finished"]
    # what only an unfinished fold needs is gone
    left = [path for name in ("checkpoints", "progress") for path in (reference / name).glob("*")]
    assert left == []


def test_two_folds_at_a_time_predict_the_same(reference, run_sweep, sweep_config, tmp_path):
    done = run_sweep(
        changed(sweep_config, resources={"max_parallel_folds": 2, "checkpoint_every": 0}), tmp_path / "run"
    )
    assert done.code == 0
    assert bytes_of(tmp_path / "run") == bytes_of(reference)
    one, other = (FoldRecord.read(run / "folds" / "samm__sub02.json") for run in (reference, tmp_path / "run"))
    assert (one.train_loss, one.final_logits) == (other.train_loss, other.final_logits)


def test_a_fold_whose_record_the_driver_does_not_find_has_failed(sweep_config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.sweep, "ray_cluster", lambda address, resources: contextlib.nullcontext())
    done = [FoldOutcome(fold=fold, seconds=1.0) for fold in ALL]
    monkeypatch.setattr(Scheduler, "run", lambda self, specs: [self.on_finish(outcome) for outcome in done])
    assert sweep(sweep_config, tmp_path / "run", None, Console(file=io.StringIO())) == 1
    failed = {item["fold"]: item["reason"] for item in summary_of(tmp_path / "run")["folds_failed"]}
    assert list(failed) == ALL
    record = tmp_path / "run" / "folds" / "smic__sub02.json"
    assert failed["smic/sub02"] == (
        f"its worker says that it is done, but {record} cannot be read: No such file or directory; "
        "RUN must lie on storage that all nodes share"
    )


def test_running_a_finished_sweep_again_trains_nothing(reference, run_sweep, sweep_config, tmp_path):
    before = bytes_of(reference)
    stamps = {path: path.stat().st_mtime_ns for path in (reference / "folds").iterdir()}
    assert run_sweep(sweep_config, reference).code == 0
    assert bytes_of(reference) == before
    assert {path: path.stat().st_mtime_ns for path in (reference / "folds").iterdir()} == stamps


def test_the_next_driver_removes_leftovers_of_finished_folds(reference, sweep_config, tmp_path):
    """Files that a kill left of a finished fold are removed by the next driver."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "checkpoints").mkdir(exist_ok=True)
    told = f"progress/samm__sub01.{'0f' * 16}.json"
    names = ("checkpoints/samm__sub01.pt", "checkpoints/.samm__sub01.pt.0f.tmp", told)
    for name in (*names, "checkpoints/samm__sub09.pt"):
        (run / name).write_bytes(b"left behind")
    assert sweep(sweep_config, run, None, Console(file=io.StringIO())) == 0
    left = [path.name for name in ("checkpoints", "progress") for path in (run / name).iterdir()]
    assert left == ["samm__sub09.pt"]  # of a fold without a record


def test_a_failed_fold_stops_no_other_and_can_be_mended(reference, run_sweep, sweep_config, tmp_path):
    """A failed fold is named, the rest is done, and the failed one can be mended."""
    run = tmp_path / "run [bold]"  # no mark-up for the terminal
    some = changed(sweep_config, data={"subjects": ("casme2/sub00", "smic/sub01")})
    done = run_sweep(some, run)
    assert done.code == 0
    assert summary_of(run)["folds_total"] == 2
    # the whole set goes on in the same folder; one fold finds a damaged checkpoint
    damaged = run / "checkpoints" / "samm__sub01.pt"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"half a checkpoint")
    done = run_sweep(sweep_config, run)
    assert done.code == 1
    assert f"{run}: 2 of 9 folds are done already; going on with the rest\n" in done.text
    summary = summary_of(run)
    assert (summary["folds_total"], summary["folds_done"], summary["samples"]) == (9, 8, 26)
    [failed] = summary["folds_failed"]
    assert failed["fold"] == "samm/sub01"
    assert f"{damaged.name}: damaged checkpoint" in failed["reason"]
    assert f"failed: samm/sub01: {failed['reason']}\n" in done.text  # one line, however narrow the log is
    assert "samm,sub01" not in (run / "predictions.csv").read_text()
    # rescoring keeps what is known of the failure
    before = bytes_of(run)
    rescore(run, Console(file=io.StringIO()))
    assert bytes_of(run) == before
    damaged.unlink()
    done = run_sweep(sweep_config, run)
    assert done.code == 0
    assert bytes_of(run) == bytes_of(reference)


def test_report_scores_a_run_again_to_the_same_numbers(reference, tmp_path, capsys):
    copy = tmp_path / "run"
    for path in reference.rglob("*"):
        if path.is_file() and path.name not in (*RESULTS, "report.html", ".lock"):
            target = copy / path.relative_to(reference)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert main(["report", str(copy)]) == 0
    assert bytes_of(copy) == bytes_of(reference)
    assert (copy / "report.html").is_file()
    # of a run whose driver was killed before it could write a summary, the open folds are known as well
    for path in (copy / "summary.json", copy / "folds" / "smic__sub02.json"):
        path.unlink()
    assert main(["report", str(copy)]) == 0
    assert (summary_of(copy)["folds_done"], summary_of(copy)["folds_total"]) == (8, 9)
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err


def write_config(config: Config, folder: Path) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(dump_config(config))
    return path


def test_a_second_driver_of_a_run_is_refused(sweep_config, tiny_store, tmp_path, capsys):
    path = write_config(sweep_config, tmp_path)
    with open_run(tmp_path / "run", sweep_config, tiny_store):
        assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("another process is running this sweep; wait for it or choose another --out")


def test_a_run_of_another_configuration_is_refused(reference, sweep_config, tiny_store, tmp_path, capsys):
    """The run of another configuration is refused, and its difference is named."""

    def content():
        return {path.name: path.read_bytes() for path in reference.iterdir() if path.is_file()}

    before = content()
    path = write_config(changed(sweep_config, train={"epochs": 7}), tmp_path)
    assert main(["sweep", str(path), "--out", str(reference)]) == 2
    assert "it differs in train.epochs; choose another --out" in capsys.readouterr().err
    assert content() == before
    # what cannot change a prediction may change
    other = changed(sweep_config, resources={"cpus_per_fold": 2.0}, data={"subjects": ("samm/sub00",)})
    with open_run(reference, other, tiny_store):
        pass


def test_a_folder_that_is_no_run_is_left_alone(sweep_config, tiny_store, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and not a run"), open_run(tmp_path, sweep_config, tiny_store):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with (
        pytest.raises(InputError, match="is a file; --out names a folder"),
        open_run(tmp_path / "thesis.tex", sweep_config, tiny_store),
    ):
        pass


def test_leftovers_of_a_killed_start_are_no_obstacle(sweep_config, tiny_store, tmp_path):
    """A folder that holds only a lock is no run. The files that a killed start leaves are no obstacle."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.c0ffee.tmp").touch()
    with open_run(tmp_path, sweep_config, tiny_store):
        pass
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(InputError, match="is not empty and not a run"), open_run(tmp_path, sweep_config, tiny_store):
        pass


@pytest.mark.parametrize("place", ["/proc/no/run", "/dev/null/run"])
def test_a_run_in_an_impossible_place_is_refused_in_one_line(sweep_config, tmp_path, capsys, place):
    assert main(["sweep", str(write_config(sweep_config, tmp_path)), "--out", place]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"htnet sweep: {place}: no run can be written there: ")


def test_more_than_one_gpu_for_a_fold_is_refused(sweep_config, tmp_path, capsys):
    path = write_config(changed(sweep_config, resources={"gpus_per_fold": 2.0}), tmp_path)
    for options in ([], ["--dry-run"]):
        assert main(["sweep", str(path), "--out", str(tmp_path / "run"), *options]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(
            "resources.gpus_per_fold=2: a fold trains on one device; set 1, or 1/k for k folds on a GPU"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_run_goes_on_without_file_locks_and_says_so(sweep_config, tmp_path, monkeypatch, code):
    """If files cannot be locked, the run goes on and says so."""

    def refuse(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("launch.run_folder.fcntl.flock", refuse)
    monkeypatch.setattr(launch.sweep, "_run_folds", lambda *_: ({}, False))
    text = io.StringIO()
    sweep(sweep_config, tmp_path / "run", None, Console(file=text))
    assert f"{tmp_path / 'run'}: no lock there ({os.strerror(code)}): nothing keeps a second driver" in text.getvalue()
    [event] = [event for event in events_of(tmp_path / "run") if event["event"] == "no_lock"]
    assert event["reason"] == os.strerror(code)


def test_the_environment_keeps_the_words_of_every_driver(sweep_config, tiny_store, tmp_path, monkeypatch):
    """The environment keeps the first driver's words and adds those of later ones."""
    run = tmp_path / "run"

    def drive_once(command: str, config: Config = sweep_config) -> dict:
        monkeypatch.setattr(sys, "argv", ["htnet", "sweep", command])
        with open_run(run, config, tiny_store):
            return json.loads((run / "environment.json").read_text())

    first = drive_once("a b.yaml")
    assert first["command"] == "htnet sweep 'a b.yaml'"
    assert first["store"] == str(tiny_store.path.resolve())
    assert "resumed" not in first
    second = drive_once("c.yaml")
    third = drive_once("d.yaml")
    assert {key: third[key] for key in first} == first
    assert [later["command"] for later in third["resumed"]] == ["htnet sweep c.yaml", "htnet sweep d.yaml"]
    assert third["resumed"][:1] == second["resumed"]
    # another configuration may take over what finished nothing, and starts the list anew
    assert "resumed" not in drive_once("e.yaml", changed(sweep_config, train={"epochs": 9}))
    (run / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json: is no JSON"):
        drive_once("f.yaml")


def test_the_environment_names_the_commit_of_a_checkout(tmp_path, monkeypatch):
    """The environment names the commit if the code is a checkout."""

    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr("launch.run_folder.__file__", str(tmp_path / "launch" / "run_folder.py"))
    assert checkout() == {}
    git("init")
    (tmp_path / "file").write_text("1")
    assert checkout() == {}  # no commit yet
    git("add", "file")
    git("commit", "-m", "why")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert checkout() == {"commit": commit, "modified": False}
    (tmp_path / "file").write_text("2")
    assert checkout() == {"commit": commit, "modified": True}
    monkeypatch.setenv("PATH", "")
    assert checkout() == {}


def test_the_signal_of_a_batch_system_is_an_interrupt(sweep_config, tmp_path, monkeypatch):
    """The signal of a batch system is an interrupt, though Ray takes it for itself."""

    @contextlib.contextmanager
    def like_rays(address, resources):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        yield None

    monkeypatch.setattr(launch.sweep, "ray_cluster", like_rays)
    monkeypatch.setattr(Scheduler, "run", lambda self, specs: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    text = io.StringIO()
    try:
        assert sweep(sweep_config, tmp_path / "run", None, Console(file=text, width=200)) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Interrupted with 0 of 9 folds done. The same command goes on from here." in text.getvalue()
    assert summary_of(tmp_path / "run")["folds_done"] == 0
    assert (tmp_path / "run" / "predictions.csv").read_text() == "dataset,subject,clip,label,final,test_selected\n"


def test_a_run_without_a_finished_fold_is_scored_as_such(sweep_config, tmp_path, tiny_store):
    with open_run(tmp_path / "run", sweep_config, tiny_store):
        finish_run(
            sweep_config,
            tmp_path / "run",
            [],
            folds_total=9,
            failed={"samm/sub00": "no luck"},
            console=Console(file=io.StringIO()),
        )
    summary = summary_of(tmp_path / "run")
    assert (summary["folds_done"], summary["folds_failed"]) == (0, [{"fold": "samm/sub00", "reason": "no luck"}])
    with pytest.raises(InputError, match="no finished fold yet"):
        rescore(tmp_path / "run", Console(file=io.StringIO()))


SIGNALLED = """
import os, signal, sys
from launch.cli import main
from launch.run_folder import RunFolder

def write_and_signal(run, kind, write=RunFolder.event, **facts):
    write(run, kind, **facts)
    if kind == "fold_done":
        (os.kill if name == "SIGKILL" else os.killpg)(os.getpid(), getattr(signal, name))

name = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
RunFolder.event = write_and_signal
sys.exit(main(sys.argv[1:]))
"""
"""The program, which gets a signal as soon as it has noted the end of a fold, however busy the machine is.

Ctrl-C counts even where a shell started the tests in the background, with SIGINT ignored.
"""


class CommandLine:
    """``htnet sweep`` as a program of its own, with a Ray of its own, as users start it."""

    def __init__(self, config: Path, out: Path, signalled: str | None) -> None:
        program = ["-m", "launch.cli"] if signalled is None else ["-c", SIGNALLED, signalled]
        command = [sys.executable, *program, "sweep", str(config), "--out", str(out)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def end(self) -> Swept:
        text, _ = self.process.communicate(timeout=240)
        return Swept(self.process.returncode, text)


@pytest.fixture
def start():
    """Starts :class:`CommandLine`; what a failed test leaves running is ended."""
    started: list[CommandLine] = []

    def begin(config: Path, out: Path, signalled: str | None = None) -> CommandLine:
        started.append(CommandLine(config, out, signalled))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_ends_like_an_undisturbed_one(reference, sweep_config, start, tmp_path):
    """A sweep that is killed and interrupted ends like one that was left alone."""
    run = tmp_path / "run"
    config = write_config(changed(sweep_config, resources={"max_parallel_folds": 2, "checkpoint_every": 1}), tmp_path)

    def finished() -> int:
        return len(list((run / "folds").glob("*.json")))

    assert start(config, run, "SIGKILL").end().code == -signal.SIGKILL
    assert not (run / "summary.json").exists()

    # Ctrl-C reaches every process of the terminal, Ray's too
    done = start(config, run, "SIGINT").end()
    count = finished()
    assert 2 <= count < 9
    assert done.code == 1, done.text
    assert f"Interrupted with {count} of 9 folds done. The same command goes on from here." in done.text
    assert "Traceback" not in done.text
    assert (summary_of(run)["folds_done"], summary_of(run)["folds_total"]) == (count, 9)

    done = start(config, run).end()
    assert done.code == 0, done.text
    assert f"{count} of 9 folds are done already; going on with the rest" in done.text
    assert bytes_of(run) == bytes_of(reference)
    assert [path for name in ("checkpoints", "progress") for path in (run / name).glob("*")] == []


# sweeps over a cluster that somebody else has started

TOKEN = "a-token-that-only-these-tests-know-of"


@dataclass
class Head:
    """A Ray head in processes of its own, with a home of its own; ``environment`` is that of a user there."""

    port: int
    client_port: int
    environment: dict[str, str]

    def sweep(self, address: str, config: Path, out: Path, *options: str, **environment: str) -> Swept:
        command = [sys.executable, "-m", "launch.cli", "sweep", str(config), "--out", str(out), "--address", address]
        done = subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return Swept(done.returncode, done.stdout)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def ray_head(home: Path, **environment: str):
    """``ray start --head`` on ports of its own; it is ended with everything that it started."""
    home.mkdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # on a busy machine a client's own server takes longer than the 30 seconds that Ray gives it
    patience = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120"}
    own = plain | patience | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    head = Head(free_port(), free_port(), own)
    sockets = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a path to a socket must be short
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={head.port}", f"--ray-client-server-port={head.client_port}"]
    command += ["--num-cpus=2", "--object-store-memory=80000000", "--include-dashboard=false", f"--temp-dir={sockets}"]
    log = home / "head.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=own | environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in log.read_text() or not listens(head.client_port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield head
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(sockets, ignore_errors=True)


def served(call):
    """The result of a command over ``ray://``, which is run again where Ray could not start the client's own server.

    Seen now and then on a busy machine; Ray gives no reason, and the command rightly says that no cluster answers.
    """
    for _ in range(2):
        done = call()
        if "Initialization failure from server" not in (done.text if isinstance(done, Swept) else done.stderr):
            return done
    return call()


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_over_a_cluster_predicts_the_same(reference, sweep_config, tmp_path):
    """A sweep over a running cluster predicts what one on this machine does."""
    config = write_config(changed(sweep_config, resources={"max_parallel_folds": 2}), tmp_path)
    with ray_head(tmp_path / "home", RAY_AUTH_MODE="disabled") as head:
        done = head.sweep(f"127.0.0.1:{head.port}", config, tmp_path / "run")
        assert done.code == 0, done.text
        assert bytes_of(tmp_path / "run") == bytes_of(reference)
        one = "data.subjects=[samm/sub01]"
        found = head.sweep("auto", config, tmp_path / "auto", "--set", one, RAY_ADDRESS=f"127.0.0.1:{head.port}")
        assert found.code == 0, found.text
        address = f"ray://127.0.0.1:{head.client_port}"
        client = served(lambda: head.sweep(address, config, tmp_path / "client", "--set", one))
        assert client.code == 0, client.text
        big = head.sweep(f"127.0.0.1:{head.port}", config, tmp_path / "big", "--set", "resources.cpus_per_fold=3")
        assert (big.code, big.text) == (
            2,
            "htnet sweep: resources.cpus_per_fold=3: the cluster has 2 CPU(s): no fold can run\n",
        )
    address = f"127.0.0.1:{head.port}"
    gone = head.sweep(address, config, tmp_path / "gone")
    assert (gone.code, gone.text) == (
        2,
        f"htnet sweep: --address {address}: no Ray cluster answers there: [Errno 111] Connection refused\n",
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_that_asks_for_a_token_gets_it(sweep_config, tmp_path):
    """A cluster that asks for a token gets it, and the lack of one is one line."""
    config = write_config(changed(sweep_config, data={"subjects": ("samm/sub01",)}), tmp_path)
    with ray_head(tmp_path / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        by_variable, by_file = tmp_path / "variable", tmp_path / "file"
        direct, client = f"127.0.0.1:{head.port}", f"ray://127.0.0.1:{head.client_port}"
        for address in (direct, client):
            without = head.sweep(address, config, tmp_path / "none")
            assert (without.code, without.text) == (
                2,
                f"htnet sweep: --address {address}: the cluster asks for a token: set RAY_AUTH_TOKEN to the one that "
                "its head was started with, or put it into ~/.ray/auth_token\n",
            )
            wrong = head.sweep(address, config, tmp_path / "none", RAY_AUTH_TOKEN=TOKEN[::-1])
            assert (wrong.code, wrong.text) == (
                2,
                f"htnet sweep: --address {address}: the cluster asks for a token, and that of RAY_AUTH_TOKEN is not "
                "its own\n",
            )
        done = served(lambda: head.sweep(client, config, by_variable, RAY_AUTH_TOKEN=TOKEN))
        assert done.code == 0, done.text
        own = tmp_path / "home" / ".ray" / "auth_token"
        own.parent.mkdir(exist_ok=True)
        own.write_text(TOKEN)
        done = head.sweep(direct, config, by_file)
        assert done.code == 0, done.text
        assert bytes_of(by_file) == bytes_of(by_variable)


def test_the_board_counts_what_is_done_in_flight_and_left(tmp_path, reference):
    records = [FoldRecord.read(path) for path in sorted((reference / "folds").iterdir())[:3]]
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, width=120, force_terminal=terminal, color_system=None)
        board = LiveBoard(console, total=24, done=records[:1], epochs=6, num_classes=3)
        with board:
            board.poll([Flight(spec=spec, moved=0.0, epoch=i - 1) for i, spec in enumerate(make_specs(tmp_path, 20))])
            console.print(board._render())
            board.finished(FoldOutcome(fold=records[1].fold, seconds=12.0), records[:2])
            board.finished(FoldOutcome(fold="casme2/s9", seconds=0.0, reason="no [luck]"), records[:2])
        board.poll([])
        console.print(board._render())
        shown = text.getvalue()
        assert not re.search(r"casme2/s0 .* epoch", shown)
        assert "1 waiting for a free place" in shown
        assert re.search(r"casme2/s4 .* epoch 3/6", shown)
        assert "and 3 more" in shown
        assert "fold casme2/s9 failed: no [luck]" in shown
        assert ("fold casme2/sub01 done in 12 s" in shown) != terminal
        assert re.search(
            r"2/24 folds  1 failed  running UF1 0\.\d{3} \(final epochs, 2 folds\)  left \d+:\d\d:\d\d", shown
        )


def test_time_left_is_reckoned_from_trained_epochs(tmp_path, reference, monkeypatch):
    """Time left is reckoned from the epochs that were trained, not from those that checkpoints held."""
    now = [1000.0]
    monkeypatch.setattr("launch.live.time.monotonic", lambda: now[0])
    records = [FoldRecord.read(path) for path in sorted((reference / "folds").iterdir())[:2]]
    specs = make_specs(tmp_path, 2)
    board = LiveBoard(Console(file=io.StringIO()), total=4, done=records[:1], epochs=100, num_classes=3)
    assert board._remaining() == "?"
    board.poll([Flight(spec=specs[0], moved=0.0, epoch=90, start=90), Flight(spec=specs[1], moved=0.0)])
    now[0] += 10
    assert board._remaining() == "?"  # 90 epochs found, none trained
    board.poll([Flight(spec=specs[0], moved=0.0, epoch=95, start=90), Flight(spec=specs[1], moved=0.0)])
    assert board._remaining() == "0:06:50"  # 2 s an epoch; 5 + 100 + 100 are left
    board.finished(FoldOutcome(fold=records[1].fold, seconds=20.0, resumed_epoch=90), records)
    board.poll([Flight(spec=specs[1], moved=0.0, epoch=0)])
    now[0] += 10
    assert board._remaining() == "0:06:40"  # 10 epochs in 20 s, 200 left


@pytest.mark.slow
def test_a_sweep_needs_no_home_and_names_a_tmpdir_too_long(reference, sweep_config, tmp_path):
    config, out = write_config(sweep_config, tmp_path), tmp_path / "run"
    long = tmp_path / ("x" * 115)
    command = [sys.executable, "-m", "launch.cli", "sweep", str(config), "--out", str(out)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    impossible = {"TMPDIR": str(long), "HOME": "/dev/null/x", "XDG_CACHE_HOME": "/proc/x"}
    done = subprocess.run(command, cwd=ROOT, env=plain | impossible, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"TMPDIR={long}: a shorter path is needed" in done.stderr
    assert bytes_of(out) == bytes_of(reference)
