"""``htnet sweep``: every LOSO fold of a store, scored; run again, it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from htnet.config import Config, ResourcesConfig
from htnet.config.plain import config_hash
from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.samples import Fold
from htnet.data.store.merged import open_stores
from htnet.data.store.reader import Store
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from htnet.rules import check_fold_device, check_initial_weights, check_one_flow_size, check_samples, check_sweep_keys
from htnet.scoring.record import FoldRecord
from launch.cluster import ClusterGoneError, Needs, Nodes, ray_cluster
from launch.commands.report import finish_run
from launch.pool import GivenUp, Pool
from launch.run.folder import OpenRun, check_run, open_run
from launch.screen import RESUME, SweepBoard, say
from launch.tasks.fold import FoldOutcome, FoldSpec, done_before
from launch.tasks.group import FoldGroup, GroupOutcome, run_folds

FOLDS_PER_PROCESS = {"gpu": 1, "cpu": 16}
"""One process per fold guarantees that its GPU memory is released; on a CPU the imports (5 s) are worth sharing."""


@dataclass(kw_only=True)
class _Sweep:
    """The driver's view of a run while it goes on."""

    run: OpenRun
    board: SweepBoard
    records: dict[str, FoldRecord]
    failed: dict[str, str] = field(default_factory=dict)

    def finish(self, group: FoldGroup, outcome: GroupOutcome | GivenUp) -> None:
        """Take up how the folds of a group have ended."""
        if isinstance(outcome, GroupOutcome):
            for ended in outcome.outcomes:
                self._finish_fold(ended)
            return
        for spec in group.specs:
            given_up = FoldOutcome(fold=spec.name, seconds=0.0, reason=outcome.reason)
            self._finish_fold(done_before(spec) if spec.record_path.exists() else given_up)

    def _finish_fold(self, outcome: FoldOutcome) -> None:
        """Take up a fold's record, or the reason why there is none."""
        for aside in outcome.damage:
            self.run.event("set_aside", **asdict(aside))
        reason = outcome.reason or self._take(outcome.fold)
        if reason is None:
            self.run.event(
                "fold_done", fold=outcome.fold, seconds=round(outcome.seconds, 2), resumed_epoch=outcome.resumed_epoch
            )
        else:
            outcome = replace(outcome, reason=reason)
            self.failed[outcome.fold] = reason
            self.run.event("fold_failed", fold=outcome.fold, reason=reason, traceback=outcome.traceback)
        self.board.finished(outcome, self.records.get(outcome.fold))

    def _take(self, fold: str) -> str | None:
        """Read the record of a fold whose worker says that it is done; returns the reason where there is none."""
        path = self.run.record(fold)
        try:
            self.records[fold] = self.run.read_record(path)
        except InputError as error:
            if path.exists():
                return self.run.set_aside(path, str(error))
            return f"its worker says that it is done, but {error}; RUN must lie on storage that all nodes share"
        return None


def sweep(config: Config, out: Path, address: str | None, console: Console) -> int:
    """Run the folds that have no record yet, then score all; return the exit code."""
    store = open_stores(config.data.store)
    folds = check_folds(config, store)
    with open_run(out, config, store) as run:
        records = run.records()
        for line in run.damage:
            say(console, line)
        total = len(records.keys() | {fold.subject for fold in folds})  # data.subjects may have been wider before
        todo = [fold for fold in folds if fold.subject not in records]
        run.event("sweep_started", folds=total, done=len(records))
        if run.unlocked is not None:
            say(console, f"{out}: no lock there ({run.unlocked}): nothing keeps a second driver of this run away")
        if records and todo:
            say(console, f"{out}: {len(records)} of {total} folds are done already; going on with the rest")
        failed, cut_short = _run_folds(config, run, todo, records, address, console)
        if cut_short is not None:
            records = run.records()  # a fold may have ended between the last look and the end
        finish_run(config, run, list(records.values()), folds_total=total, failed=failed, console=console)
        run.event(
            "sweep_finished" if cut_short is None else "sweep_interrupted",
            done=len(records),
            failed=len(failed),
            reason=cut_short,
        )
    if cut_short is not None:
        say(console, f"{cut_short} with {len(records)} of {total} folds done. {RESUME}")
    return EXIT_DONE if all(fold.subject in records for fold in folds) else EXIT_PARTIAL


