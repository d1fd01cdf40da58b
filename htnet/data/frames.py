"""Frames of a clip on disk: a folder of pictures or a video, read by number; and paths that an annotation may name.

A damaged picture is found before it is used: OpenCV fills what is missing of a JPEG with grey and says so on stderr
only, which would become motion that nobody made.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.folders import entries_of
from htnet.errors import InputError

if TYPE_CHECKING:
    from htnet.data.video import VideoFrames

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".wmv", ".webm")
LARGEST_NUMBER = 2**63 - 1
"""Of a frame, as a store's table holds it; time stamps in milliseconds fit."""
_DEPTHS = (8, 10, 12, 14, 16)
"""Bits of cameras that are saved in 16."""
_FRAME = re.compile(r"(\d+)\.(jpe?g|png|bmp)$", re.IGNORECASE)


def inside(root: Path, *parts: str) -> Path:
    """Join folder names that come from an annotation below ``root``.

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
        InputError: no such folder, no frame in it, two files of one number, a number beyond :data:`LARGEST_NUMBER`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of frames")
    frames: dict[int, Path] = {}
    for path in sorted(entries_of(folder)):
        match = _FRAME.search(path.name)
        if match is None:
            continue
        number = int(match[1])
        if number > LARGEST_NUMBER:
            raise InputError(f"{path}: the number of a frame must be at most {LARGEST_NUMBER}, got {number}")
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


def read_frame(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a picture as (H, W, 3) of 8 bits, or of 16 where a PNG has them, blue-green-red, grey ones repeated.

    EXIF's orientation is applied, as viewers do. :class:`InputError` if the file is no picture, damaged or truncated.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: unreadable picture ({error.strerror})") from None
    if not is_whole(data):
        raise InputError(f"{path}: unreadable picture: no JPEG, PNG or BMP, damaged or truncated ({len(data)} bytes)")
    if data[:2] == b"\xff\xd8":
        from htnet.data.video import jpeg_damage  # loading FFmpeg takes longer than a command that decodes nothing

        if (damage := jpeg_damage(data)) is not None:
            raise InputError(f"{path}: unreadable picture: damaged ({damage})")
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # a size beyond all bounds
        picture = None
    if picture is None:
        raise InputError(f"{path}: unreadable picture ({len(data)} bytes)")
    return np.asarray(picture)


def is_whole(data: bytes) -> bool:
    """Tell if the bytes are a JPEG, PNG or BMP whose end is there."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _is_whole_png(data)
    if data[:3] == b"\xff\xd8\xff":
        # cameras may pad behind the end mark
        return data.rstrip(b"\x00")[-2:] == b"\xff\xd9"
    if data[:2] == b"BM" and len(data) >= 26:
        size, start = struct.unpack_from("<I4xI", data, 2)
        return len(data) >= max(int(size), int(start))
    return False


def _is_whole_png(data: bytes) -> bool:
    """Tell if every chunk up to the end mark is there and undamaged."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False


class Frames(Protocol):
    """The frames of a clip."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Frame numbers there are, rising."""
        ...

    def read(self, number: int) -> NDArray[np.uint8]:
        """Read a frame, Read a frame, (H, W, 3) uint8, blue-green-red; :class:`InputError` names file and frame."""
        ...

    def read_each(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield frames as of :meth:`read`, by rising numbers; one pass over a video."""
        ...


@dataclass(frozen=True)
class FolderFrames:
    """Pictures whose names end in their number."""

    folder: Path

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return list_frames(self.folder)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Frame numbers there are, rising."""
        return tuple(self._paths)

    @cached_property
    def bits(self) -> int:
        """Bits that the folder's pictures use, as the first frame tells: 8, or up to 16 of a PNG of 16.

        A camera's 10, 12 or 14 bits are often saved in 16 as they are, and nearly black where 16 are taken for full
        scale. All pictures of a folder have one scale, or a change of it would look like one of the light.
        """
        first = read_frame(next(iter(self._paths.values())))
        largest = int(first.max())
        return 8 if first.dtype == np.uint8 else next(bits for bits in _DEPTHS if largest >> bits == 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Rule by which frames that were read are lighter than they stand, such as ``12_bits_in_16``."""
        bits = self.__dict__.get("bits", 8)  # pictures of 8 bits never ask for it
        return (f"{bits}_bits_in_16",) if 8 < bits < 16 else ()

    def read(self, number: int) -> NDArray[np.uint8]:
        """Read a frame by its number; one that does not fit the scale of the first is unreadable."""
        path = frame_path(self._paths, number, self.folder)
        picture = read_frame(path)
        if picture.dtype == np.uint8:
            return np.asarray(picture, np.uint8)
        if int(picture.max()) >> self.bits:
            raise InputError(
                f"{path}: a picture of 16 bits that holds {picture.max()}, but the first frame, "
                f"{next(iter(self._paths.values())).name}, needs {self.bits} bits only: what is white cannot be told; "
                "convert the clip to pictures of 8 bits"
            )
        return (picture >> (self.bits - 8)).astype(np.uint8)

    def read_each(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """Frames by their numbers."""
        return (self.read(number) for number in numbers)


@dataclass(frozen=True)
class PairFrames(FolderFrames):
    """Two pictures of any names; ``folder`` is the onset, frame 1, ``apex`` is frame 2."""

    apex: Path

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return {1: self.folder, 2: self.apex}


def open_frames(path: Path) -> FolderFrames | VideoFrames:
    """Open the frames of a folder or of a video file; :class:`InputError` if it is neither."""
    if path.is_dir():
        return FolderFrames(path)
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        from htnet.data.video import VideoFrames  # as above

        return VideoFrames(path)
    raise InputError(f"{path}: no such folder of frames or video ({', '.join(VIDEO_SUFFIXES)})")


def to_gray(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn (H, W, 3) blue-green-red into (H, W) grey, both uint8, by OpenCV's weights."""
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8)


def resized(gray: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize a square (H, H) grey picture to (side, side): averaged when made smaller, else bicubic."""
    how = cv2.INTER_AREA if gray.shape[0] > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(gray, (side, side), interpolation=how), np.uint8)
