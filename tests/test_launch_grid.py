"""Guarantees of a grid: each run is the one that it is alone, and the page tells spread from difference."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_htnet_results import make_run

import launch.commands.sweep
from htnet.config.plain import dump_config
from htnet.errors import InputError
from htnet.scoring.comparison import compare_runs
from htnet.scoring.grid import ensemble_labels, summarise_grid
from launch.cli import main
from launch.commands.grid import parse_seeds, sweep_grid
from launch.commands.sweep import sweep


def grid_of(records, missing=0):
    folders = {(name, seed): f"{name}/seed{seed}" for name, seeds in records.items() for seed in seeds}
    totals = {key: len(records[key[0]][key[1]]) + missing for key in folders}
    return summarise_grid(records, folders, totals, draws=50)


def seeds_of(*numbers):
    """Runs over the same clips with other predictions, by seed."""
    base = make_run(0, validated=False)
    return {
        number: [turned(record, np.random.default_rng([number, *record.fold.encode()])) for record in base]
        for number in numbers
    }


def turned(record, rng):
    count = len(record.samples)
    logits = rng.normal(size=(count, 3))
    final = tuple(int(guess) for guess in logits.argmax(1))
    return replace(
        record,
        final_logits=tuple(tuple(row) for row in logits.tolist()),
        test_predictions=(*record.test_predictions[:-1], final),
    )


def test_mean_spread_and_ensemble_are_those_of_the_seeds():
    records = {"small": seeds_of(0, 1, 2), "wide": seeds_of(5, 6)}
    small, wide = grid_of(records).configurations
    values = [run.rows["composite"]["uf1"] for run in small.runs]
    assert small.mean["composite"]["uf1"] == pytest.approx(np.mean(values))
    assert small.spread["composite"]["uf1"] == pytest.approx(np.std(values, ddof=1))
    # of one sample by hand
    first = records["small"][0][0]
    logits = np.stack([records["small"][seed][0].final_logits[0] for seed in (0, 1, 2)])
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = ensemble_labels(list(records["small"].values()))
    assert labels[first.samples[0]] == shares.mean(axis=0).argmax()
    assert small.difference == {}
    expected = compare_runs(labels, ensemble_labels(list(records["wide"].values())), num_classes=3, draws=50, seed=0)
    assert wide.difference == expected
    assert small.ensemble["composite"]["uf1"] == expected["composite"]["uf1"].first


def test_an_ensemble_waits_for_all_folds():
    small, wide = grid_of({"small": seeds_of(0, 1), "wide": seeds_of(5)}, missing=1).configurations
    assert small.ensemble == wide.ensemble == wide.difference == wide.spread == {}
    assert small.mean


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
def test_seeds_are_read_as_they_are_written(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == tuple(seeds)
    low, high = min(seeds), max(seeds)
    assert parse_seeds(f"{low}..{high}") == tuple(range(low, high + 1))


@pytest.mark.parametrize("text", ["", "4..1", "a", "1,,2", "1;2", "-1", "1..", "3,3", "0..4,7"])
def test_seeds_that_are_none_are_one_line(text):
    with pytest.raises(InputError, match=rf"^--seeds {text}: must be FIRST\.\.LAST"):
        parse_seeds(text)


@pytest.fixture(scope="module")
def grid(ray, tiny_config, tmp_path_factory):
    """Two configurations by two seeds, swept at once, and again."""
    base = tmp_path_factory.mktemp("grid")
    small = replace(tiny_config, train=replace(tiny_config.train, epochs=2))
    small = replace(small, data=replace(small.data, subjects=("casme2/sub00", "samm/sub01", "smic/sub02")))
    configs = {"small": small, "wide": replace(small, model=replace(small.model, dim=16))}
    text, out = io.StringIO(), base / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.commands.sweep, "ray_cluster", lambda address, needs: contextlib.nullcontext(ray))
        assert sweep_grid(configs, (0, 4), out, None, Console(file=text, width=100)) == 0
        alone = base / "alone"
        assert sweep(replace(configs["wide"], seed=4), alone, None, Console(quiet=True)) == 0
        before = (out / "grid.json").read_bytes()
        assert sweep_grid(configs, (0, 4), out, None, Console(file=text, width=100)) == 0
        assert (out / "grid.json").read_bytes() == before
    return configs, out, alone, text.getvalue()


def test_a_run_of_a_grid_is_the_run_alone(grid):
    _, out, alone, text = grid
    for name in ("predictions.csv", "summary.json"):
        assert (out / "wide" / "seed4" / name).read_bytes() == (alone / name).read_bytes()
    assert (out / "wide" / "seed4" / "report.html").is_file()
    assert "fold wide/seed4 samm/sub01 done in" in text
    assert "12/12 folds" in text
    assert text.count("fold wide/seed4 ") == 3  # the second time nothing was left to do
    content = json.loads((out / "grid.json").read_text())
    assert [found["name"] for found in content["configurations"]] == ["small", "wide"]
    assert [run["seed"] for run in content["configurations"][0]["runs"]] == [0, 4]


def test_the_page_of_a_grid_shows_all_of_it(grid, capsys):
    _, out, _, _ = grid
    page = (out / "grid.html").read_text()
    for text in ("small/seed0/report.html", "wide/seed4/report.html", "Against small", "ensemble", "<svg"):
        assert text in page
    assert "http" not in page.replace("http://www.w3.org", "")
    (out / "grid.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "grid.html").read_text() == page
    assert "small: UF1 " in capsys.readouterr().out


def written(configs, folder):
    """Write configurations as files of their names."""
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(dump_config(config))
    return [folder / f"{name}.yaml" for name in configs]


def test_what_is_no_grid_is_one_line(grid, tmp_path, capsys):
    configs, _, alone, _ = grid
    paths = written(configs, tmp_path)
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "small.yaml"
    twin.write_text(paths[0].read_text())
    two_places = replace(configs["wide"], resources=replace(configs["wide"].resources, cpus_per_fold=2.0))
    paths[1].write_text(dump_config(two_places))
    for arguments, message in (
        ([paths[0], twin, "--out", tmp_path / "new"], "is called small, too; rename one"),
        ([paths[0], "--seeds", "4..0", "--out", tmp_path / "new"], "--seeds 4..0: must be"),
        ([*paths, "--out", tmp_path / "new"], "resources.cpus_per_fold=2.0 in wide/seed3, 1.0 in small/seed3"),
        ([paths[0], "--seeds", "0", "--out", alone], "is a run; a grid has runs below it"),
        ([paths[0], "--seeds", "0", "--out", paths[0]], "is a file; --out names a folder"),
    ):
        assert main(["sweep", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_a_grid_is_printed_and_planned_before_it_runs(grid, tmp_path, capsys):
    configs, _, _, _ = grid
    paths = written(configs, tmp_path)
    new = str(tmp_path / "new")
    assert main(["sweep", *map(str, paths), "--out", new, "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- # small\n")
    assert "--- # wide\n" in shown
    assert main(["sweep", *map(str, paths), "--seeds", "0..1", "--out", new, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "run identity" in line] == [
        f"{name}/seed{seed}" for name in ("small", "wide") for seed in (0, 1)
    ]
    assert not (tmp_path / "new").exists()
