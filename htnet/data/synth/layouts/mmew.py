"""MMEW: Micro_Expression/happiness/S01-07-001/1.jpg and MMEW_Micro_Exp.xlsx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import (
    APEX_AFTER_OFFSET,
    LOOSE_TYPES,
    NO_FOLDER,
    OFFSET_TYPO,
    ClipFiles,
    Form,
    Layout,
    Trap,
    apex_not_coded,
    emotion,
)
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table

_NO_SUBJECT = "blank_subject"


class MmewLayout(Layout):
    """The subject is also the first part of the clip's name; a remark stands under the table."""

    name = "mmew"
    frame = "{number}.jpg"
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "fear", "anger", "sadness"),
        Emotion.POSITIVE: ("happiness",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        APEX_AFTER_OFFSET,
        OFFSET_TYPO,
        apex_not_coded("/"),
        NO_FOLDER,
        Trap(kind=_NO_SUBJECT),
        Trap(kind=LOOSE_TYPES),
        emotion("others"),
    )

    def subject_name(self, index: int) -> str:
        """``S01``."""
        return f"S{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``S01-07-001``: subject, stimulus, number."""
        return f"S{subject + 1:02d}-{index // 3 + 1:02d}-{index % 3 + 1:03d}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units", "Estimated Emotion"]
        rows: list[list[object]] = [[*header, "remarks"]]
        for clip in clips:
            marks = clip.marks
            write_frames(root / "Micro_Expression" / marks.emotion / clip.clip, clip, self.frame)
            subject = None if clip.trap == _NO_SUBJECT else int(clip.subject[1:])
            frames, word = [marks.onset, marks.apex, marks.offset], marks.emotion
            if clip.trap == LOOSE_TYPES:
                frames, word = [f"{value} " for value in frames], f" {word.title()}"
            rows.append([subject, clip.clip, *frames, units(clip.label), word, None])
        if any(clip.trap for clip in clips):
            rows.extend([[None], [*[None] * 7, "synthetic faces, no people"]])
        write_table(root / "MMEW_Micro_Exp.xlsx", rows)
        write_landmarks(root, clips)
