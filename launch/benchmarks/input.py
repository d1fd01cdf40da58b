"""``htnet profile --input``: samples per second of the training stream on this machine, against a plain DataLoader.

The stores are made for the occasion, in a temporary folder: smooth random flow images, whose time does not depend on
what they show, and pairs of drawn faces. The rival is what one writes without DALI (``benchmarks.input_rivals``): a
DataLoader, whole batches made by numpy and OpenCV, in the training process (0 workers) and in two others. Both make
the same batches, within the case's tolerance, or nothing is timed.

Then rounds: every provider of a case makes a number of batches, in turn, so that what else the machine does hits all
alike. What was made ahead while others were timed is taken away uncounted before each timing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dali_pipelines import DALI_VERSION, Batch, EpochSampler, FlowStream, FlowTransform, Resident, fit_transform
from dali_pipelines.frame_flow import FrameFlow
from htnet.config import (
    AugmentConfig,
    DataConfig,
    FlipConfig,
    JitterConfig,
    MagnifyConfig,
    PhotometricConfig,
    RotateConfig,
)
from htnet.cpu import configure_cpu
from htnet.data.flow.tvl1 import tvl1
from htnet.data.store.reader import Store
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.benchmarks.record import append_lines
from launch.benchmarks.end_to_end import environment
from launch.benchmarks.input_picture import write_picture
from launch.benchmarks.input_rivals import (
    PlainBatches,
    PlainFrames,
    PlainFramesOurFlow,
    PlainPictures,
    loader,
    make_frame_store,
    make_store,
)
from launch.benchmarks.results import results_file
from launch.cluster import usable_cpus

__all__ = ["CASES", "DIFFERENCE", "OURS", "PROVIDERS", "Plan", "Result", "check_equal", "measure", "profile_input"]

RESULTS: Final = "input.csv"
OURS: Final = "FlowStream"
PROVIDERS: Final[dict[str, int | None]] = {OURS: None, "DataLoader": 0, "DataLoader x2": 2}
"""Worker processes of the rivals; 0: the batches are made in the training process."""
_SETTLE = 0.3  # seconds for the others to finish what they make ahead
_SHORTEST = {False: 0.5, True: 2.0}  # seconds of a timing; True where samples take long
_AHEAD = 4  # batches that a provider may have ready: two of DALI, two per worker
DIFFERENCE: Final = "the batches differ"
_CHANGED = AugmentConfig(
    flip=FlipConfig(probability=0.5),
    rotate=RotateConfig(degrees=10.0),
    jitter=JitterConfig(shift=0.03),
    magnify=MagnifyConfig(low=0.7, high=1.5),
)
_LIGHT = PhotometricConfig(brightness=0.2, contrast=0.2)
_FRAMES = DataConfig(input="frames", scaling="stored", augment=replace(_CHANGED, photometric=_LIGHT))
_SIDE: Final = 112
"""Side of the stored pictures, pixels."""
_WORKING_SIZE: Final = 128
"""Side to which they are resized for their flow."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of feeding a fold."""

    data: DataConfig
    text: str
    rival: type[PlainBatches] | type[PlainPictures] | type[PlainFrames] = PlainBatches
    tolerance: float = 1e-5
    """Largest difference of a batch from ours, relative to its largest value, or as ``same_solver`` says."""
    same_solver: bool = True
    """False: two solvers of one problem are compared by the root mean square of their difference, relative to ours."""

    largest_batch: int | None = None
    """Where samples take long; None: as asked for."""

    @property
    def of_frames(self) -> bool:
        return self.rival is not PlainBatches


