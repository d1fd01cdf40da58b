"""Tables of other people: workbooks (.xlsx, .xls) and texts (commas, semicolons, tabs), each mistake named by its cell.

Every table of the project is read here: annotations, landmarks, lists of clips. A text is UTF-8, or UTF-16 with its
mark; its separator is the one whose header has most of the wanted columns, or what a first line ``sep=;`` says. A
workbook's sheet is found in the same way, so that a sheet of remarks may come first.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import xlrd
from openpyxl import load_workbook

from htnet.data.datasets.cells import ERROR_VALUES, NOT_A_NUMBER, Moment, mark_of, number_of, text_of, visible, whole_of
from htnet.data.frames import LARGEST_NUMBER
from htnet.errors import InputError

_HEADER_SEARCH = 50
_BLANK_ROWS = 1000
"""A sheet ends after so many blank rows: formatted emptiness can go on for a million of them."""
_SHOWN_COLUMNS, _SHOWN_LETTERS = 16, 60
_POINT = re.compile(r"[xyzXYZ]\W?_?[0-9]+")
_SEPARATORS = (",", ";", "\t", "|")
_DIRECTIVE = re.compile(r'"?sep=(.)"?(?=\r|\n|$)', re.IGNORECASE)
"""A first line by which Excel is told the separator."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

