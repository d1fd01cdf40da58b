"""One fold, from its samples to its record; runs in a Ray worker and knows nothing of Ray.

Idempotent: a fold with a record is done, one with a checkpoint goes on from it, bit for bit. The run's
folder, on storage that all nodes share, is the only channel: checkpoints, progress and the record.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import platform
import time
import traceback
import uuid
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htnet.config import Config
from htnet.config.identity import config_hash
from htnet.config.load import load_config
from htnet.cpu import configure_cpu
from htnet.data.samples import Fold
from htnet.data.store.writer import Store, open_store
from htnet.errors import HTNetError, InputError, NonFiniteLossError
from htnet.scoring.record import FoldRecord, RecordedSample, Validation
from kernels.machine import card_facts, cpu_name, package_version

if TYPE_CHECKING:
    import torch

    from dali_pipelines import Batch, FlowStream
    from htnet.training.engine import Engine
    from htnet.training.trainer import Trainer

PROGRESS_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class FoldSpec:
    """The order to train one fold; small, because it is sent to a worker."""

    config: Config
    fold: Fold
    run_dir: Path
    config_hash: str
    attempt: int
    submission: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names what only one worker writes: two drivers, or a stalled worker and its successor, never share it."""

    def again(self) -> FoldSpec:
        """Return the spec of the next attempt."""
        return replace(self, attempt=self.attempt + 1, submission=uuid.uuid4().hex)

    @property
    def record_path(self) -> Path:
        return self.run_dir / "folds" / f"{self.fold.name}.json"

    @property
    def checkpoint_path(self) -> Path:
        return self.run_dir / "checkpoints" / f"{self.fold.name}.pt"

    @property
    def progress_path(self) -> Path:
        return self.run_dir / "progress" / f"{self.fold.name}.{self.submission}.json"


@dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """The answer to the driver: the record's existence, or the reason why there is none."""

    fold: str
    seconds: float
    resumed_epoch: int = 0
    reason: str | None = None
    traceback: str | None = None


