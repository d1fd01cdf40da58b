"""Local attention, ours and the alternatives, against what the hardware allows: ``htnet profile attention``.

With a GPU every provider is timed there; without one the providers of a CPU are, on small batches, and of the GPU
kernels is shown what needs no GPU: their least traffic and arithmetic, the floor on a named card, and what the compiler
makes of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.benchmarks.attention import LAYOUT, Plan, measure
from kernels.benchmarks.cards import CARDS, Card
from kernels.benchmarks.cases import DIRECTIONS, OPERATIONS, SHAPE, Case, select_cases
from kernels.benchmarks.providers import PROVIDERS
from kernels.benchmarks.record import Record, read_records
from kernels.benchmarks.static import kernel_rows
from launch.benchmarks.frame import (
    Columns,
    Frame,
    compact_table,
    digits,
    fastest_device,
    known_names,
    percent,
    table_of,
)

__all__ = ["SLOW_ON_CPU", "run"]

DEFAULTS: Final[dict[str, tuple[int, str, int]]] = {"cuda": (256, "bf16", 50), "cpu": (2, "fp32", 5)}
"""Batch, dtype and samples of a timing by kind of device; what is computed for a card takes those of ``cuda``."""
SLOW_ON_CPU: Final = ("compile", "block-compile")
"""Left out on a CPU unless named: compiling takes far longer there than everything else together."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure what the options ask for; return the exit code."""
    device = fastest_device()
    frame = Frame(LAYOUT, options, console, device)
    plan = _plan(options, frame)
    [card] = (CARDS[name] for name in known_names("--card", options.card, list(CARDS)))
    if options.dry_run:
        _say_plan(plan, console)
        return EXIT_DONE
    static = _cases(options, *DEFAULTS["cuda"][:2])
    _say_floors(static, card, console)
    if device.type == "cpu":
        _say_kernels(static, card, frame)
    # a group ends when its case and operation are complete; its records are in the file by then
    for _, records in groupby(measure(plan), lambda record: (record.case["case"], record.case["operation"])):
        console.print(_results(frame.keep(records)))
    _say_goals(frame.records, console)
    if frame.path is not None:
        _draw(frame)
    return _exit_code(frame.records)


def _plan(options: argparse.Namespace, frame: Frame) -> Plan:
    """Return what to measure here; InputError names what is wrong and the known."""
    batch, dtype, rounds = DEFAULTS[frame.device.type]
    cases = _cases(options, batch, dtype)
    usual = [name for name in PROVIDERS if frame.device.type == "cuda" or name not in SLOW_ON_CPU]
    wanted = usual if options.providers is None else known_names("--providers", options.providers, list(PROVIDERS))
    providers = [provider for name, provider in PROVIDERS.items() if name in wanted]
    modes = known_names("--modes", options.modes, DIRECTIONS)
    frame.clock.steps = len(cases) * len({provider.operation for provider in providers})
    rounds = options.rounds or rounds
    return Plan(
        cases=cases, providers=providers, directions=modes, device=frame.device, rounds=rounds, clock=frame.clock
    )


def _cases(options: argparse.Namespace, batch: int, dtype: str) -> list[Case]:
    """Return the cases that are asked for; ``batch`` and ``dtype`` are the defaults."""
    names = None if options.cases is None else [name.strip() for name in options.cases.split(",")]
    shape = {key: value for key in SHAPE if (value := getattr(options, key)) is not None}
    try:
        cases: list[Case] = select_cases(names, shape, batch=options.batch or batch, dtype=options.dtype or dtype)
    except ValueError as error:  # the benchmarks know no errors of ours
        raise InputError(str(error)) from None
    return cases


def _draw(frame: Frame) -> None:
    """Draw this run and what the file holds of the same machine, commit and dtype; of a case the last batch."""
    from kernels.benchmarks.plots import write_pictures

    assert frame.path is not None

    def made(record: Record) -> tuple[Any, ...]:
        return (*(record.machine[name] or "" for name in ("card", "processor", "commit")), record.case["dtype"])

    same = {made(record) for record in frame.records}
    alike = [record for record in read_records(frame.path) if made(record) in same]
    last = {record.case["case"]: record.case["batch"] for record in alike}
    alike = [record for record in alike if record.case["batch"] == last[record.case["case"]]]
    names = {"roofline": "roofline.png", "bars": "bars.png"}
    for written in (frame.path, *write_pictures(alike, frame.path.parent, title="Time of local attention", **names)):
        frame.say(f"written: {written}")


def _exit_code(records: Sequence[Record]) -> int:
    """Return 1 when nothing was timed, or when one of ours broke or is wrong; a rival's limit is a result."""
    known = [record for record in records if record.provider in PROVIDERS]
    timed = any(record.status == "ok" for record in known)
    ours_broke = any(record.status in ("failed", "refused") and PROVIDERS[record.provider].ours for record in known)
    return EXIT_DONE if timed and not ours_broke else EXIT_PARTIAL


def _say_plan(plan: Plan, console: Console) -> None:
    columns = ("case", "dtype", "map", "blocks", "tokens per block", "heads", "head_dim", "dim")
    shapes = compact_table(f"cases, each {', '.join(plan.directions)}, on the {plan.device.type}", *columns, words=2)
    for case in plan.cases:
        size = f"{case.batch} x {case.height} x {case.width}"
        facts = (case.blocks, case.tokens_per_block, case.heads, case.head_dim, case.dim)
        shapes.add_row(case.name, case.dtype, size, *(f"{fact:,}" for fact in facts))
    ways = compact_table("providers", "provider", "what", "here", words=3)
    for provider in plan.providers:
        reasons = dict.fromkeys(provider.limit(case, plan.device) or "runs" for case in plan.cases)
        ways.add_row(provider.name, escape(provider.what), escape("; ".join(reasons)))
    console.print(shapes, ways)


