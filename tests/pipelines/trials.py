"""Objectives that searches in tests run: no training, and each does what its values say."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from heliostat.launch.tune.runner import Figures, Origin, Report
from heliostat.recipe import Refused

JOULES_A_REPORT = 1e6


class Said:
    """Notes in `folder` when a trial began and ended; `what` decides how it ends."""

    def __init__(self, folder: Path, seconds: float = 0.2) -> None:
        self.folder, self.seconds = folder, seconds

    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        if values.get("what") == "refused":
            raise Refused("what", "cannot be")
        return {"CPU": float(values.get("cpus", 1))}, True

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        begun = time.time()
        what, attempt = values.get("what"), len(list(self.folder.glob(f"{number}-*.begun")))
        (self.folder / f"{number}-{attempt}.begun").touch()
        if what == "dies" or (what == "dies once" and attempt == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raises":
            raise ValueError("no good")
        if what == "too large":
            raise MemoryError("a terabyte")
        for at in (1, 2):
            time.sleep(self.seconds / 2)
            loss = float("nan") if what == "nan" else (values.get("x", 0.0) - 1) ** 2
            report(at, {"loss": loss, "joules": at * JOULES_A_REPORT})
        (self.folder / f"{number}-{attempt}.ended").write_text(f"{begun} {time.time()} {values.get('cpus', 1)}")
        return {"seconds": time.time() - begun}
