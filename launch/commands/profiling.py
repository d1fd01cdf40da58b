"""``htnet profile``: throughput of local attention, against the alternatives and against the hardware. Needs no data.

``python -m launch.commands.profiling`` runs where the packages for data and clusters are absent. With a GPU every
provider is timed there; without one the providers of a CPU are, on small batches, and of the GPU kernels is shown what
needs no GPU: their least traffic and arithmetic, the floor on a named card, and what the compiler makes of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from htnet.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_PARTIAL, InputError
from launch.benchmarks.results import results_file

if TYPE_CHECKING:
    import torch

    from kernels.benchmarks.cases import Case
    from kernels.benchmarks.record import Row
    from kernels.benchmarks.runner import Plan

__all__ = ["add_arguments", "main", "profile"]

DEFAULTS: Final[dict[str, tuple[int, str, int]]] = {"cuda": (256, "bf16", 50), "cpu": (2, "fp32", 5)}
"""Batch, dtype and samples of a timing by kind of device; what is computed for a card takes those of ``cuda``."""
CARD: Final = "h200"
RESULTS: Final = "local_attention.csv"
TRAINING_RESULTS: Final = "training_epochs.csv"
SLOW_ON_CPU: Final = ("compile", "block-compile")
"""Left out on a CPU unless named: compiling takes far longer there than everything else together."""
NOT_FOR: Final[dict[str, tuple[str, ...]]] = {
    "end-to-end": ("cases", "providers", "modes", "set", "card", "time-limit"),
    "training": ("cases", "providers", "modes", "card"),
    "input": ("providers", "modes", "card"),
}
"""Options that say nothing to a mode: given all the same, they are refused, not left unread."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported for them."""
    parser.add_argument("--cases", metavar="A,B", help="paper, fine, hd, or one level as fine/0 (default: all)")
    parser.add_argument("--providers", metavar="A,B", help="ways to compute it; --dry-run lists them (default: all)")
    parser.add_argument("--modes", metavar="A,B", help="forward, backward, both (default: all)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="batch, dtype; or a shape of its own: tokens, heads, head_dim, blocks_per_side, dim; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="append results there and draw them (default: print)")
    parser.add_argument("--card", help=f"whose floors are shown: a100, h100, h200, b200 (default {CARD})")
    parser.add_argument("--rounds", type=int, help="samples per timing (default: 50 on a GPU, 5 on a CPU)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no measurement after so long")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--end-to-end", action="store_true", help="fold training against the public code's way, on CPUs")
    other.add_argument("--training", action="store_true", help="epochs of training without input, on this device")
    other.add_argument("--input", action="store_true", help="the training stream against a plain DataLoader")
    parser.add_argument("--train-step", action="store_true", help="with --input: the share of waiting in a step too")


def profile(options: argparse.Namespace, console: Console) -> int:
    """Run what the options ask for; returns the exit code."""
    _check_options(options)
    if options.end_to_end:
        return _end_to_end(options, console)
    if options.input:
        from launch.benchmarks.input import profile_input

        return profile_input(options, console)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.training:
        return _training(options, device, console)
    return _local_attention(options, device, console)


def _check_options(options: argparse.Namespace) -> None:
    """InputError for an option that the mode does not know, and for a number that cannot be."""
    if options.train_step and not options.input:
        raise InputError("--train-step belongs to --input")
    given = {**vars(options), "set": options.overrides or None}
    for mode, others in NOT_FOR.items():
        for name in others if given[mode.replace("-", "_")] else ():
            if given[name.replace("-", "_")] is not None:
                raise InputError(f"--{mode} takes no --{name}")
    for name in ("rounds", "time-limit"):
        value = given[name.replace("-", "_")]
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be positive, got {value:g}")


def _local_attention(options: argparse.Namespace, device: torch.device, console: Console) -> int:
    from kernels.benchmarks.record import COLUMNS
    from kernels.benchmarks.runner import measure

    path = results_file(options.out, RESULTS, COLUMNS)
    card = options.card or CARD
    try:  # the benchmarks know no errors of ours
        plan, static = _plan(options, device)
    except ValueError as error:
        raise InputError(str(error)) from None
    if options.dry_run:
        _say_plan(plan, console)
        return EXIT_DONE
    _say_floors(static, card, console)
    if device.type == "cpu":
        _say_kernels(static, card, console)
    rows = _keep(_shown(measure(plan), console), path)
    _say_goals(rows, console)
    if path is not None:
        _draw(rows, path, console)
    return _exit_code(rows)


