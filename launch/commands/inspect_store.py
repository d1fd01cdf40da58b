"""Command ``htnet inspect``: pictures of a store's content, and of the training input made from it.

A row per sample: onset and apex if the store keeps them, flow as a colour wheel (hue is the direction, colour the
speed, white is no motion), strain, the four regions, and the mosaic before and after a seeded augmentation by the very
stream that folds train from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from rich.console import Console

from dali_pipelines import EpochSampler, FlowStream, Resident, load_set
from htnet.config import AugmentConfig, DataConfig, FlipConfig, JitterConfig, MagnifyConfig, RotateConfig
from htnet.data.frames import is_whole
from htnet.data.regions import region_starts
from htnet.data.store.reader import Store, open_store
from htnet.errors import EXIT_DONE, InputError
from htnet.files import whole_folder
from launch.report.pictures import REGION_COLOURS, draw_wheel, flow_colours

__all__ = ["inspect_store", "pick_rows"]

ROWS_PER_SHEET: Final = 8
MODERATE: Final = AugmentConfig(
    flip=FlipConfig(probability=0.5),
    rotate=RotateConfig(degrees=10.0),
    jitter=JitterConfig(shift=0.03, scale=0.1),
    magnify=MagnifyConfig(low=0.7, high=1.5),
)
"""Augmentation of the last column, for samples whose u and v are pixels."""
STRETCHED: Final = AugmentConfig(flip=MODERATE.flip, jitter=MODERATE.jitter)
"""Augmentation for published pictures, whose channels were stretched one by one: no angle, no factor."""
_FRAMES: Final = ("onset", "apex")

Picture = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _View:
    """Pictures drawn of a sample; flow image (F, F, 3), mosaics (S, S, 3), channels (flow_u, flow_v, strain)."""

    row: int
    stretched: bool
    flow_image: Picture
    mosaic: Picture
    augmented: Picture
    frames: Mapping[str, NDArray[np.uint8]]


def inspect_store(path: Path, out: Path, console: Console, *, samples: int, seed: int) -> int:
    """Write ``samples_<k>.png`` sheets of up to 8 rows into ``out``; return the exit code.

    Raises:
        InputError: a bad store, ``samples`` below 1, a negative seed, an ``out`` that is a file or holds files.
    """
    if samples < 1:
        raise InputError(f"--samples must be at least 1, got {samples}")
    if seed < 0:
        raise InputError(f"--seed must not be negative, got {seed}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out}: is there already; remove it or choose another --out")
    store = open_store(path)
    rows = pick_rows([sample.label for sample in store.samples], samples, seed)
    if len(rows) < samples:
        console.print(f"the store holds {len(rows)} samples: all are drawn", highlight=False)
    views = list(_views(store, rows, seed))
    names = []
    with whole_folder(out) as folder:  # the next run would refuse a part of the sheets as "there already"
        for start in range(0, len(views), ROWS_PER_SHEET):
            names.append(f"samples_{start // ROWS_PER_SHEET + 1:02d}.png")
            figure = _sheet(store, views[start : start + ROWS_PER_SHEET])
            FigureCanvasAgg(figure)
            figure.savefig(folder / names[-1], dpi=110, facecolor="white")
    for name in names:
        console.print(f"written: {out / name}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def pick_rows(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Pick up to ``count`` rows, spread evenly over the labels as far as samples allow; sorted by label, then row."""
    rng = np.random.default_rng(seed)
    waiting = {label: list(rng.permutation(np.flatnonzero(np.equal(labels, label)))) for label in sorted(set(labels))}
    picked: list[int] = []
    while len(picked) < min(count, len(labels)):
        for rows in waiting.values():
            if rows and len(picked) < count:
                picked.append(int(rows.pop()))
    return sorted(picked, key=lambda row: (labels[row], row))


# --- what is drawn


