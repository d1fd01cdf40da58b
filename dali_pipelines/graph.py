"""The graph of a sample: bytes -> flow image -> regions -> mosaic -> normalised tensor.

Plain functions from graph node to graph node; one graph serves CPU and GPU. The parameters are
constants of the graph (a Python ``if`` here is evaluated once, when the pipeline is built).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math

# smaller than any span of a float16 flow image that is not constant; keeps 0 / 0 out of a constant one
_TINY = np.float32(1e-20)


@dataclass(frozen=True, kw_only=True)
class FlowTransform:
    """What happens to a flow image on its way to the network.

    ``mean`` and ``std`` are per channel (flow_u, flow_v, strain), of the mosaic before normalisation.
    """

    mosaic_size: int
    minmax: bool
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def decode(flow_bytes: Any) -> Any:
    """``flow.npy`` bytes -> (F, F, 3) float16; a stored array needs no picture decoder."""
    return fn.reshape(fn.decoders.numpy(flow_bytes), layout="HWC")


def to_device(image: Any, device: str) -> Any:
    """float16 -> float32 on the device; half-precision goes over the bus."""
    return fn.cast(image.gpu() if device == "gpu" else image, dtype=types.FLOAT)


def scale_minmax(image: Any) -> Any:
    """Each channel of (F, F, 3) to 0..255, as the paper's data; :func:`htnet.data.regions.scale_minmax`."""
    low = fn.reductions.min(image, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(image, axes=[0, 1], keep_dims=True) - low
    return (image - low) * (np.float32(255.0) / dali_math.max(span, _TINY))


def cut_region(image: Any, start: Any, side: Any) -> Any:
    """(F, F, 3) -> (side, side, 3) at ``start`` (row, column); both (2,) int32."""
    return fn.slice(image, start=start, shape=side, axes=[0, 1])


def join_regions(regions: list[Any]) -> Any:
    """Left eye, right eye, left lip, right lip, (S/2, S/2, 3) each -> mosaic (S, S, 3)."""
    eyes, lips = fn.cat(regions[0], regions[1], axis=1), fn.cat(regions[2], regions[3], axis=1)
    return fn.cat(eyes, lips, axis=0)


def normalise(mosaic: Any, mean: NDArray[np.float32], std: NDArray[np.float32]) -> Any:
    """(S, S, 3) -> (3, S, S) float32, (x - mean) / std per channel."""
    scaled = (mosaic - types.Constant(mean)) * types.Constant(np.float32(1.0) / std)
    return fn.transpose(scaled, perm=[2, 0, 1])


def image_to_input(image: Any, starts: Any, side: Any, *, transform: FlowTransform, resize: bool) -> Any:
    """A flow image (F, F, 3) float32 to the network's input, (3, S, S) float32, on the image's device.

    ``starts`` (4, 2) and ``side`` (2,) say where the regions are. ``resize`` is off where every region has the side of
    half a mosaic already. Regions are resized one by one, so that they do not blend into each other.
    """
    mean, std = np.asarray(transform.mean, np.float32), np.asarray(transform.std, np.float32)
    if transform.minmax:
        image = scale_minmax(image)
    regions = [cut_region(image, starts[k], side) for k in range(4)]
    if resize:
        size = [transform.mosaic_size // 2] * 2
        regions = [fn.resize(part, size=size, interp_type=types.INTERP_LINEAR, antialias=True) for part in regions]
    return normalise(join_regions(regions), mean, std)
