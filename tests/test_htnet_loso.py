"""Guarantees of the folds: every sample tested once, no person on both sides."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.samples import Sample, SampleId
from htnet.data.store.manifest import ManifestRow
from htnet.data.store.reader import Store
from htnet.errors import InputError


def made_of(*subjects: str) -> Store:
    """A store with a sample for each name, ``casme2/sub01``; it needs no files."""
    rows = []
    for number, subject in enumerate(subjects):
        dataset, name = subject.split("/", 1)
        identity = SampleId(dataset=dataset, subject=name, clip=f"c{number}")
        sample = Sample(id=identity, label=0, landmarks=((0.0, 0.0),) * 5, flow_size=28)
        rows.append(ManifestRow(sample=sample, shard="", members={}))
    return Store(path=Path("stores/x"), rows=tuple(rows), digest="d", recipe={})


SMALL = made_of("casme2/1", "casme2/1", "casme2/2", "samm/1", "samm/3", "samm/1", "smic/1")
subject_names = st.sampled_from([f"{d}/{s}" for d in ("casme2", "samm", "smic") for s in range(5)])


@settings(max_examples=100, deadline=None)
@given(st.lists(subject_names, min_size=2, max_size=40).filter(lambda names: len(set(names)) > 1))
def test_no_sample_is_tested_by_a_model_that_saw_its_person(names):
    """Every sample is tested once, and never by a model that saw its person."""
    store = made_of(*names)
    folds = loso_folds(store)
    assert [fold.subject for fold in folds] == list(dict.fromkeys(names))
    assert sorted(row for fold in folds for row in fold.test) == list(range(len(names)))
    for fold in folds:
        assert sorted((*fold.test, *fold.train)) == list(range(len(names)))
        assert list(fold.train) == sorted(fold.train)
        assert {names[row] for row in fold.test} == {fold.subject}
        assert fold.subject not in {names[row] for row in fold.train}


def test_equal_numbers_in_two_datasets_are_two_people():
    folds = {fold.subject: fold for fold in loso_folds(SMALL)}
    assert list(folds) == ["casme2/1", "casme2/2", "samm/1", "samm/3", "smic/1"]
    assert folds["samm/1"].test == (3, 5)
    assert folds["samm/1"].train == (0, 1, 2, 4, 6)
    assert folds["samm/1"].name == "samm__1"


def test_no_two_subjects_share_a_record():
    """No two subjects share a record, and ordinary names stay as they are."""
    names = ["a__b/c", "a/b__c", "a_/b", "a/_b", "a/b/c", "a/b%2Fc", "a%5F/b", "a__/b", "a/__b"]
    stems = [fold.name for fold in loso_folds(made_of(*names))]
    assert len(set(stems)) == len(names)
    assert not any("/" in stem for stem in stems)
    ordinary = {"casme3/spno.1": "casme3__spno.1", "my_set/s 1": "my_set__s 1", "4dme/b__c": "4dme__b__c"}
    assert [fold.name for fold in loso_folds(made_of(*ordinary))] == list(ordinary.values())


def test_chosen_datasets_restrict_training_and_testing():
    folds = loso_folds(SMALL, datasets=["samm", "smic"])
    assert [fold.subject for fold in folds] == ["samm/1", "samm/3", "smic/1"]
    assert all(sorted((*fold.train, *fold.test)) == [3, 4, 5, 6] for fold in folds)


def test_chosen_subjects_restrict_only_who_is_held_out():
    every = {fold.subject: fold for fold in loso_folds(SMALL)}
    chosen = loso_folds(SMALL, subjects=["smic/1", "casme2/1"])
    assert chosen == (every["casme2/1"], every["smic/1"])
    assert loso_folds(SMALL, subjects=["casme2/1", "casme2/1"]) == (every["casme2/1"],)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"datasets": ["sam"]}, "data.datasets: 'sam' is not in stores/x; it holds casme2, samm, smic"),
        ({"subjects": ["samm/2"]}, "data.subjects: 'samm/2' has no samples in stores/x; a subject is <dataset>/<id>"),
        ({"subjects": ["1"]}, "data.subjects: '1' has no samples"),
        ({"datasets": ["smic", "samm"], "subjects": ["casme2/1"]}, "'casme2/1' has no samples in stores/x, datasets"),
        ({"datasets": ["smic"]}, "stores/x: LOSO needs at least two subjects, found 1"),
    ],
)
def test_an_unknown_name_and_a_single_subject_are_input_errors(chosen, message):
    with pytest.raises(InputError) as caught:
        loso_folds(SMALL, **chosen)
    assert message in str(caught.value)


def test_a_store_with_one_subject_has_no_folds():
    with pytest.raises(InputError, match="at least two subjects, found 1"):
        loso_folds(made_of("samm/1", "samm/1"))


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(subject_names, min_size=12, max_size=30).filter(lambda names: len(set(names)) > 4),
    count=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_validation_subjects_are_never_the_tested_one(names, count, seed):
    """Validation subjects are others than the tested one, and the same each time."""
    store = made_of(*names)
    for fold in loso_folds(store):
        chosen = validation_subjects(store, fold, count, seed)
        assert len(set(chosen)) == count
        assert set(chosen) <= {names[row] for row in fold.train}
        assert fold.subject not in chosen
        assert list(chosen) == sorted(chosen)
        assert validation_subjects(store, fold, count, seed) == chosen


def test_validation_subjects_depend_on_seed_and_fold_alone():
    """Validation subjects do not depend on other folds, but on the seed and the fold."""
    store = made_of(*(f"samm/{number:03d}" for number in range(28)))
    folds = loso_folds(store)
    (alone,) = loso_folds(store, subjects=["samm/005"])
    assert validation_subjects(store, alone, 4, 0) == validation_subjects(store, folds[5], 4, 0)
    assert len({validation_subjects(store, fold, 4, 0) for fold in folds}) > 20
    assert len({validation_subjects(store, alone, 4, seed) for seed in range(20)}) > 15


def test_validation_subjects_must_leave_somebody_to_train_on():
    fold = loso_folds(SMALL)[0]
    assert len(validation_subjects(SMALL, fold, 3, 0)) == 3
    for count in (4, 5):
        with pytest.raises(InputError, match=rf"{count} of 4 training subjects of fold casme2/1 leaves none"):
            validation_subjects(SMALL, fold, count, 0)


def test_folds_of_merged_datasets_are_made_in_a_moment():
    """The folds of a store of merged datasets are made in a moment."""
    store = made_of(*(f"d{number % 5}/{number % 300}" for number in range(6000)))
    begun = time.perf_counter()
    folds = loso_folds(store)
    for fold in folds[:20]:
        validation_subjects(store, fold, 2, 0)
    assert len(folds) == 300
    assert time.perf_counter() - begun < 15  # the square of the samples would be minutes
