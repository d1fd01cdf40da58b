"""``htnet profile`` needs no data and no GPU, refuses what it does not know, and writes where it is told."""

from __future__ import annotations

import dataclasses
import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_kernels_benchmarks import chosen, measured

from kernels.benchmarks.providers import PROVIDERS
from kernels.benchmarks.record import read_records
from launch import cli
from launch.benchmarks import attention, training
from launch.commands.profiling import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
TINY = ("attention", "--tokens", "4", "--head-dim", "5", "--heads", "2", "--blocks-per-side", "2", "--rounds", "2")
FILES = (
    "local_attention.csv",
    "training_epochs.csv",
    "end_to_end_cpu.csv",
    "flow_cpu.csv",
    "input.csv",
    "apex_cpu.csv",
)
ABSENT = ("pydantic", "ray", "deepspeed", "nvidia", "openpyxl", "cv2", "yaml", "pyarrow", "jinja2", "numba")


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["profile", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_on_a_cpu_it_prints_rivals_and_static_figures(tmp_path):
    command = [sys.executable, "-m", "launch.cli", "profile", *TINY, "--out", str(tmp_path / "out")]
    command += ["--providers", "triton,reference,sdpa,block-sdpa", "--modes", "forward,backward"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("least traffic and arithmetic", "compiled for H200 SXM (sm_90)", "packed_backward", "needs CUDA"):
        assert expected in done.stdout
    packed = next(line.split() for line in done.stdout.splitlines() if "packed_forward" in line)
    case, _, registers, spills, stack, _, warps, tile, *_ = packed
    assert (case, spills, stack, warps, tile) == ("4x5", "0", "0", "1", "16")
    assert 0 < int(registers) <= 255
    assert "4x85" not in done.stdout
    rows = read_records(tmp_path / "out" / "local_attention.csv")
    assert {(row.provider, row.case["mode"]) for row in rows if row.status == "ok"} >= {("sdpa", "backward")}
    for name in ("roofline.png", "bars.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_a_second_run_adds_to_the_first(tmp_path, capsys):
    arguments = (*TINY, "--providers", "reference", "--modes", "forward", "--out", tmp_path)
    for runs in (1, 2):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert f"written: {tmp_path / 'local_attention.csv'}" in out
        assert [row.provider for row in read_records(tmp_path / "local_attention.csv")] == ["copy", "reference"] * runs


def test_without_out_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *TINY, "--providers", "reference", "--modes", "forward")
    assert code == 0
    assert "reference" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_measured_and_why_not(tmp_path, capsys):
    code, out, err = run(capsys, "attention", "--dry-run", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert all(case in out for case in ("paper/0", "fine/1", "hd/2"))
    assert all(name in out for name in PROVIDERS if name not in attention.SLOW_ON_CPU or torch.cuda.is_available())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--cases", "papr"], "unknown case 'papr'; known: paper, fine, hd, and their levels as paper/0"),
        (["attention", "--providers", "flsh"], "--providers flsh: known are triton, reference, einsum, sdpa"),
        (["attention", "--modes", "up"], "--modes up: known are forward, backward, both"),
        (["attention", "--card", "h300"], "--card h300: known are a100, h100, h200, b200"),
        (["attention", "--heads", "0"], "--heads must be positive, got 0"),
        (["attention", "--tokens", "5"], "tokens must be a square number, or rows x columns as 2x8, got 5"),
        (["attention", "--dtype", "fp8"], "dtype must be one of bf16, fp16, fp32, got 'fp8'"),
        (["attention", "--tokens", "4", "--cases", "fine"], "tokens describe a case of their own"),
        (["attention", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["attention", "--time-limit", "-1"], "--time-limit must be positive, got -1"),
        (["end-to-end", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["end-to-end", "--providers", "mine"], "--providers mine: known are torch engine, fp32; torch engine, bf16"),
        (["training", "--time-limit", "0"], "--time-limit must be positive, got 0"),
        (["flow", "--side", "0"], "--side must be positive, got 0"),
        (["apex", "--image-size", "0"], "--image-size must be positive, got 0"),
        (["head-motion", "--config", "none.yaml"], "none.yaml: "),
    ],
)
def test_bad_input_is_one_line_that_names_the_known(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"htnet profile: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["training", "--cases", "fine"], ["end-to-end", "--card", "h100"], ["attention", "--train-step"], []]
)
def test_an_option_belongs_to_its_own_benchmark(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        run(capsys, *arguments)
    assert done.value.code == 2
    assert "usage: htnet" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_place_that_cannot_hold_results_is_refused_first(tmp_path, capsys, benchmark):
    """Before anything is measured: a file with other columns, a file for a folder, a folder for the file."""
    name = importlib.import_module(f"launch.benchmarks.{BENCHMARKS[benchmark].module}").LAYOUT.file
    (tmp_path / name).write_text("a,b\n")
    (tmp_path / "taken" / name).mkdir(parents=True)
    wrong = {
        tmp_path: "holds other columns than this program writes",
        tmp_path / name / "new": f"{tmp_path / name} is a file, where a folder is needed",
        tmp_path / "taken": "is a folder, where the results are to be a file",
    }
    for place, message in wrong.items():
        code, out, err = run(capsys, benchmark, "--out", place)
        assert (code, out) == (2, "")
        assert message in err
    assert (tmp_path / name).read_text() == "a,b\n"


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_dry_run_measures_and_writes_nothing(tmp_path, capsys, benchmark):
    code, out, err = run(capsys, benchmark, "--dry-run", "--out", tmp_path / "new")
    assert (code, err) == (0, "")
    assert out
    assert not (tmp_path / "new").exists()


def test_a_dry_run_of_training_lists_the_epochs(capsys):
    _, out, _ = run(capsys, "training", "--dry-run")
    assert all(word in out for word in ("paper", "fine", "deepspeed", "bf16"))


def test_epochs_of_training_are_timed_by_engine_and_precision(tmp_path, capsys):
    code, out, _ = run(capsys, "training", "--tiny", "--rounds", "2", "--out", tmp_path)
    assert code == 0, out
    rows = read_records(tmp_path / "training_epochs.csv")
    assert {(row.case["network"], row.case["precision"]) for row in rows} == {
        ("paper", "bf16"),
        ("paper", "fp32"),
        ("fine", "bf16"),
    }
    assert {row.status for row in rows} <= {"ok", "skipped"}
    assert all(row.median > 0 for row in rows if row.status == "ok")
    assert "[2 of 8] paper, bf16, attention auto, deepspeed engine; about " in out


def test_training_leaves_out_what_the_processor_emulates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "emulates_bf16", lambda: True)
    code, out, _ = run(capsys, "training", "--tiny", "--rounds", "1", "--out", tmp_path)
    assert code == 0
    rows = read_records(tmp_path / "training_epochs.csv")
    assert {row.reason for row in rows if row.case["precision"] == "bf16"} == {"this processor emulates bf16"}
    assert {row.status for row in rows if row.case["precision"] == "fp32"} == {"ok"}
    assert "skipped: this processor emulates bf16: torch" in out


def test_only_a_failure_of_ours_makes_a_run_partial():
    (copy, rival) = measured(chosen("reference"))
    broken = dataclasses.replace(rival, status="failed", reason="x", median=None)
    assert attention._exit_code([copy, rival]) == 0
    assert attention._exit_code([copy, rival, broken]) == 0
    assert attention._exit_code([copy, broken]) == 1  # nothing but the copy was timed
    assert attention._exit_code([copy, rival, dataclasses.replace(broken, provider="block-triton")]) == 1


def test_goals_are_ratios_to_the_quickest_rival():
    """Goals are ratios to the quickest rival of the same case and mode."""
    (_, row) = measured(chosen("reference"))

    def timed(provider, median, mode="both", *, graph=False, **figures):
        case = {**row.case, "mode": mode, "graph": graph}
        return dataclasses.replace(row, provider=provider, median=median, case=case, figures={**row.figures, **figures})

    rows = [
        timed("triton", 10.0, "forward", copy_percent=87.0),
        timed("triton", 10.0, "forward", copy_percent=91.0, graph=True),
        *(timed("triton", 40.0), timed("sdpa", 90.0), timed("sdpa", 80.0, graph=True)),
        *(timed("block-triton", 60.0), timed("block-sdpa", 120.0), timed("block-compile", 96.0)),
    ]
    console = Console(width=120, file=io.StringIO())
    attention._say_goals(rows, console)
    (line,) = (line for line in console.file.getvalue().splitlines() if line.split()[:1] == [row.case["case"]])
    # of equal times the first counts
    assert line.split()[1:] == ["87", "%", "2.00", "1.60"]


@pytest.mark.parametrize(
    ("arguments", "there", "code"),
    [
        (("attention", "--dry-run"), (), 0),
        (("attention", "--cases", "x"), (), 2),
        (("training", "--tiny", "--rounds", "1"), ("pydantic",), 0),  # the configuration's
    ],
)
def test_profile_needs_no_packages_for_data_and_clusters(arguments, there, code):
    """Profile runs where the packages for data and clusters are absent."""
    absent = [name for name in ABSENT if name not in there]
    script = (
        f"import sys; [sys.modules.__setitem__(name, None) for name in {absent}]; "
        "from launch.commands.profiling import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_help_names_every_benchmark_and_its_options(capsys):
    options = {(): tuple(BENCHMARKS), ("attention",): ("--cases", "--providers", "--modes", "--tokens", "--card")}
    for command, names in options.items():
        with pytest.raises(SystemExit) as done:
            cli.main(["profile", *command, "--help"])
        assert done.value.code == 0
        out = capsys.readouterr().out
        assert all(name in out for name in names)
