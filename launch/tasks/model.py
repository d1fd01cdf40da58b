"""One rank of the training of one model; runs in a Ray worker and knows nothing of Ray.

All ranks pass the same way through this file: whatever they do together (steps, snapshots, weights) they do in the same
order. The folder of the training, on storage that all nodes share, is the only channel to the driver.
"""

from __future__ import annotations

import math
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htnet.config import Config
from htnet.config.plain import config_hash
from htnet.cpu import configure_cpu
from htnet.data.loso import Division
from htnet.data.store.merged import open_stores
from htnet.data.store.reader import Store
from htnet.errors import HTNetError, InputError
from htnet.files import SetAside, write_json, write_whole
from kernels.machine import package_versions
from launch.run.training import Figures, TrainingFolder
from launch.tasks.fold import fold_seed

if TYPE_CHECKING:
    import torch

    from dali_pipelines import Batch, FlowStream
    from htnet.data.transform import FlowTransform
    from htnet.model import HTNet
    from htnet.training.parallel_engine import ParallelEngine
    from htnet.training.snapshot import Snapshots
    from htnet.training.trainer import Trainer
    from htnet.training.world import World

_KEPT_BEST = 3
"""Best epochs whose weights stay until the end: a training may go on from a snapshot before the last of them."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Facts that every rank needs to know."""

    config: Config
    division: Division
    out: Path
    identity: str

    @property
    def folder(self) -> TrainingFolder:
        return TrainingFolder(path=self.out)


@dataclass(frozen=True, kw_only=True)
class ModelOutcome:
    """Answer of a rank to the driver."""

    steps: int = 0
    resumed: int = 0
    """Steps of the snapshot from which the training went on."""
    stopped: bool = False
    """True if the training was saved and stopped on demand."""
    reason: str | None = None
    """A failure that another attempt would meet again."""
    error: str | None = None
    """A failure that another attempt may not meet, with its traceback."""
    damage: tuple[SetAside, ...] = ()


class _Stop(Exception):
    """Demand to stop, seen by all ranks at one step."""


