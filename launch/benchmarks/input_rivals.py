"""Rivals of the training stream: the same batches by a DataLoader with numpy and OpenCV, and their data.

The rival is what one writes without DALI, whole batches at a time. It keeps in memory what our stream keeps, takes the
same random numbers and makes the same changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dali_pipelines import EpochSampler, FlowTransform
from dali_pipelines.augment import AugmentationPlan, FaceGeometry, draw, plan_changes
from dali_pipelines.photometric import draw_strengths
from htnet.config import DataConfig
from htnet.data.flow.image import flow_image_tensor, flow_tensor
from htnet.data.regions import region_starts, scale_minmax
from htnet.data.samples import Sample, SampleId
from htnet.data.store.reader import Store
from htnet.data.store.writer import PreparedSample, write_store
from htnet.data.synth.pairs import synth_pairs

__all__ = [
    "PlainBatches",
    "PlainFrames",
    "PlainFramesOurFlow",
    "PlainPictures",
    "Rival",
    "loader",
    "make_frame_store",
    "make_store",
]


def make_store(path: Path, *, samples: int, size: int) -> Store:
    """Make a store of smooth random flow images, (size, size, 3), of as many people as the composite has, or fewer."""
    rng = np.random.default_rng(0)

    def items() -> Iterator[PreparedSample]:
        for number in range(samples):
            noise = rng.normal(size=(size, size, 3)).astype(np.float32)
            image = (10 * cv2.GaussianBlur(noise, (0, 0), size / 14)).astype(np.float16)
            points = (rng.uniform(0.2, 0.8, size=(5, 2)) * size).astype(np.float32).tolist()
            yield PreparedSample(sample=_sample(number, size, points), flow_image=image)

    return write_store(path, items(), {"sources": "random"})


def make_frame_store(path: Path, *, samples: int, size: int, side: int, working_size: int) -> Store:
    """Make a store of drawn faces: onset and apex as JPEGs of ``side`` pixels, for flow images of ``size``."""
    face = [[x * size, y * size] for x, y in ((0.3, 0.3), (0.7, 0.3), (0.5, 0.5), (0.35, 0.7), (0.65, 0.7))]
    blank = np.zeros((size, size, 3), np.float16)
    onsets, apexes, _ = synth_pairs(samples, side)

    def items() -> Iterator[PreparedSample]:
        for number, pair in enumerate(zip(onsets, apexes, strict=True)):
            coded = (bytes(cv2.imencode(".jpg", part, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()) for part in pair)
            frames = tuple(zip(("onset.jpg", "apex.jpg"), coded, strict=True))
            yield PreparedSample(sample=_sample(number, size, face), flow_image=blank, frames=frames)

    flow = {"method": "none", "size": size, "working_size": working_size, "strain": "central"}
    return write_store(path, items(), {"sources": "synthetic", "flow": flow})


def _sample(number: int, size: int, points: list[list[float]]) -> Sample:
    identity = SampleId(dataset="random", subject=f"sub{number % 68:02d}", clip=f"clip{number:04d}")
    return Sample(id=identity, label=number % 3, landmarks=tuple((x, y) for x, y in points), flow_size=size)


class Rival(Dataset[tuple[Tensor, Tensor]]):
    """Batches by step, images float32 and labels (B,) int64, a whole one at a time."""

    def __init__(self, store: Store, sampler: EpochSampler, *, data: DataConfig, transform: FlowTransform) -> None:
        self._store, self._sampler, self._data, self._transform = store, sampler, data, transform
        self._labels = torch.tensor([sample.label for sample in store.samples])

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self._sampler.batch(step)
        return self.images(step, rows.tolist()), self._labels[torch.from_numpy(rows.copy())]

    def images(self, step: int, rows: list[int]) -> Tensor:
        """Return the images of a step, which has these rows."""
        raise NotImplementedError


class PlainBatches(Rival):
    """Mosaics (B, 3, S, S) by numpy and OpenCV; keeps what :class:`FlowStream` does: them, flow images, or nothing."""

    def __init__(self, store: Store, sampler: EpochSampler, *, data: DataConfig, transform: FlowTransform) -> None:
        super().__init__(store, sampler, data=data, transform=transform)
        self._mean = np.asarray(transform.mean, np.float32)
        self._scale = np.float32(1.0) / np.asarray(transform.std, np.float32)
        self._places = FaceGeometry.of(store.samples)
        self.decoded: dict[int, NDArray[np.float16]] = {}
        """Flow images by row."""
        self._finished: Tensor | None = None
        rows = range(len(store.rows))
        if data.cache_mb and data.augment.changes_pixels:
            self.decoded = {row: store.read_flow(row) for row in rows}
        elif data.cache_mb:
            self._finished = torch.from_numpy(np.stack([self._mosaic(row, None) for row in rows]))

    def images(self, step: int, rows: list[int]) -> Tensor:
        if self._finished is not None:
            return self._finished[rows]
        changes = None
        if self._data.augment.changes_pixels:
            draws, places = draw(self._sampler.seed, step, len(rows)), self._places.chosen(np.asarray(rows))
            changes = plan_changes(self._data.augment, draws, places=places, rule=self._data.crop)
        return torch.from_numpy(np.stack([self._mosaic(row, changes, index) for index, row in enumerate(rows)]))

    def _mosaic(self, row: int, changes: AugmentationPlan | None, index: int = 0) -> NDArray[np.float32]:
        """Return a mosaic, (3, S, S) float32; ``index`` is the place of the sample in the changes."""
        image = (self.decoded[row] if self.decoded else self._store.read_flow(row)).astype(np.float32)
        if changes is None:
            sample = self._store.samples[row]
            starts = region_starts(sample.landmarks, sample.flow_size, self._data.crop)
        else:
            image, starts = changed_image(image, changes, index), changes.starts[index]
        if self._transform.minmax:
            image = scale_minmax(image)
        side = image.shape[0] // 4 * 2
        parts = [image[top : top + side, left : left + side] for top, left in starts.tolist()]
        whole = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
        return np.ascontiguousarray(((whole - self._mean) * self._scale).transpose(2, 0, 1))


class PlainPictures(Rival):
    """Onsets and apexes, (B, 2, S, S) grey after their changes of light."""

    def __init__(self, store: Store, sampler: EpochSampler, *, data: DataConfig, transform: FlowTransform) -> None:
        super().__init__(store, sampler, data=data, transform=transform)
        self._side = int(store.recipe["flow"]["working_size"])
        self._decoded: dict[tuple[int, str], NDArray[np.uint8]] = {}
        if data.cache_mb:
            pictures = itertools.product(range(len(store.rows)), ("onset", "apex"))
            self._decoded = {picture: self._decode(*picture) for picture in pictures}

    def images(self, step: int, rows: list[int]) -> Tensor:
        drawn = draw_strengths(self._data.augment.photometric, self._sampler, step)
        lights = list(zip(rows, drawn["contrast"], drawn["brightness"], strict=True))
        pairs = [[self._picture(row, part, *light) for part in ("onset", "apex")] for row, *light in lights]
        return torch.from_numpy(np.asarray(pairs))

    def _picture(self, row: int, part: str, contrast: np.float32, brightness: np.float32) -> NDArray[np.float32]:
        grey = self._decoded[row, part] if self._decoded else self._decode(row, part)
        middle = np.float32(127.5)
        bright = (grey.astype(np.float32) - middle) * contrast + middle + brightness
        return np.asarray(np.clip(bright, 0.0, 255.0), np.float32)

    def _decode(self, row: int, part: str) -> NDArray[np.uint8]:
        data = np.frombuffer(self._store.read_member(row, f"{part}.jpg"), np.uint8)
        grey = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        assert grey is not None  # written by make_frame_store
        if grey.shape[0] != self._side:
            grey = cv2.resize(grey, (self._side, self._side), interpolation=cv2.INTER_LINEAR)
        return np.asarray(grey, np.uint8)


class PlainFrames(Rival):
    """Mosaics from pictures that OpenCV decodes, with flow by OpenCV's TV-L1, a pair at a time."""

    def __init__(self, store: Store, sampler: EpochSampler, *, data: DataConfig, transform: FlowTransform) -> None:
        super().__init__(store, sampler, data=data, transform=transform)
        self._pictures = PlainPictures(store, sampler, data=data, transform=transform)
        self._batches = PlainBatches(store, sampler, data=data, transform=transform)
        self._size = store.samples[0].flow_size

    def images(self, step: int, rows: list[int]) -> Tensor:
        flow_images = self._flow_images(*self._pictures.images(step, rows).unbind(1)).half().numpy()
        self._batches.decoded = dict(zip(rows, flow_images, strict=True))
        return self._batches.images(step, rows)

    def _flow_images(self, onsets: Tensor, apexes: Tensor) -> Tensor:
        """Return flow images (B, F, F, 3) of grey pictures (B, S, S)."""
        solver = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined] # not in OpenCV's type stubs
        pairs = zip(*(part.round().byte().numpy() for part in (onsets, apexes)), strict=True)
        fields = np.stack([solver.calc(first, second, None) for first, second in pairs])
        return flow_image_tensor(torch.from_numpy(fields).permute(0, 3, 1, 2), size=self._size, strain="central")


