"""Adam for weights of 16 bits: fp32 masters and moments, one pass over memory.

Arithmetic as torch's fused Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019) on the masters; the
gradient is widened and the new weight rounded while they are in the cache, so a step moves about 32 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Weights per call on a CPU: a chunk's float32 gradient (4 MiB) stays in the cache."""
_STATE = ("master", "exp_avg", "exp_avg_sq")


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
        self._fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._clip_norm = clip_norm
        self._pieces: dict[Tensor, list[tuple[Tensor, ...]]] = {}
        self._widened: dict[torch.device, Tensor] = {}

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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, scale)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but masters and moments stay fp32, where torch would round them to the parameters' dtype."""
        super().load_state_dict(dict(state_dict))
        for index, parameter in enumerate(self._parameters()):
            saved = state_dict["state"][index]
            self.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}
        self._cut()

    def _cut(self) -> None:
        """Views of weight, master and moments by piece, once and not at every step, and a buffer per device."""
        for parameter in self._parameters():
            tensors = (parameter.data, *(self.state[parameter][key] for key in _STATE))
            size = self._size(parameter)
            self._pieces[parameter] = list(zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True))
            buffer = self._widened.get(parameter.device)
            if buffer is None or len(buffer) < min(size, parameter.numel()):
                self._widened[parameter.device] = torch.empty(min(size, parameter.numel()), device=parameter.device)

    @staticmethod
    def _size(parameter: Tensor) -> int:
        return _CHUNK if parameter.device.type == "cpu" else max(1, parameter.numel())

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _clip_scale(self) -> Tensor | None:
        if not self._clip_norm:
            return None
        norms = [p.grad.norm(dtype=torch.float32) for p in self._parameters() if p.grad is not None]
        return (self._clip_norm / (torch.stack(norms).square().sum().sqrt() + 1e-6)).clamp(max=1.0)

    def _update(self, parameter: Tensor, group: dict[str, Any], scale: Tensor | None) -> None:
        step = self.state[parameter]["step"]
        step += 1
        assert parameter.grad is not None
        pieces, buffer = self._pieces[parameter], self._widened[parameter.device]
        assert pieces[0][0].data_ptr() == parameter.data_ptr(), "the parameter was moved after narrow()"
        # flatten() copies a gradient whose layout differs from its weight's
        gradients = parameter.grad.flatten().split(self._size(parameter))
        for (weight, master, mean, square), narrow in zip(pieces, gradients, strict=True):
            gradient = buffer[: len(narrow)].copy_(narrow)
            if scale is not None:
                gradient.mul_(scale)
            self._fused(
                [master],
                [gradient],
                [mean],
                [square],
                [],
                [step],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            weight.copy_(master)
