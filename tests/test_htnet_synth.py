"""The synthetic datasets: made whole or not at all, the same from the same seed, and moving as they claim."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from htnet.data.faces.landmarks import face_crop
from htnet.data.samples import Emotion
from htnet.data.synth.clips import plan_clips, render_frame, true_flow
from htnet.data.synth.generate import COMPOSITE, DATASETS, UNREADABLE, generate, planted
from htnet.data.synth.like import read_clip_list
from htnet.data.synth.motion import backward_field, expression, forward_flow
from htnet.errors import InputError

SMALL = {"subjects": 2, "clips": 3, "image_size": 96}


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "raw"
    generate(out, **SMALL)
    return out


def test_the_layouts_are_those_of_the_real_datasets(small: Path) -> None:
    assert (small / "casme2/CASME2-coding-20140508.xlsx").is_file()
    assert list((small / "casme2/CASME2_RAW_selected/sub01/EP01_01f").glob("img*.jpg"))
    assert (small / "samm/SAMM_Micro_FACS_Codes_v2.xlsx").is_file()
    assert list((small / "samm/006/006_1_1").glob("006_0*.jpg"))
    assert (small / "smic/SMIC-HS-E_annotation.xlsx").is_file()
    assert (small / "smic/HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp").is_file()
    assert all((small / name / "landmarks.csv").is_file() for name in COMPOSITE)


def test_the_seed_decides_bytes_and_faces(small: Path, tmp_path: Path) -> None:
    """The same seed gives the same bytes, and another seed gives other faces."""
    generate(tmp_path / "again", **SMALL)
    assert digests(tmp_path / "again") == digests(small)
    first, other = (plan_clips("casme2", seed=seed, **SMALL)[0] for seed in (0, 1))
    assert first.look != other.look
    assert not np.array_equal(render_frame(first, first.onset), render_frame(other, other.onset))


def test_a_dataset_does_not_depend_on_which_others_are_made(small: Path, tmp_path: Path) -> None:
    generate(tmp_path / "one", datasets=["smic"], **SMALL)
    assert digests(tmp_path / "one/smic") == digests(small / "smic")


def test_asking_again_for_the_same_data_does_nothing_and_says_so(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    summary = generate(small, **SMALL)
    assert not summary.created
    assert "nothing done" in str(summary)
    assert summary.clips == {"casme2": 6, "samm": 6, "smic": 6}
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_a_folder_of_somebody_else_is_left_alone(small: Path, tmp_path: Path) -> None:
    """A folder of other parameters or of somebody else is left alone."""
    with pytest.raises(InputError, match="other parameters"):
        generate(small, **{**SMALL, "clips": 4})
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"was not made by htnet synth"):
        generate(tmp_path, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("htnet.data.synth.generate.render_frame", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "raw", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_generation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / f".raw.{'0a' * 16}.tmp" / "casme2").mkdir(parents=True)
    generate(tmp_path / "raw", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("name", [".", "../here", "new"])
def test_a_relative_name_is_a_folder_like_another(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    generate(Path(name), **SMALL)
    assert digests(Path(name)) == digests(small)
    assert here.samefile(Path.cwd()), "the shell would stand in a folder that is no more"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not generate(Path(name), **SMALL).created


def test_a_folder_that_cannot_be_replaced_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(Path, "rename", busy)
    out = tmp_path / "mounted"
    out.mkdir()
    with pytest.raises(InputError) as caught:
        generate(out, datasets=["samm"], subjects=1, clips=2, image_size=64)
    expected = f"{out}: cannot be replaced by the data: Device or resource busy; name another folder"
    assert str(caught.value) == expected
    assert list(tmp_path.rglob("*")) == [out]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"subjects": 0}, "subjects must be in 1..90, got 0"),
        ({"clips": 1}, "clips must be in 2..60, got 1"),
        ({"image_size": 10}, "image_size must be in 64..1024, got 10"),
        ({"seed": -1}, "seed must be in"),
        ({"datasets": ["casme9"]}, "casme9"),
        ({"datasets": []}, "one or more"),
        ({"difficulty": "hard"}, "difficulty must be one of easy, realistic, got 'hard'"),
        ({"damaged": -0.1}, r"damaged must be in \[0, 1\], got -0.1"),
        ({"like": Path("none.csv")}, "subjects must not be given with like"),
    ],
)
def test_a_parameter_out_of_range_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        generate(tmp_path / "raw", **{**SMALL, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_subject_shows_at_least_two_classes(dataset: str) -> None:
    """Every subject shows at least two classes, in clips with names of their own."""
    plan = plan_clips(dataset, subjects=90, clips=2, seed=0, image_size=64)
    classes = defaultdict(set)
    for clip in plan:
        classes[clip.subject].add(clip.label)
    assert len(classes) == 90
    assert all(len(labels) >= 2 for labels in classes.values())
    many = plan_clips(dataset, subjects=1, clips=60, seed=0, image_size=64)
    assert len({clip.clip for clip in many}) == 60


def test_the_parameters_are_kept_beside_the_data(small: Path) -> None:
    kept = json.loads((small / "synth.json").read_text())
    assert {name: kept[name] for name in SMALL} == SMALL


@pytest.mark.parametrize("dataset", DATASETS)
def test_traps_and_damage_are_listed_and_change_no_other_clip(dataset: str) -> None:
    plain = plan_clips(dataset, seed=0, **SMALL)
    spoiled = plan_clips(dataset, seed=0, traps=True, damaged=0.2, **SMALL)
    listed = {(item["subject"], item["clip"]): item for item in planted(spoiled)}
    assert {(clip.subject, clip.clip) for clip in spoiled if clip.trap or clip.damage} == listed.keys()
    assert [clip for clip in spoiled if not clip.trap and not clip.damage] == [
        clip for clip in plain if (clip.subject, clip.clip) not in listed
    ]
    damage = [item for item in listed.values() if item["rule"] == UNREADABLE]
    assert len(damage) == (0 if dataset == "htnet_release" else 2)
    assert all((item["expected"], item["failed"]) == ("left_out", True) for item in damage)


def test_a_list_decides_the_clips_whatever_the_seed(tmp_path: Path) -> None:
    """A list decides subjects, clips and classes, whatever the seed."""
    path = tmp_path / "list.csv"
    path.write_text("dataset,subject,clip,label\nsamm,7,007_3_1,2\nsamm,36,036_2_1,0\nsamm,7,007_3_2,0\n")
    summary = generate(tmp_path / "raw", like=path, image_size=64)
    assert summary.clips == {"samm": 3}
    listed = read_clip_list(path).clips["samm"]
    for seed in (0, 1):
        plan = plan_clips("samm", like=listed, seed=seed, image_size=64)
        assert [(clip.subject, clip.clip, clip.label) for clip in plan] == [
            ("007", "007_3_1", 2), ("007", "007_3_2", 0), ("036", "036_2_1", 0),
        ]  # fmt: skip


def flow_at(clip, place: tuple[float, float]) -> np.ndarray:
    """Apex flow at a place in shares of the side, without the head's sway (the flow of a far corner)."""
    flow = true_flow(clip, clip.apex)
    x, y = (int(value * clip.image_size) for value in place)
    return flow[y, x] - flow[2, 2]


