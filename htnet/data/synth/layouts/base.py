"""The common part of the layouts: a clip to write, the traps that an annotation may hold, and a layout's interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from htnet.data.datasets.base import (
    APEX_AT_ONSET,
    APEX_NOT_CODED,
    APEX_OUTSIDE,
    MISSING_FRAMES,
    NEGATIVE_DURATION,
    OFFSET_UNUSABLE,
)
from htnet.data.datasets.labels import OUTSIDE_SCHEME
from htnet.data.samples import Emotion, Landmarks
from htnet.data.synth.motion import Field

LOOSE_TYPES = "loose_types"
"""Kind of trap: numbers stand as text with blanks, text as numbers, words in another case of letters."""
ODD_NAMES = "odd_names"
"""Kind of trap: folders or files are spelled otherwise than the annotation says, or otherwise than their siblings."""


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


Change = Callable[[ClipFiles], ClipFiles]


@dataclass(frozen=True, kw_only=True)
class Trap:
    """One known trap of a dataset, planted as a clip of its own.

    ``rule``: the adapters' rule that must name it, None where a right reader has nothing to remark. ``kept``: whether
    the clip stays. ``failed``: whether leaving it out means that the work is not complete. ``name``: subject and clip
    where they are decisive. ``old_workbook``: only the dataset's .xls can hold it.
    """

    kind: str
    rule: str | None = None
    kept: bool = True
    failed: bool = False
    change: Change = lambda clip: clip
    name: tuple[str, str] | None = None
    old_workbook: bool = False


def _marks(clip: ClipFiles, **changes: object) -> ClipFiles:
    return replace(clip, marks=replace(clip.marks, **changes))  # type: ignore[arg-type] # names of its fields


def no_frames(clip: ClipFiles) -> ClipFiles:
    """The clip is decided before its frames matter, or they are not there."""
    return replace(clip, numbers=())


def apex_not_coded(cell: object) -> Trap:
    """The apex's cell holds no number."""
    return Trap(kind="apex_not_coded", rule=APEX_NOT_CODED, change=lambda clip: _marks(clip, apex=cell))


def emotion(word: str) -> Trap:
    """An emotion without a class; its frames are not needed."""
    kind = f"emotion_{word}"
    return Trap(kind=kind, rule=OUTSIDE_SCHEME, kept=False, change=lambda clip: no_frames(_marks(clip, emotion=word)))


APEX_IS_ONSET = Trap(kind="apex_at_onset", rule=APEX_AT_ONSET, change=lambda clip: _marks(clip, apex=clip.marks.onset))
APEX_AFTER_OFFSET = Trap(
    kind="apex_after_offset", rule=APEX_OUTSIDE, change=lambda clip: _marks(clip, apex=clip.offset + 7)
)
APEX_BEFORE_ONSET = Trap(
    kind="apex_before_onset", rule=APEX_OUTSIDE, change=lambda clip: _marks(clip, apex=max(1, clip.onset - 2))
)
OFFSET_TYPO = Trap(
    kind="offset_before_onset", rule=OFFSET_UNUSABLE, change=lambda clip: _marks(clip, offset=max(1, clip.onset // 10))
)
NEGATIVE = Trap(
    kind="negative_duration",
    rule=NEGATIVE_DURATION,
    kept=False,
    change=lambda clip: no_frames(_marks(clip, apex=clip.onset // 3, offset=clip.onset // 2)),
)
NO_FOLDER = Trap(
    kind="missing_folder",
    rule=MISSING_FRAMES,
    kept=False,
    failed=True,
    change=no_frames,
)
SHORT_FOLDER = Trap(
    kind="frames_end_at_apex",
    change=lambda clip: replace(clip, numbers=tuple(number for number in clip.numbers if number <= clip.apex)),
)
LOST_FRAMES = Trap(
    kind="frames_lost_in_between",
    change=lambda clip: replace(clip, numbers=tuple(sorted({*clip.numbers} - {clip.onset + 1, clip.offset - 1}))),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Form of the files: ``xls``: the older workbook where the dataset has one; ``video``: clips as videos."""

    xls: bool = False
    video: bool = False


class Layout:
    """One dataset's way of naming and writing things.

    ``length``: least and most frames from onset to apex, and from apex to offset. ``margin``: frames before the onset
    and after the offset. ``emotions``: the dataset's words for each of the three classes. ``frame``: name of a frame's
    file, of its number, the subject and the clip; "" where there are none. ``grey``: pictures have one channel.
    ``traps``: in the order in which they are planted. ``damaged``: which frames may be damaged such that the clip alone
    is lost. ``in_lists``: whether :meth:`listed_name` knows how a list of the MEGC2019 composite names its clips.
    """

    name: ClassVar[str]
    length: ClassVar[tuple[int, int]] = (5, 8)
    margin: ClassVar[int] = 2
    frame: ClassVar[str] = ""
    grey: ClassVar[bool] = False
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "anger", "fear"),
        Emotion.POSITIVE: ("happiness",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = ()
    damaged: ClassVar[tuple[str, ...]] = ("onset", "apex")
    in_lists: ClassVar[bool] = False

    def dataset_name(self, subject: int) -> str:
        """The dataset that a subject belongs to."""
        return self.name

    def subject_name(self, index: int) -> str:
        """Identity of a subject, ``index`` from 0."""
        raise NotImplementedError

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Number of the first frame of a subject's clip ``index``."""
        return 1

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Identity of a subject's clip ``index``, which is its ``number``-th (from 1) of the label."""
        raise NotImplementedError

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """Identity of a clip by its names in such a list; ValueError for names that are not the dataset's."""
        raise NotImplementedError

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write frames, annotation and landmarks under ``root``, which is made."""
        raise NotImplementedError
