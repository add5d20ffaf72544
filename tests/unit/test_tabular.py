"""Rows of numbers: how they are standardised and what is missing, the model in its bundle, the baseline, refusals."""

from __future__ import annotations

import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import accuracy_score, log_loss
from transformers import dynamic_module_utils

from heliostat.data.loader import open_split
from heliostat.data.prepare import prepare
from heliostat.evaluate import row_sums
from heliostat.models import bundle as bundles
from heliostat.models.load import build_model
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, Refused, build, override
from heliostat.tasks import Rows, get_task
from heliostat.tasks.tabular_classification import BOOSTING
from heliostat.train.loop import train
from tests.bundles import tabular_bundle
from tests.recipes import TINY_TABULAR, prepared, tiny_tabular

FACTS = {"labels": ["a", "b"], "columns": ["x", "y"], "mean": [1.0, 0.0], "std": [2.0, 1.0], "may_be_missing": [1]}


def recipe(**sections: Any) -> Recipe:
    return build({"name": "r", "task": "tabular_classification", "model": {"config": TINY_TABULAR}} | sections)


def batch_of(table: pa.Table) -> tuple[Any, dict[str, torch.Tensor]]:
    """The task that was fitted on a table, and what its model would get of it."""
    task = get_task(recipe())
    task = get_task(recipe(), task.fit(table))
    stored = task.prepare(table, None)
    rows = Rows(stored, np.arange(len(stored)), np.ones(len(stored), np.float32))
    return task, task.collate(rows, train=True).inputs


