"""The fused Triton kernel of the attention block: norm, projections, attention, bias and residual in one program.

Names, tiles and column parts are those of :mod:`kernels.local_attention.kernels`; in comments, C stands for the
channels of x, padded to the power of two WIDTH.

What has to live where. The normalised tile [T, C] is an operand of all 3 * A products with ``qkv_weight``, so the
compiler keeps it in shared memory. A head's q, k and v are rounded to the weights' dtype as soon as they are complete,
and so is its output, which waits in registers for the output projection. That runs at the end, in steps of STEP columns:
an accumulator [T, C] beside q, k and v would not fit into the registers of a thread.
"""

# arguments of kernels are pointers and scalars of Triton, described beside them; an annotation other than constexpr
# would be read as a type to cast to
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from kernels.local_attention.kernels import (
    _combine,
    _dense,
    _dot,
    _locate,
    _narrow,
    _packed_slots,
    _packed_weights,
    _products,
)

__all__ = ["fused_forward"]


@triton.jit
def _columns(x, rows, valid, column, CHANNELS: tl.constexpr):
    """Some columns of the rows that begin at ``x + rows``, in float32; 0 past CHANNELS and in empty slots."""
    mask = valid[:, None] & (column < CHANNELS)[None, :]
    return tl.load(x + rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x, rows, valid, norm_weight, norm_bias, eps, dtype: tl.constexpr,
               CHANNELS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Layer norm of the rows that begin at ``x + rows``, computed in float32: [T, C]; 0 past CHANNELS.

    The statistics are taken in steps of STEP columns, from the cache: a tile [T, C] of float32 would fill the registers.
    """
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, STEP):
        total += tl.sum(_columns(x, rows, valid, start + tl.arange(0, STEP), CHANNELS), 1)
    mean = total / CHANNELS  # [T]
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, STEP):
        # the squares of the deviations: their sum keeps its digits where the mean is large against the spread
        column = start + tl.arange(0, STEP)  # [STEP]
        centred = _columns(x, rows, valid, column, CHANNELS) - mean[:, None]  # [T, STEP]
        total += tl.sum(tl.where((column < CHANNELS)[None, :], centred * centred, 0.0), 1)
    spread = 1.0 / tl.sqrt_rn(total / CHANNELS + eps)  # [T]
    column = tl.arange(0, WIDTH)  # [C]
    gain = tl.load(norm_weight + column, mask=column < CHANNELS, other=0.0).to(tl.float32)  # [C]
    bias = tl.load(norm_bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)  # [C]
    centred = _columns(x, rows, valid, column, CHANNELS) - mean[:, None]  # [T, C]
    return _narrow(centred * spread[:, None] * gain[None, :] + bias[None, :], dtype)


@triton.jit
def _weight_rows(weight, START: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, column, CHANNELS: tl.constexpr):
    """Rows START .. START + COUNT of the ROWS rows that begin at ``weight``, 0 past these: [COUNT, columns]."""
    row = START + tl.arange(0, COUNT)  # [COUNT]
    mask = (row < ROWS)[:, None] & (column < CHANNELS)[None, :]
    return tl.load(weight + row[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _head_weights(weight, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr, column,
                  CHANNELS: tl.constexpr):  # fmt: skip
    """The two parts of the HEAD_DIM rows that begin at ``weight``: [W0, columns], [W1, columns]."""
    first = _weight_rows(weight, 0, FIRST, HEAD_DIM, column, CHANNELS)
    second = first
    if SECOND > 0:
        second = _weight_rows(weight, FIRST, SECOND, HEAD_DIM, column, CHANNELS)
    return first, second


@triton.jit
def _project(normed, w0, w1, SECOND: tl.constexpr):
    """One of a head's queries, keys or values: [T, W0], [T, W1], rounded to the weights' dtype."""
    first = _narrow(_dot(normed, tl.trans(w0), None), normed.dtype)
    second = first
    if SECOND > 0:
        second = _narrow(_dot(normed, tl.trans(w1), None), normed.dtype)
    return first, second


@triton.jit
def fused_forward(
    x,  # (B, H, W, C), contiguous
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    qkv_weight,  # (3*A*D, C), contiguous
    out_weight,  # (A*D, C), contiguous: transposed, so that its rows begin where a wide load may
    out_bias,  # (C,)
    out,  # (B, H, W, C), contiguous
    num_blocks,  # B * SIDE^2
    eps,
    score_scale,  # scale * log2(e)
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The attention block on tiles of PACKED whole blocks.

    Grid: cdiv(num_blocks, PACKED) programs. A program reads its tokens twice (for the norm and as residual) and all
    weights once, and writes its tokens' output. Heads are unrolled.
    """
    INNER: tl.constexpr = NUM_HEADS * HEAD_DIM
    block, token, valid = _packed_slots(tl.program_id(0), num_blocks, PACKED, BLOCK_H * BLOCK_W, TILE)
    sample, row, column = _locate(block, token, SIDE, BLOCK_H, BLOCK_W, WIDE)
    rows = _dense(sample, row, column, CHANNELS, SIDE, BLOCK_H, BLOCK_W)  # [T]
    normed = _normalise(x, rows, valid, norm_weight, norm_bias, eps, qkv_weight.dtype.element_ty,
                        CHANNELS, WIDTH, STEP, TILE)  # fmt: skip

    channel = tl.arange(0, WIDTH)  # [C]
    attended = ()  # of each head its output's two parts, [T, W0] and [T, W1]
    for head in tl.static_range(NUM_HEADS):
        base = qkv_weight + head * HEAD_DIM * CHANNELS
        w0, w1 = _head_weights(base, FIRST, SECOND, HEAD_DIM, channel, CHANNELS)
        q0, q1 = _project(normed, w0, w1, SECOND)
        w0, w1 = _head_weights(base + INNER * CHANNELS, FIRST, SECOND, HEAD_DIM, channel, CHANNELS)
        k0, k1 = _project(normed, w0, w1, SECOND)
        scores = _products(q0, q1, k0, k1, SECOND) * score_scale  # [T, T]
        weights = _narrow(_packed_weights(scores, BLOCK_H * BLOCK_W, TILE), normed.dtype)  # [T, T]
        w0, w1 = _head_weights(base + 2 * INNER * CHANNELS, FIRST, SECOND, HEAD_DIM, channel, CHANNELS)
        v0, v1 = _project(normed, w0, w1, SECOND)
        o0, o1 = _combine(weights, v0, v1, SECOND)
        attended = attended + (_narrow(o0, normed.dtype), _narrow(o1, normed.dtype))

    for start in tl.static_range(0, CHANNELS, STEP):
        channel = start + tl.arange(0, STEP)  # [STEP]
        total = tl.zeros([TILE, STEP], tl.float32)
        for head in tl.static_range(NUM_HEADS):
            base = out_weight + head * HEAD_DIM * CHANNELS
            w0, w1 = _head_weights(base, FIRST, SECOND, HEAD_DIM, channel, CHANNELS)
            total = _dot(attended[2 * head], w0, total)
            if SECOND > 0:
                total = _dot(attended[2 * head + 1], w1, total)
        inside = channel < CHANNELS  # [STEP]
        mask = valid[:, None] & inside[None, :]
        offsets = rows[:, None] + channel[None, :]  # [T, STEP]
        total += tl.load(out_bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        total += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets, _narrow(total, out.dtype.element_ty), mask=mask)
