"""Graph of a sample: bytes -> flow image -> regions -> mosaic.

Plain functions from graph node to graph node; one graph serves CPU and GPU. Parameters are constants of the graph (a
Python ``if`` here is evaluated once, when the pipeline is built).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math

# smaller than any span of a float16 flow image that is not constant; avoids 0 / 0 in a constant one
_TINY = np.float32(1e-20)


def decode(flow_bytes: Any) -> Any:
    """Decode ``flow.npy`` bytes to (F, F, 3) float16; a stored array needs no picture decoder."""
    return fn.reshape(fn.decoders.numpy(flow_bytes), layout="HWC")


def to_device(image: Any, device: str) -> Any:
    """Send float16 to the device and widen it to float32 there, so that half-precision crosses the bus."""
    return fn.cast(image.gpu() if device == "gpu" else image, dtype=types.FLOAT)


def scale_minmax(image: Any) -> Any:
    """Scale each channel of (F, F, 3) to 0..255, as in the paper's data and :func:`htnet.data.regions.scale_minmax`."""
    low = fn.reductions.min(image, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(image, axes=[0, 1], keep_dims=True) - low
    return (image - low) * (np.float32(255.0) / dali_math.max(span, _TINY))


def cut_region(image: Any, start: Any, side: Any) -> Any:
    """Cut (side, side, 3) out of (F, F, 3) at ``start`` (row, column); ``start`` and ``side`` are (2,) int32."""
    return fn.slice(image, start=start, shape=side, axes=[0, 1])


def join_regions(regions: list[Any]) -> Any:
    """Join left eye, right eye, left lip and right lip, (S/2, S/2, 3) each, to a mosaic (S, S, 3)."""
    eyes, lips = fn.cat(regions[0], regions[1], axis=1), fn.cat(regions[2], regions[3], axis=1)
    return fn.cat(eyes, lips, axis=0)


def image_to_mosaic(image: Any, starts: Any, side: Any, *, minmax: bool, size: int | None) -> Any:
    """Make a mosaic (S, S, 3) float32 of a flow image (F, F, 3) float32, on the image's device.

    ``starts`` (4, 2) and ``side`` (2,) locate the regions. ``size`` is S, or None if every region already has half the
    side of a mosaic. Regions are resized one by one, so that they do not blend into each other.
    """
    if minmax:
        image = scale_minmax(image)
    regions = [cut_region(image, starts[k], side) for k in range(4)]
    if size is not None:
        half = [size // 2] * 2
        regions = [fn.resize(part, size=half, interp_type=types.INTERP_LINEAR, antialias=True) for part in regions]
    return join_regions(regions)
