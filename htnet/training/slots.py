"""Several models in training on one device, each in a slot: an engine whose epoch is a graph, and a stream of its own.

The streams share the device: one model's optimizer runs under another's matrix products. Nothing else is shared, so
that a training's result does not depend on its slot, on its neighbours, or on what was in the slot before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from htnet.training.graph_engine import EpochTables, GraphEngine
from htnet.training.schedule import learning_rate
from htnet.training.trainer import Trainer

__all__ = ["LOOK_SECONDS", "Slot"]

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks of the host at a training's results."""
_ROUND = 64
"""Most epochs between two looks."""
_QUEUED = 4
"""Epochs of a slot that wait on its stream; enough to bridge the time that the host spends on other slots."""


class Slot:
    """A place for one training at a time; it trains in rounds, and the host looks at the results after each.

    Args:
        engine: of this slot alone.
        after_round: called with the trainer after every round, when its state can be saved.
    """

    def __init__(self, engine: GraphEngine, after_round: Callable[[Trainer], None] = lambda trainer: None) -> None:
        self.engine, self.after_round = engine, after_round
        self.trainer: Trainer | None = None

    def take(self, trainer: Trainer, source: EpochTables, images: Tensor) -> None:
        """Take up a training; its engine is this slot's, prepared for the source and filled.

        Args:
            trainer: to be trained to its end by :meth:`advance`.
            source: its training samples.
            images: all watched images in the order of the trainer's sets; more rows may follow.
        """
        self.trainer, self._source, self._images = trainer, source, images
        classes = self.engine.num_classes
        with self.engine.on_stream():
            self._losses = torch.zeros(_ROUND, source.steps_per_epoch, device=self.engine.device)
            self._logits = torch.zeros(_ROUND, len(images), classes, device=self.engine.device)
        self._begin_round()

    def leave(self) -> None:
        """Give the place up; what is still queued is of no use."""
        self.trainer = None
        self.engine.wait()

    @property
    def finished(self) -> bool:
        """True when the training has ended."""
        assert self.trainer is not None
        return self.trainer.finished

    def advance(self) -> bool:
        """Do what can be done without waiting; False if there is nothing.

        Raises:
            NonFiniteLossError: as :meth:`Trainer.run`.
        """
        assert self.trainer is not None
        waiting = len(self._events)
        while self._events and self._events[0].query():
            self._events.popleft()
        if self._may_queue():
            self._queue_epoch()
            return True
        if self._events or not self._queued:
            return len(self._events) < waiting
        self._end_round()
        return True

    def _begin_round(self) -> None:
        self._queued, self._began = 0, time.monotonic()
        self._events: deque[Any] = deque()

    def _may_queue(self) -> bool:
        assert self.trainer is not None
        left = self.trainer.train.epochs - self.trainer.epoch - self._queued
        over = self._queued and time.monotonic() - self._began > LOOK_SECONDS
        return left > 0 and self._queued < _ROUND and len(self._events) < _QUEUED and not over

    def _queue_epoch(self) -> None:
        assert self.trainer is not None
        train, steps = self.trainer.train, self._source.steps_per_epoch
        first = (self.trainer.epoch + self._queued) * steps
        rates = [learning_rate(train, first + step, steps) for step in range(steps)]
        results = self._losses[self._queued], self._logits[self._queued]
        self.engine.queue_epoch(self._source, self._images, rates, *results)
        if self.engine.stream is not None:
            self._events.append(self.engine.stream.record_event())
        self._queued += 1

    def _end_round(self) -> None:
        """Note the epochs of a round, all of which have ended."""
        assert self.trainer is not None
        with self.engine.on_stream():
            losses, logits = (results[: self._queued].cpu() for results in (self._losses, self._logits))
        sizes = [len(watched.images) for watched in self.trainer.watched.values()]
        rest = logits.shape[1] - sum(sizes)
        for of_epoch, rows in zip(losses.tolist(), logits, strict=True):
            self.trainer.note(of_epoch, rows.split([*sizes, rest])[: len(sizes)])
        self.after_round(self.trainer)
        self._begin_round()
