"""Tables of the 68 points of the iBUG scheme, as dlib and OpenFace give them, and the five landmarks among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from htnet.data.landmarks.table import KEY, CsvRow, LandmarkTable, by_clip, checksum, require_columns
from htnet.data.types import Landmarks

COLUMNS68 = tuple(f"{axis}_{point}" for point in range(68) for axis in "xy")
"""Coordinate columns; points count from 0."""
_EYES = (range(36, 42), range(42, 48))  # the picture's left first
_NOSE_TIP = 30
_MOUTH_CORNERS = (48, 54)


def five_of_68(row: CsvRow) -> Landmarks:
    """The five landmarks in a row of :data:`COLUMNS68`: an eye is the mean of the six points of its contour.

    Raises:
        InputError: a coordinate that is no finite number, also of a point that is not used.
    """
    points = np.array([row.pixels(column) for column in COLUMNS68]).reshape(68, 2)
    eyes = [points[list(contour)].mean(axis=0) for contour in _EYES]
    chosen = [*eyes, points[_NOSE_TIP], *(points[corner] for corner in _MOUTH_CORNERS)]
    return tuple((float(x), float(y)) for x, y in chosen)


def read_points68(path: Path, header: Sequence[str], rows: Sequence[CsvRow]) -> LandmarkTable:
    """A table of ``dataset, subject, clip`` and :data:`COLUMNS68`, in pixels of the onset frame.

    Raises:
        InputError: a column is missing, an empty key, a clip twice, a coordinate that is no finite number.
    """
    require_columns(path, header, (*KEY, *COLUMNS68))
    points = by_clip((row, five_of_68(row)) for row in rows)
    return LandmarkTable(path=path, points=points, flow_size=None, sha256=checksum(path))
