"""CASME: Section A/sub01/EP01_12/EP01_12-001.jpg (and Section B) and CASME.xlsx or .xls with two apexes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from htnet.data.datasets.casme import SECOND_APEX
from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import (
    APEX_AFTER_OFFSET,
    APEX_IS_ONSET,
    LOOSE_TYPES,
    NEGATIVE,
    OFFSET_TYPO,
    ClipFiles,
    Form,
    Layout,
    Trap,
    apex_not_coded,
    emotion,
)
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table

_TWO_APEXES = "two_apexes"


class CasmeLayout(Layout):
    """Every second subject was filmed by the camera of section B."""

    name = "casme"
    frame = "{clip}-{number:03d}.jpg"
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "repression", "sadness", "contempt", "fear"),
        Emotion.POSITIVE: ("happiness",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_TWO_APEXES, rule=SECOND_APEX),
        apex_not_coded(None),
        APEX_IS_ONSET,
        APEX_AFTER_OFFSET,
        OFFSET_TYPO,
        NEGATIVE,
        Trap(kind=LOOSE_TYPES),
        emotion("tense"),
    )

    def subject_name(self, index: int) -> str:
        """``sub01``."""
        return f"sub{index + 1:02d}"

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Somewhere in the recording."""
        return int(rng.integers(30, 120))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``EP01_12``."""
        return f"EP{index // 4 + 1:02d}_{index % 4 * 3 + 2:02d}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", "OnsetF", "ApexF1", "ApexF2", "OffsetF", "Action Units", "Emotion"]
        rows: list[list[object]] = [[*header]]
        for clip in clips:
            number = int(clip.subject[3:])
            section = f"Section {'A' if number % 2 else 'B'}"
            write_frames(root / section / clip.subject / clip.clip, clip, self.frame)
            marks = clip.marks
            second = clip.apex + 1 if clip.trap == _TWO_APEXES else None
            subject, word = (
                (clip.subject, marks.emotion.title()) if clip.trap == LOOSE_TYPES else (number, marks.emotion)
            )
            frames = [marks.onset, marks.apex, second, marks.offset]
            rows.append([subject, clip.clip, *frames, units(clip.label), word])
        write_table(root / ("CASME.xls" if form.xls else "CASME.xlsx"), rows)
        write_landmarks(root, clips)
