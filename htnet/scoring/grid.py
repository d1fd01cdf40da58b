"""Outcome of a grid: configurations by seeds, their spread, and the ensemble of each configuration's seeds.

The scores are those of selection ``final``, which chooses nothing. The ensemble averages the probabilities of the last
epoch over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from htnet.data.samples import COMPOSITE
from htnet.scoring.comparison import Difference, Labels, check_same_samples, compare_runs, selected_labels
from htnet.scoring.metrics import METRICS, confusion, pooled_rates
from htnet.scoring.record import FoldRecord, RecordedSample

__all__ = ["Configuration", "Grid", "GridRun", "ensemble_labels", "summarise_grid"]

Rows = dict[str, dict[str, float]]
"""Every score, by row: the composite, then each dataset."""


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One run of a grid."""

    seed: int
    folder: str
    """Its folder, relative to the grid's."""
    folds_done: int
    folds_total: int
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """All seeds of one configuration."""

    name: str
    runs: tuple[GridRun, ...]
    mean: Rows
    """Mean over the seeds."""
    spread: Rows
    """Standard deviation over the seeds (n - 1); empty with one seed."""
    ensemble: Rows
    """Scores of the averaged probabilities; empty while a fold is missing."""
    difference: Mapping[str, Mapping[str, Difference]]
    """Difference of the ensembles from the first configuration's, paired by subject; empty for the first one, for other
    clips or classes, and while a fold is missing."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Content of ``OUT/grid.json``."""

    configurations: tuple[Configuration, ...]

    def plain(self) -> dict[str, Any]:
        """Return the content of the file."""
        return asdict(self)


def summarise_grid(
    records: Mapping[str, Mapping[int, Sequence[FoldRecord]]],
    folders: Mapping[tuple[str, int], str],
    totals: Mapping[tuple[str, int], int],
    *,
    draws: int,
) -> Grid:
    """Score a grid.

    Args:
        records: finished folds by configuration and seed.
        folders: folder of each run.
        totals: number of folds of each run.
        draws: resamplings and permutations of the differences.
    """
    ensembles: dict[str, Labels] = {}
    for name, seeds in records.items():
        if all(len(found) == totals[name, seed] > 0 for seed, found in seeds.items()):
            ensembles[name] = ensemble_labels(list(seeds.values()))
    configurations = []
    first = next(iter(records))
    for name, seeds in records.items():
        runs = tuple(
            GridRun(
                seed=seed,
                folder=folders[name, seed],
                folds_done=len(found),
                folds_total=totals[name, seed],
                rows=_rows(selected_labels(found, "final", name), _classes(found)) if found else {},
            )
            for seed, found in seeds.items()
        )
        scored = [run.rows for run in runs if run.rows]
        classes = max((_classes(found) for found in seeds.values() if found), default=0)
        ensemble = ensembles.get(name)
        configurations.append(
            Configuration(
                name=name,
                runs=runs,
                mean=_over_seeds(scored, lambda values: float(np.mean(values))),
                spread=_over_seeds(scored, lambda values: float(np.std(values, ddof=1))) if len(scored) > 1 else {},
                ensemble={} if ensemble is None else _rows(ensemble, classes),
                difference={} if name == first else _difference(ensembles, first, name, classes, draws),
            )
        )
    return Grid(configurations=tuple(configurations))


def ensemble_labels(seeds: Sequence[Sequence[FoldRecord]]) -> dict[RecordedSample, int]:
    """Return the class of the largest mean probability after the last epoch; the seeds have the same samples.

    Raises:
        InputError: they have not.
    """
    summed: dict[RecordedSample, npt.NDArray[np.float64]] = {}
    names = [selected_labels(records, "final", f"seed {number}") for number, records in enumerate(seeds)]
    for number, labels in enumerate(names[1:], start=1):
        check_same_samples(names[0], labels, ("the first seed", f"seed number {number + 1}"))
    for records in seeds:
        for record in records:
            logits = np.asarray(record.final_logits, np.float64)
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            for sample, share in zip(record.samples, shares, strict=True):
                summed[sample] = summed.get(sample, 0.0) + share
    return {sample: int(np.argmax(share)) for sample, share in summed.items()}


def _classes(records: Sequence[FoldRecord]) -> int:
    return records[0].num_classes


def _rows(labels: Labels, classes: int) -> Rows:
    """Score predictions on the composite and on each dataset."""
    groups = {COMPOSITE: list(labels)}
    for sample in labels:
        groups.setdefault(sample.dataset, []).append(sample)
    found: Rows = {}
    for name in (COMPOSITE, *sorted(groups.keys() - {COMPOSITE})):
        samples = groups[name]
        matrix = confusion([sample.label for sample in samples], [labels[sample] for sample in samples], classes)
        found[name] = {score: float(value) for score, value in pooled_rates(matrix).items()}
    return found


def _over_seeds(rows: Sequence[Rows], reduce: Any) -> Rows:
    """Reduce each score of the rows that all seeds have."""
    if not rows:
        return {}
    names = [name for name in rows[0] if all(name in other for other in rows)]
    return {name: {score: reduce([row[name][score] for row in rows]) for score in METRICS} for name in names}


def _difference(
    ensembles: Mapping[str, Labels], first: str, name: str, classes: int, draws: int
) -> Mapping[str, Mapping[str, Difference]]:
    if first not in ensembles or name not in ensembles or ensembles[first].keys() != ensembles[name].keys():
        return {}
    return compare_runs(ensembles[first], ensembles[name], num_classes=classes, draws=draws, seed=0)
