"""Guarantees of a fold's input: right pixels, right order, resumable, and the same in every process."""

from __future__ import annotations

import gc
import hashlib
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, random_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dali_pipelines import (
    Batch,
    EpochSampler,
    FlowStream,
    FlowTransform,
    Resident,
    fit_transform,
    load_set,
)
from htnet.config import Config, DataConfig, EngineConfig, PrepareConfig, SourceConfig
from htnet.data.datasets.htnet_release import HTNetRelease
from htnet.data.datasets.schemes import load_scheme
from htnet.data.loso import loso_folds
from htnet.data.regions import mosaic, scale_minmax
from htnet.data.store.reader import Store, open_store
from htnet.data.store.writer import write_store
from htnet.errors import InputError
from htnet.training.engine import resolve_device
from launch.commands.prepare import prepare

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
RAW = FlowTransform(mosaic_size=28, minmax=False)
STREAMED = DataConfig(cache_mb=0, scaling="stored")


def samples_of(store: Store, rows, data: DataConfig, *, device=CPU, threads=1) -> Resident:
    return Resident(store, rows, data=data, mosaic_size=28, device=device, threads=threads)


def fitted(store: Store, rows, data: DataConfig) -> FlowTransform:
    return fit_transform(samples_of(store, rows, data), rows, standardise=data.standardise)


def make_stream(
    store: Store, rows=range(20), batch_size=7, *, seed=5, data=STREAMED, device=CPU, threads=1, state=None,
    transform=RAW,
) -> FlowStream:  # fmt: skip
    sampler = EpochSampler(rows=tuple(rows), batch_size=batch_size, seed=seed, shuffle=True)
    resident = samples_of(store, rows, data, device=device, threads=threads)
    return FlowStream(resident, sampler, augment=data.augment, transform=transform, state=state)


