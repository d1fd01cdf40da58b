"""Guarantees of a sweep: every fold once, whatever dies on the way, and a run that anyone can take up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray as installed_ray
from conftest import PATIENCE, ROOT
from rich.console import Console

import launch.commands.sweep
from htnet.config import Config
from htnet.config.plain import dump_config
from htnet.data.samples import Fold
from htnet.data.store.reader import open_store
from htnet.errors import InputError
from htnet.scoring.record import FoldRecord
from launch.cli import main
from launch.commands.report import finish_run, rescore
from launch.commands.sweep import sweep
from launch.pool import Flight, Pool
from launch.run.folder import open_run
from launch.screen import SweepBoard
from launch.tasks.fold import FoldOutcome, FoldSpec
from launch.tasks.group import FoldGroup

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
            patch.setattr(launch.commands.sweep, "ray_cluster", lambda address, needs: contextlib.nullcontext(ray))
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
        data={"validation_subjects": 2},
        resources={"checkpoint_minutes": 1e-9, "max_parallel_folds": 1},
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
        changed(sweep_config, resources={"max_parallel_folds": 2, "checkpoint_minutes": 0.0}), tmp_path / "run"
    )
    assert done.code == 0
    assert bytes_of(tmp_path / "run") == bytes_of(reference)
    one, other = (FoldRecord.read(run / "folds" / "samm__sub02.json") for run in (reference, tmp_path / "run"))
    assert (one.train_loss, one.final_logits) == (other.train_loss, other.final_logits)


def test_a_fold_whose_record_is_not_found_has_failed(sweep_config, tmp_path, monkeypatch):
    """A fold whose record the driver does not find has failed."""
    monkeypatch.setattr(launch.commands.sweep, "ray_cluster", lambda address, needs: contextlib.nullcontext())
    monkeypatch.setattr(
        Pool, "run", lambda self, specs: ((spec, FoldOutcome(fold=spec.name, seconds=1.0)) for spec in specs)
    )
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


def test_left_overs_of_a_finished_fold_go_with_the_next_driver(reference, sweep_config, tmp_path):
    """The next driver removes everything that a kill left of a finished fold."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "checkpoints").mkdir(exist_ok=True)
    dead, told = f".3.{'0f' * 16}.tmp/engine.pt", f"progress/samm__sub01.{'0f' * 16}.json"
    names = ("checkpoints/samm__sub01/2/engine.pt", f"checkpoints/samm__sub01/{dead}", told, "progress/odd.json")
    for name in (*names, "checkpoints/samm__sub09/2/engine.pt", f"checkpoints/samm__sub09/{dead}"):
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_bytes(b"left behind")
    assert sweep(sweep_config, run, None, Console(file=io.StringIO())) == 0
    left = [path.relative_to(run) for name in ("checkpoints", "progress") for path in (run / name).rglob("*.*")]
    assert left == [Path("checkpoints/samm__sub09/2/engine.pt")]  # of a fold without a record


def test_a_failed_fold_is_named_and_can_be_mended(reference, run_sweep, sweep_config, tmp_path):
    """A failed fold is named and the rest is done and it can be mended."""
    run = tmp_path / "run [bold]"  # no mark-up for the terminal
    some = changed(sweep_config, data={"subjects": ("casme2/sub00", "smic/sub01")})
    done = run_sweep(some, run)
    assert done.code == 0
    assert summary_of(run)["folds_total"] == 2
    # the whole set goes on in the same folder; one fold finds the snapshot of another run
    foreign = run / "checkpoints" / "samm__sub01" / "3"
    foreign.mkdir(parents=True)
    (foreign / "snapshot.json").write_text('{"format": 4, "identity": "another", "crc32": {}}')
    done = run_sweep(sweep_config, run)
    assert done.code == 1
    assert f"{run}: 2 of 9 folds are done already; going on with the rest\n" in done.text
    summary = summary_of(run)
    assert (summary["folds_total"], summary["folds_done"], summary["samples"]) == (9, 8, 26)
    [failed] = summary["folds_failed"]
    assert failed["fold"] == "samm/sub01"
    assert failed["reason"] == f"{foreign}: the snapshot belongs to another configuration; delete it to start again"
    assert f"failed: samm/sub01: {failed['reason']}\n" in done.text  # one line, however narrow the log is
    assert "samm,sub01" not in (run / "predictions.csv").read_text()
    # rescoring keeps what is known of the failure
    before = bytes_of(run)
    rescore(run, Console(file=io.StringIO()))
    assert bytes_of(run) == before
    shutil.rmtree(foreign)
    done = run_sweep(sweep_config, run)
    assert done.code == 0
    assert bytes_of(run) == bytes_of(reference)


