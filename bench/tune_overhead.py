"""What a search costs beside its trials: trials that sleep for 0.1 s on four CPUs (slots, not processors), run by

    heliostat   the driver, with its study in a SQLite file
    ray_tune    Ray Tune's own controller with reused actors
    optuna      Optuna's `optimize` on four threads of one process, its study in memory

in interleaved blocks (A B C A B C …) of several sizes. Prints for each the seconds that a trial takes beyond its share
of the sleeping, what one more trial costs between the sizes, and how the driver's memory grows.

Then what population based training costs beside its steps: trials that train `digits` for a while, two at a time, by
the driver without a scheduler (FIFO) and with `pbt`, in turn. A trial that pbt ends and the one that takes its place
make together as many steps as one of the other search. Prints the ratio of the seconds from a search's first report to
its end; checkpoints, copies of them and new models are what it has in addition.

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

from heliostat.data.prepare import Prepared, prepare
from heliostat.launch.cluster import THREADS
from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.runner import Figures, Origin, Report
from heliostat.launch.tune.space import row_settings
from heliostat.launch.tune.study import Study
from heliostat.launch.tune.trial import Training
from heliostat.recipe import Tune, Uniform, override
from pipelines.recipes.vision import digits

SLOTS, SLEEP_S = 4, 0.1
PBT_SETTINGS: dict[str, Any] = {
    "tune.space": {"optimizer.lr": {"kind": "log_uniform", "low": 1e-4, "high": 3e-2}},
    "tune.num_trials": 8,
    "tune.algorithm": "random",
    "tune.limit": 800,
    "tune.epochs": 4,
    "tune.reports": 4,
}


class Sleep:
    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        return {"CPU": 1.0}, True

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        time.sleep(SLEEP_S)
        report(1, {"loss": (values["x"] - 0.3) ** 2})
        return {}


def heliostat(trials: int, folder: Path) -> None:
    space: dict[str, Any] = {"x": Uniform(low=0, high=1)}
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


def training(scheduler: str, folder: Path, prepared: Prepared) -> float:
    """Seconds of a search of real trials."""
    recipe = override(digits(), PBT_SETTINGS | {"tune.scheduler": scheduler})
    study = Study(recipe.tune, {"accuracy": True}, 0, "search", folder)
    reports: list[float] = []
    objective = Training(recipe, {row_settings(recipe): prepared}, folder / "trials", use_gpu=False)
    Driver(study, objective, 2, reported=lambda: reports.append(time.perf_counter())).run()
    ended = time.perf_counter()
    assert sum(row["evaluations"] for row in study.rows()) == recipe.tune.num_trials * recipe.tune.reports
    return ended - reports[0]


def pbt_over_fifo(rounds: int) -> dict[str, Any]:
    took: dict[str, list[float]] = {"none": [], "pbt": []}
    with tempfile.TemporaryDirectory() as storage:
        prepared, _ = prepare(override(digits(), {"storage": storage}))
        for _, scheduler in itertools.product(range(rounds), took):
            with tempfile.TemporaryDirectory() as folder:
                took[scheduler].append(training(scheduler, Path(folder), prepared))
    ratios = [pbt / fifo for fifo, pbt in zip(took["none"], took["pbt"], strict=True)]
    return {
        "fifo_s": [round(value, 2) for value in took["none"]],
        "pbt_s": [round(value, 2) for value in took["pbt"]],
        "pbt_over_fifo": round(statistics.median(ratios), 3),
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
    environment = THREADS | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'platform'}"}
    ray.init(
        "local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    try:
        answer = measure(sorted(options.trials), options.rounds) | pbt_over_fifo(options.rounds)
        print(json.dumps(answer), file=sys.stdout, flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
