"""Stored pictures: the choice for a step, and their way to grey pictures of the size at which flow is computed.

DALI decodes and resizes them, on a GPU with its hardware decoder. The pictures are face crops encoded by htnet prepare,
so they carry no camera orientation; a foreign picture's orientation is applied, as OpenCV does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from dali_pipelines.sampler import EpochSampler
from htnet.data.frames import is_whole
from htnet.data.store.frames import PARTS, nearest_member
from htnet.data.store.reader import Store
from htnet.errors import InputError

Picture = tuple[int, str]
"""A row of the manifest and the name of a member."""
PictureReader = Callable[[Picture], Any]
"""Function that returns a picture, encoded as (n,) uint8 or grey as (S, S, 1) uint8."""

_BATCH = 64
_SALT = 0x74696D65  # the sampler's generators have the same seed


class PairChoice:
    """Choice of the onset and the apex picture of each sample of a step: a function of the seed and the step.

    ``jitter`` allows frames up to that distance from onset and apex, as far as they are stored.
    """

    def __init__(self, store: Store, sampler: EpochSampler, *, jitter: int) -> None:
        self._sampler, self._jitter = sampler, jitter
        self._members = {row: store.rows[row].members for row in set(sampler.rows)}

    def pictures(self, step: int) -> tuple[list[Picture], list[Picture]]:
        """Return the onsets and the apexes of the step's samples."""
        rows = self._sampler.batch(step).tolist()
        offsets = draw_offsets(self._sampler, step, self._jitter).tolist()
        members = [self._members[row] for row in rows]
        onsets, apexes = (
            [(row, nearest_member(members[i], part, offsets[i][k])) for i, row in enumerate(rows)]
            for k, part in enumerate(PARTS)
        )
        return onsets, apexes

    def every_picture(self) -> list[Picture]:
        """Return all pictures that any step may take."""
        reach = range(-self._jitter, self._jitter + 1)
        return [
            (row, member)
            for row, members in sorted(self._members.items())
            for member in sorted({nearest_member(members, part, offset) for part in PARTS for offset in reach})
        ]


class PairSource:
    """DALI's callback for the onsets and the apexes of a step; it holds no position."""

    def __init__(self, choice: PairChoice, read: PictureReader, first_step: int) -> None:
        self._choice, self._read, self._first = choice, read, first_step

    def __call__(self, info: Any) -> tuple[list[Any], list[Any]]:
        onsets, apexes = self._choice.pictures(self._first + info.iteration)
        return [self._read(picture) for picture in onsets], [self._read(picture) for picture in apexes]


def draw_offsets(sampler: EpochSampler, step: int, reach: int) -> NDArray[np.int64]:
    """Draw offsets in frames for onset and apex of this rank's samples of a step: (B, 2), uniform in -reach..reach."""
    generator = np.random.default_rng([sampler.seed, step, _SALT])
    drawn = generator.integers(-reach, reach, (sampler.size_of(step), 2), endpoint=True)
    return drawn[sampler.rank :: sampler.ranks]


def encoded_picture(store: Store, picture: Picture) -> NDArray[np.uint8]:
    """Read the bytes of a picture.

    Raises:
        InputError: the picture is missing, damaged or cut off; names its sample.
    """
    row, member = picture
    data = store.read_member(row, member)
    if not is_whole(data):
        sample = store.rows[row].sample
        raise InputError(f"{store.path}: {member} of {sample.id} is no JPEG, PNG or BMP, or truncated")
    return np.frombuffer(data, np.uint8)


def to_grey(encoded: Any, *, size: int, on_gpu: bool) -> Any:
    """Decode pictures of any kind and size to (size, size, 1) uint8 grey."""
    # a GPU with a hardware decoder would share a batch between it and CUDA, whose pixels differ: a picture would come
    # out by its place in the batch
    where: dict[str, Any] = {"device": "mixed", "hw_decoder_load": 0.0} if on_gpu else {"device": "cpu"}
    picture = fn.decoders.image(encoded, output_type=types.GRAY, **where)
    return fn.resize(picture, size=[size, size], interp_type=types.INTERP_LINEAR)


def new_pipeline(*, batch_size: int, threads: int, device: torch.device, ahead: int) -> Pipeline:
    """Return an empty pipeline on the device; its seed is without effect, because nothing in it draws by itself."""
    on_gpu = device.type == "cuda"
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=0,
        prefetch_queue_depth=ahead,
    )


def decode_frames(
    store: Store, pictures: Sequence[Picture], *, size: int, device: torch.device, threads: int
) -> Iterator[tuple[Picture, torch.Tensor]]:
    """Yield the pictures in their order, each (size, size, 1) uint8 grey on the device."""
    batches = [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]

    def read(info: Any) -> list[NDArray[np.uint8]]:
        # DALI asks for pictures beyond the last one
        return [encoded_picture(store, picture) for picture in batches[info.iteration % len(batches)]]

    pipeline = new_pipeline(batch_size=len(batches[0]), threads=threads, device=device, ahead=1)
    with pipeline:
        encoded = fn.external_source(source=read, batch=True, batch_info=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(to_grey(encoded, size=size, on_gpu=device.type == "cuda"))
    pipeline.build()
    for batch in batches:
        (grey,) = run(pipeline, device, lambda: pictures, store)
        yield from zip(batch, grey.clone(), strict=True)


def run(
    pipeline: Pipeline, device: torch.device, asked: Callable[[], Iterable[Picture]], store: Store
) -> list[torch.Tensor]:
    """Return the pipeline's next outputs, in DALI's memory.

    Raises:
        InputError: a picture cannot be decoded; names its sample, which is searched among the pictures ``asked``.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        outputs = pipeline.run(stream)
    except RuntimeError as error:
        for row, member in asked():
            picture = cv2.imdecode(encoded_picture(store, (row, member)), cv2.IMREAD_COLOR)
            if picture is None:
                raise InputError(f"{store.path}: {member} of {store.rows[row].sample.id} cannot be decoded") from error
        raise
    return [from_dlpack(output.as_tensor()) for output in outputs]
