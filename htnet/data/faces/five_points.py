"""Tables of five points per clip: our own, and the one beside the HTNet authors' release."""

from __future__ import annotations

from collections.abc import Sequence

from htnet.data.datasets.tables import Row, Table
from htnet.data.faces.table import KEY, LandmarkTable, by_clip
from htnet.data.samples import LANDMARK_NAMES, Landmarks
from htnet.files import checksum

SOURCE_COLUMNS = tuple(f"{name}_{axis}" for name in LANDMARK_NAMES for axis in "xy")
"""Coordinate columns of ``landmarks.csv``, in the order of the landmarks."""
_UPSTREAM_NAMES = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
UPSTREAM_COLUMNS = tuple(f"{name}_{axis}_upstream28" for name in _UPSTREAM_NAMES for axis in "xy")
"""Coordinate columns of the release's ``landmarks_5pt.csv``, in the order of the landmarks."""
UPSTREAM_SIZE = 28
"""Side of the flow image that :data:`UPSTREAM_COLUMNS` are pixels of."""


def read_five_points(table: Table) -> LandmarkTable:
    """Read a table of :data:`SOURCE_COLUMNS`, in pixels of the onset frame, or of :data:`UPSTREAM_COLUMNS`.

    Raises:
        InputError: a column is missing, an empty key, a clip twice, a coordinate that is no finite number.
    """
    upstream = any(name in UPSTREAM_COLUMNS for name in table.header)
    columns = UPSTREAM_COLUMNS if upstream else SOURCE_COLUMNS
    points = by_clip((row, _points(row, columns)) for row in table.rows((*KEY, *columns)))
    size = UPSTREAM_SIZE if upstream else None
    return LandmarkTable(path=table.path, points=points, flow_size=size, sha256=checksum(table.path))


def _points(row: Row, columns: Sequence[str]) -> Landmarks:
    values = [row.decimal(column) for column in columns]
    return tuple(zip(values[::2], values[1::2], strict=True))
