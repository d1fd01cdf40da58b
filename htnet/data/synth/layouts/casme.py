"""CASME: Section A/sub01/EP01_12/EP01_12-001.jpg (and Section B) and CASME.xlsx or .xls with two apexes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.casme import SECOND_APEX, Casme
from htnet.data.datasets.tables import first_name
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Trap
from htnet.data.synth.layouts.table import Cells, TableLayout

_TWO_APEXES = "two_apexes"
_SECOND = first_name(Casme.more_columns[0])


class CasmeLayout(TableLayout):
    """Every second subject was filmed by the camera of section B."""

    adapter = Casme
    header = ("subject", "clip", "onset", "apex", _SECOND, "offset", "Action Units", "emotion")
    numbered = True
    old_table = Casme.workbooks[1]
    frame = "{clip}-{number:03d}.jpg"
    starts = (30, 120)
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_TWO_APEXES, rule=SECOND_APEX),
        trap.apex_not_coded(None),
        trap.APEX_IS_ONSET,
        trap.APEX_AFTER_OFFSET,
        trap.OFFSET_TYPO,
        trap.NEGATIVE,
        Trap(kind=trap.LOOSE_TYPES),
        trap.emotion("tense"),
    )

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``EP01_12``."""
        return f"EP{index // 4 + 1:02d}_{index % 4 * 3 + 2:02d}"

    def folder(self, clip: ClipFiles) -> Path:
        """Take the section of the subject's camera."""
        return Path(Casme.folders[1 - clip.number % 2], clip.subject, clip.clip)

    def row(self, clip: ClipFiles) -> Cells:
        """Add the second apex."""
        cells = super().row(clip) | {_SECOND: clip.apex + 1 if clip.trap == _TWO_APEXES else None}
        if clip.trap == trap.LOOSE_TYPES:
            cells["emotion"] = clip.marks.emotion.title()
        return cells
