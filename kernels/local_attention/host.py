"""Launches made from tensors: which kernel, which tile, which grid; and the two functions that run them.

A :class:`Launch` holds everything that a kernel is called with. The same object runs on a device, or is made from meta
tensors and compiled ahead of time by :mod:`kernels.local_attention.compile`: the code inspected is the code that runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kernels.local_attention import kernels

__all__ = [
    "MAX_SPAN_32_BIT",
    "Launch",
    "Tiling",
    "attend",
    "attend_backward",
    "backward_launch",
    "forward_launch",
    "tiling",
]

MAX_SPAN_32_BIT: Final = 2**31 - 1
"""Largest span of a tensor, in elements, whose offsets are computed in 32 bits."""

_LOG2_E: Final = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Division of a kernel's work: ``tile`` slots a program, filled by ``packed`` whole blocks (0: tiled kernel).

    ``registers`` limits the registers of a thread; 0 leaves them to the compiler. ``late`` is for a packed backward
    that would spill if it loaded all its input at once.
    """

    tile: int
    packed: int
    warps: int
    stages: int = 1  # nothing to pipeline: packed kernels have no loop, and odd rows allow no asynchronous copies
    registers: int = 0
    late: bool = False


def largest_packed(element_size: int) -> int:
    """Return the most tokens of a block that is packed whole into a tile; larger blocks are read tile by tile.

    In float32 it is half as many. Its products use no matrix instruction, for none keeps its precision, and hold twice
    the registers: tiles of 64 x 64 spill.
    """
    return 64 if element_size == 2 else 32


