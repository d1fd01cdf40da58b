"""Finding the apex where an annotation gives none."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.frames import Frames, to_gray
from htnet.data.landmarks import FaceCrop
from htnet.errors import InputError

SPOTTING = (
    "largest mean absolute grey difference to the onset in the face crop, both smoothed by a Gaussian of sigma 1, "
    "less what a shift of the head and a change of brightness explain"
)
"""How an apex is found where the annotation gives none."""


def find_apex(frames: Frames, onset: int, offset: int, crop: FaceCrop) -> int:
    """Find the apex by :data:`SPOTTING`: no flow per frame, and one picture in memory at a time.

    Sway of the head moves every edge of the face, a micro-expression only some: without taking the shift out
    (least squares on the onset's gradients), frames late in the clip win over the apex.

    Args:
        frames: the clip's frames.
        onset: frame number that every other is compared with.
        offset: last frame number to look at.
        crop: the face, in pixels of the frames.

    Returns:
        The frame number after ``onset`` and up to ``offset``; the first of equals.

    Raises:
        InputError: no frame in between, or an unreadable one.
    """
    between = [number for number in frames.numbers if onset < number <= offset]
    if not between:
        raise InputError(f"no frame after onset {onset} up to offset {offset}, so no apex can be found")
    rest = _smooth(crop, frames.read(onset))
    down, right = np.gradient(rest)
    head = np.stack([right.ravel(), down.ravel(), np.ones(rest.size, np.float32)], axis=1)
    fit = np.linalg.pinv(head)
    scores = []
    for number in between:
        change = (_smooth(crop, frames.read(number)) - rest).ravel()
        # rounded, so that equal frames tie and the first one wins
        scores.append(round(float(np.abs(change - head @ (fit @ change)).mean()), 6))
    return between[int(np.argmax(scores))]


def _smooth(crop: FaceCrop, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    gray = crop.cut(to_gray(frame)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(gray, (0, 0), 1.0), np.float32)
