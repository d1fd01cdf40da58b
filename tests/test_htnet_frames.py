"""Frames of a clip: by number from folders and videos, damaged ones named before anything is made of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from htnet.data.frames import inside, list_frames, open_frames, read_frame
from htnet.errors import InputError


def picture(seed: int = 0, shape=(40, 48, 3)) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(small, shape[1::-1], interpolation=cv2.INTER_CUBIC)


def test_frames_are_listed_by_the_last_number_of_their_name(tmp_path):
    """Frames are listed by the last number of their name, in any spelling."""
    for file in ("img9.JPG", "reg_img10.jpeg", "006_00002.png", "take2_000011.Bmp", "Thumbs.db", ".img12.jpg", "n.txt"):
        (tmp_path / file).write_bytes(b"")
    assert list(list_frames(tmp_path)) == [2, 9, 10, 11]
    assert open_frames(tmp_path).numbers == (2, 9, 10, 11)
    (tmp_path / "img0009.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="frame 9 is"):
        list_frames(tmp_path)


def test_a_place_without_frames_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no frames"):
        open_frames(tmp_path).read(1)
    with pytest.raises(InputError, match=r"none: no such folder of frames or video \(\.mp4"):
        open_frames(tmp_path / "none")


def test_a_frame_number_that_no_store_holds_is_named(tmp_path):
    (tmp_path / f"{2**63}.jpg").touch()
    with pytest.raises(InputError, match=rf"{2**63}\.jpg: the number of a frame must be at most {2**63 - 1}"):
        list_frames(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
def test_a_truncated_picture_is_named(tmp_path, suffix, capfd):
    """A picture that is cut anywhere is named, and nothing else is said."""
    data = cv2.imencode(suffix, picture())[1].tobytes()
    path = tmp_path / f"1{suffix}"
    path.write_bytes(data)
    assert read_frame(path).shape == (40, 48, 3)
    for size in (0, 1, 10, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=rf"1{suffix}: unreadable picture.*\({size} bytes\)"):
            read_frame(path)
    assert capfd.readouterr() == ("", "")


def test_grey_and_padded_pictures_are_read(tmp_path):
    grey = cv2.cvtColor(picture(), cv2.COLOR_BGR2GRAY)
    path = tmp_path / "1.jpg"
    path.write_bytes(cv2.imencode(".jpg", grey)[1].tobytes() + b"\0" * 20)
    found = read_frame(path)
    assert found.shape == (40, 48, 3)
    assert np.array_equal(found[..., 0], found[..., 2])


def test_a_missing_frame_is_named_with_what_there_is(tmp_path):
    for number in (5, 7):
        cv2.imwrite(str(tmp_path / f"img{number}.png"), picture(number))
    frames = open_frames(tmp_path)
    assert np.array_equal(frames.read(7), picture(7))
    with pytest.raises(InputError, match="frame 6 is missing; there are frames 5 to 7"):
        frames.read(6)


def deep(folder: Path, number: int, values: np.ndarray) -> None:
    assert cv2.imwrite(str(folder / f"{number}.png"), values.astype(np.uint16))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_cameras_bits_in_16_are_as_light_as_in_8(tmp_path, bits, channels):
    eight = picture()[..., [0, 1, 2, 0][:channels]]
    for number in (3, 4):
        deep(tmp_path, number, eight.astype(int) << (bits - 8))
    frames = open_frames(tmp_path)
    wanted = eight[..., :3] if channels > 1 else eight.repeat(3, axis=2)
    assert np.array_equal(frames.read(4), wanted)
    assert frames.read(4).dtype == np.uint8
    assert frames.notes == ((f"{bits}_bits_in_16",) if 8 < bits < 16 else ())


def test_pictures_of_a_clip_have_one_scale_or_are_refused(tmp_path):
    values = picture().astype(int) << 4
    for number, factor in ((1, 1.0), (2, 0.2), (3, 1.3)):
        deep(tmp_path, number, values * factor)
    frames = open_frames(tmp_path)
    assert np.array_equal(frames.read(2), (values * 0.2).astype(int) >> 4), "a dark frame stays dark"
    with pytest.raises(
        InputError, match=r"3\.png: a picture of 16 bits that holds \d+, but the first frame, 1\.png, needs"
    ):
        frames.read(3)


def test_pictures_of_8_bits_are_never_looked_at_for_their_scale(tmp_path):
    (tmp_path / "1.png").write_bytes(b"damaged, but not needed")
    cv2.imwrite(str(tmp_path / "2.png"), picture())
    frames = open_frames(tmp_path)
    assert np.array_equal(frames.read(2), picture())
    assert frames.notes == ()


def test_names_of_an_annotation_stay_inside(tmp_path):
    assert inside(tmp_path, "sub01", "EP02_01f") == tmp_path / "sub01" / "EP02_01f"
    for evil in ("..", "", ".", "a/b", "a\\b", "/etc", "C:x"):
        with pytest.raises(InputError, match="leads out of the dataset's folder"):
            inside(tmp_path, evil)
