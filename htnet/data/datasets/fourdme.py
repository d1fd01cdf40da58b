"""4DME (Li et al., IEEE TAC 2022), the grey micro-expression clips.

``gray_micro/<sub_ID>/<fold_name>/``. The classes are columns of zeros and ones; a clip may have several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htnet.data.datasets.base import Columns, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, DatasetSchemes, by_rule, own_classes
from htnet.data.datasets.tables import Row
from htnet.data.entries import Clip, LeftOut
from htnet.data.samples import SampleId

CLASSES = ("Positive", "Negative", "Surprise", "Repression", "Others")
SEVERAL_CLASSES = "several_classes"
"""The clip belongs to several classes at once, or to none."""


@dataclass(frozen=True, kw_only=True)
class FourDME(WorkbookDataset):
    """Adapter of a 4DME folder."""

    adapter = "4dme"
    dataset = "4dme"
    words = tuple(map(str.lower, CLASSES))
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*words), "5class": own_classes(*words)}
    workbooks = ("4DME_Labelling_Micro_release v1.xlsx",)
    columns = Columns(subject="sub_ID", clip="fold_name", onset="Onset", apex="Apex", offset="Offset")
    more_columns = CLASSES
    folders = ("gray_micro",)

    def entry(self, row: Row, sample: SampleId) -> Clip | LeftOut:
        """Turn a row with exactly one class into a clip; others are left out by :data:`SEVERAL_CLASSES`."""
        marked = self._marked(row)
        if len(marked) != 1:
            reason = f"belongs to {' and '.join(marked) or 'no class'}, one is needed"
            return LeftOut(clip=str(sample), rule=SEVERAL_CLASSES, reason=reason, place=row.place("fold_name"))
        return super().entry(row, sample)

    def _marked(self, row: Row) -> list[str]:
        return [name for name in CLASSES if row.mark(name)]

    def sample_of(self, row: Row) -> SampleId:
        """Return ``4dme/<sub_ID>/<fold_name>``."""
        return SampleId(dataset=self.dataset, subject=row.name("sub_ID"), clip=row.name("fold_name"))

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """Return the class whose column is marked; several, or none, are no emotion that a scheme knows."""
        return " and ".join(self._marked(row)).lower(), row.place("fold_name")
