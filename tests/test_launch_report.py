"""Guarantees of the report and of the table at the end of a sweep."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from htnet.errors import InputError
from htnet.files import write_json, write_whole
from htnet.scoring.record import FoldRecord, RecordedSample, Validation, read_records
from htnet.scoring.summary import Summary, predictions_csv, summarise
from launch import cli
from launch.report import page, summary_table
from launch.run.folder import RunFolder


def write_report(run: Path) -> Path:
    return page.write_report(RunFolder(path=run))


VOID = {"meta", "br", "line", "circle", "polyline", "link", "img"}


class Page(HTMLParser):
    """Collects text, tags and ids, and insists that every element is closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def make_run(folder: Path, folds: dict[str, int], *, failed=None, epochs=6, validated=False, chance=20) -> Summary:
    rng = np.random.default_rng(0)

    def guesses(size):
        return tuple(tuple(row) for row in rng.integers(3, size=(epochs, size)).tolist())

    (folder / "folds").mkdir(parents=True)
    for fold, size in folds.items():
        dataset, subject = fold.split("/", 1)
        inner = Validation(subjects=("a/b",) * 4, labels=(0, 1, 2, 0), predictions=guesses(4)) if validated else None
        record = FoldRecord(
            fold=fold,
            config_hash="c0ffee",
            samples=tuple(
                RecordedSample(dataset=dataset, subject=subject, clip=f"EP{i}", label=int(rng.integers(3)))
                for i in range(size)
            ),
            test_predictions=guesses(size),
            validation=inner,
            train_loss=(0.5,) * epochs,
            final_logits=((0.0, 1.0, 0.0),) * size,
            seconds=75.0,
            environment={"device": f"gpu{size % 2}", "versions": {"torch": "2.13.0"}},
        )
        record.write(folder / "folds" / f"{record.name}.json")
    records = read_records(folder / "folds")
    summary = summarise(
        records,
        folds_total=len(folds) + len(failed or {}),
        failed=failed or {},
        num_classes=3,
        bootstrap=30,
        chance_trials=chance,
        seed=0,
    )
    summary.write(folder / "summary.json")
    write_whole(folder / "predictions.csv", predictions_csv(records))
    write_json(folder / "environment.json", {"commit": "4ed83e0", "machine": {"cpus": 2}})
    (folder / "config.yaml").write_text("seed: 7\nmodel:\n  dim: 24\n")
    return summary


FOLDS = {"casme2/sub01": 4, "casme2/sub02": 3, "smic/s1": 5, "smic/s2": 2}


def test_the_report_holds_scores_intervals_and_chance(tmp_path):
    """The report holds every score with its interval and chance level."""
    summary = make_run(tmp_path / "run", FOLDS, validated=True)
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    shown = Page(path.read_text(encoding="utf-8"))
    for selection, rows in summary.selections.items():
        assert selection in shown.text
        for name, row in rows.items():
            chance = summary.chance.selections[selection][name]
            assert f"{chance.uf1:.3f} / {chance.uar:.3f}" in shown.text
            for key in ("uf1", "uar", "accuracy"):
                low, high = getattr(row.interval, key)
                assert f"{getattr(row, key):.3f} {low:.2f}\N{EN DASH}{high:.2f}" in shown.text
    assert "best of 6 tries" in shown.text
    assert "Quote validated or final instead" in shown.text


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [({}, "negative positive surprise"), ({"classes": ["happy", "sad", "<odd>"]}, "happy sad <odd>")],
)
def test_classes_bear_the_names_of_the_stores_label_scheme(tmp_path, recipe, expected):
    make_run(tmp_path / "run", FOLDS)
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"store_recipe": recipe}))
    assert expected in Page(write_report(tmp_path / "run").read_text()).text


def test_the_leaking_selection_is_labelled_as_leaking(tmp_path):
    make_run(tmp_path / "run", FOLDS)
    shown = Page(write_report(tmp_path / "run").read_text())
    assert "test_selected ⚠ epoch chosen on the test subject: leaks" in shown.text
    assert "Quote final instead" in shown.text


