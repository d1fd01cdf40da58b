"""Optical flow and strain: right on known motion, silent on none."""

from __future__ import annotations

from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from htnet.data.faces.landmarks import face_crop
from htnet.data.flow.image import area_averaged, flow_images
from htnet.data.flow.methods import METHODS, flow_parameters
from htnet.data.flow.opencv import dis_flow
from htnet.data.flow.tvl1 import TVL1
from htnet.data.synth.clips import plan_clips, render_frame, true_flow


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


def flow_image(onset: np.ndarray, apex: np.ndarray, method: str, size: int = 28, strain="central") -> np.ndarray:
    crops = onset[None], apex[None]
    return flow_images(*crops, method=method, size=size, strain=strain, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("method", METHODS)
def test_two_equal_frames_have_no_flow_and_no_strain(method: str) -> None:
    face = pair(plan_clips("casme2", subjects=1, clips=2, seed=0, image_size=160)[0])[0]
    for picture in (face, texture(64), np.full((40, 40), 7, np.uint8)):
        assert np.abs(flow_image(picture, picture, method)).max() < 1e-5


@pytest.mark.parametrize("shift", [(0.5, 0.0), (0.0, -0.8), (1.3, 0.7)])
def test_dis_finds_a_known_shift(shift: tuple[float, float]) -> None:
    """Median inside the picture; measured 0.001 to 0.005 px."""
    flow = dis_flow(texture(96), texture(96, shift=shift))[12:-12, 12:-12]
    assert np.abs(np.median(flow, axis=(0, 1)) - shift).max() < 0.02


def test_dis_on_synthetic_faces_is_near_the_true_flow() -> None:
    """Mean and 95th percentile of the end-point error in pixels, for motion up to 2.8 px and sensor noise.

    Measured: 0.077 and 0.185.
    """
    errors = []
    for dataset in ("casme2", "samm", "smic"):
        for clip in plan_clips(dataset, subjects=2, clips=3, seed=1, image_size=160):
            onset, apex, truth = pair(clip)
            errors.append(np.hypot(*np.moveaxis(dis_flow(onset, apex) - truth, 2, 0)).ravel())
    together = np.concatenate(errors)
    assert together.mean() < 0.095
    assert np.percentile(together, 95) < 0.23


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [64, 250])
def test_the_flow_image_counts_in_its_own_pixels(method: str, side: int) -> None:
    """The same share of the crop is the same flow whether it is computed at the crop's size or reduced."""
    shift = side / 64
    image = flow_image(texture(side, shift=(0, 0)), texture(side, shift=(shift, 0)), method, 28)
    assert image.shape == (28, 28, 3)
    assert image.dtype == np.float16
    assert np.median(image[4:-4, 4:-4, 0]) == pytest.approx(28 / 64, abs=0.12 * 28 / 64)
    assert np.median(np.abs(image[4:-4, 4:-4, 1])) < 0.05
    assert (image[..., 2] >= 0).all()


def test_dis_gives_the_same_bits_for_one_or_two_threads() -> None:
    onset, apex, _ = pair(plan_clips("smic", subjects=1, clips=2, seed=0, image_size=160)[0])
    before = cv2.getNumThreads()
    try:
        found = []
        for threads in (1, 2, 1):
            cv2.setNumThreads(threads)
            found.append(dis_flow(onset, apex))
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize(("side", "size"), [(28, 28), (56, 28), (64, 28), (31, 30), (128, 29)])
def test_areas_are_averaged_as_opencv_does(side: int, size: int) -> None:
    planes = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)
    wanted = [[cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA) for plane in image] for image in planes]
    np.testing.assert_allclose(area_averaged(torch.from_numpy(planes), size), np.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_is_the_same_alone_and_in_a_batch(method: str) -> None:
    onsets = np.stack([texture(48, seed) for seed in range(5)])
    apexes = np.stack([texture(48, seed, shift=(0.3 * seed, -0.2)) for seed in range(5)])
    together = flow_images(onsets, apexes, method=method, size=28, strain="central", device=torch.device("cpu"))
    assert together.dtype == np.float16
    for index in range(5):
        assert np.array_equal(flow_image(onsets[index], apexes[index], method), together[index])


def test_misuse_is_named() -> None:
    good = texture(32)
    with pytest.raises(ValueError, match="tvl2"):
        flow_image(good, good, "tvl2")
    with pytest.raises(ValueError, match="one shape"):
        dis_flow(good, texture(30))
    with pytest.raises(ValueError, match="uint8"):
        dis_flow(good.astype(np.float32), good)
    with pytest.raises(ValueError, match=r"S at least 28, got \(1, 20, 32\)"):
        flow_image(good[:20], good[:20], "dis")
    with pytest.raises(ValueError, match=r"strain must be one of central, .*got 'eulerian'"):
        flow_image(good, good, "dis", strain="eulerian")


def test_the_parameters_of_a_method_can_be_recorded() -> None:
    assert flow_parameters("dis")["finest_scale"] == 0
    assert flow_parameters("tvl1") == {"method": "tvl1", **asdict(TVL1())}