def test_features_are_standardised_by_the_training_rows() -> None:
    """Also those that are large beside how they vary, or do not vary."""
    random = np.random.default_rng(0)
    columns = {
        "large": (1e9 + random.normal(size=50)).tolist(),
        "whole": random.integers(-5, 5, 50).tolist(),
        "yes": (random.random(50) > 0.5).tolist(),
        "same": [3.5] * 50,
    }
    task, inputs = batch_of(pa.table(columns | {"label": ["a", "b"] * 25}))
    assert task.facts["columns"] == list(columns)
    assert inputs["missing"].shape == (50, 0)
    for index, values in enumerate(columns.values()):
        mean, deviation = statistics.fmean(values), statistics.pstdev(values) or 1.0
        expected = [(value - mean) / deviation for value in values]
        assert inputs["features"][:, index].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_is_missing_counts_for_the_mean_and_is_told() -> None:
    """Null and NaN alike; statistics are of what is there."""
    x = [1.0, None, 3.0, float("nan"), 8.0, 0.0]
    table = pa.table({"x": x, "whole": [1, 2, 3, 4, 5, 6], "empty": pa.nulls(6), "label": ["a", "b"] * 3})
    task, inputs = batch_of(table)
    assert task.facts["columns"] == ["x", "whole"]
    there = [1.0, 3.0, 8.0, 0.0]
    mean, deviation = statistics.fmean(there), statistics.pstdev(there)
    expected = [(1 - mean) / deviation, 0, (3 - mean) / deviation, 0, (8 - mean) / deviation, -mean / deviation]
    assert inputs["features"][:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert inputs["missing"].tolist() == [[0], [1], [0], [1], [0], [0]]


def test_a_request_is_prepared_as_the_rows_were(tmp_path: Path) -> None:
    source = pq.read_table(tiny_tabular(tmp_path).data.validation)
    data = prepared(tiny_tabular(tmp_path))
    task = data.task(tiny_tabular(tmp_path))
    asked = source.select(["heat", "tilt", "angle"]).to_pylist()
    assert any(row["heat"] is None for row in asked)
    of_request = task.prepare(task.parse(asked), None)
    stored = open_split(data.folder, "validation").sort_by("sample_id")
    assert np.array_equal(
        np.array(of_request.column("features").to_pylist()), np.array(stored.column("features").to_pylist()), True
    )


def test_only_named_columns_are_features(tmp_path: Path) -> None:
    recipe = tiny_tabular(tmp_path, **{"data.feature_columns": ["tilt", "angle"]})
    assert prepared(recipe).facts["columns"] == ["tilt", "angle"]
    assert prepared(recipe).fingerprint != prepared(tiny_tabular(tmp_path)).fingerprint


def test_a_column_by_another_name_is_another_data_set(tmp_path: Path) -> None:
    found = []
    for name in ("x", "y"):
        pq.write_table(pa.table({name: list(range(100)), "label": ["a", "b"] * 50}), tmp_path / "rows.parquet")
        source = {"train": str(tmp_path / "rows.parquet"), "validation_fraction": 0.3, "test_fraction": 0.3}
        found.append(prepare(recipe(storage=str(tmp_path / "storage"), data=source))[0].facts["columns"])
    assert found == [["x"], ["y"]]


def test_equal_rows_share_a_split(tmp_path: Path) -> None:
    """Whether what is missing is null or NaN, and zero has a sign."""
    x = [0.0, None, 1.0] * 40
    twins = [-0.0, float("nan"), 1.0] * 40
    other = list(range(40))
    table = pa.table({"x": x + twins, "n": [n for n in other for _ in range(3)] * 2, "label": ["a", "b"] * 120})
    pq.write_table(table, tmp_path / "rows.parquet")
    source = {"train": str(tmp_path / "rows.parquet"), "validation_fraction": 0.3, "test_fraction": 0.3}
    data = prepared(recipe(storage=str(tmp_path / "storage"), data=source))
    splits = [
        {json.dumps(row) for row in open_split(data.folder, split).column("features").to_pylist()}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 120


# -- the model


def test_a_bundle_carries_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AutoModel loads it with `trust_remote_code` where there is no Heliostat."""
    bundle = bundles.read(tabular_bundle(tmp_path))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = json.loads((bundle.path / "config.json").read_text())["auto_map"]["AutoModel"]
    kind = dynamic_module_utils.get_class_from_dynamic_module(name, bundle.path)
    source = Path(inspect.getfile(kind))
    assert source.is_relative_to(tmp_path / "modules")
    imported = dynamic_module_utils.get_imports(source)
    assert set(imported) - sys.stdlib_module_names == {"torch", "transformers", "huggingface_hub"}
    model = kind.from_pretrained(bundle.path).eval()
    features, missing = torch.tensor([[0.5, -2.0], [9.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        scores = model(features=features, missing=missing).logits.softmax(-1)
    rows = [{"height": 0.625, "width": -1.0}, {"height": 2.75, "width": None}]  # by the bundle's means and deviations
    expected = [list(each["scores"].values()) for each in Predictor(bundle).predict(rows)]
    assert scores.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert model.config.id2label == {0: "dark", 1: "bright"}


def test_a_row_is_answered_alike_in_any_company(tmp_path: Path) -> None:
    predictor = Predictor(bundles.read(tabular_bundle(tmp_path)))
    rows = [{"height": number / 7, "width": None if number % 3 else 1e30} for number in range(9)]
    together = [each["score"] for each in predictor.predict(rows)]
    assert together == pytest.approx([predictor.predict([row])[0]["score"] for row in rows], abs=1e-6)


def test_training_goes_on_from_a_bundle(tmp_path: Path) -> None:
    recipe = tiny_tabular(tmp_path, **{"schedule.max_steps": 2})
    data = prepared(recipe)
    (tmp_path / "run").mkdir()
    path = train(recipe, data.folder, tmp_path / "run")["bundle"]
    onward = override(recipe, {"model.name": path, "model.config": {}})
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            build_model(data.task(onward)).parameters(), bundles.read(Path(path)).model().parameters(), strict=True
        )
    )
    other = data.task(onward).facts | {"columns": ["angle"], "mean": [0.0], "std": [1.0], "may_be_missing": []}
    with pytest.raises(Refused, match=r"does not fit: \(3, 16\) there, \(1, 16\) here"):
        build_model(get_task(onward, other))


# -- the baseline


def test_the_baseline_is_scikit_learns(tmp_path: Path) -> None:
    """Its best settings by accuracy, fitted on the source's own numbers, whose gaps the trees know how to take."""
    recipe = tiny_tabular(tmp_path)
    data = prepared(recipe)
    task, other = data.task(recipe), open_split(data.folder, "validation")
    found = task.baseline(open_split(data.folder, "train"), other)
    assert found is not None
    names = ["angle", "tilt", "heat"]
    train, validation = (pq.read_table(path) for path in (recipe.data.train, recipe.data.validation))
    x, x_other = (table.select(names).to_pandas().to_numpy(float) for table in (train, validation))
    y, y_other = (table.column("label").to_numpy() for table in (train, validation))
    models = [HistGradientBoostingClassifier(**settings, random_state=0).fit(x, y) for settings in BOOSTING]
    accuracies = [accuracy_score(y_other, model.predict(x_other)) for model in models]
    assert found.value("accuracy") == max(accuracies) > 0.6
    best = models[BOOSTING.index(found.settings)]
    assert accuracy_score(y_other, best.predict(x_other)) == max(accuracies)
    assert found.value("loss") == pytest.approx(log_loss(y_other, best.predict_proba(x_other)))
    model_sums, _ = row_sums(build_model(task), task, other)
    assert set(model_sums) == set(found.row_sums)


def test_one_class_alone_leaves_nothing_to_compare_with(tmp_path: Path) -> None:
    recipe = tiny_tabular(tmp_path)
    data = prepared(recipe)
    train = open_split(data.folder, "train")
    same = train.filter(pa.array(train.column("label").to_numpy() == 0))
    assert data.task(recipe).baseline(same, train) is None


# -- what is refused


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"x": 1.0}, r"inputs\.1: it has no 'y' \(give null"),
        ({"x": 1.0, "y": "2"}, r"inputs\.1: 'y' is '2', not a number"),
        ({"x": 1.0, "y": [2.0]}, "not a number"),
        ({"x": float("inf"), "y": 0.0}, "'x' is inf, not a number"),
        ({"x": 10**400, "y": 0.0}, "not a number"),
        ({"x": 1.0, "y": 0.0, "yy": 0.0}, r"there is no column 'yy' \(did you mean y\?\)"),
        ({"x": 1.0, "y": 0.0, "label": "a"}, "there is no column 'label'"),
    ],
)
def test_requests_are_refused_in_words(item: dict[str, Any], words: str) -> None:
    task = get_task(recipe(), FACTS)
    fine = [task.example(), {"x": None, "y": float("nan")}, {"x": True, "y": 3}]
    assert task.parse(fine).to_pydict()["x"] == [1.0, None, 1.0]
    with pytest.raises(Refused, match=words):
        task.parse([task.example(), item])


