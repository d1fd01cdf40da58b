"""Facts on the GPU kernels without a GPU: what the compiler makes of them for a card's architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from kernels.benchmarks.cards import Card
from kernels.benchmarks.cases import Case
from kernels.benchmarks.providers import not_taken

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
    """Yield the kernels that the cases would start, each shape once, forward and backward.

    Left out is what the kernels do not take, and blocks of one token (a copy).

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    from kernels.local_attention import compile as ahead  # imports the kernels, so only when it is asked for

    shapes: dict[ahead.Case, list[str]] = {}
    for case in cases:
        if case.tokens_per_block > 1 and not_taken(case, torch.device("meta")) is None:
            shape = ahead.Case(
                block_h=case.height // case.blocks_per_side,
                block_w=case.width // case.blocks_per_side,
                head_dim=case.head_dim,
                dtype=case.dtype,
                num_heads=case.heads,
                blocks_per_side=case.blocks_per_side,
            )
            shapes.setdefault(shape, []).append(case.name)
    shown = [field.name for field in fields(KernelRow) if field.name != "cases"]
    for shape, names in shapes.items():
        for found in ahead.compile_case(shape, (card.arch,)):
            yield KernelRow(cases=tuple(names), **{name: getattr(found, name) for name in shown})
