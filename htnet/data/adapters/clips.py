"""What the frame-based adapters share: an annotated clip, its classes, and the way from frames to a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from htnet.data.adapters.frames import frame_path, list_frames, read_frame, to_gray
from htnet.data.flow import FlowMethod, flow_images, flow_parameters
from htnet.data.landmarks import CROP_RATIO, FaceCrop, LandmarkTable, face_crop
from htnet.data.prepared import PreparedSample
from htnet.data.strain import StrainKind
from htnet.data.types import Emotion, Sample, SampleId
from htnet.errors import InputError

LABEL_SCHEME = "megc2019_3class"
"""Name of the mapping from a dataset's emotions to the three classes of the MEGC2019 composite."""
SPOTTING = (
    "largest mean absolute grey difference to the onset in the face crop, both smoothed by a Gaussian of sigma 1, "
    "less what a shift of the head and a change of brightness explain"
)
"""How an apex is found where the annotation gives none."""
LANDMARKS_FILE = "landmarks.csv"
"""Landmark table of a dataset folder where none is named."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One annotated clip: where its frames lie and what the annotation says; ``apex`` None where it gives none.

    ``onset`` and ``offset`` None: the folder's first and last frame.
    """

    id: SampleId
    folder: Path
    label: Emotion
    emotion: str
    fps: float
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """How flow images are made; fields as in :class:`htnet.config.PrepareConfig`."""

    method: FlowMethod
    size: int
    working_size: int
    strain: StrainKind
    keep_frames: bool


def describe(adapter: str, annotation: Path, landmarks: Path, flow: FlowOptions, apex: str) -> dict[str, object]:
    """How an adapter makes its samples, for ``store.json``."""
    if not landmarks.is_file():
        raise InputError(f"{landmarks}: no such landmark table (columns: dataset, subject, clip, left_eye_x, ...)")
    return {
        "adapter": adapter,
        "annotation": annotation.name,
        "annotation_sha256": hashlib.sha256(annotation.read_bytes()).hexdigest(),
        "landmarks_sha256": hashlib.sha256(landmarks.read_bytes()).hexdigest(),
        "label_scheme": LABEL_SCHEME,
        "apex": apex,
        "face_crop": f"square of {CROP_RATIO} times the larger of eye distance and eye-mouth distance",
        "flow": {
            **flow_parameters(flow.method),
            "size": flow.size,
            "working_size": flow.working_size,
            "strain": flow.strain,
        },
    }


def three_classes(emotion: str, mapping: Mapping[str, Emotion | None], place: str) -> Emotion | None:
    """Class of an emotion word, any case; None where the scheme leaves it out; :class:`InputError` if unknown."""
    word = emotion.strip().lower()
    if word not in mapping:
        raise InputError(f"{place}: must be one of {', '.join(mapping)}, got {emotion!r}")
    return mapping[word]


class DuplicateGuard:
    """Refuses a clip that an annotation names twice."""

    def __init__(self) -> None:
        self._seen: dict[SampleId, str] = {}

    def add(self, sample: SampleId, place: str) -> None:
        """Take note of a clip and where it stands; :class:`InputError` if it stood elsewhere before."""
        if sample in self._seen:
            raise InputError(f"{place}: clip {sample} is there already, {self._seen[sample]}")
        self._seen[sample] = place


