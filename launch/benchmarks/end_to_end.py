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

A provider is a way to train: an entry of ``PROVIDERS``, its name with a factory that takes the configuration and the
weights (state dict of :class:`htnet.HTNet`) and returns a :class:`Provider`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from htnet.checkpoint import to_upstream
from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.config.training import EngineName, Precision
from htnet.cpu import configure_cpu
from htnet.errors import EXIT_DONE, InputError
from htnet.model import HTNet
from htnet.training.engine import create_engine
from kernels.benchmarks.race import OVER, Clock, race
from kernels.benchmarks.record import Layout, Record, figures_of, this_machine
from kernels.machine import emulates_bf16
from launch.benchmarks.frame import Frame, digits, percent
from launch.benchmarks.upstream import UpstreamHTNet

__all__ = ["BASELINE", "LAYOUT", "PROVIDERS", "Provider", "Setting", "check_equal", "first_epoch", "run"]

LAYOUT: Final = Layout(
    file="end_to_end_cpu.csv",
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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Training of a provider's process."""

    config: HTNetConfig = field(default_factory=HTNetConfig)
    sizes: tuple[int, ...] = (256, 180)
    threads: int = 2


class Provider(Protocol):
    """A network with its optimizer."""

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on (B, 3, S, S) float32 and (B,) int64; the mean loss before it, a scalar."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """(B, num_classes) of (B, 3, S, S) float32, without gradients."""
        ...


class PlainLoop:
    """A float32 network and one of torch's optimizers."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self.model(images).float()
        return out


def _upstream(config: HTNetConfig, state: State) -> Provider:
    model = UpstreamHTNet(config)
    model.load_state_dict(to_upstream(state))
    return PlainLoop(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, foreach=False, fused=False))


class EngineLoop:
    """One of the project's engines, as a fold uses it."""

    def __init__(self, model: nn.Module, name: EngineName, precision: Precision) -> None:
        train = TrainConfig(optimizer="adam", learning_rate=LEARNING_RATE, batch_size=256)
        engine = EngineConfig(name=name, precision=precision, threads=torch.get_num_threads())
        self._engine = create_engine(model, train, engine, device=torch.device("cpu"))

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._engine.train_step(images, labels, LEARNING_RATE)

    def logits(self, images: Tensor) -> Tensor:
        return self._engine.logits(images)


def _engine(name: EngineName, precision: Precision) -> Callable[[HTNetConfig, State], Provider]:
    def build(config: HTNetConfig, state: State) -> Provider:
        model = HTNet(config)
        model.load_state_dict(state)
        return EngineLoop(model, name, precision)

    return build


