"""Search: Optuna proposes and judges, actors on the cluster run the trials, and a database remembers both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.report import REPORT_FILE, write_report
from heliostat.launch.tune.runner import DONE
from heliostat.launch.tune.space import check_space, objectives, trials_at_once, trials_use_gpu
from heliostat.launch.tune.study import Study
from heliostat.launch.tune.trial import Training
from heliostat.launch.tune.watch import Watch
from heliostat.recipe import Recipe, override
from heliostat.tasks import get_task


def search(recipe: Recipe, prepared: Path, rows: int, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Run the recipe's search on the connected cluster; returns `best_recipe`, `best_value`, `metric`, `objectives`,
    `trials` (best first), `pareto` and the file of its `report`. A trial that fails is listed with its error and stops
    nothing.

    `folder`: the run's; its name is the study's. `resume`: go on with that study, its open trials from their last
    checkpoints."""
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
    training = Training(recipe, prepared, rows, trials_folder, trials_use_gpu(recipe, nodes))
    with Watch(study) as watch:
        Driver(study, training, recipe.tune.max_concurrent, watch.ended, watch.reported).run()
    shutil.rmtree(trials_folder, ignore_errors=True)
    write_report(study, folder / REPORT_FILE)
    trials = study.rows()
    done = [trial for trial in trials if trial["state"] == DONE]
    if not done:
        raise RuntimeError(_why_none(study, trials))
    return {
        "best_recipe": override(recipe, done[0]["values"]).model_dump(mode="json"),
        "best_value": done[0][metric],
        "metric": metric,
        "objectives": list(goals),
        "trials": trials,
        "pareto": [trial for trial in done if trial["pareto"]],
        "report": str(folder / REPORT_FILE),
    }


def _why_none(study: Study, trials: list[dict[str, Any]]) -> str:
    if budget := study.spent():
        return f"{budget} was spent before a trial was done"
    first = min(trials, key=lambda trial: trial["number"], default=None)
    said = f", the first failed with: {first['error']}" if first else ""
    return f"no trial of {len(trials)} finished{said}"
