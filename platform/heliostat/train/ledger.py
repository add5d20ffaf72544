"""The ledger: where every second of a run went. One attempt's classes are summed here, on rank 0; the launcher adds
what lies between attempts, so that the whole sums to the wall clock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heliostat.recipe import write_atomically

CLASSES = ("start_up", "input", "step", "replay", "evaluation", "checkpoint", "restore", "rescheduling", "other")


class Ledger:
    """`with ledger("step"): …` — nested spans count once, for the inner class."""

    def __init__(self, folder: Path | None) -> None:
        self.file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.attempt = len(list(folder.glob("attempt-*.json"))) + 1
            self.file = folder / f"attempt-{self.attempt:03d}.json"
        self.seconds: dict[str, float] = {}
        self.started = time.time()
        self._mark, self._class, self._saved = time.perf_counter(), "start_up", 0.0
        self.save()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, name: str) -> str:
        """From now on time belongs to `name`; returns what it belonged to."""
        now = time.perf_counter()
        self.seconds[self._class] = self.seconds.get(self._class, 0.0) + now - self._mark
        self._mark, before, self._class = now, self._class, name
        return before

    def save(self, every_s: float = 0.0) -> None:
        """Write the attempt so far (at most every `every_s` seconds): what a killed process leaves behind."""
        now = time.perf_counter()
        if self.file is None or now - self._saved < every_s:
            return
        self._saved = now
        self.enter(self._class)
        write_atomically(
            self.file, json.dumps({"started": self.started, "ended": time.time(), "seconds": self.seconds})
        )


def summarise(folder: Path, started: float, ended: float) -> dict[str, Any]:
    """All attempts of a run between two wall-clock times, in seconds by class; `goodput` is the share of steps
    that count."""
    attempts = [json.loads(file.read_text()) for file in sorted(folder.glob("attempt-*.json"))]
    attempts = [attempt for attempt in attempts if attempt["ended"] > started]
    seconds = dict.fromkeys(CLASSES, 0.0)
    last = started
    for number, attempt in enumerate(attempts):
        seconds["start_up" if number == 0 else "rescheduling"] += max(0.0, attempt["started"] - last)
        for name, value in attempt["seconds"].items():
            seconds[name] += value
        last = attempt["started"] + sum(attempt["seconds"].values())
    wall = ended - started
    seconds["other"] += wall - sum(seconds.values())
    return {
        "wall_s": wall,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "goodput": seconds["step"] / wall if wall > 0 else 0.0,
        "attempts": len(attempts),
    }
