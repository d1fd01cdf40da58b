"""Entries of datasets: annotated clips, with frames or as a published picture, and clips that are left out.

An entry is small and can be sent to another process. It opens its own files: who works with entries of both kinds asks
the entry, and not of which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.faces.crop import check_face, check_inside, face_crop
from htnet.data.frames import FolderFrames, Frames, PairFrames, is_whole, open_frames
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError

if TYPE_CHECKING:
    from htnet.data.video import VideoFrames


@dataclass(frozen=True, kw_only=True)
class GivenLandmarks:
    """Landmarks of a clip in a table."""

    points: Landmarks
    table: Path
    """The file, or the folder of a file per clip."""


@dataclass(frozen=True, kw_only=True)
class NoLandmarks:
    """A clip that has no landmarks in a table, and why."""

    reason: str


Made = TypeVar("Made", covariant=True)


class Maker(Protocol[Made]):
    """Work that differs between entries with frames and published pictures."""

    def from_frames(self, entry: Clip) -> Made: ...

    def from_picture(self, entry: FlowPicture) -> Made: ...


@dataclass(frozen=True, kw_only=True)
class Entry(ABC):
    """One annotated clip."""

    has_frames: ClassVar[bool]

    id: SampleId
    label: int | None = None
    """Class by the label scheme; None where nobody has labelled the clip, which no store takes."""
    emotion: str
    """The annotation's word."""
    place: str
    """Place of the clip, for messages: file, sheet, row."""
    notes: tuple[str, ...] = ()
    """Rules by which the annotation was read otherwise than it stands."""
    remarks: tuple[str, ...] = ()
    """A sentence for each annotated value that is not used: the value, the rule, file, sheet, row and column."""
    face: GivenLandmarks | NoLandmarks = NoLandmarks(reason="no landmark table was read")  # frozen

    @property
    @abstractmethod
    def path(self) -> Path:
        """The clip's files: a folder or a file."""

    @abstractmethod
    def absolute(self) -> Self:
        """Return the entry with an absolute path; what a user reads in ``place`` stays as it was."""

    @abstractmethod
    def open(self) -> NDArray[Any]:
        """Read the picture that landmarks are pixels of; :class:`InputError` names what is wrong with it."""

    @abstractmethod
    def describe_picture(self) -> str:
        """Name this picture, for messages."""

    @abstractmethod
    def check_landmarks(self, points: Landmarks, picture: NDArray[Any]) -> None:
        """Raise :class:`InputError` where the points cannot be those of a face in the picture."""

    @abstractmethod
    def identity(self, listed: Callable[[Path], bytes]) -> bytes:
        """Return what tells that the clip is read otherwise; ``listed`` gives names and sizes of a folder's files."""

    @abstractmethod
    def make(self, maker: Maker[Made]) -> Made:
        """Let the maker work on the entry."""

    def _identity(self) -> bytes:
        return repr((self.id, self.label, self.emotion)).encode()


@dataclass(frozen=True, kw_only=True)
class Clip(Entry):
    """A clip with frames. Frame numbers are those of the files, or count from 1 in a video.

    ``onset`` and ``offset`` None: the first and last frame there is. ``apex`` None: to be found.
    """

    has_frames: ClassVar[bool] = True

    frames: Path
    """Folder of pictures, or a video file."""
    fps: float | None = None
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None

    @property
    def path(self) -> Path:
        """The folder or video."""
        return self.frames

    def absolute(self) -> Self:
        """Return the clip with an absolute path."""
        return replace(self, frames=self.frames.absolute())

    def open_frames(self) -> FolderFrames | VideoFrames:
        """Open the clip's frames; :class:`InputError` where there are none."""
        return open_frames(self.frames)

    def onset_in(self, frames: Frames) -> int:
        """Number of the onset frame: the annotated one, else the first."""
        return frames.numbers[0] if self.onset is None else self.onset

    def open(self) -> NDArray[np.uint8]:
        """Read the onset frame, (H, W, 3) uint8, blue-green-red."""
        frames = self.open_frames()
        return frames.read(self.onset_in(frames))

    def describe_picture(self) -> str:
        """Name the onset frame."""
        return f"frame {self.onset_in(self.open_frames())}, the onset of clip {self.id}"

    def check_landmarks(self, points: Landmarks, picture: NDArray[Any]) -> None:
        """Raise :class:`InputError` where no face crop can be cut around the points."""
        face_crop(points, picture.shape)

    def identity(self, listed: Callable[[Path], bytes]) -> bytes:
        """Return label, interval and frames of the clip."""
        return self._identity() + repr((self.onset, self.apex, self.offset, self.fps)).encode() + listed(self.frames)

    def make(self, maker: Maker[Made]) -> Made:
        """Let the maker work on the clip."""
        return maker.from_frames(self)


