"""Endless, resumable stream of training batches.

The stream never ends an epoch inside DALI (an epoch is arithmetic on the step number), so prefetching runs across epoch
borders. Everything in it is a function of the step: order, changes, mixing. Its whole state is therefore the step
number, and neither a thread, a cache nor an interruption can change a batch.
"""

from __future__ import annotations

import json

import torch
from nvidia.dali import Pipeline, fn

from dali_pipelines.augment import FaceGeometry, draw, plan_changes
from dali_pipelines.frame_flow import FrameFlow
from dali_pipelines.mix import mix_batch
from dali_pipelines.resample import Changes, changed_mosaics
from dali_pipelines.resident import Resident
from dali_pipelines.sampler import EpochSampler
from dali_pipelines.sources import AHEAD, Source
from htnet.config import AugmentConfig
from htnet.data.transform import FlowTransform, normalise
from htnet.errors import InputError
from htnet.rules import check_one_flow_size
from htnet.training.batch import Batch, send


class FlowStream:
    """Endless batches in the sampler's order; ``state`` and the ``state`` argument resume it bit for bit.

    Args:
        resident: source of the samples.
        sampler: order of the samples.
        augment: random changes of the samples.
        transform: the fold's, from :func:`dali_pipelines.resident.fit_transform`.
        num_classes: classes of the labels; needed where samples are mixed.
        state: from :meth:`state`.
    """

    def __init__(
        self,
        resident: Resident,
        sampler: EpochSampler,
        *,
        augment: AugmentConfig,
        transform: FlowTransform,
        num_classes: int | None = None,
        state: bytes | None = None,
    ) -> None:
        if augment.mix.kind != "none" and num_classes is None:
            raise ValueError("num_classes is needed to mix labels")
        self.sampler = sampler
        self._resident, self._augment, self._transform = resident, augment, transform
        self._num_classes = num_classes
        self._step = 0 if state is None else step_of(state)
        self._places = FaceGeometry.of(resident.store.samples)
        self._changes = augment.changes_pixels
        if self._changes:
            check_one_flow_size(resident.store, sampler.rows)
        self._source = self._open_source()

    def _open_source(self) -> Source:
        resident, sampler = self._resident, self.sampler
        if not self._augment.changes_frames:
            return resident.source(sampler, whole=self._changes, first_step=self._step)
        return FrameFlow(
            resident.store,
            sampler,
            augment=self._augment,
            device=resident.device,
            threads=resident.threads,
            first_step=self._step,
            cache_bytes=resident.cache_bytes,
            ahead=AHEAD,
        )

    def next(self) -> Batch:
        """Return the next batch; the caller owns its tensors."""
        step, sampler, device = self._step, self.sampler, self._resident.device
        images, rows = self._source.batch(step)
        if self._changes:
            draws = draw(sampler.seed, step, sampler.size_of(step), rank=sampler.rank, ranks=sampler.ranks)
            places = self._places.chosen(rows.numpy())
            plan = plan_changes(self._augment, draws, places=places, rule=self._resident.crop)
            changes = Changes(*(send(table, device) for table in Changes.of(plan)))
            images = changed_mosaics(images, changes, self._transform)
        else:
            images = normalise(images, self._transform)
        self._step += 1
        batch = Batch(images=images, labels=self._resident.labels[send(rows, device)], rows=rows)
        if self._num_classes is None:
            return batch
        options = {"num_classes": self._num_classes, "seed": sampler.seed, "step": step, "rank": sampler.rank}
        return mix_batch(batch, self._augment.mix, **options)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the sampler's rows."""
        return self.sampler.steps_per_epoch

    def state(self) -> bytes:
        """Return the state from which a new stream goes on after the last batch that :meth:`next` returned."""
        return json.dumps({"step": self._step}).encode()


def step_of(state: bytes) -> int:
    """Return the number of batches before a state that :meth:`FlowStream.state` returned."""
    try:
        step = json.loads(state)["step"]
    except (ValueError, KeyError, TypeError):
        raise InputError("the checkpoint's input state is not one of this version; delete it to start again") from None
    return int(step)


def self_test(device: torch.device) -> None:
    """Run a small graph on the device; DALI's own errors are raised."""
    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=(device.index or 0) if device.type == "cuda" else None, seed=0
    )
    with pipeline:
        image = fn.random.uniform(range=[0.0, 1.0], shape=[8, 8, 3])
        pipeline.set_outputs(fn.transpose(image.gpu() if device.type == "cuda" else image, perm=[2, 0, 1]))
    pipeline.build()
    pipeline.run()
