"""Changes of light and camera, applied to the pictures of a pair before their flow is computed.

A pair is blurred, bent (gamma), brightened and stretched alike, so that the change makes no motion. Noise is a sensor's
and differs from frame to frame. The order is that of a camera: the lens blurs, the exposure moves the grey values, the
sensor adds its noise, and values outside black and white are cut off.

A sample's draws, to the last pixel of noise, are a function of (seed, step, place in the batch). DALI's own generators
go on from step to step, so a stream could not be resumed in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math

from dali_pipelines.sampler import EpochSampler
from htnet.config import PhotometricConfig

STRENGTHS = ("gamma", "contrast", "brightness", "blur", "noise")
"""Changes drawn for a pair; each has a generator of its own, which the others do not disturb."""
FIELDS = ("onset_noise", "apex_noise")
"""Noise of each frame, of standard deviation 1."""
_SALT, _FIELD_SALT = 0x6C69676874, 0x6E6F697365
_WHITE, _MIDDLE = np.float32(255.0), 127.5
_LEAST_SIGMA = 1e-3
"""Width at which a Gaussian is exactly one pixel; DALI does not take width 0."""


def draw_strengths(config: PhotometricConfig, sampler: EpochSampler, step: int) -> dict[str, NDArray[np.float32]]:
    """Draw the pairs' changes at a step, (B,) float32 each, by the names of STRENGTHS; off means no effect.

    ``gamma`` is an exponent, ``contrast`` a factor, ``brightness`` a shift in grey values. ``blur`` and ``noise`` are
    standard deviations in pixels and grey values.
    """
    size = sampler.size_of(step)
    drawn = {
        name: np.random.default_rng([sampler.seed, step, _SALT, index]).random(size)[sampler.rank :: sampler.ranks]
        for index, name in enumerate(STRENGTHS)
    }
    either_way = {name: 2.0 * drawn[name] - 1.0 for name in ("gamma", "contrast", "brightness")}
    strengths = {
        "gamma": config.gamma ** either_way["gamma"],
        "contrast": 1.0 + config.contrast * either_way["contrast"],
        "brightness": 255.0 * config.brightness * either_way["brightness"],
        "blur": config.blur * drawn["blur"],
        "noise": config.noise * drawn["noise"],
    }
    return {name: values.astype(np.float32) for name, values in strengths.items()}


def noise_field(seed: int, step: int, place: int, frame: int, side: int) -> NDArray[np.float32]:
    """Draw a noise field, (side, side, 1) standard normal numbers.

    ``place`` is the pair's place in the batch, ``frame`` 0 for the onset and 1 for the apex.
    """
    generator = np.random.default_rng([seed, step, _FIELD_SALT, place, frame])
    return generator.standard_normal((side, side, 1), np.float32)


def needed(config: PhotometricConfig) -> tuple[str, ...]:
    """Name the arguments that a graph of this configuration has, from STRENGTHS and FIELDS."""
    plain = PhotometricConfig()
    names = tuple(name for name in STRENGTHS if getattr(config, name) != getattr(plain, name))
    return (*names, *FIELDS) if "noise" in names else names


class PhotometricSource:
    """DALI's callback for the arguments ``names`` of a step's pairs; it holds no position."""

    def __init__(
        self, config: PhotometricConfig, sampler: EpochSampler, *, side: int, first_step: int, names: Sequence[str]
    ) -> None:
        self._config, self._sampler, self._side, self._first = config, sampler, side, first_step
        self._names = names

    def __call__(self, info: Any) -> tuple[list[Any], ...]:
        step, sampler = self._first + info.iteration, self._sampler
        columns: dict[str, list[Any]] = {
            name: list(values) for name, values in draw_strengths(self._config, sampler, step).items()
        }
        if FIELDS[0] in self._names:
            places = range(sampler.rank, sampler.size_of(step), sampler.ranks)
            for frame, name in enumerate(FIELDS):
                columns[name] = [noise_field(sampler.seed, step, place, frame, self._side) for place in places]
        return tuple(columns[name] for name in self._names)


def photometric_nodes(source: PhotometricSource, names: Sequence[str]) -> dict[str, Any]:
    """Return the source's nodes in a graph, by name."""
    nodes = fn.external_source(
        source=source,
        num_outputs=len(names),
        batch=True,
        batch_info=True,
        dtype=types.FLOAT,
        ndim=[3 if name in FIELDS else 0 for name in names],
    )
    return dict(zip(names, nodes, strict=True))


def change_light(picture: Any, nodes: dict[str, Any], *, noise: str, device: str) -> Any:
    """Turn (S, S, 1) uint8 into float32 grey 0..255 with every change in ``nodes``; ``noise`` is one of FIELDS."""
    picture = fn.cast(picture, dtype=types.FLOAT)
    if "blur" in nodes:
        picture = blur(picture, nodes["blur"])
    if "gamma" in nodes:
        picture = bend(picture, nodes["gamma"])
    if "contrast" in nodes or "brightness" in nodes:
        picture = stretch(picture, nodes.get("contrast", 1.0), nodes.get("brightness", 0.0))
    if "noise" in nodes:
        field = nodes[noise].gpu() if device == "gpu" else nodes[noise]
        picture = add_noise(picture, field, nodes["noise"])
    return dali_math.clamp(picture, np.float32(0.0), _WHITE)


def blur(picture: Any, sigma: Any) -> Any:
    """Smooth a picture by a Gaussian; the border is mirrored without its last pixel."""
    return fn.gaussian_blur(picture, sigma=dali_math.max(sigma, np.float32(_LEAST_SIGMA)))


def bend(picture: Any, exponent: Any) -> Any:
    """Raise grey values, as shares of white, to a power."""
    return dali_math.pow(picture / _WHITE, exponent) * _WHITE


def stretch(picture: Any, contrast: Any, shift: Any) -> Any:
    """Multiply distances to mid grey, then shift all grey values."""
    return fn.brightness_contrast(picture, contrast=contrast, contrast_center=_MIDDLE, brightness_shift=shift)


def add_noise(picture: Any, field: Any, deviation: Any) -> Any:
    """Add a field of standard deviation 1, times ``deviation``."""
    return picture + field * deviation
