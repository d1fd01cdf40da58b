"""4DME: gray_micro/<sub_ID>/<fold_name>/1.jpg, grey, and "4DME_Labelling_Micro_release v1.xlsx": a column per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.fourdme import CLASSES, SEVERAL_CLASSES
from htnet.data.samples import Emotion
from htnet.data.synth.layouts.base import APEX_AFTER_OFFSET, ClipFiles, Form, Layout, Trap, emotion, no_frames
from htnet.data.synth.layouts.files import units, write_frames, write_landmarks, write_table

_TWO, _NONE, _DOUBTFUL = "two_classes", "no_class", "doubtful_action_units"


class FourDMELayout(Layout):
    """Classes are marked by 1, the rest by 0; a clip may have several."""

    name = "4dme"
    frame = "{number:04d}.jpg"
    grey = True
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("negative", "repression"),
        Emotion.POSITIVE: ("positive",),
        Emotion.SURPRISE: ("surprise",),
    }
    traps: ClassVar[tuple[Trap, ...]] = (
        Trap(kind=_TWO, rule=SEVERAL_CLASSES, kept=False, change=no_frames),
        Trap(kind=_NONE, rule=SEVERAL_CLASSES, kept=False, change=no_frames),
        Trap(kind=_DOUBTFUL),
        APEX_AFTER_OFFSET,
        emotion("others"),
    )

    def subject_name(self, index: int) -> str:
        """``sub01``."""
        return f"sub{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """``sub01_01``."""
        return f"{self.subject_name(subject)}_{index + 1:02d}"

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        rows: list[list[object]] = [["sub_ID", "fold_name", "Onset", "Apex", "Offset", "AUs", "Emotion", *CLASSES]]
        for clip in clips:
            marks = clip.marks
            write_frames(root / "gray_micro" / clip.subject / clip.clip, clip, self.frame, grey=self.grey)
            marked = {marks.emotion.title()} if clip.trap != _NONE else set()
            if clip.trap == _TWO:
                marked |= {"Others"}
            action = f"{units(clip.label)} (k)" if clip.trap == _DOUBTFUL else units(clip.label)
            row = [clip.subject, clip.clip, marks.onset, marks.apex, marks.offset, action, " ".join(sorted(marked))]
            rows.append([*row, *(int(name in marked) for name in CLASSES)])
        write_table(root / "4DME_Labelling_Micro_release v1.xlsx", rows)
        write_landmarks(root, clips)
