"""``htnet profile --input``: samples per second of the training stream on this machine, against a plain DataLoader.

The store is made for the occasion: smooth random flow images in a temporary folder; the time of a sample does not
depend on what it shows. The rival is what one writes without DALI: torch's DataLoader, whole batches made by numpy and
OpenCV, in the training process (0 workers) and in two others. It keeps in memory what our stream keeps, takes the same
random numbers and makes the same changes. Both make the same batches, within ``TOLERANCE``, or nothing is timed.

Then rounds: every provider of a case makes a number of batches, in turn, so that what else the machine does hits all
alike. What was made ahead while others were timed is taken away uncounted before each timing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dali_pipelines import DALI_VERSION, Batch, EpochSampler, FlowStream, FlowTransform, fit_transform
from dali_pipelines.augment import Changes, Places, draw, plan_changes
from dali_pipelines.stream import changes_pixels
from htnet.config import AugmentConfig, DataConfig, FlipConfig, JitterConfig, MagnifyConfig, RotateConfig
from htnet.cpu import configure_cpu
from htnet.data.prepared import PreparedSample
from htnet.data.regions import region_starts, scale_minmax
from htnet.data.store import Store, write_store
from htnet.data.types import Sample, SampleId
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from launch.benchmarks.end_to_end import environment
from launch.scheduler import usable_cpus

__all__ = ["CASES", "DIFFERENCE", "OURS", "PROVIDERS", "Plan", "Result", "check_equal", "measure", "profile_input"]

RESULTS: Final = "input.csv"
OURS: Final = "FlowStream"
PROVIDERS: Final[dict[str, int | None]] = {OURS: None, "DataLoader, 0 workers": 0, "DataLoader, 2 workers": 2}
"""Worker processes of the rivals."""
_SETTLE, _SHORTEST = 0.3, 0.3  # seconds: for the others to finish what they make ahead; of a timing
_AHEAD = 4  # batches that a provider may have ready: two of DALI, two per worker
TOLERANCE: Final = {"plain": 1e-5, "augmented": 1e-4, "streamed": 1e-5}
"""Largest difference of a batch from ours, relative to its largest value."""
DIFFERENCE: Final = "the batches differ"
_CHANGED = AugmentConfig(
    flip=FlipConfig(probability=0.5),
    rotate=RotateConfig(degrees=10.0),
    jitter=JitterConfig(shift=0.03),
    magnify=MagnifyConfig(low=0.7, high=1.5),
)
CASES: Final[dict[str, tuple[DataConfig, str]]] = {
    "plain": (DataConfig(), "finished mosaics stay in memory"),
    "augmented": (
        DataConfig(scaling="stored", augment=_CHANGED),
        "decoded images stay; flip, rotate, jitter, magnify",
    ),
    "streamed": (DataConfig(cache_mb=0), "each sample read, checked and decoded again"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

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


@dataclass(frozen=True, kw_only=True)
class Result:
    """The timings of one provider in one case."""

    case: str
    provider: str
    rates: tuple[float, ...]
    """Samples per second of each round."""
    difference: float
    """Largest difference of the checked batches from ours, relative to their largest value."""
    waiting: float | None = None
    """Share of next() in next() and a training step of the paper-size network; ours only, where asked for."""

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
    configure_cpu(usable_cpus())  # as in a fold
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        for name in plan.cases:
            console.print(f"{name}: {CASES[name][1]}; {', '.join(PROVIDERS)}", highlight=False, soft_wrap=True)
        return EXIT_DONE
    path = None if options.out is None else options.out / RESULTS
    if path is not None:
        _check_columns(path)  # before anything is measured
    try:
        results = measure(plan, device)
    except RuntimeError as error:
        if DIFFERENCE not in str(error):
            raise
        console.print(f"{error}: nothing is timed", markup=False, highlight=False, soft_wrap=True)
        return EXIT_PARTIAL
    if path is not None:
        _append(path, results, plan, device)
    console.print(_table(results, plan, device))
    return EXIT_DONE


def _plan(options: argparse.Namespace) -> Plan:
    """InputError names what is wrong and what is known."""
    values: dict[str, Any] = {"train_step": options.train_step, "seconds": options.time_limit}
    if options.providers is not None or options.modes is not None:
        raise InputError("--input takes neither --providers nor --modes")
    for key, equals, value in (part.partition("=") for text in options.overrides for part in text.split()):
        if key not in ("samples", "size", "batch", "steps"):
            raise InputError(f"--set {key}{equals}{value}: --input knows samples, size, batch, steps")
        if not value.isdecimal() or int(value) < (4 if key == "size" else 1):
            raise InputError(f"--set {key}{equals}{value}: must be a whole number from {4 if key == 'size' else 1}")
        values[key] = int(value)
    if options.rounds is not None:
        values["rounds"] = options.rounds
    if values.get("rounds", 1) < 1 or (options.time_limit is not None and not options.time_limit > 0):
        raise InputError("--rounds and --time-limit must be positive")
    if options.cases is not None:
        values["cases"] = tuple(name.strip() for name in options.cases.split(",") if name.strip())
        if not values["cases"] or not set(values["cases"]) <= set(CASES):
            raise InputError(f"--cases {options.cases}: --input knows {', '.join(CASES)}")
    return Plan(**values)


# --- the providers


def make_store(path: Path, *, samples: int, size: int) -> Store:
    """A store of smooth random flow images, (size, size, 3), of as many people as the composite has, or fewer."""
    rng = np.random.default_rng(0)

    def items() -> Iterator[PreparedSample]:
        for number in range(samples):
            noise = rng.normal(size=(size, size, 3)).astype(np.float32)
            points = (rng.uniform(0.2, 0.8, size=(5, 2)) * size).astype(np.float32).tolist()
            sample = Sample(
                id=SampleId(dataset="random", subject=f"sub{number % 68:02d}", clip=f"clip{number:04d}"),
                label=number % 3,
                landmarks=tuple((x, y) for x, y in points),
                flow_size=size,
            )
            yield PreparedSample(
                sample=sample, flow_image=(10 * cv2.GaussianBlur(noise, (0, 0), size / 14)).astype(np.float16)
            )

    return write_store(path, items(), {"sources": "random"})


class PlainBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches by step, made by numpy and OpenCV: images (B, 3, S, S) float32 and labels (B,) int64.

    It keeps what :class:`FlowStream` keeps: finished mosaics, decoded flow images, or nothing.
    """

    def __init__(self, store: Store, sampler: EpochSampler, *, data: DataConfig, transform: FlowTransform) -> None:
        self._store, self._sampler, self._data = store, sampler, data
        self._mean = np.asarray(transform.mean, np.float32)
        self._scale = np.float32(1.0) / np.asarray(transform.std, np.float32)
        self._minmax = transform.minmax
        self._labels = torch.tensor([sample.label for sample in store.samples])
        self._places = Places.of(store.samples)
        self._decoded: dict[int, NDArray[np.float16]] = {}
        self._finished: Tensor | None = None
        rows = range(len(store.rows))
        if data.cache_mb and changes_pixels(data.augment):
            self._decoded = {row: store.read_flow(row) for row in rows}
        elif data.cache_mb:
            self._finished = torch.from_numpy(np.stack([self._mosaic(row, None) for row in rows]))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self._sampler.batch(step)
        labels = self._labels[torch.from_numpy(rows.copy())]
        if self._finished is not None:
            return self._finished[torch.from_numpy(rows.copy())], labels
        if not changes_pixels(self._data.augment):
            return torch.from_numpy(np.stack([self._mosaic(row, None) for row in rows.tolist()])), labels
        changes = self._changes(step, rows)
        images = [self._mosaic(row, changes, index) for index, row in enumerate(rows.tolist())]
        return torch.from_numpy(np.stack(images)), labels

    def _changes(self, step: int, rows: NDArray[np.int64]) -> Changes:
        draws = draw(self._sampler.seed, step, self._sampler.size_of(step))
        return plan_changes(self._data.augment, draws, places=self._places.chosen(rows), rule=self._data.crop)

    def _mosaic(self, row: int, changes: Changes | None, index: int = 0) -> NDArray[np.float32]:
        """(3, S, S) float32; ``index`` is the sample's in the changes."""
        stored = self._decoded[row] if self._decoded else self._store.read_flow(row)
        image = stored.astype(np.float32)
        if changes is None:
            sample = self._store.samples[row]
            starts = region_starts(sample.landmarks, sample.flow_size, self._data.crop)
        else:
            image, starts = changed_image(image, changes, index), changes.starts[index]
        if self._minmax:
            image = scale_minmax(image)
        side = image.shape[0] // 4 * 2
        parts = [image[top : top + side, left : left + side] for top, left in starts.tolist()]
        whole = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
        return np.ascontiguousarray(((whole - self._mean) * self._scale).transpose(2, 0, 1))


