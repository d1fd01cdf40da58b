"""Guarantees of the facial regions: upstream's mosaics to the bit, and eyes where the eyes are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htnet.data.datasets.htnet_release import LANDMARKS, HTNetRelease
from htnet.data.datasets.schemes import load_scheme
from htnet.data.entries import read_flow_picture
from htnet.data.faces.landmarks import read_landmarks
from htnet.data.regions import MOSAIC_REGIONS, mosaic, region_starts, scale_minmax

RULES = ("upstream", "anatomical")
FACE = ((9, 11), (21, 10), (15, 17), (10, 21), (20, 21))


def coordinates(size: int) -> np.ndarray:
    """A picture whose pixel says where it is: channels row, column, 0."""
    rows, columns = np.indices((size, size))
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1)


def as_the_public_code_cuts(flow: np.ndarray, landmarks) -> np.ndarray:
    """Its crop at 28 pixels in our own words: a landmark's first number picks rows, its second columns."""
    inside = [[min(max(value, 7), 21) for value in point] for point in landmarks]
    parts = [flow[first - 7 : first + 7, second - 7 : second + 7] for first, second in inside]
    return np.vstack([np.hstack([parts[0], parts[1]]), np.hstack([parts[3], parts[4]])])


points = st.tuples(st.integers(-5, 40), st.integers(-5, 40))


@settings(max_examples=50, deadline=None)
@given(landmarks=st.tuples(points, points, points, points, points), seed=st.integers(0, 100))
def test_the_upstream_rule_is_the_public_codes_crop(landmarks, seed):
    flow = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
    assert np.array_equal(mosaic(flow, landmarks, "upstream"), as_the_public_code_cuts(flow, landmarks))


def test_the_upstream_rule_gives_the_inputs_of_the_public_code(shared_data):
    """The upstream rule reproduces the inputs of the public code for all 442 clips."""
    folder = shared_data / "htnet_release"
    if not (folder / "regions_golden.npz").is_file():
        pytest.skip(f"{folder / 'regions_golden.npz'} not found")
    golden = np.load(folder / "regions_golden.npz")
    scheme = load_scheme("megc2019_3class", ["casme2", "samm", "smic"])
    entries = list(HTNetRelease(root=folder, scheme=scheme).entries())
    table = read_landmarks(folder / LANDMARKS)
    assert len(entries) == len(golden["regions"]) == 442
    for entry, expected, label in zip(entries, golden["regions"], golden["labels"], strict=True):
        # the golden mosaics keep OpenCV's order of channels
        bgr = read_flow_picture(entry.picture)[..., ::-1]
        assert np.array_equal(mosaic(bgr, table.points[entry.id], "upstream"), expected), entry.id
        assert entry.label == label


