"""The ledger of a run: the only file that knows a path inside its folder, and what of it is damaged or left over.

A run belongs to one configuration and one store. Fold records make it resumable: what holds against both is done, and
whatever is damaged is set aside under another name, so that the same command does it again.
"""

from __future__ import annotations

import glob
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from htnet.config import Config
from htnet.config.load import load_config
from htnet.config.plain import config_hash, dump_config, identity_changes
from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.samples import Fold, fold_stem
from htnet.data.store.merged import open_stores
from htnet.data.store.reader import Store
from htnet.errors import InputError
from htnet.files import locked, read_json, remove_leftovers, set_aside, write_first, write_json, write_whole
from htnet.scoring.record import FoldRecord, check_record
from launch.run.environment import RunEnvironment, driver_environment, read_environment

_HEX = "[0-9a-f]" * 32
_FACTS = TypeAdapter(dict[str, str])


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The paths of a run; a fold is named by its subject, ``casme2/sub17``."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def machine(self) -> Path:
        """Facts of the machine of the first fold, which decide the last bits of all."""
        return self.path / "machine.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def challenge_log(self) -> Path:
        return self.path / "megc_log.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def folds(self) -> Path:
        return self.path / "folds"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def progress_folder(self) -> Path:
        return self.path / "progress"

    def record(self, fold: str) -> Path:
        """Return the file of a finished fold."""
        return self.folds / f"{fold_stem(fold)}.json"

    def model(self, fold: str) -> Path:
        """Return the model folder of a finished fold, where models are kept."""
        return self.path / "models" / fold_stem(fold)

    def checkpoint(self, fold: str) -> Path:
        """Return the folder of an unfinished fold's snapshots."""
        return self.checkpoints / fold_stem(fold)

    def progress(self, fold: str, submission: str) -> Path:
        """Return the file in which one submission of a fold tells how far it is; ``submission`` is 32 hex digits."""
        return self.progress_folder / f"{fold_stem(fold)}.{submission}.json"

    def event(self, kind: str, **facts: object) -> None:
        """Append a line to ``events.jsonl``."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, default=str)
        self._append(line + "\n")

    def _append(self, text: str) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(text)

    def set_aside(self, path: Path, reason: str) -> str:
        """Rename a damaged file or folder of the run and note it as an event; returns a line that says so."""
        aside = set_aside(path, reason)
        self.event("set_aside", **asdict(aside))
        return str(aside)

    def settle_machine(self, here: Mapping[str, str]) -> dict[str, str]:
        """Return the deciding facts of the machine of the run's first fold: ``here``, where this is the first."""
        write_first(self.machine, json.dumps(dict(here), indent=1) + "\n")
        return _read_facts(self.machine)

    def remove_leftovers(self, fold: str) -> None:
        """Remove what only an unfinished fold needs, that of workers which died, too.

        The driver does it once more for folds with a record: a worker may have been killed between record and here.
        """
        shutil.rmtree(self.checkpoint(fold), ignore_errors=True)
        stem = glob.escape(fold_stem(fold))  # a subject may be called s[12], another s1.b beside s1
        told = self.progress_folder.glob(f"{stem}.{_HEX}.json")
        for path in (*told, *self.progress_folder.glob(f".{stem}.{_HEX}.json.{_HEX}.tmp")):
            path.unlink(missing_ok=True)

    def is_begun(self) -> bool:
        """Tell if any fold has a record or a checkpoint; before, a run binds nobody."""
        return any(self.folds.glob("*.json")) or any(path.is_file() for path in self.checkpoints.rglob("*"))


