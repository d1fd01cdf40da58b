"""Check a way to compute local attention against float64, and time it only if it is right.

A case is prepared once (inputs, truth, the two rates of the device), then every provider is built, checked and timed
in each mode, eagerly and inside a CUDA graph. Providers are not timed in turn, as other benchmarks do: what each keeps
for its backward passes would not fit into a card's memory beside that of the others. Whatever does not run becomes a
record with its reason: a run ends early only when the device itself is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kernels.benchmarks import timing
from kernels.benchmarks.cases import Case, Direction, Operation
from kernels.benchmarks.providers import DTYPES, Forward, Provider
from kernels.benchmarks.race import OVER, Clock
from kernels.benchmarks.record import Layout, Record, Status, figures_of, this_machine
from kernels.machine import emulates_bf16
from kernels.reference import local_attention_block_reference
from kernels.testing import BLOCK_TOLERANCES, TOLERANCES, attention_truth, poisoned_outputs, relative_rms

__all__ = ["COPY", "LAYOUT", "Plan", "measure"]

_SHAPE: Final = ("batch", "height", "width", "heads", "head_dim", "blocks_per_side", "tokens_per_block", "dim", "dtype")
_FIGURES: Final = (
    *("runs", "bytes", "flops", "gb_s", "copy_gb_s", "copy_percent", "tflop_s", "matrix_tflop_s", "matrix_percent"),
    *("peak_mib", "error_forward", "error_backward"),
)
LAYOUT: Final = Layout(
    file="local_attention.csv", case=("case", "operation", "mode", "graph", *_SHAPE), figures=_FIGURES
)
"""``mode`` is forward, backward or both; ``runs`` the runs that a sample is the mean of; ``bytes`` and ``flops`` the
least traffic and arithmetic of the case (:mod:`kernels.benchmarks.cases`); ``copy_gb_s`` and ``matrix_tflop_s`` what a
large copy and a large product reached just before; errors are relative root mean squares, the gradient's the worst."""
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
    clock: Clock = field(default_factory=Clock)
    """When it is over nothing new is begun; what is left gets a record that says so."""


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """A case with its data: what all providers of an operation share."""

    case: Case
    operation: Operation
    machine: dict[str, Any]
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


def measure(plan: Plan) -> Iterator[Record]:
    """Yield records as they are measured, case after case."""
    machine = this_machine(plan.device)
    stream = torch.cuda.stream(torch.cuda.Stream()) if plan.device.type == "cuda" else nullcontext()
    with stream:  # a graph captures one stream; what is captured must have been recorded there
        for case in plan.cases:
            for operation in ("core", "block"):
                providers = [provider for provider in plan.providers if provider.operation == operation]
                if providers:
                    yield from _measure_case(plan, case, operation, providers, machine)


def _measure_case(
    plan: Plan, case: Case, operation: Operation, providers: Sequence[Provider], machine: dict[str, Any]
) -> Iterator[Record]:
    torch.compiler.reset()  # each case is a new shape for the same code; torch gives up after eight
    reason = _not_begun(plan, case)
    if reason is None:
        plan.clock.begin(f"{case.name}, {operation}: inputs and float64 truth")
        try:
            problem = _prepare(case, operation, machine, plan.device)
        except Exception as error:  # whatever fails is a record with its reason; the rest is measured
            reason = f"inputs and truth: {_reason(error)}"
            yield from (_record(machine, case, provider, status="failed", reason=reason) for provider in providers)
            return
    if reason is not None:
        yield from (_record(machine, case, provider, status="skipped", reason=reason) for provider in providers)
        return
    if operation == "core":
        yield from _copies(plan, problem)
    for provider in providers:
        plan.clock.say(f"  {provider.name}")
        yield from _measure_provider(plan, problem, provider)


def _not_begun(plan: Plan, case: Case) -> str | None:
    """Return why a case is not measured here at all; None if it is."""
    if plan.clock.over():
        return OVER
    if plan.device.type == "cpu":
        return "this processor emulates bf16" if case.dtype == "bf16" and emulates_bf16() else None
    return _lost(plan.device)


def _measure_provider(plan: Plan, problem: _Problem, provider: Provider) -> Iterator[Record]:
    """Yield every record of one provider on one case."""
    case, machine = problem.case, problem.machine
    limit = _not_begun(plan, case) or provider.limit(case, plan.device)
    if limit is not None:
        yield _record(machine, case, provider, status="skipped", reason=limit)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            forward = provider.build(case)
            check = _check(forward, problem, poison=provider.ours and plan.device.type == "cuda")
        except Exception as error:  # whatever fails is a record with its reason; the rest is measured
            yield _record(machine, case, provider, status="failed", reason=_reason(error, said))
            return
    if check.wrong:
        yield _record(machine, case, provider, status="refused", reason=check.wrong, **check.errors)
        return
    yield from _time_modes(plan, problem, provider, forward, check.errors)


