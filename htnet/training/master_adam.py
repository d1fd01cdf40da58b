"""Adam for weights of 16 bits, with fp32 masters and moments.

On the masters its arithmetic is that of torch's fused Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter,
2019), in a few calls for all parameters of a group. On a GPU, a launch for each parameter costs more than its
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MasterAdam"]


class MasterAdam(torch.optim.Optimizer):
    """Adam (``decoupled=False``) or AdamW on fp32 masters of the parameters.

    Build it while the parameters are fp32, then call :meth:`narrow`. Gradients are clipped here, in fp32, to a norm of
    ``clip_norm`` over all of them (0: not at all). Parameter groups may set ``lr`` and ``weight_decay``.
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # closures are for line searches
        """Update every parameter that has a gradient."""
        moved = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients = [self._widened(parameters) for parameters in moved]
        if self._clip_norm:
            self._clip([gradient for group in gradients for gradient in group])
        for group, parameters, widened in zip(self.param_groups, moved, gradients, strict=True):
            if parameters:
                self._update(group, parameters, widened)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as torch does, but keep masters and moments in fp32; torch would round them to the weights' dtype."""
        super().load_state_dict(dict(state_dict))
        for index, parameter in enumerate(self._parameters()):
            saved = state_dict["state"][index]
            self.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _widened(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the gradients in fp32, each in its master's memory layout, which fused operations expect."""
        widened = [torch.empty_like(self.state[parameter]["master"]) for parameter in parameters]
        if parameters:
            torch._foreach_copy_(widened, [parameter.grad for parameter in parameters if parameter.grad is not None])
        return widened

    def _clip(self, gradients: list[Tensor]) -> None:
        norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt()
        torch._foreach_mul_(gradients, (self._clip_norm / (norm + 1e-6)).clamp(max=1.0))

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        names = ("master", "exp_avg", "exp_avg_sq", "step")
        master, mean, square, step = ([self.state[parameter][name] for parameter in parameters] for name in names)
        torch._foreach_add_(step, 1)
        fused = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        fused(
            master,
            gradients,
            mean,
            square,
            [],
            step,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        torch._foreach_copy_(parameters, master)
