"""Outcome of a run from its records: ``summary.json``, ``predictions.csv`` and the challenge's log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, TypeAdapter

from htnet.data.samples import COMPOSITE
from htnet.errors import InputError
from htnet.files import csv_text, read_json, write_json
from htnet.scoring import metrics
from htnet.scoring.metrics import Interval, Rates, Scores
from htnet.scoring.published import Context, context
from htnet.scoring.record import FoldRecord
from htnet.scoring.selection import Selection, confusions_by_epoch, selected_predictions, selections_of


@dataclass(frozen=True, kw_only=True)
class FailedFold:
    """A fold that ended with an error, and the reason."""

    fold: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ScoreRow(Scores):
    """Scores of one selection on the composite or one dataset."""

    samples: int
    subjects: int
    interval: Interval | None
    """Intervals of the scores; None if none was asked for or the data allow none."""


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Mean scores of guessers, by selection and row."""

    trials: int
    """Number of guessers simulated."""
    tries: Mapping[Selection, int]
    """Number of tries of which each guesser keeps the best."""
    selections: Mapping[Selection, Mapping[str, Rates]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Content of ``RUN/summary.json``; its rows are "composite", over all datasets, and one per dataset."""

    folds_total: int
    """Number of folds in the run."""
    folds_done: int
    folds_failed: tuple[FailedFold, ...] = ()
    samples: int
    """Number of test samples in the finished folds."""
    selections: Mapping[Selection, Mapping[str, ScoreRow]] = field(default_factory=dict)
    """Scores by selection and row; empty while no fold is done."""
    chance: Annotated[Chance | None, BeforeValidator(lambda value: value or None)] = None
    """Scores of guessers; empty in the file if not asked for."""
    published: Context

    def write(self, path: Path) -> None:
        """Write the summary, whole or not at all."""
        write_json(path, self.plain())

    def plain(self) -> dict[str, Any]:
        """Return the content of the file as dicts, tuples, strings, ints and floats."""
        content = asdict(self)
        return content | {"chance": content["chance"] or {}}

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read a summary.

        Raises:
            InputError: the file cannot be read or is no summary; names file and rule.
        """
        return read_json(path, _adapter(), "summary")


@cache
def _adapter() -> TypeAdapter[Summary]:
    return TypeAdapter(Summary)


def _in_order(records: Iterable[FoldRecord], num_classes: int | None = None) -> list[FoldRecord]:
    """Return the records sorted by fold, checked to be of one run."""
    ordered = sorted(records, key=lambda record: record.fold)
    for before, after in pairwise(ordered):
        if before.fold == after.fold:
            raise InputError(f"fold {after.fold} has two records; a run has one per fold")
        for what in ("config_hash", "epochs", "num_classes"):
            one, other = getattr(before, what), getattr(after, what)
            if one != other:
                raise InputError(f"folds {before.fold} and {after.fold} differ in {what} ({one}, {other}): not one run")
    if ordered and num_classes is not None and ordered[0].num_classes != num_classes:
        raise InputError(f"fold {ordered[0].fold} tells {ordered[0].num_classes} classes apart, the run {num_classes}")
    return ordered


@dataclass(frozen=True)
class _Pool:
    """Test samples of a run, with the rows (composite, datasets) that score them."""

    labels: npt.NDArray[np.int64]
    subjects: npt.NDArray[np.str_]
    groups: Mapping[str, npt.NDArray[np.bool_]]

    @classmethod
    def of(cls, records: Sequence[FoldRecord]) -> _Pool:
        samples = [sample for record in records for sample in record.samples]
        datasets = np.asarray([sample.dataset for sample in samples], dtype=np.str_)
        groups = {COMPOSITE: np.ones(len(samples), dtype=np.bool_)}
        groups |= {str(name): datasets == name for name in np.unique(datasets)}
        subjects = np.asarray([record.fold for record in records for _ in record.samples], dtype=np.str_)
        return cls(np.asarray([sample.label for sample in samples], dtype=np.int64), subjects, groups)


def summarise(
    records: Iterable[FoldRecord],
    *,
    folds_total: int,
    failed: Mapping[str, str],
    num_classes: int,
    bootstrap: int,
    chance_trials: int,
    seed: int,
) -> Summary:
    """Score the finished folds of a run; the order of the records does not matter.

    Args:
        records: finished folds of one run.
        folds_total: number of folds in the run.
        failed: reason by fold, for folds that ended with an error. A fold with a record is done.
        num_classes: classes that count in UF1 and UAR, present or not.
        bootstrap: resamplings of subjects for the 95 % intervals; 0: no interval.
        chance_trials: simulated guessers; 0: no chance level.
        seed: of both.

    Raises:
        InputError: the records are not from one run.
    """
    ordered = _in_order(records, num_classes)
    done = {record.fold for record in ordered}
    facts: dict[str, Any] = {
        "folds_total": folds_total,
        "folds_done": len(ordered),
        "folds_failed": tuple(FailedFold(fold=f, reason=failed[f]) for f in sorted(failed) if f not in done),
        "samples": sum(len(record.samples) for record in ordered),
    }
    if not ordered:
        return Summary(**facts, published=context({}))
    pool = _Pool.of(ordered)
    selections = {
        selection: _score_rows(pool, _pooled_predictions(ordered, selection), num_classes, bootstrap, seed)
        for selection in selections_of(ordered)
    }
    chance = None
    if chance_trials:
        tries = {name: ordered[0].epochs if name == "test_selected" else 1 for name in selections}
        chance = _chance(pool, tries, num_classes=num_classes, trials=chance_trials, seed=seed)
    counts = {name: (row.samples, row.subjects) for name, row in selections["final"].items() if name != COMPOSITE}
    return Summary(**facts, selections=selections, chance=chance, published=context(counts))


def _pooled_predictions(records: Sequence[FoldRecord], selection: Selection) -> npt.NDArray[np.int64]:
    return np.concatenate([np.asarray(selected_predictions(r, selection), dtype=np.int64) for r in records])


def _score_rows(
    pool: _Pool, predictions: npt.NDArray[np.int64], num_classes: int, bootstrap: int, seed: int
) -> dict[str, ScoreRow]:
    """Score the composite and each dataset under one selection."""
    rows = {}
    for name, mask in pool.groups.items():
        labels, guesses = pool.labels[mask], predictions[mask]
        matrices = metrics.subject_confusions(labels, guesses, pool.subjects[mask].tolist(), num_classes)
        rows[name] = ScoreRow(
            **vars(metrics.scores(labels, guesses, num_classes)),
            samples=len(labels),
            subjects=len(matrices),
            interval=metrics.bootstrap_interval(matrices, resamples=bootstrap, seed=seed),
        )
    return rows


def _chance(pool: _Pool, tries: Mapping[Selection, int], *, num_classes: int, trials: int, seed: int) -> Chance:
    """Compute the mean scores of guessers, by selection and row."""
    datasets = np.asarray([subject.split("/")[0] for subject in np.unique(pool.subjects).tolist()])
    rows: dict[Selection, dict[str, Rates]] = {}
    for selection, count in tries.items():
        drawn = metrics.chance_confusions(
            pool.labels, pool.subjects.tolist(), num_classes=num_classes, tries=count, trials=trials, seed=seed
        )
        rows[selection] = {}
        for name in pool.groups:
            people = np.ones(len(datasets), dtype=np.bool_) if name == COMPOSITE else datasets == name
            rates = metrics.pooled_rates(drawn[:, people].sum(axis=1))
            # (trials, metrics), summed trial by trial: a vector's mean adds in another order, with other last bits
            means = np.stack(list(rates.values()), axis=-1).mean(axis=0).tolist()
            rows[selection][name] = Rates(**dict(zip(rates, means, strict=True)))
    return Chance(trials=trials, tries=tries, selections=rows)


def rates_by_epoch(records: Iterable[FoldRecord]) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Return each metric pooled after every epoch, by row ("composite" or dataset) and metric: (E,) float64.

    To take the best epoch of such a curve is to choose on test subjects.
    """
    ordered = _in_order(records)
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for record in ordered:
        matrices = confusions_by_epoch(record.labels, record.test_predictions, record.num_classes)
        for name in (COMPOSITE, record.samples[0].dataset):
            counts[name] = counts[name] + matrices if name in counts else matrices
    return {name: metrics.pooled_rates(matrices) for name, matrices in counts.items()}


def predictions_csv(records: Iterable[FoldRecord]) -> str:
    """Return ``RUN/predictions.csv``: dataset, subject, clip, label and a column per selection; sorted.

    Identical records give identical bytes.
    """
    ordered = _in_order(records)
    names = selections_of(ordered)
    rows = []
    for record in ordered:
        columns = zip(*(selected_predictions(record, name) for name in names), strict=True)
        for sample, guesses in zip(record.samples, columns, strict=True):
            rows.append((sample.dataset, sample.subject, sample.clip, sample.label, *guesses))
    return csv_text([("dataset", "subject", "clip", "label", *names), *sorted(rows)])


def megc_log(records: Iterable[FoldRecord], selection: Selection = "final") -> str:
    """Return the log that MEGC2019 asks for: ``casme2 sub01``, then a line ``clip label prediction`` per clip."""
    lines = []
    for record in _in_order(records):
        lines.append(f"{record.samples[0].dataset} {record.samples[0].subject}")
        guesses = selected_predictions(record, selection)
        clips = sorted(zip(record.samples, guesses, strict=True), key=lambda pair: pair[0].clip)
        lines += [f"{sample.clip} {sample.label} {guess}" for sample, guess in clips]
    return "\n".join(lines) + "\n" if lines else ""
