"""Optical flow and strain: right on known motion, silent on none."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from htnet.data.flow import flow_image, flow_parameters, optical_flow, optical_strain
from htnet.data.landmarks import face_crop
from htnet.data.synth import plan_clips, render_frame, true_flow

METHODS = ("farneback", "dis")


def texture(side: int, seed: int = 0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """A smooth random picture, moved by exactly ``shift`` pixels (x, y) through its spectrum, (side, side) uint8."""
    full = side + 40
    spectrum = np.fft.fft2(np.random.default_rng(seed).standard_normal((full, full)))
    y, x = np.fft.fftfreq(full)[:, None], np.fft.fftfreq(full)[None, :]
    blur = np.exp(-2 * (np.pi * 2.5) ** 2 * (x**2 + y**2))
    smooth = np.fft.ifft2(spectrum * blur * np.exp(-2j * np.pi * (x * shift[0] + y * shift[1]))).real
    return np.clip(np.rint(smooth[20:-20, 20:-20] * 250 + 128), 0, 255).astype(np.uint8)


def pair(clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey face crops of onset and apex and the true flow between them."""
    onset, apex = (cv2.cvtColor(render_frame(clip, frame), cv2.COLOR_BGR2GRAY) for frame in (clip.onset, clip.apex))
    crop = face_crop(clip.landmarks, onset.shape)
    return crop.cut(onset), crop.cut(apex), crop.cut(true_flow(clip, clip.apex))


@pytest.mark.parametrize("method", METHODS)
def test_two_equal_frames_have_no_flow_and_no_strain(method: str) -> None:
    face = pair(plan_clips("casme2", subjects=1, clips=2, seed=0, image_size=160)[0])[0]
    for picture in (face, texture(64), np.full((40, 40), 7, np.uint8)):
        assert np.abs(optical_flow(picture, picture, method)).max() < 1e-5
        assert np.abs(flow_image(picture, picture, method, 28)).max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [(0.5, 0.0), (0.0, -0.8), (1.3, 0.7)])
def test_a_known_shift_is_found(method: str, shift: tuple[float, float]) -> None:
    """Median inside the picture; measured 0.001 to 0.005 px for both methods."""
    flow = optical_flow(texture(96), texture(96, shift=shift), method)[12:-12, 12:-12]
    assert np.abs(np.median(flow, axis=(0, 1)) - shift).max() < 0.02


@pytest.mark.parametrize(("method", "mean", "worst"), [("farneback", 0.16, 0.48), ("dis", 0.095, 0.23)])
def test_flow_of_synthetic_faces_is_near_the_true_flow(method: str, mean: float, worst: float) -> None:
    """Mean and 95th percentile of the end-point error in pixels, for motion up to 2.8 px and sensor noise.

    Measured: 0.134 and 0.396 (farneback), 0.077 and 0.185 (dis).
    """
    errors = []
    for dataset in ("casme2", "samm", "smic"):
        for clip in plan_clips(dataset, subjects=2, clips=3, seed=1, image_size=160):
            onset, apex, truth = pair(clip)
            errors.append(np.hypot(*np.moveaxis(optical_flow(onset, apex, method) - truth, 2, 0)).ravel())
    together = np.concatenate(errors)
    assert together.mean() < mean
    assert np.percentile(together, 95) < worst


def test_strain_of_a_rigid_shift_is_zero() -> None:
    flow = np.broadcast_to(np.array([1.25, -0.5], np.float32), (20, 30, 2))
    assert not optical_strain(flow).any()


def test_strain_follows_the_formula() -> None:
    """u = 0.1 x + 0.3 y, v = 0.2 y: sqrt(0.1^2 + 0.2^2 + 0.3^2 / 2) everywhere; a rotation has none."""
    y, x = np.mgrid[0:12, 0:15].astype(np.float32)
    linear = np.stack([0.1 * x + 0.3 * y, 0.2 * y], axis=-1)
    np.testing.assert_allclose(optical_strain(linear), np.sqrt(0.01 + 0.04 + 0.045), rtol=1e-5)
    np.testing.assert_allclose(optical_strain(np.stack([-0.1 * y, 0.1 * x], axis=-1)), 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [64, 400])
def test_the_flow_image_counts_in_its_own_pixels(method: str, side: int) -> None:
    """The same share of the crop is the same flow whether it is computed at the crop's size or reduced."""
    shift = side / 64
    image = flow_image(texture(side, shift=(0, 0)), texture(side, shift=(shift, 0)), method, 28)
    assert image.shape == (28, 28, 3)
    assert image.dtype == np.float16
    assert np.median(image[4:-4, 4:-4, 0]) == pytest.approx(28 / 64, abs=0.12 * 28 / 64)
    assert np.median(np.abs(image[4:-4, 4:-4, 1])) < 0.05
    assert (image[..., 2] >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_flow_is_the_same_bits_every_time_and_for_one_or_two_threads(method: str) -> None:
    onset, apex, _ = pair(plan_clips("smic", subjects=1, clips=2, seed=0, image_size=160)[0])
    before = cv2.getNumThreads()
    try:
        found = []
        for threads in (1, 2, 1):
            cv2.setNumThreads(threads)
            found.append(optical_flow(onset, apex, method))
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_crop_smaller_than_the_flow_image_is_enlarged() -> None:
    assert flow_image(texture(20), texture(20, 1), "farneback", 28).shape == (28, 28, 3)


def test_misuse_is_named() -> None:
    good = texture(32)
    with pytest.raises(ValueError, match="tvl2"):
        optical_flow(good, good, "tvl2")
    with pytest.raises(ValueError, match="one shape"):
        optical_flow(good, texture(30), "dis")
    with pytest.raises(ValueError, match="uint8"):
        optical_flow(good.astype(np.float32), good, "dis")
    with pytest.raises(ValueError, match="square"):
        flow_image(good[:20], good[:20], "dis", 28)


def test_the_parameters_of_a_method_can_be_recorded() -> None:
    assert flow_parameters("dis")["finest_scale"] == 0
    assert flow_parameters("farneback")["winsize"] == 17
