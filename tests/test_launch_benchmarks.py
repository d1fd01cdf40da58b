"""The end-to-end benchmark compares networks that compute the same, and says so when they do not."""

from __future__ import annotations

import csv
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_htnet_model import CASES, golden_config, load_golden, relative_error

from htnet import HTNet, HTNetConfig
from htnet.config.load import dump_config, load_config
from kernels.benchmarks.record import check_columns
from launch.benchmarks import apex, end_to_end, flow, head_motion
from launch.benchmarks.end_to_end import (
    BASELINE,
    PROVIDERS,
    Measurement,
    append_csv,
    check_equal,
    environment,
    first_epoch,
    make_batches,
    measure,
    table,
)
from launch.benchmarks.upstream import UpstreamHTNet

ROOT = Path(__file__).resolve().parents[1]
TINY = HTNetConfig(image_size=8, patch_size=2, dim=12, heads=3, depths=(1, 1, 1))


@pytest.mark.parametrize("case", CASES)
def test_the_restatement_of_upstream_computes_the_golden_logits(case):
    golden = load_golden(case)
    model = UpstreamHTNet(golden_config(golden))
    model.load_state_dict({k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if "state/" in k})
    assert relative_error(model(torch.from_numpy(golden["input"])), torch.from_numpy(golden["logits"])) < 1e-5


@pytest.mark.slow
def test_providers_are_timed_in_pairs_with_upstream(monkeypatch):
    """Checked providers are timed in pairs with upstream, and no more than two processes live at a time."""
    names = [BASELINE, "torch engine, fp32", "DeepSpeed engine, bf16"]
    alive, timed = [], end_to_end._timed_epoch

    def watched(pipe):
        alive.append(len(multiprocessing.active_children()))
        return timed(pipe)

    monkeypatch.setattr(end_to_end, "_timed_epoch", watched)
    measurements = measure(names, TINY, (8, 6), rounds=2, threads=1)
    assert [m.provider for m in measurements] == names
    assert [len(m.seconds) for m in measurements] == [4, 2, 2]
    assert measurements[0].ratio == 1.0
    assert all(m.ratio == m.baseline / statistics.median(m.seconds) for m in measurements)
    assert set(alive) == {2}
    assert multiprocessing.active_children() == []
    assert table(measurements, environment()).row_count == 3


@pytest.mark.slow
def test_upstream_alone_can_be_timed():
    (alone,) = measure([BASELINE], TINY, (8, 6), rounds=2, threads=1)
    assert (len(alone.seconds), alone.ratio) == (2, 1.0)


def test_results_are_appended_under_one_header(tmp_path):
    out = tmp_path / "new" / "results.csv"
    measurement = Measurement(provider=BASELINE, seconds=(2.0, 4.0), cpu_share=0.9, baseline=6.0)
    for _ in range(2):
        append_csv(out, [measurement], (8, 6), environment())
    header = out.read_text().splitlines()[0]
    assert header == ",".join(end_to_end.COLUMNS)
    first, second = csv.DictReader(out.read_text().splitlines())
    assert (first["provider"], first["n"], first["median_s"], first["batches"]) == (BASELINE, "2", "3.0", "8+6")
    assert (second["ratio_to_upstream"], second["upstream_beside_s"]) == ("2.0", "6.0")
    assert "" not in first.values()


def test_kept_results_have_the_columns_that_are_written():
    """The results that are kept have the columns that are written."""
    from launch.benchmarks import input as profile_input

    kept = ROOT / "docs" / "benchmarks" / "results"
    check_columns(kept / end_to_end.RESULTS, end_to_end.COLUMNS)
    check_columns(kept / profile_input.RESULTS, profile_input._columns())


@pytest.mark.parametrize("benchmark", [apex, flow, head_motion])
def test_a_place_that_cannot_hold_results_is_refused_first(tmp_path, capsys, benchmark):
    """A place that cannot hold results is refused before anything is measured."""
    (tmp_path / "other.csv").write_text("a,b\n")
    wrong = {tmp_path / "other.csv": "holds other columns", tmp_path / "other.csv" / "x.csv": "is a file"}
    for out, message in wrong.items():
        with pytest.raises(SystemExit) as done:
            benchmark.main(["--out", str(out)])
        assert done.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "other.csv").read_text() == "a,b\n"


def test_only_providers_that_compute_as_upstream_are_timed():
    """Every provider computes what upstream does, and one that does not is not timed."""
    torch.manual_seed(0)
    state = HTNet(TINY).state_dict()
    batches = make_batches(TINY, (8, 6))
    found = {name: first_epoch(build(TINY, state), batches) for name, build in PROVIDERS.items()}
    for name, values in found.items():
        check_equal(name, values, found[BASELINE])
    wrong = found["torch engine, fp32"] | {"logits before": found[BASELINE]["logits before"] + 1}
    with pytest.raises(RuntimeError, match="torch engine, fp32: logits before is off by"):
        check_equal("torch engine, fp32", wrong, found[BASELINE])


def test_apexes_are_found_by_both_ways_and_recorded(tmp_path, capsys):
    out = tmp_path / "apex.csv"
    for _ in range(2):
        assert apex.main(["--out", str(out), "--subjects", "1", "--clips", "2", "--image-size", "64"]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["provider"], row["difficulty"]) for row in rows[:4]] == [
        (provider, difficulty) for difficulty in ("easy", "realistic") for provider in ("flow", "grey differences")
    ]
    assert len(rows) == 8
    assert all(row["clips"] == "18" and int(row["exact"]) <= 18 and float(row["min_cpu_s"]) > 0 for row in rows)
    assert "apexes of synthetic clips" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_every_head_motion_is_scored_on_the_same_clips(tmp_path, capsys):
    out, config = tmp_path / "head_motion.csv", load_config(ROOT / "configs" / "demo.yaml")
    config = replace(
        config,
        prepare=replace(config.prepare, working_size=48),
        train=replace(config.train, epochs=1),
        engine=replace(config.engine, name="torch"),
        data=replace(config.data, validation_subjects=0),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    sizes = ["--seeds", "1", "--subjects", "1", "--clips", "2", "--image-size", "64"]
    assert head_motion.main(["--out", str(out), "--config", str(tmp_path / "config.yaml"), *sizes]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len({(row["motion"], row["scaling"], row["head_motion"]) for row in rows}) == len(rows) == 12
    assert all(row["samples"] == "6" and 0 <= float(row["uf1"]) <= 1 for row in rows)
    assert "landmarks" in capsys.readouterr().out
