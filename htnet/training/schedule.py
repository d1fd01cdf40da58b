"""Learning rate of every optimizer step."""

from __future__ import annotations

import math

from htnet.config import TrainConfig

__all__ = ["learning_rate"]


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or cosine to zero."""
    warmup = round(train.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - warmup) / max(1, train.epochs * steps_per_epoch - warmup)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
