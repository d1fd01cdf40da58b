"""Definition of a face detector, and the choice of the subject's face among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Landmarks

CHOICE = "largest area less twice the squared distance of its centre from the picture's centre"
"""Which of several faces is taken: a large one in the middle, as in the alignment script of facenet."""
_DECIMALS = 2


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """The landmarks of a face, and the number of faces that it was chosen from."""

    points: Landmarks
    faces: int


class Detector(Protocol):
    """Finds the face of a picture."""

    def describe(self) -> dict[str, object]:
        """Return what decides its answers, for ``store.json``: name, checksum of the weights, thresholds."""
        ...

    def __call__(self, picture: NDArray[np.uint8]) -> Sighting | None:
        """Return a face with its five landmarks in pixels of the picture, None where there is none.

        Args:
            picture: (H, W, 3) uint8, blue-green-red, at source resolution.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Face:
    """A face that was found; ``box`` is left, top, width, height in pixels."""

    box: tuple[float, float, float, float]
    points: Landmarks


def choose_face(faces: Sequence[Face], shape: tuple[int, ...]) -> Sighting | None:
    """Return the face that :data:`CHOICE` prefers, None of none; the first of equals.

    Landmarks are rounded to 1/100 pixel, so that the last bits of a network's arithmetic decide nothing.
    """

    def preference(face: Face) -> float:
        left, top, width, height = face.box
        off_x, off_y = left + width / 2 - shape[1] / 2, top + height / 2 - shape[0] / 2
        return width * height - 2 * (off_x**2 + off_y**2)

    if not faces:
        return None
    points = max(faces, key=preference).points
    rounded = tuple((round(float(x), _DECIMALS), round(float(y), _DECIMALS)) for x, y in points)
    return Sighting(points=rounded, faces=len(faces))
