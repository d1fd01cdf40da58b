"""The ledger of a training: paths beside a model in the making, figures, the words between driver and workers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htnet.config import Config, LoggingConfig
from htnet.config.load import load_config
from htnet.config.plain import config_hash, dump_config, identity_changes
from htnet.data.store.reader import Store
from htnet.errors import InputError
from htnet.files import locked, remove_leftovers, write_json, write_whole
from launch.run.environment import driver_environment

__all__ = ["Figures", "TrainingFolder", "check_logging", "check_training", "open_training"]


@dataclass(frozen=True, kw_only=True)
class TrainingFolder:
    """The paths of a training; ``path`` is the model folder that it makes."""

    path: Path

    @property
    def own(self) -> Path:
        """Folder of everything that is not the model."""
        return self.path / "training"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.own / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.own / "environment.json"

    @property
    def snapshots(self) -> Path:
        return self.own / "snapshots"

    @property
    def best(self) -> Path:
        """Folder of the weights of the best epochs."""
        return self.own / "best"

    @property
    def progress(self) -> Path:
        return self.own / "progress.json"

    @property
    def stop(self) -> Path:
        """File by which the driver asks the workers to save and stop."""
        return self.own / "stop"

    @property
    def lock(self) -> Path:
        return self.own / ".lock"

    @property
    def tensorboard(self) -> Path:
        return self.own / "tensorboard"

    @property
    def mlflow_run(self) -> Path:
        """File with the name that MLflow gave to this training."""
        return self.own / "mlflow_run"

    def event(self, kind: str, **facts: object) -> None:
        """Append a line to ``events.jsonl``."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, default=str)
        with (self.own / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read_progress(self) -> dict[str, Any]:
        """Return the workers' last word on their progress; empty before the first."""
        try:
            return dict(json.loads(self.progress.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def remove_working_files(self) -> None:
        """Remove what only an unfinished training needs."""
        for folder in (self.snapshots, self.best):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.progress, self.stop):
            file.unlink(missing_ok=True)


def check_training(path: Path, config: Config, store: Store) -> str:
    """Return the identity of the training, if one of this configuration and store may live in ``path``.

    Raises:
        InputError: the folder belongs to another training, or is something else.
    """
    folder, identity = TrainingFolder(path=path), config_hash(config, store.digest)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; --out names a folder")
    if not folder.config.exists():
        if path.is_dir() and any(item.name != folder.own.name for item in path.iterdir()):
            raise InputError(f"{path}: is not empty and no training; choose another --out")
        return identity
    known = _known(folder)
    if known.get("config_hash", identity) == identity:
        return identity
    changed = identity_changes(load_config(folder.config), config)
    same_store = known.get("store_digest") == store.digest
    what = f"it differs in {', '.join(changed)}" if changed else "the content of the store differs"
    if not changed and same_store:
        what = "another version of htnet made it"
    raise InputError(f"{path}: belongs to another training: {what}; choose another --out")


@contextmanager
def open_training(path: Path, config: Config, store: Store) -> Iterator[TrainingFolder]:
    """Create or take up the folder of a training; one driver at a time, where the file system has locks.

    Raises:
        InputError: as of :func:`check_training`; nothing can be written there; another process drives it.
    """
    check_training(path, config, store)
    folder = TrainingFolder(path=path)
    try:
        folder.own.mkdir(parents=True, exist_ok=True)
        folder.lock.open("a").close()
    except OSError as error:
        raise InputError(f"{path}: no model can be written there: {error.filename}: {error.strerror}") from None
    busy = f"{path}: another process is training this model; wait for it or choose another --out"
    with locked(folder.lock, busy) as why:
        identity = check_training(path, config, store)
        for place in (folder.path, folder.own, folder.snapshots, folder.best):
            remove_leftovers(place, owned=why is None)
        for file in (folder.progress, folder.stop):
            file.unlink(missing_ok=True)
        if not folder.config.exists():
            write_json(
                folder.environment,
                {"config_hash": identity, "store_digest": store.digest, "store": store.address, **driver_environment()},
            )
            write_whole(folder.config, dump_config(config))
        if why is not None:
            folder.event("no_lock", reason=why)
        yield folder


def _known(folder: TrainingFolder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.environment.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


class Figures:
    """Figures of a training: lines of ``metrics.jsonl``, and whatever ``logging`` asks for beside them.

    Args:
        steps: steps of the state that the training goes on from; later lines of an earlier attempt are removed.
    """

    def __init__(self, folder: TrainingFolder, logging: LoggingConfig, *, steps: int) -> None:
        self._path = folder.metrics
        self.lines = [line for line in _read_lines(self._path) if line["steps"] <= steps]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._board = _open_tensorboard(folder.tensorboard, steps) if logging.tensorboard else None
        self._mlflow = _open_mlflow(logging.mlflow, folder) if logging.mlflow else None

    def note(self, steps: int, **figures: Any) -> None:
        """Note figures after so many steps; numbers go everywhere, other values into the file alone."""
        line = {"steps": steps, **figures}
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: float(value) for name, value in _flat(figures) if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, steps)
            self._board.flush()
        if self._mlflow is not None:
            self._mlflow.log_metrics(numbers, step=steps)

    def close(self) -> None:
        """Close what is open beside the file."""
        if self._board is not None:
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.end_run()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of ``metrics.jsonl``; a kill may have cut the last one short."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("steps"), int):
            yield found


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _open_tensorboard(place: Path, steps: int) -> Any:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped] # published without type information

    return SummaryWriter(str(place), purge_step=steps + 1)


def check_logging(logging: LoggingConfig) -> None:
    """Refuse a place for figures whose package is not installed."""
    if logging.mlflow and importlib.util.find_spec("mlflow") is None:
        raise InputError(f"logging.mlflow={logging.mlflow}: needs the extra: pip install htnet[mlflow]")


def _open_mlflow(address: str, folder: TrainingFolder) -> Any:
    """Begin a run, or go on with that of an earlier attempt."""
    import mlflow  # type: ignore[import-not-found,unused-ignore] # an extra

    try:
        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("htnet")
        known = folder.mlflow_run.read_text(encoding="utf-8") if folder.mlflow_run.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=folder.path.name)
    except mlflow.exceptions.MlflowException as error:
        raise InputError(f"logging.mlflow={address}: {' '.join(str(error).split())}") from None
    write_whole(folder.mlflow_run, run.info.run_id)
    return mlflow