def _views(store: Store, rows: Sequence[int], seed: int) -> Iterator[_View]:
    flow_images = [store.read_flow(row).astype(np.float32) for row in rows]  # a damaged one is named here
    mosaic_size = max(4, max(image.shape[0] for image in flow_images) // 4 * 4)
    stretched = [store.is_published_picture(row) for row in rows]
    augment = STRETCHED if any(stretched) else MODERATE
    data = DataConfig(scaling="stored")
    resident = Resident(store, rows, data=data, mosaic_size=mosaic_size, device=torch.device("cpu"), threads=1)
    plain = load_set(resident, rows, resident.plain)
    sampler = EpochSampler(rows=tuple(rows), batch_size=len(rows), seed=seed, shuffle=False)
    changed = FlowStream(resident, sampler, augment=augment, transform=resident.plain).next()
    before, after = (batch.images.permute(0, 2, 3, 1).numpy() for batch in (plain, changed))
    for row, published, *pictures in zip(rows, stretched, flow_images, before, after, strict=True):
        frames = {name: _frame(store, row, f"{name}.jpg") for name in _FRAMES if _stored(store, row, name)}
        flow_image, mosaic, augmented = pictures
        yield _View(
            row=row, stretched=published, flow_image=flow_image, mosaic=mosaic, augmented=augmented, frames=frames
        )


def _stored(store: Store, row: int, name: str) -> bool:
    return f"{name}.jpg" in store.rows[row].members


def _frame(store: Store, row: int, member: str) -> NDArray[np.uint8]:
    """Read a frame as (H, W) uint8 grey."""
    data = store.read_member(row, member)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if is_whole(data) else None
    if picture is None:
        raise InputError(f"{store.path}: {member} of {store.rows[row].sample.id} is no JPEG, PNG or BMP, or truncated")
    return np.asarray(picture, np.uint8)


# --- how


def _sheet(store: Store, views: Sequence[_View]) -> Figure:
    """Draw a row of panels per sample, titles above the first, a colour wheel in the corner."""
    frames = _FRAMES if any(view.frames for view in views) else ()
    titles = (*frames, "flow", "strain", "regions", "mosaic", "augmented")
    height = 1.75 * len(views) + 1.1
    figure = Figure(figsize=(1.75 * len(titles) + 1.9, height))
    panels = figure.subplots(len(views), len(titles), squeeze=False)
    width = figure.get_figwidth()
    figure.subplots_adjust(left=1.7 / width, right=1 - 0.1 / width, bottom=0.2 / height, top=1 - 0.9 / height)
    for line, view in zip(panels, views, strict=True):
        for panel in line:
            panel.set(xticks=[], yticks=[])
        _frame_panels(line[: len(frames)], view, frames)
        _flow_panels(line[len(frames) :], store, view)
        line[0].set_ylabel(_said(store, view), rotation=0, ha="right", va="center", fontsize=7, labelpad=6)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    kinds = {True: "stretched channel by channel, shown around the median", False: "in pixels"}
    kind = " or ".join(kinds[kind] for kind in sorted({view.stretched for view in views}))
    figure.text(1.7 / width, 1 - 0.12 / height, f"u and v {kind}", fontsize=8, va="top")
    _wheel(figure, width, height)
    return figure


def _frame_panels(panels: Sequence[Axes], view: _View, names: Sequence[str]) -> None:
    for panel, name in zip(panels, names, strict=True):
        if name in view.frames:
            panel.imshow(view.frames[name], cmap="gray", vmin=0, vmax=255)
        else:
            panel.text(0.5, 0.5, "not stored", ha="center", va="center", fontsize=7, transform=panel.transAxes)


def _flow_panels(panels: Sequence[Axes], store: Store, view: _View) -> None:
    """Draw flow, strain, regions, mosaic, augmented; one scale of speed per sample, so that a magnification shows."""
    largest = _largest(view)

    def coloured(picture: Picture) -> Picture:
        return flow_colours(_around_still(view, picture), largest)

    flow, strain, regions, mosaic, augmented = panels
    flow.imshow(coloured(view.flow_image), interpolation="nearest")
    strain.imshow(view.flow_image[..., 2], cmap="magma", interpolation="nearest")
    regions.imshow(coloured(view.flow_image), interpolation="nearest")
    sample = store.rows[view.row].sample
    side = sample.flow_size // 4 * 2
    for start, colour in zip(
        region_starts(sample.landmarks, sample.flow_size, "anatomical"), REGION_COLOURS, strict=True
    ):
        corner = (start[1] - 0.5, start[0] - 0.5)
        regions.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.3, clip_on=False))
    regions.plot(*np.transpose(sample.landmarks), "k+", markersize=4)
    for panel, picture in ((mosaic, view.mosaic), (augmented, view.augmented)):
        panel.imshow(coloured(picture), interpolation="nearest")
        _quarters(panel, picture.shape[0] // 2)


def _quarters(panel: Axes, half: int) -> None:
    """Frame the mosaic's parts in their regions' colours."""
    panel.spines[:].set_visible(False)
    for place, colour in enumerate(REGION_COLOURS):
        corner = (place % 2 * half - 0.5, place // 2 * half - 0.5)
        panel.add_patch(Rectangle(corner, half, half, fill=False, edgecolor=colour, linewidth=1.3, clip_on=False))


def _around_still(view: _View, picture: Picture) -> Picture:
    """Return flow (H, W, 2) relative to no motion; in stretched pictures the median stands for no motion."""
    flow = picture[..., :2]
    return flow - np.median(flow, axis=(0, 1)).astype(np.float32) if view.stretched else flow


def _largest(view: _View) -> float:
    speed = np.linalg.norm(_around_still(view, view.flow_image), axis=-1)
    return float(np.percentile(speed, 99))


def _said(store: Store, view: _View) -> str:
    sample = store.rows[view.row].sample
    lines = [store.classes[sample.label], sample.subject, sample.id.clip]
    speed, strain = _largest(view), float(view.flow_image[..., 2].max())
    return "\n".join([*lines, f"speed to {speed:.3g}", f"strain to {strain:.3g}"])


def _wheel(figure: Figure, width: float, height: float) -> None:
    """Draw the colours of directions, 0.75 inches wide."""
    corner = figure.add_axes((0.2 / width, 1 - 0.85 / height, 0.75 / width, 0.75 / height))
    corner.imshow(np.asarray(draw_wheel(101)))
    corner.set_axis_off()
