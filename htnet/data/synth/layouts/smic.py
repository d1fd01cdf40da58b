"""SMIC-HS: HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp and SMIC-HS-E_annotation.xlsx, which has no apex."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import LOOSE_TYPES, LOST_FRAMES, NO_FOLDER, ClipFiles, Form, Layout, Trap
from htnet.data.synth.layouts.files import write_frames, write_landmarks, write_table

_FURTHER = "further_expression_of_a_recording"
_LEAD = 34
"""Frames of the long recording before the first that is in the clip's folder."""


class SmicLayout(Layout):
    """A folder holds one micro-expression; a row is the longer recording it was cut from, and has its frame numbers."""

    name = "smic"
    frame = "reg_image{number:06d}.bmp"
    in_lists = True
    length = (4, 6)
    margin = 0
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("negative",),
        Emotion.POSITIVE: ("positive",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_FURTHER),
        NO_FOLDER,
        LOST_FRAMES,
        Trap(kind=LOOSE_TYPES),
    )
    damaged: ClassVar[tuple[str, ...]] = ("onset",)

    def subject_name(self, index: int) -> str:
        """``s01``."""
        return f"s{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``s01_ne_01``, as the MEGC2019 list writes it; ``s1_ne_01`` on disk and in the workbook."""
        return f"{self.subject_name(subject)}_{('ne', 'po', 'sur')[label]}_{number:02d}"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """As the list has them, in two digits."""
        person, name = re.fullmatch(r"s(\d{1,2})", subject), re.fullmatch(r"s0*(\d{1,2})(_(?:ne|po|sur)_\d+)", clip)
        if person is None or name is None or int(person[1]) != int(name[1]):
            raise ValueError(f"must be such as s01, s01_ne_01, got {subject!r}, {clip!r}")
        return f"s{int(person[1]):02d}", f"s{int(person[1]):02d}{name[2]}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", "OnsetF", "OffsetF", "TotalMF1", "Onset2F", "Offset2F", "TotalMF2", "Onset3F"]
        header += ["Offset3F", "TotalMF3", "Emotion", "FirstF", "LastF", "TotalVL"]
        rows: list[list[object]] = [[*header]]
        for clip in clips:
            number = int(clip.subject[1:])
            name = f"s{number}{clip.clip.removeprefix(clip.subject)}"
            write_frames(root / "HS" / clip.subject / "micro" / clip.marks.emotion / name, clip, self.frame)
            start, end = clip.onset + _LEAD, clip.offset + _LEAD
            length = end - start + 1
            if clip.trap == _FURTHER:
                # the recording of the row before: a second expression in it
                rows[-1][5:8] = [start + 100, end + 100, length]
                continue
            subject: object = number
            if clip.trap == LOOSE_TYPES:
                subject, name = clip.subject, clip.clip
            recording = [1, end + _LEAD, end + _LEAD]
            rows.append([subject, name, start, end, length, *[None] * 6, clip.marks.emotion, *recording])
        if any(clip.trap for clip in clips):
            rows.extend([[None], [None, "OnsetF: first frame of the micro-expression in the recording"]])
        write_table(root / "SMIC-HS-E_annotation.xlsx", rows)
        write_landmarks(root, clips)
