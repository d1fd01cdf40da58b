"""Flow from frames that change from step to step: the right frames, the same batches whatever the machine does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_samples
from test_dali_pipelines_flow import DEVICES, least_growth_of_gpu_memory
from test_dali_pipelines_frames import face, jpeg

from dali_pipelines import Batch, EpochSampler, FlowStream, FlowTransform, Resident, flow_from_frames, stream
from dali_pipelines.frame_flow import FrameFlow
from dali_pipelines.frames import PairChoice, decode_frames, draw_offsets
from htnet.config import AugmentConfig, DataConfig, FlipConfig, JitterConfig, TimeJitterConfig
from htnet.data.flow.image import flow_images
from htnet.data.regions import mosaic
from htnet.data.store.frames import frame_member
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from htnet.errors import InputError

CPU = torch.device("cpu")
SIZE = 40
RECIPE = {"flow": {"method": "tvl1", "size": 28, "working_size": SIZE, "strain": "central"}, "keep_neighbours": 2}
JITTERED = AugmentConfig(time_jitter=TimeJitterConfig(frames=2))
DATA = DataConfig(input="frames", scaling="stored", standardise=False, augment=JITTERED)
RAW = FlowTransform(mosaic_size=28, minmax=False)
MEMBERS = [frame_member(part, offset) for part in ("onset", "apex") for offset in range(-2, 3)]


def write_frames(path: Path, recipe=RECIPE) -> Store:
    """Ten samples whose ten frames are ten different pictures each; the last two lack those beside the onset."""
    items = []
    for number, item in enumerate(islice(random_samples(), 10)):
        kept = [name for name in MEMBERS if number < 8 or not name.startswith(("onset-", "onset+"))]
        frames = tuple((name, jpeg(face(100 * number + MEMBERS.index(name)))) for name in kept)
        items.append(replace(item, frames=frames))
    return write_store(path, iter(items), recipe)


@pytest.fixture(scope="module")
def frames_store(tmp_path_factory) -> Store:
    return write_frames(tmp_path_factory.mktemp("frames") / "store")


def sampler_of(store: Store, **changes) -> EpochSampler:
    options = {"rows": tuple(range(len(store.rows))), "batch_size": 4, "seed": 11, "shuffle": True}
    return EpochSampler(**(options | changes))


def make_stream(
    store: Store, *, data=DATA, threads=1, state=None, cache_mb=2048, augment=JITTERED, device="cpu", **changes
) -> FlowStream:
    data = replace(data, cache_mb=cache_mb, augment=augment)
    sampler = sampler_of(store, **changes)
    place = {"device": torch.device(device), "threads": threads}
    resident = Resident(store, sampler.rows, data=data, mosaic_size=28, **place)
    return FlowStream(resident, sampler, augment=augment, transform=RAW, num_classes=3, state=state)


def take(batches: FlowStream, count: int) -> list[Batch]:
    return [batches.next() for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("rows", "labels", "images"):
            assert torch.equal(getattr(one, name), getattr(other, name))


FLOW_DIFFERS = {"cpu": 1e-5, "cuda:0": 2e-2}
"""Share of a mosaic's span between flow on the device and on the CPU, at most.

A solver stops when a step moves its pixels by less than 0.01 of one: where sums are added in another order, it may be
an iteration earlier or later. Float16, in which flow images are kept, rounds to 5e-4.
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_mb", [2048, 0], ids=["decoded once", "read at every step"])
def test_the_flow_is_that_of_the_very_frames_that_were_drawn(frames_store, cache_mb, device):
    """By the CPU's solver, of the frames as the device decodes them: decoders are compared elsewhere."""
    asked = [(row, name) for row in range(8) for name in MEMBERS]
    grey = dict(decode_frames(frames_store, asked, size=SIZE, device=torch.device(device), threads=1))
    batches = make_stream(frames_store, rows=range(8), cache_mb=cache_mb, device=device)
    sampler = sampler_of(frames_store, rows=range(8))
    for step in range(4):
        batch, offsets = batches.next(), draw_offsets(sampler, step, 2)
        for image, row, (first, second) in zip(batch.images.cpu(), batch.rows.tolist(), offsets.tolist(), strict=True):
            pair = (
                grey[row, frame_member(part, o)].squeeze(-1)[None].cpu().numpy()
                for part, o in (("onset", first), ("apex", second))
            )
            flow = flow_images(*pair, method="tvl1", size=28, strain="central", device=CPU)[0].astype(np.float32)
            wanted = mosaic(flow, frames_store.samples[row].landmarks, "anatomical").transpose(2, 0, 1)
            np.testing.assert_allclose(image.numpy(), wanted, atol=FLOW_DIFFERS[device] * np.ptp(wanted))


