"""From clips to samples: flow that shows the class, an apex that is found, and a reason for every clip that fails."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_htnet_adapters import clips, placed, read
from test_htnet_release import make_release
from test_htnet_video import overwrite

from htnet.config import PrepareConfig
from htnet.data.datasets.htnet_release import LANDMARKS, HTNetRelease
from htnet.data.datasets.schemes import load_scheme
from htnet.data.entries import Clip
from htnet.data.extraction import extract, recipe_of
from htnet.data.faces.landmarks import LandmarkTable, read_landmarks
from htnet.data.flow.image import flow_images
from htnet.data.frames import list_frames
from htnet.data.plan import check_landmarks
from htnet.data.samples import Emotion
from htnet.data.store.writer import write_store
from htnet.data.synth.clips import plan_clips, true_flow
from htnet.data.synth.generate import generate
from htnet.errors import InputError

PLAN = {"subjects": 2, "clips": 3, "seed": 4, "image_size": 160}
DATASETS = ("casme2", "samm", "smic")
names = pytest.mark.parametrize("name", DATASETS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "synth"
    generate(out, **PLAN)
    return out


def entries_and_table(root: Path, name: str) -> tuple[list[Clip], LandmarkTable]:
    return clips(read(root, name)), read_landmarks(root / "landmarks.csv")


def made(root: Path, name: str, **settings):
    return extract(placed(*entries_and_table(root, name)), PrepareConfig(**settings))


@names
def test_the_apex_is_the_annotated_one_or_found_within_a_frame(whole, name):
    slack = 1 if name == "smic" else 0
    for item, clip in zip(made(whole / name, name, flow_method="dis").samples, plan_clips(name, **PLAN), strict=True):
        assert abs(item.sample.apex - clip.apex) <= slack
        assert (item.sample.onset, item.sample.offset) == (clip.onset, clip.offset)


def test_a_sample_says_that_its_apex_was_found(whole, tmp_path):
    """A sample says that its apex was found, and the recipe says how."""
    settings = PrepareConfig(flow_method="dis", working_size=64)
    entries, table = entries_and_table(whole / "casme2", "casme2")
    subject = [replace(entries[0], apex=None, notes=("apex_not_coded",)), entries[1]]
    samples = extract(placed(subject, table), settings).samples
    store = write_store(tmp_path / "store", iter(samples), recipe_of(settings))
    with tarfile.open(store.path / store.rows[0].shard) as shard:
        notes = [json.load(shard.extractfile(f"{clip.id.clip}.json"))["notes"] for clip in subject]
    assert notes == [["apex_not_coded", "apex_found_by_flow"], []]
    how = store.recipe["apex_where_not_annotated"]
    assert (how["method"], how["size"]) == ("dis", 128)
    assert "largest mean flow from the onset in the four regions" in how["rule"]


def test_an_apex_on_the_first_frame_is_found_anew(whole):
    """An apex on the first frame of a clip without an onset is found anew.
    The clip never has flow of nothing."""
    entries, table = entries_and_table(whole / "casme2", "casme2")
    clip = entries[0]
    first = min(list_frames(clip.frames))
    blank = replace(clip, onset=None, apex=first)
    (found,) = extract(placed([blank], table), PrepareConfig(flow_method="dis", working_size=64)).samples
    assert found.sample.onset == first < found.sample.apex
    assert found.notes == ("apex_at_onset", "apex_found_by_flow")
    assert np.ptp(found.flow_image.astype(np.float32)) > 0.1


@names
@pytest.mark.parametrize("method", ["tvl1", "dis"])
def test_the_flow_image_shows_the_class_at_its_landmarks(whole, name, method):
    found = made(whole / name, name, flow_method=method)
    assert found.left_out == ()
    assert found.seconds["flow"] > 0
    for item in found.samples:
        image, sample = item.flow_image.astype(np.float32), item.sample
        assert image.shape == (28, 28, 3)
        v = image[..., 1] - np.median(image[..., 1])
        left_lip, right_lip = (v[round(y), round(x)] for x, y in sample.landmarks[3:])
        brows = np.mean([v[round(y) - 4 : round(y) - 1, round(x)].mean() for x, y in sample.landmarks[:2]])
        if sample.label == Emotion.POSITIVE:
            assert max(left_lip, right_lip) < -0.1
        elif sample.label == Emotion.NEGATIVE:
            assert min(left_lip, right_lip, brows) > 0.1
        else:
            assert brows < -0.1


@pytest.mark.parametrize("kind", ["median", "landmarks"])
def test_the_heads_motion_is_taken_out_before_strain_and_storage(whole, kind):
    plain, found = (made(whole / "smic", "smic", head_motion=name).samples for name in ("none", kind))
    for one, other in zip(plain, found, strict=True):
        before, after = (item.flow_image.astype(np.float32) for item in (one, other))
        root = tuple(round(float(value)) for value in np.mean(one.sample.landmarks[:2], axis=0)[::-1])
        assert np.abs(after[root][:2]).max() < 0.05
        taken = (before - after)[..., :2]
        assert np.abs(taken).max() > 0.02
        # of a similarity the second differences are none, but for float16
        assert np.abs(np.diff(taken, n=2, axis=0)).max() < 0.005
        assert np.array_equal(before[..., 2], after[..., 2]) == (kind == "median")


def test_a_larger_flow_image_is_near_the_true_flow(whole):
    samples = made(whole / "casme2", "casme2", flow_size=56).samples
    for item, clip in zip(samples, plan_clips("casme2", **PLAN), strict=True):
        truth = true_flow(clip, clip.apex)
        (x, y), scale = clip.landmarks[3], clip.landmarks[1][0] - clip.landmarks[0][0]
        flow_x, flow_y = item.sample.landmarks[3]
        shrink = (item.sample.landmarks[1][0] - item.sample.landmarks[0][0]) / scale
        found = item.flow_image[round(flow_y), round(flow_x), :2].astype(np.float32)
        np.testing.assert_allclose(found, truth[round(y), round(x)] * shrink, atol=0.25)


def test_frames_are_kept_on_request_as_the_face_crop(whole):
    item = made(whole / "samm", "samm", keep_frames=True, flow_method="dis").samples[0]
    assert [name for name, _ in item.frames] == ["onset.jpg", "apex.jpg"]
    onset, apex = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for _, data in item.frames)
    assert onset.shape == apex.shape
    assert onset.shape[0] == onset.shape[1]
    assert set(item.sources) == {"onset_sha256", "apex_sha256", "landmarks"}
    assert made(whole / "samm", "samm", flow_method="dis").samples[0].frames == ()


def damage(clip: Clip, number: int, data: bytes | None) -> Path:
    path = list_frames(clip.frames)[number]
    path.unlink() if data is None else path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [b"", b"no picture", None])
def test_a_damaged_frame_leaves_out_its_clip_and_no_other(whole, tmp_path, data):
    root = Path(shutil.copytree(whole / "casme2", tmp_path / "casme2"))
    entries, table = entries_and_table(root, "casme2")
    damage(entries[1], entries[1].apex, data)
    found = extract(placed(entries, table), PrepareConfig(flow_method="dis"))
    assert [item.sample.id for item in found.samples] == [clip.id for clip in entries if clip is not entries[1]]
    (out,) = found.left_out
    assert (out.clip, out.rule, out.failed) == (str(entries[1].id), "unreadable_frames", True)
    with pytest.raises(InputError, match="unreadable picture" if data is not None else "is missing"):
        extract(placed(entries, table), PrepareConfig(flow_method="dis"), strict=True)


def copied(root: Path, tmp_path: Path) -> tuple[list[Clip], LandmarkTable]:
    return entries_and_table(Path(shutil.copytree(root / "samm", tmp_path / "samm")), "samm")


def repeat(clip: Clip, numbers, change=lambda picture: picture) -> None:
    """Let frames show the onset, in pictures without loss whatever they are called."""
    paths = list_frames(clip.frames)
    onset = cv2.imread(str(paths[clip.onset]))
    for number in (clip.onset, *numbers):
        picture = onset if number == clip.onset else change(onset.copy())
        paths[number].write_bytes(cv2.imencode(".png", picture)[1].tobytes())


def dot(picture: np.ndarray) -> np.ndarray:
    picture[0, 0] = 255 - picture[0, 0]
    return picture


@pytest.mark.parametrize("change", [lambda picture: picture, dot], ids=["same_pixels", "same_face"])
def test_an_apex_that_shows_the_onset_is_found_and_told_of(whole, tmp_path, change):
    entries, table = copied(whole, tmp_path)
    quick = PrepareConfig(flow_method="dis", working_size=64)
    clip = entries[0]
    repeat(clip, [clip.apex], change)
    found = extract(placed(entries, table), quick)
    item = found.samples[0]
    assert found.left_out == ()
    assert clip.onset < item.sample.apex != clip.apex
    assert item.notes == ("apex_equals_onset", "apex_found_by_flow")
    assert found.by_rule == {"apex_equals_onset": [str(clip.id)]}
    assert np.ptp(item.flow_image.astype(np.float32)) > 0.1


@pytest.mark.parametrize("apex_given", [True, False])
@pytest.mark.parametrize("method", ["tvl1", "dis"])
def test_a_clip_in_which_nothing_moves_is_left_out(whole, tmp_path, method, apex_given):
    entries, table = copied(whole, tmp_path)
    clip = entries[0]
    repeat(clip, list_frames(clip.frames))
    still = clip if apex_given else replace(clip, apex=None)
    settings = PrepareConfig(flow_method=method, working_size=64)
    found = extract(placed([still, entries[1]], table), settings)
    assert [item.sample.id for item in found.samples] == [entries[1].id]
    (out,) = found.left_out
    assert (out.rule, out.failed) == ("no_motion", True)
    assert f"no face up to frame {clip.offset} differs from that of onset {clip.onset}" in out.reason
    with pytest.raises(InputError, match="no face up to frame"):
        extract(placed([still], table), settings, strict=True)


def test_a_flow_image_of_zeros_is_left_out_alone(whole, monkeypatch):
    entries, table = entries_and_table(whole / "casme2", "casme2")

    def second_is_zero(onsets, apexes, **options):
        images = flow_images(onsets, apexes, **options)
        images[1] = 0
        return images

    monkeypatch.setattr("htnet.data.extraction.flow_images", second_is_zero)
    found = extract(placed(entries, table), PrepareConfig(flow_method="dis"))
    assert [item.sample.id for item in found.samples] == [clip.id for clip in entries if clip is not entries[1]]
    assert "is zero everywhere" in found.left_out[0].reason
    assert found.left_out[0].rule == "no_motion"


def test_a_published_flow_picture_of_one_colour_is_left_out(tmp_path):
    release = make_release(tmp_path / "release")
    entries = list(
        HTNetRelease(root=release, scheme=load_scheme("megc2019_3class", ["casme2", "samm", "smic"])).entries()
    )
    cv2.imwrite(str(entries[1].picture), np.full((28, 28, 3), (0, 128, 128), np.uint8))
    found = extract(placed(entries, read_landmarks(release / LANDMARKS)), PrepareConfig())
    assert [item.sample.id for item in found.samples] == [entry.id for entry in entries if entry is not entries[1]]
    assert [(item.rule, item.failed) for item in found.left_out] == [("no_motion", True)]


@pytest.mark.parametrize("place", ["apex", "before"])
def test_a_damaged_video_leaves_out_its_clip_and_no_other(tmp_path, place):
    generate(tmp_path, datasets=("csv",), subjects=1, clips=3, seed=4, image_size=128, video=True)
    entries, table = entries_and_table(tmp_path / "csv", "csv")
    clip = entries[1]
    overwrite(clip.frames, clip.apex if place == "apex" else clip.apex - 1, lambda length: b"\xaa" * length)
    found = extract(placed(entries, table), PrepareConfig(flow_method="dis", working_size=64))
    assert [item.sample.id for item in found.samples] == [entry.id for entry in entries if entry is not clip]
    (out,) = found.left_out
    assert (out.clip, out.rule, out.failed) == (str(clip.id), "unreadable_frames", True)
    assert "the video is damaged: it cannot be decoded from frame" in out.reason


def test_damage_after_the_last_needed_frame_does_no_harm(tmp_path):
    generate(tmp_path, datasets=("csv",), subjects=1, clips=2, seed=4, image_size=128, video=True)
    entries, table = entries_and_table(tmp_path / "csv", "csv")
    clip, quick = entries[0], PrepareConfig(flow_method="dis", working_size=64)
    overwrite(clip.frames, clip.offset, bytes)
    (kept,) = extract(placed([clip], table), quick).samples
    assert kept.sources["apex_seconds"] == f"{(clip.apex - 1) / 100:.6f}"
    assert kept.sources["onset_seconds"] == f"{(clip.onset - 1) / 100:.6f}"
    (out,) = extract(placed([replace(clip, apex=None)], table), quick).left_out
    assert out.rule == "unreadable_frames", "the apex may be the damaged frame"


def test_a_frame_of_another_size_is_named(whole, tmp_path):
    root = Path(shutil.copytree(whole / "casme2", tmp_path / "casme2"))
    entries, table = entries_and_table(root, "casme2")
    damage(entries[0], entries[0].apex, cv2.imencode(".jpg", np.zeros((90, 160, 3), np.uint8))[1].tobytes())
    (out,) = extract(placed(entries, table), PrepareConfig(flow_method="dis")).left_out
    assert "must be as large as frame" in out.reason


def test_missing_landmarks_are_treated_by_the_policy(whole):
    """Missing landmarks are an error, a reason to leave the clip out, or the mean of the subject's other clips."""
    entries, table = entries_and_table(whole / "casme2", "casme2")
    subject = [clip for clip in entries if clip.id.subject == "sub01"]
    less = replace(table, points={key: value for key, value in table.points.items() if key != subject[0].id})
    quick = PrepareConfig(flow_method="dis")
    found = extract(placed(subject, less), quick)
    assert [item.rule for item in found.left_out] == ["no_landmarks"]
    assert f"no landmarks for clip {subject[0].id}" in found.left_out[0].reason
    with pytest.raises(InputError, match="no landmarks"):
        extract(placed(subject, less), replace(quick, landmark_failures="error"))
    mean = extract(placed(subject, less), replace(quick, landmark_failures="mean-shape"))
    assert mean.left_out == ()
    known = np.mean([np.asarray(table.points[clip.id]) for clip in subject[1:]], axis=0)
    alone = replace(table, points={subject[0].id: tuple(map(tuple, known))})
    assert np.array_equal(extract(placed(subject[:1], alone), quick).samples[0].flow_image, mean.samples[0].flow_image)