def _say_floors(cases: Sequence[Case], card: Card, console: Console) -> None:
    first = cases[0]
    columns = [f"{what} {direction}" for what in ("MB", "GFLOP", "floor us") for direction in ("fwd", "bwd")]
    table = compact_table(
        f"least traffic and arithmetic, batch {first.batch}, {first.dtype}",
        *("case", "operation", "tokens", *columns),
        words=2,
        caption=f"tokens: per block; floor: by the data sheet of {card.name}, T set by traffic, A by arithmetic",
    )
    for case in cases:
        for operation in OPERATIONS:
            moved = [case.bytes_moved(operation, way) for way in ("forward", "backward")]
            flops = [case.flops(operation, way) for way in ("forward", "backward")]
            floors = [case.floor_on(card, operation, way) for way in ("forward", "backward")]
            cells = [value / 1e6 for value in moved] + [value / 1e9 for value in flops]
            least = [f"{digits(seconds * 1e6)} {bound[0].upper()}" for seconds, bound in floors]
            table.add_row(case.name, operation, str(case.tokens_per_block), *map(digits, cells), *least)
    console.print(table)


def _say_kernels(cases: Sequence[Case], card: Card, frame: Frame) -> None:
    """Print what the compiler makes of our kernels for the card; a machine that cannot compile them says why."""
    shown = {"regs": "registers", "spills": "spilled", "stack": "stack", "shared": "shared", "warps": "warps"}
    shown |= {"tile": "tile", "instr.": "instructions", "matrix": "matrix"}
    title = f"GPU kernels compiled for {card.name} ({card.arch}); nothing was run"
    caption = "registers and bytes of stack per thread, instructions that spill, bytes of shared memory per program"
    table = compact_table(title, "cases", "kernel", *shown, words=2, caption=caption)
    try:
        for names, found in kernel_rows(cases, card):
            table.add_row(", ".join(names), found.kernel, *(str(getattr(found, name)) for name in shown.values()))
    except Exception as error:  # Triton absent, interpreted, or without its tools: the rest goes on
        frame.say(f"GPU kernels not compiled: {error}")
        return
    if table.row_count:
        frame.console.print(table)


def _results(records: Sequence[Record]) -> Table:
    """Return the table of one case and operation."""
    case, machine, figures = records[0].case, records[0].machine, records[0].figures
    size = f"{case['batch']} x {case['height']} x {case['width']}, {case['heads']} heads of {case['head_dim']}"
    title = (
        f"{case['case']}, {case['operation']}: {size}, {case['dtype']}, tokens per block: {case['tokens_per_block']}"
    )
    note = f"{machine['card'] or machine['processor']}, torch {machine['torch']}"
    if figures["copy_gb_s"]:
        copy, product = digits(figures["copy_gb_s"]), digits(figures["matrix_tflop_s"])
        note += f"; measured here: copy {copy} GB/s, matrix product {product} TFLOP/s"
    columns: Columns = {
        "graph": lambda record: "yes" if record.case["graph"] else "",
        "of copy": "copy_percent",
        "of matrix": "matrix_percent",
        "MiB": "peak_mib",
        "error": _worst_error,
    }
    return table_of(records, title=title, case=("mode",), columns=columns, notes=[note])


def _worst_error(record: Record) -> str:
    errors = [record.figures[name] for name in ("error_forward", "error_backward")]
    return "" if None in errors else f"{max(errors):.0e}"


def _say_goals(records: Sequence[Record], console: Console) -> None:
    """Print ours against the goals: share of the copy bandwidth, and times the best of the rivals."""
    best: dict[tuple[str, str, str], Record] = {}
    for record in records:
        key = (record.case["case"], record.provider, record.case["mode"])
        if record.status == "ok" and (key not in best or (record.median or 0.0) < (best[key].median or 0.0)):
            best[key] = record
    columns = {"x sdpa": ("sdpa",), "x compile": ("compile",), "x flex": ("flex",)}
    shown = ("case", "forward of copy", "backward of copy", *columns, "block x best other")
    caption = "the quicker of eager and graph; x: forward and backward together"
    table = compact_table("ours; goals: 85 %, 75 %, 2, 1.5, 1.5, 1.5", *shown, caption=caption)
    for case in dict.fromkeys(record.case["case"] for record in records):
        shares = [best.get((case, "triton", mode)) for mode in ("forward", "backward")]
        cells = ["" if share is None else percent(share.figures["copy_percent"]) for share in shares]
        cells += [_ratio(best, case, "triton", rivals) for rivals in columns.values()]
        others = ("block-unfused", "block-sdpa", "block-compile", "block-reference")
        cells.append(_ratio(best, case, "block-triton", others))
        if any(cells):
            table.add_row(case, *cells)
    if table.row_count:
        console.print(table)


def _ratio(best: Mapping[tuple[str, str, str], Record], case: str, ours: str, rivals: Sequence[str]) -> str:
    """Return the quickest rival's time over ours; empty where either is missing."""
    mine = best.get((case, ours, "both"))
    theirs = [found.median for name in rivals if (found := best.get((case, name, "both"))) and found.median]
    return f"{min(theirs) / mine.median:.2f}" if mine is not None and mine.median and theirs else ""
