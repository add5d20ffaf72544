"""What a search may try: checked before a trial starts, drawn by Optuna, and made a recipe."""

from __future__ import annotations

import itertools
import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from heliostat.launch.tune.population import CHANGEABLE
from heliostat.models.load import transformers_config
from heliostat.recipe import (
    OPEN,
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

ROWS = ("data.sequence_length", "data.pack", "data.isolate_documents", "model.max_length", "model.truncation")
"""Paths that shape prepared rows and not what is in a split: rows are prepared for each of their values."""
MOST_ROWS = 16
"""Kinds of prepared rows in one search."""
SHARED = (
    *("data.", "model.name", "model.tokenizer"),  # trials would not be measured by the same rows or tokens
    *("seed", "name", "storage", "task", "tune.", "energy.", "tracking.", "deploy."),
)
"""Beginnings of the paths that all trials share."""
OWN = ("data.augment", "data.bucket_batches", *ROWS)
"""Of those, what a trial may have for itself."""
LOSS = "loss"
"""What evaluation reports of every task beside its metric. Short trials may differ in it alone."""
COSTS = ("seconds", "parameters", "joules", "latency")
"""Objectives beside the task's metric: less of them is better."""
SINGLE_VALUE = ("asha", "hyperband", "median", "pbt")


def check_space(recipe: Recipe, task: Task) -> None:
    """Refuse a search without a space, over what all trials share, or that its algorithm cannot make."""
    tune = recipe.tune
    if not tune.space:
        raise Refused(
            "tune.space",
            "nothing is searched",
            'e.g. --tune.space \'{"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-3}}\', or --auto',
        )
    for path, spec in tune.space.items():
        if path.startswith(SHARED) and not path.startswith(OWN):
            raise Refused(
                "tune.space", f"{path} cannot be searched: it is the same for all trials", f"set {path} itself"
            )
        if path.startswith(OPEN):
            value = spec.values[0] if isinstance(spec, Choice) else spec.low
            transformers_config(override(recipe, {path: value}, check_tune=False).model)  # which knows its fields
        if path in ROWS and not isinstance(spec, Choice):
            raise Refused("tune.space", f"rows are prepared for each value of {path} beforehand", "use choice")
        if tune.scheduler == "pbt" and (spec.when or not path.startswith(CHANGEABLE)):
            raise Refused(
                "tune.space",
                f"{path} cannot change in mid-training, which is what pbt does",
                f"search {', '.join(name.removesuffix('.') for name in CHANGEABLE)}, without when",
            )
        if tune.algorithm == "grid" and (spec.when or not isinstance(spec, Choice | Integers)):
            raise Refused("tune.space", f"a grid has no points for {path}", "use choice or int, without when")
    if (kinds := len(row_choices(tune.space))) > MOST_ROWS:
        among = ", ".join(path for path in tune.space if path in ROWS)
        raise Refused("tune.space", f"{among} make {kinds} kinds of prepared rows", f"at most {MOST_ROWS}")
    names = objectives(recipe, task)
    reported = list(dict.fromkeys([task.metric, LOSS]))
    for name in names:
        if name not in (known := [*reported, *COSTS]):
            raise Refused("tune.objectives", f"no objective {name!r}", nearest(name, known) or ", ".join(known))
    if next(iter(names)) not in reported:
        raise Refused("tune.objectives", f"trials report {' and '.join(reported)}", f"name it first: {task.metric} …")
    if len(names) > 1 and tune.scheduler in SINGLE_VALUE:
        raise Refused(
            "tune.scheduler", f"{tune.scheduler} ranks trials by one value, here are {len(names)}", "set it none"
        )


def objectives(recipe: Recipe, task: Task) -> dict[str, bool]:
    """Each objective, and whether more of it is better."""
    names = recipe.tune.objectives or [task.metric]
    return {name: name == task.metric and task.higher_is_better for name in names}


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


def row_choices(space: dict[str, SearchRange]) -> list[dict[str, Any]]:
    """The values of `ROWS` that trials may have together; a path is absent where its condition may fail."""
    absent = object()
    points = [
        [(path, value) for value in (*spec.values, *([absent] if spec.when else []))]
        for path, spec in space.items()
        if path in ROWS and isinstance(spec, Choice)
    ]
    return [{path: value for path, value in each if value is not absent} for each in itertools.product(*points)]


def row_settings(recipe: Recipe, values: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """What `ROWS` are of a recipe with a trial's values: equal where prepared rows are."""
    own = zip(ROWS, attrgetter(*ROWS)(recipe), strict=True)
    return tuple((values or {}).get(path, value) for path, value in own)


def trial_recipe(recipe: Recipe, values: dict[str, Any], rows: int) -> Recipe:
    """What a trial runs: data-parallel workers unless the layout is searched, few of the training rows,
    `tune.reports` evaluations at even distances, and the searched values."""
    workers, limit = recipe.tune.workers_per_trial, recipe.tune.limit or recipe.data.limit
    chosen = override(
        recipe,
        {
            "data.limit": limit,
            "data.validation_limit": recipe.tune.validation_limit or recipe.data.validation_limit,
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
    own: dict[str, Any] = {
        "training.evaluate_every_steps": math.ceil(steps / recipe.tune.reports),
        "training.keep_best": False,  # what is reported last is of the last weights
    }
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
    parallelism = recipe.parallelism
    return {name: parallelism.workers * amount for name, amount in parallelism.worker_resources(use_gpu).items()}


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
