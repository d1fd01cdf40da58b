"""Check a way to compute local attention against float64, and time it only if it is right.

A case is prepared once (inputs, truth, the two rates of the device), then every provider is built, checked and timed
in each mode, eagerly and inside a CUDA graph. Providers are not timed in turn, as other benchmarks do: what each keeps
for its backward passes would not fit into a card's memory beside that of the others. Whatever does not run becomes a
record with its reason: a run ends early only when the device itself is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kernels.benchmarks import timing
from kernels.benchmarks.cases import Case, Direction, Operation
from kernels.benchmarks.providers import DTYPES, Forward, Provider
from kernels.benchmarks.race import OVER, Clock
from kernels.benchmarks.record import Layout, Record, this_machine
from kernels.machine import emulates_bf16
from kernels.reference import local_attention_block_reference
from kernels.testing import BLOCK_TOLERANCES, TOLERANCES, attention_truth, poisoned_outputs, relative_rms

__all__ = ["COPY", "LAYOUT", "Plan", "make_inputs", "measure"]

_SHAPE: Final = ("batch", "height", "width", "heads", "head_dim", "blocks_per_side", "tokens_per_block", "dim", "dtype")
_FIGURES: Final = (
    *("runs", "bytes", "flops", "gb_s", "copy_gb_s", "copy_percent", "tflop_s", "matrix_tflop_s", "matrix_percent"),
    *("peak_mib", "error_forward", "error_backward"),
)
LAYOUT: Final = Layout(
    file="local_attention.csv", unit="us", case=("case", "operation", "mode", "graph", *_SHAPE), figures=_FIGURES
)
"""``mode`` is forward, backward or both; ``runs`` the runs that a sample is the mean of; ``bytes`` and ``flops`` the
least traffic and arithmetic of the case (:mod:`kernels.benchmarks.cases`); ``copy_gb_s`` and ``matrix_tflop_s`` what a
large copy and a large product reached just before; errors are relative root mean squares, the gradient's the worst."""
COPY: Final = "copy"
"""The provider that copies as many bytes as the core must move: what this size can reach on this device."""
_LARGEST_INPUTS: Final = 8 << 30
"""Bytes that the inputs of a chain may take together."""
_BLOCK_INPUTS: Final = ("x", "norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias")
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Choice of what to measure, and where."""

    cases: Sequence[Case]
    providers: Sequence[Provider]
    directions: Sequence[Direction]
    device: torch.device
    rounds: int
    """Samples per timing."""
    clock: Clock = field(default_factory=Clock)
    """When it is over nothing new is begun; what is left gets a record that says so."""


def measure(plan: Plan) -> Iterator[Record]:
    """Yield records as they are measured, case after case."""
    machine = this_machine(plan.device)
    stream = torch.cuda.stream(torch.cuda.Stream()) if plan.device.type == "cuda" else nullcontext()
    with stream:  # a graph captures one stream; what is captured must have been recorded there
        for case in plan.cases:
            for operation in ("core", "block"):
                providers = [provider for provider in plan.providers if provider.operation == operation]
                if providers:
                    yield from _Bench(plan, case, operation, machine).measure(providers)


class _Bench:
    """A case of an operation on a device: what all its providers share."""

    def __init__(self, plan: Plan, case: Case, operation: Operation, machine: dict[str, Any]) -> None:
        self.plan, self.case, self.operation, self.machine = plan, case, operation, machine
        self.device = plan.device

    def measure(self, providers: Sequence[Provider]) -> Iterator[Record]:
        """Yield every record of the providers."""
        torch.compiler.reset()  # each case is a new shape for the same code; torch gives up after eight
        found = self._not_begun()
        if not found:
            self.plan.clock.begin(f"{self.case.name}, {self.operation}: inputs and float64 truth")
            try:
                self._prepare()
            except Exception as error:  # whatever fails is a record with its reason; the rest is measured
                found = {"status": "failed", "reason": f"inputs and truth: {_reason(error)}"}
        if found:
            yield from (self._record(provider.name, **found) for provider in providers)
            return
        if self.operation == "core":
            yield from map(self._copy, self.plan.directions)
        for provider in providers:
            self.plan.clock.say(f"  {provider.name}")
            yield from self._measure(provider)

    def _not_begun(self) -> dict[str, Any]:
        """Return why nothing is measured now; empty if it is."""
        reason = None
        if self.plan.clock.over():
            reason = OVER
        elif self.device.type == "cuda":
            reason = _lost(self.device)
        elif self.case.dtype == "bf16" and emulates_bf16():
            reason = "this processor emulates bf16"
        return {"status": "skipped", "reason": reason} if reason else {}

    def _prepare(self) -> None:
        """Make inputs, truth (output and the gradient of every input, float64) and the two rates of the device."""
        self.inputs, self.grad_out = make_inputs(self.case, self.operation, self.device, seed=0)
        settings: Any = {"num_heads": self.case.heads, "blocks_per_side": self.case.blocks_per_side}
        if self.operation == "core":
            self.truth = attention_truth(self.inputs[0], self.grad_out, **settings)
        else:
            wide = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
            out = local_attention_block_reference(*wide, **settings)
            self.truth = (out.detach(), *torch.autograd.grad(out, wide, self.grad_out.double()))
        self.copy_rate = timing.copy_bandwidth(self.device)
        self.matrix_rate = timing.matrix_rate(self.device, DTYPES[self.case.dtype])

    def _measure(self, provider: Provider) -> Iterator[Record]:
        """Yield a record per direction, eagerly and inside a CUDA graph, of a provider that is right; else one."""
        found = self._not_begun()
        if not found and (limit := provider.limit(self.case, self.device)) is not None:
            found = {"status": "skipped", "reason": limit}
        if not found:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    forward = provider.build(self.case)
                    found = self._check(forward, poison=provider.ours and self.device.type == "cuda")
                except Exception as error:  # as above
                    found = {"status": "failed", "reason": _reason(error, said)}
        if "status" in found:
            yield self._record(provider.name, **found)
            return
        for direction in self.plan.directions:
            for graph in (False, True) if self.device.type == "cuda" else (False,):
                timed = self._not_begun()
                if not timed:
                    try:
                        timed = self._time(forward, direction, graph)
                    except Exception as error:  # as above
                        timed = {"status": "failed", "reason": _reason(error)}
                yield self._record(provider.name, direction, graph, **timed, **found)

    def _check(self, forward: Forward, *, poison: bool) -> dict[str, Any]:
        """Return errors of output and gradients against float64, and why it is refused if it is.

        ``poison`` fills what our kernels are to write with NaN first.
        """
        with poisoned_outputs() if poison else nullcontext():
            out = forward(*self.inputs)
            grads = torch.autograd.grad(out, self.inputs, self.grad_out)
        if out.shape != self.truth[0].shape:
            raise ValueError(f"returned shape {tuple(out.shape)}, expected {tuple(self.truth[0].shape)}")
        tolerance = (TOLERANCES if self.operation == "core" else BLOCK_TOLERANCES)[out.dtype]
        inputs = ("qkv",) if self.operation == "core" else _BLOCK_INPUTS
        names = ("the output", *(f"the gradient of {name}" for name in inputs))
        errors = [relative_rms(*pair) for pair in zip((out.detach(), *grads), self.truth, strict=True)]
        worst = next((error for error in errors[1:] if error != error), max(errors[1:]))  # NaN before all
        found: dict[str, Any] = {"error_forward": errors[0], "error_backward": worst}
        for place, (name, error) in enumerate(zip(names, errors, strict=True)):
            allowed = tolerance.backward if place else tolerance.forward
            if not error <= allowed:
                reason = f"wrong: relative RMS error {error:.2g} of {name}, {self.case.dtype} allows {allowed:.2g}"
                return {"status": "refused", "reason": reason, **found}
        return found

    def _time(self, forward: Forward, direction: Direction, graph: bool) -> dict[str, Any]:
        """Return samples and figures of one mode."""
        held = sum(tensor.nbytes for tensor in (*self.inputs, self.grad_out))
        moved = self.case.bytes_moved(self.operation, direction)
        length = min(timing.chain_length(moved, self.device), max(1, _LARGEST_INPUTS // held))
        data = [(self.inputs, self.grad_out)]
        data += [make_inputs(self.case, self.operation, self.device, seed) for seed in range(1, length)]
        chain = [_run(forward, direction, inputs, grad_out) for inputs, grad_out in data]
        peak = timing.peak_memory(chain[0], self.device)
        # one replay of a graph is the whole chain
        timed = timing.time_chain(timing.capture(chain) if graph else chain, self.device, self.plan.rounds, length)
        return {"peak_mib": peak, **self._figures(timed, direction)}

    def _copy(self, direction: Direction) -> Record:
        """Time a copy of as many bytes as the core must move."""
        moved = self.case.bytes_moved("core", direction)
        shape = (timing.chain_length(moved, self.device), max(1, moved // 2))
        source = torch.zeros(shape, dtype=torch.int8, device=self.device).random_(-128, 128)
        target = torch.empty_like(source)
        chain = [lambda a=a, b=b: b.copy_(a) for a, b in zip(source, target, strict=True)]
        timed = timing.time_chain(chain, self.device, self.plan.rounds)
        nothing = {"flops": 0, "tflop_s": 0.0, "matrix_percent": 0.0}
        return self._record(COPY, direction, **self._figures(timed, direction) | nothing)

    def _figures(self, timed: timing.Timing, direction: Direction) -> dict[str, Any]:
        moved, flops = self.case.bytes_moved(self.operation, direction), self.case.flops(self.operation, direction)
        bandwidth, rate = moved / timed.median, flops / timed.median
        return {
            "samples": [second * 1e6 for second in timed.seconds],
            "runs": timed.runs,
            "bytes": moved,
            "flops": flops,
            "gb_s": bandwidth / 1e9,
            "copy_gb_s": self.copy_rate / 1e9,
            "copy_percent": 100 * bandwidth / self.copy_rate,
            "tflop_s": rate / 1e12,
            "matrix_tflop_s": self.matrix_rate / 1e12,
            "matrix_percent": 100 * rate / self.matrix_rate,
        }

    def _record(self, provider: str, direction: Direction | str = "", graph: bool = False, **found: Any) -> Record:
        case = {"case": self.case.name, "operation": self.operation, "mode": direction, "graph": graph}
        case |= {name: getattr(self.case, name) for name in _SHAPE}
        return LAYOUT.record(self.machine, case, provider, **found)


def make_inputs(case: Case, operation: Operation, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    """Return random inputs that require gradients, and a random gradient of the result; values of about one."""
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


def _run(forward: Forward, direction: Direction, inputs: Inputs, grad_out: Tensor) -> timing.Run:
    if direction == "forward":
        return lambda: forward(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(forward(*inputs), inputs, grad_out)
    out = forward(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


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
