"""DIS optical flow (Kroeger et al., ECCV 2016) by OpenCV.

It goes down to the finest scale, as motion is below two pixels, which the default scale 2 cannot see; patches every 3
pixels, 25 descent steps and 5 of refinement: twice as many steps gain 3 % on synthetic pairs
(:mod:`htnet.data.synth.generate`). Deterministic; 1 and 2 OpenCV threads gave equal bits. The number of threads is the
caller's to set.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Gray = NDArray[np.uint8]

DIS: Mapping[str, Any] = MappingProxyType(
    {"finest_scale": 0, "patch_size": 8, "patch_stride": 3, "gradient_descent_iterations": 25}
    | {"variational_refinement_iterations": 5}
)
"""Parameters of :func:`dis`."""


def dis_flow(onset: Gray, apex: Gray) -> NDArray[np.float32]:
    """Compute the flow of one pair.

    Args:
        onset: (H, W) uint8 grey.
        apex: (H, W) uint8 grey.

    Returns:
        (H, W, 2) float32 in pixels: flow_u to the right, flow_v down; onset at p is found at p + flow in apex.

    Raises:
        ValueError: pictures of another type or of different shapes.
    """
    if onset.shape != apex.shape or onset.ndim != 2 or onset.dtype != np.uint8 or apex.dtype != np.uint8:
        raise ValueError(
            f"onset and apex must be (H, W) uint8 of one shape, got {onset.shape} {onset.dtype} and "
            f"{apex.shape} {apex.dtype}"
        )
    solver = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    solver.setFinestScale(DIS["finest_scale"])
    solver.setPatchSize(DIS["patch_size"])
    solver.setPatchStride(DIS["patch_stride"])
    solver.setGradientDescentIterations(DIS["gradient_descent_iterations"])
    solver.setVariationalRefinementIterations(DIS["variational_refinement_iterations"])
    return np.asarray(solver.calc(np.ascontiguousarray(onset), np.ascontiguousarray(apex), None), np.float32)


def dis(onsets: Tensor, apexes: Tensor) -> Tensor:
    """Compute the flow of (B, S, S) pairs on the CPU, (B, 2, S, S) float32 on their device."""
    pairs = zip(_as_gray(onsets), _as_gray(apexes), strict=True)
    fields = np.stack([dis_flow(first, second) for first, second in pairs])
    return torch.from_numpy(fields).permute(0, 3, 1, 2).contiguous().to(onsets.device)


def _as_gray(crops: Tensor) -> Gray:
    return np.asarray(crops.round().clamp(0, 255).to(torch.uint8).cpu().numpy())
