"""Landmark tables and the face crop: two forms read, every mistake named, points that stay on the face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from htnet.data.landmarks import SOURCE_COLUMNS, UPSTREAM_COLUMNS, FaceCrop, face_crop, read_landmarks
from htnet.data.types import SampleId
from htnet.errors import InputError

FACE = ((60.0, 70.0), (100.0, 70.0), (80.0, 92.0), (65.0, 112.0), (95.0, 112.0))
SOURCE = ",".join(("dataset", "subject", "clip", *SOURCE_COLUMNS))
NUMBERS = "1,2,3,4,5,6,7,8,9,10.5"


def table(tmp_path: Path, *rows: str, header: str = SOURCE) -> Path:
    path = tmp_path / "landmarks.csv"
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def test_a_source_table_gives_points_of_the_onset_frame(tmp_path: Path) -> None:
    found = read_landmarks(table(tmp_path, f"samm,006,006_1_2,{NUMBERS}"))
    assert found.flow_size is None
    assert found.points[SampleId(dataset="samm", subject="006", clip="006_1_2")] == (
        (1, 2),
        (3, 4),
        (5, 6),
        (7, 8),
        (9, 10.5),
    )


def test_the_release_table_gives_points_of_its_28_pixel_flow_images(tmp_path: Path) -> None:
    header = ",".join(("dataset", "subject", "clip", "flow_file", *UPSTREAM_COLUMNS))
    found = read_landmarks(table(tmp_path, f"smic,s01,s01_ne_01,a .png,{NUMBERS}", header=header))
    assert found.flow_size == 28
    assert found.points[SampleId(dataset="smic", subject="s01", clip="s01_ne_01")][4] == (9, 10.5)


def test_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    header = ",".join(("note", *reversed(SOURCE.split(","))))
    row = ",".join(("x", *reversed(f"smic,s01,c,{NUMBERS}".split(","))))
    found = read_landmarks(table(tmp_path, row, header=header))
    assert found.points[SampleId(dataset="smic", subject="s01", clip="c")][0] == (1, 2)


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([], SOURCE.replace(",nose_x", ""), r"row 1: column nose_x is missing"),
        ([], SOURCE + ",nose_x", r"row 1: column nose_x stands there twice"),
        ([f"a,b,c,{NUMBERS}", "a,b,d,1,2,3,4,wide,6,7,8,9,10"], SOURCE, r"row 3, column nose_x: .*got 'wide'"),
        (["a,b,c,1,2,3,4,nan,6,7,8,9,10"], SOURCE, r"row 2, column nose_x: must be a finite number.*got 'nan'"),
        (["a,b,c,1,2,3,4,,6,7,8,9,10"], SOURCE, r"row 2, column nose_x: .*got ''"),
        (["a,,c,1,2,3,4,5,6,7,8,9,10"], SOURCE, r"row 2, column subject: must not be empty"),
        (["a,b,c,1,2"], SOURCE, r"row 2, column right_eye_x: must be a finite number.*got ''"),
        ([f"a,b,c,{NUMBERS}", f"a,b,c,{NUMBERS}"], SOURCE, r"row 3: clip a/b/c stands in row 2 already"),
    ],
)
def test_a_mistake_in_a_table_is_named_with_its_place(tmp_path: Path, rows: list[str], header: str, said: str) -> None:
    path = table(tmp_path, *rows, header=header)
    with pytest.raises(InputError, match=said) as error:
        read_landmarks(path)
    assert str(path) in str(error.value)


def test_a_missing_table_an_empty_one_and_a_clip_without_landmarks_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv: no such landmark table"):
        read_landmarks(tmp_path / "gone.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(InputError, match="column dataset is missing"):
        read_landmarks(empty)
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a readable CSV in UTF-8"):
        read_landmarks(empty)
    found, other = read_landmarks(table(tmp_path, f"a,b,c,{NUMBERS}")), SampleId(dataset="a", subject="b", clip="other")
    assert other not in found.points
    assert found.missing(other) == f"{found.path}: no landmarks for clip a/b/other"


def test_the_crop_is_a_square_around_eyes_and_mouth_and_the_points_land_in_the_flow_image() -> None:
    crop = face_crop(FACE, (200, 160))
    assert crop.side == round(2.4 * 42)
    left_eye, right_eye, _, left_lip, right_lip = crop.to_flow(FACE, 28)
    assert left_eye[0] + right_eye[0] == pytest.approx(27, abs=0.5)
    assert left_eye[1] + left_lip[1] == pytest.approx(27, abs=0.5)
    for x, y in (left_eye, right_eye, left_lip, right_lip):
        assert 6 < x < 22
        assert 6 < y < 22


def test_a_mapped_point_is_the_pixel_that_area_reduction_puts_there() -> None:
    """A crop of 56 to 28 pixels: source pixels 0 and 1 are averaged to flow pixel 0, so 0.5 maps to 0."""
    crop = FaceCrop(left=10, top=20, side=56)
    assert crop.to_flow(((10.5, 20.5), (12.5, 22.5)), 28) == ((0.0, 0.0), (1.0, 1.0))


@given(left=st.integers(-40, 40), top=st.integers(-40, 40), side=st.integers(16, 80), height=st.integers(20, 50))
def test_a_crop_over_the_edge_repeats_the_edge(left: int, top: int, side: int, height: int) -> None:
    picture = np.arange(height * 40, dtype=np.float32).reshape(height, 40)
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, 39)
    cut = FaceCrop(left=left, top=top, side=side).cut(picture)
    np.testing.assert_array_equal(cut, picture[np.ix_(rows, columns)])


def test_landmarks_outside_the_frame_or_on_one_spot_are_refused() -> None:
    with pytest.raises(InputError, match=r"landmark left_lip at \(65, 112\) must lie in the picture of 160 x 100"):
        face_crop(FACE, (100, 160, 3))
    with pytest.raises(InputError, match="at least 16"):
        face_crop(((50, 50),) * 5, (100, 100))
