"""One fold, from its samples to its record; runs in a Ray worker and knows nothing of Ray.

Idempotent: a fold with a record is done, one with a checkpoint goes on from it, bit for bit. The run's
folder, on storage that all nodes share, is the only channel: checkpoints, progress and the record.
"""

from __future__ import annotations

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
from htnet.config.load import load_config
from htnet.config.plain import config_hash
from htnet.cpu import configure_cpu
from htnet.data.samples import Fold
from htnet.data.store.merged import open_stores
from htnet.data.store.reader import Store
from htnet.errors import HTNetError, InputError, NonFiniteLossError
from htnet.files import SetAside
from htnet.scoring.record import FoldRecord, RecordedSample, Validation
from kernels.machine import package_versions
from launch.run.environment import deciding_facts, differences, fold_environment
from launch.run.folder import RunFolder
from launch.run.progress import ProgressWriter

if TYPE_CHECKING:
    import torch

    from dali_pipelines import Batch, FlowStream, FlowTables
    from htnet.data.transform import FlowTransform
    from htnet.model import HTNet
    from htnet.training.engine import Engine
    from htnet.training.snapshot import Snapshots
    from htnet.training.trainer import Trainer, Watched


@dataclass(frozen=True, kw_only=True)
class FoldSpec:
    """Facts that a worker needs to know; few, because they are sent to it."""

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
    def name(self) -> str:
        return self.fold.subject

    @property
    def epochs(self) -> int:
        return self.config.train.epochs

    @property
    def cpus(self) -> float:
        return self.config.resources.cpus_per_fold

    @property
    def gpus(self) -> float:
        return self.config.resources.gpus_per_fold

    @property
    def run(self) -> RunFolder:
        return RunFolder(path=self.run_dir)

    @property
    def record_path(self) -> Path:
        return self.run.record(self.fold.subject)

    @property
    def snapshot_path(self) -> Path:
        return self.run.checkpoint(self.fold.subject)

    @property
    def progress_path(self) -> Path:
        return self.run.progress(self.fold.subject, self.submission)


@dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """Answer to the driver: the record's existence, or the reason why there is none.

    ``bad_node``: the node sees another store or run than the driver, so nothing was done; another node may.
    """

    fold: str
    seconds: float
    resumed_epoch: int = 0
    reason: str | None = None
    bad_node: str | None = None
    traceback: str | None = None
    damage: tuple[SetAside, ...] = ()
    """Snapshots that could not be read; the fold went on from an older one or began anew."""


def run_fold(spec: FoldSpec) -> FoldOutcome:
    """Train the fold and write its record; a failure is an outcome, not an exception."""
    if spec.config.engine.name == "graphs":
        from launch.tasks.group import FoldGroup, run_folds  # it is made of this file's parts

        group = run_folds(FoldGroup(specs=(spec,)))
        return (
            FoldOutcome(fold=spec.name, seconds=0.0, bad_node=group.bad_node) if group.bad_node else group.outcomes[0]
        )
    start = time.monotonic()
    damage: list[SetAside] = []
    try:
        if spec.record_path.exists():
            return done_before(spec)
        os.environ.pop("HTNET_ATTENTION", None)  # the driver took it into the configuration; a node's own has no say
        configure_cpu(spec.config.engine.threads)
        try:
            store = check_node(spec)
            check_machine(spec)
        except InputError as error:
            return FoldOutcome(fold=spec.fold.subject, seconds=time.monotonic() - start, bad_node=str(error))
        # from here on the watchdog knows that the fold has started
        ProgressWriter(spec.progress_path, start=0).write(0, force=True)
        resumed = train_fold(spec, store, start, damage)
        return FoldOutcome(
            fold=spec.fold.subject,
            seconds=time.monotonic() - start,
            resumed_epoch=resumed,
            damage=tuple(damage),
        )
    except Exception as error:  # whatever one fold dies of, the others go on and the summary names it
        return failed(spec, error, time.monotonic() - start, damage)


def failed(spec: FoldSpec, error: Exception, seconds: float, damage: list[SetAside]) -> FoldOutcome:
    """Return the outcome of an attempt that an error has ended."""
    if spec.record_path.exists():  # another driver's worker was faster and has tidied up
        return done_before(spec)
    known = isinstance(error, HTNetError)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    return FoldOutcome(
        fold=spec.fold.subject,
        seconds=seconds,
        reason=" ".join(reason.split()),
        traceback=None if known else "".join(traceback.format_exception(error)),
        damage=tuple(damage),
    )


def done_before(spec: FoldSpec) -> FoldOutcome:
    """Return the outcome of a fold whose record is there."""
    return FoldOutcome(fold=spec.fold.subject, seconds=0.0, resumed_epoch=spec.config.train.epochs)


