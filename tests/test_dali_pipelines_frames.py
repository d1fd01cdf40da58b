"""Flow from stored frames: the stored flow up to JPEG's losses, whatever kind of picture lies there."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import random_samples
from PIL import Image
from test_dali_pipelines_flow import DEVICES

from dali_pipelines import EpochSampler, FlowStream, Resident, fit_transform, flow_from_frames
from dali_pipelines.frames import decode_frames
from htnet.config import AugmentConfig, Config, DataConfig, PhotometricConfig, PrepareConfig, SourceConfig
from htnet.data.extraction import extract
from htnet.data.plan import make_plan
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate
from htnet.errors import InputError

CPU = torch.device("cpu")
RECIPE = {"flow": {"method": "dis", "size": 28, "working_size": 64, "strain": "central"}}


def face(seed: int = 0, side: int = 90) -> np.ndarray:
    small = np.random.default_rng(seed).integers(40, 216, (9, 9, 3), np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def jpeg(picture: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def store_of(folder: Path, *pairs: tuple[bytes, bytes], recipe=None) -> Store:
    items = islice(random_samples(), len(pairs))
    samples = (
        replace(item, frames=tuple(zip(("onset.jpg", "apex.jpg"), pair, strict=True)))
        for item, pair in zip(items, pairs, strict=True)
    )
    return write_store(folder / "store", samples, RECIPE if recipe is None else recipe)


def decoded(store: Store, count: int = 1, size: int = 64, device: str = "cpu") -> torch.Tensor:
    wanted = [(row, "onset.jpg") for row in range(count)]
    place = torch.device(device)
    pictures, grey = zip(*decode_frames(store, wanted, size=size, device=place, threads=1), strict=True)
    assert list(pictures) == wanted
    assert {str(pixels.device) for pixels in grey} == {device}
    return torch.stack(grey).squeeze(-1).cpu()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Store:
    """Synthetic clips prepared with their frames."""
    folder = tmp_path_factory.mktemp("kept")
    generate(folder / "raw", datasets=("casme2",), subjects=2, clips=3, seed=0, image_size=128)
    source = SourceConfig(adapter="casme2", root=str(folder / "raw" / "casme2"))
    config = Config(prepare=PrepareConfig(sources=(source,), keep_frames=True, working_size=96))
    plan = make_plan(config.prepare)
    samples = [extract([entry], config.prepare, strict=True).samples[0] for entry in plan.entries]
    return write_store(folder / "store", iter(samples), plan.recipe)


@pytest.mark.parametrize("device", DEVICES)
def test_flow_from_frames_is_the_stored_flow_up_to_jpegs_losses(kept, device):
    read = flow_from_frames(kept, range(6), device=torch.device(device), threads=1)
    for row in range(6):
        stored, again = kept.read_flow(row).astype(np.float32), read(row).astype(np.float32)
        assert again.shape == (28, 28, 3)
        assert np.corrcoef(stored[..., :2].ravel(), again[..., :2].ravel())[0, 1] > 0.9
        assert np.abs(stored - again).mean() < 0.1 * np.abs(stored).max()


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_frames_and_of_flow_look_alike_to_the_model(kept, device):
    data, place = DataConfig(input="frames"), torch.device(device)
    sampler = EpochSampler(rows=tuple(range(6)), batch_size=4, seed=0, shuffle=True)
    options = {"mosaic_size": 28, "device": place, "threads": 1}
    of_frames, of_flow = (Resident(kept, range(6), data=kind, **options) for kind in (data, DataConfig()))
    transform = fit_transform(of_frames, range(6), standardise=True)
    frames, flow = (
        FlowStream(resident, sampler, augment=AugmentConfig(), transform=transform) for resident in (of_frames, of_flow)
    )
    for _ in range(3):
        one, other = frames.next(), flow.next()
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.labels, other.labels)
        assert one.images.shape == other.images.shape
        assert not torch.equal(one.images, other.images)


def test_a_store_without_frames_or_settings_is_named(tmp_path, tiny_store):
    with pytest.raises(InputError, match=r"data\.input=frames needs a store whose flow htnet prepare made"):
        flow_from_frames(tiny_store, [0], device=CPU, threads=1)
    bare = write_store(tmp_path / "bare", islice(random_samples(), 3), RECIPE)
    with pytest.raises(InputError, match=r"casme2/sub00/EP00 has no onset\.jpg: .* needs prepare\.keep_frames=true"):
        flow_from_frames(bare, [0, 1, 2], device=CPU, threads=1)


NO_PICTURE = b"\xff\xd8\xff" + bytes(200) + b"\xff\xd9"
"""What has a JPEG's first and last bytes and is none."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_a_frame_that_cannot_be_decoded_is_named(tmp_path, cache_mb, device):
    """A member that only looks like a picture is named when it cannot be decoded."""
    place = torch.device(device)
    pairs = [(jpeg(face(seed)), jpeg(face(seed + 9))) for seed in range(5)]
    store = store_of(tmp_path, *pairs[:3], (pairs[3][0], NO_PICTURE), pairs[4])
    message = r"apex\.jpg of casme2/sub01/EP00 cannot be decoded"
    with pytest.raises(InputError, match=message):
        flow_from_frames(store, range(5), device=place, threads=1)
    # in the second step, which DALI may be decoding while the first is asked for
    augment = AugmentConfig(photometric=PhotometricConfig(gamma=1.5))
    data = DataConfig(input="frames", cache_mb=cache_mb, augment=augment)
    sampler = EpochSampler(rows=tuple(range(5)), batch_size=2, seed=0, shuffle=False)
    resident = Resident(store, sampler.rows, data=data, mosaic_size=28, device=place, threads=1)

    def two_steps() -> None:
        stream = FlowStream(resident, sampler, augment=augment, transform=resident.plain)
        stream.next()
        stream.next()

    with pytest.raises(InputError, match=message):
        two_steps()
    assert flow_from_frames(store, [0, 1, 2, 4], device=place, threads=1)(4).shape == (28, 28, 3)


@pytest.mark.parametrize("data", [b"", b"no picture", jpeg(face())[:-200]])
def test_a_member_that_is_no_picture_is_named_by_its_sample(tmp_path, data):
    store = store_of(tmp_path, (jpeg(face()), jpeg(face())), (jpeg(face()), data))
    with pytest.raises(InputError, match=r"apex\.jpg of casme2/sub00/EP01 is no JPEG, PNG or BMP, or truncated"):
        flow_from_frames(store, [0, 1], device=CPU, threads=1)
