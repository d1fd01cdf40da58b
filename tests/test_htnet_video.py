"""Videos: frames by position whatever the header, rate or camera says; what is damaged is named and never made up."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from htnet.data.frames import open_frames, read_frame
from htnet.data.video import DamagedError, VideoFrames
from htnet.errors import InputError

CODECS = {
    "mjpeg.avi": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "4"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"b": "2000000"}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"b": "2000000"}),
    "h264.mp4": ("libx264", "yuv420p", {"crf": "20"}),
    "h264.mkv": ("libx264", "yuv420p", {"crf": "20"}),
    "h264.mov": ("libx264", "yuv420p", {"crf": "20", "g": "1"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"b": "2000000"}),
    "ffv1.mkv": ("ffv1", "yuv420p", {}),
    "wmv2.wmv": ("wmv2", "yuv420p", {"b": "2000000"}),
}
FRAMES = 24
every_codec = pytest.mark.parametrize("name", CODECS)


def pictures(count=FRAMES, height=96, width=128) -> list[np.ndarray]:
    """A textured picture that moves a pixel a frame."""
    rng = np.random.default_rng(0)
    wide = cv2.resize(rng.integers(0, 256, (12, 20, 3), np.uint8), (width + count, height))
    noisy = np.clip(wide + rng.normal(0, 4, wide.shape), 0, 255).astype(np.uint8)
    return [noisy[:, shift : shift + width].copy() for shift in range(count)]


def write(path: Path, frames, codec="ffv1", pixels="bgr0", options=None, *, times=None, change=lambda stream: None):
    """A video; ``frames`` are blue-green-red pictures, or ready frames of PyAV."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={**(options or {}), "threads": "1"})
        size = frames[0].shape[1::-1] if isinstance(frames[0], np.ndarray) else (frames[0].width, frames[0].height)
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        change(stream)
        for place, picture in enumerate(frames):
            ready = isinstance(picture, av.VideoFrame)
            frame = picture if ready else av.VideoFrame.from_ndarray(picture, format="bgr24")
            if times is not None:
                frame.pts, frame.time_base = times[place], Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def coded(tmp_path: Path, name: str, frames=None) -> Path:
    codec, pixels, options = CODECS[name]
    return write(tmp_path / name, frames or pictures(), codec, pixels, options)


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(video=0) if packet.size]


def overwrite(path: Path, packet: int, fill) -> None:
    """Put ``fill(bytes)`` in the place of the middle half of a packet, counted from 1."""
    data, damaged = path.read_bytes(), packets(path)[packet - 1]
    start, length = data.index(damaged) + len(damaged) // 3, len(damaged) // 2
    path.write_bytes(data[:start] + fill(length) + data[start + length :])


@every_codec
def test_frames_are_counted_from_1_and_read_in_any_order(tmp_path, name, capfd):
    video = open_frames(coded(tmp_path, name))
    assert video.numbers == tuple(range(1, FRAMES + 1))
    shown = pictures()
    for number in (24, 1, 8):
        found = video.read(number)
        errors = [np.abs(found.astype(int) - picture).mean() for picture in shown]
        assert int(np.argmin(errors)) == number - 1
    for number, found in zip((2, 3, 6), video.read_each([2, 3, 6]), strict=True):
        assert np.array_equal(found, video.read(number))
    for number in (0, 25):
        with pytest.raises(InputError, match=rf"{name}: frame {number} is missing; there are frames 1 to 24"):
            video.read(number)
    assert capfd.readouterr() == ("", "")


@every_codec
@pytest.mark.parametrize(
    "fill",
    [
        lambda length: bytes(length),
        lambda length: b"\xaa" * length,
        lambda length: np.random.default_rng(3).bytes(length),
    ],
    ids=["zeros", "pattern", "noise"],
)
def test_a_damaged_frame_is_named_and_those_before_are_read(tmp_path, name, fill, capfd):
    path = coded(tmp_path, name)
    whole = list(VideoFrames(path).read_each([1, 3]))
    overwrite(path, 12, fill)
    video = VideoFrames(path)
    assert video.numbers == tuple(range(1, FRAMES + 1)), "they are there, but cannot be read"
    assert np.array_equal(list(video.read_each([1, 3])), whole)
    # the decoder may hold back a few frames that it has
    with pytest.raises(DamagedError, match=rf"{name}: the video is damaged: it cannot be decoded from frame \d+ on"):
        video.read(15)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["mjpeg.avi", "ffv1.mkv", "h264.mov"])
