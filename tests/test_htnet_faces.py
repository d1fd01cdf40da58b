"""Places of faces: by the table, then the detector on the onset frame, then the policy; one crop for a pair."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_htnet_adapters import clips, placed, read

from htnet.config import PrepareConfig
from htnet.data.entries import Clip
from htnet.data.extraction import Extraction, extract, recipe_of
from htnet.data.faces.detector import Sighting
from htnet.data.faces.detectors import DETECTORS, build_detector
from htnet.data.faces.landmarks import LandmarkTable, face_crop, read_landmarks
from htnet.data.frames import open_frames
from htnet.data.samples import Landmarks
from htnet.data.synth.generate import generate
from htnet.errors import InputError

Picture = np.ndarray
QUICK = PrepareConfig(flow_method="dis", detector="mtcnn")


class Tiny:
    """A detector that knows the pictures it was told of, or asks a function, and counts its calls."""

    def __init__(self, find: Callable[[Picture, int], Landmarks | None]) -> None:
        self.find, self.calls = find, 0

    def describe(self) -> dict[str, object]:
        return {"name": "tiny"}

    def __call__(self, picture: Picture) -> Sighting | None:
        self.calls += 1
        points = self.find(picture, self.calls)
        return None if points is None else Sighting(points=points, faces=1)


@pytest.fixture
def register(monkeypatch):
    def do(find: Callable[[Picture, int], Landmarks | None]) -> Tiny:
        build_detector.cache_clear()
        tiny = Tiny(find)
        monkeypatch.setitem(DETECTORS, "mtcnn", lambda model: tiny)
        return tiny

    yield do
    build_detector.cache_clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("faces") / "synth"
    generate(out, datasets=["casme2"], subjects=1, clips=4, seed=2, image_size=160)
    return out / "casme2"


@pytest.fixture(scope="module")
def subject(root) -> list[Clip]:
    return clips(read(root, "casme2"))


@pytest.fixture(scope="module")
def table(root) -> LandmarkTable:
    return read_landmarks(root / "landmarks.csv")


def digest(picture: Picture) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def by_onset(subject: list[Clip], table: LandmarkTable, *, but: Clip | None = None) -> Callable[..., Landmarks | None]:
    """Finds the table's points in the onset frames as they are on disk, in none but these."""
    known = {
        digest(open_frames(clip.frames).read(clip.onset)): table.points[clip.id]
        for clip in subject
        if but is None or clip.id != but.id
    }
    return lambda picture, call: known.get(digest(picture))


def without(table: LandmarkTable, *dropped: Clip) -> LandmarkTable:
    ids = {clip.id for clip in dropped}
    return replace(table, points={key: points for key, points in table.points.items() if key not in ids})


def assert_same_samples(found: Extraction, expected: Extraction) -> None:
    assert [item.sample for item in found.samples] == [item.sample for item in expected.samples]
    for one, two in zip(found.samples, expected.samples, strict=True):
        assert np.array_equal(one.flow_image, two.flow_image)


# --- table, then detector


def test_a_detected_face_serves_as_a_table_does(subject, table, register):
    """A face that a detector finds in the onset frame serves as a table does."""
    by_table = extract(placed(subject, table), replace(QUICK, detector="none"))
    tiny = register(by_onset(subject, table))
    found = extract(placed(subject, without(table, *subject)), QUICK)
    assert_same_samples(found, by_table)
    assert tiny.calls == len(subject)
    assert set(found.methods.values()) == {"mtcnn"}
    assert set(by_table.methods.values()) == {"table landmarks.csv"}
    assert found.seconds["faces"] >= 0


def test_a_detector_is_asked_only_beyond_the_table(subject, table, register):
    """A detector is asked for the clips that the table does not cover, and for no others."""
    tiny = register(by_onset(subject, table))
    found = extract(placed(subject, without(table, subject[1])), QUICK)
    assert tiny.calls == 1
    assert [found.methods[str(clip.id)] for clip in subject[:3]] == [
        "table landmarks.csv", "mtcnn", "table landmarks.csv",
    ]  # fmt: skip
    assert [item.sources["landmarks"] for item in found.samples] == list(found.methods.values())


