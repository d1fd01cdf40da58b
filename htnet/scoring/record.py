"""The outcome of a run: fold records, the selections made from them, summary and predictions.

A fold record holds the test predictions of *every* epoch, so each selection is computed here,
after training, and none of them can influence it:

- ``final``: the last epoch; no choice made.
- ``validated``: per fold the epoch with the best UF1 on held-out *training* subjects, ties to the earliest.
- ``test_selected``: per fold the epoch with the best accuracy on the test subject itself, ties to the
  last, as upstream's ``<=``. It leaks the answer; it is reported to be comparable and to show its worth.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from htnet.data.samples import COMPOSITE, Sample, fold_stem
from htnet.errors import InputError
from htnet.files import write_whole
from htnet.scoring import metrics, published

FORMAT = 1
Selection = Literal["final", "validated", "test_selected"]
SELECTIONS: tuple[Selection, ...] = ("final", "validated", "test_selected")

_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class RecordedSample:
    """A test sample as a record names it."""

    dataset: str
    subject: str
    clip: str
    label: int

    __pydantic_config__ = _STRICT

    @classmethod
    def of(cls, sample: Sample) -> RecordedSample:
        """What identifies ``sample``, with its label."""
        return cls(dataset=sample.id.dataset, subject=sample.id.subject, clip=sample.id.clip, label=sample.label)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Predictions on the training subjects that a fold set aside to choose its epoch."""

    subjects: tuple[str, ...]
    """Subject of each validation sample, keyed by its dataset."""
    labels: tuple[int, ...]
    """Class of each validation sample."""
    predictions: tuple[tuple[int, ...], ...]
    """Predicted classes, epochs x samples."""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, kw_only=True)
