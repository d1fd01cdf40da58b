"""The ways to compute local attention that are measured against each other.

A provider has a name, an operation, a ``limit`` (why it does not run for a case on a device, or None) and a ``build``
that makes the function for a case: ``core`` takes qkv (B, H, W, 3*A*D) and returns (B, H, W, A*D); ``block`` takes x
(B, H, W, C) and the five weights of :func:`kernels.local_attention_block` and returns (B, H, W, C). All start from the
packed channels-last map and end with one, so the partition into blocks is part of every figure.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import local_attention, local_attention_block
from kernels.benchmarks.cases import Case, Operation
from kernels.local_attention.checks import triton_limit
from kernels.reference import local_attention_block_reference, local_attention_reference

__all__ = ["DTYPES", "PROVIDERS", "Forward", "Provider", "not_taken"]

Forward = Callable[..., Tensor]
Limit = Callable[[Case, torch.device], str | None]
DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute an operation."""

    name: str
    operation: Operation
    what: str
    """A line for the list of providers."""
    build: Callable[[Case], Forward]
    limits: tuple[Limit, ...] = ()
    ours: bool = False

    def limit(self, case: Case, device: torch.device) -> str | None:
        """Return the first reason why this provider does not run for a case on a device; None if it does."""
        return next((reason for check in self.limits if (reason := check(case, device)) is not None), None)


# --- the partition, as everyone but our kernels does it: copies


def split_blocks(qkv: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, H, W, 3*A*D) into queries, keys and values, each (B * blocks, A, N, D)."""
    side = case.blocks_per_side
    pattern = "b (gh h) (gw w) (qkv a d) -> qkv (b gh gw) a (h w) d"
    query, key, value = rearrange(qkv, pattern, qkv=3, a=case.heads, gh=side, gw=side)
    return query, key, value


def join_blocks(out: Tensor, case: Case) -> Tensor:
    """Join (B * blocks, A, N, D) to (B, H, W, A*D)."""
    side = case.blocks_per_side
    joined: Tensor = rearrange(
        out, "(b gh gw) a (h w) d -> b (gh h) (gw w) (a d)", gh=side, gw=side, h=case.height // side
    )
    return joined


# --- core


def _by(compute: Callable[..., Tensor], **settings: Any) -> Callable[[Case], Forward]:
    """Bind a function of this package to the case's numbers."""
    return lambda case: partial(compute, num_heads=case.heads, blocks_per_side=case.blocks_per_side, **settings)


def _einsum(case: Case) -> Forward:
    scale = case.head_dim**-0.5

    def run(qkv: Tensor) -> Tensor:
        query, key, value = split_blocks(qkv, case)
        weights = (torch.einsum("xaid,xajd->xaij", query, key) * scale).softmax(dim=-1)
        return join_blocks(torch.einsum("xaij,xajd->xaid", weights, value), case)

    return run


def _sdpa(backend: SDPBackend | None = None, multiple: int = 1) -> Callable[[Case], Forward]:
    """torch's scaled_dot_product_attention, by one of its backends; D padded to a ``multiple``."""

    def build(case: Case) -> Forward:
        scale, missing = case.head_dim**-0.5, -case.head_dim % multiple  # of the unpadded width

        def run(qkv: Tensor) -> Tensor:
            query, key, value = split_blocks(qkv, case)
            if missing:
                query, key, value = (F.pad(x, (0, missing)) for x in (query, key, value))
            if backend is None:
                out = F.scaled_dot_product_attention(query, key, value, scale=scale)
            else:
                with sdpa_kernel([backend]):
                    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
            return join_blocks(out[..., : case.head_dim] if missing else out, case)

        return run

    return build


def _compiled(build: Callable[[Case], Forward]) -> Callable[[Case], Forward]:
    def compiled(case: Case) -> Forward:
        from torch._functorch import config

        config.donated_buffer = False  # or a backward pass overwrites what the forward pass kept, and runs only once
        # one shape, whole graph: what torch.compile does best; a fallback to eager would be an error
        forward: Forward = torch.compile(build(case), fullgraph=True, dynamic=False)
        return forward

    return compiled


