"""Training step in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from htnet.config import TrainConfig
from htnet.config.training import Precision
from htnet.training.loss import cross_entropy
from htnet.training.optimizers import build_optimizer, set_learning_rate
from htnet.training.precision import AUTOCAST_DTYPES, autocast, clip_gradients, narrow_weights, predict_logits
from htnet.training.state_file import load_state, save_state

__all__ = ["TorchEngine"]


class TorchEngine:
    """Engine (:class:`~htnet.training.engine.Engine`) of one process."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        precision: Precision,
        *,
        device: torch.device,
        weights: Tensor | None,
    ) -> None:
        self.model = model
        self.device = device
        self._train = train
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._weights = None if weights is None else weights.to(device)
        self._optimizer = build_optimizer(model, train, precision)
        self._clip_norm = 0.0 if precision == "bf16" else train.clip_norm  # MasterAdam clips in fp32
        narrow_weights(self._optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        self.model.train()
        set_learning_rate(self._optimizer, learning_rate)
        with autocast(self.device, self._dtype):
            logits = self.model(images)
        loss = cross_entropy(logits, labels, self._weights, self._train.label_smoothing)
        self._scaler.scale(loss).backward()
        if self._clip_norm > 0:
            self._scaler.unscale_(self._optimizer)
            clip_gradients(self.model.parameters(), self._clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        return predict_logits(self.model, images, self.device, self._dtype)

    def save(self, folder: Path) -> Callable[[], None]:
        return save_state(folder, self.model, self._optimizer, self._scaler)

    def load(self, folder: Path) -> None:
        load_state(folder, self.model, self._optimizer, self._scaler)

    def close(self) -> None:
        return
