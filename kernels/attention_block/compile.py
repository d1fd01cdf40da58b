"""What the fused kernel of a shape needs of a GPU, without one: the sister of :mod:`kernels.local_attention.compile`.

    python -m kernels.attention_block.compile --block 4 --heads 3 --head-dim 85 --channels 256 --arch sm_90
    python -m kernels.attention_block.compile --readme

The second line prints the table of kernels/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

import torch

from kernels.attention_block import host
from kernels.local_attention import compile as core
from kernels.local_attention.host import column_parts

__all__ = ["ARCHITECTURES", "IN_USE", "compile_block"]

ARCHITECTURES: Final = tuple(arch for arch in core.ARCHITECTURES if arch.startswith("sm_"))


def _square(side: int, heads: int = 3, head_dim: int = 85) -> core.Case:
    return core.Case(block_h=side, block_w=side, num_heads=heads, head_dim=head_dim)


# a shape, channels of x, architectures
IN_USE: Final = (
    (_square(2), 256, ("sm_90", "sm_100")),
    (_square(4), 256, ("sm_90", "sm_100")),
    (_square(8), 256, ("sm_90", "sm_100")),
    (_square(4, 4, 64), 256, ("sm_90",)),
)
"""Held to no spill, and shown in kernels/README.md."""

_SHOWN: Final = (
    (_square(4, 3, 80), 256, ("sm_90",)),
    (_square(4, 3, 96), 256, ("sm_90",)),
    (_square(4, 3, 42), 128, ("sm_90",)),
    *((_square(side), 256, ("sm_90",)) for side in (3, 5, 7)),
    *((_square(side), 256, ("sm_80",)) for side in (4, 8)),
)
"""Shown there too: what other sizes cost, and what keeps the kernel from sm_80."""


def compile_block(case: core.Case, channels: int, arch: str) -> core.Resources:
    """Compile the fused kernel for a shape whose x has ``channels`` channels."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=core.DTYPES[case.dtype], device="meta")

    side, inner = case.blocks_per_side, case.num_heads * case.head_dim
    x = empty(case.batch, case.block_h * side, case.block_w * side, channels)
    weights = [empty(channels), empty(channels), empty(3 * inner, channels), empty(inner, channels), empty(channels)]
    attended = empty(*x.shape[:3], case.num_heads, sum(column_parts(case.head_dim)))
    settings = (case.num_heads, side, 1e-5, case.head_dim**-0.5)
    return core.resources(host.fused_launch(x, weights, attended, empty(*x.shape), *settings), case, arch)


def _readme(shapes: Iterable[tuple[core.Case, int, tuple[str, ...]]]) -> str:
    """The table of kernels/README.md: a line per shape and architecture."""
    lines = []
    for case, channels, archs in shapes:
        for arch in archs:
            row = compile_block(case, channels, arch)
            shape = (arch, row.tokens, f"{case.num_heads} x {case.head_dim}", channels)
            lines.append((*shape, row.registers, row.stack, f"{row.shared:,}", f"{row.instructions:,}"))
    columns = ("", "N", "A x D", "C", "registers", "stack", "dynamic shared memory", "instructions a warp")
    return core.markdown(columns, lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line: one line per figure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m kernels.attention_block.compile", description=__doc__)
    parser.add_argument("--readme", action="store_true", help="the table of kernels/README.md; takes no other option")
    parser.add_argument("--block", type=int, default=4, help="tokens in a row and in a column of a block")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=85)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    options = parser.parse_args(arguments)
    if options.readme:
        if len(arguments) > 1:
            parser.error(f"--readme takes no other option, got {' '.join(arguments)}")
        print(_readme(IN_USE + _SHOWN))
        return 0
    case = core.Case(
        block_h=options.block,
        block_w=options.block,
        head_dim=options.head_dim,
        dtype=options.dtype,
        num_heads=options.heads,
    )
    for name, value in asdict(compile_block(case, options.channels, options.arch)).items():
        print(f"{name:12} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
