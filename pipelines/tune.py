"""`python -m pipelines.tune RECIPE`: search the recipe's space; the winner is a recipe for pipelines.train."""

import sys
from typing import Any

from heliostat.data.prepare import prepare
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect
from heliostat.launch.tune import search
from heliostat.recipe import build
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    with connect(job.recipe, job.options.address):
        prepared, _ = prepare(job.recipe, run_on_ray)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        found = search(job.recipe, prepared.folder, prepared.meta["rows"]["train"], job.run_dir)
    best = job.run_dir / "best_recipe.json"
    build(found["best_recipe"]).save(best)
    return found | {"best_recipe": str(best), "metrics": {"best_value": found["best_value"]}}


if __name__ == "__main__":
    sys.exit(main("tune", run))
