"""Raw dataset folders to clips: every row is a clip or has a reason, every trap its rule, bad input its place."""

from __future__ import annotations

import csv
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import xlwt
from openpyxl import Workbook, load_workbook

from htnet.config import SourceConfig
from htnet.data.datasets import ADAPTERS, DATASETS, build_adapter
from htnet.data.datasets.schemes import load_scheme
from htnet.data.entries import Clip, Entry, LeftOut
from htnet.data.faces.landmarks import LandmarkTable
from htnet.data.synth.clips import plan_clips
from htnet.data.synth.generate import generate
from htnet.data.synth.layouts import LAYOUTS
from htnet.errors import InputError

BOOKS = {
    "casme2": "CASME2-coding-20140508.xlsx",
    "samm": "SAMM_Micro_FACS_Codes_v2.xlsx",
    "smic": "SMIC-HS-E_annotation.xlsx",
}
PLAN = {"subjects": 2, "clips": 3, "seed": 4, "image_size": 64}
names = pytest.mark.parametrize("name", list(BOOKS))


def read(root: Path, name: str, *, scheme: str = "megc2019_3class", annotations: str | None = None) -> list[Entry]:
    source = SourceConfig(adapter=name, root=str(root), annotations=annotations)
    return list(build_adapter(source, load_scheme(scheme, DATASETS[name])).entries())


def clips(entries: Sequence[Entry]) -> list[Clip]:
    return [entry for entry in entries if isinstance(entry, Clip)]


def placed(entries: Iterable[Entry], table: LandmarkTable) -> list[Entry]:
    """The entries with their landmarks of the table, as a plan has them."""
    return [replace(entry, face=table.face_of(entry.id)) for entry in entries]


def left_out(entries: Sequence[Entry]) -> list[LeftOut]:
    return [entry for entry in entries if isinstance(entry, LeftOut)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "synth"
    generate(out, **PLAN)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(whole / name, tmp_path / name))


def edit(path: Path, change: Callable[..., None]) -> None:
    book = load_workbook(path)
    change(book.worksheets[0])
    book.save(path)


def make(root: Path, book: str, rows: Sequence[Sequence[object]], folders: Sequence[str], sheet: str = "label") -> Path:
    """A dataset folder of a workbook (.xlsx, .xls or .csv by its name) and empty folders of frames with a file each."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / book
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    elif path.suffix == ".xls":
        old = xlwt.Workbook()
        page = old.add_sheet(sheet)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value is not None:
                    page.write(y, x, value)
        old.save(str(path))
    else:
        new = Workbook()
        new.active.title = sheet
        for row in rows:
            new.active.append(list(row))
        new.save(path)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "1.jpg").touch()
    return root


@names
def test_clips_come_with_labels_in_the_annotations_order(whole: Path, name: str) -> None:
    """Every clip is yielded in the annotation's order, with its label."""
    found = read(whole / name, name)
    plan = plan_clips(name, **PLAN)
    assert [(*vars(clip.id).values(), clip.label) for clip in clips(found)] == [
        (name, clip.subject, clip.clip, clip.label) for clip in plan
    ]
    assert len(clips(found)) == len(found)
    if name != "smic":
        times = [(clip.onset, clip.apex, clip.offset, clip.fps) for clip in clips(found)]
        assert times == [(clip.onset, clip.apex, clip.offset, 200.0) for clip in plan]


def test_subjects_keep_zeros_and_smic_clips_official_names(whole: Path) -> None:
    """Subjects keep their leading zeros, and SMIC's clips the names of the official list."""
    assert {clip.id.subject for clip in clips(read(whole / "samm", "samm"))} == {"006", "007"}
    assert clips(read(whole / "smic", "smic"))[0].id.clip == "s01_ne_01"


