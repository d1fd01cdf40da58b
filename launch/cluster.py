"""Connection to Ray: the only file that calls ``ray.init``; tokens, sockets, usable CPUs, room for a task."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from htnet.errors import HTNetError, InputError, StartError

_log = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
# harmless calls that Ray answers at once if the caller is authenticated
_CALLS = {"head": "/ray.rpc.NodeInfoGcsService/CheckAlive", "client server": "/ray.rpc.RayletDriver/ClusterInfo"}
_SOCKET_BYTES = 107
_SESSION = "/ray/session_2026-01-31_23-59-59_999999_1234567/sockets/plasma_store"
LONGEST_FOLDER = _SOCKET_BYTES - len(_SESSION)
"""Longest folder path, in bytes, in which Ray can make its sockets: a Unix socket's path has at most 107."""
CLIENT_ATTEMPTS = 3
"""Attempts to connect over ``ray://`` to a head that is too busy to start the client's own server in time."""
_NO_SERVER = "Initialization failure from server"
NODES_SECONDS = 5.0
"""Seconds between two readings of the cluster's nodes."""
GONE_SECONDS = 20.0
"""Silence of the head after which the cluster counts as gone; after 60 seconds Ray ends this process by force."""
_LAST_RESORT = "/tmp"  # Ray's own
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class ClusterGoneError(StartError):
    """Cluster that went away under its tasks; finished work stays."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Resources that each task of a kind reserves, and the configuration keys that set them."""

    task: str
    cpus: float
    gpus: float
    cpus_key: str
    gpus_key: str


@contextmanager
def ray_cluster(address: str | None, needs: Needs | None = None) -> Iterator[Any]:
    """Start Ray on this machine (``address`` None) or join a running cluster; check that a task of ``needs`` fits.

    The project's packages travel to a cluster's nodes; their dependencies must be installed there. Ray on this machine
    listens on 127.0.0.1 only. Ray's own handler of SIGTERM is replaced by the one that was set before.

    Raises:
        InputError: no cluster answers at the address, it refuses this process, or no node of it can hold a task.
        StartError: Ray did not start on this machine.
        KeyboardInterrupt: SIGTERM came while Ray was starting.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options = _options(address)  # before the import: that is when Ray reads if it shows a token
    with _local_only() if address is None else contextlib.nullcontext():
        import ray

        _start(ray, address, options)
        try:
            if needs is not None:
                check_fits(ray, needs)
            yield ray
        finally:
            ray.shutdown()


def _options(address: str | None) -> dict[str, Any]:
    """Make the options of ``ray.init``, and prepare the folder or the connection that they name."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        session = _session_folder()
        _prepare_token()
        own = {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False, "_temp_dir": session}
        return options | own
    _approach(address)
    root = Path(__file__).resolve().parent.parent
    packages = [str(root / name) for name in ("htnet", "kernels", "dali_pipelines", "launch")]
    return options | {"address": address, "runtime_env": {"py_modules": packages}}


def _start(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for attempt in range(CLIENT_ATTEMPTS):
            try:
                ray.init(**options)
                break
            except Exception as error:  # told from others by its text alone
                if _NO_SERVER not in str(error) or attempt + 1 == CLIENT_ATTEMPTS:
                    raise
                _log.warning("--address %s: the cluster started no server for this client; trying again", address)
    except SystemExit as error:  # Ray's own handler of SIGTERM exits with the signal's number
        if error.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    except Exception as error:  # ray.init raises many kinds, a bare Exception among them
        raise _not_connected(address, error, options.get("_temp_dir")) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _local_only() -> Iterator[None]:
    """Make Ray's processes listen on 127.0.0.1 alone, by a switch that was made for firewalls of other systems.

    ``ray.init(_node_ip_address="127.0.0.1")`` does not do it: Ray replaces it by an address that other machines reach.
    """
    before = os.environ.get(_CLUSTERS)
    os.environ[_CLUSTERS] = "0"  # for the processes that Ray starts
    from ray._private import ray_constants

    known, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False  # where ray was imported before
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        os.environ.pop(_CLUSTERS) if before is None else os.environ.update({_CLUSTERS: before})


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an interrupt, like Ctrl-C: batch systems send it before they kill."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _approach(address: str) -> None:
    """Refuse an address where nothing listens, or where the token is wrong, before Ray tries for half a minute.

    With an explicit address Ray shows a token only if RAY_AUTH_MODE says so, even if it knows one. Names such as "auto"
    are left to Ray.
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
    """Find Ray's token and its place: the variable, the file it names, or Ray's own file; no token is None."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", token
    home = os.path.expanduser("~")  # noqa: PTH111 # Path.home() raises for a user without one
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or f"{home}/.ray/auth_token")
    try:
        return str(place), place.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return str(place), None


def _turns_away(where: str, call: str, token: str | None) -> bool:
    """Return True if the Ray at ``where`` refuses a call with this token, or without one, as not authenticated."""
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
    # patience helps only if something took too long
    hope = "try again when it is less busy; " if "timed out" in reason else ""
    return StartError(
        f"Ray did not start on this machine: {reason}; {hope}Ray's logs are in {session}/session_latest/logs"
    )


