"""From tensors to the launch of the fused kernel, and the two functions behind the custom operators."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kernels.attention_block import kernels
from kernels.local_attention.host import NARROW_SPAN, Launch, Tiling, column_parts, new_empty

_LOG2_E: Final = math.log2(math.e)


def block_tiling(tokens: int, element_size: int) -> Tiling:
    """The tile of a shape."""
    tile = 128 if element_size == 2 else 64
    return Tiling(tile=tile, packed=tile // tokens, warps=8, stages=1)


def fused_launch(x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, out, num_heads, blocks_per_side, eps,
                 scale, cut=None, step=64):
    batch, height, width, channels = x.shape
    head_dim = qkv_weight.shape[0] // (3 * num_heads)
    block_h, block_w = height // blocks_per_side, width // blocks_per_side
    cut = cut or block_tiling(block_h * block_w, qkv_weight.element_size())
    first, second = column_parts(head_dim)
    blocks = batch * blocks_per_side**2
    constants = {
        "CHANNELS": channels, "WIDTH": max(16, 1 << (channels - 1).bit_length()), "STEP": step,
        "NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "FIRST": first, "SECOND": second,
        "SIDE": blocks_per_side, "BLOCK_H": block_h, "BLOCK_W": block_w, "TILE": cut.tile, "PACKED": cut.packed,
        "WIDE": int(x.numel() > NARROW_SPAN),
    }
    arguments = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "qkv_weight": qkv_weight,
                 "out_weight": out_weight, "out_bias": out_bias, "out": out, "num_blocks": blocks, "eps": eps,
                 "score_scale": scale * _LOG2_E}
    return Launch(kernel=kernels.fused_forward, programs=math.ceil(blocks / cut.packed), arguments=arguments,
                  constants=constants, tiling=cut)
