"""What a search samples, what a trial runs, what fits, and how trials are ranked."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from heliostat.launch.tune import STUDY_FILE
from heliostat.launch.tune.population import explored, source
from heliostat.launch.tune.runner import DONE, FAILED, INFEASIBLE, PRUNED
from heliostat.launch.tune.space import (
    check_space,
    draw,
    objectives,
    row_choices,
    row_settings,
    trial_recipe,
    trials_at_once,
)
from heliostat.launch.tune.study import Study
from heliostat.recipe import Choice, Integers, LogUniform, Recipe, Refused, SearchRange, Tune, Uniform, override
from heliostat.tasks import get_task
from tests import needs, postgres
from tests.recipes import prepared, tiny_bert

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
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw(study.ask(), {"x": spec})["x"] for _ in range(number)]


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
    assert trial_recipe(override(recipe, {"tune.validation_limit": 5}), {}, rows=50).data.validation_limit == 5
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


@pytest.mark.parametrize("path", ["data.limit", "model.tokenizer", "tune.limit", "energy.cpu_watts", "seed"])
def test_what_trials_share_is_not_searched(path: str, tmp_path: Path) -> None:
    space = {path: {"kind": "choice", "values": ["train:300"] if path == "model.tokenizer" else [1, 2]}}
    with pytest.raises(Refused, match=path) as refused:
        checked(tiny_bert(tmp_path, **{"tune.space": space}))
    assert refused.value.field == "tune.space"


def checked(recipe: Recipe) -> None:
    check_space(recipe, get_task(recipe))


@pytest.mark.parametrize(
    ("settings", "field", "reason"),
    [
        ({"tune.objectives": ["accuracy", "second"], "tune.scheduler": "none"}, "tune.objectives", "second"),
        ({"tune.objectives": ["accuracy", "latncy"], "tune.scheduler": "none"}, "tune.objectives", "mean latency"),
        ({"tune.objectives": ["accuracy", "seconds"]}, "tune.scheduler", "asha ranks trials by one value, here are 2"),
        ({"tune.objectives": ["seconds"], "tune.scheduler": "none"}, "tune.objectives", "trials report accuracy"),
        ({"tune.space": {"model.config.hiden_size": LR["optimizer.lr"]}}, "model.config.hiden_size", "no such field"),
        ({"tune.algorithm": "grid"}, "tune.space", "a grid has no points for optimizer.lr"),
        ({"tune.space": {"model.max_length": {"kind": "int", "low": 8, "high": 48}}}, "tune.space", "use choice"),
        (
            {"tune.space": {"model.max_length": {"kind": "choice", "values": list(range(8, 25))}}},
            "tune.space",
            "model.max_length make 17 kinds of prepared rows",
        ),
    ],
)
def test_what_cannot_be_searched(settings: dict[str, Any], field: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        checked(tiny_bert(tmp_path, **({"tune.space": LR} | settings)))
    assert refused.value.field == field


def test_trials_may_be_compared_by_their_loss(tmp_path: Path) -> None:
    recipe = tiny_bert(tmp_path, **{"tune.space": LR, "tune.objectives": ["loss"]})
    checked(recipe)
    assert objectives(recipe, get_task(recipe)) == {"loss": False}


@pytest.mark.parametrize(
    ("when", "reason"),
    [({"a": {"b": [1]}, "b": {"a": [1]}}, "in a circle"), ({"a": {"c": [1]}, "b": {}}, "a depends on c, which is not")],
)
def test_conditions_that_cannot_be(when: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tune(space={path: Choice(values=[1, 2], when=given) for path, given in when.items()})


def test_a_layout_can_be_searched(recipe: Recipe) -> None:
    several = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"workers_per_trial": 4})})
    trial = trial_recipe(several, {"parallelism.fsdp": 2}, rows=64)
    assert (trial.parallelism.workers, trial.parallelism.fsdp, trial.parallelism.replicate) == (4, 2, 2)
    with pytest.raises(Refused, match="workers=4 is not a multiple"):
        trial_recipe(several, {"parallelism.fsdp": 3}, rows=64)


def test_rows_are_prepared_for_all_that_can_be_drawn() -> None:
    space: dict[str, SearchRange] = {
        "model.max_length": Choice(values=[8, 16]),
        "optimizer.lr": LogUniform(low=1e-4, high=1e-2),
        "model.truncation": Choice(values=["head_tail"], when={"model.max_length": [16]}),
    }
    choices = row_choices(space)
    assert choices == [
        {"model.max_length": 8, "model.truncation": "head_tail"},
        {"model.max_length": 8},
        {"model.max_length": 16, "model.truncation": "head_tail"},
        {"model.max_length": 16},
    ]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        values = draw(study.ask(), space)
        values.pop("optimizer.lr")
        assert values in choices


def test_settings_of_rows_tell_prepared_data_apart(recipe: Recipe) -> None:
    """As fingerprints do."""
    for values in ({}, {"optimizer.lr": 1.0}, {"model.max_length": 9}, {"model.truncation": "head_tail"}):
        changed = override(recipe, values)
        same = row_settings(recipe, values) == row_settings(recipe)
        assert same == (prepared(changed).fingerprint == prepared(recipe).fingerprint)
        assert row_settings(recipe, values) == row_settings(changed)


SPACE: dict[str, SearchRange] = {
    "depth": Integers(low=1, high=4, when={"kind": ["tree"]}),
    "kind": Choice(values=["tree", "line"]),
    "x": Uniform(low=-2, high=2),
}


def study(folder: Path, resume: bool = False, objectives: dict[str, bool] | None = None, **settings: Any) -> Study:
    tune = Tune(**({"space": SPACE, "scheduler": "none", "num_trials": 30} | settings))
    return Study(tune, objectives or {"loss": False}, 3, "a-search", folder, resume)


def test_a_condition_decides_what_is_drawn(tmp_path: Path) -> None:
    searched = study(tmp_path)
    for _ in range(30):
        number, values = searched.ask()
        assert ("depth" in values) == (values["kind"] == "tree")
        searched.tell(number, DONE, {"loss": values["x"] ** 2})
    assert {row["values"]["kind"] for row in searched.rows()} == {"tree", "line"}


def test_a_grid_is_every_combination_once_also_when_resumed(tmp_path: Path) -> None:
    space = {"a": Choice(values=["p", "q"]), "b": Integers(low=3, high=5)}
    seen = []
    for resume in (False, True):
        searched = study(tmp_path, resume, algorithm="grid", space=space)
        assert searched.number == 6
        for _ in range(3):
            number, values = searched.ask()
            seen.append(values)
            searched.tell(number, DONE, {"loss": 0.0})
    assert seen == [{"a": a, "b": b} for a, b in itertools.product("pq", (3, 4, 5))]


@pytest.mark.parametrize("algorithm", ["random", "tpe", "cma_es", "nsga2"])
def test_it_proposes_what_optuna_does(algorithm: str, tmp_path: Path) -> None:
    """The same seed, one trial after the other: the same values as a study of Optuna's own, without the database."""
    space = {"x": Uniform(low=-2, high=2), "y": LogUniform(low=1e-3, high=10)}
    searched = study(tmp_path, algorithm=algorithm, space=space)
    plain = optuna.create_study(
        sampler={
            "random": optuna.samplers.RandomSampler(seed=3),
            "tpe": optuna.samplers.TPESampler(seed=3),
            "cma_es": optuna.samplers.CmaEsSampler(seed=3),
            "nsga2": optuna.samplers.NSGAIISampler(seed=3),
        }[algorithm]
    )
    for _ in range(30):
        number, values = searched.ask()
        trial = plain.ask()
        assert values == {"x": trial.suggest_float("x", -2, 2), "y": trial.suggest_float("y", 1e-3, 10, log=True)}
        loss = (values["x"] - 1) ** 2 + (values["y"] - 0.1) ** 2
        searched.tell(number, DONE, {"loss": loss})
        plain.tell(trial, loss)
    assert searched.rows()[0]["values"] == plain.best_params
    if algorithm == "tpe":
        assert searched.rows()[0]["loss"] < 0.1


