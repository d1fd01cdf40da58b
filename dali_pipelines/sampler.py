"""Which samples come when: seeded and stateless in (seed, epoch, step).

The order of an epoch is a function of the seed and the epoch alone, so that thread counts, prefetch
depth, interruption and resumption cannot change it. The last, short batch is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Batches of manifest rows; every epoch visits every row once."""

    rows: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a sampler needs at least one row, got none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """All rows in the order of this epoch, (len(rows),) int64."""
        rows = np.asarray(self.rows, dtype=np.int64)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows

    def batch(self, step: int) -> NDArray[np.int64]:
        """Rows of the batch at ``step``, counted from the start of training over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[within * self.batch_size : (within + 1) * self.batch_size]


def in_order(rows: Sequence[int], batch_size: int) -> EpochSampler:
    """The rows as they are, for tests and statistics."""
    return EpochSampler(rows=tuple(rows), batch_size=batch_size, seed=0, shuffle=False)