@dataclass(frozen=True, kw_only=True)
class CheckedRun(RunFolder):
    """A run beside its configuration and its store, against which its records are held."""

    configuration: Config
    store: Store
    config_hash: str

    @cached_property
    def _folds_of_store(self) -> dict[str, Fold]:
        folds = loso_folds(self.store, datasets=self.configuration.data.datasets)
        return {fold.subject: fold for fold in folds}

    def read_record(self, path: Path) -> FoldRecord:
        """Read a record and hold it against store and configuration.

        Raises:
            InputError: it is missing, damaged, changed, or of other samples, labels, epochs or another configuration.
        """
        record, config, samples = FoldRecord.read(path), self.configuration, self.store.samples
        fold = self._folds_of_store.get(record.fold)
        if fold is None or self.record(record.fold) != path:
            raise InputError(f"{path}: holds fold {record.fold}, which is not the subject that this file belongs to")
        count = config.data.validation_subjects
        inner = validation_subjects(self.store, fold, count, config.seed) if count else ()
        check_record(
            record,
            str(path),
            config_hash=self.config_hash,
            epochs=config.train.epochs,
            test=[samples[row] for row in fold.test],
            validation=[samples[row] for row in fold.train if samples[row].subject in inner],
        )
        return record

    def read_records(self) -> list[FoldRecord]:
        """Read all records, sorted by fold; changes nothing.

        Raises:
            InputError: a line for each record that does not hold, as of :meth:`read_record`.
        """
        records, damage = [], []
        for path in sorted(self.folds.glob("*.json")):
            try:
                records.append(self.read_record(path))
            except InputError as error:
                damage.append(str(error))
        if damage:
            raise InputError("\n".join(damage))
        return sorted(records, key=lambda record: record.fold)


@dataclass(frozen=True, kw_only=True)
class OpenRun(CheckedRun):
    """A run that this process drives."""

    unlocked: str | None = None
    """Reason for which nothing keeps a second driver out; None where this process holds the lock."""
    damage: list[str] = field(default_factory=list)
    """A line for everything that was damaged and is set aside now."""

    def records(self) -> dict[str, FoldRecord]:
        """Return the records by subject; those that do not hold are set aside, left-overs of the others removed."""
        records = {}
        for path in sorted(self.folds.glob("*.json")):
            try:
                record = self.read_record(path)
            except InputError as error:
                self.damage.append(self.set_aside(path, str(error)))
            else:
                records[record.fold] = record
                self.remove_leftovers(record.fold)
                if "decides" in record.environment and not self.machine.exists():
                    self.settle_machine(record.environment["decides"])
        return records

    def mend(self) -> None:
        """Set aside what of the run's own notes is damaged, and remove what dead drivers and workers left."""
        for folder in (self.path, self.folds, self.progress_folder, self.checkpoints, *self.checkpoints.glob("*/")):
            remove_leftovers(folder, owned=self.unlocked is None)
        for path in self.progress_folder.glob("*.json"):
            path.unlink(missing_ok=True)
        self._mend_events()
        for path, read in ((self.environment, read_environment), (self.machine, _read_facts)):
            try:
                if path.exists():
                    read(path)
            except InputError as error:
                self.damage.append(self.set_aside(path, str(error)))
        if not self.is_begun():
            self.machine.unlink(missing_ok=True)

    def _mend_events(self) -> None:
        try:
            text = self.events.read_bytes().decode()
        except FileNotFoundError:
            return
        except UnicodeDecodeError as error:
            self.damage.append(self.set_aside(self.events, f"{self.events} is no text in UTF-8: {error.reason}"))
            return
        if text and not text.endswith("\n"):  # a kill cut the last line short
            self._append("\n")


