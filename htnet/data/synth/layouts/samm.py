"""SAMM: 006/006_1_2/006_05562.jpg, grey, and SAMM_Micro_FACS_Codes_v2.xlsx with its header in row 14."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import (
    APEX_AFTER_OFFSET,
    APEX_BEFORE_ONSET,
    LOOSE_TYPES,
    ODD_NAMES,
    OFFSET_TYPO,
    ClipFiles,
    Form,
    Layout,
    Trap,
    emotion,
)
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table

_UNSURE = "unsure_action_units"


class SammLayout(Layout):
    """Thirteen rows of remarks above the header; subjects are numbers that lost their zeros."""

    name = "samm"
    frame = "{subject}_{number:05d}.jpg"
    grey = True
    in_lists = True
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("Anger", "Contempt", "Disgust", "Fear", "Sadness"),
        Emotion.POSITIVE: ("Happiness",),
        Emotion.SURPRISE: ("Surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        APEX_AFTER_OFFSET,
        APEX_BEFORE_ONSET,
        OFFSET_TYPO,
        Trap(kind=ODD_NAMES),
        Trap(kind=LOOSE_TYPES),
        Trap(kind=_UNSURE),
        emotion("Other"),
    )

    def subject_name(self, index: int) -> str:
        """``006``."""
        return f"{index + 6:03d}"

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Somewhere in the recording."""
        return int(rng.integers(900, 8000))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``006_1_2``."""
        return f"{self.subject_name(subject)}_{index // 3 + 1}_{index % 3 + 1}"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """The subject with its zeros."""
        if not (re.fullmatch(r"\d{1,3}", subject) and re.fullmatch(r"\d{3}_\d+_\d+", clip)):
            raise ValueError(f"must be such as 6, 006_1_2, got {subject!r}, {clip!r}")
        return f"{int(subject):03d}", clip

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration"]
        header += ["Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes"]
        blank: list[object] = [None]
        rows: list[list[object]] = [["Synthetic data in the layout of SAMM"], *[blank] * 12, [*header]]
        for clip in clips:
            name = self.frame.replace(":05d", "") if clip.trap == ODD_NAMES else self.frame
            write_frames(root / clip.subject / clip.clip, clip, name, grey=self.grey)
            marks = clip.marks
            subject: object = clip.subject if clip.trap == LOOSE_TYPES else int(clip.subject)
            word = marks.emotion.upper() if clip.trap == LOOSE_TYPES else marks.emotion
            action = f"{units(clip.label)} or 7" if clip.trap == _UNSURE else units(clip.label)
            frames = [marks.onset, marks.apex, marks.offset, clip.offset - clip.onset + 1]
            induced = int(clip.clip.split("_")[1])
            rows.append([subject, clip.clip, induced, *frames, "Micro - 1/2", action, word, None, None])
        write_table(root / "SAMM_Micro_FACS_Codes_v2.xlsx", rows)
        write_landmarks(root, clips)
