"""A run's folder: identity, lock, events, environment. Fold records make it resumable; this keeps them of one kind."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from htnet.config import Config
from htnet.config_io import changed_keys, config_hash, dump_config, load_config, to_plain
from htnet.data.store import Store
from htnet.errors import InputError
from htnet.results import write_json_atomic, write_text_atomic

PACKAGES = ("htnet", "torch", "triton", "deepspeed", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder that belongs to one configuration and one store."""

    path: Path
    config_hash: str

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
    """Create or take up a run's folder; only one process at a time drives it.

    Raises :class:`InputError` when the folder belongs to another configuration or store, when it is
    something else than a run, or when another process drives it.
    """
    identity = check_run(path, config, store)
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process is running this sweep; wait for it or choose another --out"
            ) from None
        check_run(path, config, store)  # once more under the lock
        write_text_atomic(path / "config.yaml", dump_config(config))
        write_json_atomic(path / "environment.json", environment(identity, store))
        (path / "folds").mkdir(exist_ok=True)
        (path / "progress").mkdir(exist_ok=True)
        yield RunFolder(path=path, config_hash=identity)


def check_run(path: Path, config: Config, store: Store) -> str:
    """Identity of the run, if a run with this configuration and store may live in ``path``; changes nothing.

    Raises :class:`InputError` when the folder belongs to another configuration or store or is no run.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; --out names a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").exists() and not (path / ".lock").exists():
        raise InputError(f"{path}: is not empty and not a run; choose another --out")
    identity = config_hash(config, store.digest)
    if not (path / "config.yaml").exists() or not (path / "environment.json").exists():
        return identity
    before = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    # a run that never finished anything binds nobody
    if before.get("config_hash") == identity or not any((*path.glob("folds/*.json"), *path.glob("checkpoints/*.pt"))):
        return identity
    changed = changed_keys(to_plain(load_config(path / "config.yaml")), to_plain(config))
    free = ("prepare", "data.store", "data.subjects", "score.bootstrap", "score.chance_trials")
    relevant = [key for key in changed if not key.startswith(free) and key.partition(".")[0] != "resources"]
    if before.get("store_digest") == store.digest and not relevant:
        relevant = ["resources.gpus_per_fold"]  # CPU against GPU
    what = f"it differs in {', '.join(relevant)}" if relevant else f"the content of the store {store.path} differs"
    raise InputError(f"{path}: this run belongs to another configuration: {what}; choose another --out")


def environment(identity: str, store: Store) -> dict[str, Any]:
    """What a reader needs to judge and repeat the run; written to ``environment.json``."""
    return {
        "config_hash": identity,
        "store_digest": store.digest,
        "store_recipe": store.recipe,
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
    }


def cpu_name() -> str:
    """The processor's model name, as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
