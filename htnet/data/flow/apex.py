"""Finding the apex where an annotation gives none: the frame of the largest optical flow in the regions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from htnet.data.faces.landmarks import FaceCrop
from htnet.data.flow.methods import flow_parameters
from htnet.data.flow.opencv import dis_flow
from htnet.data.frames import Frames, resized, to_gray
from htnet.data.regions import mosaic
from htnet.data.samples import Landmarks
from htnet.errors import InputError

APEX_FOUND = "apex_found_by_flow"
"""Note of a sample whose apex was found by :func:`find_apex`, in its json member."""
_SIZE = 128
"""Side in pixels to which the face crop is resized."""


def spotting_recipe() -> dict[str, object]:
    """Describe how an apex is found, for ``store.json``."""
    rule = (
        "frame of the largest mean flow from the onset in the four regions of the face crop, less its median over the "
        "crop; means smoothed over three frames"
    )
    return {"rule": rule, "size": _SIZE, **flow_parameters("dis")}


def find_apex(frames: Frames, onset: int, offset: int, crop: FaceCrop, landmarks: Landmarks) -> int:
    """Find the frame of the largest optical flow from the onset: one picture and one flow in memory at a time.

    The flow's median over the face is the head's own shift and is taken out. What is left is averaged in length over
    the eye and lip regions that the network sees (:func:`htnet.data.regions.mosaic`, anatomical). Of noise
    only one frame is the largest, of an expression several in a row are large: the lengths are smoothed over three
    frames, (1, 2, 1). The flow is DIS at 128 pixels whatever the store's method is, as only the order of frames counts.

    Args:
        frames: the clip's frames.
        onset: frame number that every other is compared with.
        offset: last frame number to look at.
        crop: the face, in pixels of the frames.
        landmarks: five points, in pixels of the frames.

    Returns:
        The frame number after ``onset`` and up to ``offset``; the first of equals.

    Raises:
        InputError: no frame in between, or an unreadable one.
    """
    between = [number for number in frames.numbers if onset < number <= offset]
    if not between:
        raise InputError(f"no frame after onset {onset} up to offset {offset}, so no apex can be found")
    places = crop.to_flow(landmarks, _SIZE)
    rest = _face(crop, frames.read(onset))
    motion = np.array([_motion(rest, _face(crop, frame), places) for frame in frames.read_each(between)])
    around = np.pad(motion, 1, mode="edge")
    return between[int(np.argmax((around[:-2] + 2 * motion + around[2:]).round(6)))]


def _face(crop: FaceCrop, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return resized(to_gray(crop.cut(frame)), _SIZE)


def _motion(rest: NDArray[np.uint8], face: NDArray[np.uint8], places: Landmarks) -> float:
    """Mean length of the flow in the regions, pixels of the resized crop."""
    flow = dis_flow(rest, face)
    own = np.asarray(mosaic(flow - np.median(flow, axis=(0, 1)), places, "anatomical"), np.float32)
    return float(np.hypot(own[..., 0], own[..., 1]).mean())
