"""Training by several processes: ``htnet profile scale``.

Steps of the paper's network, of the fine one and of the composite's recipe, by ZeRO stage and with recomputed
activations, by the group of processes that ``htnet train`` starts; the samples are there already. Then a snapshot is
written, a worker is killed, and the clock runs until the new group has taken its first step.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from htnet.config import HTNetConfig, ScaleConfig, TrainConfig
from htnet.cpu import configure_cpu
from htnet.model import HTNet
from htnet.training.parallel_engine import ParallelEngine
from htnet.training.world import World
from kernels.benchmarks.race import OVER
from kernels.benchmarks.record import Layout
from launch.benchmarks.frame import Frame, known_names, table_of
from launch.cluster import Needs, ray_cluster
from launch.group import Group, Lost

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="scale.csv",
    unit="ms",
    case=("network", "batch", "workers"),
    figures=("samples_per_second", "peak_mib", "state_mib", "save_s", "load_s", "back_s"),
)
NETWORKS: Final[dict[str, tuple[HTNetConfig, int]]] = {
    "paper": (HTNetConfig(), 256),
    "fine": (HTNetConfig(image_size=112), 32),
    "composite": (HTNetConfig(dim=24, depths=(2, 2, 4)), 64),
}
"""Networks and samples of a step, over all workers; fine is cut to what two CPUs do in seconds."""
WAYS: Final = {
    **{f"ZeRO {stage}": ScaleConfig(zero=stage) for stage in (0, 1, 2, 3)},
    "ZeRO 0, recomputed": ScaleConfig(checkpoint_activations=True),
}
NOTE: Final = (
    "per s: samples of all workers; MiB: most memory that a worker held, and on disk that of its state; back s: from a "
    "killed worker to the next step"
)


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """One measurement, as every rank needs it. A worker that is to die leaves its time in ``folder``."""

    network: HTNetConfig
    batch: int
    scale: ScaleConfig
    rounds: int
    folder: Path
    dies: bool = False
    resumes: bool = False


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Figures of a rank."""

    error: str | None = None
    reason: str | None = None
    samples: tuple[float, ...] = ()
    peak: int = 0
    size: int = 0
    save: float = 0.0
    load: float = 0.0
    stepped: float = 0.0
    """Time of day after the first step."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, case after case; return the exit code."""
    frame = Frame(LAYOUT, options, console)
    networks = known_names("--cases", options.cases, list(NETWORKS))
    rounds = options.rounds or 3
    steps = {
        f"{name}, {way}": partial(_add, frame, name, way, options.workers, rounds) for name in networks for way in WAYS
    }
    columns = {
        "per s": "samples_per_second",
        "MiB": "peak_mib",
        "on disk": "state_mib",
        "save s": "save_s",
        "back s": "back_s",
    }
    title = f"steps of {options.workers} workers on this machine's CPUs"
    return frame.run(steps, partial(table_of, title=title, case=("network",), columns=columns, notes=[NOTE]))


def _add(frame: Frame, name: str, way: str, workers: int, rounds: int) -> None:
    network, batch = NETWORKS[name]
    case = {"network": name, "batch": batch, "workers": workers}
    if frame.clock.over():
        frame.add(case, way, status="skipped", reason=OVER)
        return
    with tempfile.TemporaryDirectory() as folder:
        spec = _Spec(network=network, batch=batch, scale=WAYS[way], rounds=rounds, folder=Path(folder))
        found = _measure(spec, workers)
    frame.add(case, way, **found)


def _measure(spec: _Spec, workers: int) -> dict[str, Any]:
    needs = Needs(task="worker", cpus=1.0, gpus=0.0, cpus_key="--workers", gpus_key="")
    with ray_cluster(None, needs) as ray:
        group = Group[_Spec, _Outcome](
            ray=ray,
            task=_train,
            workers=workers,
            needs=needs,
            stall_seconds=0.0,
            progress=lambda: None,
            on_look=lambda: None,
            on_event=lambda *_, **__: None,
            on_interrupt=lambda: 0.0,
        )
        first = group.run(spec)
        if isinstance(first, Lost):
            return {"status": "failed", "reason": first.reason.strip().splitlines()[-1][:200]}
        killed = group.run(replace(spec, dies=True))
        if not isinstance(killed, Lost):
            return {"status": "failed", "reason": "a killed worker went unnoticed"}
        back = group.run(replace(spec, resumes=True))
        died = float((spec.folder / "died").read_text(encoding="utf-8"))
    if isinstance(back, Lost):
        return {"status": "failed", "reason": back.reason.strip().splitlines()[-1][:200]}
    milliseconds = statistics.median(first.samples)
    return {
        "samples": first.samples,
        "samples_per_second": 1e3 * spec.batch / milliseconds,
        "peak_mib": first.peak / 2**20,
        "state_mib": first.size / 2**20,
        "save_s": first.save,
        "load_s": back.load,
        "back_s": back.stepped - died,
    }


def _train(spec: _Spec, world: World) -> _Outcome:
    """Take the steps of a rank; in ``launch.group``'s way, an error is an outcome."""
    try:
        return _measured(spec, world)
    except Exception as error:  # of any kind: the group takes it for the end of the attempt, with its reason
        return _Outcome(error=f"{type(error).__name__}: {error}")


def _measured(spec: _Spec, world: World) -> _Outcome:
    configure_cpu(1)
    torch.manual_seed(0)
    train = TrainConfig(batch_size=spec.batch)
    options: dict[str, Any] = {"device": torch.device("cpu"), "weights": None, "world": world}
    images = torch.randn(spec.batch, 3, spec.network.image_size, spec.network.image_size)[world.rank :: world.ranks]
    labels = torch.randint(0, 3, (spec.batch,))[world.rank :: world.ranks]
    with closing(ParallelEngine(HTNet(spec.network), train, spec.scale, "fp32", **options)) as engine:
        begin = time.perf_counter()
        if spec.resumes:
            engine.load(spec.folder)
        load = time.perf_counter() - begin
        samples = []
        for _ in range(1 if spec.resumes or spec.dies else spec.rounds + 1):
            begin = time.perf_counter()
            loss = engine.train_step(images, labels, 1e-4)
            samples.append(1e3 * (time.perf_counter() - begin))
        stepped = time.time()
        if not loss.isfinite():
            raise ValueError("the loss is not finite")
        if spec.dies:
            _die(spec, world)
        begin = time.perf_counter()
        write = engine.save(spec.folder)
        if world.rank == 0 and not spec.resumes:
            write()
        save, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        size = sum(file.stat().st_size for file in spec.folder.glob("*.pt")) if world.rank == 0 else 0
        most = max(world.collect(peak))
        return _Outcome(samples=tuple(samples[1:]), peak=most, size=size, save=save, load=load, stepped=stepped)


def _die(spec: _Spec, world: World) -> None:
    """Kill the last rank as the kernel does when memory is out; the others wait for it."""
    if world.rank == world.ranks - 1:
        (spec.folder / "died").write_text(str(time.time()), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
    world.collect(None)
