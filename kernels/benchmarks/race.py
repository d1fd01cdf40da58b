"""The one runner of benchmarks: samples in turn, under a clock that says what is measured and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["OVER", "Clock", "race"]

OVER: Final = "not begun: the time allowed for this run was over"


class Clock:
    """The time that a measurement may take, from its start on; tells its progress to ``say``."""

    def __init__(
        self, seconds: float | None = None, *, steps: int = 1, say: Callable[[str], object] = lambda text: None
    ) -> None:
        self.steps = steps
        self.say = say
        self._start = time.monotonic()
        self._end = None if seconds is None else self._start + seconds
        self._begun = 0

    def left(self) -> float | None:
        """Return the seconds that are left, 0 at least; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def over(self) -> bool:
        """Return True where nothing more is to be begun."""
        return self.left() == 0.0

    def begin(self, step: str) -> None:
        """Say which step begins, and from the second on about how long the rest will take, at the pace so far."""
        text = f"[{self._begun + 1} of {self.steps}] {step}"
        if self._begun:
            pace = (time.monotonic() - self._start) / self._begun
            text += f"; about {_duration(pace * (self.steps - self._begun))} to go"
        self._begun += 1
        self.say(text)

    def share(self) -> Clock:
        """Return a clock for the step that has begun: an even part of what is left for it and those behind it."""
        left = self.left()
        return Clock(None if left is None else left / max(1, self.steps - self._begun + 1), say=self.say)


def race(
    samplers: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    clock: Clock,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Take up to ``rounds`` samples of each, in turn and in an order that is reversed from round to round.

    What else the machine does then hits all alike. ``prepare`` runs before each round. No sample is begun when the
    clock is over, and one that raises TimeoutError ends the race; who has none by then was not measured.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.monotonic()
    for number in range(rounds):
        if clock.over():
            break
        prepare()
        for name in list(samplers)[:: 1 if number % 2 else -1]:
            if clock.over():
                break
            try:
                samples[name].append(samplers[name]())
            except TimeoutError:
                return samples
        if number == 0 and rounds > 1:
            clock.say(f"  {rounds - 1} more rounds, about {_duration((time.monotonic() - start) * (rounds - 1))}")
    return samples


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
