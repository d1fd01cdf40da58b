"""The place of a clip's face: by its landmark table, else by a detector, else by the policy for failures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.datasets.base import Clip, FlowPicture
from htnet.data.datasets.htnet_release import read_flow_picture
from htnet.data.faces.detectors import Detector
from htnet.data.faces.landmarks import LandmarkTable, check_face, check_inside, face_crop
from htnet.data.frames import Frames, open_frames
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError

MEAN_SHAPE = "mean_shape"
"""Method of a clip without a face of its own under the policy ``mean-shape``."""
LandmarkPolicy = Literal["error", "skip", "mean-shape"]


class NoFaceError(InputError):
    """There are no landmarks of a clip, or they do not fit its picture."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Landmarks of a clip and how they were found.

    ``method`` is ``table NAME``, the name of a detector, or :data:`MEAN_SHAPE`; ``failure`` then says why the clip has
    no landmarks of its own.
    """

    points: Landmarks
    method: str
    failure: str | None = None


class FaceFinder:
    """Finds the faces of one subject's clips; what it has found of a clip it knows afterwards."""

    def __init__(self, table: LandmarkTable, detector: tuple[str, Detector] | None, policy: LandmarkPolicy) -> None:
        """``detector``: with its name, for clips that the table does not cover; None: they have no landmarks."""
        self._table, self._detector, self._policy = table, detector, policy
        self._own: dict[SampleId, Located | str] = {}

    def find(self, entry: Clip | FlowPicture, picture: NDArray[Any], siblings: Sequence[Clip | FlowPicture]) -> Located:
        """Landmarks in pixels of ``picture``, inside it: the onset frame, or the flow picture.

        Raises:
            NoFaceError: there are none, and the policy gives none.
        """
        own = self._own_of(entry, picture)
        if isinstance(own, Located):
            return own
        if self._policy == "mean-shape":
            # a published picture's points are pixels of the picture, a clip's of its frames
            alike = [other for other in siblings if isinstance(other, Clip) == isinstance(entry, Clip)]
            others = [found for other in alike if (found := self._quietly(other)) is not None]
            if others:
                mean = np.mean(np.asarray(others, np.float64), axis=0)
                points = tuple((float(x), float(y)) for x, y in mean)
                if (problem := _misfit(entry, points, picture)) is not None:
                    raise NoFaceError(f"{MEAN_SHAPE}: clip {entry.id}: {problem}")
                return Located(points=points, method=MEAN_SHAPE, failure=own)
        raise NoFaceError(own)

    def _own_of(self, entry: Clip | FlowPicture, picture: NDArray[Any] | None = None) -> Located | str:
        """Landmarks of the clip itself, or why there are none; ``picture`` is read where it is not given."""
        if entry.id not in self._own:
            self._own[entry.id] = self._locate(entry, _read(entry) if picture is None else picture)
        return self._own[entry.id]

    def _locate(self, entry: Clip | FlowPicture, picture: NDArray[Any]) -> Located | str:
        points, method = self._table.points.get(entry.id), f"table {self._table.name_of(entry.id)}"
        if points is None:
            if self._detector is None or isinstance(entry, FlowPicture):
                return self._table.missing(entry.id)
            method, detect = self._detector
            why = ""
            try:
                points = detect(picture)
            except cv2.error as error:  # a picture of a form that the network cannot take
                why = f": {' '.join(str(error).split())}"
            if points is None:
                onset = onset_of(entry, open_frames(entry.frames))
                return f"{entry.frames}: {method} found no face in frame {onset}, the onset of clip {entry.id}{why}"
        if (problem := _misfit(entry, points, picture)) is not None:
            place = method if isinstance(entry, Clip) else self._table.origin(entry.id).path
            return f"{place}: clip {entry.id}: {problem}"
        return Located(points=points, method=method)

    def _quietly(self, entry: Clip | FlowPicture) -> Landmarks | None:
        """Landmarks of another clip, whose own failures are told when it is its turn."""
        with contextlib.suppress(InputError):
            own = self._own_of(entry)
            return own.points if isinstance(own, Located) else None
        return None


def _read(entry: Clip | FlowPicture) -> NDArray[Any]:
    """Read what landmarks are pixels of: the onset frame, or the flow picture."""
    if isinstance(entry, FlowPicture):
        return read_flow_picture(entry.picture)
    frames = open_frames(entry.frames)
    return frames.read(onset_of(entry, frames))


def _misfit(entry: Clip | FlowPicture, points: Landmarks, picture: NDArray[Any]) -> str | None:
    """Say why the points cannot be landmarks in the picture; None where they can."""
    try:
        if isinstance(entry, Clip):
            face_crop(points, picture.shape)
        else:
            check_inside(points, picture.shape)
            check_face(points, least=picture.shape[0] / 10)
    except InputError as error:
        return str(error)
    return None


def onset_of(clip: Clip, frames: Frames) -> int:
    """Number of the onset frame: the annotated one, else the first."""
    return frames.numbers[0] if clip.onset is None else clip.onset
