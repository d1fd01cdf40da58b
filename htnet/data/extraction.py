"""From an annotated clip to a prepared sample: frames, face crop, apex, flow image.

One face crop is cut from onset and apex alike, placed by the onset's landmarks, so that the crop itself makes no
motion. A clip that cannot be used becomes a :class:`LeftOut` and never stops the others.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from htnet.config import PrepareConfig
from htnet.data.datasets.base import APEX_AT_ONSET, APEX_EQUALS_ONSET
from htnet.data.entries import Clip, Entry, FlowPicture, LeftOut
from htnet.data.faces.crop import CROP_RATIO, FaceCrop, face_crop
from htnet.data.faces.detector import Detector
from htnet.data.faces.detectors import build_detector
from htnet.data.faces.finder import SEVERAL_FACES, FaceFinder, Located, NoFaceError
from htnet.data.flow.apex import APEX_FOUND, find_apex, spotting_recipe
from htnet.data.flow.image import flow_images
from htnet.data.flow.methods import flow_parameters
from htnet.data.frames import FolderFrames, Frames, resized, to_gray
from htnet.data.samples import UNLABELLED, Landmarks, Sample
from htnet.data.store.frames import frame_member, neighbours
from htnet.data.store.writer import PreparedSample
from htnet.errors import InputError
from htnet.rules import check_gpu

UNREADABLE = "unreadable_frames"
"""Onset or apex are missing, damaged or of different sizes; a failure."""
NO_LANDMARKS = "no_landmarks"
"""There are no landmarks of the clip, or they do not fit its frames; a failure."""
NO_MOTION = "no_motion"
"""No frame differs from the onset, the flow is zero everywhere, or a flow picture has one colour; a failure."""
_Read = tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]
EXTRACTION_VERSION = 3
"""Of the way from frames to a flow image; raised whenever a store that is made anew would have other bytes."""
_GROUP = 64
"""Pairs whose flow is computed together; bounds the memory of a subject with many clips."""


def recipe_of(prepare: PrepareConfig) -> dict[str, object]:
    """Name what decides the content of a sample, for ``store.json``."""
    # head_motion and keep_neighbours only where they do something: older stores stay up to date
    head_motion = {"head_motion": prepare.head_motion} if prepare.head_motion != "none" else {}
    detector = load_detector(prepare)
    return {
        "flow": {
            **flow_parameters(prepare.flow_method),
            "size": prepare.flow_size,
            "working_size": prepare.working_size,
            "strain": prepare.strain,
            **head_motion,
        },
        "face_crop": f"square of {CROP_RATIO} times the larger of eye distance and eye-mouth distance",
        "apex_where_not_annotated": spotting_recipe(),
        "detector": None if detector is None else detector[1].describe(),
        "landmark_failures": prepare.landmark_failures,
        "keep_frames": prepare.keep_frames,
        **({"keep_neighbours": prepare.keep_neighbours} if prepare.keep_neighbours else {}),
    }


def load_detector(prepare: PrepareConfig) -> tuple[str, Detector] | None:
    """Return the detector with its name, None where none is asked for.

    Raises:
        InputError: its package or model file is missing.
    """
    if prepare.detector == "none":
        return None
    model = None if prepare.detector_model is None else Path(prepare.detector_model)
    return prepare.detector, build_detector(prepare.detector, model)


def check_machine(prepare: PrepareConfig, device: str) -> None:
    """Refuse, with an :class:`InputError`, a machine without the GPU or the detector that is asked for."""
    if device == "cuda":
        instead = "prepare.device=cpu and prepare.gpus_per_task=0"
        check_gpu("prepare.device=cuda", visible=torch.cuda.is_available(), instead=instead)
    load_detector(prepare)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A subject's samples and left-out clips, in their order. ``seconds`` by stage.

    ``methods``: how the landmarks of each sample were found, by clip. ``mean_shape``: for clips that have the mean of
    the others', why they have none of their own. ``by_rule``: samples that their frames, not yet the annotation, say to
    be read otherwise than it stands, by rule.
    """

    samples: tuple[PreparedSample, ...]
    left_out: tuple[LeftOut, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    mean_shape: dict[str, str] = field(default_factory=dict)
    by_rule: dict[str, list[str]] = field(default_factory=dict)


class NoMotionError(InputError):
    """A clip whose flow image would show nothing."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Onset and apex of a clip, cut and at working size, and the sample without its flow image."""

    clip: Clip
    sample: Sample
    crops: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    frames: tuple[tuple[str, bytes], ...]
    sources: dict[str, str]
    notes: tuple[str, ...]


def extract(
    entries: Sequence[Entry], prepare: PrepareConfig, *, device: str = "cpu", strict: bool = False
) -> Extraction:
    """Make the samples of one subject's clips.

    Args:
        device: where flow is computed, ``cpu`` or ``cuda``.
        strict: the first clip that cannot be used is an error.

    Raises:
        InputError: ``strict`` and a clip cannot be used; a flow picture cannot be used; landmarks are missing
            under the policy ``error``; a GPU is asked for where there is none.
    """
    return _Extractor(prepare, device=device, strict=strict).run(entries)


class _Extractor:
    """Maker of samples and pairs of a subject's entries, each with the reason for which it has a mean shape."""

    def __init__(self, prepare: PrepareConfig, *, device: str, strict: bool) -> None:
        check_machine(prepare, device)
        self._settings, self._device, self._strict = prepare, torch.device(device), strict
        self._seconds: dict[str, float] = defaultdict(float)
        self._faces = FaceFinder(load_detector(prepare), prepare.landmark_failures)
        self._siblings: Sequence[Entry] = ()
        self._mean_shape: dict[str, str] = {}
        self._by_rule: dict[str, list[str]] = defaultdict(list)

    def run(self, entries: Sequence[Entry]) -> Extraction:
        self._siblings = entries
        made: list[PreparedSample | LeftOut | _Pair] = []
        waiting = 0
        for entry in entries:
            made.append(self._try(entry))
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
            by_rule=dict(self._by_rule),
        )

    def _try(self, entry: Entry) -> PreparedSample | LeftOut | _Pair:
        try:
            made, failure = entry.make(self)
        except InputError as error:
            no_face = isinstance(error, NoFaceError)
            # a published composite is whole, or something is wrong with the copy
            damaged = not entry.has_frames and not isinstance(error, NoMotionError)
            if damaged or (no_face and self._settings.landmark_failures == "error"):
                raise
            return self._left_out(entry, error)
        if failure is not None:
            self._mean_shape[str(entry.id)] = failure
        return made

    def _left_out(self, entry: Entry, error: InputError) -> LeftOut:
        if self._strict:
            raise error
        rules = ((NoFaceError, NO_LANDMARKS), (NoMotionError, NO_MOTION), (InputError, UNREADABLE))
        rule = next(rule for kind, rule in rules if isinstance(error, kind))
        return LeftOut(clip=str(entry.id), rule=rule, reason=str(error), place=entry.place, failed=True)

    def _find_face(self, entry: Entry, picture: NDArray[Any]) -> Located:
        if self._settings.detector == "none":
            return self._faces.find(entry, picture, self._siblings)
        with self._timed("faces"):
            return self._faces.find(entry, picture, self._siblings)

    def from_picture(self, entry: FlowPicture) -> tuple[PreparedSample | _Pair, str | None]:
        """Make the sample, and say why it has the mean of the others' landmarks where it has."""
        with self._timed("read"):
            image = entry.open()
        if not np.ptp(image[..., :2], axis=(0, 1)).any():
            raise NoMotionError(f"{entry.picture}: flow_u and flow_v are the same everywhere, so nothing moves in it")
        face = self._find_face(entry, image)
        sample = Sample(**_facts(entry), landmarks=face.points, flow_size=entry.flow_size)
        return PreparedSample(sample=sample, flow_image=image, sources={"landmarks": face.method}), face.failure

    def from_frames(self, entry: Clip) -> tuple[PreparedSample | _Pair, str | None]:
        """Make the pair whose flow is to be computed; as :meth:`from_picture`."""
        clip, settings = entry, self._settings
        with self._timed("read"):
            frames = clip.open_frames()
            onset = clip.onset_in(frames)
            offset = frames.numbers[-1] if clip.offset is None else clip.offset
            first = frames.read(onset)
        face = self._find_face(clip, first)
        crop = face_crop(face.points, first.shape)
        rest = self._small(crop, first)
        apex, notes, (second, kept) = self._apex(clip, frames, (onset, offset), first, (crop, face.points))
        peak = self._small(crop, second)
        if np.array_equal(rest, peak):
            raise NoMotionError(f"{clip.frames}: no face up to frame {offset} differs from that of onset {onset}")
        kept = {frame_member("onset"): crop.cut(first), **kept} if settings.keep_frames else {}
        sample = Sample(
            **_facts(clip), landmarks=crop.to_flow(face.points, settings.flow_size), flow_size=settings.flow_size,
            onset=onset, apex=apex, offset=offset, fps=clip.fps,
        )  # fmt: skip
        facts = {"onset_sha256": _digest(first), "apex_sha256": _digest(second), "landmarks": face.method}
        if isinstance(frames, FolderFrames):
            notes = (*notes, *frames.notes)
        else:
            facts |= frames.seconds(onset=onset, apex=apex)
        if face.faces > 1:
            notes = (*notes, SEVERAL_FACES)
        encoded = tuple((member, _jpeg(picture)) for member, picture in kept.items())
        pair = _Pair(clip=clip, sample=sample, crops=(rest, peak), frames=encoded, sources=facts, notes=notes)
        return pair, face.failure

    def _apex(
        self, clip: Clip, frames: Frames, ends: tuple[int, int], first: NDArray[np.uint8],
        place: tuple[FaceCrop, Landmarks],
    ) -> tuple[int, tuple[str, ...], _Read]:  # fmt: skip
        """Return the apex, annotated or else found, with the clip's notes and what was read of it."""
        (onset, offset), (crop, points) = ends, place
        notes = clip.notes
        if clip.apex == onset:  # an adapter sees it only where the onset is annotated
            notes = (*notes, APEX_AT_ONSET)
        elif clip.apex is not None:
            read = self._read_rest(clip, frames, clip.apex, (onset, first), crop)
            if not np.array_equal(self._small(crop, first), self._small(crop, read[0])):
                return clip.apex, notes, read
            notes = (*notes, APEX_EQUALS_ONSET)
        with self._timed("apex"):
            apex = find_apex(frames, onset, offset, crop, points)
        return apex, (*notes, APEX_FOUND), self._read_rest(clip, frames, apex, (onset, first), crop)

    def _small(self, crop: FaceCrop, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the face at the size at which flow is computed."""
        return resized(to_gray(crop.cut(picture)), self._settings.working_size)

    def _read_rest(
        self, clip: Clip, frames: Frames, apex: int, onset: tuple[int, NDArray[np.uint8]], crop: FaceCrop
    ) -> _Read:
        """Read the apex, and crop it and the neighbours of onset and apex, by member name. One pass over a video."""
        first, alike = onset
        members = {frame_member("apex"): apex}
        reach = self._settings.keep_neighbours
        if reach and apex in frames.numbers:  # else to read it says what is wrong
            members |= dict(neighbours(frames.numbers, first, apex, reach))
        numbers = sorted(set(members.values()))
        crops: dict[int, NDArray[np.uint8]] = {}
        second = alike
        pictures = frames.read_each(numbers)
        for number in numbers:
            with self._timed("read"):
                picture = next(pictures)
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
        pairs = {index: item for index, item in enumerate(made) if isinstance(item, _Pair)}
        if not pairs:
            return
        onsets, apexes = (np.stack([pair.crops[index] for pair in pairs.values()]) for index in (0, 1))
        settings = self._settings
        with self._timed("flow"):
            images = flow_images(
                onsets, apexes, method=settings.flow_method, size=settings.flow_size, strain=settings.strain,
                device=self._device, head_motion=settings.head_motion,
                landmarks=[pair.sample.landmarks for pair in pairs.values()],
            )  # fmt: skip
        for (place, pair), image in zip(pairs.items(), images, strict=True):
            made[place] = self._finished(pair, image)

    def _finished(self, pair: _Pair, image: NDArray[np.float16]) -> PreparedSample | LeftOut:
        clip, sample = pair.clip, pair.sample
        if not image.any():
            why = f"{clip.frames}: the flow from onset {sample.onset} to apex {sample.apex} is zero everywhere"
            return self._left_out(clip, NoMotionError(why))
        for rule in pair.notes:
            if rule != APEX_FOUND and rule not in clip.notes:
                self._by_rule[rule].append(str(clip.id))
        return PreparedSample(
            sample=sample, flow_image=image, frames=pair.frames, sources=pair.sources, notes=pair.notes
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start


def _facts(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "label": UNLABELLED if entry.label is None else entry.label, "emotion": entry.emotion}


def _digest(picture: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done  # encoding to memory has no input that could be wrong
    return bytes(data.tobytes())
