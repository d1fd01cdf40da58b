"""Batches of a fold: an endless, resumable stream of training batches, and whole sets at once.

The stream never ends an epoch inside DALI (an epoch is arithmetic on the step number), so prefetching runs across
epoch borders. Everything in it is a function of the step: order, changes, mixing. The step number is therefore its
whole state, and neither a thread, a cache nor an interruption can change a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines.augment import Places, draw, plan_changes
from dali_pipelines.callbacks import ImageSource, Reader, RegionSource, RowSource, decoded_bytes, stored_bytes
from dali_pipelines.frame_flow import FrameFlow, changes_frames
from dali_pipelines.graph import FlowTransform, decode, image_to_input, to_device
from dali_pipelines.mix import mix_batch
from dali_pipelines.resample import changed_mosaics
from dali_pipelines.sampler import EpochSampler, in_order
from htnet.config import AugmentConfig, DataConfig, MixConfig
from htnet.data.store.writer import Store
from htnet.errors import InputError
from htnet.training.batch import Batch, sent

AHEAD = 2
"""Batches that DALI makes ready ahead of their use."""
_PLAIN = AugmentConfig()


class FlowStream:
    """Endless batches in the sampler's order; ``state`` and the ``state`` argument resume it bit for bit.

    Sets that fit into ``data.cache_mb`` stay on the device: finished, where a batch is nothing but a choice of
    samples; decoded, where training changes them. Larger ones are read and decoded again by DALI, ahead of their use.

    Args:
        store: where the samples are.
        sampler: which samples come when.
        data: crop rule, cache size, augmentation.
        transform: the fold's, from :func:`fit_transform`.
        device: where the batches are made.
        threads: DALI's CPU threads.
        num_classes: classes of the labels; needed where samples are mixed.
        state: from :meth:`state`.
        read: encoded or decoded flow images by row, instead of the store's.
    """

    def __init__(
        self,
        store: Store,
        sampler: EpochSampler,
        *,
        data: DataConfig,
        transform: FlowTransform,
        device: torch.device,
        threads: int,
        num_classes: int | None = None,
        state: bytes | None = None,
        read: Reader | None = None,
    ) -> None:
        self.sampler = sampler
        self.device = device
        self._augment, self._crop, self._transform = data.augment, data.crop, transform
        self._num_classes = num_classes
        if data.augment.mix.kind != "none" and num_classes is None:
            raise ValueError("num_classes is needed to mix labels")
        self._step = 0 if state is None else _step_of(state)
        self._labels = torch.tensor([sample.label for sample in store.samples], dtype=torch.int64)
        self._places = Places.of(store.samples)
        self._changes = changes_pixels(data.augment)
        limit = data.cache_mb << 20
        rows = sorted(set(sampler.rows))
        self._flows: FrameFlow | None = None
        self._resident: Tensor | None = None
        placed: dict[str, Any] = {"device": device, "threads": threads}
        if self._changes:
            _check_one_size(store, rows)
        if changes_frames(data.augment):
            options = {
                "augment": data.augment,
                "cache_bytes": limit,
                "ahead": AHEAD,
                **placed,
            }
            self._flows = FrameFlow(store, sampler, first_step=self._step, **options)
            return
        if self._changes and decoded_bytes(store, rows) <= limit:
            self._resident = _decoded(store, rows, read).to(device)
        elif not self._changes and len(rows) * 12 * transform.mosaic_size**2 <= limit:
            self._resident = load_set(store, rows, data=data, transform=transform, read=read, **placed).images
        if self._resident is not None:
            self._place = torch.zeros(len(store.rows), dtype=torch.int64)
            self._place[rows] = torch.arange(len(rows))
            self._place = self._place.to(device)
            return
        self._pipeline = build_pipeline(
            store,
            sampler,
            read or stored_bytes(store),
            encoded=read is None,
            data=data,
            transform=transform,
            first_step=self._step,
            whole=self._changes,
            **placed,
        )

    def next(self) -> Batch:
        """The next batch; its tensors are the caller's own."""
        step = self._step
        images, rows = self._chosen(step) if self._resident is not None else self._computed()
        sampler = self.sampler
        if self._changes:
            draws = draw(sampler.seed, step, sampler.size_of(step), rank=sampler.rank, ranks=sampler.ranks)
            changes = plan_changes(self._augment, draws, places=self._places.chosen(rows.numpy()), rule=self._crop)
            images = changed_mosaics(images, changes, self._transform)
        self._step += 1
        self._labels = self._labels.to(self.device)  # at the first step; they stay there
        batch = Batch(images=images, labels=self._labels[sent(rows, self.device)], rows=rows)
        if self._num_classes is None:
            return batch
        options = {"num_classes": self._num_classes, "seed": sampler.seed, "step": step, "rank": sampler.rank}
        return mix_batch(batch, self._augment.mix, **options)

    def state(self) -> bytes:
        """What makes a new stream go on after the last batch that :meth:`next` returned."""
        return json.dumps({"step": self._step}).encode()

    def _chosen(self, step: int) -> tuple[Tensor, Tensor]:
        """Images that stay on the device, mosaics or whole flow images, and rows of a step."""
        assert self._resident is not None
        rows = torch.from_numpy(self.sampler.batch(step).copy())
        return self._resident[self._place[sent(rows, self.device)]], rows

    def _computed(self) -> tuple[Tensor, Tensor]:
        """The same from the pipeline, which counts the steps itself."""
        if self._flows is not None:
            # rounded as flow images are that are stored or kept
            flow_images = self._flows.next().half().permute(0, 3, 1, 2)
            return flow_images, torch.from_numpy(self.sampler.batch(self._step).copy())
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, rows = self._pipeline.run(stream)
        # DALI uses its buffers again two batches later
        return from_dlpack(images.as_tensor()).clone(), from_dlpack(rows.as_tensor()).flatten().clone()


