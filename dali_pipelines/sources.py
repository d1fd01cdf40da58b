"""Sources of a stream's images: resident on the device, or read and decoded by DALI at each step, to the same bits.

A third, :class:`dali_pipelines.frame_flow.FrameFlow`, computes flow at each step.
"""

from __future__ import annotations

from typing import Protocol

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines.callbacks import ImageSource, Reader, RegionSource
from dali_pipelines.graph import decode, image_to_mosaic, to_device
from dali_pipelines.sampler import EpochSampler
from htnet.config.data import CropRule
from htnet.data.store.reader import Store
from htnet.training.batch import send

AHEAD = 2
"""Batches that DALI makes ready ahead of their use."""


class Source(Protocol):
    """Images of a sampler's steps."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, ., .) on the device and the manifest's rows (B,) int64 on the CPU; the caller owns both.

        Steps are asked for one after the other, from the first step of the source.
        """
        ...


def rows_of(sampler: EpochSampler, step: int) -> Tensor:
    """Return the manifest's rows of a step, (B,) int64 on the CPU."""
    return torch.from_numpy(sampler.batch(step).copy())


class ResidentSource:
    """Images that stay on the device; ``images[i]`` is that of row ``rows[i]``."""

    def __init__(self, images: Tensor, rows: tuple[int, ...], sampler: EpochSampler) -> None:
        self._images, self._sampler = images, sampler
        place = torch.zeros(max(rows) + 1, dtype=torch.int64)
        place[list(rows)] = torch.arange(len(rows))
        self._place = place.to(images.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return any step's batch as :meth:`Source.batch` does."""
        rows = rows_of(self._sampler, step)
        return self._images[self._place[send(rows, self._images.device)]], rows


class StreamedSource:
    """Images that DALI reads, decodes and cuts ahead of their use.

    They are mosaics, (B, 3, S, S), or with ``mosaic_size`` None the flow images behind them, (B, 3, F, F); float32.

    Args:
        read: reader of flow images by row, encoded as (n,) uint8 or decoded as (F, F, 3) float16.
        encoded: True if ``read`` returns encoded ones.
        first_step: the first step that will be asked for.
    """

    def __init__(
        self,
        store: Store,
        sampler: EpochSampler,
        read: Reader,
        *,
        encoded: bool,
        crop: CropRule,
        minmax: bool,
        mosaic_size: int | None,
        device: torch.device,
        threads: int,
        first_step: int = 0,
    ) -> None:
        self._sampler, self._device = sampler, device
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=-(-min(sampler.batch_size, len(sampler.rows)) // sampler.ranks),
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            seed=sampler.seed,
            prefetch_queue_depth=AHEAD,
        )
        with self._pipeline:
            image = fn.external_source(
                source=ImageSource(sampler, read, first_step),
                batch=True,
                batch_info=True,
                dtype=types.UINT8 if encoded else types.FLOAT16,
                **({"ndim": 1} if encoded else {"layout": "HWC"}),
            )
            image = to_device(decode(image) if encoded else image, "gpu" if on_gpu else "cpu")
            if mosaic_size is not None:
                starts, side = fn.external_source(
                    source=RegionSource(store, sampler, crop=crop, first_step=first_step),
                    num_outputs=2,
                    batch=True,
                    batch_info=True,
                    dtype=types.INT32,
                    ndim=[2, 1],
                )
                sides = {store.rows[row].sample.flow_size // 4 * 4 for row in set(sampler.rows)}
                size = None if sides == {mosaic_size} else mosaic_size
                image = image_to_mosaic(image, starts, side, minmax=minmax, size=size)
            self._pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
        self._pipeline.build()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the next batch as :meth:`Source.batch` does; DALI counts the steps itself."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.run(stream)
        # DALI uses its buffers again two batches later
        return from_dlpack(images.as_tensor()).clone(), rows_of(self._sampler, step)
