"""Guarantees of reading the published composite: every row as listed, every bad input named."""

from __future__ import annotations

import csv
import struct
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_htnet_adapters import placed

from htnet.config import PrepareConfig
from htnet.data.datasets.htnet_release import LABELS, LANDMARKS, PICTURES, HTNetRelease
from htnet.data.datasets.labels import OfficialList
from htnet.data.datasets.schemes import load_scheme
from htnet.data.entries import read_flow_picture
from htnet.data.extraction import extract
from htnet.data.faces.landmarks import SOURCE_COLUMNS, UPSTREAM_COLUMNS, read_landmarks
from htnet.data.plan import check_landmarks
from htnet.data.store.writer import PreparedSample
from htnet.errors import InputError

CLIPS = [
    ("casme2", "sub01", "EP02_01f", 1),
    ("casme2", "sub01", "EP19_05f", 0),
    ("samm", "006", "006_1_2", 2),
    ("smic", "s01", "s1_ne_01", 0),
]
POINTS = (9, 11, 21, 10, 15, 17, 10, 21, 20, 21)


def random_picture(seed: int, size: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def make_release(root: Path, clips=CLIPS, suffix=" .png") -> Path:
    """A release in the true layout with random pictures."""
    (root / PICTURES).mkdir(parents=True)
    for seed, (_, subject, clip, _) in enumerate(clips):
        assert cv2.imwrite(str(root / PICTURES / f"{subject}_{clip}{suffix}"), random_picture(seed))
    write_labels(root, clips)
    with (root / LANDMARKS).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["dataset", "subject", "clip", "flow_file", *UPSTREAM_COLUMNS])
        rows.writerows([d, s, c, f"{s}_{c} .png", *POINTS] for d, s, c, _ in dict.fromkeys(clips))
    return root


def write_labels(root: Path, clips) -> None:
    with (root / LABELS).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["dataset", "sub", "filename_o", "label", "apex", "imagename", "sub_filename"])
        rows.writerows([d, s, c, label, "", f"{s}_{c}.jpg", ""] for d, s, c, label in clips)


@pytest.fixture
def release(tmp_path) -> Path:
    return make_release(tmp_path / "release")


SCHEME = load_scheme("megc2019_3class", ["casme2", "samm", "smic"])


def adapter(root: Path) -> HTNetRelease:
    return HTNetRelease(root=root, scheme=SCHEME)


def samples(root: Path, landmarks: Path | None = None) -> list[PreparedSample]:
    """Everything of a release, as ``htnet prepare`` makes it."""
    entries = list(adapter(root).entries())
    table = read_landmarks(landmarks or root / LANDMARKS)
    for entry in entries:
        check_landmarks(table, entry)
    found = extract(placed(entries, table), PrepareConfig())
    assert found.left_out == ()
    return list(found.samples)


