"""Decision after a task's failure, apart from any cluster: try again, elsewhere, later, or give up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NODES_LOST = 10
"""Dead nodes after which a task is given up: it may be the cause of their death."""
PAUSE_SECONDS = 10.0
"""Pause after a task ran out of memory, so that its neighbours can end; it doubles with every attempt."""


class Failure(StrEnum):
    """Causes of a task's failure."""

    WORKER_CRASHED = "its worker died"
    NODE_DEAD = "its node died"
    NODE_UNFIT = "its node is unfit"
    OUT_OF_MEMORY = "out of memory"
    RAISED = "it raised"
    STALLED = "it stalled"
    CLUSTER_GONE = "the cluster is gone"


class Action(StrEnum):
    """Next step for a task that failed."""

    AGAIN = "again"
    ELSEWHERE = "elsewhere"
    WAIT = "wait"
    GIVE_UP = "give up"
    STOP = "stop"
    """End of the work, unfinished; the same command resumes it, and no task is given up."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Failures of one task so far."""

    attempts: int = 0
    """Failures that count as the task's own."""
    nodes_lost: int = 0
    nodes_unfit: int = 0

    def after(self, failure: Failure) -> History:
        """Return the history with one failure more; a node's death or state is not the task's own attempt."""
        return History(
            attempts=self.attempts + (failure not in (Failure.NODE_DEAD, Failure.NODE_UNFIT, Failure.CLUSTER_GONE)),
            nodes_lost=self.nodes_lost + (failure is Failure.NODE_DEAD),
            nodes_unfit=self.nodes_unfit + (failure is Failure.NODE_UNFIT),
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Action, its reason for log and summary, and the seconds to wait before it."""

    action: Action
    reason: str
    seconds: float = 0.0


def decide(failure: Failure, detail: str, history: History, *, retries: int, fit_node_left: bool) -> Decision:
    """Decide about a task that has just failed.

    Args:
        failure: the cause.
        detail: the cause in words.
        history: failures of the task, this one included.
        retries: times that a task may be tried again after failures of its own.
        fit_node_left: True if a node that this task does not avoid could hold it.

    Returns:
        The action; GIVE_UP after at most ``retries`` + 1 attempts, NODES_LOST dead nodes, or when no fit node is left.
    """
    if failure is Failure.CLUSTER_GONE:
        return Decision(action=Action.STOP, reason=detail)
    if failure is Failure.NODE_UNFIT:
        if fit_node_left:
            return Decision(action=Action.ELSEWHERE, reason=detail)
        return Decision(action=Action.GIVE_UP, reason=f"no node is fit: {detail}")
    if failure is Failure.NODE_DEAD:
        if history.nodes_lost < NODES_LOST:
            return Decision(action=Action.AGAIN, reason=detail)
        return Decision(action=Action.GIVE_UP, reason=f"gave up after {history.nodes_lost} dead nodes: {detail}")
    if history.attempts > retries:
        return Decision(action=Action.GIVE_UP, reason=f"gave up after {history.attempts} attempts: {detail}")
    if failure is Failure.OUT_OF_MEMORY:
        return Decision(action=Action.WAIT, reason=detail, seconds=PAUSE_SECONDS * 2 ** (history.attempts - 1))
    return Decision(action=Action.AGAIN, reason=detail)
