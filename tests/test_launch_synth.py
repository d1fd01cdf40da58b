"""``htnet synth`` and what prepare makes of it: every planted trap is named, every other clip is there and right."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

import launch.commands.prepare
from htnet.config import PrepareConfig, SourceConfig
from htnet.data.datasets import ADAPTERS
from htnet.data.datasets.base import APEX_NOT_CODED, MISSING_FRAMES
from htnet.data.extraction import Extraction, extract
from htnet.data.plan import Plan, make_plan
from htnet.data.store.reader import open_store
from htnet.data.synth.clips import plan_clips, true_flow
from htnet.data.synth.generate import DATASETS
from htnet.data.synth.layouts.files import write_table
from htnet.data.synth.like import TABLES, read_like
from launch import cli
from launch.cluster import ray_cluster

NO_APEX = ("smic", "casme3_c")
"""Their annotations have none, so that every clip's is found."""


def synth(out: Path, *options: object) -> int:
    return cli.main(["synth", str(out), "--image-size", "64", *map(str, options)])


def refused(capsys, *options: object) -> str:
    capsys.readouterr()
    assert synth(*options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert not Path(str(options[0])).exists()
    return line


def planned(raw: Path, *names: str) -> Plan:
    return make_plan(PrepareConfig(sources=tuple(SourceConfig(adapter=name, root=str(raw / name)) for name in names)))


def made(plan: Plan) -> list[Extraction]:
    settings = PrepareConfig(flow_method="dis", working_size=64)
    return [extract(found, settings) for found in plan.subjects.values()]


# --- traps, layout by layout


FORMS = [
    *((name, ()) for name in DATASETS),
    *((name, ("--xls",)) for name in ("casme2", "casme", "casme3_a")),
    *((name, ("--video",)) for name in ("casme3_a", "csv")),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_adapter_says_what_every_planted_trap_expects(tmp_path, capsys, name, form):
    """Of every planted trap the adapter says what is expected, and it keeps all other clips."""
    raw = tmp_path / "raw"
    assert synth(raw, "--datasets", name, "--subjects", 3, "--clips", 2, "--traps", *form) == 0
    clips = {
        f"{clip.dataset}/{clip.subject}/{clip.clip}": clip
        for clip in plan_clips(name, subjects=3, clips=2, seed=0, image_size=64, traps=True, xls="--xls" in form)
    }
    traps = {
        f"{item['dataset']}/{item['subject']}/{item['clip']}": item
        for item in json.loads((raw / "traps.json").read_text())
    }
    assert len(traps) == sum(clip.trap is not None for clip in clips.values()) > 0
    plan = planned(raw, name)
    gone = {key: (trap["rule"], trap["failed"]) for key, trap in traps.items() if trap["expected"] == "left_out"}
    assert {item.clip: (item.rule, item.failed) for item in plan.left_out} == gone
    kept = {str(entry.id): entry for entry in plan.entries}
    assert kept.keys() == clips.keys() - gone.keys()
    assert {key: entry.label for key, entry in kept.items()} == {key: clips[key].label for key in kept}
    usual = (APEX_NOT_CODED,) if name in NO_APEX else ()
    for key, entry in kept.items():
        rule = traps.get(key, {}).get("rule")
        assert getattr(entry, "notes", ()) == (usual if rule is None else (rule,)), key
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"prepare": {"sources": [{"adapter": name, "root": str(raw / name)}]}}))
    capsys.readouterr()
    assert cli.main(["prepare", str(config), "--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {line.split(": ")[1] for line in told if line.startswith("FAILED: ")} == {k for k, v in gone.items() if v[1]}
    assert {line.split(": ")[1] for line in told if line.startswith("left out: ")} == {
        key for key, (_, failed) in gone.items() if not failed
    }


@pytest.mark.parametrize(("name", "form"), [pair for pair in FORMS if pair[0] != "htnet_release"])
def test_frames_are_those_of_the_clip_whatever_is_annotated(tmp_path, name, form):
    """Onset and apex of the samples are the true ones, or near it where the apex is found."""
    raw = tmp_path / "raw"
    assert synth(raw, "--datasets", name, "--subjects", 2, "--clips", 2, "--traps", *form) == 0
    clips = {
        (clip.subject, clip.clip): clip
        for clip in plan_clips(name, subjects=2, clips=2, seed=0, image_size=64, traps=True, xls="--xls" in form)
    }
    plan = planned(raw, name)
    far = []
    for entries, done in zip(plan.subjects.values(), made(plan), strict=True):
        assert done.left_out == ()
        for entry, item in zip(entries, done.samples, strict=True):
            clip, sample = clips[entry.id.subject, entry.id.clip], item.sample
            # a video counts from 1, and these begin at the onset
            at_onset = name == "casme3_a" or (clip.trap is not None and clip.trap.kind == "no_numbers")
            before = clip.onset - 1 if form == ("--video",) and at_onset else 0
            assert sample.onset == clip.onset - before
            assert sample.offset >= clip.apex - before
            if entry.apex is not None:
                assert sample.apex == clip.apex - before
            else:
                assert clip.onset < sample.apex + before <= clip.offset
                far.append(abs(sample.apex + before - clip.apex))
    # in an MPEG-4 of 64 pixels the codec moves more than the face
    assert (name, form) == ("casme3_a", ("--video",)) or max(far, default=0) <= 2, far


# --- the command line


def test_a_parameter_that_cannot_be_is_one_line(tmp_path, capsys):
    out = tmp_path / "raw"
    known = ", ".join(DATASETS)
    for options, said in (
        (("--datasets", "casme2,casme9"), f"dataset must be one of {known}, got 'casme9'"),
        (("--datasets", "samm,samm"), "datasets must be one or more different names, got ['samm', 'samm']"),
        (("--datasets", ""), f"dataset must be one of {known}, got ''"),
        (("--difficulty", "hard"), "difficulty must be one of easy, realistic, got 'hard'"),
        (("--damaged", "1.5"), "damaged must be in [0, 1], got 1.5"),
        (("--damaged", "nan"), "damaged must be in [0, 1], got nan"),
        (("--image-size", "32"), "image_size must be in 64..1024, got 32"),
        (("--like", tmp_path / "none.csv"), f"{tmp_path / 'none.csv'}: no such table"),
    ):
        assert said in refused(capsys, out, *options)


@pytest.mark.parametrize("options", [("--damaged", "some"), ("--image-size", "big"), ("--subjects", "1.5")])
def test_a_value_that_is_no_number_is_exit_code_2(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as done:
        synth(tmp_path / "raw", *options)
    assert done.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"htnet synth: error: argument {options[0]}: invalid")


def test_every_option_decides_what_is_written(tmp_path, capsys):
    out = tmp_path / "raw"
    options = ("--subjects", 2, "--clips", 2, "--seed", 3, "--difficulty", "realistic", "--damaged", 0.1, "--traps")
    assert synth(out, "--datasets", "csv,casme", *options, "--video", "--xls") == 0
    assert "casme 12 clips, csv 10 clips" in capsys.readouterr().out
    assert json.loads((out / "synth.json").read_text()) == {
        "format": 3, "datasets": ["casme", "csv"], "seed": 3, "image_size": 64, "subjects": 2, "clips": 2,
        "difficulty": "realistic", "traps": True, "damaged": 0.1, "xls": True, "video": True,
    }  # fmt: skip
    assert (out / "casme" / "CASME.xls").is_file()
    assert list((out / "csv" / "clips" / "p01").glob("*.avi"))
    rules = Counter(item["rule"] for item in json.loads((out / "traps.json").read_text()))
    assert rules["unreadable_frames"] == 2


# --- built to a list


SMALL_LIST = [
    ("casme2", "sub04", "EP19_01f", "0"),
    ("casme2", "sub02", "EP01_11f", "2"),
    ("casme2", "sub04", "EP13", "1"),
    ("samm", "6", "006_1_2", "1"),
    ("samm", "10", "010_4_12", "0"),
    ("smic", "s03", "s03_sur_02", "2"),
]


def write_list(path: Path, rows=SMALL_LIST) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def listed(tmp_path: Path, raw: Path, path: Path, capsys) -> list[str]:
    """Return what ``htnet prepare --list`` prints of the three layouts against a list."""
    found = [{"adapter": name, "root": str(raw / name)} for name in ("casme2", "samm", "smic") if (raw / name).is_dir()]
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"prepare": {"sources": found, "official_list": str(path)}}))
    capsys.readouterr()
    assert cli.main(["prepare", str(config), "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def totals(lines: list[str]) -> list[str]:
    """Subjects, samples and clips of each class."""
    [line] = [line for line in lines if line.split()[:1] == ["all"]]
    return line.split()[1:]


def test_datasets_built_to_a_list_agree_with_it(tmp_path, capsys):
    path = write_list(tmp_path / "list.csv")
    raw = tmp_path / "raw"
    assert synth(raw, "--like", path) == 0
    assert "casme2 3 clips, samm 2 clips, smic 1 clips" in capsys.readouterr().out
    lines = listed(tmp_path, raw, path, capsys)
    assert totals(lines) == ["5", "6", "2", "2", "2"]
    assert "official list: agrees" in lines
    other = write_list(tmp_path / "other.csv", [*SMALL_LIST[1:], ("smic", "s03", "s03_ne_01", "0")])
    lines = listed(tmp_path, raw, other, capsys)
    assert "official list: left out of it: smic/s03/s03_ne_01" in lines
    assert "left out by rule: official_list: 2 clips" in lines
    # the list's content is a parameter, its place is not
    assert synth(raw, "--like", write_list(tmp_path / "copy.csv")) == 0
    assert "nothing done" in capsys.readouterr().out
    assert synth(raw, "--like", other) == 2
    assert "holds synthetic data of other parameters" in capsys.readouterr().err


def test_datasets_of_a_list_can_be_chosen(tmp_path, capsys):
    path = write_list(tmp_path / "list.csv")
    assert synth(tmp_path / "raw", "--like", path, "--datasets", "smic") == 0
    assert [folder.name for folder in (tmp_path / "raw").iterdir() if folder.is_dir()] == ["smic"]
    line = refused(capsys, tmp_path / "no", "--like", path, "--datasets", "casme")
    assert line.endswith("dataset must be one of casme2, samm, smic in the list of like, got 'casme'")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], (), "must hold at least one clip, got none"),
        ([("mmew", "S01", "S01-1-1", "0")], (), "row 1: dataset must be one of casme2, samm, smic, got 'mmew'"),
        ([("smic", "s01", "s01_ne_01", "3")], (), "row 1: label must be in 0..2, got 3"),
        ([("smic", "s01", "s02_ne_01", "0")], (), "row 1: must be such as s01, s01_ne_01, got 's01', 's02_ne_01'"),
        ([("samm", "6", "../006_1_2", "0")], (), "row 1: must be such as 6, 006_1_2, got '6', '../006_1_2'"),
        ([("casme2", "1", "EP01_01", "0")], (), "row 1: must be such as sub01, EP02_01f, got '1', 'EP01_01'"),
        (
            [("samm", "6", "006_1_2", "0"), ("samm", "006", "006_1_2", "1")],
            (),
            "row 2: clip samm/006/006_1_2 stands in",
        ),
        (
            [SMALL_LIST[0], ("samm", "6", "006_1_2")],
            (),
            "row 2, column label: must not be empty",
        ),
        (SMALL_LIST, ("--subjects", "2"), "subjects must not be given with like, whose list decides it, got 2"),
        (SMALL_LIST, ("--clips", "2"), "clips must not be given with like"),
        (SMALL_LIST, ("--traps",), "traps must not be asked for with like"),
    ],
)
def test_a_list_that_cannot_be_built_to_is_one_line(tmp_path, capsys, rows, options, said):
    path = write_list(tmp_path / "list.csv", rows)
    assert said in refused(capsys, tmp_path / "raw", "--like", path, *options)


