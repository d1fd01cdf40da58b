"""A list of one's own: ``samples.csv`` with dataset, subject, clip, onset, apex, offset, emotion and frames.

``frames`` is a folder of pictures or a video, relative to the list's folder. Empty numbers: the first frame, an apex to
be found (as one on a first frame that no onset names), the last frame. ``fps`` may be missing. ``emotion`` is a word of
the label scheme, or a class of it by number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import APEX_NOT_CODED, Columns, Interval, WorkbookDataset
from htnet.data.datasets.casme import Casme
from htnet.data.datasets.casme2 import Casme2
from htnet.data.datasets.casme3 import Casme3A
from htnet.data.datasets.labels import COMPOSITE_SCHEME, THREE_CLASSES, DatasetSchemes, by_rule
from htnet.data.datasets.samm import Samm
from htnet.data.datasets.tables import Row, open_table, simplified
from htnet.data.frames import inside
from htnet.data.samples import SampleId, check_dataset_name
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GenericCsv(WorkbookDataset):
    """Adapter of a folder with a list; .csv, .xlsx and .xls are taken."""

    adapter = "csv"
    dataset = "*"
    words = tuple(dict.fromkeys((*Casme2.words, *Samm.words, *Casme.words, *Casme3A.words, *THREE_CLASSES)))
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*words)}
    workbooks = ("samples.csv", "samples.xlsx", "samples.xls")
    columns = Columns(
        subject="subject", clip="clip",
        onset="onset|onset_frame?", apex="apex|apex_frame?", offset="offset|offset_frame?",
        emotion="emotion|label",
    )  # fmt: skip
    more_columns = ("dataset", "frames", "fps?")

    def rows(self) -> tuple[Row, ...]:
        """Read the list; :class:`InputError` where numbers stand in a column that is called otherwise."""
        table = open_table(self.workbook, self.wanted_columns)
        rows = table.rows(self.wanted_columns)
        for name in ("onset", "apex", "offset"):
            others = [column for column in table.header if name in column.casefold()]
            if others and not any(simplified(column) in (name, f"{name}frame") for column in others):
                raise InputError(f"{self.workbook}: the column must be called {name}, got {', '.join(others)}")
        return rows

    def sample_of(self, row: Row) -> SampleId:
        """Take the names of the list."""
        dataset = row.text("dataset")
        check_dataset_name(dataset, row.place("dataset"))
        return SampleId(dataset=dataset, subject=row.text("subject"), clip=row.text("clip"))

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """Return the word; a number stands for the scheme's class of that number."""
        text, place = row.text("emotion"), row.place("emotion")
        if not (text.isascii() and text.isdecimal()):
            return text, place
        number = row.integer("emotion")
        if number >= len(self.scheme.classes):
            raise InputError(f"{place}: must be in 0..{len(self.scheme.classes) - 1} or a word, got {text}")
        return self.scheme.classes[number], place

    def interval_of(self, row: Row) -> Interval | str:
        """Read the numbers that there are, in rising order."""
        given = {name: row.optional_integer(name) for name in ("onset", "apex", "offset")}
        numbers = [value for value in given.values() if value is not None]
        if numbers != sorted(set(numbers)):
            raise InputError(
                f"{row.place('onset')}: must rise, onset < apex < offset, got {', '.join(map(str, numbers))}"
            )
        notes = () if given["apex"] is not None else (APEX_NOT_CODED,)
        return Interval(onset=given["onset"], apex=given["apex"], offset=given["offset"], notes=notes)

    def fps_of(self, row: Row) -> float | None:
        """Read the number that there is, above 0."""
        if not row.optional("fps"):
            return None
        fps = row.decimal("fps")
        if fps <= 0:
            raise InputError(f"{row.place('fps')}: must be above 0, got {row.text('fps')}")
        return fps

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """Yield the path in the list, which must stay in the list's folder."""
        yield inside(self.root, *row.parts("frames"))
