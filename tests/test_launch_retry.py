"""The decision after a failure, as a table, and two laws that hold for any sequence of failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.retry import NODES_LOST, Action, Failure, History, decide

OWN = (Failure.WORKER_CRASHED, Failure.OUT_OF_MEMORY, Failure.RAISED, Failure.STALLED)


@pytest.mark.parametrize(
    ("failure", "history", "left", "action", "reason"),
    [
        (Failure.WORKER_CRASHED, History(attempts=1), True, Action.AGAIN, "x"),
        (Failure.WORKER_CRASHED, History(attempts=3), True, Action.GIVE_UP, "gave up after 3 attempts: x"),
        (Failure.RAISED, History(attempts=2), True, Action.AGAIN, "x"),
        (Failure.STALLED, History(attempts=2), False, Action.AGAIN, "x"),
        (Failure.OUT_OF_MEMORY, History(attempts=1), True, Action.WAIT, "x"),
        (Failure.OUT_OF_MEMORY, History(attempts=3), True, Action.GIVE_UP, "gave up after 3 attempts: x"),
        (Failure.NODE_DEAD, History(nodes_lost=1, attempts=2), True, Action.AGAIN, "x"),
        (
            Failure.NODE_DEAD,
            History(nodes_lost=NODES_LOST),
            True,
            Action.GIVE_UP,
            f"gave up after {NODES_LOST} dead nodes: x",
        ),
        (Failure.NODE_UNFIT, History(nodes_unfit=50), True, Action.ELSEWHERE, "x"),
        (Failure.NODE_UNFIT, History(nodes_unfit=1), False, Action.GIVE_UP, "no node is fit: x"),
        (Failure.CLUSTER_GONE, History(attempts=9), True, Action.STOP, "x"),
    ],
)
def test_the_table_of_decisions(failure, history, left, action, reason):
    decision = decide(failure, "x", history, retries=2, fit_node_left=left)
    assert (decision.action, decision.reason) == (action, reason)
    assert (decision.seconds > 0) == (action is Action.WAIT)


@given(st.lists(st.sampled_from(Failure)), st.integers(0, 5), st.integers(1, 6))
def test_every_task_ends(failures, retries, nodes):
    """The attempts of its own are bounded by the retries, those that nodes spoil by the nodes."""
    history = History()
    for number, failure in enumerate(failures, start=1):
        history = history.after(failure)
        decision = decide(failure, "x", history, retries=retries, fit_node_left=history.nodes_unfit < nodes)
        if decision.action in (Action.GIVE_UP, Action.STOP):
            break
        assert number <= retries + (NODES_LOST - 1) + (nodes - 1)
        assert history.attempts <= retries


@given(st.lists(st.sampled_from((Failure.NODE_DEAD, Failure.NODE_UNFIT)), max_size=NODES_LOST - 1))
def test_nodes_do_not_use_up_the_attempts_of_a_task(failures):
    history = History()
    for failure in failures:
        history = history.after(failure)
    decision = decide(Failure.RAISED, "x", history.after(Failure.RAISED), retries=1, fit_node_left=True)
    assert decision.action is Action.AGAIN


@given(st.lists(st.sampled_from(OWN), min_size=3, max_size=3))
def test_a_poisoned_task_is_given_up_after_its_retries(failures):
    history = History()
    for failure in failures:
        history = history.after(failure)
    assert decide(failures[-1], "x", history, retries=2, fit_node_left=True).action is Action.GIVE_UP
