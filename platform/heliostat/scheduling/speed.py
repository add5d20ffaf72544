"""How much faster a job runs with more workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_SERIAL = 0.01
"""Assumed of a job that was not measured with two sizes yet: at 100 workers, half of each does nothing."""


@dataclass(frozen=True)
class Amdahl:
    """Speed with n workers relative to one: n / (1 + serial × (n - 1)) (Amdahl 1967). Concave, so that handing out
    workers one by one to whom adds the most is optimal. The global batch stays what it is when a run is resized, and
    so does what a step is worth: goodput is proportional to speed."""

    serial: float = DEFAULT_SERIAL
    """Of one worker's time for a step, the share that more workers do not shorten."""

    def __call__(self, workers: int) -> float:
        return workers / (1 + self.serial * (workers - 1))


UNMEASURED = Amdahl()


def fit(rates: Mapping[int, float]) -> Amdahl:
    """From measured rates (steps or tokens a second) by the number of workers: least squares of the time for a step
    relative to the fastest, 1 / rate = a + b / n. Sizes of which there are fewer than two say nothing of a curve."""
    points = [(1 / workers, 1 / rate) for workers, rate in rates.items() if workers > 0 and rate > 0]
    if len(points) < 2:
        return UNMEASURED
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    intercept = mean_y - slope * mean_x
    if slope <= 0:  # more workers were no faster
        return Amdahl(1.0)
    return Amdahl(min(1.0, max(0.0, intercept / (intercept + slope))))
