"""One subject of a store: what a Ray task of ``htnet prepare`` does."""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass
from pathlib import Path

from htnet.data.adapters.base import Clip, FlowPicture
from htnet.data.extraction import ExtractionSettings
from htnet.data.landmarks import LandmarkTable
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SubjectTask:
    """Everything that the task needs; small, because it is sent to it."""

    dataset: str
    subject: str
    entries: tuple[Clip | FlowPicture, ...]
    landmarks: LandmarkTable
    settings: ExtractionSettings
    folder: Path
    """The store in the making, on storage that all nodes share."""


@dataclass(frozen=True, kw_only=True)
class SubjectOutcome:
    """``refused``: bad input, to be told in one line; ``broken``: a defect, with its traceback."""

    clips: int
    left_out: int = 0
    refused: str | None = None
    broken: str | None = None


def prepare_subject(task: SubjectTask) -> SubjectOutcome:
    """Make the subject's samples and write its shard; a failure is an outcome, not an exception."""
    import cv2
    import torch

    from htnet.data.extraction import extract
    from htnet.data.store import write_part

    cv2.setNumThreads(task.settings.threads)
    torch.set_num_threads(task.settings.threads)
    clips = len(task.entries)
    try:
        if not task.folder.is_dir():
            raise InputError(f"{task.folder}: this node does not see the store's folder; it must be on shared storage")
        found = extract(task.entries, task.landmarks, task.settings)
        left_out = [dataclasses.asdict(item) for item in found.left_out]
        write_part(task.folder, task.dataset, task.subject, found.samples, left_out, found.seconds)
    except InputError as error:
        return SubjectOutcome(clips=clips, refused=str(error))
    except Exception:  # the driver tells it; a task that raises would be tried again in vain
        return SubjectOutcome(clips=clips, broken=traceback.format_exc())
    return SubjectOutcome(clips=clips, left_out=len(left_out))
