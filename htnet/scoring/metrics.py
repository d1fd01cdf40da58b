"""Scores of the field from pooled counts, their uncertainty, and the scores of a guesser.

UF1 and UAR are the unweighted means over classes of F1 and of recall, computed from counts pooled over all folds
(MEGC2019 rules), never averaged over folds. A class without a sample, or without a prediction, scores 0 and still
counts in the mean: the denominator is always ``num_classes``, as in scikit-learn's ``f1_score(average="macro",
labels=range(k), zero_division=0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_CHUNK = 100_000  # resampled subjects held at once, so that a huge data set needs no huge array


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Values in 0..1, one for each metric of :data:`METRICS`."""

    uf1: float
    """Mean of F1 over all classes."""
    uar: float
    """Mean of recall over all classes."""
    accuracy: float
    """Share of right predictions; 0 without samples."""


@dataclass(frozen=True, kw_only=True)
class Scores(Rates):
    """Scores of a set of predictions; fractions in 0..1, per-class tuples in label order."""

    confusion: tuple[tuple[int, ...], ...]
    """Counts, row = true class, column = predicted class."""
    support: tuple[int, ...]
    """Samples of each class."""
    f1: tuple[float, ...]
    """2 TP / (2 TP + FP + FN) of each class; 0 where that is 0 / 0."""
    recall: tuple[float, ...]
    """TP / (TP + FN) of each class; 0 where that is 0 / 0."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Percentile bootstrap intervals over subjects, each (low, high)."""

    uf1: tuple[float, float]
    uar: tuple[float, float]
    accuracy: tuple[float, float]
    level: float


def _as_classes(values: npt.ArrayLike, num_classes: int, what: str) -> IntArray:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be whole numbers, got {array.dtype}")
    if array.min() < 0 or array.max() >= num_classes:
        raise ValueError(f"{what} must lie in 0..{num_classes - 1}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)


def confusion(labels: npt.ArrayLike, predictions: npt.ArrayLike, num_classes: int) -> IntArray:
    """Count (true class, predicted class) pairs.

    Args:
        labels: (N,) whole numbers in 0..num_classes-1.
        predictions: (N,), likewise.
        num_classes: classes to count, present or not.

    Returns:
        (num_classes, num_classes) int64, row = true class, column = predicted class.

    Raises:
        ValueError: lengths differ, or a value is no class.
    """
    truth = _as_classes(labels, num_classes, "labels")
    guess = _as_classes(predictions, num_classes, "predictions")
    if truth.shape != guess.shape or truth.ndim != 1:
        raise ValueError(f"labels and predictions must be vectors of one length, got {truth.shape} and {guess.shape}")
    counts = np.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def f1_by_class(matrices: npt.NDArray[np.generic]) -> FloatArray:
    """Return F1 of each class: (..., K, K) counts, row = true class, to (..., K) float64; 0 where it is 0 / 0."""
    counts = np.asarray(matrices, dtype=np.float64)
    hits, both = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1) + counts.sum(axis=-2)
    f1: FloatArray = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return f1


def recall_by_class(matrices: npt.NDArray[np.generic]) -> FloatArray:
    """Return recall of each class, as :func:`f1_by_class` does F1."""
    counts = np.asarray(matrices, dtype=np.float64)
    hits, true = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1)
    recall: FloatArray = np.divide(hits, true, out=np.zeros_like(true), where=true > 0)
    return recall


def accuracy(matrices: npt.NDArray[np.generic]) -> FloatArray:
    """Return the share of right predictions: (..., K, K) counts to (...) float64; 0 without samples."""
    counts = np.asarray(matrices, dtype=np.float64)
    total, hits = counts.sum(axis=(-2, -1)), np.trace(counts, axis1=-2, axis2=-1)
    share: FloatArray = np.divide(hits, total, out=np.zeros_like(total), where=total > 0)
    return share


METRICS: Mapping[str, Callable[[npt.NDArray[np.generic]], FloatArray]] = {
    "uf1": lambda matrices: f1_by_class(matrices).mean(axis=-1),
    "uar": lambda matrices: recall_by_class(matrices).mean(axis=-1),
    "accuracy": accuracy,
}
"""Functions of pooled counts, (..., K, K) to (...) float64; :class:`Rates` and :class:`Interval` have a field each."""


def pooled_rates(matrices: npt.NDArray[np.generic]) -> dict[str, FloatArray]:
    """Return every metric of each confusion matrix of a stack: (..., K, K) counts to (...) float64, by name."""
    return {name: metric(matrices) for name, metric in METRICS.items()}


def scores(labels: npt.ArrayLike, predictions: npt.ArrayLike, num_classes: int) -> Scores:
    """Score predictions pooled over all folds; arguments and errors as in :func:`confusion`."""
    matrix = confusion(labels, predictions, num_classes)
    return Scores(
        **{name: float(value) for name, value in pooled_rates(matrix).items()},
        confusion=tuple(tuple(row) for row in matrix.tolist()),
        support=tuple(matrix.sum(axis=1).tolist()),
        f1=tuple(f1_by_class(matrix).tolist()),
        recall=tuple(recall_by_class(matrix).tolist()),
    )


def subject_confusions(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, subjects: Sequence[str], num_classes: int
) -> IntArray:
    """Count the confusion matrix of each subject, in sorted order of subjects: (S, K, K) int64."""
    names, index = np.unique(np.asarray(subjects, dtype=np.str_), return_inverse=True)
    truth = _as_classes(labels, num_classes, "labels")
    guess = _as_classes(predictions, num_classes, "predictions")
    if not len(truth) == len(guess) == len(index):
        raise ValueError(f"{len(truth)} labels, {len(guess)} predictions and {len(index)} subjects must be as many")
    cells = (index * num_classes + truth) * num_classes + guess
    counts = np.bincount(cells, minlength=len(names) * num_classes**2)
    return counts.reshape(len(names), num_classes, num_classes).astype(np.int64)


