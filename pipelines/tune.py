"""`python -m pipelines.tune RECIPE`: search the recipe's space; the winner is a recipe for pipelines.train."""

import sys
from typing import Any

from heliostat.data.prepare import prepare
from heliostat.hardware import this_machine
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect, logical_cpus, starts_here
from heliostat.launch.tune import check_space, search, short, trials_at_once
from heliostat.recipe import build
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    check_search(job)
    with connect(job.recipe, job.options.address):
        prepared, _ = prepare(job.recipe, run_on_ray)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        found = search(job.recipe, prepared.folder, prepared.meta["rows"]["train"], job.run_dir)
    best = job.run_dir / "best_recipe.json"
    build(found["best_recipe"]).save(best)
    table(found["trials"], found["metric"])
    return found | {"best_recipe": str(best), "metrics": {"best_value": found["best_value"]}}


def check_search(job: Job) -> None:
    """Refuse, before Ray starts, a search that cannot run."""
    check_space(job.recipe)
    if starts_here(job.options.address):
        trials_at_once(job.recipe, [{"CPU": logical_cpus(), "GPU": this_machine().gpus}], "this machine")


def table(trials: list[dict[str, Any]], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = Table(*trials[0]["values"], metric, "evaluations", "error", title="Trials, best first")
    for trial in trials:
        figures = [*trial["values"].values(), trial[metric], trial["evaluations"]]
        rows.add_row(*map(short, figures), trial["error"] or "")
    Console(stderr=True).print(rows)


if __name__ == "__main__":
    sys.exit(main("tune", run))
