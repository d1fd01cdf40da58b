"""The way from a flow image to the network's input: part of a trained model, which is of no use without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FlowTransform:
    """Size of the mosaic, scaling of the flow image, and normalisation of the mosaic.

    ``minmax``: each channel of a flow image is stretched to 0..255 before its regions are cut. ``mean`` and ``std`` are
    per channel (flow_u, flow_v, strain), of the training mosaics.
    """

    mosaic_size: int
    minmax: bool
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def normalise(mosaics: Tensor, transform: FlowTransform) -> Tensor:
    """Subtract the mean and divide by the standard deviation, in place; (B, 3, S, S) float32, which is returned."""
    mean, inverse = standard(transform, mosaics.device)
    return mosaics.sub_(mean).mul_(inverse)


@lru_cache(maxsize=8)
def standard(transform: FlowTransform, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation, (1, 3, 1, 1); kept on the device: sending them would make it wait."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
    return mean.to(device), (1.0 / std).to(device)
