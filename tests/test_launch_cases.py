"""Inputs of real users that once failed, through the command line; skipped where they are absent.

Each case is a folder ``NN-...`` with a configuration; variants of its kind are in the tests of the reader concerned.
Case 12, a start in an odd environment, needs none of the folder: ``test_launch_prepare.py`` has it.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import launch.commands.prepare
from htnet.data.store.reader import open_store
from launch import cli
from launch.cluster import ray_cluster


@pytest.fixture
def case(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Go to a copy of a case, by the number that its name begins with."""

    def enter(number: str) -> Path:
        found = sorted((shared_data.parent / "cases").glob(f"{number}-*"))
        if not found:
            pytest.skip(f"case {number} not found beside {shared_data}")
        copy = Path(shutil.copytree(found[0], tmp_path / "case", copy_function=shutil.copyfile))
        for folder in (copy, *copy.rglob("*")):
            folder.chmod(0o755 if folder.is_dir() else 0o644)
        monkeypatch.chdir(copy)
        return copy

    return enter


@pytest.fixture(scope="module")
def one_ray():
    """One Ray for the cases whose frames matter."""
    with ray_cluster(None) as ray, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.commands.prepare, "ray_cluster", lambda address, needs: contextlib.nullcontext(ray))
        yield


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``htnet prepare c.yaml``."""
    capsys.readouterr()
    code = cli.main(["prepare", "c.yaml", *arguments])
    return code, *capsys.readouterr()


def counts(printed: str) -> list[str]:
    """Subjects, samples and samples of each class."""
    (line,) = [line for line in printed.splitlines() if line.split()[:1] == ["all"]]
    return line.split()[1:]


@pytest.mark.parametrize(
    ("number", "expected", "said"),
    [
        (
            "01",
            ["1", "1", "0", "0", "1"],
            ["left out by rule: official_list: 1 clips", "left out: casme2/sub05/EP09_05f"],
        ),
        ("02", ["2", "3", "1", "1", "1"], []),
        ("03", ["1", "1", "1", "0", "0"], []),
        ("07", ["2", "3", "1", "1", "1"], []),
        ("08", ["2", "2", "1", "1", "0"], ["landmarks: own: table landmarks.csv 2"]),
        ("09", ["2", "2", "1", "1", "0"], []),
        ("11", ["1", "1", "1", "0", "0"], []),
    ],
)
def test_a_table_of_a_real_user_is_read(case, capsys, number, expected, said):
    case(number)
    code, out, err = run(capsys, "--list")
    assert (code, err, counts(out)) == (0, "", expected)
    assert all(line in out for line in said)
    assert "apex_not_coded" not in out or number == "09"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("04", "points.csv: 98 points, 0 to 97; 68 are expected"),
        ("06", "20140508.xlsx, sheet 'Sheet', row 2, column Filename: must be a name, got the date 2014-03-01"),
    ],
)
def test_a_table_of_a_real_user_is_refused_on_one_line(case, capsys, number, said):
    case(number)
    code, out, err = run(capsys, "--list")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_list_named_by_its_key_decides_too(case, capsys):
    folder = case("01")
    (folder / "gt.csv").rename(folder / "official.csv")
    code, out, _ = run(capsys, "--list", "--set", "prepare.official_list=official.csv")
    assert (code, counts(out)) == (0, ["1", "1", "0", "0", "1"])
    assert "official list: official.csv decides" in out


def test_a_damaged_frame_of_a_video_leaves_its_clip_out(case, capsys, one_ray):
    folder = case("05")
    code, out, _ = run(capsys, "--out", "store")
    assert code == 1
    assert "left out by rule: unreadable_frames: 1 clips" in out
    assert "FAILED: own/p01/take01" in out
    assert [str(sample.id) for sample in open_store(folder / "store").samples] == ["own/p02/take01"]


def test_an_apex_that_shows_the_onset_is_told_of(case, capsys, one_ray):
    folder = case("10")
    code, out, _ = run(capsys, "--out", "store")
    store = open_store(folder / "store")
    assert code == 0
    assert "read by rule: apex_equals_onset: 1 clips: own/p01/take01" in out
    assert all(store.read_flow(row).any() for row in range(len(store.rows)))
