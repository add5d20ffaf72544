"""Search: Optuna proposes and judges, actors on the cluster run the trials, and a database remembers both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from heliostat.data.prepare import Prepared, prepare
from heliostat.energy import ESTIMATED, JOULES_PER_KWH
from heliostat.launch.batch import run_on_ray
from heliostat.launch.tune.baseline import compare, try_baseline
from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.gauges import Gauges
from heliostat.launch.tune.report import REPORT_FILE, write_report
from heliostat.launch.tune.runner import DONE
from heliostat.launch.tune.space import (
    check_space,
    objectives,
    row_choices,
    row_settings,
    trials_at_once,
    trials_use_gpu,
)
from heliostat.launch.tune.study import Study
from heliostat.launch.tune.trial import Training
from heliostat.launch.tune.watch import Watch
from heliostat.recipe import Recipe, override
from heliostat.record import say
from heliostat.tasks import get_task


def search(
    recipe: Recipe, prepared: Prepared, folder: Path, resume: bool = False, with_baseline: bool = False
) -> dict[str, Any]:
    """Run the recipe's search on the connected cluster; returns `best_recipe`, `best_value`, `metric`, `objectives`,
    `trials` (best first), `pareto`, the budget it was `ended_by`, what it `spent` and the file of its `report`. A trial
    that fails is listed with its error and stops nothing.

    `prepared`: the recipe's data; where the space has fields that shape rows, they are prepared for their other values
    before a trial starts. `folder`: the run's; its name is the study's. `resume`: go on with that study, its open
    trials from their last checkpoints. `with_baseline`: try the task's, where it has one; then there are `baseline`,
    `winner` and `verdict` besides."""
    import ray

    task = get_task(recipe)
    check_space(recipe, task)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    trials_at_once(recipe, nodes, "the cluster")
    goals = objectives(recipe, task)
    metric = next(iter(goals))
    study = Study(recipe.tune, goals, recipe.seed, folder.name, folder, resume)
    recipe.save(folder / "recipe.json")
    trials_folder = folder / "trials"
    # It has no loss that could be compared with a model's.
    baseline = try_baseline(recipe, prepared, folder) if with_baseline and metric == task.metric else None
    training = Training(recipe, _prepare_all(recipe, prepared), trials_folder, trials_use_gpu(recipe, nodes))
    gauges = Gauges(study)
    with Watch(study) as watch:

        def ended(row: dict[str, Any]) -> None:
            watch.ended(row)
            gauges.ended(row)
            say("trial", number=row["number"], state=row["state"], value=row[metric], reason=row["error"])

        driver = Driver(study, training, recipe.tune.max_concurrent, ended, watch.reported, gauges.tell)
        ended_by = driver.run()
    shutil.rmtree(trials_folder, ignore_errors=True)
    trials = study.rows()
    done = [trial for trial in trials if trial["state"] == DONE]
    compared = compare(baseline, metric, done[0][metric], goals[metric]) if baseline is not None and done else {}
    write_report(study, folder / REPORT_FILE, compared.get("verdict", ""))
    if not done:
        raise RuntimeError(_why_none(study, trials, ended_by))
    return {
        "best_recipe": override(recipe, done[0]["values"]).model_dump(mode="json"),
        "best_value": done[0][metric],
        "metric": metric,
        "objectives": list(goals),
        "trials": trials,
        "pareto": [trial for trial in done if trial["pareto"]],
        "ended_by": ended_by,
        "spent": {
            "hours": study.seconds / 3600,
            "gpu_hours": study.gpu_s / 3600,
            "kwh": study.joules / JOULES_PER_KWH,
            "joules_are": ESTIMATED,
        },
        "report": str(folder / REPORT_FILE),
    } | compared


def _prepare_all(recipe: Recipe, prepared: Prepared) -> dict[tuple[Any, ...], Prepared]:
    found = {row_settings(recipe): prepared}
    for values in row_choices(recipe.tune.space):
        if (key := row_settings(recipe, values)) not in found:
            found[key], _ = prepare(override(recipe, values), run_on_ray)
    return found


def _why_none(study: Study, trials: list[dict[str, Any]], ended_by: str) -> str:
    if ended_by != study.whole:
        return f"{ended_by} was spent before a trial was done"
    first = min(trials, key=lambda trial: trial["number"], default=None)
    said = f", the first failed with: {first['error']}" if first else ""
    return f"no trial of {len(trials)} finished{said}"
