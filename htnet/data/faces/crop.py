"""The face crop that five landmarks define, and their place in the flow image.

An integer coordinate is the centre of a pixel, as in OpenCV.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import LANDMARK_NAMES, Landmarks
from htnet.errors import InputError

CROP_RATIO = 2.4
"""Side of the face crop over the larger of eye distance and eye-mouth distance. It holds brows and lips with
a margin, and puts the landmarks at about 8 and 20 of 28 pixels, where the release has them (7..21)."""

LANDMARK_MARGIN = 1 / 8
"""Share of the crop's side at each edge in which no landmark may lie. A region reaches a quarter of the side around its
landmark, and is moved inwards where it would end outside: half of it at most then lies elsewhere."""

_CLOSEST, _NARROWEST, _WIDEST = 0.02, 0.05, 4.0
"""Bounds in eye-mouth distances: between any two points; of the line between two eyes or two lips."""

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
        """Return source-pixel landmarks in pixels of the ``flow_size`` flow image of this crop."""
        scale = flow_size / self.side
        # centres of pixels: the crop's left edge is left - 0.5, the flow image's is -0.5
        return tuple(((x - self.left + 0.5) * scale - 0.5, (y - self.top + 0.5) * scale - 0.5) for x, y in landmarks)


def face_crop(landmarks: Landmarks, image_shape: tuple[int, ...]) -> FaceCrop:
    """Return the square around a face.

    Centred halfway between the eyes' and the mouth's middle; side :data:`CROP_RATIO` times the larger of the
    eye distance and the eye-mouth distance, so that a turned or a tilted head still fits.

    Args:
        landmarks: five points in pixels of the frame.
        image_shape: shape of the frame, (H, W) or (H, W, C).

    Raises:
        InputError: a landmark outside the frame, a crop of fewer than 16 pixels, points that are no upright face, or
            one at the crop's edge.
    """
    check_inside(landmarks, image_shape)
    points = np.asarray(landmarks, np.float64)
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    reach = max(np.hypot(*(points[1] - points[0])), np.hypot(*(mouth - eyes)))
    side = round(CROP_RATIO * float(reach))
    if side < 16:
        raise InputError(f"landmarks span a face crop of {side} pixels, at least 16 are needed")
    check_face(landmarks)
    corner = (eyes + mouth) / 2 - (side - 1) / 2
    crop = FaceCrop(left=round(float(corner[0])), top=round(float(corner[1])), side=side)
    for name, (x, y) in zip(LANDMARK_NAMES, crop.to_flow(landmarks, side), strict=True):
        if not all(LANDMARK_MARGIN <= (place + 0.5) / side <= 1 - LANDMARK_MARGIN for place in (x, y)):
            raise InputError(
                f"landmark {name} at ({x:.0f}, {y:.0f}) of the face crop of {side} pixels lies too near its edge: "
                f"{LANDMARK_MARGIN * side:.0f} pixels must be between"
            )
    return crop


def check_inside(landmarks: Landmarks, image_shape: tuple[int, ...]) -> None:
    """Refuse a landmark outside a picture of (H, W) or (H, W, C); :class:`InputError` names it."""
    height, width = image_shape[:2]
    for name, (x, y) in zip(LANDMARK_NAMES, landmarks, strict=True):
        if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
            raise InputError(f"landmark {name} at ({x:g}, {y:g}) must lie in the picture of {width} x {height} pixels")


def check_face(landmarks: Landmarks, least: float = 0.0) -> None:
    """Refuse five points that are not those of an upright face, each in its place.

    ``least``: pixels that are at least between the eyes' and the mouth's middle; points as shares of a side have fewer.

    Lengths are in units of the eye-mouth distance, along and across the line from the eyes' to the mouth's middle, so
    that a head may be tilted. The bounds are wide: a face turned by 75 degrees has an eye distance of 0.25; of 442
    coarse faces on 28 pixels eye distances are 0.74 to 1.87, mouths 0.71 to 1.87, noses 0 to 0.79 down and 0.4 aside.
    They are there for points of another order or scheme, a mirrored picture and one that lies on its side.

    Raises:
        InputError: names the rule that is broken and the points.
    """
    points = np.asarray(landmarks, np.float64)
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    down = mouth - eyes
    length = float(np.hypot(*down))
    if length < least:
        raise _no_face(f"eyes and mouth must be {least:g} pixels apart or more", landmarks)
    if length == 0 or down[1] < length / 2:
        raise _no_face("the mouth must be below the eyes, at most 60 degrees aside", landmarks)
    turned = np.array([[down[1], -down[0]], [down[0], down[1]]]) / length**2
    places = (points - eyes) @ turned.T
    for left, right in (("left_eye", "right_eye"), ("left_lip", "right_lip")):
        across, along = places[LANDMARK_NAMES.index(right)] - places[LANDMARK_NAMES.index(left)]
        if across <= 0:
            raise _no_face(f"{left} must be left of {right} in the picture", landmarks)
        if not _NARROWEST <= across <= _WIDEST or abs(along) > 1.5 * across + 0.2:  # the rest is noise on narrow faces
            raise _no_face(
                f"from {left} to {right} it must be {_NARROWEST} to {_WIDEST:g} eye-mouth distances across the face",
                landmarks,
            )
    if places[:2, 1].max() >= places[3:, 1].min():
        raise _no_face("both eyes must be above both lip corners", landmarks)
    aside, below = places[LANDMARK_NAMES.index("nose")]
    if not -0.1 <= below <= 1 or abs(aside) > 1:
        raise _no_face("the nose must be between the eyes and the mouth", landmarks)
    if min(np.hypot(*(one - other)) for one, other in itertools.combinations(places, 2)) < _CLOSEST:
        raise _no_face("no two points may lie on each other", landmarks)


def _no_face(rule: str, landmarks: Landmarks) -> InputError:
    named = ", ".join(f"{name} ({x:g}, {y:g})" for name, (x, y) in zip(LANDMARK_NAMES, landmarks, strict=True))
    return InputError(f"landmarks are not those of an upright face: {rule}, got {named}")
