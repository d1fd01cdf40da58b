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
from torch.utils.dlpack import from_dlpack

from dali_pipelines.augment import needed
from dali_pipelines.batch import Batch
from dali_pipelines.frame_flow import FrameFlow, changes_frames
from dali_pipelines.graph import ChangeNodes, FlowTransform, decode, image_to_input, to_device
from dali_pipelines.mix import mix_batch
from dali_pipelines.sampler import EpochSampler, in_order
from dali_pipelines.source import ChangeSource, ImageSource, PlainSource, Reader, decoded_bytes, stored_bytes
from htnet.config import AugmentConfig, DataConfig, MixConfig
from htnet.data.store import Store, decode_flow
from htnet.errors import InputError

AHEAD = 2
"""Batches that DALI makes ready ahead of their use."""
_PLAIN = AugmentConfig()
_CHANGES: dict[str, tuple[Any, int]] = {
    "angle": (types.FLOAT, 0),
    "mirrored": (types.INT32, 0),
    "matrix": (types.FLOAT, 2),
    "starts": (types.INT32, 2),
    "side": (types.INT32, 1),
    "kept": (types.FLOAT, 1),
}
"""Fields of a change: DALI type and number of dimensions."""


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
        self._mix = data.augment.mix
        self._num_classes = num_classes
        if self._mix.kind != "none" and num_classes is None:
            raise ValueError("num_classes is needed to mix labels")
        self._step = 0 if state is None else _step_of(state)
        self._labels = torch.tensor([sample.label for sample in store.samples], dtype=torch.int64)
        self._resident: Batch | None = None
        limit = data.cache_mb << 20
        rows = sorted(set(sampler.rows))
        options: dict[str, Any]
        if not changes_pixels(data.augment) and len(rows) * 12 * transform.mosaic_size**2 <= limit:
            options = {"device": device, "threads": threads, "read": read}
            self._resident = load_set(store, rows, data=data, transform=transform, **options)
            self._place = {row: index for index, row in enumerate(rows)}
            return
        encoded, flows = read is None, None
        if changes_frames(data.augment):
            options = {"augment": data.augment, "method": data.frames_flow, "device": device, "threads": threads}
            flows = FrameFlow(store, sampler, first_step=self._step, cache_bytes=limit, ahead=AHEAD, **options)
            encoded = False
        elif encoded and decoded_bytes(store, rows) <= limit:
            images = {row: decode_flow(store.read_member(row, "flow.npy")) for row in rows}
            read, encoded = images.__getitem__, False
        self._pipeline = build_pipeline(
            store,
            sampler,
            flows or read or stored_bytes(store),
            encoded=encoded,
            data=data,
            transform=transform,
            device=device,
            threads=threads,
            first_step=self._step,
        )

    def next(self) -> Batch:
        """The next batch; its tensors are the caller's own."""
        batch = self._chosen() if self._resident is not None else self._computed()
        step, self._step = self._step, self._step + 1
        if self._num_classes is None:
            return batch
        sampler = self.sampler
        return mix_batch(
            batch, self._mix, num_classes=self._num_classes, seed=sampler.seed, step=step, rank=sampler.rank
        )

    def state(self) -> bytes:
        """What makes a new stream go on after the last batch that :meth:`next` returned."""
        return json.dumps({"step": self._step}).encode()

    def _chosen(self) -> Batch:
        assert self._resident is not None
        rows = torch.from_numpy(self.sampler.batch(self._step).copy())
        places = torch.tensor([self._place[row] for row in rows.tolist()], device=self.device)
        return Batch(images=self._resident.images[places], labels=self._resident.labels[places], rows=rows)

    def _computed(self) -> Batch:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, rows = self._pipeline.run(stream)
        # DALI uses its buffers again two batches later
        pixels = from_dlpack(images.as_tensor()).clone()
        indices = from_dlpack(rows.as_tensor()).flatten().clone()
        return Batch(images=pixels, labels=self._labels[indices].to(self.device, non_blocking=True), rows=indices)


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
    read: Reader | FrameFlow,
    *,
    encoded: bool,
    data: DataConfig,
    transform: FlowTransform,
    device: torch.device,
    threads: int,
    first_step: int,
) -> Pipeline:
    """The DALI pipeline that gives (images, rows) of the steps from ``first_step`` on.

    The flow images are those that ``read`` gives by row, or, where frames change, makes of a whole step's.
    """
    on_gpu, by_step = device.type == "cuda", isinstance(read, FrameFlow)
    augment = data.augment
    sides = {store.rows[row].sample.flow_size // 4 * 4 for row in set(sampler.rows)}
    resize = sides != {transform.mosaic_size} or augment.jitter.scale > 0
    pipeline = Pipeline(
        batch_size=-(-min(sampler.batch_size, len(sampler.rows)) // sampler.ranks),
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=sampler.seed,
        prefetch_queue_depth=AHEAD,
    )
    with pipeline:
        image = fn.external_source(
            source=read if by_step else ImageSource(sampler, read, first_step),
            device="gpu" if by_step and on_gpu else "cpu",
            batch=True,
            batch_info=True,
            dtype=types.UINT8 if encoded else types.FLOAT16,
            **({"ndim": 1} if encoded else {"layout": "HWC"}),
        )
        image = to_device(decode(image) if encoded else image, "gpu" if on_gpu else "cpu")
        names = needed(augment)
        plan: dict[str, Any] = {"crop": data.crop, "first_step": first_step}
        source = (
            ChangeSource(store, sampler, augment=augment, names=names, **plan)
            if changes_pixels(augment)
            else PlainSource(store, sampler, **plan)
        )
        nodes, rows = _change_nodes(source, names)
        images = image_to_input(image, nodes, transform=transform, resize=resize)
        pipeline.set_outputs(images, rows)
    pipeline.build()
    return pipeline


def _change_nodes(source: ChangeSource | PlainSource, names: tuple[str, ...]) -> tuple[ChangeNodes, Any]:
    kinds, ndims = zip(*(_CHANGES[name] for name in names), strict=True)
    *values, rows = fn.external_source(
        source=source,
        num_outputs=len(names) + 1,
        batch=True,
        batch_info=True,
        dtype=[*kinds, types.INT64],
        ndim=[*ndims, 1],
    )
    return ChangeNodes(**dict(zip(names, values, strict=True))), rows


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
        data=replace(data, augment=_PLAIN),
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
