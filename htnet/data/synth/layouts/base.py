"""The common part of the layouts: a clip to write, a trap, and the interface of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Landmarks
from htnet.data.synth.motion import Field


@dataclass(frozen=True, kw_only=True)
class Marks:
    """An annotation of a clip, right or wrong: cells as they are written."""

    onset: object
    apex: object
    offset: object
    emotion: str


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged frame: ``how`` is truncated, empty or text."""

    frame: int
    how: str


@dataclass(frozen=True, kw_only=True)
class ClipFiles:
    """A clip as a layout needs to know it.

    ``dataset``, ``subject`` and ``clip`` are its identity as an adapter should give it. ``numbers`` are those of the
    frames on disk, rising; ``onset``, ``apex`` and ``offset`` are the truth. ``render`` draws a frame by its number,
    (S, S, 3) uint8; ``flow`` is the true flow from onset to apex, (S, S, 2) pixels.
    """

    dataset: str
    subject: str
    clip: str
    label: int
    numbers: tuple[int, ...]
    onset: int
    apex: int
    offset: int
    marks: Marks
    landmarks: Landmarks
    render: Callable[[int], NDArray[np.uint8]]
    flow: Callable[[], Field]
    trap: str | None = None
    damage: Damage | None = None

    @property
    def number(self) -> int:
        """Number of the subject."""
        return int("".join(filter(str.isdigit, self.subject)))


Change = Callable[[ClipFiles], ClipFiles]


@dataclass(frozen=True, kw_only=True)
class Trap:
    """One known trap of a dataset, planted as a clip of its own.

    ``rule``: the adapters' rule that must name it, None where a right reader has nothing to remark. ``kept``: whether
    the clip stays. ``failed``: whether leaving it out means that the work is not complete. ``old_workbook``: only the
    dataset's .xls can hold it.
    """

    kind: str
    rule: str | None = None
    kept: bool = True
    failed: bool = False
    change: Change = lambda clip: clip
    old_workbook: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """Form of the files: ``xls``: the older workbook where the dataset has one; ``video``: clips as videos."""

    xls: bool = False
    video: bool = False


class Layout:
    """One dataset's way of naming and writing things.

    ``subject``: name of a subject by its number. ``starts``: range of a clip's first frame.
    ``length``: least and most frames from onset to apex, and from apex to offset. ``margin``: frames before the onset
    and after the offset. ``frame``: name of a frame's file, of its number, the subject and the clip; "" where there are
    none. ``grey``: pictures have one channel. ``traps``: in the order in which they are planted. ``damaged``: which
    frames may be damaged such that the clip alone is lost. ``in_lists``: whether :meth:`listed_name` knows how a list
    of the MEGC2019 composite names its clips.
    """

    subject: ClassVar[str] = "sub{:02d}"
    starts: ClassVar[tuple[int, int] | None] = None
    length: ClassVar[tuple[int, int]] = (5, 8)
    margin: ClassVar[int] = 2
    frame: ClassVar[str] = ""
    grey: ClassVar[bool] = False
    traps: ClassVar[tuple[Trap, ...]] = ()
    damaged: ClassVar[tuple[str, ...]] = ("onset", "apex")
    in_lists: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The adapter's."""
        raise NotImplementedError

    def dataset_name(self, subject: int) -> str:
        """Return the dataset that a subject belongs to."""
        raise NotImplementedError

    def subject_name(self, index: int) -> str:
        """Return the identity of a subject, ``index`` from 0."""
        return self.subject.format(index + 1)

    def words(self, label: int) -> tuple[str, ...]:
        """Return the dataset's words for a class, by the index of which one is drawn."""
        raise NotImplementedError

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Return the number of the first frame of a subject's clip ``index``; 1, or somewhere in the recording."""
        return 1 if self.starts is None else int(rng.integers(*self.starts))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return the identity of a subject's clip ``index``, which is its ``number``-th (from 1) of the label."""
        raise NotImplementedError

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """Return the identity of a clip by its names in a list; ValueError for names that are not the dataset's."""
        raise NotImplementedError

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write frames, annotation and landmarks under ``root``, which is made."""
        raise NotImplementedError
