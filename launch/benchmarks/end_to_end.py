"""One epoch of fold training, upstream's way against ours: ``htnet profile --end-to-end``.

Also ``python -m launch.benchmarks.end_to_end``, which takes the number of threads and some of the providers.

An epoch is what the largest fold of the MEGC2019 composite has: 436 training samples in batches of 256, so optimizer
steps of 256 and 180 samples, with the paper's network, Adam at 5e-5 and cross entropy. Images are random 0..255; the
time of a step does not depend on their values.

How it is measured: every provider lives in a process of its own, because how a process keeps its memory is part of a
provider (upstream's has the C library's defaults), and beside a new process with upstream's way, because more than two
such processes at once take memory and huge pages from each other. Both start from the same weights, and the logits,
the loss in each step and the logits after the epoch must equal upstream's within ``TOLERANCES`` before anything is
timed. Then rounds: each of the two runs one epoch, the order changing from round to round, so that what else the
machine does hits both alike. Reported are median, n, minimum, maximum and interquartile range, and the ratio of medians
to upstream's in the same pair; upstream's own row has its epochs of all pairs.

A provider is a way to train: an entry of ``PROVIDERS``, its name with a factory that takes the configuration and the
weights (state dict of :class:`htnet.HTNet`) and returns a :class:`Provider`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from htnet.checkpoint import to_upstream
from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.cpu import configure_cpu
from htnet.errors import InputError
from htnet.model import HTNet
from htnet.training.engine import create_engine
from kernels.benchmarks.record import append_lines
from kernels.machine import commit, cpu_facts, cpu_name
from launch.benchmarks.results import results_file
from launch.benchmarks.upstream import UpstreamHTNet

__all__ = [
    "COLUMNS",
    "PROVIDERS",
    "RESULTS",
    "Measurement",
    "Provider",
    "check_equal",
    "environment",
    "first_epoch",
    "main",
    "measure",
    "run",
]

RESULTS: Final = "end_to_end_cpu.csv"
BASELINE: Final = "upstream fp32"
BATCH_SIZES: Final = (256, 180)
LEARNING_RATE: Final = 5e-5
ROUNDS: Final = 5
THREADS: Final = 2
TOLERANCES: Final = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference from upstream, relative to the largest value, by the last word of a provider's name."""

State = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Epoch = tuple[float, float]
"""Seconds of an epoch, and the CPU seconds that the process spent in it."""


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

    def __init__(
        self, model: nn.Module, name: Literal["deepspeed", "torch"], precision: Literal["fp32", "bf16"]
    ) -> None:
        train = TrainConfig(optimizer="adam", learning_rate=LEARNING_RATE, batch_size=max(BATCH_SIZES))
        engine = EngineConfig(name=name, precision=precision, threads=torch.get_num_threads())
        self._engine = create_engine(model, train, engine, device=torch.device("cpu"))

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._engine.train_step(images, labels, LEARNING_RATE)

    def logits(self, images: Tensor) -> Tensor:
        return self._engine.logits(images)


def _engine(
    name: Literal["deepspeed", "torch"], precision: Literal["fp32", "bf16"]
) -> Callable[[HTNetConfig, State], Provider]:
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


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The epochs of one provider, in seconds."""

    provider: str
    seconds: tuple[float, ...]
    cpu_share: float
    """Share of its threads' time that the process had a CPU, smallest of the rounds; far below 1 beside other load."""
    baseline: float
    """Upstream's median beside this provider."""

    @property
    def ratio(self) -> float:
        """Upstream's median divided by this one's."""
        return self.baseline / statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def make_batches(config: HTNetConfig, sizes: Iterable[int] = BATCH_SIZES) -> list[Batch]:
    """Random mosaics 0..255 and labels, the same on every call."""
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
    """Train one epoch; logits of 32 samples before and after it, and the loss of each step."""
    probe = batches[0][0][:32]
    found = {"logits before": provider.logits(probe)}
    found |= {f"loss of step {i}": provider.train_step(*batch).float() for i, batch in enumerate(batches)}
    return found | {"logits after an epoch": provider.logits(probe)}


