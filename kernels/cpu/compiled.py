"""Compilation of the loops of this folder, by Numba, for the processor at hand and without Python's lock.

Arithmetic is that of IEEE 754, each operation as written. A compiler that may fuse or reorder operations does so by
what it has inlined, and that differs from one process to the next. As it may not, results have the same bits whatever
was compiled when, in whatever order and for whichever processor. A sum that should be taken in vectors is written in
lanes.
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
    """Compile at the first call and keep the machine code, that of inner functions with it, in :func:`cache_folder`.

    Arguments are C-contiguous arrays and float32 or integer scalars; indices are not checked. Call it with the same
    types always: Numba numbers the files of a function by its types, and two processes may give a number to two.
    """
    try:
        folder = cache_folder(inspect.getsource(sys.modules[function.__module__]))
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # Numba would take the folder of the source without a word
            raise PermissionError(f"{folder} cannot be written to")
        with _numba_caches_in(folder):
            return numba.njit(cache=True, **SETTINGS)(function)
    except (RuntimeError, OSError) as error:  # no home, no folder that can be written, or no source
        _log.warning("%s is compiled anew in every process: %s", function.__name__, error)
        return inner(function)


def inner(function: Function) -> Function:
    """Compile a function that only compiled ones call; it is part of their machine code."""
    return numba.njit(**SETTINGS)(function)


def cache_folder(source: str) -> Path:
    """Name the folder of machine code: in NUMBA_CACHE_DIR or the user's cache, by all that the code follows from.

    Numba writes an index of a function's files before the files. With one folder for two sources, settings, versions or
    processors, a process that is killed between the two, or another beside it, would leave the one's index with the
    other's code.
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
    """Numba reads the setting when it decorates; other users of Numba in this process keep theirs."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