class FoldRecord:
    """Content of ``RUN/folds/<dataset>__<subject>.json``: all that is known of a finished fold.

    Raises:
        ValueError: the parts contradict each other (numbers of samples, epochs or classes).
    """

    format: int = FORMAT
    fold: str
    """The held-out subject, ``casme2/sub01``."""
    config_hash: str
    """Identity of the configuration; records of different ones never mix."""
    samples: tuple[RecordedSample, ...]
    """Samples of the test subject."""
    test_predictions: tuple[tuple[int, ...], ...]
    """Predicted classes, epochs x samples."""
    validation: Validation | None = None
    """Where ``validated`` was asked for."""
    train_loss: tuple[float, ...]
    """Mean training loss of each epoch."""
    final_logits: tuple[tuple[float, ...], ...]
    """Logits after the last epoch, samples x classes."""
    seconds: float
    """Wall-clock time of the fold, from its first try to its record."""
    environment: Mapping[str, Any]
    """What computed it: device, precision, engine, threads, versions."""
    attempts: int = 1
    """Submissions until the fold finished."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {self.format}; a newer htnet may have written it")
        if not self.samples or not self.test_predictions:
            raise ValueError("samples and test_predictions must not be empty")
        strangers = [s for s in self.samples if f"{s.dataset}/{s.subject}" != self.fold]
        if strangers:
            raise ValueError(f"every sample must belong to {self.fold}, got {strangers[0]}")
        if {len(row) for row in self.final_logits} != {self.num_classes} or len(self.final_logits) != len(self.samples):
            raise ValueError(f"final_logits must be {len(self.samples)} samples x classes, one width")
        if len(self.train_loss) != self.epochs:
            raise ValueError(f"train_loss must have {self.epochs} epochs, got {len(self.train_loss)}")
        self._check("", [s.label for s in self.samples], self.test_predictions)
        if self.validation is not None:
            if not len(self.validation.subjects) == len(self.validation.labels) > 0:
                raise ValueError("validation must name a subject and a label for every sample, at least one")
            self._check("validation ", self.validation.labels, self.validation.predictions)

    def _check(self, what: str, labels: Sequence[int], predictions: Sequence[Sequence[int]]) -> None:
        """Predictions must be epochs x samples, labels and predictions classes."""
        if len(predictions) != self.epochs or {len(row) for row in predictions} != {len(labels)}:
            raise ValueError(f"{what}predictions must be {self.epochs} epochs x {len(labels)} samples")
        for name, values in (("labels", labels), ("predictions", np.ravel(predictions).tolist())):
            wrong = [value for value in values if not 0 <= value < self.num_classes]
            if wrong:
                raise ValueError(f"{what}{name} must lie in 0..{self.num_classes - 1}, got {wrong[0]}")

    @property
    def name(self) -> str:
        """File name stem of the record, ``casme2__sub01``."""
        return fold_stem(self.fold)

    @property
    def epochs(self) -> int:
        """Epochs with test predictions."""
        return len(self.test_predictions)

    @property
    def num_classes(self) -> int:
        """Classes told apart: the width of the logits."""
        return len(self.final_logits[0]) if self.final_logits else 0

    @property
    def labels(self) -> tuple[int, ...]:
        """Class of each test sample."""
        return tuple(sample.label for sample in self.samples)

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all; what exists counts as done."""
        write_whole(path, json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> FoldRecord:
        """Read a record.

        Raises:
            InputError: the file cannot be read or is no whole record; names file and rule.
        """
        try:
            return _adapter().validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            rule = f"{where}: {first['msg']}" if where else first["msg"]
            raise InputError(f"{path} is no valid fold record: {rule}; delete it to run the fold again") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@cache
def _adapter() -> TypeAdapter[FoldRecord]:
    return TypeAdapter(FoldRecord)


def read_records(folder: Path) -> list[FoldRecord]:
    """All records of ``RUN/folds``, sorted by fold; none where the folder does not exist.

    Raises:
        InputError: a record is damaged, or its file bears another fold's name.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = FoldRecord.read(path)
        if record.name != path.stem:
            raise InputError(f"{path} holds fold {record.fold}, whose file must be {record.name}.json")
        records.append(record)
    return sorted(records, key=lambda record: record.fold)


def _confusions_by_epoch(
    labels: Sequence[int], predictions: Sequence[Sequence[int]], num_classes: int
) -> npt.NDArray[np.int64]:
    """(E, K, K) int64 counts from (N,) labels and E x N predictions."""
    return np.stack([metrics.confusion(labels, epoch, num_classes) for epoch in predictions])


def chosen_epoch(record: FoldRecord, selection: Selection) -> int:
    """Index of the epoch whose predictions count under ``selection`` (0 is the first epoch).

    Raises:
        InputError: ``validated`` of a fold without validation predictions.
    """
    if selection == "final":
        return record.epochs - 1
    if selection == "test_selected":
        hits = (np.asarray(record.test_predictions) == np.asarray(record.labels)).sum(axis=1)
        return record.epochs - 1 - int(np.argmax(hits[::-1]))
    if record.validation is None:
        raise InputError(f"fold {record.fold} kept no validation predictions, so it has no validated epoch")
    matrices = _confusions_by_epoch(record.validation.labels, record.validation.predictions, record.num_classes)
    # rounded: epochs that are equally good must tie whatever the order of the additions; the first is
    # the one that early stopping would have kept
    return int(np.argmax(metrics.pooled_rates(matrices)[:, 0].round(12)))


def selected_predictions(record: FoldRecord, selection: Selection) -> tuple[int, ...]:
    """Predicted class of each test sample under ``selection``; errors as :func:`chosen_epoch`."""
    return record.test_predictions[chosen_epoch(record, selection)]


def selections_of(records: Iterable[FoldRecord]) -> tuple[Selection, ...]:
    """Selections that all records allow, in reporting order."""
    kept = [record.validation is not None for record in records]
    with_validation = bool(kept) and all(kept)
    return tuple(name for name in SELECTIONS if name != "validated" or with_validation)


def _in_order(records: Iterable[FoldRecord], num_classes: int | None = None) -> list[FoldRecord]:
    """Records sorted by fold, checked to be of one run."""
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
    """All test samples of a run in one row, and the rows to score: the composite and each dataset."""

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


def _score_row(
    pool: _Pool,
    mask: npt.NDArray[np.bool_],
    predictions: npt.NDArray[np.int64],
    *,
    num_classes: int,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    labels, guesses, subjects = pool.labels[mask], predictions[mask], pool.subjects[mask].tolist()
    row = metrics.scores(labels, guesses, num_classes)
    matrices = metrics.subject_confusions(labels, guesses, subjects, num_classes)
    interval = metrics.bootstrap_interval(matrices, resamples=bootstrap, seed=seed)
    # through JSON and back: what the caller holds is what a reader of summary.json gets, lists and all
    plain: dict[str, Any] = json.loads(json.dumps(asdict(row)))
    return plain | {
        "samples": len(labels),
        "subjects": len(matrices),
        "interval": None if interval is None else json.loads(json.dumps(asdict(interval))),
    }


def _chance(pool: _Pool, tries: Mapping[Selection, int], *, num_classes: int, trials: int, seed: int) -> dict[str, Any]:
    """Mean UF1, UAR and accuracy of guessers, per selection and row."""
    datasets = np.asarray([subject.split("/")[0] for subject in np.unique(pool.subjects).tolist()])
    rows: dict[str, Any] = {}
    for selection, count in tries.items():
        drawn = metrics.chance_confusions(
            pool.labels, pool.subjects.tolist(), num_classes=num_classes, tries=count, trials=trials, seed=seed
        )
        rows[selection] = {}
        for name in pool.groups:
            people = np.ones(len(datasets), dtype=np.bool_) if name == COMPOSITE else datasets == name
            means = metrics.pooled_rates(drawn[:, people].sum(axis=1)).mean(axis=0).tolist()
            rows[selection][name] = dict(zip(("uf1", "uar", "accuracy"), means, strict=True))
    return {"trials": trials, "tries": dict(tries), "selections": rows}


def _pooled_predictions(records: Sequence[FoldRecord], selection: Selection) -> npt.NDArray[np.int64]:
    return np.concatenate([np.asarray(selected_predictions(r, selection), dtype=np.int64) for r in records])


def summarise(
    records: Iterable[FoldRecord],
    *,
    folds_total: int,
    failed: Mapping[str, str],
    num_classes: int,
    bootstrap: int,
    chance_trials: int,
    seed: int,
) -> dict[str, Any]:
    """Content of ``RUN/summary.json``; the same whatever the order of the records.

    Args:
        records: finished folds of one run.
        folds_total: folds that the run consists of.
        failed: reason by fold, for folds that ended with an error. A fold with a record is done.
        num_classes: classes that count in UF1 and UAR, present or not.
        bootstrap: resamplings of subjects for the 95 % intervals; 0: ``interval`` is None.
        chance_trials: simulated guessers; 0: ``chance`` is empty.
        seed: of both.

    Returns:
        Plain dicts, lists, strings, ints and floats: ``folds_total``, ``folds_done``, ``folds_failed``
        (``[{"fold", "reason"}]``), ``samples``, ``selections`` (selection -> "composite" or dataset ->
        ``uf1, uar, accuracy, confusion, support, f1, recall, samples, subjects, interval``; empty while no
        fold is done), ``chance`` (``trials``, ``tries`` and ``selections`` as above), ``published``.

    Raises:
        InputError: the records are not of one run.
    """
    ordered = _in_order(records, num_classes)
    done = {record.fold for record in ordered}
    summary: dict[str, Any] = {
        "folds_total": folds_total,
        "folds_done": len(ordered),
        "folds_failed": [{"fold": fold, "reason": failed[fold]} for fold in sorted(failed) if fold not in done],
        "samples": sum(len(record.samples) for record in ordered),
        "selections": {},
        "chance": {},
        "published": published.context({}),
    }
    if not ordered:
        return summary
    pool = _Pool.of(ordered)
    for selection in selections_of(ordered):
        guesses = _pooled_predictions(ordered, selection)
        summary["selections"][selection] = {
            name: _score_row(pool, mask, guesses, num_classes=num_classes, bootstrap=bootstrap, seed=seed)
            for name, mask in pool.groups.items()
        }
    if chance_trials:
        tries = {name: ordered[0].epochs if name == "test_selected" else 1 for name in selections_of(ordered)}
        summary["chance"] = _chance(pool, tries, num_classes=num_classes, trials=chance_trials, seed=seed)
    rows = {name: row for name, row in summary["selections"]["final"].items() if name != COMPOSITE}
    summary["published"] = published.context({name: (row["samples"], row["subjects"]) for name, row in rows.items()})
    return summary


def rates_by_epoch(records: Iterable[FoldRecord]) -> dict[str, npt.NDArray[np.float64]]:
    """Pooled UF1, UAR and accuracy after every epoch, by row ("composite" or dataset): (E, 3) each.

    Taking the best epoch of such a curve is a choice made on test subjects, too.
    """
    ordered = _in_order(records)
    if not ordered:
        return {}
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for record in ordered:
        matrices = _confusions_by_epoch(record.labels, record.test_predictions, record.num_classes)
        for name in (COMPOSITE, record.samples[0].dataset):
            counts[name] = counts[name] + matrices if name in counts else matrices
    return {name: metrics.pooled_rates(matrices) for name, matrices in counts.items()}


def predictions_csv(records: Iterable[FoldRecord]) -> str:
    """Content of ``RUN/predictions.csv``: dataset, subject, clip, label and a column per selection; sorted."""
    ordered = _in_order(records)
    names = selections_of(ordered)
    rows = []
    for record in ordered:
        columns = zip(*(selected_predictions(record, name) for name in names), strict=True)
        for sample, guesses in zip(record.samples, columns, strict=True):
            rows.append((sample.dataset, sample.subject, sample.clip, sample.label, *guesses))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("dataset", "subject", "clip", "label", *names))
    writer.writerows(sorted(rows))
    return text.getvalue()


def write_predictions(path: Path, records: Iterable[FoldRecord]) -> None:
    """Write ``predictions.csv`` atomically; identical records give identical bytes."""
    write_whole(path, predictions_csv(records))


def megc_log(records: Iterable[FoldRecord], selection: Selection = "final") -> str:
    """Log that the MEGC2019 challenge asks for: ``casme2 sub01``, then a line ``clip label prediction`` per clip."""
    lines = []
    for record in _in_order(records):
        lines.append(f"{record.samples[0].dataset} {record.samples[0].subject}")
        guesses = selected_predictions(record, selection)
        clips = sorted(zip(record.samples, guesses, strict=True), key=lambda pair: pair[0].clip)
        lines += [f"{sample.clip} {sample.label} {guess}" for sample, guess in clips]
    return "\n".join(lines) + "\n" if lines else ""
