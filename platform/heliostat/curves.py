"""The curves of a run: `metrics.jsonl` in its folder, a line for each step and each evaluation."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class Recorder:
    """Every step's figures, drained to a file off the cluster's reporting path (which blocks for seconds). Writes
    nothing where it is not `active`: one rank records."""

    def __init__(self, path: Path, active: bool) -> None:
        self.active = active
        self.last_step = 0
        if not active:
            return
        self.last_step = max((record["step"] for record in read_metrics(path)), default=0)
        self.stream = path.open("a", encoding="utf-8")

    def step(self, step: int, figures: dict[str, float]) -> None:
        if not self.active:
            return
        # JSON has no name for what is not finite.
        self._write({"step": step, **{name: x if math.isfinite(x) else None for name, x in figures.items()}})
        self.flush()  # a process that is killed now has lost no step's figures

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        if self.active:
            self._write({"step": step, "validation": figures})
            self.flush()

    def _write(self, record: dict[str, Any]) -> None:
        self.stream.write(json.dumps(record | {"time": time.time()}) + "\n")

    def flush(self) -> None:
        if self.active:
            self.stream.flush()

    def close(self) -> None:
        if self.active:
            self.stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run; where a step was replayed, its last record counts."""
    records = {(record["step"], "validation" in record): record for record in read_all_metrics(path)}
    return [records[key] for key in sorted(records)]


def read_all_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run as they were written. A line cut by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
