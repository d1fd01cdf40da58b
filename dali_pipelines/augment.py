"""Random changes of training samples that keep a flow image a flow image: the draws and their meaning.

A sample's draws are a function of (seed, step, place in the batch). No generator keeps a state, so threads,
prefetching, ranks and resumption cannot change them. All of this is numpy, for a whole batch at once, where the samples
are chosen; :mod:`dali_pipelines.resample` applies the changes on the device.

A flow image holds vectors, and moving its pixels is only half of the work. When the picture is turned or mirrored, so
are the vectors (u, v); the strain is a magnitude and stays. All changes of values are one 3x3 matrix per sample, and
all changes of place are one affine map per region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htnet.config import AugmentConfig
from htnet.config.data import CropRule
from htnet.data.regions import region_starts
from htnet.data.samples import Sample

_DRAWS = {"flip": 1, "rotate": 1, "shift": 8, "scale": 1, "magnify": 1, "drop": 4}
"""Numbers drawn for a sample, by name; add new names at the end, so that old seeds keep their meaning."""
_SALT = 0x617567  # the sampler's generators have the same seed


Draws = Mapping[str, NDArray[np.float64]]
"""Random numbers of a batch, uniform in [0, 1), by name: (B, n) each, n as in ``_DRAWS``."""


def draw(seed: int, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Draws:
    """Draw the random numbers of this rank's part of a batch of ``size`` samples."""
    numbers = np.random.default_rng([seed, step, _SALT]).random((size, sum(_DRAWS.values())))[rank::ranks]
    ends = np.cumsum(list(_DRAWS.values()))
    return dict(zip(_DRAWS, np.split(numbers, ends[:-1], axis=1), strict=True))


