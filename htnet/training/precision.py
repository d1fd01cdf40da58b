"""Precision of a step: autocast, prediction, clipping, weights of 16 bits."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from htnet.training.master_adam import MasterAdam

__all__ = ["AUTOCAST_DTYPES", "autocast", "clip_factor", "clip_gradients", "narrow_weights", "predict_logits"]

AUTOCAST_DTYPES = {"fp16": torch.float16}
"""Precisions that keep fp32 weights and cast in the pass; bf16 has bf16 weights instead (:class:`MasterAdam`)."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return torch's autocast to ``dtype``, which does nothing for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Return logits in evaluation mode: (B, 3, S, S) float32 -> (B, num_classes) float32 on ``device``."""
    model.eval()
    with autocast(device, dtype):
        logits: Tensor = model(images.to(device))
    return logits.float()


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> None:
    """Scale the gradients to a norm of at most ``clip_norm`` over all of them, rounded as DeepSpeed does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, clip_factor(gradients, clip_norm))


def clip_factor(gradients: list[Tensor], clip_norm: float) -> Tensor:
    """Return the factor, a scalar, that scales gradients to a norm of at most ``clip_norm`` over all of them."""
    norm = torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)).square().sum().sqrt()
    return (torch.full_like(norm, clip_norm) / (norm + 1e-6)).clamp(max=1.0)


def narrow_weights(optimizer: torch.optim.Optimizer) -> None:
    """Round the weights to bf16 if the optimizer holds masters."""
    if isinstance(optimizer, MasterAdam):
        optimizer.narrow(torch.bfloat16)
