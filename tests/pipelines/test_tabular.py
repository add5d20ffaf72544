"""A table of numbers through the jobs: a search that boosts trees, too, and the life of a model that beats them."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import skops.io
from sklearn.ensemble import HistGradientBoostingClassifier

from heliostat.data.loader import open_split
from heliostat.hardware import free_port
from heliostat.launch.tune.baseline import ESTIMATOR_FILE, compare, try_baseline
from heliostat.launch.tune.report import REPORT_FILE
from heliostat.launch.tune.space import trial_recipe
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import override
from heliostat.tasks.tabular_classification import BOOSTING, TabularClassification
from heliostat.train.loop import train
from heliostat.train.samples import collect
from pipelines import lifecycle, predict, tune
from pipelines.job import Job, parse
from pipelines.register import chosen_bundle
from tests.recipes import prepared, tiny_tabular


def job(name: str, file: Path, *words: str) -> Job:
    recipe, options = parse(["--recipe", str(file), *words])
    return Job(name, recipe, options, recipe.storage_path / "runs" / f"{recipe.name}-{name}")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_auto_tries_boosting_on_the_rows_of_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"tune.limit": 100, "tune.num_trials": 2, "tune.max_concurrent": 1, "tune.scheduler": "none"}
    recipe = tiny_tabular(tmp_path, **settings, **{"data.log_samples": True})
    recipe.save(tmp_path / "recipe.json")
    asked = job("tune", tmp_path / "recipe.json", "--auto")
    answer = tune.run(asked)
    assert [trial["state"] for trial in answer["trials"]] == ["done", "done"]
    assert {"optimizer.lr", "model.config.hidden_size", "model.config.num_hidden_layers", "model.dropout",
            "optimizer.weight_decay", "training.global_batch_size"} <= set(answer["trials"][0]["values"])  # fmt: skip
    assert answer["best_value"] == max(trial["accuracy"] for trial in answer["trials"])

    # What scikit-learn makes of the rows that a trial is fed.
    data = prepared(recipe)
    (tmp_path / "trial").mkdir()
    trial = override(trial_recipe(recipe, {}, 160), {"parallelism.workers": 1})
    train(trial, data.folder, tmp_path / "trial", write_bundle=False)
    fed = pq.read_table(collect(tmp_path / "trial", trial)).column("id").unique()
    assert len(fed) == answer["baseline"]["rows"] == 100
    rows, other = open_split(data.folder, "train"), open_split(data.folder, "validation")
    rows = rows.filter(pc.is_in(rows.column("sample_id"), fed))

    def numbers(table: pa.Table) -> np.ndarray:
        return np.array(table.column("features").to_pylist(), float)

    def fitted(settings: dict[str, Any]) -> Any:
        model = HistGradientBoostingClassifier(**settings, random_state=0)
        return model.fit(numbers(rows), rows.column("label").to_numpy())

    scores = [fitted(settings).score(numbers(other), other.column("label").to_numpy()) for settings in BOOSTING]
    assert answer["baseline"]["value"] == answer["metrics"]["baseline_value"] == max(scores)
    assert answer["baseline"]["settings"] in BOOSTING

    # It is kept, and people are told.
    kept = answer["baseline"]["estimator"]
    assert Path(kept) == asked.run_dir / ESTIMATOR_FILE
    trusted = skops.io.get_untrusted_types(file=kept)
    assert all(name.startswith("sklearn.") for name in trusted)
    opened = skops.io.load(kept, trusted=trusted)
    assert opened.score(numbers(other), other.column("label").to_numpy()) == max(scores)
    assert answer["winner"] == ("baseline" if max(scores) >= answer["best_value"] else "best_recipe")
    assert answer["verdict"] in html.unescape((asked.run_dir / REPORT_FILE).read_text())
    assert answer["verdict"].split(":")[0] in capsys.readouterr().err
    assert tune.build(json.loads(Path(answer["best_recipe"]).read_text())).task == recipe.task


@pytest.mark.usefixtures("ray_cluster")
def test_a_baseline_that_fails_stops_no_search(tmp_path: Path) -> None:
    recipe = tiny_tabular(tmp_path)
    found = try_baseline(override(recipe, {"task": f"{__name__}:Failing"}), prepared(recipe), tmp_path)
    assert found is not None
    assert (found["value"], found["error"]) == (None, "MemoryError: a terabyte")
    answer = compare(found, "accuracy", 0.5, True)
    assert (answer["winner"], answer["verdict"]) == ("best_recipe", "The baseline failed: MemoryError: a terabyte")


class Failing(TabularClassification):
    def baseline(self, train: pa.Table, other: pa.Table) -> Any:
        raise MemoryError("a terabyte")


@pytest.mark.parametrize(
    ("value", "best", "more_is_better", "winner"),
    [
        (0.8, 0.9, True, "best_recipe"),
        (0.9, 0.8, True, "baseline"),
        (0.8, 0.9, False, "baseline"),
        (0.9, 0.9, True, "baseline"),
        (0.9, 0.9, False, "baseline"),
    ],
)
def test_the_better_wins_and_of_equals_the_simpler(
    value: float, best: float, more_is_better: bool, winner: str
) -> None:
    baseline = {"name": "trees", "value": value, "estimator": "/run/baseline.skops"}
    answer = compare(baseline, "accuracy", best, more_is_better)
    assert answer["winner"] == winner
    assert f"trees has accuracy {value}, the best trial {best}" in answer["verdict"]
    assert ("baseline.skops" in answer["verdict"]) == (winner == "baseline")


@pytest.fixture
def no_serve_after(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    yield
    serve.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("no_serve_after")
def test_life_of_a_model_that_beats_boosting(tmp_path: Path) -> None:
    """A slanted border between two classes, which trees can only climb in steps."""
    sources = {}
    for number, (split, rows) in enumerate({"train": 240, "validation": 400, "test": 400}.items()):
        x = np.random.default_rng(number).normal(size=(rows, 8))
        columns = {f"x{index}": x[:, index] * 10.0**index for index in range(8)}
        pq.write_table(
            pa.table(columns | {"label": np.where(x.sum(1) > 0, "yes", "no")}), tmp_path / f"{split}.parquet"
        )
        sources[f"data.{split}"] = str(tmp_path / f"{split}.parquet")
    recipe = tiny_tabular(
        tmp_path, **sources, **{"schedule.max_steps": 150, "parallelism.workers": 2, "deploy.port": free_port()}
    )
    recipe.save(tmp_path / "recipe.json")
    answer = lifecycle.run(job("lifecycle", tmp_path / "recipe.json"))
    assert answer["gate"]["against"] == "baseline (gradient boosting)"
    assert answer["promoted"] is True, answer["gate"]
    assert answer["gate"]["challenger"] > answer["gate"]["champion"]
    (x, y), (x_test, y_test) = (
        (table.drop_columns("label").to_pandas().to_numpy(), table.column("label").to_numpy())
        for table in (pq.read_table(sources[f"data.{split}"]) for split in ("train", "test"))
    )
    boosted = HistGradientBoostingClassifier(random_state=0).fit(x, y).score(x_test, y_test)
    assert answer["metrics"]["test.accuracy"] > boosted > 0.6
    assert answer["champion"] == answer["version"] == 1

    # The champion's endpoint, and predictions for a file, are the bundle's own.
    asked = job("predict", tmp_path / "recipe.json", "--input", sources["data.test"])
    bundle = bundles.read(chosen_bundle(asked))
    test = pq.read_table(sources["data.test"])
    inputs = test.slice(0, 20).drop_columns("label").to_pylist()
    expected = [each["label"] for each in Predictor(bundle).predict(inputs)]
    address = f"http://127.0.0.1:{recipe.deploy.port}/predict"
    served = httpx.post(address, json={"inputs": inputs}, timeout=30).json()
    assert [each["label"] for each in served["predictions"]] == expected
    refused = httpx.post(address, json={"inputs": [{**inputs[0], "x0": "much"}]}, timeout=30)
    assert (refused.status_code, refused.json()) == (422, {"detail": "inputs.0: 'x0' is 'much', not a number"})
    found = pq.read_table(predict.run(asked)["predictions"])
    assert found.column("predicted_label").to_pylist()[:20] == expected
    right = np.mean(found.column("predicted_label").to_numpy() == test.column("label").to_numpy())
    assert right == pytest.approx(answer["metrics"]["test.accuracy"])
