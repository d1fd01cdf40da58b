"""Step of Adam or AdamW over flat buffers, one pass by one Triton kernel.

Weights, masters and moments of a network lie in flat buffers, cut into segments: a parameter begins at a multiple of
``BLOCK`` elements, so that each block is of one parameter. Gradients are read where autograd has put them, by a
table of addresses. Rates and the factor of clipping come from tensors on the device. A captured CUDA graph can
therefore be replayed for every step.

Traffic of a weight: 28 bytes. In bf16 its gradient (2) is read, master and moments (12) are read and written, and the
weight (2) is written; in fp32 the gradient (4) is read, weight and moments (12) are read and written.

Adam: Kingma and Ba, ICLR 2015. AdamW: Loshchilov and Hutter, ICLR 2019.
"""

# a kernel's arguments are pointers and scalars of Triton, described beside them; Triton takes no type hints for values:
# it would read an annotation other than constexpr as a type to cast to
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.local_attention.kernels import _narrow

__all__ = ["BLOCK", "PROGRAMS", "WARPS", "AdamBuffers", "adam_launch", "adam_pass", "rate_table"]

BLOCK: Final = 1024
"""Elements that a program holds at once, and the unit of a parameter's segment."""
WARPS: Final = 4
PROGRAMS: Final = 4
"""Programs per multiprocessor. They walk over the blocks, and leave room for other kernels beside them."""


