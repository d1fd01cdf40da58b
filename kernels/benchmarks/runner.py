"""Check a provider against float64, and time it only if it is right.

A case is prepared once (inputs, truth, the two rates of the device), then every provider is built, checked and timed
in each mode, eagerly and inside a CUDA graph. Whatever does not run becomes a row with its reason: a run ends early
only when the device itself is lost.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kernels.benchmarks import timing
from kernels.benchmarks.cases import Case, Direction, Operation
from kernels.benchmarks.providers import DTYPES, Forward, Provider
from kernels.benchmarks.record import Row, Status, Where, this_machine
from kernels.reference import local_attention_block_reference
from kernels.testing import BLOCK_TOLERANCES, TOLERANCES, attention_truth, poisoned_outputs, relative_rms

__all__ = ["Plan", "measure"]

COPY: Final = "copy"
"""The provider that copies as many bytes as the core must move: what this size can reach on this device."""
_LARGEST_INPUTS: Final = 8 << 30
"""Bytes that the inputs of a chain may take together."""


_INPUTS: Final[dict[Operation, tuple[str, ...]]] = {
    "core": ("qkv",),
    "block": ("x", "norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias"),
}
_TOLERANCES: Final = {"core": TOLERANCES, "block": BLOCK_TOLERANCES}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Choice of what to measure, and where."""

    cases: Sequence[Case]
    providers: Sequence[Provider]
    directions: Sequence[Direction]
    device: torch.device
    rounds: int
    """Samples per timing."""
    graphs: bool = True
    """Also inside a CUDA graph, where there is a GPU."""
    seconds: float | None = None
    """After so long nothing new is begun; what is left gets a row that says so."""


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """A case with its data: what all providers of an operation share."""

    case: Case
    operation: Operation
    where: Where
    inputs: tuple[Tensor, ...]
    grad_out: Tensor
    truth: tuple[Tensor, ...]
    """Output and the gradient of every input, float64."""
    copy_rate: float
    matrix_rate: float


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Errors against float64, and why the provider is not timed (empty if it is)."""

    errors: dict[str, float]
    wrong: str


@dataclass(kw_only=True)
class _Clock:
    """The end of the allowed time, and the reason why nothing more is begun."""

    end: float | None
    stop: str = ""

    def stopped(self) -> bool:
        if not self.stop and self.end is not None and time.monotonic() > self.end:
            self.stop = "not begun: the time allowed for this run was over"
        return bool(self.stop)


def measure(plan: Plan) -> Iterator[Row]:
    """Rows as they are measured, case after case."""
    clock = _Clock(end=None if plan.seconds is None else time.monotonic() + plan.seconds)
    where = this_machine(plan.device)
    stream = torch.cuda.stream(torch.cuda.Stream()) if plan.device.type == "cuda" else nullcontext()
    with stream:  # a graph captures one stream; what is captured must have been recorded there
        for case in plan.cases:
            for operation in ("core", "block"):
                providers = [provider for provider in plan.providers if provider.operation == operation]
                if providers:
                    yield from _measure_case(plan, case, operation, providers, where, clock)


def _measure_case(
    plan: Plan, case: Case, operation: Operation, providers: Sequence[Provider], where: Where, clock: _Clock
) -> Iterator[Row]:
    torch.compiler.reset()  # each case is a new shape for the same code; torch gives up after eight
    try:
        problem = None if clock.stopped() else _prepare(case, operation, where, plan.device)
    except Exception as error:  # whatever fails is a row with its reason; the rest is measured
        problem = None
        clock.stop = _lost(plan.device)
        for provider in providers:
            yield _row(where, case, provider, status="failed", reason=f"inputs and truth: {_sentence(error)}")
        return
    if problem is None:
        yield from (_row(where, case, provider, status="skipped", reason=clock.stop) for provider in providers)
        return
    if operation == "core":
        yield from _copies(plan, problem)
    for provider in providers:
        yield from _measure_provider(plan, problem, provider, clock)


def _measure_provider(plan: Plan, problem: _Problem, provider: Provider, clock: _Clock) -> Iterator[Row]:
    """Every row of one provider on one case."""
    case, where = problem.case, problem.where
    limit = clock.stop if clock.stopped() else provider.limit(case, plan.device)
    if limit is not None:
        yield _row(where, case, provider, status="skipped", reason=limit)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            forward = provider.build(case)
            check = _check(forward, problem, poison=provider.ours and plan.device.type == "cuda")
        except Exception as error:  # whatever fails is a row with its reason; the rest is measured
            clock.stop = _lost(plan.device)
            yield _row(where, case, provider, status="failed", reason=_sentence(error, said))
            return
    if check.wrong:
        yield _row(where, case, provider, status="refused", reason=check.wrong, **check.errors)
        return
    yield from _time_modes(plan, problem, provider, forward, check.errors, clock)


def _time_modes(
    plan: Plan, problem: _Problem, provider: Provider, forward: Forward, errors: dict[str, float], clock: _Clock
) -> Iterator[Row]:
    """A row per direction, eagerly and inside a CUDA graph."""
    case, where = problem.case, problem.where
    for direction in plan.directions:
        for graph in (False, True) if plan.graphs and plan.device.type == "cuda" else (False,):
            if clock.stopped():
                yield _row(where, case, provider, direction, graph, status="skipped", reason=clock.stop, **errors)
                continue
            try:
                yield _timed(plan, problem, provider, forward, direction, graph, errors)
            except Exception as error:  # whatever fails is a row with its reason; the rest is measured
                clock.stop = _lost(plan.device)
                reason = _sentence(error)
                yield _row(where, case, provider, direction, graph, status="failed", reason=reason, **errors)


def _prepare(case: Case, operation: Operation, where: Where, device: torch.device) -> _Problem:
    inputs, grad_out = _make_inputs(case, operation, device, seed=0)
    return _Problem(
        case=case,
        operation=operation,
        where=where,
        inputs=inputs,
        grad_out=grad_out,
        truth=_truth(case, operation, inputs, grad_out),
        copy_rate=timing.copy_bandwidth(device),
        matrix_rate=timing.matrix_rate(device, DTYPES[case.dtype]),
    )


def _make_inputs(
    case: Case, operation: Operation, device: torch.device, seed: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Random inputs that require gradients, and a random gradient of the result; values of about one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale + mean
        return values.to(DTYPES[case.dtype])

    shape, dim, inner = (case.batch, case.height, case.width), case.dim, case.inner
    if operation == "core":
        inputs = [normal(*shape, 3 * inner)]
    else:
        inputs = [normal(*shape, dim), normal(dim, scale=0.1, mean=1.0), normal(dim, scale=0.1)]
        inputs += [normal(3 * inner, dim, scale=dim**-0.5), normal(dim, inner, scale=inner**-0.5), normal(dim)]
    grad_out = normal(*shape, inner if operation == "core" else dim)
    return tuple(tensor.requires_grad_() for tensor in inputs), grad_out


def _truth(case: Case, operation: Operation, inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    settings: Any = {"num_heads": case.heads, "blocks_per_side": case.blocks_per_side}
    if operation == "core":
        return attention_truth(inputs[0], grad_out, **settings)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = local_attention_block_reference(*wide, **settings)
    return (out.detach(), *torch.autograd.grad(out, wide, grad_out.double()))


def _check(forward: Forward, problem: _Problem, *, poison: bool) -> _Check:
    """Output and gradients against float64; ``poison`` fills what our kernels are to write with NaN first."""
    with ExitStack() as stack:
        if poison:
            stack.enter_context(poisoned_outputs())
        out = forward(*problem.inputs)
        grads = torch.autograd.grad(out, problem.inputs, problem.grad_out)
    truth_out, *truth_grads = problem.truth
    if out.shape != truth_out.shape:
        raise ValueError(f"returned shape {tuple(out.shape)}, expected {tuple(truth_out.shape)}")
    names = _INPUTS[problem.operation]
    tolerance = _TOLERANCES[problem.operation][out.dtype]
    found = {"the output": (relative_rms(out.detach(), truth_out), tolerance.forward)}
    for name, grad, truth in zip(names, grads, truth_grads, strict=True):
        found[f"the gradient of {name}"] = (relative_rms(grad, truth), tolerance.backward)
    forward_error, *backward_errors = (error for error, _ in found.values())
    nan = [error for error in backward_errors if error != error]
    errors = {"error_forward": forward_error, "error_backward": (nan or [max(backward_errors)])[0]}
    wrong = (
        f"wrong: relative RMS error {error:.2g} of {name}, {problem.case.dtype} allows {allowed:.2g}"
        for name, (error, allowed) in found.items()
        if not error <= allowed
    )
    return _Check(errors=errors, wrong=next(wrong, ""))


def _timed(
    plan: Plan,
    problem: _Problem,
    provider: Provider,
    forward: Forward,
    direction: Direction,
    graph: bool,
    errors: dict[str, float],
) -> Row:
    case, device = problem.case, plan.device
    moved, flops = case.bytes_moved(problem.operation, direction), case.flops(problem.operation, direction)
    held = sum(tensor.nbytes for tensor in (*problem.inputs, problem.grad_out))
    length = min(timing.chain_length(moved, device), max(1, _LARGEST_INPUTS // held))
    data = [(problem.inputs, problem.grad_out)]
    data += [_make_inputs(case, problem.operation, device, seed) for seed in range(1, length)]
    chain = [_run(forward, direction, inputs, grad_out) for inputs, grad_out in data]
    peak = timing.peak_memory(chain[0], device)
    timed = timing.time_chain(timing.capture(chain) if graph else chain, device, plan.rounds)
    if graph:  # one replay is the whole chain
        timed = timing.Timing(seconds=tuple(second / length for second in timed.seconds), runs=length)
    figures = _figures(timed, moved, flops, problem)
    return _row(problem.where, case, provider, direction, graph, status="ok", peak_mib=peak, **figures, **errors)


def _run(forward: Forward, direction: Direction, inputs: tuple[Tensor, ...], grad_out: Tensor) -> timing.Run:
    if direction == "forward":
        return lambda: forward(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(forward(*inputs), inputs, grad_out)
    out = forward(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def _copies(plan: Plan, problem: _Problem) -> Iterator[Row]:
    """A copy of as many bytes as the core must move, by the same clock."""
    case, device = problem.case, plan.device
    for direction in plan.directions:
        moved = case.bytes_moved("core", direction)
        shape = (timing.chain_length(moved, device), max(1, moved // 2))
        source = torch.zeros(shape, dtype=torch.int8, device=device).random_(-128, 128)
        target = torch.empty_like(source)
        chain = [lambda a=a, b=b: b.copy_(a) for a, b in zip(source, target, strict=True)]
        timed = timing.time_chain(chain, device, plan.rounds)
        what = {"operation": "core", "provider": COPY, "mode": direction, "graph": False}
        yield Row(**asdict(problem.where), **_shape(case), **what, status="ok", **_figures(timed, moved, 0, problem))


def _figures(timed: timing.Timing, moved: int, flops: int, problem: _Problem) -> dict[str, Any]:
    low, high = timed.spread
    bandwidth, rate = moved / timed.median, flops / timed.median
    return {
        "n": len(timed.seconds),
        "runs": timed.runs,
        "median_us": timed.median * 1e6,
        "p20_us": low * 1e6,
        "p80_us": high * 1e6,
        "bytes": moved,
        "flops": flops,
        "gb_s": bandwidth / 1e9,
        "copy_gb_s": problem.copy_rate / 1e9,
        "copy_percent": 100 * bandwidth / problem.copy_rate,
        "tflop_s": rate / 1e12,
        "matrix_tflop_s": problem.matrix_rate / 1e12,
        "matrix_percent": 100 * rate / problem.matrix_rate,
    }


def _row(
    where: Where,
    case: Case,
    provider: Provider,
    direction: Direction | str = "",
    graph: bool = False,
    *,
    status: Status,
    **values: Any,
) -> Row:
    what = {"operation": provider.operation, "provider": provider.name, "mode": direction, "graph": graph}
    return Row(**asdict(where), **_shape(case), **what, status=status, **values)


def _shape(case: Case) -> dict[str, Any]:
    names = ("batch", "height", "width", "heads", "head_dim", "blocks_per_side", "tokens_per_block", "dim", "dtype")
    return {"case": case.name} | {name: getattr(case, name) for name in names}


def _lost(device: torch.device) -> str:
    """Empty if the device still answers after an error; else why nothing more can be run in this process."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # whatever fails is a row with its reason; the rest is measured
        return f"not begun: the device was lost before ({_sentence(error)})"
    return ""


def _sentence(error: Exception, said: Sequence[warnings.WarningMessage] = ()) -> str:
    """Say on one line what went wrong: the error, and what torch warned of before it (why a backend refuses, say)."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
    lines += [str(warning.message).splitlines()[0] for warning in said if "deprecat" not in str(warning.message)]
    return "; ".join(dict.fromkeys(line.strip() for line in lines))[:300]
