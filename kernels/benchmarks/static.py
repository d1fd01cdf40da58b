"""What can be said of the GPU kernels without a GPU: what the compiler makes of them for a card's architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.benchmarks.cards import Card
from kernels.benchmarks.cases import Case

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
    """Forward and backward kernels of the cases, each shape once; none where a block holds one token (a copy).

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    from kernels import compile as ahead  # imports the kernels, so only when it is asked for

    shapes: dict[ahead.Case, list[str]] = {}
    for case in cases:
        if case.tokens_per_block == 1:
            continue
        shape = ahead.Case(
            block_h=case.height // case.blocks_per_side,
            block_w=case.width // case.blocks_per_side,
            head_dim=case.head_dim,
            dtype=case.dtype,
            num_heads=case.heads,
            blocks_per_side=case.blocks_per_side,
        )
        shapes.setdefault(shape, []).append(case.name)
    for shape, names in shapes.items():
        for found in ahead.compile_case(shape, (card.arch,)):
            yield KernelRow(
                cases=tuple(names),
                kernel=found.kernel,
                arch=found.arch,
                registers=found.registers,
                spilled=found.spilled,
                stack=found.stack,
                shared=found.shared,
                warps=found.warps,
                tile=found.tile,
            )
