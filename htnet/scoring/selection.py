"""Selections: rules for the epoch whose predictions of a fold count.

- ``final``: the last epoch; no choice made.
- ``validated``: per fold the epoch with the best UF1 on held-out *training* subjects, ties to the earliest.
- ``test_selected``: per fold the epoch with the best accuracy on the test subject itself, ties to the
  last, as upstream's ``<=``. It leaks the answer; it is reported for comparison and to show the worth of the leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from htnet.errors import InputError
from htnet.scoring import metrics
from htnet.scoring.record import FoldRecord

Selection = Literal["final", "validated", "test_selected"]
SELECTIONS: tuple[Selection, ...] = ("final", "validated", "test_selected")


def confusions_by_epoch(
    labels: Sequence[int], predictions: Sequence[Sequence[int]], num_classes: int
) -> npt.NDArray[np.int64]:
    """Count (true class, predicted class) pairs after each epoch: (N,) labels, E x N predictions to (E, K, K) int64."""
    return np.stack([metrics.confusion(labels, epoch, num_classes) for epoch in predictions])


def chosen_epoch(record: FoldRecord, selection: Selection) -> int:
    """Return the index of the epoch whose predictions count under ``selection`` (0 is the first epoch).

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
    matrices = confusions_by_epoch(record.validation.labels, record.validation.predictions, record.num_classes)
    # rounded: equally good epochs must tie in any order of the additions; the first is
    # the one that early stopping would have kept
    return int(np.argmax(metrics.METRICS["uf1"](matrices).round(12)))


def selected_predictions(record: FoldRecord, selection: Selection) -> tuple[int, ...]:
    """Return the predicted class of each test sample under ``selection``; errors as :func:`chosen_epoch`."""
    return record.test_predictions[chosen_epoch(record, selection)]


def selections_of(records: Iterable[FoldRecord]) -> tuple[Selection, ...]:
    """Return the selections that all records allow, in reporting order."""
    kept = [record.validation is not None for record in records]
    with_validation = bool(kept) and all(kept)
    return tuple(name for name in SELECTIONS if name != "validated" or with_validation)
