"""Annotation tables of every kind, and what is wrong with them, by file, sheet, row and column."""

from __future__ import annotations

import random
import zipfile

import pytest
from openpyxl import Workbook
from test_htnet_adapters import make

from htnet.data.tables import read_rows
from htnet.errors import InputError

ROWS = [["a title"], [], ["Subject", "Onset", None, "Emotion"], [1.0, "7", None, " happy "], [], ["x", None, None, ""]]


@pytest.mark.parametrize("book", ["t.xlsx", "t.xls", "t.csv"])
def test_the_three_kinds_of_table_read_alike(tmp_path, book):
    path = make(tmp_path, book, ROWS, []) / book
    first, second = read_rows(path, ("Subject", "Start|Onset", "Emotion", "Notes?"))
    assert (first.text("Subject").removesuffix(".0"), first.integer("Start"), first.text("Emotion")) == (
        "1",
        7,
        "happy",
    )
    assert (first.number, second.number) == (4, 6)
    assert second.optional("Emotion") == second.optional("Notes") == ""
    with pytest.raises(InputError, match=rf"{book}.*, row 6, column Emotion: must not be empty"):
        second.text("Emotion")


@pytest.mark.parametrize("book", ["t.xlsx", "t.xls"])
def test_a_sheet_is_chosen_by_name(tmp_path, book):
    path = make(tmp_path, book, ROWS, [], sheet="label") / book
    assert len(read_rows(path, ("Subject",), sheet="Label")) == 2
    with pytest.raises(InputError, match=rf"{book}: sheet 'other' is missing; there are 'label'"):
        read_rows(path, ("Subject",), sheet="other")


def test_a_merged_header_is_refused(tmp_path):
    book = Workbook()
    book.active.append(["Subject", "Onset", "Offset"])
    book.active.append([1, 2, 3])
    book.active.merge_cells("B1:C1")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"t\.xlsx, sheet 'Sheet', row 1: the header cell in column 2 is merged"):
        read_rows(tmp_path / "t.xlsx", ("Subject", "Onset"))


def test_a_formula_in_a_needed_cell_is_refused_and_elsewhere_it_is_not(tmp_path):
    path = make(tmp_path, "t.xlsx", [["Subject", "Onset", "Sum"], [1, 2, "=A2+B2"]], []) / "t.xlsx"
    (row,) = read_rows(path, ("Subject", "Onset", "Sum"))
    assert row.integer("Onset") == 2
    with pytest.raises(InputError, match=r"row 2, column Sum: must be a value, got the formula '=A2\+B2'"):
        row.text("Sum")


def test_a_column_that_is_missing_or_there_twice_is_named(tmp_path):
    path = make(tmp_path, "t.xlsx", [["Subject", "Onset", "Onset"], [1, 2, 3]], []) / "t.xlsx"
    with pytest.raises(InputError, match=r"sheet 'label', row 1: column Onset stands there twice"):
        read_rows(path, ("Subject", "Onset"))
    with pytest.raises(InputError, match=r"row 1: column Apex is missing; found Subject, Onset, Onset"):
        read_rows(path, ("Subject", "Apex"))
    with pytest.raises(InputError, match=r"none of the first 50 rows is a header with it"):
        read_rows(path, ("Person",))


@pytest.mark.parametrize("book", ["t.xlsx", "t.xls"])
@pytest.mark.parametrize("content", [b"", b"Subject,Filename", b"PK\x03\x04 half a zip", b"<html></html>"])
def test_a_file_that_is_no_workbook_is_named(tmp_path, book, content):
    (tmp_path / book).write_bytes(content)
    with pytest.raises(InputError, match=rf"t\.xlsx?: not a readable {book[1:]} workbook"):
        read_rows(tmp_path / book, ("Subject",))


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Cut off, bytes flipped, or a part replaced by a shorter one."""
    data, place = bytearray(whole), rng.randrange(len(whole))
    kind = rng.randrange(3)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for place in rng.sample(range(len(data)), rng.randrange(1, 9)):
            data[place] ^= rng.randrange(1, 256)
    else:
        data[place : place + rng.randrange(21, 512)] = rng.randbytes(20)
    return bytes(data)


@pytest.mark.parametrize("book", ["t.xlsx", "t.xls"])
def test_a_workbook_damaged_anywhere_is_one_line_or_reads(tmp_path, book, capfd):
    path = make(tmp_path, book, ROWS, []) / book
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        path.write_bytes(damaged(whole, rng))
        try:
            read_rows(path, ("Subject", "Onset", "Emotion"))
        except InputError as error:
            refused += 1
            assert book in str(error)
            assert "\n" not in str(error)
    assert refused > 200
    assert capfd.readouterr() == ("", "")


def test_a_sheet_that_is_cut_off_within_a_whole_archive_is_named(tmp_path):
    path = make(tmp_path, "t.xlsx", ROWS, []) / "t.xlsx"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-40] if "worksheets/" in name else data)
    with pytest.raises(InputError, match=r"t\.xlsx: not a readable \.xlsx workbook \(.*line 1"):
        read_rows(path, ("Subject",))


def test_a_csv_in_another_encoding_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("Subject\né".encode("latin-1"))
    with pytest.raises(InputError, match=r"t\.csv: not a readable CSV in UTF-8"):
        read_rows(tmp_path / "t.csv", ("Subject",))


def test_formatted_emptiness_ends_the_table(tmp_path):
    rows = [["Subject"], [1], *([[""]] * 1100), [2]]
    path = make(tmp_path, "t.csv", rows, []) / "t.csv"
    assert len(read_rows(path, ("Subject",))) == 1
