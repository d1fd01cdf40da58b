"""A step of Adam on fp32 masters of bf16 weights, one pass over memory.

Kingma and Ba, 2015; decoupled decay: Loshchilov and Hutter, 2019. A step moves 28 bytes a weight: the gradient (2), the
master and both moments read and written (24), the rounded weight (2). Single operations move the widened gradient and
the new master through the cache once more.
"""

# Numba types arguments at the call; hints would say less than the docstrings and be checked by nobody
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import numpy as np

from kernels.cpu.compiled import compiled

__all__ = ["update"]

_16, _HALF, _LAST, _NAN = np.uint32(16), np.uint32(0x7FFF), np.uint32(1), np.uint32(0x7FC0)


@compiled
def update(weight, gradient, master, mean, square, scale, decay, keep, of_mean, of_square, rate, root_scale, eps):
    """Update ``weight``, ``master``, ``mean`` and ``square`` in place.

    Args:
        weight, gradient: (n,) uint16, the bits of bf16.
        master, mean, square: (n,) float32, mean and square the moments.
        scale: float32, the gradient's factor where it is clipped; 1 else.
        decay: float32, the part of the master that is added to the gradient (Adam's decay); 0 for none.
        keep: float32, what is left of the master before the step (AdamW's decay); 1 for all.
        of_mean, of_square, eps: float32; the first two 1 - beta1 and 1 - beta2, which float32 cannot take from betas.
        rate: float32, the learning rate divided by 1 - beta1^t.
        root_scale: float32, 1 / sqrt(1 - beta2^t).
    """
    for i in range(weight.shape[0]):
        slope = scale * np.uint32(np.uint32(gradient[i]) << _16).view(np.float32) + decay * master[i]
        mean[i] += of_mean * (slope - mean[i])
        square[i] += of_square * (slope * slope - square[i])
        value = np.float32(keep * master[i] - rate * mean[i] / (np.sqrt(square[i]) * root_scale + eps))
        master[i] = value
        bits = value.view(np.uint32)
        rounded = np.uint32(bits + _HALF + ((bits >> _16) & _LAST)) >> _16  # to nearest, ties to even
        weight[i] = np.uint16(rounded if value == value else _NAN)
