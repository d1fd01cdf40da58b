"""Files and folders that appear whole, and locks; no other file of the project renames, locks or removes leftovers.

Content is written beside its place as ``.<name>.<32 hex digits>.tmp`` and renamed. Meanwhile the writer holds a lock on
it, by which :func:`remove_leftovers` tells the work of a living writer from the leftovers of a killed one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from htnet.errors import DiskFullError, InputError

T = TypeVar("T")
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_TEMPORARY = f".{'[0-9a-f]' * 32}.tmp"


def checksum(*paths: Path) -> str:
    """Return the SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes, *, beside: Path | None = None) -> None:
    """Replace ``path`` by ``content`` (a text in UTF-8); a kill at any moment leaves the old file or the new one.

    Args:
        beside: folder of the temporary file, on the same file system; by default that of ``path``.

    Raises:
        DiskFullError: no space is left; names ``path``.
        OSError: the file cannot be written; names it as well.
    """
    with _temporary_file(path, content, beside) as temporary:
        temporary.replace(path)


def write_first(path: Path, content: str) -> bool:
    """Write ``path`` whole unless it exists; return False if it does. Of several writers exactly one is the first."""
    with _temporary_file(path, content) as temporary:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            temporary.replace(path)
    return True


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON by :func:`write_whole`; a float that is NaN or infinite is a ValueError."""
    write_whole(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_json(path: Path, kind: TypeAdapter[T], name: str) -> T:
    """Read a JSON file that holds a value of a known kind; ``name`` is the kind in words.

    Raises:
        InputError: the file is missing, cannot be read or holds another kind; names file, place and rule.
    """
    try:
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        rule = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise InputError(f"{path} is no valid {name}: {rule}") from error


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV; a text that a spreadsheet would run as a formula gets an apostrophe before it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


@contextmanager
def whole_folder(place: Path, *, last: str = "", sync: bool = False) -> Iterator[Path]:
    """Yield a new folder to write into; it becomes ``place`` when the block ends, and is removed if the block raises.

    Args:
        place: absent, or an empty folder. The working folder is not replaced, which would leave the user's shell in a
            removed folder; the content is moved into it.
        last: name of the item that is moved last there, as the sign that all is there.
        sync: put the content on the disk before the folder appears, so that it is whole even after a loss of power.

    Raises:
        InputError: ``place`` holds something that cannot be replaced.
        DiskFullError: no space is left for the content.
    """
    target = place.resolve()  # "." has no name that a temporary one could be made from
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    partial, lock = _claim(target, Path.mkdir)
    try:
        with full_disk_named(place):
            yield partial
            if sync:
                _sync_tree(partial)
        _put(partial, target, place, last)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def move_folder(folder: Path, place: Path) -> None:
    """Rename a finished folder, so that ``place`` appears whole or not at all, even after a loss of power."""
    with full_disk_named(place):
        _sync_tree(folder)
        folder.rename(place)
    _sync_names(place.parent)


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A damaged file or folder that bears another name now."""

    path: str
    now: str
    """Its new name, in the same folder."""
    reason: str
    """The damage, in words that name the file."""

    def __str__(self) -> str:
        return f"{self.reason}; set aside as {self.now}"


def set_aside(path: Path, reason: str) -> SetAside:
    """Rename a damaged file or folder to ``<name>.damaged-N`` beside it, N the first free number."""
    numbers = iter(range(1, 1_000_000))
    aside = next(one for n in numbers if not os.path.lexists(one := path.with_name(f"{path.name}.damaged-{n}")))
    path.rename(aside)
    return SetAside(path=str(path), now=aside.name, reason=reason)


def remove_leftovers(folder: Path, name: str | None = None, *, owned: bool = False) -> None:
    """Remove from ``folder`` the temporary files and folders of dead writers; never raise.

    Args:
        name: only those of a writer of this name.
        owned: the caller holds the lock under which all writers work. Then remove also files and folders that may be a
            living writer's, because the file system has no locks (or, as NFS, none on folders).
    """
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}{_TEMPORARY}"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:  # renamed meanwhile, or not readable for this user
            continue
        try:
            free = _try_lock(lock)
        except OSError:
            free = owned
        if free:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[str | None]:
    """Hold the lock ``path``, a file that is removed afterwards.

    Yields the reason if the file system has no locks, else None. A kill frees the lock and leaves the file, which does
    not hinder the next holder.

    Raises:
        InputError: another process holds it; ``busy`` is the message.
    """
    with path.open("a") as lock:
        unlocked = None
        try:
            # the holder before us removes the file when it ends: a lock on the removed one guards nothing
            held = _try_lock(lock.fileno()) and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except FileNotFoundError:
            held = False
        except OSError as error:
            held, unlocked = True, error.strerror
        if not held:
            raise InputError(busy)
        try:
            yield unlocked
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn any error of a full disk while writing ``path`` into one error that says so and names the file.

    ``write`` and ``fsync`` do not know the name. torch.save hides the system's error behind an ``unexpected pos`` of
    its own, which has it as context.

    Raises:
        DiskFullError: in place of any exception caused by a full disk or an exhausted quota.
    """
    try:
        yield
    except DiskFullError:  # the error names a file already
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _DISK_IS_FULL:
                full = "no space left on the device" if cause.errno == errno.ENOSPC else os.strerror(errno.EDQUOT)
                raise DiskFullError(cause.errno, full, str(path)) from error
            cause = cause.__context__
        raise


@contextmanager
def _temporary_file(path: Path, content: str | bytes, beside: Path | None = None) -> Iterator[Path]:
    """Yield a synced file with the content; it is removed when the block ends, unless it was renamed."""
    data = content.encode() if isinstance(content, str) else content
    temporary, lock = _claim((beside or path.parent) / path.name, Path.touch)
    try:
        with full_disk_named(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_names(path.parent)
    finally:
        os.close(lock)
        temporary.unlink(missing_ok=True)


def _claim(target: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a temporary file or folder beside ``target``; return it and a descriptor that holds its lock.

    Between the two steps another process may take it for a leftover and remove it.
    """
    while True:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        create(temporary)
        try:
            lock = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if _try_lock(lock) and temporary.exists():
                return temporary, lock
        except OSError:  # a process that respects locks does not remove it
            return temporary, lock
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock a file or folder; return False if another process holds it. Without locks there it is an OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _put(partial: Path, target: Path, place: Path, last: str) -> None:
    try:
        if target == Path.cwd():
            for item in sorted(partial.iterdir(), key=lambda item: item.name == last):
                item.rename(target / item.name)
        else:
            partial.rename(target)
            _sync_names(target.parent)
    except OSError as error:
        raise InputError(f"{place}: cannot be replaced by the data: {error.strerror}; name another folder") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Make the names in a folder durable; some network file systems cannot do this."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        _sync_names(Path(folder))
