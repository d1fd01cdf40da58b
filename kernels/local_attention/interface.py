"""Public operation: argument checks, exact short cuts, and the choice of a backend.

A backend is an entry of ``IMPLEMENTATIONS``. It gets arguments that :mod:`kernels.local_attention.checks` has passed,
and blocks of at least two tokens. :mod:`kernels.attention_block` puts norm, projections and residual around it.
:func:`_resolve` alone decides the meaning of ``auto``.

The Triton kernels are imported at their first use. The package therefore works without Triton, and TRITON_INTERPRET may
be set until then.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels.backends import BACKENDS
from kernels.local_attention.checks import check_attention, triton_limit
from kernels.reference import local_attention_reference

__all__ = ["drop_heads", "local_attention"]

_log = logging.getLogger(__name__)
_logged: Final[set[str]] = set()
_TRITON_INSTALLED: Final = importlib.util.find_spec("triton") is not None


def local_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    blocks_per_side: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax attention inside each of ``blocks_per_side`` x ``blocks_per_side`` blocks of a feature map.

    Args:
        qkv: (B, H, W, 3*A*D), channels-last, any floating dtype: queries, keys, values, each A heads of D channels.
        num_heads: A.
        blocks_per_side: blocks along height and along width; must divide H and W. H and W may differ.
        scale: factor of the scores; D^-0.5 by default.
        dropout_p: probability of dropping an attention weight, drawn from torch's generator; 0 outside training.
        backend: ``reference`` (plain, float32 inside), ``sdpa`` (torch's scaled_dot_product_attention), ``triton``
            (float32, bfloat16 or float16 on CUDA or ROCm; D up to 128; up to 1024 tokens in a block), or ``auto``:
            ``triton`` where it takes the input, else ``sdpa``. Both run dropout on ``sdpa``. So does ``auto`` with
            input on a GPU that ``triton`` does not take. The log gives the reason once.

    Returns:
        (B, H, W, A*D) in the dtype of ``qkv``, contiguous.

    Raises:
        ValueError: a shape, a setting or the backend's name breaks a rule, or ``triton`` was asked for and does not
            take the input; the message names rule and value.
        TypeError: ``qkv`` is not a floating-point tensor, or a count is not an int.
    """
    check_attention(qkv, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale, dropout_p=dropout_p)
    head_dim = qkv.shape[-1] // (3 * num_heads)
    run = IMPLEMENTATIONS[_resolve(backend, qkv, num_heads, head_dim, blocks_per_side, dropout_p)]
    if qkv.shape[1] == qkv.shape[2] == blocks_per_side:
        # one token per block: the softmax over one key is exactly 1, so the output is the values
        value = qkv[..., 2 * (qkv.shape[-1] // 3) :]
        return drop_heads(value, num_heads, dropout_p) if dropout_p else value.contiguous()
    out = run(qkv, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale, dropout_p=dropout_p)
    # under autocast, sdpa returns a narrower dtype
    return out.to(qkv.dtype).contiguous()


def drop_heads(value: Tensor, num_heads: int, dropout_p: float) -> Tensor:
    """Drop whole heads of ``value`` (..., A*D): attention dropout where each token attends to itself alone."""
    keep = F.dropout(value.new_ones(*value.shape[:-1], num_heads, 1), dropout_p)
    return (value.reshape(*value.shape[:-1], num_heads, -1) * keep).flatten(-2)


def _resolve(backend: str, x: Tensor, num_heads: int, head_dim: int, blocks_per_side: int, dropout_p: float) -> str:
    """Choose the backend that runs: never ``auto``, and ``triton`` only where the kernels take the input."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if x.shape[1] == x.shape[2] == blocks_per_side:
        # one token per block: any backend takes the short cut
        return "sdpa" if backend in ("auto", "triton") else backend
    on_gpu = x.device.type == "cuda"  # torch's name for ROCm devices as well
    if backend not in ("auto", "triton") or (backend == "auto" and not (on_gpu and _TRITON_INSTALLED)):
        return "sdpa" if backend == "auto" else backend
    limit = triton_limit(x, num_heads=num_heads, head_dim=head_dim, blocks_per_side=blocks_per_side)
    if backend == "triton":
        limit = limit or _missing(x)
        if limit is not None:
            raise ValueError(f"backend 'triton' does not take this input: {limit}; use 'auto', 'sdpa' or 'reference'")
    if limit is None and dropout_p:
        limit = f"the kernels have no dropout of attention weights, got dropout_p={dropout_p}"
    if limit is None:
        return "triton"
    _log_once(f"local attention runs on 'sdpa' instead of 'triton': {limit}")
    return "sdpa"


def _missing(x: Tensor) -> str | None:
    """Name the thing that the Triton kernels lack to run on the device of ``x``; return None if they lack nothing."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if x.device.type == "cuda" or (x.device.type == "cpu" and _interpreted()):
        return None
    return (
        f"the tensors must be on a CUDA or ROCm device, got {x.device} "
        "(for Triton's interpreter on the CPU, set TRITON_INTERPRET=1 before the first use)"
    )


def _interpreted() -> bool:
    from kernels.local_attention import kernels

    return kernels.INTERPRETED


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _logged:  # a logger breaks a graph
        _logged.add(message)
        _log.info(message)


def _triton(qkv: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None, dropout_p: float) -> Tensor:
    from kernels.local_attention.autograd import triton_attention

    assert not dropout_p
    return triton_attention(qkv, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale)


def _sdpa(qkv: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None, dropout_p: float) -> Tensor:
    query, key, value = rearrange(
        qkv,
        "b (gh h) (gw w) (qkv a d) -> qkv (b gh gw) a (h w) d",
        qkv=3,
        a=num_heads,
        gh=blocks_per_side,
        gw=blocks_per_side,
    )  # each (B * blocks, A, N, D)
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    out: Tensor = rearrange(
        attended,
        "(b gh gw) a (h w) d -> b (gh h) (gw w) (a d)",
        gh=blocks_per_side,
        gw=blocks_per_side,
        h=qkv.shape[1] // blocks_per_side,
    )
    return out


IMPLEMENTATIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "reference": local_attention_reference,
    "sdpa": _sdpa,
    "triton": _triton,
}