def test_a_run_damaged_all_over_is_mended_by_its_command(reference, run_sweep, sweep_config, tmp_path):
    """A run that is damaged all over is mended by the same command."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    edited = json.loads((run / "folds" / "samm__sub01.json").read_text())
    edited["samples"][0]["label"] = (edited["samples"][0]["label"] + 1) % 3
    (run / "folds" / "samm__sub01.json").write_text(json.dumps(edited))
    (run / "environment.json").write_text('{"resumed": 7}')
    (run / "events.jsonl").write_bytes(b"\xff\xfe\n")
    (run / "progress" / f"samm__sub01.{'0f' * 16}.json").write_text("{}")
    done = run_sweep(sweep_config, run)
    assert done.code == 0, done.text
    assert bytes_of(run) == bytes_of(reference)
    lines = [line for line in done.text.splitlines() if "set aside as" in line]
    for line, name in zip(lines, ("events.jsonl", "environment.json", "folds/samm__sub01.json"), strict=True):
        assert line.startswith(str(run / name))
        assert (run / f"{name}.damaged-1").exists()
    assert [event["path"] for event in events_of(run) if event["event"] == "set_aside"] == [
        str(run / name) for name in ("events.jsonl", "environment.json", "folds/samm__sub01.json")
    ]


def test_a_damaged_snapshot_is_told_on_screen_and_in_events(reference, run_sweep, sweep_config, tmp_path):
    """The user learns of it, though the fold begins anew by itself and ends with the same record."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "folds" / "samm__sub01.json").unlink()
    snapshot = run / "checkpoints" / "samm__sub01" / "3"
    snapshot.mkdir(parents=True)
    (snapshot / "snapshot.json").write_text("{")
    done = run_sweep(sweep_config, run)
    assert done.code == 0, done.text
    assert bytes_of(run) == bytes_of(reference)
    [event] = [event for event in events_of(run) if event["event"] == "set_aside"]
    assert (event["path"], event["now"]) == (str(snapshot), "3.damaged-1")
    assert event["reason"].startswith(f"{snapshot}: damaged snapshot (JSONDecodeError")
    assert f"fold samm/sub01: {event['reason']}; set aside as 3.damaged-1\n" in done.text


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