def bootstrap_interval(
    matrices: npt.NDArray[np.int64], *, resamples: int, seed: int, level: float = 0.95
) -> Interval | None:
    """Bootstrap UF1, UAR and accuracy over subjects; return percentile intervals.

    Clips of one person are not independent, so whole subjects are drawn with replacement, as many as there are (Efron &
    Tibshirani 1993, chapter 13). The interval covers the choice of people; it does not cover the scatter from training
    with another seed.

    Args:
        matrices: (S, K, K) counts of each subject, as :func:`subject_confusions` gives them.
        resamples: number of resampled data sets.
        seed: the same seed gives the same interval.
        level: share of the resamples inside the interval.

    Returns:
        None for fewer than two subjects or no resamples, which allow no interval.
    """
    people, num_classes = matrices.shape[0], matrices.shape[-1]
    if people < 2 or resamples < 1:
        return None
    rng = np.random.default_rng(seed)
    flat = matrices.reshape(people, -1)
    step = max(1, _CHUNK // people)
    sums = [
        flat[rng.integers(people, size=(min(step, resamples - start), people))].sum(axis=1)
        for start in range(0, resamples, step)
    ]
    rates = pooled_rates(np.concatenate(sums).reshape(-1, num_classes, num_classes))
    tail = (1.0 - level) / 2
    limits = {name: tuple(np.quantile(values, [tail, 1.0 - tail]).tolist()) for name, values in rates.items()}
    return Interval(**limits, level=level)


def _hits_to_come(right: FloatArray) -> FloatArray:
    """Compute the distribution of right guesses among samples i and later: (n+1, n+1), row i."""
    size = len(right)
    table = np.zeros((size + 1, size + 1))
    table[size, 0] = 1.0
    for i in range(size - 1, -1, -1):
        table[i] = (1.0 - right[i]) * table[i + 1]
        table[i, 1:] += right[i] * table[i + 1, :-1]
    return table


def _best_of(pmf: FloatArray, tries: int, uniform: FloatArray) -> IntArray:
    """Draw the largest of ``tries`` independent values of ``pmf`` by inverting its distribution function."""
    above = np.append(np.cumsum(pmf[:0:-1])[::-1], 0.0)
    # P(largest <= m) = (1 - P(value > m)) ** tries, in logarithms so that rare perfect tries are not lost
    log_cdf = tries * np.log1p(-np.minimum(above, 1.0), where=above < 1.0, out=np.full_like(above, -np.inf))
    return np.searchsorted(np.exp(log_cdf), uniform, side="left").astype(np.int64)


def _guess_subject(
    labels: IntArray, prior: FloatArray, *, tries: int, trials: int, rng: np.random.Generator
) -> IntArray:
    """Draw the confusion counts of one subject's kept try, for each trial: (trials, K, K) int64."""
    num_classes = len(prior)
    table = _hits_to_come(prior[labels])
    left = _best_of(table[0], tries, rng.random(trials))
    counts = np.zeros((trials, num_classes, num_classes), dtype=np.int64)
    rows = np.arange(trials)
    for i, label in enumerate(labels.tolist()):
        reach = prior[label] * table[i + 1, np.maximum(left - 1, 0)] * (left > 0)
        hit = rng.random(trials) * table[i, left] < reach
        wrong = prior.copy()
        wrong[label] = 0.0
        edges = np.cumsum(wrong) / max(wrong.sum(), np.finfo(np.float64).tiny)
        miss = np.minimum(np.searchsorted(edges, rng.random(trials), side="right"), num_classes - 1)
        counts[rows, label, np.where(hit, label, miss)] += 1
        left = left - hit
    return counts


def chance_confusions(
    labels: npt.ArrayLike, subjects: Sequence[str], *, num_classes: int, tries: int, trials: int, seed: int
) -> IntArray:
    """Draw the confusion counts of guessers; the best of ``tries`` tries is kept for every test subject.

    The guesser draws every label from the class prior of the data. Each subject gets ``tries`` independent tries (one
    per epoch). The try with the best accuracy on that subject counts, ties to the last one, as upstream's ``<=`` does.
    Tries are independent of each other, which the epochs of a training run are not, so this bounds the worth of the
    leak from above.

    The tries are not simulated one by one. The kept try is one whose number of hits is the largest of ``tries`` draws
    (ties change nothing, because tries are exchangeable). That number is drawn from its exact distribution, and then
    one try with that many hits. The cost does not grow with ``tries``.

    Returns:
        (trials, S, K, K) int64, subjects in sorted order.

    Raises:
        ValueError: no labels, a label that is no class, or fewer than one try or trial.
    """
    truth = _as_classes(labels, num_classes, "labels")
    people = np.asarray(subjects, dtype=np.str_)
    if len(truth) == 0 or len(truth) != len(people):
        raise ValueError(
            f"chance level needs as many labels as subjects and at least one, got {len(truth)} and {len(people)}"
        )
    if tries < 1 or trials < 1:
        raise ValueError(f"tries and trials must be at least 1, got {tries} and {trials}")
    prior = np.bincount(truth, minlength=num_classes) / len(truth)
    rng = np.random.default_rng(seed)
    kept = [
        # sorted labels: the order of a subject's clips must not change the draw
        _guess_subject(np.sort(truth[people == name]), prior, tries=tries, trials=trials, rng=rng)
        for name in np.unique(people)
    ]
    return np.stack(kept, axis=1)
