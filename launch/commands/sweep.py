"""``htnet sweep``: every LOSO fold of a store, scored; run again, it goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from htnet.config import Config
from htnet.config.identity import config_hash
from htnet.config.load import load_config
from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.samples import Fold, fold_stem
from htnet.data.store.frames import check_frames
from htnet.data.store.writer import Store, open_store
from htnet.data.stretched import check_stretched
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from htnet.scoring.record import (
    FoldRecord,
    megc_log,
    read_records,
    summarise,
    write_json_atomic,
    write_predictions,
    write_text_atomic,
)
from launch.pool import Scheduler, ray_cluster, terminable
from launch.report import summary_table, write_report
from launch.run.folder import RunFolder, check_run, open_run
from launch.screen import LiveBoard
from launch.tasks.fold import FoldOutcome, FoldSpec, tidy_up


@dataclass(kw_only=True)
class _Sweep:
    """The driver's view of a run while it goes on."""

    run: RunFolder
    board: LiveBoard
    records: dict[str, FoldRecord]
    failed: dict[str, str] = field(default_factory=dict)

    def finish(self, outcome: FoldOutcome) -> None:
        if outcome.reason is None:
            path = self.run.folds / f"{fold_stem(outcome.fold)}.json"
            try:
                self.records[outcome.fold] = FoldRecord.read(path)
            except InputError as error:
                reason = f"its worker says that it is done, but {error}; RUN must lie on storage that all nodes share"
                outcome = replace(outcome, reason=reason)
        if outcome.reason is None:
            self.run.event(
                "fold_done", fold=outcome.fold, seconds=round(outcome.seconds, 2), resumed_epoch=outcome.resumed_epoch
            )
        else:
            self.failed[outcome.fold] = outcome.reason
            self.run.event("fold_failed", fold=outcome.fold, reason=outcome.reason, traceback=outcome.traceback)
        self.board.finished(outcome, list(self.records.values()))


def sweep(config: Config, out: Path, address: str | None, console: Console) -> int:
    """Run the folds that have no record yet, then score all; returns the exit code."""
    store = open_store(Path(config.data.store))
    folds = check_folds(config, store)
    with open_run(out, config, store) as run:
        records = existing_records(run)
        for record in records.values():
            tidy_up(run.path, record.name)
        total = len(records.keys() | {fold.subject for fold in folds})  # data.subjects may have been wider before
        todo = [fold for fold in folds if fold.subject not in records]
        run.event("sweep_started", folds=total, done=len(records))
        if run.unlocked is not None:
            _say(console, f"{out}: no lock there ({run.unlocked}): nothing keeps a second driver of this run away")
        if records and todo:
            _say(console, f"{out}: {len(records)} of {total} folds are done already; going on with the rest")
        failed, interrupted = _run_folds(config, run, todo, records, address, console)
        if interrupted:
            records = existing_records(run)  # a fold may have ended between the last look and the signal
        finish_run(config, out, list(records.values()), folds_total=total, failed=failed, console=console)
        run.event("sweep_interrupted" if interrupted else "sweep_finished", done=len(records), failed=len(failed))
    if interrupted:
        console.print(f"Interrupted with {len(records)} of {total} folds done. The same command goes on from here.")
    return EXIT_DONE if all(fold.subject in records for fold in folds) else EXIT_PARTIAL


def check_folds(config: Config, store: Store) -> tuple[Fold, ...]:
    """The run's folds; refuses what would fail in every one of them, before any is started."""
    folds = loso_folds(store, datasets=config.data.datasets, subjects=config.data.subjects)
    for fold in folds:
        validation_subjects(store, fold, config.data.validation_subjects, config.seed)
    rows = {row for fold in folds for row in (*fold.train, *fold.test)}
    if config.data.input == "frames":
        check_frames(store, rows, jitter=config.data.augment.time_jitter.frames)
    check_stretched(store, rows, config.data)
    for sample in [store.samples[row] for row in rows]:
        if not 0 <= sample.label < config.model.num_classes:
            raise InputError(
                f"{store.path}: {sample.id} has label {sample.label}; model.num_classes={config.model.num_classes}"
            )
    if config.model.in_channels != 3:
        raise InputError(
            f"model.in_channels: flow input has 3 channels (flow_u, flow_v, strain), got {config.model.in_channels}"
        )
    if config.resources.gpus_per_fold > 1:
        raise InputError(
            f"resources.gpus_per_fold={config.resources.gpus_per_fold:g}: a fold trains on one device; set 1, or 1/k "
            "for k folds on a GPU"
        )
    if config.engine.device == "cuda" and config.resources.gpus_per_fold == 0:
        raise InputError("engine.device=cuda needs resources.gpus_per_fold > 0 (1, or 1/k for k folds on a GPU)")
    if config.engine.precision == "fp16" and config.resources.gpus_per_fold == 0:
        raise InputError("engine.precision=fp16 needs a GPU: set resources.gpus_per_fold, or use bf16 or fp32")
    return folds


