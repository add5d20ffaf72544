"""What runs trials on the cluster: an actor that runs one after the other, and asks the driver at each report."""

from __future__ import annotations

import queue
import threading
from typing import Any, NamedTuple, Protocol

from heliostat.recipe import Refused

Figures = dict[str, float]
DONE, PRUNED, INFEASIBLE, FAILED = "done", "pruned", "infeasible", "failed"
"""How a trial ends."""


class Origin(NamedTuple):
    """Whose weights a trial begins with: another trial's, at one of its reports."""

    trial: int
    report: int


class Stopped(Exception):
    """The driver wants no more of this trial."""


class Report(Protocol):
    def __call__(self, at: int, figures: Figures) -> None:
        """Tell figures of a trial, its `at`-th, counted from 1; raises Stopped where it is to end."""


class Objective(Protocol):
    """What a search runs for each trial's values."""

    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        """What a trial takes of the cluster, and whether the actor itself is to hold it (else what it starts does).
        Raises Refused where the values cannot go together."""

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        """Run trial `number`, from where an earlier attempt at it got to, or else from `origin`; its last figures."""


class Runner:
    """A Ray actor with several threads. In `begin` and `event` the driver waits for what comes next: a report, or the
    trial's end."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.answers: queue.Queue[bool] = queue.Queue()

    def begin(self, number: int, values: dict[str, Any], origin: Origin | None) -> tuple[str, Any]:
        threading.Thread(target=self._run, args=(number, values, origin), name=f"trial-{number}", daemon=True).start()
        return self.events.get()

    def event(self, go_on: bool) -> tuple[str, Any]:
        """`go_on`: the answer to the last report."""
        self.answers.put(go_on)
        return self.events.get()

    def report(self, at: int, figures: Figures) -> bool:
        """Called by the trial, or by a worker of it from elsewhere; whether to go on."""
        self.events.put(("report", (at, figures)))
        return self.answers.get()

    def _run(self, number: int, values: dict[str, Any], origin: Origin | None) -> None:
        def report(at: int, figures: Figures) -> None:
            if not self.report(at, figures):
                raise Stopped

        try:
            self.events.put(("done", self.objective(number, values, report, origin)))
        except Stopped:
            self.events.put(("stopped", None))
        except BaseException as error:  # noqa: BLE001 - listed with its trial
            self.events.put(("error", (INFEASIBLE if cannot_be(error) else FAILED, cause(error))))


def root(error: BaseException) -> BaseException:
    """The error that a trial or one of its workers raised, without what carried it here."""
    while inner := next(iter(getattr(error, "worker_failures", {}).values()), None) or getattr(error, "cause", None):
        error = inner
    return error


def cause(error: BaseException) -> str:
    error = root(error)
    text = str(error).strip()
    return text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"


def cannot_be(error: BaseException) -> bool:
    """Whether the same values would fail again wherever they are tried: refused, or out of memory."""
    error = root(error)
    # torch.OutOfMemoryError and ray.exceptions.OutOfMemoryError, wherever they come from.
    return isinstance(error, Refused | MemoryError) or type(error).__name__ == "OutOfMemoryError"
