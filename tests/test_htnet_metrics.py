"""Guarantees of the scores."""

from __future__ import annotations

import csv
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from htnet.scoring import metrics


@st.composite
def answers(draw):
    classes = draw(st.integers(2, 6))
    size = draw(st.integers(1, 60))
    one = st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)
    return classes, draw(one), draw(one)


@settings(max_examples=150, deadline=None)
@given(answers())
def test_scores_equal_scikit_learn_also_when_classes_are_absent(case):
    classes, labels, predictions = case
    result = metrics.scores(labels, predictions, classes)
    every = list(range(classes))
    expected = {"labels": every, "zero_division": 0}
    assert result.uf1 == pytest.approx(f1_score(labels, predictions, average="macro", **expected), abs=1e-12)
    assert result.uar == pytest.approx(recall_score(labels, predictions, average="macro", **expected), abs=1e-12)
    assert result.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert result.f1 == pytest.approx(f1_score(labels, predictions, average=None, **expected))
    assert result.recall == pytest.approx(recall_score(labels, predictions, average=None, **expected))
    assert np.array_equal(result.confusion, confusion_matrix(labels, predictions, labels=every))
    assert sum(result.support) == len(labels)


def test_a_class_nobody_shows_still_counts_in_the_mean():
    perfect = metrics.scores([0, 0, 1], [0, 0, 1], 3)
    assert perfect.uf1 == pytest.approx(2 / 3)
    assert perfect.uar == pytest.approx(2 / 3)
    assert perfect.accuracy == 1.0


