"""The pictures that a store keeps of a clip: onset, apex and frames beside them; what they are called, which is taken.

A member is named by its place: ``apex.jpg``, and ``apex-2.jpg`` for the second frame before it. Frames after the onset
and before the apex are kept up to the middle between the two, so that the onset comes before the apex whichever of
them are taken, and no frame lies in the store twice.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from htnet.config.prepare import HeadMotion, StrainKind
from htnet.data.store.reader import Store
from htnet.errors import InputError

Part = Literal["onset", "apex"]
PARTS: tuple[Part, Part] = ("onset", "apex")


def frame_member(part: Part, offset: int = 0) -> str:
    """Name of the frame ``offset`` frames after onset or apex (before, where it is negative): ``onset+1.jpg``."""
    return f"{part}{offset:+d}.jpg" if offset else f"{part}.jpg"


def neighbours(numbers: Sequence[int], onset: int, apex: int, reach: int) -> Iterator[tuple[str, int]]:
    """Members and frame numbers of the frames beside onset and apex that are kept.

    Args:
        numbers: frame numbers that the clip has, rising, with gaps or without.
        onset: one of them.
        apex: one of them, after the onset.
        reach: frames on each side, where there are as many.
    """
    first, second = numbers.index(onset), numbers.index(apex)
    inner = min(reach, max(0, second - first - 1) // 2)
    sides: dict[Part, tuple[int, range]] = {
        "onset": (first, range(-min(reach, first), inner + 1)),
        "apex": (second, range(-inner, min(reach, len(numbers) - 1 - second) + 1)),
    }
    for part, (place, offsets) in sides.items():
        for offset in offsets:
            if offset:
                yield frame_member(part, offset), numbers[place + offset]


def nearest_member(members: Container[str], part: Part, offset: int) -> str:
    """Return the member at ``offset`` from onset or apex; where it was not kept, the farthest on the way there."""
    step = 1 if offset > 0 else -1
    while offset and frame_member(part, offset) not in members:
        offset -= step
    return frame_member(part, offset)


@dataclass(frozen=True, kw_only=True)
class FramesRecipe:
    """The way from a store's frames to its flow images, which flow computed anew follows."""

    size: int
    """Side of the flow images."""
    working_size: int
    """Side of the pictures whose flow is computed."""
    strain: StrainKind
    head_motion: HeadMotion
    neighbours: int
    """Frames kept on each side of onset and apex."""

    @classmethod
    def of(cls, store: Store) -> FramesRecipe:
        """Read it of a store; :class:`InputError` where the store does not say."""
        settings = store.recipe.get("flow")
        if not isinstance(settings, dict) or not {"size", "working_size", "strain"} <= settings.keys():
            raise InputError(f"{store.path}: data.input=frames needs a store whose flow htnet prepare made")
        return cls(
            size=int(settings["size"]),
            working_size=int(settings["working_size"]),
            strain=settings["strain"],
            head_motion=settings.get("head_motion", "none"),
            neighbours=int(store.recipe.get("keep_neighbours", 0)),
        )
