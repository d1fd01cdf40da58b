"""A list of one's own: samples.csv, and frames in folders of PNG or in motion-JPEG videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import APEX_NOT_CODED
from htnet.data.synth.layouts.base import (
    LOOSE_TYPES,
    NO_FOLDER,
    ClipFiles,
    Form,
    Layout,
    Marks,
    Trap,
    apex_not_coded,
    emotion,
)
from htnet.data.synth.layouts.files import write_frames, write_landmarks, write_table, write_video

_LABEL_NUMBER = "label_as_number"


def _no_numbers(clip: ClipFiles) -> ClipFiles:
    """Keep the frames that the numbers would have cut out."""
    marks = Marks(onset="", apex="", offset="", emotion=clip.marks.emotion)
    return replace(clip, numbers=tuple(range(clip.onset, clip.offset + 1)), marks=marks)


class CsvLayout(Layout):
    """Frames count from 1 in every clip, so that folders and videos have the same numbers."""

    name = "csv"
    frame = "{number:03d}.png"
    traps: ClassVar[tuple[Trap, ...]] = (
        apex_not_coded(""),
        Trap(kind="no_numbers", rule=APEX_NOT_CODED, change=_no_numbers),
        Trap(kind=_LABEL_NUMBER),
        Trap(kind=LOOSE_TYPES),
        NO_FOLDER,
        emotion("others"),
    )

    def dataset_name(self, subject: int) -> str:
        """One dataset of one's own."""
        return "own"

    def subject_name(self, index: int) -> str:
        """``p01``."""
        return f"p{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``take01``."""
        return f"take{index + 1:02d}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["dataset", "subject", "clip", "onset", "apex", "offset", "label", "frames", "fps"]
        rows: list[list[object]] = [[*header]]
        for clip in clips:
            marks = clip.marks
            place = f"clips/{clip.subject}/{clip.clip}" + (".avi" if form.video else "")
            if form.video:
                write_video(root / place, clip, 100)
            else:
                write_frames(root / place, clip, self.frame)
            label: object = clip.label if clip.trap == _LABEL_NUMBER else marks.emotion
            frames = [marks.onset, marks.apex, marks.offset]
            if clip.trap == LOOSE_TYPES:
                frames, label = [f" {cell}" for cell in frames], f"{marks.emotion.upper()} "
            rows.append([clip.dataset, clip.subject, clip.clip, *frames, label, place, 100])
        write_table(root / "samples.csv", rows)
        write_landmarks(root, clips)
