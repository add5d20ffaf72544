"""What Ray exports to Prometheus of a search, each name with `ray_` before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from heliostat.launch.tune.runner import DONE
from heliostat.launch.tune.study import RUNNING, Study


class Gauges:
    """The driver tells it of trials that end, and when it waits."""

    def __init__(self, study: Study) -> None:
        from ray.util.metrics import Gauge

        self.study = study
        self.metric, self.more_is_better = next(iter(study.objectives.items()))
        self.trials = Gauge("heliostat_tune_trials", "By state, running or as they ended", ("search", "state"))
        self.best_value = Gauge("heliostat_tune_best_value", "Of trials that are done", ("search", "metric"))
        self.joules = Gauge("heliostat_tune_joules", "Estimated, of all trials", ("search",))
        self.tags = {"search": study.memory.study_name}
        self.states: Counter[str] = Counter()
        self.best: float | None = None
        for row in study.rows():  # of earlier sessions
            self._take(row)

    def ended(self, row: dict[str, Any]) -> None:
        """A trial has ended; `row`: as the study lists it."""
        self._take(row)
        self.tell()

    def _take(self, row: dict[str, Any]) -> None:
        self.states[row["state"]] += 1
        if row["state"] == DONE:
            value = row[self.metric]
            better = self.best is None or (value > self.best) == self.more_is_better
            self.best = value if better else self.best

    def tell(self) -> None:
        """Tell Ray. It has to hear of them again and again: what was set 20 s ago is exported no more."""
        for state, count in {**self.states, RUNNING: self.study.begun - self.study.ended}.items():
            self.trials.set(count, self.tags | {"state": state})
        if self.best is not None:
            self.best_value.set(self.best, self.tags | {"metric": self.metric})
        self.joules.set(self.study.joules, self.tags)
