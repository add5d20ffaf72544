"""Training loops that take their steps in turn, A B C A B C …, in one process: whatever else the machine does meets
them all alike, which it does not where one runs to its end before the next begins."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

WARM_UP = 3
"""Steps that are not counted."""


def in_turn(ways: Mapping[str, Callable[[Callable[[], None]], object]]) -> dict[str, list[float]]:
    """CPU seconds of the process, by way and step, the first ones and the last left out. Each way runs in a thread of
    its own and gets a function that it calls where a step begins. The error of one is raised."""
    turns = _Turns(list(ways))

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
    def __init__(self, names: list[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._order, self._begun = names, dict[str, float]()
        self._changed = threading.Condition()

    def begin(self, name: str) -> None:
        """Ends the step before, and waits until all others have made one."""
        now = time.process_time()
        with self._changed:
            if name in self._begun:
                self.seconds[name].append(now - self._begun[name])
                self._order.remove(name)
                self._order.append(name)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._order[0] == name)
            self._begun[name] = time.process_time()

    def leave(self, name: str) -> None:
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()


def compared(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Quartiles of the ratios of steps that were made side by side, and the median of what `one` takes longer, in
    milliseconds."""
    pairs = list(zip(seconds[one], seconds[other], strict=True))
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    added = statistics.median(1000 * (a - b) for a, b in pairs)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3), "added_ms": round(added, 3)}


def cpu_ms(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()}
