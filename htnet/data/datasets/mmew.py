"""MMEW (Ben et al., IEEE TPAMI 2022): 90 frames a second, colour, apex annotated.

``Micro_Expression/<emotion>/S01-07-001/1.jpg``; the subject is the first part of the file name. About 16 rows of the
workbook have an apex or an offset that cannot be; the rules of :mod:`htnet.data.datasets.base` deal with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import Columns, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, DatasetSchemes, by_rule, own_classes
from htnet.data.datasets.tables import Row
from htnet.data.frames import inside
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Mmew(WorkbookDataset):
    """Adapter of an MMEW folder."""

    adapter = "mmew"
    dataset = "mmew"
    words = ("happiness", "surprise", "anger", "disgust", "fear", "sadness", "others")
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*words), "7class": own_classes(*words)}
    workbooks = ("MMEW_Micro_Exp.xlsx",)
    columns = Columns(
        subject="Subject?", clip="Filename",
        onset="OnsetFrame", apex="ApexFrame", offset="OffsetFrame",
        emotion="Estimated Emotion",
    )  # fmt: skip
    folders = ("Micro_Expression",)
    """Here it holds ``<emotion>/<clip>``."""
    fps = 90.0

    def sample_of(self, row: Row) -> SampleId:
        """Return ``mmew/S01/S01-07-001``."""
        name = row.name("Filename")
        match = re.fullmatch(r"S(\d{1,2})-\d+-\d+", name, re.IGNORECASE)
        if match is None:
            raise InputError(f"{row.place('Filename')}: must be such as S01-07-001, got {name!r}")
        return SampleId(dataset=self.dataset, subject=f"S{int(match[1]):02d}", clip=name.upper())

    def rows(self) -> tuple[Row, ...]:
        """Return the rows that are of a clip; a remark under the table has neither a name nor numbers."""
        stated = ("Filename", "OnsetFrame", "ApexFrame", "OffsetFrame")
        return tuple(row for row in super().rows() if any(map(row.optional, stated)))

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """Yield the clip's folder in that of its emotion."""
        yield inside(self.root / self.folders[0], row.text("Estimated Emotion").lower(), sample.clip)
