"""Search on Ray Tune: Optuna proposes, ASHA stops early. A trial is the one loop on few rows, on one worker or many."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from heliostat.recipe import (
    SHARD_AXES,
    SHARD_OPTIONS,
    Choice,
    Integers,
    LogUniform,
    Recipe,
    Refused,
    SearchRange,
    build,
    override,
    write_atomically,
)
from heliostat.tasks import Task, get_task
from heliostat.train.loop import train
from heliostat.train.optim import total_steps

SEARCHABLE = (
    "optimizer.",
    "schedule.",
    "training.",
    "model.config",
    "model.dropout",
    "model.freeze_layers",
    "model.lora.",
    "model.pretrained",
    "model.sync_batch_norm",
    "data.augment",
    "data.bucket_batches",
)
"""Beginnings of the paths that may be searched: all trials read the same prepared rows on equally many workers."""
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one has no silent level
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files for TensorBoard, and hints about it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the job like any other
}

PLACEMENT_GROUP = "placement_group"
LOGGERS = ("ray.tune.tune", "ray.tune.execution.tune_controller", "ray.tune.analysis.experiment_analysis")
"""They log failed trials' tracebacks and miss the files for TensorBoard."""


def check_space(recipe: Recipe) -> None:
    """Refuse a search without a space, or over what all trials share."""
    if not recipe.tune.space:
        raise Refused(
            "tune.space",
            "nothing is searched",
            'e.g. --tune.space \'{"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-3}}\'',
        )
    for path in recipe.tune.space:
        if not path.startswith(SEARCHABLE):
            raise Refused(
                "tune.space",
                f"{path} cannot be searched: trials share the prepared rows and the number of workers",
                f"search {', '.join(name.removesuffix('.') for name in SEARCHABLE)}; set {path} itself",
            )