NUMBERS = list(range(40))


@pytest.mark.parametrize(
    ("columns", "data", "words"),
    [
        ({"x": list(map(str, NUMBERS))}, {}, "none but 'label' holds numbers: x, label"),
        (
            {"x": list(map(str, NUMBERS))},
            {"feature_columns": ["x"]},
            r"'x' of row (\d+) of .*rows\.parquet.* is '\1', not a number",
        ),
        ({"x": [*NUMBERS[1:], float("inf")]}, {}, r"'x' of row 39 of .*rows\.parquet.* is inf, not a number"),
        ({"x": NUMBERS, "y": [None] * 40}, {"feature_columns": ["x", "y"]}, "no training row has a value in 'y'"),
        ({"x": NUMBERS, "y": [float("nan")] * 40}, {}, "no training row has a value in 'y'"),
        ({"x": NUMBERS}, {"feature_columns": ["z"]}, "has no column 'z'"),
        ({"x": NUMBERS}, {"feature_columns": ["x", "label"]}, "'label' is the label"),
    ],
)
def test_tables_are_refused_in_words(columns: dict[str, Any], data: dict[str, Any], words: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns | {"label": ["a", "b"] * 20}), tmp_path / "rows.parquet")
    source = {"train": str(tmp_path / "rows.parquet"), "validation_fraction": 0.3, "test_fraction": 0.3}
    with pytest.raises(Refused, match=words):
        prepare(recipe(storage=str(tmp_path / "storage"), data=source | data))


def test_a_column_that_another_source_lacks_is_named(tmp_path: Path) -> None:
    recipe = tiny_tabular(tmp_path)
    source = pq.read_table(recipe.data.test)
    pq.write_table(source.drop_columns("tilt"), tmp_path / "without.parquet")
    with pytest.raises(Refused, match=r"without\.parquet row group 0 has no column 'tilt', which the training rows"):
        prepare(override(recipe, {"data.test": str(tmp_path / "without.parquet")}))
    texts = pa.array(["high"] * len(source))
    pq.write_table(source.set_column(0, "angle", texts), tmp_path / "texts.parquet")
    with pytest.raises(Refused, match=r"'angle' of row 0 of .*texts\.parquet row group 0 is 'high', not a number"):
        prepare(override(recipe, {"data.test": str(tmp_path / "texts.parquet")}))