def train_model(spec: ModelSpec, world: World) -> ModelOutcome:
    """Train as one rank of the world, and write the model as the first; a failure is an outcome."""
    damage: list[SetAside] = []
    try:
        configure_cpu(spec.config.engine.threads)
        with _told_to_stop() as told:
            return _Rank(spec, world, told, damage).train()
    except HTNetError as error:
        return ModelOutcome(reason=" ".join(str(error).split()), damage=tuple(damage))
    except Exception:
        return ModelOutcome(error=traceback.format_exc(), damage=tuple(damage))


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """Collect signals to stop in a list, which is yielded: batch systems send SIGTERM before they kill."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: told.append(signum))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


class _Rank:
    """One rank's training: assembly around a Trainer."""

    def __init__(self, spec: ModelSpec, world: World, told: list[int], damage: list[SetAside]) -> None:
        self._spec, self._world, self._told, self._damage = spec, world, told, damage
        self._config, self._folder = spec.config, spec.folder
        self._store = self._open_store()

    def _open_store(self) -> Store:
        store = open_stores(self._config.data.store)
        if config_hash(self._config, store.digest) != self._spec.identity:
            raise InputError(
                f"{store.path}: not the store of this training; it must lie on storage that all nodes share"
            )
        return store

    def train(self) -> ModelOutcome:
        """Train what is left."""
        from htnet.training.snapshot import Snapshots
        from htnet.training.trainer import Trainer

        config, world = self._config, self._world
        snapshots = Snapshots(
            self._folder.snapshots,
            identity=self._spec.identity,
            minutes=config.resources.checkpoint_minutes,
            keep=config.scale.keep_snapshots,
            world=world,
        )
        device = self._device()
        with closing(snapshots):
            found = snapshots.newest(self._damage)
            source, transform, validation = self._load_data(device, None if found is None else found.source)
            timed = _TimedSource(source)
            with closing(self._make_engine(device)) as engine:
                trainer = Trainer(engine, timed, config.train)
                if found is not None:
                    found.restore(trainer, world.rank)
                watch = _Watch(self, trainer, timed, snapshots, validation)
                resumed = trainer.steps
                try:
                    with closing(watch):
                        trainer.run()
                        self._write_model(engine, trainer, transform, watch)
                except _Stop:
                    return self._outcome(trainer, resumed, stopped=True)
                return self._outcome(trainer, resumed)

    def _outcome(self, trainer: Trainer, resumed: int, *, stopped: bool = False) -> ModelOutcome:
        return ModelOutcome(steps=trainer.steps, resumed=resumed, stopped=stopped, damage=tuple(self._damage))

    def _device(self) -> torch.device:
        from htnet.training.engine import resolve_device

        return resolve_device(self._config.engine, self._config.scale.gpus_per_worker)

    def _load_data(self, device: torch.device, state: bytes | None) -> tuple[FlowStream, FlowTransform, Batch | None]:
        """Return this rank's batches, the transform of all ranks, and on the first rank the validation set."""
        from dali_pipelines import EpochSampler, FlowStream, balance_groups, fit_transform, load_set, open_resident

        config, data, division, store = self._config, self._config.data, self._spec.division, self._store
        resident = open_resident(
            store,
            (*division.train, *division.validation),
            data=data,
            mosaic_size=config.model.image_size,
            device=device,
            threads=config.engine.threads,
        )
        own = fit_transform(resident, division.train, standardise=data.standardise) if self._world.rank == 0 else None
        transform = self._world.tell(own)
        assert transform is not None
        sampler = EpochSampler(
            rows=division.train,
            batch_size=config.train.batch_size,
            seed=fold_seed(config.seed, "model"),
            shuffle=data.shuffle,
            groups=balance_groups(store, division.train, data.balance),
            rank=self._world.rank,
            ranks=self._world.ranks,
        )
        classes = config.model.num_classes
        source = FlowStream(
            resident, sampler, augment=data.augment, transform=transform, num_classes=classes, state=state
        )
        watched = self._world.rank == 0 and division.validation
        return source, transform, load_set(resident, division.validation, transform) if watched else None

    def _make_engine(self, device: torch.device) -> ParallelEngine:
        import torch

        from htnet.model import HTNet
        from htnet.model_folder import fill_network
        from htnet.training.engine import set_determinism
        from htnet.training.loss import class_weights
        from htnet.training.parallel_engine import ParallelEngine

        config = self._config
        set_determinism(device)
        torch.manual_seed(fold_seed(config.seed, "model"))  # the same weights on all ranks
        network = HTNet(config.model)
        if config.train.init:
            fill_network(network, Path(config.train.init))
        torch.manual_seed(fold_seed(config.seed, f"rank {self._world.rank}"))  # of dropout
        weights = None
        if config.train.class_weights == "balanced":
            labels = [self._store.samples[row].label for row in self._spec.division.train]
            weights = class_weights(torch.tensor(labels), config.model.num_classes)
        return ParallelEngine(
            network.to(device),
            config.train,
            config.scale,
            config.engine.precision,
            device=device,
            weights=weights,
            world=self._world,
        )

    def _write_model(self, engine: ParallelEngine, trainer: Trainer, transform: FlowTransform, watch: _Watch) -> None:
        """Write the model folder, on the first rank: the best epoch where one is chosen, else the last."""
        import torch

        from htnet.model import HTNet
        from htnet.model_folder import ModelFacts, save_model, seen_samples

        weights = engine.weights()
        if self._world.rank:
            return
        epoch, chosen = watch.chosen(trainer.epoch)
        network = HTNet(self._config.model)
        network.load_state_dict(weights if chosen is None else chosen)
        facts = ModelFacts(
            classes=self._store.classes,
            recipe=self._store.recipe,
            transform=transform,
            crop=self._config.data.crop,
            trained_on=seen_samples(self._store, self._spec.division.train, self._config.train.init),
            selection="final" if chosen is None else "validated",
            epoch=epoch,
            scores=watch.scores(epoch),
            versions=package_versions(),
        )
        with torch.no_grad():
            save_model(self._spec.out, network.state_dict(), self._config, facts)


