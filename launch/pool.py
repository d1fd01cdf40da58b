"""Folds as Ray tasks: submission, retries after a death, a watchdog, and a stop that leaves a resumable run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from htnet.config import ResourcesConfig
from htnet.errors import HTNetError, InputError, StartError
from launch.tasks.fold import FoldOutcome, FoldSpec, run_fold

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
FOLDS_PER_PROCESS = {"gpu": 1, "cpu": 16}
"""A fresh process for every fold surely frees its GPU memory; on a CPU the imports (5 s) are worth sharing."""
# harmless calls that a Ray answers before anything else, if it knows who asks
_CALLS = {"head": "/ray.rpc.NodeInfoGcsService/CheckAlive", "client server": "/ray.rpc.RayletDriver/ClusterInfo"}
_SOCKET_BYTES = 107
_SESSION = "/ray/session_2026-01-31_23-59-59_999999_1234567/sockets/plasma_store"
LONGEST_FOLDER = _SOCKET_BYTES - len(_SESSION)
"""Bytes of a folder's path in which Ray can make its sockets: a Unix socket has at most 107 bytes of path."""
_LAST_RESORT = "/tmp"  # Ray's own
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


@contextmanager
def ray_cluster(address: str | None, resources: ResourcesConfig) -> Iterator[Any]:
    """Ray on this machine (``address`` None) or a running cluster; checks that a fold fits.

    Our packages travel to a cluster's nodes; what they depend on has to be installed there.

    Raises:
        InputError: no cluster answers at the address or it refuses us, or no node of it can hold a fold.
        StartError: Ray did not start on this machine.
    """
    session = None
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        session = _session_folder()
        _name_a_token()
        options |= {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False, "_temp_dir": session}
    else:
        _approach(address)
        root = Path(__file__).resolve().parent.parent
        packages = [str(root / name) for name in ("htnet", "kernels", "dali_pipelines", "launch")]
        options |= {"address": address, "runtime_env": {"py_modules": packages}}
    import ray

    try:
        ray.init(**options)
    except Exception as error:  # ray.init raises many kinds, a bare Exception among them
        raise _not_connected(address, error, session) from error
    try:
        _check_fits(ray, resources)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C: batch systems send it before they kill.

    Enter it after :func:`ray_cluster`: Ray sets a handler of its own when it starts.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _approach(address: str) -> None:
    """Before Ray tries for half a minute: does anything listen there, and does it ask for a token?

    With an explicit address Ray shows a token only if RAY_AUTH_MODE says so, even where it knows one. Names such as
    "auto" are left to Ray.
    """
    where = address.removeprefix("ray://")
    call = _CALLS["head" if where == address else "client server"]
    host, colon, port = where.rpartition(":")
    if not (colon and host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there: {error}") from None
    if _turns_away(where, call, token=None):
        place, token = _known_token()
        if token is None:
            raise InputError(
                f"--address {address}: the cluster asks for a token: set RAY_AUTH_TOKEN to the one that its head was "
                "started with, or put it into ~/.ray/auth_token"
            )
        if _turns_away(where, call, token):
            raise InputError(f"--address {address}: the cluster asks for a token, and that of {place} is not its own")
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _known_token() -> tuple[str, str | None]:
    """Find where Ray looks for its token, and the token: variable, named file, own file; None where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", token
    home = os.path.expanduser("~")  # noqa: PTH111 # Path.home() raises for a user without one
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or f"{home}/.ray/auth_token")
    try:
        return str(place), place.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return str(place), None


def _turns_away(where: str, call: str, token: str | None) -> bool:
    """Tell if the Ray at ``where`` refuses a call with this token, or without any, as not authenticated."""
    import grpc  # type: ignore[import-untyped] # published without type information

    shown = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=CONNECT_SECONDS, metadata=shown)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def _not_connected(address: str | None, error: Exception, session: str | None) -> HTNetError:
    reason = " ".join(str(error).split())[:200]
    if address is not None:
        return InputError(f"--address {address}: no Ray cluster answers there: {reason}")
    # patience helps against what took too long, and against nothing else
    hope = "try again when it is less busy; " if "timed out" in reason else ""
    return StartError(
        f"Ray did not start on this machine: {reason}; {hope}Ray's logs are in {session}/session_latest/logs"
    )


def _session_folder() -> str:
    """Find a folder for Ray's sockets and logs: in RAY_TMPDIR, TMPDIR or /tmp, as Ray does, but in one that serves.

    Raises:
        StartError: none of them does; names each with the rule that it breaks.
    """
    unfit: list[str] = []
    for name in ("RAY_TMPDIR", "TMPDIR", None):
        value = os.environ.get(name) if name else _LAST_RESORT
        if not value:
            continue
        folder = Path(value).absolute()
        if (problem := _no_place_for_ray(folder)) is None:
            if unfit:
                _log.warning("%s; Ray's sockets and logs are in %s/ray instead", "; ".join(unfit), folder)
            return f"{folder}/ray"
        unfit.append(f"{name}={value}: {problem}" if name else f"{value}: {problem}")
    raise StartError(
        f"Ray needs a folder for its sockets and logs: {'; '.join(unfit)}; set TMPDIR to a folder that can be written "
        f"to, with a path of at most {LONGEST_FOLDER} bytes"
    )


def _no_place_for_ray(folder: Path) -> str | None:
    """The rule for Ray's session that the folder breaks; None where it serves."""
    if (length := len(os.fsencode(folder))) > LONGEST_FOLDER:
        return (
            f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got {length}: "
            f"Ray makes Unix sockets in it, which have at most {_SOCKET_BYTES}"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "ray") as file:
            file.write(bytes(1 << 16))  # a full disk takes names, but no content
    except OSError as error:
        return f"cannot be written to: {error.strerror}"
    return None


def _name_a_token() -> None:
    """Give a Ray of this machine a token where it would find none.

    Ray would write one into HOME, which not every job can. It stays in the environment, for Ray remembers the first
    one that this process shows.
    """
    if _known_token()[1] is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may use: its affinity, and the quotas of its control group (v2) and those around it."""
    cpus = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        entries = [line for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
        group = cgroups / entries[0].removeprefix("0::").lstrip("/") if entries else cgroups
        for folder in (group, *group.parents):
            if folder.is_relative_to(cgroups):
                cpus = min(cpus, _quota(folder / "cpu.max"))
    return max(1, int(cpus))


def _quota(path: Path) -> float:
    """CPUs that a ``cpu.max`` ("max 100000" or "150000 100000") allows."""
    try:
        quota, period = path.read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return float("inf")


def _check_fits(ray: Any, resources: ResourcesConfig) -> None:
    """Refuse folds that would wait for ever: a fold runs on one node."""
    needs = {"CPU": resources.cpus_per_fold, "GPU": resources.gpus_per_fold}
    total = ray.cluster_resources()
    for key, needed in needs.items():
        if needed > total.get(key, 0):
            raise InputError(
                f"{_name(key)}={needed:g}: the cluster has {total.get(key, 0):g} {key}(s): no fold can run"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, needed in needs.items():
        largest = max((node.get(key, 0) for node in nodes), default=0)
        if needed > largest:
            raise InputError(f"{_name(key)}={needed:g}: no node has more than {largest:g} {key}(s): no fold can run")
    if not any(all(needed <= node.get(key, 0) for key, needed in needs.items()) for node in nodes):
        asked = ", ".join(f"{_name(key)}={needed:g}" for key, needed in needs.items())
        raise InputError(f"{asked}: no single node has as many of both: no fold can run")


def _name(resource: str) -> str:
    return f"resources.{resource.lower()}s_per_fold"


@dataclass(kw_only=True)
class Flight:
    """A submitted fold and when it last moved."""

    spec: FoldSpec
    moved: float
    epoch: int = -1
    """Finished epochs; -1 while the fold waits for a place."""
    start: int = 0
    """Epochs that the worker found done in a checkpoint."""


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
        """Submit, wait, resubmit; returns when every fold has an outcome.

        An interrupt leaves folds in flight: they end when Ray is shut down, as :func:`ray_cluster` does. Cancelled
        by force just before, some make Ray 2.60 abort this process (a failed check in its task_manager.cc).
        """
        remote = self._remote()
        waiting = deque(specs)
        limit = self.resources.max_parallel_folds or len(waiting)
        while waiting or self.flights:
            while waiting and len(self.flights) < limit:
                spec = waiting.popleft()
                self.flights[remote.remote(spec)] = Flight(spec=spec, moved=time.monotonic())
            done, _ = self.ray.wait(list(self.flights), num_returns=1, timeout=POLL_SECONDS)
            for ref in done:
                waiting.extendleft(self._collect(ref))
            waiting.extendleft(self._watch())
            self.on_poll(list(self.flights.values()))

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
            elif progress.epoch != flight.epoch:
                flight.epoch, flight.start, flight.moved = progress.epoch, progress.start, time.monotonic()
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
        return [spec.again()]


def _describe(error: Exception) -> str:
    """A death or an exception of a task on one line: what was raised there, with both ends of a long message."""
    raised = getattr(error, "cause", None) or error  # Ray's own text of an exception is its traceback
    text = " ".join(f"{type(raised).__name__}: {raised}".split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


@dataclass(frozen=True)
class Progress:
    """Finished epochs of a fold, and how many of them its worker found done."""

    epoch: int
    start: int


def read_progress(spec: FoldSpec) -> Progress | None:
    """Read how far the spec's submission is; None while it has not started."""
    try:
        state = json.loads(spec.progress_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Progress(epoch=int(state["epoch"]), start=int(state["start"]))