@dataclass(frozen=True, kw_only=True)
class AugmentationPlan:
    """Changes to the B samples of a batch."""

    angle: NDArray[np.float64]
    """(B,) degrees, counter-clockwise as seen."""
    mirrored: NDArray[np.int32]
    """(B,) 1 or 0."""
    matrix: NDArray[np.float32]
    """(B, 3, 3), maps (u, v, strain) to their new values."""
    starts: NDArray[np.int32]
    """(B, 4, 2) first row and column of each region in the turned and mirrored picture."""
    side: NDArray[np.int32]
    """(B, 2) height and width of a region."""
    kept: NDArray[np.float32]
    """(B, 4) 1 or 0 by region."""
    flow_sizes: NDArray[np.int64]
    """(B,) sides of the flow images."""

    def windows(self, points: int) -> NDArray[np.float32]:
        """Map the pixels of a region of ``points`` x ``points`` to their places in the unchanged picture.

        Mirroring back and turning back are one affine map, (B, 4, 2, 3) by region, from (column, row, 1) of the region
        to (x, y) in pixels of the flow image. Without a change it maps to whole pixels.
        """
        step, last = self.side[:, 0] / points, self.flow_sizes - 1.0
        first = self.starts[..., ::-1] + ((step - 1) / 2)[:, None, None]
        mirrored = self.mirrored == 1
        first[..., 0] = np.where(mirrored[:, None], last[:, None] - first[..., 0], first[..., 0])
        scale = np.stack([np.where(mirrored, -step, step), step], axis=-1)
        centre, back = (last / 2)[:, None, None], _rotations(-self.angle)
        offset = (first - centre) @ back.swapaxes(1, 2) + centre
        linear = np.broadcast_to((back * scale[:, None])[:, None], (len(step), 4, 2, 2))
        return np.concatenate([linear, offset[..., None]], axis=-1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FaceGeometry:
    """Geometry of the samples' faces: ``points`` (B, 5, 2) float64 landmarks, ``sizes`` (B,) int64 of flow images."""

    points: NDArray[np.float64]
    sizes: NDArray[np.int64]

    @staticmethod
    def of(samples: Sequence[Sample]) -> FaceGeometry:
        """Collect landmarks and sizes of the samples, in their order."""
        points = np.asarray([sample.landmarks for sample in samples], np.float64)
        return FaceGeometry(points=points, sizes=np.asarray([sample.flow_size for sample in samples], np.int64))

    def chosen(self, indices: NDArray[np.int64]) -> FaceGeometry:
        """Select the places of some samples."""
        return FaceGeometry(points=self.points[indices], sizes=self.sizes[indices])


def plan_changes(config: AugmentConfig, draws: Draws, *, places: FaceGeometry, rule: CropRule) -> AugmentationPlan:
    """Turn the draws of a batch into changes of its samples, all at once: a loop in Python would be slow."""
    sizes, halves = places.sizes, places.sizes // 4
    angle = config.rotate.degrees * _around_zero(draws["rotate"][:, 0])
    mirrored = draws["flip"][:, 0] < config.flip.probability
    low, high = np.log(config.magnify.low), np.log(config.magnify.high)
    factor = np.exp(low + (high - low) * draws["magnify"][:, 0])
    if config.jitter.scale:
        grown = halves * (1 + config.jitter.scale * _around_zero(draws["scale"][:, 0]))
        halves = np.clip(np.rint(grown).astype(np.int64), 1, sizes // 2)
    points = turned_points(places.points, angle, sizes)
    shift = _around_zero(draws["shift"]).reshape(-1, 4, 2)
    points[:, [0, 1, 3, 4]] += config.jitter.shift * sizes[:, None, None] * shift
    starts = region_starts(points, sizes, rule, halves)
    starts = np.where(mirrored[:, None, None], mirrored_starts(starts, 2 * halves, sizes), starts)
    return AugmentationPlan(
        angle=angle,
        mirrored=mirrored.astype(np.int32),
        matrix=vector_matrices(angle, mirrored, factor),
        starts=starts,
        side=np.repeat(2 * halves, 2).reshape(-1, 2).astype(np.int32),
        kept=kept_regions(draws["drop"], config.drop_region.probability),
        flow_sizes=sizes,
    )


def _around_zero(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2.0 * numbers - 1.0


def turned_points(
    points: NDArray[np.float64], degrees: NDArray[np.float64], flow_sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Turn points (x, y), (B, P, 2), of square pictures counter-clockwise about their centres; return a copy."""
    centres = (flow_sizes[:, None, None] - 1) / 2
    return (points - centres) @ _rotations(degrees).swapaxes(1, 2) + centres


def mirrored_starts(
    starts: NDArray[np.int32], sides: NDArray[np.int64], flow_sizes: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Return the region starts of mirrored pictures, (B, 4, 2): a region cut on the right is now on the left."""
    swapped = starts[:, [1, 0, 3, 2]]
    swapped[..., 1] = (flow_sizes - sides)[:, None] - swapped[..., 1]
    return swapped


def vector_matrices(
    degrees: NDArray[np.float64], mirrored: NDArray[np.bool_], factor: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the matrices that turn, mirror and magnify (u, v, strain), (B, 3, 3) float32."""
    matrices = np.broadcast_to(np.eye(3), (len(degrees), 3, 3)).copy()
    matrices[:, :2, :2] = _rotations(degrees)
    matrices[mirrored, 0] *= -1
    return (factor[:, None, None] * matrices).astype(np.float32)


def _rotations(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rotation matrices, (B, 2, 2), counter-clockwise as seen; y points down."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.stack([cosine, sine, -sine, cosine], axis=-1).reshape(-1, 2, 2)


def kept_regions(numbers: NDArray[np.float64], probability: float) -> NDArray[np.float32]:
    """Return 1 for each region that stays, (B, 4); if all would go, the one with the largest number stays."""
    kept = numbers >= probability
    kept[np.arange(len(numbers)), numbers.argmax(axis=1)] = True
    return kept.astype(np.float32)
