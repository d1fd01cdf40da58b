"""The flow path as a DALI graph: bytes -> flow image -> regions -> mosaic -> normalised tensor.

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
    ``resize`` is off where every flow image already has the mosaic's side.
    """

    mosaic_size: int
    minmax: bool
    resize: bool
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def decode(flow_bytes: Any, device: str) -> Any:
    """``flow.npy`` bytes -> (F, F, 3) float32 on the device; a stored array needs no picture decoder."""
    image = fn.decoders.numpy(flow_bytes)
    if device == "gpu":
        image = image.gpu()  # half-precision over the bus, widened on the device
    return fn.cast(image, dtype=types.FLOAT)


def scale_minmax(image: Any) -> Any:
    """Each channel of (F, F, 3) to 0..255, as the paper's data; :func:`htnet.data.regions.scale_minmax`."""
    low = fn.reductions.min(image, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(image, axes=[0, 1], keep_dims=True) - low
    return (image - low) * (np.float32(255.0) / dali_math.max(span, _TINY))


def assemble_mosaic(image: Any, starts: Any, side: Any) -> Any:
    """(F, F, 3) and four (row, column) starts, (4, 2) int32 -> mosaic (2 * side, 2 * side, 3).

    ``side`` is (2,) int32, a region's extent.
    """
    parts = [fn.slice(image, start=starts[k], shape=side, axes=[0, 1]) for k in range(4)]
    eyes, lips = fn.cat(parts[0], parts[1], axis=1), fn.cat(parts[2], parts[3], axis=1)
    return fn.cat(eyes, lips, axis=0)


def normalise(mosaic: Any, mean: NDArray[np.float32], std: NDArray[np.float32]) -> Any:
    """(S, S, 3) -> (3, S, S) float32, (x - mean) / std per channel."""
    scaled = (mosaic - types.Constant(mean)) * types.Constant(np.float32(1.0) / std)
    return fn.transpose(scaled, perm=[2, 0, 1])


def flow_to_input(flow_bytes: Any, starts: Any, side: Any, *, transform: FlowTransform, device: str) -> Any:
    """The whole path of one sample; (3, S, S) float32 on the device."""
    image = decode(flow_bytes, device)
    if transform.minmax:
        image = scale_minmax(image)
    mosaic = assemble_mosaic(image, starts, side)
    if transform.resize:
        mosaic = fn.resize(mosaic, size=[transform.mosaic_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
    return normalise(mosaic, np.asarray(transform.mean, np.float32), np.asarray(transform.std, np.float32))
