"""What an adapter hands to the store writer: one sample with its pictures in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from htnet.data.types import Sample


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample and its flow image.

    ``flow_image`` is (F, F, 3) float16, channels (flow_u, flow_v, strain). ``frames`` are the encoded
    onset and apex pictures where they are kept, by member name (``onset.jpg``, ``apex.jpg``).
    """

    sample: Sample
    flow_image: NDArray[np.float16]
    frames: tuple[tuple[str, bytes], ...] = ()


class Adapter(Protocol):
    """A dataset as its owners ship it. ``describe`` says how the flow was made, for ``store.json``."""

    def describe(self) -> dict[str, object]: ...

    def samples(self) -> Iterator[PreparedSample]:
        """Yield every sample in a fixed order; raise :class:`htnet.errors.InputError` on bad input."""
        ...