def tiling(tokens: int, head_dim: int, element_size: int, capability: int, *, backward: bool) -> Tiling:
    """Choose the tile of a shape by a fixed rule, so that equal input gives equal bits on one kind of device.

    There is no autotuning. The tile is the smallest one that holds a block, with as many whole blocks as fit. With one
    block to a tile the compiler knows the empty slots, which then cost next to nothing: 9 tokens in 16 slots take half
    the instructions per token that three blocks take in 32. One warp per 16 slots is the least work in all, because the
    warps of a product's rows exchange nothing. There are twice as many where one would run out of registers.
    kernels/README.md has the figures.
    """
    row = sum(column_parts(head_dim)) * element_size
    if tokens > largest_packed(element_size):
        return _tiled(row, element_size, capability, backward=backward)
    tile = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    warps = tile // 16 * (2 if row > 192 or (backward and tile == 64) else 1)
    warps *= 2 if row > 384 and tile == 32 else 1  # float32 with D over 96
    # without a limit, ptxas stops at 128 registers on sm_80 and spills two
    ampere = 80 <= capability < 90
    registers = 144 if ampere and not backward and tile // tokens > 1 else 0
    late = ampere and backward and tile == 64
    return Tiling(tile=tile, packed=tile // tokens, warps=warps, registers=registers, late=late)


def _tiled(row: int, element_size: int, capability: int, *, backward: bool) -> Tiling:
    """Choose the largest tile that the card's registers allow: a larger tile reads keys and values less often.

    From sm_90 on a product reads its second operand from shared memory. On older cards it waits in registers, and a
    backward of more than 16 slots spills, as it does in float32.
    """
    warps = 8 if row > 384 else 4  # float32 with D over 96
    if backward and (element_size > 2 or capability < 90):
        return Tiling(tile=16, packed=0, warps=warps)
    return Tiling(tile=64, packed=0, warps=8) if element_size == 2 else Tiling(tile=32, packed=0, warps=warps)


def _capability(x: Tensor) -> int:
    """Return the compute capability times ten (90 for 9.0); 0 for ROCm, Hopper's 90 without a card."""
    if x.device.type != "cuda":
        return 90
    major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def column_parts(head_dim: int) -> tuple[int, int]:
    """Return the widths of two column parts that cover ``head_dim``: powers of two from 16; the second may be 0."""
    whole = max(16, 1 << (head_dim - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << (head_dim - first - 1).bit_length()) if head_dim > first else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel with all its arguments, constants and options."""

    kernel: Any
    programs: int
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int]
    tiling: Tiling

    def run(self) -> None:
        """Start the kernel on the device of its first argument."""
        with torch.cuda.device_of(next(iter(self.arguments.values()))):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int | bool]:
        """Return the compiler's options for the kernel."""
        options: dict[str, int | bool] = {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}
        if self.tiling.registers:
            options["maxnreg"] = self.tiling.registers
        return options | {"enable_fp_fusion": True}  # the default until Triton 3.10


def attend(qkv: Tensor, num_heads: int, blocks_per_side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return output (B, H, W, A*D) and base-2 log-sums (blocks, A, N); (blocks, A, 0) where nothing needs them."""
    qkv = last_dim_dense(qkv)
    out, log_sums = empty_outputs(qkv, num_heads, blocks_per_side)
    forward_launch(qkv, out, log_sums, num_heads, blocks_per_side, scale).run()
    return out, log_sums


def empty_outputs(qkv: Tensor, num_heads: int, blocks_per_side: int) -> tuple[Tensor, Tensor]:
    """Allocate the tensors that :func:`attend` returns; also its fake implementation, so that the two cannot differ."""
    batch, height, width, channels = qkv.shape
    tokens = height * width // blocks_per_side**2
    statistics = (batch * blocks_per_side**2, num_heads, tokens if tokens > largest_packed(qkv.element_size()) else 0)
    return new_empty(qkv, (batch, height, width, channels // 3)), new_empty(qkv, statistics, torch.float32)


def attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    log_sums: Tensor | None,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
) -> Tensor:
    """Return the contiguous gradient of ``qkv``; ``out`` and ``log_sums`` are :func:`attend`'s, None if packed."""
    qkv, grad_out = last_dim_dense(qkv), last_dim_dense(grad_out)
    # contiguous from the forward; vmap expands them where one forward serves many upstream gradients
    out, log_sums = (None if x is None else x.contiguous() for x in (out, log_sums))
    grad_qkv = new_empty(qkv, tuple(qkv.shape))
    backward_launch(grad_out, qkv, out, log_sums, grad_qkv, num_heads, blocks_per_side, scale).run()
    return grad_qkv


def forward_launch(
    qkv: Tensor,
    out: Tensor,
    log_sums: Tensor,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
    capability: int | None = None,
) -> Launch:
    """Prepare the forward pass of ``qkv`` into ``out`` and, for large blocks, ``log_sums``."""
    cut, programs, constants = _plan(qkv, num_heads, blocks_per_side, capability, backward=False)
    vec = constants["VEC"] = _vector(qkv)
    dense = qkv.is_contiguous()
    constants |= {"WIDE": int(_span(qkv) > MAX_SPAN_32_BIT), "DENSE": int(dense)}
    strides = _strides("stride", qkv, vec, dense=dense)
    arguments: dict[str, Tensor | int | float] = {"qkv": qkv, "out": out}
    if cut.packed:
        arguments |= strides | {"num_blocks": qkv.shape[0] * blocks_per_side**2}
    else:
        arguments |= {"log_sums": log_sums} | strides
    arguments["score_scale"] = scale * _LOG2_E
    kernel = kernels.packed_forward if cut.packed else kernels.tiled_forward
    return Launch(kernel=kernel, programs=programs, arguments=arguments, constants=constants, tiling=cut)


def backward_launch(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    log_sums: Tensor | None,
    grad_qkv: Tensor,
    num_heads: int,
    blocks_per_side: int,
    scale: float,
    capability: int | None = None,
) -> Launch:
    """Prepare the backward pass into ``grad_qkv``."""
    cut, programs, constants = _plan(qkv, num_heads, blocks_per_side, capability, backward=True)
    vec = constants["VEC"] = min(_vector(qkv), _vector(grad_out))
    constants["WIDE"] = int(max(_span(qkv), _span(grad_out), _span(grad_qkv)) > MAX_SPAN_32_BIT)
    # a late backward has no registers to spare: addresses computed from strides take fewer, else Triton 3.9 spills
    dense, grad_dense = qkv.is_contiguous() and not cut.late, grad_out.is_contiguous()
    constants |= {"DENSE": int(dense), "GRAD_DENSE": int(grad_dense)}
    arguments: dict[str, Tensor | int | float] = {"grad_out": grad_out, "qkv": qkv, "grad_qkv": grad_qkv}
    if not cut.packed:
        assert out is not None
        assert log_sums is not None
        arguments |= {"out": out, "log_sums": log_sums}
    arguments |= _strides("grad_stride", grad_out, vec, dense=grad_dense) | _strides("stride", qkv, vec, dense=dense)
    if cut.packed:
        arguments["num_blocks"] = qkv.shape[0] * blocks_per_side**2
        constants["LATE"] = int(cut.late)
    arguments |= {"scale": scale, "score_scale": scale * _LOG2_E}
    kernel = kernels.packed_backward if cut.packed else kernels.tiled_backward
    return Launch(kernel=kernel, programs=programs, arguments=arguments, constants=constants, tiling=cut)


def _plan(
    qkv: Tensor, num_heads: int, blocks_per_side: int, capability: int | None, *, backward: bool
) -> tuple[Tiling, int, dict[str, int]]:
    """Choose the tile, the number of programs and the constants that both directions share."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    block_h, block_w = height // blocks_per_side, width // blocks_per_side
    tokens, blocks = block_h * block_w, batch * blocks_per_side**2
    capability = _capability(qkv) if capability is None else capability
    cut = tiling(tokens, head_dim, qkv.element_size(), capability, backward=backward)
    first, second = column_parts(head_dim)
    constants = {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "FIRST": first,
        "SECOND": second,
        "SIDE": blocks_per_side,
    }
    constants |= {"BLOCK_H": block_h, "BLOCK_W": block_w, "TILE": cut.tile}
    if cut.packed:
        constants["PACKED"] = cut.packed
    tiles = math.ceil(blocks / cut.packed) if cut.packed else blocks * math.ceil(tokens / cut.tile)
    return cut, tiles * num_heads, constants


def _vector(x: Tensor) -> int:
    """Return the elements of the widest aligned load, at most 16 bytes: a power of two that divides all offsets."""
    return math.gcd(16 // x.element_size(), x.shape[-1], *x.stride()[:3])


def _span(x: Tensor) -> int:
    """Count the elements of memory from the first to the last element of ``x``."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _strides(name: str, x: Tensor, vec: int, *, dense: bool) -> dict[str, int]:
    """Return strides in units of ``vec`` elements; zeros where the kernel reads none, so that it is compiled once."""
    strides = (0, 0, 0) if dense else x.stride()[:3]
    return {f"{name}_{axis}": stride // vec for axis, stride in zip("bhw", strides, strict=True)}


def last_dim_dense(x: Tensor) -> Tensor:
    """Return ``x`` itself, or a copy if its channels are not adjacent in memory; other strides may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def new_empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Allocate an output on the device of ``like``. The kernels write all of it; tests fill it with NaN first."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
