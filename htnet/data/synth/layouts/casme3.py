"""CAS(ME)^3, parts A and C: recordings of several micro-expressions, named by recording and onset, or counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from htnet.data.datasets.base import MACRO
from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import (
    APEX_AFTER_OFFSET,
    APEX_BEFORE_ONSET,
    APEX_IS_ONSET,
    NEGATIVE,
    ODD_NAMES,
    OFFSET_TYPO,
    ClipFiles,
    Form,
    Layout,
    Trap,
    emotion,
    no_frames,
)
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table, write_video

_FRAME = "{number}.jpg"
_MACRO = "macro_expression"
_SLOT = 20
"""Frames from the start of an expression to the next in a recording; more than the longest of them has."""
_PER_RECORDING = 3


def _write_recording(folder: Path, clips: Sequence[ClipFiles]) -> None:
    """Write the expressions of a recording, and the resting face in between."""
    there = sorted((clip for clip in clips if clip.numbers), key=lambda clip: clip.numbers[0])
    for clip in there:
        write_frames(folder, clip, _FRAME)
    for before, after in pairwise(there):
        between = range(before.numbers[-1] + 1, after.numbers[0])
        write_frames(folder, replace(before, numbers=tuple(between)), _FRAME)


class Casme3ALayout(Layout):
    """part_A/spNO.1/b/color/175.jpg, or videos, and cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, all cells as text.

    As .xls, the table is the one that holds macro-expressions too.
    """

    name = "casme3_a"
    frame = _FRAME
    length = (3, 6)
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "fear", "anger", "sad"),
        Emotion.POSITIVE: ("happy",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=ODD_NAMES),
        APEX_IS_ONSET,
        APEX_AFTER_OFFSET,
        APEX_BEFORE_ONSET,
        OFFSET_TYPO,
        NEGATIVE,
        emotion("others"),
        emotion("Others"),
        Trap(kind=_MACRO, rule=MACRO, kept=False, change=no_frames, old_workbook=True),
    )

    def dataset_name(self, subject: int) -> str:
        """Parts A and C are two datasets."""
        return "casme3"

    def subject_name(self, index: int) -> str:
        """``spno.1``; spNO and spNo in the files."""
        return f"spno.{index + 1}"

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """The next slot of the recording."""
        return 40 + _SLOT * (index % _PER_RECORDING) + int(rng.integers(0, 3))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``b_166``."""
        return f"{chr(ord('a') + index // _PER_RECORDING)}_{onset}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        header = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion"]
        rows: list[list[object]] = [[*header, "Expression type"] if form.xls else [*header]]
        recordings: dict[tuple[str, str], list[ClipFiles]] = defaultdict(list)
        for clip in clips:
            letter, marks = clip.clip.partition("_")[0], clip.marks
            recordings[clip.subject.replace("spno", "spNO"), letter].append(clip)
            odd = clip.trap == ODD_NAMES
            name = [clip.subject.replace("spno", "spNo" if odd else "spNO"), letter.upper() if odd else letter]
            frames = [str(cell) for cell in (marks.onset, marks.apex, marks.offset)]
            row = [*name, *frames, units(clip.label), "I", marks.emotion]
            kind = "Macro-expression" if clip.trap == _MACRO else "Micro-expression"
            rows.append([*row, kind] if form.xls else [*row])
        for (subject, letter), found in recordings.items():
            if not form.video:
                _write_recording(root / "part_A" / subject / letter / "color", found)
                continue
            for clip in found:
                path = root / "Part_A_ME_clip" / "video" / f"{clip.subject.replace('spno', 'spNo')}_{clip.clip}.mp4"
                # named by its onset, and begins there
                numbers = tuple(number for number in clip.numbers if number >= clip.onset)
                write_video(path, replace(clip, numbers=numbers), 30)
        table = "CAS(ME)3_part_A_v2.xls" if form.xls else "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx"
        write_table(root / table, rows, sheet="label", more_sheets=["Sheet1", "Sheet3"])
        write_landmarks(root, clips)


class Casme3CLayout(Layout):
    """part_C/1/color/6450.jpg, one recording a subject, and CAS(ME)3_part_C_ME.xlsx, which has no apex."""

    name = "casme3_c"
    frame = _FRAME
    length = (3, 6)
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("negative",),
        Emotion.POSITIVE: ("positive",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (emotion("others"), NEGATIVE)
    damaged: ClassVar[tuple[str, ...]] = ("onset",)

    def dataset_name(self, subject: int) -> str:
        """Parts A and C are two datasets."""
        return "casme3c"

    def subject_name(self, index: int) -> str:
        """``sub01``; 1 in the files."""
        return f"sub{index + 1:02d}"

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """The next slot of the recording."""
        return 350 + _SLOT * index + int(rng.integers(0, 3))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """The subject's expressions are counted."""
        return str(index + 1)

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        rows: list[list[object]] = [["sub", "count", "onset", "offset", "au", "emotion"]]
        subjects: dict[int, list[ClipFiles]] = defaultdict(list)
        for clip in clips:
            number, marks = int(clip.subject[3:]), clip.marks
            subjects[number].append(clip)
            rows.append([number, int(clip.clip), marks.onset, marks.offset, units(clip.label), marks.emotion])
        for number, found in subjects.items():
            _write_recording(root / "part_C" / str(number) / "color", found)
        write_table(root / "CAS(ME)3_part_C_ME.xlsx", rows, sheet="mockCrimeME")
        write_landmarks(root, clips)
