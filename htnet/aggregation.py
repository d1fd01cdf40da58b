"""Level change of the network: a 3x3 convolution, a layer norm and a max-pool, channels last.

The convolution of a 2x2 map is one matrix product, and on a GPU the max-pool sums its gradient in a fixed order. Both
are the same functions as torch's.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BlockAggregation", "conv", "conv_2x2", "max_pool"]


class BlockAggregation(nn.Module):
    """Level change: 3x3 convolution, layer norm, 3x3 max-pool of stride 2; (B, H, W, C) -> (B, H', W', C').

    H' and W' are half of H and W, rounded up. It crosses block borders: this is how blocks learn of each other.
    ``weight`` is (C', 3, 3, C), the layout that a channels-last convolution reads without a copy.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, 3, 3, dim))
        self.bias = nn.Parameter(torch.empty(out_dim))
        self.norm = nn.LayerNorm(out_dim)
        self.fused = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch's Conv2d does: uniform within 1 / sqrt(9 * C)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        small = x.shape[1:3] == (2, 2)
        mixed: Tensor = self.norm((conv_2x2 if small else conv)(x, self.weight, self.bias))
        if self.fused:
            return fused_max_pool(mixed)
        if mixed.is_cuda:
            return max_pool(mixed)
        planes = mixed.permute(0, 3, 1, 2)
        pooled = F.max_pool2d(planes, 2) if small else F.max_pool2d(planes, kernel_size=3, stride=2, padding=1)
        return pooled.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Return the channels before and after."""
        return f"{self.weight.shape[3]}, {self.weight.shape[0]}"


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve 3x3 with zero padding 1: (B, H, W, C), (C', 3, 3, C), (C',) -> (B, H, W, C')."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)


def conv_2x2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute :func:`conv` of a 2x2 map as one matrix product: 20 of a convolution's 36 products are with padding."""
    taps: Tensor = _Taps.apply(weight)  # type: ignore[no-untyped-call] # torch's
    mixed: Tensor = F.linear(x.flatten(1), taps, bias.repeat(4)).unflatten(1, (2, 2, -1))
    return mixed


class _Taps(torch.autograd.Function):
    """Matrix of a 3x3 convolution with padding 1 of a 2x2 map: (C', 3, 3, C) -> (4*C', 4*C).

    Without it, autograd would make a gradient of the whole weight for each output position, zeros included, and add the
    four.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        out_dim, _, _, dim = weight.shape
        taps = weight.new_empty(2, 2, out_dim, 2, 2, dim)
        for i, j in product((0, 1), repeat=2):
            taps[i, j] = weight[:, 1 - i : 3 - i, 1 - j : 3 - j]
        return taps.view(4 * out_dim, 4 * dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        out_dim, _, _, dim = ctx.shape
        taps = gradient.reshape(2, 2, out_dim, 2, 2, dim)
        weight = gradient.new_zeros(ctx.shape)
        for i, j in product((0, 1), repeat=2):
            weight[:, 1 - i : 3 - i, 1 - j : 3 - j] += taps[i, j]
        return weight


def fused_max_pool(x: Tensor) -> Tensor:
    """Compute :func:`max_pool` with a backward of one kernel, which has no derivative itself."""
    from kernels.pointwise import max_pool as fused  # imports Triton

    pooled: Tensor = fused(x)
    return pooled


def max_pool(x: Tensor) -> Tensor:
    """Pool 3x3 maxima with stride 2 and padding 1, (B, H, W, C) -> (B, H', W', C'); sum the gradient in fixed order.

    Values and gradients are those of torch's max_pool2d, whose backward on a GPU counts as not deterministic.
    """
    pooled: Tensor = _MaxPool.apply(x)[0]  # type: ignore[no-untyped-call] # torch's
    return pooled


class _MaxPool(torch.autograd.Function):
    """Pooled map and, for the backward, the position in the map, H * row + column, of each maximum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=3, stride=2, padding=1, return_indices=True)
        return pooled.permute(0, 2, 3, 1), places.permute(0, 2, 3, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        batch, height, width, dim = ctx.shape
        rows, columns = gradient.shape[1:3]
        # the map with a rim for the taps of border windows that fall outside
        whole = gradient.new_zeros(
            (batch, 2 * rows + 1, 2 * columns + 1, dim), dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        first_row = 2 * torch.arange(rows, device=gradient.device).view(-1, 1, 1) - 1
        first_column = 2 * torch.arange(columns, device=gradient.device).view(-1, 1) - 1
        # a tap touches each pixel once, so a pixel's windows are added in the order of the taps
        for i, j in product((2, 1, 0), repeat=2):
            hit = places == (first_row + i) * width + first_column + j
            whole[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] += gradient.where(hit, 0)
        return whole[:, 1 : height + 1, 1 : width + 1].to(gradient.dtype)