def test_the_anatomical_rule_exchanges_rows_and_columns():
    upstream, anatomical = (region_starts(FACE, 28, rule) for rule in RULES)
    assert np.array_equal(upstream, anatomical[:, ::-1])
    assert anatomical.tolist() == [[4, 2], [3, 14], [14, 3], [14, 13]]
    assert anatomical.dtype == np.int32
    assert anatomical.flags.c_contiguous


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(8, 120))
def test_the_anatomical_regions_lie_at_the_landmarks(data, size):
    quarter = size // 4
    inner = st.floats(quarter, size - quarter - 1, allow_nan=False)
    landmarks = data.draw(st.tuples(*[st.tuples(inner, inner)] * 5))
    side = size // 4 * 2
    for index, (row, column) in zip(MOSAIC_REGIONS, region_starts(landmarks, size, "anatomical"), strict=True):
        x, y = landmarks[index]
        assert column <= int(x) < column + side
        assert row <= int(y) < row + side
        # and in its middle
        assert abs(int(x) - (column + side // 2)) == abs(int(y) - (row + side // 2)) == 0


def test_the_mosaic_has_eyes_above_lips_and_keeps_the_sides():
    """The mosaic has eyes above and lips below, and the left of the picture is at the left."""
    # a face with its parts far apart, so that regions cannot be confused
    cut = mosaic(coordinates(56), ((14, 14), (42, 14), (28, 28), (14, 42), (42, 42)), "anatomical")
    assert cut.shape == (56, 56, 3)
    assert np.array_equal(cut, coordinates(56))
    turned = mosaic(coordinates(56), ((42, 14), (14, 14), (28, 28), (14, 42), (42, 42)), "anatomical")
    assert turned[0, 0].tolist() == [0, 28, 0]
    assert turned[0, 28].tolist() == [0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(8, 120), rule=st.sampled_from(RULES))
def test_a_region_never_leaves_the_picture(data, size, rule):
    """A region never leaves the picture, wherever the landmark is."""
    anywhere = st.floats(-1e4, 1e4, allow_nan=False)
    landmarks = data.draw(st.tuples(*[st.tuples(anywhere, anywhere)] * 5))
    starts = region_starts(landmarks, size, rule)
    side = size // 4 * 2
    assert starts.min() >= 0
    assert starts.max() + side <= size
    assert mosaic(coordinates(size), landmarks, rule).shape == (2 * side, 2 * side, 3)


def test_landmarks_at_the_border_are_clamped():
    corners = ((0, 0), (27, 0), (0, 0), (0, 27), (27, 27))
    assert region_starts(corners, 28, "anatomical").tolist() == [[0, 0], [0, 14], [14, 0], [14, 14]]


def test_fractions_of_a_pixel_are_cut_off_as_upstream_does():
    fraction = tuple((x + 0.99, y + 0.99) for x, y in ((9, 11), (20, 10), (15, 17), (10, 20), (20, 20)))
    assert region_starts(fraction, 28, "upstream").tolist() == [[2, 4], [13, 3], [3, 13], [13, 13]]


@pytest.mark.parametrize(("size", "side"), [(8, 8), (9, 8), (29, 28), (30, 28), (31, 28), (57, 56), (112, 112)])
def test_odd_sizes_give_a_mosaic_of_four_equal_regions(size, side):
    landmarks = tuple((x * size / 28, y * size / 28) for x, y in FACE)
    for rule in RULES:
        assert mosaic(coordinates(size), landmarks, rule).shape == (side, side, 3)


def test_the_mosaic_keeps_the_type_of_the_picture():
    for kind in (np.uint8, np.float16, np.float32):
        assert mosaic(np.zeros((28, 28, 3), kind), FACE, "anatomical").dtype == kind


def test_a_picture_over_the_full_range_is_left_as_it_is():
    flow = np.random.default_rng(0).integers(0, 256, (28, 28, 3))
    flow[0, 0], flow[0, 1] = 0, 255
    for kind in (np.uint8, np.float16, np.float32):
        scaled = scale_minmax(flow.astype(kind))
        assert scaled.dtype == np.float32
        assert np.array_equal(scaled, flow.astype(np.float32))


def test_a_constant_channel_becomes_zero_and_disturbs_no_other():
    flow = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    flow[..., 1] = -3.5
    scaled = scale_minmax(flow)
    assert not scaled[..., 1].any()
    assert np.array_equal(scaled[..., [0, 2]], scale_minmax(flow[..., [0, 2]]))
    assert np.isfinite(scaled).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), gain=st.floats(1e-3, 1e3), offset=st.floats(-100, 100))
def test_scaling_frees_a_channel_of_its_amplitude(seed, gain, offset):
    flow = np.random.default_rng(seed).normal(size=(8, 8, 3)).astype(np.float64)
    scaled = scale_minmax(flow)
    assert scaled.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert scaled.max(axis=(0, 1)) == pytest.approx([255.0] * 3, abs=1e-3)
    # float32 carries seven digits of offset + gain * flow
    assert scale_minmax(flow * gain + offset) == pytest.approx(scaled, abs=1e-3 + 1e-4 * abs(offset) / gain)
