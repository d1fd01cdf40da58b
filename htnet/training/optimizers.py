"""Optimizers by configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from htnet.config import TrainConfig
from htnet.config.training import Precision
from htnet.training.master_adam import MasterAdam

__all__ = ["build_optimizer", "set_learning_rate"]


def build_optimizer(model: nn.Module, train: TrainConfig, precision: Precision) -> torch.optim.Optimizer:
    """Build fused Adam or AdamW; for bf16, one that works on fp32 masters.

    Decay applies to weight matrices; biases, norms and position tables have none.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named], "weight_decay": 0.0}]
    if train.weight_decay > 0:
        exempt = set(model.no_weight_decay())  # type: ignore[operator] # every model of this project names them
        groups = [
            {"params": [p for name, p in named if name not in exempt], "weight_decay": train.weight_decay},
            {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
        ]
    if precision == "bf16":
        return MasterAdam(
            groups,
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            decoupled=train.optimizer == "adamw",
            clip_norm=train.clip_norm,
        )
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
