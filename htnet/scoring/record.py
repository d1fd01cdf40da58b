"""Fold records, ``RUN/folds/<dataset>__<subject>.json``: all that is known of a finished fold.

A record holds the test predictions of *every* epoch. Each selection is computed after training, and none can influence
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from htnet.data.samples import Sample, fold_stem
from htnet.errors import InputError
from htnet.files import read_json, write_whole

FORMAT = 2
"""Version of the format. Records of version 2 hold a checksum; those of version 1 have none and are still read."""

_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class RecordedSample:
    """Names and label of a test sample in a record."""

    dataset: str
    subject: str
    clip: str
    label: int

    __pydantic_config__ = _STRICT

    @classmethod
    def of(cls, sample: Sample) -> RecordedSample:
        """Return the names of ``sample`` and its label."""
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
    """Predictions of the validation subjects, if ``validated`` was asked for."""
    train_loss: tuple[float, ...]
    """Mean training loss of each epoch."""
    final_logits: tuple[tuple[float, ...], ...]
    """Logits after the last epoch, samples x classes."""
    seconds: float
    """Wall-clock time of the fold, from its first try to its record."""
    environment: Mapping[str, Any]
    """Machine and settings that computed it: device, precision, engine, threads, versions."""
    attempts: int = 1
    """Submissions until the fold finished."""
    checksum: str | None = field(default=None, compare=False)
    """SHA-256 of the rest of the file, set when the record is written; a wrong one betrays an edited record."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not 1 <= self.format <= FORMAT:
            raise ValueError(f"format must be 1..{FORMAT}, got {self.format}; a newer htnet may have written it")
        if self.format == 1 and self.checksum is not None:
            raise ValueError("format 1 has no checksum")
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
        """Check that predictions are epochs x samples, and that labels and predictions are classes."""
        if len(predictions) != self.epochs or {len(row) for row in predictions} != {len(labels)}:
            raise ValueError(f"{what}predictions must be {self.epochs} epochs x {len(labels)} samples")
        for name, values in (("labels", labels), ("predictions", np.ravel(predictions).tolist())):
            wrong = [value for value in values if not 0 <= value < self.num_classes]
            if wrong:
                raise ValueError(f"{what}{name} must lie in 0..{self.num_classes - 1}, got {wrong[0]}")

    @property
    def name(self) -> str:
        """Stem of the record's file name, ``casme2__sub01``."""
        return fold_stem(self.fold)

    @property
    def epochs(self) -> int:
        """Epochs with test predictions."""
        return len(self.test_predictions)

    @property
    def num_classes(self) -> int:
        """Number of classes: the width of the logits."""
        return len(self.final_logits[0]) if self.final_logits else 0

    @property
    def labels(self) -> tuple[int, ...]:
        """Class of each test sample."""
        return tuple(sample.label for sample in self.samples)

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all; a fold whose record exists counts as done."""
        content = asdict(self) | {"format": FORMAT, "checksum": None}
        content["checksum"] = _checksum(content)
        write_whole(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> FoldRecord:
        """Read a record.

        Raises:
            InputError: the file cannot be read, is no whole record or was changed after it was written; names file and
                rule.
        """
        record = read_json(path, _adapter(), "fold record")
        content = json.loads(path.read_bytes())
        if record.format > 1 and record.checksum != _checksum(content | {"checksum": None}):
            raise InputError(f"{path} is no valid fold record: its content was changed, for its checksum differs")
        return record


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's content as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@cache
def _adapter() -> TypeAdapter[FoldRecord]:
    return TypeAdapter(FoldRecord)


def read_records(folder: Path) -> list[FoldRecord]:
    """Read all records of ``RUN/folds``, sorted by fold; none where the folder does not exist.

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


def check_record(
    record: FoldRecord,
    place: str,
    *,
    config_hash: str,
    epochs: int,
    test: Sequence[Sample],
    validation: Sequence[Sample],
) -> None:
    """Compare a record with the run and the store that it should be from.

    Args:
        record: the record that was read at ``place``.
        config_hash: identity of the run.
        epochs: epochs that the run trains.
        test: samples of the held-out subject, in the store's order.
        validation: samples that choose the epoch, likewise; none if that is not asked for.

    Raises:
        InputError: the record differs; names the place and the first difference.
    """
    inner = record.validation or Validation(subjects=(), labels=(), predictions=())
    facts: dict[str, tuple[object, object]] = {
        "another configuration": (record.config_hash, config_hash),
        f"{record.epochs} epochs, not {epochs}": (record.epochs, epochs),
        "other samples or labels": (record.samples, tuple(RecordedSample.of(sample) for sample in test)),
        "other validation samples or labels": (
            (inner.subjects, inner.labels),
            (tuple(sample.subject for sample in validation), tuple(sample.label for sample in validation)),
        ),
    }
    for difference, (found, right) in facts.items():
        if found != right:
            raise InputError(f"{place}: the record is of {difference}")
