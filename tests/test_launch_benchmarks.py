"""The benchmarks compare what computes the same, keep their time limit and say what they left out."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_htnet_model import CASES, golden_config, load_golden, relative_error

from htnet import HTNet, HTNetConfig
from htnet.config.load import load_config
from htnet.config.plain import dump_config
from kernels.benchmarks.race import OVER, Clock
from kernels.benchmarks.record import append_records, read_records
from launch import cli
from launch.benchmarks import apex, end_to_end, flow, head_motion
from launch.benchmarks import input as profile_input
from launch.benchmarks.end_to_end import (
    BASELINE,
    PROVIDERS,
    Setting,
    check_equal,
    first_epoch,
    make_batches,
    measure,
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


SETTING = Setting(config=TINY, sizes=(8, 6), threads=1)


def run(*arguments) -> int:
    return cli.main(["profile", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch engine, fp32", "DeepSpeed engine, bf16"])
def test_a_checked_provider_is_timed_beside_upstream(monkeypatch, name):
    """No more than two processes live, for they take memory from each other; none is left behind."""
    alive, answered = [], end_to_end._answer

    def watched(pipe, clock):
        alive.append(len(multiprocessing.active_children()))
        return answered(pipe, clock)

    monkeypatch.setattr(end_to_end, "_answer", watched)
    said = []
    mine, beside = measure(name, SETTING, rounds=2, clock=Clock(say=said.append))
    assert [len(part) for part in (*mine, *beside)] == [2] * 4
    assert max(alive) == 2
    assert multiprocessing.active_children() == []
    assert any(text.startswith(f"  {name}: ") for text in said)


def serve_nothing(name, setting, pipe):
    """The process of a provider whose check of correctness does not end."""
    time.sleep(3600)


def test_the_time_limit_holds_in_the_check_of_correctness(tmp_path, monkeypatch, capsys):
    """It said nothing for a quarter of an hour and ended before its first figure."""
    monkeypatch.setattr(end_to_end, "serve", serve_nothing)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests run at one
    chosen = ("--providers", "torch engine, fp32", "--time-limit", "0.5", "--out", tmp_path)
    assert run("end-to-end", *chosen) == 1
    (record,) = read_records(tmp_path / "end_to_end_cpu.csv")
    assert (record.provider, record.status, record.reason) == ("torch engine, fp32", "skipped", OVER)
    out = capsys.readouterr().out
    assert "[1 of 1] torch engine, fp32" in out
    assert f"skipped: {OVER}: torch engine, fp32" in " ".join(out.split())
    assert multiprocessing.active_children() == []


def test_what_the_processor_emulates_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "emulates_bf16", lambda: True)
    monkeypatch.setattr(end_to_end, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert run("end-to-end", "--providers", "torch engine, bf16;DeepSpeed engine, bf16", "--out", tmp_path) == 1
    records = read_records(tmp_path / "end_to_end_cpu.csv")
    assert [(record.status, record.reason) for record in records] == [("skipped", "this processor emulates bf16")] * 2


def test_a_wrong_or_dead_provider_stops_no_other(tmp_path, monkeypatch, capsys):
    """It is a record with its reason, and the next is measured."""
    pair = (end_to_end.Epochs([2.0, 4.0], [1.0, 0.7]), end_to_end.Epochs([6.0, 8.0], [0.9, 0.8]))
    answers = iter([RuntimeError("logits before is off"), EOFError(), pair])

    def measured(name, setting, **_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(end_to_end, "measure", measured)
    monkeypatch.setattr(end_to_end, "emulates_bf16", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    names = ["torch engine, fp32", "torch engine, bf16", "DeepSpeed engine, fp32"]
    assert run("end-to-end", "--providers", ";".join(names), "--out", tmp_path) == 1
    rows = read_records(tmp_path / "end_to_end_cpu.csv")
    assert [(row.provider, row.status) for row in rows] == [
        *zip(names, ("refused", "failed", "ok"), strict=True),
        (BASELINE, "ok"),
    ]
    assert (rows[2].median, rows[2].n, rows[2].case["batches"]) == (3.0, 2, "256+180")
    figures = {"min": 2, "max": 4, "least_cpu_share": 0.7, "ratio_to_upstream": 7 / 3, "upstream_beside_s": 7}
    assert rows[2].figures == pytest.approx(figures, rel=1e-5)
    assert rows[3].figures["ratio_to_upstream"] == 1
    assert "refused: logits before is off: torch engine, fp32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("benchmark", "count"), [(end_to_end, 29), (flow, 12), (apex, 4), (head_motion, 120), (profile_input, 18)]
)
def test_the_results_that_are_kept_can_be_read_and_added_to(benchmark, count):
    kept = ROOT / "docs" / "benchmarks" / "results" / benchmark.LAYOUT.file
    append_records(kept, benchmark.LAYOUT, [])
    records = read_records(kept)
    assert len(records) >= count
    assert all(record.median > 0 and record.n and record.unit for record in records if record.status == "ok")


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


def test_apexes_are_found_by_both_ways_and_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for _ in range(2):
        assert run("apex", "--out", tmp_path, "--subjects", 1, "--clips", 2, "--image-size", 64) == 0
    rows = read_records(tmp_path / "apex_cpu.csv")
    assert [(row.provider, row.case["difficulty"]) for row in rows[:4]] == [
        (provider, difficulty) for difficulty in ("easy", "realistic") for provider in ("flow", "grey differences")
    ]
    assert len(rows) == 8
    assert all(row.n == 18 and row.figures["exact"] <= 18 and row.low > 0 for row in rows)
    out = capsys.readouterr().out
    assert "apexes of synthetic clips" in out
    assert "  17 more rounds, about" in out


def test_flow_is_timed_where_ours_is_as_accurate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    ways = {flow.OURS: flow.PROVIDERS[flow.OURS], "zero": (lambda first, second: 0 * flow._ours(first, second), 1)}
    monkeypatch.setattr(flow, "PROVIDERS", ways)
    sizes = ("--pairs", 2, "--side", 32, "--rounds", 2, "--out", tmp_path)
    assert run("flow", *sizes) == 0
    rows = read_records(tmp_path / "flow_cpu.csv")
    assert [(row.provider, row.n, row.unit, row.case["side"]) for row in rows] == [
        (flow.OURS, 2, "s/pair", 32),
        ("zero", 2, "s/pair", 32),
    ]
    assert rows[1].figures["end_point_error_px"] > rows[0].figures["end_point_error_px"]
    assert rows[1].figures["times_ours"] == pytest.approx(rows[1].median / rows[0].median, rel=1e-4)
    monkeypatch.setattr(flow, "SLACK", 0.0)
    assert run("flow", *sizes) == 1
    assert [row.status for row in read_records(tmp_path / "flow_cpu.csv")[2:]] == ["refused"] * 2
    assert "refused: ours is off by" in capsys.readouterr().out


@pytest.mark.slow
def test_every_head_motion_is_scored_on_the_same_clips(tmp_path, capsys):
    config = load_config(ROOT / "configs" / "demo.yaml")
    config = replace(
        config,
        prepare=replace(config.prepare, working_size=48),
        train=replace(config.train, epochs=1),
        engine=replace(config.engine, name="torch"),
        data=replace(config.data, validation_subjects=0),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    sizes = ("--seeds", 1, "--subjects", 1, "--clips", 2, "--image-size", 64)
    assert run("head-motion", "--out", tmp_path, "--config", tmp_path / "config.yaml", *sizes) == 0
    rows = read_records(tmp_path / "head_motion.csv")
    assert len({(row.case["motion"], row.case["scaling"], row.provider) for row in rows}) == len(rows) == 12
    assert all(row.case["samples"] == 6 and 0 <= row.median <= 1 and 0 <= row.figures["uar"] <= 1 for row in rows)
    assert "landmarks" in capsys.readouterr().out
