"""What energy is estimated from, and what trials tell of it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from heliostat.energy import JOULES_PER_KWH, joules
from heliostat.recipe import Energy
from heliostat.train.loop import train
from tests.recipes import prepared, tiny_bert


def test_a_kilowatt_hour() -> None:
    """Ten cores at 50 W and two GPUs at 250 W, for an hour."""
    assert joules(Energy(cpu_watts=50, gpu_watts=250), 10 * 3600, 2 * 3600) == pytest.approx(JOULES_PER_KWH)
    assert JOULES_PER_KWH == 1000 * 3600


def test_reports_say_how_long_processors_worked(tmp_path: Path) -> None:
    """As the kernel counts it: all threads of the process, and nothing of before the loop."""
    recipe = tiny_bert(tmp_path, **{"training.evaluate_every_steps": 5})
    data = prepared(recipe)

    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    told: list[tuple[dict[str, Any], float]] = []
    train(recipe, data.folder, tmp_path / "run", report=lambda said: told.append((said, cpu_s())), write_bundle=False)
    assert [said["step"] for said, _ in told] == [5, 10, 15, 20]
    (first, then), *_, (last, now) = told
    assert last["loop_cpu_s"] - first["loop_cpu_s"] == pytest.approx(now - then, abs=0.02)
    assert last["loop_s"] > first["loop_s"] > 0
