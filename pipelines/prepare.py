"""`python -m pipelines.prepare RECIPE`: source rows to prepared Parquet."""

import sys
from typing import Any

from heliostat.data.prepare import describe, open_sources, prepare
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    sources = open_sources(job.recipe)
    with connect(job.recipe, job.options.address):
        prepared, made = prepare(job.recipe, run_on_ray, sources)
    print(f"{'prepared' if made else 'already prepared'}: {prepared.folder}")
    for name, said in describe(prepared):
        print(f"{name}: {said}")
    return {
        "data": str(prepared.folder),
        "fingerprint": prepared.fingerprint,
        "rows": prepared.meta["rows"],
        "made": made,
        "metrics": {f"rows.{split}": count for split, count in prepared.meta["rows"].items()},
    }


if __name__ == "__main__":
    sys.exit(main("prepare", run))