PROVIDERS: Final[dict[str, Callable[[HTNetConfig, State], Provider]]] = {
    BASELINE: _upstream,
    "torch engine, fp32": _engine("torch", "fp32"),
    "torch engine, bf16": _engine("torch", "bf16"),
    "DeepSpeed engine, fp32": _engine("deepspeed", "fp32"),
    "DeepSpeed engine, bf16": _engine("deepspeed", "bf16"),
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


def first_epoch(provider: Provider, batches: list[Batch]) -> dict[str, Tensor]:
    """Train one epoch; return logits of 32 samples before and after it, and the loss of each step."""
    probe = batches[0][0][:32]
    found = {"logits before": provider.logits(probe)}
    found |= {f"loss of step {i}": provider.train_step(*batch).float() for i, batch in enumerate(batches)}
    return found | {"logits after an epoch": provider.logits(probe)}


def check_equal(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold a provider's first epoch against the baseline's.

    Raises:
        RuntimeError: a difference is above the tolerance of the provider's precision; names provider and quantity.
    """
    tolerance = TOLERANCES[name.split()[-1]]
    for quantity, value in found.items():
        error = ((value - expected[quantity]).abs().max() / expected[quantity].abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{name}: {quantity} is off by {error:.2e} (relative), more than {tolerance}")


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Run a provider: send the small network's first epoch, then, when asked, seconds and CPU seconds of an epoch."""
    if name != BASELINE:
        configure_cpu(setting.threads)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    small = PROVIDERS[name](SMALL, HTNet(SMALL).state_dict())
    pipe.send({key: value.numpy() for key, value in first_epoch(small, make_batches(SMALL, SMALL_BATCHES)).items()})
    provider = PROVIDERS[name](setting.config, HTNet(setting.config).state_dict())
    batches = make_batches(setting.config, setting.sizes)
    while True:
        pipe.recv()
        start, start_cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            provider.train_step(*batch).item()  # reading the loss waits for the step
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


@dataclass(kw_only=True)
class Pair:
    """A provider and the baseline beside it: seconds of their epochs, and shares of a CPU."""

    seconds: dict[str, list[float]]
    shares: dict[str, list[float]]


def measure(name: str, setting: Setting, *, rounds: int, clock: Clock) -> Pair:
    """Check a provider and time its epochs in turn with the baseline's; of ``BASELINE`` itself, its epochs alone.

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
        expected = _tensors(_answer(first, clock))
        with served(name, setting) as second:
            check_equal(name, _tensors(_answer(second, clock)), expected)
            clock.say("  computes what upstream's way does on a small network; an epoch of each before the count")
            ways = {BASELINE: partial(epoch, BASELINE, first), name: partial(epoch, name, second)}
            for of, way in ways.items():
                clock.say(f"  {of}: {way():.2f} s")
                shares[of].clear()
            return Pair(seconds=race(ways, rounds=rounds, clock=clock), shares=shares)


def _answer(pipe: Connection, clock: Clock) -> Any:
    """Return what the process sends; TimeoutError where the time is over before."""
    if not pipe.poll(clock.left()):
        raise TimeoutError(OVER)
    return pipe.recv()


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def run(options: argparse.Namespace, console: Console) -> int:
    """Check and measure every provider beside upstream's way; return the exit code."""
    names = _chosen(options.providers)
    frame = Frame(LAYOUT, options, console, steps=len(names))
    if options.dry_run:
        frame.say(f"{options.rounds} epochs each, on the CPU, beside {BASELINE}: {'; '.join(names)}")
        return EXIT_DONE
    torch.set_num_threads(options.threads)
    setting = Setting(threads=options.threads)
    beside: dict[str, list[float]] = {"seconds": [], "shares": []}
    for name in names:
        frame.clock.begin(name)
        frame.keep([_measured(name, setting, options.rounds, frame.clock, beside)])
    if beside["seconds"]:
        frame.keep([_record(BASELINE, setting, beside["seconds"], beside["shares"], beside["seconds"])])
    columns = {
        "min .. max": lambda record: f"{digits(record.figures['min'])} .. {digits(record.figures['max'])}",
        "CPU": lambda record: percent(100 * record.figures["least_cpu_share"]),
        "x upstream": lambda record: f"{record.figures['ratio_to_upstream']:.2f}",
    }
    frame.show(frame.records, f"an epoch at the paper's size, {options.threads} threads", case=(), columns=columns)
    return frame.exit_code()


def _chosen(text: str | None) -> list[str]:
    """Return the names of the providers beside the baseline."""
    known = [name for name in PROVIDERS if name != BASELINE]
    names = known if text is None else [name.strip() for name in text.split(";")]
    for name in names:
        if name not in known:
            raise InputError(f"--providers {name}: known are {'; '.join(known)}")
    return names


def _measured(name: str, setting: Setting, rounds: int, clock: Clock, beside: dict[str, list[float]]) -> Record:
    """Measure one provider; a failure is a record with its reason. The baseline's epochs are added to ``beside``."""
    if name.endswith("bf16") and emulates_bf16():
        return _unmeasured(name, setting, "skipped", "this processor emulates bf16")
    if clock.over():
        return _unmeasured(name, setting, "skipped", OVER)
    try:
        pair = measure(name, setting, rounds=rounds, clock=clock)
    except TimeoutError:
        return _unmeasured(name, setting, "skipped", OVER)
    except RuntimeError as error:
        return _unmeasured(name, setting, "refused", str(error))
    except EOFError:
        return _unmeasured(name, setting, "failed", "its process died")
    beside["seconds"] += pair.seconds[BASELINE]
    beside["shares"] += pair.shares[BASELINE]
    if not (pair.seconds[name] and pair.seconds[BASELINE]):
        return _unmeasured(name, setting, "skipped", OVER)
    return _record(name, setting, pair.seconds[name], pair.shares[name], pair.seconds[BASELINE])


def _record(name: str, setting: Setting, seconds: list[float], shares: list[float], beside: list[float]) -> Record:
    measured, upstream = figures_of(seconds), figures_of(beside)["median"]
    figures = (min(seconds), max(seconds), min(shares), upstream / measured["median"], upstream)
    return _base(name, setting, figures=dict(zip(LAYOUT.figures, figures, strict=True)), **measured)


def _unmeasured(name: str, setting: Setting, status: str, reason: str) -> Record:
    return _base(name, setting, status=status, reason=reason)


def _base(name: str, setting: Setting, **measured: Any) -> Record:
    case = {"batches": "+".join(map(str, setting.sizes))}
    return Record(case=case, provider=name, unit="s", machine=this_machine(torch.device("cpu")), **measured)
