"""What the readers of landmark tables share: the table they make, and CSV rows that name the place of a mistake."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from htnet.data.types import Landmarks, SampleId
from htnet.errors import InputError

KEY = ("dataset", "subject", "clip")
"""Columns that name a clip."""
_SHOWN_COLUMNS = 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The table of a clip's landmarks; fields as in :class:`LandmarkTable`."""

    path: Path
    flow_size: int | None


@dataclass(frozen=True, kw_only=True)
class LandmarkTable:
    """Landmarks by clip. ``flow_size`` is the side of the flow image they are pixels of, None for the onset frame."""

    path: Path
    """The file, or the folder of a file per clip."""
    points: Mapping[SampleId, Landmarks]
    flow_size: int | None
    sha256: str = ""
    """Of the file, or of all files that were read."""
    not_found: Mapping[SampleId, str] = field(default_factory=dict)
    """Clips whose table says that no face was found, and where it says so."""
    parts: Mapping[SampleId, Origin] = field(default_factory=dict)
    """Where a clip's landmarks come from, where tables of several sources are put together."""

    def origin(self, sample: SampleId) -> Origin:
        """Path and ``flow_size`` of the table that a clip's landmarks come from."""
        return self.parts.get(sample, Origin(path=self.path, flow_size=self.flow_size))

    def name_of(self, sample: SampleId) -> str:
        """Name of the file or folder that the clip's landmarks come from."""
        return self.origin(sample).path.name

    def missing(self, sample: SampleId) -> str:
        """Why there are no landmarks of the clip."""
        return self.not_found.get(sample, f"{self.path}: no landmarks for clip {sample}")


@dataclass(frozen=True, kw_only=True)
class CsvRow:
    """A row of a table: ``cells`` are texts by column, ``number`` counts from 1 with the header."""

    path: Path
    number: int
    cells: Mapping[str, str]

    def place(self, column: str) -> str:
        """Where a cell stands, for messages."""
        return f"{self.path}, row {self.number}, column {column}"

    def pixels(self, column: str) -> float:
        """A coordinate; :class:`InputError` if it is not a finite number."""
        text = self.cells[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{self.place(column)}: must be a finite number of pixels, got {text!r}")
        return value

    def sample(self) -> SampleId:
        """The clip that :data:`KEY` names; :class:`InputError` if a part of it is empty."""
        key = {name: self.cells[name].strip() for name in KEY}
        for name, value in key.items():
            if not value:
                raise InputError(f"{self.place(name)}: must not be empty")
        return SampleId(**key)


def read_text(path: Path) -> str:
    """Text of a table, UTF-8; :class:`InputError` if there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what = "(columns: dataset, subject, clip, left_eye_x, ...); prepare.detector does without one"
        raise InputError(f"{path}: no such landmark table {what}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_csv(path: Path) -> tuple[list[str], list[CsvRow]]:
    """Header and rows of a table; blanks around names are dropped, empty lines passed over.

    Raises:
        InputError: no such file, no CSV in UTF-8, a row with more or fewer cells than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [row_of(path, number, header, cells) for number, cells in enumerate(reader, start=2) if cells]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from None
    return header, rows


def row_of(path: Path, number: int, header: Sequence[str], cells: Sequence[str]) -> CsvRow:
    """A row of a table; :class:`InputError` if it has more or fewer cells than the header."""
    if len(cells) != len(header):
        raise InputError(f"{path}, row {number}: {len(cells)} values, the header has {len(header)} columns")
    return CsvRow(path=path, number=number, cells=dict(zip(header, cells, strict=True)))


def require_columns(path: Path, header: Sequence[str], columns: Iterable[str]) -> None:
    """Refuse a header in which one of the columns is missing or stands twice."""
    for column in columns:
        if header.count(column) != 1:
            problem = "is missing" if column not in header else "stands there twice"
            shown = ", ".join([*header[:_SHOWN_COLUMNS], *(["..."] if len(header) > _SHOWN_COLUMNS else [])])
            raise InputError(f"{path}, row 1: column {column} {problem}; the header is {shown or 'empty'}")


def by_clip(rows: Iterable[tuple[CsvRow, Landmarks]]) -> dict[SampleId, Landmarks]:
    """Landmarks by the clip that their row names; :class:`InputError` if a clip has two rows."""
    points: dict[SampleId, Landmarks] = {}
    seen: dict[SampleId, int] = {}
    for row, landmarks in rows:
        sample = row.sample()
        if sample in seen:
            raise InputError(f"{row.path}, row {row.number}: clip {sample} stands in row {seen[sample]} already")
        seen[sample] = row.number
        points[sample] = landmarks
    return points


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
