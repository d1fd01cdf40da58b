"""Epochs of training at the paper's size without input: ``htnet profile training``.

What a fold of 436 samples, in steps of 256 and 180, pays for its network and optimizer on this device: on the paper's
map and on the fine one, by attention backend, precision and engine. The samples are there already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Final

import torch
from rich.console import Console

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.model import HTNet
from htnet.training.engine import Engine, create_engine
from kernels.benchmarks.race import OVER, race
from kernels.benchmarks.record import Layout
from kernels.machine import emulates_bf16
from launch.benchmarks.frame import Frame, fastest_device, table_of

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="training_epochs.csv",
    unit="ms",
    case=("network", "attention", "precision", "tiny"),
    figures=("peak_gib", "launches", "busy_percent"),
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
    columns = {"peak GiB": "peak_gib", "launches": "launches", "busy": "busy_percent"}
    return frame.run(steps, partial(table_of, title=title, case=("network", "attention", "precision"), columns=columns))


def _trainings(device: torch.device, *, tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yield cases with their engine; on the paper's map every backend takes the same short cut."""
    backends = {"paper": ("auto",), "fine": ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)}
    for network, names in backends.items():
        for precision in ("bf16", "fp32") if network == "paper" else ("bf16",):
            for attention in names:
                case = {"network": network, "attention": attention, "precision": precision, "tiny": tiny}
                yield from ((case, engine) for engine in (("torch", "deepspeed") if network == "paper" else ("torch",)))


def _add(frame: Frame, case: Case, name: str, rounds: int) -> None:
    frame.add(case, name, **_measure(frame, case, name, rounds))


def _measure(frame: Frame, case: Case, name: str, rounds: int) -> dict[str, Any]:
    """Return the wall clock of whole epochs, after one that is not counted, and figures, or why there are none."""
    if frame.clock.over():
        return {"status": "skipped", "reason": OVER}
    if frame.device.type == "cpu" and case["precision"] == "bf16" and emulates_bf16():
        return {"status": "skipped", "reason": "this processor emulates bf16"}
    try:
        engine, batches = _engine_and_batches(case, name, frame.device)
        with closing(engine):

            def epoch() -> float:
                begin = time.perf_counter()
                losses = [engine.train_step(*batch, 5e-5) for batch in batches]
                if not torch.stack(losses).isfinite().all():  # waits for the device
                    raise ValueError("the loss is not finite")
                return 1e3 * (time.perf_counter() - begin)

            frame.say(f"  an epoch before the count: {epoch() / 1e3:.2f} s")
            samples = race({name: epoch}, rounds=rounds, clock=frame.clock)[name]
            on_gpu = frame.device.type == "cuda" and samples
            return {"samples": samples, **(_device_figures(epoch, statistics.median(samples)) if on_gpu else {})}
    except ModuleNotFoundError as error:
        return {"status": "skipped", "reason": f"{error.name} is not installed"}
    except Exception as error:  # memory, a driver: the other rows go on
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _device_figures(epoch: Callable[[], float], milliseconds: float) -> dict[str, float]:
    """Return the peak of memory so far, and what the GPU does in an epoch: kernels and copies, share of the time."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        epoch()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA" and not event.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e3
    return {"peak_gib": peak, "launches": len(events), "busy_percent": 100 * busy / milliseconds}


def _engine_and_batches(
    case: Case, name: str, device: torch.device
) -> tuple[Engine, list[tuple[torch.Tensor, torch.Tensor]]]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size: dict[str, Any] = {"image_size": 112} if case["network"] == "fine" else {}
    small: dict[str, Any] = {"dim": 8, "heads": 1, "depths": (1, 1, 1)} if case["tiny"] else {}
    config = HTNetConfig(**size, **small, attention_backend=case["attention"])
    torch.manual_seed(0)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=256)
    settings: Any = {"name": name, "precision": case["precision"]}
    engine = create_engine(HTNet(config), train, EngineConfig(**settings), device=device)
    shape, sizes = (3, config.image_size, config.image_size), (4, 3) if case["tiny"] else (256, 180)
    images = [torch.randn(n, *shape, device=device) for n in sizes]
    return engine, [(batch, torch.randint(0, 3, (len(batch),), device=device)) for batch in images]