def test_the_report_lets_a_reader_judge_and_repeat_the_run(tmp_path):
    """The report says what is needed to judge and repeat the run."""
    make_run(tmp_path / "run", FOLDS, failed={"samm/006": "the loss became NaN in epoch 3"})
    shown = Page(write_report(tmp_path / "run").read_text())
    for text in (
        "4 of 5 folds done",
        "samm/006 the loss became NaN in epoch 3",
        "casme2/sub01 4",
        "1 min 15 s",
        "seed: 7",
        "machine.cpus 2",
        "gpu0 (2 folds), gpu1 (2 folds)",
        "htnet sweep run/config.yaml --out run-again",
        "git checkout 4ed83e0",
        "c0ffee",
        "HTNet, paper",
        "0.8603 0.8475 best epoch on each test subject",
        "context, not a comparison",
    ):
        assert text in shown.text
    assert {"polyline", "caption"} <= set(shown.tags)


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        (
            {"commit": "4ed83e0", "modified": True, "store": "/data/my stores/x"},
            [
                "git checkout 4ed83e0 # and changes that were not committed",
                """htnet sweep 'a run/config.yaml' --set 'data.store="/data/my stores/x"' --out 'a run-again'""",
                "sha256sum 'a run-again/predictions.csv'",
            ],
        ),
        (
            {"versions": {"htnet": "0.1.0"}, "store": "/data/x"},
            ["htnet --version # was 0.1.0", "htnet sweep 'a run/config.yaml' --set data.store=/data/x --out"],
        ),
    ],
)
def test_what_reproduces_a_run_can_be_pasted_into_a_shell(tmp_path, environment, lines):
    run = tmp_path / "a run"
    make_run(run, FOLDS)
    command = "htnet sweep 'my config.yaml' --out 'a run'"
    write_json(run / "environment.json", environment | {"command": command})
    shown = Page(write_report(run).read_text())
    for line in (*lines, f"This run was started as {command}"):
        assert line in shown.text


def test_every_driver_of_a_run_is_named_with_what_it_was(tmp_path):
    make_run(tmp_path / "run", FOLDS)
    later = [{"host": "node1", "versions": {"torch": "2.13.0"}}, {"host": "node2"}]
    write_json(tmp_path / "run" / "environment.json", {"host": "node0", "resumed": later})
    shown = Page(write_report(tmp_path / "run").read_text())
    for text in ("host node0", "resumed.1.host node1", "resumed.1.versions.torch 2.13.0", "resumed.2.host node2"):
        assert text in shown.text


def test_the_page_fetches_nothing_and_its_links_work(tmp_path):
    """The page fetches nothing and its own links lead somewhere."""
    make_run(tmp_path / "run", FOLDS, failed={"samm/006": "no"})
    markup = write_report(tmp_path / "run").read_text()
    shown = Page(markup)
    assert all(link.startswith("#") and link[1:] in shown.ids for link in shown.links)
    assert len(shown.ids) == len(set(shown.ids))
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    assert "url(" not in markup
    assert "@import" not in markup


def test_names_from_outside_are_text_and_never_markup(tmp_path):
    run = tmp_path / "a <i> & b"
    summary = make_run(run, {"casme2/<b>": 3, "smic/s1": 2}, failed={"samm/<script>": "<img src=x>[red]"})
    (run / "config.yaml").write_text("seed: 0 # </pre><h1>")
    markup = write_report(run).read_text()
    shown = Page(markup)
    assert "casme2/<b>" in shown.text
    assert "<b>" not in markup
    assert shown.tags.count("h1") == 1
    assert not {"b", "i", "script", "img"} & set(shown.tags)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    assert "failed samm/<script>: <img src=x>[red]" in console.export_text()


@pytest.mark.parametrize("epochs", [1, 2, 7, 800])
def test_any_number_of_epochs_makes_a_curve(tmp_path, epochs):
    make_run(tmp_path / "run", {"smic/s1": 2}, epochs=epochs)
    shown = Page(write_report(tmp_path / "run").read_text())
    assert f"after each of {epochs} epoch" in shown.text


