"""What ending bad trials early saves: a search of `digits`, every trial to its end (`full`), and the same trials (the
same values, seeds and rows) under ASHA.

Prints the training steps and seconds that each took and their ratios, and the accuracy of the two winners, trained once
more as their trials were, on the test split, which no search has seen, with bootstrap intervals of 95%.
`full_is_better`: whether a paired bootstrap of the same rows finds the full search's winner better by more than noise.

    python -m bench.tune_savings [--trials 16] [--reports 16]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from heliostat.data.loader import open_split
from heliostat.data.prepare import Prepared, prepare
from heliostat.evaluate import confidence_interval, gain, row_sums
from heliostat.launch.cluster import connect
from heliostat.launch.tune.search import search
from heliostat.launch.tune.space import trial_recipe
from heliostat.models import bundle as bundles
from heliostat.recipe import Recipe, override
from heliostat.train.loop import train
from heliostat.train.optim import total_steps
from pipelines.recipes.vision import digits

SPACE = {
    "optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 3e-2},
    "optimizer.weight_decay": {"kind": "log_uniform", "low": 1e-3, "high": 1.0},
    "training.label_smoothing": {"kind": "uniform", "low": 0.0, "high": 0.3},
    "data.augment": {"kind": "choice", "values": ["none", "crop"]},
}


def steps(recipe: Recipe, trial: dict[str, Any], rows: int) -> int:
    """That a trial made before it ended, from how often it was evaluated."""
    own = trial_recipe(recipe, trial["values"], rows)
    batches = math.ceil(min(rows, own.data.limit or rows) / own.training.global_batch_size)
    return min(trial["evaluations"] * own.training.evaluate_every_steps, total_steps(own.schedule, batches))


def tested(recipe: Recipe, values: dict[str, Any], prepared: Prepared, folder: Path) -> dict[str, np.ndarray]:
    """Row sums on the test split of a model trained as a trial was."""
    own = trial_recipe(recipe, values, prepared.meta["rows"]["train"])
    bundle = bundles.read(Path(train(own, prepared.folder, folder)["bundle"]))
    return row_sums(bundle.model(), bundle.task(), open_split(prepared.folder, "test"))[0]


def measure(recipe: Recipe, folder: Path) -> dict[str, Any]:
    prepared, _ = prepare(recipe)
    rows, answer, sums = prepared.meta["rows"]["train"], dict[str, Any](), dict[str, dict[str, np.ndarray]]()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    with connect(recipe):
        for name, scheduler in (("full", "none"), ("asha", "asha")):
            (folder / name).mkdir()
            searched, begun = override(recipe, {"tune.scheduler": scheduler}), time.perf_counter()
            result = search(searched, prepared, folder / name)
            found[name] = {trial["number"]: trial["values"] for trial in result["trials"]}
            answer[name] = {
                "seconds": round(time.perf_counter() - begun, 1),
                "steps": sum(steps(recipe, trial, rows) for trial in result["trials"]),
                "validation": result["best_value"],
                "winner": next(trial["number"] for trial in result["trials"] if trial["state"] == "done"),
            }
    assert found["full"] == found["asha"], "the same trials"
    for name, of in answer.items():
        sums[name] = tested(recipe, found[name][of["winner"]], prepared, folder / f"{name}-winner")
        value, weight = sums[name]["accuracy"], sums[name]["weight"]
        of |= {"test": float(value.sum() / weight.sum()), "test_ci95": confidence_interval(value, weight)}
    compared = gain(prepared.task(recipe), sums["full"], sums["asha"], confidence=0.95, resamples=2000)
    return {
        "trials": recipe.tune.num_trials,
        "reports": recipe.tune.reports,
        **answer,
        "steps_ratio": round(answer["asha"]["steps"] / answer["full"]["steps"], 3),
        "seconds_ratio": round(answer["asha"]["seconds"] / answer["full"]["seconds"], 3),
        "full_is_better": compared["better"],
        "gain_of_full": compared["gain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--reports", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = override(
            digits(),
            {
                "storage": f"{folder}/storage",
                "tune.space": SPACE,
                "tune.algorithm": "random",
                "tune.num_trials": options.trials,
                "tune.reports": options.reports,
                "tune.limit": 1000,
                "tune.epochs": 4,
                "tune.max_concurrent": 2,
            },
        )
        print(json.dumps(measure(recipe, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
