"""What can be said of the GPU kernels without a GPU: what the compiler makes of them for a card's architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from kernels.benchmarks.cards import Card
from kernels.benchmarks.cases import Case
from kernels.benchmarks.providers import not_fused, not_taken

__all__ = ["KernelRow", "kernel_rows"]


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """A kernel that the cases named would start, compiled ahead of time."""

    cases: tuple[str, ...]
    kernel: str
    arch: str
    registers: int
    """Per thread."""
    spilled: int
    stack: int
    """Bytes per thread."""
    shared: int
    """Bytes per program."""
    warps: int
    """Per program."""
    tile: int


def kernel_rows(cases: Sequence[Case], card: Card) -> Iterator[KernelRow]:
    """The kernels that the cases would start, each shape once: forward and backward of the core, then the fused block.

    Left out is what the kernels do not take, and the core where a block holds one token (a copy).

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    from kernels import compile as ahead  # imports the kernels, so only when it is asked for
    from kernels.attention_block.compile import compile_block

    nowhere, major = torch.device("meta"), int(card.arch.removeprefix("sm_")) // 10
    cores: dict[ahead.Case, list[str]] = {}
    blocks: dict[tuple[ahead.Case, int], list[str]] = {}
    for case in cases:
        shape = ahead.Case(
            block_h=case.height // case.blocks_per_side,
            block_w=case.width // case.blocks_per_side,
            head_dim=case.head_dim,
            dtype=case.dtype,
            num_heads=case.heads,
            blocks_per_side=case.blocks_per_side,
        )
        if case.tokens_per_block > 1 and not_taken(case, nowhere) is None:
            cores.setdefault(shape, []).append(case.name)
            if not_fused(case, nowhere, major=major) is None:
                blocks.setdefault((shape, case.dim), []).append(case.name)
    for shape, names in cores.items():
        yield from (_row(names, found) for found in ahead.compile_case(shape, (card.arch,)))
    for (shape, dim), names in blocks.items():
        yield _row(names, compile_block(shape, dim, card.arch))


def _row(cases: Sequence[str], found: Any) -> KernelRow:
    """``found`` is a ``kernels.local_attention.compile.Resources``."""
    wanted = {field.name for field in fields(KernelRow)} - {"cases"}
    return KernelRow(cases=tuple(cases), **{name: getattr(found, name) for name in wanted})
