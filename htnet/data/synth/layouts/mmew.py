"""MMEW: Micro_Expression/happiness/S01-07-001/1.jpg and MMEW_Micro_Exp.xlsx."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.mmew import Mmew
from htnet.data.samples import Emotion
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Trap
from htnet.data.synth.layouts.table import Cells, TableLayout, padded

_NO_SUBJECT = "blank_subject"


class MmewLayout(TableLayout):
    """The subject is also the first part of the clip's name; a remark stands under the table."""

    adapter = Mmew
    header = ("subject", "clip", "onset", "apex", "offset", "Action Units", "emotion", "remarks")
    numbered = True
    remark = (*[None] * 7, "synthetic faces, no people")
    subject = "S{:02d}"
    frame = "{number}.jpg"
    traps: ClassVar[tuple[Trap, ...]] = (
        trap.APEX_AFTER_OFFSET,
        trap.OFFSET_TYPO,
        trap.apex_not_coded("/"),
        trap.NO_FOLDER,
        Trap(kind=_NO_SUBJECT),
        Trap(kind=trap.LOOSE_TYPES),
        trap.emotion("others"),
    )

    def words(self, label: int) -> tuple[str, ...]:
        """Keep the order by which a seed has always drawn a word."""
        return ("disgust", "fear", "anger", "sadness") if label == Emotion.NEGATIVE else super().words(label)

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``S01-07-001``: subject, stimulus, number."""
        return f"{self.subject_name(subject)}-{index // 3 + 1:02d}-{index % 3 + 1:03d}"

    def folder(self, clip: ClipFiles) -> Path:
        """Take the folder of the emotion."""
        return Path(Mmew.folders[0], clip.marks.emotion, clip.clip)

    def row(self, clip: ClipFiles) -> Cells:
        """Write the subject as a number, or leave it out; pad loose cells with blanks."""
        cells = super().row(clip) | {"subject": None if clip.trap == _NO_SUBJECT else clip.number}
        if clip.trap == trap.LOOSE_TYPES:
            cells |= padded(cells, "{} ") | {"emotion": f" {clip.marks.emotion.title()}"}
        return cells
