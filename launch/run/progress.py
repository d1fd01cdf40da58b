"""Progress of a task: a small file per submission, written by its worker and read by the driver."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from htnet.files import write_json

PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """Finished epochs of a task, and the number of them that its worker found in a checkpoint."""

    epoch: int
    start: int


@dataclass
class ProgressWriter:
    """Writer on the worker's side; it writes at most once a second."""

    path: Path
    start: int
    _last: float = field(default=0.0, init=False)

    def write(self, epoch: int, *, force: bool = False) -> None:
        """Replace the file, unless it is less than a second old and ``force`` is not set."""
        if not force and time.monotonic() - self._last < PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, asdict(Progress(epoch=epoch, start=self.start)))


def read_progress(path: Path) -> Progress | None:
    """Read one file; return None if there is none, or if it cannot be understood."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return Progress(epoch=int(state["epoch"]), start=int(state["start"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class ProgressReader:
    """Reader on the driver's side: one scan of a folder per look; only changed files are read again."""

    _known: dict[Path, tuple[tuple[int, int], Progress | None]] = field(default_factory=dict, init=False)

    def look(self, folders: Iterable[Path]) -> dict[Path, Progress | None]:
        """Return the progress by file; None for a file that cannot be understood, no entry for a missing file."""
        now: dict[Path, tuple[tuple[int, int], Progress | None]] = {}
        for folder in folders:
            for path, stamp in _files(folder):
                known = self._known.get(path)
                now[path] = known if known and known[0] == stamp else (stamp, read_progress(path))
        self._known = now
        return {path: progress for path, (_, progress) in now.items()}


def _files(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """List the progress files of a folder with inode and time of change, which a replacement does not share."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    try:
                        state = entry.stat()
                    except FileNotFoundError:  # its task has just ended
                        continue
                    found.append((Path(entry.path), (state.st_ino, state.st_mtime_ns)))
    except FileNotFoundError:  # no task has started
        pass
    return found