def test_the_database_outlives_the_driver_and_is_optunas(tmp_path: Path) -> None:
    outlives(tmp_path, "", f"sqlite:///{tmp_path / STUDY_FILE}")


@needs.postgres
def test_so_does_one_in_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres.server() as address:
        monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)
        outlives(tmp_path, address, address.replace("postgresql:", "postgresql+psycopg:"))
        assert not (tmp_path / STUDY_FILE).exists()
        monkeypatch.setenv("PGPASSWORD", "wrong")
        with pytest.raises(Refused, match="cannot be opened"):
            study(tmp_path, storage=address)
    with pytest.raises(Refused, match="cannot be opened"):
        study(tmp_path, storage=address)


def outlives(folder: Path, storage: str, address: str) -> None:
    """`address`: as Optuna by itself opens the database."""
    first = study(folder, scheduler="median", storage=storage)
    for loss in (0.5, None, 0.2):
        number, _ = first.ask()
        first.report(number, 1, {"loss": 0.7})
        if loss is not None:
            first.tell(number, DONE, {"loss": loss})
    number, _ = first.ask()
    first.tell(number, INFEASIBLE, {}, "too large")
    # No word of an end: this is what a killed driver leaves.
    second = study(folder, resume=True, scheduler="median", storage=storage)
    assert (second.begun, list(second.interrupted)) == (4, [1])
    assert second.interrupted == first.interrupted
    assert second.rows() == first.rows()
    assert second.report(1, 1, {"loss": 99.0}), "a report made before decides nothing, and is not made twice"
    second.tell(1, DONE, {"loss": 0.1})
    plain = optuna.load_study(study_name="a-search", storage=address)
    assert (plain.best_value, plain.best_trial.number) == (0.1, 1)
    assert Counter(trial.state.name for trial in plain.trials) == {"COMPLETE": 3, "FAIL": 1}
    assert plain.trials[1].intermediate_values == {1: 0.7}
    assert plain.trials[3].user_attrs["heliostat"]["reason"] == "too large"