@pytest.mark.slow
def test_the_official_list_is_matched_442_of_442(tmp_path, capsys, shared_data):
    path = shared_data / "megc2019" / "combined_3class_gt.csv"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    raw = tmp_path / "raw"
    assert synth(raw, "--like", path) == 0
    lines = listed(tmp_path, raw, path, capsys)
    assert totals(lines) == ["68", "442", "250", "109", "83"]
    assert "official list: agrees" in lines
    assert not any(line.startswith("FAILED") for line in lines)


# --- built to the owners' annotation


def owners_table(folder: Path, name: str) -> Path:
    """A small annotation of a dataset, with every trap that it knows."""
    assert synth(folder, "--datasets", name, "--subjects", 2, "--clips", 2, "--traps") == 0
    [table] = [path for path in (folder / name).iterdir() if path.name in ADAPTERS[name].workbooks]
    return table


def names(folder: Path) -> set[str]:
    """Names of files without their numbers."""
    return {re.sub(r"\d+", "#", path.name) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TABLES)
def test_frames_for_an_annotation_make_all_that_it_allows(tmp_path, name):
    table = owners_table(tmp_path / "raw", name)
    assert cli.main(["synth", str(tmp_path / "like"), "--like", str(table)]) == 0
    assert (tmp_path / "like" / name / table.name).read_bytes() == table.read_bytes()
    assert names(tmp_path / "like" / name) == names(tmp_path / "raw" / name)
    before, plan = planned(tmp_path / "raw", name), planned(tmp_path / "like", name)
    # frames are all that may have been missing
    assert {item.clip: item.rule for item in plan.left_out} == {
        item.clip: item.rule for item in before.left_out if item.rule != MISSING_FRAMES
    }
    assert {entry.id for entry in before.entries} <= {entry.id for entry in plan.entries}
    done = made(plan)
    assert not any(found.left_out for found in done)
    for entry, item in zip(plan.entries, (item for found in done for item in found.samples), strict=True):
        assert (item.sample.onset, item.sample.label) == (entry.onset, entry.label)
        assert entry.onset < item.sample.apex == (entry.apex or item.sample.apex)
        assert item.flow_image[..., :2].any()


