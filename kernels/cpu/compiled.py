"""How the loops of this folder are compiled: by Numba for the processor at hand, without Python's lock."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numba
from llvmlite import binding

_log = logging.getLogger(__name__)
SETTINGS: Final[dict[str, Any]] = {
    "nogil": True,
    # products may be fused with sums, and sums be taken in vectors; NaN and infinity stay what they are
    "fastmath": {"contract", "nsz", "reassoc"},
    "error_model": "numpy",
    "boundscheck": False,
}

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile at the first call and keep the machine code in :func:`cache_folder`.

    Arguments are C-contiguous arrays and float32 or integer scalars; indices are not checked.
    """
    try:
        with _numba_caches_in(cache_folder()):
            return numba.njit(cache=True, **SETTINGS)(function)
    except RuntimeError as error:  # no home, or no folder that can be written
        _log.warning("%s is compiled anew in every process: %s", function.__name__, error)
        return numba.njit(**SETTINGS)(function)


def cache_folder() -> Path:
    """Where machine code is kept: NUMBA_CACHE_DIR, or a folder of the user's, by processor and settings.

    Numba looks at the function's own file only, so code of other settings would be taken for this one's; and machines
    with different processors that share a checkout would write over each other's.
    """
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    features = binding.get_host_cpu_features().flatten()
    settings = sorted((key, sorted(value) if isinstance(value, set) else value) for key, value in SETTINGS.items())
    digest = hashlib.sha256(f"{features} {settings}".encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "htnet" / f"{binding.get_host_cpu_name()}-{digest}"


@contextmanager
def _numba_caches_in(folder: Path) -> Iterator[None]:
    """Numba reads the setting when it decorates; other users of Numba in this process keep theirs."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
