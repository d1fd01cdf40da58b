"""One fold, from its samples to its record; runs in a Ray worker and knows nothing of Ray.

Idempotent: a fold with a record is done, one with a checkpoint goes on from it, bit for bit. The run's
folder, on storage that all nodes share, is the only channel: checkpoints, progress and the record.
"""

from __future__ import annotations

import io
import math
import os
import platform
import time
import traceback
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htnet.config import Config
from htnet.config.identity import config_hash
from htnet.config.load import load_config
from htnet.cpu import configure_cpu
from htnet.data.samples import Fold
from htnet.data.store.reader import open_store
from htnet.errors import HTNetError, InputError, NonFiniteLossError
from htnet.files import write_whole
from htnet.scoring.record import FoldRecord, RecordedSample, Validation
from launch.run.environment import deciding_facts, differences, fold_environment
from launch.run.folder import RunFolder
from launch.run.progress import ProgressWriter

if TYPE_CHECKING:
    import torch

    from dali_pipelines import Batch
    from htnet.training.engine import Engine

CHECKPOINT_FORMAT = 2
"""Since queries and keys of one-token blocks have no optimizer state; earlier checkpoints have no number."""


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
        """The spec of the next attempt."""
        return replace(self, attempt=self.attempt + 1, submission=uuid.uuid4().hex)

    @property
    def name(self) -> str:
        return self.fold.subject

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
    def checkpoint_path(self) -> Path:
        return self.run.checkpoint(self.fold.subject) / "state.pt"

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


def run_fold(spec: FoldSpec) -> FoldOutcome:
    """Train the fold and write its record; a failure is an outcome, not an exception."""
    start = time.monotonic()
    try:
        if spec.record_path.exists():
            return _done_before(spec)
        os.environ.pop("HTNET_ATTENTION", None)  # the driver took it into the configuration; a node's own has no say
        configure_cpu(spec.config.engine.threads)
        try:
            check_node(spec)
            check_machine(spec)
        except InputError as error:
            return FoldOutcome(fold=spec.fold.subject, seconds=time.monotonic() - start, bad_node=str(error))
        # from here on the watchdog knows that the fold has started
        ProgressWriter(spec.progress_path, start=0).write(0, force=True)
        training = FoldTraining(spec)
        resumed = training.epoch
        try:
            training.run()
        finally:
            training.engine.close()
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
        seen = config_hash(load_config(spec.run.config), digest)
    except InputError as error:
        raise InputError(f"{node}: {error}; the run's folder {rule}") from None
    if seen != spec.config_hash:
        raise InputError(f"{node}: {spec.run_dir}: holds another run; the run's folder {rule}")


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
    """The seed of a fold: a function of the run's seed and the held-out subject, not of order or place."""
    import numpy as np

    return int(np.random.SeedSequence([seed, *fold.encode()]).generate_state(1)[0] >> 1)