def check_subject_folder(folder: Path, subject: str) -> None:
    """Refuse a subject of the annotation whose folder is missing or holds no clip."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder for subject {subject} of the annotation")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise InputError(f"{folder}: subject {subject} has no clips")


def prepare_clips(
    root: Path, clips: Iterable[Clip], table: LandmarkTable, flow: FlowOptions
) -> Iterator[PreparedSample]:
    """Make a sample of every clip, in order; :class:`InputError` if there is none, or as :func:`prepare_clip`."""
    empty = True
    for clip in clips:
        empty = False
        yield prepare_clip(clip, table, flow)
    if empty:
        raise InputError(f"{root}: no clip of the classes negative, positive and surprise")


def prepare_clip(clip: Clip, table: LandmarkTable, flow: FlowOptions) -> PreparedSample:
    """Make the sample of a clip: one face crop for the pair, flow image, landmarks in its pixels.

    Kept frames are the face crop of onset and apex at source resolution, JPEG of quality 95, so that the
    sample's landmarks fit them by a scale alone.

    Raises:
        InputError: frames missing or unreadable, of different sizes, without landmarks; the message names them.
    """
    frames = list_frames(clip.folder)
    onset = min(frames) if clip.onset is None else clip.onset
    offset = max(frames) if clip.offset is None else clip.offset
    first = read_frame(frame_path(frames, onset, clip.folder))
    points = table.of(clip.id)
    if table.flow_size is not None:
        raise InputError(f"{table.path}: landmarks must be in pixels of the onset frame, these are of a flow image")
    try:
        crop = face_crop(points, first.shape)
    except InputError as error:
        raise InputError(f"{table.path}: clip {clip.id}: {error}") from None
    apex = find_apex(frames, onset, offset, crop, clip.folder) if clip.apex is None else clip.apex
    second = read_frame(frame_path(frames, apex, clip.folder))
    if second.shape != first.shape:
        sizes = f"{first.shape[:2]}, got {second.shape[:2]}"
        raise InputError(f"{frames[apex]}: must be as large as frame {onset}, {sizes}")
    pair = crop.cut(first), crop.cut(second)
    grays = (_resized(to_gray(picture), flow.working_size)[None] for picture in pair)
    image = flow_images(*grays, method=flow.method, size=flow.size, strain=flow.strain, device=torch.device("cpu"))[0]
    sample = Sample(
        id=clip.id,
        label=int(clip.label),
        landmarks=crop.to_flow(points, flow.size),
        flow_size=flow.size,
        onset=onset,
        apex=apex,
        offset=offset,
        fps=clip.fps,
        emotion=clip.emotion,
    )
    kept = tuple(zip(("onset.jpg", "apex.jpg"), map(_jpeg, pair), strict=True)) if flow.keep_frames else ()
    return PreparedSample(sample=sample, flow_image=image, frames=kept)


def find_apex(frames: Mapping[int, Path], onset: int, offset: int, crop: FaceCrop, folder: Path) -> int:
    """Find the apex by :data:`SPOTTING`: no flow per frame, and one picture in memory at a time.

    Sway of the head moves every edge of the face, a micro-expression only some: without taking the shift out
    (least squares on the onset's gradients), frames late in the clip win over the apex.

    Args:
        frames: the clip's frames by number.
        onset: frame number that every other is compared with.
        offset: last frame number to look at.
        crop: the face, in pixels of the frames.
        folder: the clip's folder, for error messages.

    Returns:
        The frame number after ``onset`` and up to ``offset``; the first of equals.

    Raises:
        InputError: no frame in between, or an unreadable one.
    """
    between = [number for number in frames if onset < number <= offset]
    if not between:
        raise InputError(f"{folder}: no frame after onset {onset} up to offset {offset}, so no apex can be found")
    rest = _smooth(crop, frame_path(frames, onset, folder))
    down, right = np.gradient(rest)
    head = np.stack([right.ravel(), down.ravel(), np.ones(rest.size, np.float32)], axis=1)
    fit = np.linalg.pinv(head)
    scores = []
    for number in between:
        change = (_smooth(crop, frames[number]) - rest).ravel()
        # rounded, so that equal frames tie and the first one wins
        scores.append(round(float(np.abs(change - head @ (fit @ change)).mean()), 6))
    return between[int(np.argmax(scores))]


def _smooth(crop: FaceCrop, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    gray = crop.cut(to_gray(read_frame(path))).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(gray, (0, 0), 1.0), np.float32)


def _resized(gray: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A square crop at the size at which flow is computed."""
    how = cv2.INTER_AREA if gray.shape[0] > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(gray, (side, side), interpolation=how), np.uint8)


def _jpeg(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done  # encoding to memory has no input that could be wrong
    return bytes(data.tobytes())
