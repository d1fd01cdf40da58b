"""The GPU's flow engine: refused in one line where there is none; what its vectors become; on a GPU, a known shift."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from conftest import random_samples
from nvidia.dali import Pipeline, fn, types
from test_dali_pipelines_frame_flow import CPU, DATA, frames_store, make_stream
from test_htnet_flow import texture

from dali_pipelines import flow_from_frames
from dali_pipelines.hardware_flow import engine_vectors, flow_of_vectors, no_engine, pair_of
from htnet.config import Config, DataConfig
from htnet.data.flow.image import flow_image_tensor
from htnet.data.store.writer import write_store
from htnet.errors import InputError
from launch.commands.sweep import check_folds

__all__ = ["frames_store"]  # the fixture


def test_on_a_cpu_it_is_refused_in_one_line(frames_store):
    message = re.escape(
        "data.frames_flow=hardware needs an NVIDIA GPU with a flow engine (Turing or later), got device cpu; "
        "set data.frames_flow=tvl1"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        flow_from_frames(frames_store, [0], method="hardware", device=CPU, threads=1)
    with pytest.raises(InputError, match=f"^{message}$"):
        make_stream(frames_store, data=replace(DATA, frames_flow="hardware"))


def test_a_sweep_without_gpus_is_refused_before_a_fold_is_started(frames_store):
    data = DataConfig(store=str(frames_store.path), input="frames", frames_flow="hardware")
    with pytest.raises(
        InputError, match=r"frames_flow=hardware needs a GPU: set resources\.gpus_per_fold, or use tvl1"
    ):
        check_folds(Config(data=data), frames_store)
    check_folds(Config(data=replace(data, frames_flow="tvl1")), frames_store)


def test_it_needs_frames():
    with pytest.raises(
        ValueError, match=r"frames_flow=hardware needs input=frames: with input=flow no flow is computed"
    ):
        DataConfig(frames_flow="hardware")


@pytest.mark.parametrize(
    "text",
    [
        "Failed to create Optical Flow context: Verify that your device supports Optical Flow.",
        "Failed to load OF library: libnvidia-opticalflow.so:\n cannot open shared object file",
        "Output grid size: 1 is not supported, supported are: [4]",
    ],
)
def test_an_engine_that_the_driver_lacks_is_one_line(text):
    told = no_engine(RuntimeError(text))
    assert isinstance(told, InputError)
    assert "\n" not in str(told)
    assert no_engine(RuntimeError("out of memory")) is None


def test_the_pair_has_the_apex_first():
    onset, apex = (np.full((4, 6, 1), value, np.uint8) for value in (3, 7))
    pipeline = Pipeline(1, 1, None, seed=0)
    with pipeline:
        nodes = fn.external_source(source=iter([([onset], [apex])]), num_outputs=2, batch=True, layout="HWC")
        pipeline.set_outputs(pair_of(*nodes))
    pipeline.build()
    (sequence,) = pipeline.run()
    assert sequence.layout() == "FHWC"
    assert np.array_equal(np.asarray(sequence[0]), np.stack([apex, onset]))


@pytest.mark.parametrize("grid", [1, 4])
def test_the_graph_is_one_that_dali_knows(grid):
    # built by nothing without a GPU, but an unknown operator or argument is refused here
    with Pipeline(2, 1, 0, seed=0):
        pair = fn.external_source(source=lambda: None, num_outputs=2, dtype=types.UINT8, layout="HWC")
        vectors = engine_vectors(*(picture.gpu() for picture in pair), grid=grid)
    assert vectors.device == "gpu"
    text = str(vectors.source.spec)
    assert "OpSpec for OpticalFlow" in text
    assert f"output_grid: {grid}\n" in text
    assert f"image_type: {int(types.GRAY)}\n" in text


@pytest.mark.parametrize("grid", [1, 4])
def test_vectors_become_a_flow_image_in_its_own_pixels(grid):
    side, size = 224, 28
    count = side // grid
    x = torch.arange(count).float() * grid
    vectors = torch.zeros(1, 1, count, count, 2)
    vectors[..., 0], vectors[..., 1] = 2.0, 0.01 * x  # in pixels of the pictures; v grows by 1/100 a pixel
    image = flow_image_tensor(flow_of_vectors(vectors, side), size=size)[0]
    torch.testing.assert_close(image[..., 0], torch.full((size, size), 2.0 * size / side))
    middle = (torch.arange(size) * (side // size)).float() + (side / size - grid) / 2
    torch.testing.assert_close(image[3, :, 1], 0.01 * middle * size / side)
    torch.testing.assert_close(image[..., 2], torch.full((size, size), 0.01 / 2**0.5))


@pytest.mark.gpu
def test_on_a_gpu_a_known_shift_is_found(tmp_path):
    """Direction and scale; how exact the engine is on small motions is not ours to promise."""
    shift, side = (3.0, -2.0), 256
    pair = (texture(side), texture(side, shift=shift))
    frames = tuple(
        (f"{part}.jpg", cv2.imencode(".png", p)[1].tobytes()) for part, p in zip(("onset", "apex"), pair, strict=True)
    )
    recipe = {"flow": {"method": "tvl1", "size": 28, "working_size": side, "strain": "central"}}
    items = (replace(item, frames=frames) for item in islice(random_samples(), 3))
    store = write_store(tmp_path / "store", items, recipe)
    read = flow_from_frames(store, range(3), method="hardware", device=torch.device("cuda", 0), threads=1)
    for row in range(3):
        found = np.median(read(row)[4:-4, 4:-4, :2].astype(np.float32), axis=(0, 1)) * side / 28
        assert np.abs(found - shift).max() < 0.5