def _plan(options: argparse.Namespace, device: torch.device) -> tuple[Plan, list[Case]]:
    """Plan the measurements, and the cases as a card would get them; ValueError names what is wrong and the known."""
    from kernels.benchmarks.cards import CARDS
    from kernels.benchmarks.cases import DIRECTIONS, select_cases
    from kernels.benchmarks.providers import select_providers
    from kernels.benchmarks.runner import Plan

    names, overrides = _listed(options.cases), _pairs(options.overrides)
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
    if (card := options.card or CARD) not in CARDS:
        raise ValueError(f"unknown card {card!r}; known: {', '.join(CARDS)}")
    rounds = rounds if options.rounds is None else options.rounds
    limits = {"rounds": rounds, "seconds": options.time_limit}
    return Plan(cases=cases, providers=providers, directions=modes, device=device, **limits), static


def _keep(rows: Iterable[Row], path: Path | None) -> list[Row]:
    """Append each row to the file as it comes, and return them all."""
    from kernels.benchmarks.record import append_rows

    kept: list[Row] = []

    def passing() -> Iterator[Row]:
        for row in rows:
            kept.append(row)
            yield row

    if path is None:
        kept.extend(rows)
    else:
        append_rows(path, passing())
    return kept


def _draw(rows: Sequence[Row], path: Path, console: Console) -> None:
    """Draw this run together with what the file holds of the same card, commit and dtype; of a case the last batch."""
    from kernels.benchmarks.plots import write_pictures
    from kernels.benchmarks.record import read_rows

    same = {(row.card, row.commit, row.dtype) for row in rows}
    alike = [row for row in read_rows(path) if (row.card, row.commit, row.dtype) in same]
    last = {row.case: row.batch for row in alike}
    alike = [row for row in alike if row.batch == last[row.case]]
    for written in (path, *write_pictures(alike, path.parent)):
        console.print(f"written: {written}", markup=False, highlight=False, soft_wrap=True)


def _exit_code(rows: Sequence[Row]) -> int:
    """Partial when nothing was timed, or when one of ours broke or is wrong; a rival's limit is a result."""
    from kernels.benchmarks.providers import PROVIDERS

    timed = any(row.status == "ok" and row.provider in PROVIDERS for row in rows)
    ours_broke = any(
        row.status in ("failed", "refused") and row.provider in PROVIDERS and PROVIDERS[row.provider].ours
        for row in rows
    )
    return EXIT_DONE if timed and not ours_broke else EXIT_PARTIAL


# --- what is said on the terminal


def _say_plan(plan: Plan, console: Console) -> None:
    columns = ("case", "dtype", "map", "blocks", "tokens per block", "heads", "head_dim", "dim")
    shapes = _compact(f"cases, each {', '.join(plan.directions)}, on the {plan.device.type}", *columns, words=2)
    for case in plan.cases:
        size = f"{case.batch} x {case.height} x {case.width}"
        facts = (case.blocks, case.tokens_per_block, case.heads, case.head_dim, case.dim)
        shapes.add_row(case.name, case.dtype, size, *(f"{fact:,}" for fact in facts))
    console.print(shapes)
    ways = _compact("providers", "provider", "what", "here", words=3)
    for provider in plan.providers:
        reasons = dict.fromkeys(provider.limit(case, plan.device) or "runs" for case in plan.cases)
        ways.add_row(provider.name, escape(provider.what), escape("; ".join(reasons)))
    console.print(ways)


