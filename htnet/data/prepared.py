"""What goes into a store: one sample with its pictures in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from htnet.data.types import Sample


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample and its flow image.

    ``flow_image`` is (F, F, 3) float16, channels (flow_u, flow_v, strain). ``frames`` are the encoded onset and apex
    pictures where they are kept, by member name (``onset.jpg``, ``apex.jpg``). ``sources`` says what it was made from:
    checksums of the frames, and how the landmarks were found; it goes into the sample's json member.
    """

    sample: Sample
    flow_image: NDArray[np.float16]
    frames: tuple[tuple[str, bytes], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
