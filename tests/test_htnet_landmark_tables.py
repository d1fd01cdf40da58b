"""Landmark tables of others: 68 points to five, OpenFace by clip and frame, every mistake named with its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from htnet.data.entries import Clip
from htnet.data.faces.landmarks import COLUMNS68, LandmarkTable, read_landmarks
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError

FACE = ((60.0, 70.0), (100.0, 70.0), (80.0, 92.0), (65.0, 112.0), (95.0, 112.0))
SAMPLE = SampleId(dataset="casme2", subject="sub01", clip="EP02_01f")
KEY = ("dataset", "subject", "clip")
HEAD = ("frame", "face_id", "timestamp", "confidence", "success")
OPENFACE = (*HEAD, *(f"x_{n}" for n in range(68)), *(f"y_{n}" for n in range(68)))


def points68(face: Landmarks = FACE) -> np.ndarray:
    """(68, 2): contours of six points around each eye, the other landmarks where iBUG has them, the rest anywhere."""
    points = np.random.default_rng(3).uniform(50, 120, (68, 2))
    around = np.array([(-8, 0), (-3, -4), (3, -4), (8, 0), (3, 4), (-3, 4)])
    points[36:42], points[42:48] = np.array(face[0]) + around, np.array(face[1]) + around
    points[30], points[48], points[54] = face[2:]
    return points


def row68(face: Landmarks = FACE) -> list[str]:
    return [str(value) for value in points68(face).ravel()]


def table68(tmp_path: Path, *rows: list[str], header: tuple[str, ...] = (*KEY, *COLUMNS68)) -> Path:
    path = tmp_path / "dlib.csv"
    path.write_text("\n".join(",".join(row) for row in (header, *rows)) + "\n")
    return path


def clip(tmp_path: Path, names: list[str], onset: int | None = None) -> Clip:
    """A clip whose folder holds files of these names; no picture is decoded for its landmarks."""
    frames = tmp_path / "frames"
    frames.mkdir(exist_ok=True)
    for name in names:
        (frames / name).touch()
    return Clip(id=SAMPLE, frames=frames, label=0, emotion="fear", place="sheet, row 2", onset=onset)


def openface_row(frame: int, face: Landmarks, *, success: str = "1", face_id: int = 0) -> list[str]:
    return [str(frame), str(face_id), "0.000", "0.98", success, *(f"{value:.1f}" for value in points68(face).T.ravel())]


def openface(
    tmp_path: Path, *rows: list[str], name: str = "casme2/sub01/EP02_01f.csv", header: tuple[str, ...] = OPENFACE
) -> Path:
    """A folder with one file as OpenFace writes it, blanks after the commas."""
    path = tmp_path / "openface" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(", ".join(row) for row in (header, *rows)) + "\n")
    return tmp_path / "openface"


def moved(by: float) -> Landmarks:
    return tuple((x + by, y) for x, y in FACE)


def assert_face(table: LandmarkTable, expected: Landmarks) -> None:
    np.testing.assert_allclose(table.points[SAMPLE], expected, atol=0.06)


# --- 68 points


def test_of_68_points_an_eye_is_the_middle_of_its_contour(tmp_path):
    found = read_landmarks(table68(tmp_path, [*vars(SAMPLE).values(), *row68()]))
    assert found.flow_size is None
    assert_face(found, FACE)


@pytest.mark.parametrize(
    ("row", "header", "said"),
    [
        (
            ["a", "b", "c", *row68()[:-1], "far"],
            (*KEY, *COLUMNS68),
            r"row 2, column y_67: .*number, got 'far'",
        ),
        (["a", "", "c", *row68()], (*KEY, *COLUMNS68), r"row 2, column subject: must not be empty"),
        (
            ["a", "b", "c", *row68()[1:]],
            (*KEY, *COLUMNS68),
            r"row 2, column y_67: must be a finite number, got ''",
        ),
        (
            ["a", "b", "c", *row68()],
            (*KEY, *(f"{axis}_{n}" for n in range(1, 69) for axis in "xy")),
            r"68 points, 1 to 68; 68 are expected, 0 to 67 as dlib and OpenFace 2 number them \(iBUG\)",
        ),
    ],
)
def test_a_mistake_in_a_table_of_68_points_is_named(tmp_path, row, header, said):
    """A mistake in a table of 68 points is named with its place."""
    path = table68(tmp_path, row, header=header)
    with pytest.raises(InputError, match=said) as error:
        read_landmarks(path)
    assert str(error.value).startswith(str(path))


# --- OpenFace


@pytest.mark.parametrize("name", ["casme2/sub01/EP02_01f.csv", "sub01_EP02_01f.csv"])
def test_the_row_of_the_onset_is_found_in_either_folder_layout(tmp_path, name):
    pictures = [f"img{number:03d}.jpg" for number in range(46, 50)]
    folder = openface(tmp_path, *(openface_row(n, moved(n)) for n in range(1, 5)), name=name)
    assert_face(read_landmarks(folder, [clip(tmp_path, pictures, onset=48)]), moved(3))
    assert_face(read_landmarks(folder, [clip(tmp_path, pictures)]), moved(1))


def test_openface_counts_pictures_in_the_order_of_their_names(tmp_path):
    """Without leading zeros img100 comes before img98: rows 1 to 4 are the frames 100, 101, 98, 99."""
    pictures = [f"img{number}.jpg" for number in range(98, 102)]
    folder = openface(tmp_path, *(openface_row(n, moved(n)) for n in range(1, 5)))
    assert_face(read_landmarks(folder, [clip(tmp_path, pictures, onset=98)]), moved(3))


def test_rows_that_begin_at_0_are_counted_from_0(tmp_path):
    pictures = [f"img{number}.jpg" for number in range(98, 102)]
    folder = openface(tmp_path, *(openface_row(n, moved(n)) for n in range(4)))
    assert_face(read_landmarks(folder, [clip(tmp_path, pictures, onset=98)]), moved(2))
    video = tmp_path / "film.avi"
    video.touch()
    film = replace(clip(tmp_path, [], onset=3), frames=video)
    assert_face(read_landmarks(folder, [film]), moved(2))


@pytest.mark.parametrize("points", [98, 478, 5, 67])
def test_points_of_another_scheme_are_refused_by_their_number(tmp_path, points):
    header = (*KEY, *(f"{axis}_{n}" for n in range(points) for axis in "xy"))
    path = table68(tmp_path, ["a", "b", "c", *["50.0"] * 2 * points], header=header)
    with pytest.raises(InputError, match=rf"dlib\.csv: {points} points, 0 to {points - 1}; 68 are expected"):
        read_landmarks(path)


def test_points_in_space_are_not_taken_for_pixels(tmp_path):
    """OpenFace's X_0 is in millimetres; 2-D points may not be there."""
    header = tuple(name.upper() if name[:2] in ("x_", "y_") else name for name in OPENFACE)
    folder = openface(tmp_path, openface_row(1, FACE), header=header)
    with pytest.raises(InputError, match=r"row 1: column x_0 is missing; found frame, face_id"):
        read_landmarks(folder, [clip(tmp_path, ["1.jpg"])])