def _compact(title: str, *columns: str, words: int = 1, caption: str = "") -> Table:
    """A table that fits 80 columns: no lines between columns, the first ``words`` columns to the left."""
    table = Table(title=title, caption=caption or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for place, column in enumerate(columns):
        left = place < words
        table.add_column(column, justify="left" if left else "right", no_wrap=place == 0 or (left and words == 2))
    return table


def _say_floors(cases: Sequence[Case], card_name: str, console: Console) -> None:
    from kernels.benchmarks.cards import CARDS
    from kernels.benchmarks.cases import OPERATIONS

    card, first = CARDS[card_name], cases[0]
    columns = [f"{what} {direction}" for what in ("MB", "GFLOP", "floor us") for direction in ("fwd", "bwd")]
    table = _compact(
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
            least = [f"{_f(seconds * 1e6)} {bound[0].upper()}" for seconds, bound in floors]
            table.add_row(case.name, operation, str(case.tokens_per_block), *map(_f, cells), *least)
    console.print(table)


def _say_kernels(cases: Sequence[Case], card_name: str, console: Console) -> None:
    """Print what the compiler makes of our kernels for the card; a machine that cannot compile them says why."""
    from kernels.benchmarks.cards import CARDS
    from kernels.benchmarks.static import kernel_rows

    card = CARDS[card_name]
    columns = ("registers", "spills", "stack B", "shared B", "warps", "tile")
    title = f"GPU kernels compiled for {card.name} ({card.arch}); nothing was run"
    table = _compact(title, "cases", "kernel", *columns, words=2)
    try:
        for row in kernel_rows(cases, card):
            numbers = (row.registers, row.spilled, row.stack, row.shared, row.warps, row.tile)
            table.add_row(", ".join(row.cases), row.kernel, *map(str, numbers))
    except Exception as error:  # Triton absent, interpreted, or without its tools: the rest goes on
        console.print(f"GPU kernels not compiled: {error}", markup=False, highlight=False, soft_wrap=True)
        return
    if table.row_count:
        console.print(table)


def _shown(rows: Iterable[Row], console: Console) -> Iterator[Row]:
    """Pass rows on and print a table whenever a case and operation is complete."""
    batch: list[Row] = []
    for row in rows:
        if batch and (row.case, row.operation) != (batch[0].case, batch[0].operation):
            console.print(_result_table(batch))
            batch = []
        batch.append(row)
        yield row
    if batch:
        console.print(_result_table(batch))


def _result_table(rows: Sequence[Row]) -> Table:
    """One case and operation: a line per timing, and below it why others have none."""
    first = rows[0]
    size = f"{first.batch} x {first.height} x {first.width}, {first.heads} heads of {first.head_dim}, {first.dtype}"
    timed = [row for row in rows if row.status == "ok"]
    notes = _reasons(rows)
    if timed:
        rates = f"copy {_f(timed[0].copy_gb_s)} GB/s, matrix product {_f(timed[0].matrix_tflop_s)} TFLOP/s"
        notes = [f"{first.card}, torch {first.torch}, n = {timed[0].n}; measured here: {rates}", *notes]
    unit, factor = ("ms", 1e3) if any((row.p80_us or 0.0) >= 1e4 for row in timed) else ("us", 1.0)
    table = _compact(
        escape(f"{first.case}, {first.operation}: {size}, tokens per block: {first.tokens_per_block}"),
        *("provider", "mode", unit, "20 % .. 80 %", "of copy", "of matrix", "MiB", "error"),
        words=2,
        caption=escape("\n".join(notes)),
    )
    before = ""
    for row in timed:
        mode = f"{row.mode}{' graph' if row.graph else ''}"
        middle, low, high = (_f((value or 0.0) / factor) for value in (row.median_us, row.p20_us, row.p80_us))
        shares = (_percent(row.copy_percent), _percent(row.matrix_percent))
        error = "" if row.error_forward is None else f"{max(row.error_forward, row.error_backward or 0.0):.0e}"
        name, error = ("", "") if row.provider == before else (row.provider, error)
        table.add_row(name, mode, middle, f"{low} .. {high}", *shares, _f(row.peak_mib), error)
        before = row.provider
    return table


def _reasons(rows: Sequence[Row]) -> list[str]:
    """A line per reason for which something was not timed, with all that it holds for."""
    held: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            mode = f" {row.mode}{' graph' if row.graph else ''}" if row.mode else ""
            held.setdefault(f"{row.status}: {row.reason}", []).append(f"{row.provider}{mode}")
    return [f"{reason}: {', '.join(names)}" for reason, names in held.items()]


def _say_goals(rows: Sequence[Row], console: Console) -> None:
    """Ours against the goals: share of the copy bandwidth, and times the best of the rivals."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.case, row.provider, row.mode)
        if row.status == "ok" and (key not in best or (row.median_us or 0.0) < (best[key].median_us or 0.0)):
            best[key] = row
    columns = {"x sdpa": ("sdpa",), "x compile": ("compile",), "x flex": ("flex",)}
    shown = ("case", "forward of copy", "backward of copy", *columns, "block x best other")
    caption = "the quicker of eager and graph; x: forward and backward together"
    table = _compact("ours; goals: 85 %, 75 %, 2, 1.5, 1.5, 1.5", *shown, caption=caption)
    for case in dict.fromkeys(row.case for row in rows):
        shares = [best.get((case, "triton", mode)) for mode in ("forward", "backward")]
        cells = ["" if row is None else _percent(row.copy_percent) for row in shares]
        cells += [_ratio(best, case, "triton", rivals) for rivals in columns.values()]
        others = ("block-unfused", "block-sdpa", "block-compile", "block-reference")
        cells.append(_ratio(best, case, "block-triton", others))
        if any(cells):
            table.add_row(case, *cells)
    if table.row_count:
        console.print(table)


def _ratio(best: Mapping[tuple[str, str, str], Row], case: str, ours: str, rivals: Sequence[str]) -> str:
    """The quickest rival's time over ours; empty where either is missing."""
    mine = best.get((case, ours, "both"))
    theirs = [row.median_us for name in rivals if (row := best.get((case, name, "both"))) and row.median_us]
    return f"{min(theirs) / mine.median_us:.2f}" if mine is not None and mine.median_us and theirs else ""


def _f(value: float | None) -> str:
    """Three digits, or whole numbers with separators."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else "<0.001" if 0 < value < 0.001 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """``tokens=16`` and ``tokens=16 heads=3`` alike; InputError for what is no pair."""
    pairs = [part.partition("=") for text in texts for part in text.split()]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(f"--set {key}{equals}{value}: expected key=value")
    return {key: value for key, _, value in pairs}


# --- whole networks


def _end_to_end(options: argparse.Namespace, console: Console) -> int:
    """:mod:`launch.benchmarks.end_to_end` with the options that both have."""
    from launch.benchmarks import end_to_end

    path = results_file(options.out, end_to_end.RESULTS, end_to_end.COLUMNS)
    rounds = options.rounds or end_to_end.ROUNDS
    if options.dry_run:
        console.print(f"{rounds} epochs each, on the CPU: {'; '.join(end_to_end.PROVIDERS)}", soft_wrap=True)
        return EXIT_DONE
    end_to_end.run(path, console, rounds=rounds)
    return EXIT_DONE


def _training(options: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Epochs of the paper's fold (436 samples in steps of 256 and 180) on this device, input already there.

    What a fold pays for its network and optimizer, on the paper's map and on the fine one, by attention backend,
    precision and engine. ``--set tiny=1`` runs a network of a few thousand weights, to try the program.
    """
    from kernels.benchmarks.record import append_lines

    tiny = _pairs(options.overrides) == {"tiny": "1"}
    if options.overrides and not tiny:
        raise InputError("--training takes no --set but tiny=1")
    columns = list(_training_line(next(_trainings(device)), {}, device, tiny=tiny))
    path = results_file(options.out, TRAINING_RESULTS, columns)
    deadline = time.monotonic() + (options.time_limit or 3600.0)
    rounds = options.rounds or (20 if device.type == "cuda" else 3)
    shown = ("network", "attention", "engine", "precision", "ms (20 % .. 80 %)", "n", "peak GiB")
    table = _compact(f"epochs of {7 if tiny else 436} samples on the {device.type}", *shown, words=4)
    if options.dry_run:
        for what in _trainings(device):
            table.add_row(*what.values(), "", str(rounds))
        console.print(table)
        return EXIT_DONE
    failed = False
    for what in _trainings(device):
        if time.monotonic() > deadline:
            figures: dict[str, Any] = {"status": "skipped", "reason": "the time allowed for this run was over"}
        else:
            figures = _epochs(what, device, rounds, tiny=tiny, deadline=deadline)
        failed |= figures["status"] == "failed"
        if path is not None:
            append_lines(path, columns, [_training_line(what, figures, device, tiny=tiny)])
        ok = figures["status"] == "ok"
        spread = f"{_f(figures['median_ms'])} ({_f(figures['p20_ms'])} .. {_f(figures['p80_ms'])})" if ok else ""
        last = (spread, str(figures["n"]), _f(figures["peak_gib"])) if ok else (escape(figures["reason"]), "", "")
        table.add_row(*(str(value) for value in what.values()), *last)
    console.print(table)
    return EXIT_PARTIAL if failed else EXIT_DONE


def _trainings(device: torch.device) -> Iterator[dict[str, str]]:
    """Network, attention backend, engine and precision; on the paper's map every backend takes the same short cut."""
    backends = {"paper": ("auto",), "fine": ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)}
    for network, names in backends.items():
        for precision in ("bf16", "fp32") if network == "paper" else ("bf16",):
            for attention in names:
                for engine in ("torch", "deepspeed") if network == "paper" else ("torch",):
                    yield {"network": network, "attention": attention, "engine": engine, "precision": precision}


def _epochs(
    what: Mapping[str, str], device: torch.device, rounds: int, *, tiny: bool, deadline: float
) -> dict[str, Any]:
    """Wall clock of whole epochs, after one that is not counted; a failure is a result with its reason."""
    import torch

    engine = None
    try:
        engine, batches = _engine_and_batches(what, device, tiny=tiny)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        for epoch in range(rounds + 1):
            begin = time.perf_counter()
            losses = [engine.train_step(*batch, 5e-5) for batch in batches]
            finite = bool(torch.stack(losses).isfinite().all())  # waits for the device
            if epoch:
                seconds.append(1e3 * (time.perf_counter() - begin))
            if not finite:
                return {"status": "failed", "reason": "the loss is not finite"}
            if seconds and time.monotonic() > deadline:
                break
        low, high = _quantiles(seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        figures = {"median_ms": statistics.median(seconds), "p20_ms": low, "p80_ms": high, "n": len(seconds)}
        return {"status": "ok", "reason": "", **figures, "peak_gib": peak}
    except Exception as error:  # an engine that is not installed, memory, a driver: the other rows go on
        if isinstance(error, ModuleNotFoundError):
            return {"status": "skipped", "reason": f"{error.name} is not installed"}
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        if engine is not None:
            engine.close()


def _engine_and_batches(what: Mapping[str, Any], device: torch.device, *, tiny: bool) -> tuple[Any, list[Any]]:
    import torch

    from htnet.config import EngineConfig, HTNetConfig, TrainConfig
    from htnet.model import HTNet
    from htnet.training.engine import create_engine

    size: dict[str, Any] = {"image_size": 112} if what["network"] == "fine" else {}
    small: dict[str, Any] = {"dim": 8, "heads": 1, "depths": (1, 1, 1)} if tiny else {}
    config = HTNetConfig(**size, **small, attention_backend=what["attention"])
    torch.manual_seed(0)
    train = TrainConfig(optimizer="adam", learning_rate=5e-5, batch_size=256)
    engine = EngineConfig(name=what["engine"], precision=what["precision"])
    batches = [
        (
            torch.randn(samples, 3, config.image_size, config.image_size, device=device),
            torch.randint(0, 3, (samples,), device=device),
        )
        for samples in ((4, 3) if tiny else (256, 180))
    ]
    return create_engine(HTNet(config), train, engine, device=device), batches


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def _training_line(
    what: Mapping[str, str], figures: Mapping[str, Any], device: torch.device, *, tiny: bool
) -> dict[str, object]:
    """A line of the file, figures that are missing empty."""
    from kernels.benchmarks.record import this_machine

    names = ("status", "reason", "median_ms", "p20_ms", "p80_ms", "n", "peak_gib")
    return {**asdict(this_machine(device)), **what, "tiny": tiny, **{name: figures.get(name, "") for name in names}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The same without the other sub-commands, and so without what those need."""
    parser = argparse.ArgumentParser(prog="python -m launch.commands.profiling", description=__doc__)
    add_arguments(parser)
    console = Console()
    try:
        return profile(parser.parse_args(arguments), console)
    except InputError as error:
        print(f"profile: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
