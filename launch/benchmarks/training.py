"""Epochs of training at the paper's size without input: ``htnet profile training``.

What an epoch of a fold costs on this device, on the paper's map and on the fine one, by attention backend, precision
and engine: 436 samples to train on, in steps of 256 and 180, and the classes of six more. The samples are there
already. Engine ``graphs`` is timed with several folds side by side, by the time for each of them. On a GPU the
optimizer is timed alone, too: one pass over flat buffers, and torch's fused kernels for all parameters together.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.model import HTNet
from htnet.training.engine import Engine, create_engine
from htnet.training.flat_adam import FlatAdam
from htnet.training.graph_engine import GraphEngine
from htnet.training.optimizers import build_optimizer
from htnet.training.precision import narrow_weights
from htnet.training.slots import Slot
from htnet.training.trainer import Trainer, Watched
from kernels.benchmarks.race import OVER, race
from kernels.benchmarks.record import Layout
from kernels.machine import emulates_bf16
from launch.benchmarks.frame import Frame, fastest_device, table_of

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="training_epochs.csv",
    unit="ms",
    case=("network", "attention", "precision", "tiny"),
    figures=("peak_gib", "launches", "busy_percent", "terabytes_per_second"),
)
Case = dict[str, Any]


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, case after case; return the exit code."""
    frame = Frame(LAYOUT, options, console, fastest_device())
    rounds = options.rounds or (20 if frame.device.type == "cuda" else 3)
    steps = {
        f"{case['network']}, {case['precision']}, attention {case['attention']}, {engine} engine": partial(
            _add, frame, case, engine, rounds
        )
        for case, engine in _trainings(frame.device, tiny=options.tiny)
    }
    title = f"epochs of {7 if options.tiny else 436} samples on the {frame.device.type}"
    columns = {
        "peak GiB": "peak_gib",
        "launches": "launches",
        "busy": "busy_percent",
        "TB/s": "terabytes_per_second",
    }
    return frame.run(steps, partial(table_of, title=title, case=("network", "attention", "precision"), columns=columns))


_RATE: Final = 5e-5
_SLOTS: Final = (1, 4, 8)
_ONE_PASS: Final = "optimizer, one pass"
_TORCHS: Final = "optimizer, fused"
_EPOCHS: Final = 24
"""Epochs of each fold in a sample of slots."""


def _trainings(device: torch.device, *, tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yield cases with their engine; on the paper's map every backend takes the same short cut."""
    backends = {"paper": ("auto",), "fine": ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)}
    for network, names in backends.items():
        for precision in ("bf16", "fp32") if network == "paper" else ("bf16",):
            if network == "paper" and device.type == "cuda":
                case = {"network": network, "attention": names[0], "precision": precision, "tiny": tiny}
                yield from ((case, optimizer) for optimizer in (_ONE_PASS, _TORCHS))
            for attention in names:
                case = {"network": network, "attention": attention, "precision": precision, "tiny": tiny}
                eager = ("torch", "deepspeed") if network == "paper" else ("torch",)
                slots = [
                    f"graphs, {count} slot{'s' * (count > 1)}" for count in (_SLOTS if device.type == "cuda" else (1,))
                ]
                yield from ((case, engine) for engine in (*eager, *slots))


def _add(frame: Frame, case: Case, name: str, rounds: int) -> None:
    frame.add(case, name, **_measure(frame, case, name, rounds))


