"""CAS(ME)^3 (Li et al., IEEE TPAMI 2023), parts A and C: 30 frames a second, colour.

Part A: ``part_A/spNO.1/b/color/175.jpg``, or the clips ``Part_A_ME_clip/frame/spNo.1_b_166/175.jpg`` (also as
``video/spNo.1_b_166.mp4``, taken to begin at the onset). A recording holds several micro-expressions, so that a clip is
named by recording and onset, ``b_166``, as the owners name the clips. Subjects are written spNO and spNo; ``spno.1``
here.

Part C (mock crime): ``CAS(ME)3_part_C_ME.xlsx`` names subject and count; frames are looked for in
``part_C/<subject>/color`` and, as clips, in ``Part_C_ME_clip/frame/<subject>_<count>``. No apex is annotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import MACRO, Interval, WorkbookDataset, read_interval
from htnet.data.datasets.tables import Row
from htnet.data.entries import Clip, LeftOut
from htnet.data.frames import inside
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Casme3A(WorkbookDataset):
    """Adapter of part A, with any of its three annotation files."""

    adapter: ClassVar[str] = "casme3_a"
    workbooks: ClassVar[tuple[str, ...]] = (
        "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx",
        "cas(me)3_part_A_ME_label_JpgIndex_v1.xls",
        "CAS(ME)3_part_A_v2.xls",
    )
    columns: ClassVar[tuple[str, ...]] = (
        *("Subject", "Filename", "Onset", "Apex", "Offset", "emotion|Emotion", "Expression type?"),
    )
    fps: ClassVar[float | None] = 30.0

    def entry(self, row: Row, sample: SampleId) -> Clip | LeftOut:
        """Turn a row into a clip or a reason; the file of macro- and micro-expressions gives its micro-expressions."""
        kind = row.optional("Expression type")
        if kind and "micro" not in kind.lower():
            place = row.place("Expression type")
            return LeftOut(clip=str(sample), rule=MACRO, reason=f"expression type {kind}", place=place)
        entry = super().entry(row, sample)
        return _counted_from_one(entry) if isinstance(entry, Clip) and entry.frames.is_file() else entry

    def sample_of(self, row: Row) -> SampleId:
        """``casme3/spno.1/b_166``."""
        text = row.text("Subject")
        match = re.fullmatch(r"spno\.?\s*(\d+)", text, re.IGNORECASE)
        if match is None:
            raise InputError(f"{row.place('Subject')}: must be such as spNO.1, got {text!r}")
        clip = f"{row.name('Filename').lower()}_{row.integer('Onset')}"
        return SampleId(dataset="casme3", subject=f"spno.{int(match[1])}", clip=clip)

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """The emotion's word; "others" is also written with a capital."""
        return row.text("emotion"), row.place("emotion")

    def interval_of(self, row: Row) -> Interval | str:
        """Onset, apex, offset; 55 apexes are the onset itself, others outside, three offsets before the onset."""
        return read_interval(row, "Onset", "Apex", "Offset")

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """The recording, else the clip as pictures or as a video."""
        clips = self.root / "Part_A_ME_clip"
        yield inside(self.root / "part_A", sample.subject, row.name("Filename"), "color")
        yield inside(clips / "frame", f"{sample.subject}_{sample.clip}")
        yield inside(clips / "video", f"{sample.subject}_{sample.clip}.mp4")


def _counted_from_one(clip: Clip) -> Clip:
    """The annotation has the recording's frame numbers; a clip's video begins at its onset, and counts from 1."""
    before = 0 if clip.onset is None else clip.onset - 1
    apex, offset = (None if number is None else number - before for number in (clip.apex, clip.offset))
    return replace(clip, onset=1, apex=apex, offset=offset)


@dataclass(frozen=True, kw_only=True)
class Casme3C(WorkbookDataset):
    """Adapter of part C."""

    adapter: ClassVar[str] = "casme3_c"
    workbooks: ClassVar[tuple[str, ...]] = ("CAS(ME)3_part_C_ME.xlsx",)
    columns: ClassVar[tuple[str, ...]] = ("sub", "count", "onset", "offset", "emotion")
    fps: ClassVar[float | None] = 30.0

    def sample_of(self, row: Row) -> SampleId:
        """``casme3c/sub01/1``: the count-th micro-expression of the subject."""
        subject = f"sub{row.integer('sub'):02d}"
        return SampleId(dataset="casme3c", subject=subject, clip=str(row.integer("count")))

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """Negative, positive, surprise or others."""
        return row.text("emotion"), row.place("emotion")

    def interval_of(self, row: Row) -> Interval | str:
        """Onset and offset."""
        return read_interval(row, "onset", None, "offset")

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """The recording, else the clip."""
        number = str(row.integer("sub"))
        yield inside(self.root / "part_C", number, "color")
        yield inside(self.root / "part_C", sample.subject, "color")
        yield inside(self.root / "Part_C_ME_clip" / "frame", f"{number}_{sample.clip}")
