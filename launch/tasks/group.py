"""Several folds in one process, each in a slot of its device; runs in a Ray worker and knows nothing of Ray.

A thread makes the next fold ready (samples, weights) while the slots train. Each fold is what it is when it is alone: a
record, or a failure that leaves its slot to the next one.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from htnet.cpu import configure_cpu
from htnet.data.store.reader import Store
from htnet.errors import InputError, NonFiniteLossError
from htnet.files import SetAside
from launch.run.progress import ProgressWriter
from launch.tasks.fold import (
    FoldData,
    FoldOutcome,
    FoldSpec,
    check_machine,
    check_node,
    done_before,
    end_fold,
    failed,
    limit_gpu_memory,
    load_data,
    loss_weights,
    make_network,
    run_fold,
    watched_sets,
)

if TYPE_CHECKING:
    import torch

    from htnet.model import HTNet
    from htnet.training.graph_engine import GraphEngine
    from htnet.training.slots import Slot
    from htnet.training.snapshot import Snapshot, Snapshots
    from htnet.training.trainer import Trainer

_IDLE_SECONDS: Final = 2e-4
_GENERATOR = threading.Lock()
"""Held by whoever uses torch's default generators: the thread that makes weights, and a snapshot that restores them."""


@dataclass(frozen=True, kw_only=True)
class FoldGroup:
    """Folds that one worker trains; a pool's spec."""

    specs: tuple[FoldSpec, ...]
    label: str = ""
    """Name of the folds' run, where several runs share a pool."""

    def again(self) -> FoldGroup:
        """Return the spec of the next attempt; folds that have a record by then are done."""
        return replace(self, specs=tuple(spec.again() for spec in self.specs))

    @property
    def name(self) -> str:
        more = f" and {len(self.specs) - 1} more" if len(self.specs) > 1 else ""
        return f"{self.label} {self.specs[0].name}{more}".strip()

    @property
    def cpus(self) -> float:
        return self.specs[0].cpus

    @property
    def gpus(self) -> float:
        return self.specs[0].gpus

    @property
    def epochs(self) -> int:
        return sum(spec.epochs for spec in self.specs)

    @property
    def progress_path(self) -> Path:
        return self.specs[0].progress_path


@dataclass(frozen=True, kw_only=True)
class GroupOutcome:
    """Answer to the driver: how each fold of a group ended; ``bad_node`` as a fold's."""

    outcomes: tuple[FoldOutcome, ...] = ()
    bad_node: str | None = None


def run_folds(group: FoldGroup) -> GroupOutcome:
    """Train the folds and write their records; a failure is an outcome, not an exception.

    With ``engine.name: graphs`` they train side by side, else one after the other.
    """
    first = group.specs[0]
    if first.config.engine.name != "graphs":
        outcomes = tuple(map(run_fold, group.specs))
        return GroupOutcome(outcomes=outcomes, bad_node=outcomes[0].bad_node)
    os.environ.pop("HTNET_ATTENTION", None)  # the driver took it into the configuration; a node's own has no say
    configure_cpu(first.config.engine.threads)
    try:
        store = check_node(first)
        check_machine(first)
    except InputError as error:
        return GroupOutcome(bad_node=str(error))
    progress = ProgressWriter(group.progress_path, start=0)
    progress.write(0, force=True)
    done = [done_before(spec) for spec in group.specs if spec.record_path.exists()]
    todo = [spec for spec in group.specs if not spec.record_path.exists()]
    return GroupOutcome(outcomes=(*done, *_Group(store, todo, progress).run()))


@dataclass(kw_only=True)
class _Attempt:
    """A fold on its way through a slot."""

    spec: FoldSpec
    snapshots: Snapshots
    started: float = field(default_factory=time.monotonic)
    damage: list[SetAside] = field(default_factory=list)
    found: Snapshot | None = None
    data: FoldData | None = None
    network: HTNet | None = None
    weights: torch.Tensor | None = None
    resumed: int = 0


