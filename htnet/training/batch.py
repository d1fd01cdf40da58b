"""Batches of a fold's training and test samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Network input with its labels and rows, on the fold's device."""

    images: torch.Tensor
    """(B, 3, S, S) float32."""
    labels: torch.Tensor
    """(B,) int64; for mixed samples (B, num_classes) float32 shares that add up to 1."""
    rows: torch.Tensor
    """(B,) int64 on the CPU: the manifest's row of each sample (of the first of a mixed pair)."""


def send(values: NDArray[np.generic] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send an array from the CPU to the device, without waiting for the device's work."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