@dataclass(frozen=True, kw_only=True)
class Pair(Clip):
    """Two pictures of any names: ``frames`` is the onset, frame 1, ``apex_picture`` the apex, frame 2."""

    apex_picture: Path
    onset: int | None = 1
    apex: int | None = 2

    def open_frames(self) -> FolderFrames | VideoFrames:
        """Open the two pictures."""
        return PairFrames(self.frames, self.apex_picture)


@dataclass(frozen=True, kw_only=True)
class FlowPicture(Entry):
    """A clip that comes as a flow picture, channels (flow_u, flow_v, strain) scaled to 0..255, without frames."""

    has_frames: ClassVar[bool] = False

    picture: Path
    flow_size: int
    """Side of the picture, which its landmarks are pixels of."""

    @property
    def path(self) -> Path:
        """The picture."""
        return self.picture

    def absolute(self) -> Self:
        """Return the clip with an absolute path."""
        return replace(self, picture=self.picture.absolute())

    def open(self) -> NDArray[np.float16]:
        """Read the picture, (F, F, 3) float16, channels (flow_u, flow_v, strain)."""
        image = read_flow_picture(self.picture)
        if image.shape[0] != self.flow_size:
            raise InputError(
                f"{self.picture}: a picture of {image.shape[0]} pixels, but its landmarks are in pixels of a picture "
                f"of {self.flow_size}"
            )
        return image

    def describe_picture(self) -> str:
        """Name the picture."""
        return f"the flow picture of clip {self.id}"

    def check_landmarks(self, points: Landmarks, picture: NDArray[Any]) -> None:
        """Raise :class:`InputError` where the points are none of a face that fills the picture."""
        check_inside(points, picture.shape)
        check_face(points, least=picture.shape[0] / 10)

    def identity(self, listed: Callable[[Path], bytes]) -> bytes:
        """Return the label of the clip; the pictures are digested by the adapter."""
        return self._identity()

    def make(self, maker: Maker[Made]) -> Made:
        """Let the maker work on the clip."""
        return maker.from_picture(self)


def clips_of(entries: Iterable[Entry]) -> list[Clip]:
    """Select those that have frames."""
    return [entry for entry in entries if isinstance(entry, Clip)]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A clip that does not become a sample, and why.

    ``failed``: something is wrong with the files (a damaged frame, no face found), so that the work is not complete;
    otherwise it is a choice (the label scheme) or a rule about the annotation.
    """

    clip: str
    rule: str
    reason: str
    place: str
    failed: bool = False


def read_flow_picture(path: Path) -> NDArray[np.float16]:
    """Read a published picture, (F, F, 3) float16, channels (flow_u, flow_v, strain); 0..255 is exact in float16."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    picture = None
    if data[:4] == b"\x89PNG" and is_whole(data):
        try:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:  # a size beyond all bounds
            picture = None
    if picture is None:
        raise InputError(f"{path}: unreadable picture: not a PNG, damaged or truncated ({len(data)} bytes)")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        channels = picture.shape[2] if picture.ndim == 3 else 1
        raise InputError(
            f"{path}: a flow picture must have 3 channels of 8 bits, got {channels} of {8 * picture.itemsize}"
        )
    if picture.shape[0] != picture.shape[1]:
        raise InputError(f"{path}: a flow picture must be square, got {picture.shape[1]} x {picture.shape[0]} pixels")
    return np.ascontiguousarray(picture[..., ::-1]).astype(np.float16)