def check_folds(config: Config, store: Store) -> tuple[Fold, ...]:
    """Return the run's folds; refuse what would fail in every one of them, before any is started."""
    check_sweep_keys(config)
    folds = loso_folds(store, datasets=config.data.datasets, subjects=config.data.subjects)
    check_initial_weights(config, (fold.subject for fold in folds))
    for fold in folds:
        inner = validation_subjects(store, fold, config.data.validation_subjects, config.seed)
        if config.data.augment.changes_pixels:
            check_one_flow_size(store, (row for row in fold.train if store.samples[row].subject not in inner))
    check_samples(config, store, {row for fold in folds for row in (*fold.train, *fold.test)})
    check_fold_device(config)
    return folds


def _run_folds(
    config: Config,
    run: OpenRun,
    todo: Sequence[Fold],
    records: dict[str, FoldRecord],
    address: str | None,
    console: Console,
) -> tuple[dict[str, str], str | None]:
    """Return reasons of failed folds, and what cut the run short, if anything; ``records`` grows as folds finish."""
    if not todo:
        return {}, None
    absolute = config.anchored(run.store.address)
    specs = [
        FoldSpec(config=absolute, fold=fold, run_dir=run.path.resolve(), config_hash=run.config_hash, attempt=1)
        for fold in todo
    ]
    board = SweepBoard(
        console,
        total=len(records) + len(todo),
        done=records.values(),
        epochs=config.train.epochs,
    )
    state = _Sweep(run=run, board=board, records=records)
    try:
        with ray_cluster(address, _needs(config.resources)) as ray, board:
            pool = Pool[FoldGroup, GroupOutcome](
                ray=ray,
                task=run_folds,
                retries=config.resources.retries,
                max_parallel=config.resources.max_parallel_folds,
                tasks_per_process=FOLDS_PER_PROCESS["gpu" if config.resources.gpus_per_fold else "cpu"],
                stall_minutes=config.resources.stall_minutes,
                on_look=board.poll,
                on_event=run.event,
            )
            for group, outcome in pool.run(_grouped(config, specs, ray)):
                state.finish(group, outcome)
    except KeyboardInterrupt:
        return state.failed, "Interrupted"
    except ClusterGoneError as error:
        return state.failed, f"Stopped: {error};"
    return state.failed, None


def _grouped(config: Config, specs: Sequence[FoldSpec], ray: Any) -> list[FoldGroup]:
    """Divide the folds into groups: one for each place of the cluster where folds share a process, else one by one."""
    size = 1
    if config.engine.name == "graphs":
        places = Nodes(ray).places(config.resources.cpus_per_fold, config.resources.gpus_per_fold)
        size = -(-len(specs) // min(places, config.resources.max_parallel_folds or places))
    return [FoldGroup(specs=tuple(specs[start : start + size])) for start in range(0, len(specs), size)]


def _needs(resources: ResourcesConfig) -> Needs:
    return Needs(
        task="fold",
        cpus=resources.cpus_per_fold,
        gpus=resources.gpus_per_fold,
        cpus_key="resources.cpus_per_fold",
        gpus_key="resources.gpus_per_fold",
    )


def plan(config: Config, out: Path) -> list[str]:
    """Say what a sweep of this configuration would do; check the store, the folds and an existing run."""
    store = open_stores(config.data.store)
    folds = check_folds(config, store)
    samples = sum(len(fold.test) for fold in folds)
    check_run(out, config, store)
    steps = -(-max(len(fold.train) for fold in folds) // config.train.batch_size)
    share = f"{config.resources.cpus_per_fold:g} CPUs, {config.resources.gpus_per_fold:g} GPUs"
    return [
        f"store {store.path}: {len(store.rows)} samples, digest {store.digest[:12]}",
        f"{len(folds)} folds, {samples} test samples, {config.train.epochs} epochs of up to {steps} steps each",
        f"a fold takes {share}; engine {config.engine.name} {config.engine.precision}, {config.engine.threads} threads",
        f"run identity {config_hash(config, store.digest)}",
    ]
