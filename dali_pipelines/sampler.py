"""Order of the samples: seeded, and stateless in (seed, epoch, step).

The order of an epoch is a function of the seed and the epoch alone, so that thread counts, prefetch depth, interruption
and resumption cannot change it. The last, short batch is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from htnet.config.data import Balance
from htnet.data.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Batches of manifest rows; every epoch has as many samples as there are rows.

    Without ``groups`` an epoch visits every row once. With groups (one name per row: its class, its dataset) every
    group fills the same share of each epoch, to one sample. An epoch shows a part of a large group, and the next epoch
    goes on where it ended; a small group comes several times. Within a group all rows come equally often, to one.

    ``batch_size`` is the size of a step's batch over all ``ranks``. This process gets the rows of its ``rank``: the
    ranks' rows are disjoint and together make the batch.

    Raises:
        ValueError: no rows, a batch size below 1, groups without ``shuffle`` or of another length than the rows, a rank
            outside the ranks, a batch that leaves a rank without a sample.
    """

    rows: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool
    groups: tuple[str, ...] = ()
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a sampler needs at least one row, got none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.groups and not self.shuffle:
            raise ValueError("balanced groups need shuffle: a balanced epoch has no file order")
        if self.groups and len(self.groups) != len(self.rows):
            raise ValueError(f"groups must name one group per row, got {len(self.groups)} for {len(self.rows)} rows")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must be in 0..{self.ranks - 1}, got {self.rank}")
        smallest = (len(self.rows) - 1) % self.batch_size + 1
        if smallest < self.ranks:
            raise ValueError(
                f"{len(self.rows)} samples in batches of {self.batch_size} leave a batch of {smallest}, "
                f"too few for {self.ranks} ranks"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of this epoch over all ranks, in order, (len(rows),) int64."""
        rows = np.asarray(self.rows, dtype=np.int64)
        if not self.shuffle:
            return rows
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self._balanced(epoch) if self.groups else rows)

    def size_of(self, step: int) -> int:
        """Count the samples of the batch at ``step`` over all ranks."""
        within = step % self.steps_per_epoch
        return min(self.batch_size, len(self.rows) - within * self.batch_size)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return this rank's rows of the batch at ``step``, counted from the start of training over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._recent:  # several steps in a row ask for the same epoch, at its end for two
            for old in list(self._recent)[:-1]:
                del self._recent[old]
            self._recent[epoch] = self.epoch(epoch)
        whole = self._recent[epoch][within * self.batch_size : (within + 1) * self.batch_size]
        return whole[self.rank :: self.ranks]

    @cached_property
    def _recent(self) -> dict[int, NDArray[np.int64]]:
        return {}

    @cached_property
    def _members(self) -> tuple[NDArray[np.int64], ...]:
        """Rows of each group, in the order of the groups' names."""
        names = sorted(set(self.groups))
        return tuple(
            np.asarray([row for row, group in zip(self.rows, self.groups, strict=True) if group == name], np.int64)
            for name in names
        )

    def _balanced(self, epoch: int) -> NDArray[np.int64]:
        """Take an equal share of every group, an endless sequence of permutations that the epochs cut into pieces."""
        parts = len(self._members)
        pieces = []
        for index, members in enumerate(self._members):
            # shares of one epoch add up to its length, and what is left over goes to each group in turn
            start, end = ((len(self.rows) * e + index) // parts for e in (epoch, epoch + 1))
            cycles = range(start // len(members), -(-end // len(members)))
            stream = [np.random.default_rng([self.seed, index, cycle]).permutation(members) for cycle in cycles]
            first = start - cycles.start * len(members)
            pieces.append(np.concatenate(stream)[first : first + end - start])
        return np.concatenate(pieces)


def in_order(rows: Sequence[int], batch_size: int) -> EpochSampler:
    """Return a sampler of the rows in their given order, for tests and statistics."""
    return EpochSampler(rows=tuple(rows), batch_size=batch_size, seed=0, shuffle=False)


def balance_groups(store: Store, rows: Sequence[int], balance: Balance) -> tuple[str, ...]:
    """Name the group of each row, its class or its dataset, or no groups at all; ``balance`` as in DataConfig."""
    samples = [store.rows[row].sample for row in rows]
    if balance == "class":
        return tuple(str(sample.label) for sample in samples)
    return tuple(sample.id.dataset for sample in samples) if balance == "dataset" else ()
