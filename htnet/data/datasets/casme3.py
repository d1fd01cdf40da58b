"""CAS(ME)^3 (Li et al., IEEE TPAMI 2023), parts A and C: 30 frames a second, colour.

Part A: ``part_A/spNO.1/b/color/175.jpg``, or the clips ``Part_A_ME_clip/frame/spNo.1_b_166/175.jpg`` (also as
``video/spNo.1_b_166.mp4``, taken to begin at the onset). A recording holds several micro-expressions, so that a clip is
named by recording and onset, ``b_166``, as the owners name the clips. Subjects are written spNO and spNo; ``spno.1``
here. 55 apexes are the onset itself, others lie outside the interval, three offsets before the onset.

Part C (mock crime): ``CAS(ME)3_part_C_ME.xlsx`` names subject and count; frames are looked for in
``part_C/<subject>/color`` and, as clips, in ``Part_C_ME_clip/frame/<subject>_<count>``. No apex is annotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import MACRO, Columns, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, THREE_CLASSES, DatasetSchemes, by_rule, own_classes
from htnet.data.datasets.tables import Row
from htnet.data.entries import Clip, LeftOut
from htnet.data.frames import inside
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Casme3A(WorkbookDataset):
    """Adapter of part A, with any of its three annotation files."""

    adapter = "casme3_a"
    dataset = "casme3"
    words = ("disgust", "surprise", "others", "fear", "anger", "sad", "happy")
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*words), "7class": own_classes(*words)}
    workbooks = (
        "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx",
        "cas(me)3_part_A_ME_label_JpgIndex_v1.xls",
        "CAS(ME)3_part_A_v2.xls",
    )
    columns = Columns(
        subject="Subject", clip="Filename",
        onset="Onset", apex="Apex", offset="Offset",
        emotion="emotion|Emotion",
    )  # fmt: skip
    more_columns = ("Expression type?",)
    folders = ("part_A", "Part_A_ME_clip/frame")
    videos = "Part_A_ME_clip/video"
    fps = 30.0

    def entry(self, row: Row, sample: SampleId) -> Clip | LeftOut:
        """Turn a row into a clip or a reason; the file of macro- and micro-expressions gives its micro-expressions."""
        kind = row.optional("Expression type")
        if kind and "micro" not in kind.lower():
            place = row.place("Expression type")
            return LeftOut(clip=str(sample), rule=MACRO, reason=f"expression type {kind}", place=place)
        entry = super().entry(row, sample)
        return _counted_from_one(entry) if isinstance(entry, Clip) and entry.frames.is_file() else entry

    def sample_of(self, row: Row) -> SampleId:
        """Return ``casme3/spno.1/b_166``."""
        text = row.text("Subject")
        match = re.fullmatch(r"spno\.?\s*(\d+)", text, re.IGNORECASE)
        if match is None:
            raise InputError(f"{row.place('Subject')}: must be such as spNO.1, got {text!r}")
        clip = f"{row.name('Filename').lower()}_{row.integer('Onset')}"
        return SampleId(dataset=self.dataset, subject=f"spno.{int(match[1])}", clip=clip)

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """Yield the recording, else the clip as pictures or as a video."""
        recordings, clips = self.folders
        yield inside(self.root / recordings, sample.subject, row.name("Filename"), "color")
        yield inside(self.root / clips, f"{sample.subject}_{sample.clip}")
        yield inside(self.root / self.videos, f"{sample.subject}_{sample.clip}.mp4")


def _counted_from_one(clip: Clip) -> Clip:
    """Count from 1: the annotation has the recording's numbers, but a clip's video begins at its onset."""
    before = 0 if clip.onset is None else clip.onset - 1
    apex, offset = (None if number is None else number - before for number in (clip.apex, clip.offset))
    return replace(clip, onset=1, apex=apex, offset=offset)


@dataclass(frozen=True, kw_only=True)
class Casme3C(WorkbookDataset):
    """Adapter of part C."""

    adapter = "casme3_c"
    dataset = "casme3c"
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*THREE_CLASSES, "others")}
    workbooks = ("CAS(ME)3_part_C_ME.xlsx",)
    columns = Columns(subject="sub", clip="count", onset="onset", offset="offset", emotion="emotion")
    folders = ("part_C", "Part_C_ME_clip/frame")
    fps = 30.0

    def sample_of(self, row: Row) -> SampleId:
        """Return ``casme3c/sub01/1``: the count-th micro-expression of the subject."""
        subject = f"sub{row.integer('sub'):02d}"
        return SampleId(dataset=self.dataset, subject=subject, clip=str(row.integer("count")))

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """Yield the recording, else the clip."""
        recordings, clips = self.folders
        number = str(row.integer("sub"))
        yield inside(self.root / recordings, number, "color")
        yield inside(self.root / recordings, sample.subject, "color")
        yield inside(self.root / clips, f"{number}_{sample.clip}")