def test_of_independent_frames_the_damaged_one_is_named(tmp_path, name):
    path = coded(tmp_path, name)
    overwrite(path, 8, bytes)
    video = VideoFrames(path)
    assert video.read(7 if name != "h264.mov" else 5).any()
    with pytest.raises(DamagedError, match=r"from frame \d on \(packet 8: "):
        video.read(8)


def test_a_jpeg_is_checked_as_a_frame_of_motion_jpeg(tmp_path):
    path = coded(tmp_path, "mjpeg.avi")
    overwrite(path, 8, lambda length: b"\xaa" * length)
    whole, damaged = packets(path)[6:8]
    assert damaged[-2:] == b"\xff\xd9", "both ends are there"
    (tmp_path / "7.jpg").write_bytes(whole)
    (tmp_path / "8.jpg").write_bytes(damaged)
    assert read_frame(tmp_path / "7.jpg").shape == (96, 128, 3)
    with pytest.raises(InputError, match=r"8\.jpg: unreadable picture: damaged \("):
        read_frame(tmp_path / "8.jpg")


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]])
@pytest.mark.parametrize("grey", [True, False])
def test_whole_jpegs_of_every_kind_are_read(tmp_path, options, grey):
    picture = pictures(1, 75, 63)[0]
    picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) if grey else picture
    for quality in (5, 60, 100):
        cv2.imwrite(str(tmp_path / "1.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, quality, *options])
        assert read_frame(tmp_path / "1.jpg").shape == (75, 63, 3)


def test_odd_notes_of_a_camera_are_no_damage(tmp_path):
    picture = cv2.imencode(".jpg", pictures(1)[0])[1].tobytes()
    notes = b"Exif\0\0II*\0\x08\0\0\0\xff\x7f" + b"odd" * 9
    head = b"\xff\xe1" + struct.pack(">H", len(notes) + 2) + notes
    (tmp_path / "1.jpg").write_bytes(picture[:2] + head + picture[2:])
    assert np.array_equal(read_frame(tmp_path / "1.jpg"), cv2.imdecode(np.frombuffer(picture, np.uint8), 1))


@pytest.mark.parametrize("name", ["mjpeg.avi", "h264.mkv", "mpeg4.avi", "wmv2.wmv", "vp9.webm"])
def test_of_a_truncated_video_the_frames_before_the_end_are_read(tmp_path, name):
    path = coded(tmp_path, name)
    first = VideoFrames(path).read(2)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(packets(path)[14]) + 20])
    video = VideoFrames(path)
    assert np.array_equal(video.read(2), first)
    with pytest.raises(InputError, match=r"cannot be decoded from frame \d+ on|is missing; there are frames 1 to 1\d"):
        video.read(17)


def test_a_file_that_is_no_whole_video_is_named(tmp_path):
    path = coded(tmp_path, "h264.mp4")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"h264\.mp4: not a readable video \(moov atom not found\)"):
        VideoFrames(path).read(1)
    for content in (b"", b"no video"):
        (tmp_path / "x.avi").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.avi: not a readable video"):
            open_frames(tmp_path / "x.avi").read(1)


def test_a_header_that_counts_too_many_is_not_believed(tmp_path):
    path = coded(tmp_path, "mjpeg.avi")
    data = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 24), (b"strh", 40)):
        place = data.index(chunk) + offset
        assert struct.unpack_from("<I", data, place) == (FRAMES,)
        struct.pack_into("<I", data, place, 99)
    path.write_bytes(data)
    video = VideoFrames(path)
    assert video.numbers == tuple(range(1, FRAMES + 1))
    with pytest.raises(InputError, match="frame 25 is missing; there are frames 1 to 24"):
        video.read(25)


def test_a_lost_frame_does_not_shift_those_after_it(tmp_path):
    path = coded(tmp_path, "mjpeg.avi")
    data, fifth = path.read_bytes(), packets(path)[4]
    head = data.index(fifth) - 8
    path.write_bytes(data[:head] + bytes(4) + data[head + 4 :])
    assert VideoFrames(path).read(4).any()
    with pytest.raises(DamagedError, match=r"from frame 5 on \(packet 5: the file's index names a frame before it\)"):
        VideoFrames(path).read(8)


