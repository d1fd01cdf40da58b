"""Annotation workbooks (.xlsx): the header row found by name, cells read with errors that name their place."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpyxl import load_workbook
from openpyxl.utils.exceptions import InvalidFileException

from htnet.errors import InputError

_HEADER_SEARCH = 50


@dataclass(frozen=True, kw_only=True)
class Row:
    """One annotated row; ``number`` counts from 1 as a spreadsheet program shows it."""

    path: Path
    sheet: str
    number: int
    cells: Mapping[str, object]

    def place(self, column: str) -> str:
        """File, sheet, row and column, for an error message."""
        return f"{self.path}, sheet {self.sheet!r}, row {self.number}, column {column}"

    def text(self, column: str) -> str:
        """A cell as text without surrounding blanks; a whole number loses its ``.0``; :class:`InputError` if empty."""
        value = self.cells[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = "" if value is None else str(value).strip()
        if not text:
            raise InputError(f"{self.place(column)}: must not be empty")
        return text

    def integer(self, column: str) -> int:
        """A cell as a whole number, written as a number or as text; :class:`InputError` otherwise."""
        text = self.text(column)
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{self.place(column)}: must be a whole number, got {text!r}") from None


def find_workbook(root: Path, names: Sequence[str]) -> Path:
    """The first of the workbooks ``names`` that lies in ``root``; :class:`InputError` names them if there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such dataset folder")
    for name in names:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root}: the annotation workbook is missing, expected {' or '.join(names)}")


def read_rows(path: Path, columns: Sequence[str]) -> tuple[Row, ...]:
    """Read the first sheet of a workbook.

    The header is the first of the leading 50 rows in which a cell equals the first of ``columns``. Rows that
    are blank in all ``columns`` are passed over.

    Args:
        path: the workbook.
        columns: columns to read, by the header's words (surrounding blanks do not count).

    Raises:
        InputError: not a readable workbook, no header row, a column missing or there twice.
    """
    try:
        sheet = load_workbook(path, data_only=True).worksheets[0]
    except (InvalidFileException, zipfile.BadZipFile, KeyError, ValueError, OSError, IndexError) as error:
        raise InputError(f"{path}: not a readable .xlsx workbook ({error})") from error
    table = list(sheet.iter_rows(values_only=True))
    header = _header_row(path, sheet.title, table, columns[0])
    names = ["" if cell is None else str(cell).strip() for cell in table[header]]
    for column in columns:
        if names.count(column) != 1:
            problem = "is missing" if column not in names else "stands there twice"
            found = ", ".join(name for name in names if name)
            row = f"sheet {sheet.title!r}, row {header + 1}"
            raise InputError(f"{path}, {row}: column {column} {problem}; found {found}")
    place = {column: names.index(column) for column in columns}
    rows = (
        Row(path=path, sheet=sheet.title, number=number, cells={name: row[at] for name, at in place.items()})
        for number, row in enumerate(table[header + 1 :], start=header + 2)
    )
    return tuple(row for row in rows if any(cell is not None for cell in row.cells.values()))


def _header_row(path: Path, sheet: str, table: Sequence[Sequence[object]], key: str) -> int:
    for number, row in enumerate(table[:_HEADER_SEARCH]):
        if any(isinstance(cell, str) and cell.strip() == key for cell in row):
            return number
    raise InputError(
        f"{path}, sheet {sheet!r}: column {key} is missing, none of the first {_HEADER_SEARCH} rows is a header with it"
    )