def test_an_annotated_clip_moves_by_its_emotion(tmp_path):
    table = tmp_path / "CASME2-coding-20140508.xlsx"
    header = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Estimated Emotion"]
    rows: list[tuple[list[object], tuple[int, int, int | None]]] = [
        # cells, then onset, apex and label of the motion
        ([10, 20, 30, "happiness"], (10, 20, 1)),
        ([10, 20, 20, "surprise"], (10, 20, 2)),
        ([10, "/", 30, "disgust"], (10, 20, 0)),
        ([10, "/", 11, "repression"], (10, 11, 0)),
        ([10, 20, 3, "Happiness "], (10, 20, 1)),
        ([10, 5, 3, "surprise"], (10, 12, 2)),
        ([10, 5, 30, "others"], (10, 20, None)),
    ]
    write_table(table, [header, *([1, f"EP01_{number:02d}", *cells] for number, (cells, _) in enumerate(rows))])
    clips = plan_clips("casme2", like=read_like(table, None).clips["casme2"], seed=0, image_size=64)
    for clip, (cells, expected) in zip(clips, rows, strict=True):
        assert (clip.onset, clip.apex) == expected[:2]
        assert clip.label == expected[2] or expected[2] is None
        assert {number for number in cells if isinstance(number, int)} <= {*clip.numbers}
        assert {clip.onset, clip.apex} <= {*clip.numbers}
        assert not true_flow(clip, clip.onset).any()
        assert np.abs(true_flow(clip, clip.apex)).max() > 0.5