def _decoded(store: Store, rows: Sequence[int], read: Reader | None) -> Tensor:
    """Whole flow images, (n, 3, F, F) float16."""
    read = read or store.read_flow
    return torch.from_numpy(np.stack([read(row) for row in rows])).permute(0, 3, 1, 2).contiguous()


def _check_one_size(store: Store, rows: Sequence[int]) -> None:
    sizes = {store.samples[row].flow_size: row for row in rows}
    if len(sizes) > 1:
        named = ", ".join(f"{store.samples[row].id} has {size}" for size, row in sorted(sizes.items()))
        raise InputError(f"{store.path}: data.augment needs flow images of one size: {named}")


def changes_pixels(augment: AugmentConfig) -> bool:
    """Whether a sample's mosaic differs from epoch to epoch; mixing does not change it, it comes after."""
    return replace(augment, mix=MixConfig()) != _PLAIN


def _step_of(state: bytes) -> int:
    try:
        step = json.loads(state)["step"]
    except (ValueError, KeyError, TypeError):
        raise InputError("the checkpoint's input state is not one of this version; delete it to start again") from None
    return int(step)


def build_pipeline(
    store: Store,
    sampler: EpochSampler,
    read: Reader,
    *,
    encoded: bool,
    data: DataConfig,
    transform: FlowTransform,
    device: torch.device,
    threads: int,
    first_step: int,
    whole: bool = False,
) -> Pipeline:
    """The DALI pipeline that gives (images, rows) of the steps from ``first_step`` on.

    Images are mosaics, (3, S, S), or with ``whole`` the flow images that they are cut from, (3, F, F), float32.
    """
    on_gpu = device.type == "cuda"
    sides = {store.rows[row].sample.flow_size // 4 * 4 for row in set(sampler.rows)}
    pipeline = Pipeline(
        batch_size=-(-min(sampler.batch_size, len(sampler.rows)) // sampler.ranks),
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=sampler.seed,
        prefetch_queue_depth=AHEAD,
    )
    with pipeline:
        image = fn.external_source(
            source=ImageSource(sampler, read, first_step),
            batch=True,
            batch_info=True,
            dtype=types.UINT8 if encoded else types.FLOAT16,
            **({"ndim": 1} if encoded else {"layout": "HWC"}),
        )
        image = to_device(decode(image) if encoded else image, "gpu" if on_gpu else "cpu")
        if whole:
            rows = fn.external_source(
                source=RowSource(sampler, first_step), batch=True, batch_info=True, dtype=types.INT64, ndim=1
            )
            images = fn.transpose(image, perm=[2, 0, 1])
        else:
            starts, side, rows = fn.external_source(
                source=RegionSource(store, sampler, crop=data.crop, first_step=first_step),
                num_outputs=3,
                batch=True,
                batch_info=True,
                dtype=[types.INT32, types.INT32, types.INT64],
                ndim=[2, 1, 1],
            )
            resize = sides != {transform.mosaic_size}
            images = image_to_input(image, starts, side, transform=transform, resize=resize)
        pipeline.set_outputs(images, rows)
    pipeline.build()
    return pipeline


def load_set(
    store: Store,
    rows: Sequence[int],
    *,
    data: DataConfig,
    transform: FlowTransform,
    device: torch.device,
    threads: int,
    read: Reader | None = None,
) -> Batch:
    """A whole set through the same graph, unchanged and in the order of ``rows``; for tests and validation."""
    sampler = in_order(rows, batch_size=min(256, len(rows)))
    pipeline = build_pipeline(
        store,
        sampler,
        read or stored_bytes(store),
        encoded=read is None,
        data=data,
        transform=transform,
        device=device,
        threads=threads,
        first_step=0,
    )
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    parts = []
    for _ in range(sampler.steps_per_epoch):
        parts.append(from_dlpack(pipeline.run(stream)[0].as_tensor()).clone())
    labels = torch.tensor([store.samples[row].label for row in rows], dtype=torch.int64, device=device)
    return Batch(images=torch.cat(parts), labels=labels, rows=torch.tensor(list(rows), dtype=torch.int64))


def fit_transform(
    store: Store, rows: Sequence[int], *, data: DataConfig, mosaic_size: int, read: Reader | None = None
) -> FlowTransform:
    """The transform of a fold, with mean and standard deviation of its training mosaics where asked for.

    The statistics are those of the network's input before normalisation, of the training rows alone, in float64.
    """
    plain = FlowTransform(mosaic_size=mosaic_size, minmax=data.scaling == "minmax")
    if not data.standardise:
        return plain
    images = load_set(
        store, rows, data=data, transform=plain, device=torch.device("cpu"), threads=1, read=read
    ).images.numpy()
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for image in images:
        pixels: NDArray[np.float64] = image.transpose(1, 2, 0).astype(np.float64).reshape(-1, 3)
        sums, squares, count = sums + pixels.sum(0), squares + (pixels**2).sum(0), count + len(pixels)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    safe = np.where(std > 0, std, 1.0)
    return replace(plain, mean=tuple(mean.tolist()), std=tuple(safe.tolist()))


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
