"""`python -m pipelines.train RECIPE`: a bundle from a recipe."""

import sys
from typing import Any

from heliostat.data.prepare import open_sources, prepare
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect
from heliostat.launch.train import fit
from heliostat.tracking import log_run
from heliostat.train.ledger import figures
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    sources = open_sources(job.recipe)
    with connect(job.recipe, job.options.address):
        prepared, _ = prepare(job.recipe, run_on_ray, sources)
        outcome = fit(job.recipe, prepared.folder, job.run_dir)
    if outcome["status"] != "failed":
        log_run(job.recipe, job.run_dir, metrics=outcome["metrics"] | figures(outcome["ledger"]))
    return outcome


if __name__ == "__main__":
    sys.exit(main("train", run))