class PlainFramesOurFlow(PlainFrames):
    """The same with the project's TV-L1."""

    def _flow_images(self, onsets: Tensor, apexes: Tensor) -> Tensor:
        return flow_tensor(onsets, apexes, method="tvl1", size=self._size, strain="central")


def changed_image(image: NDArray[np.float32], changes: AugmentationPlan, index: int) -> NDArray[np.float32]:
    """Turn, mirror and magnify an (F, F, 3) flow image by OpenCV and numpy."""
    centre = (image.shape[0] - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), float(changes.angle[index]), 1.0)
    out = cv2.warpAffine(image, turn, image.shape[:2], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if changes.mirrored[index]:
        out = cv2.flip(out, 1)
    return np.asarray(out @ changes.matrix[index].T, np.float32)


def loader(batches: Rival, workers: int) -> DataLoader[Any]:
    """Return the batches of one step after the other, by so many worker processes or (0) in this one."""
    # a fork would copy DALI's threads half
    several: dict[str, Any] = {"multiprocessing_context": "spawn", "worker_init_fn": _begin_worker} if workers else {}
    steps: Iterable[int] = itertools.count()
    return DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers, **several)


def _begin_worker(_: int) -> None:
    cv2.setNumThreads(0)  # a worker is a thread's worth of work, and OpenCV's threads abort it at its end
