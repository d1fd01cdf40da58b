"""Pictures as cameras and datasets have them: prepare's OpenCV and DALI's decoder see the same in each."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_dali_pipelines_flow import DEVICES
from test_dali_pipelines_frames import decoded, face, jpeg, store_of
from test_htnet_adapters import clips, placed, read

from dali_pipelines import flow_from_frames
from htnet.config import PrepareConfig
from htnet.data.entries import Clip
from htnet.data.extraction import Extraction, extract, recipe_of
from htnet.data.faces.landmarks import LandmarkTable, read_landmarks
from htnet.data.frames import list_frames, read_frame, to_gray
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate

SETTINGS = PrepareConfig(keep_frames=True, working_size=96)
RAW_SIDE = 128


def encoded(picture: np.ndarray, kind: str, mode: str = "RGB", **options) -> bytes:
    """A blue-green-red picture in a format and colour mode of PIL."""
    out = io.BytesIO()
    Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).convert(mode, palette=Image.Palette.ADAPTIVE).save(
        out, kind, **options
    )
    return out.getvalue()


def turned(picture: np.ndarray, orientation: int) -> bytes:
    """A JPEG of a picture as a camera stores it that was held otherwise: it shows the picture once EXIF is applied."""
    undo = {1: lambda p: p, 3: lambda p: p[::-1, ::-1], 6: lambda p: np.rot90(p), 8: lambda p: np.rot90(p, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(np.ascontiguousarray(undo[orientation](picture)), exif=exif)


def sixteen_bits(picture: np.ndarray) -> bytes:
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.uint16)
    return cv2.imencode(".png", grey * 257)[1].tobytes()


RUBBISH = b"\xff\xd8\xff" + bytes(99) + b"\xff\xd9"
"""The first and last bytes of a JPEG, and no picture between them."""
JPEGS = {
    "plain": jpeg,
    "progressive": lambda p: jpeg(p, progressive=True),
    "full colour": lambda p: jpeg(p, subsampling=0),
    "grey": lambda p: encoded(p, "JPEG", "L", quality=95),
    "CMYK": lambda p: encoded(p, "JPEG", "CMYK", quality=95),
    **{f"orientation {number}": lambda p, n=number: turned(p, n) for number in (1, 3, 6, 8)},
}
OTHERS = {
    "png": lambda p: encoded(p, "PNG"),
    "grey png": lambda p: encoded(p, "PNG", "L"),
    "png of 16 bits": lambda p: sixteen_bits(p),
    "png with alpha": lambda p: encoded(p, "PNG", "RGBA"),
    "bmp": lambda p: encoded(p, "BMP"),
    "grey bmp": lambda p: encoded(p, "BMP", "L"),
    "bmp with a palette": lambda p: encoded(p, "BMP", "P"),
}  # fmt: skip
ODD = JPEGS | OTHERS


DECODERS_DIFFER = {"cpu": 2, "cuda:0": 4}
"""Grey values of 255 between OpenCV's decoder and DALI's, at most.

On a CPU both are libjpeg-turbo, and rounding differs. On a GPU nvJPEG decodes JPEGs: by another inverse cosine
transform, and colours that were stored at half the size are repeated where libjpeg-turbo interpolates them, which grey
sees where a colour is clipped. Not run on a GPU yet.
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ODD)
def test_dali_decodes_to_what_prepare_reads(tmp_path, kind, device):
    picture = face()[:70]
    data = ODD[kind](picture)
    (tmp_path / "1.jpg").write_bytes(data)
    seen = to_gray(read_frame(tmp_path / "1.jpg"))
    assert seen.shape == (70, 90)
    truth = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(int)
    assert np.abs(seen - truth).mean() < 4
    found = decoded(store_of(tmp_path, (data, data)), size=90, device=device)[0].numpy().astype(int)
    wanted = cv2.resize(seen, (90, 90), interpolation=cv2.INTER_LINEAR)
    assert np.abs(found - wanted).max() <= DECODERS_DIFFER[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (8000, 8000), (1, 8000), (8000, 3)])
