"""Flow input of a fold: an endless, resumable stream of training batches, and whole sets at once.

The stream never ends an epoch inside DALI (an epoch is arithmetic on the step number), so prefetching
runs across epoch borders, and the state of a stream is DALI's own checkpoint of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from dali_pipelines.graph import FlowTransform, flow_to_input
from dali_pipelines.sampler import EpochSampler, in_order
from htnet.config import DataConfig
from htnet.data.regions import mosaic, region_starts, scale_minmax
from htnet.data.store import Store

_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Network input and what it belongs to, on the fold's device."""

    images: torch.Tensor
    """(B, 3, S, S) float32."""
    labels: torch.Tensor
    """(B,) int64."""
    rows: torch.Tensor
    """(B,) int64 on the CPU: the manifest's row of each sample."""


class FlowSource:
    """DALI's callback: the encoded bytes, region starts and row numbers of a step's samples.

    Holds no position: the step comes from DALI, whose checkpoint restores it.
    """

    def __init__(self, store: Store, sampler: EpochSampler, crop: Any) -> None:
        self.sampler = sampler
        samples = [store.rows[row].sample for row in range(len(store.rows))]
        self._starts = {
            row: region_starts(samples[row].landmarks, samples[row].flow_size, crop) for row in sampler.rows
        }
        self._side = {row: np.full(2, samples[row].flow_size // 4 * 2, np.int32) for row in sampler.rows}
        self._read = _cached_reader(store, sampler.rows)

    def __call__(self, info: Any) -> tuple[list[NDArray[Any]], ...]:
        rows = self.sampler.batch(info.iteration).tolist()
        return (
            [self._read(row) for row in rows],
            [self._starts[row] for row in rows],
            [self._side[row] for row in rows],
            [np.array([row], np.int64) for row in rows],
        )


def _cached_reader(store: Store, rows: Sequence[int]) -> Callable[[int], NDArray[np.uint8]]:
    """Encoded flow of a row; kept in memory when the whole set is small enough to be."""

    def read(row: int) -> NDArray[np.uint8]:
        return np.frombuffer(store.read_member(row, "flow.npy"), np.uint8)

    total = sum(store.rows[row].members["flow.npy"].bytes for row in rows)
    return functools.cache(read) if total <= _CACHE_BYTES else read


class FlowStream:
    """Endless batches in the sampler's order; ``state`` and the ``state`` argument resume it bit for bit."""

    def __init__(
        self,
        store: Store,
        sampler: EpochSampler,
        *,
        crop: Any,
        transform: FlowTransform,
        device: torch.device,
        threads: int,
        state: bytes | None = None,
    ) -> None:
        self.sampler = sampler
        self.device = device
        labels = [sample.label for sample in store.samples]
        self._labels = torch.tensor(labels, dtype=torch.int64)
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=min(sampler.batch_size, len(sampler.rows)),
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            seed=sampler.seed,
            prefetch_queue_depth=2,
            enable_checkpointing=True,
            checkpoint=state,
        )
        with self._pipeline:
            flow_bytes, starts, side, rows = fn.external_source(
                source=FlowSource(store, sampler, crop),
                num_outputs=4,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT64],
                ndim=[1, 2, 1, 1],
            )
            images = flow_to_input(flow_bytes, starts, side, transform=transform, device="gpu" if on_gpu else "cpu")
            self._pipeline.set_outputs(images, rows)
        self._pipeline.build()

    def next(self) -> Batch:
        """The next batch; its tensors are the caller's own."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, rows = self._pipeline.run(stream)
        # DALI uses its buffers again two batches later
        pixels = from_dlpack(images.as_tensor()).clone()
        indices = from_dlpack(rows.as_tensor()).flatten().clone()
        return Batch(images=pixels, labels=self._labels[indices].to(self.device, non_blocking=True), rows=indices)

    def state(self) -> bytes:
        """DALI's checkpoint after the last batch that :meth:`next` returned."""
        return bytes(self._pipeline.checkpoint())


def load_set(
    store: Store, rows: Sequence[int], *, data: DataConfig, transform: FlowTransform, device: torch.device, threads: int
) -> Batch:
    """A whole set through the same graph, in the order of ``rows``; for test and validation samples."""
    sampler = in_order(rows, batch_size=min(256, len(rows)))
    stream = FlowStream(store, sampler, crop=data.crop, transform=transform, device=device, threads=threads)
    batches = [stream.next() for _ in range(sampler.steps_per_epoch)]
    return Batch(
        images=torch.cat([batch.images for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        rows=torch.cat([batch.rows for batch in batches]),
    )


def fit_transform(store: Store, rows: Sequence[int], *, data: DataConfig, mosaic_size: int) -> FlowTransform:
    """The transform of a fold, with mean and standard deviation of its training mosaics where asked for.

    The statistics are of the training rows alone, in float64, before any resizing.
    """
    resize = any(store.rows[row].sample.flow_size // 4 * 4 != mosaic_size for row in range(len(store.rows)))
    minmax = data.scaling == "minmax"
    plain = FlowTransform(mosaic_size=mosaic_size, minmax=minmax, resize=resize)
    if not data.standardise:
        return plain
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for row in rows:
        sample, image = store.rows[row].sample, store.read_flow(row)
        scaled = scale_minmax(image) if minmax else image.astype(np.float32)
        pixels = mosaic(scaled, sample.landmarks, data.crop).astype(np.float64).reshape(-1, 3)
        sums, squares, count = sums + pixels.sum(0), squares + (pixels**2).sum(0), count + len(pixels)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    safe = np.where(std > 0, std, 1.0)
    return FlowTransform(
        mosaic_size=mosaic_size, minmax=minmax, resize=resize, mean=tuple(mean.tolist()), std=tuple(safe.tolist())
    )


def self_test(device: torch.device) -> None:
    """Run a small graph on the device; raises what DALI raises where it does not work."""
    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=(device.index or 0) if device.type == "cuda" else None, seed=0
    )
    with pipeline:
        image = fn.random.uniform(range=[0.0, 1.0], shape=[8, 8, 3])
        pipeline.set_outputs(fn.transpose(image.gpu() if device.type == "cuda" else image, perm=[2, 0, 1]))
    pipeline.build()
    pipeline.run()
