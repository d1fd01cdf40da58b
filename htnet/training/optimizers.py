"""Optimizers by configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from htnet.config import TrainConfig
from htnet.config.training import Precision
from htnet.training.master_adam import MasterAdam

__all__ = ["build_optimizer", "parameter_groups", "set_learning_rate"]


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by their decay, which biases, norms and position tables have none of."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not train.weight_decay:
        return [{"params": [p for _, p in named], "weight_decay": 0.0}]
    exempt = set(model.no_weight_decay())  # type: ignore[operator] # every model of this project names them
    return [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": train.weight_decay},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, train: TrainConfig, precision: Precision) -> torch.optim.Optimizer:
    """Build fused Adam or AdamW; for bf16, one that works on fp32 masters."""
    groups = parameter_groups(model, train)
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
