"""Samples that all folds of a process share: decoded once, on the device, not normalised.

A fold is rows of them, and the mean and standard deviation of its training rows. A set larger than ``data.cache_mb`` is
read and decoded again at each use, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.callbacks import Reader, stored_bytes
from dali_pipelines.frame_flow import flow_from_frames
from dali_pipelines.sampler import EpochSampler, in_order
from dali_pipelines.sources import ResidentSource, Source, StreamedSource
from htnet.config import DataConfig
from htnet.data.store.reader import Store
from htnet.data.transform import FlowTransform, normalise
from htnet.training.batch import Batch

_BATCH = 256


class Resident:
    """Samples of a store on a device, decoded and cut at their first use, as ``data`` says.

    With ``data.input: frames`` their flow images are computed here, once, and stay in the CPU's memory.

    Args:
        rows: all rows that will be asked for.
        threads: DALI's CPU threads.

    Every method raises :class:`htnet.errors.InputError` for a damaged sample, and for frames or settings that
    ``data.input`` needs and the store lacks.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[int],
        *,
        data: DataConfig,
        mosaic_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.store, self.rows = store, tuple(sorted(set(rows)))
        self.device, self.threads, self.crop = device, threads, data.crop
        self.plain = FlowTransform(mosaic_size=mosaic_size, minmax=data.scaling == "minmax")
        """Transform of the mosaics in this object."""
        self.cache_bytes = data.cache_mb << 20
        self._encoded = data.input == "flow"

    @cached_property
    def labels(self) -> Tensor:
        """Labels of all rows of the store, int64, on the device."""
        return torch.tensor([sample.label for sample in self.store.samples], dtype=torch.int64, device=self.device)

    def source(self, sampler: EpochSampler, *, whole: bool, first_step: int = 0) -> Source:
        """Return a source of the sampler's mosaics, float32; ``whole``: of the flow images behind them, any floats."""
        images = self.images(whole=whole)
        if images is None:
            return self._streamed(sampler, whole=whole, first_step=first_step)
        return ResidentSource(images, self.rows, sampler)

    def images(self, *, whole: bool) -> Tensor | None:
        """Return all mosaics, or ``whole`` all flow images, in the order of ``rows``; None if they are too large."""
        return self._flow_images if whole else self._mosaics

    def mosaics(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yield the rows' mosaics in their order, (n, 3, S, S) float32 each; the caller owns them."""
        sampler = in_order(rows, batch_size=min(_BATCH, len(rows)))
        source = self.source(sampler, whole=False)
        return (source.batch(step)[0] for step in range(sampler.steps_per_epoch))

    def moments(self, rows: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute mean and standard deviation of the rows' mosaics per channel, (3,) each, in float64."""
        places = np.searchsorted(self.rows, rows)
        # added one after the other, in the order of the rows
        sums, squares = (np.cumsum(each[places], axis=0)[-1] for each in self._sums)
        count = len(places) * self.plain.mosaic_size**2
        mean = sums / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))

    @cached_property
    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums and sums of squares of the channels of each mosaic, (n, 3) each."""
        sums, squares = [], []
        for part in self.mosaics(self.rows):
            for image in part.cpu().numpy():
                pixels: NDArray[np.float64] = image.transpose(1, 2, 0).astype(np.float64).reshape(-1, 3)
                sums.append(pixels.sum(0))
                squares.append((pixels**2).sum(0))
        return np.stack(sums), np.stack(squares)

    @cached_property
    def _read(self) -> Reader:
        """Reader of flow images by row: as stored, or computed from the store's frames, all at the first use."""
        if self._encoded:
            return stored_bytes(self.store)
        return flow_from_frames(self.store, self.rows, device=self.device, threads=self.threads)

    @property
    def _mosaic_bytes(self) -> int:
        return len(self.rows) * 12 * self.plain.mosaic_size**2

    @cached_property
    def _mosaics(self) -> Tensor | None:
        """All mosaics, (n, 3, S, S) float32; None if they are too large to keep."""
        if self._mosaic_bytes > self.cache_bytes:
            return None
        sampler = in_order(self.rows, batch_size=min(_BATCH, len(self.rows)))
        source = self._streamed(sampler, whole=False)
        return torch.cat([source.batch(step)[0] for step in range(sampler.steps_per_epoch)])

    @cached_property
    def _flow_images(self) -> Tensor | None:
        """All flow images, (n, 3, F, F) float16; None if they are too large to keep beside the mosaics."""
        size = sum(self.store.samples[row].flow_size ** 2 * 6 for row in self.rows)
        if size + self._mosaic_bytes > self.cache_bytes:
            return None
        read = self.store.read_flow if self._encoded else self._read
        images = torch.from_numpy(np.stack([read(row) for row in self.rows]))
        return images.permute(0, 3, 1, 2).contiguous().to(self.device)

    def _streamed(self, sampler: EpochSampler, *, whole: bool, first_step: int = 0) -> StreamedSource:
        options: dict[str, Any] = {"encoded": self._encoded, "crop": self.crop, "minmax": self.plain.minmax}
        options |= {"device": self.device, "threads": self.threads, "first_step": first_step}
        size = None if whole else self.plain.mosaic_size
        return StreamedSource(self.store, sampler, self._read, mosaic_size=size, **options)


_kept: dict[Any, Resident] = {}


def open_resident(
    store: Store, rows: Sequence[int], *, data: DataConfig, mosaic_size: int, device: torch.device, threads: int
) -> Resident:
    """Return the :class:`Resident` of these arguments, made now or kept from the last call of this process.

    Stores are compared by their digest. Only one is kept, so that ``data.cache_mb`` limits the memory of a process
    through all its folds.
    """
    settings = (data.input, data.crop, data.scaling, data.cache_mb, mosaic_size, device, threads)
    key = (store.digest, tuple(sorted(set(rows))), settings)
    if key not in _kept:
        _kept.clear()
        _kept[key] = Resident(store, rows, data=data, mosaic_size=mosaic_size, device=device, threads=threads)
    return _kept[key]


def fit_transform(resident: Resident, rows: Sequence[int], *, standardise: bool) -> FlowTransform:
    """Return the transform of a fold that trains on the rows, with their mean and standard deviation if asked for."""
    if not standardise:
        return resident.plain
    mean, std = resident.moments(rows)
    safe = np.where(std > 0, std, 1.0)
    return replace(resident.plain, mean=tuple(mean.tolist()), std=tuple(safe.tolist()))


def load_set(resident: Resident, rows: Sequence[int], transform: FlowTransform) -> Batch:
    """Load a whole set, unchanged and in the order of ``rows``; for tests and validation."""
    images = normalise(torch.cat(list(resident.mosaics(rows))), transform)
    chosen = torch.tensor(list(rows), dtype=torch.int64)
    return Batch(images=images, labels=resident.labels[chosen.to(resident.device)], rows=chosen)
