"""What a search may try: checked before a trial starts, drawn by Optuna, and made a recipe."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from heliostat.launch.tune.population import CHANGEABLE
from heliostat.recipe import (
    SHARD_AXES,
    SHARD_OPTIONS,
    Choice,
    Integers,
    LogUniform,
    Recipe,
    Refused,
    SearchRange,
    nearest,
    override,
)
from heliostat.tasks import Task
from heliostat.train.optim import total_steps

if TYPE_CHECKING:
    from optuna import Trial

SHARED = ("data.", "model.name", "model.max_length", "seed", "name", "storage", "task", "tune.", "tracking.", "deploy.")
"""Beginnings of the paths that all trials share: they read the same prepared rows."""
OWN = ("data.augment", "data.bucket_batches")
"""Of those, what a trial may have for itself."""
COSTS = {"seconds": False, "parameters": False}
"""Objectives beside the task's metric, and whether more of them is better."""
SINGLE_VALUE = ("asha", "hyperband", "median", "pbt")


def check_space(recipe: Recipe, task: Task) -> None:
    """Refuse a search without a space, over what all trials share, or that its algorithm cannot make."""
    tune = recipe.tune
    if not tune.space:
        raise Refused(
            "tune.space",
            "nothing is searched",
            'e.g. --tune.space \'{"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-3}}\'',
        )
    for path, spec in tune.space.items():
        if path.startswith(SHARED) and not path.startswith(OWN):
            raise Refused(
                "tune.space", f"{path} cannot be searched: trials share the prepared rows", f"set {path} itself"
            )
        if tune.scheduler == "pbt" and (spec.when or not path.startswith(CHANGEABLE)):
            raise Refused(
                "tune.space",
                f"{path} cannot change in mid-training, which is what pbt does",
                f"search {', '.join(name.removesuffix('.') for name in CHANGEABLE)}, without when",
            )
        if tune.algorithm == "grid" and (spec.when or not isinstance(spec, Choice | Integers)):
            raise Refused("tune.space", f"a grid has no points for {path}", "use choice or int, without when")
    names = objectives(recipe, task)
    for name in names:
        if name != task.metric and name not in COSTS:
            known = [task.metric, *COSTS]
            raise Refused("tune.objectives", f"no objective {name!r}", nearest(name, known) or ", ".join(known))
    if next(iter(names)) != task.metric:
        raise Refused("tune.objectives", f"trials report {task.metric}", f"name it first: {task.metric} …")
    if len(names) > 1 and tune.scheduler in SINGLE_VALUE:
        raise Refused(
            "tune.scheduler", f"{tune.scheduler} ranks trials by one value, here are {len(names)}", "set it none"
        )


def objectives(recipe: Recipe, task: Task) -> dict[str, bool]:
    """Each objective, and whether more of it is better."""
    names = recipe.tune.objectives or [task.metric]
    return {name: task.higher_is_better if name == task.metric else COSTS.get(name, False) for name in names}


def draw(trial: Trial, space: dict[str, SearchRange]) -> dict[str, Any]:
    """A trial's values. `space`: in the order of `Tune.in_order`."""
    values: dict[str, Any] = {}
    for path, spec in space.items():
        if not all(path in values and values[path] in allowed for path, allowed in spec.when.items()):
            continue
        if isinstance(spec, Choice):
            values[path] = trial.suggest_categorical(path, spec.values)
        elif isinstance(spec, Integers):
            values[path] = trial.suggest_int(path, spec.low, spec.high)
        else:
            values[path] = trial.suggest_float(path, spec.low, spec.high, log=isinstance(spec, LogUniform))
    return values


def grid(space: dict[str, SearchRange]) -> list[dict[str, Any]]:
    """Every combination, the last path's values changing fastest."""
    points = [
        spec.values if isinstance(spec, Choice) else range(int(spec.low), int(spec.high) + 1) for spec in space.values()
    ]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*points)]


def trial_recipe(recipe: Recipe, values: dict[str, Any], rows: int) -> Recipe:
    """What a trial runs: data-parallel workers unless the layout is searched, few of the training rows,
    `tune.reports` evaluations at even distances, and the searched values."""
    workers, limit = recipe.tune.workers_per_trial, recipe.tune.limit or recipe.data.limit
    chosen = override(
        recipe,
        {
            "data.limit": limit,
            "schedule.epochs": recipe.tune.epochs,
            "schedule.max_steps": None,
            "training.early_stopping_patience": 0,
            "checkpoint.storage": "",
            "checkpoint.every_steps": 0,
            "checkpoint.max_failures": recipe.tune.max_failures,
            "parallelism.workers": workers,
            "parallelism.min_workers": None,
            **{f"parallelism.{axis}": 1 for axis in SHARD_AXES},
            **{f"parallelism.{option}": False for option in SHARD_OPTIONS},
        }
        | values,
    )
    global_batch_size = chosen.training.global_batch_size
    steps = total_steps(chosen.schedule, math.ceil(min(rows, limit or rows) / global_batch_size))
    own: dict[str, Any] = {"training.evaluate_every_steps": math.ceil(steps / recipe.tune.reports)}
    if recipe.tune.scheduler == "pbt":  # others go on from here
        own |= {
            "checkpoint.every_steps": own["training.evaluate_every_steps"],
            "checkpoint.keep": recipe.tune.reports,
            "checkpoint.asynchronous": False,
        }
    if "training.micro_batch_size" not in values and chosen.parallelism.pipeline == 1:
        own["training.micro_batch_size"] = math.ceil(global_batch_size / chosen.parallelism.replicate)
    return override(chosen, own)


def needs(recipe: Recipe, use_gpu: bool) -> dict[str, float]:
    """What a trial takes of a cluster."""
    workers = recipe.parallelism.workers
    return {"CPU": workers * recipe.parallelism.cpus_per_worker} | ({"GPU": float(workers)} if use_gpu else {})


def trials_at_once(recipe: Recipe, nodes: list[dict[str, float]], where: str) -> int:
    """How many trials fit beside each other on nodes of these resources. Refuses a search of which none ever fits."""
    wanted, cpus_each = recipe.tune.workers_per_trial, recipe.parallelism.cpus_per_worker
    gpus = trials_use_gpu(recipe, nodes)
    workers = 0
    for node in nodes:
        fit = int(node.get("CPU", 0) // cpus_each)
        workers += min(fit, int(node.get("GPU", 0))) if gpus else fit
    if workers < wanted:
        need, has = f"{wanted * cpus_each:g} CPUs", f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs"
        if gpus:
            need, has = (
                f"{need} and {wanted} GPUs",
                f"{has} and {sum(node.get('GPU', 0) for node in nodes):g} GPUs",
            )
        raise Refused(
            "tune.workers_per_trial",
            f"a trial of {wanted} workers needs {need}, {where} has {has}",
            f"use ≤ {workers}" if workers else "lower parallelism.cpus_per_worker, or set parallelism.use_gpu false",
        )
    return workers // wanted


def trials_use_gpu(recipe: Recipe, nodes: list[dict[str, float]]) -> bool:
    if recipe.parallelism.use_gpu is not None:
        return recipe.parallelism.use_gpu
    return sum(node.get("GPU", 0) for node in nodes) >= recipe.tune.workers_per_trial
