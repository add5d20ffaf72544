"""What a search samples, what a trial runs, what fits, and how trials are ranked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from heliostat.launch.tune import check_space, outcome, ranked, search_range, trial_recipe, trials_at_once
from heliostat.recipe import Choice, Integers, LogUniform, Recipe, Refused, SearchRange, Uniform, override
from tests.recipes import tiny_bert

LR = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_bert(
        tmp_path_factory.mktemp("search"),
        **{
            "data.limit": 64,
            "parallelism.workers": 4,
            "parallelism.fsdp": 2,
            "training.early_stopping_patience": 1,
            "tune.epochs": 5,
            "tune.reports": 4,
            "tune.space": LR,
        },
    )


def samples(spec: SearchRange, number: int = 400) -> list[Any]:
    domain = search_range(spec)
    return [domain.sample() for _ in range(number)]


def test_ranges_hold_what_they_say() -> None:
    assert set(samples(Choice(values=["a", 2, True]))) == {"a", 2, True}
    assert set(samples(Integers(low=2, high=4))) == {2, 3, 4}, "both ends belong to it"
    uniform = samples(Uniform(low=-1, high=3))
    assert all(-1 <= value <= 3 for value in uniform)
    assert sum(value > 1 for value in uniform) == pytest.approx(200, abs=70)
    log = samples(LogUniform(low=1e-5, high=1e-1))
    assert all(1e-5 <= value <= 1e-1 for value in log)
    assert sum(value > 1e-3 for value in log) == pytest.approx(200, abs=70), "half of it lies above the middle decade"


def test_trial_recipe(recipe: Recipe) -> None:
    trial = trial_recipe(recipe, {"optimizer.lr": 0.005, "training.global_batch_size": 12}, rows=50)
    assert trial.optimizer.lr == 0.005
    assert (trial.parallelism.workers, trial.parallelism.fsdp, trial.training.micro_batch_size) == (1, 1, 12)
    assert (trial.schedule.epochs, trial.schedule.max_steps) == (5, None)
    assert trial.data.limit == 64, "a trial never sees more than the recipe does"
    assert trial.training.early_stopping_patience == 0
    # 50 rows are 5 batches of 12; 25 steps are evaluated after 7, 14, 21 and at the end.
    assert trial.training.evaluate_every_steps == 7
    assert trial.tune == recipe.tune
    assert trial.model == recipe.model


def test_trials_split_no_model(recipe: Recipe) -> None:
    split = {"parallelism.tensor": 2, "parallelism.sequence_parallel": True, "parallelism.loss_parallel": True}
    trial = trial_recipe(override(recipe, split), {}, rows=50)
    assert (trial.parallelism.shards, trial.parallelism.sequence_parallel) == (1, False)


def test_trial_of_several_workers_shares_the_global_batch(recipe: Recipe) -> None:
    several = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"workers_per_trial": 3, "limit": 32})})
    trial = trial_recipe(several, {}, rows=1000)
    assert (trial.parallelism.workers, trial.parallelism.replicate) == (3, 3)
    assert trial.training.global_batch_size == 16
    assert trial.training.micro_batch_size == 6, "the least that holds 16 rows in one micro-batch of three workers"
    assert trial.data.limit == 32
    assert trial.training.evaluate_every_steps == 3, "2 steps an epoch, 5 epochs, at most 4 evaluations"


@pytest.mark.parametrize(
    ("workers", "cpus_each", "nodes", "expected"),
    [
        (1, 1, [{"CPU": 8}], 8),
        (2, 1, [{"CPU": 8}], 4),
        (3, 1, [{"CPU": 8}], 2),
        (2, 0.5, [{"CPU": 2}], 2),
        (1, 2, [{"CPU": 3}, {"CPU": 3}], 2),  # what is left of two nodes is not a worker's place
        (2, 2, [{"CPU": 64, "GPU": 4}], 2),
        (3, 1, [{"CPU": 64, "GPU": 2}], 21),  # too few GPUs: on CPUs
    ],
)
def test_trials_at_once(
    recipe: Recipe, workers: int, cpus_each: float, nodes: list[dict[str, float]], expected: int
) -> None:
    assert trials_at_once(sized(recipe, workers, cpus_each), nodes, "here") == expected


def sized(recipe: Recipe, workers: int, cpus_each: float, use_gpu: bool | None = None) -> Recipe:
    return recipe.model_copy(
        update={
            "tune": recipe.tune.model_copy(update={"workers_per_trial": workers}),
            "parallelism": recipe.parallelism.model_copy(update={"cpus_per_worker": cpus_each, "use_gpu": use_gpu}),
        }
    )


def test_a_trial_that_never_fits_is_refused(recipe: Recipe) -> None:
    for workers, nodes, use_gpu, suggestion in [
        (9, [{"CPU": 8.0}], None, "use ≤ 4"),
        (4, [{"CPU": 3.0}, {"CPU": 3.0}], None, "use ≤ 2"),
        (1, [{"CPU": 1.0}], None, "parallelism.cpus_per_worker"),
        (2, [{"CPU": 8.0, "GPU": 1.0}], True, "use ≤ 1"),
    ]:
        with pytest.raises(Refused) as refused:
            trials_at_once(sized(recipe, workers, 2, use_gpu), nodes, "here")
        assert refused.value.field == "tune.workers_per_trial"
        assert suggestion in refused.value.suggestion


@pytest.mark.parametrize("path", ["data.sequence_length", "model.max_length", "parallelism.workers", "seed"])
def test_what_trials_share_is_not_searched(path: str, tmp_path: Path) -> None:
    space = {path: {"kind": "choice", "values": [1, 2]}}
    with pytest.raises(Refused, match=path) as refused:
        check_space(tiny_bert(tmp_path, **{"tune.space": space}))
    assert refused.value.field == "tune.space"


def test_ranking_puts_failures_last() -> None:
    error = Refused("model.freeze_layers", "99 of 2 blocks")
    rows = [
        outcome({"x": 1}, {"loss": 0.5, "training_iteration": 2}, None, "loss"),
        outcome({"x": 2}, {"loss": math.nan, "training_iteration": 1}, None, "loss"),
        outcome({"x": 3}, {"loss": 0.1, "training_iteration": 1}, error, "loss"),
        outcome({"x": 4}, {"loss": 0.3, "training_iteration": 4}, None, "loss"),
        outcome({"x": 5}, None, None, "loss"),
    ]
    assert [row["values"]["x"] for row in ranked(rows, "loss", False)] == [4, 1, 2, 3, 5]
    assert [row["values"]["x"] for row in ranked(rows, "loss", True)] == [1, 4, 2, 3, 5]
    assert [row["error"] for row in rows] == [None, "loss is nan", str(error), None, "it ended without an evaluation"]
    assert [row["loss"] for row in rows] == [0.5, None, None, 0.3, None]
