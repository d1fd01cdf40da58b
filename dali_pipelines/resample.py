"""The changes of a batch applied on its device: from flow images to mosaics, all samples at once.

Batched PyTorch, not nodes of the DALI graph: a change is a different affine map for each region of each sample, and
turning, mirroring, scaling and cutting are one interpolation here. As a chain of DALI operators they are five passes
with two interpolations, and on a CPU every pass has a price per sample that is higher than its work at 28 pixels
(docs/adr/0008).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dali_pipelines.augment import Changes
from dali_pipelines.graph import FlowTransform

_TINY = 1e-20  # smaller than any span of a float16 flow image that is not constant; keeps 0 / 0 out of a constant one


def changed_mosaics(images: Tensor, changes: Changes, transform: FlowTransform) -> Tensor:
    """The network's input of changed flow images.

    What lies outside a turned picture repeats its edge. Regions are resized one by one, so that they do not blend.
    With ``transform.minmax`` the channels are stretched after the vectors are mapped, by the values of the whole
    picture, turned or not.

    Args:
        images: (B, 3, F, F) flow images as stored, channels (flow_u, flow_v, strain), any floating dtype.
        changes: of the B samples.
        transform: size of the mosaic S, scaling, mean and standard deviation.

    Returns:
        (B, 3, S, S) float32 on the device of ``images``.
    """
    size, half = images.shape[-1], transform.mosaic_size // 2
    vectors = torch.bmm(_tensor(changes.matrix, images), images.float().flatten(2)).view(images.shape)
    gain, shift = _scaling(vectors, transform)
    points = size // 4 * 2
    grid = _grid(_tensor(changes.windows(points), images), points, size)
    # the grid runs through the four regions in the mosaic's order, so that what comes out is the mosaic
    mosaics = F.grid_sample(vectors, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if points != half:
        regions = mosaics.unflatten(3, (2, points)).unflatten(2, (2, points)).transpose(3, 4)  # (B, 3, 2, 2, p, p)
        resized = F.interpolate(regions.flatten(1, 3), size=(half, half), mode="bilinear", antialias=True)
        mosaics = resized.unflatten(1, (-1, 2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    mosaics.mul_(gain).add_(shift)
    if not changes.kept.all():
        # a region that is dropped is the training mean, which standardising makes 0
        kept = _tensor(changes.kept, images).view(-1, 1, 2, 2)
        mosaics *= kept.repeat_interleave(half, 2).repeat_interleave(half, 3)
    return mosaics


def _scaling(vectors: Tensor, transform: FlowTransform) -> tuple[Tensor, Tensor]:
    """Factor and summand, (B or 1, 3, 1, 1), of stretching to 0..255 (where asked for) and standardising in one."""
    mean, std = (
        torch.tensor(values, device=vectors.device).view(1, 3, 1, 1) for values in (transform.mean, transform.std)
    )
    if not transform.minmax:
        return 1.0 / std, -mean / std
    low = vectors.amin((2, 3), keepdim=True)
    stretch = 255.0 / (vectors.amax((2, 3), keepdim=True) - low).clamp_min(_TINY)
    return stretch / std, -(low * stretch + mean) / std


def _grid(windows: Tensor, points: int, size: int) -> Tensor:
    """(B, 4, 2, 3) maps -> (B, 2 * points, 2 * points, 2), x and y from -1 (first pixel's centre) to 1 (last one's)."""
    line = torch.arange(points, device=windows.device, dtype=torch.float32)
    row, column = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([column, row, torch.ones_like(row)]).view(3, -1)
    maps = windows * (2.0 / (size - 1))
    maps[..., 2] -= 1.0
    grid = (maps.flatten(0, 2) @ places).view(-1, 2, 2, 2, points, points)  # (B, 2, 2, x and y, points, points)
    return grid.permute(0, 1, 4, 2, 5, 3).reshape(-1, 2 * points, 2 * points, 2)


def _tensor(values: object, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).to(like.device, non_blocking=True)
