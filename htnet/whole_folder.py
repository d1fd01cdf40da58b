"""A folder that appears whole: written beside its place under another name, then renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htnet.errors import InputError

__all__ = ["whole_folder"]


@contextmanager
def whole_folder(place: Path, *, last: str = "") -> Iterator[Path]:
    """A new folder to write into, which becomes ``place`` when the block ends, or is gone when it raises.

    What killed writers left is removed first. Writers hold a lock on their folder, so that the work of one that is
    alive stays; where the file system has no locks nobody can tell, and it stays as well.

    Args:
        place: absent, or an empty folder. The working folder gets the content moved into it instead of being replaced,
            which would leave the user's shell in a folder that is no more.
        last: name of the item that is moved last there, for it says that all is there.

    Raises:
        InputError: something that cannot be replaced is at ``place``.
    """
    target = place.resolve()  # "." has no name to put another beside
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    partial, lock = _new_folder(target)
    try:
        yield partial
        _put(partial, target, place, last)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _new_folder(target: Path) -> tuple[Path, int]:
    """A folder beside ``target`` and its lock.

    Between the two another writer may take the folder for an abandoned one: then it is gone, or soon will be.
    """
    while True:
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        held = _lock(lock)
        if held is None or (held and partial.is_dir()):  # without locks nobody removes anything
            return partial, lock
        os.close(lock)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.tmp"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # renamed meanwhile, or not ours to read
            continue
        try:
            if _lock(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(folder: int) -> bool | None:
    """Whether the lock could be had; None where the file system has no locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _put(partial: Path, target: Path, place: Path, last: str) -> None:
    try:
        if target == Path.cwd():
            for item in sorted(partial.iterdir(), key=lambda item: item.name == last):
                item.rename(target / item.name)
        else:
            partial.rename(target)
    except OSError as error:
        raise InputError(f"{place}: cannot be replaced by the data: {error.strerror}; name another folder") from None
