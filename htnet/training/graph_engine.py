"""Training step of one process that a CUDA graph can hold: a whole epoch is captured once and replayed.

A step of this network is hundreds of short kernels. Started one by one from Python they keep a GPU waiting nine tenths
of the time (docs/benchmarks/gpu.md). The engine is the static memory of one model in training: weights, masters,
moments, the tables of an epoch and its results. Another model can take its place without a new capture. On a CPU the
same epoch runs step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from htnet.config import TrainConfig
from htnet.config.training import Precision
from htnet.training.flat_adam import FlatAdam
from htnet.training.loss import cross_entropy, padded_cross_entropy
from htnet.training.precision import predict_logits
from htnet.training.state_file import copied_to_cpu, read_tensors

__all__ = ["EpochTables", "GraphEngine"]

_NAME = "engine.pt"
_WARM_UPS = 2


class EpochTables(Protocol):
    """Training samples of a model, resident on the device, and the tables that make an epoch's batches of them."""

    @property
    def shape(self) -> Hashable:
        """Everything on which the work of an epoch depends beside the tables' values; graphs are kept by it."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        ...

    def tables(self, epoch: int) -> dict[str, Tensor]:
        """Return the tables of an epoch, on the CPU: the same names, shapes and dtypes for every epoch."""
        ...

    def next_tables(self) -> dict[str, Tensor]:
        """Return the tables of the next epoch."""
        ...

    def batch(self, tables: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make the images, labels and real rows (B,) float32 of a step from tables on the device, without waiting."""
        ...


@dataclass(kw_only=True)
class _Epoch:
    """Static tensors of an epoch of one shape, and its graph."""

    tables: dict[str, Tensor]
    rates: Tensor
    """(steps, 4) float32, of :func:`kernels.adam.rate_table`."""
    images: Tensor
    """(W, 3, S, S) float32: samples that are classified after the epoch."""
    losses: Tensor
    """(steps,) float32."""
    logits: Tensor
    """(W, num_classes) float32."""
    run: Callable[[], None]
    addresses: list[Tensor]
    """(parameters,) int64 of each step: tables of the optimizer, which the graph reads at every replay."""