def check_node(spec: FoldSpec) -> Store:
    """Return the store, if this node sees it and the run's folder as the driver does; nothing is written before.

    Raises:
        InputError: it does not; names the node, the place and the rule.
    """
    node, rule = f"node {platform.node()}", "must lie on storage that all nodes share"
    try:
        store = open_stores(spec.config.data.store)
    except InputError as error:
        raise InputError(f"{node}: {error}; the store {rule}") from None
    if config_hash(spec.config, store.digest) != spec.config_hash:
        raise InputError(f"{node}: {spec.config.data.store}: not the store of this run; the store {rule}")
    try:
        seen = config_hash(load_config(spec.run.config), store.digest)
    except InputError as error:
        raise InputError(f"{node}: {error}; the run's folder {rule}") from None
    if seen != spec.config_hash:
        raise InputError(f"{node}: {spec.run_dir}: holds another run; the run's folder {rule}")
    return store


def check_machine(spec: FoldSpec) -> None:
    """Make sure that this machine gives the bits that the run's first fold got; the first fold decides.

    Raises:
        InputError: it does not, and ``resources.mixed_devices`` is not set; names the node and what differs.
    """
    from htnet.training.engine import resolve_device

    device = resolve_device(spec.config.engine, spec.config.resources.gpus_per_fold)
    here = deciding_facts(spec.config.engine, device)
    differs = differences(spec.run.settle_machine(here), here)
    if differs and not spec.config.resources.mixed_devices:
        raise InputError(
            f"node {platform.node()}: not of the kind of the run's first fold: {', '.join(differs)}; "
            "resources.mixed_devices=true lets a run mix them"
        )


def fold_seed(seed: int, fold: str) -> int:
    """Return the seed of a fold: a function of the run's seed and the held-out subject, not of order or place."""
    import numpy as np

    return int(np.random.SeedSequence([seed, *fold.encode()]).generate_state(1)[0] >> 1)


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """The samples of a fold, ready for a trainer."""

    source: FlowStream | FlowTables
    transform: FlowTransform
    train_rows: tuple[int, ...]
    """Rows of the manifest that are trained on."""
    train_labels: tuple[int, ...]
    """Their labels."""
    sets: dict[str, Batch]
    """The whole sets that are classified after every epoch: ``test``, and ``validation`` where it is asked for."""


def load_data(spec: FoldSpec, store: Store, device: torch.device, state: bytes | None) -> FoldData:
    """Assemble the data of a fold on the device; ``state`` is that of a source from which training goes on."""
    from dali_pipelines import (
        EpochSampler,
        FlowStream,
        FlowTables,
        balance_groups,
        fit_transform,
        load_set,
        open_resident,
    )
    from htnet.data.loso import validation_subjects

    config, fold, data = spec.config, spec.fold, spec.config.data
    inner = validation_subjects(store, fold, data.validation_subjects, config.seed)
    validation_rows = [row for row in fold.train if store.samples[row].subject in inner]
    train_rows = tuple(row for row in fold.train if store.samples[row].subject not in inner)
    resident = open_resident(
        store,
        (*fold.train, *fold.test),
        data=data,
        mosaic_size=config.model.image_size,
        device=device,
        threads=config.engine.threads,
    )
    transform = fit_transform(resident, train_rows, standardise=data.standardise)
    sets = {"test": load_set(resident, fold.test, transform)}
    if inner:
        sets["validation"] = load_set(resident, validation_rows, transform)
    sampler = EpochSampler(
        rows=train_rows,
        batch_size=config.train.batch_size,
        seed=fold_seed(config.seed, fold.subject),
        shuffle=data.shuffle,
        groups=balance_groups(store, train_rows, data.balance),
    )
    classes = config.model.num_classes
    kind = FlowTables if config.engine.name == "graphs" else FlowStream
    source = kind(resident, sampler, augment=data.augment, transform=transform, num_classes=classes, state=state)
    labels = tuple(store.samples[row].label for row in train_rows)
    return FoldData(source=source, transform=transform, train_rows=train_rows, train_labels=labels, sets=sets)


