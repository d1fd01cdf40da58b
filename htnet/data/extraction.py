"""From an annotated clip to a prepared sample: frames, face crop, apex, flow image.

One face crop is cut from onset and apex alike, placed by the onset's landmarks, so that the crop itself makes no
motion. A clip that cannot be used becomes a :class:`LeftOut` and never stops the others.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from htnet.data.adapters.base import APEX_AT_ONSET, Clip, FlowPicture, LeftOut
from htnet.data.adapters.htnet_release import read_flow_picture
from htnet.data.apex import APEX_FOUND, find_apex, spotting_recipe
from htnet.data.detectors import Detector, build_detector
from htnet.data.faces import FaceFinder, LandmarkPolicy, Located, NoFaceError, onset_of
from htnet.data.flow import FlowMethod, flow_images, flow_parameters
from htnet.data.frames import Frames, open_frames, resized, to_gray
from htnet.data.head_motion import HeadMotion
from htnet.data.landmarks import CROP_RATIO, FaceCrop, LandmarkTable, face_crop
from htnet.data.prepared import PreparedSample
from htnet.data.stored_frames import frame_member, neighbours
from htnet.data.strain import StrainKind
from htnet.data.types import Sample, SampleId
from htnet.errors import InputError

UNREADABLE = "unreadable_frames"
"""Onset or apex are missing, damaged or of different sizes; a failure."""
NO_LANDMARKS = "no_landmarks"
"""There are no landmarks of the clip, or they do not fit its frames; a failure."""
_GROUP = 64
"""Pairs whose flow is computed together; bounds the memory of a subject with many clips."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How samples are made; fields as in :class:`htnet.config.PrepareConfig`."""

    flow_method: FlowMethod = "tvl1"
    flow_size: int = 28
    working_size: int = 256
    strain: StrainKind = "central"
    head_motion: HeadMotion = "none"
    detector: str = "none"
    detector_model: str | None = None
    landmark_failures: LandmarkPolicy = "skip"
    keep_frames: bool = False
    keep_neighbours: int = 0
    device: str = "cpu"
    threads: int = 1
    strict: bool = False
    """Whether the first clip that cannot be used is an error."""

    def recipe(self) -> dict[str, object]:
        """What decides the content of a sample, for ``store.json``."""
        return {
            "flow": {
                **flow_parameters(self.flow_method),
                "size": self.flow_size,
                "working_size": self.working_size,
                "strain": self.strain,
                # only where it is taken out: stores of before stay up to date
                **({"head_motion": self.head_motion} if self.head_motion != "none" else {}),
            },
            "face_crop": f"square of {CROP_RATIO} times the larger of eye distance and eye-mouth distance",
            "apex_where_not_annotated": spotting_recipe(),
            "detector": None if self.detector == "none" else self.load_detector()[1].describe(),
            "landmark_failures": self.landmark_failures,
            "keep_frames": self.keep_frames,
            # as above
            **({"keep_neighbours": self.keep_neighbours} if self.keep_neighbours else {}),
        }

    def check_machine(self) -> None:
        """:class:`InputError` where this machine lacks the GPU or the detector that is asked for."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("prepare.device=cuda: no CUDA device is visible")
        if self.detector != "none":
            self.load_detector()

    def load_detector(self) -> tuple[str, Detector]:
        """The detector and its name; :class:`InputError` if its package or model file is missing."""
        model = None if self.detector_model is None else Path(self.detector_model)
        return self.detector, build_detector(self.detector, model)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What became of a subject's clips, in their order. ``seconds`` by stage.

    ``methods``: how the landmarks of each sample were found, by clip. ``mean_shape``: for clips that have the mean of
    the others', why they have none of their own.
    """

    samples: tuple[PreparedSample, ...]
    left_out: tuple[LeftOut, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    mean_shape: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Onset and apex of a clip, cut and at working size, and the sample without its flow image."""

    sample: Sample
    crops: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    frames: tuple[tuple[str, bytes], ...]
    sources: dict[str, str]
    notes: tuple[str, ...]


def extract(
    entries: Sequence[Clip | FlowPicture], landmarks: LandmarkTable, settings: ExtractionSettings
) -> Extraction:
    """Make the samples of one subject's clips.

    Raises:
        InputError: ``settings.strict`` and a clip cannot be used; a flow picture cannot be used; landmarks are missing
            under the policy ``error``; a GPU is asked for where there is none.
    """
    return _Extractor(landmarks, settings).run(entries)


class _Extractor:
    def __init__(self, landmarks: LandmarkTable, settings: ExtractionSettings) -> None:
        settings.check_machine()
        self._table, self._settings = landmarks, settings
        self._seconds: dict[str, float] = defaultdict(float)
        detector = None if settings.detector == "none" else settings.load_detector()
        self._faces = FaceFinder(landmarks, detector, settings.landmark_failures)
        self._mean_shape: dict[str, str] = {}

    def run(self, entries: Sequence[Clip | FlowPicture]) -> Extraction:
        made: list[PreparedSample | LeftOut | _Pair] = []
        waiting = 0
        for entry in entries:
            made.append(self._try(entry, entries))
            waiting += isinstance(made[-1], _Pair)
            if waiting == _GROUP:
                self._finish(made)
                waiting = 0
        self._finish(made)
        samples = tuple(item for item in made if isinstance(item, PreparedSample))
        return Extraction(
            samples=samples,
            left_out=tuple(item for item in made if isinstance(item, LeftOut)),
            seconds={name: round(value, 3) for name, value in self._seconds.items()},
            methods={str(item.sample.id): item.sources["landmarks"] for item in samples},
            mean_shape=self._mean_shape,
        )

    def _try(
        self, entry: Clip | FlowPicture, siblings: Sequence[Clip | FlowPicture]
    ) -> PreparedSample | LeftOut | _Pair:
        try:
            made, failure = (
                self._picture(entry, siblings) if isinstance(entry, FlowPicture) else self._pair(entry, siblings)
            )
        except InputError as error:
            no_face = isinstance(error, NoFaceError)
            # a published composite is whole, or something is wrong with the copy
            strict = self._settings.strict or isinstance(entry, FlowPicture)
            if strict or (no_face and self._settings.landmark_failures == "error"):
                raise
            rule = NO_LANDMARKS if no_face else UNREADABLE
            return LeftOut(clip=str(entry.id), rule=rule, reason=str(error), place=entry.place, failed=True)
        if failure is not None:
            self._mean_shape[str(entry.id)] = failure
        return made

    def _find_face(
        self, entry: Clip | FlowPicture, picture: NDArray[Any], siblings: Sequence[Clip | FlowPicture]
    ) -> Located:
        if self._settings.detector == "none":
            return self._faces.find(entry, picture, siblings)
        with self._timed("faces"):
            return self._faces.find(entry, picture, siblings)

    def _picture(self, entry: FlowPicture, siblings: Sequence[Clip | FlowPicture]) -> tuple[PreparedSample, str | None]:
        """The sample, and why it has the mean of the others' landmarks where it has."""
        with self._timed("read"):
            image = read_flow_picture(entry.picture)
        table = self._table.origin(entry.id)
        if image.shape[0] != table.flow_size:
            raise InputError(
                f"{entry.picture}: a picture of {image.shape[0]} pixels, but the landmarks in {table.path} "
                f"are in pixels of a picture of {table.flow_size}"
            )
        face = self._find_face(entry, image, siblings)
        sample = Sample(
            id=entry.id, label=entry.label, emotion=entry.emotion, landmarks=face.points, flow_size=image.shape[0]
        )
        return PreparedSample(sample=sample, flow_image=image, sources={"landmarks": face.method}), face.failure

    def _pair(self, clip: Clip, siblings: Sequence[Clip | FlowPicture]) -> tuple[_Pair, str | None]:
        """As :meth:`_picture`."""
        settings = self._settings
        with self._timed("read"):
            frames = open_frames(clip.frames)
            onset = onset_of(clip, frames)
            offset = frames.numbers[-1] if clip.offset is None else clip.offset
            first = frames.read(onset)
        face = self._find_face(clip, first, siblings)
        crop = face_crop(face.points, first.shape)
        apex, notes = clip.apex, clip.notes
        if apex == onset:  # an adapter sees it only where the onset is annotated
            apex, notes = None, (*notes, APEX_AT_ONSET)
        if apex is None:
            with self._timed("apex"):
                apex, notes = find_apex(frames, onset, offset, crop, face.points), (*notes, APEX_FOUND)
        with self._timed("read"):
            second, kept = self._read_rest(clip, frames, apex, (onset, first), crop)
            cut = crop.cut(first), crop.cut(second)
            kept = {frame_member("onset"): cut[0], **kept} if settings.keep_frames else {}
        sample = Sample(
            id=clip.id, label=clip.label, emotion=clip.emotion, landmarks=crop.to_flow(face.points, settings.flow_size),
            flow_size=settings.flow_size, onset=onset, apex=apex, offset=offset, fps=clip.fps,
        )  # fmt: skip
        one, two = (resized(to_gray(picture), settings.working_size) for picture in cut)
        checksums = {"onset_sha256": _digest(first), "apex_sha256": _digest(second)}
        sources = {**checksums, "landmarks": face.method}
        encoded = tuple((member, _jpeg(picture)) for member, picture in kept.items())
        pair = _Pair(sample=sample, crops=(one, two), frames=encoded, sources=sources, notes=notes)
        return pair, face.failure

    def _read_rest(
        self, clip: Clip, frames: Frames, apex: int, onset: tuple[int, NDArray[np.uint8]], crop: FaceCrop
    ) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
        """The apex, and the crops of it and its and the onset's neighbours by member; a video is gone through once."""
        first, alike = onset
        members = {frame_member("apex"): apex}
        reach = self._settings.keep_neighbours
        if reach and apex in frames.numbers:  # else to read it says what is wrong
            members |= dict(neighbours(frames.numbers, first, apex, reach))
        numbers = sorted(set(members.values()))
        crops: dict[int, NDArray[np.uint8]] = {}
        second = alike
        for number, picture in zip(numbers, frames.read_each(numbers), strict=True):
            if picture.shape != alike.shape:
                raise InputError(
                    f"{clip.frames}: frame {number} must be as large as frame {first}, {alike.shape[:2]}, "
                    f"got {picture.shape[:2]}"
                )
            crops[number] = crop.cut(picture).copy()  # a view would keep every whole picture
            second = picture if number == apex else second
        return second, {member: crops[number] for member, number in members.items()}

    def _finish(self, made: list[PreparedSample | LeftOut | _Pair]) -> None:
        """Compute the flow of the pairs that wait for it, in place."""
        places = [index for index, item in enumerate(made) if isinstance(item, _Pair)]
        if not places:
            return
        pairs = [item for item in made if isinstance(item, _Pair)]
        onsets, apexes = (np.stack([pair.crops[index] for pair in pairs]) for index in (0, 1))
        settings = self._settings
        with self._timed("flow"):
            images = flow_images(
                onsets, apexes, method=settings.flow_method, size=settings.flow_size, strain=settings.strain,
                device=torch.device(settings.device), head_motion=settings.head_motion,
                landmarks=[pair.sample.landmarks for pair in pairs],
            )  # fmt: skip
        for place, pair, image in zip(places, pairs, images, strict=True):
            made[place] = PreparedSample(
                sample=pair.sample, flow_image=image, frames=pair.frames, sources=pair.sources, notes=pair.notes
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start


def check_landmarks(table: LandmarkTable, entries: Sequence[Clip | FlowPicture]) -> None:
    """Refuse landmarks of another kind than the entries need: of frames for frames, of the picture for pictures."""
    for entry in entries:
        if isinstance(entry, FlowPicture) and table.flow_size is None:
            raise InputError(
                f"{table.path}: landmarks in pixels of a frame, but {entry.place} comes without frames: columns such "
                "as left_eye_x_upstream28, in pixels of the flow picture, are needed"
            )
        if isinstance(entry, Clip) and table.flow_size is not None:
            raise InputError(f"{table.path}: landmarks must be in pixels of the onset frame, these are of a flow image")


def subject_table(tables: Mapping[SampleId, LandmarkTable]) -> LandmarkTable:
    """What a subject's task needs of the tables of its clips, which may come from two sources."""
    return replace(
        next(iter(tables.values())),
        points={sample: table.points[sample] for sample, table in tables.items() if sample in table.points},
        not_found={sample: table.missing(sample) for sample, table in tables.items() if sample not in table.points},
        parts={sample: table.origin(sample) for sample, table in tables.items()},
    )


def _digest(picture: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done  # encoding to memory has no input that could be wrong
    return bytes(data.tobytes())
