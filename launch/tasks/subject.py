"""Subject of a store, as a task of ``htnet prepare``; knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import traceback
from dataclasses import dataclass
from pathlib import Path

from htnet.config import PrepareConfig
from htnet.data.entries import Entry
from htnet.errors import InputError

SHARED = "must lie on storage that all nodes share"


class RefusedError(InputError):
    """Content of the sources that cannot be used: it must change, and everything made from it is useless."""


@dataclass(frozen=True, kw_only=True)
class SubjectTask:
    """Input of the task; small, because it is sent to the worker. Paths are absolute."""

    dataset: str
    subject: str
    entries: tuple[Entry, ...]
    prepare: PrepareConfig
    device: str
    """Device that computes flow, ``cpu`` or ``cuda``."""
    strict: bool = False
    """True if the first clip that cannot be used ends the work."""
    folder: Path
    """Folder of the store in the making, on storage that all nodes share."""
    progress_path: None = None

    @property
    def cpus(self) -> float:
        """Number of its threads."""
        return self.prepare.threads

    @property
    def gpus(self) -> float:
        """Share of a GPU that Ray reserves for it."""
        return self.prepare.gpus_per_task

    @property
    def name(self) -> str:
        """Subject keyed by its dataset, ``casme2/sub17``."""
        return f"{self.dataset}/{self.subject}"

    def again(self) -> SubjectTask:
        """Return the task of the next attempt. It is the same task: its shard is written whole or not at all."""
        return self


@dataclass(frozen=True, kw_only=True)
class SubjectOutcome:
    """End of a subject's task.

    ``bad_input``: the content of the sources cannot be used, which ends the run. ``bad_node``: this node is not set up
    for the work; another may be. ``error``: a fault of the machine (a full disk, a dead worker), or a defect, then with
    a ``traceback``. The subject is not done, and the others go on.
    """

    clips: int
    left_out: int = 0
    bad_input: str | None = None
    bad_node: str | None = None
    error: str | None = None
    traceback: str | None = None


def prepare_subject(task: SubjectTask) -> SubjectOutcome:
    """Make the subject's samples and write its shard; a failure is an outcome, not an exception."""
    import cv2
    import torch

    from htnet.data.extraction import extract
    from htnet.data.store.writer import write_part

    cv2.setNumThreads(task.prepare.threads)
    torch.set_num_threads(task.prepare.threads)
    clips = len(task.entries)
    try:
        _check_node(task)
    except InputError as error:
        return SubjectOutcome(clips=clips, bad_node=f"node {platform.node()}: {error}")
    try:
        found = extract(task.entries, task.prepare, device=task.device, strict=task.strict)
        left_out = [dataclasses.asdict(item) for item in found.left_out]
        notes = {"methods": found.methods, "mean_shape": found.mean_shape, "by_rule": found.by_rule}
        write_part(task.folder, task.dataset, task.subject, found.samples, left_out, found.seconds, notes)
    except InputError as error:
        return SubjectOutcome(clips=clips, bad_input=str(error))
    except OSError as error:
        return SubjectOutcome(clips=clips, error=f"node {platform.node()}: {error}")
    except Exception as error:  # the other subjects go on; another try of this one would fail likewise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return SubjectOutcome(clips=clips, error=reason, traceback=traceback.format_exc())
    return SubjectOutcome(clips=clips, left_out=len(left_out))


def _check_node(task: SubjectTask) -> None:
    """Check that this node sees the driver's files: all clips that it does not see would be left out."""
    from htnet.data.extraction import check_machine

    check_machine(task.prepare, task.device)
    if any(entry.has_frames for entry in task.entries):
        importlib.import_module("htnet.data.video")  # refuses where PyAV is missing
    if not task.folder.is_dir():
        raise InputError(f"{task.folder}: not there; the store {SHARED}")
    for entry in task.entries:
        if not entry.path.exists():
            raise InputError(f"{entry.path}: not there; the sources {SHARED}")
