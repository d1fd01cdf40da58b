"""``htnet predict`` answers as training would, names what is wrong with a clip, and goes on."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model
from PIL import Image
from test_htnet_adapters import clips, placed, read
from test_htnet_video import write as write_video

from dali_pipelines import load_set, open_resident
from htnet.config import DataConfig, PrepareConfig
from htnet.data.extraction import EXTRACTION_VERSION, extract, recipe_of
from htnet.data.faces.landmarks import read_landmarks
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate
from htnet.model_folder import TrainedOn, save_model
from launch.cli import main

CLIPS = 4
MJPEG = ("mjpeg", "yuvj420p")
COLUMNS = ("frames", "dataset", "subject", "clip", "onset", "apex", "offset", "fps")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "raw"
    generate(folder, datasets=["casme2"], subjects=1, clips=CLIPS, seed=5)
    return folder / "casme2"


@pytest.fixture(scope="module")
def store(raw, tmp_path_factory):
    """The raw clips as ``htnet prepare`` makes a store of them."""
    entries = labelled(raw)
    found = extract(entries, PrepareConfig())
    return write_store(tmp_path_factory.mktemp("store") / "store", found.samples, recipe_of(PrepareConfig()))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


def labelled(raw: Path):
    return placed(clips(read(raw, "casme2")), read_landmarks(raw / "landmarks.csv"))


def make_model(path: Path, **changes) -> Path:
    network, config, facts = small_model()
    recipe = {**recipe_of(PrepareConfig()), "extraction_version": EXTRACTION_VERSION}
    save_model(path, network.state_dict(), config, replace(facts, **{"recipe": recipe} | changes))
    return path


def write_table(path: Path, entries) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for entry in entries:
            names = (entry.id.dataset, entry.id.subject, entry.id.clip)
            writer.writerow([entry.frames.absolute(), *names, entry.onset, entry.apex, entry.offset, entry.fps])
    return path


def answers_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def run(model: Path, *inputs: object, out: Path, landmarks: Path) -> int:
    names = [str(item) for item in inputs]
    return main(["predict", str(model), *names, "--out", str(out), "--landmarks", str(landmarks), "--detector", "none"])


def test_a_clip_is_predicted_as_prepare_and_the_model_do(raw, store, model, tmp_path):
    """Bit for bit, alone or among others."""
    entries = labelled(raw)
    together, alone = tmp_path / "together", tmp_path / "alone"
    table = write_table(tmp_path / "all.csv", entries)
    assert run(model, table, out=together, landmarks=raw / "landmarks.csv") == 0
    assert run(model, write_table(tmp_path / "one.csv", entries[2:3]), out=alone, landmarks=raw / "landmarks.csv") == 0
    answers = answers_of(together)
    assert len(answers) == len(entries) == CLIPS
    assert answers_of(alone) == [answers[2] | {"picture": "pictures/0001.jpg"}]
    network, _, facts = small_model()
    options = {"mosaic_size": 28, "device": torch.device("cpu"), "threads": 1, "data": DataConfig()}
    rows = range(CLIPS)
    batch = load_set(open_resident(store, rows, **options), rows, facts.transform)
    filled = torch.cat([batch.images, torch.zeros(64 - CLIPS, 3, 28, 28)])
    with torch.no_grad():
        expected = network.eval()(filled)[:CLIPS].double().softmax(dim=-1)
    by_clip = {Path(answer["input"]).name: list(answer["probabilities"].values()) for answer in answers}
    for sample, probabilities in zip(store.samples, expected.tolist(), strict=True):
        assert by_clip[sample.id.clip] == probabilities
    assert list(answers[0]["regions"]) == ["left_eye", "right_eye", "left_lip", "right_lip"]


def test_a_clip_without_an_answer_stops_no_other(raw, model, tmp_path, capsys):
    entries = labelled(raw)[:1]
    table = write_table(tmp_path / "one.csv", entries)
    empty = tmp_path / "empty"
    empty.mkdir()
    inputs = (tmp_path / "nowhere.mp4", table, empty)
    assert run(model, *inputs, out=tmp_path / "out", landmarks=raw / "landmarks.csv") == 1
    missing, good, bare = answers_of(tmp_path / "out")
    assert missing["error"] == f"{tmp_path / 'nowhere.mp4'}: no such file or folder"
    assert "holds no frames" in bare["error"]
    assert good["predicted"] in good["probabilities"]
    printed = capsys.readouterr()
    assert "1 of 3 clips" in printed.out
    assert len(printed.err.splitlines()) == 2


def test_each_bad_clip_is_one_line_and_the_rest_is_answered(raw, model, tmp_path, monkeypatch, capsys):
    entry = labelled(raw)[0]
    frames = sorted(entry.frames.iterdir())
    header, first, *_ = (raw / "landmarks.csv").read_text().splitlines()
    numbers = first.split(",")[3:]
    sources = {name: tmp_path / name for name in ("one", "sizes", "noise.mp4", "cut.avi", "good")}
    for name in ("one", "sizes", "good"):
        sources[name].mkdir()
    shutil.copy(frames[0], sources["one"] / frames[0].name)
    for picture in frames:
        shutil.copy(picture, sources["sizes"] / picture.name)
        shutil.copy(picture, sources["good"] / picture.name)
    whole = Image.open(frames[-1])
    whole.resize((whole.width // 2, whole.height // 2)).save(sources["sizes"] / frames[-1].name)
    sources["noise.mp4"].write_bytes(bytes(range(256)) * 64)
    write_video(sources["cut.avi"], [np.asarray(Image.open(picture).convert("RGB")) for picture in frames], *MJPEG)
    content = sources["cut.avi"].read_bytes()
    sources["cut.avi"].write_bytes(content[: len(content) // 2])
    lines = [{"frames": str(path), "dataset": "own", "subject": "p1", "clip": name} for name, path in sources.items()]
    table = tmp_path / "landmarks.csv"
    table.write_text("\n".join([header, *(",".join(["own", "p1", name, *numbers]) for name in sources)]) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    assert run(model, "-", out=tmp_path / "out", landmarks=table) == 1
    errors = [answer.get("error") or "" for answer in answers_of(tmp_path / "out")]
    for error, words in zip(
        errors,
        (
            "no frame after onset",
            "(80, 80)",
            "noise.mp4: not a readable video",
            "cut.avi: the video is damaged: it cannot be decoded from frame",
            "",
        ),
        strict=True,
    ):
        assert words in error
    assert errors[-1] == ""
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_two_pictures_are_onset_and_apex(raw, model, tmp_path, monkeypatch):
    """Named by a table or JSON lines; the same pictures in a folder give the same answer."""
    (entry,) = labelled(raw)[:1]
    frames = entry.open_frames()._paths
    names = {"dataset": entry.id.dataset, "subject": entry.id.subject, "clip": entry.id.clip, "fps": entry.fps}
    pair = {"onset_picture": str(frames[entry.onset].absolute()), "apex_picture": str(frames[entry.apex].absolute())}
    folder = {"frames": str(entry.frames.absolute()), "onset": entry.onset, "apex": entry.apex}
    lines = "".join(json.dumps(names | keys) + "\n" for keys in (pair, folder | {"clip": entry.id.clip}))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines.splitlines()[0] + "\n"))
    assert run(model, "-", out=tmp_path / "pair", landmarks=raw / "landmarks.csv") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(lines.splitlines()[1] + "\n"))
    assert run(model, "-", out=tmp_path / "folder", landmarks=raw / "landmarks.csv") == 0
    (one,), (other,) = answers_of(tmp_path / "pair"), answers_of(tmp_path / "folder")
    assert one["probabilities"] == other["probabilities"]
    assert (one["onset"], one["apex"]) == (1, 2)


def test_models_answer_for_people_that_they_have_not_seen(raw, tmp_path):
    entries = labelled(raw)
    table = write_table(tmp_path / "all.csv", entries)
    folder = tmp_path / "models"
    person = f"{entries[0].id.dataset}/{entries[0].id.subject}"
    seen = TrainedOn(stores=(), subjects=(person,), samples={})
    make_model(folder / "a", trained_on=seen)
    make_model(folder / "b", trained_on=replace(seen, subjects=()))
    landmarks = raw / "landmarks.csv"
    assert run(folder, table, out=tmp_path / "both", landmarks=landmarks) == 0
    assert run(folder / "b", table, out=tmp_path / "b", landmarks=landmarks) == 0
    assert run(folder / "a", table, out=tmp_path / "a", landmarks=landmarks) == 0
    assert [one["probabilities"] for one in answers_of(tmp_path / "both")] == [
        one["probabilities"] for one in answers_of(tmp_path / "b")
    ]
    assert all("the person was seen in training" in one["warnings"] for one in answers_of(tmp_path / "a"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "standard input, line 1: not JSON"),
        ('{"frame": "a"}', "standard input, line 1: frame: Extra inputs are not permitted; known are frames"),
        ('{"frames": "a", "apex_picture": "b", "onset_picture": "c"}', "a clip is either frames, or onset_picture"),
        ('{"frames": "a", "onset": 5, "apex": 5}', "frame numbers must rise, onset < apex < offset, got 5, 5"),
        ('{"frames": "a", "fps": 0}', "fps: Input should be greater than 0"),
    ],
)
def test_a_line_of_another_form_is_bad_input(model, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    assert main(["predict", str(model), "-", "--out", str(tmp_path / "out"), "--detector", "none"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_lonely_picture_and_another_flow_are_bad_input(model, tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--detector", "none"]
    assert main(["predict", str(model), "onset.png", *options]) == 2
    assert "a picture needs another one after it" in capsys.readouterr().err
    recipe = recipe_of(PrepareConfig())
    other = make_model(tmp_path / "other", recipe={**recipe, "flow": {**recipe["flow"], "tau": 0.5}})
    assert main(["predict", str(other), str(tmp_path), *options]) == 2
    assert "trained on flow with tau=0.5; this htnet has 0.25" in capsys.readouterr().err
