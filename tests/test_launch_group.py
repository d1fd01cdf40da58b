"""Workers that train together: each has its place, and the loss of one ends the attempt of all with its reason."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from launch.cluster import Needs
from launch.group import Group, Lost


@dataclass(frozen=True, kw_only=True)
class Answer:
    told: list[str] | None = None
    error: str | None = None
    reason: str | None = None


def grouped(ray, task: Callable, workers: int = 2, *, gpus: float = 0.0, stall: float = 0.0, events=None) -> Group:
    return Group(
        ray=ray,
        task=task,
        workers=workers,
        needs=Needs(task="worker", cpus=1.0, gpus=gpus, cpus_key="cpus", gpus_key="gpus"),
        stall_seconds=stall,
        progress=lambda: None,
        on_look=lambda: None,
        on_event=lambda kind, **facts: None if events is None else events.append((kind, facts)),
        on_interrupt=lambda: 0.0,
    )


def test_each_worker_has_a_gpu_of_its_own_and_meets_the_others(ray):
    def task(spec, world):
        return Answer(told=world.collect(f"{spec} {world.rank} {os.environ['CUDA_VISIBLE_DEVICES']}"))

    told = grouped(ray, task, gpus=1.0).run("rank").told
    assert [line.rpartition(" ")[0] for line in told] == ["rank 0", "rank 1"]
    assert {line.rpartition(" ")[2] for line in told} == {"0", "1"}


def test_a_dead_worker_ends_the_attempt_of_all(ray):
    """The one that waits for it would wait for ever."""

    def task(spec, world):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.collect(None)
        return Answer()

    end = grouped(ray, task).run(None)
    assert isinstance(end, Lost)
    assert "died" in end.reason


@pytest.mark.parametrize(("answer", "lost"), [({"error": "no luck"}, True), ({"reason": "never"}, False)])
def test_a_failure_of_one_is_the_end_of_all(ray, answer, lost):
    """An error may go away at another attempt; a reason stays."""

    def task(spec, world):
        if world.rank == 1:
            return Answer(**answer)
        time.sleep(60)
        return Answer()

    end = grouped(ray, task).run(None)
    assert end == (Lost(reason="no luck") if lost else Answer(reason="never"))


def test_workers_without_a_word_are_given_up(ray):
    def task(spec, world):
        time.sleep(60)
        return Answer()

    assert grouped(ray, task, stall=1.0).run(None) == Lost(reason="no step for 1 s")


def test_a_group_waits_for_room_and_says_so(ray, monkeypatch):
    """All places at once: half a group would wait for the other half with its places taken."""
    monkeypatch.setattr("launch.group.ROOM_SECONDS", 0.5)
    events: list[tuple[str, dict]] = []

    @ray.remote(num_cpus=3)
    class Other:
        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    gone = threading.Timer(3.0, lambda: ray.kill(other))
    gone.start()
    end = grouped(ray, lambda spec, world: Answer(told=world.collect("here")), events=events).run(None)
    gone.join()
    assert end.told == ["here", "here"]
    assert [kind for kind, _ in events] == ["waiting_for_room"]
