"""The processes that train one model together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

__all__ = ["ALONE", "World"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of a process in a training of ``ranks`` processes; ranks count from 0.

    With several ranks, every method is called by all of them, in the same order; the caller has joined torch's process
    group. Values travel as pickles among processes of one training, which trust each other.
    """

    rank: int
    ranks: int

    def tell(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        if self.ranks == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def collect(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.ranks == 1:
            return [value]
        values: list[T] = [value] * self.ranks
        dist.all_gather_object(values, value)
        return values


ALONE = World(rank=0, ranks=1)