CASES: Final[dict[str, Case]] = {
    "plain": Case(data=DataConfig(), text="finished mosaics stay in memory"),
    "augmented": Case(
        data=DataConfig(scaling="stored", augment=_CHANGED),
        text="decoded flow images stay; flip, rotate, jitter, magnify",
        tolerance=1e-4,
    ),
    "streamed": Case(data=DataConfig(cache_mb=0), text="each flow image read, checked and decoded again"),
    "pictures": Case(
        data=DataConfig(input="frames", cache_mb=0, augment=AugmentConfig(photometric=_LIGHT)),
        text="onset and apex read, decoded, light changed; no flow",
        rival=PlainPictures,
        largest_batch=64,
        tolerance=0.02,  # the two JPEG decoders round differently
    ),
    "frames": Case(
        data=_FRAMES,
        text="decoded pictures stay; light changed, flow (theirs: OpenCV's DualTVL1), flip, rotate, jitter, magnify",
        rival=PlainFrames,
        largest_batch=16,
        tolerance=0.3,  # 0.10 and 0.14 were measured
        same_solver=False,
    ),
    "own-flow": Case(
        data=_FRAMES,
        text="the same, with our TV-L1 in their processes",
        rival=PlainFramesOurFlow,
        largest_batch=64,
        tolerance=0.1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Extent of the measurement."""

    cases: tuple[str, ...] = tuple(CASES)
    samples: int = 442
    size: int = 28
    """Side of the flow images, pixels."""
    batch: int = 256
    steps: int = 20
    """Batches of a timing, at least."""
    rounds: int = 10
    seconds: float | None = None
    """No round begins after so long; the first of a case always does."""
    train_step: bool = False

    def of(self, case: Case) -> Plan:
        """The same for a case whose samples take a hundred times as long."""
        if case.largest_batch is None:
            return self
        batch, steps = min(self.batch, case.largest_batch), max(1, self.steps // 10)
        return replace(self, samples=min(self.samples, 2 * case.largest_batch), batch=batch, steps=steps)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The timings of one provider in one case."""

    case: str
    provider: str
    plan: Plan
    """How much was measured in this case."""
    rates: tuple[float, ...]
    """Samples per second of each round."""
    difference: float
    """Of the checked batches from ours, as the case's tolerance has it."""
    start: float
    """Seconds until the first batch: pipelines built or processes started, what stays in memory decoded."""
    same_solver: bool = True
    waiting: tuple[float, ...] = ()
    """Shares of next() in next() and a training step at the paper's size, step by step; ours only, where asked for."""

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rates) < 2:
            return self.rates[0], self.rates[0]
        low, _, high = statistics.quantiles(self.rates, n=4, method="inclusive")
        return low, high


def profile_input(options: argparse.Namespace, console: Console) -> int:
    """Run what the options ask for; 1 where a rival does not make our batches, as nothing can be compared then."""
    plan = _plan(options)
    path = results_file(options.out, RESULTS, _columns())
    configure_cpu(usable_cpus())  # as in a fold
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        for name in plan.cases:
            text = f"{name}: {CASES[name].text}; {', '.join(PROVIDERS)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return EXIT_DONE
    results: list[Result] = []
    code = EXIT_DONE
    for name in plan.cases:
        if (reason := _cannot_run(CASES[name])) is not None:
            console.print(f"{name}: left out: {reason}", markup=False, highlight=False, soft_wrap=True)
            continue
        try:
            found = measure(name, plan, device)
        except RuntimeError as error:
            if DIFFERENCE not in str(error):
                raise
            console.print(f"{error}: not timed", markup=False, highlight=False, soft_wrap=True)
            code = EXIT_PARTIAL
            continue
        results += found
        if path is not None:
            append_lines(path, _columns(), _lines(found, device))
    if results:
        console.print(_table(results, plan, device))
        if path is not None:
            write_picture(path.with_suffix(".png"), _lines(results, device))
    return code


def _cannot_run(case: Case) -> str | None:
    if case.rival is PlainFrames and not hasattr(cv2, "optflow"):
        return "this OpenCV has no DualTVL1 (it is in opencv-contrib-python-headless)"
    return None


def _plan(options: argparse.Namespace) -> Plan:
    """InputError names what is wrong and what is known."""
    values: dict[str, Any] = {"train_step": options.train_step, "seconds": options.time_limit}
    for key, equals, value in (part.partition("=") for text in options.overrides for part in text.split()):
        if key not in ("samples", "size", "batch", "steps"):
            raise InputError(f"--set {key}{equals}{value}: --input knows samples, size, batch, steps")
        if not value.isdecimal() or int(value) < (4 if key == "size" else 1):
            raise InputError(f"--set {key}{equals}{value}: must be a whole number from {4 if key == 'size' else 1}")
        values[key] = int(value)
    if options.rounds is not None:
        values["rounds"] = options.rounds
    if options.cases is not None:
        values["cases"] = tuple(name.strip() for name in options.cases.split(",") if name.strip())
        if not values["cases"] or not set(values["cases"]) <= set(CASES):
            raise InputError(f"--cases {options.cases}: --input knows {', '.join(CASES)}")
    plan = Plan(**values)
    if plan.train_step and plan.size % 28:
        raise InputError(f"--train-step: the network takes mosaics of a multiple of 28 pixels, got size={plan.size}")
    return plan


# --- the providers


Next = Callable[[], tuple[Tensor, Tensor]]
Setting = tuple[EpochSampler, FlowTransform]


@contextmanager
def _provided(name: str, case: Case, store: Store, setting: Setting, device: torch.device) -> Iterator[Next]:
    """A function that gives the next batch on the device; its processes end with the block."""
    sampler, transform = setting
    workers = PROVIDERS[name]
    if workers is None:
        yield _ours(case, store, setting, device)
        return
    made = iter(loader(case.rival(store, sampler, data=case.data, transform=transform), workers))

    def following() -> tuple[Tensor, Tensor]:
        images, labels = next(made)
        return images.to(device), labels.to(device)

    yield following  # the workers end with the last reference to the iterator


def _ours(case: Case, store: Store, setting: Setting, device: torch.device) -> Next:
    sampler, transform = setting
    placed: dict[str, Any] = {"device": device, "threads": usable_cpus()}
    if case.rival is not PlainPictures:
        resident = Resident(store, sampler.rows, data=case.data, mosaic_size=transform.mosaic_size, **placed)
        stream = FlowStream(resident, sampler, augment=case.data.augment, transform=transform, num_classes=3)
        return lambda: _pair(stream.next())
    flows = FrameFlow(store, sampler, augment=case.data.augment, ahead=2, **placed)
    labels = torch.tensor([sample.label for sample in store.samples], device=device)
    steps = iter(range(1 << 40))

    def following() -> tuple[Tensor, Tensor]:
        return torch.stack(flows.next_pair(), dim=1), labels[torch.from_numpy(sampler.batch(next(steps)).copy())]

    return following


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.images, batch.labels


# --- measuring


def measure(name: str, plan: Plan, device: torch.device) -> list[Result]:
    """Check and time a case; ours comes first.

    Raises:
        RuntimeError: a provider's batches are not ours, with ``DIFFERENCE`` in its text.
    """
    deadline = None if plan.seconds is None else time.monotonic() + plan.seconds
    case = CASES[name]
    plan = plan.of(case)
    with _made_store(case, plan) as store:
        found = list(_measure_case(name, store, plan, device, deadline))
        if not plan.train_step or case.rival is PlainPictures:  # what has no flow yet trains nothing
            return found
        waiting = _waiting_shares(case, store, plan, device)
        return [replace(one, waiting=waiting) if one.provider == OURS else one for one in found]


@contextmanager
def _made_store(case: Case, plan: Plan) -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        if case.of_frames:
            yield make_frame_store(
                path, samples=plan.samples, size=plan.size, side=_SIDE, working_size=max(_WORKING_SIZE, plan.size)
            )
        else:
            yield make_store(path, samples=plan.samples, size=plan.size)


def _setting(case: Case, store: Store, plan: Plan) -> Setting:
    rows = tuple(range(len(store.rows)))
    sampler = EpochSampler(rows=rows, batch_size=plan.batch, seed=0, shuffle=True)
    placed: dict[str, Any] = {"device": torch.device("cpu"), "threads": 1}
    stored = replace(case.data, input="flow", augment=AugmentConfig())
    resident = Resident(store, rows, data=stored, mosaic_size=plan.size // 4 * 4, **placed)
    return sampler, fit_transform(resident, rows, standardise=case.data.standardise)


def _measure_case(
    name: str, store: Store, plan: Plan, device: torch.device, deadline: float | None
) -> Iterator[Result]:
    case = CASES[name]
    setting = _setting(case, store, plan)
    rates: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    differences = {OURS: 0.0}
    shortest = _SHORTEST[case.largest_batch is not None]
    ways: dict[str, Next] = {}
    starts: dict[str, float] = {}
    first: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with ExitStack() as stack:
        if case.rival in (PlainFrames, PlainFramesOurFlow):
            tvl1(*torch.zeros(2, 1, 16, 16))  # compiled once per machine, which is no provider's start
        for provider in PROVIDERS:
            time.sleep(_SETTLE)
            start = time.perf_counter()
            ways[provider] = stack.enter_context(_provided(provider, case, store, setting, device))
            first[provider] = [ways[provider]()]
            _wait(device)
            starts[provider] = time.perf_counter() - start
            first[provider].append(ways[provider]())
        for provider in list(PROVIDERS)[1:]:
            differences[provider] = check_equal(name, provider, first[provider], first[OURS])
        for number in range(plan.rounds):
            if number and deadline is not None and time.monotonic() > deadline:
                break
            for provider in list(PROVIDERS)[:: 1 if number % 2 else -1]:
                rates[provider].append(_rate(ways[provider], plan.steps, shortest, device))
    for provider in PROVIDERS:
        measured = tuple(rates[provider])
        yield Result(
            case=name,
            provider=provider,
            plan=plan,
            rates=measured,
            difference=differences[provider],
            start=starts[provider],
            same_solver=case.same_solver,
        )


def check_equal(
    case: str, name: str, found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """The largest difference of images, relative to the largest value; RuntimeError above the case's tolerance."""
    worst = 0.0
    for (images, labels), (our_images, our_labels) in zip(found, expected, strict=True):
        if images.shape != our_images.shape or not torch.equal(labels, our_labels):
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} in shape or labels")
        size = _largest if CASES[case].same_solver else _root_mean_square
        difference = (size(images - our_images) / size(our_images)).item()
        if not difference <= CASES[case].tolerance:  # NaN is no small difference
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} by {difference:.2e} of ours")
        worst = max(worst, difference)
    return worst


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _rate(way: Next, steps: int, shortest: float, device: torch.device) -> float:
    """Samples per second over ``steps`` batches and ``shortest`` seconds or more, what was made ahead left out."""
    time.sleep(_SETTLE)
    for _ in range(_AHEAD):
        way()
    _wait(device)
    start, made, count = time.perf_counter(), 0, 0
    while made < steps or time.perf_counter() - start < shortest:
        count, made = count + len(way()[1]), made + 1
    _wait(device)
    return count / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waiting_shares(case: Case, store: Store, plan: Plan, device: torch.device) -> tuple[float, ...]:
    """Shares of next() in next() and a training step at the paper's size; the epoch before them is not counted."""
    from htnet.config import EngineConfig, HTNetConfig, TrainConfig
    from htnet.model import HTNet
    from htnet.training.engine import create_engine

    torch.manual_seed(0)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=plan.batch)
    threads = EngineConfig(name="torch", threads=torch.get_num_threads())
    engine = create_engine(HTNet(HTNetConfig(image_size=plan.size)), train, threads, device=device)
    setting = _setting(case, store, plan)
    shares = []
    with _provided(OURS, case, store, setting, device) as way:
        for step in range(setting[0].steps_per_epoch + plan.rounds):
            start = time.perf_counter()
            batch = way()
            _wait(device)
            ready = time.perf_counter()
            engine.train_step(*batch, 5e-5).item()
            if step >= setting[0].steps_per_epoch:
                shares.append((ready - start) / (time.perf_counter() - start))
    engine.close()
    return tuple(shares)