def test_all_negative_on_the_composite_scores_as_noted():
    """All negative on the composite scores what the field notes say."""
    labels = [0] * 250 + [1] * 109 + [2] * 83
    result = metrics.scores(labels, [0] * 442, 3)
    assert (round(result.uf1, 3), round(result.uar, 3), round(result.accuracy, 3)) == (0.241, 0.333, 0.566)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [([0, 3], [0, 0], "labels must lie in 0..2"), ([0, 1], [0], "one length"), ([0.5], [0], "whole numbers")],
)
def test_what_is_no_class_is_refused(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion(labels, predictions, 3)


def _toy(people: int = 20, seed: int = 0):
    rng = np.random.default_rng(seed)
    subjects = [f"s/{i}" for i in rng.integers(people, size=200)]
    labels = rng.integers(3, size=200)
    predictions = np.where(rng.random(200) < 0.7, labels, rng.integers(3, size=200))
    return labels, predictions, subjects


def test_bootstrap_draws_subjects_and_repeats():
    """Bootstrap resamples whole subjects and repeats with its seed."""
    labels, predictions, subjects = _toy()
    matrices = metrics.subject_confusions(labels, predictions, subjects, 3)
    assert np.array_equal(matrices.sum(axis=0), metrics.confusion(labels, predictions, 3))
    first = metrics.bootstrap_interval(matrices, resamples=1000, seed=3)
    assert first == metrics.bootstrap_interval(matrices, resamples=1000, seed=3)
    assert first != metrics.bootstrap_interval(matrices, resamples=1000, seed=4)
    assert first is not None
    assert first.uf1[0] < metrics.scores(labels, predictions, 3).uf1 < first.uf1[1]
    # the same answers given by one person each spread more than when they come in clones of one
    clones = np.repeat(matrices[:1], 20, axis=0)
    same = metrics.bootstrap_interval(clones, resamples=100, seed=0)
    assert same is not None
    assert same.uf1[0] == pytest.approx(same.uf1[1])


def test_no_interval_is_stated_for_one_subject():
    matrix = metrics.subject_confusions([0, 1], [0, 1], ["a/1", "a/1"], 3)
    assert metrics.bootstrap_interval(matrix, resamples=100, seed=0) is None


def test_a_thousand_resamplings_are_quick():
    """A thousand resamplings of the composite take a fraction of a second."""
    matrices = np.ones((68, 3, 3), dtype=np.int64)
    start = time.perf_counter()
    metrics.bootstrap_interval(matrices, resamples=1000, seed=0)
    assert time.perf_counter() - start < 0.5


def _guess_one_by_one(labels, subjects, *, tries, trials, seed):
    """The guesser as the rule states it, try after try."""
    rng = np.random.default_rng(seed)
    labels, subjects = np.asarray(labels), np.asarray(subjects)
    prior = np.bincount(labels, minlength=3) / len(labels)
    rates = []
    for _ in range(trials):
        kept = labels.copy()
        for name in np.unique(subjects):
            mask = subjects == name
            best = -1.0
            for _ in range(tries):
                guess = rng.choice(3, size=mask.sum(), p=prior)
                accuracy = (guess == labels[mask]).mean()
                if best <= accuracy:
                    best, kept[mask] = accuracy, guess
        rates.append(list(metrics.pooled_rates(metrics.confusion(labels, kept, 3)).values()))
    return np.asarray(rates)


@pytest.mark.parametrize("tries", [1, 4])
def test_the_chance_level_equals_a_guesser_simulated_try_by_try(tries):
    labels = [0, 0, 0, 1, 0, 2, 2, 1, 0, 1, 0, 0, 2]
    subjects = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"]
    slow = _guess_one_by_one(labels, subjects, tries=tries, trials=800, seed=1)
    drawn = metrics.chance_confusions(labels, subjects, num_classes=3, tries=tries, trials=4000, seed=2)
    fast = np.stack(list(metrics.pooled_rates(drawn.sum(axis=1)).values()), axis=-1)
    standard_error = np.sqrt(slow.var(axis=0) / len(slow) + fast.var(axis=0) / len(fast))
    assert np.all(np.abs(slow.mean(axis=0) - fast.mean(axis=0)) < 4 * standard_error)
    assert np.allclose(slow.std(axis=0), fast.std(axis=0), rtol=0.15)


def test_every_sample_is_guessed_once_in_every_trial():
    labels, _, subjects = _toy()
    drawn = metrics.chance_confusions(labels, subjects, num_classes=3, tries=50, trials=7, seed=0)
    assert drawn.shape == (7, 20, 3, 3)
    assert np.array_equal(drawn.sum(axis=(1, 3)), np.tile(np.bincount(labels), (7, 1)))


def test_a_single_class_leaves_nothing_to_guess():
    drawn = metrics.chance_confusions([1, 1], ["a", "b"], num_classes=3, tries=3, trials=5, seed=0)
    assert np.all(drawn[:, :, 1, 1] == 1)


# means of 100-200 guessers simulated try by try; the field notes' 0.326, 0.582 and 0.822 are one guesser each,
# whose standard deviation is 0.022, 0.018 and 0.010
@pytest.mark.parametrize(
    ("tries", "uf1", "uar", "noted"), [(1, 0.332, 0.333, 0.326), (10, 0.583, 0.574, 0.582), (800, 0.827, 0.814, 0.822)]
)
def test_chance_of_the_official_list_is_as_documented(shared_data: Path, tries, uf1, uar, noted):
    """Chance level of the official list is the documented one."""
    listed = shared_data / "megc2019" / "combined_3class_gt.csv"
    if not listed.is_file():
        pytest.skip(f"{listed} not found")
    with listed.open(encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    subjects, labels = [f"{row[0]}/{row[1]}" for row in rows], [int(row[3]) for row in rows]
    drawn = metrics.chance_confusions(labels, subjects, num_classes=3, tries=tries, trials=1000, seed=0)
    rates = metrics.pooled_rates(drawn.sum(axis=1))
    assert [rates["uf1"].mean(), rates["uar"].mean()] == pytest.approx([uf1, uar], abs=0.003)
    assert abs(rates["uf1"].mean() - noted) < 2 * rates["uf1"].std()


def test_every_metric_has_a_place_in_scores_and_intervals():
    named = {field.name for field in fields(metrics.Rates)}
    assert named == metrics.METRICS.keys()
    assert {field.name for field in fields(metrics.Interval)} == named | {"level"}
