"""Triton kernels of local attention: a packed pair for small blocks, a tiled pair for large ones.

Names: a *tile* is the TILE tokens that a program holds at once, a *slot* is a place in it. Shape letters in comments: T
slots of a tile, D head_dim, and W0, W1 the columns of the two parts below.

Columns. A tile's columns must be powers of two, D need not be. Up to two parts, FIRST and SECOND columns wide, cover D.
For D = 85 they are 64 and 32: 96 columns are loaded, multiplied and kept in registers instead of 128. Every value of a
tile is therefore a pair; SECOND = 0 leaves the second part out.

Alignment. Strides are passed in units of VEC elements, the largest power of two that divides them and D. This tells the
compiler the width of a load: 16 bytes where D and the row are multiples of 8 bf16 elements, one element where they are
odd (D = 85).

Programs do not communicate and there are no atomics: the same input gives the same bits.
"""

# a kernel's arguments are pointers and scalars of Triton, described beside them; Triton takes no type hints for values:
# it would read an annotation other than constexpr as a type to cast to
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "packed_backward", "packed_forward", "tiled_backward", "tiled_forward"]

INTERPRETED: Final[bool] = triton.knobs.runtime.interpret
"""True if Triton's interpreter runs these kernels, because TRITON_INTERPRET was set when this module was imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(x, y, total):
    """Compute ``x @ y + total`` in float32; float32 operands are not rounded to TF32."""
    if _INTERPRETED:
        # the interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same and exact
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Convert float32 ``x`` to another dtype, rounded to nearest, ties to even."""
    if _INTERPRETED:  # noqa: SIM102, Triton decides such conditions one at a time
        if dtype == tl.bfloat16:
            # the interpreter cuts off instead of rounding; rounded here, it cuts off zeros only
            bits = x.to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _load_part(base, rows, valid, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load columns START .. START + WIDTH of the rows at ``base + rows``; 0 past HEAD_DIM and in empty slots."""
    column = START + tl.arange(0, WIDTH)  # [WIDTH]
    mask = valid[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load(base, rows, valid, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load the two column parts of a tile, [T, W0] and [T, W1]; without a second part, the first one twice."""
    first = _load_part(base, rows, valid, 0, FIRST, HEAD_DIM)
    second = first
    if SECOND > 0:
        second = _load_part(base, rows, valid, FIRST, SECOND, HEAD_DIM)
    return first, second


@triton.jit
def _store_part(base, rows, valid, part, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = START + tl.arange(0, WIDTH)  # [WIDTH]
    mask = valid[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] + column[None, :], _narrow(part, base.dtype.element_ty), mask=mask)


@triton.jit
def _store(base, rows, valid, first, second, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the two column parts of a tile in the dtype of ``base``, without empty slots and columns past HEAD_DIM."""
    _store_part(base, rows, valid, first, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        _store_part(base, rows, valid, second, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _products(x0, x1, y0, y1, SECOND: tl.constexpr):
    """Compute the dot products of the rows of two tiles over all columns, in float32: [T, T]."""
    products = _dot(x0, tl.trans(y0), None)
    if SECOND > 0:
        products = _dot(x1, tl.trans(y1), products)
    return products


@triton.jit
def _combine(weights, x0, x1, SECOND: tl.constexpr):
    """Multiply ``weights`` [T, T] by the rows of a tile, in float32, by column part."""
    first = _dot(weights, x0, None)
    second = first
    if SECOND > 0:
        second = _dot(weights, x1, None)
    return first, second


@triton.jit
def _locate(block, token, SIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr):
    """Return sample, row and column on the feature map of token ``token`` of block ``block``: the partition's formula.

    With WIDE they have 64 bits, and so do all offsets. Otherwise offsets fit into 32 bits, which halves the registers
    and the arithmetic of addresses.
    """
    sample = block // (SIDE * SIDE)
    row = block // SIDE % SIDE * BLOCK_H + token // BLOCK_W
    column = block % SIDE * BLOCK_W + token % BLOCK_W
    if WIDE:
        sample = sample.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return sample, row, column


@triton.jit
def _dense(sample, row, column, VEC: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BLOCK_H: tl.constexpr,
           BLOCK_W: tl.constexpr):  # fmt: skip
    """Compute the element offset of each token in a contiguous (B, H, W, CHANNELS) tensor, a multiple of VEC.

    VEC is stated because the compiler, left alone, finds a larger multiple than is true for one head and blocks of even
    width.
    """
    offset = ((sample * (SIDE * BLOCK_H) + row) * (SIDE * BLOCK_W) + column) * CHANNELS
    return tl.multiple_of(offset, VEC)


@triton.jit
def _rows(sample, row, column, stride_b, stride_h, stride_w, DENSE: tl.constexpr, VEC: tl.constexpr,
          CHANNELS: tl.constexpr, SIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Compute the element offset of each token in a (B, H, W, CHANNELS) tensor with strides in units of VEC elements.

    With DENSE the tensor is contiguous. Offsets are then multiples of the token's number, so one value serves all such
    tensors, which saves registers and arithmetic in the usual case.
    """
    offset = _dense(sample, row, column, VEC, CHANNELS, SIDE, BLOCK_H, BLOCK_W)
    if not DENSE:
        offset = tl.multiple_of((sample * stride_b + row * stride_h + column * stride_w) * VEC, VEC)
    return offset


@triton.jit
def _packed_slots(tile, num_blocks, PACKED: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Return block, token and validity of each slot of a tile of PACKED whole blocks; each [T].

    With one block to a tile the block's number stays a scalar, and so does most of the arithmetic on addresses.
    """
    slot = tl.arange(0, TILE)
    block = tile
    token = slot
    valid = slot < TOKENS
    if PACKED > 1:
        block = tile * PACKED + slot // TOKENS
        token = slot % TOKENS
        valid = (slot < PACKED * TOKENS) & (block < num_blocks)
    return block, token, valid


@triton.jit
def _packed_weights(scores, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Compute the softmax of base-2 scores [T, T] inside each block of a tile.

    Slots of the same block see each other. The slots left over at the end form an incomplete block of their own, whose
    queries and keys are zeros; so do the blocks after the last one. No row is ever without a key, so none gives NaN.
    """
    if TOKENS < TILE:
        slot = tl.arange(0, TILE)
        scores = tl.where((slot // TOKENS)[:, None] == (slot // TOKENS)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights * (1.0 / tl.sum(weights, 1))[:, None]


@triton.jit
def packed_forward(
    qkv,  # (B, H, W, 3*A*D), last dimension dense, else any strides
    out,  # (B, H, W, A*D), contiguous
    stride_b, stride_h, stride_w,  # strides of qkv in units of VEC elements
    num_blocks,  # B * SIDE^2
    score_scale,  # scale * log2(e)
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute attention within blocks of at most TILE tokens.

    Grid: one dimension of cdiv(num_blocks, PACKED) * A programs. The head runs fastest, so that neighbours read
    neighbouring parts of the same rows while these are in the cache. A program computes one head of PACKED blocks.
    """
    program = tl.program_id(0)
    head = program % NUM_HEADS
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    block, token, valid = _packed_slots(program // NUM_HEADS, num_blocks, PACKED, BLOCK_H * BLOCK_W, TILE)
    sample, row, column = _locate(block, token, SIDE, BLOCK_H, BLOCK_W, WIDE)
    rows = _rows(
        sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
    )  # [T]
    base = qkv + head * HEAD_DIM
    q0, q1 = _load(base, rows, valid, FIRST, SECOND, HEAD_DIM)  # [T, W0], [T, W1]
    k0, k1 = _load(base + CHANNELS, rows, valid, FIRST, SECOND, HEAD_DIM)
    v0, v1 = _load(base + 2 * CHANNELS, rows, valid, FIRST, SECOND, HEAD_DIM)

    scores = _products(q0, q1, k0, k1, SECOND) * score_scale  # [T, T]
    weights = _packed_weights(scores, BLOCK_H * BLOCK_W, TILE)  # [T, T]
    out0, out1 = _combine(_narrow(weights, v0.dtype), v0, v1, SECOND)  # [T, W0], [T, W1]

    out_rows = _dense(sample, row, column, VEC, CHANNELS, SIDE, BLOCK_H, BLOCK_W)  # [T]
    _store(out + head * HEAD_DIM, out_rows, valid, out0, out1, FIRST, SECOND, HEAD_DIM)


@triton.jit
def packed_backward(
    grad_out,  # (B, H, W, A*D), last dimension dense, else any strides
    qkv,  # (B, H, W, 3*A*D), last dimension dense, else any strides
    grad_qkv,  # (B, H, W, 3*A*D), contiguous
    grad_stride_b, grad_stride_h, grad_stride_w,  # strides of grad_out in units of VEC elements
    stride_b, stride_h, stride_w,  # strides of qkv in units of VEC elements
    num_blocks,  # B * SIDE^2
    scale,
    score_scale,  # scale * log2(e)
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, DENSE: tl.constexpr, GRAD_DENSE: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of :func:`packed_forward` from qkv and the upstream gradient alone.

    Grid and tiles are those of the forward. The weights are computed again: two small products instead of reading
    statistics. The softmax's gradient needs sum(P * dP) of a row, which is a row sum of the tile. With LATE, values and
    upstream gradient are loaded after the weights are computed: fewer loads under way, and fewer registers.
    """
    program = tl.program_id(0)
    head = program % NUM_HEADS
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    block, token, valid = _packed_slots(program // NUM_HEADS, num_blocks, PACKED, BLOCK_H * BLOCK_W, TILE)
    sample, row, column = _locate(block, token, SIDE, BLOCK_H, BLOCK_W, WIDE)
    rows = _rows(
        sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
    )  # [T]
    base = qkv + head * HEAD_DIM
    q0, q1 = _load(base, rows, valid, FIRST, SECOND, HEAD_DIM)  # [T, W0], [T, W1]
    k0, k1 = _load(base + CHANNELS, rows, valid, FIRST, SECOND, HEAD_DIM)
    if not LATE:
        v0, v1 = _load(base + 2 * CHANNELS, rows, valid, FIRST, SECOND, HEAD_DIM)
    grad_rows = _rows(
        sample,
        row,
        column,
        grad_stride_b,
        grad_stride_h,
        grad_stride_w,
        GRAD_DENSE,
        VEC,
        CHANNELS,
        SIDE,
        BLOCK_H,
        BLOCK_W,
    )  # [T]
    if not LATE:
        g0, g1 = _load(grad_out + head * HEAD_DIM, grad_rows, valid, FIRST, SECOND, HEAD_DIM)

    scores = _products(q0, q1, k0, k1, SECOND) * score_scale  # [T, T]
    weights = _packed_weights(scores, BLOCK_H * BLOCK_W, TILE)  # [T, T]
    if LATE:
        v0, v1 = _load(base + 2 * CHANNELS, rows, valid, FIRST, SECOND, HEAD_DIM)
        g0, g1 = _load(grad_out + head * HEAD_DIM, grad_rows, valid, FIRST, SECOND, HEAD_DIM)
    grad_weights = _products(g0, g1, v0, v1, SECOND)  # [T, T]
    delta = tl.sum(weights * grad_weights, 1)  # [T]
    grad_scores = _narrow(weights * (grad_weights - delta[:, None]), q0.dtype)  # [T, T], without the factor scale

    out_rows = _dense(sample, row, column, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W)  # [T]
    out_base = grad_qkv + head * HEAD_DIM
    x0, x1 = _combine(tl.trans(_narrow(weights, g0.dtype)), g0, g1, SECOND)  # dV: [T, W0], [T, W1]
    _store(out_base + 2 * CHANNELS, out_rows, valid, x0, x1, FIRST, SECOND, HEAD_DIM)
    x0, x1 = _combine(grad_scores, k0, k1, SECOND)  # dQ
    _store(out_base, out_rows, valid, x0 * scale, x1 * scale, FIRST, SECOND, HEAD_DIM)
    x0, x1 = _combine(tl.trans(grad_scores), q0, q1, SECOND)  # dK
    _store(out_base + CHANNELS, out_rows, valid, x0 * scale, x1 * scale, FIRST, SECOND, HEAD_DIM)


@triton.jit
def tiled_forward(
    qkv,  # (B, H, W, 3*A*D), last dimension dense, else any strides
    out,  # (B, H, W, A*D), contiguous
    log_sums,  # (blocks, A, N) float32, contiguous: base-2 logarithm of the sum of exponentials of each query's scores
    stride_b, stride_h, stride_w,  # strides of qkv in units of VEC elements
    score_scale,  # scale * log2(e)
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Compute attention within blocks of more than TILE tokens, in one pass over the keys with a running softmax.

    Grid: one dimension of blocks * cdiv(N, TILE) * A programs. The head runs fastest, then the query tile, so that
    programs that share keys and values run at the same time. A program computes one head of one query tile.
    """
    TOKENS: tl.constexpr = BLOCK_H * BLOCK_W
    TILES: tl.constexpr = (TOKENS + TILE - 1) // TILE
    program = tl.program_id(0)
    head = program % NUM_HEADS
    block = program // NUM_HEADS // TILES
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    base = qkv + head * HEAD_DIM
    query = program // NUM_HEADS % TILES * TILE + tl.arange(0, TILE)  # [T]
    sample, row, column = _locate(block, query, SIDE, BLOCK_H, BLOCK_W, WIDE)
    rows = _rows(
        sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
    )  # [T]
    q0, q1 = _load(base, rows, query < TOKENS, FIRST, SECOND, HEAD_DIM)  # [T, W0], [T, W1]

    peak = tl.full([TILE], float("-inf"), tl.float32)  # [T], largest score so far
    total = tl.zeros([TILE], tl.float32)  # [T], sum of exponentials relative to the peak
    out0 = tl.zeros([TILE, FIRST], tl.float32)  # [T, W0]
    out1 = tl.zeros([TILE, SECOND if SECOND > 0 else FIRST], tl.float32)  # [T, W1], not touched where SECOND = 0
    for start in range(0, TOKENS, TILE):
        key = start + tl.arange(0, TILE)  # [T]
        key_sample, key_row, key_column = _locate(block, key, SIDE, BLOCK_H, BLOCK_W, WIDE)
        rows = _rows(
            key_sample,
            key_row,
            key_column,
            stride_b,
            stride_h,
            stride_w,
            DENSE,
            VEC,
            3 * CHANNELS,
            SIDE,
            BLOCK_H,
            BLOCK_W,
        )  # [T]
        k0, k1 = _load(base + CHANNELS, rows, key < TOKENS, FIRST, SECOND, HEAD_DIM)
        v0, v1 = _load(base + 2 * CHANNELS, rows, key < TOKENS, FIRST, SECOND, HEAD_DIM)
        scores = _products(q0, q1, k0, k1, SECOND) * score_scale  # [T, T]
        scores = tl.where((key < TOKENS)[None, :], scores, float("-inf"))
        # every key tile holds a key, so the peak is finite from the first one on
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])  # [T, T]
        total = total * decay + tl.sum(weights, 1)
        out0 = _dot(_narrow(weights, v0.dtype), v0, out0 * decay[:, None])
        if SECOND > 0:
            out1 = _dot(_narrow(weights, v0.dtype), v1, out1 * decay[:, None])
        peak = new_peak

    out_rows = _dense(sample, row, column, VEC, CHANNELS, SIDE, BLOCK_H, BLOCK_W)  # [T]
    share = (1.0 / total)[:, None]
    out_base = out + head * HEAD_DIM
    _store(out_base, out_rows, query < TOKENS, out0 * share, out1 * share, FIRST, SECOND, HEAD_DIM)
    statistics = log_sums + (block.to(tl.int64) * NUM_HEADS + head) * TOKENS + query
    tl.store(statistics, peak + tl.log2(total), mask=query < TOKENS)


@triton.jit
def _query_tile(query, base, grad_base, out_base, log_sums, rows, grad_rows, out_rows,
                FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Load a query tile for the backward: queries, output gradient, log-sums, delta = sum(dO * O) per row."""
    valid = query < TOKENS
    q0, q1 = _load(base, rows, valid, FIRST, SECOND, HEAD_DIM)  # [T, W0], [T, W1]
    g0, g1 = _load(grad_base, grad_rows, valid, FIRST, SECOND, HEAD_DIM)
    o0, o1 = _load(out_base, out_rows, valid, FIRST, SECOND, HEAD_DIM)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)  # [T]
    if SECOND > 0:
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    # an empty slot has zeros as query and gradient and 0 as log-sum: weight 1 for every key, gradient 0
    return q0, q1, g0, g1, tl.load(log_sums + query, mask=valid, other=0.0), delta


@triton.jit
def tiled_backward(
    grad_out,  # (B, H, W, A*D), last dimension dense, else any strides
    qkv,  # (B, H, W, 3*A*D), last dimension dense, else any strides
    out,  # (B, H, W, A*D), contiguous, from the forward
    log_sums,  # (blocks, A, N) float32, contiguous, from the forward
    grad_qkv,  # (B, H, W, 3*A*D), contiguous
    grad_stride_b, grad_stride_h, grad_stride_w,  # strides of grad_out in units of VEC elements
    stride_b, stride_h, stride_w,  # strides of qkv in units of VEC elements
    scale,
    score_scale,  # scale * log2(e)
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    DENSE: tl.constexpr, GRAD_DENSE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of :func:`tiled_forward`.

    Grid as in the forward. The program of tile t computes dQ of its tokens as queries, in a loop over key tiles. Then
    it computes dK and dV of the same tokens as keys, in a loop over query tiles. The scores are thus computed twice. In
    return one program writes each gradient once, without atomics and in a fixed order of summation.
    """
    TOKENS: tl.constexpr = BLOCK_H * BLOCK_W
    TILES: tl.constexpr = (TOKENS + TILE - 1) // TILE
    OTHER: tl.constexpr = SECOND if SECOND > 0 else FIRST
    program = tl.program_id(0)
    head = program % NUM_HEADS
    block = program // NUM_HEADS // TILES
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    base = qkv + head * HEAD_DIM
    grad_base = grad_out + head * HEAD_DIM
    out_base = out + head * HEAD_DIM
    log_sums += (block.to(tl.int64) * NUM_HEADS + head) * TOKENS

    own = program // NUM_HEADS % TILES * TILE + tl.arange(0, TILE)  # [T]
    sample, row, column = _locate(block, own, SIDE, BLOCK_H, BLOCK_W, WIDE)
    own_rows = _rows(
        sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
    )  # [T]
    grad_rows = _rows(
        sample,
        row,
        column,
        grad_stride_b,
        grad_stride_h,
        grad_stride_w,
        GRAD_DENSE,
        VEC,
        CHANNELS,
        SIDE,
        BLOCK_H,
        BLOCK_W,
    )
    out_rows = _dense(sample, row, column, VEC, CHANNELS, SIDE, BLOCK_H, BLOCK_W)
    store_rows = _dense(sample, row, column, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W)
    q0, q1, g0, g1, sums, delta = _query_tile(
        own, base, grad_base, out_base, log_sums, own_rows, grad_rows, out_rows, FIRST, SECOND, HEAD_DIM, TOKENS
    )
    x0 = tl.zeros([TILE, FIRST], tl.float32)  # dQ
    x1 = tl.zeros([TILE, OTHER], tl.float32)
    for start in range(0, TOKENS, TILE):
        key = start + tl.arange(0, TILE)  # [T]
        sample, row, column = _locate(block, key, SIDE, BLOCK_H, BLOCK_W, WIDE)
        rows = _rows(
            sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
        )  # [T]
        k0, k1 = _load(base + CHANNELS, rows, key < TOKENS, FIRST, SECOND, HEAD_DIM)
        v0, v1 = _load(base + 2 * CHANNELS, rows, key < TOKENS, FIRST, SECOND, HEAD_DIM)
        # mask the scores, not the weights: a key of zeros has score 0, which may be so far above the log-sum of a
        # query that exp2 overflows
        scores = _products(q0, q1, k0, k1, SECOND) * score_scale - sums[:, None]  # [T, T]
        weights = tl.exp2(tl.where((key < TOKENS)[None, :], scores, float("-inf")))
        grad_scores = weights * (_products(g0, g1, v0, v1, SECOND) - delta[:, None])
        x0 = _dot(_narrow(grad_scores, k0.dtype), k0, x0)
        if SECOND > 0:
            x1 = _dot(_narrow(grad_scores, k0.dtype), k1, x1)
    store_base = grad_qkv + head * HEAD_DIM
    _store(store_base, store_rows, own < TOKENS, x0 * scale, x1 * scale, FIRST, SECOND, HEAD_DIM)

    k0, k1 = _load(base + CHANNELS, own_rows, own < TOKENS, FIRST, SECOND, HEAD_DIM)  # [T, W0], [T, W1]
    v0, v1 = _load(base + 2 * CHANNELS, own_rows, own < TOKENS, FIRST, SECOND, HEAD_DIM)
    x0 = tl.zeros([TILE, FIRST], tl.float32)  # dK
    x1 = tl.zeros([TILE, OTHER], tl.float32)
    y0 = tl.zeros([TILE, FIRST], tl.float32)  # dV
    y1 = tl.zeros([TILE, OTHER], tl.float32)
    for start in range(0, TOKENS, TILE):
        query = start + tl.arange(0, TILE)  # [T]
        sample, row, column = _locate(block, query, SIDE, BLOCK_H, BLOCK_W, WIDE)
        rows = _rows(
            sample, row, column, stride_b, stride_h, stride_w, DENSE, VEC, 3 * CHANNELS, SIDE, BLOCK_H, BLOCK_W
        )  # [T]
        grad_rows = _rows(
            sample,
            row,
            column,
            grad_stride_b,
            grad_stride_h,
            grad_stride_w,
            GRAD_DENSE,
            VEC,
            CHANNELS,
            SIDE,
            BLOCK_H,
            BLOCK_W,
        )
        out_rows = _dense(sample, row, column, VEC, CHANNELS, SIDE, BLOCK_H, BLOCK_W)
        q0, q1, g0, g1, sums, delta = _query_tile(
            query, base, grad_base, out_base, log_sums, rows, grad_rows, out_rows, FIRST, SECOND, HEAD_DIM, TOKENS
        )
        # keys by queries, [T, T], as the products below need them. An empty key slot spoils its own row only, which
        # is not stored
        weights = tl.exp2(_products(k0, k1, q0, q1, SECOND) * score_scale - sums[None, :])
        grad_scores = weights * (_products(v0, v1, g0, g1, SECOND) - delta[None, :])
        weights = _narrow(weights, g0.dtype)
        grad_scores = _narrow(grad_scores, q0.dtype)
        x0 = _dot(grad_scores, q0, x0)
        y0 = _dot(weights, g0, y0)
        if SECOND > 0:
            x1 = _dot(grad_scores, q1, x1)
            y1 = _dot(weights, g1, y1)
    _store(store_base + CHANNELS, store_rows, own < TOKENS, x0 * scale, x1 * scale, FIRST, SECOND, HEAD_DIM)
    _store(store_base + 2 * CHANNELS, store_rows, own < TOKENS, y0, y1, FIRST, SECOND, HEAD_DIM)
