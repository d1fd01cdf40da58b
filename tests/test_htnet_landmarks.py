"""Landmark tables and the face crop: two forms read, every mistake named, points that stay on the face."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htnet.data.faces.landmarks import SOURCE_COLUMNS, UPSTREAM_COLUMNS, FaceCrop, check_face, face_crop, read_landmarks
from htnet.data.samples import SampleId
from htnet.data.synth.faces import draw_look, look_landmarks
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


def test_the_release_table_has_points_of_its_flow_images(tmp_path: Path) -> None:
    """The table of the release gives points of its flow images of 28 pixels."""
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


def test_missing_tables_and_landmarks_are_named(tmp_path: Path) -> None:
    """A missing table, an empty one and a clip without landmarks are named."""
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
    assert found.face_of(other).reason == f"{found.path}: no landmarks for clip a/b/other"


def test_the_crop_is_a_square_around_eyes_and_mouth() -> None:
    """The crop is a square around eyes and mouth, and the points land in the flow image."""
    crop = face_crop(FACE, (200, 160))
    assert crop.side == round(2.4 * 42)
    left_eye, right_eye, _, left_lip, right_lip = crop.to_flow(FACE, 28)
    assert left_eye[0] + right_eye[0] == pytest.approx(27, abs=0.5)
    assert left_eye[1] + left_lip[1] == pytest.approx(27, abs=0.5)
    for x, y in (left_eye, right_eye, left_lip, right_lip):
        assert 6 < x < 22
        assert 6 < y < 22


def test_a_mapped_point_is_the_pixel_of_the_area_reduction() -> None:
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


@st.composite
def faces(draw) -> tuple[tuple[float, float], ...]:
    """Five points of a head in space, turned, nodding, tilted and seen on a picture of 400 pixels, found with noise."""

    def share(low: float, high: float) -> float:
        return draw(st.floats(low, high))

    eye, lip, tip = share(0.8, 1.2) / 2, share(0.5, 0.9) / 2, share(0.3, 0.5)
    head = np.array([[-eye, -0.5, 0], [eye, -0.5, 0], [0, 0.1, tip], [-lip, 0.5, 0.1], [lip, 0.5, 0.1]])
    yaw, nod, tilt = np.radians([share(-60, 60), share(-25, 25), share(-45, 45)])
    head = head @ np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    head = head @ np.array([[1, 0, 0], [0, np.cos(nod), -np.sin(nod)], [0, np.sin(nod), np.cos(nod)]])
    seen = head[:, :2] @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    noise = np.array(draw(st.lists(st.floats(-0.04, 0.04), min_size=10, max_size=10))).reshape(5, 2)
    return tuple(map(tuple, ((seen + noise) * share(15, 150) + 200).tolist()))


@settings(max_examples=300, deadline=None)
@given(faces())
def test_a_turned_tilted_and_noisy_face_is_a_face(points) -> None:
    face_crop(points, (400, 400))


@settings(deadline=None)
@given(faces())
def test_a_mirrored_or_fallen_picture_holds_no_upright_face(points) -> None:
    for name, other in (
        ("mirrored", [(399 - x, y) for x, y in points]),
        ("upside down", [(x, 399 - y) for x, y in points]),
        ("turned over", [(399 - x, 399 - y) for x, y in points]),
    ):
        with pytest.raises(InputError, match="landmarks are not those of an upright face: "):
            pytest.fail(f"{name}: {check_face(tuple(other))}")


UPRIGHT = "landmarks are not those of an upright face: "


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            lambda x, y: (160 - x, y),
            "left_eye must be left of right_eye in the picture, got left_eye (100, 70), right_eye",
        ),
        (lambda x, y: (x, 160 - y), "the mouth must be below the eyes, at most 60 degrees aside"),
        (lambda x, y: (y, 160 - x), "the mouth must be below the eyes"),
        (lambda x, y: (160 - y, x), "the mouth must be below the eyes"),
        (lambda x, y: (y, x), "the mouth must be below the eyes"),
        (lambda x, y: (x, y / 30 + 70), "from left_eye to right_eye it must be 0.05 to 4 eye-mouth distances across"),
    ],
)
def test_points_of_a_face_that_does_not_stand_upright_are_named(change, rule) -> None:
    with pytest.raises(InputError) as caught:
        face_crop(tuple(change(x, y) for x, y in FACE), (160, 160))
    assert str(caught.value).startswith(UPRIGHT + rule)
    assert "right_lip (" in str(caught.value)


def test_the_points_of_a_face_in_another_order_are_refused() -> None:
    for order in itertools.permutations(range(5)):
        points = tuple(FACE[index] for index in order)
        if points != FACE:
            with pytest.raises(InputError):
                pytest.fail(f"{order}: {face_crop(points, (200, 160))}")


def test_points_that_lie_on_each_other_are_no_face() -> None:
    for one, other in itertools.permutations(range(5), 2):
        points = list(FACE)
        points[one] = points[other]
        with pytest.raises(InputError):
            pytest.fail(f"{one} = {other}: {face_crop(tuple(points), (200, 160))}")


def test_five_points_out_of_the_98_of_wflw_are_no_face() -> None:
    """At the places that the eyes, nose and mouth have among 68: brows, the jaw, a brow's end and the nose's back."""
    points = ((37.97, 32.07), (58.23, 32.07), (8.86, 61.74), (65.23, 32.07), (48.1, 58.74))
    with pytest.raises(InputError, match=f"^{UPRIGHT}left_lip must be left of right_lip in the picture"):
        face_crop(points, (96, 96))


def test_a_landmark_at_the_edge_of_the_crop_is_refused() -> None:
    wide = (*FACE[:3], (25.0, 112.0), (135.0, 112.0))
    with pytest.raises(
        InputError, match=r"landmark left_lip at \(-?\d+, 71\) of the face crop of 101 pixels lies too near"
    ):
        face_crop(wide, (200, 160))


def test_every_face_of_the_release_is_one(shared_data: Path) -> None:
    table = read_landmarks(shared_data / "htnet_release" / "landmarks_5pt.csv")
    assert len(table.points) == 442
    for points in table.points.values():
        check_face(points)


def test_every_synthetic_face_is_one() -> None:
    for seed in range(200):
        face_crop(look_landmarks(draw_look(np.random.default_rng(seed)), 160), (160, 160))
