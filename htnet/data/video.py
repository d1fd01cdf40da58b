"""Videos read by PyAV, which reports what its decoders find damaged; OpenCV shows the picture that they make up.

Nothing is decoded in threads: the same frames come out whatever the machine does, and a forked worker cannot wait for
threads that it does not have.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htnet.errors import InputError

try:
    import av
    from av.container import InputContainer
    from av.video.reformatter import Interpolation
    from av.video.stream import VideoStream
except ModuleNotFoundError:
    raise InputError("PyAV is not installed, which reads videos and checks JPEGs: pip install av") from None

_TELLING = {"vp9": "libvpx-vp9"}
"""Decoders that report damage where FFmpeg's own do not; they are asked as well, for they know of no rotation."""
_EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""Conversion of colours with the same bits on every processor; without all of them white may come out as 253."""
# some decoders write of a failed checksum to the log and go on; repeated lines are hidden unless asked for
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)


class DamagedError(InputError):
    """A video that cannot be decoded any further."""


class _ComplaintError(Exception):
    """The words of a decoder or demultiplexer that is not content."""


@contextmanager
def _complaints() -> Iterator[None]:
    """Turn errors that PyAV raises, and those that FFmpeg only logs, into :class:`_ComplaintError`."""
    with av.logging.Capture() as said:
        try:
            yield
        except (av.FFmpegError, UnicodeDecodeError) as error:
            why = said[-1][2] if said else getattr(error, "strerror", str(error))
            raise _ComplaintError(" ".join(why.split())) from None
    if said:
        raise _ComplaintError(" ".join(said[0][2].split()))


def jpeg_damage(data: bytes) -> str | None:
    """Report what a strict decoder says of a damaged JPEG, where OpenCV's fills up what is missing. None: nothing.

    A few changed bytes can be another valid JPEG, of which no decoder has anything to report.
    """
    context = _strict(av.CodecContext.create("mjpeg", "r"))
    with av.logging.Capture() as said:  # of a camera's odd notes in the head as well, which are no damage
        try:
            frames = [*context.decode(av.Packet(data)), *context.decode(None)]
        except av.error.InvalidDataError:
            return " ".join(said[-1][2].split()) if said else "invalid data"
        except av.FFmpegError:  # a kind that this decoder does not know
            return None
    return None if frames and not frames[0].is_corrupt else "no whole picture"


@dataclass(frozen=True)
class VideoFrames:
    """A video; frames count from 1 by their position. Read from the start: seeking is not exact in many formats.

    Whatever follows the first thing that cannot be decoded is not read, for it may depend on that.
    """

    path: Path
    _seconds: dict[int, float] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Frame numbers there are, whatever the header says; from a damaged frame on they are counted, but not read."""
        found = 0
        try:
            for _ in self._each():
                found += 1
        except DamagedError:
            found = max(found + 1, self._packets())
        if not found:
            raise InputError(f"{self.path}: a video without a readable frame")
        return tuple(range(1, found + 1))

    def read(self, number: int) -> NDArray[np.uint8]:
        """Read a frame by its number."""
        return next(self.read_each([number]))

    def read_each(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """Frames by their numbers, which must rise."""
        each = enumerate(self._each(), 1)
        for number in numbers:
            frame, seconds = next((found for at, found in each if at == number), (None, None))
            if frame is None:
                raise InputError(f"{self.path}: frame {number} is missing; there are frames 1 to {self.numbers[-1]}")
            if frame.interlaced_frame:
                raise InputError(
                    f"{self.path}: frame {number} is interlaced, two moments in one picture, which reads as motion: "
                    "deinterlace the video first, for example by ffmpeg -i IN -vf bwdif -c:v ffv1 OUT.mkv"
                )
            if seconds is not None:
                self._seconds[number] = seconds
            yield _upright(frame, f"{self.path}: frame {number}")

    def seconds(self, **numbers: int) -> dict[str, str]:
        """Time stamps, as ``<name>_seconds``, of frames that were read and have one."""
        return {
            f"{name}_seconds": f"{self._seconds[number]:.6f}"
            for name, number in numbers.items()
            if number in self._seconds
        }

    def _each(self) -> Iterator[tuple[Any, float | None]]:
        """Frames and their time stamps in the order in which they are shown, up to the first damage."""
        container, stream = self._open()
        context = stream.codec_context
        decoders = [_strict(context)]
        if context.name in _TELLING:
            decoders.insert(0, _strict(av.CodecContext.create(_TELLING[context.name], "r")))
        number, before = 1, -1
        with container:
            listed = _index(container, stream)
            packets = container.demux(stream)
            for place in count(1):
                try:
                    with _complaints():
                        # PyAV ends with an empty one; in an AVI they also stand for frames that were dropped
                        packet = next((packet for packet in packets if packet.size), None)
                        if packet is not None and packet.is_corrupt:
                            raise _ComplaintError("truncated")
                        here = packet.pos if packet is not None else sys.maxsize
                        if here is not None and bisect_left(listed, here) > bisect_right(listed, before):
                            raise _ComplaintError("the file's index names a frame before it")
                        before = before if here is None else here
                        frames = [decoder.decode(packet) for decoder in decoders][-1]
                except _ComplaintError as complaint:
                    raise self._damaged(number, f"packet {place}: {complaint}") from None
                for frame in frames:
                    if frame.is_corrupt:
                        raise self._damaged(number, f"packet {place}: the decoder made up a part of the picture")
                    # the last ones come out of the decoder without a time base
                    known = frame.pts is not None and stream.time_base is not None
                    yield frame, float(frame.pts * stream.time_base) if known else None
                    number += 1
                if packet is None:
                    return

    def _damaged(self, number: int, why: str) -> DamagedError:
        return DamagedError(f"{self.path}: the video is damaged: it cannot be decoded from frame {number} on ({why})")

    def _packets(self) -> int:
        """Frames that there would be, undamaged."""
        container, stream = self._open()
        found = 0
        with container:
            try:
                with _complaints():
                    for packet in container.demux(stream):
                        found += packet.size > 0
            except _ComplaintError:
                pass
        return found

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """Open the file and its first video; the cover picture of a sound is none."""
        try:
            with _complaints():
                container = av.open(f"file:{self.path.absolute()}", metadata_errors="replace")
        except _ComplaintError as complaint:
            raise InputError(f"{self.path}: not a readable video ({complaint})") from None
        cover = av.stream.Disposition.attached_pic
        stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
        if stream is None or stream.codec_context is None:
            container.close()
            what = "of an unknown codec" if stream is not None else "in it: sound or subtitles only"
            raise InputError(f"{self.path}: not a readable video (no video {what})")
        return container, stream


def _strict(context: Any) -> Any:
    """Set the decoder to one thread, and to give up at an error."""
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    return context


def _index(container: InputContainer, stream: VideoStream) -> list[int]:
    """Give the places of frames in an AVI's index: one whose head is damaged is passed over without a word."""
    return sorted(entry.pos + 8 for entry in stream.index_entries) if container.format.name == "avi" else []


def _upright(frame: Any, place: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) blue-green-red of 8 bits, turned and mirrored as players show it."""
    picture = frame.to_ndarray(format="bgr24", interpolation=_EXACT, threads=1)
    side = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if side is None:
        return np.ascontiguousarray(picture)
    a, b, _, c, d, *_ = np.frombuffer(bytes(side), "=i4")
    if (a or d) and (b or c):
        raise InputError(f"{place} is shown turned by {frame.rotation} degrees; multiples of 90 are read")
    across, down = (c, b) if b else (a, d)
    picture = picture.transpose(1, 0, 2) if b else picture
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