def _flex(case: Case) -> Forward:
    """Attend by one sequence per sample, its tokens in the order of blocks, under a block-diagonal mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, count = case.tokens_per_block, case.blocks_per_side**2

    def same_block(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // tokens == key // tokens

    mask = create_block_mask(same_block, None, None, tokens * count, tokens * count, device="cuda")

    def run(qkv: Tensor) -> Tensor:
        parts = split_blocks(qkv, case)
        query, key, value = (rearrange(x, "(b g) a n d -> b a (g n) d", g=count) for x in parts)
        out: Any = flex_attention(query, key, value, block_mask=mask)
        return join_blocks(rearrange(out, "b a (g n) d -> (b g) a n d", g=count), case)

    return run


# --- block


def _unfused(build_core: Callable[[Case], Forward]) -> Callable[[Case], Forward]:
    """torch's layer norm and linear maps around a core."""

    def build(case: Case) -> Forward:
        attend = build_core(case)

        def run(
            x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor
        ) -> Tensor:
            normed = F.layer_norm(x, (case.dim,), norm_weight, norm_bias)
            return x + F.linear(attend(F.linear(normed, qkv_weight)), out_weight, out_bias)

        return run

    return build


# --- what a provider does not take


def _needs_cuda(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs CUDA"


def _needs_triton(case: Case, device: torch.device) -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _needs_half(case: Case, device: torch.device) -> str | None:
    return "needs bf16 or fp16" if case.dtype == "fp32" else None


def _needs_several_tokens(case: Case, device: torch.device) -> str | None:
    return "one token per block: nothing to attend to" if case.tokens_per_block == 1 else None


def _head_dim_not_multiple(multiple: int) -> Limit:
    def check(case: Case, device: torch.device) -> str | None:
        return None if case.head_dim % multiple else f"head_dim is a multiple of {multiple}: nothing to pad"

    return check


def _grid_limit(case: Case, device: torch.device) -> str | None:
    # the grid's second and third dimension hold heads and blocks
    return "more than 65,535 blocks" if case.blocks > 65_535 else None


def not_taken(case: Case, device: torch.device) -> str | None:
    """Say what our core's kernels do not take, on any device; blocks of one token need no kernel."""
    if case.tokens_per_block == 1:
        return None
    x = torch.empty(case.batch, case.height, case.width, 1, dtype=DTYPES[case.dtype], device="meta")
    return triton_limit(x, num_heads=case.heads, head_dim=case.head_dim, blocks_per_side=case.blocks_per_side)


def _table() -> Iterable[Provider]:
    def core(name: str, what: str, build: Callable[[Case], Forward], *limits: Limit, ours: bool = False) -> Provider:
        return Provider(name=name, operation="core", what=what, build=build, limits=limits, ours=ours)

    def block(name: str, what: str, build: Callable[[Case], Forward], *limits: Limit) -> Provider:
        return Provider(name=name, operation="block", what=what, build=build, limits=limits, ours=bool(limits))

    attending, cuda = _needs_several_tokens, _needs_cuda
    limits: tuple[Limit, ...] = (cuda, _needs_triton, not_taken)
    ours = _by(local_attention, backend="triton")
    yield core("triton", "ours: kernels.local_attention", ours, *limits, ours=True)
    yield core("reference", "kernels.reference, computed in fp32", _by(local_attention_reference))
    yield core("einsum", "the same in the input's dtype, as the public code does it", _einsum)
    yield core("sdpa", "scaled_dot_product_attention, torch's choice", _sdpa())
    flash, efficient, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    yield core("sdpa-flash", "its flash backend", _sdpa(flash), attending, cuda, _needs_half)
    padded = "D padded to a multiple of 8, as it needs"
    name, what = "sdpa-efficient", f"its memory-efficient backend, {padded}"
    yield core(name, what, _sdpa(efficient, 8), attending, cuda, _grid_limit)
    yield core("sdpa-cudnn", f"its cuDNN backend, {padded}", _sdpa(cudnn, 8), attending, cuda, _needs_half)
    yield core("sdpa-math", "its plain backend", _sdpa(SDPBackend.MATH), attending)
    for multiple in (8, 32):
        what = f"torch's choice, D padded to a multiple of {multiple} (85: {math.ceil(85 / multiple) * multiple})"
        unpadded = _head_dim_not_multiple(multiple)
        yield core(f"sdpa-pad{multiple}", what, _sdpa(multiple=multiple), attending, unpadded)
    yield core("compile", "torch.compile of einsum", _compiled(_einsum))
    yield core("flex", "flex_attention, compiled, block-diagonal mask", _compiled(_flex), attending, cuda)
    whole = _by(local_attention_block, backend="triton")
    yield block("block-triton", "ours: kernels.local_attention_block", whole, *limits)
    yield block("block-unfused", "torch's norm and linear maps around our core", _unfused(ours), *limits)
    yield block("block-reference", "kernels.reference, computed in fp32", _by(local_attention_block_reference))
    yield block("block-sdpa", "torch's norm and linear maps around its attention", _unfused(_sdpa()))
    yield block("block-compile", "torch.compile of the same around einsum", _compiled(_unfused(_einsum)))


PROVIDERS: Final = {provider.name: provider for provider in _table()}
"""Ours first, so that a run that is cut short holds what it was made for."""
