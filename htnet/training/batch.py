"""Data that a fold trains and tests on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Network input and what it belongs to, on the fold's device."""

    images: torch.Tensor
    """(B, 3, S, S) float32."""
    labels: torch.Tensor
    """(B,) int64; where samples are mixed, (B, num_classes) float32 shares that add up to 1."""
    rows: torch.Tensor
    """(B,) int64 on the CPU: the manifest's row of each sample (of the first of a mixed pair)."""


def sent(values: NDArray[np.generic] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """An array of the CPU on the device, without waiting for what the device is doing."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
