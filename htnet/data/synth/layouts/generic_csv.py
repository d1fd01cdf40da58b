"""A list of one's own: samples.csv, and frames in folders of PNG or in motion-JPEG videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import APEX_NOT_CODED
from htnet.data.datasets.generic_csv import GenericCsv
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Form, Marks, Trap
from htnet.data.synth.layouts.files import write_frames, write_video
from htnet.data.synth.layouts.table import Cells, TableLayout, padded

_LABEL_NUMBER = "label_as_number"
_FPS = 100


def _no_numbers(clip: ClipFiles) -> ClipFiles:
    """Keep the frames that the numbers would have cut out."""
    marks = Marks(onset="", apex="", offset="", emotion=clip.marks.emotion)
    return replace(clip, numbers=tuple(range(clip.onset, clip.offset + 1)), marks=marks)


class CsvLayout(TableLayout):
    """Frames count from 1 in every clip, so that folders and videos have the same numbers."""

    adapter = GenericCsv
    header = ("dataset", "subject", "clip", "onset", "apex", "offset", "label", "frames", "fps")
    subject = "p{:02d}"
    frame = "{number:03d}.png"
    traps: ClassVar[tuple[Trap, ...]] = (
        trap.apex_not_coded(""),
        Trap(kind="no_numbers", rule=APEX_NOT_CODED, change=_no_numbers),
        Trap(kind=_LABEL_NUMBER),
        Trap(kind=trap.LOOSE_TYPES),
        trap.NO_FOLDER,
        trap.emotion("others"),
    )

    def dataset_name(self, subject: int) -> str:
        """Name one dataset of one's own."""
        return "own"

    def words(self, label: int) -> tuple[str, ...]:
        """Return some of those that any dataset may have."""
        return (("disgust", "anger", "fear"), ("happiness",), ("surprise",))[label]

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return ``take01``."""
        return f"take{index + 1:02d}"

    def folder(self, clip: ClipFiles) -> Path:
        """Take a folder for all clips."""
        return Path("clips", clip.subject, clip.clip)

    def write_clips(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write folders of pictures, or videos."""
        for clip in clips:
            if form.video:
                write_video(root / f"{self.folder(clip)}.avi", clip, _FPS)
            else:
                write_frames(root / self.folder(clip), clip, self.frame)

    def rows(self, clips: Sequence[ClipFiles], form: Form) -> Iterator[Cells]:
        """Name each clip's frames in the list."""
        suffix = ".avi" if form.video else ""
        return (self.row(clip) | {"frames": f"{self.folder(clip).as_posix()}{suffix}"} for clip in clips)

    def row(self, clip: ClipFiles) -> Cells:
        """Write the emotion as a word, or as the number of its class."""
        word = clip.marks.emotion
        label = clip.label if clip.trap == _LABEL_NUMBER else word
        cells = super().row(clip) | {"dataset": clip.dataset, "label": label, "fps": _FPS}
        if clip.trap == trap.LOOSE_TYPES:
            cells |= padded(cells, " {}") | {"label": f"{word.upper()} "}
        return cells
