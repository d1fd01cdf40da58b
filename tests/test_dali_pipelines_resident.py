"""Samples that folds share: read once, the same bits however they are kept, never another configuration's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types
from test_dali_pipelines_frame_flow import frames_store

from dali_pipelines import EpochSampler, FlowStream, FlowTransform, fit_transform, load_set, open_resident
from htnet.config import AugmentConfig, DataConfig, FlipConfig
from htnet.data.loso import loso_folds
from htnet.data.store.reader import Store
from htnet.data.transform import normalise

__all__ = ["frames_store"]  # the fixture

CPU = torch.device("cpu")
FLIPPED = AugmentConfig(flip=FlipConfig(probability=0.5))


def train(store: Store, fold, data: DataConfig) -> list[torch.Tensor]:
    """Images that a fold takes: two batches, and the test set."""
    rows = (*fold.train, *fold.test)
    resident = open_resident(store, rows, data=data, mosaic_size=28, device=CPU, threads=1)
    transform = fit_transform(resident, fold.train, standardise=data.standardise)
    sampler = EpochSampler(rows=fold.train, batch_size=7, seed=1, shuffle=True)
    stream = FlowStream(resident, sampler, augment=data.augment, transform=transform)
    return [stream.next().images, stream.next().images, load_set(resident, fold.test, transform).images]


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Reads of members of stores, by row and member, from here on."""
    counted: Counter = Counter()
    read = Store.read_member

    def count(self: Store, row: int, member: str) -> bytes:
        counted[row, member] += 1
        return read(self, row, member)

    monkeypatch.setattr(Store, "read_member", count)
    return counted


@pytest.mark.parametrize("source", ["flow", "frames"])
def test_a_store_is_read_once_for_all_folds(frames_store, reads, source):
    data = DataConfig(input=source, cache_mb=100)  # no other test's
    folds = loso_folds(frames_store)
    train(frames_store, folds[0], data)
    once = reads.total()
    for fold in folds:
        train(frames_store, fold, data)
    assert reads.total() == once > 0


@pytest.mark.parametrize("source", ["flow", "frames"])
@pytest.mark.parametrize("augment", [AugmentConfig(), FLIPPED], ids=["plain", "changed"])
def test_a_fold_is_the_same_kept_or_read_again(frames_store, augment, source):
    data, fold = DataConfig(augment=augment, input=source), loso_folds(frames_store)[1]
    kept, streamed = train(frames_store, fold, data), train(frames_store, fold, replace(data, cache_mb=0))
    assert all(map(torch.equal, kept, streamed))


def test_another_configuration_finds_nothing_of_the_last(tiny_store):
    fold, data = loso_folds(tiny_store)[0], DataConfig()
    first = train(tiny_store, fold, data)
    for changes in ({"scaling": "stored"}, {"crop": "upstream"}, {"standardise": False}):
        assert not torch.equal(train(tiny_store, fold, replace(data, **changes))[2], first[2])
    assert all(map(torch.equal, train(tiny_store, fold, data), first))


def test_normalising_has_the_bits_of_a_dali_graph():
    """Folds were normalised in DALI's graph once; their predictions stay what they were."""
    images = np.random.default_rng(0).normal(100, 60, (20, 3, 28, 28)).astype(np.float32)
    mean, std = np.float32([93.7, 101.3, 17.1]), np.float32([41.9, 0.37, 77.7])
    pipeline = Pipeline(20, 1, None, seed=0)
    with pipeline:
        image = fn.external_source(
            source=lambda: list(np.ascontiguousarray(images.transpose(0, 2, 3, 1))), layout="HWC"
        )
        scaled = (image - types.Constant(mean)) * types.Constant(np.float32(1.0) / std)
        pipeline.set_outputs(fn.transpose(scaled, perm=[2, 0, 1]))
    pipeline.build()
    (wanted,) = pipeline.run()
    transform = FlowTransform(mosaic_size=28, minmax=False, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    assert np.array_equal(normalise(torch.from_numpy(images), transform).numpy(), np.asarray(wanted.as_tensor()))
