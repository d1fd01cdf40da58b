"""4DME: gray_micro/<sub_ID>/<fold_name>/1.jpg, grey, and "4DME_Labelling_Micro_release v1.xlsx": a column per class."""

from __future__ import annotations

from typing import ClassVar

from htnet.data.datasets.fourdme import CLASSES, SEVERAL_CLASSES, FourDME
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Trap
from htnet.data.synth.layouts.table import Cells, TableLayout

_TWO, _NONE, _DOUBTFUL = "two_classes", "no_class", "doubtful_action_units"


class FourDMELayout(TableLayout):
    """Classes are marked by 1, the rest by 0; a clip may have several."""

    adapter = FourDME
    header = ("subject", "clip", "onset", "apex", "offset", "AUs", "Emotion", *CLASSES)
    frame = "{number:04d}.jpg"
    grey = True
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_TWO, rule=SEVERAL_CLASSES, kept=False, change=trap.no_frames),
        Trap(kind=_NONE, rule=SEVERAL_CLASSES, kept=False, change=trap.no_frames),
        Trap(kind=_DOUBTFUL),
        trap.APEX_AFTER_OFFSET,
        trap.emotion("others"),
    )

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``sub01_01``."""
        return f"{self.subject_name(subject)}_{index + 1:02d}"

    def row(self, clip: ClipFiles) -> Cells:
        """Add the classes as words and as marks."""
        cells = super().row(clip)
        marked = {clip.marks.emotion.title()} if clip.trap != _NONE else set()
        if clip.trap == _TWO:
            marked |= {"Others"}
        if clip.trap == _DOUBTFUL:
            cells["AUs"] = f"{cells['AUs']} (k)"
        return {**cells, "Emotion": " ".join(sorted(marked)), **{name: int(name in marked) for name in CLASSES}}
