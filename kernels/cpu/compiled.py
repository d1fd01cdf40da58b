"""Compilation of this folder's loops by Numba, for the processor at hand and without Python's lock.

Arithmetic follows IEEE 754, each operation as written. A compiler that may fuse or reorder operations decides by the
functions it has inlined, and those differ from process to process. This one may not, so results have the same bits in
whatever order functions were compiled, and on every processor. A sum that should run in vectors is written in lanes.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import llvmlite
import numba
from llvmlite import binding

_log = logging.getLogger(__name__)
SETTINGS: Final[dict[str, Any]] = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a function at its first call; keep its machine code and that of inner functions in :func:`cache_folder`.

    Arguments are C-contiguous arrays and float32 or integer scalars; indices are not checked. Always call it with the
    same types: Numba numbers a function's files by its types, and two processes may give one number to two files.
    """
    try:
        folder = cache_folder(inspect.getsource(sys.modules[function.__module__]))
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # Numba would silently use the folder of the source
            raise PermissionError(f"{folder} cannot be written to")
        with _numba_caches_in(folder):
            return numba.njit(cache=True, **SETTINGS)(function)
    except (RuntimeError, OSError) as error:  # no home, no writable folder, or no source
        _log.warning("%s is compiled anew in every process: %s", function.__name__, error)
        return inner(function)


def inner(function: Function) -> Function:
    """Compile a function that only compiled functions call; it becomes part of their machine code."""
    return numba.njit(**SETTINGS)(function)


def cache_folder(source: str) -> Path:
    """Name the folder of machine code, in NUMBA_CACHE_DIR or the user's cache, after everything that decides the code.

    Numba writes the index of a function's files before the files. Suppose that two sources, settings, versions or
    processors shared a folder: a process killed between the two steps, or two processes side by side, would leave the
    index of one with the code of the other.
    """
    versions = numba.__version__, llvmlite.__version__, sys.version
    features = binding.get_host_cpu_features().flatten()
    digest = hashlib.sha256(repr((source, versions, features, sorted(SETTINGS.items()))).encode()).hexdigest()[:16]
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "htnet"
    return Path(base) / f"{binding.get_host_cpu_name()}-{digest}"


@contextmanager
def _numba_caches_in(folder: Path) -> Iterator[None]:
    """Make Numba cache in the folder; it reads the setting at decoration, so other users of Numba keep theirs."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