def _measure(frame: Frame, case: Case, name: str, rounds: int) -> dict[str, Any]:
    """Return the wall clock of whole epochs, after one that is not counted, and figures, or why there are none."""
    if frame.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if frame.clock.over():
        return {"status": "skipped", "reason": OVER}
    if name in (_ONE_PASS, _TORCHS):
        return _measure_optimizer(frame, case, name, rounds)
    if frame.device.type == "cpu" and case["precision"] == "bf16" and emulates_bf16():
        return {"status": "skipped", "reason": "this processor emulates bf16"}
    try:
        with ExitStack() as stack:
            if name.startswith("graphs"):
                epoch = _in_slots(case, int(name.split()[1]), frame.device)
            else:
                epoch = _one_by_one(stack, case, name, frame.device)
            frame.say(f"  an epoch before the count: {epoch() / 1e3:.2f} s")
            # a sample of slots is many epochs
            few = max(3, rounds // 3) if name.startswith("graphs") else rounds
            samples = race({name: epoch}, rounds=few, clock=frame.clock)[name]
            # several slots are not traced: the trace of hundreds of thousands of kernels takes longer than they do
            traced = frame.device.type == "cuda" and samples and not name.endswith("slots")
            return {"samples": samples, **(_device_figures(name, epoch, statistics.median(samples)) if traced else {})}
    except ModuleNotFoundError as error:
        return {"status": "skipped", "reason": f"{error.name} is not installed"}
    except Exception as error:  # memory, a driver: the other rows go on
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _device_figures(name: str, epoch: Callable[[], float], milliseconds: float) -> dict[str, float]:
    """Return the peak of memory so far, and what the GPU does in an epoch: kernels and copies, share of the time."""
    epochs = _EPOCHS if name.startswith("graphs") else 1
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        epoch()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA" and not event.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e3 / epochs
    return {"peak_gib": peak, "launches": len(events) / epochs, "busy_percent": 100 * busy / milliseconds}


def _measure_optimizer(frame: Frame, case: Case, name: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of the optimizer's step alone, by the device's clock, and its least traffic by them."""
    step: Callable[[], object]
    narrow = case["precision"] == "bf16"
    network = _network(case).to(frame.device)
    if name == _ONE_PASS:
        flat = FlatAdam(network, _train(), narrow=narrow)
        rates = torch.tensor([1e-9, 1e-9, 1.0, 1.0], device=frame.device)
        parameters, table = flat.parameters, flat.make_table()
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        kept = [parameter.grad for parameter in parameters]
        table.copy_(torch.tensor([gradient.data_ptr() for gradient in kept if gradient is not None]))
        step = partial(flat.launch, table, rates)
    else:
        optimizer = build_optimizer(network, _train(), case["precision"])
        narrow_weights(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        step = optimizer.step
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds + 3)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    samples = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)][3:]
    weights = sum(parameter.numel() for parameter in parameters)
    return {"samples": samples, "terabytes_per_second": 28e-9 * weights / statistics.median(samples)}


def _one_by_one(stack: ExitStack, case: Case, name: str, device: torch.device) -> Callable[[], float]:
    """Return the function that takes an epoch step by step, and its milliseconds."""
    engine, samples = _engine(case, name, device), _Samples.of(case, device)
    stack.enter_context(closing(engine))
    batches = [samples.batch(samples.tables(0), step)[:2] for step in range(samples.steps_per_epoch)]
    images, labels = batches[-1]
    batches[-1] = images[: samples.left_over], labels[: samples.left_over]

    def epoch() -> float:
        begin = time.perf_counter()
        losses = [engine.train_step(*batch, _RATE) for batch in batches]
        classes = engine.logits(samples.watched[: samples.tests]).argmax(1)
        if not torch.stack(losses).isfinite().all():  # waits for the device
            raise ValueError("the loss is not finite")
        classes.cpu()
        return 1e3 * (time.perf_counter() - begin)

    return epoch


def _in_slots(case: Case, count: int, device: torch.device) -> Callable[[], float]:
    """Return the function that trains ``count`` folds side by side, and the milliseconds for an epoch of one.

    Raises:
        ValueError: the folds, which are the same, do not end alike.
    """
    samples = _Samples.of(case, device)
    slots = []
    for _ in range(count):
        engine = _engine(case, "graphs", device)
        assert isinstance(engine, GraphEngine)
        engine.prepare(samples, samples.watched)
        slots.append(Slot(engine))
    network, train = _network(case), _train(_EPOCHS)
    for slot in slots:
        slot.engine.restart(network, None)

    def epochs() -> float:
        for slot in slots:
            watched = {"test": Watched(images=samples.watched[: samples.tests], names=("",) * samples.tests)}
            slot.take(Trainer(slot.engine, samples, train, watched=watched), samples, samples.watched)
        begin = time.perf_counter()
        while not all(slot.finished for slot in slots):
            for slot in slots:
                slot.advance()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        ends = [slot.trainer.train_loss for slot in slots if slot.trainer is not None]
        if any(losses != ends[0] for losses in ends):
            raise ValueError("the same fold gives other losses in another slot")
        return milliseconds / (count * _EPOCHS)

    return epochs


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """A fold's samples: random numbers, each epoch in the same order."""

    images: Tensor
    labels: Tensor
    watched: Tensor
    """Test samples, filled up."""
    sizes: tuple[int, ...]
    """Samples of each batch, filled up."""
    left_over: int
    """True samples of the last batch."""
    tests: int = 6

    @staticmethod
    def of(case: Case, device: torch.device) -> _Samples:
        side = _model(case).image_size
        batch, left_over, unit = (4, 3, 4) if case["tiny"] else (256, 180, 64)
        generator = torch.Generator().manual_seed(0)
        sizes = (batch, -(-left_over // unit) * unit)
        images = torch.randn(sum(sizes), 3, side, side, generator=generator).to(device)
        labels = torch.randint(0, 3, (sum(sizes),), generator=generator).to(device)
        return _Samples(images=images, labels=labels, watched=images[:64].clone(), sizes=sizes, left_over=left_over)

    @property
    def shape(self) -> Hashable:
        return self.sizes

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sizes)

    def tables(self, epoch: int) -> dict[str, Tensor]:
        real = torch.ones(sum(self.sizes))
        real[self.sizes[0] + self.left_over :] = 0.0
        return {"places": torch.arange(sum(self.sizes)), "real": real}

    def next_tables(self) -> dict[str, Tensor]:
        return self.tables(0)

    def batch(self, tables: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
        start = sum(self.sizes[:step])
        places, real = (tables[name][start : start + self.sizes[step]] for name in ("places", "real"))
        return self.images[places], self.labels[places], real

    def state(self) -> bytes:
        return b""


def _model(case: Case) -> HTNetConfig:
    size: dict[str, Any] = {"image_size": 112} if case["network"] == "fine" else {}
    small: dict[str, Any] = {"dim": 8, "heads": 1, "depths": (1, 1, 1)} if case["tiny"] else {}
    return HTNetConfig(**size, **small, attention_backend=case["attention"])


def _network(case: Case) -> HTNet:
    return copy.deepcopy(_seeded(_model(case)))


@lru_cache(maxsize=1)
def _seeded(config: HTNetConfig) -> HTNet:
    """Make the network; its seeded weights take a second."""
    torch.manual_seed(0)
    return HTNet(config)


def _train(epochs: int = 1) -> TrainConfig:
    return TrainConfig(optimizer="adam", learning_rate=_RATE, batch_size=256, epochs=epochs)


def _engine(case: Case, name: str, device: torch.device) -> Engine:
    settings: Any = {"name": name, "precision": case["precision"]}
    return create_engine(_network(case), _train(), EngineConfig(**settings), device=device)
