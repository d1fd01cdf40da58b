"""Folders of datasets as they lie on disks: names that differ in case or blanks, and traces of other programs."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_TRACES = re.compile(
    r"\..*|__MACOSX|__pycache__|lost\+found"  # hidden ones, archives packed on a Mac, Python, checks of a disk
    r"|@.*|#recycle|#snapshot|~snapshot"  # boxes of Synology, QNAP and NetApp
    r"|Network Trash Folder|Temporary Items|TheVolumeSettingsFolder|TheFindByContentFolder|Icon\r"  # servers of Macs
    r"|\$RECYCLE\.BIN|RECYCLE[RD]|FOUND\.\d{3}|System Volume Information"  # Windows
    r"|Thumbs\.db|ehthumbs.*\.db|desktop\.ini"
    r"|~.*|.*~|.*\.(?:swp|tmp|bak|part|crdownload)",  # editors, office programs, downloads
    re.IGNORECASE,
)


def is_trace(name: str) -> bool:
    """Tell by its name that a file or folder was left by an operating system, a storage box or an editor."""
    return _TRACES.fullmatch(name) is not None


def entries_of(folder: Path) -> Iterator[Path]:
    """Yield what a folder holds, in the disk's order, but for the traces of other programs."""
    with os.scandir(folder) as entries:  # a recording may have thousands of frames, of which one is asked for
        for entry in entries:
            if not is_trace(entry.name):
                yield Path(entry.path)


def spelled(path: Path) -> list[Path]:
    """Find a path as the disk spells it: datasets say spNO in one place and spNo in another.

    Names are equal that differ in case, in blanks at their ends and in how an accent is composed.

    Returns:
        The path itself where it exists and is not empty, else those that are there, sorted.
    """
    try:
        if path.exists() and not (path.is_dir() and is_empty(path)):
            return [path]
        parents = [path.parent] if path.parent.exists() or path.parent == path else spelled(path.parent)
        wanted = same_name(path.name)
        folders = [parent for parent in parents if parent.is_dir()]
        return sorted(entry for folder in folders for entry in entries_of(folder) if same_name(entry.name) == wanted)
    except OSError:  # a name that no disk can hold
        return []


def same_name(name: str) -> str:
    """Fold a name to what is compared: composed accents, small letters, no blanks at the ends."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def is_empty(folder: Path) -> bool:
    """Tell if a folder holds nothing but the traces of other programs."""
    return next(entries_of(folder), None) is None