def test_a_run_without_scores_has_a_report(tmp_path):
    """A run without scores intervals or chance levels still has a report."""
    make_run(tmp_path / "empty", {}, failed={"smic/s1": "no GPU"})
    assert "No fold is finished" in Page(write_report(tmp_path / "empty").read_text()).text
    summary = make_run(tmp_path / "plain", {"smic/s1": 2}, chance=0)
    assert summary.selections["final"]["composite"].interval is None
    assert "Chance" not in Page(write_report(tmp_path / "plain").read_text()).text


def test_scores_older_than_the_records_are_called_so(tmp_path):
    make_run(tmp_path / "run", FOLDS)
    (tmp_path / "run" / "folds" / "smic__s1.json").unlink()
    assert "scores below are older" in Page(write_report(tmp_path / "run").read_text()).text


def test_the_same_run_gives_the_same_page(tmp_path):
    make_run(tmp_path / "run", FOLDS)
    first = write_report(tmp_path / "run").read_bytes()
    assert write_report(tmp_path / "run").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("config.yaml", None, "cannot be read"),
        ("predictions.csv", None, "cannot be read"),
        ("environment.json", "{", "is no valid environment of a run: Invalid JSON"),
        ("environment.json", '{"store_recipe": null}', "store_recipe: Input should be an object"),
        (
            "environment.json",
            '{"store_recipe": {"classes": 3}}',
            r"recipe\.classes: Input should be a valid array",
        ),
        ("environment.json", '{"versions": []}', "versions: Input should be"),
        ("environment.json", '{"store": 7}', "store: Value error, must be a folder or a list"),
        ("environment.json", '{"resumed": 7}', "resumed: Input should be a valid array"),
        ("summary.json", "[]", "is no valid summary: Input should be an object"),
        ("summary.json", json.dumps({"folds_total": 1}), "folds_done: Field required"),
        ("folds/smic__s1.json", "{}", "is no valid fold record"),
    ],
)
def test_a_damaged_run_is_named_and_the_old_report_stays(tmp_path, name, content, rule):
    run = tmp_path / "run"
    make_run(run, FOLDS)
    before = write_report(run).read_bytes()
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(InputError, match=rule) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value)
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"folds_failed": [1]}', '{"folds_failed": null}', "null"])
def test_a_damaged_summary_is_refused_in_one_line_and_stays(tmp_path, capsys, content):
    make_run(tmp_path / "run", FOLDS)
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(content)
    (tmp_path / "run" / "events.jsonl").write_bytes(b'[]\n\xff\n{"event": "sweep_started", "folds": null}\n')
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"htnet report: {summary} is no valid summary: ")
    assert err.endswith("; delete it to score without the reasons of failed folds\n")
    assert err.count("\n") == 1
    assert summary.read_text() == content
    summary.unlink()
    assert cli.main(["report", str(tmp_path / "run")]) == 0


def test_the_table_fits_eighty_columns_and_names_failures(tmp_path):
    """The table of a sweep fits eighty columns and names failures."""
    summary = make_run(tmp_path / "run", FOLDS, validated=True, failed={"samm/006": "died"})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    assert "…" not in text
    for selection, rows in summary.selections.items():
        assert selection in text
        for row in rows.values():
            assert f"{row.uf1:.3f} / {row.uar:.3f}" in text
    assert "leaks" in text
    assert "4 of 5 folds, 14 samples" in text
    assert "failed samm/006: died" in text


def test_the_table_of_a_sweep_without_a_finished_fold_prints(tmp_path):
    summary = make_run(tmp_path / "run", {}, failed={"smic/s1": "no GPU"})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    assert "failed smic/s1: no GPU" in console.export_text()


def test_the_table_stays_on_the_screen_if_all_fails(tmp_path):
    """The table of a sweep stays on the screen when everything fails."""
    summary = make_run(tmp_path / "run", {}, failed={f"smic/s{i}": "no GPU" for i in range(68)})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    assert "and 58 more" in text
    assert len(text.splitlines()) < 24
