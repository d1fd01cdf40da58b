"""A file or folder appears whole or not at all, whatever its writers die of, and nothing of the dead stays."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from conftest import ROOT

from htnet.errors import DiskFullError, InputError
from htnet.files import (
    full_disk_named,
    locked,
    remove_leftovers,
    set_aside,
    whole_folder,
    write_first,
    write_json,
)

DEAD = f".{'0a' * 16}.tmp"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_in_fsync(program: str) -> None:
    """Run a program that is killed when it wants to make something durable for the first time."""
    head = "import os, signal\nfrom pathlib import Path\nfrom htnet.files import *\n"
    head += "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", head + textwrap.dedent(program)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"old": True})
    killed_in_fsync(f"write_json(Path({str(path)!r}), {{'new': list(range(100000))}})")
    assert json.loads(path.read_text()) == {"old": True}
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)  # the real name of a real left-over, not one that this test made up
    assert names(tmp_path) == ["summary.json"]
    write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"new": 1}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError) as caught:
        write_json(path, 2)
    assert str(caught.value) == f"{path}: no space left on the device"
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "1\n"


def test_a_checkpoint_on_a_full_disk_is_named_as_such(tmp_path):
    """torch.save reports a full disk as ``unexpected pos 704 vs 598``."""
    path = tmp_path / "weights.pt"
    with pytest.raises(DiskFullError) as caught, full_disk_named(path), open("/dev/full", "wb") as file:  # noqa: PTH123
        torch.save({"weights": torch.zeros(1_000_000)}, file)
    assert str(caught.value) == f"{path}: no space left on the device"
    sent = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 # as out of a worker
    assert str(sent) == str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), full_disk_named(path):
        raise RuntimeError("something else")


def test_of_many_first_writers_one_is_the_first(tmp_path):
    path, won = tmp_path / "first", []

    def write(number: int) -> None:
        if write_first(path, str(number)):
            won.append(str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [path.read_text()]
    assert names(tmp_path) == ["first"]


def test_a_file_system_without_hard_links_has_a_first_writer(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    assert write_first(tmp_path / "first", "1")
    assert not write_first(tmp_path / "first", "2")
    assert (tmp_path / "first").read_text() == "1"


def test_damage_is_set_aside_under_the_next_free_name(tmp_path):
    for content in ("one", "two"):
        (tmp_path / "a.json").write_text(content)
        aside = set_aside(tmp_path / "a.json", "a.json is no JSON")
    assert str(aside) == "a.json is no JSON; set aside as a.json.damaged-2"
    (tmp_path / "folder").mkdir()
    assert set_aside(tmp_path / "folder", "damaged").now == "folder.damaged-1"
    assert names(tmp_path) == ["a.json.damaged-1", "a.json.damaged-2", "folder.damaged-1"]
    assert (tmp_path / "a.json.damaged-2").read_text() == "two"


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path):
    """The folder appears at the end and not when its writer fails."""
    with whole_folder(tmp_path / "new", sync=True) as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "1"


def test_a_dead_writers_folder_goes_and_a_living_ones_stays(tmp_path):
    """The next writer removes the work of a killed one, and leaves that of a living one alone."""
    killed_in_fsync(f"""
        with whole_folder(Path({str(tmp_path / "new")!r}), sync=True) as partial:
            (partial / "a").write_text("0")
    """)
    [dead] = tmp_path.iterdir()
    (tmp_path / f".newer{DEAD}").mkdir()  # of another name
    with whole_folder(tmp_path / "new") as first:
        assert not dead.exists()
        with pytest.raises(InputError, match="cannot be replaced"), whole_folder(tmp_path / "new") as second:
            (first / "a").write_text("1")
            (second / "b").write_text("2")
            (tmp_path / "new").write_text("in the way")
        assert (first / "a").exists()
        (tmp_path / "new").unlink()
    assert names(tmp_path / "new") == ["a"]
    assert names(tmp_path) == [f".newer{DEAD}", "new"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_taken_for_a_left_over_is_made_again(tmp_path, monkeypatch, gone: bool):
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


def test_left_overs_follow_the_pattern(tmp_path, monkeypatch):
    """Left-overs have our pattern; where nothing can be locked, only the holder of the lock above removes them."""
    for name in (f".a{DEAD}", f".b*{DEAD}", ".mine.tmp", "b.tmp", ".a.c0ffee.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "b*")
    assert names(tmp_path) == sorted([f".a{DEAD}", ".mine.tmp", "b.tmp", ".a.c0ffee.tmp"])

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    remove_leftovers(tmp_path)
    assert (tmp_path / f".a{DEAD}").exists()
    remove_leftovers(tmp_path, owned=True)
    assert names(tmp_path) == sorted([".mine.tmp", "b.tmp", ".a.c0ffee.tmp"])
    remove_leftovers(tmp_path / "nowhere")


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    lock = tmp_path / ".lock"
    lock.touch()  # what a kill leaves is no obstacle
    with locked(lock, "busy") as unlocked:
        assert unlocked is None
        with pytest.raises(InputError, match="busy"), locked(lock, "busy"):
            pass
        assert lock.exists()
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_where_there_are_no_locks_the_reason_is_handed_on(tmp_path, monkeypatch, code):
    def refuse(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", "busy") as unlocked:
        assert unlocked == os.strerror(code)
