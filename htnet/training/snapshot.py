"""Snapshots of a training on disk: everything on which the rest of it depends.

PLACE/<steps>/ is a snapshot, a folder that appears whole: ``trainer.json`` (the trainer's results and the state of its
source), ``random.pt`` (torch's default generators of each rank), the files of the engine, and ``snapshot.json`` with a
checksum of each. Older snapshots are removed when the next one is there, so that a kill at any moment leaves one of
them. Of several ranks, the first writes.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htnet.errors import InputError
from htnet.files import SetAside, set_aside, whole_folder
from htnet.training.state_file import read_tensors
from htnet.training.trainer import Trainer
from htnet.training.world import ALONE, World

__all__ = ["Snapshot", "Snapshots"]

_FORMAT = 4
_MANIFEST = "snapshot.json"
_TRAINER = "trainer.json"
_RANDOM = "random.pt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot on disk, whole and of this training."""

    folder: Path
    source: bytes
    """State of the trainer's source."""
    trainer: dict[str, Any]

    def restore(self, trainer: Trainer, rank: int = 0) -> None:
        """Put trainer, engine and torch's default generators into the state that was saved.

        A rank that the saved training did not have keeps its generators.
        """
        trainer.engine.load(self.folder)
        trainer.load_state(self.trainer)
        states = read_tensors(self.folder / _RANDOM)
        if rank >= len(states):
            return
        random = states[rank]
        torch.set_rng_state(random["cpu"])
        if random["device"] is not None and trainer.engine.device.type == "cuda":
            torch.cuda.set_rng_state(random["device"], trainer.engine.device)


class Snapshots:
    """Snapshots of one training, taken at intervals and written by a thread beside it.

    Args:
        place: folder for this training's snapshots alone; made when the first is written.
        identity: identity of the training; a snapshot of another is refused.
        minutes: least time between two snapshots, and before the first; 0: none are taken.
        keep: number of the newest snapshots that stay.
        world: the processes of the training; all of them call :meth:`newest`, :meth:`save` and
            :meth:`save_when_due`, and see the same storage.
    """

    def __init__(self, place: Path, *, identity: str, minutes: float, keep: int = 1, world: World = ALONE) -> None:
        self._place, self._identity, self._minutes = place, identity, minutes
        self._keep, self._world = keep, world
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def newest(self, damage: list[SetAside]) -> Snapshot | None:
        """Return the newest whole snapshot; rename damaged ones, log them and add them to ``damage``.

        Raises:
            InputError: it belongs to another training, or another version of htnet wrote it.
        """
        if self._world.rank:
            chosen = self._world.tell(None)
            return None if chosen is None else _read(Path(chosen), self._identity)
        found = self._newest_whole(damage)
        self._world.tell(None if found is None else str(found.folder))
        return found

    def _newest_whole(self, damage: list[SetAside]) -> Snapshot | None:
        for folder in reversed(self._folders()):
            try:
                return _read(folder, self._identity)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                damage.append(set_aside(folder, f"{folder}: damaged snapshot ({_described(error)})"))
                _log.warning("%s", damage[-1])
        return None

    def save_when_due(self, trainer: Trainer) -> None:
        """Save if enough time has passed and epochs are left; raise the error of the last writing, if any."""
        if not self._minutes or trainer.finished:
            return
        if self._world.tell(time.monotonic() - self._last >= 60 * self._minutes):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Copy the training's state and write it beside the training."""
        self.wait()
        self._last = time.monotonic()
        self._writing = self._writer.submit(self._copied(trainer))

    def wait(self) -> None:
        """Wait for the writer and raise its error, if any."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the writer and log its error, if any: the training is over, well or ill."""
        try:
            self.wait()
        except Exception as error:
            _log.warning("%s: the last snapshot was not written: %s", self._place, _described(error))
        self._writer.shutdown()

    def _folders(self) -> list[Path]:
        """Return the snapshots' folders, oldest first."""
        found = [path for path in self._place.glob("*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def _copied(self, trainer: Trainer) -> Callable[[], None]:
        """Copy the training's state; return the function that writes the copy."""
        folder = self._place / str(trainer.steps)
        random = self._world.collect(_random_state(trainer.engine.device))
        if self._world.rank:
            trainer.engine.save(folder)  # it gives the first rank what it alone has
            return lambda: None
        noted = json.dumps({"source": trainer.source.state().hex(), "trainer": trainer.state()})
        with ExitStack() as stack:
            partial = stack.enter_context(whole_folder(folder, sync=True))
            write_engine = trainer.engine.save(partial)
            whole = stack.pop_all()

        def fill() -> None:
            with whole:
                write_engine()
                torch.save(random, partial / _RANDOM)
                (partial / _TRAINER).write_text(noted, encoding="utf-8")
                manifest = {"format": _FORMAT, "identity": self._identity, "crc32": _checksums(partial)}
                (partial / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

        def write() -> None:
            try:
                fill()
            except InputError:
                if not folder.is_dir():  # otherwise another process with the same training was faster
                    raise
            older = [path for path in self._folders() if int(path.name) < int(folder.name)]
            for path in older[: max(0, len(older) - self._keep + 1)]:
                shutil.rmtree(path, ignore_errors=True)

        return write


def _read(folder: Path, identity: str) -> Snapshot:
    """Read a snapshot and verify it; an error other than InputError means that it is damaged."""
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    for key, known, rule in (
        ("format", _FORMAT, "the snapshot was written by another version of htnet"),
        ("identity", identity, "the snapshot belongs to another configuration"),
    ):
        if manifest[key] != known:
            raise InputError(f"{folder}: {rule}; delete it to start again")
    found = _checksums(folder)
    for name, expected in manifest["crc32"].items():
        if found.get(name) != expected:
            raise ValueError(f"{name} is not as it was written")
    noted = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
    return Snapshot(folder=folder, source=bytes.fromhex(noted["source"]), trainer=noted["trainer"])


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of every file but the manifest, by its path in the folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: _checksum(folder / name) for name in names if name != _MANIFEST}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def _random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's default generators: the CPU's, and the device's if it is another."""
    on_gpu = device.type == "cuda"
    return {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state(device) if on_gpu else None}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
