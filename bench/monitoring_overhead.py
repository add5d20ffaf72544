"""What being watched costs a training step: all metrics on (each step's figures are read and written, and Ray gets what
it exports to Prometheus) over none, on the same model and batches in one process of a Ray cluster, in interleaved
pairs. Prints CPU milliseconds a step, and ratios paired by round. Without what Ray's agent takes, a process beside it.

    python -m bench.monitoring_overhead [--pairs 5] [--steps 24]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch

from bench.train_overhead import ours, recipe_for, spread, unrecorded
from heliostat.data.prepare import Prepared, prepare
from heliostat.launch.cluster import start_local_cluster
from heliostat.launch.train import gauges
from heliostat.recipe import Recipe

PEAK_FLOPS = 1e12
"""Any: so that those are exported too which only GPUs have."""


def watched(recipe: Recipe, data: Prepared, run_dir: Path) -> float:
    return ours(recipe, data, run_dir, observe=gauges(run_dir.name, recipe, False, PEAK_FLOPS))


def measure(size: str, pairs: int, steps: int, folder: Path) -> dict[str, Any]:
    recipe = recipe_for(size, folder / "storage", steps)
    data, _ = prepare(recipe)
    on: list[float] = []
    off: list[float] = []
    for pair in range(pairs):
        on.append(watched(recipe, data, folder / f"{size}-on-{pair}"))
        off.append(unrecorded(recipe, data, folder / f"{size}-off-{pair}"))
    milliseconds = {"on": 1000 * statistics.median(on), "off": 1000 * statistics.median(off)}
    return {
        "model": size,
        "pairs": pairs,
        "steps": steps,
        "cpu_ms_per_step": {name: round(value, 3) for name, value in milliseconds.items()},
        "on_over_off": spread([a / b for a, b in zip(on, off, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_local_cluster({"log_to_driver": False, "logging_level": "WARNING"})
    with tempfile.TemporaryDirectory() as folder:
        for size, steps in (("17M", options.steps), ("tiny", 10 * options.steps)):
            print(json.dumps(measure(size, options.pairs, steps, Path(folder))), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
