"""`python -m pipelines.tune RECIPE [--auto]`: search the recipe's space; the winner is a recipe for pipelines.train."""

import dataclasses
import sys
from typing import Any

from rich.console import Console

from heliostat.data.prepare import open_sources, prepare
from heliostat.hardware import this_machine
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect, starts_here
from heliostat.launch.tune.auto import with_auto_space
from heliostat.launch.tune.search import search
from heliostat.launch.tune.space import check_space, trials_at_once
from heliostat.launch.tune.watch import trials_table
from heliostat.placement import logical_cpus
from heliostat.recipe import build
from heliostat.tasks import get_task
from heliostat.tracking import log_run, log_trials
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    if job.options.auto:
        job = dataclasses.replace(job, recipe=with_auto_space(job.recipe, get_task(job.recipe)))
    check_search(job)
    sources = open_sources(job.recipe)
    with connect(job.recipe, job.options.address):
        prepared, _ = prepare(job.recipe, run_on_ray, sources)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        found = search(
            job.recipe, prepared, job.run_dir, resume=bool(job.options.resume), with_baseline=job.options.auto
        )
    best = job.run_dir / "best_recipe.json"
    build(found["best_recipe"]).save(best)
    metrics = {"best_value": found["best_value"]}
    if (value := found.get("baseline", {}).get("value")) is not None:
        metrics["baseline_value"] = value
    search_id = log_run(job.recipe, job.run_dir, metrics=metrics)
    if search_id is not None:
        log_trials(job.recipe, search_id, found["trials"], found["objectives"])
    Console(stderr=True).print(trials_table(found["trials"], "Trials, best first", found.get("verdict", "")))
    return found | {"best_recipe": str(best), "metrics": metrics}


def check_search(job: Job) -> None:
    """Refuse, before Ray starts, a search that cannot run."""
    check_space(job.recipe, get_task(job.recipe))
    if starts_here(job.options.address):
        trials_at_once(job.recipe, [{"CPU": logical_cpus(), "GPU": this_machine().gpus}], "this machine")


if __name__ == "__main__":
    sys.exit(main("tune", run))
