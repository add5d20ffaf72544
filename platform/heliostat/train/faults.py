"""Faults made on purpose, for the drill: one in a run, at a given step, on one rank."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.recipe import write_atomically
from heliostat.tasks import Batch
from heliostat.train.checkpoint import complete

KINDS = ("kill", "hang", "nan", "truncate")
FAULT_FILE = "fault.json"
"""In the run's folder: that the fault was injected, and when; a later attempt is left alone."""


@dataclass(frozen=True)
class Fault:
    """`kill`: the process gets SIGKILL after the step. `hang`: it never comes back from the step. `nan`: its share of
    the step's loss is not a number, once. `truncate`: the newest checkpoint loses its last byte after the step, and the
    process gets SIGKILL."""

    kind: str
    step: int
    rank: int = 0


class Injector:
    """What the loop asks at each step of one rank."""

    def __init__(self, fault: Fault | None, run_dir: Path, rank: int) -> None:
        self.fault, self.file = fault, run_dir / FAULT_FILE
        self.armed = fault is not None and fault.rank == rank and not self.file.exists()

    def batches(self, step: int, batches: list[Batch]) -> list[Batch]:
        """What the step's first try is made of."""
        if not self._now("nan", step):
            return batches
        self._note()
        spoilt = dataclasses.replace(batches[0], row_weight_B=batches[0].row_weight_B * float("nan"))
        return [spoilt, *batches[1:]]

    def after_step(self, step: int, checkpoints: Path) -> None:
        if self._now("kill", step):
            self._note()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._now("hang", step):
            self._note()
            while True:
                time.sleep(1)
        if self._now("truncate", step) and len(found := complete(checkpoints)) > 1:
            self._note()
            largest = max(found[-1].path.glob("*.distcp"), key=lambda file: file.stat().st_size)
            os.truncate(largest, largest.stat().st_size - 1)
            os.kill(os.getpid(), signal.SIGKILL)

    def _now(self, kind: str, step: int) -> bool:
        return self.armed and self.fault is not None and self.fault.kind == kind and step >= self.fault.step

    def _note(self) -> None:
        self.armed = False
        write_atomically(self.file, json.dumps({"time": time.time()}))


def injected_at(run_dir: Path) -> float | None:
    """Unix time at which a run's fault was injected; None where it was not."""
    file = run_dir / FAULT_FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found.get("time")