def run_fold(spec: FoldSpec) -> FoldOutcome:
    """Train the fold and write its record; a failure is an outcome, not an exception."""
    start = time.monotonic()
    try:
        if spec.record_path.exists():
            return _done_before(spec)
        check_node(spec)
        os.environ.pop("HTNET_ATTENTION", None)  # the driver took it into the configuration; a node's own has no say
        configure_cpu(spec.config.engine.threads)
        _Progress(spec, start=0).write(0, force=True)  # from here on the watchdog knows that the fold has started
        resumed = train_fold(spec, start)
        return FoldOutcome(fold=spec.fold.subject, seconds=time.monotonic() - start, resumed_epoch=resumed)
    except Exception as error:  # whatever one fold dies of, the others go on and the summary names it
        if spec.record_path.exists():  # another driver's worker was faster and has tidied up
            return _done_before(spec)
        known = isinstance(error, HTNetError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        return FoldOutcome(
            fold=spec.fold.subject,
            seconds=time.monotonic() - start,
            reason=" ".join(reason.split()),
            traceback=None if known else traceback.format_exc(),
        )


def _done_before(spec: FoldSpec) -> FoldOutcome:
    return FoldOutcome(fold=spec.fold.subject, seconds=0.0, resumed_epoch=spec.config.train.epochs)


def check_node(spec: FoldSpec) -> None:
    """Make sure that this node sees the store and the run's folder that the driver sees, before anything is written.

    Raises:
        InputError: it does not; names the node, the place and the rule.
    """
    node, rule = f"node {platform.node()}", "must lie on storage that all nodes share"
    try:
        digest = open_store(Path(spec.config.data.store)).digest
    except InputError as error:
        raise InputError(f"{node}: {error}; the store {rule}") from None
    if config_hash(spec.config, digest) != spec.config_hash:
        raise InputError(f"{node}: {spec.config.data.store}: not the store of this run; the store {rule}")
    try:
        seen = config_hash(load_config(spec.run_dir / "config.yaml"), digest)
    except InputError as error:
        raise InputError(f"{node}: {error}; the run's folder {rule}") from None
    if seen != spec.config_hash:
        raise InputError(f"{node}: {spec.run_dir}: holds another run; the run's folder {rule}")


def tidy_up(run_dir: Path, fold: str) -> None:
    """Remove what only an unfinished fold needs, of workers that died, too; ``fold`` as in its files' names.

    The driver does it once more for folds with a record: a worker may have been killed between record and here.
    """
    checkpoints, progress = run_dir / "checkpoints", run_dir / "progress"
    name, submission = glob.escape(fold), "[0-9a-f]" * 32  # a subject may be called s[12], another s1.b beside s1
    partial = checkpoints.glob(f".{name}.pt.*.tmp")
    told = progress.glob(f"{name}.{submission}.json"), progress.glob(f".{name}.{submission}.json.*.tmp")
    for path in (checkpoints / f"{fold}.pt", *partial, *told[0], *told[1]):
        path.unlink(missing_ok=True)


def fold_seed(seed: int, fold: str) -> int:
    """Return the seed of a fold: a function of the run's seed and the held-out subject, not of order or place."""
    import numpy as np

    return int(np.random.SeedSequence([seed, *fold.encode()]).generate_state(1)[0] >> 1)


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """The samples of a fold, ready for a trainer."""

    source: FlowStream
    train_labels: tuple[int, ...]
    """Labels of the samples that are trained on."""
    sets: dict[str, Batch]
    """The whole sets that are classified after every epoch: ``test``, and ``validation`` where it is asked for."""


def load_data(spec: FoldSpec, store: Store, device: torch.device, state: bytes | None) -> FoldData:
    """Assemble the data of a fold on the device; ``state`` is that of a source from which training goes on."""
    from dali_pipelines import EpochSampler, FlowStream, balance_groups, fit_transform, flow_from_frames, load_set
    from htnet.data.loso import validation_subjects

    config, fold, data = spec.config, spec.fold, spec.config.data
    inner = validation_subjects(store, fold, data.validation_subjects, config.seed)
    validation_rows = [row for row in fold.train if store.samples[row].subject in inner]
    train_rows = tuple(row for row in fold.train if store.samples[row].subject not in inner)
    placed: dict[str, Any] = {"device": device, "threads": config.engine.threads}
    read = None
    if data.input == "frames":
        read = flow_from_frames(store, (*fold.train, *fold.test), method=data.frames_flow, **placed)
    transform = fit_transform(store, train_rows, data=data, mosaic_size=config.model.image_size, read=read)
    shared: dict[str, Any] = {"data": data, "transform": transform, "read": read, **placed}
    sets = {"test": load_set(store, fold.test, **shared)}
    if validation_rows:
        sets["validation"] = load_set(store, validation_rows, **shared)
    sampler = EpochSampler(
        rows=train_rows,
        batch_size=config.train.batch_size,
        seed=fold_seed(config.seed, fold.subject),
        shuffle=data.shuffle,
        groups=balance_groups(store, train_rows, data.balance),
    )
    source = FlowStream(store, sampler, num_classes=config.model.num_classes, state=state, **shared)
    labels = tuple(store.samples[row].label for row in train_rows)
    return FoldData(source=source, train_labels=labels, sets=sets)


def train_fold(spec: FoldSpec, started: float) -> int:
    """Train the fold from its newest snapshot on and write its record; returns the epochs that the snapshot held.

    ``started`` is the time, of ``time.monotonic``, from which the fold's seconds count.
    """
    from htnet.training.engine import resolve_device
    from htnet.training.snapshot import Snapshots
    from htnet.training.trainer import Trainer, Watched

    config = spec.config
    store = open_store(Path(config.data.store))
    device = resolve_device(config.engine, config.resources.gpus_per_fold)
    limit_gpu_memory(device, config.resources.gpus_per_fold)
    minutes = config.resources.checkpoint_minutes
    with closing(Snapshots(snapshot_place(spec), identity=spec.config_hash, minutes=minutes)) as snapshots:
        found = snapshots.newest()
        data = load_data(spec, store, device, None if found is None else found.source)
        with closing(make_engine(config, spec.fold, data.train_labels, device)) as engine:
            watched = {
                name: Watched(images=batch.images, names=tuple(str(store.samples[row].id) for row in batch.rows))
                for name, batch in data.sets.items()
            }
            trainer = Trainer(engine, data.source, config.train, watched=watched, started=started)
            if found is not None:
                found.restore(trainer)
            start = trainer.epoch
            progress = _Progress(spec, start=start)
            progress.write(start, force=True)

            def after_epoch(trainer: Trainer) -> None:
                progress.write(trainer.epoch)
                snapshots.save_when_due(trainer)

            trainer.after_epoch = after_epoch
            try:
                trainer.run()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"fold {spec.fold.subject}: {error}") from None
            write_record(spec, store, trainer, data)
    snapshots.remove()
    tidy_up(spec.run_dir, spec.fold.name)
    return start


