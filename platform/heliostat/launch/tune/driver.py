"""The driver of a search: starts trials where there is room, answers their reports, and outlives what they die of."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from heliostat.launch.tune.runner import DONE, FAILED, INFEASIBLE, PRUNED, Objective, Runner, cannot_be, cause
from heliostat.launch.tune.study import Study
from heliostat.recipe import Refused

THREADS = 3
"""Of a runner's actor: the driver waits in one, a worker of the trial in another, and one starts the next."""
ROOM_S = 5.0
"""So often the cluster is asked anew how large it is."""


@dataclass
class Running:
    number: int
    values: dict[str, Any]
    runner: Any
    resources: dict[str, float]
    held: bool
    """By the runner's actor itself."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of its last report."""
    heard: float = field(default_factory=time.monotonic)
    """When something was last heard of it."""
    budget: str = ""
    """The one that ends it."""


class Driver:
    def __init__(
        self,
        study: Study,
        objective: Objective,
        max_concurrent: int = 0,
        ended: Callable[[dict[str, Any]], None] = lambda row: None,
        reported: Callable[[], None] = lambda: None,
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_concurrent`: 0 for as many as fit. `ended` is told of each trial that has ended, as it is listed;
        `reported` that one has reported; `waits` that the driver waits, every few seconds or more often."""
        import ray

        self.ray = ray
        self.study, self.objective, self.max_concurrent = study, objective, max_concurrent
        self.ended, self.reported, self.waits = ended, reported, waits
        self.shared = ray.put(objective)
        self.running: dict[Any, Running] = {}
        """By the reference to what comes next of each."""
        self.idle: list[tuple[dict[str, float], Any]] = []
        self.waiting = dict(study.interrupted)
        """Trials that have values and no runner: of an earlier session, or there was no room."""
        self.deaths: Counter[int] = Counter()
        self.budget = ""
        """The one that was spent before all trials were made."""

    def run(self) -> str:
        """Returns the budget that ended the search, as the field that gives it."""
        try:
            while True:
                self._start()
                if not self.running:
                    break
                self.waits()
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=ROOM_S)
                for reference in ready:
                    self._take(self.running.pop(reference), reference)
        finally:
            for trial in self.running.values():
                self.ray.kill(trial.runner)
            for _, runner in self.idle:
                self.ray.kill(runner)
            self.study.note()
        return self.budget or self.study.whole

    # -- starting trials

    def _start(self) -> None:
        while not self.max_concurrent or len(self.running) < self.max_concurrent:
            if not self.waiting and self.study.founded >= self.study.number:
                return
            if budget := self.study.spent():
                self.budget = budget
                return
            if not self.waiting:
                number, values = self.study.ask()
                self.waiting[number] = values
            number, values = next(iter(self.waiting.items()))
            try:
                resources, held = self.objective.needs(values)
            except Refused as error:
                del self.waiting[number]
                self._end(number, INFEASIBLE, {}, str(error))
                continue
            runner = self._runner(resources, held)
            if runner is None:
                return
            del self.waiting[number]
            trial = Running(number, values, runner, resources, held)
            self.running[runner.begin.remote(number, values, self.study.origin(number))] = trial

    def _runner(self, resources: dict[str, float], held: bool) -> Any:
        """One with these resources, or None where there is no room now. Where nothing runs there always is: what does
        not fit a cluster may be what it grows for."""
        for index, (has, runner) in enumerate(self.idle):
            if has == resources and held:
                del self.idle[index]
                return runner
        total = self.ray.cluster_resources()
        used: Counter[str] = Counter()
        for trial in self.running.values():
            used.update(trial.resources)
        for has, _ in self.idle:
            used.update(has)

        def fits() -> bool:
            return all(used[name] + amount <= total.get(name, 0) for name, amount in resources.items())

        while not fits() and self.idle:
            has, runner = self.idle.pop()
            self.ray.kill(runner)
            used.subtract(has)
        if not fits() and self.running:
            return None
        own = resources if held else {}
        return (
            self.ray.remote(Runner)
            .options(num_cpus=own.get("CPU", 0), num_gpus=own.get("GPU", 0), max_concurrency=THREADS)
            .remote(self.shared)
        )

    # -- what comes of them

    def _take(self, trial: Running, reference: Any) -> None:
        now = time.monotonic()
        self.study.gpu_s += trial.resources.get("GPU", 0.0) * (now - trial.heard)
        trial.heard = now
        try:
            what, said = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._died(trial, error)
            return
        if what == "report":
            at, figures = said
            self.study.joules += figures.get("joules", 0.0) - trial.figures.get("joules", 0.0)
            trial.figures = figures
            go_on = self.study.report(trial.number, at, figures)
            if go_on:
                trial.budget = self.study.spent()
                self.budget = self.budget or trial.budget
            self.running[trial.runner.event.remote(go_on and not trial.budget)] = trial
            self.reported()
            return
        if trial.held:
            self.idle.append((trial.resources, trial.runner))
        else:
            self.ray.kill(trial.runner)
        if what == "error":
            state, reason = said
            self._end(trial.number, state, trial.figures, reason)
        elif what == "stopped":
            self._stopped(trial)
        else:
            figures = trial.figures | said
            missing = [name for name in self.study.objectives if not _finite(figures.get(name))]
            if missing:
                name = missing[0]
                reason = f"{name} is {figures[name]}" if name in figures else "it ended without an evaluation"
                self._end(trial.number, FAILED, figures, reason)
            else:
                self._end(trial.number, DONE, figures, "")

    def _stopped(self, trial: Running) -> None:
        reason = ""
        if trial.budget:
            reason = f"{trial.budget} is spent"
        elif not self.study.spent() and (successor := self.study.succeed(trial.number)):
            number, values, origin = successor
            reason = f"trial {number} takes its place, from trial {origin.trial}'s report {origin.report}"
            self.waiting = {number: values} | self.waiting
        self._end(trial.number, PRUNED, trial.figures, reason)

    def _died(self, trial: Running, error: Exception) -> None:
        self.deaths[trial.number] += 1
        if cannot_be(error):
            self._end(trial.number, INFEASIBLE, trial.figures, cause(error))
        elif self.deaths[trial.number] > self.study.tune.max_failures:
            reason = f"its process died {self.deaths[trial.number]} times, at last: {cause(error).splitlines()[0]}"
            self._end(trial.number, FAILED, trial.figures, reason)
        else:
            self.waiting = {trial.number: trial.values} | self.waiting

    def _end(self, number: int, state: str, figures: dict[str, float], reason: str) -> None:
        self.study.tell(number, state, figures, reason)
        self.ended(self.study.row(number))


def _finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")
