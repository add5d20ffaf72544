"""The ledger: where every second of a run went. One attempt's classes are summed here, on rank 0; the launcher adds
what lies between attempts, so that the whole sums to the wall clock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from heliostat.recipe import write_atomically
from heliostat.train.notes import note, read_notes

CLASSES = {
    "start_up": "until the first attempt's model stands",
    "input": "waiting for rows",
    "step": "steps that count",
    "checkpoint": "training stands still for a checkpoint, or the bundle is written",
    "evaluation": "on the validation split",
    "detection": "from a failure until it was noticed",
    "rescheduling": "from then until the next attempt began",
    "restore": "until its model stood, with the checkpoint's state",
    "replay": "steps that an earlier attempt had made and lost",
    "idle": "what is left: bringing results home",
}
FAILURES_FILE = "failures.jsonl"


class Ledger:
    """`with ledger("step"): …` — nested spans count once, for the inner class."""

    def __init__(self, folder: Path | None, workers: int = 1) -> None:
        """`folder`: where the attempt is written; None: nowhere. `workers`: of this attempt."""
        self.file: Path | None = None
        self.workers = workers
        self.attempt = 1
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.attempt = len(list(folder.glob("attempt-*.json"))) + 1
            self.file = folder / f"attempt-{self.attempt:03d}.json"
        self.seconds: dict[str, float] = {}
        self.started = time.time()
        self._mark, self._saved = time.perf_counter(), 0.0
        self._class = "start_up" if self.attempt == 1 else "restore"
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

    def save(self, every_s: float = 0.0) -> bool:
        """Write the attempt so far (at most every `every_s` seconds): what a killed process leaves behind. Returns
        whether it did."""
        now = time.perf_counter()
        if self.file is None or now - self._saved < every_s:
            return False
        self._saved = now
        self.enter(self._class)
        record = {"started": self.started, "ended": time.time(), "workers": self.workers, "seconds": self.seconds}
        write_atomically(self.file, json.dumps(record))
        return True


def note_failure(folder: Path, reasons: dict[int, str]) -> None:
    """Write down that workers failed, by rank, and that it was noticed now."""
    note(folder / FAILURES_FILE, {"time": time.time(), "reasons": reasons})


def failures(folder: Path) -> list[dict[str, Any]]:
    return read_notes(folder / FAILURES_FILE)


def started(folder: Path) -> float:
    """When the first attempt began, in Unix time."""
    return min(float(json.loads(file.read_text())["started"]) for file in folder.glob("attempt-*.json"))


class Speed(NamedTuple):
    """What a run's steps were made of."""

    tokens: Sequence[tuple[float, float]]
    """When each step was recorded (Unix time), and its tokens; also of steps that were lost."""
    flops_per_token: float | None = None
    peak_flops: float | None = None
    """Of a worker, a second."""


NO_STEPS = Speed(())


def summarise(folder: Path, started: float, ended: float, speed: Speed = NO_STEPS) -> dict[str, Any]:
    """All attempts of a run between two wall-clock times, in seconds by class, in total and by attempt; `goodput` is
    the share of steps that count, `tokens_per_s` what steps made while they ran, `mfu` that as a share of what the
    workers could have computed (None where rows have no tokens)."""
    attempts = [json.loads(file.read_text()) for file in sorted(folder.glob("attempt-*.json"))]
    attempts = [attempt for attempt in attempts if attempt["ended"] > started]
    noticed = [failure["time"] for failure in failures(folder)]
    seconds = dict.fromkeys(CLASSES, 0.0)
    last = started
    for number, attempt in enumerate(attempts):
        gap = max(0.0, attempt["started"] - last)
        if number == 0:
            seconds["start_up"] += gap
        else:
            # The first notice since the last sign of life; without one, all of the gap was spent on starting again.
            notice = min((time_ for time_ in noticed if last <= time_ <= attempt["started"]), default=last)
            seconds["detection"] += notice - last if gap else 0.0
            seconds["rescheduling"] += attempt["started"] - notice if gap else 0.0
        for name, value in attempt["seconds"].items():
            seconds[name] += value
        last = attempt["started"] + sum(attempt["seconds"].values())
    wall = ended - started
    seconds["idle"] += wall - sum(seconds.values())
    return {
        "wall_s": wall,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "goodput": seconds["step"] / wall if wall > 0 else 0.0,
        **_throughput(attempts, speed),
        "attempts": len(attempts),
        "by_attempt": [
            {
                "workers": attempt["workers"],
                "seconds": {name: round(value, 3) for name, value in attempt["seconds"].items()},
                **_throughput([attempt], speed),
            }
            for attempt in attempts
        ],
    }


def figures(book: dict[str, Any]) -> dict[str, float]:
    """A summary as flat figures, `ledger.step_s` and so on, for tracking."""
    named = {f"ledger.{name}_s": value for name, value in book["seconds"].items()}
    rates = {f"ledger.{name}": book[name] for name in ("goodput", "attempts", "tokens_per_s", "mfu")}
    return named | {name: float(value) for name, value in rates.items() if value is not None}


def _throughput(attempts: list[dict[str, Any]], speed: Speed) -> dict[str, float | None]:
    """Of the steps of some attempts, whether they count or were made again."""
    stepping = [sum(attempt["seconds"].get(name, 0.0) for name in ("step", "replay")) for attempt in attempts]
    begun = [attempt["started"] for attempt in attempts]
    ends = [start + sum(attempt["seconds"].values()) for start, attempt in zip(begun, attempts, strict=True)]
    tokens = sum(
        count for time_, count in speed.tokens if any(a <= time_ <= b + 1.0 for a, b in zip(begun, ends, strict=True))
    )
    if not tokens or not sum(stepping):
        return {"tokens_per_s": None, "mfu": None}
    mfu = None
    if speed.flops_per_token and speed.peak_flops:
        could = sum(s * attempt["workers"] for s, attempt in zip(stepping, attempts, strict=True)) * speed.peak_flops
        mfu = tokens * speed.flops_per_token / could
    return {"tokens_per_s": tokens / sum(stepping), "mfu": mfu}
