"""DALI's callbacks: what the graph is fed with at a step. They hold no position: the step comes from DALI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.augment import draw, plan_change
from dali_pipelines.sampler import EpochSampler
from htnet.config import AugmentConfig
from htnet.data.regions import CropRule, region_starts
from htnet.data.store import Store

Reader = Callable[[int], NDArray[Any]]


class ChangeSource:
    """The arguments of a step's samples, those fields of Change that ``names`` names, and the manifest's rows."""

    def __init__(
        self,
        store: Store,
        sampler: EpochSampler,
        *,
        crop: CropRule,
        augment: AugmentConfig,
        first_step: int,
        names: Sequence[str],
    ) -> None:
        self._sampler, self._crop, self._augment, self._first = sampler, crop, augment, first_step
        self._names = names
        self._samples = {row: store.rows[row].sample for row in set(sampler.rows)}

    def __call__(self, info: Any) -> tuple[list[Any], ...]:
        step = self._first + info.iteration
        sampler = self._sampler
        rows = sampler.batch(step).tolist()
        draws = draw(sampler.seed, step, sampler.size_of(step), rank=sampler.rank, ranks=sampler.ranks)
        changes = []
        for index, row in enumerate(rows):
            sample = self._samples[row]
            changes.append(plan_change(self._augment, draws, index, sample=sample, rule=self._crop))
        columns = ([getattr(change, name) for change in changes] for name in self._names)
        return (*columns, [np.array([row], np.int64) for row in rows])


class PlainSource:
    """The same without changes, worked out once: nothing is drawn."""

    def __init__(self, store: Store, sampler: EpochSampler, *, crop: CropRule, first_step: int) -> None:
        self._sampler, self._first = sampler, first_step
        samples = {row: store.rows[row].sample for row in set(sampler.rows)}
        self._starts = {row: region_starts(s.landmarks, s.flow_size, crop) for row, s in samples.items()}
        self._sides = {row: np.full(2, s.flow_size // 4 * 2, np.int32) for row, s in samples.items()}

    def __call__(self, info: Any) -> tuple[list[Any], ...]:
        rows = self._sampler.batch(self._first + info.iteration).tolist()
        return (
            [self._starts[row] for row in rows],
            [self._sides[row] for row in rows],
            [np.array([row], np.int64) for row in rows],
        )


class ImageSource:
    """The encoded or decoded flow images of a step's samples."""

    def __init__(self, sampler: EpochSampler, read: Reader, first_step: int) -> None:
        self._sampler, self._read, self._first = sampler, read, first_step

    def __call__(self, info: Any) -> list[NDArray[Any]]:
        return [self._read(row) for row in self._sampler.batch(self._first + info.iteration).tolist()]


def stored_bytes(store: Store) -> Reader:
    """Reads ``flow.npy`` as it lies in the shard, checked against its checksum."""
    return lambda row: np.frombuffer(store.read_member(row, "flow.npy"), np.uint8)


def decoded_bytes(store: Store, rows: Sequence[int]) -> int:
    """Memory that the decoded flow images of the rows take: float16, three channels."""
    return sum(store.rows[row].sample.flow_size ** 2 * 6 for row in set(rows))