def test_a_detector_belongs_to_the_recipe(register):
    register(lambda picture, call: None)
    assert recipe_of(QUICK)["detector"] == {"name": "tiny"}
    assert recipe_of(replace(QUICK, detector="none"))["detector"] is None


# --- policies


def test_a_clip_without_a_face_is_left_out_and_the_others_stay(subject, table, register):
    register(by_onset(subject, table, but=subject[2]))
    found = extract(placed(subject, without(table, *subject)), QUICK)
    assert [item.sample.id for item in found.samples] == [clip.id for clip in subject if clip is not subject[2]]
    [out] = found.left_out
    assert (out.clip, out.rule, out.failed) == (str(subject[2].id), "no_landmarks", True)
    expected = f"mtcnn found no face in frame {subject[2].onset}, the onset of clip {subject[2].id}"
    assert out.reason == f"{subject[2].frames}: {expected}"


def test_a_picture_that_opencv_refuses_shows_no_face(subject, table, register):
    """A picture that OpenCV refuses shows no face, and the other clips stay."""

    def refuse(picture: Picture, call: int) -> Landmarks | None:
        return tuple(cv2.resize(picture, (0, 0)))

    register(refuse)
    found = extract(placed(subject, without(table, subject[2])), QUICK)
    assert len(found.samples) == len(subject) - 1
    [out] = found.left_out
    assert out.rule == "no_landmarks"
    assert f"mtcnn found no face in frame {subject[2].onset}, the onset of clip {subject[2].id}: OpenCV" in out.reason
    assert "\n" not in out.reason


def test_under_the_policy_error_it_ends_the_work(subject, table, register):
    register(by_onset(subject, table, but=subject[2]))
    with pytest.raises(InputError, match="mtcnn found no face in frame"):
        extract(placed(subject, without(table, *subject)), replace(QUICK, landmark_failures="error"))


def test_mean_shape_gives_the_mean_of_the_other_clips(subject, table, register):
    """Under mean-shape, a clip without a face has the mean of the subject's other clips, given or found."""
    register(by_onset(subject, table, but=subject[2]))
    partly = without(table, subject[1], subject[2])
    found = extract(placed(subject, partly), replace(QUICK, landmark_failures="mean-shape"))
    assert found.left_out == ()
    assert found.methods[str(subject[2].id)] == "mean_shape"
    assert list(found.mean_shape) == [str(subject[2].id)]
    assert "mtcnn found no face in frame" in found.mean_shape[str(subject[2].id)]
    others = np.mean([np.asarray(table.points[clip.id]) for clip in subject if clip is not subject[2]], axis=0)
    given = replace(table, points={**table.points, subject[2].id: tuple(map(tuple, others))})
    assert_same_samples(found, extract(placed(subject, given), replace(QUICK, detector="none")))


def test_where_no_clip_has_a_face_there_is_no_mean(subject, table, register):
    register(lambda picture, call: None)
    found = extract(placed(subject, without(table, *subject)), replace(QUICK, landmark_failures="mean-shape"))
    assert found.samples == ()
    assert {item.rule for item in found.left_out} == {"no_landmarks"}


def test_an_unreadable_onset_is_no_missing_face(root, table, register, tmp_path):
    """An onset that cannot be read is no missing face and no failure of another clip."""
    copy = Path(shutil.copytree(root, tmp_path / "casme2"))
    subject = clips(read(copy, "casme2"))
    register(by_onset(subject, table, but=subject[1]))
    next(path for path in subject[0].frames.iterdir() if path.stem == f"img{subject[0].onset}").write_bytes(b"")
    none = without(table, *subject)
    found = extract(placed(subject, none), replace(QUICK, landmark_failures="mean-shape"))
    assert [item.rule for item in found.left_out] == ["unreadable_frames"]
    assert list(found.mean_shape) == [str(subject[1].id)]
    assert len(extract(placed(subject[:1], none), replace(QUICK, landmark_failures="error")).left_out) == 1


def test_landmarks_that_do_not_fit_the_frame_are_no_landmarks(subject, table, register):
    register(lambda picture, call: ((500.0, 5.0),) * 5)
    found = extract(placed(subject, without(table, subject[0])), QUICK)
    [out] = found.left_out
    assert out.rule == "no_landmarks"
    assert f"mtcnn: clip {subject[0].id}: landmark left_eye at (500, 5) must lie in the picture" in out.reason


