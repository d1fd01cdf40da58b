"""The face crop that five landmarks define, and their place in the flow image.

An integer coordinate is the centre of a pixel, as in OpenCV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.types import LANDMARK_NAMES, Landmarks
from htnet.errors import InputError

CROP_RATIO = 2.4
"""Side of the face crop over the larger of eye distance and eye-mouth distance. It holds brows and lips with
a margin, and puts the landmarks at about 8 and 20 of 28 pixels, where the release has them (7..21)."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


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