@pytest.mark.parametrize(
    ("onset", "apex", "offset", "read_as", "rule"),
    [
        (10, 20, 30, (10, 20, 30), None),
        (10, "/", 30, (10, None, 30), "apex_not_coded"),
        (10, None, 30, (10, None, 30), "apex_not_coded"),
        (10, "20.0", 30, (10, 20, 30), None),
        ("10", 20.0, " 30 ", (10, 20, 30), None),
        (10, "20?", 30, (10, None, 30), "apex_not_coded"),
        (10, -1, 30, (10, None, 30), "apex_outside_interval"),
        (10, 10, 30, (10, None, 30), "apex_at_onset"),
        (10, 9, 30, (10, None, 30), "apex_outside_interval"),
        (10, 31, 30, (10, None, 30), "apex_outside_interval"),
        (10, 20, 5, (10, 20, None), "offset_before_onset"),
    ],
)
def test_an_interval_that_cannot_be_is_read_by_a_named_rule(copy, onset, apex, offset, read_as, rule) -> None:
    root = copy("casme2")

    def change(sheet) -> None:
        for column, value in zip((4, 5, 6), (onset, apex, offset), strict=True):
            sheet.cell(2, column).value = value

    edit(root / BOOKS["casme2"], change)
    first = clips(read(root, "casme2"))[0]
    assert (first.onset, first.apex, first.offset) == read_as
    assert first.notes == (() if rule is None else (rule,))
    # a value that is not used is named with its rule and cell; a blank cell has none
    for remark in first.remarks:
        assert remark.startswith(f"{rule}: ")
        assert re.search(r"\.xlsx, sheet '\w+', row 2, column (Apex|Offset)Frame\)$", remark)
    assert len(first.remarks) == (rule is not None and apex is not None)


def test_a_negative_duration_without_an_apex_is_left_out(copy) -> None:
    """A clip of negative duration without an apex after the onset is left out by the rule for it."""
    root = copy("samm")
    edit(root / BOOKS["samm"], lambda sheet: [sheet.cell(15, x, v) for x, v in ((4, 50), (5, 40), (6, 30))])
    (out,) = left_out(read(root, "samm"))
    assert (out.rule, out.failed) == ("negative_duration", False)
    assert "onset 50, apex 40, offset 30" in out.reason
    assert out.place.endswith("row 15, column Filename")


def test_emotions_outside_the_scheme_are_left_out(copy) -> None:
    """Emotions outside the scheme are left out, with the reason."""
    root = copy("casme2")
    edit(root / BOOKS["casme2"], lambda sheet: sheet.cell(2, 9, "others") and sheet.cell(3, 9, "sadness"))
    found = left_out(read(root, "casme2"))
    assert [(item.rule, item.clip) for item in found] == [
        ("label_scheme", "casme2/sub01/EP01_01f"),
        ("label_scheme", "casme2/sub01/EP02_01f"),
    ]
    seven = read(root, "casme2", scheme="7class")
    assert len(clips(seven)) == 6
    assert [clip.label for clip in clips(seven)][:2] == [6, 4]


def test_a_missing_folder_of_frames_stops_nothing_else(copy) -> None:
    """A missing folder of frames is a failure that stops nothing."""
    root = copy("casme2")
    shutil.rmtree(root / "CASME2_RAW_selected" / "sub01" / "EP01_01f")
    found = read(root, "casme2")
    assert len(clips(found)) == 5
    (out,) = left_out(found)
    assert (out.rule, out.failed) == ("missing_frames", True)
    assert "CASME2_RAW_selected/sub01/EP01_01f" in out.reason


def test_a_second_expression_in_smic_follows_the_rows(copy) -> None:
    """A second micro-expression of a SMIC recording follows after the rows."""
    root = copy("smic")
    edit(root / BOOKS["smic"], lambda sheet: sheet.delete_rows(2))
    found = [clip.id.clip for clip in clips(read(root, "smic"))]
    assert len(found) == 6
    assert found[-1] == "s01_ne_01"


def test_a_scheme_of_ones_own_may_leave_out_a_word_of_smic(copy, tmp_path) -> None:
    root, path = copy("smic"), tmp_path / "mine.yaml"
    path.write_text("classes: [bad, good]\nwords: {smic: {negative: bad, positive: good, surprise: null}}")
    words = [entry.emotion for entry in clips(read(root, "smic"))]
    found = read(root, "smic", scheme=str(path))
    assert [entry.emotion for entry in clips(found)] == [word for word in words if word != "surprise"]
    assert len(left_out(found)) == words.count("surprise") > 0
    assert {(entry.rule, entry.failed) for entry in left_out(found)} == {("label_scheme", False)}
    assert all("surprise is in none of the classes" in entry.reason for entry in left_out(found))


