"""How the loops of this folder are compiled: by Numba for the processor at hand, without Python's lock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numba

_log = logging.getLogger(__name__)
_FASTMATH = {"contract", "nsz", "reassoc"}
"""Products may be fused with sums, and sums be taken in vectors; NaN and infinity stay what they are."""

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile at the first call and keep the result on disk, beside the source or in the user's cache folder.

    Arguments are C-contiguous arrays and float32 or integer scalars; indices are not checked.
    """
    settings = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError as error:  # no folder can be written
        _log.warning("%s is compiled anew in every process: %s", function.__name__, error)
        return numba.njit(**settings)(function)