def test_report_names_every_record_that_the_store_contradicts(reference, sweep_config, tmp_path, capsys):
    """Nothing is scored of a damaged run; where the store is not at hand, a line says that it was not asked."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    results = bytes_of(run)
    one, other = run / "folds" / "samm__sub01.json", run / "folds" / "smic__sub02.json"
    kept = one.read_bytes()
    record = FoldRecord.read(one)
    sample = replace(record.samples[0], label=(record.samples[0].label + 1) % 3)
    replace(record, samples=(sample, *record.samples[1:])).write(one)  # with the checksum of its content
    other.write_bytes(other.read_bytes().replace(b"smic", b"samm", 1))
    assert main(["report", str(run)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"htnet report: {one}") and "label" in first
    assert second.startswith(f"htnet report: {other}")
    assert bytes_of(run) == results
    one.write_bytes(kept)
    shutil.copy(reference / "folds" / other.name, other)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "store": str(tmp_path / "gone"), "resumed": []}))
    assert main(["report", str(run)]) == 0
    assert f"the records are not held against the store: {tmp_path / 'gone'}: no such store" in capsys.readouterr().out
    assert bytes_of(run) == results


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


def test_the_run_of_another_configuration_is_refused(reference, sweep_config, tiny_store, tmp_path, capsys):
    """The run of another configuration is refused and its difference named."""

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


def test_the_rest_of_a_killed_start_is_no_obstacle(sweep_config, tiny_store, tmp_path):
    """A folder that holds but a lock is no run and the rest of a killed start is no obstacle."""
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
def test_a_run_without_locks_goes_on_and_says_so(sweep_config, tmp_path, monkeypatch, code):
    """A file system without locks is said on the screen and in the events."""

    def refuse(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(launch.commands.sweep, "_run_folds", lambda *_: None)
    text = io.StringIO()
    sweep(sweep_config, tmp_path / "run", None, Console(file=text))
    assert f"{tmp_path / 'run'}: no lock there ({os.strerror(code)}): nothing keeps a second driver" in text.getvalue()
    [event] = [event for event in events_of(tmp_path / "run") if event["event"] == "no_lock"]
    assert event["reason"] == os.strerror(code)


def test_the_environment_keeps_every_drivers_words(sweep_config, tiny_store, tmp_path, monkeypatch):
    """The environment keeps the words of the first driver and adds those of later ones."""
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
    assert drive_once("f.yaml")["command"] == "htnet sweep f.yaml"
    assert (run / "environment.json.damaged-1").read_text() == "{"


def test_sigterm_is_an_interrupt_and_what_is_done_is_scored(sweep_config, tmp_path, monkeypatch, capsys):
    """Batch systems send SIGTERM before they kill; Ctrl-C does the same."""
    monkeypatch.setattr(launch.commands.sweep, "ray_cluster", lambda address, needs: contextlib.nullcontext())
    monkeypatch.setattr(Pool, "run", lambda self, specs: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", str(write_config(sweep_config, tmp_path)), "--out", str(tmp_path / "run")]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Interrupted with 0 of 9 folds done. Run the same command again to resume." in capsys.readouterr().out
    assert summary_of(tmp_path / "run")["folds_done"] == 0
    assert (tmp_path / "run" / "predictions.csv").read_text() == "dataset,subject,clip,label,final,test_selected\n"


def test_a_run_without_a_finished_fold_is_scored_as_such(sweep_config, tmp_path, tiny_store):
    with open_run(tmp_path / "run", sweep_config, tiny_store) as run:
        finish_run(
            sweep_config,
            run,
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
from launch.run.folder import RunFolder

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

    def __init__(
        self, config: Path, out: Path, *options: str, signalled: str | None, environment: dict[str, str] | None
    ) -> None:
        program = ["-m", "launch.cli"] if signalled is None else ["-c", SIGNALLED, signalled]
        command = [sys.executable, *program, "sweep", str(config), "--out", str(out), *options]
        self.out = out
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=environment,
        )  # fmt: skip

    def wait_for_a_fold(self) -> None:
        """Until this driver, not one before it, has seen a fold end."""
        deadline = time.monotonic() + PATIENCE
        before = len(self._events())
        while "fold_done" not in [event["event"] for event in self._events()[before:]]:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _events(self) -> list[dict]:
        return events_of(self.out) if (self.out / "events.jsonl").exists() else []

    def end(self) -> Swept:
        text, _ = self.process.communicate(timeout=PATIENCE)
        return Swept(self.process.returncode, text)


@pytest.fixture
def start():
    """Starts :class:`CommandLine`; what a failed test leaves running is ended."""
    started: list[CommandLine] = []

    def begin(
        config: Path, out: Path, *options: str, signalled: str | None = None, environment: dict[str, str] | None = None
    ) -> CommandLine:
        started.append(CommandLine(config, out, *options, signalled=signalled, environment=environment))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_ends_like_an_undisturbed_one(reference, sweep_config, start, tmp_path):
    """A sweep that is killed and interrupted ends like one that was left alone."""
    run = tmp_path / "run"
    config = write_config(
        changed(sweep_config, resources={"max_parallel_folds": 2, "checkpoint_minutes": 1e-9}), tmp_path
    )

    def finished() -> int:
        return len(list((run / "folds").glob("*.json")))

    assert start(config, run, signalled="SIGKILL").end().code == -signal.SIGKILL
    assert not (run / "summary.json").exists()

    # Ctrl-C reaches every process of the terminal, Ray's too
    done = start(config, run, signalled="SIGINT").end()
    count = finished()
    assert 2 <= count < 9
    assert done.code == 1, done.text
    assert f"Interrupted with {count} of 9 folds done. Run the same command again to resume." in done.text
    assert "Traceback" not in done.text
    assert (summary_of(run)["folds_done"], summary_of(run)["folds_total"]) == (count, 9)

    done = start(config, run).end()
    assert done.code == 0, done.text
    assert f"{count} of 9 folds are done already; going on with the rest" in done.text
    assert bytes_of(run) == bytes_of(reference)
    assert [path for name in ("checkpoints", "progress") for path in (run / name).glob("*")] == []


def descendants(pid: int, name: str) -> list[int]:
    """Find processes by the start of their names among those that a process has started, directly or not."""
    family = {pid}
    while True:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                own, _, rest = stat.read_text().rpartition(")")
                parents[int(stat.parent.name)] = (int(rest.split()[1]), own.partition("(")[2])
        more = {child for child, (parent, _) in parents.items() if parent in family} - family
        if not more:
            return [child for child in family if child in parents and parents[child][1].startswith(name)]
        family |= more


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_sweep_whose_ray_dies_is_scored_and_resumed(reference, sweep_config, start, tmp_path, part):
    """The death of a local raylet used up the attempts of 7 of 9 folds, that of the head ended the driver."""
    run = tmp_path / "run"
    config = write_config(changed(sweep_config, resources={"max_parallel_folds": 1}), tmp_path)
    driver = start(config, run)
    driver.wait_for_a_fold()
    os.kill(descendants(driver.process.pid, part)[0], signal.SIGKILL)
    done = driver.end()
    if part == "raylet":  # without its head a Ray of one machine may get to the end before anyone notices
        assert done.code == 1, done.text
    if done.code:
        [line] = [line for line in done.text.splitlines() if "the Ray cluster is gone" in line]
        assert line.startswith("Stopped: the Ray cluster is gone: ")
        assert line.endswith(" of 9 folds done. Run the same command again to resume.")
    assert "Traceback" not in done.text
    assert summary_of(run)["folds_failed"] == []
    assert summary_of(run)["folds_done"] == len(list((run / "folds").glob("*.json")))
    assert start(config, run).end().code == 0
    assert bytes_of(run) == bytes_of(reference)


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
            timeout=PATIENCE,
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
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text() or not listens(head.client_port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield head
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)  # it waits for a client that is not coming back
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(sockets, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
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
        client = head.sweep(address, config, tmp_path / "client", "--set", one)
        assert client.code == 0, client.text
        big = head.sweep(f"127.0.0.1:{head.port}", config, tmp_path / "big", "--set", "resources.cpus_per_fold=3")
        assert (big.code, big.text) == (
            2,
            "htnet sweep: resources.cpus_per_fold=3: no node has more than 2 CPU(s): no fold can run\n",
        )
    address = f"127.0.0.1:{head.port}"
    gone = head.sweep(address, config, tmp_path / "gone")
    assert (gone.code, gone.text) == (
        2,
        f"htnet sweep: --address {address}: no Ray cluster answers there: [Errno 111] Connection refused\n",
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
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
        done = head.sweep(client, config, by_variable, RAY_AUTH_TOKEN=TOKEN)
        assert done.code == 0, done.text
        own = tmp_path / "home" / ".ray" / "auth_token"
        own.parent.mkdir(exist_ok=True)
        own.write_text(TOKEN)
        done = head.sweep(direct, config, by_file)
        assert done.code == 0, done.text
        assert bytes_of(by_file) == bytes_of(by_variable)


def make_groups(folder: Path, count: int, epochs: int) -> list[FoldGroup]:
    config = changed(Config(), train={"epochs": epochs})
    specs = [
        FoldSpec(
            config=config,
            fold=Fold(subject=f"casme2/s{i}", train=(1,), test=(0,)),
            run_dir=folder,
            config_hash="x",
            attempt=1,
        )
        for i in range(count)
    ]
    return [FoldGroup(specs=(spec,)) for spec in specs]


def test_the_board_counts_what_is_done_in_flight_and_left(tmp_path, reference):
    records = [FoldRecord.read(path) for path in sorted((reference / "folds").iterdir())[:3]]
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, width=120, force_terminal=terminal, color_system=None)
        board = SweepBoard(console, total=24, done=records[:1], epochs=6)
        with board:
            board.poll([Flight(spec=spec, epoch=i - 1) for i, spec in enumerate(make_groups(tmp_path, 20, 6))])
            console.print(board.render())
            board.finished(FoldOutcome(fold=records[1].fold, seconds=12.0), records[1])
            board.finished(FoldOutcome(fold="casme2/s9", seconds=0.0, reason="no [luck]"), None)
        board.poll([])
        console.print(board.render())
        shown = text.getvalue()
        assert not re.search(r"casme2/s0 .* epoch", shown)
        assert "4 waiting for a free place" in shown  # of 24, 1 is done and 19 run
        assert re.search(r"casme2/s4 .* epoch 3/6", shown)
        assert "and 3 more" in shown
        assert "fold casme2/s9 failed: no [luck]" in shown
        assert ("fold casme2/sub01 done in 12 s" in shown) != terminal
        assert re.search(
            r"2/24 folds  1 failed  running UF1 0\.\d{3} \(final epochs, 2 folds\)  left \d+:\d\d:\d\d", shown
        )


def test_time_left_is_reckoned_from_what_was_trained(tmp_path, reference, monkeypatch):
    """Epochs that a checkpoint held took no time of this run."""
    now = [1000.0]
    monkeypatch.setattr("launch.screen.time.monotonic", lambda: now[0])
    records = [FoldRecord.read(path) for path in sorted((reference / "folds").iterdir())[:2]]
    specs = make_groups(tmp_path, 2, 100)
    board = SweepBoard(Console(file=io.StringIO()), total=4, done=records[:1], epochs=100)
    assert board._remaining() == "?"
    board.poll([Flight(spec=specs[0], epoch=90, start=90), Flight(spec=specs[1])])
    now[0] += 10
    assert board._remaining() == "?"  # 90 epochs found, none trained
    board.poll([Flight(spec=specs[0], epoch=95, start=90), Flight(spec=specs[1])])
    assert board._remaining() == "0:06:50"  # 2 s an epoch; 5 + 100 + 100 are left
    board.finished(FoldOutcome(fold=records[1].fold, seconds=20.0, resumed_epoch=90), records[1])
    board.poll([Flight(spec=specs[1], epoch=0)])
    now[0] += 10
    assert board._remaining() == "0:06:40"  # 10 epochs in 20 s, 200 left


@pytest.mark.slow
def test_a_sweep_needs_no_home_and_names_a_tmpdir_too_long(reference, sweep_config, tmp_path):
    config, out = write_config(sweep_config, tmp_path), tmp_path / "run"
    long = tmp_path / ("x" * 115)
    command = [sys.executable, "-m", "launch.cli", "sweep", str(config), "--out", str(out)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    impossible = {"TMPDIR": str(long), "HOME": "/dev/null/x", "XDG_CACHE_HOME": "/proc/x"}
    done = subprocess.run(command, cwd=ROOT, env=plain | impossible, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"TMPDIR={long}: a shorter path is needed" in done.stderr
    assert bytes_of(out) == bytes_of(reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_whose_client_loses_its_cluster_is_scored(sweep_config, start, tmp_path):
    """Over ``ray://`` this was a ConnectionError with a traceback."""
    run = tmp_path / "run"
    config = write_config(changed(sweep_config, train={"epochs": 60}, resources={"max_parallel_folds": 1}), tmp_path)
    with ray_head(tmp_path / "home", RAY_AUTH_MODE="disabled") as head:
        address = f"ray://127.0.0.1:{head.client_port}"
        driver = start(config, run, "--address", address, environment=head.environment)
        driver.wait_for_a_fold()
    done = driver.end()
    assert done.code == 1, done.text
    assert "Stopped: the Ray cluster is gone: " in done.text
    assert "Traceback" not in done.text
    assert summary_of(run)["folds_failed"] == []