def test_data_for_an_annotation_are_a_function_of_it(tmp_path, capsys):
    table = owners_table(tmp_path / "raw", "samm")
    assert synth(tmp_path / "a", "--like", table) == synth(tmp_path / "b", "--like", table) == 0
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    )
    assert one == other
    assert synth(tmp_path / "a", "--like", table) == 0
    assert "nothing done" in capsys.readouterr().out
    assert synth(tmp_path / "a", "--like", owners_table(tmp_path / "other", "mmew")) == 2
    assert "holds synthetic data of other parameters" in capsys.readouterr().err


def test_what_cannot_be_done_with_an_annotation_is_one_line(tmp_path, capsys):
    samm, smic = owners_table(tmp_path / "a", "samm"), tmp_path / "b/smic/SMIC-HS-E_annotation.xlsx"
    assert synth(tmp_path / "b", "--datasets", "smic") == 0
    empty = tmp_path / "CASME.xlsx"
    write_table(empty, [["Subject", "Filename", "OnsetF", "ApexF1", "OffsetF", "Emotion"]])
    known = ", ".join(TABLES)
    for options, said in (
        ((smic,), f"or datasets must be one of {known}, got none"),
        ((smic, "--datasets", "smic"), f"or datasets must be one of {known}, got smic"),
        ((samm, "--datasets", "samm,casme2"), f"or datasets must be one of {known}, got samm, casme2"),
        ((samm, "--datasets", "mmew"), "column"),
        ((samm, "--traps"), "traps must not be asked for with like, whose list has no such clips"),
        ((samm, "--damaged", "0.5"), "damaged must not be asked for with like, whose annotation is taken as it is"),
        ((samm, "--xls"), "xls must not be asked for with like, whose annotation is taken as it is"),
        ((samm, "--subjects", "3"), "subjects must not be given with like"),
        ((tmp_path / "no" / samm.name,), "no such"),
        ((empty,), "must hold at least one clip, got none"),
        ((write_list(tmp_path / "l.csv", [("x", "y")]), "--datasets", "samm"), "neither an annotation of samm ("),
    ):
        assert said in refused(capsys, tmp_path / "out", "--like", *options)


