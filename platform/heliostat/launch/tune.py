"""Search on Ray Tune: Optuna proposes, ASHA stops early. A trial is the one loop on few rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from heliostat.recipe import Choice, Integers, LogUniform, Recipe, Refused, SearchRange, build, override
from heliostat.tasks import get_task
from heliostat.train.loop import train


def trial_recipe(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """What a trial runs: one process, few rows, the searched values."""
    chosen = override(
        recipe,
        {
            "data.limit": recipe.tune.limit,
            "schedule.epochs": recipe.tune.epochs,
            "schedule.max_steps": None,
            "training.early_stopping_patience": 0,
            "checkpoint.every_steps": 1 << 30,
            "training.micro_batch_size": recipe.training.global_batch_size,
            **{f"parallelism.{axis}": 1 for axis in ("fsdp", "tensor", "pipeline")},
            "parallelism.workers": 1,
        }
        | values,
    )
    return chosen


def _trial(config: dict[str, Any]) -> None:
    from ray import tune

    recipe = build(config["recipe"])
    values = {path: value for path, value in config.items() if path not in ("recipe", "prepared", "rows")}
    trial = trial_recipe(recipe, values)
    steps = max(1, int(trial.schedule.epochs * -(-config["rows"] // trial.training.global_batch_size)))
    trial = override(trial, {"training.evaluate_every_steps": max(1, steps // trial.tune.reports)})
    with tempfile.TemporaryDirectory() as folder:
        train(
            trial,
            Path(config["prepared"]),
            Path(folder),
            report=lambda figures: tune.report(figures),
            write_bundle=False,
        )


def _range(spec: SearchRange) -> Any:
    from ray import tune

    if isinstance(spec, Choice):
        return tune.choice(spec.values)
    if isinstance(spec, Integers):
        return tune.randint(spec.low, spec.high + 1)
    if isinstance(spec, LogUniform):
        return tune.loguniform(spec.low, spec.high)
    return tune.uniform(spec.low, spec.high)


def _outcome(result: Any, recipe: Recipe, metric: str) -> dict[str, Any]:
    figures, config = result.metrics or {}, result.config or {}
    return {
        "values": {path: config.get(path) for path in recipe.tune.space},
        metric: figures.get(metric),
        "evaluations": figures.get("training_iteration", 0),
        "error": str(result.error) if result.error else None,
    }


def search(recipe: Recipe, prepared: Path, rows: int, folder: Path) -> dict[str, Any]:
    """Run the recipe's search; returns `best_recipe`, `best_value` and `trials` (best first)."""
    if not recipe.tune.space:
        raise Refused(
            "tune.space",
            "nothing is searched",
            'e.g. --tune.space \'{"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-3}}\'',
        )
    if recipe.tune.workers_per_trial != 1:
        raise Refused("tune.workers_per_trial", "trials of several workers are not supported yet", "use 1")
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = get_task(recipe)
    mode = "max" if task.higher_is_better else "min"
    rows = min(rows, recipe.tune.limit or rows)
    fixed = {"recipe": recipe.model_dump(mode="json"), "prepared": str(prepared), "rows": rows}
    tuner = tune.Tuner(
        tune.with_resources(_trial, {"cpu": 1}),
        param_space=fixed | {path: _range(spec) for path, spec in recipe.tune.space.items()},
        tune_config=tune.TuneConfig(
            metric=task.metric,
            mode=mode,
            num_samples=recipe.tune.num_trials,
            reuse_actors=True,
            max_concurrent_trials=recipe.tune.max_concurrent or None,
            search_alg=OptunaSearch(sampler=optuna.samplers.TPESampler(seed=recipe.seed)),
            scheduler=ASHAScheduler(time_attr="training_iteration", max_t=recipe.tune.reports, grace_period=1),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    trials = [_outcome(results[i], recipe, task.metric) for i in range(len(results))]
    finished = [trial for trial in trials if trial[task.metric] is not None]
    if not finished:
        raise RuntimeError(f"no trial of {len(trials)} finished: {trials[0]['error']}")
    finished.sort(key=lambda trial: trial[task.metric], reverse=task.higher_is_better)
    best = finished[0]
    failed = [trial for trial in trials if trial[task.metric] is None]
    return {
        "best_recipe": override(recipe, best["values"]).model_dump(mode="json"),
        "best_value": best[task.metric],
        "trials": finished + failed,
    }
