"""CASME II (Yan et al., PLoS ONE 2014): 200 frames a second, colour, apex annotated.

``CASME2_RAW_selected/sub01/EP02_01f/img46.jpg``, or the owners' face crops ``Cropped/sub01/EP02_01f/reg_img46.jpg``.
"""

from __future__ import annotations

import re
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
class Casme2(WorkbookDataset):
    """Adapter of a CASME II folder."""

    adapter: ClassVar[str] = "casme2"
    workbooks: ClassVar[tuple[str, ...]] = (
        "CASME2-coding-20140508.xlsx",
        "CASME2-coding-20190701.xlsx",
        "CASME2-coding-updated.xlsx",
        "CASME2_label_Ver_2.xls",
    )
    columns: ClassVar[tuple[str, ...]] = (
        *("Subject", "Filename", "OnsetFrame|Onset", "ApexFrame|Apex", "OffsetFrame|Offset"),
        "Estimated Emotion|Emotion",
    )
    fps: ClassVar[float | None] = 200.0

    def sample_of(self, row: Row) -> SampleId:
        """``casme2/sub01/EP02_01f``; the workbook may have lost the zero or the word."""
        return SampleId(dataset="casme2", subject=subject_of(row), clip=row.name("Filename"))

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """The estimated emotion."""
        return row.text("Estimated Emotion"), row.place("Estimated Emotion")

    def interval_of(self, row: Row) -> Interval | str:
        """Onset, apex, offset; about 21 rows of the real workbook hold "/" for an apex that was not coded."""
        return read_interval(row, "OnsetFrame", "ApexFrame", "OffsetFrame")

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """The raw frames, else the owners' crops."""
        for folder in ("CASME2_RAW_selected", "CASME2-RAW", "Cropped"):
            yield inside(self.root / folder, sample.subject, sample.clip)


def subject_of(row: Row) -> str:
    """``sub01`` of 1, 01 or sub01; :class:`InputError` for anything else."""
    text = row.text("Subject")
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,2})", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{row.place('Subject')}: must be a number such as 1 or sub01, got {text!r}")
    return f"sub{int(match[1]):02d}"
