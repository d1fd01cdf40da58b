"""Samples that came as published pictures, each channel of each stretched to 0..255: what training may do with them.

Rest is a value of its own in each of their channels, about 128, and u and v have units of their own. A mirrored u is
255 - u, which the minmax scaling makes of -u and ``stored`` does not; nothing gives back what turns a vector.
"""

from __future__ import annotations

from collections.abc import Iterable

from htnet.config import DataConfig
from htnet.data.store.reader import Store
from htnet.errors import InputError


def is_stretched(store: Store, row: int) -> bool:
    """Say whether a sample's channels were stretched by the dataset's authors, and u and v are not pixels.

    Of sources that say so, only what comes without frames, and so without an onset, is such a picture.
    """
    sources = store.recipe.get("sources")
    flows = [source.get("flow") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    published = any(isinstance(flow, dict) and "scaling" in flow for flow in flows)
    return published and store.samples[row].onset is None


def check_stretched(store: Store, rows: Iterable[int], data: DataConfig) -> None:
    """Refuse changes that mean nothing where some of the rows are stretched, and a scale that they do not share.

    Raises:
        InputError: names the store, the key, its value, a sample and the rule.
    """
    chosen = sorted(set(rows))
    stretched = {row: store.samples[row].id for row in chosen if is_stretched(store, row)}
    if not stretched or data.input == "frames":  # flow that is computed anew is in pixels
        return
    name = next(iter(stretched.values()))
    if data.scaling == "stored" and len(stretched) < len(chosen):
        other = store.samples[next(row for row in chosen if row not in stretched)].id
        raise InputError(
            f"{store.path}: data.scaling=stored: {name} is a published picture of 0..255 and {other} is flow in "
            "pixels; set minmax, or choose data.datasets of one kind"
        )
    for key, value, rule in _wrong(data):
        raise InputError(f"{store.path}: data.augment.{key}={value:g}: {name} is a published picture, {rule}")


def _wrong(data: DataConfig) -> Iterable[tuple[str, float, str]]:
    """Key, value and rule of what training must not do with stretched pictures."""
    augment, stored = data.augment, data.scaling == "stored"
    if augment.rotate.degrees:
        yield "rotate.degrees", augment.rotate.degrees, "whose u and v were stretched one by one: no angle turns them"
    if stored and augment.flip.probability:
        yield "flip.probability", augment.flip.probability, "where rest is not 0: to mirror u needs data.scaling=minmax"
    for bound in ("low", "high"):
        if stored and (value := getattr(augment.magnify, bound)) != 1.0:
            yield f"magnify.{bound}", value, "where rest is not 0 and the amplitude is gone: no factor magnifies it"
    if stored and not data.standardise and augment.drop_region.probability:
        yield (
            "drop_region.probability",
            augment.drop_region.probability,
            "where 0 is not rest but the strongest motion one way: needs data.standardise=true",
        )
