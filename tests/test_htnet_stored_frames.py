"""Frames beside onset and apex: which are kept, under which name, and which one a draw takes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import random_samples
from hypothesis import given
from hypothesis import strategies as st
from test_htnet_adapters import clips, placed, read
from test_htnet_store import content

from htnet.config import PrepareConfig, SourceConfig
from htnet.data.entries import Clip
from htnet.data.extraction import extract, recipe_of
from htnet.data.faces.landmarks import LandmarkTable, face_crop, read_landmarks
from htnet.data.frames import list_frames, read_frame
from htnet.data.store.frames import frame_member, nearest_member, neighbours
from htnet.data.store.reader import Store, open_store
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate
from htnet.data.video import VideoFrames
from htnet.errors import InputError

PLAIN_DIGEST = "4dd48a0745e7d5f8fe835afe43483a5d5db0e294558b08e5e33c4bc4156a8756"
NAMED = {"onset-1.jpg": b"a", "onset+1.jpg": b"bb", "onset+2.jpg": b"c", "apex-1.jpg": b"", "apex+1.jpg": b"ddd"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "synth"
    generate(out, datasets=("casme2",), subjects=1, clips=2, seed=4, image_size=128)
    return out / "casme2"


@pytest.fixture(scope="module")
def sources(raw) -> tuple[list[Clip], LandmarkTable]:
    return clips(read(raw, "casme2")), read_landmarks(raw / "landmarks.csv")


def test_frames_on_each_side_are_found_by_order():
    """Frames on each side are found by their order, not by their number."""
    found = dict(neighbours((3, 4, 6, 9, 10, 11, 15, 20, 21), 6, 15, 2))
    assert found == {
        "onset-2.jpg": 3, "onset-1.jpg": 4, "onset+1.jpg": 9, "apex-1.jpg": 11, "apex+1.jpg": 20, "apex+2.jpg": 21
    }  # fmt: skip


@given(count=st.integers(2, 60), reach=st.integers(1, 12), data=st.data())
def test_whatever_is_taken_the_onset_stays_before_the_apex(count, reach, data):
    onset = data.draw(st.integers(0, count - 2))
    apex = data.draw(st.integers(onset + 1, count - 1))
    found = dict(neighbours(range(count), onset, apex, reach))
    assert len(set(found.values()) | {onset, apex}) == len(found) + 2
    stored = found | {"onset.jpg": onset, "apex.jpg": apex}
    for first in range(-reach, reach + 1):
        for second in range(-reach, reach + 1):
            taken = stored[nearest_member(stored, "onset", first)], stored[nearest_member(stored, "apex", second)]
            assert taken[0] < taken[1]
    # all that the clip has, up to the middle between the two
    assert sum(name.startswith("onset-") for name in found) == min(reach, onset)
    assert sum(name.startswith("apex+") for name in found) == min(reach, count - 1 - apex)
    assert sum(name.startswith("onset+") for name in found) == min(reach, (apex - onset - 1) // 2)


@pytest.mark.parametrize(
    ("part", "offset", "taken"),
    [("onset", 0, "onset.jpg"), ("onset", -1, "onset-1.jpg"), ("onset", -2, "onset-1.jpg"), ("onset", 2, "onset+2.jpg"),
     ("apex", 3, "apex+1.jpg"), ("apex", -1, "apex-1.jpg"), ("apex", -9, "apex-1.jpg")],
)  # fmt: skip
def test_the_farthest_frame_there_is_replaces_a_missing_one(part, offset, taken):
    """If a frame is missing, the farthest one on the way to it is taken."""
    assert nearest_member(NAMED, part, offset) == taken
    assert nearest_member((), part, offset) == frame_member(part)


def test_what_is_kept_are_the_face_crops_of_the_frames_beside(sources):
    entries, table = sources
    entry = entries[0]
    paths = list_frames(entry.frames)
    (item,) = extract(
        placed([entry], table), PrepareConfig(flow_method="dis", keep_frames=True, keep_neighbours=2)
    ).samples
    numbers = {"onset.jpg": entry.onset, "apex.jpg": entry.apex}
    numbers |= neighbours(tuple(paths), entry.onset, entry.apex, 2)
    assert list(numbers) == [name for name, _ in item.frames]
    assert {"onset+1.jpg", "onset+2.jpg", "apex-1.jpg", "apex+1.jpg"} <= set(numbers)
    for name, data in item.frames:
        frame = read_frame(paths[numbers[name]])
        wanted = face_crop(table.points[entry.id], frame.shape).cut(frame)
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).mean() < 3


def test_of_a_video_the_same_is_kept_and_it_is_gone_through_once(tmp_path, monkeypatch):
    generate(tmp_path / "raw", datasets=("csv",), subjects=1, clips=2, seed=4, image_size=128, video=True)
    root = tmp_path / "raw" / "csv"
    entry, table = clips(read(root, "csv"))[0], read_landmarks(root / "landmarks.csv")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    video = VideoFrames(entry.frames)
    for number, picture in zip(video.numbers, video.read_each(video.numbers), strict=True):
        cv2.imwrite(str(pictures / f"{number}.png"), picture)
    settings = PrepareConfig(flow_method="dis", keep_frames=True, keep_neighbours=2)
    (expected,) = extract(placed([replace(entry, frames=pictures)], table), settings).samples
    passes = []
    monkeypatch.setattr(
        VideoFrames, "_open", lambda video, whole=VideoFrames._open: passes.append(video) or whole(video)
    )
    (found,) = extract(placed([entry], table), settings).samples
    assert found.frames == expected.frames
    assert len(found.frames) > 6
    assert len(passes) == 3, "the onset, the count of the frames, all the rest"


def test_a_missing_apex_is_named_with_neighbours_or_without(sources):
    """An apex that is not there is named, with neighbours or without."""
    entries, table = sources
    late = replace(entries[0], apex=999, offset=999)
    for reach in (0, 2):
        settings = PrepareConfig(flow_method="dis", keep_frames=True, keep_neighbours=reach)
        (out,) = extract(placed([late], table), settings).left_out
        assert f"{late.frames}: frame 999 is missing; there are frames" in out.reason


def test_a_damaged_frame_beside_the_apex_leaves_out_its_clip(sources, monkeypatch):
    entries, table = sources
    bad = list_frames(entries[0].frames)[entries[0].apex + 1]
    monkeypatch.setattr(
        Path, "read_bytes", lambda path, whole=Path.read_bytes: whole(path)[: 100 if path == bad else None]
    )
    settings = PrepareConfig(flow_method="dis", keep_frames=True)
    assert extract(placed(entries, table), settings).left_out == ()
    (out,) = extract(placed(entries, table), replace(settings, keep_neighbours=1)).left_out
    assert out.clip == str(entries[0].id)
    assert f"{bad}: unreadable picture" in out.reason


def with_neighbours(folder: Path) -> Store:
    """Three samples, of which the second has frames, and the third some beside them."""
    one, two, three = islice(random_samples(), 3)
    pair = (("onset.jpg", b"first"), ("apex.jpg", b"second"))
    return write_store(
        folder, iter([one, replace(two, frames=pair), replace(three, frames=(*pair, *NAMED.items()))]), {"made": "up"}
    )


def test_a_store_finds_the_frames_beside_onset_and_apex(tmp_path):
    """A store knows the place of the frames beside onset and apex, and any tar tool shows them."""
    store = with_neighbours(tmp_path / "store")
    opened = open_store(tmp_path / "store")
    assert opened == store
    assert set(opened.rows[0].members) == {"flow.npy"}
    assert set(opened.rows[1].members) == {"flow.npy", "onset.jpg", "apex.jpg"}
    assert {name: opened.read_member(2, name) for name in NAMED} == NAMED
    with pytest.raises(InputError, match=r"casme2/sub00/EP01 has no onset\+1\.jpg"):
        opened.read_member(1, "onset+1.jpg")
    with tarfile.open(store.path / store.rows[2].shard) as tar:
        assert tar.extractfile("EP02.onset+2.jpg").read() == b"c"
        assert {name.partition(".")[0] for name in tar.getnames()} == {"EP00", "EP01", "EP02"}


def test_a_changed_frame_beside_changes_the_digest(tmp_path):
    """A changed frame beside onset or apex changes the digest, and it is named when it is read."""
    store = with_neighbours(tmp_path / "store")
    where = store.rows[2].members["onset+1.jpg"]
    assert where.sha256 == hashlib.sha256(b"bb").hexdigest()
    shard = store.path / store.rows[2].shard
    data = bytearray(shard.read_bytes())
    data[where.start] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"onset\+1\.jpg of casme2/sub00/EP02 is damaged"):
        open_store(store.path).read_member(2, "onset+1.jpg")
    assert write_store(tmp_path / "other", islice(random_samples(), 3), {"made": "up"}).digest != store.digest


def test_a_store_without_frames_beside_keeps_the_old_format(tmp_path):
    """A store without frames beside onset and apex is one that earlier versions read."""
    plain = write_store(tmp_path / "plain", islice(random_samples(), 3), {})
    # the digest of the version that introduced the format
    assert plain.digest == PLAIN_DIGEST
    assert json.loads(content(plain.path)["store.json"])["format"] == 1
    wider = with_neighbours(tmp_path / "wider")
    assert json.loads(content(wider.path)["store.json"])["format"] == 2


def test_the_recipe_names_head_motion_that_is_taken_out():
    assert "head_motion" not in recipe_of(PrepareConfig())["flow"]
    assert recipe_of(PrepareConfig(head_motion="median"))["flow"]["head_motion"] == "median"


def test_the_recipe_names_the_reach_only_where_there_is_one():
    assert "keep_neighbours" not in recipe_of(PrepareConfig(keep_frames=True))
    assert recipe_of(PrepareConfig(keep_frames=True, keep_neighbours=3))["keep_neighbours"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_neighbours": 2}, "keep_neighbours=2 needs keep_frames=true"),
        (
            {"keep_neighbours": -1, "keep_frames": True},
            r"keep_neighbours\s+Input should be greater than or equal to 0 .*-1",
        ),
        (
            {"head_motion": "median", "sources": (SourceConfig(adapter="htnet_release", root="x"),)},
            "head_motion=median needs sources with frames: of htnet_release's pictures",
        ),
    ],
)
def test_settings_of_prepare_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**changes)