@pytest.mark.parametrize("dataset", DATASETS)
def test_each_class_moves_the_parts_it_should(dataset: str) -> None:
    """Pixels of a 160-pixel frame; y points down."""
    for clip in plan_clips(dataset, subjects=3, clips=3, seed=5, image_size=160):
        look = clip.look
        left_lip = flow_at(clip, (look.centre_x - look.mouth_width, look.mouth_y))
        right_lip = flow_at(clip, (look.centre_x + look.mouth_width, look.mouth_y))
        brow = flow_at(clip, (look.eyes_x[0] + 0.02, look.brow_y))
        chin = flow_at(clip, (look.centre_x, look.mouth_y + 0.035))
        if clip.label == Emotion.NEGATIVE:
            assert brow[1] > 0.7 and brow[0] > 0.3
            assert left_lip[1] > 0.7 and right_lip[1] > 0.7
        elif clip.label == Emotion.POSITIVE:
            assert left_lip[1] < -0.7 and right_lip[1] < -0.7
            assert left_lip[0] < -0.5 and right_lip[0] > 0.5
            assert abs(brow[1]) < 0.2
        else:
            assert brow[1] < -0.7
            assert chin[1] > 0.7


def test_motion_is_largest_at_the_apex_and_ends_at_the_offset() -> None:
    """Motion is zero at the onset, largest at the apex and gone at the offset."""
    clip = plan_clips("casme2", subjects=1, clips=2, seed=0, image_size=96)[0]
    assert not true_flow(clip, clip.onset).any()
    # less the sway of the head, which goes on all the time
    sizes = [
        np.abs((flow := true_flow(clip, frame)) - flow[2, 2]).max() for frame in range(clip.onset, clip.offset + 1)
    ]
    assert clip.onset + int(np.argmax(sizes)) == clip.apex
    assert sizes[-1] < 1e-4
    steps = np.abs(np.diff(sizes))
    assert steps.max() < 0.6 * max(sizes)


def test_true_flow_says_where_each_point_went() -> None:
    """The true flow says where each point of the resting face went."""
    clip = plan_clips("samm", subjects=1, clips=2, seed=0, image_size=160)[0]
    backward = backward_field(expression(clip.look, clip.label, clip.style), 160, clip.amplitude, (0.2, -0.1))
    flow = forward_flow(backward)
    assert 1.0 < np.abs(flow).max() < 4.0
    # u(p) = b(p + u(p)), with b in closed form at p + u
    y, x = 60, 50
    moved = np.array([x, y]) + flow[y, x]
    corner = np.floor(moved).astype(int)
    part = moved - corner
    patch = backward[corner[1] : corner[1] + 2, corner[0] : corner[0] + 2]
    rows = patch[0] * (1 - part[1]) + patch[1] * part[1]
    np.testing.assert_allclose(rows[0] * (1 - part[0]) + rows[1] * part[0], flow[y, x], atol=0.02)


def test_the_face_crop_holds_brows_eyes_and_lips() -> None:
    for clip in plan_clips("casme2", subjects=8, clips=2, seed=3, image_size=160):
        crop = face_crop(clip.landmarks, (160, 160))
        look = clip.look
        for x, y in ((look.eyes_x[0] - 0.07, look.brow_y - 0.02), (look.eyes_x[1] + 0.07, look.mouth_y + 0.06)):
            assert crop.left < x * 160 < crop.left + crop.side
            assert crop.top < y * 160 < crop.top + crop.side
