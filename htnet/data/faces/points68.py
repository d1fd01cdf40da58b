"""Tables of the 68 points of the iBUG scheme, as dlib and OpenFace give them, and the five landmarks among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from htnet.data.datasets.tables import Row, Table
from htnet.data.faces.table import KEY, LandmarkTable, by_clip
from htnet.data.samples import Landmarks
from htnet.errors import InputError
from htnet.files import checksum

COLUMNS68 = tuple(f"{axis}_{point}" for point in range(68) for axis in "xy")
"""Coordinate columns; points count from 0."""
_POINT = re.compile(r"[xy]_?([0-9]{1,3})")
_EYES = (range(36, 42), range(42, 48))  # the picture's left first
_NOSE_TIP = 30
_MOUTH_CORNERS = (48, 54)


def is_point(column: str) -> bool:
    """Tell if a column holds a coordinate of a numbered point; capitals are OpenFace's points in space."""
    return _POINT.fullmatch(column) is not None


def check_scheme(path: Path, header: Sequence[str]) -> None:
    """Refuse points of another scheme, whose numbers mean other places of the face.

    The 98 points of WFLW, which OpenFace 3 gives, have brows where the 68 have eyes; MediaPipe has 468 or 478.
    """
    numbers = sorted({int(found[1]) for name in header if (found := _POINT.fullmatch(name))})
    if numbers and numbers != list(range(68)):
        raise InputError(
            f"{path}: {len(numbers)} points, {numbers[0]} to {numbers[-1]}; 68 are expected, 0 to 67 as dlib and "
            "OpenFace 2 number them (iBUG)"
        )


def five_of_68(row: Row) -> Landmarks:
    """Return the five landmarks in a row of :data:`COLUMNS68`: an eye is the mean of its contour's six points.

    Raises:
        InputError: a coordinate that is no finite number, also of a point that is not used.
    """
    points = np.array([row.decimal(column) for column in COLUMNS68]).reshape(68, 2)
    eyes = [points[list(contour)].mean(axis=0) for contour in _EYES]
    chosen = [*eyes, points[_NOSE_TIP], *(points[corner] for corner in _MOUTH_CORNERS)]
    return tuple((float(x), float(y)) for x, y in chosen)


def read_points68(table: Table) -> LandmarkTable:
    """Read a table of ``dataset, subject, clip`` and :data:`COLUMNS68`, in pixels of the onset frame.

    Raises:
        InputError: points of another scheme, a column is missing, an empty key, a clip twice, a coordinate that is no
            finite number.
    """
    check_scheme(table.path, table.header)
    points = by_clip((row, five_of_68(row)) for row in table.rows((*KEY, *COLUMNS68)))
    return LandmarkTable(path=table.path, points=points, flow_size=None, sha256=checksum(table.path))
