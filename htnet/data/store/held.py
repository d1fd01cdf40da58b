"""Samples in memory that are read as those of a store, for clips that no store takes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htnet.data.store.manifest import ManifestRow
from htnet.data.store.reader import Store
from htnet.data.store.writer import PreparedSample
from htnet.errors import InputError

__all__ = ["HeldStore", "hold"]


@dataclass(frozen=True, kw_only=True)
class HeldStore(Store):
    """A store without a folder."""

    held: tuple[Mapping[str, bytes], ...]
    """Members of each sample by name, as a shard has them."""

    def read_member(self, row: int, member: str) -> bytes:
        """Return the bytes of a sample's member; :class:`InputError` where there is none."""
        if member not in self.held[row]:
            raise InputError(f"sample {self.rows[row].sample.id} has no {member}")
        return self.held[row][member]


def hold(samples: Sequence[PreparedSample], recipe: Mapping[str, Any]) -> HeldStore:
    """Hold samples as a store would, to be read by the same code."""
    rows = tuple(ManifestRow(sample=item.sample, shard="", members={}) for item in samples)
    members = tuple({"flow.npy": _encoded(item), **dict(item.frames)} for item in samples)
    return HeldStore(path=Path(), rows=rows, digest="", recipe=dict(recipe), held=members)


def _encoded(item: PreparedSample) -> bytes:
    data = io.BytesIO()
    np.save(data, item.flow_image)
    return data.getvalue()
