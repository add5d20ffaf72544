"""The search on a real cluster: what it lists, what wins, trials of several workers, and trials that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from heliostat.launch.tune import STUDY_FILE
from heliostat.launch.tune.space import trial_recipe
from heliostat.models.load import build_model
from heliostat.placement import logical_cpus
from heliostat.recipe import Recipe, Refused, load, override
from heliostat.train.loop import train
from pipelines import tune
from pipelines.job import Job, parse
from tests.pipelines.jobs import Done, run, start
from tests.recipes import lora_head, prepared, tiny_bert

LR = {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}
INVALID = {"model.freeze_layers": {"kind": "choice", "values": [0, 99]}}


def recipe_file(folder: Path, space: dict[str, Any], **overrides: Any) -> Path:
    settings = {"tune.epochs": 3, "tune.reports": 3, "tune.space": space} | overrides
    tiny_bert(folder, **settings).save(folder / "recipe.json")
    return folder / "recipe.json"


def ok(done: Done, told: int | None = None) -> dict[str, Any]:
    """`told`: of how many trials this job was to say that they ended; all of them where nothing else is said."""
    assert done.code == 0, done.stderr[-4000:]
    trials = done.answer["trials"]
    known = [trial["accuracy"] for trial in trials if trial["state"] in ("done", "pruned")]
    assert known == sorted(known, reverse=True)
    assert all(trial["accuracy"] is None for trial in trials[len(known) :]), "failed trials are listed last"
    finished = [trial["accuracy"] for trial in trials if trial["state"] == "done"]
    assert done.answer["best_value"] == done.answer["metrics"]["best_value"] == max(finished)
    said = done.stderr
    assert sum(line.startswith("trial ") for line in said.splitlines()) == (told or len(trials)), (
        "a line for each trial"
    )
    assert not (Path(done.answer["run_dir"]) / "trials").exists(), "nothing of the trials stays but their figures"
    return done.answer


def accuracy_here(recipe: Recipe, values: dict[str, Any], folder: Path) -> float:
    """What the trial ought to have measured: the same training in this process, without Ray."""
    data = prepared(recipe)
    alone = override(trial_recipe(recipe, values, data.meta["rows"]["train"]), {"parallelism.workers": 1})
    train(alone, data.folder, folder, write_bundle=False)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["validation"]["accuracy"] for record in records if "validation" in record][-1]


@pytest.mark.slow
def test_search_finds_the_best_of_its_trials(tmp_path: Path) -> None:
    space = {"optimizer.lr": LR, "training.label_smoothing": {"kind": "uniform", "low": 0.0, "high": 0.3}}
    file = recipe_file(tmp_path, space)
    answer = ok(run("tune", str(file)))
    assert len(answer["trials"]) == 4
    for trial in answer["trials"]:
        assert trial["error"] is None
        assert 1 <= trial["evaluations"] <= 3
        assert 1e-4 <= trial["values"]["optimizer.lr"] <= 1e-2
        assert 0.0 <= trial["values"]["training.label_smoothing"] <= 0.3
    assert len({trial["values"]["optimizer.lr"] for trial in answer["trials"]}) == 4
    winner = next(trial for trial in answer["trials"] if trial["state"] == "done")
    assert winner["evaluations"] == 3
    assert accuracy_here(load(file), winner["values"], tmp_path / "here") == pytest.approx(winner["accuracy"])

    best, _ = parse(["--recipe", answer["best_recipe"]])
    assert best == override(load(file), winner["values"]), "the winner's values, and the recipe's own epochs and rows"


@pytest.mark.slow
def test_several_objectives_over_rows_and_models(tmp_path: Path) -> None:
    """Each trial is measured on rows of its own kind, and the front is what no trial beats in all objectives."""
    objectives = ["accuracy", "seconds", "parameters", "joules", "latency"]
    space = {
        "model.max_length": {"kind": "choice", "values": [4, 48]},
        "model.config.num_hidden_layers": {"kind": "choice", "values": [1, 12]},
    }
    settings: dict[str, Any] = {"tune.objectives": objectives, "tune.scheduler": "none", "tune.algorithm": "grid"}
    settings["tune.max_concurrent"] = 1  # so that no latency is taken beside another trial
    file = recipe_file(tmp_path, space, **settings | {"energy.cpu_watts": 20.0})
    answer = ok(run("tune", str(file)))
    trials = {tuple(trial["values"].values()): trial for trial in answer["trials"]}
    assert set(trials) == {(4, 1), (4, 12), (48, 1), (48, 12)}
    for values, trial in trials.items():
        recipe = override(load(file), trial["values"])
        assert accuracy_here(recipe, {}, tmp_path / str(values)) == pytest.approx(trial["accuracy"])
        model = build_model(prepared(recipe).task(recipe))
        assert trial["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert 0 < trial["joules"] < 20.0 * 2 * trial["seconds"], "a thread that computes, and one that reads"
    for length in (4, 48):
        assert trials[length, 12]["latency"] > trials[length, 1]["latency"]

    def beaten(trial: dict[str, Any], by: dict[str, Any]) -> bool:
        signs = [(1 if name == "accuracy" else -1) * (by[name] - trial[name]) for name in objectives]
        return min(signs) >= 0 and max(signs) > 0

    front = [trial for trial in answer["trials"] if not any(beaten(trial, by) for by in answer["trials"])]
    assert answer["pareto"] == front
    assert answer["ended_by"] == "tune.space, 4 combinations"
    assert answer["spent"]["joules_are"] == "estimated"
    assert answer["spent"]["kwh"] * 3.6e6 == pytest.approx(sum(trial["joules"] for trial in trials.values()))


@pytest.mark.slow
def test_a_ready_made_search_of_a_pretrained_model(tmp_path: Path) -> None:
    settings = {"tune.epochs": 1, "tune.reports": 1, "tune.num_trials": 6, "tune.algorithm": "random", "seed": 1}
    recipe = lora_head(tmp_path, **{"model.lora.rank": 0} | settings)
    recipe.save(tmp_path / "recipe.json")
    answer = ok(run("tune", str(tmp_path / "recipe.json"), "--auto"))
    trials = answer["trials"]
    assert {trial["state"] for trial in trials} == {"done"}, trials
    assert {trial["values"]["model.lora.rank"] for trial in trials} == {0, 8}
    assert len({trial["values"]["model.max_length"] for trial in trials}) == 2
    best, _ = parse(["--recipe", answer["best_recipe"]])
    assert best.model.max_length == trials[0]["values"]["model.max_length"]


@pytest.mark.slow
def test_trials_of_two_workers_and_one_that_cannot_be(tmp_path: Path) -> None:
    """Each takes all CPUs: the second, which fails, can only start once the first has given them back."""
    settings = {
        "tune.workers_per_trial": 2,
        "tune.objectives": ["accuracy", "seconds", "joules", "latency"],
        "tune.scheduler": "none",
        "tune.algorithm": "grid",
        "parallelism.cpus_per_worker": logical_cpus() / 2,
    }
    file = recipe_file(tmp_path, INVALID, **settings)
    answer = ok(run("tune", str(file)))
    finished, failed = answer["trials"]
    assert (finished["values"]["model.freeze_layers"], finished["error"]) == (0, None)
    assert failed["values"]["model.freeze_layers"] == 99
    assert (failed["state"], failed["error"]) == ("infeasible", "model.freeze_layers: 99 of 2 blocks (use ≤ 2)")
    assert finished["evaluations"] == 3
    assert finished["latency"] > 0
    # Two processes, each with a thread that computes and one that reads.
    assert 0 < finished["joules"] < 12.0 * 2 * 2 * finished["seconds"]
    here = accuracy_here(load(file), finished["values"], tmp_path / "here")
    assert here == pytest.approx(finished["accuracy"], abs=1 / 32), "as one process, but for the order of sums"


@pytest.mark.slow
def test_killed_and_resumed_no_trial_is_lost_or_made_twice(tmp_path: Path) -> None:
    """kill -9 of the driver while a trial runs; its head goes with it."""
    file = recipe_file(tmp_path, {"optimizer.lr": LR}, **{"tune.num_trials": 5, "tune.scheduler": "none"})
    process = start("tune", str(file), "--run-name", "killed")
    assert process.stderr is not None
    lines = 0
    while lines < 2:
        lines += process.stderr.readline().startswith("trial ")
    process.kill()
    process.communicate(timeout=60)
    run_dir = tmp_path / "storage" / "runs" / "killed"

    def trials() -> dict[int, Any]:
        study = optuna.load_study(study_name="killed", storage=f"sqlite:///{run_dir / STUDY_FILE}")
        return {trial.number: trial for trial in study.trials}

    before = trials()
    assert any(not trial.state.is_finished() for trial in before.values()), "one was running"
    answer = ok(
        run("tune", str(file), "--resume", str(run_dir)), told=5 - sum(t.state.is_finished() for t in before.values())
    )
    after = trials()
    assert sorted(trial["number"] for trial in answer["trials"]) == sorted(after) == [0, 1, 2, 3, 4]
    for number, trial in before.items():
        assert after[number].params == trial.params
        assert after[number].state == TrialState.COMPLETE
        if trial.state.is_finished():
            assert after[number] == trial, "it was not made again"


def test_all_trials_failing_is_a_failure(tmp_path: Path) -> None:
    space = {"model.freeze_layers": {"kind": "choice", "values": [98, 99]}}
    done = run("tune", str(recipe_file(tmp_path, space, **{"tune.num_trials": 2})))
    assert done.code == 1
    assert done.answer["status"] == "failed"
    assert done.answer["error"].startswith(
        "RuntimeError: no trial of 2 finished, the first failed with: model.freeze_layers: 9"
    )


@pytest.mark.parametrize(
    ("words", "field", "suggestion"),
    [
        (["--tune.space", "{}"], "tune.space", "log_uniform"),
        (["--tune.space", '{"seed": {"kind": "int", "low": 1, "high": 2}}'], "tune.space", "set seed itself"),
        (["--tune.workers-per-trial", "1000"], "tune.workers_per_trial", "use ≤"),
    ],
)
def test_refused_before_ray_starts(
    words: list[str], field: str, suggestion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("Ray would have started")

    monkeypatch.setattr(tune, "connect", connect)
    recipe, options = parse(["--recipe", str(recipe_file(tmp_path, {"optimizer.lr": LR})), *words])
    with pytest.raises(Refused) as refused:
        tune.run(Job("tune", recipe, options, tmp_path / "run"))
    assert refused.value.field == field
    assert suggestion in refused.value.suggestion
    assert not (tmp_path / "storage").exists(), "nothing was prepared"


def test_unknown_path_is_refused(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, {"optimizer.lr": LR})
    file.write_text(file.read_text().replace('"space": {\n      "optimizer.lr"', '"space": {\n      "optimizer.lrr"'))
    with pytest.raises(Refused, match=r"did you mean optimizer\.lr\?") as refused:
        parse(["--recipe", str(file)])
    assert refused.value.field == "optimizer.lrr"
