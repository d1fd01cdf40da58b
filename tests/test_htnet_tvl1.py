"""TV-L1: as right as the known implementations, right on known motion, zero on none, and every pair on its own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.registration import optical_flow_tvl1
from test_htnet_flow import texture

from htnet.data.flow.tvl1 import TVL1, blurred, median_filtered, tvl1, warped
from htnet.data.synth.pairs import synth_pairs


def flow_of(onset: np.ndarray, apex: np.ndarray, parameters: TVL1 | None = None) -> np.ndarray:
    """(H, W, 2) of one pair of (H, W)."""
    pair = (torch.from_numpy(picture)[None] for picture in (onset, apex))
    return tvl1(*pair, parameters)[0].permute(1, 2, 0).numpy()


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean end-point error in pixels."""
    return float(np.hypot(*np.moveaxis(found - truth, -1, 0)).mean())


@pytest.mark.slow
def test_flow_of_faces_is_as_right_as_that_of_known_codes():
    """Measured at 96 px: ours 0.08 to 0.1 px; no worse than 5 % above either."""
    onsets, apexes, truth = synth_pairs(6, 96)
    ours = tvl1(torch.from_numpy(onsets), torch.from_numpy(apexes)).permute(0, 2, 3, 1).numpy()
    dual = cv2.optflow.DualTVL1OpticalFlow_create()
    theirs = np.stack([dual.calc(first, second, None) for first, second in zip(onsets, apexes, strict=True)])
    assert error(ours, truth) <= 1.05 * error(theirs, truth)
    unit = [pictures.astype(np.float32) / 255 for pictures in (onsets, apexes)]
    skimage = np.stack([np.stack(optical_flow_tvl1(a, b)[::-1], axis=-1) for a, b in zip(*unit, strict=True)])
    assert error(ours, truth) <= 1.05 * error(skimage, truth)


@settings(max_examples=12, deadline=None)
@given(x=st.floats(-2.5, 2.5), y=st.floats(-2.5, 2.5), seed=st.integers(0, 100))
def test_a_known_shift_is_right_within_a_twentieth_of_a_pixel(x, y, seed):
    flow = flow_of(texture(72, seed), texture(72, seed, shift=(x, y)))[8:-8, 8:-8]
    assert np.abs(np.median(flow, axis=(0, 1)) - (x, y)).max() < 0.05
    assert np.hypot(*np.moveaxis(flow - (x, y), -1, 0)).mean() < 0.05


@pytest.mark.parametrize("picture", [texture(40), np.full((33, 50), 7, np.uint8), np.zeros((16, 16), np.uint8)])
def test_two_equal_pictures_have_no_flow_at_all(picture):
    assert not flow_of(picture, picture).any()


def test_a_pair_does_not_depend_on_what_else_is_in_the_batch():
    onsets = torch.from_numpy(np.stack([texture(50, seed) for seed in range(6)]))
    apexes = torch.from_numpy(np.stack([texture(50, seed, shift=(0.4 * seed - 1, 0.2)) for seed in range(6)]))
    together = tvl1(onsets, apexes)
    for index in range(6):
        assert torch.equal(tvl1(onsets[index : index + 1], apexes[index : index + 1])[0], together[index])
    assert torch.equal(tvl1(onsets.flip(0), apexes.flip(0)).flip(0), together)


def test_the_number_of_threads_changes_no_flow():
    """The number of threads changes nothing and is left as it was."""
    onsets = torch.from_numpy(np.stack([texture(200, seed) for seed in range(5)]))
    apexes = torch.from_numpy(np.stack([texture(200, seed, shift=(1, 0.5)) for seed in range(5)]))
    before, quick = torch.get_num_threads(), TVL1(iterations=10, warps=2)
    try:
        torch.set_num_threads(1)
        alone = tvl1(onsets, apexes, quick)
        torch.set_num_threads(2)
        assert torch.equal(tvl1(onsets, apexes, quick), alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_longer_way_needs_the_pyramid():
    flow = flow_of(texture(96), texture(96, shift=(6.0, -4.0)))[16:-16, 16:-16]
    assert np.abs(np.median(flow, axis=(0, 1)) - (6.0, -4.0)).max() < 0.1


@pytest.mark.parametrize("side", [3, 5])
def test_the_median_is_opencvs(side):
    planes = np.random.default_rng(0).standard_normal((2, 2, 11, 13)).astype(np.float32)
    wanted = np.stack([[cv2.medianBlur(plane, side) for plane in pair] for pair in planes])
    assert np.array_equal(median_filtered(torch.from_numpy(planes), side), wanted)


def test_the_blur_is_opencvs():
    picture = texture(30).astype(np.float32)
    wanted = cv2.GaussianBlur(picture, (5, 5), 0.8, borderType=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(blurred(torch.from_numpy(picture)[None], 0.8)[0], wanted, atol=1e-3)


def test_warping_by_whole_pixels_only_moves_them():
    picture = torch.from_numpy(texture(20).astype(np.float32))[None]
    flow = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 20, 20)
    assert torch.equal(warped(picture, flow)[0, 3:, :-2], picture[0, :-3, 2:])


def test_warping_reproduces_a_quadratic():
    """Cubic convolution with a = -1/2 is exact for polynomials up to the second degree (Keys 1981)."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")

    def surface(x, y):
        return 0.1 * x**2 - 0.05 * x * y + 0.2 * y**2 + x

    flow = torch.tensor([0.37, -0.61]).view(1, 2, 1, 1).expand(1, 2, 24, 24)
    found = warped(surface(x, y)[None], flow)[0]
    torch.testing.assert_close(found[3:-3, 3:-3], surface(x + 0.37, y - 0.61)[3:-3, 3:-3], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((1, 9, 9), (1, 9, 8)), "one shape"), (((9, 9), (9, 9)), "must be"), (((1, 7, 20), (1, 7, 20)), "at least 8")],
)
def test_other_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        tvl1(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("changes", [{"median": 4}, {"tau": 0.5}, {"warps": 0}, {"coarsest": 1}])
def test_parameters_that_do_not_converge_or_exist_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TVL1(**changes)