def test_another_search_does_not_go_on_with_it(tmp_path: Path) -> None:
    study(tmp_path)
    with pytest.raises(Refused, match="already holds a study a-search"):
        study(tmp_path)
    with pytest.raises(Refused, match="the study was begun with") as refused:
        study(tmp_path, resume=True, space={"x": Uniform(low=0, high=1)})
    assert refused.value.field == "tune.space"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(Refused, match="holds none of the name a-search"):
        study(tmp_path / "elsewhere", resume=True)


def test_a_database_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be opened"):
        study(tmp_path, storage="postgresql+nodriver://me@127.0.0.1/x")
    with pytest.raises(Refused, match="no address of a database"):
        study(tmp_path, storage="my study")


@pytest.mark.parametrize(
    ("field", "address"),
    [("tune.storage", "postgresql://me:hidden@127.0.0.1/x"), ("tracking.uri", "http://me:hidden@127.0.0.1:5000")],
)
def test_passwords_are_refused_where_a_recipe_would_keep_them(field: str, address: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="it holds a password") as refused:
        tiny_bert(tmp_path, **{field: address})
    assert refused.value.field == field
    assert "hidden" not in str(refused.value)


def test_the_front_is_what_nothing_beats_in_all(tmp_path: Path) -> None:
    points = [(0.9, 5.0), (0.8, 2.0), (0.8, 3.0), (0.5, 1.0), (0.4, 1.5)]
    searched = study(tmp_path, objectives={"accuracy": True, "seconds": False}, num_trials=5)
    for accuracy, seconds in points:
        number, _ = searched.ask()
        assert searched.report(number, 1, {"accuracy": accuracy})
        searched.tell(number, DONE, {"accuracy": accuracy, "seconds": seconds})
    front = {(row["accuracy"], row["seconds"]) for row in searched.rows() if row["pareto"]}
    assert front == {(a, s) for a, s in points if not any((b >= a and t <= s) and (b, t) != (a, s) for b, t in points)}


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_bad_trials_end_early_and_good_ones_do_not(scheduler: str, tmp_path: Path) -> None:
    """Of 24 whose losses never cross, the best gets all its 9 reports, and all together well below all theirs."""
    searched = study(tmp_path, scheduler=scheduler, reports=9)
    losses = [(7 * i) % 24 for i in range(24)]
    made = 0
    for loss in losses:
        number, _ = searched.ask()
        ended = False
        for at in range(1, 10):
            made += 1
            if not searched.report(number, at, {"loss": loss + 1 / at}):
                searched.tell(number, PRUNED, {"loss": loss + 1 / at})
                ended = True
                break
        if not ended:
            searched.tell(number, DONE, {"loss": loss + 1 / 9})
    best = searched.rows()[0]
    assert (best["state"], best["evaluations"], best["loss"]) == (DONE, 9, pytest.approx(1 / 9))
    assert made < 24 * 9 * 0.7


