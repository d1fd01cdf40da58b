"""Local attention, ours and the alternatives, against what the hardware allows: ``htnet profile attention``.

With a GPU every provider is timed there; without one the providers of a CPU are, on small batches, and of the GPU
kernels is shown what needs no GPU: their least traffic and arithmetic, the floor on a named card, and what the compiler
makes of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Final

import torch
from rich.console import Console
from rich.markup import escape

from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.benchmarks.attention import LAYOUT, Plan, measure
from kernels.benchmarks.cards import CARDS, Card
from kernels.benchmarks.cases import DIRECTIONS, KEYS, OPERATIONS, Case, select_cases
from kernels.benchmarks.providers import PROVIDERS, select_providers
from kernels.benchmarks.record import Record, read_records
from kernels.benchmarks.static import kernel_rows
from launch.benchmarks.frame import Frame, compact_table, digits, percent

__all__ = ["SLOW_ON_CPU", "run"]

DEFAULTS: Final[dict[str, tuple[int, str, int]]] = {"cuda": (256, "bf16", 50), "cpu": (2, "fp32", 5)}
"""Batch, dtype and samples of a timing by kind of device; what is computed for a card takes those of ``cuda``."""
SLOW_ON_CPU: Final = ("compile", "block-compile")
"""Left out on a CPU unless named: compiling takes far longer there than everything else together."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure what the options ask for; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frame = Frame(LAYOUT, options, console)
    try:  # the benchmarks know no errors of ours
        plan, static = _plan(options, device, frame)
    except ValueError as error:
        raise InputError(str(error)) from None
    if options.dry_run:
        _say_plan(plan, console)
        return EXIT_DONE
    card = CARDS[options.card]
    _say_floors(static, card, console)
    if device.type == "cpu":
        _say_kernels(static, card, frame)
    # a group ends when its case and operation are complete; its records are in the file by then
    for _, records in groupby(measure(plan), lambda record: (record.case["case"], record.case["operation"])):
        _show_results(frame.keep(records), frame)
    _say_goals(frame.records, console)
    if frame.path is not None:
        _draw(frame)
    return _exit_code(frame.records)


def _plan(options: argparse.Namespace, device: torch.device, frame: Frame) -> tuple[Plan, list[Case]]:
    """Return what to measure here, and the cases as a card would get them.

    Raises:
        ValueError: names what is wrong and the known.
    """
    names = _listed(options.cases)
    overrides = {key: value for key in KEYS if (value := getattr(options, key)) is not None}
    batch, dtype, rounds = DEFAULTS[device.type]
    cases = select_cases(names, overrides, batch=batch, dtype=dtype)
    batch, dtype, _ = DEFAULTS["cuda"]
    static = select_cases(names, overrides, batch=batch, dtype=dtype)
    providers = select_providers(_listed(options.providers))
    if device.type == "cpu" and options.providers is None:
        providers = [provider for provider in providers if provider.name not in SLOW_ON_CPU]
    modes = _listed(options.modes) or list(DIRECTIONS)
    for mode in modes:
        if mode not in DIRECTIONS:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(DIRECTIONS)}")
    if options.card not in CARDS:
        raise ValueError(f"unknown card {options.card!r}; known: {', '.join(CARDS)}")
    frame.clock.steps = len(cases) * len({provider.operation for provider in providers})
    rounds = options.rounds or rounds
    plan = Plan(cases=cases, providers=providers, directions=modes, device=device, rounds=rounds, clock=frame.clock)
    return plan, static


def _draw(frame: Frame) -> None:
    """Draw this run and what the file holds of the same machine, commit and dtype; of a case the last batch."""
    from kernels.benchmarks.plots import write_pictures

    assert frame.path is not None
    same = {_made(record) for record in frame.records}
    alike = [record for record in read_records(frame.path) if _made(record) in same]
    last = {record.case["case"]: record.case["batch"] for record in alike}
    alike = [record for record in alike if record.case["batch"] == last[record.case["case"]]]
    title, names = "Time of local attention", {"roofline": "roofline.png", "bars": "bars.png"}
    for written in (frame.path, *write_pictures(alike, frame.path.parent, title=title, **names)):
        frame.say(f"written: {written}")


def _made(record: Record) -> tuple[str, ...]:
    facts = (record.machine[name] or "" for name in ("card", "processor", "commit"))
    return (*facts, record.case["dtype"])


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
    console.print(shapes)
    ways = compact_table("providers", "provider", "what", "here", words=3)
    for provider in plan.providers:
        reasons = dict.fromkeys(provider.limit(case, plan.device) or "runs" for case in plan.cases)
        ways.add_row(provider.name, escape(provider.what), escape("; ".join(reasons)))
    console.print(ways)


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
    columns = ("registers", "spills", "stack B", "shared B", "warps", "tile")
    title = f"GPU kernels compiled for {card.name} ({card.arch}); nothing was run"
    table = compact_table(title, "cases", "kernel", *columns, words=2)
    try:
        for row in kernel_rows(cases, card):
            numbers = (row.registers, row.spilled, row.stack, row.shared, row.warps, row.tile)
            table.add_row(", ".join(row.cases), row.kernel, *map(str, numbers))
    except Exception as error:  # Triton absent, interpreted, or without its tools: the rest goes on
        frame.say(f"GPU kernels not compiled: {error}")
        return
    if table.row_count:
        frame.console.print(table)


def _show_results(records: Sequence[Record], frame: Frame) -> None:
    """Print one case and operation."""
    case, machine, figures = records[0].case, records[0].machine, records[0].figures
    size = f"{case['batch']} x {case['height']} x {case['width']}, {case['heads']} heads of {case['head_dim']}"
    title = (
        f"{case['case']}, {case['operation']}: {size}, {case['dtype']}, tokens per block: {case['tokens_per_block']}"
    )
    rates = [f"{machine['card'] or machine['processor']}, torch {machine['torch']}"]
    if figures["copy_gb_s"]:
        copy, product = digits(figures["copy_gb_s"]), digits(figures["matrix_tflop_s"])
        rates += [f"measured here: copy {copy} GB/s, matrix product {product} TFLOP/s"]
    columns = {
        "graph": lambda record: "yes" if record.case["graph"] else "",
        "of copy": lambda record: percent(record.figures["copy_percent"]),
        "of matrix": lambda record: percent(record.figures["matrix_percent"]),
        "MiB": lambda record: digits(record.figures["peak_mib"]),
        "error": _worst_error,
    }
    frame.show(records, title, case=("mode",), columns=columns, notes=["; ".join(rates)])


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


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