def test_a_landmark_outside_the_frame_is_a_reason(whole):
    entries, table = entries_and_table(whole / "casme2", "casme2")
    table = replace(table, points={**table.points, entries[0].id: ((500.0, 5.0),) * 5})
    (out,) = extract(placed(entries, table), PrepareConfig(flow_method="dis")).left_out
    assert "landmark left_eye at (500, 5) must lie in the picture of 160 x 160 pixels" in out.reason


def test_landmarks_of_another_kind_are_refused(whole):
    entries, table = entries_and_table(whole / "casme2", "casme2")
    with pytest.raises(InputError, match="landmarks must be in pixels of the onset frame"):
        check_landmarks(replace(table, flow_size=28), entries[0])


@pytest.mark.parametrize("pictures_first", [True, False])
def test_a_subject_may_have_both_pictures_and_frames(whole, tmp_path, pictures_first):
    """If one source has pictures of a subject and another has frames, the subject is what each of them says."""
    entries, table = entries_and_table(whole / "casme2", "casme2")
    subject = [clip for clip in entries if clip.id.subject == "sub01"]
    release = make_release(tmp_path / "release", clips=[("casme2", "sub01", f"published_{n}", 0) for n in range(2)])
    scheme = load_scheme("megc2019_3class", ["casme2"])
    pictures = list(HTNetRelease(root=release, scheme=scheme).entries())
    published = read_landmarks(release / LANDMARKS)
    pictures, subject = placed(pictures, published), placed(subject, table)
    both = [*pictures, *subject] if pictures_first else [*subject, *pictures]
    quick = PrepareConfig(flow_method="dis")
    found = extract(both, quick)
    assert found.left_out == ()
    apart = {item.sample.id: item for part in (pictures, subject)
             for item in extract(part, quick).samples}  # fmt: skip
    assert [item.sample for item in found.samples] == [apart[entry.id].sample for entry in both]
    # points of another kind of picture have no part in a mean
    less = replace(table, points={key: value for key, value in table.points.items() if key != subject[0].id})
    both = [*pictures, *placed(subject, less)] if pictures_first else [*placed(subject, less), *pictures]
    quick = replace(quick, landmark_failures="mean-shape")
    mixed = extract(both, quick)
    (mean,) = [item for item in mixed.samples if item.sample.id == subject[0].id]
    assert mean.sample == extract(placed(subject, less), quick).samples[0].sample


def test_how_many_clips_are_worked_on_together_changes_no_bit(whole):
    entries, table = entries_and_table(whole / "casme2", "casme2")
    together = extract(placed(entries, table), PrepareConfig()).samples
    for clip, item in zip(entries, together, strict=True):
        (alone,) = extract(placed([clip], table), PrepareConfig()).samples
        assert np.array_equal(alone.flow_image, item.flow_image)


def test_a_gpu_asked_for_where_there_is_none_is_one_line(whole, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"prepare\.device=cuda: no CUDA device is visible"):
        extract(placed(*entries_and_table(whole / "casme2", "casme2")), PrepareConfig(), device="cuda")


def test_a_clip_without_a_label_enters_no_store(whole, tmp_path):
    entries = placed(*entries_and_table(whole / "casme2", "casme2"))
    (sample,) = extract([replace(entries[0], label=None)], PrepareConfig()).samples
    with pytest.raises(InputError, match=rf"{entries[0].id}: the clip has no label, which a store needs"):
        write_store(tmp_path / "store", [sample], {})
