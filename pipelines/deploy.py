"""`python -m pipelines.deploy RECIPE [--bundle FOLDER] [--keep]`: a bundle behind an autoscaled endpoint."""

import sys
import time
from typing import Any

from heliostat.installed import check_engine
from heliostat.launch.cluster import connect, dashboard
from heliostat.models import bundle as bundles
from heliostat.record import say
from pipelines.answer import end_on_signals
from pipelines.job import Job, main
from pipelines.register import chosen_bundle
from serve import keys
from serve.application import check_served, deploy


def run(job: Job) -> dict[str, Any]:
    bundle = bundles.read(chosen_bundle(job))
    keys.check(job.recipe.deploy.keys_file)  # before Ray starts
    check_engine(job.recipe.deploy)
    check_served(bundle.path, job.recipe.deploy)
    with connect(job.recipe, job.options.address, job.options.keep):
        end_on_signals()
        endpoint = deploy(bundle.path, bundle.digest[:12], job.recipe.deploy, job.recipe.name)
        say("deployed", endpoint=endpoint, bundle=str(bundle.path))
        kept = f"; `make stop` ends it; Ray dashboard: {dashboard()}" if job.options.keep else ""
        print(f"serving {bundle.path} at {endpoint}{kept}", flush=True)
        try:
            while not (job.options.keep or job.options.address):
                time.sleep(1)  # until Ctrl-C: the cluster lives as long as this job
        except KeyboardInterrupt:
            pass
    return {"endpoint": endpoint, "bundle": str(bundle.path)}


if __name__ == "__main__":
    sys.exit(main("deploy", run))