def snapshot_place(spec: FoldSpec) -> Path:
    """Return the folder of the fold's snapshots."""
    return spec.checkpoint_path.with_name(spec.fold.name)


def make_engine(config: Config, fold: Fold, train_labels: tuple[int, ...], device: torch.device) -> Engine:
    """Make the fold's network with its seeded weights, and its engine."""
    import torch

    from htnet.model import HTNet
    from htnet.training.engine import create_engine
    from htnet.training.loss import class_weights

    torch.manual_seed(fold_seed(config.seed, fold.subject))  # of the weights, and of dropout from here on
    weights = None
    if config.train.class_weights == "balanced":
        weights = class_weights(torch.tensor(train_labels), config.model.num_classes)
    return create_engine(HTNet(config.model), config.train, config.engine, device=device, weights=weights)


def write_record(spec: FoldSpec, store: Store, trainer: Trainer, data: FoldData) -> None:
    """Publish the record of the trained fold."""
    predictions = {name: tuple(tuple(epoch) for epoch in epochs) for name, epochs in trainer.predictions.items()}
    validation = None
    if "validation" in data.sets:
        samples = [store.samples[row] for row in data.sets["validation"].rows]
        validation = Validation(
            subjects=tuple(sample.subject for sample in samples),
            labels=tuple(sample.label for sample in samples),
            predictions=predictions["validation"],
        )
    record = FoldRecord(
        fold=spec.fold.subject,
        config_hash=spec.config_hash,
        samples=tuple(RecordedSample.of(store.samples[row]) for row in spec.fold.test),
        test_predictions=predictions["test"],
        validation=validation,
        train_loss=tuple(trainer.train_loss),
        final_logits=tuple(tuple(row) for row in trainer.logits(data.sets["test"].images).tolist()),
        seconds=round(trainer.seconds, 3),
        environment=fold_environment(spec.config, trainer.engine.device),
        attempts=spec.attempt,
    )
    spec.record_path.parent.mkdir(parents=True, exist_ok=True)
    record.write(spec.record_path)


class _Progress:
    """The file that tells the driver how far a fold is, at most once a second, and where this worker took it up."""

    def __init__(self, spec: FoldSpec, *, start: int) -> None:
        self._path, self._start, self._epochs = spec.progress_path, start, spec.config.train.epochs
        self._last = 0.0
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, epoch: int, *, force: bool = False) -> None:
        if not force and time.monotonic() - self._last < PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(
            json.dumps({"epoch": epoch, "start": self._start, "epochs": self._epochs}), encoding="utf-8"
        )
        temporary.replace(self._path)


def limit_gpu_memory(device: torch.device, share: float) -> None:
    """Make torch keep to Ray's share of a GPU, which is bookkeeping only."""
    import torch

    if device.type == "cuda" and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)


def fold_environment(config: Config, device: torch.device) -> dict[str, Any]:
    """Describe what computed a fold, for its record: host, device, engine, versions; of a GPU its card and driver."""
    from dali_pipelines import DALI_VERSION

    card = card_facts(device)
    versions = {name: package_version(name) for name in ("torch", "deepspeed", "ray")} | {"dali": str(DALI_VERSION)}
    return {
        "host": platform.node(),
        "device": device.type,
        "device_name": card.pop("name", None) or cpu_name(),
        **({"card": card} if card else {}),
        **{key: value for key, value in dataclasses.asdict(config.engine).items() if key != "device"},
        "versions": {name: found for name, found in versions.items() if found is not None},
    }
