"""Guarantees of a run's records, selections, summary and predictions."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from htnet.data.samples import Sample, SampleId
from htnet.errors import InputError
from htnet.files import write_whole
from htnet.scoring.record import FoldRecord, RecordedSample, Validation, check_record, read_records
from htnet.scoring.selection import chosen_epoch, selected_predictions
from htnet.scoring.summary import Summary, megc_log, predictions_csv, rates_by_epoch, summarise

FEW = {"num_classes": 3, "bootstrap": 50, "chance_trials": 20, "seed": 0}


def make_record(fold="casme2/sub01", labels=(0, 1, 2), epochs=5, seed=0, validated=False, **changes) -> FoldRecord:
    rng = np.random.default_rng([seed, *fold.encode()])
    dataset, subject = fold.split("/")

    def guesses(size):
        return tuple(tuple(row) for row in rng.integers(3, size=(epochs, size)).tolist())

    inner = Validation(subjects=("smic/s1",) * 4, labels=(0, 0, 1, 2), predictions=guesses(4)) if validated else None
    record = FoldRecord(
        fold=fold,
        config_hash="abc",
        samples=tuple(
            RecordedSample(dataset=dataset, subject=subject, clip=f"EP{i:02d}", label=label)
            for i, label in enumerate(labels)
        ),
        test_predictions=guesses(len(labels)),
        validation=inner,
        train_loss=tuple(rng.random(epochs).tolist()),
        final_logits=tuple(tuple(row) for row in rng.normal(size=(len(labels), 3)).tolist()),
        seconds=1.5,
        environment={"device": "cpu", "threads": 1, "versions": {"torch": "2.13.0"}},
    )
    return replace(record, **changes)


def make_run(seed=0, validated=True, subjects=6) -> list[FoldRecord]:
    rng = np.random.default_rng(seed)
    folds = [f"{('casme2', 'samm', 'smic')[i % 3]}/{i:03d}" for i in range(subjects)]
    return [
        make_record(fold, tuple(rng.integers(3, size=rng.integers(1, 6)).tolist()), seed=seed, validated=validated)
        for fold in folds
    ]


def summarised(records, **settings) -> dict:
    """The summary as a reader of summary.json gets it."""
    return json.loads(json.dumps(summarise(records, **settings).plain(), allow_nan=False))


def damaged(record: FoldRecord, change) -> str:
    content = json.loads(json.dumps(asdict(record)))
    change(content)
    return json.dumps(content)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), validated=st.booleans(), count=st.integers(1, 7), epochs=st.integers(1, 6))
def test_a_record_reads_back_as_it_was_written(tmp_path_factory, seed, validated, count, epochs):
    record = make_record(labels=(1,) * count, epochs=epochs, seed=seed, validated=validated, seconds=5)
    path = tmp_path_factory.mktemp("folds") / f"{record.name}.json"
    record.write(path)
    assert FoldRecord.read(path) == record
    assert path.name == "casme2__sub01.json"
    assert json.loads(path.read_text())["format"] == 2


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda c: c.pop("samples"), "samples: Field required"),
        (lambda c: c.update(format=3), "format must be 1..2, got 3; a newer htnet"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c["test_predictions"][0].pop(), "predictions must be 5 epochs x 3 samples"),
        (lambda c: c["test_predictions"].pop(), "train_loss must have 4 epochs, got 5"),
        (lambda c: c["test_predictions"][2].__setitem__(0, 3), "predictions must lie in 0..2, got 3"),
        (lambda c: c["test_predictions"][2].__setitem__(0, "1"), "test_predictions.2.0"),
        (lambda c: c["samples"][1].update(label=-1), "labels must lie in 0..2, got -1"),
        (lambda c: c["samples"][1].update(subject="sub02"), "every sample must belong to casme2/sub01"),
        (lambda c: c["final_logits"].pop(), "final_logits must be 3 samples x classes"),
        (lambda c: c["validation"]["labels"].pop(), "validation must name a subject and a label"),
        (lambda c: c["validation"]["predictions"].pop(), "validation predictions must be 5 epochs x 4 samples"),
    ],
)
def test_a_damaged_record_is_named_with_the_rule_it_breaks(tmp_path, change, rule):
    path = tmp_path / "casme2__sub01.json"
    path.write_text(damaged(make_record(validated=True), change))
    with pytest.raises(InputError) as caught:
        FoldRecord.read(path)
    assert str(path) in str(caught.value)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["samples"][0].update(label=2),
        lambda c: c["test_predictions"][0].__setitem__(0, 2 - c["test_predictions"][0][0]),
        lambda c: c.update(seconds=1),
        lambda c: c.update(checksum=None),
        lambda c: c.update(checksum="0" * 64),
    ],
)
def test_a_record_that_was_edited_is_known_by_its_checksum(tmp_path, change):
    path = tmp_path / "casme2__sub01.json"
    make_record(test_predictions=((0, 1, 2),) * 5).write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"casme2__sub01\.json is no valid fold record: .*checksum"):
        FoldRecord.read(path)


def test_a_record_of_an_earlier_version_has_no_checksum(tmp_path):
    path = tmp_path / "casme2__sub01.json"
    make_record().write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 1, "checksum": None}))
    assert replace(FoldRecord.read(path), format=2) == make_record()
    path.write_text(json.dumps(content | {"format": 1}))  # a checksum is not got rid of by a smaller number alone
    with pytest.raises(InputError, match="format 1 has no checksum"):
        FoldRecord.read(path)


def of_store(label: int = 0, clip: str = "EP00", fold: str = "casme2/sub01") -> Sample:
    dataset, subject = fold.split("/")
    name = SampleId(dataset=dataset, subject=subject, clip=clip)
    return Sample(id=name, label=label, landmarks=((1.0, 2.0),) * 5, flow_size=28)


def test_a_record_is_held_against_store_and_run():
    """A record must be of the samples of the store and the epochs of the run."""
    inner = Validation(subjects=("smic/s1",), labels=(1,), predictions=((0,),) * 5)
    record = make_record(labels=(0, 1), validation=inner)
    right = {
        "config_hash": "abc",
        "epochs": 5,
        "test": [of_store(0), of_store(1, "EP01")],
        "validation": [of_store(1, fold="smic/s1")],
    }
    check_record(record, "x.json", **right)
    for wrong, rule in (
        ({"config_hash": "abd"}, "another configuration"),
        ({"epochs": 6}, "5 epochs, not 6"),
        ({"test": right["test"][::-1]}, "other samples or labels"),
        ({"test": right["test"][:1]}, "other samples or labels"),
        ({"test": [of_store(2), right["test"][1]]}, "other samples or labels"),
        ({"validation": []}, "other validation samples or labels"),
        ({"validation": [of_store(2, fold="smic/s1")]}, "other validation samples or labels"),
    ):
        with pytest.raises(InputError, match=f"x.json: the record is of {rule}"):
            check_record(record, "x.json", **(right | wrong))


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "fo', b"\xff\xfe", b"[]"])
def test_a_truncated_record_is_an_input_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json is no valid fold record"):
        FoldRecord.read(path)


def test_a_missing_record_and_a_misnamed_one_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        FoldRecord.read(tmp_path / "none.json")
    make_record().write(tmp_path / "casme2__sub02.json")
    with pytest.raises(InputError, match=r"whose file must be casme2__sub01\.json"):
        read_records(tmp_path)


def test_records_come_sorted_without_temporary_files(tmp_path):
    """Records of a folder come sorted and left over temporaries are ignored."""
    run = make_run()
    for record in reversed(run):
        record.write(tmp_path / f"{record.name}.json")
    (tmp_path / ".casme2__000.json.1.tmp").write_text("{")
    assert read_records(tmp_path) == sorted(run, key=lambda r: r.fold)
    assert read_records(tmp_path / "absent") == []


def test_each_selection_takes_the_epoch_it_promises():
    inner = Validation(
        subjects=("samm/006",) * 3, labels=(0, 1, 2), predictions=((0, 0, 0), (0, 1, 2), (0, 1, 2), (0, 1, 1))
    )
    record = make_record(
        epochs=4, validation=inner, test_predictions=((0, 1, 0), (0, 1, 1), (0, 0, 2), (0, 0, 0)), train_loss=(0.0,) * 4
    )
    assert chosen_epoch(record, "final") == 3
    # epochs 0, 1 and 2 have two of three right: upstream's <= keeps the last of them
    assert chosen_epoch(record, "test_selected") == 2
    # epochs 1 and 2 are perfect on validation: the earliest counts
    assert chosen_epoch(record, "validated") == 1
    assert selected_predictions(record, "validated") == (0, 1, 1)
    with pytest.raises(InputError, match="no validation predictions"):
        chosen_epoch(replace(record, validation=None), "validated")


def test_every_row_of_the_summary_scores_as_scikit_learn_does():
    run = make_run(subjects=9)
    summary = summarised(run, folds_total=9, failed={}, **FEW)
    assert list(summary["selections"]) == ["final", "validated", "test_selected"]
    for selection, rows in summary["selections"].items():
        assert list(rows) == ["composite", "casme2", "samm", "smic"]
        for name, row in rows.items():
            chosen = [r for r in run if name in ("composite", r.fold.split("/")[0])]
            labels = [label for r in chosen for label in r.labels]
            guesses = [guess for r in chosen for guess in selected_predictions(r, selection)]
            macro = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
            assert row["uf1"] == pytest.approx(f1_score(labels, guesses, **macro))
            assert row["uar"] == pytest.approx(recall_score(labels, guesses, **macro))
            assert row["accuracy"] == pytest.approx(np.mean(np.equal(labels, guesses)))
            assert row["samples"] == sum(row["support"]) == np.sum(row["confusion"]) == len(labels)
            assert row["subjects"] == len(chosen)
            low, high = row["interval"]["uf1"]
            assert 0 <= low <= high <= 1
    chance = summary["chance"]
    assert chance["tries"] == {"final": 1, "validated": 1, "test_selected": 5}
    assert chance["selections"]["test_selected"]["composite"]["uf1"] > chance["selections"]["final"]["composite"]["uf1"]
    assert summary["folds_done"] == 9
    assert summary["samples"] == sum(len(r.samples) for r in run)
    assert summary["published"]["comparable"] is False


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(6)))
def test_order_of_the_records_changes_nothing(order):
    run = make_run()
    shuffled = [run[i] for i in order]
    failed = {"smic/s9": "worker died", "samm/999": "loss is nan"}
    expected = summarised(run, folds_total=8, failed=failed, **FEW)
    mixed = dict(reversed(failed.items()))
    assert json.dumps(summarised(shuffled, folds_total=8, failed=mixed, **FEW)) == json.dumps(expected)
    assert predictions_csv(shuffled) == predictions_csv(run)
    assert megc_log(shuffled) == megc_log(run)


def test_a_summary_reads_back_and_repeats_with_its_seed(tmp_path):
    run = make_run()
    for scored in (FEW, {**FEW, "chance_trials": 0}):
        first = summarise(run, folds_total=6, failed={"a/b": "no"}, **scored)
        first.write(tmp_path / "summary.json")
        assert Summary.read(tmp_path / "summary.json") == first
        assert summarise(run, folds_total=6, failed={"a/b": "no"}, **scored) == first
        assert summarise(run, folds_total=6, failed={"a/b": "no"}, **{**scored, "seed": 1}) != first


def test_a_run_that_failed_in_part_says_which_folds_and_why():
    run = make_run()
    failed = {"smic/s9": "loss is nan in epoch 3", "samm/999": "died", run[0].fold: "died, then finished"}
    summary = summarised(run, folds_total=8, failed=failed, **FEW)
    assert summary["folds_failed"] == [
        {"fold": "samm/999", "reason": "died"},
        {"fold": "smic/s9", "reason": "loss is nan in epoch 3"},
    ]
    assert summary["folds_total"] == 8


def test_no_finished_fold_gives_a_summary_without_scores():
    """A run without a finished fold has a summary without scores."""
    summary = summarised([], folds_total=2, failed={"a/b": "no"}, **FEW)
    assert (summary["folds_done"], summary["samples"], summary["selections"], summary["chance"]) == (0, 0, {}, {})
    assert predictions_csv([]) == "dataset,subject,clip,label,final,test_selected\n"
    assert megc_log([]) == ""
    assert rates_by_epoch([]) == {}


def test_intervals_and_chance_can_be_left_out():
    """No interval and no chance level where none was asked for."""
    nothing = {"num_classes": 3, "bootstrap": 0, "chance_trials": 0, "seed": 0}
    summary = summarised(make_run(validated=False), folds_total=6, failed={}, **nothing)
    assert summary["chance"] == {}
    assert summary["selections"]["final"]["composite"]["interval"] is None
    assert "validated" not in summary["selections"]


@pytest.mark.parametrize(
    ("records", "rule"),
    [
        ([make_record(), make_record(config_hash="other")], "two records"),
        ([make_record(), make_record("samm/1", config_hash="other")], "differ in config_hash"),
        ([make_record(), make_record("samm/1", epochs=6)], "differ in epochs"),
    ],
)
def test_records_of_two_runs_are_not_scored_together(records, rule):
    """Records that are not of one run are not scored together."""
    with pytest.raises(InputError, match=rule):
        summarised(records, folds_total=2, failed={}, **FEW)
    with pytest.raises(InputError, match="classes apart, the run 5"):
        summarised([make_record()], folds_total=1, failed={}, **{**FEW, "num_classes": 5})


def test_predictions_have_a_row_per_clip(tmp_path):
    """Predictions hold a row per clip and a column per selection."""
    run = make_run()
    path = tmp_path / "predictions.csv"
    write_whole(path, predictions_csv(run))
    assert path.read_bytes() == predictions_csv(run[::-1]).encode()
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == ["dataset", "subject", "clip", "label", "final", "validated", "test_selected"]
    assert len(rows) == sum(len(r.samples) for r in run)
    keys = [(row["dataset"], row["subject"], row["clip"]) for row in rows]
    assert keys == sorted(keys)
    first = next(r for r in run if r.fold == f"{rows[0]['dataset']}/{rows[0]['subject']}")
    assert int(rows[0]["final"]) == first.test_predictions[-1][0]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_name_is_no_formula_for_a_spreadsheet(name):
    sample = RecordedSample(dataset="casme2", subject="sub01", clip=name, label=1)
    record = make_record(labels=(1,), epochs=1, test_predictions=((1,),), train_loss=(0.1,), samples=(sample,))
    [row] = csv.DictReader(predictions_csv([record]).splitlines())
    assert (row["clip"], row["label"]) == (f"'{name}", "1")


@pytest.mark.parametrize("letter", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize("kind", ["dataset", "subject", "clip"])
def test_a_name_that_would_be_several_lines_is_refused(kind, letter):
    names = {"dataset": "casme2", "subject": "sub01", "clip": "EP01"}
    with pytest.raises(InputError, match=f"the name of a {kind} must not hold a control character or line break"):
        SampleId(**names | {kind: f"a{letter}b 1 1"})
    assert str(SampleId(**names | {kind: "情 \N{NO-BREAK SPACE}é"})).count("情") == 1


def test_megc_log_has_the_challenge_layout():
    record = make_record(labels=(1, 0), epochs=1, test_predictions=((1, 2),), train_loss=(0.1,))
    assert megc_log([record]) == "casme2 sub01\nEP00 1 1\nEP01 0 2\n"


def test_the_curve_ends_at_the_final_scores():
    run = make_run()
    curves = rates_by_epoch(run)
    summary = summarised(run, folds_total=6, failed={}, **FEW)
    for name, row in summary["selections"]["final"].items():
        assert {metric: len(curve) for metric, curve in curves[name].items()} == {"uf1": 5, "uar": 5, "accuracy": 5}
        assert {metric: curve[-1] for metric, curve in curves[name].items()} == pytest.approx(
            {metric: row[metric] for metric in ("uf1", "uar", "accuracy")}
        )


def test_a_recorded_sample_is_what_identifies_the_sample():
    sample = Sample(
        id=SampleId(dataset="smic", subject="s01", clip="s1_ne_01"), label=0, landmarks=((1.0, 2.0),) * 5, flow_size=28
    )
    assert RecordedSample.of(sample) == RecordedSample(dataset="smic", subject="s01", clip="s1_ne_01", label=0)


def test_figures_compare_only_on_the_official_list(shared_data):
    """Published figures are comparable only on the official list."""
    listed = shared_data / "megc2019" / "combined_3class_gt.csv"
    if not listed.is_file():
        pytest.skip(f"{listed} not found")
    people: dict[str, list[int]] = {}
    with listed.open(encoding="utf-8") as lines:
        for dataset, subject, _, label in csv.reader(lines):
            people.setdefault(f"{dataset}/{subject}", []).append(int(label))
    run = [make_record(fold, tuple(labels)) for fold, labels in people.items()]
    context = summarised(run, folds_total=68, failed={}, **FEW)["published"]
    assert context["comparable"] is True
    assert summarised(run[1:], folds_total=68, failed={}, **FEW)["published"]["comparable"] is False
    paper = next(figure for figure in context["figures"] if figure["method"] == "HTNet, paper")
    assert (paper["uf1"], paper["uar"], paper["selection"]) == (0.8603, 0.8475, "best epoch on each test subject")
