"""The HTNet authors' composite: 28-pixel flow pictures, here of the true flow, a label list and landmarks.

``datasets/STSNet_whole_norm_u_v_os/sub01_EP02_01f .png`` (with the blank), channels strain, v, u in OpenCV's order,
each scaled to 0..255 between its least and its largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.datasets.htnet_release import COLUMNS, LABELS, LANDMARKS, PICTURES, HTNetRelease
from htnet.data.faces.landmarks import UPSTREAM_COLUMNS, UPSTREAM_SIZE, face_crop
from htnet.data.samples import Emotion, Landmarks
from htnet.data.synth.layouts import trap
from htnet.data.synth.layouts.base import ClipFiles, Form, Layout, Trap
from htnet.data.synth.layouts.casme2 import Casme2Layout
from htnet.data.synth.layouts.files import encode, write_table
from htnet.data.synth.layouts.samm import SammLayout
from htnet.data.synth.layouts.smic import SmicLayout

_PARTS: tuple[Layout, ...] = (Casme2Layout(), SammLayout(), SmicLayout())


class HTNetReleaseLayout(Layout):
    """Subjects take turns in belonging to CASME II, SAMM and SMIC."""

    name = HTNetRelease.adapter
    traps: ClassVar[tuple[Trap, ...]] = (Trap(kind=trap.ODD_NAMES),)
    # a composite with a damaged picture is refused as a whole
    damaged: ClassVar[tuple[str, ...]] = ()

    def dataset_name(self, subject: int) -> str:
        """Return casme2, samm or smic."""
        return HTNetRelease.datasets[subject % len(_PARTS)]

    def subject_name(self, index: int) -> str:
        """Return a name as the subject's dataset has it."""
        return _PARTS[index % len(_PARTS)].subject_name(index // len(_PARTS))

    def words(self, label: int) -> tuple[str, ...]:
        """Return the name of the class."""
        return (Emotion(label).name.lower(),)

    def clip_name(self, subject: int, index: int, label: int, number: int, onset: int) -> str:
        """Return a name as the subject's dataset has it."""
        return _PARTS[subject % len(_PARTS)].clip_name(subject // len(_PARTS), index, label, number, onset)

    def write(self, root: Path, clips: Sequence[ClipFiles], form: Form) -> None:
        """Write the composite."""
        pictures = root / PICTURES
        pictures.mkdir(parents=True)
        rows: list[list[object]] = [[*COLUMNS, "apex", "imagename", "sub_filename"]]
        points: list[list[object]] = [["dataset", "subject", "clip", "flow_file", *UPSTREAM_COLUMNS]]
        for clip in clips:
            stem = f"{clip.subject}_{clip.clip}"
            name = f"{stem}.png" if clip.trap == trap.ODD_NAMES else f"{stem} .png"
            picture, landmarks = _flow_picture(clip)
            (pictures / name).write_bytes(encode(picture, ".png"))
            rows.append([clip.dataset, clip.subject, clip.clip, clip.label, "", f"{stem}.jpg", ""])
            places = [round(value) for point in landmarks for value in point]
            points.append([clip.dataset, clip.subject, clip.clip, name, *places])
        write_table(root / LABELS, rows)
        write_table(root / LANDMARKS, points)


def _flow_picture(clip: ClipFiles) -> tuple[NDArray[np.uint8], Landmarks]:
    """Return a (28, 28, 3) uint8 picture in OpenCV's order, and the landmarks in its pixels."""
    import torch  # here, so that writing the other layouts loads none

    from htnet.data.flow.strain import optical_strain

    flow = clip.flow()
    crop = face_crop(clip.landmarks, flow.shape)
    # vectors stay in pixels of the crop: the scaling to 0..255 takes any unit away
    small = cv2.resize(crop.cut(flow), (UPSTREAM_SIZE, UPSTREAM_SIZE), interpolation=cv2.INTER_AREA)
    channels = torch.from_numpy(small).permute(2, 0, 1)[None]
    image = np.dstack([optical_strain(channels)[0].numpy(), small[..., 1], small[..., 0]])
    low, high = image.min((0, 1)), image.max((0, 1))
    picture = np.rint(255 * (image - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)
    return picture, crop.to_flow(clip.landmarks, UPSTREAM_SIZE)
