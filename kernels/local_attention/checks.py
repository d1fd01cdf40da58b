"""Rules for the arguments of the public operations, checked in one place for every backend.

A violation raises ValueError, or TypeError for a wrong type or dtype, with the rule and the value found. Checks read
shapes, dtypes and devices, never data, so they need no synchronisation with the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

__all__ = ["check_attention", "check_block", "triton_limit"]

_TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM: Final = 128
_MAX_TOKENS: Final = 1024
_MAX_PROGRAMS: Final = 2**31 - 1  # of one launch


def check_attention(
    qkv: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None, dropout_p: float
) -> None:
    """Check the arguments of ``local_attention``; ``qkv`` must be (B, H, W, 3*A*D)."""
    _check_map("qkv", qkv, blocks_per_side)
    _check_settings(num_heads, scale, dropout_p)
    channels = qkv.shape[-1]
    if channels == 0 or channels % (3 * num_heads):
        raise ValueError(
            f"the channels of qkv must be 3 * num_heads * head_dim, got {channels} channels with num_heads={num_heads}"
        )


def check_block(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    blocks_per_side: int,
    eps: float,
    scale: float | None,
    dropout_p: float,
) -> None:
    """Check the arguments of ``local_attention_block``; ``x`` must be (B, H, W, C), ``weights`` by argument name."""
    _check_map("x", x, blocks_per_side)
    _check_settings(num_heads, scale, dropout_p)
    _check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
        if weight.dtype != x.dtype:
            raise TypeError(f"all tensors must have one dtype, got x {x.dtype} and {name} {weight.dtype}")
        if weight.device != x.device:
            raise ValueError(f"all tensors must be on one device, got x on {x.device} and {name} on {weight.device}")
    _check_weight_shapes(x.shape[-1], weights, num_heads)


def triton_limit(x: Tensor, *, num_heads: int, head_dim: int, blocks_per_side: int) -> str | None:
    """Name the rule that keeps a feature map ``x`` (B, H, W, channels) from the Triton kernels, with the value found.

    Return None if the kernels take it. The device is not checked here.
    """
    batch, height, width = x.shape[:3]
    tokens, blocks = height * width // blocks_per_side**2, batch * blocks_per_side**2
    if x.dtype not in _TRITON_DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {x.dtype}"
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, got {head_dim}"
    if tokens > _MAX_TOKENS:
        return f"a block must hold at most {_MAX_TOKENS} tokens, got {tokens}"
    if blocks * num_heads * math.ceil(tokens / 64) > _MAX_PROGRAMS:
        return f"blocks * heads must stay below 2^31, got {blocks} blocks of {tokens} tokens and {num_heads} heads"
    return None


def _check_weight_shapes(channels: int, weights: Mapping[str, Tensor], num_heads: int) -> None:
    rows = weights["qkv_weight"].shape[0] if weights["qkv_weight"].dim() else 0
    if rows == 0 or rows % (3 * num_heads):
        raise ValueError(
            f"qkv_weight must have 3 * num_heads * head_dim rows, got {rows} rows with num_heads={num_heads}"
        )
    expected = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "qkv_weight": (rows, channels),
        "out_weight": (channels, rows // 3),
        "out_bias": (channels,),
    }
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(weights[name].shape)}")


def _check_map(name: str, x: Tensor, blocks_per_side: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not torch.is_floating_point(x):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (B, H, W, channels), got shape {tuple(x.shape)}")
    if 0 in x.shape[:3]:
        raise ValueError(f"{name} must hold at least one token, got shape {tuple(x.shape)}")
    _check_count("blocks_per_side", blocks_per_side)
    height, width = x.shape[1:3]
    if height % blocks_per_side or width % blocks_per_side:
        raise ValueError(
            f"height and width of {name} must be multiples of blocks_per_side, got {height} x {width} "
            f"with blocks_per_side={blocks_per_side}"
        )


def _check_settings(num_heads: int, scale: float | None, dropout_p: float) -> None:
    _check_count("num_heads", num_heads)
    if scale is not None:
        _check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    _check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):  # a tensor's value would have to be fetched
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