class GraphEngine:
    """Engine (:class:`~htnet.training.engine.Engine`) with an epoch as its unit, :meth:`queue_epoch`."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        precision: Precision,
        *,
        device: torch.device,
        weights: Tensor | None,
    ) -> None:
        self.on_gpu, self._narrow = device.type == "cuda", precision == "bf16"
        self._fuse(model)
        self.model = model
        self.device = device
        self.num_classes: int = model.config.num_classes  # type: ignore[union-attr, assignment] # an HTNet's
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._train = train
        self._weights = None if weights is None else weights.to(device)
        self._optimizer = FlatAdam(model, train, narrow=self._narrow)
        self._taken = 0
        self._epochs: dict[Hashable, _Epoch] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.stream is not None else None

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        self.model.train()
        loss = cross_entropy(self.model(images), labels, self._weights, self._train.label_smoothing)
        loss.backward()
        self._optimizer.step(self._rates([learning_rate])[0].to(self.device))
        self._taken += 1
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        return predict_logits(self.model, images, self.device, None)

    def restart(self, model: nn.Module, weights: Tensor | None) -> None:
        """Take up another model of the same architecture with its weights, and other class weights; steps are 0."""
        self._fuse(model)
        new = dict(model.named_parameters())
        self._follow()
        with self.on_stream(), torch.no_grad():
            self._optimizer.restart({own: new[name] for name, own in self.model.named_parameters()})
            for name, own in self.model.named_parameters():
                if not own.requires_grad:
                    own.copy_(new[name])
            if self._weights is not None and weights is not None:
                self._weights.copy_(weights)
        self._taken = 0
        self.wait()

    def _fuse(self, model: nn.Module) -> None:
        """Let a GPU compute the layers by kernels of their own, on weights that are padded once and for all."""
        if self.on_gpu:
            model.fuse(padded=self._narrow)  # type: ignore[operator] # an HTNet

    def queue_epoch(
        self, source: EpochTables, images: Tensor, rates: list[float], losses: Tensor, logits: Tensor
    ) -> None:
        """Queue an epoch on the engine's stream: training, then the classes of ``images``; nothing is waited for.

        Args:
            source: the training samples.
            images: (W, 3, S, S) float32, classified after the last step; the same until :meth:`prepare` is called.
            rates: the learning rate of each step.
            losses: (steps,) float32, receives the loss of each step.
            logits: (W, num_classes) float32, receives the logits of the images.
        """
        epoch = self._epochs[source.shape, images.shape]
        with self.on_stream():
            for name, table in source.next_tables().items():
                epoch.tables[name].copy_(self._sent(table), non_blocking=True)
            epoch.rates.copy_(self._sent(self._rates(rates)), non_blocking=True)
            epoch.run()
            losses.copy_(epoch.losses)
            logits.copy_(epoch.logits)
        self._taken += len(rates)

    def prepare(self, source: EpochTables, images: Tensor) -> None:
        """Make ready to queue epochs of the source: its shape is captured at its first use.

        A capture changes the weights: call it before :meth:`restart` and :meth:`load`.
        """
        key = (source.shape, images.shape)
        if key not in self._epochs:
            self._epochs[key] = self._make_epoch(source, images)
        self._follow()
        with self.on_stream():
            self._epochs[key].images.copy_(images)
        self.wait()

    def on_stream(self) -> Any:
        """Return the context in which work goes to the engine's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _follow(self) -> None:
        """Let the engine's stream wait for what the current one has been given."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait for all queued work."""
        if self.stream is not None:
            self.stream.synchronize()

    def save(self, folder: Path) -> Callable[[], None]:
        self.wait()
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        state = copied_to_cpu({"optimizer": self._optimizer.state(), "frozen": frozen, "steps": self._taken})
        return lambda: torch.save(state, folder / _NAME)

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / _NAME)
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        with self.on_stream(), torch.no_grad():
            self._optimizer.load_state(state["optimizer"])
            for parameter, value in zip(frozen, state["frozen"], strict=True):
                parameter.copy_(value)
        self._taken = state["steps"]
        self.wait()

    def close(self) -> None:
        self.wait()
        self._epochs.clear()

    def _rates(self, rates: list[float]) -> Tensor:
        from kernels.adam import rate_table  # imports Triton

        table: Tensor = rate_table(rates, self._train.betas, self._taken)
        return table

    def _sent(self, table: Tensor) -> Tensor:
        return table if self.stream is None else table.pin_memory()

    def _make_epoch(self, source: EpochTables, images: Tensor) -> _Epoch:
        steps = source.steps_per_epoch
        # copies, on a CPU too: other epochs are written into them, and the source's own may be shared
        tables = {name: table.to(self.device, copy=True) for name, table in source.tables(0).items()}
        epoch = _Epoch(
            tables=tables,
            rates=torch.ones(steps, 4, device=self.device),
            images=images.clone(),
            losses=torch.zeros(steps, device=self.device),
            logits=torch.zeros(len(images), self.num_classes, device=self.device),
            run=lambda: None,
            addresses=[],
        )
        if self.stream is None:
            epoch.run = lambda: self._run_epoch(source, epoch, [None] * steps)
        else:
            epoch.run = self._captured(source, epoch)
        return epoch

    def _captured(self, source: EpochTables, epoch: _Epoch) -> Callable[[], None]:
        """Capture an epoch on the engine's own stream and memory; return its replay."""
        torch.cuda.synchronize(self.device)
        steps = source.steps_per_epoch
        with self.on_stream():
            for _ in range(_WARM_UPS):  # kernels are compiled, workspaces allocated; cuBLAS keeps one for each stream
                self._run_epoch(source, epoch, [None] * steps)
        torch.cuda.synchronize(self.device)
        epoch.addresses = [self._optimizer.make_table() for _ in range(steps)]
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate memory while this one captures
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            self._run_epoch(source, epoch, epoch.addresses)
        self._optimizer.fill_tables()
        torch.cuda.synchronize(self.device)
        return graph.replay

    def _run_epoch(self, source: EpochTables, epoch: _Epoch, addresses: list[Any]) -> None:
        """Train the steps of an epoch and classify its images; no value is read by the host."""
        self.model.train()
        for step, table in enumerate(addresses):
            images, labels, real = source.batch(epoch.tables, step)
            logits = self.model(images)
            loss = padded_cross_entropy(logits, labels, self._weights, self._train.label_smoothing, real)
            loss.backward()
            self._optimizer.step(epoch.rates[step], table)
            epoch.losses[step].copy_(loss.detach())
        start = 0
        for part in epoch.images.split(self._train.batch_size):
            epoch.logits[start : start + len(part)].copy_(self.logits(part))
            start += len(part)
