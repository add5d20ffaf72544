"""A search's baseline: the task's simplest honest method, on the rows that trials are trained on and measured by."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from heliostat.data.loader import open_split, training_loader
from heliostat.data.prepare import Prepared
from heliostat.launch.tune.runner import cause
from heliostat.launch.tune.space import trial_recipe
from heliostat.recipe import Recipe, override, write_atomically

FIGURES_FILE = "baseline.json"
ESTIMATOR_FILE = "baseline.skops"
BASELINE, BEST_RECIPE = "baseline", "best_recipe"
"""What may win: the keys of a search's answer."""


def try_baseline(recipe: Recipe, prepared: Prepared, folder: Path) -> dict[str, Any] | None:
    """On the connected cluster: its `name`, the `value` of the task's metric on the validation rows, its `settings`,
    `seconds`, and the file of its `estimator`. None where the task has none; where it fails, `error` says why. In
    the folder of a search that is gone on with, it is there already."""
    import ray

    figures = folder / FIGURES_FILE
    if figures.is_file():
        return json.loads(figures.read_text(encoding="utf-8"))
    fit = ray.remote(_fit).options(num_cpus=recipe.parallelism.cpus_per_worker)
    try:
        found = ray.get(fit.remote(recipe, prepared, folder))
    except ray.exceptions.RayError as error:
        return {"name": BASELINE, "value": None, "error": cause(error)}
    if found is not None:
        write_atomically(figures, json.dumps(found))
    return found


def _fit(recipe: Recipe, prepared: Prepared, folder: Path) -> dict[str, Any] | None:
    begun = time.perf_counter()
    limit = trial_recipe(recipe, {}, prepared.meta["rows"]["train"]).data.limit
    task = prepared.task(recipe)
    rows = open_split(prepared.folder, "train")
    if limit is not None:
        order = training_loader(override(recipe, {"data.limit": limit}), prepared).order
        rows = rows.take(np.sort(order.rows(0, 0, order.total)))
    baseline = task.baseline(rows, open_split(prepared.folder, "validation"))
    if baseline is None:
        return None
    return {
        "name": baseline.name,
        "value": baseline.value(task.metric),
        "settings": baseline.settings,
        "rows": rows.num_rows,
        "seconds": time.perf_counter() - begun,
        "estimator": _save(baseline.estimator, folder / ESTIMATOR_FILE),
    }


def _save(estimator: Any, path: Path) -> str | None:
    """In skops' format, which no pickle is needed to read."""
    if estimator is None:
        return None
    import skops.io

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    skops.io.dump(estimator, beside)
    os.replace(beside, path)
    return str(path)


def compare(baseline: dict[str, Any], metric: str, best: float, more_is_better: bool) -> dict[str, Any]:
    """What a search answers besides: the `baseline`, the `winner` (which of the keys `baseline` and `best_recipe`), and
    the `verdict` in words. `best`: the best trial's value. Of equals the simpler wins."""
    value = baseline["value"]
    if value is None:
        return {"baseline": baseline, "winner": BEST_RECIPE, "verdict": f"The baseline failed: {baseline['error']}"}
    wins = value >= best if more_is_better else value <= best
    verdict = f"{baseline['name']} has {metric} {value:.4g}, the best trial {best:.4g}"
    verdict = f"The baseline {'wins' if wins else 'loses'}: {verdict}."
    if wins and baseline["estimator"]:
        verdict += f" What was fitted is kept in {ESTIMATOR_FILE}; {BEST_RECIPE}.json is the best trial's."
    return {"baseline": baseline, "winner": BASELINE if wins else BEST_RECIPE, "verdict": verdict}
