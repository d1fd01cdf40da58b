"""A run's folder: identity, lock, events, environment. Fold records make it resumable; this keeps them of one kind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from htnet.config import Config
from htnet.config.identity import config_hash, identity_changes
from htnet.config.load import dump_config, load_config
from htnet.data.store.writer import Store
from htnet.errors import InputError
from htnet.scoring.record import write_json_atomic, write_text_atomic

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""How a network file system says that it does not lock files."""
PACKAGES = (
    *("htnet", "torch", "triton", "deepspeed", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("numpy", "numba", "llvmlite"),
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder that belongs to one configuration and one store."""

    path: Path
    config_hash: str
    unlocked: str | None = None
    """Why nothing keeps a second driver out; None where this process holds the lock."""

    @property
    def folds(self) -> Path:
        return self.path / "folds"

    @property
    def progress(self) -> Path:
        return self.path / "progress"

    def event(self, kind: str, **facts: object) -> None:
        """Append a line to ``events.jsonl``."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, default=str)
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@contextmanager
def open_run(path: Path, config: Config, store: Store) -> Iterator[RunFolder]:
    """Create or take up a run's folder; only one process at a time drives it, where its file system has locks.

    Where it has none, the run goes on without: folds are idempotent and files appear whole, so a second driver would
    waste time and spoil nothing. ``events.jsonl`` and :attr:`RunFolder.unlocked` then name the reason.

    Raises :class:`InputError` when the folder cannot be made, when it belongs to another configuration or store,
    when it is something else than a run, or when another process drives it.
    """
    identity = check_run(path, config, store)
    with _lock(path) as unlocked:
        check_run(path, config, store)  # once more under the lock
        write_text_atomic(path / "config.yaml", dump_config(config))
        write_json_atomic(path / "environment.json", _environments(path, identity, store))
        (path / "folds").mkdir(exist_ok=True)
        (path / "progress").mkdir(exist_ok=True)
        run = RunFolder(path=path, config_hash=identity, unlocked=unlocked)
        if unlocked is not None:
            run.event("no_lock", asked="a lock on .lock", taken="none: keep a second driver away", reason=unlocked)
        yield run


@contextmanager
def _lock(path: Path) -> Iterator[str | None]:
    """Make the folder and hold its lock; yields the reason where there are no locks, else None."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise InputError(f"{path}: no run can be written there: {error.filename}: {error.strerror}") from None
    with lock:
        unlocked = None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process is running this sweep; wait for it or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            unlocked = error.strerror
        yield unlocked


def check_run(path: Path, config: Config, store: Store) -> str:
    """Identity of the run, if a run with this configuration and store may live in ``path``; changes nothing.

    Raises :class:`InputError` when the folder belongs to another configuration or store or is no run.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; --out names a folder")
    if path.is_dir() and not (path / "config.yaml").exists() and any(not _ours(item) for item in path.iterdir()):
        raise InputError(f"{path}: is not empty and not a run; choose another --out")
    identity = config_hash(config, store.digest)
    before = _known_environment(path)
    # a run that never finished anything binds nobody
    if (
        not before
        or not (path / "config.yaml").exists()
        or before.get("config_hash") == identity
        or not any((*path.glob("folds/*.json"), *path.glob("checkpoints/*.pt")))
    ):
        return identity
    changed = identity_changes(load_config(path / "config.yaml"), config)
    if changed:
        what = f"it differs in {', '.join(changed)}"
    elif before.get("store_digest") != store.digest:
        what = f"the content of the store {store.path} differs"
    else:
        what = "another version of htnet made it"
    raise InputError(f"{path}: this run belongs to another configuration: {what}; choose another --out")


def _ours(item: Path) -> bool:
    """Whether a driver that was killed at its start leaves this behind."""
    return item.name == ".lock" or (item.name.startswith(".") and item.name.endswith(".tmp"))


def _known_environment(path: Path) -> dict[str, Any]:
    """``environment.json`` of an earlier driver, empty where there is none."""
    try:
        known = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise InputError(f"{path / 'environment.json'}: is no JSON ({error}); choose another --out") from None
    return known if isinstance(known, dict) else {}


def _environments(path: Path, identity: str, store: Store) -> dict[str, Any]:
    """Content of ``environment.json``: the first driver's, and under ``resumed`` what each later one was."""
    now = environment(store.path)
    before = _known_environment(path)
    if before.get("config_hash") == identity:
        return before | {"resumed": [*before.get("resumed", []), now]}
    return {"config_hash": identity, "store_digest": store.digest, "store_recipe": store.recipe, **now}


def environment(store: Path) -> dict[str, Any]:
    """What a reader needs to judge and repeat a driver's work; ``commit`` only where the code is a checkout."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "store": str(store.resolve()),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        **checkout(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
    }


def checkout() -> dict[str, Any]:
    """``commit`` of the project and whether files differ from it (``modified``); empty for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # git itself would find a repository that the environment happens to lie in
        return {}
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=30, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.strip(), "modified": bool(changes)}


def cpu_facts() -> dict[str, str]:
    """What Linux reports of the last processor in /proc/cpuinfo, by its names; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """The processor's model name, as far as the system says."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