class FoldTraining:
    """State of a fold under training; ``epoch`` is the number of finished epochs."""

    def __init__(self, spec: FoldSpec) -> None:
        self.started = time.monotonic()  # before the imports, which are part of a fold's price
        import torch

        from dali_pipelines import EpochSampler, FlowStream, balance_groups, fit_transform, load_set, open_resident
        from htnet.data.loso import validation_subjects
        from htnet.model import HTNet
        from htnet.training.engine import class_weights, create_engine, resolve_device

        config, fold = spec.config, spec.fold
        self.spec = spec
        self.store = open_store(Path(config.data.store))
        self.device = resolve_device(config.engine, config.resources.gpus_per_fold)
        limit_gpu_memory(self.device, config.resources.gpus_per_fold)
        seed = fold_seed(config.seed, fold.subject)
        checkpoint = self._read_checkpoint()

        inner = validation_subjects(self.store, fold, config.data.validation_subjects, config.seed)
        self.validation_rows = [row for row in fold.train if self.store.samples[row].subject in inner]
        train_rows = tuple(row for row in fold.train if self.store.samples[row].subject not in inner)
        resident = open_resident(
            self.store,
            (*fold.train, *fold.test),
            data=config.data,
            mosaic_size=config.model.image_size,
            device=self.device,
            threads=config.engine.threads,
        )
        transform = fit_transform(resident, train_rows, standardise=config.data.standardise)
        self.test = load_set(resident, fold.test, transform)
        self.validation = load_set(resident, self.validation_rows, transform) if inner else None
        self.stream = FlowStream(
            resident,
            EpochSampler(
                rows=train_rows,
                batch_size=config.train.batch_size,
                seed=seed,
                shuffle=config.data.shuffle,
                groups=balance_groups(self.store, train_rows, config.data.balance),
            ),
            augment=config.data.augment,
            transform=transform,
            num_classes=config.model.num_classes,
            state=None if checkpoint is None else bytes(checkpoint["dali"].numpy().tobytes()),
        )
        torch.manual_seed(seed)
        labels = torch.tensor([self.store.samples[row].label for row in train_rows])
        weights = class_weights(labels, config.model.num_classes) if config.train.class_weights == "balanced" else None
        model = HTNet(config.model)
        self.engine: Engine = create_engine(model, config.train, config.engine, device=self.device, weights=weights)
        self.epoch = 0
        self.train_loss: list[float] = []
        self.test_predictions: list[list[int]] = []
        self.validation_predictions: list[list[int]] = []
        self.seconds_before = 0.0
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> None:
        """Train what is left and publish the record."""
        config = self.spec.config
        every = config.resources.checkpoint_every
        progress = ProgressWriter(self.spec.progress_path, start=self.epoch)
        progress.write(self.epoch, force=True)
        while self.epoch < config.train.epochs:
            self.train_loss.append(self._train_epoch())
            self.test_predictions.append(self._predict(self.test))
            if self.validation is not None:
                self.validation_predictions.append(self._predict(self.validation))
            self.epoch += 1
            progress.write(self.epoch)
            if every and self.epoch % every == 0 and self.epoch < config.train.epochs:
                self._write_checkpoint()
        self._write_record()
        self.spec.run.remove_leftovers(self.spec.fold.subject)

    def _train_epoch(self) -> float:
        """One pass over the training samples; returns the mean loss of its steps."""
        import torch

        from htnet.training.engine import learning_rate

        steps = self.stream.sampler.steps_per_epoch
        losses = []
        for step in range(steps):
            batch = self.stream.next()
            rate = learning_rate(self.spec.config.train, self.epoch * steps + step, steps)
            losses.append(self.engine.train_step(batch.images, batch.labels, rate))
        # read once an epoch: a look at every loss would make the GPU wait at every step
        values = torch.stack(losses).tolist()
        for step, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"fold {self.spec.fold.subject}: the training loss became {value} in epoch {self.epoch + 1} of "
                    f"{self.spec.config.train.epochs}, step {step + 1} of {steps}; a lower train.learning_rate, "
                    "train.clip_norm or engine.precision=fp32 may help"
                )
        return float(sum(values) / steps)

    def _predict(self, batch: Batch) -> list[int]:
        """Classes of a whole set; an output that is not finite has none and ends the fold."""
        logits = self._logits(batch)
        wrong = batch.rows[~logits.isfinite().all(dim=1)].tolist()
        if wrong:
            raise NonFiniteLossError(
                f"fold {self.spec.fold.subject}: the output for {self.store.samples[wrong[0]].id} is not finite after "
                f"epoch {self.epoch + 1} of {self.spec.config.train.epochs}: the weights have blown up (a lower "
                "train.learning_rate may help) or its flow image is not finite"
            )
        return logits.argmax(dim=1).tolist()

    def _logits(self, batch: Batch) -> torch.Tensor:
        """Logits of a whole set, (n, num_classes) float32, on the CPU."""
        import torch

        size = max(1, self.spec.config.train.batch_size)
        return torch.cat([self.engine.logits(part) for part in batch.images.split(size)]).cpu()

    def _write_record(self) -> None:
        fold, samples = self.spec.fold, self.store.samples
        validation = None
        if self.validation is not None:
            validation = Validation(
                subjects=tuple(samples[row].subject for row in self.validation_rows),
                labels=tuple(samples[row].label for row in self.validation_rows),
                predictions=_frozen(self.validation_predictions),
            )
        record = FoldRecord(
            fold=fold.subject,
            config_hash=self.spec.config_hash,
            samples=tuple(RecordedSample.of(samples[row]) for row in fold.test),
            test_predictions=_frozen(self.test_predictions),
            validation=validation,
            train_loss=tuple(self.train_loss),
            final_logits=tuple(tuple(row) for row in self._logits(self.test).tolist()),
            seconds=round(self.seconds_before + time.monotonic() - self.started, 3),
            environment=self._environment(),
            attempts=self.spec.attempt,
        )
        self.spec.record_path.parent.mkdir(parents=True, exist_ok=True)
        record.write(self.spec.record_path)

    def _environment(self) -> dict[str, Any]:
        config = self.spec.config
        first = self.spec.run.settle_machine(deciding_facts(config.engine, self.device))
        return fold_environment(config, self.device, first)

    def _write_checkpoint(self) -> None:
        """Everything that the rest of the fold depends on, whole or not at all."""
        import numpy as np
        import torch

        path = self.spec.checkpoint_path
        state = {
            "format": CHECKPOINT_FORMAT,
            "config_hash": self.spec.config_hash,
            "epoch": self.epoch,
            "train_loss": self.train_loss,
            "test_predictions": self.test_predictions,
            "validation_predictions": self.validation_predictions,
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "engine": self.engine.state(),
            "dali": torch.from_numpy(np.frombuffer(self.stream.state(), np.uint8).copy()),
            "rng": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng(self.device)},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(path, content.getvalue())

    def _read_checkpoint(self) -> dict[Any, Any] | None:
        import torch

        path = self.spec.checkpoint_path
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise InputError(
                f"{path}: damaged checkpoint ({type(error).__name__}); delete it to start the fold again"
            ) from None
        if not isinstance(state, dict) or "config_hash" not in state:
            raise InputError(f"{path}: not a checkpoint of htnet; delete it to start the fold again")
        if state.get("format") != CHECKPOINT_FORMAT:
            raise InputError(f"{path}: written by another version of htnet; delete it to start the fold again")
        if state["config_hash"] != self.spec.config_hash:
            raise InputError(
                f"{path}: the checkpoint belongs to another configuration; delete it to start the fold again"
            )
        return state

    def _restore(self, state: dict[Any, Any]) -> None:
        import torch

        self.engine.load_state(state["engine"])
        self.epoch = state["epoch"]
        self.train_loss = state["train_loss"]
        self.test_predictions = state["test_predictions"]
        self.validation_predictions = state["validation_predictions"]
        self.seconds_before = state["seconds"]
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def limit_gpu_memory(device: torch.device, share: float) -> None:
    """Ray's share of a GPU is bookkeeping only; this makes torch keep to it."""
    import torch

    if device.type == "cuda" and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)


def _cuda_rng(device: torch.device) -> torch.Tensor | None:
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _frozen(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)