def changed_image(image: NDArray[np.float32], changes: Changes, index: int) -> NDArray[np.float32]:
    """An (F, F, 3) flow image turned, mirrored and magnified by OpenCV and numpy."""
    centre = (image.shape[0] - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), float(changes.angle[index]), 1.0)
    out = cv2.warpAffine(image, turn, image.shape[:2], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if changes.mirrored[index]:
        out = cv2.flip(out, 1)
    return np.asarray(out @ changes.matrix[index].T, np.float32)


Next = Callable[[], tuple[Tensor, Tensor]]


@contextmanager
def _provided(
    name: str, store: Store, sampler: EpochSampler, data: DataConfig, transform: FlowTransform, device: torch.device
) -> Iterator[Next]:
    """A function that gives the next batch on the device; its processes end with the block."""
    workers = PROVIDERS[name]
    if workers is None:
        stream = FlowStream(
            store, sampler, data=data, transform=transform, device=device, threads=usable_cpus(), num_classes=3
        )
        yield lambda: _pair(stream.next())
        return
    made = iter(_loader(PlainBatches(store, sampler, data=data, transform=transform), workers))

    def following() -> tuple[Tensor, Tensor]:
        images, labels = next(made)
        return images.to(device), labels.to(device)

    yield following  # the workers end with the last reference to the iterator


def _loader(batches: PlainBatches, workers: int) -> DataLoader[Any]:
    steps: Iterable[int] = itertools.count()
    context = "spawn" if workers else None  # a fork would copy DALI's threads half
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_begin_worker if workers else None,
    )


