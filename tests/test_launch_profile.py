"""``htnet profile`` needs no data and no GPU, refuses what it does not know, and writes where it is told."""

from __future__ import annotations

import csv
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_kernels_benchmarks import measured

from kernels.benchmarks.providers import PROVIDERS, select_providers
from kernels.benchmarks.record import read_rows
from launch import cli
from launch.benchmarks import end_to_end
from launch.commands import profiling as profile

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--set", "tokens=4 head_dim=5 heads=2", "--set", "blocks_per_side=2", "--rounds", "2")
ABSENT = ("pydantic", "ray", "deepspeed", "nvidia", "openpyxl", "cv2", "yaml", "pyarrow", "jinja2", "numba")


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["profile", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_a_profile_on_a_cpu_has_figures_and_pictures(tmp_path):
    """On a CPU, profile prints rivals and static figures and writes both pictures."""
    command = [sys.executable, "-m", "launch.cli", "profile", *TINY, "--out", str(tmp_path / "out")]
    command += ["--providers", "triton,reference,sdpa,block-sdpa", "--modes", "forward,backward"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("least traffic and arithmetic", "compiled for H200 SXM (sm_90)", "packed_backward", "needs CUDA"):
        assert expected in done.stdout
    packed = next(line.split() for line in done.stdout.splitlines() if "packed_forward" in line)
    case, _, registers, spills, stack, _, warps, tile = packed
    assert (case, spills, stack, warps, tile) == ("4x5", "0", "0", "1", "16")
    assert 0 < int(registers) <= 255
    assert "4x85" not in done.stdout
    rows = read_rows(tmp_path / "out" / "local_attention.csv")
    assert {(row.provider, row.mode) for row in rows if row.status == "ok"} >= {("sdpa", "backward")}
    for name in ("roofline.png", "bars.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_a_second_run_adds_to_the_first(tmp_path, capsys):
    arguments = (*TINY, "--providers", "reference", "--modes", "forward", "--out", tmp_path)
    for runs in (1, 2):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert f"written: {tmp_path / 'local_attention.csv'}" in out
        assert [row.provider for row in read_rows(tmp_path / "local_attention.csv")] == ["copy", "reference"] * runs


def test_without_out_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *TINY, "--providers", "reference", "--modes", "forward")
    assert code == 0
    assert "reference" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_measured_and_why_not(tmp_path, capsys):
    code, out, err = run(capsys, "--dry-run", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert all(case in out for case in ("paper/0", "fine/1", "hd/2"))
    assert all(name in out for name in PROVIDERS if name not in profile.SLOW_ON_CPU or torch.cuda.is_available())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "papr"], "unknown case 'papr'; known: paper, fine, hd, and their levels as paper/0"),
        (["--providers", "flsh"], "unknown provider 'flsh'; known: triton, reference, einsum, sdpa"),
        (["--modes", "up"], "unknown mode 'up'; known: forward, backward, both"),
        (["--card", "h300"], "unknown card 'h300'; known: a100, h100, h200, b200"),
        (["--set", "tokens"], "--set tokens: expected key=value"),
        (["--set", "token=4"], "unknown key 'token'; known: batch, dtype, tokens, heads, head_dim"),
        (["--set", "tokens=4", "--cases", "fine"], "tokens describe a case of their own"),
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--time-limit", "-1"], "--time-limit must be positive, got -1"),
        (["--end-to-end", "--cases", "fine"], "--end-to-end takes no --cases"),
        (["--end-to-end", "--set", "batch=4"], "--end-to-end takes no --set"),
        (["--end-to-end", "--time-limit", "9"], "--end-to-end takes no --time-limit"),
        (["--end-to-end", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["--end-to-end", "--train-step"], "--train-step belongs to --input"),
        (["--training", "--set", "dim=4"], "--training takes no --set but tiny=1"),
        (["--training", "--set", "foo"], "--set foo: expected key=value"),
        (["--training", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["--training", "--time-limit", "0"], "--time-limit must be positive, got 0"),
        (["--training", "--modes", "both"], "--training takes no --modes"),
        (["--training", "--card", "h100"], "--training takes no --card"),
        (["--input", "--card", "h100"], "--input takes no --card"),
    ],
)
def test_bad_input_is_one_line_that_names_the_known(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"htnet profile: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("mode", [(), ("--training",), ("--end-to-end",)])
def test_results_of_other_columns_are_refused_first(tmp_path, capsys, mode):
    """Results of other columns are refused before anything is measured."""
    for name in ("local_attention.csv", "training_epochs.csv", "end_to_end_cpu.csv"):
        (tmp_path / name).write_text("a,b\n")
    code, out, err = run(capsys, *mode, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "holds other columns than this program writes" in err


@pytest.mark.parametrize("mode", [(), ("--training",), ("--end-to-end",)])
def test_a_place_that_cannot_hold_results_is_refused_first(tmp_path, capsys, mode):
    """A place that cannot hold results is refused before anything is measured."""
    (tmp_path / "file.csv").touch()
    code, out, err = run(capsys, *mode, "--out", tmp_path / "file.csv" / "new")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'file.csv'} is a file, where a folder is needed" in err
    for name in ("local_attention.csv", "training_epochs.csv", "end_to_end_cpu.csv"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    code, out, err = run(capsys, *mode, "--out", tmp_path / "taken")
    assert (code, out) == (2, "")
    assert "is a folder, where the results are to be a file" in err


def test_the_end_to_end_benchmark_appends_to_its_file(tmp_path, monkeypatch, capsys):
    """The end-to-end benchmark appends to its file in the folder."""
    one = end_to_end.Measurement(provider=end_to_end.BASELINE, seconds=(2.0,), cpu_share=1.0, baseline=2.0)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests run at one
    monkeypatch.setattr(end_to_end, "measure", lambda *_, rounds, threads: seen.append(rounds) or [one])
    assert run(capsys, "--end-to-end", "--out", tmp_path, "--rounds", "3")[0] == 0
    assert end_to_end.main(["--out", str(tmp_path)]) == 0
    assert run(capsys, "--end-to-end")[0] == 0
    assert seen == [3, 5, 5]
    assert len((tmp_path / "end_to_end_cpu.csv").read_text().splitlines()) == 3
    code, out, _ = run(capsys, "--end-to-end", "--out", tmp_path / "new", "--dry-run")
    assert code == 0
    assert all(name in out for name in end_to_end.PROVIDERS)
    assert len(seen) == 3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [("--rounds", "0"), ("--threads", "0"), ("--out", __file__)])
def test_the_end_to_end_benchmark_refuses_what_it_cannot_do(capsys, monkeypatch, wrong):
    """The end-to-end benchmark, run alone, refuses what it cannot do."""
    monkeypatch.setattr(end_to_end, "measure", lambda *_, **__: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as done:
        end_to_end.main(list(wrong))
    assert done.value.code == 2
    assert f"error: {wrong[0]} " in capsys.readouterr().err


def test_a_dry_run_of_training_trains_nothing(tmp_path, capsys, monkeypatch):
    """A dry run of training lists the epochs and trains nothing."""
    monkeypatch.setattr(profile, "_epochs", lambda *_, **__: pytest.fail("it trained"))
    code, out, _ = run(capsys, "--training", "--dry-run", "--out", tmp_path / "new")
    assert code == 0
    assert all(word in out for word in ("paper", "fine", "deepspeed", "bf16"))
    assert not (tmp_path / "new").exists()


def test_epochs_of_training_are_timed_by_engine_and_precision(tmp_path, capsys):
    code, out, _ = run(capsys, "--training", "--set", "tiny=1", "--rounds", "2", "--out", tmp_path)
    assert code == 0, out
    rows = list(csv.DictReader((tmp_path / "training_epochs.csv").open()))
    assert {(row["network"], row["precision"]) for row in rows} == {
        ("paper", "bf16"),
        ("paper", "fp32"),
        ("fine", "bf16"),
    }
    assert {row["status"] for row in rows} <= {"ok", "skipped"}
    assert all(float(row["median_ms"]) > 0 for row in rows if row["status"] == "ok")


def test_only_a_failure_of_ours_makes_a_run_partial():
    (copy, rival) = measured(select_providers(["reference"]))
    broken = dataclasses.replace(rival, status="failed", reason="x", median_us=None)
    assert profile._exit_code([copy, rival]) == 0
    assert profile._exit_code([copy, rival, broken]) == 0
    assert profile._exit_code([copy, broken]) == 1  # nothing but the copy was timed
    assert profile._exit_code([copy, rival, dataclasses.replace(broken, provider="block-triton")]) == 1


def test_goals_are_ratios_to_the_quickest_rival():
    """Goals are ratios to the quickest rival of the same case and mode."""
    (_, row) = measured(select_providers(["reference"]))

    def timed(provider, median, mode="both", **values):
        return dataclasses.replace(row, provider=provider, median_us=median, mode=mode, **values)

    rows = [
        timed("triton", 10.0, "forward", copy_percent=87.0),
        timed("triton", 10.0, "forward", copy_percent=91.0, graph=True),
        *(timed("triton", 40.0), timed("sdpa", 90.0), timed("sdpa", 80.0, graph=True)),
        *(timed("block-triton", 60.0), timed("block-sdpa", 120.0), timed("block-compile", 96.0)),
    ]
    console = Console(width=120, file=io.StringIO())
    profile._say_goals(rows, console)
    (line,) = (line for line in console.file.getvalue().splitlines() if line.split()[:1] == [row.case])
    # of equal times the first counts
    assert line.split()[1:] == ["87", "%", "2.00", "1.60"]


def test_profile_needs_no_packages_for_data_and_clusters():
    """Profile runs where the packages for data and clusters are absent."""
    script = (
        f"import sys; [sys.modules.__setitem__(name, None) for name in {ABSENT}]; "
        "from launch.commands.profiling import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["--dry-run"], ["--training", "--set", "tiny=1", "--rounds", "1"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert subprocess.run([sys.executable, "-c", script, "--cases", "x"], cwd=ROOT, capture_output=True).returncode == 2


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["profile", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--cases", "--providers", "--modes", "--set", "--card", "--end-to-end"))
