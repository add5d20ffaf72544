"""A run of 2, then 1, then 3 workers, whose attempts are killed at a random moment, against one worker that is left
alone: a packed mixture of three sources, the same rows in the same order, and the same losses."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, override
from heliostat.train.checkpoint import complete
from heliostat.train.loop import train
from heliostat.train.samples import collect
from tests.distributed.harness import run, run_until_killed
from tests.recipes import mixed, prepared, tiny_llama

STEPS = 30


def train_until_killed(recipe: Recipe, data: Path, run_dir: Path, step: int, delay_s: float) -> Any:
    """Rank 0 sends itself a signal that nothing can catch, some time after it has begun a step."""
    begun = 0

    def at_each_step() -> bool:
        nonlocal begun
        begun += 1
        if begun == step and os.environ["RANK"] == "0":
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.02)  # so that a moment lies within a step or two
        return False

    return train(recipe, data, run_dir, should_stop=at_each_step, write_bundle=False)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_resumed_equals_one_worker(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    recipe = mixed(
        tmp_path,
        tiny_llama(tmp_path),
        **{
            "data.pack": True,
            "data.sequence_length": 16,
            "data.log_samples": True,
            "schedule.max_steps": STEPS,
            "training.global_batch_size": 7,
            "checkpoint.every_steps": 4,
        },
    )
    data, run_dir = prepared(recipe).folder, tmp_path / "killed"
    run(1, train, recipe, data, tmp_path / "one")
    reached = [0]
    for workers in (2, 1):
        laid_out = override(recipe, {"parallelism.workers": workers})
        # A checkpoint is begun at every fourth step, and is there at the latest when the next is begun.
        run_until_killed(
            workers, tmp_path / f"rendezvous-{workers}", train_until_killed, laid_out, data, run_dir,
            draw.randint(9, 12), draw.uniform(0, 0.05),
        )  # fmt: skip
        reached.append(complete(run_dir / "checkpoints")[-1].manifest["step"])
    assert 0 < reached[1] < reached[2] < STEPS
    run(3, train, override(recipe, {"parallelism.workers": 3}), data, run_dir)

    one, other = (pq.read_table(collect(folder, recipe)) for folder in (tmp_path / "one", run_dir))
    assert set(other["attempt"].to_pylist()) == {1, 2, 3}
    lost = other.filter(pc.invert(other["committed"]))
    assert set(zip(lost["attempt"].to_pylist(), lost["step"].to_pylist(), strict=True)) <= {
        (attempt, step) for attempt in (1, 2) for step in range(reached[attempt] + 1, STEPS)
    }
    committed = other.filter(other["committed"]).sort_by([("step", "ascending"), ("position", "ascending")])
    columns = ["step", "position", "source", "id"]
    assert one["committed"].to_pylist() == [True] * one.num_rows
    assert one.num_rows > 150
    assert set(one["source"].to_pylist()) == set(recipe.data.mixture)
    assert committed.select(columns).to_pylist() == one.select(columns).to_pylist()
    losses, losses_ = (
        {record["step"]: record["loss"] for record in read_metrics(folder / METRICS_FILE) if "loss" in record}
        for folder in (tmp_path / "one", run_dir)
    )
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses_ == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "axis", ["tensor", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("pipeline", "context"))]
)
def test_of_peers_with_the_same_rows_one_logs(axis: str, tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"data.log_samples": True, "schedule.max_steps": 5})
    data = prepared(recipe).folder
    run(1, train, recipe, data, tmp_path / "one")
    laid_out = override(recipe, {"parallelism.workers": 2, f"parallelism.{axis}": 2})
    run(2, train, laid_out, data, tmp_path / axis)
    one, two = (pq.read_table(collect(folder, recipe)) for folder in (tmp_path / "one", tmp_path / axis))
    assert two.to_pylist() == one.to_pylist()
    assert len(one) == 4 * 8 + 1  # an epoch of 33 rows
