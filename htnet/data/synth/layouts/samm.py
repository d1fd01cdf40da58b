"""SAMM: 006/006_1_2/006_05562.jpg, grey, and SAMM_Micro_FACS_Codes_v2.xlsx with its header in row 14."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.samm import Samm
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Form, Trap
from htnet.data.synth.layouts.files import write_frames
from htnet.data.synth.layouts.table import Cells, TableLayout

_UNSURE = "unsure_action_units"


class SammLayout(TableLayout):
    """Thirteen rows of remarks above the header; subjects are numbers that lost their zeros."""

    adapter = Samm
    above: ClassVar[tuple[Sequence[object], ...]] = (["Synthetic data in the layout of SAMM"], *[[None]] * 12)
    header = (
        *("subject", "clip", "Inducement Code", "onset", "apex", "offset", "Duration", "Micro", "Action Units"),
        *("emotion", "Objective Classes", "Notes"),
    )
    numbered = True
    frame = "{subject}_{number:05d}.jpg"
    grey = True
    starts = (900, 8000)
    in_lists = True
    traps: ClassVar[tuple[Trap, ...]] = (
        trap.APEX_AFTER_OFFSET,
        trap.APEX_BEFORE_ONSET,
        trap.OFFSET_TYPO,
        Trap(kind=trap.ODD_NAMES),
        Trap(kind=trap.LOOSE_TYPES),
        Trap(kind=_UNSURE),
        trap.emotion("Other"),
    )

    def subject_name(self, index: int) -> str:
        """Return ``006`` for the first."""
        return f"{index + 6:03d}"

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``006_1_2``."""
        return f"{self.subject_name(subject)}_{index // 3 + 1}_{index % 3 + 1}"

    def listed_name(self, subject: str, clip: str) -> tuple[str, str]:
        """Give the subject its zeros."""
        if not (re.fullmatch(r"\d{1,3}", subject) and re.fullmatch(r"\d{3}_\d+_\d+", clip)):
            raise ValueError(f"must be such as 6, 006_1_2, got {subject!r}, {clip!r}")
        return f"{int(subject):03d}", clip

    def write_clips(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write frames, whose numbers have lost their zeros under odd names."""
        for clip in clips:
            name = self.frame.replace(":05d", "") if clip.trap == trap.ODD_NAMES else self.frame
            write_frames(root / self.folder(clip), clip, name, grey=self.grey)

    def row(self, clip: ClipFiles) -> Cells:
        """Add the columns that no adapter reads; words have a capital."""
        cells, word = super().row(clip), clip.marks.emotion
        cells["emotion"] = word.upper() if clip.trap == trap.LOOSE_TYPES else word.title()
        if clip.trap == _UNSURE:
            cells["Action Units"] = f"{cells['Action Units']} or 7"
        induced, duration = int(clip.clip.split("_")[1]), clip.offset - clip.onset + 1
        return {**cells, "Inducement Code": induced, "Duration": duration, "Micro": "Micro - 1/2"}