Cells = Sequence[object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row by column; ``number`` counts from 1 as a spreadsheet program shows it."""

    path: Path
    sheet: str
    number: int
    cells: Mapping[str, object]
    decimal_comma: bool = False
    """True where a comma inside a cell is the decimal point."""

    def place(self, column: str) -> str:
        """Name file, sheet, row and column, for an error message."""
        sheet = f", sheet {self.sheet!r}" if self.sheet else ""
        return f"{self.path}{sheet}, row {self.number}, column {column}"

    def optional(self, column: str, expected: str = "a text or a number") -> str:
        """Read a cell as text, as :func:`htnet.data.datasets.cells.text_of` does; empty where it is blank.

        Raises:
            InputError: a date, of which nobody knows what it was; a formula, or the error that one gave. The message
                says what is ``expected``.
        """
        value = self.cells[column]
        if isinstance(value, Moment):
            raise InputError(f"{self.place(column)}: must be {expected}, got the date {value}, made by a spreadsheet")
        text = text_of(value, decimal_comma=self.decimal_comma)
        if text.startswith("="):
            raise InputError(f"{self.place(column)}: must be a value, got the formula {text!r}")
        if text in ERROR_VALUES:
            raise InputError(f"{self.place(column)}: must be a value, got the error {text!r}")
        return text

    def text(self, column: str, expected: str = "a text") -> str:
        """Read a cell as :meth:`optional` does; :class:`InputError` if empty."""
        text = self.optional(column, expected)
        if not text:
            raise InputError(f"{self.place(column)}: must not be empty")
        return text

    def name(self, column: str) -> str:
        """Read the name of one folder or file; :class:`InputError` for what is none, or would lead elsewhere."""
        text = self.text(column, "a name")
        if text in (".", "..") or any(mark in text for mark in ("/", "\\", ":")):
            raise InputError(
                f"{self.place(column)}: must be a name, got {text!r}, which leads out of the dataset's folder"
            )
        return text

    def parts(self, column: str) -> tuple[str, ...]:
        r"""Read a relative path, ``a/b`` or ``a\b``, as its names; :class:`InputError` if it could lead elsewhere."""
        text = self.text(column, "a path")
        if isinstance(raw := self.cells[column], str):
            text = visible(raw)  # a folder may be called 1.0
        path = PurePosixPath(text.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in text or not path.parts:
            raise InputError(
                f"{self.place(column)}: must be a path, got {text!r}, which leads out of the dataset's folder"
            )
        return path.parts

    def integer(self, column: str) -> int:
        """Read a whole number, however it is written; :class:`InputError` otherwise."""
        text = self.text(column, "a whole number")
        number = whole_of(text, decimal_comma=self.decimal_comma)
        if number is None:
            raise InputError(f"{self.place(column)}: must be a whole number, got {text!r}")
        if abs(number) > LARGEST_NUMBER:
            raise InputError(f"{self.place(column)}: must be at most {LARGEST_NUMBER}, got {text}")
        return number

    def whole(self, column: str) -> int | None:
        """Read as :meth:`integer`; None where the cell holds anything else, such as "/" for what was not coded."""
        number = whole_of(self.optional(column), decimal_comma=self.decimal_comma)
        return None if number is None else self.integer(column)

    def optional_integer(self, column: str) -> int | None:
        """Read as :meth:`integer`; None where the cell is blank or says NaN."""
        return None if self.optional(column).casefold() in NOT_A_NUMBER else self.integer(column)

    def decimal(self, column: str) -> float:
        """Read a number such as a coordinate; :class:`InputError` if it is not a finite one."""
        text = self.optional(column, "a number")
        number = number_of(text, decimal_comma=self.decimal_comma)
        value = math.nan if number is None else float(number)
        if not math.isfinite(value):
            raise InputError(f"{self.place(column)}: must be a finite number, got {text!r}")
        return value

    def mark(self, column: str) -> bool:
        """Read a mark, as :func:`htnet.data.datasets.cells.mark_of` does; :class:`InputError` for what is none."""
        text = self.optional(column)
        marked = mark_of(text, decimal_comma=self.decimal_comma)
        if marked is None:
            raise InputError(f"{self.place(column)}: must be 0 or 1, got {text!r}")
        return marked


@dataclass(frozen=True, kw_only=True)
class Table:
    """A sheet of a workbook, or a text with one separator; its header is row ``top``, from 0."""

    path: Path
    sheet: str
    """Title; empty for a text."""
    lines: Sequence[Cells]
    separator: str = ""
    """Of a text's columns; empty for a workbook."""
    hidden: bool = False
    """True for a sheet that a spreadsheet program does not show."""
    text: str = field(default="", repr=False)
    """A text of which ``lines`` are the first ones only."""
    merged: tuple[tuple[int, int, int, int], ...] = ()
    """Merged areas: first and last row, first and last column, from 0."""
    top: int | None = None

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns, empty where a cell is blank."""
        return tuple(_heading(cell) for cell in self.lines[self.top]) if self.top is not None else ()

    def at(self, number: int) -> str:
        """Name file, sheet and row (from 1), for an error message."""
        return f"{self.path}, sheet {self.sheet!r}, row {number}" if self.sheet else f"{self.path}, row {number}"

    def rows(self, columns: Sequence[str]) -> tuple[Row, ...]:
        """Read the rows below the header; those that are blank in all of ``columns`` are passed over.

        Raises:
            InputError: no header, a merged header cell, a column that is missing or there twice, cells of a text
                beyond its header.
        """
        wanted = [_Column.of(column) for column in columns]
        if self.top is None:
            where = f"{self.path}, sheet {self.sheet!r}" if self.sheet else str(self.path)
            first = next((line for line in self.lines if not all(map(_blank, line))), ())
            seen = " ".join(text_of(cell) for cell in first)[:_SHOWN_LETTERS]
            raise InputError(
                f"{where}: column {wanted[0].names[0]} is missing, none of the first {_HEADER_SEARCH} rows is a "
                f"header with it; the first that is not blank is {seen!r}"
            )
        place = self._places(wanted)
        self._refuse_merged({index: name for name, index in place.items() if index is not None})
        rows = []
        width = len(self.header)
        for number, cells in enumerate(self.lines[self.top + 1 :], start=self.top + 2):
            # a separator too many, and cells stand elsewhere
            if self.separator and not all(map(_blank, cells[width:])):
                raise InputError(f"{self.at(number)}: {len(cells)} values, the header has {width} columns")
            taken = {name: cells[at] if at is not None and at < len(cells) else None for name, at in place.items()}
            if not all(_blank(value) for value in taken.values()):
                rows.append(self.row(number, taken))
        return tuple(rows)

    def row(self, number: int, cells: Mapping[str, object]) -> Row:
        """Give a row of these cells by column."""
        comma = self.separator not in ("", ",")
        return Row(path=self.path, sheet=self.sheet, number=number, cells=cells, decimal_comma=comma)

    def _refuse_merged(self, columns: Mapping[int, str]) -> None:
        """Refuse merged cells in the header, and those that stand for several rows of a column that is read.

        An area of several columns is a remark.
        """
        for first, last, left, right in self.merged:
            if first == self.top:
                raise InputError(f"{self.at(first + 1)}: the header cell in column {left + 1} is merged; split it")
            if self.top is not None and first > self.top and last > first and left == right and left in columns:
                raise InputError(
                    f"{self.at(first + 1)}, column {columns[left]}: the cells of rows {first + 1} to {last + 1} are "
                    "merged; split them"
                )

    def _places(self, wanted: Sequence[_Column]) -> dict[str, int | None]:
        assert self.top is not None
        place: dict[str, int | None] = {}
        header = _Header.of(self.lines[self.top])
        for column in wanted:
            found = header.places(column)
            if len(found) > 1 or not (found or column.optional):
                problem = "stands there twice" if found else "is missing"
                there = [name for name in header.names if name]
                shown = ", ".join([*there[:_SHOWN_COLUMNS], *(["..."] if len(there) > _SHOWN_COLUMNS else [])])
                raise InputError(f"{self.at(self.top + 1)}: column {column.names[0]} {problem}; found {shown}")
            place[column.names[0]] = found[0] if found else None
        return place


def open_table(path: Path, columns: Sequence[str]) -> Table:
    """Open a table whose header, one of the leading 50 rows, has the first of ``columns``.

    Of several sheets, separators and rows the one with most of ``columns`` is taken, the first of equals; sheets that
    are shown come before hidden ones.

    Args:
        path: the file; .xlsx and .xls are workbooks, all else is text.
        columns: as :func:`read_rows` takes them.

    Raises:
        InputError: no such file, not a readable table, several sheets that would do.
    """
    wanted = [_Column.of(column) for column in columns]
    found = []
    for table in _tables(path):
        top, score = _find_header(table.lines[:_HEADER_SEARCH], wanted)
        found.append((score, replace(table, top=top)))
        if score == len(wanted) and table.separator:
            break
    most = max(score for score, _ in found)
    return _whole(_only([table for score, table in found if score == most], "the columns" if most else None))


def first_name(column: str) -> str:
    """Return the name under which a row knows a column that :func:`read_rows` was asked for."""
    return column.removesuffix("?").split("|")[0]


def read_rows(path: Path, columns: Sequence[str]) -> tuple[Row, ...]:
    """Read the rows of a table by the names of its columns.

    A column may be named with alternatives, ``Onset|OnsetFrame``; the row then knows it by the first. A column that
    ends in ``?`` may be missing; its cells are then blank. Where no column is called exactly so, one whose name differs
    in capitals, blanks and marks alone is taken.

    Raises:
        InputError: as :func:`open_table` and :meth:`Table.rows`.
    """
    return open_table(path, columns).rows(columns)


def read_plain(path: Path, columns: Sequence[str]) -> tuple[Row, ...]:
    """Read a table without a header, whose first cells are those of ``columns``; blank rows are passed over.

    The separator or sheet is the first under which a row has as many cells.

    Raises:
        InputError: as :func:`open_table`.
    """
    tables = list(_tables(path))
    fitting = [table for table in tables if any(len(line) >= len(columns) for line in table.lines)]
    table = _whole(_only(fitting, "rows") if fitting else tables[0])
    return tuple(
        table.row(number, dict(itertools.zip_longest(columns, line[: len(columns)])))
        for number, line in enumerate(table.lines, start=1)
        if not all(map(_blank, line))
    )


def _only(tables: Sequence[Table], content: str | None) -> Table:
    """Give the first of the tables; of a workbook one sheet that is shown may have the ``content``."""
    shown = [repr(table.sheet) for table in tables if table.sheet and not table.hidden]
    if content and len(shown) > 1:
        raise InputError(
            f"{tables[0].path}: sheets {' and '.join(shown)} have {content}; one of them is read: hide the rest"
        )
    return tables[0]


def _whole(table: Table) -> Table:
    """Read all of a text, now that its separator is known; a quotation mark that nothing closes is an error."""
    if not table.separator:
        return table
    reader = csv.reader(io.StringIO(table.text, newline=""), delimiter=table.separator, strict=True)
    try:
        return replace(table, lines=list(reader), text="")
    except csv.Error as error:
        raise InputError(f"{table.path}, line {reader.line_num}: not a readable CSV in UTF-8 ({error})") from None


@dataclass(frozen=True, kw_only=True)
class _Column:
    names: tuple[str, ...]
    optional: bool

    @classmethod
    def of(cls, text: str) -> _Column:
        return cls(names=tuple(text.removesuffix("?").split("|")), optional=text.endswith("?"))


@dataclass(frozen=True, kw_only=True)
class _Header:
    """A row as names of columns; ``exact`` and ``loose``: where each name stands."""

    names: tuple[str, ...]
    exact: Mapping[str, Sequence[int]]
    loose: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, cells: Cells) -> _Header:
        names = tuple(_heading(cell) for cell in cells)
        exact: dict[str, list[int]] = defaultdict(list)
        loose: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            exact[name].append(index)
            # coordinates of numbered points are told apart by their capitals: OpenFace's X_0 is in space
            if name and not _POINT.fullmatch(name):
                loose[simplified(name)].append(index)
        return cls(names=names, exact=exact, loose=loose)

    def places(self, column: _Column) -> list[int]:
        """Find a column: by its exact names, else by names that differ in capitals, blanks and marks."""
        exact = [index for name in column.names for index in self.exact.get(name, ())]
        return exact or [index for name in {*map(simplified, column.names)} for index in self.loose.get(name, ())]

    def score(self, wanted: Sequence[_Column]) -> int:
        """Count the wanted columns that are there; 0 without the first."""
        return sum(bool(self.places(column)) for column in wanted) if self.places(wanted[0]) else 0


def simplified(name: str) -> str:
    """Reduce a column's name to its small letters and digits, by which names are compared that are not equal."""
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def _heading(cell: object) -> str:
    return " ".join(visible("" if cell is None else str(cell)).split())


def _blank(value: object) -> bool:
    if not isinstance(value, str):
        return value is None
    return not value or value.isspace() or not (value.isascii() or visible(value))


def _find_header(lines: Sequence[Cells], wanted: Sequence[_Column]) -> tuple[int | None, int]:
    """Find the row that has the first column and most of the others, the first of equals, and how many it has."""
    top, score = None, 0
    for row, cells in enumerate(lines):
        found = _Header.of(cells).score(wanted)
        if found > score:
            top, score = row, found
        if score == len(wanted):  # tables of others have hundreds of columns
            break
    return top, score


def _tables(path: Path) -> Iterable[Table]:
    """Give what the file may mean: each sheet of a workbook, or a text by each separator."""
    kind = path.suffix.lower()
    if kind in _WORKBOOKS:
        with _reading(path, f"{kind} workbook"):
            pages = list(_WORKBOOKS[kind](path))
        if not pages:
            raise InputError(f"{path}: the workbook has no sheet")
        return pages
    text, separators = _text_of_file(path)
    return (_text_table(path, text, separator) for separator in separators)


def _text_of_file(path: Path) -> tuple[str, Sequence[str]]:
    """Decode a text, and name its separators; a first line ``sep=;`` says it, and is blank afterwards."""
    with _reading(path, "CSV in UTF-8"):
        data = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    if chosen := _DIRECTIVE.match(text):
        return text[chosen.end() :], (chosen[1],)
    return text, _SEPARATORS


def _text_table(path: Path, text: str, separator: str) -> Table:
    """Split the first lines of a text into cells."""
    with _reading(path, "CSV in UTF-8"):
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        head = list(itertools.islice(lines, _HEADER_SEARCH))
        return Table(path=path, sheet="", lines=head, separator=separator, text=text)


def _xlsx_pages(path: Path) -> Iterator[Table]:
    # formulas as they stand: what a spreadsheet program last made of them may be out of date or missing
    book = load_workbook(path, data_only=False)
    for page in sorted(book.worksheets, key=lambda page: page.sheet_state != "visible"):
        areas = page.merged_cells.ranges
        merged = tuple((area.min_row - 1, area.max_row - 1, area.min_col - 1, area.max_col - 1) for area in areas)
        lines = _until_blank(page.iter_rows(values_only=True))
        if len(lines) < page.max_row:
            _refuse_more_rows(path, page.title, len(lines))
        hidden = page.sheet_state != "visible"
        yield Table(path=path, sheet=page.title, lines=lines, merged=merged, hidden=hidden)


def _xls_pages(path: Path) -> Iterator[Table]:
    # what it warns of would stand on stdout, in the middle of what is printed for the user
    book = xlrd.open_workbook(path, logfile=io.StringIO(), formatting_info=True)
    for page in sorted(book.sheets(), key=lambda page: page.visibility):
        merged = tuple((top, below - 1, left, right - 1) for top, below, left, right in page.merged_cells)
        lines = [[_xls_value(cell, book.datemode) for cell in page.row(row)] for row in range(page.nrows)]
        yield Table(path=path, sheet=page.name, lines=lines, merged=merged, hidden=page.visibility != 0)


def _refuse_more_rows(path: Path, sheet: str, read: int) -> None:
    """Refuse what stands below the blank rows at which reading ended; the rows are gone through one at a time."""
    book = load_workbook(path, read_only=True)
    try:
        for number, row in enumerate(book[sheet].iter_rows(min_row=read + 1, values_only=True), start=read + 1):
            if not all(map(_blank, row)):
                raise InputError(
                    f"{path}, sheet {sheet!r}, row {number}: stands below {_BLANK_ROWS} blank rows; remove them"
                )
    finally:
        book.close()


def _xls_value(cell: xlrd.sheet.Cell, datemode: int) -> object:
    """Give a cell of the older workbooks as openpyxl gives it, where dates and errors are numbers with a type."""
    if cell.ctype == xlrd.XL_CELL_DATE:
        try:
            return xlrd.xldate_as_datetime(cell.value, datemode)
        except (ValueError, OverflowError):  # a number that is no day, though the cell is formatted as one
            return cell.value
    if cell.ctype == xlrd.XL_CELL_ERROR:
        return xlrd.error_text_from_code.get(cell.value, "#N/A")
    return bool(cell.value) if cell.ctype == xlrd.XL_CELL_BOOLEAN else cell.value


_WORKBOOKS = {".xlsx": _xlsx_pages, ".xlsm": _xlsx_pages, ".xls": _xls_pages}


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a library dies of while it reads the file into one line."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such table") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not a readable {kind} ({error})") from None
    except Exception as error:  # of a damaged file they raise far more than errors of their own: KeyError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable {kind} ({reason})") from error


def _until_blank(rows: Iterable[Cells]) -> list[Cells]:
    table: list[Cells] = []
    blank = 0
    for row in rows:
        blank = blank + 1 if all(map(_blank, row)) else 0
        if blank > _BLANK_ROWS:
            break
        table.append(row)
    return table
