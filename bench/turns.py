"""Training loops that take their steps, or a few at once, in turn, A B C A B C …, in one process: whatever else the
machine does meets them all alike, which it does not where one runs to its end before the next begins."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

WARM_UP = 3
"""Turns that are not counted."""


def in_turn(ways: Mapping[str, Callable[[Callable[[], None]], object]], steps: int = 1) -> dict[str, list[float]]:
    """CPU seconds of the process for a step, by way and turn, the first turns and the last left out. Each way runs in
    a thread of its own and gets a function that it calls where a step begins. The error of one is raised.

    A turn is so many steps. Where it is more than one, its first is not counted: the others' code has just been in the
    processor's caches, which is most of what a step of a few milliseconds would be seen to take.
    """
    turns = _Turns(list(ways), steps)

    def run(name: str) -> None:
        try:
            ways[name](lambda: turns.begin(name))
        finally:
            turns.leave(name)

    with ThreadPoolExecutor(len(ways)) as pool:
        for each in [pool.submit(run, name) for name in ways]:
            each.result()
    return {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}


class _Turns:
    def __init__(self, names: list[str], steps: int) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._order, self._steps = names, steps
        self._made, self._begun = dict.fromkeys(names, -1), dict[str, float]()
        self._changed = threading.Condition()

    def begin(self, name: str) -> None:
        """Ends the step before and, with it, perhaps the turn; then waits until all others have had theirs."""
        now = time.process_time()
        self._made[name] += 1
        if self._made[name] % self._steps == 0:
            with self._changed:
                if self._made[name]:
                    self.seconds[name].append((now - self._begun[name]) / max(1, self._steps - 1))
                    self._order.remove(name)
                    self._order.append(name)
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._order[0] == name)
        if self._made[name] % self._steps == min(1, self._steps - 1):
            self._begun[name] = time.process_time()

    def leave(self, name: str) -> None:
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()


def compared(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Quartiles of the ratios of turns that were had side by side, and the median of what `one` takes longer for a
    step, in milliseconds."""
    added = statistics.median(1000 * (a - b) for a, b in zip(seconds[one], seconds[other], strict=True))
    return ratios(seconds[one], seconds[other]) | {"added_ms": round(added, 3)}


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Quartiles, of pairs."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}


def cpu_ms(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()}
