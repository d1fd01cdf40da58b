"""What goes into a store: one sample with its pictures in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Sample


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample and its flow image.

    ``flow_image`` is (F, F, 3) float16, channels (flow_u, flow_v, strain). ``frames`` are the encoded onset and apex
    pictures where they are kept, and those beside them, by member name (:mod:`htnet.data.store.frames`). ``sources``
    says what it was made from: checksums of the frames, and how the landmarks were found; ``notes`` are the rules by
    which the clip was read otherwise than its annotation stands, or its apex was found. Both go into the sample's json
    member.
    """

    sample: Sample
    flow_image: NDArray[np.float16]
    frames: tuple[tuple[str, bytes], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
