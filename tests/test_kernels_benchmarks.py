"""The kernel benchmarks count what a shape must move and compute, time nothing that is wrong, and forget no result."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from htnet.config import HTNetConfig
from kernels.benchmarks import attention, gpu_check, timing
from kernels.benchmarks.attention import Plan, measure
from kernels.benchmarks.cards import CARDS
from kernels.benchmarks.cases import CONFIGURATIONS, DIRECTIONS, OPERATIONS, SHAPE, select_cases
from kernels.benchmarks.plots import roofline, write_pictures
from kernels.benchmarks.providers import PROVIDERS, Provider
from kernels.benchmarks.race import OVER, Clock, race
from kernels.benchmarks.record import MACHINE, MEASURED, Layout, Record, append_records, read_records
from kernels.benchmarks.static import kernel_rows
from kernels.reference import local_attention_reference
from kernels.testing import BLOCK_TOLERANCES
from launch.commands.profiling import add_arguments

CPU = torch.device("cpu")
TINY = {"tokens": "2x3", "head_dim": 5, "heads": 2, "blocks_per_side": 2}


def tiny_case(*, batch=2, dtype="fp32", **shape):
    (case,) = select_cases(None, TINY | shape, batch=batch, dtype=dtype)
    return case


def chosen(*names) -> list[Provider]:
    return [PROVIDERS[name] for name in names]


def measured(providers, *, case=None, directions=("forward",), device=CPU, seconds=None) -> list[Record]:
    case = case or tiny_case()
    plan = Plan(cases=[case], providers=providers, directions=directions, device=device, rounds=2, clock=Clock(seconds))
    return list(measure(plan))


def fake(build, *, name="fake", **fields) -> Provider:
    return Provider(name=name, operation="core", what="", build=build, **fields)


def reference(case, factor=1.0):
    settings = {"num_heads": case.heads, "blocks_per_side": case.blocks_per_side}
    return lambda qkv: local_attention_reference(qkv, **settings) * factor


# --- cases


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_cases_are_the_levels_of_the_network(name):
    config = HTNetConfig(image_size=CONFIGURATIONS[name].image_size)
    cases = select_cases([name], {}, batch=7, dtype="bf16")
    assert len(cases) == config.levels
    for level, case in enumerate(cases):
        assert case.name == f"{name}/{level}"
        assert case.tokens_per_block == config.tokens_per_block
        assert case.blocks_per_side == config.blocks_per_side[level]
        assert case.height == case.width == config.image_size // config.patch_size // 2**level
        assert (case.dim, case.heads) == (config.dim * 2**level, config.heads * 2**level)
        assert case.head_dim == case.dim // case.heads


def block_weights(case) -> dict[str, int]:
    dim, inner = case.dim, case.inner
    return {"norm": 2 * dim, "qkv": 3 * inner * dim, "out": inner * dim, "bias": dim}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tokens", ["1", "2x3"])
def test_least_traffic_is_every_tensor_once(tokens, dtype):
    case = tiny_case(tokens=tokens, dtype=dtype)
    size = torch.empty((), dtype=attention.DTYPES[dtype]).element_size()
    inner = case.batch * case.height * case.width * case.heads * case.head_dim
    one = case.tokens_per_block == 1
    read, written = (inner, inner) if one else (3 * inner, inner)
    assert case.bytes_moved("core", "forward") == (read + written) * size
    read = inner if one else inner + 3 * inner  # of one token, the gradient alone decides
    assert case.bytes_moved("core", "backward") == (read + 3 * inner) * size
    maps = case.batch * case.height * case.width * case.dim
    weights = block_weights(case)
    used = sum(weights.values()) - (weights["qkv"] * 2 // 3 if one else 0)
    assert case.bytes_moved("block", "forward") == (2 * maps + used) * size
    assert case.bytes_moved("block", "backward") == (3 * maps + used + sum(weights.values())) * size
    for operation in OPERATIONS:
        both = sum(case.bytes_moved(operation, direction) for direction in ("forward", "backward"))
        assert case.bytes_moved(operation, "both") == both


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_is_what_torch_counts_in_the_reference(operation):
    case = tiny_case()
    inputs, grad_out = attention.make_inputs(case, operation, CPU, seed=0)
    forward = PROVIDERS["reference" if operation == "core" else "block-reference"].build(case)
    with FlopCounterMode(display=False) as counted:
        out = forward(*inputs)
    assert counted.get_total_flops() == case.flops(operation, "forward")
    with FlopCounterMode(display=False) as counted:
        torch.autograd.grad(out, inputs, grad_out)
    # the reference keeps its weights; a kernel that reads no more than it must computes the scores again
    scores = 2 * case.batch * case.height * case.width * case.tokens_per_block * case.inner
    assert counted.get_total_flops() + scores == case.flops(operation, "backward")


def test_one_token_per_block_costs_a_copy():
    """One token per block is a copy, and its block two projections."""
    (case,) = select_cases(["paper/0"], {}, batch=2, dtype="bf16")
    assert [case.flops("core", direction) for direction in DIRECTIONS] == [0, 0, 0]
    assert case.flops("block", "forward") == 2 * 2 * 16 * 2 * 256 * 255


def test_the_floor_is_the_larger_of_traffic_and_arithmetic():
    (fine,) = select_cases(["fine/0"], {}, batch=256, dtype="bf16")
    # design figures: 31 us of traffic for the core, 45 us of arithmetic for the block
    seconds, bound = fine.floor("core", "forward", bandwidth=4.3e12, rate=790e12)
    assert (round(seconds * 1e6), bound) == (31, "traffic")
    seconds, bound = fine.floor("block", "forward", bandwidth=4.3e12, rate=790e12)
    assert (round(seconds * 1e6), bound) == (45, "arithmetic")
    assert fine.floor_on(CARDS["h200"], "core", "forward")[0] < fine.floor_on(CARDS["h100"], "core", "forward")[0]


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["papr"], {}, "unknown case 'papr'; known: paper, fine, hd"),
        (["fine/3"], {}, "unknown case 'fine/3'"),
        (None, {"tokens": "5"}, "tokens must be a square number"),
        (None, {"tokens": "2x0"}, "width must be at least 1, got 0"),
        (None, {"tokens": "many"}, "tokens must be a whole number, or rows x columns as 2x8, got 'many'"),
        (None, {"heads": 0}, "heads must be at least 1, got 0"),
        (["fine"], {"tokens": "4"}, "tokens describe a case of their own"),
    ],
)
def test_an_unknown_case_or_setting_names_the_known(names, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        select_cases(names, overrides, batch=1, dtype="bf16")
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'fp8'"):
        select_cases(None, {}, batch=1, dtype="fp8")


# --- static figures


def kernels_and_cases(monkeypatch, cases, card="h200") -> list[tuple[str, tuple[str, ...]]]:
    """Which kernels would be compiled for which cases."""
    pytest.importorskip("triton")

    def fake(shape, archs):
        (arch,) = archs
        for kernel in ("forward", "backward"):
            yield SimpleNamespace(kernel=kernel, arch=arch)

    monkeypatch.setattr(importlib.import_module("kernels.local_attention.compile"), "compile_case", fake)
    rows = list(kernel_rows(cases, CARDS[card]))
    assert {found.arch for _, found in rows} <= {CARDS[card].arch}
    return [(found.kernel, tuple(names)) for names, found in rows]


def test_the_static_table_holds_each_shape_once(monkeypatch):
    cases = select_cases(["paper", "fine/0", "fine/1"], {}, batch=256, dtype="bf16")
    alike = [*cases, dataclasses.replace(cases[3], name="again"), dataclasses.replace(cases[3], name="less", dim=128)]
    assert kernels_and_cases(monkeypatch, alike) == [
        *(("forward", ("fine/0", "again", "less")), ("backward", ("fine/0", "again", "less"))),
        *(("forward", ("fine/1",)), ("backward", ("fine/1",))),
    ]


@pytest.mark.parametrize(
    ("shape", "card", "kernels"),
    [
        ({"dtype": "bf16"}, "a100", ["forward", "backward"]),
        ({"dtype": "bf16", "tokens": "81"}, "h200", ["forward", "backward"]),
        ({"dtype": "bf16", "head_dim": 129}, "h200", []),
        ({"dtype": "bf16", "tokens": "33x33"}, "h200", []),
    ],
)
def test_kernels_are_compiled_only_for_shapes_they_take(monkeypatch, shape, card, kernels):
    """Kernels that do not take a shape are not compiled for it."""
    assert [kernel for kernel, _ in kernels_and_cases(monkeypatch, [tiny_case(**shape)], card)] == kernels


# --- providers and the gate


def test_every_provider_computes_attention_here_or_says_why_not():
    providers = [provider for provider in PROVIDERS.values() if "compile" not in provider.name]
    rows = measured(providers, directions=("forward", "backward", "both"))
    ok = {row.provider for row in rows if row.status == "ok"}
    expected = {"copy", "reference", "einsum", "sdpa", "sdpa-math", "sdpa-pad8", "sdpa-pad32"}
    assert ok == expected | {"block-reference", "block-sdpa"}
    skipped = {row.provider: row.reason for row in rows if row.status == "skipped"}
    assert skipped["triton"] == skipped["flex"] == skipped["sdpa-flash"] == "needs CUDA"
    assert not [row for row in rows if row.status in ("failed", "refused")]
    for row in rows:
        if row.status == "ok":
            assert row.n == 2
            assert 0 < row.low <= row.median <= row.high
            figures = row.figures
            assert figures["gb_s"] == pytest.approx(figures["bytes"] / row.median / 1e3)
            assert figures["copy_percent"] == pytest.approx(100 * figures["gb_s"] / figures["copy_gb_s"])


@pytest.mark.slow
def test_a_compiled_backward_pass_can_be_timed_again_and_again():
    rows = measured(chosen("compile"), directions=("backward",))
    assert [row.status for row in rows] == ["ok", "ok"], rows[-1].reason


def test_a_provider_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cuda, (case,) = torch.device("cuda"), select_cases(["fine/0"], {}, batch=8, dtype="bf16")
    assert PROVIDERS["triton"].limit(case, cuda) == "triton is not installed"
    assert PROVIDERS["sdpa-efficient"].limit(dataclasses.replace(case, batch=5000), cuda) == "more than 65,535 blocks"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"head_dim": 129}, "head_dim must be at most 128, got 129"),
        ({"tokens": "33x33"}, "a block must hold at most 1024 tokens, got 1089"),
        ({"head_dim": 129, "tokens": "1"}, None),  # a copy needs no kernel
    ],
)
def test_what_our_kernels_do_not_take_is_no_failure_of_ours(monkeypatch, shape, reason):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    ours = [provider for provider in PROVIDERS.values() if provider.ours]
    assert len(ours) == 3
    for provider in ours:
        assert provider.limit(tiny_case(**shape), torch.device("cuda")) == reason


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(1.001, "wrong: relative RMS error 0.001 of the output"), (float("nan"), "wrong: relative RMS error nan")],
)
def test_a_wrong_provider_is_not_timed(factor, reason):
    row = measured([fake(lambda case: reference(case, factor))])[-1]
    assert row.status == "refused"
    assert row.reason.startswith(reason)
    assert row.median is None
    assert row.n == 0


def test_a_provider_that_is_wrong_only_backward_is_not_timed():
    def build(case):
        right = reference(case)
        # the value is right; its gradient is that of twice as much
        return lambda qkv: 2 * right(qkv) - right(qkv).detach()

    row = measured([fake(build)])[-1]
    assert row.status == "refused"
    assert "of the gradient of qkv" in row.reason


@pytest.mark.parametrize(("share", "status"), [(0.5, "ok"), (2.0, "refused")])
def test_the_block_is_held_to_its_own_tolerances(share, status):
    allowed = BLOCK_TOLERANCES[torch.float32].backward

    def build(case):
        right = PROVIDERS["block-reference"].build(case)

        def run(*tensors):
            out = right(*tensors)
            return out + share * allowed * (out - out.detach())  # the value is right, all gradients are a little large

        return run

    provider = dataclasses.replace(PROVIDERS["block-reference"], build=build)
    (row,) = measured([provider])
    assert row.status == status
    assert row.figures["error_backward"] == pytest.approx(share * allowed, rel=0.5)


def test_a_provider_that_breaks_is_a_row():
    """A provider that breaks is a row, and the others are measured."""

    def breaks(error):
        def build(case):
            raise error

        return build

    def later(case):
        right, calls = reference(case), []

        def run(qkv):
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once\nand more")
            return right(qkv)

        return run

    providers = [
        fake(breaks(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), name="large"),
        fake(lambda case: lambda qkv: qkv, name="shape"),
        fake(later, name="later"),
        fake(reference, name="good"),
    ]
    rows = {row.provider: row for row in measured(providers)}
    assert (rows["large"].status, rows["large"].reason) == ("failed", "out of memory")
    assert rows["shape"].reason.startswith("ValueError: returned shape") or "shape" in rows["shape"].reason
    assert (rows["later"].status, rows["later"].reason) == ("failed", "RuntimeError: only once")
    assert rows["later"].figures["error_forward"] < 1e-6  # it passed the gate before
    assert rows["good"].status == "ok"


def test_after_the_time_limit_nothing_is_begun():
    """After the time limit nothing is begun, and every row says so."""
    rows = measured(chosen("reference", "block-sdpa"), seconds=0)
    assert [(row.provider, row.status) for row in rows] == [("reference", "skipped"), ("block-sdpa", "skipped")]
    assert all("time allowed" in row.reason for row in rows)


def test_a_chain_moves_several_times_what_the_cache_holds():
    assert timing.chain_length(1 << 40, CPU) == 1
    assert timing.chain_length(64 << 20, CPU) == 2
    assert timing.chain_length(1, CPU) == 8  # no longer than that on a CPU


@pytest.mark.gpu
def test_on_a_gpu_ours_is_right_and_timed_eagerly_and_in_graphs():
    case = tiny_case(dtype="bf16", batch=64)
    providers = [provider for provider in PROVIDERS.values() if "compile" not in provider.name]
    rows = measured(providers, case=case, directions=DIRECTIONS, device=torch.device("cuda"))
    ours = [row for row in rows if row.provider in PROVIDERS and PROVIDERS[row.provider].ours]
    assert {row.status for row in ours} == {"ok"}, [row.reason for row in ours]
    assert {(row.case["mode"], row.case["graph"]) for row in ours if row.provider == "triton"} == {
        (mode, graph) for mode in DIRECTIONS for graph in (False, True)
    }


# --- what is kept


def test_results_are_appended_under_one_header_and_come_back(tmp_path):
    path = tmp_path / "new" / "results.csv"
    rows = measured(chosen("triton", "reference"))
    append_records(path, attention.LAYOUT, rows)
    before = path.read_bytes()
    append_records(path, attention.LAYOUT, rows)
    assert path.read_bytes().startswith(before)
    back = read_records(path)
    assert len(back) == 2 * len(rows)
    assert path.read_text().count("median") == 1
    for row, again in zip(rows, back[len(rows) :], strict=True):
        assert again.case == {name: value if value != "" else None for name, value in row.case.items()}
        assert (again.provider, again.status, again.reason, again.n) == (row.provider, row.status, row.reason, row.n)
        assert again.median == (None if row.median is None else pytest.approx(row.median, rel=1e-5))
        figures = {name: value for name, value in row.figures.items() if value is not None}
        assert {name: again.figures[name] for name in figures} == pytest.approx(figures, rel=1e-5)


def test_a_file_with_other_columns_is_not_touched(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="holds other columns"):
        append_records(path, attention.LAYOUT, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_rows_are_on_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / "results.csv"

    def rows():
        (row,) = measured(chosen("triton"), directions=())
        yield row
        assert len(read_records(path)) == 1
        yield row

    append_records(path, attention.LAYOUT, rows())
    assert len(read_records(path)) == 2


def test_columns_are_case_measurement_figures_machine():
    layout = Layout(file="x.csv", unit="s", case=("side",), figures=("error",))
    assert layout.columns == ("side", *MEASURED, "error", *MACHINE)


def test_the_results_that_are_kept_can_be_read_and_added_to():
    kept = Path(attention.__file__).parent / "results" / "cpu" / attention.LAYOUT.file
    append_records(kept, attention.LAYOUT, [])
    records = read_records(kept)
    assert len(records) == 93
    assert {record.status for record in records} == {"ok", "skipped"}


def test_both_pictures_are_drawn_unless_there_is_no_arithmetic(tmp_path):
    """Both pictures are drawn, and a run without arithmetic has no roofline."""
    names = {"roofline": "roofline.png", "bars": "bars.png"}
    rows = measured(chosen("reference", "sdpa", "block-sdpa"), directions=("forward", "backward"))
    written = write_pictures(rows, tmp_path / "pictures", title="Time", **names)
    assert [path.name for path in written] == ["roofline.png", "bars.png"]
    assert all(path.stat().st_size > 10_000 for path in written)
    copies = measured(chosen("sdpa"), case=tiny_case(tokens="1"))
    assert roofline(copies) is None
    assert [path.name for path in write_pictures(copies, tmp_path / "one", title="Time", **names)] == ["bars.png"]
    assert write_pictures([], tmp_path / "none", title="Time", **names) == []
    assert not (tmp_path / "none").exists()


# --- the runner


def test_samples_are_taken_in_turn_in_an_order_that_changes():
    taken = []
    ways = {name: lambda name=name: taken.append(name) or float(len(taken)) for name in "ab"}
    samples = race(ways, rounds=3, clock=Clock())
    assert "".join(taken) == "baabba"
    assert samples == {"a": [2.0, 3.0, 6.0], "b": [1.0, 4.0, 5.0]}


def test_no_sample_is_begun_when_the_time_is_over():
    assert race({"a": lambda: pytest.fail("begun")}, rounds=3, clock=Clock(0)) == {"a": []}


def test_a_sample_that_is_not_ready_in_time_ends_the_race():
    answers = iter([1.0, TimeoutError()])

    def sample() -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert race({"a": sample}, rounds=9, clock=Clock()) == {"a": [1.0]}


def test_a_clock_says_the_step_and_from_the_second_on_the_rest():
    said = []
    clock = Clock(steps=3, say=said.append)
    for step in ("one", "two", "three"):
        clock.begin(step)
    assert said[0] == "[1 of 3] one"
    assert said[1].startswith("[2 of 3] two; about 0 s to go")
    race({"a": lambda: 1.0}, rounds=5, clock=clock)
    assert said[-1] == "  4 more rounds, about 0 s"


def test_a_step_gets_an_even_share_of_the_time_that_is_left():
    clock = Clock(1000.0, steps=4)
    clock.begin("one")
    assert 240 < clock.share().left() <= 250
    assert Clock().share().left() is None


def test_what_the_processor_emulates_is_left_out(monkeypatch):
    monkeypatch.setattr(attention, "emulates_bf16", lambda: True)
    rows = measured(chosen("reference", "block-sdpa"), case=tiny_case(dtype="bf16"))
    assert {(row.status, row.reason) for row in rows} == {("skipped", "this processor emulates bf16")}
    assert {row.status for row in measured(chosen("reference"))} == {"ok"}


def test_quartiles_of_samples():
    layout = Layout(file="x.csv", unit="s", case=(), figures=("error",))
    found = layout.record({}, {}, "a", [4.0, 1.0, 2.0, 3.0], error=0.5)
    assert (found.low, found.median, found.high, found.spread, found.n) == (1.75, 2.5, 3.25, "quartiles", 4)
    assert found.figures == {"error": 0.5}
    one = layout.record({}, {}, "a", (7.0,))
    assert (one.low, one.median, one.high, one.n) == (7.0, 7.0, 7.0, 1)
    none = layout.record({}, {}, "a", [])
    assert (none.status, none.reason, none.median) == ("skipped", OVER, None)


# --- gpu-check


def test_a_step_that_fails_hangs_or_is_left_out_stops_no_other(tmp_path):
    child = tmp_path / "child"
    hangs = f"import subprocess, time; subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w'); time.sleep(60)"
    said: list[str] = []
    steps = [
        gpu_check.Step(name="fails", arguments=("-c", "print('so far'); raise SystemExit(5)"), seconds=20),
        gpu_check.Step(name="hangs", arguments=("-c", hangs), seconds=2),
        gpu_check.Step(name="absent", arguments=("-c", ""), seconds=20, left_out="not installed: ray"),
        gpu_check.Step(name="good", arguments=("-c", "import kernels.benchmarks; print('done')"), seconds=60),
    ]
    begin = time.monotonic()
    ends = gpu_check.run_steps(steps, tmp_path, total=120, say=said.append)
    assert time.monotonic() - begin < 60
    assert ends == ["exit 5", "time limit of 2 s", "left out: not installed: ray", "ok"]
    assert child.exists()
    assert "so far" in (tmp_path / "fails.log").read_text()
    assert [line.split()[0] for line in (tmp_path / "summary.txt").read_text().splitlines()] == [
        step.name for step in steps
    ]
    assert any("done" in text for text in said)


def test_steps_after_the_total_time_are_left_out(tmp_path):
    steps = [gpu_check.Step(name="late", arguments=("-c", ""), seconds=20)]
    ends = gpu_check.run_steps(steps, tmp_path, total=0.0, say=lambda _: None)
    assert ends == ["left out: the time for all steps is over"]


@pytest.mark.parametrize("quick", [False, True])
def test_the_steps_know_the_options_of_the_programs_they_call(tmp_path, quick, monkeypatch):
    # not at the top: this file's GPU tests run where DALI is absent
    profile_input = pytest.importorskip("launch.benchmarks.input")
    monkeypatch.setattr(gpu_check, "_installed", lambda name: name not in ("ray", "deepspeed"))
    steps = gpu_check.make_steps(tmp_path, quick=quick)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    benchmarks = []
    for step in steps:
        if "launch.commands.profiling" in step.arguments:
            options = parser.parse_args(step.arguments[2:])
            benchmarks.append(options.benchmark)
            assert options.out == tmp_path
            assert options.time_limit < step.seconds
            if options.benchmark == "input":
                assert options.train_step
                assert set(options.cases.split(",")) <= set(profile_input.CASES)
                assert profile_input.Plan.of(options).rounds == options.rounds
            elif options.benchmark == "attention":
                shape = {key: value for key in SHAPE if (value := getattr(options, key)) is not None}
                assert select_cases(options.cases and options.cases.split(","), shape, batch=1, dtype="bf16")
                assert set(options.providers.split(",") if options.providers else ()) <= set(PROVIDERS)
    assert set(benchmarks) == {"attention", "training", "input"}
    left_out = {step.name: step.left_out for step in steps if step.left_out}
    folds = ("fold-synth", "fold-prepare", "fold-sweep-torch", "folds-shared", "folds-graphs")
    assert left_out == dict.fromkeys(folds, "not installed: ray")
    assert sum(step.name.startswith("input") for step in steps) == 2


def test_the_input_is_left_out_where_dali_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_installed", lambda name: name != "nvidia.dali")
    steps = gpu_check.make_steps(tmp_path, quick=False)
    left_out = {step.left_out for step in steps if step.name.startswith("input")}
    assert left_out == {"not installed: nvidia.dali"}
    [tests] = [step for step in steps if step.name == "tests"]
    assert not any("dali" in argument for argument in tests.arguments)  # pytest would stop at their imports
    assert "tests/test_kernels_triton.py" in tests.arguments


def test_gpu_tests_that_failed_last_come_first(tmp_path):
    """Their messages were lost at a time limit; now a failure is in a file as soon as it happened."""
    [tests] = [step for step in gpu_check.make_steps(tmp_path, quick=False) if step.name == "tests"]
    files = [argument.removeprefix("tests/") for argument in tests.arguments if argument.startswith("tests/")]
    assert set(files[:3]) == set(gpu_check.FAILED_LAST)
    assert tests.seconds == 240
    test = tmp_path / "test_it.py"
    test.write_text("import os\ndef test_wrong():\n    assert 1 == 2\ndef test_killed():\n    os._exit(9)\n")
    failures = tmp_path / "failed.txt"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "conftest", f"--failures={failures}", str(test)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert "test_wrong" in failures.read_text()
    assert "assert 1 == 2" in failures.read_text()


def test_the_check_runs_the_steps_that_are_named(tmp_path, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(gpu_check, "run_steps", lambda steps, *_, **__: ran.extend(s.name for s in steps) or ["ok"])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    assert gpu_check.main(["--quick", "--steps", "fold-s,tests", "--out", str(tmp_path)]) == 0
    assert [name.replace("deepspeed", "torch") for name in ran] == [
        "machine",
        "tests",
        "fold-synth",
        "fold-sweep-torch",
    ]


def test_without_a_gpu_the_check_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = Path(gpu_check.__file__)
    done = subprocess.run([sys.executable, script, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stdout
