"""``htnet profile input``: samples per second of the training stream on this machine, against a plain DataLoader.

The stores are made for the occasion, in a temporary folder: smooth random flow images, whose time does not depend on
what they show, and pairs of drawn faces. The rival is what one writes without DALI (``benchmarks.input_rivals``): a
DataLoader, whole batches made by numpy and OpenCV, in the training process (0 workers) and in two others. Both make
the same batches, within the case's tolerance, or nothing is timed.

Then rounds: every provider of a case makes a number of batches, in turn. What was made ahead while others were timed is
taken away uncounted before each timing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import torch
from rich.console import Console
from torch import Tensor

from dali_pipelines import Batch, EpochSampler, FlowStream, FlowTransform, Resident, fit_transform
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
from htnet.errors import EXIT_DONE, InputError
from kernels.benchmarks.plots import write_pictures
from kernels.benchmarks.race import OVER, Clock, race
from kernels.benchmarks.record import Layout, Record, Status, figures_of, this_machine
from launch.benchmarks.frame import Frame, percent
from launch.benchmarks.input_rivals import (
    PlainBatches,
    PlainFrames,
    PlainFramesOurFlow,
    PlainPictures,
    loader,
    make_frame_store,
    make_store,
)
from launch.cluster import usable_cpus

__all__ = ["CASES", "DIFFERENCE", "LAYOUT", "OURS", "PROVIDERS", "Plan", "check_equal", "measure", "run"]

LAYOUT: Final = Layout(
    file="input.csv",
    case=("case", "samples", "size", "batch", "steps", "dali_threads"),
    figures=(
        *("ours_is_times_as_fast", "start_s", "difference", "difference_is"),
        *("waiting_n", "waiting_share", "waiting_most"),
    ),
)
"""``start_s`` are the seconds until the first batch: pipelines built or processes started, what stays decoded.
``difference`` is that of the checked batches from ours, as the case's tolerance has it. Shares of waiting are those of
``next()`` in ``next()`` and a training step at the paper's size, of ours alone."""
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
    """Of a case whose samples take long; None: as asked for."""

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
    """Extent of the measurement of a case."""

    samples: int = 442
    size: int = 28
    """Side of the flow images, pixels."""
    batch: int = 256
    steps: int = 20
    """Batches of a timing, at least."""
    rounds: int = 10
    train_step: bool = False

    def of(self, case: Case) -> Plan:
        """Return the same for a case whose samples take a hundred times as long."""
        if case.largest_batch is None:
            return self
        batch, steps = min(self.batch, case.largest_batch), max(1, self.steps // 10)
        return replace(self, samples=min(self.samples, 2 * case.largest_batch), batch=batch, steps=steps)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure the cases; return the exit code: 1 where a rival does not make our batches, for nothing compares then."""
    names = _chosen(options.cases)
    plan = _plan(options)
    frame = Frame(LAYOUT, options, console, steps=len(names))
    configure_cpu(usable_cpus())  # as in a fold
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        for name in names:
            frame.say(f"{name}: {CASES[name].text}; {', '.join(PROVIDERS)}")
        return EXIT_DONE
    for name in names:
        frame.clock.begin(f"{name}: {CASES[name].text}")
        frame.keep(measure(name, plan, device, frame.clock.share()))
    columns = {
        "ours": _times,
        "start s": lambda record: f"{record.figures['start_s']:.2f}",
        "waiting": lambda record: (
            percent(100 * share) if (share := record.figures["waiting_share"]) is not None else ""
        ),
    }
    title = f"the {device.type}; flow images of {plan.size} px, pictures of {_SIDE} px"
    frame.show(frame.records, title, case=("case",), columns=columns)
    if frame.path is not None:
        write_pictures(frame.records, frame.path.parent, title="Input of a fold", bars="input.png")
    return frame.exit_code()


def _times(record: Record) -> str:
    times = record.figures["ours_is_times_as_fast"]
    return "" if record.provider == OURS or times is None else f"{times:.2f}"


def _chosen(text: str | None) -> list[str]:
    """Return the names of cases; InputError names those that are known."""
    names = list(CASES) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(CASES):
        raise InputError(f"--cases {text}: known are {', '.join(CASES)}")
    return names


def _plan(options: argparse.Namespace) -> Plan:
    names = ("samples", "size", "batch", "steps", "rounds", "train_step")
    plan = Plan(**{name: getattr(options, name) for name in names})
    if plan.size < 4:
        raise InputError(f"--size {plan.size}: must be at least 4")
    if plan.train_step and plan.size % 28:
        raise InputError(f"--train-step: the network takes mosaics of a multiple of 28 pixels, got --size {plan.size}")
    return plan


# --- the providers


Next = Callable[[], tuple[Tensor, Tensor]]
Setting = tuple[EpochSampler, FlowTransform]


@contextmanager
def _provided(name: str, case: Case, store: Store, setting: Setting, device: torch.device) -> Iterator[Next]:
    """Give a function that returns the next batch on the device; its processes end with the block."""
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


def measure(name: str, plan: Plan, device: torch.device, clock: Clock) -> Iterator[Record]:
    """Check and time a case; ours comes first. What is not measured is a record with its reason."""
    case = CASES[name]
    plan = plan.of(case)
    if (reason := OVER if clock.over() else _cannot_run(case)) is not None:
        yield from (_unmeasured(name, provider, plan, reason, device) for provider in PROVIDERS)
        return
    with _made_store(case, plan) as store:
        yield from _measure_case(name, store, plan, device, clock)


def _cannot_run(case: Case) -> str | None:
    if case.rival is PlainFrames and not hasattr(cv2, "optflow"):
        return "this OpenCV has no DualTVL1 (it is in opencv-contrib-python-headless)"
    return None


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


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A provider that runs: how to get its next batch, its first two batches, and the seconds until the first."""

    following: Next
    first: list[tuple[Tensor, Tensor]]
    seconds: float


def _measure_case(name: str, store: Store, plan: Plan, device: torch.device, clock: Clock) -> Iterator[Record]:
    case, setting = CASES[name], _setting(CASES[name], store, plan)
    begun: dict[str, _Begun] = {}
    differences = {OURS: 0.0}
    with ExitStack() as stack:
        if case.rival in (PlainFrames, PlainFramesOurFlow):
            tvl1(*torch.zeros(2, 1, 16, 16))  # compiled once per machine, which is no provider's start
        for provider in PROVIDERS:
            if clock.over():
                yield from (_unmeasured(name, provider, plan, OVER, device) for provider in PROVIDERS)
                return
            clock.say(f"  {provider}: start and first batches")
            begun[provider] = _begin(stack, _provided(provider, case, store, setting, device), device)
            if provider != OURS:
                try:
                    differences[provider] = check_equal(name, provider, begun[provider].first, begun[OURS].first)
                except RuntimeError as error:
                    yield _unmeasured(name, provider, plan, str(error), device, status="refused")
                    return
        shortest = _SHORTEST[case.largest_batch is not None]
        ways = {who: partial(_rate, one.following, plan.steps, shortest, device) for who, one in begun.items()}
        rates = race(ways, rounds=plan.rounds, clock=clock)
    wanted = plan.train_step and case.rival is not PlainPictures  # what has no flow yet trains nothing
    waiting = _waiting_shares(case, store, plan, device) if wanted and not clock.over() else ()
    ours = statistics.median(rates[OURS]) if rates[OURS] else None
    for provider, found in rates.items():
        figures = {"start_s": begun[provider].seconds, "difference": differences[provider]}
        figures |= _waiting_figures(waiting if provider == OURS else ())
        yield _result(name, provider, plan, device, found, ours, figures)


def _begin(stack: ExitStack, provided: AbstractContextManager[Next], device: torch.device) -> _Begun:
    time.sleep(_SETTLE)
    start = time.perf_counter()
    following = stack.enter_context(provided)
    first = [following()]
    _wait(device)
    seconds = time.perf_counter() - start
    return _Begun(following=following, first=[*first, following()], seconds=seconds)


def _waiting_figures(shares: Sequence[float]) -> dict[str, Any]:
    middle, most = (statistics.median(shares), max(shares)) if shares else (None, None)
    return {"waiting_n": len(shares) or None, "waiting_share": middle, "waiting_most": most}


def _result(
    name: str,
    provider: str,
    plan: Plan,
    device: torch.device,
    rates: Sequence[float],
    ours: float | None,
    figures: dict[str, Any],
) -> Record:
    """Return a provider's record; ``ours`` is the median of our rates."""
    if not rates:
        return _unmeasured(name, provider, plan, OVER, device)
    measured = figures_of(rates)
    figures["ours_is_times_as_fast"] = ours / measured["median"] if ours else None
    figures["difference_is"] = "largest" if CASES[name].same_solver else "root mean square"
    return _record(name, provider, plan, device, figures=figures, **measured)


def _record(name: str, provider: str, plan: Plan, device: torch.device, **measured: Any) -> Record:
    kept = {field: getattr(plan, field) for field in ("samples", "size", "batch", "steps")}
    case = {"case": name, **kept, "dali_threads": usable_cpus()}
    return Record(case=case, provider=provider, unit="samples/s", machine=this_machine(device), **measured)


def _unmeasured(
    name: str, provider: str, plan: Plan, reason: str, device: torch.device, *, status: Status = "skipped"
) -> Record:
    return _record(name, provider, plan, device, status=status, reason=reason)


def check_equal(
    case: str, name: str, found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """Return the largest difference of images, relative to the largest value; RuntimeError above the tolerance."""
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
    """Return samples per second over ``steps`` batches, ``shortest`` seconds or more, less what was made ahead."""
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
    """Return shares of next() in next() and a training step at the paper's size, after an epoch."""
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
