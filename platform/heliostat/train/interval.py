"""When to write a checkpoint: often enough to lose little, seldom enough to cost little."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from heliostat.recipe import Checkpoint
from heliostat.record import say
from heliostat.train import ledger

FIRST_S = 60.0
"""Until a checkpoint has shown what one costs."""
LONGEST_S = 1800.0
"""Whatever the formula says: a failure rate is a guess until there were failures."""
MARGIN_S = 3.0
"""Before machines are taken away, beside twice what a checkpoint takes."""


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints that lose the least time in all, where one costs `cost_s` and failures
    come `mtbf_s` apart on average. Daly 2006, A higher order estimate of the optimum checkpoint interval for restart
    dumps, equation 37; its first term is Young's of 1974."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    share = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9) - cost_s


class Interval:
    """Of the checkpoints of one attempt, on one rank; what any rank wants, all do."""

    def __init__(
        self,
        settings: Checkpoint,
        workers: int,
        book: Path | None,
        notice: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`book`: the ledger's folder on the rank that keeps the clock, None on others. `notice`: when this rank's
        machine will be taken away (Unix time), as far as is known."""
        self.settings, self.workers, self.book, self.notice, self.clock = settings, workers, book, notice, clock
        self.every_s = FIRST_S if settings.every_s == "auto" else settings.every_s
        self.last = clock()
        self.takes_s = 0.0
        self._noticed = self._last_call = False

    def wanted(self) -> bool:
        """Whether this rank asks for a checkpoint after the step that begins now."""
        if self._taken_away():
            return True
        return self.book is not None and not self.settings.every_steps and self.clock() - self.last >= self.every_s

    def _taken_away(self) -> bool:
        """At once when that is announced, and once more shortly before."""
        deadline = self.notice()
        if deadline is None:
            return False
        if not self._noticed:
            say("notice", reason="this machine will be taken away", deadline=deadline)
        last_call = self.clock() >= deadline - 2 * self.takes_s - MARGIN_S
        wanted = not self._noticed or (last_call and not self._last_call)
        self._noticed, self._last_call = True, self._last_call or last_call
        return wanted

    def saved(self, cost_s: float, write_s: float) -> None:
        """A checkpoint was begun, which training stood still for; `write_s`: what the last one took to write."""
        self.last, self.takes_s = self.clock(), cost_s + write_s
        if self.settings.every_s == "auto" and self.book is not None:
            interval = daly_interval_s(cost_s, self.mtbf_s())
            # One is to be there before the next is begun.
            self.every_s = min(max(interval, self.takes_s), LONGEST_S)

    def mtbf_s(self) -> float:
        """Mean time between failures: of this run where it had some, of workers elsewhere before."""
        assert self.book is not None
        failed = len(ledger.failures(self.book))
        if not failed:
            return self.settings.worker_mtbf_h * 3600 / self.workers
        return (self.clock() - ledger.started(self.book)) / failed
