"""CASME II: CASME2_RAW_selected/sub01/EP02_01f/img46.jpg and CASME2-coding-20140508.xlsx (older: a .xls)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import (
    APEX_AFTER_OFFSET,
    LOOSE_TYPES,
    OFFSET_TYPO,
    SHORT_FOLDER,
    ClipFiles,
    Form,
    Layout,
    Trap,
    apex_not_coded,
    emotion,
)
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table


class Casme2Layout(Layout):
    """Two of the columns have no header; subjects are numbers that lost their zeros."""

    name = "casme2"
    frame = "img{number}.jpg"
    in_lists = True
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "repression"),
        Emotion.POSITIVE: ("happiness",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        apex_not_coded("/"),
        OFFSET_TYPO,
        APEX_AFTER_OFFSET,
        SHORT_FOLDER,
        Trap(kind=LOOSE_TYPES),
        emotion("others"),
        emotion("sadness"),
        emotion("fear"),
    )

    def subject_name(self, index: int) -> str:
        """``sub01``."""
        return f"sub{index + 1:02d}"

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Somewhere in the recording."""
        return int(rng.integers(30, 120))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``EP02_01f``."""
        return f"EP{index + 1:02d}_{subject % 9 + 1:02d}f"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """As the list has them."""
        if not (re.fullmatch(r"sub\d\d", subject) and re.fullmatch(r"EP\d\d\w*", clip)):
            raise ValueError(f"must be such as sub01, EP02_01f, got {subject!r}, {clip!r}")
        return subject, clip

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None]
        rows: list[list[object]] = [[*header, "Action Units", "Estimated Emotion"]]
        for clip in clips:
            write_frames(root / "CASME2_RAW_selected" / clip.subject / clip.clip, clip, self.frame)
            marks = clip.marks
            subject: object = int(clip.subject[3:])
            frames, word = [marks.onset, marks.apex, marks.offset], marks.emotion
            if clip.trap == LOOSE_TYPES:
                subject, frames, word = clip.subject, [f" {value}" for value in frames], f"{word.title()} "
            rows.append([subject, clip.clip, None, *frames, None, units(clip.label), word])
        write_table(root / ("CASME2_label_Ver_2.xls" if form.xls else "CASME2-coding-20140508.xlsx"), rows)
        write_landmarks(root, clips)