def existing_records(run: RunFolder) -> dict[str, FoldRecord]:
    """The run's records, by subject; a record of another configuration is an error."""
    records = {record.fold: record for record in read_records(run.folds)}
    for record in records.values():
        if record.config_hash != run.config_hash:
            raise InputError(
                f"{run.folds / record.name}.json: belongs to another configuration; delete it or choose another --out"
            )
    return records


def _run_folds(
    config: Config,
    run: RunFolder,
    todo: Sequence[Fold],
    records: dict[str, FoldRecord],
    address: str | None,
    console: Console,
) -> tuple[dict[str, str], bool]:
    """Reasons of failed folds, and whether the run was interrupted; ``records`` grows as folds finish."""
    if not todo:
        return {}, False
    # workers have their own working directory
    absolute = replace(config, data=replace(config.data, store=str(Path(config.data.store).resolve())))
    specs = [
        FoldSpec(config=absolute, fold=fold, run_dir=run.path.resolve(), config_hash=run.config_hash, attempt=1)
        for fold in todo
    ]
    for path in run.progress.glob("*.json"):
        path.unlink()
    total = len(records) + len(todo)
    board = LiveBoard(
        console,
        total=total,
        done=list(records.values()),
        epochs=config.train.epochs,
        num_classes=config.model.num_classes,
    )
    state = _Sweep(run=run, board=board, records=records)
    try:
        # in this order: ray.init sets a handler of its own for SIGTERM, which would end us without a summary
        with ray_cluster(address, config.resources) as ray, terminable(), board:
            Scheduler(
                ray=ray, resources=config.resources, on_finish=state.finish, on_poll=board.poll, on_event=run.event
            ).run(specs)
    except KeyboardInterrupt:
        return state.failed, True
    return state.failed, False


def finish_run(
    config: Config,
    out: Path,
    records: Sequence[FoldRecord],
    *,
    folds_total: int,
    failed: Mapping[str, str],
    console: Console,
) -> None:
    """Score what is there: ``summary.json``, ``predictions.csv``, ``report.html`` and the table."""
    summary = summarise(
        records,
        folds_total=folds_total,
        failed=failed,
        num_classes=config.model.num_classes,
        bootstrap=config.score.bootstrap,
        chance_trials=config.score.chance_trials,
        seed=config.seed,
    )
    write_json_atomic(out / "summary.json", summary)
    write_predictions(out / "predictions.csv", records)
    write_text_atomic(out / "megc_log.txt", megc_log(records))
    report = write_report(out)
    if records:
        console.print(summary_table(summary))
    for item in summary["folds_failed"]:
        _say(console, f"failed: {item['fold']}: {item['reason']}", style="red")
    _say(console, f"report: {report}")


def _say(console: Console, line: str, style: str | None = None) -> None:
    """Print one line as it is, however narrow the terminal."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def plan(config: Config, out: Path) -> list[str]:
    """What a sweep of this configuration would do; checks the store, the folds and an existing run."""
    store = open_store(Path(config.data.store))
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


def rescore(run_dir: Path, console: Console) -> None:
    """Scores and report of a run from its records, without training; InputError when it is no run."""
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: not a run: it holds no config.yaml")
    config = load_config(run_dir / "config.yaml")
    records = read_records(run_dir / "folds")
    if not records:
        raise InputError(f"{run_dir}: no finished fold yet: {run_dir / 'folds'} holds no record")
    total, failed = max(len(records), _folds_announced(run_dir)), _known_failures(run_dir)
    finish_run(config, run_dir, records, folds_total=total, failed=failed, console=console)


def _known_failures(run_dir: Path) -> dict[str, str]:
    """Reasons of failed folds by the run's last summary; InputError where it is damaged, for nothing else holds them.

    The run of a killed driver may have no summary yet.
    """
    path = run_dir / "summary.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return {str(item["fold"]): str(item["reason"]) for item in before["folds_failed"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):  # no JSON, no such key, or something else than a mapping or a list
        raise InputError(
            f"{path}: must be a JSON object whose folds_failed lists fold and reason; delete it to score without"
        ) from None


def _folds_announced(run_dir: Path) -> int:
    """Most folds that a driver of the run set out to finish, from ``events.jsonl``; 0 where it does not tell."""
    count = 0
    with contextlib.suppress(OSError):
        for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may have cut a line short
                event = json.loads(line)
                count = max(count, int(event["folds"])) if event["event"] == "sweep_started" else count
    return count
