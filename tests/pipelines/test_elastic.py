"""A run that goes on with the workers there are: nodes go, and come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Refused, override
from heliostat.train.loop import train
from tests.pipelines.jobs import ROOT
from tests.recipes import prepared, tiny_bert


@pytest.mark.slow
def test_a_run_shrinks_and_grows_and_stays_the_same(tmp_path: Path) -> None:
    """2 workers, then 1, after notice was given, then 2 again: losses as in one process, all the way."""
    recipe = tiny_bert(
        tmp_path,
        **{
            "optimizer.lr": 1e-4,
            "parallelism.workers": 2,
            "parallelism.min_workers": 1,
            "recovery.grow_every_s": 3.0,
            "schedule.max_steps": 2500,
            "checkpoint.every_steps": 200,
            "data.log_samples": True,
            "training.keep_best": False,
            "training.evaluate_every_steps": 2500,
        },
    )
    recipe.save(tmp_path / "recipe.json")
    command = [sys.executable, "-m", "tests.pipelines.elastic", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert [each["workers"] for each in outcome["ledger"]["by_attempt"]] == [2, 1, 2]
    assert sum(outcome["ledger"]["seconds"].values()) == pytest.approx(outcome["ledger"]["wall_s"], rel=0.01)
    # The notice made a checkpoint while there was time, and the run went on from it, or from a later one.
    assert outcome["within_s"] > 0
    samples = pq.read_table(tmp_path / "run" / "samples.parquet", filters=[("attempt", "=", 2)])
    assert pc.min(samples["step"]).as_py() > outcome["noticed"]
    # Prometheus heard of it.
    assert any("heliostat_train_step{" in line and 'run="run"' in line for line in outcome["exported"])
    assert any("heliostat_train_seconds{" in line and 'class="step"' in line for line in outcome["exported"])
    alone = override(recipe, {"parallelism.workers": 1, "parallelism.min_workers": None})
    train(alone, prepared(alone).folder, tmp_path / "alone")
    losses = [r["loss"] for r in read_metrics(tmp_path / "alone" / METRICS_FILE) if "loss" in r]
    assert outcome["losses"] == pytest.approx(losses, rel=1e-5)


def test_layouts_that_cannot_shrink_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="min_workers"):
        tiny_bert(tmp_path, **{"parallelism.workers": 2, "parallelism.fsdp": 2, "parallelism.min_workers": 1})
    with pytest.raises(Refused, match="min_workers"):
        tiny_bert(tmp_path, **{"parallelism.workers": 2, "parallelism.min_workers": 3})
