"""Adam for weights of 16 bits: fp32 masters and moments.

Arithmetic as torch's fused Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019) on the masters. On a CPU
a compiled loop does it in one pass over memory (:mod:`kernels.cpu.adam`); elsewhere torch's fused operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIECE = 1 << 20
"""Weights that a CPU thread takes at once."""
_STATE = ("master", "exp_avg", "exp_avg_sq")

Piece = tuple[NDArray[Any], ...]
"""Equal parts of weight, gradient, master and moments, (n,)."""
Factors = tuple[np.float32, ...]


class MasterAdam(torch.optim.Optimizer):
    """Adam (``decoupled=False``) or AdamW on fp32 masters of the parameters.

    Build it while the parameters are fp32, then call :meth:`narrow`. Gradients are clipped here, in fp32, to a norm
    of ``clip_norm`` over all of them (0: not at all). Parameter groups may set ``lr`` and ``weight_decay``.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        clip_norm: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._decoupled = decoupled
        self._clip_norm = clip_norm
        self._kept: dict[Tensor, list[Piece]] = {}

    def narrow(self, dtype: torch.dtype) -> None:
        """Keep the parameters' values as masters and round the parameters to ``dtype``, in place."""
        for parameter in self._parameters():
            master = parameter.data.float()
            self.state[parameter] = {
                "master": master,
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
                "step": torch.zeros((), device=parameter.device),
            }
            parameter.data = master.to(dtype)
        self._cut()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # closures are for line searches
        """Update every parameter that has a gradient."""
        scale = self._clip_scale()
        pieces: list[tuple[Piece, Factors]] = []
        for group in self.param_groups:
            factors: dict[float, Factors] = {}  # by step, which is the same for all but in odd checkpoints
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = self.state[parameter]["step"]
                step += 1
                if parameter not in self._kept:
                    self._update(parameter, group, scale)
                    continue
                count = step.item()
                if count not in factors:
                    factors[count] = self._factors(count, group, scale)
                pieces += [(piece, factors[count]) for piece in self._pieces(parameter)]
        _update_on_threads(pieces)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but masters and moments stay fp32, where torch would round them to the parameters' dtype."""
        super().load_state_dict(dict(state_dict))
        for index, parameter in enumerate(self._parameters()):
            saved = state_dict["state"][index]
            self.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}
        self._cut()

    def _cut(self) -> None:
        """Pieces of weight, master and moments of what the compiled loop takes, made once and not at every step."""
        self._kept = {}
        for parameter in self._parameters():
            if _takes_loop(parameter) and parameter.numel():
                weight = _bits(parameter.data.view(-1))
                whole = (weight, *(self.state[parameter][key].view(-1).numpy() for key in _STATE))
                cuts = range(0, parameter.numel(), _PIECE)
                self._kept[parameter] = [tuple(array[start : start + _PIECE] for array in whole) for start in cuts]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _clip_scale(self) -> Tensor | None:
        if not self._clip_norm:
            return None
        norms = [p.grad.norm(dtype=torch.float32) for p in self._parameters() if p.grad is not None]
        return (self._clip_norm / (torch.stack(norms).square().sum().sqrt() + 1e-6)).clamp(max=1.0)

    def _pieces(self, parameter: Tensor) -> Iterator[Piece]:
        assert parameter.grad is not None
        kept = self._kept[parameter]
        first = kept[0][0].__array_interface__["data"][0]
        assert first == parameter.data_ptr(), "the parameter was moved after narrow()"
        assert parameter.grad.dtype == parameter.dtype, "the gradient is older than narrow()"
        # flatten() copies a gradient whose layout differs from its weight's
        gradient = _bits(parameter.grad.flatten())
        for index, (weight, *state) in enumerate(kept):
            yield (weight, gradient[index * _PIECE : (index + 1) * _PIECE], *state)

    def _factors(self, step: float, group: dict[str, Any], scale: Tensor | None) -> Factors:
        """The scalars of :func:`kernels.cpu.adam.update`."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        decay = group["weight_decay"]
        values = (
            1.0 if scale is None else scale.item(),
            0.0 if self._decoupled else decay,
            1.0 - rate * decay if self._decoupled else 1.0,
            1.0 - beta1,
            1.0 - beta2,
            rate / (1.0 - beta1**step),
            (1.0 - beta2**step) ** -0.5,
            group["eps"],
        )
        return tuple(np.float32(value) for value in values)

    def _update(self, parameter: Tensor, group: dict[str, Any], scale: Tensor | None) -> None:
        """By torch's operations, for what the compiled loop does not take."""
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = parameter.grad.float().contiguous()  # as the masters are; fused operations go by memory
        if scale is not None:
            gradient = gradient * scale
        fused = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        fused(
            [state["master"]],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        parameter.copy_(state["master"])


def _bits(flat: Tensor) -> NDArray[np.uint16]:
    return flat.view(torch.int16).numpy().view(np.uint16)


def _takes_loop(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16


def _update_on_threads(pieces: list[tuple[Piece, Factors]]) -> None:
    """Each thread takes every n-th piece, which are equal but for the last of a parameter; none waits for Python."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads == 0:
        return
    from kernels.cpu.adam import update  # Numba, which a GPU does without

    def work(first: int) -> None:
        for piece, factors in pieces[first::threads]:
            update(*piece, *factors)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
