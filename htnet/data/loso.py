"""Divisions of a store: the folds of LOSO, inner validation subjects, and the samples of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from htnet.config import Config
from htnet.data.samples import Fold
from htnet.data.store.reader import Store
from htnet.errors import InputError


def loso_folds(store: Store, *, datasets: Sequence[str] = (), subjects: Sequence[str] = ()) -> tuple[Fold, ...]:
    """Return one fold per subject, in the manifest's order of subjects.

    ``datasets`` restricts what is trained and tested on; ``subjects`` restricts only who is held out.
    Raises :class:`InputError` for an unknown name and for fewer than two subjects.
    """
    samples = store.samples
    present = list(dict.fromkeys(sample.id.dataset for sample in samples))
    for name in datasets:
        if name not in present:
            raise InputError(f"data.datasets: {name!r} is not in {store.path}; it holds {', '.join(present)}")
    rows = [row for row, sample in enumerate(samples) if not datasets or sample.id.dataset in datasets]
    by_subject: dict[str, list[int]] = {}
    for row in rows:
        by_subject.setdefault(samples[row].subject, []).append(row)
    for subject in subjects:
        if subject not in by_subject:
            among = f", datasets {', '.join(datasets)}" if datasets else ""
            raise InputError(
                f"data.subjects: {subject!r} has no samples in {store.path}{among}; a subject is <dataset>/<id>"
            )
    if len(by_subject) < 2:
        raise InputError(f"{store.path}: LOSO needs at least two subjects, found {len(by_subject)}")
    return tuple(
        Fold(subject=subject, test=tuple(test), train=tuple(row for row in rows if samples[row].subject != subject))
        for subject, test in by_subject.items()
        if not subjects or subject in subjects
    )


def validation_subjects(store: Store, fold: Fold, count: int, seed: int) -> tuple[str, ...]:
    """Draw ``count`` of the fold's training subjects with the run's seed; sorted.

    Raises :class:`InputError` when that would leave nobody to train on.
    """
    candidates = sorted({store.samples[row].subject for row in fold.train})
    if count >= len(candidates):
        raise InputError(
            f"data.validation_subjects: {count} of {len(candidates)} training subjects of fold {fold.subject} "
            "leaves none to train on"
        )
    # the held-out subject's name is part of the seed, so that folds draw independently of their order
    generator = np.random.default_rng([seed, *fold.subject.encode()])
    return tuple(sorted(generator.choice(candidates, size=count, replace=False).tolist()))


@dataclass(frozen=True, kw_only=True)
class Division:
    """Rows of a store that one model trains on, and those on which it is validated; none is both."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


def divide_store(store: Store, config: Config) -> Division:
    """Return the samples of one model (``htnet train``).

    Validation has ``data.validation_datasets``, ``data.subjects``, and ``data.validation_subjects`` more people, drawn
    with the seed from those that are left.

    Raises:
        InputError: an unknown name, nobody left to train on, or ``train.patience`` without validation.
    """
    data, samples = config.data, store.samples
    folds = loso_folds(store, datasets=data.datasets)
    rows = sorted(row for fold in folds for row in fold.test)
    loso_folds(store, datasets=data.datasets, subjects=data.subjects)  # unknown names are errors
    present = {samples[row].id.dataset for row in rows}
    for name in data.validation_datasets:
        if name not in present:
            raise InputError(f"data.validation_datasets: {name!r} is not among {', '.join(sorted(present))}")
    held = {samples[row].subject for row in rows if samples[row].id.dataset in data.validation_datasets}
    held |= set(data.subjects)
    left = tuple(row for row in rows if samples[row].subject not in held)
    if left and data.validation_subjects:
        held |= set(
            validation_subjects(store, Fold(subject="all", train=left, test=()), data.validation_subjects, config.seed)
        )
    train = tuple(row for row in left if samples[row].subject not in held)
    validation = tuple(row for row in rows if samples[row].subject in held)
    if not train:
        raise InputError(f"{store.path}: every sample is held out for validation: none is left to train on")
    if config.train.patience and not validation:
        raise InputError(
            f"train.patience={config.train.patience} needs validation: set data.validation_subjects, "
            "data.validation_datasets or data.subjects"
        )
    return Division(train=train, validation=validation)
