"""``htnet inspect`` draws what the store holds and what a fold trains on, and refuses bad input in one line."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import random_samples
from matplotlib.image import imread

from htnet.config import MagnifyConfig, RotateConfig
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from launch import cli
from launch.commands import inspect_store as inspect
from launch.commands.inspect_store import STRETCHED, _sheet, _views, pick_rows
from launch.report.pictures import flow_colours

RED, CYAN = (1.0, 0.0, 0.0), (0.0, 1.0, 1.0)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def with_frames(path: Path, *, apex: bytes | None = None) -> Store:
    """Seven samples with pictures."""
    rng = np.random.default_rng(0)
    faces = [cv2.imencode(".jpg", rng.integers(0, 256, (40, 40), np.uint8))[1].tobytes() for _ in range(2)]
    frames = (("onset.jpg", faces[0]), ("apex.jpg", faces[1] if apex is None else apex))
    items = [replace(item, frames=frames) for item in random_samples(datasets=("samm",), subjects=2)]
    return write_store(path, iter(items), {"sources": "random"})


def test_many_samples_go_on_several_sheets(tiny_store, tmp_path, capsys):
    code, out, _ = run(capsys, tiny_store.path, "--samples", 10, "--out", tmp_path / "new" / "pictures")
    assert code == 0
    sheets = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == ["samples_01.png", "samples_02.png"]
    assert all(f"written: {sheet}" in out for sheet in sheets)
    first, second = map(imread, sheets)
    assert first.shape[0] > 2 * second.shape[0]  # eight rows, two rows
    assert first.shape[1] == second.shape[1]


def test_onset_and_apex_are_drawn_where_they_are_stored(tiny_store, tmp_path, capsys):
    stored = with_frames(tmp_path / "store")
    widths = []
    for place, store in enumerate((tiny_store, stored)):
        out = tmp_path / str(place)
        assert run(capsys, store.path, "--samples", 2, "--out", out)[0] == 0
        widths.append(imread(out / "samples_01.png").shape[1])
    assert widths[1] > 1.3 * widths[0]


def test_the_seed_decides_the_pictures(tiny_store, tmp_path, capsys):
    """The same seed gives the same pictures, and another seed gives others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(capsys, tiny_store.path, "--samples", 3, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (imread(tmp_path / name / "samples_01.png") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_samples_are_spread_evenly_over_classes():
    """Samples are spread evenly over classes, as far as there are any."""
    labels = [0] * 20 + [1] * 20 + [2]
    rows = pick_rows(labels, 9, seed=0)
    assert [labels[row] for row in rows] == [0] * 4 + [1] * 4 + [2]
    assert len(set(rows)) == 9
    assert pick_rows(labels, 100, seed=0) == list(range(41))


def test_a_store_with_too_few_samples_is_drawn_whole(tmp_path, capsys):
    """A store with fewer samples than asked for is drawn whole."""
    store = with_frames(tmp_path / "store")
    code, out, _ = run(capsys, store.path, "--samples", 50, "--out", tmp_path / "out")
    assert code == 0
    assert f"the store holds {len(store.rows)} samples: all are drawn" in out


def test_the_colour_tells_direction_and_speed():
    flow = np.array([[[2, 0], [-2, 0], [0, 0], [1, 0], [0, -2]]], np.float32)
    right, left, still, slow, up = flow_colours(flow, largest=2.0)[0]
    assert right == pytest.approx(RED, abs=1e-5)
    assert left == pytest.approx(CYAN, abs=1e-5)
    assert still == pytest.approx((1, 1, 1))
    assert slow == pytest.approx((1, 0.5, 0.5), abs=1e-5)
    assert up == pytest.approx((0.5, 1, 0), abs=1e-5)  # y points down: a raised brow is green


def test_published_pictures_are_shown_around_their_median(tmp_path):
    """Published pictures are shown around their median, and only mirrored and cut elsewhere."""
    scaled = {"sources": [{"adapter": "htnet_release", "flow": {"scaling": "min-max per channel to 0..255"}}]}
    store = write_store(tmp_path / "store", random_samples(datasets=("samm",), subjects=2), scaled)
    (said,) = [text.get_text() for text in _sheet(store, list(_views(store, [0, 1], seed=0))).texts]
    assert said == "u and v stretched channel by channel, shown around the median"
    assert (STRETCHED.rotate, STRETCHED.magnify) == (RotateConfig(), MagnifyConfig())


def test_flow_in_pixels_is_shown_as_such(tmp_path):
    """Flow in pixels is shown as such beside published pictures."""
    scaled = {"sources": [{"adapter": "htnet_release", "flow": {"scaling": "min-max per channel to 0..255"}}]}
    first, *others = random_samples(datasets=("samm",), subjects=2)
    made = replace(first, sample=replace(first.sample, onset=1))
    store = write_store(tmp_path / "store", iter([made, *others]), scaled)
    assert [view.stretched for view in _views(store, [0, 1], seed=0)] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", 0), "--samples must be at least 1, got 0"),
        (("--seed", -1), "--seed must not be negative, got -1"),
    ],
)
def test_bad_numbers_are_refused_in_one_line(tiny_store, tmp_path, capsys, arguments, message):
    code, _, err = run(capsys, tiny_store.path, *arguments, "--out", tmp_path / "out")
    assert (code, err) == (2, f"htnet inspect: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_bad_store_is_refused_in_one_line_and_leaves_no_folder(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "none", "--out", tmp_path / "out")
    assert (code, err) == (2, f"htnet inspect: {tmp_path / 'none'}: no such store; make it with htnet prepare\n")
    broken = with_frames(tmp_path / "store", apex=b"\xff\xd8\xff cut off")
    code, _, err = run(capsys, broken.path, "--out", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert "apex.jpg of samm/" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_content_or_a_file_is_never_written_to(tiny_store, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    taken = tmp_path / "full" / "notes.txt"
    taken.write_text("mine")
    for out in (tmp_path / "full", taken):
        code, _, err = run(capsys, tiny_store.path, "--out", out)
        assert (code, err) == (2, f"htnet inspect: {out}: is there already; remove it or choose another --out\n")
    assert taken.read_text() == "mine"
    assert list((tmp_path / "full").iterdir()) == [taken]


def test_pictures_appear_all_together_or_not_at_all(tiny_store, tmp_path, capsys, monkeypatch):
    drawn = []

    def sheet(*arguments):
        drawn.append([path.name for path in tmp_path.glob("*.png")] + [path.name for path in tmp_path.glob("out")])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return _sheet(*arguments)

    monkeypatch.setattr(inspect, "_sheet", sheet)
    arguments = (tiny_store.path, "--samples", 10, "--out", tmp_path / "out")
    assert run(capsys, *arguments)[:2] == (1, "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # empty, it may be there
    assert run(capsys, *arguments)[0] == 0
    assert drawn == [[], [], ["out"], ["out"]]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_killed_writers_alone_are_removed(tiny_store, tmp_path, capsys):
    """The folder that a killed writer left is removed, and that of a living one stays."""
    killed, alive, other = (tmp_path / f".{name}.tmp" for name in (f"out.{'0' * 32}", f"out.{'1' * 32}", "out.mine"))
    for folder in (killed, alive, other):
        folder.mkdir()
        (folder / "samples_01.png").touch()
    lock = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(capsys, tiny_store.path, "--samples", 1, "--out", tmp_path / "out")[0] == 0
    finally:
        os.close(lock)
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, tmp_path / "out"])


def test_pictures_can_go_into_the_working_folder(tiny_store, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(capsys, tiny_store.path, "--samples", 1, "--out", ".")[0] == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["samples_01.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tiny_store, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def sheet(*arguments):
        out.mkdir()
        (out / "mine").touch()
        return _sheet(*arguments)

    monkeypatch.setattr(inspect, "_sheet", sheet)
    code, _, err = run(capsys, tiny_store.path, "--samples", 1, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{out}: cannot be replaced by the data: " in err
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [out]