def _time_modes(
    plan: Plan, problem: _Problem, provider: Provider, forward: Forward, errors: dict[str, float]
) -> Iterator[Record]:
    """Yield a record per direction, eagerly and inside a CUDA graph."""
    case, machine = problem.case, problem.machine
    for direction in plan.directions:
        for graph in (False, True) if plan.graphs and plan.device.type == "cuda" else (False,):
            what: Any = (machine, case, provider, direction, graph)
            if (reason := _not_begun(plan, case)) is not None:
                yield _record(*what, status="skipped", reason=reason, **errors)
                continue
            try:
                yield _timed(plan, problem, provider, forward, direction, graph, errors)
            except Exception as error:  # whatever fails is a record with its reason; the rest is measured
                yield _record(*what, status="failed", reason=_reason(error), **errors)


def _prepare(case: Case, operation: Operation, machine: dict[str, Any], device: torch.device) -> _Problem:
    inputs, grad_out = _make_inputs(case, operation, device, seed=0)
    return _Problem(
        case=case,
        operation=operation,
        machine=machine,
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
) -> Record:
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
    figures = {**_figures(timed, moved, flops, problem), "peak_mib": peak, **errors}
    return _record(problem.machine, case, provider, direction, graph, samples=timed.seconds, **figures)


def _run(forward: Forward, direction: Direction, inputs: tuple[Tensor, ...], grad_out: Tensor) -> timing.Run:
    if direction == "forward":
        return lambda: forward(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(forward(*inputs), inputs, grad_out)
    out = forward(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def _copies(plan: Plan, problem: _Problem) -> Iterator[Record]:
    """A copy of as many bytes as the core must move, by the same clock."""
    case, device = problem.case, plan.device
    for direction in plan.directions:
        moved = case.bytes_moved("core", direction)
        shape = (timing.chain_length(moved, device), max(1, moved // 2))
        source = torch.zeros(shape, dtype=torch.int8, device=device).random_(-128, 128)
        target = torch.empty_like(source)
        chain = [lambda a=a, b=b: b.copy_(a) for a, b in zip(source, target, strict=True)]
        timed = timing.time_chain(chain, device, plan.rounds)
        named = Provider(name=COPY, operation="core", what="", build=lambda case: torch.clone)
        figures = _figures(timed, moved, 0, problem)
        yield _record(problem.machine, case, named, direction, False, samples=timed.seconds, **figures)


def _figures(timed: timing.Timing, moved: int, flops: int, problem: _Problem) -> dict[str, Any]:
    bandwidth, rate = moved / timed.median, flops / timed.median
    return {
        "runs": timed.runs,
        "bytes": moved,
        "flops": flops,
        "gb_s": bandwidth / 1e9,
        "copy_gb_s": problem.copy_rate / 1e9,
        "copy_percent": 100 * bandwidth / problem.copy_rate,
        "tflop_s": rate / 1e12,
        "matrix_tflop_s": problem.matrix_rate / 1e12,
        "matrix_percent": 100 * rate / problem.matrix_rate,
    }


def _record(
    machine: dict[str, Any],
    case: Case,
    provider: Provider,
    direction: Direction | str = "",
    graph: bool = False,
    *,
    status: Status = "ok",
    reason: str = "",
    samples: Sequence[float] = (),
    **figures: Any,
) -> Record:
    """Return a record; ``samples`` in seconds."""
    what = {"case": case.name, "operation": provider.operation, "mode": direction, "graph": graph}
    return Record(
        case=what | {name: getattr(case, name) for name in _SHAPE},
        provider=provider.name,
        unit="us",
        status=status,
        reason=reason,
        figures=dict.fromkeys(_FIGURES) | figures,
        machine=machine,
        **(figures_of([second * 1e6 for second in samples]) if samples else {}),
    )


def _lost(device: torch.device) -> str | None:
    """Return why nothing more can be run in this process; None if the GPU still answers."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:  # of any kind, once the device is lost
        return f"not begun: the device was lost before ({_line(error)})"
    return None


def _reason(error: Exception, said: Sequence[warnings.WarningMessage] = ()) -> str:
    """Give back the memory of what failed; return the error, and what torch warned of before it, on one line."""
    if torch.cuda.is_initialized():
        with suppress(Exception):  # of a device that is lost
            torch.cuda.empty_cache()
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    # a backend that refuses says why in warnings
    warned = [_line(warning.message) for warning in said if "deprecat" not in str(warning.message)]
    return "; ".join(dict.fromkeys((f"{type(error).__name__}: {_line(error)}", *warned)))[:300]


def _line(message: Exception | Warning | str) -> str:
    return (str(message).splitlines() or [""])[0].strip()
