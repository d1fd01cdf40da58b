"""The known traps of the datasets' annotations and folders, each of which is planted as a clip of its own."""

from __future__ import annotations

from dataclasses import replace

from htnet.data.datasets.base import (
    APEX_AT_ONSET,
    APEX_NOT_CODED,
    APEX_OUTSIDE,
    MISSING_FRAMES,
    NEGATIVE_DURATION,
    OFFSET_UNUSABLE,
)
from htnet.data.datasets.labels import OUTSIDE_SCHEME
from htnet.data.synth.layouts.base import ClipFiles, Trap

LOOSE_TYPES = "loose_types"
"""Kind of trap: numbers stand as text with blanks, text as numbers, words in another case of letters."""
ODD_NAMES = "odd_names"
"""Kind of trap: folders or files are spelled otherwise than the annotation says, or otherwise than their siblings."""


def _marks(clip: ClipFiles, **changes: object) -> ClipFiles:
    return replace(clip, marks=replace(clip.marks, **changes))  # type: ignore[arg-type] # names of its fields


def no_frames(clip: ClipFiles) -> ClipFiles:
    """Take the frames away: the clip is decided before they matter, or they are not there."""
    return replace(clip, numbers=())


def apex_not_coded(cell: object) -> Trap:
    """Make a trap of an apex cell without a number."""
    return Trap(kind="apex_not_coded", rule=APEX_NOT_CODED, change=lambda clip: _marks(clip, apex=cell))


def emotion(word: str) -> Trap:
    """Make a trap of an emotion without a class; its frames are not needed."""
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
