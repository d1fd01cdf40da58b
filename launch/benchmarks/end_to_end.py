"""One epoch of fold training, upstream's way against ours: ``htnet profile end-to-end``.

An epoch is what the largest fold of the MEGC2019 composite has: 436 training samples in batches of 256, so optimizer
steps of 256 and 180 samples, with the paper's network, Adam at 5e-5 and cross entropy. Images are random 0..255; the
time of a step does not depend on their values.

Every provider lives in a process of its own, because how a process keeps its memory is part of a provider (upstream's
has the C library's defaults), and beside a new process with upstream's way, because more than two such processes at
once take memory and huge pages from each other. On a small network of the same form, logits, the loss in each step and
the logits after an epoch must equal upstream's within ``TOLERANCES`` before anything is timed. Then each of the two
trains an epoch uncounted, and rounds: an epoch of each, in turn. The ratio is of medians to upstream's in the same
pair; upstream's own row has its epochs of all pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from htnet.checkpoint import to_upstream
from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.cpu import configure_cpu
from htnet.model import HTNet
from htnet.training.engine import Engine, create_engine
from kernels.benchmarks.race import OVER, Clock, race
from kernels.benchmarks.record import Layout
from kernels.machine import emulates_bf16
from launch.benchmarks.frame import Columns, Frame, digits, known_names, table_of
from launch.benchmarks.upstream import UpstreamHTNet

__all__ = ["BASELINE", "LAYOUT", "PROVIDERS", "Setting", "check_equal", "first_epoch", "run"]

LAYOUT: Final = Layout(
    file="end_to_end_cpu.csv",
    unit="s",
    case=("batches",),
    figures=("min", "max", "least_cpu_share", "ratio_to_upstream", "upstream_beside_s"),
)
"""``least_cpu_share`` is the share of its threads' time that the process had a CPU, the smallest of the rounds: far
below 1 beside other load."""
BASELINE: Final = "upstream fp32"
LEARNING_RATE: Final = 5e-5
SMALL: Final = HTNetConfig(dim=24, heads=3, depths=(1, 1, 1))
"""The network of the check: the paper's mosaic, heads of 8 channels."""
SMALL_BATCHES: Final = (8, 6)
TOLERANCES: Final = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference from upstream, relative to the largest value, by the last word of a provider's name."""

State = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Training of a provider's process."""

    config: HTNetConfig = field(default_factory=HTNetConfig)
    sizes: tuple[int, ...] = (256, 180)
    threads: int = 2


class Upstream:
    """Upstream's network and optimizer, with an engine's way to call them."""

    def __init__(self, config: HTNetConfig, state: State) -> None:
        self.model = UpstreamHTNet(config)
        self.model.load_state_dict(to_upstream(state))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, foreach=False, fused=False)

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self.model(images).float()
        return out


def _engine(name: str, precision: str, config: HTNetConfig, state: State) -> Engine:
    """Return one of the project's engines, as a fold uses it."""
    model = HTNet(config)
    model.load_state_dict(state)
    train = TrainConfig(optimizer="adam", learning_rate=LEARNING_RATE, batch_size=256)
    settings: Any = {"name": name, "precision": precision, "threads": torch.get_num_threads()}
    return create_engine(model, train, EngineConfig(**settings), device=torch.device("cpu"))


Provider = Upstream | Engine
PROVIDERS: Final[dict[str, Callable[[HTNetConfig, State], Provider]]] = {BASELINE: Upstream} | {
    f"{name} engine, {precision}": partial(_engine, name.lower(), precision)
    for name in ("torch", "DeepSpeed")
    for precision in ("fp32", "bf16")
}


def make_batches(config: HTNetConfig, sizes: Iterable[int]) -> list[Batch]:
    """Return random mosaics 0..255 and labels, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.in_channels, config.image_size, config.image_size)
    return [
        (
            torch.randint(0, 256, (size, *shape), generator=generator).float(),
            torch.randint(0, config.num_classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def first_epoch(provider: Provider, batches: list[Batch]) -> dict[str, Array]:
    """Train one epoch; return logits of 32 samples before and after it, and the loss of each step."""
    probe = batches[0][0][:32]
    found = {"logits before": provider.logits(probe)}
    for number, batch in enumerate(batches):
        found[f"loss of step {number}"] = provider.train_step(*batch, LEARNING_RATE).float()
    found["logits after an epoch"] = provider.logits(probe)
    return {quantity: value.numpy() for quantity, value in found.items()}  # which pass to another process as they are


def check_equal(name: str, found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Hold a provider's first epoch against the baseline's.

    Raises:
        RuntimeError: a difference is above the tolerance of the provider's precision; names provider and quantity.
    """
    tolerance = TOLERANCES[name.split()[-1]]
    for quantity, value in found.items():
        error = np.abs(value - expected[quantity]).max() / np.abs(expected[quantity]).max()
        if not error <= tolerance:
            raise RuntimeError(f"{name}: {quantity} is off by {error:.2e} (relative), more than {tolerance}")


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Run a provider: send the small network's first epoch, then, when asked, seconds and CPU seconds of an epoch."""
    if name != BASELINE:
        configure_cpu(setting.threads)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    small = PROVIDERS[name](SMALL, HTNet(SMALL).state_dict())
    pipe.send(first_epoch(small, make_batches(SMALL, SMALL_BATCHES)))
    provider = PROVIDERS[name](setting.config, HTNet(setting.config).state_dict())
    batches = make_batches(setting.config, setting.sizes)
    while True:
        pipe.recv()
        start, start_cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            provider.train_step(*batch, LEARNING_RATE).item()  # reading the loss waits for the step
        pipe.send((time.perf_counter() - start, time.process_time() - start_cpu))


