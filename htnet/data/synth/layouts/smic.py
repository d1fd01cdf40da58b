"""SMIC-HS: HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp and SMIC-HS-E_annotation.xlsx, which has no apex."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.smic import Smic
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Form, Trap
from htnet.data.synth.layouts.table import Cells, TableLayout

_FURTHER = "further_expression_of_a_recording"
_LEAD = 34
"""Frames of the long recording before the first that is in the clip's folder."""
_INTERVALS = (
    ("OnsetF", "OffsetF", "TotalMF1"),
    ("Onset2F", "Offset2F", "TotalMF2"),
    ("Onset3F", "Offset3F", "TotalMF3"),
)


class SmicLayout(TableLayout):
    """A folder holds one micro-expression; a row is the longer recording it was cut from, and has its frame numbers."""

    adapter = Smic
    header = ("subject", "clip", *sum(_INTERVALS, ()), "emotion", "FirstF", "LastF", "TotalVL")
    numbered = True
    remark = (None, "OnsetF: first frame of the micro-expression in the recording")
    subject = "s{:02d}"
    frame = "reg_image{number:06d}.bmp"
    in_lists = True
    length = (4, 6)
    margin = 0
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_FURTHER),
        trap.NO_FOLDER,
        trap.LOST_FRAMES,
        Trap(kind=trap.LOOSE_TYPES),
    )
    damaged: ClassVar[tuple[str, ...]] = ("onset",)

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``s01_ne_01``, as the MEGC2019 list writes it; ``s1_ne_01`` on disk and in the workbook."""
        return f"{self.subject_name(subject)}_{('ne', 'po', 'sur')[label]}_{number:02d}"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """Return the names of the list, in two digits."""
        person, name = re.fullmatch(r"s(\d{1,2})", subject), re.fullmatch(r"s0*(\d{1,2})(_(?:ne|po|sur)_\d+)", clip)
        if person is None or name is None or int(person[1]) != int(name[1]):
            raise ValueError(f"must be such as s01, s01_ne_01, got {subject!r}, {clip!r}")
        return f"s{int(person[1]):02d}", f"s{int(person[1]):02d}{name[2]}"

    def folder(self, clip: ClipFiles) -> Path:
        """Take the folders of subject and emotion."""
        return Path(Smic.folders[0], clip.subject, "micro", clip.marks.emotion, _name(clip))

    def rows(self, clips: Sequence[ClipFiles], form: Form) -> Iterator[Cells]:
        """Put a further expression into the row of the recording before."""
        rows: list[Cells] = []
        for clip in clips:
            if clip.trap == _FURTHER:
                rows[-1] |= _interval(clip, 1, later=100)
            else:
                rows.append(self.row(clip))
        return iter(rows)

    def row(self, clip: ClipFiles) -> Cells:
        """Describe the recording that the clip was cut from."""
        name = clip.clip if clip.trap == trap.LOOSE_TYPES else _name(clip)
        end = clip.offset + 2 * _LEAD
        return {**super().row(clip), "clip": name, **_interval(clip, 0), "FirstF": 1, "LastF": end, "TotalVL": end}


def _name(clip: ClipFiles) -> str:
    return f"s{clip.number}{clip.clip.removeprefix(clip.subject)}"


def _interval(clip: ClipFiles, which: int, later: int = 0) -> Cells:
    """Return the cells of a recording's expression, ``later`` frames after the clip's own."""
    numbers = (clip.onset + _LEAD + later, clip.offset + _LEAD + later, clip.offset - clip.onset + 1)
    return dict(zip(_INTERVALS[which], numbers, strict=True))
