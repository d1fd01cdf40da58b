"""Optical flow between onset and apex, and the flow image (flow_u, flow_v, strain) that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from htnet.data.flow.head_motion import HeadMotion, without_head_motion
from htnet.data.flow.strain import StrainKind, optical_strain
from htnet.data.flow.tvl1 import TVL1, tvl1
from htnet.data.samples import Landmarks

FlowMethod = Literal["tvl1", "dis", "farneback"]
Gray = NDArray[np.uint8]
Flow = NDArray[np.float32]

_FARNEBACK: Mapping[str, Any] = MappingProxyType(
    {"pyr_scale": 0.5, "levels": 3, "winsize": 17, "iterations": 5, "poly_n": 5, "poly_sigma": 1.1}
)
_TVL1 = TVL1()
_FADE, _MARGIN = 16, 32
_DIS: Mapping[str, Any] = MappingProxyType(
    {"finest_scale": 0, "patch_size": 8, "patch_stride": 3, "gradient_descent_iterations": 25}
    | {"variational_refinement_iterations": 5}
)


def flow_parameters(method: str) -> dict[str, object]:
    """Name what makes the flow of a method, for ``store.json``: the method and its parameters."""
    values = {"tvl1": asdict(_TVL1), "dis": _DIS, "farneback": _FARNEBACK}[method]
    return {"method": method, **values}


def optical_flow(onset: Gray, apex: Gray, method: str) -> Flow:
    """Compute dense optical flow of one pair by OpenCV; :mod:`htnet.data.flow.tvl1` is the third method.

    ``farneback`` (Farneback, SCIA 2003): three pyramid levels cover the few pixels that a micro-expression
    moves; the Gaussian window of 17 pixels and the polynomials of 5 pixels with sigma 1.1 (OpenCV's own pair)
    had the least end-point error on synthetic pairs (:mod:`htnet.data.synth.generate`) among windows 9 to 27. The pair
    fades to grey in a margin that is cut off again: at the last row and column OpenCV's version compares with
    nothing and finds up to 2 pixels of motion between equal pictures.
    ``dis`` (Kroeger et al., ECCV 2016): down to the finest scale, as motion is below two pixels, which the
    default scale 2 cannot see, patches every 3 pixels, 25 descent steps and 5 of refinement; twice as many
    steps gain 3 % on the same pairs. Its error there is about half of Farneback's.

    Deterministic; 1 and 2 OpenCV threads gave equal bits. The number of threads is the caller's to set.

    Args:
        onset: (H, W) uint8 grey.
        apex: (H, W) uint8 grey.
        method: ``farneback`` or ``dis``.

    Returns:
        (H, W, 2) float32 in pixels: flow_u to the right, flow_v down; onset at p is found at p + flow in apex.

    Raises:
        ValueError: pictures of another type or of different shapes, an unknown method.
    """
    if onset.shape != apex.shape or onset.ndim != 2 or onset.dtype != np.uint8 or apex.dtype != np.uint8:
        raise ValueError(
            f"onset and apex must be (H, W) uint8 of one shape, got {onset.shape} {onset.dtype} and "
            f"{apex.shape} {apex.dtype}"
        )
    if method not in _METHODS:
        raise ValueError(f"flow method must be one of {', '.join(_METHODS)}, got {method!r}")
    return _METHODS[method](np.ascontiguousarray(onset), np.ascontiguousarray(apex))


def _farneback(onset: Gray, apex: Gray) -> Flow:
    grey = float(onset.mean())
    pair = _faded(onset, grey), _faded(apex, grey)
    flow = cv2.calcOpticalFlowFarneback(*pair, None, **_FARNEBACK, flags=cv2.OPTFLOW_FARNEBACK_GAUSSIAN)
    return np.ascontiguousarray(flow[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], np.float32)


def _faded(picture: Gray, grey: float) -> Gray:
    """The picture in a margin of its repeated edge that fades to ``grey`` within ``_FADE`` pixels."""
    wide = cv2.copyMakeBorder(picture, *(_MARGIN,) * 4, cv2.BORDER_REPLICATE).astype(np.float32)
    weights = []
    for length in picture.shape:
        place = np.arange(-_MARGIN, length + _MARGIN)
        outside = np.maximum(np.maximum(-place, place - length + 1), 0)
        weights.append(0.5 + 0.5 * np.cos(np.pi * np.minimum(outside / _FADE, 1.0)))
    faded: Gray = np.rint(grey + (wide - grey) * np.outer(*weights)).astype(np.uint8)
    return faded


def _dis(onset: Gray, apex: Gray) -> Flow:
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(_DIS["finest_scale"])
    dis.setPatchSize(_DIS["patch_size"])
    dis.setPatchStride(_DIS["patch_stride"])
    dis.setGradientDescentIterations(_DIS["gradient_descent_iterations"])
    dis.setVariationalRefinementIterations(_DIS["variational_refinement_iterations"])
    return np.asarray(dis.calc(onset, apex, None), np.float32)


_METHODS: dict[str, Callable[[Gray, Gray], Flow]] = {"farneback": _farneback, "dis": _dis}


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
        method: ``tvl1`` runs on the device; ``dis`` and ``farneback`` are OpenCV's, on the CPU.
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
    if method == "tvl1":
        flow = tvl1(onset, apex, _TVL1)
    else:
        pairs = zip(_as_gray(onset), _as_gray(apex), strict=True)
        fields = np.stack([optical_flow(first, second, method) for first, second in pairs])
        flow = torch.from_numpy(fields).permute(0, 3, 1, 2).contiguous().to(onset.device)
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
    """:func:`flow_tensor` of (B, S, S) uint8 arrays on a device, as it is stored: (B, F, F, 3) float16."""
    pair = (torch.from_numpy(np.ascontiguousarray(crops)).to(device) for crops in (onsets, apexes))
    places = landmark_tensor(landmarks).to(device) if landmarks else None
    flow = flow_tensor(*pair, method=method, size=size, strain=strain, head_motion=head_motion, landmarks=places)
    images: NDArray[np.float16] = flow.half().cpu().numpy()
    return images


def landmark_tensor(landmarks: Sequence[Landmarks]) -> Tensor:
    """(B, 5, 2) float32, the precision in which a store keeps landmarks: flow computed anew finds the same places."""
    return torch.tensor(landmarks, dtype=torch.float32)


def _as_gray(crops: Tensor) -> Gray:
    return np.asarray(crops.round().clamp(0, 255).to(torch.uint8).cpu().numpy())


def area_averaged(planes: Tensor, size: int) -> Tensor:
    """(B, C, S, S) -> (B, C, size, size): each new pixel is the mean over the area that it covers."""
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
