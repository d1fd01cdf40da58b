"""Frames of a clip on disk: listing by number, reading, and folders that an annotation may name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.errors import InputError

_FRAME = re.compile(r"(\d+)\.(jpe?g|png|bmp)$", re.IGNORECASE)


def inside(root: Path, *parts: str) -> Path:
    """A folder below ``root`` whose names come from an annotation.

    Each part must be one folder name: an annotation that holds a separator or ``..`` could lead out of the
    dataset, and is refused. Links that the user put into the folder are the user's own business.

    Raises:
        InputError: a part that is not a single name.
    """
    for part in parts:
        if part in ("", ".", "..") or any(mark in part for mark in ("/", "\\", "\0", ":")):
            raise InputError(f"{root}: the annotation names {part!r}, which leads out of the dataset's folder")
    return root.joinpath(*parts)


def list_frames(folder: Path) -> dict[int, Path]:
    """Frames of a folder by frame number, in rising order.

    The number is the last integer before the extension (jpg, jpeg, png or bmp, any case): ``img46.jpg`` is 46,
    ``006_05562.jpg`` is 5562. Other files are passed over.

    Raises:
        InputError: no such folder, no frame in it, two files of one number.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of frames")
    frames: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _FRAME.search(path.name)
        if match is None or path.name.startswith("."):
            continue
        number = int(match[1])
        if number in frames:
            raise InputError(f"{path}: frame {number} is {frames[number].name} already")
        frames[number] = path
    if not frames:
        raise InputError(f"{folder}: holds no frames (jpg, jpeg, png or bmp with a number before the extension)")
    return dict(sorted(frames.items()))


def frame_path(frames: Mapping[int, Path], number: int, folder: Path) -> Path:
    """File of a frame; :class:`InputError` names the missing one and what there is."""
    if number not in frames:
        raise InputError(f"{folder}: frame {number} is missing; there are frames {min(frames)} to {max(frames)}")
    return frames[number]


def read_frame(path: Path) -> NDArray[np.uint8]:
    """Read a picture as (H, W, 3) uint8, blue-green-red, grey ones repeated; :class:`InputError` if unreadable."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error) as error:
        raise InputError(f"{path}: unreadable picture ({error})") from error
    if picture is None:
        raise InputError(f"{path}: unreadable picture")
    return np.asarray(picture, np.uint8)


def to_gray(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) blue-green-red to (H, W) grey, both uint8, by OpenCV's weights."""
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8)
