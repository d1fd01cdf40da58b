"""SAMM (Davison et al., IEEE TAC 2018): 200 frames a second, grey, apex annotated.

``006/006_1_2/006_05562.jpg``; the workbook's header stands in row 14.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import Interval, WorkbookDataset, read_interval
from htnet.data.datasets.tables import Row
from htnet.data.frames import inside
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Samm(WorkbookDataset):
    """Adapter of a SAMM folder."""

    adapter: ClassVar[str] = "samm"
    workbooks: ClassVar[tuple[str, ...]] = (
        "SAMM_Micro_FACS_Codes_v2.xlsx",
        "SAMM_20181215_Micro_FACS_Codes_v2.xlsx",
    )
    columns: ClassVar[tuple[str, ...]] = (
        *("Subject", "Filename", "Onset Frame", "Apex Frame", "Offset Frame", "Estimated Emotion"),
    )
    fps: ClassVar[float | None] = 200.0

    def sample_of(self, row: Row) -> SampleId:
        """``samm/006/006_1_2``; a spreadsheet that takes 006 for a number shows 6, the folders have three digits."""
        text = row.text("Subject")
        if not (text.isascii() and text.isdigit() and int(text) < 1000):
            raise InputError(f"{row.place('Subject')}: must be a number of up to three digits, got {text!r}")
        return SampleId(dataset="samm", subject=f"{int(text):03d}", clip=row.name("Filename"))

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """The estimated emotion."""
        return row.text("Estimated Emotion"), row.place("Estimated Emotion")

    def interval_of(self, row: Row) -> Interval | str:
        """Onset, apex, offset; two apexes of the real workbook lie outside."""
        return read_interval(row, "Onset Frame", "Apex Frame", "Offset Frame")

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """The clip's folder in the subject's."""
        yield inside(self.root, sample.subject, sample.clip)
        yield inside(self.root / "SAMM", sample.subject, sample.clip)
