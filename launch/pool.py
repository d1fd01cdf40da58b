"""Pool of Ray tasks, from specs to outcomes: submission, retries, a watchdog, and a clear end if the cluster dies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from launch.cluster import ClusterGoneError, Nodes
from launch.retry import Action, Decision, Failure, History, decide
from launch.run.progress import ProgressReader

POLL_SECONDS = 0.5
IN_FLIGHT_PER_PLACE = 2
"""Tasks submitted per place of the cluster: one that runs, one that is ready for the place."""


class Spec(Protocol):
    """Input of a task; small, because it is sent to the worker."""

    @property
    def name(self) -> str: ...
    @property
    def cpus(self) -> float: ...
    @property
    def gpus(self) -> float: ...
    @property
    def progress_path(self) -> Path | None:
        """Progress file that the worker writes; None if it writes none, and then there is no watchdog."""

    def again(self) -> Any:
        """Return the spec of the next attempt."""


class Outcome(Protocol):
    """Result of a task. ``bad_node``: the reason why the node cannot do the work; nothing was done then."""

    @property
    def bad_node(self) -> str | None: ...


SpecT = TypeVar("SpecT", bound=Spec)
OutcomeT = TypeVar("OutcomeT", bound=Outcome)


@dataclass(frozen=True)
class GivenUp:
    """End of a task that has no outcome; ``unfit``: no node could do its work."""

    reason: str
    unfit: bool = False


@dataclass(kw_only=True)
class Flight(Generic[SpecT]):
    """A task between its first submission and its end."""

    spec: SpecT
    last_progress: float = 0.0
    """Time of submission or of the last progress, in seconds of ``time.monotonic``."""
    not_before: float = 0.0
    epoch: int = -1
    """Finished epochs; -1 while the task waits for a place."""
    start: int = 0
    """Epochs that the worker found finished in a checkpoint."""
    attempt: int = 1
    history: History = field(default_factory=History)
    avoided: dict[str, str] = field(default_factory=dict)
    """Nodes that were found unfit for this task, each with its reason."""


@dataclass(kw_only=True)
class Pool(Generic[SpecT, OutcomeT]):
    """Pool that runs tasks to their ends; iterate over :meth:`run`.

    ``on_look`` gets the flights at every look, ``on_event`` every event, as ``events.jsonl`` takes it.
    """

    ray: Any
    task: Callable[[SpecT], OutcomeT]
    retries: int
    max_parallel: int = 0
    """Most tasks in flight; 0: as many as fit into the cluster."""
    tasks_per_process: int = 0
    """Tasks after which a worker process is replaced; 0: never."""
    stall_minutes: float = 0.0
    on_look: Callable[[Sequence[Flight[SpecT]]], None] = lambda flights: None
    on_event: Callable[..., None] = lambda kind, **facts: None
    _flights: dict[Any, Flight[SpecT]] = field(default_factory=dict, init=False)
    _waiting: deque[Flight[SpecT]] = field(default_factory=deque, init=False)
    _ended: deque[tuple[SpecT, OutcomeT | GivenUp]] = field(default_factory=deque, init=False)
    _reader: ProgressReader = field(default_factory=ProgressReader, init=False)
    _nodes: Nodes = field(init=False)

    def run(self, specs: Sequence[SpecT]) -> Iterator[tuple[SpecT, OutcomeT | GivenUp]]:
        """Submit, wait, submit again; yield every task's end as it comes.

        An interrupt leaves tasks in flight: they end when Ray is shut down, as ``ray_cluster`` does. If they are
        cancelled by force just before, Ray 2.60 may abort this process (a failed check in its task_manager.cc).

        Raises:
            ClusterGoneError: the cluster, or this process's connection to it, is gone.
        """
        try:
            yield from self._run(specs)
        except (ConnectionError, self.ray.exceptions.RaySystemError, self.ray.exceptions.RpcError) as error:
            raise ClusterGoneError(f"the Ray cluster is gone: {describe(error)}") from None

    def _run(self, specs: Sequence[SpecT]) -> Iterator[tuple[SpecT, OutcomeT | GivenUp]]:
        remote = self._remote()
        self._waiting.extend(Flight(spec=spec) for spec in specs)
        self._nodes = Nodes(self.ray)
        next_look = 0.0
        while self._waiting or self._flights:
            self._nodes.look()
            self._submit(remote)
            self._collect()
            if time.monotonic() >= next_look:
                self._watch()
                self.on_look(list(self._flights.values()))
                next_look = time.monotonic() + POLL_SECONDS
            while self._ended:
                yield self._ended.popleft()

    def _remote(self) -> Any:
        # max_calls cannot be set later through .options; retries are counted in this process, which can log the reason
        return self.ray.remote(max_calls=self.tasks_per_process, max_retries=0)(_with_node(self.task))

    def _submit(self, remote: Any) -> None:
        """Submit waiting tasks while there is room; give up a task that no node may run."""
        for _ in range(len(self._waiting)):
            flight = self._waiting[0]
            limit = IN_FLIGHT_PER_PLACE * self._nodes.places(flight.spec.cpus, flight.spec.gpus)
            if len(self._flights) >= min(limit, self.max_parallel or limit):
                return
            self._waiting.popleft()
            if flight.not_before > time.monotonic():
                self._waiting.append(flight)
                continue
            avoided = self._avoided(flight)
            if not self._may_run(flight):
                reason = f"no node is fit: {'; '.join(avoided.values())}"
                self._ended.append((flight.spec, GivenUp(reason, unfit=True)))
                continue
            options: dict[str, Any] = {"num_cpus": flight.spec.cpus, "num_gpus": flight.spec.gpus}
            if avoided:
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoided)})"}
            flight.last_progress = time.monotonic()
            self._flights[remote.options(**options).remote(flight.spec)] = flight

    def _collect(self) -> None:
        """Wait for the first end, for half a second at most, and take all tasks that have ended by then."""
        if not self._flights:
            time.sleep(POLL_SECONDS)
            return
        flying = list(self._flights)
        self.ray.wait(flying, num_returns=1, timeout=POLL_SECONDS)
        done, _ = self.ray.wait(flying, num_returns=len(flying), timeout=0)
        for ref in done:
            flight = self._flights.pop(ref)
            try:
                node, outcome = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                self._failed(flight, _failure(self.ray.exceptions, error), describe(error))
                continue
            if outcome.bad_node is None:
                self._nodes.fit.add(node)
                self._ended.append((flight.spec, outcome))
            else:
                self._avoid(flight, node, outcome.bad_node)
                self._failed(flight, Failure.NODE_UNFIT, outcome.bad_node)

    def _avoid(self, flight: Flight[SpecT], node: str, reason: str) -> None:
        """Keep all tasks from an unfit node; keep only this one if the node has finished another."""
        flight.avoided[node] = reason
        if node not in self._nodes.fit and node not in self._nodes.unfit:
            self._nodes.unfit[node] = reason
            self.on_event("node_avoided", node=node, reason=reason)

    def _avoided(self, flight: Flight[SpecT]) -> dict[str, str]:
        return self._nodes.unfit | flight.avoided

    def _may_run(self, flight: Flight[SpecT]) -> bool:
        return self._nodes.any_fit(flight.spec.cpus, flight.spec.gpus, self._avoided(flight))

    def _watch(self) -> None:
        """Look at the progress of all flights; cancel those that finish no epoch for too long."""
        paths = {flight.spec.progress_path for flight in self._flights.values()}
        seen = self._reader.look({path.parent for path in paths if path is not None})
        now = time.monotonic()
        for ref, flight in list(self._flights.items()):
            if flight.spec.progress_path not in seen:
                flight.last_progress = now  # queued: Ray has not started it yet
                if not self._may_run(flight):  # and never will start it: the last fit node has died
                    self._cancel(ref)
                    self._waiting.appendleft(flight)
                continue
            progress = seen[flight.spec.progress_path]
            if progress is not None and progress.epoch != flight.epoch:
                flight.epoch, flight.start, flight.last_progress = progress.epoch, progress.start, now
            elif self.stall_minutes and now - flight.last_progress > 60 * self.stall_minutes:
                self._cancel(ref)
                self._failed(flight, Failure.STALLED, f"no epoch finished for {self.stall_minutes:g} minutes")

    def _cancel(self, ref: Any) -> None:
        self.ray.cancel(ref, force=True)
        del self._flights[ref]

    def _failed(self, flight: Flight[SpecT], failure: Failure, detail: str) -> None:
        """Act as :func:`decide` says; tasks to try again come before tasks never tried."""
        flight.history = flight.history.after(failure)
        decision = decide(failure, detail, flight.history, retries=self.retries, fit_node_left=self._may_run(flight))
        if decision.action is Action.STOP:
            raise ClusterGoneError(f"the Ray cluster is gone: {decision.reason}")
        if decision.action is Action.GIVE_UP:
            unfit = failure is Failure.NODE_UNFIT
            self._ended.append((flight.spec, GivenUp(decision.reason, unfit=unfit)))
        else:
            self._again(flight, failure, decision)

    def _again(self, flight: Flight[SpecT], failure: Failure, decision: Decision) -> None:
        spec = flight.spec
        self.on_event(
            "task_again", task=spec.name, attempt=flight.attempt, failure=failure.name.lower(), reason=decision.reason
        )
        later = time.monotonic() + decision.seconds
        self._waiting.appendleft(
            replace(flight, spec=spec.again(), attempt=flight.attempt + 1, epoch=-1, start=0, not_before=later)
        )


def _with_node(task: Callable[[SpecT], OutcomeT]) -> Callable[[SpecT], tuple[str, OutcomeT]]:
    """Make a task also return the node that it ran on."""

    def run(spec: SpecT) -> tuple[str, OutcomeT]:
        import ray

        return ray.get_runtime_context().get_node_id(), task(spec)

    return run


def _failure(exceptions: Any, error: Exception) -> Failure:
    """Name the kind of a task's death by Ray's exception."""
    kinds = {
        exceptions.LocalRayletDiedError: Failure.CLUSTER_GONE,
        exceptions.NodeDiedError: Failure.NODE_DEAD,
        exceptions.ObjectLostError: Failure.NODE_DEAD,  # its outcome was on a node that died
        exceptions.OutOfMemoryError: Failure.OUT_OF_MEMORY,
        exceptions.RayTaskError: Failure.RAISED,
    }
    found = (failure for kind, failure in kinds.items() if isinstance(error, kind))
    return next(found, Failure.WORKER_CRASHED)


def describe(error: Exception) -> str:
    """Describe a death or an exception of a task on one line, with both ends of a long message."""
    raised = getattr(error, "cause", None) or error  # Ray's own text of an exception is its traceback
    text = " ".join(f"{type(raised).__name__}: {raised}".split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
