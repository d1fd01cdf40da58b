"""Optical strain: how much the skin is stretched, from the flow's derivatives.

The magnitude is ``sqrt(ux^2 + vy^2 + (uy + vx)^2 / 2)``, the Frobenius norm of the infinitesimal strain tensor (Liong
et al., STSTNet, https://arxiv.org/abs/1902.03634, eq. 5-7). Public implementations differ in the derivatives; each is a
named kind here, so that features made elsewhere can be made again:

``central``
    Differences over two pixels, one-sided at the border, as ``numpy.gradient``: they belong to the pixel itself.
``forward``, ``backward``
    Differences to the next or from the previous pixel, zero where there is none (as in SoftNet and SKD-TSTSAN, and as
    in MEAN); half a pixel off.
``sobel``
    Sobel's 3x3 derivatives, the border repeated, and ``(uy^2 + vx^2) / 2`` for the shear (as in MEB), which a mere
    rotation of the head does not leave at zero.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from htnet.config.prepare import StrainKind


def optical_strain(flow: Tensor, kind: StrainKind = "central") -> Tensor:
    """Magnitude of optical strain.

    Args:
        flow: (B, 2, H, W) float, flow_u and flow_v in pixels, H and W at least 2.
        kind: how derivatives are taken.

    Returns:
        (B, H, W), pixels per pixel, so it does not change when the flow image is resized; never negative.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(StrainKind):
        raise ValueError(f"strain must be one of {', '.join(get_args(StrainKind))}, got {kind!r}")
    down, right = _derivatives(flow, kind)
    (u_x, v_x), (u_y, v_y) = right.unbind(1), down.unbind(1)
    shear = u_y.square() + v_x.square() if kind == "sobel" else (u_y + v_x).square()
    return (u_x.square() + v_y.square() + 0.5 * shear).sqrt()


def _derivatives(flow: Tensor, kind: StrainKind) -> tuple[Tensor, Tensor]:
    """Derivatives along y and along x, each as the flow's shape."""
    if kind == "central":
        down, right = torch.gradient(flow, dim=(2, 3))
        return down, right
    if kind == "sobel":
        wide = F.pad(flow, (1, 1, 1, 1), mode="replicate")
        smooth_y = (wide[..., :-2, :] + 2 * wide[..., 1:-1, :] + wide[..., 2:, :]) / 4
        smooth_x = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]) / 4
        return (smooth_x[..., 2:, :] - smooth_x[..., :-2, :]) / 2, (smooth_y[..., 2:] - smooth_y[..., :-2]) / 2
    start, end = (0, 1) if kind == "forward" else (1, 0)
    down = F.pad(flow.diff(dim=2), (0, 0, start, end))
    return down, F.pad(flow.diff(dim=3), (start, end, 0, 0))
