"""Five landmarks per clip: reading them, and the face crop they define.

Tables are told apart by their header, a reader each:

- ``five_points.py``: ``dataset, subject, clip`` and ``left_eye_x, left_eye_y, ... right_lip_y``, in pixels of the
  onset frame at source resolution; or columns ending in ``_upstream28``, as in ``landmarks_5pt.csv`` beside the HTNet
  authors' release, in pixels of the 28-pixel flow image;
- ``points68.py``: ``dataset, subject, clip`` and the 68 points of dlib and iBUG, ``x_0, y_0, ... x_67, y_67``;
- ``openface.py``: a folder of OpenFace's output, a file per clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from htnet.data.datasets.tables import open_table
from htnet.data.entries import Entry
from htnet.data.faces.crop import CROP_RATIO, FaceCrop, check_face, check_inside, face_crop
from htnet.data.faces.five_points import SOURCE_COLUMNS, UPSTREAM_COLUMNS, UPSTREAM_SIZE, read_five_points
from htnet.data.faces.openface import FRAME, PLACES, SUCCESS, read_openface
from htnet.data.faces.points68 import COLUMNS68, is_point, read_points68
from htnet.data.faces.table import KEY, LandmarkTable
from htnet.errors import InputError

__all__ = [
    "COLUMNS68",
    "CROP_RATIO",
    "SOURCE_COLUMNS",
    "UPSTREAM_COLUMNS",
    "UPSTREAM_SIZE",
    "FaceCrop",
    "LandmarkTable",
    "check_face",
    "check_inside",
    "face_crop",
    "read_landmarks",
]


def read_landmarks(path: Path, entries: Sequence[Entry] = ()) -> LandmarkTable:
    """Read a landmark table of any kind.

    Args:
        path: a table, as :mod:`htnet.data.datasets.tables` reads them; or a folder of OpenFace's output.
        entries: the clips that landmarks are wanted of; a folder of files is searched for those of them.

    Raises:
        InputError: no such file, a missing column, a row of the wrong length, an empty key, a duplicate clip,
            a coordinate that is not a finite number; the message names file, row, column, value and rule.
    """
    if path.is_dir():
        return read_openface(path, entries)
    if not path.exists():
        what = "(columns: dataset, subject, clip, left_eye_x, ...); prepare.detector does without one"
        raise InputError(f"{path}: no such landmark table {what}")
    table = open_table(path, (*KEY, *SOURCE_COLUMNS, *UPSTREAM_COLUMNS, *COLUMNS68))
    if any(map(is_point, table.header)):
        return read_points68(table)
    if table.top is None and open_table(path, (FRAME, SUCCESS)).top is not None:
        raise InputError(f"{path}: OpenFace's output of one clip; name the folder that holds a file per clip: {PLACES}")
    return read_five_points(table)
