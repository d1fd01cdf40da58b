"""``htnet sweep``: every LOSO fold of a store, scored; run again, it goes on where it stopped.

A grid is several such runs, of configurations and seeds, in one pool of tasks on one cluster (``grid.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that is to be finished: its configuration, its folder, and its name among others (empty: it is alone)."""

    config: Config
    out: Path
    label: str = ""


@dataclass(kw_only=True)
class _Driven:
    """The driver's view of a run while it goes on."""

    plan: Planned
    run: OpenRun
    folds: tuple[Fold, ...]
    records: dict[str, FoldRecord]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Folds of the run; ``data.subjects`` may have been wider before."""
        return len(self.records.keys() | {fold.subject for fold in self.folds})

    @property
    def todo(self) -> list[Fold]:
        """Folds that have no record."""
        return [fold for fold in self.folds if fold.subject not in self.records]

    def groups(self, ray: Any) -> list[FoldGroup]:
        """Divide the open folds: one group for each place of the cluster where folds share a process, else singly."""
        config, todo = self.plan.config.anchored(self.run.store.address), self.todo
        path, identity = self.run.path.resolve(), self.run.config_hash
        specs = [FoldSpec(config=config, fold=fold, run_dir=path, config_hash=identity, attempt=1) for fold in todo]
        size = 1
        if config.engine.name == "graphs":
            places = Nodes(ray).places(config.resources.cpus_per_fold, config.resources.gpus_per_fold)
            size = -(-len(specs) // min(places, config.resources.max_parallel_folds or places)) or 1
        starts = range(0, len(specs), size)
        return [FoldGroup(specs=tuple(specs[start : start + size]), label=self.plan.label) for start in starts]

    def finish(self, group: FoldGroup, outcome: GroupOutcome | GivenUp, board: SweepBoard) -> None:
        """Take up how the folds of a group have ended."""
        if isinstance(outcome, GroupOutcome):
            for ended in outcome.outcomes:
                self._finish_fold(ended, board)
            return
        for spec in group.specs:
            given_up = FoldOutcome(fold=spec.name, seconds=0.0, reason=outcome.reason)
            self._finish_fold(done_before(spec) if spec.record_path.exists() else given_up, board)

    def _finish_fold(self, outcome: FoldOutcome, board: SweepBoard) -> None:
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
        board.finished(outcome, self.records.get(outcome.fold), self.plan.label)

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
    return sweep_all([Planned(config=config, out=out)], address, console)


def sweep_all(plans: Sequence[Planned], address: str | None, console: Console) -> int:
    """Finish several runs in one pool; all are checked before the first starts. Returns the exit code.

    Raises:
        InputError: as of one run; or the runs ask for different places.
    """
    checked = []
    for plan in plans:
        store = open_stores(plan.config.data.store)
        checked.append((plan, store, check_folds(plan.config, store)))
    _check_resources(plans)
    with ExitStack() as stack:
        runs = [
            _take_up(plan, stack.enter_context(open_run(plan.out, plan.config, store)), folds, console)
            for plan, store, folds in checked
        ]
        cut_short = _run_folds(runs, address, console)
        for run in runs:
            _end(run, cut_short, console)
    done = sum(len(run.records) for run in runs)
    if cut_short is not None:
        say(console, f"{cut_short} with {done} of {sum(run.total for run in runs)} folds done. {RESUME}")
    complete = all(not run.todo for run in runs)
    return EXIT_DONE if complete else EXIT_PARTIAL


def _check_resources(plans: Sequence[Planned]) -> None:
    """Refuse runs that ask for different places: they share one pool."""
    first = plans[0]
    for plan in plans[1:]:
        here, there = asdict(plan.config.resources), asdict(first.config.resources)
        for key, value in here.items():
            if value != there[key]:
                raise InputError(
                    f"resources.{key}={value} in {plan.label}, {there[key]} in {first.label}: runs of a grid share "
                    "their places; set it for all with --set"
                )


def _take_up(plan: Planned, run: OpenRun, folds: tuple[Fold, ...], console: Console) -> _Driven:
    driven = _Driven(plan=plan, run=run, folds=folds, records=run.records())
    for line in run.damage:
        say(console, line)
    run.event("sweep_started", folds=driven.total, done=len(driven.records))
    if run.unlocked is not None:
        say(console, f"{plan.out}: no lock there ({run.unlocked}): nothing keeps a second driver of this run away")
    if driven.records and driven.todo:
        done = f"{len(driven.records)} of {driven.total} folds are done already"
        say(console, f"{plan.out}: {done}; going on with the rest")
    return driven


def _end(driven: _Driven, cut_short: str | None, console: Console) -> None:
    """Score a run and note how it ended."""
    run, config = driven.run, driven.plan.config
    if cut_short is not None:
        driven.records = run.records()  # a fold may have ended between the last look and the end
    records, failed = list(driven.records.values()), driven.failed
    shown = Console(quiet=True) if driven.plan.label else console  # a grid has a page for all
    finish_run(config, run, records, folds_total=driven.total, failed=failed, console=shown)
    run.event(
        "sweep_finished" if cut_short is None else "sweep_interrupted",
        done=len(records),
        failed=len(failed),
        reason=cut_short,
    )


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


def _run_folds(runs: Sequence[_Driven], address: str | None, console: Console) -> str | None:
    """Train the open folds of all runs; return what cut them short, if anything."""
    if not any(run.todo for run in runs):
        return None
    resources = runs[0].plan.config.resources
    by_place = {run.run.path.resolve(): run for run in runs}
    board = SweepBoard(
        console,
        total=sum(run.total for run in runs),
        done=[record for run in runs for record in run.records.values()],
        epochs=max(run.plan.config.train.epochs for run in runs),
        scored=len(runs) == 1,
    )

    def note(kind: str, **facts: Any) -> None:
        for run in runs:
            if "task" not in facts or str(facts["task"]).startswith(run.plan.label):
                run.run.event(kind, **facts)

    try:
        with ray_cluster(address, _needs(resources)) as ray, board:
            pool = Pool[FoldGroup, GroupOutcome](
                ray=ray,
                task=run_folds,
                retries=resources.retries,
                max_parallel=resources.max_parallel_folds,
                tasks_per_process=FOLDS_PER_PROCESS["gpu" if resources.gpus_per_fold else "cpu"],
                stall_minutes=resources.stall_minutes,
                on_look=board.poll,
                on_event=note,
            )
            for group, outcome in pool.run([group for run in runs for group in run.groups(ray)]):
                by_place[group.specs[0].run_dir].finish(group, outcome, board)
    except KeyboardInterrupt:
        return "Interrupted"
    except ClusterGoneError as error:
        return f"Stopped: {error};"
    return None


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
