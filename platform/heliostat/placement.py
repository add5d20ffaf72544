"""Whether what a recipe asks for can ever be placed."""

from __future__ import annotations

from typing import NamedTuple

from heliostat.hardware import this_machine
from heliostat.recipe import Recipe, Refused


class Node(NamedTuple):
    cpus: float
    gpus: float

    def workers(self, cpus_per_worker: float, use_gpu: bool) -> int:
        """How many fit on it, with a GPU each or with none."""
        fit = int(self.cpus // cpus_per_worker)
        return min(fit, int(self.gpus)) if use_gpu else fit


def logical_cpus() -> int:
    """What a cluster on this machine declares: workers of a tiny run may share cores, and drivers must not starve."""
    return max(8, 4 * this_machine().cpus)


def check_placement(recipe: Recipe, cpus: float, gpus: float, where: str) -> None:
    """Refuse what could never be placed."""
    parallelism = recipe.parallelism
    workers = parallelism.min_workers or parallelism.workers
    needed = workers * parallelism.cpus_per_worker
    if parallelism.use_gpu and workers > gpus:
        raise Refused(
            "parallelism.use_gpu",
            f"{workers} GPUs are asked for, {where} has {gpus:g}",
            "set parallelism.use_gpu false, or fewer workers",
        )
    if needed > cpus:
        raise Refused(
            "parallelism.workers",
            f"{workers} workers need {needed:g} CPUs, {where} has {cpus:g}",
            f"use ≤ {int(cpus // parallelism.cpus_per_worker)} workers",
        )
