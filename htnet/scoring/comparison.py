"""Two runs over the same clips: the difference of their scores, and how sure it is.

Both were tested on the same people. The difference is therefore paired by subject: people are drawn together with both
of their predictions (bootstrap, for the interval), and a subject's predictions change sides at random (permutation
test, for the probability that runs which do not differ would differ so much).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htnet.data.samples import COMPOSITE
from htnet.errors import InputError
from htnet.scoring.metrics import pooled_rates, subject_confusions
from htnet.scoring.record import FoldRecord, RecordedSample
from htnet.scoring.selection import Selection, selected_predictions, selections_of

__all__ = ["Difference", "compare_runs", "differing_clips", "selected_labels"]

COMPARED = ("uf1", "uar")
_CHUNK = 2000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of two runs."""

    first: float
    second: float
    interval: tuple[float, float] | None
    """95 % of the difference, second less first, over subjects; None with fewer than two subjects."""
    probability: float | None
    """Probability of a difference at least as large, either way, between runs that do not differ (two-sided)."""

    @property
    def value(self) -> float:
        """The second run's score less the first one's."""
        return self.second - self.first


Labels = Mapping[RecordedSample, int]
"""Predicted class of each test sample."""


def selected_labels(records: Sequence[FoldRecord], selection: Selection, name: str) -> dict[RecordedSample, int]:
    """Return the predictions of the run called ``name`` under a selection.

    Raises:
        InputError: the run does not allow the selection.
    """
    if selection not in selections_of(records):
        raise InputError(f"{name}: kept no predictions for selection {selection}")
    return {
        sample: guess
        for record in records
        for sample, guess in zip(record.samples, selected_predictions(record, selection), strict=True)
    }


def check_same_samples(first: Labels, second: Labels, names: tuple[str, str]) -> None:
    """Refuse to compare runs over different samples; the message names the first one that differs.

    Raises:
        InputError: they differ.
    """
    for one, other, (here, there) in ((first, second, names), (second, first, names[::-1])):
        missing = sorted(one.keys() - other.keys(), key=_clip)
        if missing:
            sample = missing[0]
            labels = {_clip(found): found.label for found in other}
            known = labels.get(_clip(sample))
            what = f"is not in {there}" if known is None else f"has label {sample.label}, in {there} {known}"
            raise InputError(f"{here}: {'/'.join(_clip(sample))} {what}; runs are compared over the same samples")


def _clip(sample: RecordedSample) -> tuple[str, str, str]:
    return sample.dataset, sample.subject, sample.clip


def compare_runs(
    first: Labels, second: Labels, *, num_classes: int, draws: int, seed: int
) -> dict[str, dict[str, Difference]]:
    """Compare two runs on the composite and on each dataset; returns differences by row and score.

    Args:
        first, second: predictions over the same samples.
        num_classes: classes that count in the scores.
        draws: resamplings and permutations; 0: neither interval nor probability.
        seed: of both.
    """
    samples = sorted(first, key=_clip)
    labels = np.asarray([sample.label for sample in samples])
    guesses = [np.asarray([run[sample] for sample in samples]) for run in (first, second)]
    subjects = np.asarray([f"{sample.dataset}/{sample.subject}" for sample in samples])
    datasets = np.asarray([sample.dataset for sample in samples])
    rows = {COMPOSITE: np.ones(len(samples), dtype=np.bool_)}
    rows |= {str(name): datasets == name for name in np.unique(datasets)}
    found = {}
    for row, chosen in rows.items():
        people = subjects[chosen].tolist()
        pair = [subject_confusions(labels[chosen], guess[chosen], people, num_classes) for guess in guesses]
        found[row] = _paired(pair[0], pair[1], draws, np.random.default_rng(seed))
    return found


def _paired(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], draws: int, rng: np.random.Generator
) -> dict[str, Difference]:
    """Compare (S, K, K) counts of two runs."""
    people = len(first)
    scores = [pooled_rates(counts.sum(axis=0)) for counts in (first, second)]
    sure = draws > 0 and people > 1
    drawn, swapped = _draw(first, second, draws, rng) if sure else ({}, {})
    differences = {}
    for name in COMPARED:
        one, other = (float(score[name]) for score in scores)
        interval = probability = None
        if sure:
            low, high = np.quantile(drawn[name], [0.025, 0.975]).tolist()
            # rounded: equal differences must tie in any order of the additions; the one observed is counted too
            reached = np.abs(swapped[name]).round(12) >= np.round(abs(other - one), 12)
            interval, probability = (low, high), float((1 + reached.sum()) / (1 + draws))
        differences[name] = Difference(first=one, second=other, interval=interval, probability=probability)
    return differences


def _draw(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], draws: int, rng: np.random.Generator
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, npt.NDArray[np.float64]]]:
    """Return the differences of resampled people, and of runs whose predictions changed sides at random."""
    people, classes = len(first), first.shape[-1]
    flat = [counts.reshape(people, -1) for counts in (first, second)]
    change, whole = flat[1] - flat[0], flat[0].sum(axis=0)
    drawn: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in COMPARED}
    swapped: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in COMPARED}
    for start in range(0, draws, _CHUNK):
        count = min(_CHUNK, draws - start)
        times = rng.multinomial(people, np.full(people, 1 / people), size=count)  # how often each one was drawn
        sides = rng.integers(2, size=(count, people)) @ change
        for kept, pair in (
            (drawn, [times @ counts for counts in flat]),
            (swapped, [whole + sides, whole + change.sum(axis=0) - sides]),
        ):
            one, other = (pooled_rates(counts.reshape(-1, classes, classes)) for counts in pair)
            for name in COMPARED:
                kept[name].append(other[name] - one[name])
    joined = [{name: np.concatenate(parts) for name, parts in kept.items()} for kept in (drawn, swapped)]
    return joined[0], joined[1]


def differing_clips(runs: Mapping[str, Labels]) -> list[tuple[str, str, str, int, tuple[int, ...]]]:
    """List the clips that the runs do not agree on: dataset, subject, clip, label, each run's prediction; sorted."""
    samples = sorted(next(iter(runs.values())), key=_clip)
    rows = [(*_clip(sample), sample.label, tuple(run[sample] for run in runs.values())) for sample in samples]
    return [row for row in rows if len(set(row[-1])) > 1]