def test_a_table_with_semicolons_decimal_commas_and_empty_rows(tmp_path):
    path = table68(tmp_path, [*vars(SAMPLE).values(), *row68()])
    text = path.read_text().replace(",", ";").replace(".", ",")
    path.write_text(text + ";" * 138 + "\n")
    assert_face(read_landmarks(path), FACE)


def test_rows_may_begin_at_the_number_of_a_later_frame(tmp_path):
    """Rows that do not begin at 1 name frames by the numbers of the frames."""
    pictures = [f"img{number}.jpg" for number in range(98, 102)]
    folder = openface(tmp_path, *(openface_row(n, moved(n)) for n in range(98, 102)))
    assert_face(read_landmarks(folder, [clip(tmp_path, pictures, onset=99)]), moved(99))


def test_landmarks_are_absent_with_a_reason(tmp_path):
    """A frame without success and a clip without a file have no landmarks, and a reason is given."""
    here = clip(tmp_path, ["1.jpg", "2.jpg"], onset=2)
    other = replace(here, id=SampleId(dataset="casme2", subject="sub01", clip="other"))
    folder = openface(tmp_path, openface_row(1, FACE), openface_row(2, FACE, success="0"))
    found = read_landmarks(folder, [here, other])
    assert found.points == {}
    assert "EP02_01f.csv, row 3, column success: 0: no face in frame 2, the onset" in found.face_of(here.id).reason
    assert found.face_of(other.id).reason.startswith(f"{folder}: no OpenFace file of clip casme2/sub01/other")
    missing = replace(here, onset=9)
    face = read_landmarks(folder, [missing]).face_of(here.id)
    assert "frame 9, the onset of clip casme2/sub01/EP02_01f, is missing" in face.reason