class _Group:
    """The slots of a process, and the folds that go through them."""

    def __init__(self, store: Store, specs: Sequence[FoldSpec], progress: ProgressWriter) -> None:
        self._store, self._progress = store, progress
        self._waiting = deque(specs)
        self._epochs = 0

    def run(self) -> Iterator[FoldOutcome]:
        """Train all folds; yield the end of each."""
        from htnet.training.engine import resolve_device

        if not self._waiting:
            return
        config = self._waiting[0].config
        self._device = resolve_device(config.engine, config.resources.gpus_per_fold)
        limit_gpu_memory(self._device, config.resources.gpus_per_fold)
        places = min(config.resources.slots_per_gpu, len(self._waiting))
        self._places: dict[int, tuple[_Attempt, Slot] | None] = dict.fromkeys(range(places))
        self._slots: dict[int, Slot] = {}
        with ThreadPoolExecutor(1) as thread:
            ahead = self._prepare_next(thread)
            while ahead is not None or any(self._places.values()):
                free = next((place for place, held in self._places.items() if held is None), None)
                # wait for the thread only where nothing else is to be done
                if free is not None and ahead is not None and (ahead.done() or not any(self._places.values())):
                    prepared, ahead = ahead.result(), self._prepare_next(thread)
                    if isinstance(prepared, FoldOutcome):
                        yield prepared
                    elif (outcome := self._begin(free, prepared)) is not None:
                        yield outcome
                yield from self._advance()

    def _prepare_next(self, thread: ThreadPoolExecutor) -> Future[_Attempt | FoldOutcome] | None:
        return thread.submit(self._prepare, self._waiting.popleft()) if self._waiting else None

    def _prepare(self, spec: FoldSpec) -> _Attempt | FoldOutcome:
        """Load what a fold needs."""
        import torch

        from htnet.training.snapshot import Snapshots

        minutes = spec.config.resources.checkpoint_minutes
        snapshots = Snapshots(spec.snapshot_path, identity=spec.config_hash, minutes=minutes)
        attempt = _Attempt(spec=spec, snapshots=snapshots)
        try:
            attempt.found = snapshots.newest(attempt.damage)
            state = None if attempt.found is None else attempt.found.source
            attempt.data = load_data(spec, self._store, self._device, state)
            with _GENERATOR:
                network = make_network(spec.config, spec.fold)
            attempt.network = network.to(self._device)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # another stream will read it
            attempt.weights = loss_weights(spec.config, attempt.data.train_labels)
        except Exception as error:  # whatever one fold dies of, the others go on and the summary names it
            return self._failed(attempt, error)
        return attempt

    def _begin(self, place: int, attempt: _Attempt) -> FoldOutcome | None:
        """Let a fold into a free place; return its outcome if it fails already."""
        try:
            slot = self._fill(place, attempt)
        except Exception as error:
            return self._failed(attempt, error)
        self._places[place] = attempt, slot
        return None

    def _fill(self, place: int, attempt: _Attempt) -> Slot:
        import torch

        from dali_pipelines import FlowTables, padded_images
        from htnet.training.slots import Slot
        from htnet.training.trainer import Trainer

        config, data = attempt.spec.config, attempt.data
        network, attempt.network = attempt.network, None  # it is copied into the slot
        assert data is not None
        assert network is not None
        assert isinstance(data.source, FlowTables)
        images = padded_images(torch.cat([batch.images for batch in data.sets.values()]))
        if place not in self._slots:
            self._slots[place] = Slot(self._make_engine(attempt, network))
        slot = self._slots[place]
        slot.engine.prepare(data.source, images)
        slot.engine.restart(network, attempt.weights)
        watched = watched_sets(self._store, data)
        trainer = Trainer(slot.engine, data.source, config.train, watched=watched, started=attempt.started)
        if attempt.found is not None:
            with _GENERATOR:
                attempt.found.restore(trainer)
            attempt.resumed = trainer.epoch
        trainer.after_epoch = self._count_epoch
        slot.after_round = attempt.snapshots.save_when_due
        slot.take(trainer, data.source, images)
        return slot

    @staticmethod
    def _failed(attempt: _Attempt, error: Exception) -> FoldOutcome:
        """Return the outcome of an attempt that an error has ended; an error of the device itself goes on.

        The device's context is lost with such an error, and with it every other fold of this process. A new process
        goes on from their snapshots and records.
        """
        import torch

        attempt.snapshots.close()
        if isinstance(error, torch.AcceleratorError):
            raise error
        if isinstance(error, NonFiniteLossError):
            error = NonFiniteLossError(f"fold {attempt.spec.name}: {error}")
        return failed(attempt.spec, error, time.monotonic() - attempt.started, attempt.damage)

    def _make_engine(self, attempt: _Attempt, network: HTNet) -> GraphEngine:
        from htnet.training.engine import create_engine
        from htnet.training.graph_engine import GraphEngine

        config = attempt.spec.config
        weights = None if attempt.weights is None else attempt.weights.clone()
        engine = create_engine(
            copy.deepcopy(network), config.train, config.engine, device=self._device, weights=weights
        )
        assert isinstance(engine, GraphEngine)
        return engine

    def _count_epoch(self, trainer: Trainer) -> None:
        self._epochs += 1
        self._progress.write(self._epochs)

    def _advance(self) -> Iterator[FoldOutcome]:
        """Let every slot do what it can; yield the folds that have ended, and sleep a moment if nothing was to do."""
        busy = False
        for place, held in self._places.items():
            if held is None:
                continue
            attempt, slot = held
            try:
                busy |= slot.advance()
                if not slot.finished:
                    continue
                trainer = slot.trainer
                assert trainer is not None
                assert attempt.data is not None
                end_fold(attempt.spec, self._store, trainer, attempt.data)
                seconds = time.monotonic() - attempt.started
                outcome = FoldOutcome(
                    fold=attempt.spec.name,
                    seconds=seconds,
                    resumed_epoch=attempt.resumed,
                    damage=tuple(attempt.damage),
                )
            except Exception as error:  # whatever one fold dies of, the others go on
                outcome = self._failed(attempt, error)
            slot.leave()
            attempt.snapshots.close()
            if outcome.reason is None:
                attempt.spec.run.remove_leftovers(attempt.spec.name)
            self._places[place] = None
            yield outcome
        if not busy:
            time.sleep(_IDLE_SECONDS)
