"""`python -m pipelines.predict RECIPE --input SOURCE [--bundle FOLDER]`: predictions for a data set, as Parquet."""

import sys
from typing import Any

from heliostat.data.sources import open_source
from heliostat.launch.batch import predict
from heliostat.launch.cluster import connect
from heliostat.models import bundle as bundles
from pipelines.job import Job, main
from pipelines.register import chosen_bundle


def run(job: Job) -> dict[str, Any]:
    bundle = bundles.read(chosen_bundle(job))
    open_source(job.options.input, "input")
    folder = job.run_dir / "predictions"
    with connect(job.recipe, job.options.address):
        rows = predict(bundle.path, job.options.input, folder)
    return {"predictions": str(folder), "rows": rows, "bundle": str(bundle.path)}


if __name__ == "__main__":
    sys.exit(main("predict", run))
