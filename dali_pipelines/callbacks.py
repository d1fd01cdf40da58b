"""DALI's callbacks: the input of the graph at a step. They hold no position; DALI passes the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.augment import FaceGeometry
from dali_pipelines.sampler import EpochSampler
from htnet.config.data import CropRule
from htnet.data.regions import region_starts
from htnet.data.store.reader import Store

Reader = Callable[[int], NDArray[Any]]


class RegionSource:
    """Regions of a step's samples: starts (4, 2) and sides (2,), int32."""

    def __init__(self, store: Store, sampler: EpochSampler, *, crop: CropRule, first_step: int) -> None:
        self._sampler, self._first = sampler, first_step
        places = FaceGeometry.of(store.samples)
        self._starts = region_starts(places.points, places.sizes, crop)
        self._sides = np.repeat(places.sizes // 4 * 2, 2).reshape(-1, 2).astype(np.int32)

    def __call__(self, info: Any) -> tuple[NDArray[Any], ...]:
        rows = self._sampler.batch(self._first + info.iteration)
        return self._starts[rows], self._sides[rows]


class ImageSource:
    """Encoded or decoded flow images of a step's samples."""

    def __init__(self, sampler: EpochSampler, read: Reader, first_step: int) -> None:
        self._sampler, self._read, self._first = sampler, read, first_step

    def __call__(self, info: Any) -> list[NDArray[Any]]:
        return [self._read(row) for row in self._sampler.batch(self._first + info.iteration).tolist()]


def stored_bytes(store: Store) -> Reader:
    """Return a reader of ``flow.npy`` in a store, as it is stored and checked against its checksum."""
    return lambda row: np.frombuffer(store.read_member(row, "flow.npy"), np.uint8)
