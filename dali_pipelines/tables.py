"""Epochs of a resident fold as tables of one shape: what a captured CUDA graph needs to make its batches.

The samples and changes are those of :class:`dali_pipelines.stream.FlowStream` at the same step. The last batch of an
epoch is filled up to a multiple of ``UNIT`` with samples that count nothing, so that folds with a few samples more or
less have one shape.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.augment import FaceGeometry, draw, plan_changes
from dali_pipelines.mix import Mix, draw_mix, mix_samples
from dali_pipelines.resample import Changes, changed_mosaics
from dali_pipelines.resident import Resident
from dali_pipelines.sampler import EpochSampler
from dali_pipelines.stream import step_of
from htnet.config import AugmentConfig
from htnet.data.transform import FlowTransform, standard
from htnet.errors import InputError
from htnet.rules import check_one_flow_size

UNIT = 64
"""Batches and watched sets are filled up to a multiple of so many samples."""


class FlowTables:
    """Tables of each epoch, :class:`htnet.training.graph_engine.EpochTables`; arguments as of ``FlowStream``.

    Raises:
        InputError: the samples are not resident: too large for ``data.cache_mb``, or flow is computed at each step.
    """

    def __init__(
        self,
        resident: Resident,
        sampler: EpochSampler,
        *,
        augment: AugmentConfig,
        transform: FlowTransform,
        num_classes: int,
        state: bytes | None = None,
    ) -> None:
        self.sampler = sampler
        self._augment, self._transform, self._num_classes = augment, transform, num_classes
        self._crop = resident.crop
        self._changes = augment.changes_pixels
        self._epoch = 0 if state is None else step_of(state) // sampler.steps_per_epoch
        if self._changes:
            check_one_flow_size(resident.store, sampler.rows)
        self._images = self._resident_images(resident)
        self._labels = resident.labels[torch.tensor(resident.rows, device=resident.device)]
        self._rows = np.asarray(resident.rows)
        self._faces = FaceGeometry.of(resident.store.samples)
        self._moments = standard(transform, torch.device("cpu"))

    def _resident_images(self, resident: Resident) -> Tensor:
        if self._augment.changes_frames:
            raise InputError(
                "engine.name=graphs: data.augment changes frames, whose flow is computed at each step; set "
                "engine.name=torch"
            )
        images = resident.images(whole=self._changes)
        if images is None:
            raise InputError(
                f"engine.name=graphs: the samples take more than data.cache_mb={resident.cache_bytes >> 20}; raise it, "
                "or set engine.name=torch, which streams them"
            )
        return images

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the sampler's rows."""
        return self.sampler.steps_per_epoch

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Samples of each batch, filled up."""
        limit, steps = self.sampler.batch_size, self.steps_per_epoch
        return tuple(min(limit, -(-self.sampler.size_of(step) // UNIT) * UNIT) for step in range(steps))

    @property
    def shape(self) -> Hashable:
        """The batches' sizes, and where the samples lie."""
        images = self._images
        return (self._sizes, images.data_ptr(), images.shape, self._transform.minmax, self._augment)

    def next_tables(self) -> dict[str, Tensor]:
        """Return :meth:`tables` of the next epoch."""
        self._epoch += 1
        return self.tables(self._epoch - 1)

    def tables(self, epoch: int) -> dict[str, Tensor]:
        """Return the tables of an epoch, on the CPU; a row for each sample of each batch."""
        steps = [self._step_tables(epoch * self.steps_per_epoch + step) for step in range(self.steps_per_epoch)]
        mean, inverse = self._moments
        return {name: torch.cat([step[name] for step in steps]) for name in steps[0]} | {"mean": mean, "inv": inverse}

    def _step_tables(self, step: int) -> dict[str, Tensor]:
        rows, size = self.sampler.batch(step), self._sizes[step % self.steps_per_epoch]
        tables: dict[str, Tensor] = {
            "places": torch.from_numpy(np.searchsorted(self._rows, rows)),
            "real": torch.ones(len(rows)),
        }
        if self._changes:
            draws = draw(self.sampler.seed, step, len(rows))
            plan = plan_changes(self._augment, draws, places=self._faces.chosen(rows), rule=self._crop)
            tables |= Changes.of(plan)._asdict()
        if self._augment.mix.kind != "none":
            tables |= draw_mix(self._augment.mix, len(rows), seed=self.sampler.seed, step=step)._asdict()
        # filled up with the first sample: a row of the table must be a real one, for 0 times a NaN is NaN
        padded = {
            name: torch.cat([table, table[:1].expand(size - len(rows), *table.shape[1:])])
            for name, table in tables.items()
        }
        padded["real"][len(rows) :] = 0.0
        return padded

    def batch(self, tables: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make images (B, 3, S, S) float32, labels and real rows (B,) of a step of the epoch from its tables."""
        start = sum(self._sizes[:step])
        own = {name: table[start : start + self._sizes[step]] for name, table in tables.items()}
        moments = (tables["mean"], tables["inv"])
        images, labels = self._images[own["places"]], self._labels[own["places"]]
        if self._changes:
            changes = Changes(*(own[name] for name in Changes._fields))
            images = changed_mosaics(images, changes, self._transform, moments)
        else:
            images = images.sub_(moments[0]).mul_(moments[1])
        if self._augment.mix.kind != "none":
            mix = Mix(*(own[name] for name in Mix._fields))
            images, labels = mix_samples(images, labels, mix, self._num_classes)
        return images, labels, own["real"]

    def state(self) -> bytes:
        """Return the state after the last epoch that :meth:`next_tables` returned, as a stream's."""
        return json.dumps({"step": self._epoch * self.steps_per_epoch}).encode()


def padded_images(images: Tensor) -> Tensor:
    """Fill images (n, 3, S, S) up to a multiple of ``UNIT`` with the first one."""
    return torch.cat([images, images[:1].expand(-len(images) % UNIT, *images.shape[1:])])
