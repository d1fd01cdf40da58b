"""Optical flow between the onset and the apex frame, its strain, and the flow image that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

FlowMethod = Literal["farneback", "dis"]
Gray = NDArray[np.uint8]
Flow = NDArray[np.float32]
_Scalar = TypeVar("_Scalar", bound=np.generic)

WORKING_SIZE = 256
"""Largest side in pixels at which flow is computed; see :func:`flow_image`."""

_FARNEBACK: Mapping[str, Any] = MappingProxyType(
    {"pyr_scale": 0.5, "levels": 3, "winsize": 17, "iterations": 5, "poly_n": 5, "poly_sigma": 1.1}
)
_FADE, _MARGIN = 16, 32
_DIS: Mapping[str, Any] = MappingProxyType(
    {"finest_scale": 0, "patch_size": 8, "patch_stride": 3, "gradient_descent_iterations": 25}
    | {"variational_refinement_iterations": 5}
)


def flow_parameters(method: str) -> dict[str, object]:
    """How flow of a method is made, for ``store.json``: parameters of the method, strain, working size."""
    values = _DIS if method == "dis" else _FARNEBACK
    return {"method": method, **values, "strain": "central differences", "working_size": WORKING_SIZE}


def optical_flow(onset: Gray, apex: Gray, method: str) -> Flow:
    """Dense optical flow from onset to apex.

    ``farneback`` (Farneback, SCIA 2003): three pyramid levels cover the few pixels that a micro-expression
    moves; the Gaussian window of 17 pixels and the polynomials of 5 pixels with sigma 1.1 (OpenCV's own pair)
    had the least end-point error on synthetic pairs (:mod:`htnet.data.synth`) among windows 9 to 27. The pair
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


def optical_strain(flow: Flow) -> NDArray[np.float32]:
    """Magnitude of optical strain, ``sqrt(ux^2 + vy^2 + (uy + vx)^2 / 2)`` (STSTNet, arXiv 1902.03634, eq. 5-7).

    Derivatives are central differences over two pixels inside and one-sided at the border
    (``numpy.gradient``): they belong to the pixel itself, where forward or backward ones lie half a pixel off.

    Args:
        flow: (H, W, 2) float, pixels, H and W at least 2.

    Returns:
        (H, W) float32, pixels per pixel, so it does not change when the flow image is scaled; never negative.
    """
    u_y, u_x = np.gradient(flow[..., 0])
    v_y, v_x = np.gradient(flow[..., 1])
    strain: NDArray[np.float32] = np.sqrt(u_x**2 + v_y**2 + 0.5 * (u_y + v_x) ** 2).astype(np.float32)
    return strain


def flow_image(onset: Gray, apex: Gray, method: str, size: int) -> NDArray[np.float16]:
    """Flow image of a face crop.

    Flow and strain are computed on the crop at its own resolution, reduced to :data:`WORKING_SIZE` where it
    is larger: on 28 pixels a motion of two source pixels is half a pixel and the texture that shows it is gone,
    while above 256 pixels a face holds little but sensor noise and the time grows. Then the three channels are
    averaged over areas down to ``size``, strain after it was taken from the fine flow, as in the paper's data.

    Args:
        onset: (S, S) uint8 grey face crop.
        apex: (S, S) uint8 grey face crop, the same square of the apex frame.
        method: as in :func:`optical_flow`.
        size: side F of the flow image in pixels.

    Returns:
        (F, F, 3) float16: flow_u and flow_v in pixels of the F-sized crop, strain in pixels per pixel.

    Raises:
        ValueError: a crop that is not square; as :func:`optical_flow`.
    """
    if onset.ndim != 2 or onset.shape[0] != onset.shape[1]:
        raise ValueError(f"a face crop must be square, got {onset.shape}")
    work = max(size, min(onset.shape[0], WORKING_SIZE))
    flow = optical_flow(_resized(onset, work), _resized(apex, work), method)
    fine = np.dstack([flow * np.float32(size / work), optical_strain(flow)])
    return _resized(fine, size).astype(np.float16)


def _resized(picture: NDArray[_Scalar], side: int) -> NDArray[_Scalar]:
    now = picture.shape[0]
    if now == side:
        return picture
    kind = cv2.INTER_AREA if side < now else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (side, side), interpolation=kind), picture.dtype)
