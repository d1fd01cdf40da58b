"""The layout of a dataset with one annotation table: what the adapter looks for is what is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME
from htnet.data.synth.layouts.base import ClipFiles, Form, Layout
from htnet.data.synth.layouts.files import write_frames, write_landmarks, write_table
from htnet.data.synth.layouts.trap import LOOSE_TYPES

Cells = dict[str, object]
"""Cells of a row by column."""
_UNITS = ("4+15", "6+12", "1+2+5+26")
"""Action units of the classes."""


class TableLayout(Layout):
    """A table with a row per clip, under the adapter's names of columns, files and folders.

    ``adapter``: who reads it. ``header``: the table's columns, a field of the adapter's ``columns`` for one that it
    reads, empty for one without a name. ``numbered``: subjects are numbers, which lost their zeros. ``above``: rows
    above the header. ``remark``: a row below the table where traps are planted. ``old_table``: name of the older
    workbook. ``sheets``: the table's, and empty ones.
    """

    adapter: ClassVar[type[WorkbookDataset]]
    header: ClassVar[tuple[str, ...]]
    numbered: ClassVar[bool] = False
    above: ClassVar[tuple[Sequence[object], ...]] = ()
    remark: ClassVar[tuple[object, ...]] = ()
    old_table: ClassVar[str] = ""
    sheets: ClassVar[tuple[str, ...]] = ("Sheet1",)

    @property
    def name(self) -> str:
        """The adapter's."""
        return self.adapter.adapter

    def dataset_name(self, subject: int) -> str:
        """Return the adapter's."""
        return self.adapter.dataset

    def words(self, label: int) -> tuple[str, ...]:
        """Return the words of the class in the composite's scheme, in the adapter's order."""
        classes, words = self.adapter.schemes[COMPOSITE_SCHEME]
        return tuple(word for word, name in words.items() if name == classes[label])

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the dataset."""
        self.write_clips(root, clips, form)
        columns, header = self.adapter.columns.names._asdict(), self.header_of(form)
        rows = [*self.above, [columns.get(name, name) or None for name in header]]
        rows += [[cells.get(name) for name in header] for cells in self.rows(clips, form)]
        if self.remark and any(clip.trap for clip in clips):
            rows += [[None], self.remark]
        table = self.old_table if form.xls and self.old_table else self.adapter.workbooks[0]
        write_table(root / table, rows, sheet=self.sheets[0], more_sheets=self.sheets[1:])
        write_landmarks(root, clips)

    def write_clips(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write every clip's frames into a folder of its own."""
        for clip in clips:
            write_frames(root / self.folder(clip), clip, self.frame, grey=self.grey)

    def folder(self, clip: ClipFiles) -> Path:
        """Return the folder of a clip's frames below the dataset's."""
        return Path(self.adapter.folders[0], clip.subject, clip.clip)

    def header_of(self, form: Form) -> Sequence[str]:
        """Return the table's columns in this form."""
        return self.header

    def rows(self, clips: Sequence[ClipFiles], form: Form) -> Iterator[Cells]:
        """Yield the rows of the table."""
        return map(self.row, clips)

    def row(self, clip: ClipFiles) -> Cells:
        """Return the row of a clip; a layout changes what its dataset writes otherwise."""
        as_text = clip.trap == LOOSE_TYPES or not self.numbered
        units = dict.fromkeys(("Action Units", "AUs", "AU", "au"), _UNITS[clip.label])
        return {"subject": clip.subject if as_text else clip.number, "clip": clip.clip, **vars(clip.marks), **units}


def padded(cells: Cells, form: str) -> Cells:
    """Return the interval as text with blanks; ``form`` is such as ``"{} "``."""
    return {name: form.format(cells[name]) for name in ("onset", "apex", "offset")}
