"""Annotation tables of every kind, and what is wrong with them, by file, sheet, row and column."""

from __future__ import annotations

import csv
import datetime
import io
import random
import zipfile

import pytest
import xlwt
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook
from test_htnet_adapters import make

from htnet.data.datasets.cells import mark_of, number_of, text_of, whole_of
from htnet.data.datasets.tables import read_plain, read_rows
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


def test_a_merged_header_is_refused(tmp_path):
    book = Workbook()
    book.active.append(["Subject", "Onset", "Offset"])
    book.active.append([1, 2, 3])
    book.active.merge_cells("B1:C1")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"t\.xlsx, sheet 'Sheet', row 1: the header cell in column 2 is merged"):
        read_rows(tmp_path / "t.xlsx", ("Subject", "Onset"))


def test_a_formula_in_a_needed_cell_is_refused(tmp_path):
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


# --- texts of every separator, encoding and habit

SAID = [("006", "006_1_2", 5562, 34.965), ("010", "Müller, A", 91, -0.5)]


def saved(separator: str, *, comma: bool = False, first: str = "", end: str = "\r\n", junk: bool = False) -> str:
    """:data:`SAID` as somebody's program saves it: decimal commas, a directive, rows of separators below."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["Subject", "Filename", "Onset\nFrame", "left_eye_x"])
    for subject, name, onset, x in SAID:
        numbers = [f"{onset}.0", str(x)]
        writer.writerow([subject, name, *(number.replace(".", ",") if comma else number for number in numbers)])
    if junk:
        text.write((separator * 3 + end) * 3)
    return first + text.getvalue()


def assert_said(path) -> None:
    rows = read_rows(path, ("Subject", "Filename", "Onset Frame", "left_eye_x"))
    read = [(r.text("Subject"), r.text("Filename"), r.integer("Onset Frame"), r.decimal("left_eye_x")) for r in rows]
    assert read == SAID


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_texts_read_alike_however_they_are_saved(tmp_path, separator, end, encoding):
    (tmp_path / "t.csv").write_bytes(saved(separator, end=end, junk=True).encode(encoding))
    assert_said(tmp_path / "t.csv")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_commas_are_decimal_where_they_separate_nothing(tmp_path, separator):
    (tmp_path / "t.txt").write_text(saved(separator, comma=True), encoding="utf-8")
    assert_said(tmp_path / "t.txt")


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\r"])
def test_a_first_line_may_name_the_separator(tmp_path, first):
    (tmp_path / "t.csv").write_text(saved(";", comma=True, first=first), encoding="utf-8", newline="")
    assert_said(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Subject,Onset\n1,5,562\n", r"row 2: 3 values, the header has 2 columns"),
        ('Subject,Onset\n1,"5,562"\n', r"row 2, column Onset: must be a whole number, got '5,562'"),
        ("Subject;Onset\n1;1.234,5\n", r"row 2, column Onset: must be a whole number, got '1\.234,5'"),
        ("Subject;Onset\n1;59,5\n", r"row 2, column Onset: must be a whole number, got '59,5'"),
        ('Subject,Onset\n"1,2\n3,4\n', r"not a readable CSV in UTF-8"),
        ("Subject,Onset\n1,#REF!\n", r"column Onset: must be a value, got the error '#REF!'"),
    ],
)
def test_what_a_text_leaves_open_is_refused(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        [row.integer("Onset") for row in read_rows(tmp_path / "t.csv", ("Subject", "Onset"))]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=8))
def test_any_cell_is_one_line_without_blanks_around(cell):
    text = text_of(cell)
    assert text == text.strip()
    assert len(text.splitlines()) <= 1


@given(st.integers(-(10**18), 10**18), st.integers(0, 4))
def test_a_whole_number_is_exact_however_it_is_written(number, zeros):
    assert whole_of(f"{number}.{'0' * zeros}") == number
    # 3,000 may be thousands where a comma may be decimal
    assert whole_of(f"{number},{'0' * zeros}", decimal_comma=True) == (None if zeros == 3 else number)
    assert whole_of(f"{number}.5") is None
    assert number_of(f"{number}e-3") * 1000 == number


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("\ufeffEP02_01f\u200b ", "EP02_01f"),
        ("EP02\u00a0x", "EP02 x"),
        (" Estimated \r\n Emotion", "Estimated Emotion"),
        ("Onset_x000D_\nFrame", "Onset Frame"),
        ('="006"', "006"),
        (46.0, "46"),
        ("46.00", "46"),
        ("4.50", "4.50"),
        (float("nan"), ""),
        ("\u00ad", ""),
    ],
)
def test_invisible_characters_are_no_part_of_a_cell(cell, text):
    assert text_of(cell) == text


@pytest.mark.parametrize("cell", ["0", "0.0", "", "FALSE", "-", "no", "nan", "0.00", "/"])
def test_marks_that_are_not_set(cell):
    assert mark_of(cell) is False


@pytest.mark.parametrize("cell", ["1", "1.0", "TRUE", "true", "x", "X", "yes", "1e0"])
def test_marks_that_are_set(cell):
    assert mark_of(cell) is True
    assert mark_of(f"{cell}?") is None


# --- names and sheets


def dated(path) -> None:
    """A workbook whose second row has a date for a name."""
    rows = [["Subject", "Filename"], [1, datetime.datetime(2014, 3, 1)]]
    if path.suffix == ".xlsx":
        make(path.parent, path.name, rows, [])
        return
    book = xlwt.Workbook()
    page = book.add_sheet("label")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            page.write(y, x, value, xlwt.easyxf(num_format_str="YYYY-MM-DD" if x and y else "General"))
    book.save(str(path))


@pytest.mark.parametrize("book", ["t.xlsx", "t.xls"])
def test_a_date_in_place_of_a_name_is_named_by_its_cell(tmp_path, book):
    dated(tmp_path / book)
    (row,) = read_rows(tmp_path / book, ("Subject", "Filename"))
    assert row.integer("Subject") == 1
    with pytest.raises(InputError, match=rf"{book}, sheet 'label', row 2, column Filename: must be a name, got the"):
        row.name("Filename")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "C:x"])
def test_a_name_that_leads_elsewhere_is_named_by_its_cell(tmp_path, name):
    (row,) = read_rows(make(tmp_path, "t.csv", [["Subject"], [name]], []) / "t.csv", ("Subject",))
    with pytest.raises(InputError, match=r"t\.csv, row 2, column Subject: must be a name, got .* leads out"):
        row.name("Subject")


def test_a_path_may_be_of_windows_and_stays_below(tmp_path):
    rows = [["frames"], ["clips\\p01/take"], ["/etc"], ["a/../../b"], ["C:\\x"]]
    first, *others = read_rows(make(tmp_path, "t.csv", rows, []) / "t.csv", ("frames",))
    assert first.parts("frames") == ("clips", "p01", "take")
    for row in others:
        with pytest.raises(InputError, match="leads out of the dataset's folder"):
            row.parts("frames")


def test_the_sheet_with_the_columns_is_found_behind_a_readme(tmp_path):
    book = Workbook()
    book.active.title = "README"
    for line in (["Subject"], ["One row per clip"], ["Subject", "as in the folders"]):
        book.active.append(line)
    hidden = book.create_sheet("old")
    hidden.sheet_state = "hidden"
    sheet = book.create_sheet("data")
    for page, onset in ((hidden, 1), (sheet, 2)):
        page.append(["Subject", "Onset"])
        page.append(["s01", onset])
    book.save(tmp_path / "t.xlsx")
    (row,) = read_rows(tmp_path / "t.xlsx", ("Subject", "Onset"))
    assert (row.sheet, row.integer("Onset")) == ("data", 2)


@pytest.mark.parametrize(
    "name", ["Estimated\nEmotion", "estimated emotion", "EstimatedEmotion\u200b", "Estimated_Emotion"]
)
def test_a_header_is_found_however_it_is_written(tmp_path, name):
    path = make(tmp_path, "t.xlsx", [["Subject", name], [1, "fear"]], []) / "t.xlsx"
    assert read_rows(path, ("Subject", "Estimated Emotion"))[0].text("Estimated Emotion") == "fear"


def test_an_exact_header_comes_before_a_similar_one(tmp_path):
    path = make(tmp_path, "t.csv", [["X_0", "x_0"], [1, 2]], []) / "t.csv"
    assert read_rows(path, ("x_0",))[0].integer("x_0") == 2


def test_rows_of_a_table_without_a_header(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\n;;;\nsamm;6;006_1_2;0,0\n\n")
    (row,) = read_plain(tmp_path / "t.csv", ("dataset", "subject", "clip", "label"))
    assert (row.number, row.text("clip"), row.integer("label")) == (3, "006_1_2", 0)


def test_two_sheets_with_the_columns_are_refused_by_name(tmp_path):
    book = Workbook()
    for page in (book.active, book.create_sheet("part2")):
        page.append(["Subject", "Onset"])
        page.append(["s01", 1])
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"t\.xlsx: sheets 'Sheet' and 'part2' have the columns; one of them"):
        read_rows(tmp_path / "t.xlsx", ("Subject", "Onset"))
    book["part2"].sheet_state = "hidden"
    book.save(tmp_path / "t.xlsx")
    assert len(read_rows(tmp_path / "t.xlsx", ("Subject", "Onset"))) == 1


def test_rows_below_a_thousand_blank_ones_are_not_lost(tmp_path):
    rows = [["Subject"], [1], *([[""]] * 1100), [2]]
    for book in ("t.csv", "t.xls"):
        assert len(read_rows(make(tmp_path, book, rows, []) / book, ("Subject",))) == 2
    path = make(tmp_path, "t.xlsx", rows, []) / "t.xlsx"
    with pytest.raises(InputError, match=r"t\.xlsx, sheet 'label', row 1103: stands below 1000 blank rows"):
        read_rows(path, ("Subject",))


def test_a_cell_merged_over_rows_is_refused_and_a_remark_is_not(tmp_path):
    book = Workbook()
    for row in (["Subject", "Apex"], [1, 5], [2, None], ["a remark", None]):
        book.active.append(row)
    book.active.merge_cells("A4:B5")
    book.save(tmp_path / "t.xlsx")
    assert len(read_rows(tmp_path / "t.xlsx", ("Subject", "Apex"))) == 3
    book.active.merge_cells("B2:B3")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"row 2, column Apex: the cells of rows 2 to 3 are merged; split them"):
        read_rows(tmp_path / "t.xlsx", ("Subject", "Apex"))


def test_what_is_wrong_with_a_text_is_named_by_its_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("Subject\n1\né".encode("latin-1"))
    with pytest.raises(InputError, match=r"t\.csv, line 3: not a readable CSV in UTF-8"):
        read_rows(tmp_path / "t.csv", ("Subject",))
    (tmp_path / "t.csv").write_text("Subject:Onset\n1:2\n")
    with pytest.raises(InputError, match=r"column Subject is missing.*the first that is not blank is 'Subject:Onset'"):
        read_rows(tmp_path / "t.csv", ("Subject", "Onset"))
