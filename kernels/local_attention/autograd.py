"""Operators that make the kernels known to the rest of torch.

``htnet::local_attention_forward`` and ``htnet::local_attention_backward`` are custom operators: opaque to
``torch.compile``, with a fake implementation for its tracing and a rule for ``vmap``. They have no derivative
themselves. :class:`LocalAttention` adds it as an autograd Function with ``setup_context``. No other combination works
in eager mode, under ``torch.compile(fullgraph=True)``, ``vmap``, ``func.grad`` and their nesting (``register_autograd``
does not work with ``func.grad``). There are no second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.local_attention import host

__all__ = ["LocalAttention", "local_attention_backward", "local_attention_forward", "triton_attention"]


def triton_attention(qkv: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None) -> Tensor:
    """Compute local attention by the Triton kernels; arguments as in ``local_attention``, not checked here."""
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else float(scale)
    out: Tensor = LocalAttention.apply(qkv, num_heads, blocks_per_side, scale)[0]
    return out


@torch.library.custom_op("htnet::local_attention_forward", mutates_args=())
def local_attention_forward(qkv: Tensor, num_heads: int, blocks_per_side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and log-sums; see :func:`kernels.local_attention.host.attend`."""
    return host.attend(qkv, num_heads, blocks_per_side, scale)


@local_attention_forward.register_fake
def _(qkv: Tensor, num_heads: int, blocks_per_side: int, scale: float) -> tuple[Tensor, Tensor]:
    return host.empty_outputs(qkv, num_heads, blocks_per_side)


@torch.library.custom_op("htnet::local_attention_backward", mutates_args=())
def local_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    log_sums: Tensor | None,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
) -> Tensor:
    """Return the gradient of qkv; see :func:`kernels.local_attention.host.attend_backward`."""
    return host.attend_backward(grad_out, qkv, out, log_sums, num_heads, blocks_per_side, scale)


@local_attention_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    log_sums: Tensor | None,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


@local_attention_forward.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], qkv: Tensor, num_heads: int, blocks_per_side: int, scale: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    folded = _fold(qkv, in_dims[0], info.batch_size)
    out, log_sums = local_attention_forward(folded, num_heads, blocks_per_side, scale)
    return (_unfold(out, info.batch_size), _unfold(log_sums, info.batch_size)), (0, 0)


@local_attention_backward.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    log_sums: Tensor | None,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
) -> tuple[Tensor, int]:
    tensors = (grad_out, qkv, out, log_sums)
    folded = [
        None if x is None else _fold(x, dim, info.batch_size) for x, dim in zip(tensors, in_dims[:4], strict=True)
    ]
    grad_qkv = local_attention_backward(*folded, num_heads, blocks_per_side, scale)
    return _unfold(grad_qkv, info.batch_size), 0


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold the mapped dimension into the samples: blocks are independent, so vmap only means more of them."""
    stacked = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return stacked.flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.view(size, x.shape[0] // size, *x.shape[1:])


class LocalAttention(torch.autograd.Function):
    """Output and log-sums of packed qkv, with the gradient of the output."""

    generate_vmap_rule = True  # from the rules of the two operators

    @staticmethod
    def forward(qkv: Tensor, num_heads: int, blocks_per_side: int, scale: float) -> tuple[Tensor, Tensor]:
        """Run the forward operator."""
        return local_attention_forward(qkv, num_heads, blocks_per_side, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep qkv. For large blocks keep the output (the projection behind it does so anyway) and the log-sums."""
        qkv, *ctx.settings = inputs
        out, log_sums = output
        ctx.mark_non_differentiable(log_sums)
        ctx.save_for_backward(qkv, *((out, log_sums) if log_sums.shape[-1] else (None, None)))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _grad_log_sums: Tensor) -> tuple[Tensor, None, None, None]:
        """Run the backward operator in a Function of its own, because ``func.grad`` records the backward pass too."""
        return _LocalAttentionGradient.apply(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None


class _LocalAttentionGradient(torch.autograd.Function):
    """Gradient of qkv. It has no derivative: nothing here needs a second one, and a wrong one would go unnoticed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_out: Tensor,
        qkv: Tensor,
        out: Tensor | None,
        log_sums: Tensor | None,
        num_heads: int,
        blocks_per_side: int,
        scale: float,
    ) -> Tensor:
        return local_attention_backward(grad_out, qkv, out, log_sums, num_heads, blocks_per_side, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "backend 'triton' has no second derivatives; use backend 'reference' or 'sdpa' to differentiate twice"
        )