def test_smic_may_lack_a_clip_and_hold_remarks(copy) -> None:
    """SMIC's cropped folder may lack a clip, and remarks under the table are no rows."""
    root = copy("smic")
    edit(root / BOOKS["smic"], lambda sheet: sheet.append([None, None, None, None, None] + [None] * 6 + ["total 6"]))
    (root / "SMIC_all_cropped").mkdir()
    (root / "HS").rename(root / "SMIC_all_cropped" / "HS")
    shutil.rmtree(root / "SMIC_all_cropped" / "HS" / "s01" / "micro" / "negative" / "s1_ne_01")
    found = read(root, "smic")
    assert len(clips(found)) == 5
    assert [item.rule for item in left_out(found)] == ["missing_frames"]


CASME3 = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion"]


def test_casme3_a_reads_its_names_in_any_spelling(tmp_path) -> None:
    """The adapter casme3_a reads any spelling and names clips by recording and onset."""
    rows = [
        CASME3,
        ["spNO.1", "b", "175", "180", "190", "4", "I", "disgust"],
        ["spNo.1", "B", "20", "20", "30", "4", "I", "Others"],
        ["spNO.12", "c", "3647", "2668", "2694", "4", "I", "happy"],
        ["spNO.12", "c", "5", "8", "9", "4", "I", "happy"],
    ]
    folders = ["part_A/spNO.1/b/color", "Part_A_ME_clip/frame/spNo.12_c_5"]
    root = make(tmp_path / "c3", "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", rows, folders)
    found = read(root, "casme3_a", scheme="7class")
    assert [str(clip.id) for clip in clips(found)] == [
        "casme3/spno.1/b_175",
        "casme3/spno.1/b_20",
        "casme3/spno.12/c_5",
    ]
    assert [item.rule for item in left_out(found)] == ["negative_duration"]
    assert [clip.frames.name for clip in clips(found)] == ["color", "color", "spNo.12_c_5"]
    assert [item.rule for item in left_out(read(root, "casme3_a"))] == ["label_scheme", "negative_duration"]


def test_casme3_a_takes_only_the_micro_expressions(tmp_path) -> None:
    """The adapter casme3_a takes the micro-expressions of the file that holds both kinds."""
    rows = [
        ["Subject", "Filename", "Expression type", "Onset", "Apex", "Offset", "emotion"],
        ["spNO.1", "b", "Macro-expression", 1.0, 2.0, 3.0, "happy"],
        ["spNO.1", "b", "Micro-expression", 4.0, 5.0, 6.0, "happy"],
    ]
    root = make(tmp_path / "c3", "CAS(ME)3_part_A_v2.xls", rows, ["part_A/spNO.1/b/color"])
    found = read(root, "casme3_a")
    assert [clip.onset for clip in clips(found)] == [4]
    assert [item.rule for item in left_out(found)] == ["macro_expression"]


def test_the_real_workbook_of_casme3_part_a_parses_completely(shared_data) -> None:
    root = shared_data / "casme3"
    if not root.is_dir():
        pytest.skip(f"{root} not found")
    adapter = build_adapter(SourceConfig(adapter="casme3_a", root=str(root)), load_scheme("7class", ["casme3"]))
    rows = adapter.rows()
    assert len(rows) == 860
    assert len({adapter.sample_of(row) for row in rows}) == 860
    assert len({adapter.sample_of(row).subject for row in rows}) == 94
    emotions = Counter(row.text("emotion").lower() for row in rows)
    assert emotions == {
        "disgust": 250, "surprise": 187, "others": 161, "fear": 86, "anger": 64, "sad": 57, "happy": 55,
    }  # fmt: skip
    intervals = [adapter.interval_of(row) for row in rows]
    assert sum(isinstance(interval, str) for interval in intervals) == 1
    notes = Counter(note for interval in intervals if not isinstance(interval, str) for note in interval.notes)
    assert notes == {"apex_at_onset": 55, "apex_outside_interval": 1, "offset_before_onset": 2}
    # without the frames every row is listed with its reason
    assert Counter(item.rule for item in left_out(read(root, "casme3_a", scheme="7class"))) == {
        "missing_frames": 859,
        "negative_duration": 1,
    }
    three = Counter(item.rule for item in left_out(read(root, "casme3_a")))
    assert three == {"missing_frames": 699, "label_scheme": 161}


