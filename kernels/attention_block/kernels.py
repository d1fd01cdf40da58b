"""The fused Triton kernel of the attention block: norm, projections, attention, bias and residual in one program.

Names, tiles and column parts are those of :mod:`kernels.local_attention.kernels`; in comments, C stands for the
channels of x, padded to the power of two WIDTH.

What lives where. The normalised tile [T, C] is an operand of all 3 * A products with ``qkv_weight`` and belongs into
shared memory. The compiler puts there what a product gets straight from a load; what is computed it keeps in registers,
128 of a thread's 255 for this tile. So the tile takes a detour through the rows of ``out`` that the program will write
anyway, and the heads' outputs, which wait for the output projection, take one through ``attended``. A program reads
back only what it wrote itself, behind a barrier of its own threads; the lines are in the L2 cache still. Without the
detours the kernel spills (kernels/README.md).
"""

# arguments of kernels are pointers and scalars of Triton, described beside them; an annotation other than constexpr
# would be read as a type to cast to
# and Triton unpacks no tuple within another, so that tuples grow by addition
# Triton's compiler reads these functions: it takes no Python type hints for values and no unpacking in tuples
# ruff: noqa: ANN001, ANN201, ANN202, RUF005

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
def _normalise(x, rows, valid, norm_weight, norm_bias, eps, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
               STEP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Layer norm of the rows that begin at ``x + rows``, computed in float32: [T, C]; 0 past CHANNELS.

    The statistics are taken STEP columns at a time, from the cache: a tile [T, C] of float32 would fill the registers.
    """
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, STEP):
        total += tl.sum(_load_columns(x, rows, valid, start + tl.arange(0, STEP), CHANNELS), 1)
    mean = total / CHANNELS  # [T]
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, STEP):
        # the squares of the deviations: their sum keeps its digits where the mean is large against the spread
        part = start + tl.arange(0, STEP)  # [STEP]
        centred = _load_columns(x, rows, valid, part, CHANNELS) - mean[:, None]  # [T, STEP]
        total += tl.sum(tl.where((part < CHANNELS)[None, :], centred * centred, 0.0), 1)
    spread = 1.0 / tl.sqrt_rn(total / CHANNELS + eps)  # [T]
    column = tl.arange(0, WIDTH)  # [C]
    gain = tl.load(norm_weight + column, mask=column < CHANNELS, other=0.0).to(tl.float32)  # [C]
    bias = tl.load(norm_bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)  # [C]
    centred = _load_columns(x, rows, valid, column, CHANNELS) - mean[:, None]  # [T, C]
    return centred * spread[:, None] * gain[None, :] + bias[None, :]


@triton.jit
def _load_columns(base, rows, valid, column, CHANNELS: tl.constexpr):
    """Some columns of the rows that begin at ``base + rows``, in float32; 0 past CHANNELS and in empty slots."""
    mask = valid[:, None] & (column < CHANNELS)[None, :]
    return tl.load(base + rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_tile(base, rows, valid, START: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Columns START .. START + COUNT of the rows that begin at ``base + rows``; 0 past CHANNELS and in empty slots."""
    column = START + tl.arange(0, COUNT)  # [COUNT]
    mask = valid[:, None] & (column < CHANNELS)[None, :]
    return tl.load(base + rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(base, rows, valid, tile, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Write ``tile`` [T, COUNT], in the dtype of ``base``, without empty slots and columns past CHANNELS."""
    column = tl.arange(0, COUNT)  # [COUNT]
    mask = valid[:, None] & (column < CHANNELS)[None, :]
    tl.store(base + rows[:, None] + column[None, :], _narrow(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def _weight_rows(weight, COUNT: tl.constexpr, ROWS: tl.constexpr, column, CHANNELS: tl.constexpr):
    """Columns ``column`` of COUNT rows from ``weight`` on, 0 past the first ROWS: [COUNT, columns]."""
    row = tl.arange(0, COUNT)  # [COUNT]
    mask = (row < ROWS)[:, None] & (column < CHANNELS)[None, :]
    return tl.load(weight + row[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _project_part(parts, weight, COUNT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """Products of the normalised tile with COUNT rows of ``weight``, of which ROWS exist: [T, COUNT]."""
    total = None
    for start in tl.static_range(0, CHANNELS, CHUNK):
        rows = _weight_rows(weight, COUNT, ROWS, start + tl.arange(0, CHUNK), CHANNELS)  # [COUNT, CHUNK]
        total = _dot(parts[start // CHUNK], tl.trans(rows), total)
    return _narrow(total, weight.dtype.element_ty)


@triton.jit
def _project(parts, weight, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr,
             CHANNELS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """A head's queries, keys or values, whose rows begin at ``weight``: [T, W0], [T, W1], in the weights' dtype."""
    first = _project_part(parts, weight, FIRST, HEAD_DIM, CHANNELS, CHUNK)
    second = first
    if SECOND > 0:
        second = _project_part(parts, weight + FIRST * CHANNELS, SECOND, HEAD_DIM - FIRST, CHANNELS, CHUNK)
    return first, second


@triton.jit
def fused_forward(
    x,  # (B, H, W, C), contiguous
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    qkv_weight,  # (3*A*D, C), contiguous
    out_weight,  # (A*D, C), contiguous: transposed, so that its rows begin where a wide load may
    out_bias,  # (C,)
    attended,  # (B, H, W, A, W0 + W1), contiguous: scratch
    out,  # (B, H, W, C), contiguous
    num_blocks,  # B * SIDE^2
    eps,
    score_scale,  # scale * log2(e)
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
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

    Grid: cdiv(num_blocks, PACKED) programs. A program computes the output of its tokens and reads all weights once.
    """
    INNER: tl.constexpr = NUM_HEADS * HEAD_DIM
    COLUMNS: tl.constexpr = FIRST + SECOND
    block, token, valid = _packed_slots(tl.program_id(0), num_blocks, PACKED, BLOCK_H * BLOCK_W, TILE)
    sample, row, column = _locate(block, token, SIDE, BLOCK_H, BLOCK_W, WIDE)
    rows = _dense(sample, row, column, CHANNELS, SIDE, BLOCK_H, BLOCK_W)  # [T]
    head_rows = _dense(sample, row, column, NUM_HEADS * COLUMNS, SIDE, BLOCK_H, BLOCK_W)  # [T]

    normed = _normalise(x, rows, valid, norm_weight, norm_bias, eps, CHANNELS, WIDTH, STEP, TILE)  # [T, C]
    _store_tile(out, rows, valid, normed, WIDTH, CHANNELS)
    tl.debug_barrier()  # what the threads wrote is there for all of them to read
    parts = ()  # the normalised tile in pieces, [T, CHUNK] each
    for start in tl.static_range(0, CHANNELS, CHUNK):
        parts = parts + (_load_tile(out, rows, valid, start, CHUNK, CHANNELS),)

    for head in tl.static_range(NUM_HEADS):
        base = qkv_weight + head * (HEAD_DIM * CHANNELS)
        k0, k1 = _project(parts, base + INNER * CHANNELS, FIRST, SECOND, HEAD_DIM, CHANNELS, CHUNK)
        v0, v1 = _project(parts, base + 2 * INNER * CHANNELS, FIRST, SECOND, HEAD_DIM, CHANNELS, CHUNK)
        q0, q1 = _project(parts, base, FIRST, SECOND, HEAD_DIM, CHANNELS, CHUNK)
        scores = _products(q0, q1, k0, k1, SECOND) * score_scale  # [T, T]
        weights = _packed_weights(scores, BLOCK_H * BLOCK_W, TILE)  # [T, T]
        o0, o1 = _combine(_narrow(weights, v0.dtype), v0, v1, SECOND)  # [T, W0], [T, W1]
        _store_tile(attended + head * COLUMNS, head_rows, valid, o0, FIRST, FIRST)
        if SECOND > 0:
            _store_tile(attended + head * COLUMNS + FIRST, head_rows, valid, o1, SECOND, SECOND)

    tl.debug_barrier()
    first = ()  # the heads' outputs, [T, W0] each
    second = ()  # [T, W1] each
    for head in tl.static_range(NUM_HEADS):
        first = first + (_load_tile(attended + head * COLUMNS, head_rows, valid, 0, FIRST, FIRST),)
        if SECOND > 0:
            second = second + (_load_tile(attended + head * COLUMNS + FIRST, head_rows, valid, 0, SECOND, SECOND),)
    for start in tl.static_range(0, CHANNELS, STEP):
        channel = start + tl.arange(0, STEP)  # [STEP]
        total = tl.load(out_bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        total += _load_tile(x, rows, valid, start, STEP, CHANNELS).to(tl.float32)  # [T, STEP]
        for head in tl.static_range(NUM_HEADS):
            base = out_weight + head * (HEAD_DIM * CHANNELS)
            total = _dot(first[head], _weight_rows(base, FIRST, HEAD_DIM, channel, CHANNELS), total)
            if SECOND > 0:
                base += FIRST * CHANNELS
                total = _dot(second[head], _weight_rows(base, SECOND, HEAD_DIM - FIRST, channel, CHANNELS), total)
        _store_tile(out + start, rows, valid, total, STEP, CHANNELS - start)
