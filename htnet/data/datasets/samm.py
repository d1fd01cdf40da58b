"""SAMM (Davison et al., IEEE TAC 2018): 200 frames a second, grey, apex annotated.

``006/006_1_2/006_05562.jpg``; the workbook's header stands in row 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htnet.data.datasets.base import Columns, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, DatasetSchemes, by_rule, own_classes
from htnet.data.datasets.tables import Row
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Samm(WorkbookDataset):
    """Adapter of a SAMM folder."""

    adapter = "samm"
    dataset = "samm"
    words = ("anger", "contempt", "disgust", "fear", "sadness", "happiness", "surprise", "other")
    schemes: ClassVar[DatasetSchemes] = {
        COMPOSITE_SCHEME: by_rule(*words),
        "5class": own_classes(*words, out=("disgust", "fear", "sadness")),
    }
    workbooks = (
        "SAMM_Micro_FACS_Codes_v2.xlsx",
        "SAMM_20181215_Micro_FACS_Codes_v2.xlsx",
    )
    columns = Columns(
        subject="Subject", clip="Filename",
        onset="Onset Frame", apex="Apex Frame", offset="Offset Frame",
        emotion="Estimated Emotion",
    )  # fmt: skip
    folders = ("", "SAMM")
    fps = 200.0

    def sample_of(self, row: Row) -> SampleId:
        """Return ``samm/006/006_1_2``; a spreadsheet that takes 006 for a number shows 6, folders have three digits."""
        text = row.text("Subject")
        if not (text.isascii() and text.isdigit() and int(text) < 1000):
            raise InputError(f"{row.place('Subject')}: must be a number of up to three digits, got {text!r}")
        return SampleId(dataset=self.dataset, subject=f"{int(text):03d}", clip=row.name("Filename"))