def test_the_real_workbook_of_casme3_part_c_parses_completely(shared_data) -> None:
    root = shared_data / "casme3"
    if not root.is_dir():
        pytest.skip(f"{root} not found")
    adapter = build_adapter(
        SourceConfig(adapter="casme3_c", root=str(root)), load_scheme("megc2019_3class", ["casme3c"])
    )
    rows = adapter.rows()
    assert len({adapter.sample_of(row) for row in rows}) == 165
    assert len({adapter.sample_of(row).subject for row in rows}) == 30
    assert Counter(row.text("emotion") for row in rows) == {
        "negative": 99, "surprise": 30, "others": 20, "positive": 16,
    }  # fmt: skip
    assert Counter(item.rule for item in left_out(read(root, "casme3_c"))) == {
        "label_scheme": 20,
        "missing_frames": 145,
    }


def test_mmew_takes_the_subject_from_the_clips_name(tmp_path) -> None:
    header = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "AU", "Estimated Emotion", "remarks"]
    rows = [header, [1, "S01-07-001", 1, 9, 20, 4, "disgust", None], [None] * 7 + ["counted twice"]]
    root = make(tmp_path / "m", "MMEW_Micro_Exp.xlsx", rows, ["Micro_Expression/disgust/S01-07-001"])
    (clip,) = read(root, "mmew")
    assert (str(clip.id), clip.label, clip.fps) == ("mmew/S01/S01-07-001", 0, 90.0)


def test_4dme_takes_clips_of_one_class_and_lists_the_rest(tmp_path) -> None:
    """The adapter 4dme takes clips of one class and lists those of several."""
    header = ["sub_ID", "fold_name", "Onset", "Apex", "Offset", "AUs", "Emotion"]
    header += ["Positive", "Negative", "Surprise", "Repression", "Others"]
    rows = [header, ["01", "f1", 1, 5, 9, "AU4(k)", "x", 0, 1, 0, 0, 0], ["01", "f2", 1, 5, 9, "", "x", 1, 0, 1, 0, 0]]
    rows.append(["01", "f3", 1, 5, 9, "", "x", None, None, None, 1, None])
    folders = [f"gray_micro/01/f{number}" for number in (1, 2, 3)]
    found = read(make(tmp_path / "4", "4DME_Labelling_Micro_release v1.xlsx", rows, folders), "4dme")
    assert [(clip.id.clip, clip.label) for clip in clips(found)] == [("f1", 0), ("f3", 0)]
    assert [(item.rule, item.reason) for item in left_out(found)] == [
        ("several_classes", "belongs to Positive and Surprise, one is needed")
    ]


@pytest.mark.parametrize("book", ["CASME.xlsx", "CASME.xls"])
def test_casme_has_two_apexes_of_which_the_first_counts(tmp_path, book) -> None:
    header = ["Subject", "Filename", "OnsetF", "ApexF1", "ApexF2", "OffsetF", "AUs", "Emotion"]
    rows = [header, [1, "EP01_12", 73, 81, 90, 98, "4", "tense"], [1, "EP01_8", 3, 8, 9, 12, "4", "Disgust"]]
    found = read(make(tmp_path / "c", book, rows, ["Section A/sub01/EP01_12", "Section A/sub01/EP01_8"]), "casme")
    assert [(str(clip.id), clip.apex) for clip in clips(found)] == [("casme/sub01/EP01_8", 8)]
    assert left_out(found)[0].reason == "emotion tense is in none of the classes"


LIST = ["dataset", "subject", "clip", "onset", "apex", "offset", "label", "frames"]


