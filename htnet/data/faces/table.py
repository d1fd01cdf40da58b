"""Landmarks by clip, as the readers of landmark tables give them, and what these readers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from htnet.data.datasets.tables import Row
from htnet.data.entries import GivenLandmarks, NoLandmarks
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError

KEY = ("dataset", "subject", "clip")
"""Columns that name a clip."""


@dataclass(frozen=True, kw_only=True)
class LandmarkTable:
    """Landmarks by clip. ``flow_size`` is the side of the flow image they are pixels of, None for the onset frame."""

    path: Path
    """The file, or the folder of a file per clip."""
    points: Mapping[SampleId, Landmarks]
    flow_size: int | None
    sha256: str = ""
    """Of the file, or of all files that were read."""
    not_found: Mapping[SampleId, str] = field(default_factory=dict)
    """Clips whose table says that no face was found, and where it says so."""

    def face_of(self, sample: SampleId) -> GivenLandmarks | NoLandmarks:
        """Return the landmarks of a clip, or why the table has none."""
        if sample in self.points:
            return GivenLandmarks(points=self.points[sample], table=self.path)
        return NoLandmarks(reason=self.not_found.get(sample, f"{self.path}: no landmarks for clip {sample}"))


def sample_of(row: Row) -> SampleId:
    """Return the clip that :data:`KEY` names; :class:`InputError` if a part of it is empty."""
    return SampleId(**{name: row.text(name) for name in KEY})


def by_clip(rows: Iterable[tuple[Row, Landmarks]]) -> dict[SampleId, Landmarks]:
    """Return landmarks by the clip that their row names; :class:`InputError` if a clip has two rows."""
    points: dict[SampleId, Landmarks] = {}
    seen: dict[SampleId, int] = {}
    for row, landmarks in rows:
        sample = sample_of(row)
        if sample in seen:
            raise InputError(f"{row.path}, row {row.number}: clip {sample} stands in row {seen[sample]} already")
        seen[sample] = row.number
        points[sample] = landmarks
    return points
