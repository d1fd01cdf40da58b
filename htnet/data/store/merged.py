"""Several stores, read as one; nothing is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from htnet.data.store.reader import Store, open_store
from htnet.errors import InputError

__all__ = ["MergedStore", "open_stores"]

_SHARED = ("classes", "flow", "face_crop")
"""Entries of a recipe that stores must have in common: one network reads the images of all."""


@dataclass(frozen=True, kw_only=True)
class MergedStore(Store):
    """The samples of several stores, one store after the other."""

    parts: tuple[Store, ...]

    @property
    def address(self) -> tuple[str, ...]:
        return tuple(str(part.path.resolve()) for part in self.parts)

    def read_member(self, row: int, member: str) -> bytes:
        part, own_row = self._origins[row]
        return part.read_member(own_row, member)

    @cached_property
    def _origins(self) -> tuple[tuple[Store, int], ...]:
        return tuple((part, row) for part in self.parts for row in range(len(part.rows)))


def open_stores(paths: str | Sequence[str]) -> Store:
    """Open the store, or the stores, that ``data.store`` names.

    Raises:
        InputError: a store cannot be read, two of them hold one clip, or their images were made in different ways;
            names both stores and the rule.
    """
    names = (paths,) if isinstance(paths, str) else tuple(paths)
    parts = tuple(open_store(Path(name)) for name in names)
    if len(parts) == 1:
        return parts[0]
    for part in parts[1:]:
        _check_recipe(parts[0], part)
    _check_clips(parts)
    return MergedStore(
        path=Path(" and ".join(str(part.path) for part in parts)),
        rows=tuple(row for part in parts for row in part.rows),
        digest=hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest(),
        recipe=_merged_recipe(parts),
        parts=parts,
    )


def _check_recipe(first: Store, other: Store) -> None:
    for key in _SHARED:
        mine, theirs = first.recipe.get(key), other.recipe.get(key)
        if key == "classes":
            mine, theirs = list(first.classes), list(other.classes)
        if mine != theirs:
            raise InputError(f"data.store: {other.path} was prepared with another {key} than {first.path}: {theirs}")


def _check_clips(parts: Sequence[Store]) -> None:
    """Refuse a clip that two stores hold, under one name or by its flow image."""
    seen: dict[str, tuple[Store, str]] = {}
    for part in parts:
        for row in part.rows:
            name = str(row.sample.id)
            for mark in (name, row.members["flow.npy"].sha256):
                other, known = seen.setdefault(mark, (part, name))
                if other is not part:
                    also = "" if known == name else f" (there {known})"
                    raise InputError(f"data.store: {part.path} and {other.path} both hold the clip {name}{also}")


def _merged_recipe(parts: Sequence[Store]) -> dict[str, Any]:
    """Return the first store's recipe with the sources of all, and the frames that all of them keep."""
    recipes = [part.recipe for part in parts]
    merged = {**recipes[0], "sources": [source for recipe in recipes for source in recipe.get("sources", [])]}
    if any("keep_neighbours" in recipe for recipe in recipes):
        merged["keep_neighbours"] = min(int(recipe.get("keep_neighbours", 0)) for recipe in recipes)
    return merged
