"""From tensors to the launch of the fused kernel, what it takes, and the two functions behind the custom operators."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_block import kernels
from kernels.attention_block.norm import norm_inputs
from kernels.local_attention import host as core

__all__ = ["attend_block", "attend_block_backward", "fused_launch", "fused_tiling", "pad_heads"]

_LOG2_E: Final = math.log2(math.e)
_CHUNK: Final = 128  # channels of x that one product with the weights takes
_STEP: Final = 64  # columns of the output that one product makes


def fused_tiling(tokens: int, element_size: int) -> core.Tiling:
    """The tile of the fused kernel: 128 slots, for every program reads all weights, so that 64 would read them twice.

    float32 runs in the interpreter alone, where small tiles are quick.
    """
    tile = 128 if element_size == 2 else 64
    return core.Tiling(tile=tile, packed=tile // tokens, warps=8)


def attend_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    blocks_per_side: int,
    eps: float,
    scale: float,
) -> Tensor:
    """Output (B, H, W, C) of the attention block, by the fused kernel; contiguous."""
    head_dim = out_weight.shape[1] // num_heads
    attended = core.new_empty(x, (*x.shape[:3], num_heads, sum(core.column_parts(head_dim))))
    out = core.new_empty(x, tuple(x.shape))
    weights = [weight.contiguous() for weight in (norm_weight, norm_bias, qkv_weight, out_weight.T, out_bias)]
    fused_launch(x.contiguous(), weights, attended, out, num_heads, blocks_per_side, eps, scale).run()
    return out


def fused_launch(
    x: Tensor,
    weights: list[Tensor],
    attended: Tensor,
    out: Tensor,
    num_heads: int,
    blocks_per_side: int,
    eps: float,
    scale: float,
) -> core.Launch:
    """The fused kernel into ``out``; ``weights`` as the kernel takes them, the output projection's transposed."""
    batch, height, width, channels = x.shape
    head_dim = weights[3].shape[0] // num_heads
    block_h, block_w = height // blocks_per_side, width // blocks_per_side
    blocks, cut = batch * blocks_per_side**2, fused_tiling(block_h * block_w, x.element_size())
    first, second = core.column_parts(head_dim)
    padded = max(16, 1 << (channels - 1).bit_length())
    constants = {"CHANNELS": channels, "WIDTH": padded, "CHUNK": min(_CHUNK, padded), "STEP": min(_STEP, padded)}
    constants |= {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "FIRST": first, "SECOND": second}
    constants |= {"SIDE": blocks_per_side, "BLOCK_H": block_h, "BLOCK_W": block_w}
    constants |= {"TILE": cut.tile, "PACKED": cut.packed}
    constants["WIDE"] = int(max(x.numel(), attended.numel()) > core.NARROW_SPAN)
    names = ("norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias")
    arguments: dict[str, Tensor | int | float] = {"x": x, **dict(zip(names, weights, strict=True))}
    arguments |= {"attended": attended, "out": out, "num_blocks": blocks, "eps": eps, "score_scale": scale * _LOG2_E}
    programs = math.ceil(blocks / cut.packed)
    return core.Launch(
        kernel=kernels.fused_forward, programs=programs, arguments=arguments, constants=constants, tiling=cut
    )


def attend_block_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    num_heads: int,
    blocks_per_side: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the five weights, contiguous; what lies between them is computed again."""
    channels, head_dim = x.shape[-1], out_weight.shape[1] // num_heads
    wide_qkv, wide_out = pad_heads(qkv_weight, out_weight, num_heads)
    core_settings = (num_heads, blocks_per_side, scale)
    wide, *gain_and_bias = norm_inputs(x.contiguous(), norm_weight, norm_bias)
    with torch.autocast(x.device.type, enabled=False):  # the operator computes in the dtype of its input
        normed, mean, inverse = torch.native_layer_norm(wide, [channels], *gain_and_bias, eps)
        normed = normed.to(x.dtype)
        qkv = normed @ wide_qkv.T
        attended, log_sums = core.attend(qkv, *core_settings)
        tiled = (attended, log_sums) if log_sums.shape[-1] else (None, None)
        grad_qkv = core.attend_backward(grad_out @ wide_out, qkv, *tiled, *core_settings)
        rows = grad_out.reshape(-1, channels)
        grad_wide_out = rows.T @ attended.flatten(0, 2)
        grad_wide_qkv = grad_qkv.flatten(0, 2).T @ normed.flatten(0, 2)
        grad_normed = (grad_qkv @ wide_qkv).to(wide.dtype)
        gradients = torch.ops.aten.native_layer_norm_backward(
            grad_normed, wide, [channels], mean, inverse, *gain_and_bias, [True] * 3
        )
        grad_x, grad_gain, grad_bias = (gradient.to(x.dtype) for gradient in gradients)
        grad_qkv_weight = grad_wide_qkv.unflatten(0, (3 * num_heads, -1))[:, :head_dim].flatten(0, 1).contiguous()
        grad_out_weight = grad_wide_out.unflatten(1, (num_heads, -1))[..., :head_dim].flatten(1).contiguous()
        return grad_x + grad_out, grad_gain, grad_bias, grad_qkv_weight, grad_out_weight, rows.sum(0)


def pad_heads(qkv_weight: Tensor, out_weight: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Both weights with zeros in each head up to a multiple of 8 channels; themselves where D is one.

    The zeros add nothing to scores or output, but rows of qkv then begin at multiples of 16 bytes. That is what matrix
    products and our loads need to run at full width; with D = 85 they would move 2 bytes at a time.
    """
    head_dim = out_weight.shape[1] // num_heads
    missing = -head_dim % 8
    if not missing:
        return qkv_weight, out_weight
    qkv_weight = F.pad(qkv_weight.unflatten(0, (3 * num_heads, head_dim)), (0, 0, 0, missing)).flatten(0, 1)
    return qkv_weight, F.pad(out_weight.unflatten(1, (num_heads, head_dim)), (0, missing)).flatten(1)
