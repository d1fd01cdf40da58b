"""The fused block as operators that the rest of torch understands, as in :mod:`kernels.local_attention.autograd`.

``htnet::attention_block_forward`` and ``htnet::attention_block_backward`` carry no derivative; :class:`AttentionBlock`
adds the first one. Only the arguments are kept for the backward, which computes the rest again. ``vmap`` runs the
operators once for each map, by torch's fallback.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention_block import host

__all__ = ["attention_block_backward", "attention_block_forward", "fused_block"]


def fused_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_heads: int,
    blocks_per_side: int,
    eps: float,
    scale: float | None,
) -> Tensor:
    """The block by the fused kernel; arguments as in ``local_attention_block``, taken as checked."""
    scale = (out_weight.shape[1] // num_heads) ** -0.5 if scale is None else float(scale)
    weights = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
    out: Tensor = AttentionBlock.apply(x, *weights, num_heads, blocks_per_side, float(eps), scale)
    return out


@torch.library.custom_op("htnet::attention_block_forward", mutates_args=())
def attention_block_forward(
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
    """See :func:`kernels.attention_block.host.attend_block`."""
    weights = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
    return host.attend_block(x, *weights, num_heads, blocks_per_side, eps, scale)


@attention_block_forward.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("htnet::attention_block_backward", mutates_args=())
def attention_block_backward(
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
    """See :func:`kernels.attention_block.host.attend_block_backward`."""
    weights = (norm_weight, norm_bias, qkv_weight, out_weight)
    return host.attend_block_backward(grad_out, x, *weights, num_heads, blocks_per_side, eps, scale)


@attention_block_backward.register_fake
def _(
    grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    like = (x, norm_weight, norm_bias, qkv_weight, out_weight, norm_bias)
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


class AttentionBlock(torch.autograd.Function):
    """Output of the block, with the gradients of x and of the five weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        """Run the forward operator."""
        weights = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
        return attention_block_forward(x, *weights, num_heads, blocks_per_side, eps, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the arguments that the gradients depend on: all tensors but the last bias."""
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward operator, in a Function of its own: ``func.grad`` records the backward pass too."""
        gradients: tuple[Tensor, ...] = _AttentionBlockGradient.apply(grad_out, *ctx.saved_tensors, *ctx.settings)
        return *gradients, None, None, None, None


class _AttentionBlockGradient(torch.autograd.Function):
    """The six gradients. Has no derivative: nothing here needs second ones, and a wrong one would be silent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
    ) -> tuple[Tensor, ...]:
        weights = (norm_weight, norm_bias, qkv_weight, out_weight)
        return attention_block_backward(grad_out, x, *weights, num_heads, blocks_per_side, eps, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "the fused block has no second derivatives; use backend 'reference' or 'sdpa' to differentiate twice"
        )