def test_pictures_of_any_size_are_resized(tmp_path, shape, device):
    data = cv2.imencode(".jpg", np.full(shape, 99, np.uint8))[1].tobytes()
    found = decoded(store_of(tmp_path, (data, data)), device=device)[0]
    assert (found.float() - 99).abs().max() <= 1


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> tuple[Clip, LandmarkTable]:
    folder = tmp_path_factory.mktemp("raw") / "synth"
    generate(folder, datasets=("casme2",), subjects=1, clips=2, seed=4, image_size=RAW_SIDE)
    return clips(read(folder / "casme2", "casme2"))[0], read_landmarks(folder / "casme2" / "landmarks.csv")


def prepared(
    raw: tuple[Clip, LandmarkTable], folder: Path, encode, *, suffix: str = ".jpg", scale: float = 1
) -> Extraction:
    """The clip of an onset and an apex that ``encode`` wrote, prepared."""
    clip, table = raw
    folder.mkdir()
    for number in (clip.onset, clip.apex):
        (folder / f"img{number}{suffix}").write_bytes(encode(read_frame(list_frames(clip.frames)[number])))
    points = {clip.id: tuple(((x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5) for x, y in table.points[clip.id])}
    return extract(placed([replace(clip, frames=folder)], replace(table, points=points)), SETTINGS)


def stored(found: Extraction, folder: Path) -> Store:
    return write_store(folder, iter(found.samples), recipe_of(SETTINGS))


def flow_of(store: Store, device: str = "cpu") -> np.ndarray:
    return flow_from_frames(store, [0], device=torch.device(device), threads=1)(0).astype(np.float32)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one[..., :2].ravel(), other[..., :2].ravel())[0, 1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["grey", "CMYK", "progressive", "orientation 3", "orientation 6", "png", "bmp"])
def test_odd_pictures_give_the_flow_of_plain_ones(raw, tmp_path, kind, device):
    """A clip of odd pictures has the flow of a plain one, in the store and out of its frames."""
    plain = stored(prepared(raw, tmp_path / "plain", ODD["png"], suffix=".png"), tmp_path / "plain_store")
    suffix = {"png": ".png", "bmp": ".bmp"}.get(kind, ".JPG")
    store = stored(prepared(raw, tmp_path / "odd", ODD[kind], suffix=suffix), tmp_path / "store")
    assert alike(store.read_flow(0).astype(np.float32), plain.read_flow(0).astype(np.float32)) > 0.97
    assert alike(flow_of(store, device), flow_of(plain)) > 0.97


def test_a_clip_of_8000_pixels_has_the_flow_of_a_small_one(raw, tmp_path):
    def large(picture: np.ndarray) -> bytes:
        wide = np.zeros((1600, 8000, 3), np.uint8)
        wide[:, :1600] = cv2.resize(picture, (1600, 1600), interpolation=cv2.INTER_CUBIC)
        return jpeg(wide)

    small = stored(prepared(raw, tmp_path / "small", ODD["png"], suffix=".png"), tmp_path / "small_store")
    store = stored(prepared(raw, tmp_path / "large", large, scale=1600 / RAW_SIDE), tmp_path / "store")
    assert alike(store.read_flow(0).astype(np.float32), small.read_flow(0).astype(np.float32)) > 0.9
    assert alike(flow_of(store), flow_of(small)) > 0.9


BAD = {
    "empty": (lambda p: b"", "unreadable picture"),
    "no picture": (lambda p: b"no picture at all", "unreadable picture"),
    "truncated": (lambda p: jpeg(p)[:-50], "unreadable picture"),
    "rubbish": (lambda p: RUBBISH, "unreadable picture"),
    "one pixel": (lambda p: jpeg(p[:1, :1]), "must lie in the picture of 1 x 1 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_found_when_the_store_is_made(raw, tmp_path, kind):
    """A bad picture is found when the store is made, and it is named with its clip."""
    encode, reason = BAD[kind]
    found = prepared(raw, tmp_path / "bad", encode)
    assert found.samples == ()
    (out,) = found.left_out
    assert out.clip == str(raw[0].id)
    assert out.failed
    assert reason in out.reason