def refusal(root: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        samples(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_every_row_becomes_a_sample_in_the_order_of_the_list(release):
    items = samples(release)
    assert [(*vars(item.sample.id).values(), item.sample.label) for item in items] == CLIPS
    assert [item.sample.emotion for item in items] == ["positive", "negative", "surprise", "negative"]
    assert items[0].sample.landmarks == ((9, 11), (21, 10), (15, 17), (10, 21), (20, 21))
    assert {item.sample.flow_size for item in items} == {28}
    assert all(item.flow_image.dtype == np.float16 and item.flow_image.flags.c_contiguous for item in items)


def test_channels_are_u_v_strain_where_opencv_reads_strain_v_u(release):
    for seed, item in enumerate(samples(release)):
        strain, v, u = np.moveaxis(random_picture(seed), -1, 0)
        assert np.array_equal(item.flow_image, np.stack([u, v, strain], axis=-1))


def test_file_names_may_hold_the_published_space(tmp_path, release):
    """File names with and without the published space are read."""
    plain = make_release(tmp_path / "plain", suffix=".png")
    for one, other in zip(samples(plain), samples(release), strict=True):
        assert one.sample == other.sample
        assert np.array_equal(one.flow_image, other.flow_image)


def test_a_list_from_a_spreadsheet_program_is_read(release):
    text = (release / LABELS).read_text().replace("\n", "\n\n", 2)  # a byte order mark, empty lines
    (release / LABELS).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(samples(release)) == 4
    (release / LABELS).write_text(text.replace(",2,", ",7,"))
    assert f"{LABELS}, row 6, column label" in refusal(release)


def test_the_recipe_names_labels_and_pictures_not_the_place(tmp_path, release):
    """The recipe identifies labels and pictures, but not the place."""
    first = adapter(release).describe()
    assert adapter(make_release(tmp_path / "copy")).describe() == first
    for name in (LABELS, PICTURES / "006_006_1_2 .png"):
        before = (release / name).read_bytes()
        (release / name).write_bytes(before + b"\n")
        assert adapter(release).describe() != first
        (release / name).write_bytes(before)
    assert adapter(release).describe() == first


def test_missing_files_of_the_release_are_named(tmp_path, release):
    """A missing folder, a missing label list and a missing landmark table are named."""
    with pytest.raises(InputError, match=f"{LABELS}: no such file; an htnet_release folder holds"):
        adapter(tmp_path / "none").describe()
    assert "other.csv: no such landmark table" in refusal(release, landmarks=tmp_path / "other.csv")
    (release / LABELS).unlink()
    assert f"{release / LABELS}: no such file; an htnet_release folder holds" in refusal(release)
    (release / LABELS).mkdir()
    assert f"{release / LABELS}: cannot be read: Is a directory" in refusal(release)


def test_landmarks_may_lie_elsewhere(tmp_path, release):
    (release / LANDMARKS).rename(tmp_path / "points.csv")
    assert len(list(samples(release, landmarks=tmp_path / "points.csv"))) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column dataset is missing"),
        ("dataset,sub,label\n", "row 1: column filename_o is missing; found dataset, sub, label"),
        ("dataset,sub,filename_o,label\nsamm,,006_1_2,1\n", "row 2, column sub: must not be empty"),
        ("dataset,sub,filename_o,label\nsamm,006, ,1\n", "row 2, column filename_o: must not be empty"),
        ("dataset,sub,filename_o,label\n,006,006_1_2,1\n", "row 2, column dataset: must not be empty"),
        ("dataset,sub,filename_o,label\ncomposite,006,006_1_2,1\n", "row 2, column dataset: no dataset may be named"),
        (
            "dataset,sub,filename_o,label\nsamm/2,006,006_1_2,1\n",
            "row 2, column dataset: the name of a dataset",
        ),
        ("dataset,sub,filename_o,label\nsamm,006\n", "row 2, column filename_o: must not be empty"),
        ("dataset,sub,filename_o,label\nsamm,006,006_1_2\n", "row 2, column label: must be 0"),
        (
            "dataset,sub,filename_o,label\nsamm,../006,x,1\n",
            "row 2, column sub: must be a name",
        ),
        ('dataset,sub,filename_o,label\n"' + "x" * 200_000, "not a readable CSV in UTF-8 (field larger than"),
        ("dataset,sub,filename_o,label\nsamm,\xe9\xff,c,1\n", "not a readable CSV in UTF-8"),
    ],
)
def test_a_bad_label_list_names_file_row_and_column(release, text, message):
    (release / LABELS).write_bytes(text.encode("latin-1"))
    assert f"{release / LABELS}" in refusal(release)
    assert message in refusal(release)


@pytest.mark.parametrize("label", ["3", "-1", "", "1.5", "happy", "²"])
def test_a_label_outside_the_three_classes_is_named_with_its_row(release, label):
    write_labels(release, [*CLIPS[:2], (*CLIPS[2][:3], label), CLIPS[3]])
    found = refusal(release)
    assert f"{LABELS}, row 4, column label: must be 0 (negative), 1 (positive) or 2 (surprise), got {label!r}" in found


def test_a_clip_listed_twice_is_named_with_both_rows(release):
    write_labels(release, [*CLIPS, CLIPS[1]])
    assert "row 6: duplicate clip casme2/sub01/EP19_05f: row 3 holds it already" in refusal(release)


def test_two_clips_of_one_flow_file_are_refused(release):
    # file names do not hold the dataset: without this rule a person's picture would be another's as well
    write_labels(release, [*CLIPS, ("smic", "006", "006_1_2", 1)])
    assert "row 6: smic/006/006_1_2 has the flow file of samm/006/006_1_2: 006_006_1_2 .png" in refusal(release)


def test_a_missing_flow_file_is_named_with_its_clip_and_row(release):
    (release / PICTURES / "006_006_1_2 .png").unlink()
    expected = f"{release / PICTURES / '006_006_1_2 .png'}: missing flow file of samm/006/006_1_2 ({LABELS}, row 4)"
    assert refusal(release) == expected
    with pytest.raises(InputError, match="missing flow file of samm/006/006_1_2"):
        adapter(release).describe()


def test_a_clip_without_landmarks_is_named(release):
    lines = (release / LANDMARKS).read_text().splitlines()
    (release / LANDMARKS).write_text("\n".join(line for line in lines if "s1_ne_01" not in line))
    assert refusal(release) == f"{release / LANDMARKS}: no landmarks for clip smic/s01/s1_ne_01"