def test_of_several_faces_the_largest_that_was_found_is_taken(tmp_path):
    small = tuple((x / 2, y / 2) for x, y in FACE)
    large = tuple((x * 2, y * 2) for x, y in FACE)
    rows = [openface_row(1, small), openface_row(1, FACE, face_id=1), openface_row(1, large, success="0", face_id=2)]
    assert_face(read_landmarks(openface(tmp_path, *rows), [clip(tmp_path, ["1.jpg"])]), FACE)


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([openface_row(1, FACE)], OPENFACE[:-1], r"row 1: column y_67 is missing; found frame, face_id"),
        ([openface_row(1, FACE)[:-1]], OPENFACE, r"row 2, column y_67: must be a finite.*got ''"),
        ([["one", *openface_row(1, FACE)[1:]]], OPENFACE, r"row 2, column frame: must be a whole number, got 'one'"),
        ([openface_row(1, FACE, success="perhaps")], OPENFACE, r"row 2, column success: must be 0 or 1, got 'perhaps'"),
        ([[*openface_row(1, FACE)[:-1], "inf"]], OPENFACE, r"row 2, column y_67: must be a finite.*got 'inf'"),
        ([openface_row(2, FACE)], OPENFACE, r"no row of frame 1, the onset of clip casme2/sub01/.* frames 2 to 2"),
        ([openface_row(n, FACE) for n in (1, 2, 3)], OPENFACE, r"3 frames, but .*frames has 2 pictures"),
    ],
)
def test_a_mistake_in_an_openface_file_is_named_with_its_place(tmp_path, rows, header, said):
    folder = openface(tmp_path, *rows, header=header)
    with pytest.raises(InputError, match=said) as error:
        read_landmarks(folder, [clip(tmp_path, ["1.jpg", "2.jpg"])])
    assert "EP02_01f.csv" in str(error.value)


def test_a_wrong_folder_of_landmarks_is_shown_the_layout(tmp_path):
    """A folder without files of the clips and a single file are refused, with the layout that is expected."""
    here = clip(tmp_path, ["1.jpg"])
    folder = openface(tmp_path, openface_row(1, FACE), name="somebody.csv")
    for path in (folder, folder / "somebody.csv"):
        with pytest.raises(InputError, match=r"<dataset>/<subject>/<clip>\.csv or <subject>_<clip>\.csv"):
            read_landmarks(path, [here])


def test_what_a_folder_holds_identifies_it(tmp_path):
    here = clip(tmp_path, ["1.jpg"])
    first = read_landmarks(openface(tmp_path, openface_row(1, FACE)), [here]).sha256
    assert read_landmarks(openface(tmp_path, openface_row(1, FACE)), [here]).sha256 == first
    assert read_landmarks(openface(tmp_path, openface_row(1, moved(1))), [here]).sha256 != first
