"""Guarantees of ``htnet compare``: true differences, honest probabilities, one line for what cannot be compared."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score
from test_htnet_results import make_run

from htnet.config import Config
from htnet.config.plain import dump_config
from htnet.scoring.comparison import compare_runs, differing_clips, selected_labels
from htnet.scoring.record import RecordedSample
from launch.cli import main


def random_pair(seed, subjects=6, clips=3):
    """Predictions of two runs over the same clips, which agree on two thirds of them."""
    rng = np.random.default_rng(seed)
    first, second = {}, {}
    for subject, clip in product(range(subjects), range(clips)):
        names = {"dataset": "ab"[subject % 2], "subject": str(subject), "clip": f"c{clip}"}
        sample = RecordedSample(**names, label=int(rng.integers(3)))
        first[sample] = int(rng.integers(3))
        second[sample] = first[sample] if rng.random() < 0.5 else int(rng.integers(3))
    return first, second


def uf1(run, samples):
    """UF1 of a run over some of its samples, which may come several times."""
    truth, guesses = [sample.label for sample in samples], [run[sample] for sample in samples]
    return f1_score(truth, guesses, average="macro", labels=range(3), zero_division=0)


def people_of(run):
    """Each subject's samples."""
    subjects = sorted({sample.subject for sample in run})
    return [[sample for sample in run if sample.subject == subject] for subject in subjects]


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_scores_are_scikit_learns_and_signs_follow_the_order(seed):
    first, second = random_pair(seed)
    found = compare_runs(first, second, num_classes=3, draws=0, seed=0)
    assert set(found) == {"composite", "a", "b"}
    truth = [sample.label for sample in first]
    options = {"average": "macro", "labels": range(3), "zero_division": 0}
    for run, which in ((first, "first"), (second, "second")):
        uf1 = f1_score(truth, list(run.values()), **options)
        uar = recall_score(truth, list(run.values()), **options)
        assert getattr(found["composite"]["uf1"], which) == pytest.approx(uf1)
        assert getattr(found["composite"]["uar"], which) == pytest.approx(uar)
    turned = compare_runs(second, first, num_classes=3, draws=0, seed=0)
    for row, scores in found.items():
        assert all(turned[row][name].value == pytest.approx(-score.value) for name, score in scores.items())
        assert all(score.interval is score.probability is None for score in scores.values())


def test_runs_that_are_equal_do_not_differ():
    first, _ = random_pair(1)
    for scores in compare_runs(first, first, num_classes=3, draws=200, seed=0).values():
        for score in scores.values():
            assert (score.value, score.interval, score.probability) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_probability_is_that_of_all_exchanges(seed):
    """Of the composite: 2^6 exchanges can be counted one by one."""
    first, second = random_pair(seed)
    score = compare_runs(first, second, num_classes=3, draws=20_000, seed=0)["composite"]["uf1"]
    people, samples = people_of(first), list(first)
    reached = []
    for sides in product((False, True), repeat=len(people)):
        moved = {sample for person, side in zip(people, sides, strict=True) if side for sample in person}
        one = {sample: (second if sample in moved else first)[sample] for sample in samples}
        other = {sample: (first if sample in moved else second)[sample] for sample in samples}
        reached.append(abs(uf1(other, samples) - uf1(one, samples)) >= abs(score.value) - 1e-12)
    assert score.probability == pytest.approx(np.mean(reached), abs=0.02)


def test_the_interval_is_that_of_resampled_people():
    first, second = random_pair(5, subjects=12)
    score, again = (compare_runs(first, second, num_classes=3, draws=4000, seed=0)["composite"]["uf1"] for _ in "ab")
    assert score == again
    rng, people = np.random.default_rng(9), people_of(first)
    values = []
    for _ in range(600):
        chosen = [sample for index in rng.integers(len(people), size=len(people)) for sample in people[index]]
        values.append(uf1(second, chosen) - uf1(first, chosen))
    assert score.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.03)


@pytest.fixture
def runs(tmp_path):
    """Two runs over the same clips, other predictions."""
    for name, seed in (("one", 0), ("two", 0)):
        records = make_run(seed)
        (tmp_path / name / "folds").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(dump_config(Config()))
        for record in records:
            if name == "two":
                turned = tuple(tuple((guess + 1) % 3 for guess in epoch) for epoch in record.test_predictions)
                record = replace(record, test_predictions=turned)
            record.write(tmp_path / name / "folds" / f"{record.name}.json")
    return tmp_path / "one", tmp_path / "two"


def test_the_command_writes_clips_and_a_picture(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "two less one" in text
    assert f"clips and picture: {out}" in text.replace("\n", "")
    rows = list(csv.DictReader((out / "clips.csv").open()))
    labels = [selected_labels(make_run(0), "final", "one")]
    assert len(rows) == len(labels[0])  # every prediction was turned
    assert {(int(row["one"]) + 1) % 3 == int(row["two"]) for row in rows} == {True}
    assert (out / "differences.png").read_bytes()[:4] == b"\x89PNG"
    assert differing_clips({"one": labels[0], "same": labels[0]}) == []


def other_samples(path):
    next(iter(sorted((path / "folds").glob("*.json")))).unlink()


def other_label(path):
    record = make_run(0)[0]
    samples = (replace(record.samples[0], label=(record.samples[0].label + 1) % 3), *record.samples[1:])
    replace(record, samples=samples).write(path / "folds" / f"{record.name}.json")


def other_classes(path):
    config = Config()
    (path / "config.yaml").write_text(dump_config(replace(config, model=replace(config.model, num_classes=5))))


def no_records(path):
    for record in (path / "folds").glob("*.json"):
        record.unlink()


def no_validation(path):
    for record in make_run(0, validated=False):
        record.write(path / "folds" / f"{record.name}.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_samples, "one: casme2/000/EP00 is not in two; runs are compared over the same samples"),
        (other_label, "one: casme2/000/EP00 has label"),
        (other_classes, "two: 5 classes, one has 3"),
        (no_records, "no finished fold yet"),
        (no_validation, "two: kept no predictions for selection validated"),
        (lambda path: (path / "config.yaml").unlink(), "not a run: it holds no config.yaml"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, damage, message, tmp_path, capsys):
    damage(runs[1])
    assert main(["compare", *map(str, runs), "--selection", "validated", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_compared_with_itself(runs, capsys):
    assert main(["compare", str(runs[0])]) == 2
    assert "two runs or more are compared, got 1" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(runs[0])]) == 2
    assert "a run is named twice" in capsys.readouterr().err
