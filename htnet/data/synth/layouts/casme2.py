"""CASME II: CASME2_RAW_selected/sub01/EP02_01f/img46.jpg and CASME2-coding-20140508.xlsx (older: a .xls)."""

from __future__ import annotations

import re
from typing import ClassVar

from htnet.data.datasets.casme2 import Casme2
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Trap
from htnet.data.synth.layouts.table import Cells, TableLayout, padded


class Casme2Layout(TableLayout):
    """Two of the columns have no header; subjects are numbers that lost their zeros."""

    adapter = Casme2
    header = ("subject", "clip", "", "onset", "apex", "offset", "", "Action Units", "emotion")
    numbered = True
    old_table = Casme2.workbooks[-1]
    frame = "img{number}.jpg"
    starts = (30, 120)
    in_lists = True
    traps: ClassVar[tuple[Trap, ...]] = (
        trap.apex_not_coded("/"),
        trap.OFFSET_TYPO,
        trap.APEX_AFTER_OFFSET,
        trap.SHORT_FOLDER,
        Trap(kind=trap.LOOSE_TYPES),
        trap.emotion("others"),
        trap.emotion("sadness"),
        trap.emotion("fear"),
    )

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``EP02_01f``."""
        return f"EP{index + 1:02d}_{subject % 9 + 1:02d}f"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """Return the names of the list."""
        if not (re.fullmatch(r"sub\d\d", subject) and re.fullmatch(r"EP\d\d\w*", clip)):
            raise ValueError(f"must be such as sub01, EP02_01f, got {subject!r}, {clip!r}")
        return subject, clip

    def row(self, clip: ClipFiles) -> Cells:
        """Pad loose cells with blanks."""
        cells = super().row(clip)
        if clip.trap == trap.LOOSE_TYPES:
            cells |= padded(cells, " {}") | {"emotion": f"{clip.marks.emotion.title()} "}
        return cells
