"""Random changes of training samples that leave a flow image a flow image.

What a sample draws is a function of (seed, step, place in the batch): no generator keeps a state, so threads,
prefetching, ranks and resumption cannot change it. The draws are numpy, made where the samples are chosen; the
functions from graph node to graph node below apply them, each to one sample.

A flow image holds vectors. Moving its pixels is half of the work: when the picture is turned or mirrored, so are the
vectors (u, v); the strain is a magnitude and stays. All changes of values are one 3x3 matrix per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types

from htnet.config import AugmentConfig
from htnet.data.regions import CropRule, region_starts
from htnet.data.types import Sample

_DRAWS = {"flip": 1, "rotate": 1, "shift": 8, "scale": 1, "magnify": 1, "drop": 4}
"""Random numbers of a sample by name; new ones go to the end, so that old seeds keep their meaning."""
_SALT = 0x617567  # the sampler's generators have the same seed


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of a batch, uniform in [0, 1), by name: (B, how many) float64."""

    flip: NDArray[np.float64]
    rotate: NDArray[np.float64]
    shift: NDArray[np.float64]
    scale: NDArray[np.float64]
    magnify: NDArray[np.float64]
    drop: NDArray[np.float64]


def draw(seed: int, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Draws:
    """The random numbers of this rank's part of a batch of ``size`` samples."""
    numbers = np.random.default_rng([seed, step, _SALT]).random((size, sum(_DRAWS.values())))[rank::ranks]
    ends = np.cumsum(list(_DRAWS.values()))
    return Draws(**dict(zip(_DRAWS, np.split(numbers, ends[:-1], axis=1), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happens to one sample: arguments of the graph's nodes."""

    angle: np.float32
    """Degrees, counter-clockwise as seen."""
    mirrored: np.int32
    matrix: NDArray[np.float32]
    """(3, 3), from (u, v, strain) to the changed ones."""
    starts: NDArray[np.int32]
    """(4, 2) first row and column of the regions, in the turned and mirrored picture."""
    side: NDArray[np.int32]
    """(2,) height and width of a region."""
    kept: NDArray[np.float32]
    """(4,) 1 or 0 by region."""


def plan_change(config: AugmentConfig, draws: Draws, index: int, *, sample: Sample, rule: CropRule) -> Change:
    """What the draws of sample ``index`` of a batch mean for it."""
    angle = config.rotate.degrees * float(_around_zero(draws.rotate[index, 0]))
    mirrored = bool(draws.flip[index, 0] < config.flip.probability)
    low, high = np.log(config.magnify.low), np.log(config.magnify.high)
    factor = float(np.exp(low + (high - low) * draws.magnify[index, 0]))
    flow_size = sample.flow_size
    half = flow_size // 4
    if config.jitter.scale:
        grown = half * (1 + config.jitter.scale * float(_around_zero(draws.scale[index, 0])))
        half = int(np.clip(round(grown), 1, flow_size // 2))
    points = turned_points(np.asarray(sample.landmarks, np.float64), angle, flow_size)
    points[[0, 1, 3, 4]] += config.jitter.shift * flow_size * _around_zero(draws.shift[index]).reshape(4, 2)
    starts = region_starts(points, flow_size, rule, half)
    if mirrored:
        starts = mirrored_starts(starts, 2 * half, flow_size)
    return Change(
        angle=np.float32(angle),
        mirrored=np.int32(mirrored),
        matrix=vector_matrix(angle, mirrored, factor),
        starts=starts,
        side=np.full(2, 2 * half, np.int32),
        kept=kept_regions(draws.drop[index], config.drop_region.probability),
    )


def _around_zero(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2.0 * numbers - 1.0


def turned_points(points: NDArray[np.float64], degrees: float, flow_size: int) -> NDArray[np.float64]:
    """(x, y) points, (P, 2), of a square picture after a counter-clockwise turn about its centre; a copy."""
    centre = (flow_size - 1) / 2
    return (points - centre) @ _rotation(degrees).T + centre


def mirrored_starts(starts: NDArray[np.int32], side: int, flow_size: int) -> NDArray[np.int32]:
    """Region starts in the mirrored picture, (4, 2): what was cut on the right is now on the left."""
    swapped = starts[[1, 0, 3, 2]].copy()
    swapped[:, 1] = flow_size - side - swapped[:, 1]
    return swapped


def vector_matrix(degrees: float, mirrored: bool, factor: float) -> NDArray[np.float32]:
    """(3, 3) float32 that turns, mirrors and magnifies (u, v, strain)."""
    matrix = np.eye(3)
    matrix[:2, :2] = _rotation(degrees)
    if mirrored:
        matrix[0] = -matrix[0]
    return (factor * matrix).astype(np.float32)


def _rotation(degrees: float) -> NDArray[np.float64]:
    """Counter-clockwise as seen; y points down."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cosine, sine], [-sine, cosine]])


def kept_regions(numbers: NDArray[np.float64], probability: float) -> NDArray[np.float32]:
    """(4,) 1 for regions that stay; where all would go, the one with the largest number stays."""
    kept = numbers >= probability
    kept[np.argmax(numbers)] = True
    return kept.astype(np.float32)


def turn(image: Any, angle: Any) -> Any:
    """(F, F, 3) turned by ``angle`` degrees about its centre; what comes in at the border repeats the edge."""
    return fn.rotate(image, angle=angle, keep_size=True, interp_type=types.INTERP_LINEAR)


def mirror(image: Any, mirrored: Any) -> Any:
    """(F, F, 3) with its columns in reverse where ``mirrored`` is 1."""
    return fn.flip(image, horizontal=mirrored)


def map_vectors(image: Any, matrix: Any) -> Any:
    """(F, F, 3) with ``matrix`` applied to each pixel's (u, v, strain)."""
    return fn.coord_transform(image, M=matrix)


def needed(config: AugmentConfig) -> tuple[str, ...]:
    """The fields of :class:`Change` that a graph of this configuration uses."""
    turns, mirrors = config.rotate.degrees > 0, config.flip.probability > 0
    matrix = turns or mirrors or (config.magnify.low, config.magnify.high) != (1.0, 1.0)
    wanted = {"angle": turns, "mirrored": mirrors, "matrix": matrix, "kept": config.drop_region.probability > 0}
    return ("starts", "side", *(name for name, wants in wanted.items() if wants))


def change_image(image: Any, angle: Any, mirrored: Any, matrix: Any) -> Any:
    """All changes of a flow image whose arguments are there; what is not asked for costs nothing."""
    if angle is not None:
        image = turn(image, angle)
    if mirrored is not None:
        image = mirror(image, mirrored)
    return image if matrix is None else map_vectors(image, matrix)
