"""What every adapter does: read a dataset's annotations and say, for each clip, what it is or why it is left out.

An adapter decodes no picture. What it yields is small and can be sent to another process; landmarks, flow and the
sample are made of it there (:mod:`htnet.data.extraction`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from htnet.data.types import Landmarks, SampleId

__all__ = ["Adapter", "Clip", "FlowPicture", "LeftOut"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One annotated clip. Frame numbers are those of the files, or count from 1 in a video.

    ``onset`` and ``offset`` None: the first and last frame there is. ``apex`` None: to be found.
    """

    id: SampleId
    frames: Path
    """Folder of pictures, or a video file."""
    label: int
    emotion: str
    """The annotation's word."""
    place: str
    """Where the clip stands, for messages: file, sheet, row."""
    fps: float | None = None
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None
    notes: tuple[str, ...] = ()
    """Names of the rules by which the annotation was read differently from what it says, such as apex_not_coded."""


@dataclass(frozen=True, kw_only=True)
class FlowPicture:
    """A clip that comes as a flow picture, channels (flow_u, flow_v, strain) scaled to 0..255, without frames."""

    id: SampleId
    picture: Path
    label: int
    emotion: str
    place: str
    landmarks: Landmarks
    """In pixels of the picture."""
    flow_size: int


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


class Adapter(Protocol):
    """A dataset as its owners ship it. Built from ``root``, ``annotations`` (None: by the usual names), ``scheme``."""

    dataset: str

    def describe(self) -> dict[str, object]:
        """What identifies the input, for ``store.json``: adapter, annotation file and its checksum, notes on rules."""
        ...

    def entries(self) -> Iterator[Clip | FlowPicture | LeftOut]:
        """Every annotated clip once, in a fixed order.

        Raises:
            htnet.errors.InputError: an annotation that cannot be read; names file, sheet, row, column, value, rule.
        """
        ...
