"""Whether what a recipe asks for can ever be placed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


def at_largest(config: dict[str, Any], there: Node, num_nodes: int) -> Node:
    """What a cluster could grow to, at most, by the file that its autoscaler goes by: what `there` is on `num_nodes`,
    and on more the best that a type of node has. Infinite where a type does not say what it has."""
    left = config["max_workers"] - (num_nodes - 1)

    def most(resource: str) -> float:
        each = [
            body["resources"].get(resource, 0) if body["resources"] else math.inf
            for body in config["available_node_types"].values()
            for _ in range(min(left, body.get("max_workers", left)))
        ]
        return sum(sorted(each)[-left:])

    return Node(there.cpus + most("CPU"), there.gpus + most("GPU")) if left > 0 else there


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