def check_equal(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare a provider's first epoch with the baseline's.

    Raises:
        RuntimeError: a difference is above the tolerance of the provider's precision; names provider and quantity.
    """
    tolerance = TOLERANCES[name.split()[-1]]
    for quantity, value in found.items():
        error = ((value - expected[quantity]).abs().max() / expected[quantity].abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{name}: {quantity} is off by {error:.2e} (relative), more than {tolerance}")


def timed_epoch(provider: Provider, batches: list[Batch]) -> Epoch:
    """Train one epoch and time it."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        provider.train_step(*batch).item()  # reading the loss waits for the step
    return time.perf_counter() - start, time.process_time() - start_cpu


def serve(name: str, config: HTNetConfig, sizes: tuple[int, ...], threads: int, pipe: Connection) -> None:
    """Body of a provider's process: sends its first epoch, then the times of an epoch for all that it receives."""
    if name != BASELINE:
        configure_cpu(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    provider = PROVIDERS[name](config, HTNet(config).state_dict())
    batches = make_batches(config, sizes)
    pipe.send({key: value.numpy() for key, value in first_epoch(provider, batches).items()})
    while True:
        pipe.recv()
        pipe.send(timed_epoch(provider, batches))


@contextmanager
def served(name: str, config: HTNetConfig, sizes: tuple[int, ...], threads: int) -> Iterator[Connection]:
    """A provider in a new process that runs :func:`serve`; it is gone, with its memory, when the block ends."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, config, sizes, threads, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is noticed
    try:
        yield pipe
    finally:
        process.kill()  # it has nothing to put in order
        process.join()


def measure(
    names: Sequence[str], config: HTNetConfig, sizes: tuple[int, ...], *, rounds: int, threads: int
) -> list[Measurement]:
    """Check, then time ``rounds`` epochs of every provider beside as many of the baseline, the first name.

    Raises:
        RuntimeError: a provider does not compute what the baseline does.
        EOFError: the process of a provider died.
    """
    settings = (config, sizes, threads)
    base, *others = names
    pairs = {name: _measure_pair(base, name, settings, rounds) for name in others}
    baseline = [epoch for epochs, _ in pairs.values() for epoch in epochs]
    if not others:
        with served(base, *settings) as pipe:
            _first_epoch(pipe)
            baseline = [_timed_epoch(pipe) for _ in range(rounds)]
    rows = [_measurement(base, baseline, threads, baseline)]
    return rows + [_measurement(name, epochs, threads, beside) for name, (beside, epochs) in pairs.items()]


def _measure_pair(
    base: str, name: str, settings: tuple[HTNetConfig, tuple[int, ...], int], rounds: int
) -> tuple[list[Epoch], list[Epoch]]:
    """Epochs of the baseline and of the provider beside it."""
    with served(base, *settings) as first:
        expected = _first_epoch(first)
        with served(name, *settings) as second:
            check_equal(name, _first_epoch(second), expected)
            epochs: dict[Connection, list[Epoch]] = {first: [], second: []}
            for number in range(rounds):
                for pipe in (first, second) if number % 2 else (second, first):
                    epochs[pipe].append(_timed_epoch(pipe))
    return epochs[first], epochs[second]


def _first_epoch(pipe: Connection) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in pipe.recv().items()}


def _timed_epoch(pipe: Connection) -> Epoch:
    pipe.send("an epoch, please")
    seconds, cpu = pipe.recv()
    return seconds, cpu


def _measurement(name: str, epochs: list[Epoch], threads: int, baseline: list[Epoch]) -> Measurement:
    return Measurement(
        provider=name,
        seconds=tuple(wall for wall, _ in epochs),
        cpu_share=min(cpu / wall / threads for wall, cpu in epochs),
        baseline=statistics.median(wall for wall, _ in baseline),
    )


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Facts that a reader needs to place the numbers."""

    date: str
    commit: str
    cpu: str
    cores: int
    threads: int
    avx512_bf16: bool
    torch: str
    python: str
    system: str


COLUMNS: Final = (
    *("provider", "batches", "n", "median_s", "min_s", "max_s", "q1_s", "q3_s", "least_cpu_share", "ratio_to_upstream"),
    *(field.name for field in fields(Environment)),
    "upstream_beside_s",
)
"""Of the CSV file."""


def environment() -> Environment:
    """This machine, as far as it says."""
    facts = cpu_facts()
    return Environment(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        commit=commit(),
        cpu=f"{cpu_name()} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})",
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        avx512_bf16="avx512_bf16" in facts.get("flags", "").split(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(),
    )


def append_csv(path: Path, measurements: list[Measurement], sizes: Sequence[int], where: Environment) -> None:
    """Append a row per measurement."""
    append_lines(path, COLUMNS, (_line(measurement, sizes, where) for measurement in measurements))


def _line(measurement: Measurement, sizes: Sequence[int], where: Environment) -> dict[str, object]:
    low, high = measurement.quartiles
    return {
        "provider": measurement.provider,
        "batches": "+".join(str(size) for size in sizes),
        "n": len(measurement.seconds),
        "median_s": round(statistics.median(measurement.seconds), 4),
        "min_s": round(min(measurement.seconds), 4),
        "max_s": round(max(measurement.seconds), 4),
        "q1_s": round(low, 4),
        "q3_s": round(high, 4),
        "least_cpu_share": round(measurement.cpu_share, 3),
        "ratio_to_upstream": round(measurement.ratio, 3),
        **asdict(where),
        "upstream_beside_s": round(measurement.baseline, 4),
    }


def table(measurements: list[Measurement], where: Environment) -> Table:
    """The measurements for a terminal."""
    title = f"seconds per epoch, {where.cpu}, {where.threads} threads, torch {where.torch}"
    out = Table(title=Text(title))
    for column in ("provider", "median", "n", "min .. max", "IQR", "CPU share", "x upstream"):
        out.add_column(column, justify="left" if column == "provider" else "right")
    for measurement in measurements:
        low, high = measurement.quartiles
        out.add_row(
            measurement.provider,
            f"{statistics.median(measurement.seconds):.2f}",
            str(len(measurement.seconds)),
            f"{min(measurement.seconds):.2f} .. {max(measurement.seconds):.2f}",
            f"{high - low:.2f}",
            f"{measurement.cpu_share:.0%}",
            f"{measurement.ratio:.2f}",
        )
    return out


def run(
    path: Path | None, console: Console, *, rounds: int = ROUNDS, threads: int = THREADS, only: Sequence[str] = ()
) -> None:
    """Check, measure, append to the CSV file where there is one, and print; ``only``: providers beside upstream."""
    torch.set_num_threads(threads)
    names = [BASELINE, *(name for name in PROVIDERS if name in (only or PROVIDERS) and name != BASELINE)]
    console.print("checking that all providers compute the same, then timing ...")
    measurements = measure(names, HTNetConfig(), BATCH_SIZES, rounds=rounds, threads=threads)
    where = environment()
    console.print(table(measurements, where))
    if path is not None:
        append_csv(path, measurements, BATCH_SIZES, where)


def main(arguments: list[str] | None = None) -> int:
    """The same with what ``htnet profile`` has no options for."""
    parser = argparse.ArgumentParser(description="One epoch of fold training at the paper's size, by provider.")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"append to {RESULTS} there (default: print)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="epochs timed per provider")
    parser.add_argument("--threads", type=int, default=THREADS, help="CPU threads")
    parser.add_argument("--only", nargs="+", choices=list(PROVIDERS), default=[], help="providers to run")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    try:
        path = results_file(options.out, RESULTS, COLUMNS)
    except InputError as error:
        parser.error(str(error))
    run(path, Console(), rounds=options.rounds, threads=options.threads, only=options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