@pytest.mark.parametrize("bad", [((500.0, 5.0),) * 5, ((80.0, 80.0),) * 5])
@pytest.mark.parametrize("given", [True, False])
def test_landmarks_that_do_not_fit_give_way_to_the_mean(subject, table, register, bad, given):
    """Landmarks that do not fit are replaced by the mean and enter no mean."""
    outside, none, *others = subject
    spoiled = replace(without(table, none), points={**without(table, none).points, outside.id: bad})
    if not given:
        first = open_frames(outside.frames).read(outside.onset)
        register(lambda picture, call: bad if np.array_equal(picture, first) else None)
        spoiled = without(spoiled, outside)
    settings = replace(QUICK, detector="none" if given else "mtcnn", landmark_failures="mean-shape")
    found = extract(placed(subject, spoiled), settings)
    assert found.left_out == ()
    assert list(found.mean_shape) == [str(outside.id), str(none.id)]
    assert f"clip {outside.id}: landmark" in found.mean_shape[str(outside.id)]
    mean = tuple(map(tuple, np.mean([np.asarray(table.points[clip.id]) for clip in others], axis=0)))
    known = replace(table, points={**table.points, outside.id: mean, none.id: mean})
    assert_same_samples(found, extract(placed(subject, known), replace(QUICK, detector="none")))


def test_a_mean_that_lies_outside_the_frame_is_none(subject, table, tmp_path):
    small = pair(tmp_path, *(np.zeros((40, 40, 3), np.uint8) for _ in range(2)), like=subject[0])
    settings = replace(QUICK, detector="none", landmark_failures="mean-shape")
    found = extract(placed([small, *subject[1:]], without(table, subject[0])), settings)
    [out] = found.left_out
    assert (out.clip, out.rule) == (str(subject[0].id), "no_landmarks")
    assert f"mean_shape: clip {subject[0].id}: landmark" in out.reason
    assert found.mean_shape == {}


# --- one crop for a pair


def pair(tmp_path: Path, onset: Picture, apex: Picture, like: Clip) -> Clip:
    folder = tmp_path / "pair"
    folder.mkdir()
    for number, picture in ((1, onset), (2, apex)):
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return replace(like, frames=folder, onset=1, apex=2, offset=2)


def test_the_crop_makes_no_motion_however_unsure_the_detector_is(subject, table, register, tmp_path):
    face = open_frames(subject[0].frames).read(subject[0].onset)
    points = np.asarray(table.points[subject[0].id])
    tiny = register(lambda picture, call: tuple(map(tuple, points + 3.0 * call)))
    clip = pair(tmp_path, face, face, subject[0])
    [out] = extract(placed([clip], without(table, clip)), replace(QUICK, flow_method="tvl1")).left_out
    assert tiny.calls == 1
    assert out.rule == "no_motion", "equal frames are cut alike"


def test_a_head_that_moves_keeps_its_whole_motion(subject, table, register, tmp_path):
    face = open_frames(subject[0].frames).read(subject[0].onset)
    shift = np.array([[1, 0, 2], [0, 1, -1]], np.float32)
    clip = pair(
        tmp_path, face, cv2.warpAffine(face, shift, face.shape[1::-1], borderMode=cv2.BORDER_REPLICATE), subject[0]
    )
    register(by_onset([clip], table))
    [item] = extract(placed([clip], without(table, clip)), replace(QUICK, flow_method="tvl1")).samples
    scale = item.sample.flow_size / face_crop(table.points[clip.id], face.shape).side
    flow = np.median(item.flow_image[..., :2].astype(np.float32), axis=(0, 1)) / scale
    np.testing.assert_allclose(flow, (2, -1), atol=0.1)


# --- configuration


def test_a_model_file_belongs_to_yunet_and_to_no_other():
    with pytest.raises(ValueError, match="detector yunet needs detector_model, its model file"):
        PrepareConfig(detector="yunet")
    with pytest.raises(InputError, match=r"prepare\.detector_model: a\.onnx: of detector yunet only"):
        build_detector("mtcnn", Path("a.onnx"))
