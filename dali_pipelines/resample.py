"""Changes of a batch applied on its device: from flow images to mosaics, all samples at once.

This is batched PyTorch, not nodes of the DALI graph. A change is a different affine map for each region of each sample;
turning, mirroring, scaling and cutting are one interpolation here. As DALI operators they would be five passes with two
interpolations. On a CPU the price of a pass per sample is higher than its work at 28 pixels (docs/adr/0008).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dali_pipelines.augment import AugmentationPlan
from htnet.data.transform import FlowTransform, standard


class Changes(NamedTuple):
    """Changes of B samples as the device needs them."""

    matrices: Tensor
    """(B, 3, 3) float32, maps (u, v, strain) to their new values."""
    windows: Tensor
    """(B, 4, 2, 3) float32, of :meth:`AugmentationPlan.windows`."""
    kept: Tensor
    """(B, 4) float32, 1 or 0 by region."""

    @staticmethod
    def of(plan: AugmentationPlan) -> Changes:
        """Return the changes of a plan, on the CPU; all flow images are of one size."""
        points = int(plan.flow_sizes[0]) // 4 * 2
        return Changes(*map(torch.from_numpy, (plan.matrix, plan.windows(points), plan.kept)))


def changed_mosaics(
    images: Tensor, changes: Changes, transform: FlowTransform, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Turn flow images into changed mosaics, the network's input.

    Places outside a turned picture repeat its edge. Regions are resized one by one, so that they do not blend. With
    ``transform.minmax`` the channels are stretched after the vectors are mapped, by the values of the whole picture,
    turned or not.

    Args:
        images: (B, 3, F, F) flow images as stored, channels (flow_u, flow_v, strain), any floating dtype.
        changes: of the B samples, on the device of ``images``.
        transform: size of the mosaic S, scaling, mean and standard deviation.
        moments: mean and inverse standard deviation, (1, 3, 1, 1), instead of the transform's.

    Returns:
        (B, 3, S, S) float32 on the device of ``images``.
    """
    size, half = images.shape[-1], transform.mosaic_size // 2
    vectors = _mapped(images.float(), changes.matrices)
    if transform.minmax:
        _stretch(vectors)
    points = size // 4 * 2
    grid = _grid(changes.windows, points, size)
    # the grid runs through the four regions in the mosaic's order: sampled, it is the mosaic
    mosaics = F.grid_sample(vectors, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if points != half:
        regions = mosaics.unflatten(3, (2, points)).unflatten(2, (2, points)).transpose(3, 4)  # (B, 3, 2, 2, p, p)
        resized = F.interpolate(regions.flatten(1, 3), size=(half, half), mode="bilinear", antialias=True)
        mosaics = resized.unflatten(1, (-1, 2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    mean, inverse = standard(transform, images.device) if moments is None else moments
    mosaics.sub_(mean).mul_(inverse)
    # a dropped region becomes the training mean, which standardising makes 0
    return mosaics.mul_(spread_regions(changes.kept, half))


def spread_regions(values: Tensor, half: int) -> Tensor:
    """Spread (B, 4) by region over the pixels of mosaics, (B, 1, 2 * half, 2 * half)."""
    return values.view(-1, 1, 2, 2).repeat_interleave(half, 2).repeat_interleave(half, 3)


def _mapped(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply the matrix of each sample to each of its pixels, (B, 3, F, F).

    By plain multiplications, as for the grid: a matrix product may run in TF32, which is too coarse for coordinates.
    """
    columns = matrices[..., None, None].unbind(2)
    mapped = columns[0] * images[:, :1]
    for index in (1, 2):
        mapped.addcmul_(columns[index], images[:, index : index + 1])
    return mapped


def _stretch(images: Tensor) -> None:
    """Scale each channel of each image to 0..255, in place; a constant channel becomes 0."""
    low = images.amin((2, 3), keepdim=True)
    span = images.amax((2, 3), keepdim=True) - low
    images.sub_(low).mul_(torch.where(span > 0, 255.0 / span, 0.0))


def _grid(windows: Tensor, points: int, size: int) -> Tensor:
    """Turn (B, 4, 2, 3) maps into a sampling grid, (B, 2 * points, 2 * points, 2).

    x and y run from -1 (the first pixel's centre) to 1 (the last one's).
    """
    line = torch.arange(points, device=windows.device, dtype=torch.float32)
    maps = windows.view(-1, 2, 2, 2, 3, 1, 1) * (2.0 / (size - 1))  # (B, 2, 2, x and y, 3, 1, 1)
    columns, rows, start = maps.unbind(4)
    grid = columns * line + (rows * line[:, None] + (start - 1.0))  # (B, 2, 2, x and y, points, points)
    return grid.permute(0, 1, 4, 2, 5, 3).reshape(-1, 2 * points, 2 * points, 2)
