"""The head's own motion, taken out of a flow field so that the expression's is left."""

from __future__ import annotations

import torch
from torch import Tensor

from htnet.config.prepare import HeadMotion

__all__ = ["without_head_motion"]

_STABLE = (-0.25, 0.25, 0.5, 0.75, 1.25)
"""Outer and inner corner of the left eye, nose root, corners of the right eye: shares of the way between the eyes."""
_PATCH = 1 / 40
"""Reach of a patch to each side of its place, as a share of the face crop's side."""


def without_head_motion(flow: Tensor, head_motion: HeadMotion, landmarks: Tensor | None = None) -> Tensor:
    """Subtract what the head as a rigid thing has moved from a flow field.

    ``median`` subtracts the middle value of flow_u and of flow_v over the face: the pixels whose centres lie in the
    disc inscribed in the crop, for its corners hold hair and background. An expression moves less than half of them.

    ``landmarks`` subtracts a similarity (a shift, a rotation and a change of scale), the least squares fit to the flow
    at five places that expressions hardly move: the four eye corners and the root of the nose. The contract has eye
    centres, nose tip and lip corners only, so the five are placed by proportion: the root of the nose in the middle
    between the eye centres, the corners on the line of the eyes, a quarter of the eye distance to both sides of each.
    Each counts with the middle value of the flow in a small square around it. What a head that turns or nods makes of
    a face's depth is no similarity and stays.

    A pair's bits do not depend on what else is in the batch: values are sorted, the few sums taken in a fixed order.

    Args:
        flow: (B, 2, S, S) flow_u and flow_v of square face crops, in pixels.
        head_motion: what is subtracted.
        landmarks: (B, 5, 2) of the onset in pixels of ``flow``, on its device; ``landmarks`` needs them.

    Returns:
        The same shape; ``flow`` itself with ``none``.

    Raises:
        ValueError: no landmarks where they are needed.
    """
    if head_motion == "none":
        return flow
    if head_motion == "median":
        return flow - _middle(flow[..., _disc(flow.shape[-1], flow.device)])[..., None, None]
    if landmarks is None:
        raise ValueError("head_motion=landmarks needs landmarks")
    return flow - _similarity(flow, landmarks.double())


def _middle(values: Tensor) -> Tensor:
    """Middle value of the last axis, the lower of two; a median of torch's on a GPU is not named deterministic."""
    return values.sort(dim=-1).values[..., (values.shape[-1] - 1) // 2]


def _disc(side: int, device: torch.device) -> Tensor:
    """Return a disc, (side, side) bool."""
    offset = torch.arange(side, dtype=torch.float64, device=device) - (side - 1) / 2
    return offset[:, None] ** 2 + offset**2 <= (side / 2) ** 2


def _similarity(flow: Tensor, landmarks: Tensor) -> Tensor:
    """Fit a similarity to the flow at the stable places and return its field; landmarks are float64."""
    side = flow.shape[-1]
    reach = max(1, round(side * _PATCH))
    left, right = landmarks[:, 0], landmarks[:, 1]
    found = [_patch(flow, left + (right - left) * share, reach) for share in _STABLE]
    # around their middle the shift is the mean flow, and turn and growth are sums of products over one of squares
    centre, shift = _mean([place for place, _ in found]), _mean([moved for _, moved in found])
    turn, growth, spread = (torch.zeros_like(centre[:, 0]) for _ in range(3))
    for place, moved in found:
        (x, y), (u, v) = (place - centre).unbind(1), moved.unbind(1)
        growth, turn, spread = growth + (x * u + y * v), turn + (x * v - y * u), spread + (x * x + y * y)
    spread = spread.clamp(min=1.0)  # all places in one: a shift is all that can be told
    growth, turn = (growth / spread)[:, None, None], (turn / spread)[:, None, None]
    axis = torch.arange(side, dtype=torch.float64, device=flow.device)
    x, y = axis - centre[:, 0, None, None], axis[:, None] - centre[:, 1, None, None]
    planes = growth * x - turn * y, turn * x + growth * y
    return torch.stack([plane + shift[:, k, None, None] for k, plane in enumerate(planes)], dim=1).to(flow.dtype)


def _patch(flow: Tensor, place: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Return the pixel nearest to a place, and the median of the flow around it; both (B, 2) float64."""
    pixel = place.round().clamp(reach, flow.shape[-1] - 1 - reach).long()
    offset = torch.arange(-reach, reach + 1, device=flow.device)
    columns, rows = (pixel[:, k, None] + offset for k in (0, 1))
    sample = torch.arange(len(flow), device=flow.device)[:, None, None]
    patch = flow[sample, :, rows[:, :, None], columns[:, None, :]]
    return pixel.double(), _middle(patch.flatten(1, 2).transpose(1, 2)).double()


def _mean(vectors: list[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total / len(vectors)