@pytest.fixture(scope="module")
def one_ray():
    with ray_cluster(None) as ray:
        yield ray


REAL = [
    ("annotations/CASME2-coding-20140508.xlsx", 255, ()),
    ("annotations/CASME2-coding-20190701.xlsx", 255, ()),
    ("annotations/SAMM_Micro_FACS_Codes_v2.xlsx", 159, ()),
    ("annotations/samm_semicolon.csv", 159, ("--datasets", "samm")),
    ("casme3/CAS(ME)3_part_C_ME.xlsx", 165, ()),
    ("casme3/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", 860, ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rows", "options"), REAL)
def test_the_owners_own_annotations_run_to_a_store(
    tmp_path, capsys, monkeypatch, shared_data, one_ray, file, rows, options
):
    if not (shared_data / file).is_file():
        pytest.skip(f"{shared_data / file} not found")
    monkeypatch.setattr(launch.commands.prepare, "ray_cluster", lambda address, needs: contextlib.nullcontext(one_ray))
    assert cli.main(["synth", str(tmp_path / "raw"), "--like", str(shared_data / file), *options]) == 0
    # what is printed is a whole configuration
    written, told = capsys.readouterr().out.splitlines()
    assert f" {rows} clips, " in written
    plain = yaml.safe_load(told.split(": ", 1)[1])
    plain["prepare"] |= {"working_size": 64, "flow_method": "dis"}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(plain))
    assert cli.main(["prepare", str(config), "--list"]) == 0
    gone = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert cli.main(["prepare", str(config), "--out", str(tmp_path / "store")]) == 0
    assert len(open_store(tmp_path / "store").samples) + len(gone) == rows
    assert all(f"{Path(file).name}, " in line and ", row " in line for line in gone)