def test_a_list_of_ones_own_needs_no_number(tmp_path) -> None:
    rows = [LIST, ["own", "p1", "a", "", "", "", "surprise", "x/y"], [], ["own", "p1", "b", 3, 5, "", 1, "x/y"]]
    found = read(make(tmp_path / "own", "samples.csv", rows, ["x/y"]), "csv")
    assert [(clip.label, clip.onset, clip.apex, clip.offset) for clip in clips(found)] == [
        (2, None, None, None),
        (1, 3, 5, None),
    ]
    assert found[0].notes == ("apex_not_coded",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["own", "p1", "a", 5, 3, 9, "surprise", "x"], r"row 2, column onset: must rise, .* got 5, 3, 9"),
        (["own", "p1", "a", "x", 3, 9, "surprise", "x"], r"row 2, column onset: must be a whole number, got 'x'"),
        (
            ["own", "p1", "a", 1, 3, 10**20, "surprise", "x"],
            r"column offset: must be at most 9223372036854775807",
        ),
        (["own", "p1", "a", 1, 3, 9, "7", "x"], r"row 2, column emotion: must be in 0\.\.2 or a word, got 7"),
        (["own", "p1", "a", 1, 3, 9, "bored", "x"], r"row 2, column emotion: must be one of .*got 'bored'"),
        (["own", "p1", "a", 1, 3, 9, "surprise", "../x"], "leads out of the dataset's folder"),
        (["own", "p1", "a", 1, 3, 9, "surprise", "/etc"], "leads out of the dataset's folder"),
        (["own", "", "a", 1, 3, 9, "surprise", "x"], r"row 2, column subject: must not be empty"),
        (
            ["composite", "p", "a", 1, 3, 9, "surprise", "x"],
            r"row 2, column dataset: no dataset may be named",
        ),
        (["a/b", "p", "a", 1, 3, 9, "surprise", "x"], r"row 2, column dataset: .* must not hold a slash, got 'a/b'"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(tmp_path, row, message) -> None:
    with pytest.raises(InputError, match=message):
        read(make(tmp_path / "own", "samples.csv", [LIST, row], ["x"]), "csv")


@names
def test_a_missing_folder_or_workbook_is_named(copy, name: str) -> None:
    with pytest.raises(InputError, match=r"prepare\.sources: nowhere: no such folder"):
        read(Path("nowhere"), name)
    root = copy(name)
    with pytest.raises(InputError, match=r"other\.xlsx: no such annotation file"):
        read(root, name, annotations="other.xlsx")
    (root / BOOKS[name]).rename(root / "mine.xlsx")
    with pytest.raises(InputError, match=f"workbook is missing, expected .*{BOOKS[name]}"):
        read(root, name)
    assert len(read(root, name, annotations="mine.xlsx")) == 6


@names
def test_a_missing_column_is_named_with_sheet_and_row(copy, name: str) -> None:
    root = copy(name)
    header = 14 if name == "samm" else 1
    column = {"casme2": "OnsetFrame", "samm": "Onset Frame", "smic": "Emotion"}[name]

    def rename(sheet) -> None:
        next(cell for cell in sheet[header] if cell.value == column).value = "Start"

    edit(root / BOOKS[name], rename)
    with pytest.raises(InputError, match=rf"sheet 'Sheet1', row {header}: column {column} is missing"):
        read(root, name)


@names
def test_a_clip_that_stands_twice_is_named(copy, name: str) -> None:
    root = copy(name)
    edit(root / BOOKS[name], lambda sheet: sheet.append([cell.value for cell in sheet[sheet.max_row]]))
    with pytest.raises(InputError, match=rf"clip {name}/\S+ is there already, .*row \d+"):
        read(root, name)


@pytest.mark.parametrize("name", ["casme2", "samm"])
def test_an_empty_subject_or_clip_folder_stops_nothing_else(copy, name: str) -> None:
    """An empty folder of a subject or a clip is a failure that stops nothing."""
    root = copy(name)
    clip = plan_clips(name, **PLAN)[0]
    folder = next(path for path in root.rglob(clip.subject) if path.is_dir())
    for clip_folder in sorted(folder.iterdir())[1:]:
        shutil.rmtree(clip_folder)
    for frame in next(folder.iterdir()).iterdir():
        frame.unlink()
    found = read(root, name)
    assert len(clips(found)) == 3
    assert [(out.rule, out.failed) for out in left_out(found)] == [("missing_frames", True)] * 3
    assert sum("(empty)" in out.reason for out in left_out(found)) == 1
    shutil.rmtree(next(folder.iterdir()))
    assert len(left_out(read(root, name))) == 3


def test_an_empty_subject_folder_hides_no_clip_elsewhere(copy) -> None:
    """An empty folder of a subject does not hide the clips that lie elsewhere."""
    root = copy("casme2")
    (root / "Cropped").mkdir()
    (root / "CASME2_RAW_selected" / "sub01").rename(root / "Cropped" / "sub01")
    for place in ("sub01", "sub01/EP01_01f"):
        (root / "CASME2_RAW_selected" / place).mkdir()
        assert len(clips(read(root, "casme2"))) == 6


@pytest.mark.parametrize("left", ["nothing", "micro", "clips"])
def test_a_smic_subject_without_clips_stops_nothing_else(copy, left: str) -> None:
    """A subject of SMIC without clips is a failure that stops nothing."""
    root = copy("smic")
    micro = root / "HS" / "s01" / "micro"
    names = [path.relative_to(micro) for path in micro.glob("*/*")]
    shutil.rmtree(micro)
    for name in {"nothing": [], "micro": ["."], "clips": names}[left]:
        (micro / name).mkdir(parents=True)
    found = read(root, "smic")
    assert len(clips(found)) == 3
    assert [(out.rule, out.failed) for out in left_out(found)] == [("missing_frames", True)] * 3


@names
@pytest.mark.parametrize("evil", ["../../secret", "/etc", "..", "a\\b"])
def test_an_annotation_that_leads_out_of_the_dataset_is_refused(copy, name: str, evil: str) -> None:
    root = copy(name)
    edit(root / BOOKS[name], lambda sheet: sheet.cell(15 if name == "samm" else 2, 2, evil))
    with pytest.raises(InputError, match="leads out of the dataset's folder"):
        read(root, name)


@pytest.mark.parametrize(
    ("name", "cell", "value", "said"),
    [
        ("casme2", (2, 9), "joy", r"row 2, column Estimated Emotion: must be one of happiness.*got 'joy'"),
        ("casme2", (2, 4), "soon", r"row 2, column OnsetFrame: must be a whole number, got 'soon'"),
        ("casme2", (2, 4), "=1+1", r"row 2, column OnsetFrame: must be a value, got the formula '=1\+1'"),
        ("casme2", (3, 1), "Bob", r"row 3, column Subject: must be a number such as 1 or sub01, got 'Bob'"),
        ("samm", (15, 1), "x6", r"row 15, column Subject: must be a number of up to three digits, got 'x6'"),
        ("samm", (16, 4), None, r"row 16, column Onset Frame: must not be empty"),
        ("smic", (2, 12), "positive", r"row 2, column Emotion: positive, but the clip lies in"),
        ("smic", (2, 1), 7, r"row 2, column Filename: must be a clip of subject 7"),
    ],
)
def test_a_wrong_cell_is_named(copy, name: str, cell: tuple[int, int], value: object, said: str) -> None:
    root = copy(name)

    def change(sheet) -> None:
        sheet.cell(*cell).value = value

    edit(root / BOOKS[name], change)
    with pytest.raises(InputError, match=said):
        read(root, name)


def test_every_adapter_can_be_configured_and_synthesised() -> None:
    """The configuration, which loads no adapter, spells their names once more."""
    configured = get_args(get_type_hints(SourceConfig)["adapter"])
    assert set(ADAPTERS) == set(configured) == set(DATASETS) == set(LAYOUTS)


def test_adapters_identify_their_input_without_a_path(whole: Path) -> None:
    """Every adapter says what identifies its input, without a path."""
    for name, book in BOOKS.items():
        source = SourceConfig(adapter=name, root=str(whole / name))
        facts = build_adapter(source, load_scheme("megc2019_3class", [name])).describe()
        assert facts["annotation"] == book
        assert str(whole) not in str(facts)


TRACES = [
    "Network Trash Folder",
    "FOUND.000",
    "__MACOSX",
    "@eaDir",
    ".AppleDouble",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
]


@names
def test_traces_of_other_programs_change_nothing(copy, name: str) -> None:
    before = read(root := copy(name), name)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        for trace in TRACES:
            (folder / trace).mkdir()
            (folder / trace / "1.jpg").touch()
        for trace in (".DS_Store", "Thumbs.db", "._img1.jpg", "~$book.xlsx", "desktop.ini"):
            (folder / trace).touch()
    assert read(root, name) == before


def test_a_folder_of_traces_alone_is_empty(copy) -> None:
    root = copy("casme2")
    folder = root / "CASME2_RAW_selected" / "sub01" / "EP01_01f"
    (root / "Cropped" / "sub01").mkdir(parents=True)
    folder.rename(root / "Cropped" / "sub01" / "EP01_01f")
    folder.mkdir()
    (folder / "Thumbs.db").touch()
    assert clips(read(root, "casme2"))[0].frames.parent.parent.name == "Cropped"


@pytest.mark.parametrize("spelling", ["EP01_01f ", "ep01_01F", " EP01_01f"])
def test_a_folder_is_found_though_blanks_or_case_differ(copy, spelling: str) -> None:
    root = copy("casme2")
    folder = root / "CASME2_RAW_selected" / "sub01"
    (folder / "EP01_01f").rename(folder / spelling)
    assert clips(read(root, "casme2"))[0].frames.name == spelling


@pytest.mark.parametrize("double", ["{} ", "s001_ne_01", "S1_NE_01"])
def test_a_smic_folder_that_is_there_twice_is_named(copy, double: str) -> None:
    root = copy("smic")
    before = read(root, "smic")
    (folder,) = (root / "HS").glob("s*1/micro/negative/s*1_ne_01")
    double = double.format(folder.name)
    shutil.copytree(folder, folder.with_name(double))
    found = read(root, "smic")
    (out,) = left_out(found)
    assert (out.rule, out.clip, out.failed) == ("double_folder", "smic/s01/s01_ne_01", True)
    assert double in out.place + out.reason
    assert [clip.id for clip in clips(found)] == [clip.id for clip in clips(before)]


MARKED = ["sub_ID", "fold_name", "Onset", "Apex", "Offset", "Positive", "Negative", "Surprise", "Repression", "Others"]


@pytest.mark.parametrize("marks", [("0.0", "1.0"), ("FALSE", "TRUE"), ("-", "x"), (0, 1), (False, True), ("", "1")])
@pytest.mark.parametrize("book", ["a.csv", "a.xlsx"])
def test_marks_of_4dme_are_read_however_they_are_written(tmp_path, book: str, marks) -> None:
    off, on = marks
    rows = [MARKED, ["1.0", "c1", "1", 5, "9.0", off, on, off, off, off]]
    root = make(tmp_path / "r", book, rows, ["gray_micro/1/c1"])
    (clip,) = read(root, "4dme", annotations=book)
    assert (clip.id.subject, clip.label, clip.onset, clip.apex, clip.offset) == ("1", 0, 1, 5, 9)


def test_a_mark_of_4dme_that_is_none_is_named(tmp_path) -> None:
    root = make(tmp_path / "r", "a.csv", [MARKED, [1, "c1", 1, 5, 9, 0, 2, 0, 0, 0]], ["gray_micro/1/c1"])
    with pytest.raises(InputError, match=r"a\.csv, row 2, column Negative: must be 0 or 1, got '2'"):
        read(root, "4dme", annotations="a.csv")


OWN = ["dataset", "subject", "clip", "onset", "apex", "offset", "emotion", "frames", "fps"]


def test_a_list_of_ones_own_as_pandas_and_excel_save_it(tmp_path) -> None:
    """Floats because a cell was blank, NaN for blanks, paths of Windows, a decimal comma in the frame rate."""
    root = make(tmp_path / "own", "samples.csv", [], ["clips/p01/a", "clips/p01/b"])
    rows = [OWN, ["own", "p01", "a", "1.0", "NaN", "9,0", "anger", "clips\\p01\\a", "29,97"]]
    rows.append(["own", "p01", "b", "", "5.0", "", "1.0", "clips/p01/b", ""])
    (root / "samples.csv").write_text("\n".join(";".join(row) for row in rows), encoding="utf-8")
    first, second = clips(read(root, "csv"))
    assert (first.onset, first.apex, first.offset, first.fps) == (1, None, 9, 29.97)
    assert (second.onset, second.apex, second.offset, second.fps, second.label) == (None, 5, None, None, 1)


def test_a_frame_rate_that_is_none_is_named(tmp_path) -> None:
    root = make(tmp_path / "own", "samples.csv", [OWN, ["o", "p", "a", 1, 2, 3, "anger", "a", 0]], ["a"])
    with pytest.raises(InputError, match=r"samples\.csv, row 2, column fps: must be above 0, got 0"):
        read(root, "csv")


@pytest.mark.parametrize(("column", "apex"), [("apex", 2), ("ApexFrame", 2), ("Apex frame", 2), ("apex_idx", None)])
def test_an_apex_is_never_lost_by_the_name_of_its_column(tmp_path, column: str, apex: int | None) -> None:
    header = [column if name == "apex" else name for name in OWN]
    root = make(tmp_path / "own", "samples.csv", [header, ["o", "p", "a", 1, 2, 3, "anger", "a", 30]], ["a"])
    if apex is None:
        with pytest.raises(InputError, match=r"samples\.csv: the column must be called apex, got apex_idx"):
            read(root, "csv")
    else:
        assert clips(read(root, "csv"))[0].apex == apex


@pytest.mark.parametrize(("name", "row", "cells"), [("smic", 3, (2,)), ("smic", 3, (1,)), ("mmew", 3, (2,))])
def test_a_row_of_a_clip_without_its_name_is_an_error(tmp_path, name: str, row: int, cells: tuple[int, ...]) -> None:
    generate(tmp_path / "raw", datasets=(name,), subjects=2, clips=2, image_size=64)
    root = tmp_path / "raw" / name
    (book,) = root.glob("*.xlsx")
    edit(book, lambda sheet: [sheet.cell(row, column, "") for column in cells])
    with pytest.raises(InputError, match=rf"row {row}, column \w+: must not be empty"):
        read(root, name)


def test_a_second_apex_is_named_with_its_cell(tmp_path) -> None:
    header = ["Subject", "Filename", "OnsetF", "ApexF1", "ApexF2", "OffsetF", "Emotion"]
    root = make(
        tmp_path / "c", "CASME.xlsx", [header, [1, "EP01_12", 10, 20, 24, 30, "disgust"]], ["Cropped/sub01/EP01_12"]
    )
    (clip,) = clips(read(root, "casme"))
    assert clip.apex == 20
    assert re.fullmatch(r"second_apex: 24, the first is taken \(.*row 2, column ApexF2\)", clip.remarks[0])


def test_folders_that_differ_in_blanks_or_case_are_a_failure(copy) -> None:
    root = copy("casme2")
    folder = root / "CASME2_RAW_selected" / "sub01"
    shutil.copytree(folder / "EP01_01f", folder / "EP01_01f ")
    assert clips(read(root, "casme2"))[0].frames.name == "EP01_01f"  # spelled as in the annotation
    (folder / "EP01_01f").rename(folder / "ep01_01f")
    (out,) = left_out(read(root, "casme2"))
    assert (out.rule, out.failed) == ("missing_frames", True)
    assert out.reason.startswith("several folders of frames, whose names differ in blanks or case: ")
    shutil.rmtree(folder / "ep01_01f")
    (folder / "ep01_01f").mkdir()  # an empty one is no rival
    assert clips(read(root, "casme2"))[0].frames.name == "EP01_01f "


def test_a_clip_named_twice_in_other_case_is_refused(copy) -> None:
    root = copy("casme2")
    edit(root / BOOKS["casme2"], lambda sheet: sheet.cell(3, 2, "ep01_01F"))
    with pytest.raises(InputError, match=r"row 3, column Filename: clip casme2/sub01/ep01_01F is there already"):
        read(root, "casme2")
