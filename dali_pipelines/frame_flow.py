"""Flow images from stored frames (``data.input: frames``): once per fold, or at every step where the frames change.

DALI decodes and resizes, the project's TV-L1 runs on the same device, a batch at a time, and what comes out takes the
place of the stored flow images: their changes and regions are the same code. The flow image of a sample
depends on its two pictures alone, so that both ways give the same bits where nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from dali_pipelines.callbacks import Reader
from dali_pipelines.frames import (
    PairChoice,
    PairSource,
    Picture,
    decode_frames,
    encoded_picture,
    new_pipeline,
    run,
    to_grey,
)
from dali_pipelines.photometric import FIELDS, PhotometricSource, change_light, needed, photometric_nodes
from dali_pipelines.sampler import EpochSampler, in_order
from dali_pipelines.sources import rows_of
from htnet.config import AugmentConfig
from htnet.data.flow.image import flow_tensor, landmark_tensor
from htnet.data.store.reader import Store
from htnet.rules import check_frames

_BATCH = 32


class FrameFlow:
    """Flow images of a sampler's steps, in their order, computed on the device.

    A step's pictures are a function of the step. The decoded ones stay on the device where they take no more than
    ``cache_bytes``; else each step reads and decodes its own, ``ahead`` steps before their use.

    Raises:
        InputError: frames or settings that the flow needs are not in the store, or a picture is damaged.
    """

    def __init__(
        self,
        store: Store,
        sampler: EpochSampler,
        *,
        augment: AugmentConfig,
        device: torch.device,
        threads: int,
        first_step: int = 0,
        cache_bytes: int = 0,
        ahead: int = 1,
    ) -> None:
        self._store, self._sampler, self._device, self._ahead = store, sampler, device, ahead
        self._first = self._step = first_step
        jitter = augment.time_jitter.frames
        self._recipe = check_frames(store, sampler.rows, jitter=jitter)
        self._landmarks = landmark_tensor([sample.landmarks for sample in store.samples])
        self._choice = PairChoice(store, sampler, jitter=jitter)
        self._light = augment.photometric
        pictures, size = self._choice.every_picture(), self._recipe.working_size
        if cached := len(pictures) * size**2 <= cache_bytes:
            grey = decode_frames(store, pictures, size=size, device=device, threads=threads)
            decoded = {picture: for_dali(pixels) for picture, pixels in grey}
        read = decoded.__getitem__ if cached else partial(encoded_picture, store)
        source = PairSource(self._choice, read, first_step)
        self._pipeline = self._build(source, sampler, threads=threads, cached=cached)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return flow images, (B, 3, F, F) float16 as they are stored, and their rows, as a source does."""
        return self.next().half().permute(0, 3, 1, 2), rows_of(self._sampler, step)

    def next(self) -> torch.Tensor:
        """Return the next step's flow images, (B, F, F, 3) float32, (flow_u, flow_v, strain), on the device."""
        recipe = self._recipe
        made: dict[str, Any] = {"size": recipe.size, "strain": recipe.strain, "head_motion": recipe.head_motion}
        if recipe.head_motion != "none":
            made["landmarks"] = self._landmarks[self._sampler.batch(self._step)].to(self._device)
        return flow_tensor(*self.next_pair(), method="tvl1", **made)

    def next_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next step's onsets and apexes, (B, S, S) grey 0..255: uint8, float32 if the light changes."""
        outputs = run(self._pipeline, self._device, self._pictures_ahead, self._store)
        self._step += 1
        # copied: DALI uses its buffers again while flow is being computed
        onsets, apexes = (output.clone().squeeze(-1) for output in outputs)
        return onsets, apexes

    def _pictures_ahead(self) -> list[Picture]:
        """Pictures that DALI may be reading while this step is asked for."""
        pairs = (self._choice.pictures(step) for step in range(self._step, self._step + self._ahead + 1))
        return [picture for pair in pairs for part in pair for picture in part]

    def _build(self, source: PairSource, sampler: EpochSampler, *, threads: int, cached: bool) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        batch_size = -(-min(sampler.batch_size, len(sampler.rows)) // sampler.ranks)
        pipeline = new_pipeline(batch_size=batch_size, threads=threads, device=self._device, ahead=self._ahead)
        with pipeline:
            pair = fn.external_source(
                source=source,
                num_outputs=2,
                batch=True,
                batch_info=True,
                dtype=types.UINT8,
                device="gpu" if on_gpu and cached else "cpu",
                **({"layout": "HWC"} if cached else {"ndim": 1}),
            )
            if not cached:
                pair = [to_grey(data, size=self._recipe.working_size, on_gpu=on_gpu) for data in pair]
            pipeline.set_outputs(*self._changed(pair, sampler))
        pipeline.build()
        return pipeline

    def _changed(self, pair: Sequence[Any], sampler: EpochSampler) -> list[Any]:
        """Nodes of onset and apex after their photometric changes."""
        names = needed(self._light)
        if not names:
            return list(pair)
        side = self._recipe.working_size
        source = PhotometricSource(self._light, sampler, side=side, first_step=self._first, names=names)
        nodes = photometric_nodes(source, names)
        device = "gpu" if self._device.type == "cuda" else "cpu"
        return [
            change_light(picture, nodes, noise=name, device=device) for picture, name in zip(pair, FIELDS, strict=True)
        ]


def for_dali(pixels: torch.Tensor) -> Any:
    """Give what DALI takes from the tensor's device; of a CPU tensor it would ask for a CUDA stream."""
    return pixels if pixels.is_cuda else pixels.numpy()


def flow_from_frames(store: Store, rows: Sequence[int], *, device: torch.device, threads: int) -> Reader:
    """Compute the flow images of the rows from their onset and apex, once.

    Returns:
        By row, (F, F, 3) float16, channels (flow_u, flow_v, strain), as the store would hold it.

    Raises:
        InputError: as :class:`FrameFlow`.
    """
    sampler = in_order(sorted(set(rows)), batch_size=_BATCH)
    flow = FrameFlow(store, sampler, augment=AugmentConfig(), device=device, threads=threads)
    images: dict[int, NDArray[np.float16]] = {}
    for step in range(sampler.steps_per_epoch):
        images.update(zip(sampler.batch(step).tolist(), flow.next().half().cpu().numpy(), strict=True))
    return images.__getitem__