def _begin_worker(_: int) -> None:
    cv2.setNumThreads(0)  # a worker is a thread's worth of work, and OpenCV's threads abort it at its end


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.images, batch.labels


# --- measuring


def measure(plan: Plan, device: torch.device) -> list[Result]:
    """Check and time every case of the plan; ours is the first of each.

    Raises:
        RuntimeError: a provider's batches are not ours, with ``DIFFERENCE`` in its text.
    """
    deadline = None if plan.seconds is None else time.monotonic() + plan.seconds
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", samples=plan.samples, size=plan.size)
        results = [result for case in plan.cases for result in _measure_case(case, store, plan, device, deadline)]
        if not plan.train_step:
            return results
        waiting = _waiting_shares(plan, store, device)
    return [replace(one, waiting=waiting[one.case]) if one.provider == OURS else one for one in results]


def _setting(case: str, store: Store, plan: Plan) -> tuple[EpochSampler, DataConfig, FlowTransform]:
    data, rows = CASES[case][0], tuple(range(len(store.rows)))
    sampler = EpochSampler(rows=rows, batch_size=plan.batch, seed=0, shuffle=True)
    return sampler, data, fit_transform(store, rows, data=data, mosaic_size=plan.size // 4 * 4)


def _measure_case(
    case: str, store: Store, plan: Plan, device: torch.device, deadline: float | None
) -> Iterator[Result]:
    sampler, data, transform = _setting(case, store, plan)
    rates: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    differences = {OURS: 0.0}
    with ExitStack() as stack:
        ways = {
            name: stack.enter_context(_provided(name, store, sampler, data, transform, device)) for name in PROVIDERS
        }
        first = {name: [way() for _ in range(2)] for name, way in ways.items()}
        for name in list(PROVIDERS)[1:]:
            differences[name] = check_equal(case, name, first[name], first[OURS])
        for number in range(plan.rounds):
            if number and deadline is not None and time.monotonic() > deadline:
                break
            for name in list(PROVIDERS)[:: 1 if number % 2 else -1]:
                rates[name].append(_rate(ways[name], plan.steps, device))
    for name in PROVIDERS:
        yield Result(case=case, provider=name, rates=tuple(rates[name]), difference=differences[name])


def check_equal(
    case: str, name: str, found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """The largest difference of images, relative to the largest value; RuntimeError above the case's tolerance."""
    worst = 0.0
    for (images, labels), (our_images, our_labels) in zip(found, expected, strict=True):
        if images.shape != our_images.shape or not torch.equal(labels, our_labels):
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} in shape or labels")
        difference = ((images - our_images).abs().max() / our_images.abs().max()).item()
        if not difference <= TOLERANCE[case]:  # NaN is no small difference
            raise RuntimeError(f"{case}, {name}: {DIFFERENCE} by {difference:.2e} of the largest value")
        worst = max(worst, difference)
    return worst


def _rate(way: Next, steps: int, device: torch.device) -> float:
    """Samples per second over ``steps`` batches or more, what was made ahead left out."""
    time.sleep(_SETTLE)
    for _ in range(_AHEAD):
        way()
    _wait(device)
    start, made, count = time.perf_counter(), 0, 0
    while made < steps or time.perf_counter() - start < _SHORTEST:
        count, made = count + len(way()[1]), made + 1
    _wait(device)
    return count / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waiting_shares(plan: Plan, store: Store, device: torch.device) -> dict[str, float]:
    """By case, the share of next() in next() and one training step; the epoch before it is not counted."""
    from htnet.config import EngineConfig, HTNetConfig, TrainConfig
    from htnet.engine import create_engine
    from htnet.model import HTNet

    torch.manual_seed(0)
    config = HTNetConfig(image_size=plan.size // 4 * 4)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=plan.batch)
    threads = EngineConfig(name="torch", threads=torch.get_num_threads())
    engine = create_engine(HTNet(config), train, threads, device=device)
    shares = {}
    for case in plan.cases:
        sampler, data, transform = _setting(case, store, plan)
        with _provided(OURS, store, sampler, data, transform, device) as way:
            for _ in range(sampler.steps_per_epoch):  # up to the next full batch
                engine.train_step(*way(), 5e-5).item()
            start = time.perf_counter()
            batch = way()
            _wait(device)
            ready = time.perf_counter()
            engine.train_step(*batch, 5e-5).item()
            shares[case] = (ready - start) / (time.perf_counter() - start)
    engine.close()
    return shares


# --- what is written and said


def _lines(results: Sequence[Result], plan: Plan, device: torch.device) -> list[dict[str, Any]]:
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
                **{name: getattr(plan, name) for name in kept},
                "n": len(result.rates),
                "median_samples_per_s": round(result.median, 1),
                "q1": round(low, 1),
                "q3": round(high, 1),
                "ours_is_times_as_fast": round(ours[result.case] / result.median, 3),
                "largest_difference": f"{result.difference:.2e}",
                "waiting_share": "" if result.waiting is None else f"{result.waiting:.5f}",
                **where,
            }
        )
    return lines