def take(stream: FlowStream, count: int) -> list[Batch]:
    return [stream.next() for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def expected_input(store: Store, row: int, data: DataConfig, transform: FlowTransform) -> np.ndarray:
    """The plain numpy statement of the input of one sample, (3, S, S)."""
    image = store.read_flow(row)
    scaled = scale_minmax(image) if data.scaling == "minmax" else image.astype(np.float32)
    pixels = mosaic(scaled, store.samples[row].landmarks, data.crop)
    return ((pixels - np.float32(transform.mean)) / np.float32(transform.std)).transpose(2, 0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("scaling", ["stored", "minmax"])
@pytest.mark.parametrize("crop", ["upstream", "anatomical"])
def test_the_graph_computes_what_the_numpy_statement_says(tiny_store, crop, scaling, standardise, device):
    data = DataConfig(crop=crop, scaling=scaling, standardise=standardise)
    rows = range(len(tiny_store.rows))
    transform = fitted(tiny_store, rows, data)
    batch = load_set(samples_of(tiny_store, rows, data, device=torch.device(device)), rows, transform)
    assert batch.images.shape == (30, 3, 28, 28)
    assert batch.images.dtype == torch.float32
    assert str(batch.images.device) == str(batch.labels.device) == device
    assert batch.rows.tolist() == list(rows)
    assert batch.labels.tolist() == [sample.label for sample in tiny_store.samples]
    wanted = np.stack([expected_input(tiny_store, row, data, transform) for row in rows])
    if not standardise and device == "cpu":
        assert np.array_equal(batch.images.numpy(), wanted)
    np.testing.assert_allclose(batch.images.cpu().numpy(), wanted, rtol=2e-6, atol=2e-6)


def test_upstreams_mosaics_of_the_release_come_out_exactly(shared_data, tmp_path):
    """Upstream's mosaics of the published release come out exactly."""
    release = shared_data / "htnet_release"
    golden = np.load(release / "regions_golden.npz")["regions"]
    config = Config(prepare=PrepareConfig(sources=(SourceConfig(adapter="htnet_release", root=str(release)),)))
    assert prepare(config, tmp_path / "store", Console(quiet=True)) == 0
    store = open_store(tmp_path / "store")
    # the golden mosaics are in the order of the label list, the store's rows are sorted by subject
    place = {sample.id: row for row, sample in enumerate(store.samples)}
    scheme = load_scheme("megc2019_3class", ["casme2", "samm", "smic"])
    order = [place[entry.id] for entry in HTNetRelease(root=release, scheme=scheme).entries()]
    data = DataConfig(crop="upstream", scaling="stored", standardise=False)
    transform = fitted(store, order, data)
    batch = load_set(samples_of(store, order, data), order, transform)
    # upstream keeps OpenCV's channel order (strain, v, u)
    mosaics = batch.images.numpy().transpose(0, 2, 3, 1)[..., ::-1]
    assert mosaics.shape == golden.shape == (442, 28, 28, 3)
    assert np.array_equal(mosaics, golden.astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 2**31 - 1), shuffle=st.booleans())
def test_every_epoch_visits_every_row_once(count, batch_size, seed, shuffle):
    rows = tuple(range(100, 100 + count))
    sampler = EpochSampler(rows=rows, batch_size=batch_size, seed=seed, shuffle=shuffle)
    steps = sampler.steps_per_epoch
    for epoch in (0, 1, 7):
        batches = [sampler.batch(epoch * steps + step) for step in range(steps)]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
        assert 0 < len(batches[-1]) <= batch_size
        visited = np.concatenate(batches)
        assert sorted(visited) == list(rows)
        assert shuffle or visited.tolist() == list(rows)


def test_a_shuffled_order_differs_by_epoch_and_seed():
    """The order differs between epochs and between seeds, and only when it is shuffled."""

    def order(epoch, **changes):
        return EpochSampler(
            **({"rows": tuple(range(40)), "batch_size": 8, "seed": 1, "shuffle": True} | changes)
        ).epoch(epoch)

    assert order(0).tolist() == order(0).tolist() == order(0, batch_size=3).tolist()
    assert order(0).tolist() != order(1).tolist()
    assert order(0).tolist() != order(0, seed=2).tolist()
    assert order(0, shuffle=False).tolist() == order(5, shuffle=False).tolist() == list(range(40))


def test_a_sampler_needs_rows_and_a_batch_size():
    """A sampler without rows or with an empty batch is refused."""
    with pytest.raises(ValueError, match="at least one row"):
        EpochSampler(rows=(), batch_size=1, seed=0, shuffle=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EpochSampler(rows=(1,), batch_size=0, seed=0, shuffle=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(20, 7, [7, 7, 6]), (20, 10, [10, 10]), (5, 8, [5]), (1, 1, [1]), (1, 64, [1]), (9, 4, [4, 4, 1])],
)
def test_the_last_short_batch_is_kept_in_every_epoch(tiny_store, count, batch_size, sizes, device):
    stream = make_stream(tiny_store, range(count), batch_size, device=torch.device(device))
    for _ in range(3):
        batches = take(stream, len(sizes))
        assert [len(batch.images) for batch in batches] == [len(batch.labels) for batch in batches] == sizes
        assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(count))
        for batch in batches:
            assert batch.labels.tolist() == [tiny_store.samples[row].label for row in batch.rows]


def fingerprint(store: Store, threads: int) -> str:
    transform = fitted(store, range(20), DataConfig())
    digest = hashlib.sha256()
    for batch in take(make_stream(store, threads=threads, transform=transform), 7):
        digest.update(batch.rows.numpy().tobytes() + batch.labels.numpy().tobytes() + batch.images.numpy().tobytes())
    return digest.hexdigest()


