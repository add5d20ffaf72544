"""What being watched costs a training step: all metrics on (each step's figures are read and written, and Ray gets what
it exports to Prometheus) over none, on the same model and batches in one process of a Ray cluster, in turn: step by
step, or twenty at once of a tiny one. Prints CPU milliseconds a step, and quartiles of ratios paired by turn. Without
what Ray's agent takes, a process beside it; what Ray's threads in this one do now and then meets both alike.

    python -m bench.monitoring_overhead [--turns 60]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch

from bench.train_overhead import ours, recipe_for, unrecorded
from bench.turns import compared, cpu_ms, in_turn
from heliostat.data.prepare import prepare
from heliostat.launch.cluster import start_local_cluster
from heliostat.launch.gauges import exported

PEAK_FLOPS = 1e12
"""Any: so that those are exported too which only GPUs have."""


def measure(size: str, turns: int, steps: int, folder: Path) -> dict[str, Any]:
    recipe = recipe_for(size, folder / "storage", turns * steps)
    data, _ = prepare(recipe)
    with exported(f"{size}-on", recipe, False, PEAK_FLOPS) as observe:
        seconds = in_turn(
            {
                "on": lambda begin: ours(begin, recipe, data, folder / f"{size}-on", observe=observe),
                "off": lambda begin: unrecorded(begin, recipe, data, folder / f"{size}-off"),
            },
            steps,
        )
    return {
        "model": size,
        "turns": len(seconds["on"]),
        "steps_a_turn": steps,
        "cpu_ms_per_step": cpu_ms(seconds),
        "on_over_off": compared(seconds, "on", "off"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_local_cluster({"log_to_driver": False, "logging_level": "WARNING"})
    with tempfile.TemporaryDirectory() as folder:
        for size, steps in (("17M", 1), ("tiny", 20)):
            print(json.dumps(measure(size, options.turns, steps, Path(folder))), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
