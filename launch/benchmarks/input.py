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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import cv2
import torch
from rich.console import Console
from torch import Tensor

from dali_pipelines import EpochSampler, FlowStream, FlowTransform, Resident, fit_transform
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
from htnet.errors import InputError
from kernels.benchmarks.plots import write_pictures
from kernels.benchmarks.race import OVER, race
from kernels.benchmarks.record import Layout, Record
from launch.benchmarks.frame import Columns, Frame, fastest_device, known_names, table_of
from launch.benchmarks.input_rivals import (
    PlainBatches,
    PlainFrames,
    PlainFramesOurFlow,
    PlainPictures,
    Rival,
    loader,
    make_frame_store,
    make_store,
)
from launch.cluster import usable_cpus

__all__ = ["CASES", "DIFFERENCE", "LAYOUT", "OURS", "PROVIDERS", "Feed", "Plan", "check_equal", "run"]

LAYOUT: Final = Layout(
    file="input.csv",
    unit="samples/s",
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
    rival: type[Rival] = PlainBatches
    tolerance: float = 1e-5
    """Largest difference of a batch from ours, relative to its largest value, or as ``same_solver`` says."""
    same_solver: bool = True
    """False: two solvers of one problem are compared by the root mean square of their difference, relative to ours."""

    largest_batch: int | None = None
    """Of a case whose samples take long; None: as asked for."""


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

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        """Return what the options ask for; InputError where it cannot be."""
        plan = cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})
        if plan.size < 4:
            raise InputError(f"--size {plan.size}: must be at least 4")
        if plan.train_step and plan.size % 28:
            raise InputError(
                f"--train-step: the network takes mosaics of a multiple of 28 pixels, got --size {plan.size}"
            )
        return plan

    def for_case(self, case: Case) -> Plan:
        """Return the same, smaller for a case whose samples take a hundred times as long."""
        if case.largest_batch is None:
            return self
        batch, steps = min(self.batch, case.largest_batch), max(1, self.steps // 10)
        return replace(self, samples=min(self.samples, 2 * case.largest_batch), batch=batch, steps=steps)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure the cases; return the exit code: 1 where a rival does not make our batches, for nothing compares then."""
    names, plan = known_names("--cases", options.cases, list(CASES)), Plan.of(options)
    frame = Frame(LAYOUT, options, console, fastest_device())
    configure_cpu(usable_cpus())  # as in a fold
    steps = {f"{name}: {CASES[name].text}": partial(_measure, frame, name, plan) for name in names}
    title = f"the {frame.device.type}; flow images of {plan.size} px, pictures of {_SIDE} px"
    columns: Columns = {"ours": _times, "start s": "start_s", "waiting": "waiting_share"}
    code = frame.run(steps, partial(table_of, title=title, case=("case",), columns=columns))
    if frame.path is not None:
        write_pictures(frame.records, frame.path.parent, title="Input of a fold", bars="input.png")
    return code


def _times(record: Record) -> str:
    times = record.figures["ours_is_times_as_fast"]
    return "" if record.provider == OURS or times is None else f"{times:.2f}"


Batch = tuple[Tensor, Tensor]
Next = Callable[[], Batch]


@dataclass(frozen=True)
class Feed:
    """A case with its data: the samples of a fold, and the ways to its batches on the device."""

    case: Case
    plan: Plan
    store: Store
    device: torch.device

    @cached_property
    def sampler(self) -> EpochSampler:
        rows = tuple(range(len(self.store.rows)))
        return EpochSampler(rows=rows, batch_size=self.plan.batch, seed=0, shuffle=True)

    @cached_property
    def transform(self) -> FlowTransform:
        stored, size = replace(self.case.data, input="flow", augment=AugmentConfig()), self.plan.size // 4 * 4
        rows, cpu = self.sampler.rows, torch.device("cpu")
        resident = Resident(self.store, rows, data=stored, mosaic_size=size, device=cpu, threads=1)
        return fit_transform(resident, rows, standardise=self.case.data.standardise)

    def ours(self) -> Next:
        placed: dict[str, Any] = {"device": self.device, "threads": usable_cpus()}
        sampler, data = self.sampler, self.case.data
        if self.case.rival is not PlainPictures:
            size = self.transform.mosaic_size
            resident = Resident(self.store, sampler.rows, data=data, mosaic_size=size, **placed)
            stream = FlowStream(resident, sampler, augment=data.augment, transform=self.transform, num_classes=3)
            return lambda: ((batch := stream.next()).images, batch.labels)
        flows = FrameFlow(self.store, sampler, augment=data.augment, ahead=2, **placed)
        labels, steps = torch.tensor([sample.label for sample in self.store.samples], device=self.device), count()
        return lambda: (
            torch.stack(flows.next_pair(), dim=1),
            labels[torch.from_numpy(sampler.batch(next(steps)).copy())],
        )

    def rival(self) -> Rival:
        return self.case.rival(self.store, self.sampler, data=self.case.data, transform=self.transform)

    @contextmanager
    def by(self, provider: str) -> Iterator[Next]:
        """Give a function that returns the next batch; processes of the provider end with the block."""
        workers = PROVIDERS[provider]
        if workers is None:
            yield self.ours()
            return
        made = iter(loader(self.rival(), workers))

        def following() -> Batch:
            images, labels = next(made)
            return images.to(self.device), labels.to(self.device)

        yield following  # the workers end with the last reference to the iterator


def _measure(frame: Frame, name: str, plan: Plan) -> None:
    """Check and time a case; ours comes first. What is not measured is a record with its reason."""
    case, clock = CASES[name], frame.clock.share()
    plan = plan.for_case(case)
    kept = {field: getattr(plan, field) for field in ("samples", "size", "batch", "steps")}
    add = partial(frame.add, {"case": name, **kept, "dali_threads": usable_cpus()})
    no_rival = case.rival is PlainFrames and not hasattr(cv2, "optflow")
    if clock.over() or no_rival:
        reason = OVER if clock.over() else "this OpenCV has no DualTVL1 (it is in opencv-contrib-python-headless)"
        for provider in PROVIDERS:
            add(provider, status="skipped", reason=reason)
        return
    begun: dict[str, _Begun] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        feed = Feed(case, plan, _make_store(case, plan, Path(folder) / "store"), frame.device)
        if case.rival in (PlainFrames, PlainFramesOurFlow):
            tvl1(*torch.zeros(2, 1, 16, 16))  # compiled once per machine, which is no provider's start
        for provider in PROVIDERS:
            if clock.over():
                break
            clock.say(f"  {provider}: start and first batches")
            begun[provider] = _Begun(stack, feed, provider)
            try:
                begun[provider].difference = check_equal(name, provider, begun[provider].first, begun[OURS].first)
            except RuntimeError as error:
                add(provider, status="refused", reason=str(error))
                return
        ways = {provider: partial(_rate, one.following, feed) for provider, one in begun.items()}
        rates = race(ways, rounds=plan.rounds, clock=clock) if len(begun) == len(PROVIDERS) else {}
        wanted = plan.train_step and case.rival is not PlainPictures  # what has no flow yet trains nothing
        waiting = _waiting_shares(feed) if wanted and not clock.over() else []
    for provider in PROVIDERS:
        samples, figures = rates.get(provider, []), {}
        if samples:
            one, times = begun[provider], statistics.median(rates[OURS]) / statistics.median(samples)
            figures = {"ours_is_times_as_fast": times, "start_s": one.seconds, "difference": one.difference}
            figures["difference_is"] = "largest" if case.same_solver else "root mean square"
            if provider == OURS and waiting:
                middle, most = statistics.median(waiting), max(waiting)
                figures |= {"waiting_n": len(waiting), "waiting_share": middle, "waiting_most": most}
        add(provider, samples, **figures)


def _make_store(case: Case, plan: Plan, path: Path) -> Store:
    if case.rival is PlainBatches:
        return make_store(path, samples=plan.samples, size=plan.size)
    working = max(_WORKING_SIZE, plan.size)
    return make_frame_store(path, samples=plan.samples, size=plan.size, side=_SIDE, working_size=working)


class _Begun:
    """A provider that runs: its next batch, its first two, the seconds until the first, its difference from ours."""

    def __init__(self, stack: ExitStack, feed: Feed, provider: str) -> None:
        time.sleep(_SETTLE)
        start = time.perf_counter()
        self.following = stack.enter_context(feed.by(provider))
        first = self.following()
        _wait(feed.device)
        self.seconds = time.perf_counter() - start
        self.first = [first, self.following()]
        self.difference = 0.0


def check_equal(case: str, name: str, found: Sequence[Batch], expected: Sequence[Batch]) -> float:
    """Return the largest difference of images, relative to the largest value; RuntimeError above the tolerance."""
    worst = 0.0
    for (images, labels), (our_images, our_labels) in zip(found, expected, strict=True):
        if images.shape != our_images.shape or not torch.equal(labels, our_labels):
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} in shape or labels")
        difference = (_size(images - our_images, case) / _size(our_images, case)).item()
        if not difference <= CASES[case].tolerance:  # NaN is no small difference
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} by {difference:.2e} of ours")
        worst = max(worst, difference)
    return worst


def _size(values: Tensor, case: str) -> Tensor:
    return values.abs().max() if CASES[case].same_solver else values.square().mean().sqrt()


def _rate(way: Next, feed: Feed) -> float:
    """Return samples per second over the plan's steps, or ``_SHORTEST`` seconds, less what was made ahead."""
    time.sleep(_SETTLE)
    for _ in range(_AHEAD):
        way()
    _wait(feed.device)
    start, made, samples = time.perf_counter(), 0, 0
    while made < feed.plan.steps or time.perf_counter() - start < _SHORTEST[feed.case.largest_batch is not None]:
        samples, made = samples + len(way()[1]), made + 1
    _wait(feed.device)
    return samples / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waiting_shares(feed: Feed) -> list[float]:
    """Return shares of next() in next() and a training step at the paper's size, after an epoch."""
    from htnet.config import EngineConfig, HTNetConfig, TrainConfig
    from htnet.model import HTNet
    from htnet.training.engine import create_engine

    torch.manual_seed(0)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=feed.plan.batch)
    settings = EngineConfig(name="torch", threads=torch.get_num_threads())
    engine = create_engine(HTNet(HTNetConfig(image_size=feed.plan.size)), train, settings, device=feed.device)
    shares, epoch = [], feed.sampler.steps_per_epoch
    with feed.by(OURS) as way:
        for _ in range(epoch + feed.plan.rounds):
            start = time.perf_counter()
            batch = way()
            _wait(feed.device)
            ready = time.perf_counter()
            engine.train_step(*batch, 5e-5).item()
            shares.append((ready - start) / (time.perf_counter() - start))
    engine.close()
    return shares[epoch:]
