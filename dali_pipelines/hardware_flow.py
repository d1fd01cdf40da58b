"""Flow by the engine of an NVIDIA GPU, DALI's ``optical_flow``: another feature than the paper's TV-L1.

The engine is made for video: its vectors serve motion compensation, in steps of 1/32 pixel, one for each pixel from the
Ampere generation on, one for 4 x 4 pixels before. It minimises no total variation, and what a motion below a pixel
becomes is the driver's affair. It costs next to nothing, which is what it is for: a first look at a large dataset.
"""

from __future__ import annotations

from typing import Any

import torch
from nvidia.dali import fn, types

from htnet.errors import InputError

_AMPERE = (8, 0)
_NEEDED = "data.frames_flow=hardware needs an NVIDIA GPU with a flow engine (Turing or later)"


def check_engine(device: torch.device) -> None:
    """:class:`InputError` where the device cannot have a flow engine."""
    if device.type != "cuda":
        raise InputError(f"{_NEEDED}, got device {device.type}; set data.frames_flow=tvl1")


def no_engine(error: RuntimeError) -> InputError | None:
    """What to tell where DALI found no engine, or a driver without its library; None for other errors."""
    text = " ".join(str(error).split())
    signs = ("Optical Flow context", "OF library", "grid size", "Feature unsupported")
    return InputError(f"{_NEEDED}: {text}") if any(sign in text for sign in signs) else None


def finest_grid(device: torch.device) -> int:
    """Pixels between two vectors: 1 where the engine can, else 4."""
    return 1 if torch.cuda.get_device_capability(device) >= _AMPERE else 4


def engine_vectors(onset: Any, apex: Any, *, grid: int) -> Any:
    """(S, S, 1) grey each on the GPU -> (1, S / grid, S / grid, 2) float32, x and y, in pixels of the pictures."""
    pair = pair_of(fn.cast(onset, dtype=types.UINT8), fn.cast(apex, dtype=types.UINT8))
    return fn.optical_flow(pair, output_grid=grid, image_type=types.GRAY, preset=0.0)


def pair_of(onset: Any, apex: Any) -> Any:
    """A sequence of two frames, (2, S, S, 1).

    The apex is the first: DALI gives the second frame to the engine as the input, whose pixels are looked for in the
    first, and a flow of ours says where a pixel of the onset is found in the apex.
    """
    return fn.stack(apex, onset, axis_name="F")


def flow_of_vectors(vectors: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 1, G, G, 2) in pixels of pictures of ``side`` -> (B, 2, G, G) flow_u and flow_v in pixels of the grid."""
    return vectors.squeeze(1).permute(0, 3, 1, 2) * (vectors.shape[2] / side)
