"""Five landmarks per clip: reading them, the face crop they define, and their place in the flow image.

Two tables are read, told apart by their header:

- ``landmarks.csv``: ``dataset, subject, clip`` and ``left_eye_x, left_eye_y, ... right_lip_y``
  (:data:`SOURCE_COLUMNS`), in pixels of the onset frame at source resolution;
- ``landmarks_5pt.csv`` beside the HTNet authors' release: columns ending in ``_upstream28``
  (:data:`UPSTREAM_COLUMNS`), already in pixels of the 28-pixel flow image.

An integer coordinate is the centre of a pixel, as in OpenCV.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.types import LANDMARK_NAMES, Landmarks, SampleId
from htnet.errors import InputError

SOURCE_COLUMNS = tuple(f"{name}_{axis}" for name in LANDMARK_NAMES for axis in "xy")
"""Coordinate columns of ``landmarks.csv``, in the order of the landmarks."""
_UPSTREAM_NAMES = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
UPSTREAM_COLUMNS = tuple(f"{name}_{axis}_upstream28" for name in _UPSTREAM_NAMES for axis in "xy")
"""Coordinate columns of the release's ``landmarks_5pt.csv``, in the order of the landmarks."""
UPSTREAM_SIZE = 28
"""Side of the flow image that :data:`UPSTREAM_COLUMNS` are pixels of."""
CROP_RATIO = 2.4
"""Side of the face crop over the larger of eye distance and eye-mouth distance. It holds brows and lips with
a margin, and puts the landmarks at about 8 and 20 of 28 pixels, where the release has them (7..21)."""

_KEY = ("dataset", "subject", "clip")
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class LandmarkTable:
    """Landmarks by clip. ``flow_size`` is the side of the flow image they are pixels of, None for the onset frame."""

    path: Path
    points: Mapping[SampleId, Landmarks]
    flow_size: int | None
    sha256: str = ""
    """Of the file."""

    def of(self, sample: SampleId) -> Landmarks:
        """Landmarks of a clip; :class:`InputError` names the clip and the table where there are none."""
        try:
            return self.points[sample]
        except KeyError:
            raise InputError(f"{self.path}: no landmarks for clip {sample}") from None


def read_landmarks(path: Path) -> LandmarkTable:
    """Read either form of landmark table.

    Args:
        path: the CSV, UTF-8, first row the header.

    Raises:
        InputError: no such file, a missing column, a row of the wrong length, an empty key, a duplicate clip,
            a coordinate that is not a finite number; the message names file, row, column, value and rule.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such landmark table (columns: dataset, subject, clip, left_eye_x, ...)")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            upstream = any(name in UPSTREAM_COLUMNS for name in header)
            columns = UPSTREAM_COLUMNS if upstream else SOURCE_COLUMNS
            place = _places(path, header, (*_KEY, *columns))
            points = dict(_unique(path, _parse(path, rows, len(header), place, columns)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from error
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return LandmarkTable(path=path, points=points, flow_size=UPSTREAM_SIZE if upstream else None, sha256=checksum)


def _places(path: Path, header: Sequence[str], needed: Sequence[str]) -> dict[str, int]:
    names = [name.strip() for name in header]
    for column in needed:
        if names.count(column) != 1:
            problem = "is missing" if column not in names else "stands there twice"
            raise InputError(f"{path}, row 1: column {column} {problem}; the header is {', '.join(names) or 'empty'}")
    return {column: names.index(column) for column in needed}


def _parse(
    path: Path, rows: Iterator[list[str]], width: int, place: Mapping[str, int], columns: Sequence[str]
) -> Iterator[tuple[int, SampleId, Landmarks]]:
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != width:
            raise InputError(f"{path}, row {number}: {len(row)} values, the header has {width} columns")
        key = {name: row[place[name]].strip() for name in _KEY}
        for name, value in key.items():
            if not value:
                raise InputError(f"{path}, row {number}, column {name}: must not be empty")
        values = [_number(path, number, column, row[place[column]]) for column in columns]
        yield number, SampleId(**key), tuple(zip(values[::2], values[1::2], strict=True))


def _number(path: Path, row: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}, row {row}, column {column}: must be a finite number of pixels, got {text!r}")
    return value


def _unique(path: Path, rows: Iterator[tuple[int, SampleId, Landmarks]]) -> Iterator[tuple[SampleId, Landmarks]]:
    seen: dict[SampleId, int] = {}
    for number, sample, landmarks in rows:
        if sample in seen:
            raise InputError(f"{path}, row {number}: clip {sample} stands in row {seen[sample]} already")
        seen[sample] = number
        yield sample, landmarks


@dataclass(frozen=True, kw_only=True)
class FaceCrop:
    """A square of a frame, whole pixels: the same for every frame of a clip, so that it makes no motion itself.

    ``left`` and ``top`` may be negative and the square may end outside the frame.
    """

    left: int
    top: int
    side: int

    def cut(self, picture: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Cut the square out of an (H, W) or (H, W, 3) picture; what lies outside repeats the picture's edge."""
        height, width = picture.shape[:2]
        over = (-self.top, self.top + self.side - height, -self.left, self.left + self.side - width)
        top, bottom, left, right = (max(0, value) for value in over)
        y, x = self.top + top, self.left + left
        if top or bottom or left or right:
            picture = np.asarray(cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_REPLICATE))
            y, x = self.top + top, self.left + left
        return picture[y : y + self.side, x : x + self.side]

    def to_flow(self, landmarks: Landmarks, flow_size: int) -> Landmarks:
        """Source-pixel landmarks in pixels of the ``flow_size`` flow image of this crop."""
        scale = flow_size / self.side
        # centres of pixels: the crop's left edge is left - 0.5, the flow image's is -0.5
        return tuple(((x - self.left + 0.5) * scale - 0.5, (y - self.top + 0.5) * scale - 0.5) for x, y in landmarks)


def face_crop(landmarks: Landmarks, image_shape: tuple[int, ...]) -> FaceCrop:
    """The square around a face.

    Centred halfway between the eyes' and the mouth's middle; side :data:`CROP_RATIO` times the larger of the
    eye distance and the eye-mouth distance, so that a turned or a tilted head still fits.

    Args:
        landmarks: five points in pixels of the frame.
        image_shape: shape of the frame, (H, W) or (H, W, C).

    Raises:
        InputError: a landmark outside the frame, or a crop of fewer than 16 pixels.
    """
    check_inside(landmarks, image_shape)
    points = np.asarray(landmarks, np.float64)
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    reach = max(np.hypot(*(points[1] - points[0])), np.hypot(*(mouth - eyes)))
    side = round(CROP_RATIO * float(reach))
    if side < 16:
        raise InputError(f"landmarks span a face crop of {side} pixels, at least 16 are needed")
    corner = (eyes + mouth) / 2 - (side - 1) / 2
    return FaceCrop(left=round(float(corner[0])), top=round(float(corner[1])), side=side)


def check_inside(landmarks: Landmarks, image_shape: tuple[int, ...]) -> None:
    """:class:`InputError` names a landmark outside a picture of (H, W) or (H, W, C)."""
    height, width = image_shape[:2]
    for name, (x, y) in zip(LANDMARK_NAMES, landmarks, strict=True):
        if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
            raise InputError(f"landmark {name} at ({x:g}, {y:g}) must lie in the picture of {width} x {height} pixels")