def test_ranking_puts_failures_last(tmp_path: Path) -> None:
    searched = study(tmp_path, num_trials=4)
    for state, figures, reason in (
        (DONE, {"loss": 0.5}, ""),
        (FAILED, {"loss": 0.1}, "loss is nan"),
        (DONE, {"loss": 0.3}, ""),
        (INFEASIBLE, {}, "model.freeze_layers: 99 of 2 blocks"),
    ):
        number, _ = searched.ask()
        searched.tell(number, state, figures, reason)
    rows = searched.rows()
    assert [row["number"] for row in rows] == [2, 0, 1, 3]
    assert [row["loss"] for row in rows] == [0.3, 0.5, None, None]
    assert [row["error"] for row in rows] == [None, None, "loss is nan", "model.freeze_layers: 99 of 2 blocks"]
    assert [row["pareto"] for row in rows] == [True, False, False, False]


def test_what_pbt_goes_on_from_and_with() -> None:
    draw = random.Random(0)
    values = {number: float(number) for number in range(8)}
    for number in range(8):
        found = {source(values, number, False, draw) for _ in range(200)}
        assert found == ({0, 1} if number >= 6 else {None}), "the worst quarter, from the best"
        found = {source(values, number, True, draw) for _ in range(200)}
        assert found == ({6, 7} if number <= 1 else {None})
    assert source({3: 1.0}, 3, False, draw) is None
    space: dict[str, SearchRange] = {
        "x": LogUniform(low=1e-3, high=1.0), "n": Integers(low=1, high=9), "c": Choice(values=["a", "b"])
    }  # fmt: skip
    near = [explored({"x": 0.1, "n": 4, "c": "a"}, space, draw) for _ in range(2000)]
    assert all(1e-3 <= each["x"] <= 1.0 and 1 <= each["n"] <= 9 and each["c"] in "ab" for each in near)
    little = Counter(round(each["x"], 6) for each in near)
    assert little[0.08] + little[0.125] == pytest.approx(1500, abs=80)
    assert little[0.08] == pytest.approx(750, abs=90)
    assert Counter(each["c"] for each in near)["b"] == pytest.approx(250, abs=60)


def test_pbt_changes_nothing_that_weights_or_rows_depend_on(tmp_path: Path) -> None:
    space = {"training.global_batch_size": {"kind": "choice", "values": [8, 16]}}
    with pytest.raises(Refused, match="cannot change in mid-training"):
        checked(tiny_bert(tmp_path, **{"tune.space": space, "tune.scheduler": "pbt"}))
