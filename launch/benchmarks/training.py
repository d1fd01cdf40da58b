"""Epochs of training at the paper's size without input: ``htnet profile training``.

What a fold of 436 samples, in steps of 256 and 180, pays for its network and optimizer on this device: on the paper's
map and on the fine one, by attention backend, precision and engine. The samples are there already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from rich.console import Console

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.errors import EXIT_DONE
from htnet.model import HTNet
from htnet.training.engine import create_engine
from kernels.benchmarks.race import OVER, race
from kernels.benchmarks.record import Layout, Record, figures_of, this_machine
from kernels.machine import emulates_bf16
from launch.benchmarks.frame import Frame, digits, percent

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="training_epochs.csv",
    case=("network", "attention", "precision", "tiny"),
    figures=("peak_gib", "launches", "busy_percent"),
)
Case = dict[str, Any]


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, case after case; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainings = list(_trainings(device, tiny=options.tiny))
    frame = Frame(LAYOUT, options, console, steps=len(trainings))
    if options.dry_run:
        for case, engine in trainings:
            frame.say(f"{_name(case)}, {engine} engine")
        return EXIT_DONE
    machine = this_machine(device)
    rounds = options.rounds or (20 if device.type == "cuda" else 3)
    for case, engine in trainings:
        frame.clock.begin(f"{_name(case)}, {engine} engine")
        measured = _measure(case, engine, device, rounds, frame)
        frame.keep([Record(case=case, provider=engine, unit="ms", machine=machine, **measured)])
    columns = {
        "peak GiB": lambda record: digits(record.figures.get("peak_gib")),
        "launches": lambda record: digits(record.figures.get("launches")),
        "busy": lambda record: percent(record.figures.get("busy_percent")),
    }
    title = f"epochs of {7 if options.tiny else 436} samples on the {device.type}"
    frame.show(frame.records, title, case=("network", "attention", "precision"), columns=columns)
    return frame.exit_code()


def _trainings(device: torch.device, *, tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yield cases with their engine; on the paper's map every backend takes the same short cut."""
    backends = {"paper": ("auto",), "fine": ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)}
    for network, names in backends.items():
        for precision in ("bf16", "fp32") if network == "paper" else ("bf16",):
            for attention in names:
                case = {"network": network, "attention": attention, "precision": precision, "tiny": tiny}
                yield from ((case, engine) for engine in (("torch", "deepspeed") if network == "paper" else ("torch",)))


def _name(case: Case) -> str:
    return f"{case['network']}, {case['precision']}, attention {case['attention']}"


def _measure(case: Case, name: str, device: torch.device, rounds: int, frame: Frame) -> dict[str, Any]:
    """Return status and wall clock of whole epochs, after one that is not counted; a failure is a result, too."""
    if frame.clock.over():
        return {"status": "skipped", "reason": OVER}
    if device.type == "cpu" and case["precision"] == "bf16" and emulates_bf16():
        return {"status": "skipped", "reason": "this processor emulates bf16"}
    engine = None
    try:
        engine, batches = _engine_and_batches(case, name, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def epoch() -> float:
            begin = time.perf_counter()
            losses = [engine.train_step(*batch, 5e-5) for batch in batches]
            if not torch.stack(losses).isfinite().all():  # waits for the device
                raise ValueError("the loss is not finite")
            return 1e3 * (time.perf_counter() - begin)

        frame.say(f"  an epoch before the count: {epoch() / 1e3:.2f} s")
        samples = race({name: epoch}, rounds=rounds, clock=frame.clock)[name]
        if not samples:
            return {"status": "skipped", "reason": OVER}
        figures = {} if device.type == "cpu" else _device_figures(epoch, statistics.median(samples))
        return {**figures_of(samples), "figures": figures}
    except Exception as error:  # an engine that is not installed, memory, a driver: the other rows go on
        if isinstance(error, ModuleNotFoundError):
            return {"status": "skipped", "reason": f"{error.name} is not installed"}
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        if engine is not None:
            engine.close()


def _device_figures(epoch: Callable[[], float], milliseconds: float) -> dict[str, float]:
    """Return the peak of memory so far, and what the GPU does in an epoch: kernels and copies, share of the time."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        epoch()
    spans = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    busy = 100 * sum(spans) / 1e3 / milliseconds
    return {"peak_gib": peak, "launches": len(spans), "busy_percent": busy}


def _engine_and_batches(case: Mapping[str, Any], name: str, device: torch.device) -> tuple[Any, list[Any]]:
    size: dict[str, Any] = {"image_size": 112} if case["network"] == "fine" else {}
    small: dict[str, Any] = {"dim": 8, "heads": 1, "depths": (1, 1, 1)} if case["tiny"] else {}
    config = HTNetConfig(**size, **small, attention_backend=case["attention"])
    torch.manual_seed(0)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=256)
    engine: Any = EngineConfig(name=name, precision=case["precision"])  # type: ignore[arg-type] # of _trainings
    batches = [
        (
            torch.randn(samples, 3, config.image_size, config.image_size, device=device),
            torch.randint(0, 3, (samples,), device=device),
        )
        for samples in ((4, 3) if case["tiny"] else (256, 180))
    ]
    return create_engine(HTNet(config), train, engine, device=device), batches