# --- what is written and said


def _lines(results: Sequence[Result], device: torch.device) -> list[dict[str, Any]]:
    ours = {result.case: result.median for result in results if result.provider == OURS}
    kept = ("samples", "size", "batch", "steps")
    where: Mapping[str, Any] = {
        **asdict(environment()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dali": DALI_VERSION,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "load": round(os.getloadavg()[0], 2),
        "dali_threads": usable_cpus(),
    }
    lines = []
    for result in results:
        low, high = result.quartiles
        lines.append(
            {
                "case": result.case,
                "provider": result.provider,
                **{name: getattr(result.plan, name) for name in kept},
                "n": len(result.rates),
                "median_samples_per_s": round(result.median, 1),
                "q1": round(low, 1),
                "q3": round(high, 1),
                "ours_is_times_as_fast": round(ours[result.case] / result.median, 3),
                "start_s": round(result.start, 3),
                "difference": f"{result.difference:.2e}",
                "difference_is": "largest" if result.same_solver else "root mean square",
                "waiting_n": len(result.waiting) or "",
                "waiting_share": f"{statistics.median(result.waiting):.5f}" if result.waiting else "",
                "waiting_most": f"{max(result.waiting):.5f}" if result.waiting else "",
                **where,
            }
        )
    return lines


def _columns() -> list[str]:
    blank = Result(case="", provider=OURS, plan=Plan(), rates=(1.0,), difference=0.0, start=0.0)
    return list(_lines([blank], torch.device("cpu"))[0])


def _table(results: Sequence[Result], plan: Plan, device: torch.device) -> Table:
    title = f"samples per second on the {device.type}; flow images of {plan.size} px, pictures of {_SIDE} px"
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("case", "provider", "median", "quartiles", "n", "ours", "start s"):
        out.add_column(column, justify="left" if column in ("case", "provider") else "right", no_wrap=True)
    if plan.train_step:
        out.add_column("waiting", justify="right")
    for result, line in zip(results, _lines(results, device), strict=True):
        low, high = result.quartiles
        cells = [_short(result.median), f"{_short(low)} .. {_short(high)}", str(len(result.rates))]
        cells += ["" if result.provider == OURS else f"{line['ours_is_times_as_fast']:.2f}"]
        cells += [f"{result.start:.2f}"]
        cells += [f"{statistics.median(result.waiting):.2%}" if result.waiting else ""] if plan.train_step else []
        out.add_row(result.case if result.provider == OURS else "", result.provider, *cells)
    return out


def _short(rate: float) -> str:
    """Such that a line of the table fits 80 columns."""
    return f"{rate / 1000:,.0f}k" if rate >= 1e5 else f"{rate:,.0f}"