def test_a_landmark_outside_its_picture_is_named_with_its_clip(release):
    lines = (release / LANDMARKS).read_text().splitlines()
    moved = [f"{line.rpartition(',')[0]},28.5" if "s1_ne_01" in line else line for line in lines]
    (release / LANDMARKS).write_text("\n".join(moved))
    found = refusal(release)
    assert found.startswith(f"{release / LANDMARKS}: clip smic/s01/s1_ne_01: landmark right_lip at (")
    assert found.endswith(", 28.5) must lie in the picture of 28 x 28 pixels")


def test_landmarks_of_frames_are_refused(tmp_path, release):
    """Landmarks of frames are refused because the release has no frames."""
    path = tmp_path / "landmarks.csv"
    rows = "\n".join(f"{d},{s},{c}," + ",".join("200" for _ in SOURCE_COLUMNS) for d, s, c, _ in CLIPS)
    path.write_text(f"dataset,subject,clip,{','.join(SOURCE_COLUMNS)}\n{rows}\n")
    assert "landmarks.csv: landmarks in pixels of a frame, but " in refusal(release, landmarks=path)


def test_a_picture_that_does_not_fit_its_landmarks_is_refused(release):
    """A picture is refused if it is not the one whose pixels the landmarks are given in."""
    path = release / PICTURES / "006_006_1_2 .png"
    cv2.imwrite(str(path), random_picture(0, 56))
    assert f"{path}: a picture of 56 pixels, but its landmarks are in pixels of a picture of 28" in refusal(release)


def test_an_unreadable_picture_is_named_wherever_it_is_cut(tmp_path, capfd):
    """An unreadable picture is named wherever it is cut, and nothing else is said."""
    path = tmp_path / "x.png"
    whole = cv2.imencode(".png", random_picture(3))[1].tobytes()
    for size in (*range(60), *range(60, len(whole), 97), *range(len(whole) - 20, len(whole))):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"x\.png: unreadable picture: .*\({size} bytes\)"):
            read_flow_picture(path)
    for place in range(8, len(whole), 53):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="unreadable picture"):
            read_flow_picture(path)
    for text in (b"", b"not a picture", b"\x89PNG\r\n\x1a\n", cv2.imencode(".jpg", random_picture(3))[1].tobytes()):
        path.write_bytes(text)
        with pytest.raises(InputError, match="unreadable picture: not a PNG, damaged or truncated"):
            read_flow_picture(path)
    # OpenCV would remark on each of them on stderr, where a user expects one line
    assert capfd.readouterr() == ("", "")


def test_a_png_of_an_absurd_size_is_unreadable(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match="unreadable picture"):
        read_flow_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((28, 30, 3), np.uint8), "must be square, got 30 x 28 pixels"),
        (np.zeros((28, 28), np.uint8), "must have 3 channels of 8 bits, got 1 of 8"),
        (np.zeros((28, 28, 4), np.uint8), "must have 3 channels of 8 bits, got 4 of 8"),
        (np.zeros((28, 28, 3), np.uint16), "must have 3 channels of 8 bits, got 3 of 16"),
    ],
)
def test_a_picture_of_another_form_is_named(release, picture, message):
    path = release / PICTURES / "006_006_1_2 .png"
    cv2.imwrite(str(path), picture)
    assert refusal(release) == f"{path}: a flow picture {message}"


def test_the_published_composite_has_442_clips_of_68_people(shared_data):
    root = shared_data / "htnet_release"
    if not root.is_dir():
        pytest.skip(f"{root} not found")
    items = samples(root)
    assert len(items) == 442
    assert Counter(item.sample.label for item in items) == {0: 250, 1: 109, 2: 83}
    clips = Counter(item.sample.id.dataset for item in items)
    people = Counter(subject.split("/")[0] for subject in {item.sample.subject for item in items})
    assert clips == {"casme2": 145, "samm": 133, "smic": 164}
    assert people == {"casme2": 24, "samm": 28, "smic": 16}
    assert {item.flow_image.shape for item in items} == {(28, 28, 3)}
    assert all(7 <= value <= 21 for item in items for point in item.sample.landmarks for value in point)


def test_the_published_composite_is_the_official_list(shared_data):
    listed, root = shared_data / "megc2019" / "combined_3class_gt.csv", shared_data / "htnet_release"
    if not (listed.is_file() and root.is_dir()):
        pytest.skip(f"{listed} or {root} not found")

    labels = {entry.id: entry.label for entry in adapter(root).entries()}
    official = OfficialList.read(listed)
    assert len(labels) == len(official.clips) == 442
    assert official.missing(labels) == []
    assert {sample: official.find(sample).label for sample in labels} == labels
