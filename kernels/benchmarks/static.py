"""Facts on the GPU kernels without a GPU: what the compiler makes of them for a card's architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from kernels.benchmarks.cards import Card
from kernels.benchmarks.cases import Case
from kernels.benchmarks.providers import not_taken

if TYPE_CHECKING:
    from kernels.local_attention.compile import Resources

__all__ = ["kernel_rows"]


def kernel_rows(cases: Sequence[Case], card: Card) -> Iterator[tuple[list[str], Resources]]:
    """Yield the kernels that the cases would start, forward and backward, each shape once with the cases' names.

    Left out is what the kernels do not take, and blocks of one token (a copy).

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    from kernels.local_attention import compile as ahead  # imports the kernels, so only when it is asked for

    shapes: dict[ahead.Case, list[str]] = {}
    for case in cases:
        if case.tokens_per_block > 1 and not_taken(case, torch.device("meta")) is None:
            side = case.blocks_per_side
            block = {"block_h": case.height // side, "block_w": case.width // side, "head_dim": case.head_dim}
            shape = ahead.Case(**block, dtype=case.dtype, num_heads=case.heads, blocks_per_side=side)
            shapes.setdefault(shape, []).append(case.name)
    for shape, names in shapes.items():
        yield from ((names, resources) for resources in ahead.compile_case(shape, (card.arch,)))