class _TimedSource:
    """Source that counts the seconds for which the training waits for it, and the samples of all ranks."""

    def __init__(self, source: FlowStream) -> None:
        self._source, self._step = source, 0
        self.seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return self._source.steps_per_epoch

    def next(self) -> Batch:
        start = time.monotonic()
        batch = self._source.next()
        self.seconds += time.monotonic() - start
        return batch

    def state(self) -> bytes:
        return self._source.state()

    def samples(self, step: int) -> int:
        """Count the samples of all ranks in a step."""
        return self._source.sampler.size_of(step)


class _Watch:
    """Hooks of a trainer: figures, snapshots, stops, validation."""

    def __init__(
        self, rank: _Rank, trainer: Trainer, source: _TimedSource, snapshots: Snapshots, validation: Batch | None
    ) -> None:
        self._world, self._config, self._folder = rank._world, rank._config, rank._folder
        self._told, self._store, self._division = rank._told, rank._store, rank._spec.division
        self._source, self._snapshots, self._validation = source, snapshots, validation
        self._figures: Figures | None = None
        if self._world.rank == 0:
            self._figures = Figures(self._folder, self._config.logging, steps=trainer.steps)
        self._since, self._waited, self._samples = time.monotonic(), source.seconds, 0
        self._flops = _training_flops(self._config) if trainer.engine.device.type == "cuda" else 0
        trainer.after_step, trainer.after_epoch = self.after_step, self.after_epoch
        self._tell_progress(trainer)

    def close(self) -> None:
        if self._figures is not None:
            self._figures.close()

    def after_step(self, trainer: Trainer) -> None:
        """Look every ``scale.look_steps`` steps: note figures, save where it is due, stop where it is asked for."""
        import torch

        self._samples += self._source.samples(trainer.steps - 1)
        if trainer.steps % self._config.scale.look_steps:
            return
        recent = torch.stack(trainer.losses[-self._config.scale.look_steps :] or trainer.losses).tolist()
        if not all(map(math.isfinite, recent)):
            trainer.check_losses([loss.item() for loss in trainer.losses])
        elapsed = max(time.monotonic() - self._since, 1e-9)
        told = bool(self._told) or (self._world.rank == 0 and self._folder.stop.exists())
        waiting = (self._source.seconds - self._waited) / elapsed
        ranks = self._world.collect((told, waiting, _peak_memory(trainer.engine.device)))
        if self._figures is not None:
            self._note_interval(trainer, elapsed, recent, ranks)
        self._since, self._waited, self._samples = time.monotonic(), self._source.seconds, 0
        if any(told for told, _, _ in ranks):
            self._snapshots.save(trainer)
            self._snapshots.wait()
            raise _Stop
        self._snapshots.save_when_due(trainer)

    def _note_interval(
        self, trainer: Trainer, elapsed: float, recent: list[float], ranks: list[tuple[bool, float, int]]
    ) -> None:
        from htnet.training.schedule import learning_rate

        assert self._figures is not None
        rate = self._samples / elapsed
        figures: dict[str, Any] = {
            "epoch": trainer.epoch,
            "loss": sum(recent) / len(recent),
            "learning_rate": learning_rate(trainer.train, trainer.steps - 1, self._source.steps_per_epoch),
            "samples_per_second": round(rate, 3),
            "waiting": round(sum(waiting for _, waiting, _ in ranks) / len(ranks), 4),
            "peak_memory_mb": round(max(peak for _, _, peak in ranks) / 2**20, 1),
        }
        if mfu := self._mfu(trainer, rate):
            figures["mfu"] = round(mfu, 4)
        self._figures.note(trainer.steps, **figures)
        self._tell_progress(trainer, **figures)

    def _mfu(self, trainer: Trainer, rate: float) -> float | None:
        """Return the share of the cards' rate that the network's arithmetic takes; None where the rate is not known."""
        import torch

        from kernels.benchmarks.cards import find_card

        card = find_card(torch.cuda.get_device_name(trainer.engine.device)) if self._flops else None
        if card is None:
            return None
        whole: float = card.rate(self._config.engine.precision) * self._world.ranks
        return self._flops * rate / whole

    def _tell_progress(self, trainer: Trainer, **figures: Any) -> None:
        if self._world.rank == 0:
            total = self._config.train.epochs * self._source.steps_per_epoch
            write_json(self._folder.progress, {"steps": trainer.steps, "total": total, **figures})

    def after_epoch(self, trainer: Trainer) -> None:
        """Validate, note the epoch, and decide if it was the last."""
        found: dict[str, Any] = {"train_loss": trainer.train_loss[-1]}
        if self._division.validation:
            weights = trainer.engine.weights()  # type: ignore[attr-defined] # this file makes the engine
            if self._world.rank == 0:
                found["validation"] = self._validate(weights)
                self._keep_best(trainer.epoch, found["validation"]["uf1"], weights)
        if self._figures is not None:
            self._figures.note(trainer.steps, epoch=trainer.epoch, **found)
            self._tell_progress(trainer, epoch=trainer.epoch, **found)
        patience = self._config.train.patience
        if patience:
            trainer.enough = self._world.tell(trainer.epoch - self._best()[0] >= patience)

    def _validate(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Score the weights that would be kept now, in fp32, on the validation samples."""
        import torch
        import torch.nn.functional as F

        from htnet.model import HTNet
        from htnet.scoring.metrics import confusion, pooled_rates

        assert self._validation is not None
        images, labels = self._validation.images, self._validation.labels
        network: HTNet = HTNet(self._config.model)
        network.load_state_dict(weights)
        network.to(images.device).eval()
        with torch.no_grad():
            logits = torch.cat([network(part) for part in images.split(self._config.train.batch_size)])
        matrix = confusion(labels.tolist(), logits.argmax(dim=1).tolist(), self._config.model.num_classes)
        rates = {name: float(value) for name, value in pooled_rates(matrix).items()}
        return {"loss": F.cross_entropy(logits, labels).item(), **rates}

    def _best(self) -> tuple[int, float]:
        """Return the epoch with the best validation UF1 so far, the earliest of equals, and its UF1; 0 for none."""
        lines = [] if self._figures is None else [line for line in self._figures.lines if "validation" in line]
        found = [(line["validation"]["uf1"], -line["epoch"]) for line in lines]
        uf1, epoch = max(found, default=(0.0, 0))
        return -epoch, uf1

    def _keep_best(self, epoch: int, uf1: float, weights: dict[str, torch.Tensor]) -> None:
        """Keep the weights of an epoch that is better than all before, where one is chosen."""
        import safetensors.torch

        best, before = self._best()
        if not self._config.train.patience or (best and uf1 <= before):
            return
        self._folder.best.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder.best / f"{epoch}.safetensors", safetensors.torch.save(weights))
        kept = sorted(self._folder.best.glob("*.safetensors"), key=lambda path: int(path.stem))
        for old in kept[:-_KEPT_BEST]:
            old.unlink(missing_ok=True)

    def chosen(self, last: int) -> tuple[int, dict[str, torch.Tensor] | None]:
        """Return the epoch that is chosen and its weights; None for the last epoch's, where none is chosen."""
        import safetensors.torch

        if not self._config.train.patience:
            return last, None
        epoch, _ = self._best()
        path = self._folder.best / f"{epoch}.safetensors"
        if not path.is_file():
            raise InputError(f"{path}: not found; remove {self._folder.own} and train again")
        return epoch, safetensors.torch.load_file(path)

    def scores(self, epoch: int) -> dict[str, Any]:
        """Return the validation scores of an epoch as a model's facts have them; empty without validation."""
        assert self._figures is not None
        for line in self._figures.lines:
            if line.get("epoch") == epoch and "validation" in line:
                return {"validation": {**line["validation"], "samples": len(self._division.validation)}}
        return {}


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: on its GPU, or in all on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _training_flops(config: Config) -> int:
    """Count the arithmetic of a training step for a sample: a forward pass and twice as much backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from htnet.model import HTNet

    network = HTNet(replace(config.model, attention_backend="reference"))
    side = config.model.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, config.model.in_channels, side, side))
    return 3 * int(counter.get_total_flops())
