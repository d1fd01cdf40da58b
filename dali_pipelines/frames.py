"""Flow images from the stored onset and apex: ``data.input: frames``.

DALI decodes and resizes (on a GPU with its hardware decoder), the project's flow runs on the same device in batches,
and what comes out takes the place of the stored flow images; regions and augmentation are the same graph. Nothing
random happens before the flow, so it is computed once per fold and kept.

DALI's ``optical_flow`` operator is another feature: it uses the video engine of some NVIDIA GPUs, whose vectors are
made for motion compensation on a grid of 4 pixels, not for motion below a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from dali_pipelines.source import Reader
from htnet.data.flow import flow_tensor
from htnet.data.frames import is_whole
from htnet.data.store import Store
from htnet.errors import InputError

MEMBERS = ("onset.jpg", "apex.jpg")
_BATCH = 32


def flow_from_frames(store: Store, rows: Sequence[int], *, device: torch.device, threads: int) -> Reader:
    """Compute the flow images of the rows, with the store's own flow settings.

    Returns:
        By row, (F, F, 3) float16, channels (flow_u, flow_v, strain), as the store would hold it.

    Raises:
        InputError: the store holds no frames or does not say how its flow was made; a damaged picture, by its sample.
    """
    settings = store.recipe.get("flow")
    if not isinstance(settings, dict) or "working_size" not in settings:
        raise InputError(f"{store.path}: data.input=frames needs a store whose flow htnet prepare made")
    images: dict[int, NDArray[np.float16]] = {}
    wanted = sorted(set(rows))
    size = int(settings["working_size"])
    for batch, onsets, apexes in decode_pairs(store, wanted, size=size, device=device, threads=threads):
        flow = flow_tensor(
            onsets, apexes, method=settings["method"], size=int(settings["size"]), strain=settings["strain"]
        )
        images.update(zip(batch, flow.half().cpu().numpy(), strict=True))
    return images.__getitem__


def decode_pairs(
    store: Store, rows: Sequence[int], *, size: int, device: torch.device, threads: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Rows with their onsets and apexes, (B, size, size) uint8 grey on the device, a batch at a time."""
    batches = [list(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
    on_gpu = device.type == "cuda"

    def read(info: Any) -> tuple[list[NDArray[np.uint8]], ...]:
        batch = batches[info.iteration % len(batches)]  # DALI asks ahead, beyond the last one
        return tuple([_picture(store, row, member) for row in batch] for member in MEMBERS)

    pipeline = Pipeline(
        batch_size=min(_BATCH, len(rows)),
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=0,
        prefetch_queue_depth=1,
    )
    with pipeline:
        encoded = fn.external_source(source=read, num_outputs=2, batch=True, batch_info=True, dtype=types.UINT8, ndim=1)
        decoded = (
            fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY) for data in encoded
        )
        pipeline.set_outputs(
            *(fn.resize(picture, size=[size, size], interp_type=types.INTERP_LINEAR) for picture in decoded)
        )
    pipeline.build()
    for batch in batches:
        onsets, apexes = (from_dlpack(output.as_tensor()).squeeze(-1).clone() for output in pipeline.run())
        yield batch, onsets, apexes


def _picture(store: Store, row: int, member: str) -> NDArray[np.uint8]:
    sample = store.rows[row].sample
    if member not in store.rows[row].members:
        raise InputError(
            f"{store.path}: sample {sample.id} has no {member}: data.input=frames needs prepare.keep_frames=true"
        )
    data = store.read_member(row, member)
    if not is_whole(data):
        raise InputError(f"{store.path}: {member} of {sample.id} is no JPEG, PNG or BMP, or truncated")
    return np.frombuffer(data, np.uint8)
