"""The place of a clip's face: by its landmark table, else by a detector, else by the policy for failures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.config.prepare import LandmarkPolicy
from htnet.data.entries import Entry, GivenLandmarks
from htnet.data.faces.detector import Detector, Sighting
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError

MEAN_SHAPE = "mean_shape"
"""Method of a clip without a face of its own under the policy ``mean-shape``."""
SEVERAL_FACES = "several_faces"
"""Note of a clip in whose onset frame the detector saw several faces; one was chosen."""


class NoFaceError(InputError):
    """There are no landmarks of a clip, or they do not fit its picture."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Landmarks of a clip and how they were found.

    ``method`` is ``table NAME``, the name of a detector, or :data:`MEAN_SHAPE`; ``failure`` then says why the clip has
    no landmarks of its own. ``faces`` were seen in the picture, if a detector looked at it.
    """

    points: Landmarks
    method: str
    faces: int = 1
    failure: str | None = None


class FaceFinder:
    """Finds the faces of one subject's clips; what it has found of a clip it knows afterwards."""

    def __init__(self, detector: tuple[str, Detector] | None, policy: LandmarkPolicy) -> None:
        """Find by ``detector``, with its name, where no table gives landmarks; None: such clips have none."""
        self._detector, self._policy = detector, policy
        self._own: dict[SampleId, Located | str] = {}

    def find(self, entry: Entry, picture: NDArray[Any], siblings: Sequence[Entry]) -> Located:
        """Return landmarks in pixels of ``picture``, inside it: the onset frame, or the flow picture.

        Raises:
            NoFaceError: there are none, and the policy gives none.
        """
        own = self._own_of(entry, picture)
        if isinstance(own, Located):
            return own
        if self._policy == "mean-shape":
            # a published picture's points are pixels of the picture, a clip's of its frames
            alike = [other for other in siblings if other.has_frames == entry.has_frames]
            others = [found for other in alike if (found := self._quietly(other)) is not None]
            if others:
                mean = np.mean(np.asarray(others, np.float64), axis=0)
                points = tuple((float(x), float(y)) for x, y in mean)
                if (problem := _misfit(entry, points, picture)) is not None:
                    raise NoFaceError(f"{MEAN_SHAPE}: clip {entry.id}: {problem}")
                return Located(points=points, method=MEAN_SHAPE, failure=own)
        raise NoFaceError(own)

    def _own_of(self, entry: Entry, picture: NDArray[Any] | None = None) -> Located | str:
        """Return landmarks of the clip itself, or why there are none; ``picture`` is read where it is not given."""
        if entry.id not in self._own:
            self._own[entry.id] = self._locate(entry, entry.open() if picture is None else picture)
        return self._own[entry.id]

    def _locate(self, entry: Entry, picture: NDArray[Any]) -> Located | str:
        face = entry.face
        if isinstance(face, GivenLandmarks):
            found, method, place = Sighting(points=face.points, faces=1), f"table {face.table.name}", str(face.table)
        elif self._detector is None or not entry.has_frames:
            return face.reason
        else:
            seen = self._detect(entry, picture)
            if isinstance(seen, str):
                return seen
            found, method, place = seen, self._detector[0], self._detector[0]
        if (problem := _misfit(entry, found.points, picture)) is not None:
            return f"{place}: clip {entry.id}: {problem}"
        return Located(points=found.points, method=method, faces=found.faces)

    def _detect(self, entry: Entry, picture: NDArray[Any]) -> Sighting | str:
        """Return the face that the detector finds, or why there is none."""
        assert self._detector is not None
        name, detect = self._detector
        why = ""
        try:
            found = detect(picture)
        except cv2.error as error:  # a picture of a form that the network cannot take
            found, why = None, f": {' '.join(str(error).split())}"
        return f"{entry.path}: {name} found no face in {entry.describe_picture()}{why}" if found is None else found

    def _quietly(self, entry: Entry) -> Landmarks | None:
        """Return landmarks of another clip, whose own failures are told when it is its turn."""
        with contextlib.suppress(InputError):
            own = self._own_of(entry)
            return own.points if isinstance(own, Located) else None
        return None


def _misfit(entry: Entry, points: Landmarks, picture: NDArray[Any]) -> str | None:
    """Say why the points cannot be landmarks in the picture; None where they can."""
    try:
        entry.check_landmarks(points, picture)
    except InputError as error:
        return str(error)
    return None
