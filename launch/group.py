"""Processes that train together: placed at once, started again together when one of them is lost."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from htnet.training.world import World
from launch.cluster import ClusterGoneError, Needs, Nodes
from launch.pool import describe

__all__ = ["Group", "Lost"]

POLL_SECONDS = 0.5
ROOM_SECONDS = 30.0
"""Time after which a group that finds no room says so."""
DEATH_SECONDS = 5.0
"""Time in which Ray tells of a death that the other ranks have met already."""


class Outcome(Protocol):
    """Answer of a rank. ``error``: a failure that another attempt may not meet; ``reason``: one that it would meet."""

    @property
    def error(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


SpecT = TypeVar("SpecT")
OutcomeT = TypeVar("OutcomeT", bound=Outcome)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """End of an attempt without a result."""

    reason: str


class _Member:
    """Body of an actor: one rank."""

    def __init__(self) -> None:
        self._store: Any = None

    def open_door(self, ranks: int) -> tuple[str, int]:
        """Open the place where the ranks meet, on this node's address alone; return host and port."""
        import ray
        import torch.distributed as dist

        host = str(ray.util.get_node_ip_address())
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        options: dict[str, Any] = {"master_listen_fd": listener.detach(), "use_libuv": False, "wait_for_workers": False}
        self._store = dist.TCPStore(host, port, ranks, True, **options)  # type: ignore[attr-defined] # exported late
        return host, port

    def run(
        self, task: Callable[[Any, World], Any], spec: Any, world: World, door: tuple[str, int], gpus: float
    ) -> Any:
        """Join the others, run the task as one rank, and return its outcome."""
        import torch
        import torch.distributed as dist

        host, port = door
        if host.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name may lead to an address that others reach
        if world.ranks > 1:
            store = self._store
            if store is None:
                store = dist.TCPStore(host, port, world.ranks, False, use_libuv=False)  # type: ignore[attr-defined]
            # a worker without the card that it was given says so itself, after it has met the others
            backend = "nccl" if gpus and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.ranks)
        outcome = task(spec, world)
        if world.ranks > 1 and outcome.error is None and outcome.reason is None:
            dist.barrier()  # nobody leaves before the last has done its part; a failure does not wait for the others
            dist.destroy_process_group()
        return outcome


@dataclass(kw_only=True)
class Group(Generic[SpecT, OutcomeT]):
    """Ranks of one task on a cluster.

    Args:
        ray: the connected module.
        task: takes a spec and a :class:`~htnet.training.world.World`; does not raise.
        workers: number of ranks.
        needs: resources of each.
        stall_seconds: time without a word of progress after which an attempt is ended; 0: never.
        progress: returns something that changes when the ranks get on.
        on_look: called every half second.
        on_event: told of waiting for room.
        on_interrupt: called at the first interrupt; returns the seconds in which the ranks may end by themselves.
    """

    ray: Any
    task: Callable[[SpecT, World], OutcomeT]
    workers: int
    needs: Needs
    stall_seconds: float
    progress: Callable[[], object]
    on_look: Callable[[], None]
    on_event: Callable[..., None]
    on_interrupt: Callable[[], float]

    def run(self, spec: SpecT) -> OutcomeT | Lost:
        """Run one attempt: the first rank's outcome, or the reason why there is none.

        Raises:
            ClusterGoneError: the cluster went away.
        """
        try:
            return self._run(spec)
        except (ConnectionError, self.ray.exceptions.RaySystemError, self.ray.exceptions.RpcError) as error:
            raise ClusterGoneError(f"the Ray cluster is gone: {describe(error)}") from None

    def _run(self, spec: SpecT) -> OutcomeT | Lost:
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle = {"CPU": self.needs.cpus, **({"GPU": self.needs.gpus} if self.needs.gpus else {})}
        nodes = Nodes(self.ray)
        placed = placement_group([bundle] * self.workers, strategy="PACK")
        members: list[Any] = []
        try:
            self._wait_for_room(nodes, placed)
            members = [self._member(placed, bundle, rank) for rank in range(self.workers)]
            return self._watch(nodes, self._start(members, spec))
        finally:
            with suppress(Exception):  # where the cluster is gone there is nothing to clear away
                for member in members:
                    self.ray.kill(member)
                remove_placement_group(placed)

    def _member(self, placed: Any, bundle: dict[str, float], rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(placed, placement_group_bundle_index=rank)
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": strategy}
        return self.ray.remote(_Member).options(**options).remote()

    def _wait_for_room(self, nodes: Nodes, placed: Any) -> None:
        ready, start, said = placed.ready(), time.monotonic(), False
        while not self.ray.wait([ready], timeout=POLL_SECONDS)[0]:
            nodes.look()
            self.on_look()
            if not said and time.monotonic() - start > ROOM_SECONDS:
                said = True
                places = nodes.places(self.needs.cpus, self.needs.gpus)
                self.on_event("waiting_for_room", workers=self.workers, places=places)

    def _start(self, members: list[Any], spec: SpecT) -> list[Any]:
        door = members[0].open_door.remote(self.workers)
        worlds = [World(rank=rank, ranks=self.workers) for rank in range(self.workers)]
        return [
            member.run.remote(self.task, spec, world, door, self.needs.gpus)
            for member, world in zip(members, worlds, strict=True)
        ]

    def _watch(self, nodes: Nodes, runs: list[Any]) -> OutcomeT | Lost:
        """Wait for all ranks; the first failure ends the attempt, because the others would wait for that rank."""
        outcomes: dict[Any, OutcomeT] = {}
        known, heard, deadline = self.progress(), time.monotonic(), math.inf
        while len(outcomes) < len(runs):
            try:
                if (end := self._take(runs, outcomes)) is not None:
                    return end
                nodes.look()
                self.on_look()
            except KeyboardInterrupt:
                if deadline < math.inf:
                    raise
                deadline = time.monotonic() + self.on_interrupt()
            if (now := self.progress()) != known:
                known, heard = now, time.monotonic()
            elif self.stall_seconds and time.monotonic() - heard > self.stall_seconds:
                return Lost(reason=f"no step for {self.stall_seconds:.0f} s")
            if time.monotonic() > deadline:
                raise KeyboardInterrupt
        return outcomes[runs[0]]

    def _take(self, runs: list[Any], outcomes: dict[Any, OutcomeT]) -> OutcomeT | Lost | None:
        """Take the outcomes that are there; returns the end of the attempt, if one of them is it."""
        open_runs = [run for run in runs if run not in outcomes]
        done, _ = self.ray.wait(open_runs, timeout=POLL_SECONDS)
        for run in done:
            try:
                outcome: OutcomeT = self.ray.get(run)
            except self.ray.exceptions.RayError as error:
                return Lost(reason=f"rank {runs.index(run)} died: {describe(error)}")
            if outcome.error is not None:
                return self._death_of([other for other in open_runs if other is not run]) or Lost(reason=outcome.error)
            if outcome.reason is not None:
                return outcome
            outcomes[run] = outcome
        return None

    def _death_of(self, others: list[Any]) -> Lost | None:
        """Find the rank whose death made another one fail, which may be heard of first."""
        done, _ = self.ray.wait(others, num_returns=len(others), timeout=DEATH_SECONDS) if others else ([], [])
        for run in done:
            try:
                self.ray.get(run)
            except self.ray.exceptions.RayError as error:
                return Lost(reason=f"a rank died: {describe(error)}")
        return None
