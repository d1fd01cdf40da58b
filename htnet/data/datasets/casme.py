"""CASME (Yan et al., FG 2013): 60 frames a second, sections A and B from two cameras.

``Cropped/sub01/EP01_12/reg_EP01_12-001.jpg`` or ``Section A/sub01/EP01_12/EP01_12-001.jpg``; the layouts that public
readers of the dataset expect, as its own paper does not describe the folders. A row may name two apexes; the first
counts. The subjects of section B go on counting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from htnet.data.datasets.base import Columns, Interval, WorkbookDataset
from htnet.data.datasets.casme2 import subject_of
from htnet.data.datasets.labels import COMPOSITE_SCHEME, DatasetSchemes, by_rule
from htnet.data.datasets.tables import Row
from htnet.data.samples import SampleId

SECOND_APEX = "second_apex"
"""The row names a second apex."""


@dataclass(frozen=True, kw_only=True)
class Casme(WorkbookDataset):
    """Adapter of a CASME folder."""

    adapter = "casme"
    dataset = "casme"
    words = ("tense", "disgust", "repression", "surprise", "happiness", "sadness", "contempt", "fear")
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*words)}
    workbooks = ("CASME.xlsx", "CASME.xls", "CASME_annotation.xlsx", "CASME_annotation.xls")
    columns = Columns(
        subject="Subject|subject", clip="Filename|FileName|filename",
        onset="OnsetF|Onset|OnsetFrame", apex="ApexF1|ApexF|Apex|ApexFrame", offset="OffsetF|Offset|OffsetFrame",
        emotion="Emotion|Estimated Emotion",
    )  # fmt: skip
    more_columns = ("ApexF2?",)
    folders = ("Section A", "Section B", "CASME_raw_selected", "Cropped")
    fps = 60.0

    def sample_of(self, row: Row) -> SampleId:
        """Return ``casme/sub01/EP01_12``."""
        return SampleId(dataset=self.dataset, subject=subject_of(row), clip=row.name("Filename"))

    def interval_of(self, row: Row) -> Interval | str:
        """Read onset, first apex and offset; a second apex is not used, and said to be not."""
        interval = super().interval_of(row)
        second = row.optional("ApexF2")
        if isinstance(interval, str) or not second:
            return interval
        remark = f"{SECOND_APEX}: {second}, the first is taken ({row.place('ApexF2')})"
        return replace(interval, notes=(*interval.notes, SECOND_APEX), remarks=(*interval.remarks, remark))