@contextmanager
def open_run(path: Path, config: Config, store: Store) -> Iterator[OpenRun]:
    """Create or take up a run's folder; only one process at a time drives it, where its file system has locks.

    Where it has none, the run goes on without: folds are idempotent and files appear whole, so a second driver would
    waste time and spoil nothing. ``events.jsonl`` and :attr:`OpenRun.unlocked` then name the reason.

    Raises:
        InputError: the folder cannot be made, belongs to another configuration or store, is something else than a run,
            or another process drives it.
    """
    check_run(path, config, store)
    run = RunFolder(path=path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.lock.open("a").close()  # says at once if nothing can be written there
    except OSError as error:
        raise InputError(f"{path}: no run can be written there: {error.filename}: {error.strerror}") from None
    with locked(run.lock, f"{path}: another process is running this sweep; wait for it or choose another --out") as why:
        identity = check_run(path, config, store)  # once more under the lock
        opened = OpenRun(path=path, configuration=config, store=store, config_hash=identity, unlocked=why)
        opened.mend()
        write_whole(run.config, dump_config(config))
        write_json(run.environment, _environment(run, identity, store))
        run.folds.mkdir(exist_ok=True)
        run.progress_folder.mkdir(exist_ok=True)
        if why is not None:
            run.event("no_lock", asked="a lock on .lock", taken="none: keep a second driver away", reason=why)
        yield opened


def find_store(path: Path) -> CheckedRun:
    """Return a run beside the store that its last driver read. Changes nothing.

    Raises:
        InputError: the store is not there or damaged, or it or the configuration is another than the run's.
    """
    run = RunFolder(path=path)
    config, known = load_config(run.config), _known_environment(run)
    drivers = [dict(known), *known.get("resumed", [])]
    store = open_stores(drivers[-1].get("store", config.data.store))
    identity = config_hash(config, store.digest)
    if identity != known.get("config_hash", _identity_of_records(run)):
        raise InputError(f"{store.path}: another store, or {run.config} another configuration, than the run's")
    return CheckedRun(path=path, configuration=config, store=store, config_hash=identity)


def check_run(path: Path, config: Config, store: Store) -> str:
    """Return the identity of the run, if a run with this configuration and store may live in ``path``.

    Changes nothing.

    Raises:
        InputError: the folder belongs to another configuration or store, or is no run.
    """
    run = RunFolder(path=path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; --out names a folder")
    if path.is_dir() and not run.config.exists() and any(not _is_startup_leftover(item) for item in path.iterdir()):
        raise InputError(f"{path}: is not empty and not a run; choose another --out")
    identity = config_hash(config, store.digest)
    if not run.config.exists() or not run.is_begun():
        return identity
    known = _known_environment(run)
    if known.get("config_hash", _identity_of_records(run) or identity) == identity:
        return identity
    changed = identity_changes(load_config(run.config), config)
    if changed:
        what = f"it differs in {', '.join(changed)}"
    elif known.get("store_digest") != store.digest:
        what = f"the content of the store {store.path} differs"
    else:
        what = "another version of htnet made it"
    raise InputError(f"{path}: this run belongs to another configuration: {what}; choose another --out")


def _is_startup_leftover(item: Path) -> bool:
    """Tell if a driver that was killed at its start leaves this behind."""
    return item.name == ".lock" or (item.name.startswith(".") and item.name.endswith(".tmp"))


def _known_environment(run: RunFolder) -> RunEnvironment:
    """Read the environment of an earlier driver, empty where there is none that can be understood."""
    with suppress(InputError):
        return read_environment(run.environment)
    return {}


def _identity_of_records(run: RunFolder) -> str | None:
    for path in sorted(run.folds.glob("*.json")):
        with suppress(InputError):
            return FoldRecord.read(path).config_hash
    return None


def _environment(run: RunFolder, identity: str, store: Store) -> dict[str, Any]:
    """Return ``environment.json``: the first driver's facts, and under ``resumed`` those of each later one."""
    now = {"store": store.address, **driver_environment()}
    known = _known_environment(run)
    if known.get("config_hash") == identity:
        return {**known, "resumed": [*known.get("resumed", []), now]}
    return {"config_hash": identity, "store_digest": store.digest, "store_recipe": store.recipe, **now}


def _read_facts(path: Path) -> dict[str, str]:
    return read_json(path, _FACTS, "list of a machine's facts")