def train_fold(spec: FoldSpec, store: Store, started: float, damage: list[SetAside]) -> int:
    """Train the fold from its newest snapshot on and write its record; returns the epochs that the snapshot held.

    ``started`` is the time, of ``time.monotonic``, from which the fold's seconds count. ``damage`` takes the snapshots
    that cannot be read.
    """
    from htnet.training.engine import resolve_device
    from htnet.training.snapshot import Snapshots
    from htnet.training.trainer import Trainer

    config = spec.config
    device = resolve_device(config.engine, config.resources.gpus_per_fold)
    limit_gpu_memory(device, config.resources.gpus_per_fold)
    minutes = config.resources.checkpoint_minutes
    with closing(Snapshots(spec.snapshot_path, identity=spec.config_hash, minutes=minutes)) as snapshots:
        found = snapshots.newest(damage)
        data = load_data(spec, store, device, None if found is None else found.source)
        with closing(make_engine(config, spec.fold, data.train_labels, device)) as engine:
            watched = watched_sets(store, data)
            trainer = Trainer(engine, data.source, config.train, watched=watched, started=started)
            if found is not None:
                found.restore(trainer)
            resumed = trainer.epoch
            run_trainer(spec, trainer, snapshots)
            end_fold(spec, store, trainer, data)
    spec.run.remove_leftovers(spec.fold.subject)
    return resumed


def end_fold(spec: FoldSpec, store: Store, trainer: Trainer, data: FoldData) -> None:
    """Write what a trained fold leaves: its model, where it is asked for, and its record."""
    if spec.config.resources.keep_models:
        keep_model(spec, store, trainer, data)
    write_record(spec, store, trainer, data)


def make_engine(config: Config, fold: Fold, train_labels: tuple[int, ...], device: torch.device) -> Engine:
    """Make the fold's network with its seeded weights, and its engine."""
    from htnet.training.engine import create_engine

    network = make_network(config, fold)
    weights = loss_weights(config, train_labels)
    return create_engine(network, config.train, config.engine, device=device, weights=weights)


def make_network(config: Config, fold: Fold) -> HTNet:
    """Make the fold's network with its seeded weights, or with those of ``train.init``."""
    import torch

    from htnet.model import HTNet
    from htnet.model_folder import fill_network

    torch.manual_seed(fold_seed(config.seed, fold.subject))  # of the weights, and of dropout from here on
    network = HTNet(config.model)
    if config.train.init:
        fill_network(network, Path(config.train.init))
    return network


def loss_weights(config: Config, train_labels: tuple[int, ...]) -> torch.Tensor | None:
    """Return the loss's class weights, (num_classes,), where the configuration asks for some."""
    import torch

    from htnet.training.loss import class_weights

    if config.train.class_weights == "none":
        return None
    return class_weights(torch.tensor(train_labels), config.model.num_classes)


def watched_sets(store: Store, data: FoldData) -> dict[str, Watched]:
    """Return the fold's sets as a trainer watches them, with the name of each sample."""
    from htnet.training.trainer import Watched

    return {
        name: Watched(images=batch.images, names=tuple(str(store.samples[row].id) for row in batch.rows))
        for name, batch in data.sets.items()
    }


def run_trainer(spec: FoldSpec, trainer: Trainer, snapshots: Snapshots) -> None:
    """Train what is left; after every epoch progress is told, and a snapshot is taken where one is due.

    Raises:
        NonFiniteLossError: a loss or an output is not finite; names the fold, and epoch and step or sample.
    """
    progress = ProgressWriter(spec.progress_path, start=trainer.epoch)
    progress.write(trainer.epoch, force=True)

    def after_epoch(trainer: Trainer) -> None:
        progress.write(trainer.epoch)
        snapshots.save_when_due(trainer)

    trainer.after_epoch = after_epoch
    try:
        trainer.run()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"fold {spec.fold.subject}: {error}") from None


def keep_model(spec: FoldSpec, store: Store, trainer: Trainer, data: FoldData) -> None:
    """Write the network of the trained fold as a model folder, before the record says that the fold is done."""
    from htnet.model_folder import ModelFacts, save_model, seen_samples

    facts = ModelFacts(
        classes=store.classes,
        recipe=store.recipe,
        transform=data.transform,
        crop=spec.config.data.crop,
        trained_on=seen_samples(store, data.train_rows, spec.config.train.init),
        selection="final",
        epoch=trainer.epoch,
        versions=package_versions(),
    )
    save_model(spec.run.model(spec.fold.subject), trainer.engine.model.state_dict(), spec.config, facts)


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
        final_logits=tuple(tuple(row) for row in trainer.outputs["test"].tolist()),
        seconds=round(trainer.seconds, 3),
        environment=describe_environment(spec, trainer.engine.device),
        attempts=spec.attempt,
    )
    spec.record_path.parent.mkdir(parents=True, exist_ok=True)
    record.write(spec.record_path)


def describe_environment(spec: FoldSpec, device: torch.device) -> dict[str, Any]:
    """Describe what computed the fold, and in what it differs from the run's first one."""
    first = spec.run.settle_machine(deciding_facts(spec.config.engine, device))
    return fold_environment(spec.config, device, first)


def limit_gpu_memory(device: torch.device, share: float) -> None:
    """Make torch keep to Ray's share of a GPU, which is bookkeeping only."""
    import torch

    if device.type == "cuda" and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)
