"""Jobs with priorities on a real Ray cluster."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.curves import METRICS_FILE, read_all_metrics
from tests.pipelines.jobs import ROOT
from tests.recipes import tiny_bert


@pytest.mark.slow
def test_a_preempted_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """It makes room, by a checkpoint, for a run of a higher priority and goes on after it, though the scheduler is
    killed in between; no step is made twice, and the weights are bitwise those of a run that nobody disturbed."""
    tiny_bert(
        tmp_path,
        **{
            "parallelism.workers": 1,
            "schedule.max_steps": 600,
            "checkpoint.every_steps": 100_000,
            "training.keep_best": False,
            "training.evaluate_every_steps": 600,
        },
    ).save(tmp_path / "recipe.json")
    command = [sys.executable, "-m", "tests.pipelines.scheduled", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    jobs = {job["name"]: job for job in answer["jobs"]}
    assert {name: (job["status"], job["attempt"], job["preemptions"]) for name, job in jobs.items()} == {
        "low": ("done", 2, 1),
        "high": ("done", 1, 0),
        "undisturbed": ("done", 1, 0),
    }
    runs = tmp_path / "storage" / "runs"
    low, undisturbed = (
        [(each["step"], each["loss"]) for each in read_all_metrics(runs / name / METRICS_FILE) if "loss" in each]
        for name in ("low", "undisturbed")
    )
    assert 30 < len(answer["made"]) < 600, "it was preempted in mid-run"
    assert low == undisturbed
    weights = [(runs / name / "bundle" / "model.safetensors").read_bytes() for name in ("low", "undisturbed")]
    assert len({hashlib.sha256(each).hexdigest() for each in weights}) == 1
