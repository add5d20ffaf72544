"""What Ray Train costs over torchrun: the same loop, recipe and data with two gloo workers, in interleaved pairs.
Prints the median step time of each, the time from launch to the end of the first step, and their paired ratios.

    python -m bench.launch_overhead [--pairs 3] [--steps 30]

Ray itself is started once, as on a cluster that is up; torchrun's time counts from the start of its process, Ray
Train's from `fit`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.train_overhead import recipe_for, spread
from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import Prepared, prepare
from heliostat.launch.cluster import THREADS, connect
from heliostat.launch.train import fit
from heliostat.recipe import Recipe, build, override
from heliostat.train.folder import OUTCOME_FILE
from heliostat.train.loop import train


@dataclass(frozen=True)
class Run:
    step_s: float
    """Median wall seconds a step."""
    cpu_s: float
    """CPU seconds of rank 0 over the loop, divided by its steps."""
    first_step_s: float
    """From the launch to the end of the second step (each is recorded while the next one runs)."""


def run_of(run_dir: Path, started: float) -> Run:
    times = [record["time"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]
    cpu_s = json.loads((run_dir / OUTCOME_FILE).read_text())["loop_cpu_s"] / len(times)
    return Run(statistics.median(b - a for a, b in itertools.pairwise(times[3:])), cpu_s, times[0] - started)


def under_ray(recipe: Recipe, data: Prepared, run_dir: Path) -> Run:
    started = time.time()
    fit(recipe, data.folder, run_dir)
    return run_of(run_dir, started)


def under_torchrun(recipe: Recipe, data: Prepared, run_dir: Path) -> Run:
    run_dir.mkdir(parents=True)
    recipe.save(run_dir / "recipe.json")
    started = time.time()
    workers = f"--nproc-per-node={recipe.parallelism.workers}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", workers, "-m", "bench.launch_overhead"]
    subprocess.run(
        [*command, "--worker", str(run_dir), str(data.folder)],
        env=os.environ | THREADS | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return run_of(run_dir, started)


def worker(run_dir: Path, data: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    train(build(json.loads((run_dir / "recipe.json").read_text())), data, run_dir)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe = override(
            recipe_for("17M", Path(folder), options.steps),
            {"parallelism.workers": 2, "training.micro_batch_size": 2},
        )
        data, _ = prepare(recipe)
        ray, torchrun = [], []
        with connect(recipe):
            for pair in range(options.pairs):
                ray.append(under_ray(recipe, data, Path(folder) / f"ray-{pair}"))
                torchrun.append(under_torchrun(recipe, data, Path(folder) / f"torchrun-{pair}"))
    answer: dict[str, Any] = {"model": "17M", "workers": 2, "pairs": options.pairs}
    for figure in ("step_s", "cpu_s", "first_step_s"):
        pairs = [(getattr(a, figure), getattr(b, figure)) for a, b in zip(ray, torchrun, strict=True)]
        answer[figure] = {
            "ray": round(statistics.median(a for a, _ in pairs), 4),
            "torchrun": round(statistics.median(b for _, b in pairs), 4),
            "ratio": spread([a / b for a, b in pairs]),
        }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
