"""Faults made on purpose, for the drill: one in a run, at a given step, on one rank."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.recipe import write_atomically
from heliostat.tasks import Batch
from heliostat.train.checkpoint import Writer, complete

KINDS = ("kill", "hang", "nan", "disk_full", "truncate")
FAULT_FILE = "fault.json"
"""In the run's folder: that the fault was injected, and when; a later attempt is left alone."""


@dataclass(frozen=True)
class Fault:
    """`kill`: the process gets SIGKILL after the step. `hang`: it never comes back from the step. `nan`: its share of
    the step's loss is not a number, once. `disk_full`: its part of the next checkpoint finds no room, whatever is
    removed. `truncate`: the newest checkpoint loses its last byte after the step, and the process gets SIGKILL."""

    kind: str
    step: int
    rank: int = 0


class Injector:
    """What the loop asks at each step of one rank."""

    def __init__(self, fault: Fault | None, run_dir: Path, rank: int) -> None:
        self.fault, self.file = fault, run_dir / FAULT_FILE
        self.armed = fault is not None and fault.rank == rank and not self.file.exists()
        self._file_limits: tuple[int, int] | None = None

    def batches(self, step: int, batches: list[Batch]) -> list[Batch]:
        """What the step's first try is made of."""
        if not self._now("nan", step):
            return batches
        self._note()
        spoilt = dataclasses.replace(batches[0], row_weight_B=batches[0].row_weight_B * float("nan"))
        return [spoilt, *batches[1:]]

    def before_checkpoint(self, step: int, writer: Writer) -> None:
        if not self._now("disk_full", step):
            return
        writer.wait()
        if found := complete(writer.folder):
            self._note()
            # The system lets the process write no file that long: a checkpoint's, but not the run's small ones.
            shortest = min(file.stat().st_size for file in found[-1].path.glob("*.distcp"))
            self._file_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (shortest // 2, self._file_limits[1]))

    def after_step(self, step: int, writer: Writer) -> None:
        if self._file_limits is not None:
            writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, self._file_limits)
            self._file_limits = None
        if self._now("kill", step):
            self._note()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._now("hang", step):
            self._note()
            while True:
                time.sleep(1)
        if self._now("truncate", step):
            writer.wait()
            if len(found := complete(writer.folder)) > 1:
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