def _session_folder() -> str:
    """Find a folder for Ray's sockets and logs, in RAY_TMPDIR, TMPDIR or /tmp as Ray does, but one that can be used.

    Raises:
        StartError: none of them can be used; names each with the rule that it breaks.
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
    """Name the rule for Ray's session that the folder breaks; return None if it breaks none."""
    if (length := len(os.fsencode(folder))) > LONGEST_FOLDER:
        return (
            f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got {length}: "
            f"Ray makes Unix sockets in it, which have at most {_SOCKET_BYTES}"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "ray") as file:
            file.write(bytes(1 << 16))  # a full disk still accepts names, but no content
    except OSError as error:
        return f"cannot be written to: {error.strerror}"
    return None


def _prepare_token() -> None:
    """Give Ray on this machine a token if it would find none; keep others from reading a token in a file.

    Ray would write a token into HOME, which not every job can write to, for everyone to read. This one stays in the
    environment: Ray remembers the first token that this process shows.
    """
    place, token = _known_token()
    if token is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif place != "RAY_AUTH_TOKEN":
        with contextlib.suppress(OSError):  # another user's file: its owner decides
            Path(place).chmod(0o600)


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Count the CPUs that this process may use: affinity, quotas of its control group (v2) and of those around it."""
    cpus = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        entries = [line for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
        group = cgroups / entries[0].removeprefix("0::").lstrip("/") if entries else cgroups
        for folder in (group, *group.parents):
            if folder.is_relative_to(cgroups):
                cpus = min(cpus, _quota(folder / "cpu.max"))
    return max(1, int(cpus))


def _quota(path: Path) -> float:
    """Read the number of CPUs that a ``cpu.max`` ("max 100000" or "150000 100000") allows."""
    try:
        quota, period = path.read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return float("inf")


def check_fits(ray: Any, needs: Needs) -> None:
    """Refuse tasks that would wait for ever, because no single node can hold one.

    Raises:
        InputError: no node has enough; names the keys, their values and the largest node.
    """
    wanted = {"CPU": (needs.cpus_key, needs.cpus), "GPU": (needs.gpus_key, needs.gpus)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, (key, needed) in wanted.items():
        largest = max((node.get(resource, 0) for node in nodes), default=0)
        if needed > largest:
            raise InputError(
                f"{key}={needed:g}: no node has more than {largest:g} {resource}(s): no {needs.task} can run"
            )
    if not any(has_room(node, needs.cpus, needs.gpus) for node in nodes):
        asked = ", ".join(f"{key}={needed:g}" for key, needed in wanted.values())
        raise InputError(f"{asked}: no single node has as many of both: no {needs.task} can run")


def has_room(resources: Mapping[str, float], cpus: float, gpus: float) -> bool:
    """Return True if an empty node with these resources, as ``ray.nodes()`` names them, can hold a task."""
    return cpus <= resources.get("CPU", 0) and gpus <= resources.get("GPU", 0)


def head_answers(address: str) -> bool:
    """Return True if the head (host:port) answers within a few seconds; a refusal of the token is an answer, too."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_CALLS["head"])(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True


class Nodes:
    """Nodes of a cluster, read every few seconds, and the experience of tasks with them."""

    def __init__(self, ray: Any) -> None:
        """Find the head. A head that gives no plain answer (TLS, a client outside) is not asked again."""
        self._ray = ray
        head = ray.get_runtime_context().gcs_address
        self._head = head if head_answers(head) else None
        self._heard = self._looked = time.monotonic()
        self._alive = self._read()
        self.fit: set[str] = set()
        """Nodes that have done a task."""
        self.unfit: dict[str, str] = {}
        """Nodes that tasks avoid, each with its reason."""

    def look(self) -> None:
        """Read the living nodes again, when the last reading is old.

        Raises:
            ClusterGoneError: the head has not answered for GONE_SECONDS.
        """
        now = time.monotonic()
        if now - self._looked < NODES_SECONDS:
            return
        self._looked = now
        if self._head is None or head_answers(self._head):
            self._heard, self._alive = now, self._read()
        elif now - self._heard > GONE_SECONDS:
            raise ClusterGoneError(f"the Ray cluster is gone: its head {self._head} does not answer")

    def _read(self) -> dict[str, Mapping[str, float]]:
        return {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}

    def places(self, cpus: float, gpus: float) -> int:
        """Count the tasks of a size that can run at once; at least 1, because nodes may be added."""
        return max(1, sum(_places(node, cpus, gpus) for node in self._alive.values()))

    def any_fit(self, cpus: float, gpus: float, avoided: Collection[str]) -> bool:
        """Return True if a task may hope for a node: False if it avoids all those that could hold it."""
        able = [name for name, node in self._alive.items() if has_room(node, cpus, gpus)]
        return not able or any(name not in avoided for name in able)


def _places(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    wanted = (("CPU", cpus), ("GPU", gpus))
    return min(int(node.get(resource, 0) / needed) for resource, needed in wanted if needed)
