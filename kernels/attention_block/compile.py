"""What the fused kernel of a shape needs of a GPU, without one: the sister of :mod:`kernels.compile`.

python -m kernels.attention_block.compile --block 4 --heads 3 --head-dim 85 --channels 256 --arch sm_90
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from kernels import compile as core
from kernels.attention_block import host
from kernels.local_attention.host import column_parts

__all__ = ["compile_block"]


def compile_block(
    block: int, heads: int, head_dim: int, channels: int, *, arch: str = "sm_90", dtype: str = "bf16"
) -> dict[str, Any]:
    """Compile for blocks of ``block`` x ``block`` tokens; registers, stack, spills, shared memory, instructions."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=core.DTYPES[dtype], device="meta")

    x, inner = empty(256, 4 * block, 4 * block, channels), heads * head_dim
    weights = [empty(channels), empty(channels), empty(3 * inner, channels), empty(inner, channels), empty(channels)]
    attended = empty(*x.shape[:3], heads, sum(column_parts(head_dim)))
    launch = host.fused_launch(x, weights, attended, empty(*x.shape), heads, 4, 1e-5, head_dim**-0.5)
    compiled = core.compile_launch(launch, arch)
    shape = {"arch": arch, "dtype": dtype, "tokens": block**2, "heads": heads, "head_dim": head_dim}
    return shape | {"channels": channels, "shared": compiled.metadata.shared} | core._nvidia(compiled, arch)


def main(arguments: list[str] | None = None) -> int:
    """The command line: one line per figure."""
    parser = argparse.ArgumentParser(prog="python -m kernels.attention_block.compile", description=__doc__)
    parser.add_argument("--block", type=int, default=4, help="tokens in a row and in a column of a block")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=85)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument(
        "--arch", choices=[arch for arch in core.ARCHITECTURES if arch.startswith("sm")], default="sm_90"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    for name, value in compile_block(**vars(parser.parse_args(arguments))).items():
        print(f"{name:12} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