@pytest.mark.parametrize("kind", ["median", "landmarks"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_heads_motion_is_taken_out_as_the_stores_recipe_says(tmp_path, kind, device):
    store = write_frames(tmp_path / "store", RECIPE | {"flow": RECIPE["flow"] | {"head_motion": kind}})
    asked = [(row, f"{part}.jpg") for row in range(10) for part in ("onset", "apex")]
    grey = dict(decode_frames(store, asked, size=SIZE, device=torch.device(device), threads=1))
    read = flow_from_frames(store, range(10), device=torch.device(device), threads=1)
    options = {"method": "tvl1", "size": 28, "strain": "central", "device": CPU}
    for row in range(10):
        pair = [grey[row, f"{part}.jpg"].squeeze(-1)[None].cpu().numpy() for part in ("onset", "apex")]
        wanted = flow_images(*pair, **options, head_motion=kind, landmarks=[store.samples[row].landmarks])[0]
        limit = FLOW_DIFFERS[device] * np.ptp(wanted.astype(np.float32))
        np.testing.assert_allclose(read(row).astype(np.float32), wanted.astype(np.float32), atol=limit)
        assert not np.allclose(wanted, flow_images(*pair, **options)[0], atol=limit)


@pytest.mark.gpu
def test_a_gpus_decoder_gives_nearly_the_flow_of_the_cpus(frames_store):
    """Decoders differ by a few grey values (test_dali_pipelines_odd_pictures.py), and flow follows them."""
    expected, found = make_stream(frames_store), make_stream(frames_store, device="cuda:0")
    for _ in range(3):
        one, other = found.next().images.cpu(), expected.next().images
        assert (one - other).square().mean().sqrt() < 0.1 * other.square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("cache_mb", [0, 2048], ids=["read at every step", "decoded once"])
def test_dropped_streams_of_frames_leave_no_gpu_memory(frames_store, cache_mb):
    """Streams of frames that are dropped leave no GPU memory behind."""
    options = {"augment": JITTERED, "cache_mb": cache_mb, "device": "cuda:0"}
    assert least_growth_of_gpu_memory(lambda: make_stream(frames_store, **options).next(), 200) < 8


def test_onset_and_apex_have_offsets_of_their_own(frames_store):
    """Offsets are drawn for onset and apex each, and all of them equally often."""
    sampler = sampler_of(frames_store, batch_size=10)
    drawn = np.concatenate([draw_offsets(sampler, step, 2) for step in range(500)])
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == {(one, other) for one in range(-2, 3) for other in range(-2, 3)}
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert not draw_offsets(sampler, 3, 0).any()


def test_a_frame_that_was_not_kept_gives_way_to_the_nearest(frames_store):
    onsets, apexes = PairChoice(
        frames_store, sampler_of(frames_store, rows=(9,) * 64, batch_size=64), jitter=2
    ).pictures(0)
    assert {member for _, member in onsets} == {"onset.jpg"}
    assert {member for _, member in apexes} == {frame_member("apex", offset) for offset in range(-2, 3)}
    every = PairChoice(frames_store, sampler_of(frames_store, rows=(0, 9)), jitter=1).every_picture()
    assert len(every) == 6 + 4


EVERYTHING = replace(JITTERED, flip=FlipConfig(probability=0.5), jitter=JitterConfig(shift=0.05))


def test_threads_cache_and_work_ahead_change_no_batch(frames_store, monkeypatch):
    """Neither threads nor cache nor the work that is done ahead changes a batch."""
    undisturbed = take(make_stream(frames_store, augment=EVERYTHING), 7)
    assert not torch.equal(undisturbed[0].images, undisturbed[3].images)
    for options in ({"threads": 2}, {"cache_mb": 0}, {"cache_mb": 0, "threads": 2}):
        assert_same(take(make_stream(frames_store, augment=EVERYTHING, **options), 7), undisturbed)
    for ahead in (1, 4):
        monkeypatch.setattr(stream, "AHEAD", ahead)
        for cache_mb in (0, 2048):
            assert_same(take(make_stream(frames_store, augment=EVERYTHING, cache_mb=cache_mb), 7), undisturbed)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_resumed_at_any_step_goes_on_bit_for_bit(frames_store, device):
    undisturbed = take(make_stream(frames_store, device=device), 6)
    walking = make_stream(frames_store, device=device)
    for step in range(5):
        resumed = make_stream(frames_store, device=device, state=walking.state(), cache_mb=0 if step % 2 else 2048)
        assert_same(take(resumed, 6 - step), undisturbed[step:])
        assert_same([walking.next()], undisturbed[step : step + 1])


def test_a_rank_gets_its_part_of_the_batch_of_one_process(frames_store):
    """A rank gets its part of the very batch that one process would get."""
    whole = make_stream(frames_store)
    parts = [make_stream(frames_store, rank=rank, ranks=2) for rank in (0, 1)]
    for _ in range(3):
        batch = whole.next()
        for rank, part in enumerate(parts):
            mine = part.next()
            assert torch.equal(mine.rows, batch.rows[rank::2])
            assert torch.equal(mine.images, batch.images[rank::2])


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_without_changes_equals_flow_computed_once(frames_store, device):
    """If no frame changes, a step computes the very flow that is computed once."""
    sampler, placed = sampler_of(frames_store), {"device": torch.device(device), "threads": 1}
    once = flow_from_frames(frames_store, range(10), **placed)
    flow = FrameFlow(frames_store, sampler, augment=AugmentConfig(), **placed)
    for step in range(4):
        images = flow.next().half().cpu().numpy()
        assert np.array_equal(images, np.stack([once(row) for row in sampler.batch(step)]))


def test_a_batch_larger_than_the_data_holds_what_there_is(frames_store):
    batch = make_stream(frames_store, rows=(1, 2, 5), batch_size=64).next()
    assert sorted(batch.rows.tolist()) == [1, 2, 5]
    assert batch.images.shape == (3, 3, 28, 28)


def test_a_jitter_beyond_what_the_store_keeps_names_both_keys(frames_store):
    augment = AugmentConfig(time_jitter=TimeJitterConfig(frames=3))
    with pytest.raises(
        InputError, match=r"time_jitter\.frames=3 needs prepare\.keep_neighbours of at least 3, this store has 2"
    ):
        make_stream(frames_store, augment=augment)


def test_what_changes_frames_needs_frames():
    with pytest.raises(
        ValueError, match=r"augment\.time_jitter needs input=frames: with input=flow no flow is computed"
    ):
        DataConfig(augment=JITTERED)
    with pytest.raises(ValueError, match=r"frames\s+Input should be greater than or equal to 0 .*-1"):
        TimeJitterConfig(frames=-1)
