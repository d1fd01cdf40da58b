"""The public operation on the whole attention half of a transformer layer, and the choice of how it is computed.

``reference`` computes it plainly; ``sdpa`` and ``triton`` are torch's norm and linear maps around a core (composed),
and ``triton`` also has one kernel for all of it (fused). Which of the two runs is decided by :func:`composed_reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_block.norm import norm_inputs
from kernels.local_attention.checks import check_block
from kernels.local_attention.interface import _resolve, _sdpa, _triton, drop_heads
from kernels.reference import local_attention_block_reference

__all__ = ["composed_reason", "fused_limit", "local_attention_block"]

_FUSED_ARCHITECTURES: Final = (9, 10)
"""Major compute capabilities for which the fused kernel compiles without spills and within shared memory."""

_MEASURED_AHEAD: Final[frozenset[int]] = frozenset()
"""Major compute capabilities on which a measurement showed the fused kernel ahead. None yet: no GPU was at hand, and
the estimates of the two overlap (kernels/README.md). A card joins when ``htnet profile`` says so, and the rules of
:func:`composed_reason` about shapes then take effect."""


def local_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_heads: int,
    blocks_per_side: int,
    eps: float = 1e-5,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    fused: bool | None = None,
) -> Tensor:
    """``x + out_proj(local_attention(qkv_proj(layer_norm(x))))``, the attention half of a transformer layer.

    Args:
        x: (B, H, W, C), channels-last, any floating dtype; the weights have its dtype and device.
        norm_weight: (C,), the gain of the layer norm over channels.
        norm_bias: (C,), its bias.
        qkv_weight: (3*A*D, C), rows in the order queries, keys, values.
        out_weight: (C, A*D).
        out_bias: (C,).
        num_heads: A.
        blocks_per_side: blocks along height and along width; must divide H and W.
        eps: added to the variance in the layer norm.
        scale, dropout_p, backend: as in :func:`kernels.local_attention`.
        fused: with the Triton backend, whether all is one kernel; by default where measured to be faster, which
            :func:`composed_reason` decides. The fused kernel keeps nothing but its arguments for the backward.

    Returns:
        (B, H, W, C) in the dtype of ``x``.

    Raises:
        ValueError: a shape, a setting, a device or the backend's name breaks a rule, or ``fused`` is True where the
            fused kernel cannot run; the message names rule and value.
        TypeError: a dtype differs from that of ``x``, or is not floating point, or a count is not an int.
    """
    weights = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "qkv_weight": qkv_weight,
        "out_weight": out_weight,
        "out_bias": out_bias,
    }
    check_block(
        x, weights, num_heads=num_heads, blocks_per_side=blocks_per_side, eps=eps, scale=scale, dropout_p=dropout_p
    )
    head_dim = qkv_weight.shape[0] // (3 * num_heads)
    chosen = _resolve(backend, x, num_heads, head_dim, blocks_per_side, dropout_p)
    settings = {"num_heads": num_heads, "blocks_per_side": blocks_per_side, "eps": eps, "scale": scale}
    if _fuses(fused, chosen, x, list(weights.values()), num_heads, head_dim, blocks_per_side):
        from kernels.attention_block.autograd import fused_block

        return fused_block(x, **weights, **settings)
    run = local_attention_block_reference if chosen == "reference" else _composed
    attend = {} if chosen == "reference" else {"attend": _triton if chosen == "triton" else _sdpa}
    return run(x, **weights, **settings, dropout_p=dropout_p, **attend)


def fused_limit(
    x: Tensor, *, num_heads: int, head_dim: int, blocks_per_side: int, major: int | None = None
) -> str | None:
    """The rule that keeps ``x`` (B, H, W, C) from the fused kernel, and what breaks it; None if it takes it.

    ``major`` is the first number of an NVIDIA card's compute capability, by default that of the card that holds ``x``;
    without either the interpreter is meant, which is held to the rules about shapes alone. What the core's kernels do
    not take is taken as refused already.
    """
    tokens = x.shape[1] * x.shape[2] // blocks_per_side**2
    if not 2 <= tokens <= 64:
        return f"a block must hold 2 to 64 tokens, got {tokens}"
    if x.shape[-1] > 256:
        return f"x must have at most 256 channels, got {x.shape[-1]}"
    if head_dim > 96:
        return f"head_dim must be at most 96, got {head_dim}"
    columns = num_heads * math.ceil(head_dim / 16) * 16
    if columns > 288:
        return f"all heads, each padded to a multiple of 16, must have at most 288 channels, got {columns}"
    if major is None and x.device.type != "cuda":
        return None
    if x.element_size() != 2:
        return f"dtype must be bfloat16 or float16, got {x.dtype}"
    if major is None:
        if torch.version.hip:
            return "the device must be an NVIDIA card, got one of AMD"
        major = torch.cuda.get_device_properties(x.device).major
    if major not in _FUSED_ARCHITECTURES:
        return f"the compute capability must be 9.x or 10.x, got {major}.x"
    return None


def composed_reason(x: Tensor, *, num_heads: int, head_dim: int, blocks_per_side: int, trains: bool) -> str | None:
    """Why the composed path is preferred to the fused kernel; None where the fused one is.

    The rules about shapes are predicted from traffic, arithmetic and compiled code; kernels/README.md has the figures.
    Takes for granted that :func:`fused_limit` found nothing.
    """
    tokens, channels = x.shape[1] * x.shape[2] // blocks_per_side**2, x.shape[-1]
    if x.device.type != "cuda":
        return "the interpreter is for tests"
    if trains:
        return "the backward would compute norm, projection and attention again, which takes longer than fusing saves"
    if 128 % tokens:
        return f"blocks of {tokens} tokens leave slots of the tile of 128 empty, or their mask spills registers"
    if channels % 8:
        return f"{channels} channels are no multiple of 8: loads are narrow"
    if math.prod(x.shape[:3]) < 128 * 132:
        return "fewer tiles of 128 tokens than an H100 or H200 has multiprocessors"
    if torch.cuda.get_device_properties(x.device).major not in _MEASURED_AHEAD:
        return "no measurement shows the fused kernel ahead on this card"
    return None


def _fuses(
    fused: bool | None,
    backend: str,
    x: Tensor,
    weights: list[Tensor],
    num_heads: int,
    head_dim: int,
    blocks_per_side: int,
) -> bool:
    """Whether the fused kernel runs; ValueError if it cannot and was asked for."""
    if fused is None and backend != "triton":
        return False
    shape = {"num_heads": num_heads, "head_dim": head_dim, "blocks_per_side": blocks_per_side}
    limit = fused_limit(x, **shape)
    if backend != "triton":
        limit = limit or f"the block must run on backend 'triton', got {backend!r}"
    if fused is not None:
        if fused and limit is not None:
            raise ValueError(f"fused=True is not possible: {limit}")
        return fused
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return limit is None and composed_reason(x, **shape, trains=trains) is None


def _composed(
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
    dropout_p: float,
    attend: Callable[..., Tensor],
) -> Tensor:
    """The block of torch's norm and linear maps around the core ``attend``."""
    wide, gain, bias = norm_inputs(x, norm_weight, norm_bias)
    normed = F.layer_norm(wide, (x.shape[-1],), gain, bias, eps).to(x.dtype)
    if x.shape[1] == x.shape[2] == blocks_per_side:
        # one token per block: queries and keys have no influence, so they are not computed
        value = F.linear(normed, qkv_weight[2 * (qkv_weight.shape[0] // 3) :])
        attended = drop_heads(value, num_heads, dropout_p) if dropout_p else value
        return x + F.linear(attended, out_weight, out_bias)
    scale = (out_weight.shape[1] // num_heads) ** -0.5 if scale is None else scale
    if attend is _triton and _padding_pays(x, qkv_weight):
        from kernels.attention_block.host import pad_heads

        qkv_weight, out_weight = pad_heads(qkv_weight, out_weight, num_heads)
    qkv = F.linear(normed, qkv_weight)
    attended = attend(qkv, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale, dropout_p=dropout_p)
    return x + F.linear(attended, out_weight, out_bias)


def _padding_pays(x: Tensor, qkv_weight: Tensor) -> bool:
    """Whether the feature map outweighs the padded copies of the weights, four times."""
    return math.prod(x.shape[:3]) >= 4 * qkv_weight.shape[0]
