"""Finding an apex: the frame of most motion in the regions, not of most sway; the same answer for the same frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from htnet.data.faces.landmarks import face_crop
from htnet.data.flow.apex import find_apex
from htnet.data.synth.clips import plan_clips, render_frame
from htnet.errors import InputError


@dataclass
class Pictures:
    """Frames in memory, by number."""

    frames: dict[int, np.ndarray]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self.frames)

    def read(self, number: int) -> np.ndarray:
        return self.frames[number]

    def read_each(self, numbers):
        return (self.frames[number] for number in numbers)


def planned(dataset: str, **options):
    return plan_clips(dataset, subjects=2, clips=3, seed=2, image_size=128, **options)


def rendered(clip) -> Pictures:
    return Pictures({number: render_frame(clip, number) for number in range(clip.onset, clip.offset + 1)})


def found(frames: Pictures, clip) -> int:
    crop = face_crop(clip.landmarks, (clip.image_size, clip.image_size))
    return find_apex(frames, clip.onset, clip.offset, crop, clip.landmarks)


@pytest.mark.parametrize("dataset", ["casme2", "smic", "casme3_c"])
def test_the_apex_of_a_clear_expression_is_found(dataset):
    errors = [abs(found(rendered(clip), clip) - clip.apex) for clip in planned(dataset)]
    assert max(errors) <= 1
    assert errors.count(0) >= len(errors) / 2


def test_a_head_that_goes_on_moving_does_not_hide_the_apex():
    clip = planned("casme2")[0]
    moving = rendered(replace(clip, sway=2.0))
    assert abs(found(moving, clip) - clip.apex) <= 1


def test_motion_outside_the_regions_does_not_count():
    clip = planned("casme2")[1]
    frames = rendered(clip)
    still = frames.read(clip.onset)
    late = still.copy()
    late[:20] = np.roll(still, 3, axis=1)[:20]  # hair and background
    frames.frames[clip.offset] = late
    assert abs(found(frames, clip) - clip.apex) <= 1


def test_the_first_of_equal_frames_is_the_apex():
    """Of equal frames the first is taken, and frames beyond the offset are not looked at."""
    clip = planned("casme2")[0]
    still = render_frame(clip, clip.onset)
    numbers = range(clip.onset, clip.offset + 1)
    assert found(Pictures(dict.fromkeys(numbers, still)), clip) == clip.onset + 1
    frames = rendered(clip)
    assert found(frames, replace(clip, offset=clip.apex - 2)) == clip.apex - 2


def test_an_interval_without_frames_is_named():
    clip = planned("casme2")[0]
    with pytest.raises(InputError, match=rf"no frame after onset {clip.onset} up to offset {clip.offset}, so no apex"):
        found(Pictures({clip.onset: render_frame(clip, clip.onset)}), clip)