@contextmanager
def served(name: str, setting: Setting) -> Iterator[Connection]:
    """Start a provider in a new process that runs :func:`serve`; it is gone, with its memory, when the block ends."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, setting, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is noticed
    try:
        yield pipe
    finally:
        process.kill()  # it has nothing to put in order
        process.join()


class Epochs(NamedTuple):
    """Epochs of a provider: seconds, and the share of its threads' time that it had a CPU."""

    seconds: list[float]
    shares: list[float]


def measure(name: str, setting: Setting, *, rounds: int, clock: Clock) -> tuple[Epochs, Epochs]:
    """Check a provider and time its epochs in turn with the baseline's; return the provider's and the baseline's.

    Raises:
        RuntimeError: it does not compute what the baseline does.
        TimeoutError: the clock was over before the first epoch was timed.
        EOFError: a process died.
    """
    shares: dict[str, list[float]] = {BASELINE: [], name: []}

    def epoch(of: str, pipe: Connection) -> float:
        pipe.send("an epoch, please")
        seconds, cpu = _answer(pipe, clock)
        shares[of].append(cpu / seconds / setting.threads)
        return float(seconds)

    with served(BASELINE, setting) as first:
        expected = _answer(first, clock)
        with served(name, setting) as second:
            check_equal(name, _answer(second, clock), expected)
            clock.say("  computes what upstream's way does on a small network; an epoch of each before the count")
            ways = {BASELINE: partial(epoch, BASELINE, first), name: partial(epoch, name, second)}
            for of, way in ways.items():
                clock.say(f"  {of}: {way():.2f} s")
                shares[of].clear()
            seconds = race(ways, rounds=rounds, clock=clock)
    return Epochs(seconds[name], shares[name]), Epochs(seconds[BASELINE], shares[BASELINE])


def _answer(pipe: Connection, clock: Clock) -> Any:
    """Return what the process sends; TimeoutError where the time is over before."""
    if not pipe.poll(clock.left()):
        raise TimeoutError(OVER)
    return pipe.recv()


def run(options: argparse.Namespace, console: Console) -> int:
    """Check and measure every provider beside upstream's way; return the exit code."""
    known = [name for name in PROVIDERS if name != BASELINE]
    names = known_names("--providers", options.providers, known, ";")
    frame = Frame(LAYOUT, options, console)
    setting, beside = Setting(threads=options.threads), Epochs([], [])

    def add(name: str) -> None:
        torch.set_num_threads(setting.threads)
        _record(frame, setting, name, **_measured(name, setting, options.rounds, frame.clock, beside))
        if name == names[-1] and beside.seconds:
            _record(frame, setting, BASELINE, beside, beside)

    columns: Columns = {
        "min .. max": lambda record: f"{digits(record.figures['min'])} .. {digits(record.figures['max'])}",
        "CPU": "least_cpu_share",
        "x upstream": "ratio_to_upstream",
    }
    title = f"an epoch at the paper's size, {options.threads} threads, beside {BASELINE}"
    return frame.run(
        {name: partial(add, name) for name in names}, partial(table_of, title=title, case=(), columns=columns)
    )


def _measured(name: str, setting: Setting, rounds: int, clock: Clock, beside: Epochs) -> dict[str, Any]:
    """Return a provider's epochs and the baseline's, which are kept in ``beside`` too, or why there are none."""
    if name.endswith("bf16") and emulates_bf16():
        return {"status": "skipped", "reason": "this processor emulates bf16"}
    if clock.over():
        return {}
    try:
        mine, theirs = measure(name, setting, rounds=rounds, clock=clock)
    except TimeoutError:
        return {}
    except RuntimeError as error:
        return {"status": "refused", "reason": str(error)}
    except EOFError:
        return {"status": "failed", "reason": "its process died"}
    beside.seconds.extend(theirs.seconds)
    beside.shares.extend(theirs.shares)
    return {"mine": mine, "beside": theirs}


def _record(
    frame: Frame, setting: Setting, name: str, mine: Epochs | None = None, beside: Epochs | None = None, **found: Any
) -> None:
    if mine and beside and mine.seconds and beside.seconds:
        upstream, median = (statistics.median(epochs.seconds) for epochs in (beside, mine))
        figures = (min(mine.seconds), max(mine.seconds), min(mine.shares), upstream / median, upstream)
        found |= {"samples": mine.seconds, **dict(zip(LAYOUT.figures, figures, strict=True))}
    frame.add({"batches": "+".join(map(str, setting.sizes))}, name, **found)
