"""Training loop of one model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from htnet.config import TrainConfig
from htnet.errors import NonFiniteLossError
from htnet.training.batch import Batch
from htnet.training.engine import Engine
from htnet.training.schedule import learning_rate

__all__ = ["BatchSource", "Source", "Trainer", "Watched"]


class Source(Protocol):
    """Training samples in an order of their own."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training samples."""
        ...

    def state(self) -> bytes:
        """Return a state from which a new source goes on after the last batch, or epoch, that was returned."""
        ...


class BatchSource(Source, Protocol):
    """Endless training batches; a source of whole epochs has none (:mod:`htnet.training.slots`)."""

    def next(self) -> Batch:
        """Return the next batch, on the engine's device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Set of samples that is classified after every epoch."""

    images: Tensor
    """(n, 3, S, S) float32, on the engine's device."""
    names: tuple[str, ...]
    """Name of each sample, for error messages; as many as images."""


def _do_nothing(trainer: Trainer) -> None:
    return


class Trainer:
    """One model in training: epochs, steps, classes of the watched sets. It knows no fold, file, store or Ray.

    Several may live in one process. They share torch's default random generator, from which dropout draws. With
    dropout, the steps of one trainer between two steps of another change the other's result.

    Args:
        engine: the model, its optimizer and its precision.
        source: the training samples; a :class:`BatchSource` where :meth:`run` takes the steps.
        train: number of epochs, learning rates; ``batch_size`` also limits the images that are classified at once.
        watched: sets to classify after every epoch, by name.
        after_epoch: called with the trainer after every epoch, once the epoch's results are noted.
        after_step: called with the trainer after every step; after an exception of it, a state can be saved.
        started: start of this training's seconds, a time of ``time.monotonic``; now by default.

    Attributes:
        epoch: finished epochs.
        losses: loss of each step since the last finished epoch, scalars on the device.
        enough: set to end the training after this epoch.
        train_loss: mean loss of the steps, by epoch.
        predictions: classes of each watched set, by epoch and sample.
        outputs: logits of each watched set after the last epoch, (n, num_classes) float32 on the CPU.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        train: TrainConfig,
        *,
        watched: Mapping[str, Watched] | None = None,
        after_epoch: Callable[[Trainer], None] = _do_nothing,
        after_step: Callable[[Trainer], None] = _do_nothing,
        started: float | None = None,
    ) -> None:
        self.engine, self.source, self.train = engine, source, train
        self.watched = dict(watched or {})
        self.after_epoch, self.after_step = after_epoch, after_step
        self.epoch = 0
        self.losses: list[Tensor] = []
        self.enough = False
        self.train_loss: list[float] = []
        self.predictions: dict[str, list[list[int]]] = {name: [] for name in self.watched}
        self.outputs: dict[str, Tensor] = {}
        self._started = time.monotonic() if started is None else started
        self._seconds_before = 0.0

    @property
    def finished(self) -> bool:
        """True when no epoch is left."""
        return self.enough or self.epoch >= self.train.epochs

    @property
    def steps(self) -> int:
        """Steps that were taken since the start of the training."""
        return self.epoch * self.source.steps_per_epoch + len(self.losses)

    @property
    def seconds(self) -> float:
        """Seconds that this training has taken, including those before it was restored."""
        return self._seconds_before + time.monotonic() - self._started

    def run(self) -> None:
        """Train the epochs that are left.

        Raises:
            NonFiniteLossError: a loss or an output became NaN or infinite; names epoch and step or sample.
        """
        while not self.finished:
            self.train_epoch()
            logits = [self.logits(watched.images) for watched in self.watched.values()]
            self.note(*_fetched(torch.stack(self.losses), logits))

    def train_epoch(self) -> None:
        """Take the steps that are left of this epoch."""
        steps = self.source.steps_per_epoch
        while len(self.losses) < steps:
            batch = cast(BatchSource, self.source).next()
            rate = learning_rate(self.train, self.steps, steps)
            self.losses.append(self.engine.train_step(batch.images, batch.labels, rate))
            self.after_step(self)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits of any number of images, (n, num_classes) float32, on the device."""
        return torch.cat([self.engine.logits(part) for part in images.split(self.train.batch_size)])

    def state(self) -> dict[str, Any]:
        """Return this object's own results as plain values; engine and source have states of their own."""
        return {
            "epoch": self.epoch,
            "losses": [loss.item() for loss in self.losses],
            "train_loss": self.train_loss,
            "predictions": self.predictions,
            "seconds": self.seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state` returned."""
        self.epoch, self.train_loss = state["epoch"], list(state["train_loss"])
        self.losses = [torch.tensor(loss, device=self.engine.device) for loss in state["losses"]]
        self.predictions = {name: list(epochs) for name, epochs in state["predictions"].items()}
        self._seconds_before = state["seconds"]

    def note(self, losses: list[float], logits: Sequence[Tensor]) -> None:
        """End an epoch: keep its losses and the logits of the watched sets, on the CPU, and tell the hook.

        Raises:
            NonFiniteLossError: as :meth:`run`.
        """
        self.check_losses(losses)
        for (name, watched), outputs in zip(self.watched.items(), logits, strict=True):
            self._check_outputs(outputs, watched.names)
            self.outputs[name] = outputs
            self.predictions[name].append(outputs.argmax(dim=1).tolist())
        self.train_loss.append(sum(losses) / len(losses))
        self.epoch, self.losses = self.epoch + 1, []
        self.after_epoch(self)

    def check_losses(self, values: list[float]) -> None:
        """Raise NonFiniteLossError unless the losses of this epoch's first steps are finite."""
        for step, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the training loss became {value} in epoch {self.epoch + 1} of {self.train.epochs}, "
                    f"step {step + 1} of {self.source.steps_per_epoch}; a lower train.learning_rate, "
                    "train.clip_norm or engine.precision=fp32 may help"
                )

    def _check_outputs(self, outputs: Tensor, names: tuple[str, ...]) -> None:
        wrong = (~outputs.isfinite().all(dim=1)).nonzero()
        if len(wrong):
            raise NonFiniteLossError(
                f"the output for {names[int(wrong[0])]} is not finite after epoch {self.epoch + 1} of "
                f"{self.train.epochs}: the weights have blown up (a lower train.learning_rate may help) or its flow "
                "image is not finite"
            )


def _fetched(losses: Tensor, logits: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Fetch an epoch's results together: each fetch makes the host wait for the device."""
    fetched = torch.cat([losses, *(part.flatten() for part in logits)]).cpu()
    first, *parts = fetched.split([len(losses), *(part.numel() for part in logits)])
    return first.tolist(), [part.view(whole.shape) for part, whole in zip(parts, logits, strict=True)]
