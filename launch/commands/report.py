"""``htnet report``: scores and report of a run from its records; also the end of every sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from htnet.config import Config
from htnet.config.load import load_config
from htnet.errors import InputError
from htnet.files import write_whole
from htnet.scoring.record import FoldRecord, read_records
from htnet.scoring.summary import Summary, megc_log, predictions_csv, summarise
from launch.report import summary_table, write_report
from launch.run.folder import RunFolder, find_store
from launch.screen import say


def rescore(path: Path, console: Console) -> None:
    """Score a run again from its records, without training.

    Raises:
        InputError: it is no run, or something in it is damaged; a line for each record that does not hold.
    """
    run = RunFolder(path=path)
    if not run.config.is_file():
        raise InputError(f"{path}: not a run: it holds no {run.config.name}")
    config = load_config(run.config)
    records = _records(run, console)
    if not records:
        raise InputError(f"{path}: no finished fold yet: {run.folds} holds no record")
    total = max(len(records), _folds_announced(run))
    finish_run(config, run, records, folds_total=total, failed=_known_failures(run), console=console)


def _records(run: RunFolder, console: Console) -> list[FoldRecord]:
    """Read the records and hold them against the store; only against themselves where it is not at hand."""
    try:
        checked = find_store(run.path)
    except InputError as error:
        say(console, f"the records are not held against the store: {error}")
        return read_records(run.folds)
    return checked.read_records()


def finish_run(
    config: Config,
    run: RunFolder,
    records: Sequence[FoldRecord],
    *,
    folds_total: int,
    failed: Mapping[str, str],
    console: Console,
) -> None:
    """Score what is there: write summary, predictions, challenge log and report, and print the table."""
    summary = summarise(
        records,
        folds_total=folds_total,
        failed=failed,
        num_classes=config.model.num_classes,
        bootstrap=config.score.bootstrap,
        chance_trials=config.score.chance_trials,
        seed=config.seed,
    )
    summary.write(run.summary)
    write_whole(run.predictions, predictions_csv(records))
    write_whole(run.challenge_log, megc_log(records))
    report = write_report(run)
    if records:
        console.print(summary_table(summary))
    for item in summary.folds_failed:
        say(console, f"failed: {item.fold}: {item.reason}", style="red")
    say(console, f"report: {report}")


def _known_failures(run: RunFolder) -> dict[str, str]:
    """Return the reasons of failed folds by the run's last summary, for nothing else holds them.

    The run of a killed driver may have no summary yet; a damaged one is an InputError.
    """
    if not run.summary.exists():
        return {}
    try:
        return {item.fold: item.reason for item in Summary.read(run.summary).folds_failed}
    except InputError as error:
        raise InputError(f"{error}; delete it to score without the reasons of failed folds") from None


def _folds_announced(run: RunFolder) -> int:
    """Return the most folds that a driver set out to finish, from ``events.jsonl``; 0 where it does not tell."""
    count = 0
    with suppress(OSError):
        for line in run.events.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a kill may have cut a line short
                event = json.loads(line)
                count = max(count, int(event["folds"])) if event["event"] == "sweep_started" else count
    return count
