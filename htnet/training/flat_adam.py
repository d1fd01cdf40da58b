"""Adam and AdamW over flat buffers of all trained parameters, which become views of them.

On a GPU a step is one kernel (:mod:`kernels.adam`), on a CPU torch's fused loop. Nothing of
a step is decided on the host, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from htnet.config import TrainConfig
from htnet.training.optimizers import parameter_groups
from htnet.training.precision import clip_factor

__all__ = ["FlatAdam"]


class FlatAdam:
    """Optimizer of a network whose weights are fp32, or with ``narrow`` bf16 beside fp32 masters.

    Attributes:
        parameters: the trained parameters in the order of the buffers: those with weight decay first.
        noted: tables of addresses that await their values, each with them; see :meth:`fill_tables`.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, *, narrow: bool) -> None:
        from kernels.adam import AdamBuffers  # imports Triton

        groups = parameter_groups(model, train)
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        device = self.parameters[0].device
        self.buffers = AdamBuffers.of([p.numel() for p in self.parameters], decays, narrow=narrow, device=device)
        self.noted: list[tuple[Tensor, list[int]]] = []
        self._betas, self._eps, self._clip_norm = train.betas, train.eps, train.clip_norm
        self._decoupled = train.optimizer == "adamw"
        self._whole = torch.ones(1, device=device)
        self._views = {name: self._view(name) for name in ("masters", "means", "squares")}
        weights = self._views["masters"] if self.buffers.narrow is None else self._view("narrow")
        with torch.no_grad():
            for parameter, master, weight in zip(self.parameters, self._views["masters"], weights, strict=True):
                master.copy_(parameter)
                weight.copy_(parameter)
                parameter.data = weight
        # (decay, elements) of each group: on a CPU its buffers are one range
        lengths = [sum(self.segment(p.numel()) for p in group["params"]) for group in groups]
        self._ranges = [(group["weight_decay"], length) for group, length in zip(groups, lengths, strict=True)]
        self._gradients: Tensor | None = None

    @staticmethod
    def segment(size: int) -> int:
        """Return the elements of the buffers that a parameter of ``size`` elements takes."""
        from kernels.adam import BLOCK

        return int(-(-size // BLOCK) * BLOCK)

    def _view(self, name: str) -> list[Tensor]:
        views: list[Tensor] = self.buffers.views(getattr(self.buffers, name), self.parameters)
        return views

    def make_table(self) -> Tensor:
        """Return an empty table of addresses for a step in a CUDA graph; it is not of the graph's memory."""
        return torch.zeros(len(self.parameters), dtype=torch.int64, device=self._whole.device)

    @torch.no_grad()
    def step(self, rates: Tensor, table: Tensor | None = None) -> None:
        """Update every parameter by its gradient, and drop the gradients.

        Args:
            rates: (4,) float32, the step's row of :func:`kernels.adam.rate_table`, on the parameters' device.
            table: of :meth:`make_table` while a graph is captured; :meth:`fill_tables` completes it.
        """
        gradients = [self._gradient_of(parameter) for parameter in self.parameters]
        factor = clip_factor(gradients, self._clip_norm) if self._clip_norm else self._whole
        if self._whole.is_cuda:
            self._launch(gradients, rates, factor, table)
        else:
            self._update_ranges(gradients, rates, factor)
        for parameter in self.parameters:
            parameter.grad = None

    def fill_tables(self) -> None:
        """Write the addresses that the captured steps have noted into their tables."""
        for table, addresses in self.noted:
            table.copy_(torch.tensor(addresses))
        self.noted.clear()

    @torch.no_grad()
    def restart(self, weights: Mapping[Tensor, Tensor]) -> None:
        """Begin anew from fp32 weights, by parameter: moments become 0."""
        for parameter, master in zip(self.parameters, self._views["masters"], strict=True):
            master.copy_(weights[parameter])
        self.buffers.means.zero_()
        self.buffers.squares.zero_()
        self._narrow_weights()

    def state(self) -> dict[str, Any]:
        """Return masters and moments by name, each a list in the order of ``parameters``; views, not copies."""
        return {name: list(views) for name, views in self._views.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, copied."""
        for name, views in self._views.items():
            for view, value in zip(views, state[name], strict=True):
                view.copy_(value)
        self._narrow_weights()

    def _narrow_weights(self) -> None:
        if self.buffers.narrow is not None:
            self.buffers.narrow.copy_(self.buffers.masters)

    @staticmethod
    def _gradient_of(parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        gradient = parameter.grad.contiguous()
        if gradient.is_cuda and gradient.data_ptr() % 16:  # the kernel reads 16 bytes at a time
            gradient = gradient.clone()
        parameter.grad = gradient  # kept until the step is queued
        return gradient

    def _launch(self, gradients: list[Tensor], rates: Tensor, factor: Tensor, table: Tensor | None) -> None:
        addresses = [gradient.data_ptr() for gradient in gradients]
        if table is None:
            table = torch.tensor(addresses).to(factor.device)
        else:
            self.noted.append((table, addresses))
        self.launch(table, rates, factor)

    def launch(self, addresses: Tensor, rates: Tensor, factor: Tensor | None = None) -> None:
        """Start the kernel on gradients that lie at the addresses, (parameters,) int64; ``factor`` (1,) scales them."""
        from kernels.adam import adam_launch

        settings: dict[str, Any] = {"betas": self._betas, "eps": self._eps, "decoupled": self._decoupled}
        adam_launch(self.buffers, addresses, rates, self._whole if factor is None else factor, **settings).run()

    def _update_ranges(self, gradients: list[Tensor], rates: Tensor, factor: Tensor) -> None:
        """Take the step of :func:`kernels.adam.adam_pass` by torch's fused loop over whole ranges."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.buffers.masters)
            self._gradient_views = self.buffers.views(self._gradients, self.parameters)
        torch._foreach_copy_(self._gradient_views, gradients)
        if factor is not self._whole:
            self._gradients.mul_(factor)
        options: dict[str, Any] = {"lr": rates[0].item(), "beta1": self._betas[0], "beta2": self._betas[1]}
        options |= {"eps": self._eps, "amsgrad": False, "maximize": False}
        fused = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        lengths = [length for _, length in self._ranges]
        buffers = (self.buffers.masters, self.buffers.means, self.buffers.squares, self._gradients)
        parts = zip(*(buffer.split(lengths) for buffer in buffers), strict=True)
        for (decay, _), (master, mean, square, gradient) in zip(self._ranges, parts, strict=True):
            fused([master], [gradient], [mean], [square], [], [rates[3]], weight_decay=decay, **options)
        self._narrow_weights()