def trials_at_once(recipe: Recipe, nodes: list[dict[str, float]], where: str) -> int:
    """How many trials fit beside each other on nodes of these resources. Refuses a search of which none ever fits."""
    wanted, cpus_each = recipe.tune.workers_per_trial, recipe.parallelism.cpus_per_worker
    gpus = _trials_use_gpu(recipe, nodes)
    workers = 0
    for node in nodes:
        fit = int(node.get("CPU", 0) // cpus_each)
        workers += min(fit, int(node.get("GPU", 0))) if gpus else fit
    if workers < wanted:
        needs, has = f"{wanted * cpus_each:g} CPUs", f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs"
        if gpus:
            needs, has = (
                f"{needs} and {wanted} GPUs",
                f"{has} and {sum(node.get('GPU', 0) for node in nodes):g} GPUs",
            )
        raise Refused(
            "tune.workers_per_trial",
            f"a trial of {wanted} workers needs {needs}, {where} has {has}",
            f"use ≤ {workers}" if workers else "lower parallelism.cpus_per_worker, or set parallelism.use_gpu false",
        )
    return workers // wanted


def _trials_use_gpu(recipe: Recipe, nodes: list[dict[str, float]]) -> bool:
    if recipe.parallelism.use_gpu is not None:
        return recipe.parallelism.use_gpu
    return sum(node.get("GPU", 0) for node in nodes) >= recipe.tune.workers_per_trial


def trial_recipe(recipe: Recipe, values: dict[str, Any], rows: int) -> Recipe:
    """What a trial runs: data-parallel workers, few of the training rows, `tune.reports` evaluations at even
    distances, and the searched values."""
    workers, limit = recipe.tune.workers_per_trial, recipe.tune.limit or recipe.data.limit
    chosen = override(
        recipe,
        {
            "data.limit": limit,
            "schedule.epochs": recipe.tune.epochs,
            "schedule.max_steps": None,
            "training.early_stopping_patience": 0,
            "checkpoint.every_steps": 1 << 30,
            **{f"parallelism.{axis}": 1 for axis in SHARD_AXES},
            **{f"parallelism.{option}": False for option in SHARD_OPTIONS},
            "parallelism.workers": workers,
        }
        | values,
    )
    global_batch_size = chosen.training.global_batch_size
    steps = total_steps(chosen.schedule, math.ceil(min(rows, limit or rows) / global_batch_size))
    return override(
        chosen,
        {
            "training.micro_batch_size": math.ceil(global_batch_size / workers),
            "training.evaluate_every_steps": math.ceil(steps / recipe.tune.reports),
        },
    )


def _trial(
    values: dict[str, Any], tree: dict[str, Any], prepared: Path, rows: int, folder: Path, use_gpu: bool
) -> None:
    from ray import tune

    recipe = trial_recipe(build(tree), values, rows)
    run_dir = folder / tune.get_context().get_trial_id()
    if recipe.parallelism.workers == 1:
        train(recipe, prepared, run_dir, report=tune.report, write_bundle=False)
    else:
        _fit_workers(recipe, prepared, run_dir, use_gpu)


def _fit_workers(recipe: Recipe, prepared: Path, run_dir: Path, use_gpu: bool) -> None:
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = {"CPU": recipe.parallelism.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    # What fails is listed with its trial.
    quiet: dict[str, Any] = {"callbacks": [TuneReportCallback()], "logging_config": LoggingConfig("CRITICAL")}
    TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "prepared": str(prepared),
            "run_dir": str(run_dir),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.parallelism.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(name="train", storage_path=str(run_dir / "ray"), **quiet),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    group = ray.util.get_current_placement_group()
    assert group is not None  # Ray Train always makes one
    write_atomically(run_dir / PLACEMENT_GROUP, group.id.hex())
    train(build(config["recipe"]), Path(config["prepared"]), run_dir, report=ray.train.report, write_bundle=False)


def _free(run_dir: Path) -> None:
    """Give back what a trial's workers reserved. Ray keeps it for the rest of the job where a trial is stopped early,
    and later trials would wait for it forever."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if (file := run_dir / PLACEMENT_GROUP).is_file():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(file.read_text())))


def search_range(spec: SearchRange) -> Any:
    """The range as Ray Tune says it."""
    from ray import tune

    if isinstance(spec, Choice):
        return tune.choice(spec.values)
    if isinstance(spec, Integers):
        return tune.randint(spec.low, spec.high + 1)
    if isinstance(spec, LogUniform):
        return tune.loguniform(spec.low, spec.high)
    return tune.uniform(spec.low, spec.high)


def _cause(error: Any) -> str:
    """The error that a trial or one of its workers raised, without what carried it here."""
    while inner := next(iter(getattr(error, "worker_failures", {}).values()), None) or getattr(error, "cause", None):
        error = inner
    text = str(error).strip()
    return text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"


def outcome(values: dict[str, Any], figures: dict[str, Any] | None, error: Any, metric: str) -> dict[str, Any]:
    """A trial as it is listed: what it tried, its last figure of the metric, and why it has none."""
    figures = figures or {}
    value, why = figures.get(metric), None
    if error is not None:
        value, why = None, _cause(error)
    elif value is None:
        why = "it ended without an evaluation"
    elif not math.isfinite(value):
        value, why = None, f"{metric} is {value}"
    return {"values": values, metric: value, "evaluations": figures.get("training_iteration", 0), "error": why}


def ranked(trials: list[dict[str, Any]], metric: str, higher_is_better: bool) -> list[dict[str, Any]]:
    """Best first, failed ones last."""
    sign = -1 if higher_is_better else 1
    return sorted(trials, key=lambda trial: math.inf if trial[metric] is None else sign * trial[metric])


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _on_end(folder: Path, number: int, metric: str) -> Any:
    """A Tune callback: for each trial that ends a line on stderr, and its workers' resources back."""
    from ray import cloudpickle, tune

    class OnEnd(tune.Callback):
        ended = 0

        def end(self, trial: Any, error: Any) -> None:
            _free(folder / trial.trial_id)
            self.ended += 1
            row = outcome(trial.config, trial.last_result, error, metric)
            values = ", ".join(f"{path}={short(value)}" for path, value in row["values"].items())
            result = f"failed: {row['error']}" if row["error"] else f"{metric} {short(row[metric])}"
            count = f"{row['evaluations']} evaluation{'' if row['evaluations'] == 1 else 's'}"
            print(f"trial {self.ended} of {number} ({values}), {count}: {result}", file=sys.stderr, flush=True)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.end(trial, None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            file = Path(trial.pickled_error_file or trial.error_file)
            known = trial.pickled_error_file and file.is_file()
            self.end(trial, cloudpickle.loads(file.read_bytes()) if known else RuntimeError(f"see {file}"))

    return OnEnd()


def search(recipe: Recipe, prepared: Path, rows: int, folder: Path) -> dict[str, Any]:
    """Run the recipe's search on the connected cluster; returns `best_recipe`, `best_value`, `metric` and `trials`
    (best first). A trial that fails is listed with its error and stops nothing."""
    import ray

    check_space(recipe)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    at_once = trials_at_once(recipe, nodes, "the cluster")
    _quieten()
    task, trials_folder = get_task(recipe), folder / "trials"
    tuner = _tuner(
        recipe,
        task,
        {"prepared": prepared, "rows": rows, "folder": trials_folder, "use_gpu": _trials_use_gpu(recipe, nodes)},
        folder,
        at_once,
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(trials_folder, ignore_errors=True)
    ended = [results[i] for i in range(len(results))]
    trials = ranked(
        [outcome(result.config or {}, result.metrics, result.error, task.metric) for result in ended],
        task.metric,
        task.higher_is_better,
    )
    if trials[0][task.metric] is None:
        raise RuntimeError(f"no trial of {len(trials)} finished, the first failed with: {trials[0]['error']}")
    return {
        "best_recipe": override(recipe, trials[0]["values"]).model_dump(mode="json"),
        "best_value": trials[0][task.metric],
        "metric": task.metric,
        "trials": trials,
    }


def _quieten() -> None:
    import optuna

    os.environ.update(QUIET)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _tuner(recipe: Recipe, task: Task, given: dict[str, Any], folder: Path, at_once: int) -> Any:
    """`given`: what every trial gets beside the recipe and its values."""
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    settings = recipe.tune
    if one_process := settings.workers_per_trial == 1:
        resources = {"cpu": recipe.parallelism.cpus_per_worker, "gpu": float(given["use_gpu"])}
    else:
        # The trial itself takes no CPU, or its workers could wait for it forever; but no request may be empty.
        resources = {"cpu": 0.0, "memory": 1.0}
    trial = tune.with_parameters(_trial, tree=recipe.model_dump(mode="json"), **given)
    return tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={path: search_range(spec) for path, spec in settings.space.items()},
        tune_config=tune.TuneConfig(
            metric=task.metric,
            mode="max" if task.higher_is_better else "min",
            num_samples=settings.num_trials,
            reuse_actors=one_process,
            max_concurrent_trials=min(settings.max_concurrent or at_once, at_once),
            search_alg=OptunaSearch(sampler=optuna.samplers.TPESampler(seed=recipe.seed)),
            scheduler=ASHAScheduler(time_attr="training_iteration", max_t=settings.reports, grace_period=1),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_on_end(given["folder"], settings.num_trials, task.metric)],
        ),
    )
