"""Limits on a kernel's error: error measures, tolerances per dtype, float64 truth, poisoned outputs.

Used by the tests, and by the gate that a backend passes before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from unittest import mock

import torch
from torch import Tensor

from kernels.reference import local_attention_reference

__all__ = [
    "BLOCK_TOLERANCES",
    "FLOOR",
    "TOLERANCES",
    "Tolerance",
    "assert_close",
    "attention_truth",
    "poisoned_outputs",
    "relative_rms",
]

FLOOR: Final = 1e-6
"""Root mean square below which truth is held to the absolute error ``tolerance * FLOOR``."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative root-mean-square error of the output and of each gradient."""

    forward: float
    backward: float


# three times the largest error measured over the cases of tests/test_kernels_triton.py, interpreted, against float64
# of the same (rounded) input, the output first: float32 4.3e-7 and 5.1e-7 (tiles of 64; 1.9e-7 and 3.1e-7 with those
# now in use), bfloat16 2.4e-3 and 2.6e-3, float16 3.0e-4 and 3.1e-4, both little more than rounding the result
TOLERANCES: Final = {
    torch.float32: Tolerance(forward=1.3e-6, backward=1.5e-6),
    torch.bfloat16: Tolerance(forward=7.2e-3, backward=7.8e-3),
    torch.float16: Tolerance(forward=9.0e-4, backward=9.4e-4),
}

# the same for local_attention_block, of all six gradients the worst: over the cases of tests/test_kernels_block.py,
# interpreted, and over the profiler's fine/0, fine/2, hd/0 and paper/0 with batch 2 and 8 on a CPU,
# float32 1.8e-7 and 1.8e-6 (the gain's, a sum over 8,192 tokens; 4.8e-7 in the tests), bfloat16 2.8e-3 and 6.0e-3,
# float16 3.3e-4 and 7.1e-4: more is rounded on the way than in the core
BLOCK_TOLERANCES: Final = {
    torch.float32: Tolerance(forward=5.4e-7, backward=5.4e-6),
    torch.bfloat16: Tolerance(forward=8.4e-3, backward=1.8e-2),
    torch.float16: Tolerance(forward=9.9e-4, backward=2.1e-3),
}


def relative_rms(actual: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the error over that of the truth, computed in float64; NaN if anything is NaN."""
    error, size = ((x.double().square().mean().sqrt()) for x in (actual.double() - truth.double(), truth))
    return (error / size.clamp_min(FLOOR)).item()


def assert_close(name: str, actual: Tensor, truth: Tensor, tolerance: float) -> None:
    """Raise AssertionError, with the figures, unless shapes agree and the relative error is within ``tolerance``."""
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    error = relative_rms(actual, truth.to(actual.device))
    if not error <= tolerance:
        missing = int(actual.isnan().sum())
        raise AssertionError(f"{name}: relative RMS error {error:.3g} over {tolerance:.3g}, {missing} values are NaN")


def attention_truth(
    qkv: Tensor, grad_out: Tensor, *, num_heads: int, blocks_per_side: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of ``qkv``, both in float64, for the upstream gradient ``grad_out``."""
    wide = qkv.detach().double().requires_grad_()
    out = local_attention_reference(wide, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale)
    (grad_qkv,) = torch.autograd.grad(out, wide, grad_out.double())
    return out.detach(), grad_qkv


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill the Triton backend's outputs with NaN before its kernels run, so that places they do not write show."""
    from kernels.local_attention import host

    empty = host.new_empty

    def poisoned(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return empty(like, shape, dtype).fill_(torch.nan)

    with mock.patch.object(host, "new_empty", poisoned):
        yield