def test_batches_depend_on_neither_threads_nor_process(tiny_store):
    here = fingerprint(tiny_store, threads=1)
    assert fingerprint(tiny_store, threads=2) == here
    code = (
        "import sys; from pathlib import Path; import test_dali_pipelines_flow as t; "
        "print(t.fingerprint(t.open_store(Path(sys.argv[1])), threads=2))"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", code, str(tiny_store.path)]
    there = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_resumed_at_any_step_goes_on_bit_for_bit(tiny_store, device):
    place = torch.device(device)
    undisturbed = take(make_stream(tiny_store, device=place), 8)  # two epochs of 7 + 7 + 6, and two more
    walking = make_stream(tiny_store, device=place)
    for step in range(7):
        state = walking.state()
        assert isinstance(state, bytes)
        assert_same(take(make_stream(tiny_store, device=place, state=state), 8 - step), undisturbed[step:])
        # asking for the state changes nothing
        assert_same([walking.next()], undisturbed[step : step + 1])


def test_a_batch_stays_as_it_is_while_the_stream_goes_on(tiny_store):
    stream = make_stream(tiny_store)
    first = stream.next()
    copy = first.images.clone()
    take(stream, 6)
    assert torch.equal(first.images, copy)


@pytest.mark.parametrize("scaling", ["stored", "minmax"])
def test_the_statistics_are_those_of_the_training_rows_alone(tiny_store, scaling):
    data = DataConfig(scaling=scaling)
    plain = replace(data, standardise=False)
    fold = loso_folds(tiny_store)[4]
    transform = fitted(tiny_store, fold.train, data)
    pixels = np.stack([expected_input(tiny_store, row, plain, RAW) for row in fold.train]).astype(np.float64)
    np.testing.assert_allclose(transform.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(transform.std, pixels.std(axis=(0, 2, 3)), rtol=1e-9)
    everything = fitted(tiny_store, (*fold.train, *fold.test), data)
    assert transform.mean != everything.mean
    train = load_set(samples_of(tiny_store, fold.train, data), fold.train, transform).images
    torch.testing.assert_close(train.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_flow_image_without_motion_gives_finite_input(tmp_path):
    samples = list(islice(random_samples(), 3))
    still = np.full((28, 28, 3), 2.5, np.float16)
    faint = np.zeros((28, 28, 3), np.float16)
    faint[3, 4] = np.float16(6e-8)  # the smallest step that float16 has
    store = write_store(
        tmp_path / "store",
        iter([replace(samples[0], flow_image=still), replace(samples[1], flow_image=faint), samples[2]]),
        {},
    )
    for rows in ([0], [0, 1], [0, 1, 2]):
        transform = fitted(store, rows, DataConfig())
        batch = load_set(samples_of(store, rows, DataConfig()), rows, transform)
        assert torch.isfinite(batch.images).all()
    raw = load_set(samples_of(store, [0, 1], DataConfig()), [0, 1], replace(RAW, minmax=True)).images
    assert (raw[0] == 0).all()
    assert raw[1].max() <= 255.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("flow_size", "tolerance"), [(40, 0.06), (24, 0.01), (30, 0.0)])
def test_a_flow_of_another_size_is_resized_as_opencv_would(tmp_path, flow_size, tolerance, device):
    samples = list(islice(random_samples(flow_size=flow_size), 6))
    smooth = [
        replace(item, flow_image=cv2.GaussianBlur(item.flow_image.astype(np.float32), (0, 0), 3.0).astype(np.float16))
        for item in samples
    ]
    store = write_store(tmp_path / "store", iter(smooth), {})
    data = DataConfig(scaling="stored", standardise=False)
    transform = fitted(store, range(6), data)
    batch = load_set(samples_of(store, range(6), data, device=torch.device(device)), range(6), transform)
    assert batch.images.shape == (6, 3, 28, 28)
    for row, image in enumerate(batch.images.cpu().numpy()):
        pixels = mosaic(store.read_flow(row).astype(np.float32), store.samples[row].landmarks, data.crop)
        how = cv2.INTER_AREA if flow_size > 30 else cv2.INTER_LINEAR
        side = len(pixels) // 2
        quarters = [pixels[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
        resized = [cv2.resize(quarter, (14, 14), interpolation=how) for quarter in quarters]
        wanted = np.vstack([np.hstack(resized[:2]), np.hstack(resized[2:])]).transpose(2, 0, 1)
        assert np.abs(image - wanted).mean() <= tolerance * wanted.std()
        assert np.corrcoef(image.ravel(), wanted.ravel())[0, 1] > 0.98


def test_flow_images_of_two_sizes_share_a_batch(tmp_path):
    mixed = [*random_samples(datasets=("casme2",)), *random_samples(datasets=("samm",), flow_size=64)]
    store = write_store(tmp_path / "store", iter(mixed), {})
    rows = range(len(mixed))
    transform = fitted(store, rows, DataConfig())
    batch = load_set(samples_of(store, rows, DataConfig()), rows, transform)
    assert batch.images.shape == (len(mixed), 3, 28, 28)
    small = load_set(samples_of(store, range(10), DataConfig()), range(10), transform)
    # a mosaic that has the network's size already is not touched by the resizing
    torch.testing.assert_close(batch.images[:10], small.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", [EngineConfig(device="cuda"), EngineConfig(device="auto")])
def test_a_gpu_that_is_not_there_is_one_clear_sentence(engine, monkeypatch):
    """A GPU that is asked for where there is none is reported in one clear sentence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no CUDA device is visible; set engine\.device=cpu") as caught:
        resolve_device(engine, 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_pipeline_without_a_gpu_fails_when_it_is_built(tiny_store):
    with pytest.raises(RuntimeError, match="CUDA"):
        make_stream(tiny_store, device=torch.device("cuda", 0))


def damaged_copy(store: Store, folder: Path, row: int) -> Store:
    """The store with one byte of one flow image turned round; sizes as before."""
    for path in store.path.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(store.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    shard = folder / store.rows[row].shard
    data = bytearray(shard.read_bytes())
    data[store.rows[row].members["flow.npy"].start + 200] ^= 0xFF
    shard.write_bytes(data)
    return open_store(folder)


@pytest.mark.parametrize("standardise", [False, True])
def test_a_damaged_member_is_an_error_that_names_the_sample(tiny_store, tmp_path, standardise):
    store = damaged_copy(tiny_store, tmp_path / "store", 3)
    data = DataConfig(standardise=standardise)
    with pytest.raises(InputError, match=r"sub01\.tar: flow\.npy of casme2/sub01/EP00 is damaged"):
        transform = fitted(store, range(10), data)
        take(make_stream(store, range(10), 4, transform=transform), 3)
    with pytest.raises(InputError, match=r"casme2/sub01/EP00 is damaged"):
        load_set(samples_of(store, [3], data), [3], RAW)
    # the other subjects' samples are as good as before
    assert len(load_set(samples_of(store, [0, 1], data), [0, 1], RAW).images) == 2


def resident_mebibytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def held() -> tuple[int, int]:
    """File handles and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def growth(use: Callable[[], object], times: int) -> tuple[int, int, float]:
    """Handles, threads and mebibytes that are more after ``use`` ran ``times`` times, pools having had their size."""

    def repeat(count: int) -> None:
        for _ in range(count):
            use()
        gc.collect()

    repeat(10)
    (files, threads), memory = held(), resident_mebibytes()
    repeat(times)
    files_now, threads_now = held()
    return files_now - files, threads_now - threads, resident_mebibytes() - memory


def assert_nothing_is_left_by(use: Callable[[], object], times: int) -> None:
    """``use`` makes and drops something, and can be pickled.

    In a process of its own: in this one, what other tests have started may open a handle at any time.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        files, threads, memory = pool.apply(growth, (use, times))
    assert files <= 0
    assert threads <= 1
    assert memory < 20


def make_and_drop(make: Callable[..., FlowStream], store: Store, options: dict) -> None:
    make(store, **options).next()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_pipelines_that_are_dropped_leave_nothing_behind(tiny_store):
    assert_nothing_is_left_by(partial(make_and_drop, make_stream, tiny_store, {}), 200)


def least_growth_of_gpu_memory(use: Callable[[], object], times: int) -> float:
    """Mebibytes that the GPU has less of after ``use`` was done ``times`` times, once its pools have their size.

    The least of four parts, for the tests beside this one may take memory of the same GPU meanwhile; what leaks grows
    in each.
    """

    def free() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    for _ in range(10):
        use()
    marks = [free()]
    for _ in range(4):
        for _ in range(times // 4):
            use()
        marks.append(free())
    return min(before - after for before, after in itertools.pairwise(marks)) / 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("cache_mb", [0, 2048], ids=["streamed", "resident"])
def test_streams_that_are_dropped_leave_no_gpu_memory_behind(tiny_store, cache_mb):
    options = {"data": DataConfig(cache_mb=cache_mb), "device": torch.device("cuda", 0)}
    assert least_growth_of_gpu_memory(lambda: make_stream(tiny_store, **options).next(), 200) < 8
