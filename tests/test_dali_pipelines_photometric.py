"""Photometric changes against plain numpy and OpenCV, and a law: light that changes for both frames is no motion."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import random_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import Pipeline, fn, types
from test_dali_pipelines_flow import DEVICES as PLACES
from test_dali_pipelines_flow import assert_nothing_is_left_by, make_and_drop
from test_dali_pipelines_frame_flow import (
    DATA,
    RECIPE,
    SIZE,
    assert_same,
    frames_store,
    make_stream,
    sampler_of,
    take,
)
from test_dali_pipelines_frames import face, jpeg

from dali_pipelines import EpochSampler
from dali_pipelines.frame_flow import FrameFlow
from dali_pipelines.frames import decode_frames
from dali_pipelines.photometric import (
    FIELDS,
    PhotometricSource,
    add_noise,
    bend,
    blur,
    draw_strengths,
    needed,
    noise_field,
    stretch,
)
from htnet.config import AugmentConfig, DataConfig, PhotometricConfig, TimeJitterConfig
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store

__all__ = ["frames_store"]  # the fixture

STRONG = PhotometricConfig(brightness=0.2, contrast=0.4, gamma=1.8, blur=2.0, noise=6.0)
SILENT = replace(STRONG, noise=0.0)
DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


def grey(seed: int = 0, side: int = SIZE) -> np.ndarray:
    return cv2.cvtColor(face(seed, side), cv2.COLOR_BGR2GRAY).astype(np.float32)[..., None]


def apply(change, pictures: list[np.ndarray], *arguments: list, device: str = "cpu") -> list[np.ndarray]:
    """A node function applied to a batch of pictures with an argument for each."""
    pipeline = Pipeline(len(pictures), 1, None if device == "cpu" else 0, seed=0)
    with pipeline:
        picture = fn.external_source(source=itertools.repeat(pictures), batch=True, dtype=types.FLOAT, layout="HWC")
        columns = [np.asarray(column, np.float32) for column in arguments]
        nodes = [
            fn.external_source(source=itertools.repeat(c), batch=True, dtype=types.FLOAT, ndim=c.ndim - 1)
            for c in columns
        ]
        picture = picture.gpu() if device == "gpu" else picture
        nodes = [node.gpu() if device == "gpu" and c.ndim > 1 else node for node, c in zip(nodes, columns, strict=True)]
        pipeline.set_outputs(change(picture, *nodes))
    pipeline.build()
    (output,) = pipeline.run()
    return list(output.as_cpu().as_array())


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(np.ceil(3 * sigma))
    smooth = cv2.GaussianBlur(picture, (2 * reach + 1,) * 2, sigma, borderType=cv2.BORDER_REFLECT_101)
    return smooth.reshape(picture.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "arguments", "oracle"),
    [
        (blur, ([0.4, 1.0, 2.3],), blurred),
        (bend, ([0.5, 1.0, 1.9],), lambda picture, e: 255 * (picture / 255) ** e),
        (stretch, ([0.6, 1.0, 1.4], [20.0, 0.0, -31.0]), lambda picture, c, b: (picture - 127.5) * c + 127.5 + b),
        (add_noise, (np.full((3, SIZE, SIZE, 1), 0.5), [0.0, 1.0, 3.0]), lambda picture, field, d: picture + field * d),
    ],
    ids=["blur", "gamma", "brightness and contrast", "noise"],
)  # fmt: skip
def test_each_change_is_its_plain_statement(change, arguments, oracle, device):
    pictures = [grey(seed) for seed in range(3)]
    found = apply(change, pictures, *arguments, device=device)
    for index, picture in enumerate(pictures):
        wanted = oracle(picture, *(column[index] for column in arguments))
        np.testing.assert_allclose(found[index], wanted, atol=2e-3, rtol=1e-5)


def test_a_change_of_no_strength_is_the_identity():
    pictures = [grey(seed) for seed in range(2)]
    for change, arguments in ((blur, ([0.0] * 2,)), (stretch, ([1.0] * 2, [0.0] * 2))):
        assert np.array_equal(apply(change, pictures, *arguments), pictures)
    np.testing.assert_allclose(apply(bend, pictures, [1.0] * 2), pictures, atol=1e-4)
    assert needed(PhotometricConfig()) == ()
    assert needed(PhotometricConfig(blur=1.0)) == ("blur",)
    assert needed(STRONG) == ("gamma", "contrast", "brightness", "blur", "noise", *FIELDS)


def pictures_of(store: Store, rows, device: str) -> tuple[np.ndarray, np.ndarray]:
    wanted = [(row, f"{part}.jpg") for part in ("onset", "apex") for row in rows]
    placed = {"device": torch.device(device), "threads": 1}
    decoded = [pixels.cpu().numpy() for _, pixels in decode_frames(store, wanted, size=SIZE, **placed)]
    whole = np.stack(decoded).astype(np.float32)
    return whole[: len(rows)], whole[len(rows) :]


def flow_of(store: Store, sampler: EpochSampler, config: PhotometricConfig, device: str, **options) -> FrameFlow:
    placed = {"device": torch.device(device), "threads": 1}
    return FrameFlow(store, sampler, augment=AugmentConfig(photometric=config), **placed, **options)


def changed_plainly(picture: np.ndarray, strengths: dict, index: int, field: np.ndarray) -> np.ndarray:
    """(S, S, 1) by numpy and OpenCV, in the order of a camera."""
    values = {name: float(column[index]) for name, column in strengths.items()}
    picture = blurred(picture, max(values["blur"], 1e-3))
    picture = 255 * (picture / 255) ** values["gamma"]
    picture = (picture - 127.5) * values["contrast"] + 127.5 + values["brightness"]
    return np.clip(picture + values["noise"] * field, 0, 255).astype(np.float32)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20], ids=["read at every step", "decoded once"])
def test_a_steps_pictures_are_those_changed_plainly(frames_store, cache_bytes, device):
    """Within 0.005 grey values, 0.02 on a GPU, whose power function is coarser, of what the device itself decodes."""
    sampler = sampler_of(frames_store, shuffle=False)
    flow = flow_of(frames_store, sampler, STRONG, device, cache_bytes=cache_bytes)
    for step in range(2):
        found, pictures = flow.next_pair(), pictures_of(frames_store, sampler.batch(step).tolist(), device)
        strengths = draw_strengths(STRONG, sampler, step)
        for frame in (0, 1):
            for index, (changed, picture) in enumerate(zip(found[frame].cpu().numpy(), pictures[frame], strict=True)):
                field = noise_field(sampler.seed, step, index, frame, SIZE)
                wanted = changed_plainly(picture, strengths, index, field)
                np.testing.assert_allclose(changed, wanted[..., 0], atol=5e-3 if device == "cpu" else 2e-2)
                assert np.abs(changed - picture[..., 0]).mean() > 1


def store_of_equal_frames(folder) -> Store:
    items = [
        replace(item, frames=tuple((name, jpeg(face(seed, 60))) for name in ("onset.jpg", "apex.jpg")))
        for seed, item in enumerate(islice(random_samples(), 6))
    ]
    return write_store(folder / "store", iter(items), RECIPE)


@pytest.mark.parametrize("device", PLACES)
def test_light_on_both_frames_is_no_motion_and_noise_is(tmp_path, device):
    """Light that changes for both frames is no motion, and noise is."""
    store = store_of_equal_frames(tmp_path)
    for config, moves in ((SILENT, False), (PhotometricConfig(noise=6.0), True)):
        flow = flow_of(store, sampler_of(store, batch_size=6), config, device)
        for _ in range(2):
            assert bool(flow.next().any()) == moves


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), step=st.integers(0, 10**6), brightness=st.floats(0, 0.5), gamma=st.floats(1, 4))
def test_what_is_drawn_stays_within_its_bounds(seed, step, brightness, gamma):
    config = replace(STRONG, brightness=brightness, gamma=gamma)
    sampler = SimpleNamespace(seed=seed, size_of=lambda _: 50, rank=0, ranks=1)
    drawn = draw_strengths(config, sampler, step)
    slack = 1 + 1e-6
    assert (np.abs(drawn["brightness"]) <= 255 * brightness * slack).all()
    assert (drawn["gamma"] <= gamma * slack).all()
    assert (drawn["gamma"] >= 1 / gamma / slack).all()
    assert (np.abs(drawn["contrast"] - 1) <= 0.4 * slack).all()
    assert ((drawn["blur"] >= 0) & (drawn["blur"] <= 2)).all()
    assert ((drawn["noise"] >= 0) & (drawn["noise"] <= 6)).all()


def test_noise_is_standard_normal_and_never_repeats():
    """Noise is standard normal and new for every frame, pair and step."""
    fields = [
        noise_field(*place, 64) for place in ((1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0), (2, 0, 0, 0))
    ]
    assert np.array_equal(fields[0], noise_field(1, 0, 0, 0, 64))
    for one in range(5):
        assert abs(fields[one].mean()) < 0.06
        assert abs(fields[one].std() - 1) < 0.05
        for other in range(one):
            assert abs(np.corrcoef(fields[one].ravel(), fields[other].ravel())[0, 1]) < 0.06


def test_a_change_switched_on_leaves_what_the_others_draw(frames_store):
    sampler = sampler_of(frames_store)
    some, all_of_them = (draw_strengths(config, sampler, 4) for config in (PhotometricConfig(gamma=1.8), STRONG))
    assert np.array_equal(some["gamma"], all_of_them["gamma"])
    rank = replace(sampler, rank=1, ranks=2)
    assert np.array_equal(draw_strengths(STRONG, rank, 4)["blur"], all_of_them["blur"][1::2])
    info, names = SimpleNamespace(iteration=4), needed(STRONG)
    whole, part = (PhotometricSource(STRONG, s, side=SIZE, first_step=0, names=names)(info) for s in (sampler, rank))
    for column, mine in zip(whole, part, strict=True):
        assert np.array_equal(column[1::2], mine)


def test_threads_cache_and_interruptions_change_no_batch(frames_store):
    """Neither threads nor cache nor an interruption changes a batch."""
    augment = AugmentConfig(photometric=STRONG, time_jitter=TimeJitterConfig(frames=1))
    undisturbed = take(make_stream(frames_store, augment=augment), 6)
    assert_same(take(make_stream(frames_store, augment=augment, threads=2, cache_mb=0), 6), undisturbed)
    walking = make_stream(frames_store, augment=augment)
    take(walking, 4)
    assert_same(take(make_stream(frames_store, augment=augment, state=walking.state()), 2), undisturbed[4:])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("cache_mb", [0, 1], ids=["read at every step", "decoded once"])
def test_streams_of_frames_that_are_dropped_leave_nothing_behind(frames_store, cache_mb):
    augment = AugmentConfig(photometric=STRONG, time_jitter=TimeJitterConfig(frames=2))
    options = {"augment": augment, "cache_mb": cache_mb}
    assert_nothing_is_left_by(partial(make_and_drop, make_stream, frames_store, options), 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brightness": 0.6}, r"brightness\s+Input should be less than or equal to 0\.5 .*0\.6"),
        ({"contrast": 1.0}, r"contrast\s+Input should be less than or equal to 0\.9 .*1\.0"),
        ({"gamma": 0.5}, r"gamma\s+Input should be greater than or equal to 1 .*0\.5"),
        ({"blur": -1.0}, r"blur\s+Input should be greater than or equal to 0 .*-1\.0"),
        ({"noise": 65.0}, r"noise\s+Input should be less than or equal to 64 .*65\.0"),
    ],
)
def test_strengths_out_of_bounds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PhotometricConfig(**changes)


def test_photometric_changes_need_frames():
    with pytest.raises(
        ValueError, match=r"augment\.photometric needs input=frames: with input=flow no flow is computed"
    ):
        DataConfig(augment=AugmentConfig(photometric=STRONG))
    assert replace(DATA, augment=AugmentConfig(photometric=STRONG)).input == "frames"
