"""`python -m pipelines.bundle RECIPE`: the recipe's pre-trained model as a bundle, as it is, to deploy or evaluate."""

import sys
from typing import Any

from heliostat.models import bundle as bundles
from heliostat.models.load import build_model, processor_facts
from heliostat.recipe import Refused
from heliostat.tasks import Task, get_task
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    model, command = job.recipe.model, f"python -m pipelines.train {job.recipe.name}"
    if not (model.name and model.pretrained):
        raise Refused("model.name", "the recipe starts from no pre-trained model", command)
    task = get_task(job.recipe)
    if type(task).fit is not Task.fit:
        raise Refused("task", f"{job.recipe.task} learns from training rows what it predicts", command)
    processor = task.processor()
    task = get_task(job.recipe, processor_facts(processor) | task.pretrained_facts())
    built = build_model(task)
    if lacking := [name for name in sorted(built.new_parameters) if not name.startswith(task.unused)]:
        raise Refused("model.name", f"{lacking[0]} is not among its weights: it must be trained", command)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    lineage = {"pretrained": model.name}
    bundle = bundles.write(
        job.run_dir / "bundle", task, built.state_dict(), processor, data={}, metrics={}, lineage=lineage
    )
    return {"bundle": str(bundle.path), "digest": bundle.digest}


if __name__ == "__main__":
    sys.exit(main("bundle", run))
