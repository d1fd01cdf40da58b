"""Files of results: whether one can be written, asked before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from htnet.errors import InputError

__all__ = ["results_file"]


def results_file(folder: Path | None, name: str, columns: Sequence[str]) -> Path | None:
    """The file ``name`` in the folder of ``--out``, which may be new; None where nothing is to be written.

    Raises:
        InputError: no such file can be there, or one with other columns is. Nothing is made for the answer.
    """
    if folder is None:
        return None
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"--out {folder}: {there} is a file, where a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: no right to write in {there}")
    path = folder / name
    if path.is_dir():
        raise InputError(f"--out {folder}: {path} is a folder, where the results are to be a file")
    from kernels.benchmarks.record import check_columns  # imports torch, which the help does without

    try:
        check_columns(path, columns)
    except ValueError as error:
        raise InputError(str(error)) from None
    return path
