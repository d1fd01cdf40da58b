"""Folds as Ray tasks: submission, retries after a death, a watchdog, and a stop that leaves a resumable run."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from htnet.config import ResourcesConfig
from htnet.errors import InputError, StartError
from launch.fold_task import FoldOutcome, FoldSpec, run_fold

POLL_SECONDS = 0.5
FOLDS_PER_PROCESS = {"gpu": 1, "cpu": 16}
"""A fresh process for every fold surely frees its GPU memory; on a CPU the imports (5 s) are worth sharing."""
# a dead node with an open connection is noticed in half a minute instead of seven
_KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "10000", "RAY_grpc_client_keepalive_timeout_ms": "5000"}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


@contextmanager
def ray_cluster(address: str | None, resources: ResourcesConfig) -> Iterator[Any]:
    """Ray on this machine (``address`` None) or a running cluster; checks that a fold fits.

    Our packages travel to a cluster's nodes; what they depend on has to be installed there.
    """
    for name, value in (*_KEEPALIVE.items(), *_QUIET.items()):
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        options |= {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    else:
        root = Path(__file__).resolve().parent.parent
        packages = [str(root / name) for name in ("htnet", "kernels", "dali_pipelines", "launch")]
        options |= {"address": address, "runtime_env": {"py_modules": packages}}
    try:
        ray.init(**options)
    except Exception as error:  # ray.init raises many kinds, a bare Exception among them
        reason = " ".join(str(error).split())[:200]
        if address is None:
            raise StartError(f"Ray did not start on this machine: {reason}; try again when it is less busy") from error
        if "token" in reason.lower():
            reason += "; set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN here"
        raise InputError(f"--address {address}: no Ray cluster answers there: {reason}") from None
    try:
        _check_fits(ray, resources)
        yield ray
    finally:
        ray.shutdown()


def _check_fits(ray: Any, resources: ResourcesConfig) -> None:
    total = ray.cluster_resources()
    for key, needed, name in (("CPU", resources.cpus_per_fold, "cpus"), ("GPU", resources.gpus_per_fold, "gpus")):
        if needed > total.get(key, 0):
            raise InputError(
                f"resources.{name}_per_fold={needed:g}: the cluster has {total.get(key, 0):g} {key}(s): no fold can run"
            )


@dataclass(kw_only=True)
class Flight:
    """A submitted fold and when it last moved."""

    spec: FoldSpec
    moved: float
    epoch: int = -1


@dataclass(kw_only=True)
class Scheduler:
    """Runs the specs to their ends; call :meth:`run`.

    ``on_finish`` gets each outcome, ``on_poll`` the flights at every look, ``on_event`` what happened.
    """

    ray: Any
    resources: ResourcesConfig
    on_finish: Callable[[FoldOutcome], None]
    on_poll: Callable[[Sequence[Flight]], None]
    on_event: Callable[..., None]
    task: Callable[[FoldSpec], FoldOutcome] = run_fold
    flights: dict[Any, Flight] = field(default_factory=dict)

    def run(self, specs: Sequence[FoldSpec]) -> None:
        """Submit, wait, resubmit; returns when every fold has an outcome."""
        remote = self._remote()
        waiting = deque(specs)
        limit = self.resources.max_parallel_folds or len(waiting)
        try:
            while waiting or self.flights:
                while waiting and len(self.flights) < limit:
                    spec = waiting.popleft()
                    self.flights[remote.remote(spec)] = Flight(spec=spec, moved=time.monotonic())
                done, _ = self.ray.wait(list(self.flights), num_returns=1, timeout=POLL_SECONDS)
                for ref in done:
                    waiting.extendleft(self._collect(ref))
                waiting.extendleft(self._watch())
                self.on_poll(list(self.flights.values()))
        except BaseException:
            for ref in self.flights:
                self.ray.cancel(ref, force=True)
            raise

    def _remote(self) -> Any:
        # built once from the configuration, because max_calls cannot be given later through .options;
        # the retries are counted here, where the reason can be logged
        return self.ray.remote(
            num_cpus=self.resources.cpus_per_fold,
            num_gpus=self.resources.gpus_per_fold,
            max_calls=FOLDS_PER_PROCESS["gpu" if self.resources.gpus_per_fold else "cpu"],
            max_retries=0,
        )(self.task)

    def _collect(self, ref: Any) -> list[FoldSpec]:
        """Hand on a finished fold; the spec to submit again where its worker or node died."""
        flight = self.flights.pop(ref)
        try:
            self.on_finish(self.ray.get(ref))
        except self.ray.exceptions.RayError as error:
            return self._again(flight, _describe(error))
        return []

    def _watch(self) -> list[FoldSpec]:
        """Cancel folds that finish no epoch for too long; their specs, to submit again."""
        again: list[FoldSpec] = []
        for ref, flight in list(self.flights.items()):
            progress = read_progress(flight.spec)
            if progress is None:
                flight.moved = time.monotonic()  # queued: Ray has not started it yet
            elif progress != flight.epoch:
                flight.epoch, flight.moved = progress, time.monotonic()
            elif self.resources.stall_minutes and time.monotonic() - flight.moved > 60 * self.resources.stall_minutes:
                self.ray.cancel(ref, force=True)
                del self.flights[ref]
                again += self._again(flight, f"no epoch finished for {self.resources.stall_minutes:g} minutes")
        return again

    def _again(self, flight: Flight, reason: str) -> list[FoldSpec]:
        spec = flight.spec
        if spec.attempt > self.resources.retries:
            reason = f"gave up after {spec.attempt} attempts: {reason}"
            self.on_finish(FoldOutcome(fold=spec.fold.subject, seconds=0.0, reason=reason))
            return []
        self.on_event("fold_again", fold=spec.fold.subject, attempt=spec.attempt, reason=reason)
        return [replace(spec, attempt=spec.attempt + 1)]


def _describe(error: Exception) -> str:
    """A death or an exception of a task on one line: what was raised there, with both ends of a long message."""
    raised = getattr(error, "cause", None) or error  # Ray's own text of an exception is its traceback
    text = " ".join(f"{type(raised).__name__}: {raised}".split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def read_progress(spec: FoldSpec) -> int | None:
    """Finished epochs of the spec's current attempt; None while it has not started."""
    try:
        state = json.loads(spec.progress_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(state["epoch"]) if state.get("attempt") == spec.attempt else None
