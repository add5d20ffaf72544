"""`python -m pipelines.register RECIPE [--bundle FOLDER]`: a new version in the registry, promoted to champion."""

import sys
from pathlib import Path
from typing import Any

from heliostat.models import bundle as bundles
from heliostat.recipe import Refused
from heliostat.record import say
from heliostat.registry import champion, promote, register
from pipelines.job import Job, main


def newest_bundle(job: Job) -> Path | None:
    """The bundle that the recipe's newest run wrote."""
    runs = (job.recipe.storage_path / "runs").glob(f"{job.recipe.name}-*/bundle/{bundles.CARD}")
    return max((card.parent for card in runs), key=lambda path: path.parent.stat().st_mtime, default=None)


def chosen_bundle(job: Job) -> Path:
    """`--bundle`, else the champion, else the newest run's."""
    if job.options.bundle:
        return Path(job.options.bundle).expanduser().absolute()
    if (job.recipe.storage_path / "mlflow.db").exists() and (version := champion(job.recipe)):
        return version.path
    if newest := newest_bundle(job):
        return newest
    raise Refused(
        "bundle",
        f"{job.recipe.name} has no bundle in {job.recipe.storage_path}",
        f"python -m pipelines.train {job.recipe.name}, or --bundle FOLDER",
    )


def run(job: Job) -> dict[str, Any]:
    path = Path(job.options.bundle).expanduser().absolute() if job.options.bundle else newest_bundle(job)
    if path is None:
        raise Refused(
            "bundle", f"{job.recipe.name} has no run with a bundle", f"python -m pipelines.train {job.recipe.name}"
        )
    bundle = bundles.read(path)
    version = register(job.recipe, bundle, None, {"promoted": "true"})
    promote(job.recipe, version)
    say("promoted", version=version.version, bundle=str(version.path))
    return {"version": version.version, "bundle": str(version.path), "promoted": True}


if __name__ == "__main__":
    sys.exit(main("register", run))