def _columns() -> list[str]:
    blank = Result(case="", provider=OURS, rates=(1.0,), difference=0.0)
    return list(_lines([blank], Plan(), torch.device("cpu"))[0])


def _check_columns(path: Path) -> None:
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            if next(csv.reader(file)) != _columns():
                raise InputError(f"{path}: holds other columns than this program writes; choose another --out")


def _append(path: Path, results: Sequence[Result], plan: Plan, device: torch.device) -> None:
    """A row per case and provider, with a header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(_lines(results, plan, device))


def _table(results: Sequence[Result], plan: Plan, device: torch.device) -> Table:
    title = f"samples per second on the {device.type}: {plan.samples} of {plan.size} px, batch {plan.batch}"
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("case", "provider", "median", "quartiles", "n", "ours x", "differs by"):
        out.add_column(column, justify="left" if column in ("case", "provider") else "right", no_wrap=True)
    if plan.train_step:
        out.add_column("waiting", justify="right")
    for result, line in zip(results, _lines(results, plan, device), strict=True):
        low, high = result.quartiles
        cells = [f"{result.median:,.0f}", f"{low:,.0f} .. {high:,.0f}", str(len(result.rates))]
        cells += ["" if result.provider == OURS else f"{line['ours_is_times_as_fast']:.2f}"]
        cells += ["" if result.provider == OURS else f"{result.difference:.0e}"]
        cells += ["" if result.waiting is None else f"{result.waiting:.2%}"] if plan.train_step else []
        out.add_row(result.case if result.provider == OURS else "", result.provider, *cells)
    return out
