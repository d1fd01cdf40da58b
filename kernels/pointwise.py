"""Passes between the matrix products of a transformer layer: Triton kernels and their operators.

``residual_norm`` adds a linear map's output and bias to the residual stream and normalises the sum, ``residual`` only
adds, ``gelu`` adds a bias and applies the exact GELU, ``max_pool`` is the pooling between levels. Left to torch, the
bias gradients alone are 7 % of an epoch's kernels on a GPU (docs/benchmarks/gpu.md). Here the backward passes sum them
up on the way: each program over its rows, and a second kernel over the programs.

Arithmetic is float32. Results are rounded once to the input's dtype. Nothing is atomic, so equal input gives equal
bits. Letters: R rows (tokens), C columns (channels), P programs over rows.
"""

# a kernel's arguments are pointers and scalars of Triton, described beside them; Triton takes no type hints for values:
# it would read an annotation other than constexpr as a type to cast to
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.local_attention.kernels import _narrow

__all__ = ["ROWS", "WIDTH", "gelu", "max_pool", "residual", "residual_norm", "row_tile"]

WIDTH: Final = 256
"""Columns of a tile where no row has to be whole."""
ROWS: Final = 32
"""Rows of a program there."""
_PROGRAMS: Final = 128
"""Most programs over the rows of a layer norm; about one for each multiprocessor."""
_ROOT_HALF: Final = tl.constexpr(math.sqrt(0.5))
_DENSITY: Final = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def norm_forward(
    x,  # [R, C] residual stream
    delta,  # [R, C] output of a linear map, without its bias
    bias,  # [C]
    gain,  # [C]
    shift,  # [C]
    total,  # [R, C] out: x + delta + bias
    normed,  # [R, C] out: layer norm of total
    means,  # [R] float32 out
    scales,  # [R] float32 out: 1 / standard deviation
    rows,
    columns,
    eps,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    column = tl.arange(0, COLUMNS)  # [COLUMNS]
    here = column < columns
    valid = (row < rows)[:, None] & here[None, :]
    place = row[:, None] * columns + column[None, :]
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    value += tl.load(delta + place, mask=valid, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[None, :]
    rounded = _narrow(value, total.dtype.element_ty)
    tl.store(total + place, rounded, mask=valid)
    value = rounded.to(tl.float32)  # as the backward will read it
    mean = tl.sum(value, 1) / columns
    centred = tl.where(valid, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / columns + eps)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(scales + row, scale, mask=row < rows)
    weight = tl.load(gain + column, mask=here, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(shift + column, mask=here, other=0.0).to(tl.float32)[None, :]
    out = centred * scale[:, None] * weight + offset
    tl.store(normed + place, _narrow(out, normed.dtype.element_ty), mask=valid)


@triton.jit
def norm_backward(
    grad_total,  # [R, C]
    grad_normed,  # [R, C]
    total,  # [R, C]
    means,  # [R] float32
    scales,  # [R] float32
    gain,  # [C]
    grad,  # [R, C] out: of x and of delta
    sums,  # [P, 3, C] float32 out: gradients of bias, gain and shift over a program's rows
    rows,
    columns,
    tiles,  # tiles of a program
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    here = column < columns
    weight = tl.load(gain + column, mask=here, other=0.0).to(tl.float32)[None, :]
    of_bias = tl.zeros([COLUMNS], tl.float32)
    of_gain = tl.zeros([COLUMNS], tl.float32)
    of_shift = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * TILE + tl.arange(0, TILE)
        inside = row < rows
        valid = inside[:, None] & here[None, :]
        place = row[:, None] * columns + column[None, :]
        mean = tl.load(means + row, mask=inside, other=0.0)[:, None]
        scale = tl.load(scales + row, mask=inside, other=0.0)[:, None]
        value = tl.load(total + place, mask=valid, other=0.0).to(tl.float32)
        standard = tl.where(valid, (value - mean) * scale, 0.0)
        upstream = tl.load(grad_normed + place, mask=valid, other=0.0).to(tl.float32)
        of_gain += tl.sum(upstream * standard, 0)
        of_shift += tl.sum(upstream, 0)
        weighted = upstream * weight
        along = tl.sum(weighted * standard, 1) / columns
        even = tl.sum(weighted, 1) / columns
        own = (weighted - even[:, None] - standard * along[:, None]) * scale
        own = tl.where(valid, own, 0.0) + tl.load(grad_total + place, mask=valid, other=0.0).to(tl.float32)
        of_bias += tl.sum(own, 0)
        tl.store(grad + place, _narrow(own, grad.dtype.element_ty), mask=valid)
    base = sums + program * 3 * columns + column
    tl.store(base, of_bias, mask=here)
    tl.store(base + columns, of_gain, mask=here)
    tl.store(base + 2 * columns, of_shift, mask=here)


@triton.jit
def add_bias(
    x,  # [R, C] residual stream
    delta,  # [R, C]
    bias,  # [C]
    out,  # [R, C]
    rows,
    columns,
    GELU: tl.constexpr,  # apply it to delta + bias; x is not read then
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < columns
    valid = (row < rows)[:, None] & here[None, :]
    place = row[:, None] * columns + column[None, :]
    value = tl.load(delta + place, mask=valid, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value *= 0.5 * (1.0 + tl.erf(value * _ROOT_HALF))
    else:
        value += tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, _narrow(value, out.dtype.element_ty), mask=valid)


@triton.jit
def add_bias_backward(
    grad_out,  # [R, C]
    delta,  # [R, C]; not read without GELU
    bias,  # [C]; not read without GELU
    grad,  # [R, C] out: of delta; not written without GELU, where it is grad_out
    sums,  # [P, C] float32 out: gradient of bias over a program's rows
    rows,
    columns,
    GELU: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < columns
    valid = (row < rows)[:, None] & here[None, :]
    place = row[:, None] * columns + column[None, :]
    own = tl.load(grad_out + place, mask=valid, other=0.0).to(tl.float32)
    if GELU:
        value = tl.load(delta + place, mask=valid, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[None, :]
        share = 0.5 * (1.0 + tl.erf(value * _ROOT_HALF))
        own *= share + value * tl.exp(-0.5 * value * value) * _DENSITY
        tl.store(grad + place, _narrow(own, grad.dtype.element_ty), mask=valid)
    tl.store(sums + tl.program_id(0) * columns + column, tl.sum(own, 0), mask=here)


@triton.jit
def sum_programs(
    sums,  # [P, C] float32
    out,  # [C]
    programs,
    columns,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < columns
    found = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, programs, TILE):
        row = start + tl.arange(0, TILE)
        valid = (row < programs)[:, None] & here[None, :]
        found += tl.sum(tl.load(sums + row[:, None] * columns + column[None, :], mask=valid, other=0.0), 0)
    tl.store(out + column, _narrow(found, out.dtype.element_ty), mask=here)


@triton.jit
def pool_backward(
    grad_out,  # [B, H', W', C]
    places,  # [B, H', W', C] int64: W * row + column of each maximum
    grad,  # [B, H, W, C] out
    height,
    width,
    out_height,
    out_width,
    channels,
    COLUMNS: tl.constexpr,
):
    pixel = tl.program_id(0)  # of all samples
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < channels
    own = pixel % (height * width)
    sample = (pixel // (height * width)).to(tl.int64)
    row, line = own // width, own % width
    total = tl.zeros([COLUMNS], tl.float32)
    # a pixel lies in the windows of at most two rows and columns, added in that order
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            window_row, window_column = row // 2 + i, line // 2 + j
            # the second window of an even row begins behind it
            exists = (window_row < out_height) & (window_column < out_width)
            exists = exists & ((i == 0) | (row % 2 == 1)) & ((j == 0) | (line % 2 == 1))
            base = ((sample * out_height + window_row) * out_width + window_column) * channels + column
            hit = tl.load(places + base, mask=here & exists, other=-1) == own
            # all of the row is read, in wide loads; a gradient that is not finite must not touch other pixels
            upstream = tl.load(grad_out + base, mask=here & exists, other=0.0).to(tl.float32)
            total += tl.where(hit, upstream, 0.0)
    tl.store(grad + pixel.to(tl.int64) * channels + column, _narrow(total, grad.dtype.element_ty), mask=here)


def row_tile(columns: int, elements: int) -> dict[str, int]:
    """Return the tile of whole rows: as many as make ``elements``, one at least."""
    wide = triton.next_power_of_2(columns)
    return {"TILE": max(1, elements // wide), "COLUMNS": wide}


@torch.library.custom_op("htnet::residual_norm_forward", mutates_args=())
def residual_norm_forward(
    x: Tensor, delta: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total, normed, means and scales of :func:`norm_forward`."""
    out = _norm_outputs(x)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    tile = row_tile(columns, 1024)
    with torch.cuda.device_of(x):
        norm_forward[(triton.cdiv(rows, tile["TILE"]),)](
            x.contiguous(), delta.contiguous(), bias, gain, shift, *out, rows, columns, eps, **tile
        )
    return out


@residual_norm_forward.register_fake
def _(x: Tensor, delta: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_outputs(x)


def _norm_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    means, scales = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return total, normed, means, scales


@torch.library.custom_op("htnet::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, means: Tensor, scales: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum, and (3, C) gradients of bias, gain and shift."""
    grad, columns = torch.empty_like(total), total.shape[-1]
    rows = total.numel() // columns
    tile = row_tile(columns, 2048)
    tiles = triton.cdiv(triton.cdiv(rows, tile["TILE"]), _PROGRAMS)
    programs = triton.cdiv(rows, tiles * tile["TILE"])
    sums = torch.empty(programs, 3 * columns, dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(total):
        norm_backward[(programs,)](
            grad_total.contiguous(),
            grad_normed.contiguous(),
            total,
            means,
            scales,
            gain,
            grad,
            sums,
            rows,
            columns,
            tiles,
            **tile,
        )
    return grad, _summed(sums, gain.dtype).view(3, columns)


@residual_norm_backward.register_fake
def _(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, means: Tensor, scales: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total), gain.new_empty(3, total.shape[-1])


def _summed(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (P, C) over the programs."""
    programs, columns = sums.shape
    out = torch.empty(columns, dtype=dtype, device=sums.device)
    with torch.cuda.device_of(sums):
        sum_programs[(triton.cdiv(columns, 64),)](sums, out, programs, columns, TILE=32, COLUMNS=64)
    return out


@torch.library.custom_op("htnet::add_bias_forward", mutates_args=())
def add_bias_forward(x: Tensor | None, delta: Tensor, bias: Tensor) -> Tensor:
    """Return ``x + delta + bias``; without ``x`` the GELU of ``delta + bias``."""
    delta = delta.contiguous()
    out, columns = torch.empty_like(delta), delta.shape[-1]
    rows = delta.numel() // columns
    base = delta if x is None else x.contiguous()
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, WIDTH))
    with torch.cuda.device_of(delta):
        add_bias[grid](base, delta, bias, out, rows, columns, GELU=int(x is None), TILE=8, COLUMNS=WIDTH)
    return out


@add_bias_forward.register_fake
def _(x: Tensor | None, delta: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)


@torch.library.custom_op("htnet::add_bias_backward", mutates_args=())
def add_bias_gradients(grad_out: Tensor, delta: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of delta and bias; without ``delta`` no GELU was applied, and the first one is empty."""
    grad_out = grad_out.contiguous()
    columns = grad_out.shape[-1]
    rows = grad_out.numel() // columns
    grad = torch.empty_like(grad_out) if delta is not None else grad_out.new_empty(0)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDTH))
    sums = torch.empty(grid[0], columns, dtype=torch.float32, device=grad_out.device)
    with torch.cuda.device_of(grad_out):
        add_bias_backward[grid](
            grad_out,
            grad_out if delta is None else delta,
            bias,
            grad,
            sums,
            rows,
            columns,
            GELU=int(delta is not None),
            TILE=ROWS,
            COLUMNS=WIDTH,
            num_warps=8,
        )
    return grad, _summed(sums, bias.dtype)


@add_bias_gradients.register_fake
def _(grad_out: Tensor, delta: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (0,) if delta is None else grad_out.shape
    return grad_out.new_empty(shape), torch.empty_like(bias)


@torch.library.custom_op("htnet::max_pool_backward", mutates_args=())
def max_pool_gradient(grad_out: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient of a 3x3 max-pool with stride 2 and padding 1, (B, H, W, C).

    ``grad_out`` and ``places`` are (B, H', W', C), ``places`` the position in the map, W * row + column, of each
    maximum. The gradients of a pixel's windows are added in the windows' order, in float32.
    """
    batch, out_height, out_width, channels = grad_out.shape
    grad = torch.empty(batch, height, width, channels, dtype=grad_out.dtype, device=grad_out.device)
    grid = (batch * height * width, triton.cdiv(channels, WIDTH))
    sizes = (height, width, out_height, out_width, channels)
    with torch.cuda.device_of(grad_out):
        pool_backward[grid](grad_out.contiguous(), places.contiguous(), grad, *sizes, COLUMNS=WIDTH, num_warps=2)
    return grad


@max_pool_gradient.register_fake
def _(grad_out: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    return grad_out.new_empty(grad_out.shape[0], height, width, grad_out.shape[3])


def residual_norm(
    x: Tensor, delta: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return ``x + delta + bias`` and its layer norm over the last dimension.

    Args:
        x, delta: (..., C).
        bias, gain, shift: (C,), in the dtype of ``x``.
        eps: added to the variance.
    """
    total, normed, *_ = _ResidualNorm.apply(x, delta, bias, gain, shift, eps)  # type: ignore[no-untyped-call] # torch's
    return total, normed


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Any:
        total, normed, means, scales = residual_norm_forward(x, delta, bias, gain, shift, eps)
        ctx.save_for_backward(total, means, scales, gain)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor) -> Any:
        grad, (of_bias, of_gain, of_shift) = residual_norm_backward(grad_total, grad_normed, *ctx.saved_tensors)
        return grad, grad, of_bias, of_gain, of_shift, None


def residual(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
    """Return ``x + delta + bias``; shapes as of :func:`residual_norm`."""
    out: Tensor = _Residual.apply(x, delta, bias)  # type: ignore[no-untyped-call] # torch's
    return out


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        out: Tensor = add_bias_forward(x, delta, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        _, of_bias = add_bias_gradients(grad_out, None, *ctx.saved_tensors)
        return grad_out, grad_out, of_bias


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return the exact (erf) GELU of ``x + bias``, (..., C) and (C,)."""
    out: Tensor = _Gelu.apply(x, bias)  # type: ignore[no-untyped-call] # torch's
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        out: Tensor = add_bias_forward(None, x, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return add_bias_gradients(grad_out, *ctx.saved_tensors)


def max_pool(x: Tensor) -> Tensor:
    """Pool 3x3 maxima with stride 2 and padding 1, (B, H, W, C) -> (B, H', W', C'); sum the gradient in fixed order."""
    pooled: Tensor = _MaxPool.apply(x)  # type: ignore[no-untyped-call] # torch's
    return pooled


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=3, stride=2, padding=1, return_indices=True)
        ctx.save_for_backward(places.permute(0, 2, 3, 1))
        ctx.sides = x.shape[1:3]
        return pooled.permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return max_pool_gradient(grad_out, *ctx.saved_tensors, *ctx.sides)
