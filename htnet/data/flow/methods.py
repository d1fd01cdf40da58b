"""Methods of optical flow, by the name that ``prepare.flow_method`` takes.

Another one is a function of a batch of pairs, its parameters, and a line in :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from htnet.config.prepare import FlowMethod
from htnet.data.flow.opencv import DIS, dis
from htnet.data.flow.tvl1 import TVL1, tvl1


@dataclass(frozen=True)
class Method:
    """A way to compute optical flow.

    ``compute`` takes grey values 0..255 of onsets and apexes, (B, S, S) each, and returns (B, 2, S, S) float32 flow_u
    (to the right) and flow_v (down) in pixels, on their device: onset at p is found at p + flow in apex. A pair's flow
    does not depend on what else is in the batch. ``parameters`` are what decides the result.
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    parameters: Mapping[str, Any]


METHODS: Mapping[FlowMethod, Method] = {"tvl1": Method(tvl1, asdict(TVL1())), "dis": Method(dis, DIS)}
"""``tvl1`` runs on the pictures' device, ``dis`` is OpenCV's, on the CPU."""


def compute_flow(onset: Tensor, apex: Tensor, method: FlowMethod) -> Tensor:
    """Compute the flow of a batch of pairs; shapes and units as of :class:`Method`.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"flow method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method].compute(onset, apex)


def flow_parameters(method: FlowMethod) -> dict[str, object]:
    """Name a method and its parameters, for ``store.json``."""
    return {"method": method, **METHODS[method].parameters}
