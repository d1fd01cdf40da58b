"""Clocks, and the two rates of the device that a run compares with.

A sample is the mean of a chain of runs, back to back over different inputs that together exceed the cache several
times: no run finds its input in the cache, and every run pays for writing back what the one before left there. Flushing
the cache between runs instead would charge a run for the flush, or let it leave its output in the cache unpaid. Results
are kept until the chain ends: memory that is freed comes back at once for the next result, and would be in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

__all__ = ["Run", "Timing", "capture", "chain_length", "copy_bandwidth", "matrix_rate", "peak_memory", "time_chain"]

Run = Callable[[], object]
_WARM_UP_SECONDS: Final = {"cuda": 0.02, "cpu": 0.03}
_COPY_BYTES: Final = {"cuda": 1 << 30, "cpu": 1 << 27}
_MATRIX_SIDE: Final = {"cuda": 8192, "cpu": 1024}
_CPU_CACHE: Final = 32 << 20
_GPU_CACHE: Final = 64 << 20
"""Size of the L2 cache where torch does not tell."""
_LONGEST_CHAIN: Final = {"cuda": 32, "cpu": 8}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Samples in seconds per run; each is the mean of ``runs`` runs."""

    seconds: tuple[float, ...]
    runs: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def chain_length(num_bytes: int, device: torch.device) -> int:
    """Runs of ``num_bytes`` of traffic each that together move four times what the device's cache holds."""
    cache = _CPU_CACHE
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _GPU_CACHE
    return max(1, min(_LONGEST_CHAIN[device.type], -(-4 * cache // max(1, num_bytes))))


def time_chain(chain: Sequence[Run], device: torch.device, rounds: int, runs: int | None = None) -> Timing:
    """Warm up, then take ``rounds`` samples of the chain of ``runs`` runs (as many as it has calls by default).

    By events on the current stream of a GPU, by the wall clock of a CPU.
    """
    start = time.perf_counter()
    while True:
        for run in chain:
            run()
        _wait(device)
        if time.perf_counter() - start > _WARM_UP_SECONDS[device.type]:
            break
    runs, on_gpu = runs or len(chain), device.type == "cuda"
    marks: list[tuple[Any, Any]] = []
    for _ in range(rounds):
        begin = _mark(on_gpu)
        kept = [run() for run in chain]
        marks.append((begin, _mark(on_gpu)))
        del kept
    _wait(device)
    seconds = (begin.elapsed_time(end) / 1e3 if on_gpu else end - begin for begin, end in marks)
    return Timing(seconds=tuple(second / runs for second in seconds), runs=runs)


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def capture(chain: Sequence[Run]) -> list[Run]:
    """Capture the chain as one CUDA graph on the current stream; return a chain of one replay of all its runs."""
    for run in chain:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [run() for run in chain]
    del kept
    return [graph.replay]


def peak_memory(run: Run, device: torch.device) -> float | None:
    """MiB that one run takes at most beyond what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: torch.device, rounds: int = 10) -> float:
    """Bytes a second, read and written, of a large copy inside the device's memory."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.int8, device=device).random_(-128, 128)
    target = torch.empty_like(source)
    timing = time_chain([lambda: target.copy_(source)], device, rounds)
    return 2 * source.nbytes / timing.median


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """FLOP a second of a large square product of random numbers (zeros can run faster)."""
    side = _MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = time_chain([lambda: torch.mm(left, right, out=out)], device, rounds)
    return 2 * side**3 / timing.median


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
