"""A folder appears whole or not at all, whatever other writers do."""

from __future__ import annotations

import fcntl
import shutil

import pytest

from htnet.errors import InputError
from htnet.whole_folder import whole_folder


def test_the_folder_appears_at_the_end_and_not_when_its_writer_fails(tmp_path) -> None:
    with whole_folder(tmp_path / "new") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "1"


def test_what_a_killed_writer_left_is_removed_but_not_the_work_of_one_that_lives(tmp_path) -> None:
    dead = tmp_path / f".new.{'0a' * 16}.tmp"
    dead.mkdir()
    with whole_folder(tmp_path / "new") as first:
        assert not dead.exists()
        with pytest.raises(InputError, match="cannot be replaced"), whole_folder(tmp_path / "new") as second:
            (first / "a").write_text("1")
            (second / "b").write_text("2")
            (tmp_path / "new").write_text("in the way")
        assert (first / "a").exists()
        (tmp_path / "new").unlink()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_writer_whose_new_folder_another_took_for_an_abandoned_one_takes_a_new_one(
    tmp_path, monkeypatch, gone: bool
) -> None:
    """Between the folder and its lock, the other holds the lock, or has removed the folder already."""
    lock, tries = fcntl.flock, []

    def taken(file: int, how: int) -> None:
        tries.append(file)
        if len(tries) > 1:
            return lock(file, how)
        if not gone:
            raise BlockingIOError
        for path in tmp_path.glob(".new.*.tmp"):
            shutil.rmtree(path)
        return None

    monkeypatch.setattr(fcntl, "flock", taken)
    with whole_folder(tmp_path / "new") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "new" / "a").read_text() == "1"
