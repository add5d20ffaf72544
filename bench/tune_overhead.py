"""What a search costs beside its trials: trials that sleep for 0.1 s on four CPUs (slots, not processors), run by

    heliostat   the driver, with its study in a SQLite file
    ray_tune    Ray Tune's own controller with reused actors
    optuna      Optuna's `optimize` on four threads of one process, its study in memory

in interleaved blocks (A B C A B C …) of several sizes. Prints for each the seconds that a trial takes beyond its share
of the sleeping, what one more trial costs between the sizes, and how the driver's memory grows.

    python -m bench.tune_overhead [--trials 16 256 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.runner import Figures, Origin, Report
from heliostat.launch.tune.study import Study
from heliostat.recipe import Tune, Uniform

SLOTS, SLEEP_S = 4, 0.1


class Sleep:
    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        return {"CPU": 1.0}, True

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        time.sleep(SLEEP_S)
        report(1, {"loss": (values["x"] - 0.3) ** 2})
        return {}


def heliostat(trials: int, folder: Path) -> None:
    space = {"x": Uniform(low=0, high=1)}
    tune = Tune(num_trials=trials, algorithm="random", scheduler="none", space=space)
    study = Study(tune, {"loss": False}, 0, "search", folder)
    Driver(study, Sleep(), SLOTS).run()
    assert len(study.rows()) == trials


def _sleep(values: dict[str, float]) -> None:
    from ray import tune

    time.sleep(SLEEP_S)
    tune.report({"loss": (values["x"] - 0.3) ** 2})


def ray_tune(trials: int, folder: Path) -> None:
    from ray import tune

    results = tune.Tuner(
        tune.with_resources(_sleep, {"cpu": 1}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, metric="loss", mode="min"),
        run_config=tune.RunConfig(name="search", storage_path=str(folder), verbose=0),
    ).fit()
    assert len(results) == trials


def optuna(trials: int, folder: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        time.sleep(SLEEP_S)
        return (x - 0.3) ** 2

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=trials, n_jobs=SLOTS)


WAYS: dict[str, Callable[[int, Path], None]] = {"heliostat": heliostat, "ray_tune": ray_tune, "optuna": optuna}


def seconds(way: Callable[[int, Path], None], trials: int) -> tuple[float, float]:
    """That it takes, and by how many MB the process has grown."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        way(trials, Path(folder))
        took = time.perf_counter() - begun
    gc.collect()
    return took, (psutil.Process().memory_info().rss - before) / 1e6


def measure(sizes: list[int], rounds: int) -> dict[str, Any]:
    for way in WAYS.values():  # imports, and the cluster's first workers
        seconds(way, SLOTS)
    took = {name: {size: list[float]() for size in sizes} for name in WAYS}
    grown = {name: {size: list[float]() for size in sizes} for name in WAYS}
    for _, size, (name, way) in itertools.product(range(rounds), sizes, WAYS.items()):
        for into, value in zip((took, grown), seconds(way, size), strict=True):
            into[name][size].append(value)
    medians = {name: {size: statistics.median(values) for size, values in by.items()} for name, by in took.items()}
    return {
        "slots": SLOTS,
        "sleep_s": SLEEP_S,
        "rounds": rounds,
        "overhead_ms_a_trial": {
            name: {size: round(1e3 * (whole / size - SLEEP_S / SLOTS), 2) for size, whole in by.items()}
            for name, by in medians.items()
        },
        "marginal_ms_a_trial": {
            name: {
                f"{few} to {many}": round(1e3 * ((by[many] - by[few]) / (many - few) - SLEEP_S / SLOTS), 2)
                for few, many in itertools.pairwise(sizes)
            }
            for name, by in medians.items()
        },
        "driver_grows_mb": {
            name: {size: round(statistics.median(values), 1) for size, values in by.items()}
            for name, by in grown.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[16, 256, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    for name in ("ray.tune.tune", "ray.tune.execution.tune_controller"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root = Path(__file__).resolve().parent.parent
    environment = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'platform'}"}
    ray.init(
        "local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    try:
        print(json.dumps(measure(sorted(options.trials), options.rounds)), file=sys.stdout, flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