@triton.jit
def adam_pass(
    masters,  # [blocks * BLOCK] float32; the weights themselves where there are no narrow ones
    means,  # [blocks * BLOCK] float32, first moments
    squares,  # [blocks * BLOCK] float32, second moments
    narrow,  # [blocks * BLOCK] bf16 weights; not read, and any pointer where NARROW is 0
    addresses,  # [parameters] int64, of the gradients, contiguous, at multiples of 16 bytes
    owners,  # [blocks] int32, parameter of each block
    first,  # [parameters] int32, first block of each parameter
    sizes,  # [parameters] int32, elements of each parameter
    decays,  # [parameters] float32, weight decay of each parameter
    rates,  # [4] float32, the step's row of rate_table
    clip,  # [1] float32, factor of the gradients
    blocks,
    beta1,
    beta2,
    eps,
    NARROW: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rate, step_size, inverse_root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    factor = tl.load(clip)
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        owner = tl.load(owners + block)
        decay = tl.load(decays + owner)
        start = (block - tl.load(first + owner)) * BLOCK
        left = tl.load(sizes + owner) - start  # elements from here to the parameter's end
        gradients = tl.load(addresses + owner).to(tl.pointer_type(narrow.dtype.element_ty))
        gradients = tl.multiple_of(gradients + start + lane, 16)  # [BLOCK], each thread's first one is aligned
        if left >= BLOCK:  # without a mask, which would make it load element by element
            gradient = tl.load(gradients).to(tl.float32)
        else:
            gradient = tl.load(gradients, mask=lane < left, other=0.0).to(tl.float32)
        gradient *= factor
        place = block * tl.full((), BLOCK, tl.int64) + lane
        weight, mean, square = tl.load(masters + place), tl.load(means + place), tl.load(squares + place)
        if DECOUPLED:
            weight -= rate * decay * weight
        else:
            gradient += decay * weight
        mean += (1.0 - beta1) * (gradient - mean)
        square = beta2 * square + (1.0 - beta2) * gradient * gradient
        weight -= step_size * mean / (tl.sqrt(square) * inverse_root + eps)
        tl.store(means + place, mean)
        tl.store(squares + place, square)
        tl.store(masters + place, weight)
        if NARROW:
            tl.store(narrow + place, _narrow(weight, narrow.dtype.element_ty))


def rate_table(rates: Sequence[float], betas: tuple[float, float], first_step: int) -> Tensor:
    """Return (steps, 4) float32 on the CPU: rate, rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), t.

    ``rates`` are those of the steps from ``first_step`` on, counted from 0; t counts from 1. The corrections are
    computed in float64: 1 - beta2^t of early steps would lose four digits in float32.
    """
    step = torch.arange(first_step + 1, first_step + 1 + len(rates), dtype=torch.float64)
    rate = torch.tensor(rates, dtype=torch.float64)
    first, second = (1.0 - beta**step for beta in betas)
    return torch.stack([rate, rate / first, second.rsqrt(), step], dim=1).float()


@dataclass(frozen=True, kw_only=True)
class AdamBuffers:
    """Flat buffers of all parameters, and the tables that say whose each block is."""

    masters: Tensor
    """(blocks * BLOCK,) float32: the weights, or in 16 bits their masters."""
    means: Tensor
    """As ``masters``: first moments."""
    squares: Tensor
    """As ``masters``: second moments."""
    narrow: Tensor | None
    """(blocks * BLOCK,) bf16 weights; None where the masters are the weights."""
    owners: Tensor
    """(blocks,) int32: parameter of each block."""
    first: Tensor
    """(parameters,) int32: first block of each parameter."""
    sizes: Tensor
    """(parameters,) int32: elements of each parameter."""
    decays: Tensor
    """(parameters,) float32: weight decay of each parameter."""

    @staticmethod
    def of(sizes: Sequence[int], decays: Sequence[float], *, narrow: bool, device: torch.device) -> AdamBuffers:
        """Allocate buffers of zeros for parameters of these sizes, in elements."""
        blocks = [-(-size // BLOCK) for size in sizes]
        count = torch.tensor(blocks)
        length = int(count.sum()) * BLOCK
        masters, means, squares = (torch.zeros(length, device=device) for _ in range(3))
        return AdamBuffers(
            masters=masters,
            means=means,
            squares=squares,
            narrow=torch.zeros(length, dtype=torch.bfloat16, device=device) if narrow else None,
            owners=torch.repeat_interleave(torch.arange(len(blocks)), count).int().to(device),
            first=(count.cumsum(0) - count).int().to(device),
            sizes=torch.tensor(sizes, dtype=torch.int32, device=device),
            decays=torch.tensor(decays, dtype=torch.float32, device=device),
        )

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return views of a flat buffer with the shapes of the parameters."""
        starts = (self.first.long() * BLOCK).tolist()
        return [
            flat[start : start + tensor.numel()].view(tensor.shape) for start, tensor in zip(starts, like, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class AdamLaunch:
    """The kernel with all its arguments."""

    kernel: Any
    programs: int
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int]

    def run(self) -> None:
        """Start the kernel on the device of its buffers."""
        masters = self.arguments["masters"]
        assert isinstance(masters, Tensor)
        with torch.cuda.device_of(masters):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int | bool]:
        """Return the compiler's options for the kernel."""
        return {"num_warps": WARPS, "enable_fp_fusion": True}


def adam_launch(
    buffers: AdamBuffers,
    addresses: Tensor,
    rates: Tensor,
    clip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> AdamLaunch:
    """Prepare a step: ``addresses`` (parameters,) int64, ``rates`` (4,), ``clip`` (1,).

    The gradients at the addresses have the dtype of the weights: bf16 where there are narrow ones, else float32.
    """
    tensors = {
        "masters": buffers.masters,
        "means": buffers.means,
        "squares": buffers.squares,
        "narrow": buffers.masters if buffers.narrow is None else buffers.narrow,
        "addresses": addresses,
        "owners": buffers.owners,
        "first": buffers.first,
        "sizes": buffers.sizes,
        "decays": buffers.decays,
        "rates": rates,
        "clip": clip,
    }
    blocks = len(buffers.owners)
    return AdamLaunch(
        kernel=adam_pass,
        programs=min(blocks, PROGRAMS * _multiprocessors(buffers.masters.device)),
        arguments={**tensors, "blocks": blocks, "beta1": betas[0], "beta2": betas[1], "eps": eps},
        constants={"NARROW": int(buffers.narrow is not None), "DECOUPLED": int(decoupled), "BLOCK": BLOCK},
    )


def _multiprocessors(device: torch.device) -> int:
    """Return the number of a card's multiprocessors; one where there is no card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
