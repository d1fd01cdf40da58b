"""Annotation tables (.xlsx, .xls, .csv): the header row found by name, cells read with errors that name their place."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xlrd
from openpyxl import load_workbook

from htnet.data.frames import LARGEST_NUMBER
from htnet.errors import InputError

_HEADER_SEARCH = 50
_BLANK_ROWS = 1000
"""A sheet ends after so many blank rows: formatted emptiness can go on for a million of them."""

Table = list[Sequence[object]]
Sheet = TypeVar("Sheet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One annotated row; ``number`` counts from 1 as a spreadsheet program shows it."""

    path: Path
    sheet: str
    number: int
    cells: Mapping[str, object]

    def place(self, column: str) -> str:
        """File, sheet, row and column, for an error message."""
        sheet = f", sheet {self.sheet!r}" if self.sheet else ""
        return f"{self.path}{sheet}, row {self.number}, column {column}"

    def optional(self, column: str) -> str:
        """A cell as text without surrounding blanks, empty where it is blank; a whole number loses its ``.0``."""
        value = self.cells[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return "" if value is None else str(value).strip()

    def text(self, column: str) -> str:
        """As :meth:`optional`; :class:`InputError` if empty."""
        text = self.optional(column)
        if not text:
            raise InputError(f"{self.place(column)}: must not be empty")
        return text

    def integer(self, column: str) -> int:
        """A cell as a whole number, written as a number or as text; :class:`InputError` otherwise."""
        text = self.text(column)
        try:
            number = int(text)
        except ValueError:
            raise InputError(f"{self.place(column)}: must be a whole number, got {text!r}") from None
        if abs(number) > LARGEST_NUMBER:
            raise InputError(f"{self.place(column)}: must be at most {LARGEST_NUMBER}, got {text}")
        return number


def find_workbook(root: Path, names: Sequence[str], chosen: Path | None = None) -> Path:
    """The annotation file: ``chosen`` (relative to ``root``) if given, else the first of ``names`` in ``root``.

    Raises:
        InputError: there is none; names them.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such dataset folder")
    if chosen is not None:
        if not (root / chosen).is_file():
            raise InputError(f"{root / chosen}: no such annotation file")
        return root / chosen
    for name in names:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root}: the annotation workbook is missing, expected {' or '.join(names)}")


def read_rows(path: Path, columns: Sequence[str], *, sheet: str | None = None) -> tuple[Row, ...]:
    """Read a sheet.

    The header is the first of the leading 50 rows in which a cell equals the first of ``columns``. Rows that are blank
    in all ``columns`` are passed over. A column may be named with alternatives, ``Onset|OnsetFrame``; the row then
    knows it by the first. A column that ends in ``?`` may be missing; its cells are then blank.

    Args:
        path: the file; by its suffix a workbook (.xlsx, .xls) or a CSV in UTF-8.
        columns: columns to read, by the header's words (surrounding blanks do not count).
        sheet: name of the sheet, any case; None: the first.

    Raises:
        InputError: not a readable table, no such sheet, no header row, a merged header cell, a column missing or there
            twice, a formula in a needed cell.
    """
    title, table, merged = _read_table(path, sheet)
    wanted = [_Column.of(column) for column in columns]
    header = _header_row(path, title, table, wanted[0])
    place = _places(path, title, header, table[header], wanted)
    for row, column in merged:
        if row == header:
            raise InputError(f"{_at(path, title, header)}: the header cell in column {column + 1} is merged; split it")
    rows = []
    for number, cells in enumerate(table[header + 1 :], start=header + 2):
        taken = {name: cells[at] if at is not None and at < len(cells) else None for name, at in place.items()}
        if any(not _blank(value) for value in taken.values()):
            rows.append(Row(path=path, sheet=title, number=number, cells=taken))
            _refuse_formulas(rows[-1])
    return tuple(rows)


@dataclass(frozen=True, kw_only=True)
class _Column:
    names: tuple[str, ...]
    optional: bool

    @classmethod
    def of(cls, text: str) -> _Column:
        return cls(names=tuple(text.removesuffix("?").split("|")), optional=text.endswith("?"))


def _at(path: Path, sheet: str, row: int) -> str:
    return f"{path}, sheet {sheet!r}, row {row + 1}" if sheet else f"{path}, row {row + 1}"


def _blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _refuse_formulas(row: Row) -> None:
    for column, value in row.cells.items():
        if isinstance(value, str) and value.startswith("="):
            raise InputError(f"{row.place(column)}: must be a value, got the formula {value!r}")


def _read_table(path: Path, sheet: str | None) -> tuple[str, Table, list[tuple[int, int]]]:
    """Title, cells and merged cells (row, column) of a sheet."""
    kind = path.suffix.lower()
    if kind == ".csv":
        return "", _read_csv(path), []
    if kind == ".xls":
        return _read_xls(path, sheet)
    with _reading(path, ".xlsx workbook"):
        # formulas as they stand: what a spreadsheet program last made of them may be out of date or missing
        book = load_workbook(path, data_only=False)
        page = _choose(path, {page.title: page for page in book.worksheets}, sheet)
        merged = [(area.min_row - 1, area.min_col - 1) for area in page.merged_cells.ranges]
        return page.title, _until_blank(page.iter_rows(values_only=True)), merged


def _read_xls(path: Path, sheet: str | None) -> tuple[str, Table, list[tuple[int, int]]]:
    with _reading(path, ".xls workbook"):
        # what it warns of would stand on stdout, in the middle of what is printed for the user
        book = xlrd.open_workbook(path, logfile=io.StringIO(), formatting_info=True)
        page = _choose(path, {page.name: page for page in book.sheets()}, sheet)
        merged = [(area[0], area[2]) for area in page.merged_cells]
        return page.name, _until_blank(page.row_values(index) for index in range(page.nrows)), merged


def _read_csv(path: Path) -> Table:
    with _reading(path, "CSV in UTF-8"), path.open(encoding="utf-8-sig", newline="") as file:
        return _until_blank(csv.reader(file))


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a library dies of while it reads the file into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of a damaged file they raise far more than errors of their own: KeyError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable {kind} ({reason})") from error


def _until_blank(rows: Iterator[Sequence[object]]) -> Table:
    table: Table = []
    blank = 0
    for row in rows:
        blank = blank + 1 if all(_blank(cell) for cell in row) else 0
        if blank > _BLANK_ROWS:
            break
        table.append(row)
    return table


def _choose(path: Path, sheets: Mapping[str, Sheet], wanted: str | None) -> Sheet:
    if not sheets:
        raise InputError(f"{path}: the workbook has no sheet")
    if wanted is None:
        return next(iter(sheets.values()))
    for title, page in sheets.items():
        if title.strip().lower() == wanted.lower():
            return page
    raise InputError(f"{path}: sheet {wanted!r} is missing; there are {', '.join(map(repr, sheets))}")


def _header_row(path: Path, sheet: str, table: Table, key: _Column) -> int:
    for number, row in enumerate(table[:_HEADER_SEARCH]):
        if any(isinstance(cell, str) and cell.strip() in key.names for cell in row):
            return number
    where = f"{path}, sheet {sheet!r}" if sheet else str(path)
    raise InputError(
        f"{where}: column {key.names[0]} is missing, none of the first {_HEADER_SEARCH} rows is a header with it"
    )


def _places(
    path: Path, sheet: str, header: int, cells: Sequence[object], wanted: Sequence[_Column]
) -> dict[str, int | None]:
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    place: dict[str, int | None] = {}
    for column in wanted:
        found = [index for index, name in enumerate(names) if name in column.names]
        if len(found) > 1 or not (found or column.optional):
            problem = "stands there twice" if found else "is missing"
            there = ", ".join(name for name in names if name)
            raise InputError(f"{_at(path, sheet, header)}: column {column.names[0]} {problem}; found {there}")
        place[column.names[0]] = found[0] if found else None
    return place
