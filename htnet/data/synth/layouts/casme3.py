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
from htnet.data.datasets.casme3 import Casme3A, Casme3C
from htnet.data.datasets.tables import first_name
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Form, Trap
from htnet.data.synth.layouts.files import write_frames, write_video
from htnet.data.synth.layouts.table import Cells, TableLayout, padded

_MACRO = "macro_expression"
_SLOT = 20
"""Frames from the start of an expression to the next in a recording; more than the longest of them has."""
_PER_RECORDING = 3
_KIND = first_name(Casme3A.more_columns[0])


class _RecordingLayout(TableLayout):
    """A folder holds a recording with several expressions."""

    frame = "{number}.jpg"
    length = (3, 6)

    def write_clips(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the expressions of every recording, and the resting face in between."""
        recordings: dict[Path, list[ClipFiles]] = defaultdict(list)
        for clip in clips:
            if clip.numbers:
                recordings[self.folder(clip)].append(clip)
        for folder, found in recordings.items():
            there = sorted(found, key=lambda clip: clip.numbers[0])
            for clip in there:
                write_frames(root / folder, clip, self.frame)
            for before, after in pairwise(there):
                between = range(before.numbers[-1] + 1, after.numbers[0])
                write_frames(root / folder, replace(before, numbers=tuple(between)), self.frame)


class Casme3ALayout(_RecordingLayout):
    """part_A/spNO.1/b/color/175.jpg, or videos, and cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, all cells as text.

    As .xls, the table is the one that holds macro-expressions too.
    """

    adapter = Casme3A
    header = ("subject", "clip", "onset", "apex", "offset", "AU", "Objective class", "emotion")
    old_table = Casme3A.workbooks[-1]
    sheets = ("label", "Sheet1", "Sheet3")
    subject = "spno.{}"
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=trap.ODD_NAMES),
        trap.APEX_IS_ONSET,
        trap.APEX_AFTER_OFFSET,
        trap.APEX_BEFORE_ONSET,
        trap.OFFSET_TYPO,
        trap.NEGATIVE,
        trap.emotion("others"),
        trap.emotion("Others"),
        Trap(kind=_MACRO, rule=MACRO, kept=False, change=trap.no_frames, old_workbook=True),
    )

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Return the start of the recording's next slot."""
        return 40 + _SLOT * (index % _PER_RECORDING) + int(rng.integers(0, 3))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``b_166``."""
        return f"{chr(ord('a') + index // _PER_RECORDING)}_{onset}"

    def folder(self, clip: ClipFiles) -> Path:
        """Return the folder of the recording."""
        return Path(Casme3A.folders[0], clip.subject.replace("spno", "spNO"), _letter(clip), "color")

    def write_clips(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write recordings, or a video for each clip."""
        if not form.video:
            super().write_clips(root, clips, form)
            return
        for clip in clips:
            name = f"{clip.subject.replace('spno', 'spNo')}_{clip.clip}.mp4"
            # named by its onset, and begins there
            numbers = tuple(number for number in clip.numbers if number >= clip.onset)
            write_video(root / Casme3A.videos / name, replace(clip, numbers=numbers), 30)

    def header_of(self, form: Form) -> Sequence[str]:
        """Add the kind of expression, which the older table has."""
        return (*self.header, _KIND) if form.xls else self.header

    def row(self, clip: ClipFiles) -> Cells:
        """Write every cell as text."""
        odd, letter, cells = clip.trap == trap.ODD_NAMES, _letter(clip), super().row(clip)
        return {
            **cells,
            **padded(cells, "{}"),
            "subject": clip.subject.replace("spno", "spNo" if odd else "spNO"),
            "clip": letter.upper() if odd else letter,
            "Objective class": "I",
            _KIND: "Macro-expression" if clip.trap == _MACRO else "Micro-expression",
        }


def _letter(clip: ClipFiles) -> str:
    """Return the letter of the clip's recording."""
    return clip.clip.partition("_")[0]


class Casme3CLayout(_RecordingLayout):
    """part_C/1/color/6450.jpg, one recording a subject, and CAS(ME)3_part_C_ME.xlsx, which has no apex."""

    adapter = Casme3C
    header = ("subject", "clip", "onset", "offset", "au", "emotion")
    numbered = True
    sheets = ("mockCrimeME",)
    traps: ClassVar[tuple[Trap, ...]] = (trap.emotion("others"), trap.NEGATIVE)
    damaged: ClassVar[tuple[str, ...]] = ("onset",)

    def first_frame(self, rng: np.random.Generator, index: int) -> int:
        """Return the start of the recording's next slot."""
        return 350 + _SLOT * index + int(rng.integers(0, 3))

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Count the subject's expressions."""
        return str(index + 1)

    def folder(self, clip: ClipFiles) -> Path:
        """Return the folder of the subject's recording."""
        return Path(Casme3C.folders[0], str(clip.number), "color")

    def row(self, clip: ClipFiles) -> Cells:
        """Write the count as a number."""
        return super().row(clip) | {"clip": int(clip.clip)}
