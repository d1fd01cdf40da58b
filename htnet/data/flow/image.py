"""The flow image (flow_u, flow_v, strain) that is made of the optical flow between onset and apex."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from htnet.config.prepare import FlowMethod, HeadMotion, StrainKind
from htnet.data.flow.head_motion import without_head_motion
from htnet.data.flow.methods import compute_flow
from htnet.data.flow.strain import optical_strain
from htnet.data.samples import Landmarks

Gray = NDArray[np.uint8]


def flow_tensor(
    onset: Tensor,
    apex: Tensor,
    *,
    method: FlowMethod,
    size: int,
    strain: StrainKind = "central",
    head_motion: HeadMotion = "none",
    landmarks: Tensor | None = None,
) -> Tensor:
    """Flow images of a batch of face crops, on their device.

    Flow and strain are computed at the crops' size: on 28 pixels a motion of two source pixels is half a pixel and the
    texture that shows it is gone. Then the three channels are averaged over areas down to ``size``, strain after it was
    taken from the fine flow, as in the paper's data. A pair's result does not depend on what else is in the batch.

    Args:
        onset: (B, S, S) grey values 0..255.
        apex: (B, S, S), the same squares of the apex frames.
        method: of :data:`htnet.data.flow.methods.METHODS`.
        size: side F of the flow images, at most S.
        strain: kind of derivatives, :mod:`htnet.data.flow.strain`.
        head_motion: as of :func:`flow_image_tensor`.
        landmarks: as of :func:`flow_image_tensor`.

    Returns:
        (B, F, F, 3) float32: flow_u and flow_v in pixels of the F-sized crop, strain in pixels per pixel.

    Raises:
        ValueError: crops that are not square or smaller than ``size``, an unknown method or strain, no landmarks where
            ``head_motion`` needs them.
    """
    if onset.dim() != 3 or onset.shape[1] != onset.shape[2] or onset.shape[1] < size:
        raise ValueError(f"face crops must be (B, S, S) with S at least {size}, got {tuple(onset.shape)}")
    flow = compute_flow(onset, apex, method)
    return flow_image_tensor(flow, size=size, strain=strain, head_motion=head_motion, landmarks=landmarks)


def flow_image_tensor(
    flow: Tensor,
    *,
    size: int,
    strain: StrainKind = "central",
    head_motion: HeadMotion = "none",
    landmarks: Tensor | None = None,
) -> Tensor:
    """Flow images of flow fields: strain is taken of the fine field, then all three are averaged down to ``size``.

    The head's motion is taken out before, so that strain does not see it either.

    Args:
        flow: (B, 2, S, S) flow_u and flow_v, in pixels of this size.
        size: side F of the flow images, at most S.
        strain: kind of derivatives, :mod:`htnet.data.flow.strain`.
        head_motion: what of the head's motion is subtracted, :mod:`htnet.data.flow.head_motion`.
        landmarks: (B, 5, 2) in pixels of the F-sized crop, on the flow's device; only ``landmarks`` needs them.

    Returns:
        (B, F, F, 3) float32: flow_u and flow_v in pixels of the F-sized crop, strain in pixels per pixel.
    """
    if head_motion != "none":
        # a pixel's centre lies half a pixel from its edge in both
        places = None if landmarks is None else (landmarks.double() + 0.5) * (flow.shape[2] / size) - 0.5
        flow = without_head_motion(flow, head_motion, places)
    fine = torch.cat([flow * (size / flow.shape[2]), optical_strain(flow, strain).unsqueeze(1)], dim=1)
    return area_averaged(fine, size).permute(0, 2, 3, 1).contiguous()


def flow_images(
    onsets: Gray,
    apexes: Gray,
    *,
    method: FlowMethod,
    size: int,
    strain: StrainKind,
    device: torch.device,
    head_motion: HeadMotion = "none",
    landmarks: Sequence[Landmarks] = (),
) -> NDArray[np.float16]:
    """Return :func:`flow_tensor` of (B, S, S) uint8 arrays on a device, as it is stored: (B, F, F, 3) float16."""
    pair = (torch.from_numpy(np.ascontiguousarray(crops)).to(device) for crops in (onsets, apexes))
    places = landmark_tensor(landmarks).to(device) if landmarks else None
    flow = flow_tensor(*pair, method=method, size=size, strain=strain, head_motion=head_motion, landmarks=places)
    images: NDArray[np.float16] = flow.half().cpu().numpy()
    return images


def landmark_tensor(landmarks: Sequence[Landmarks]) -> Tensor:
    """Return (B, 5, 2) float32, as a store keeps landmarks, so that flow computed anew finds the same places."""
    return torch.tensor(landmarks, dtype=torch.float32)


def area_averaged(planes: Tensor, size: int) -> Tensor:
    """Shrink (B, C, S, S) to (B, C, size, size): each new pixel is the mean over the area that it covers."""
    side = planes.shape[-1]
    if side == size:
        return planes
    edges = torch.arange(size + 1, dtype=torch.float64) * side / size
    first = edges[:-1].floor().long()
    reach = int((edges[1:].ceil().long() - first).max())
    for axis in (2, 3):
        total = torch.zeros_like(planes.narrow(axis, 0, size))
        for tap in range(reach):
            place = first + tap
            covered = torch.minimum(place + 1.0, edges[1:]) - torch.maximum(place.double(), edges[:-1])
            weight = (covered.clamp(min=0) * size / side).to(planes)
            taken = planes.index_select(axis, place.clamp(max=side - 1).to(planes.device))
            total.addcmul_(taken, weight.view(-1, 1) if axis == 2 else weight)
        planes = total
    return planes
