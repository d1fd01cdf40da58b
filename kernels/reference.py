"""Operations of this package in plain PyTorch: the truth that every kernel is tested against.

Written to be read, not to be fast. All arithmetic is in float32 (float64 for float64 input); results have the input's
dtype. Arguments are not checked here: call :mod:`kernels.local_attention`, which checks them.

Local attention is that of NesT (Zhang et al., "Nested Hierarchical Transformer", AAAI 2022), as HTNet uses it (Wang et
al., Neurocomputing 602, 2024). Shapes: B samples, H x W feature map, C channels, A heads, D head_dim, N tokens per
block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["local_attention_block_reference", "local_attention_reference"]


def local_attention_reference(
    qkv: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Compute softmax attention inside each of ``blocks_per_side`` x ``blocks_per_side`` blocks of a feature map.

    ``qkv`` is (B, H, W, 3*A*D): queries, keys and values one after the other, each A heads of D channels. The result is
    (B, H, W, A*D). ``scale`` multiplies the scores and defaults to D^-0.5. ``dropout_p`` is the probability of dropping
    an attention weight after the softmax; the other weights are scaled up.
    """
    compute = torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = rearrange(
        qkv.to(compute),
        "b (gh h) (gw w) (qkv a d) -> qkv (b gh gw) a (h w) d",
        qkv=3,
        a=num_heads,
        gh=blocks_per_side,
        gw=blocks_per_side,
    )  # each (B * blocks, A, N, D)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)  # (B * blocks, A, N, N)
    out: Tensor = rearrange(
        weights @ value,
        "(b gh gw) a (h w) d -> b (gh h) (gw w) (a d)",
        gh=blocks_per_side,
        gw=blocks_per_side,
        h=qkv.shape[1] // blocks_per_side,
    )
    return out.to(qkv.dtype)


def local_attention_block_reference(
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
) -> Tensor:
    """Compute ``x + out_proj(local_attention(qkv_proj(layer_norm(x))))``, the attention half of a transformer layer.

    ``x`` (B, H, W, C), ``norm_weight`` and ``norm_bias`` (C,), ``qkv_weight`` (3*A*D, C), ``out_weight`` (C, A*D),
    ``out_bias`` (C,); returns (B, H, W, C). Only the result is rounded to the input's dtype.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normed = F.layer_norm(wide, (x.shape[-1],), norm_weight.to(compute), norm_bias.to(compute), eps)
    attended = local_attention_reference(
        normed @ qkv_weight.to(compute).T,
        num_heads=num_heads,
        blocks_per_side=blocks_per_side,
        scale=scale,
        dropout_p=dropout_p,
    )
    return (wide + attended @ out_weight.to(compute).T + out_bias.to(compute)).to(x.dtype)