@pytest.mark.parametrize("codec", ["h264.mp4", "vp9.webm"])
@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_a_video_is_turned_as_players_show_it(tmp_path, codec, degrees, turns):
    upright, turned = (
        VideoFrames(write(tmp_path / f"{angle}.mp4", pictures(3), *CODECS[codec],
                          change=lambda stream, angle=angle: angle and stream.set_display_rotation(angle)))
        for angle in (0, degrees)
    )  # fmt: skip
    assert np.array_equal(turned.read(2), np.rot90(upright.read(2), turns))


def test_a_video_is_mirrored_as_players_show_it(tmp_path):
    plain = VideoFrames(write(tmp_path / "a.mp4", pictures(3), *CODECS["h264.mp4"]))
    mirrored = write(
        tmp_path / "b.mp4", pictures(3), *CODECS["h264.mp4"],
        change=lambda stream: stream.set_display_matrix([-1, 0, 0, 0, 1, 0, 0, 0, 1]),
    )  # fmt: skip
    assert np.array_equal(VideoFrames(mirrored).read(2), plain.read(2)[:, ::-1])


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        *(("ffv1", name) for name in ("gray", "gray10le", "gray12le", "gray16le", "bgra", "yuv422p10le")),
        *(("libx264", name) for name in ("yuv420p", "yuv420p10le")),
        ("rawvideo", "bgr24"),
        ("huffyuv", "yuv422p"),
    ],
)
def test_any_depth_of_bits_has_the_same_light(tmp_path, codec, pixels):
    ramp = np.repeat(np.linspace(0, 255, 62).astype(np.uint8)[None, :, None], 38, axis=0).repeat(3, axis=2)
    options = {"crf": "1"} if codec == "libx264" else {}
    suffix = ".avi" if codec in ("rawvideo", "huffyuv") else ".mkv"
    found = VideoFrames(write(tmp_path / f"x{suffix}", [ramp] * 3, codec, pixels, options)).read(2)
    assert (found.shape, found.dtype) == (ramp.shape, np.uint8)
    assert np.abs(found.astype(int) - ramp).max() <= 4
    assert found.max() >= 252


def test_odd_sizes_are_read(tmp_path):
    shown = pictures(3, 31, 37)
    found = VideoFrames(write(tmp_path / "x.avi", shown, "ffv1", "bgr0")).read(3)
    assert np.array_equal(found, shown[2])


def test_an_interlaced_frame_is_refused_in_words(tmp_path):
    path = write(tmp_path / "x.mkv", pictures(), "libx264", "yuv420p", {"x264-params": "interlaced=1:threads=1"})
    with pytest.raises(InputError, match=r"x\.mkv: frame 3 is interlaced, two moments in one picture.*bwdif"):
        VideoFrames(path).read(3)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_at_a_variable_rate_frames_go_by_position(tmp_path, suffix):
    times = [0, 1, 5, 6, 20]
    path = write(tmp_path / f"x.{suffix}", pictures(5), *CODECS["h264.mp4"], times=times)
    video = VideoFrames(path)
    assert video.numbers == (1, 2, 3, 4, 5)
    shown = [np.abs(video.read(3).astype(int) - picture).mean() for picture in pictures(5)]
    assert int(np.argmin(shown)) == 2
    assert video.seconds(apex=3, onset=1) == {"apex_seconds": "0.200000"}, "only of frames that were read"
    video.read(5)  # the decoder holds it back until the end, and forgets its unit of time
    assert video.seconds(apex=5) == {"apex_seconds": "0.800000"}


def test_sound_alone_is_refused_and_the_first_video_read(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4: not a readable video \(no video in it: sound or subtitles"):
        open_frames(tmp_path / "sound.mp4").read(1)
    shown = pictures(2)
    with av.open(str(tmp_path / "two.mkv"), "w") as file:
        streams = [file.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 128, 96, "bgr0"
        for stream, picture in zip(streams, shown, strict=True):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
            file.mux(stream.encode())
    assert np.array_equal(VideoFrames(tmp_path / "two.mkv").read(1), shown[0])


def test_a_missing_pyav_is_one_clear_line(tmp_path, monkeypatch):
    """Pictures and videos alike: the package is named where they are opened."""
    path = coded(tmp_path, "mjpeg.avi")
    cv2.imwrite(str(tmp_path / "img1.jpg"), pictures(1)[0])
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "htnet.data.video")
    for read in (lambda: open_frames(path), lambda: read_frame(tmp_path / "img1.jpg")):
        with pytest.raises(InputError, match="PyAV is not installed, which reads videos and checks JPEGs"):
            read()
