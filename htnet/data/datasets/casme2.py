"""CASME II (Yan et al., PLoS ONE 2014): 200 frames a second, colour, apex annotated.

``CASME2_RAW_selected/sub01/EP02_01f/img46.jpg``, or the owners' face crops ``Cropped/sub01/EP02_01f/reg_img46.jpg``.
About 21 rows of the workbook hold "/" for an apex that was not coded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from htnet.data.datasets.base import Columns, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, DatasetSchemes, by_rule, own_classes
from htnet.data.datasets.tables import Row
from htnet.data.samples import SampleId
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Casme2(WorkbookDataset):
    """Adapter of a CASME II folder."""

    adapter = "casme2"
    dataset = "casme2"
    words = ("happiness", "disgust", "repression", "surprise", "sadness", "fear", "others")
    schemes: ClassVar[DatasetSchemes] = {
        COMPOSITE_SCHEME: by_rule(*words, out=("sadness", "fear")),
        "5class": own_classes(*words, out=("sadness", "fear")),
        "7class": own_classes(*words),
    }
    workbooks = (
        "CASME2-coding-20140508.xlsx",
        "CASME2-coding-20190701.xlsx",
        "CASME2-coding-updated.xlsx",
        "CASME2_label_Ver_2.xls",
    )
    columns = Columns(
        subject="Subject", clip="Filename",
        onset="OnsetFrame|Onset", apex="ApexFrame|Apex", offset="OffsetFrame|Offset",
        emotion="Estimated Emotion|Emotion",
    )  # fmt: skip
    folders = ("CASME2_RAW_selected", "CASME2-RAW", "Cropped")
    fps = 200.0

    def sample_of(self, row: Row) -> SampleId:
        """Return ``casme2/sub01/EP02_01f``; the workbook may have lost the zero or the word."""
        return SampleId(dataset=self.dataset, subject=subject_of(row), clip=row.name("Filename"))


def subject_of(row: Row) -> str:
    """Return ``sub01`` of 1, 01 or sub01; :class:`InputError` for anything else."""
    text = row.text("Subject")
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,2})", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{row.place('Subject')}: must be a number such as 1 or sub01, got {text!r}")
    return f"sub{int(match[1]):02d}"
