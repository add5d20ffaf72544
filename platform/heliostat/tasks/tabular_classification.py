"""One label for a row of numbers. Shapes: B rows, F features, M of them that may be missing, C classes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from heliostat.recipe import Refused, nearest
from heliostat.tasks import (
    Baseline,
    Batch,
    Rows,
    Task,
    class_predictions,
    classification_sums,
    encode_labels,
    labels_of,
    row_name,
)

BOOSTING: list[dict[str, Any]] = [
    {},
    {"max_leaf_nodes": 8},
    {"learning_rate": 0.05, "max_leaf_nodes": 16, "max_iter": 300},
    {"learning_rate": 0.05, "max_leaf_nodes": 8, "max_iter": 300, "l2_regularization": 1.0},
]
"""Settings of scikit-learn's histogram trees that the baseline tries; the first are its own."""


class TabularClassification(Task):
    model_class = "AutoModel"
    metric = "accuracy"
    higher_is_better = True
    train_metrics = ("accuracy",)

    def check(self) -> None:
        data = self.recipe.data
        if data.label_column in data.feature_columns:
            raise Refused("data.feature_columns", f"{data.label_column!r} is the label", "leave it out")

    def choices(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"model.dropout": [0.0, 0.1, 0.3], "optimizer.weight_decay": [0.0, 0.01, 0.1]}
        if not self.recipe.model.name:
            found |= {
                "model.config.hidden_size": [64, 128, 256],
                "model.config.num_hidden_layers": [1, 2, 4],
                "model.config.frequency_scale": [0.05, 0.2, 0.5],
            }
        return found

    def required_columns(self) -> list[str]:
        return [*self.recipe.data.feature_columns, self.recipe.data.label_column]

    def read_columns(self, table: pa.Table) -> list[str]:
        return [*self._columns(table), self.recipe.data.label_column]

    def _columns(self, table: pa.Table) -> list[str]:
        """The features, as far as a table says: in some rows, a column may hold nothing."""
        data = self.recipe.data
        if data.feature_columns:
            return data.feature_columns
        names = [name for name in table.column_names if name != data.label_column and _numeric(table.column(name))]
        if not names:
            known = ", ".join(table.column_names)
            raise Refused("data.feature_columns", f"none but {data.label_column!r} holds numbers: {known}")
        return names

    def content(self, table: pa.Table) -> list[bytes]:
        names = self._columns(table)
        if not all(_numeric(table.column(name)) for name in names):  # preparing says which value is none
            return [repr(row).encode() for row in table.select(names).to_pylist()]
        values = np.stack([_float64(table.column(name)) for name in names], 1)
        return [json.dumps(names).encode() + row.tobytes() for row in values]

    def fit(self, table: pa.Table) -> dict[str, Any]:
        from sklearn.preprocessing import StandardScaler

        names = self._columns(table)
        values = _values(table, names, "the training rows")
        missing = np.isnan(values)
        for name, empty in zip(names, missing.all(0), strict=True):
            if empty:
                raise Refused("data.feature_columns", f"no training row has a value in {name!r}", "leave it out")
        # It leaves missing values out, and divides by one where a column holds the same everywhere.
        scaler = StandardScaler().fit(values)
        return {
            "labels": labels_of(table.column(self.recipe.data.label_column), "data.label_column"),
            "columns": names,
            "mean": scaler.mean_.tolist(),
            "std": scaler.scale_.tolist(),
            "may_be_missing": np.flatnonzero(missing.any(0)).tolist(),
        }

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        data, names = self.recipe.data, self.facts["columns"]
        for name in names:
            if name not in table.column_names:
                raise Refused("data.feature_columns", f"{where} has no column {name!r}, which the training rows have")
        values = _values(table, names, where)
        columns = {
            "features": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), len(names)),
            "length": pa.array(np.ones(len(values), np.int32)),
        }
        if data.label_column in table.column_names:
            columns["label"] = encode_labels(table, data.label_column, self.facts["labels"], "data.label_column", where)
        return pa.table(columns)

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        values_BF = self._stored(rows.column("features"))
        standard_BF = (values_BF - np.array(self.facts["mean"])) / np.array(self.facts["std"])
        missing_BF = np.isnan(values_BF)
        inputs = {
            "features": torch.from_numpy(np.where(missing_BF, 0.0, standard_BF).astype(np.float32)),
            "missing": torch.from_numpy(missing_BF[:, self.facts["may_be_missing"]].astype(np.float32)),
        }
        targets = {}
        if "label" in rows.table.column_names:
            targets["labels"] = torch.from_numpy(rows.column("label").to_numpy().astype(np.int64))
        return Batch(inputs, targets, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def _stored(self, features: pa.Array) -> np.ndarray:
        """(B, F) float64 as the source has them, NaN where missing."""
        return features.flatten().to_numpy().reshape(-1, len(self.facts["columns"]))

    def model_config(self) -> dict[str, Any]:
        labels = self.facts["labels"]
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "num_features": len(self.facts["columns"]),
            "num_missing": len(self.facts["may_be_missing"]),
        }

    def row_sums(self, outputs: Tensor, batch: Batch, train: bool) -> dict[str, Tensor]:
        smoothing = self.recipe.training.label_smoothing if train else 0.0
        return classification_sums(outputs, batch.targets["labels"], smoothing)

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        names = self.facts["columns"]
        for i, item in enumerate(inputs):
            for name in item:
                if name not in names:
                    raise Refused(f"inputs.{i}", f"there is no column {name!r}", nearest(name, names))
            for name in names:
                if name not in item:
                    raise Refused(f"inputs.{i}", f"it has no {name!r}", "give null where a value is not known")
                if (value := item[name]) is not None and not _is_number(value):
                    raise Refused(f"inputs.{i}", f"{name!r} is {value!r}, not a number")
        return pa.table({name: pa.array([item[name] for item in inputs], pa.float64()) for name in names})

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return class_predictions(outputs, self.facts["labels"])

    def example(self) -> dict[str, Any]:
        return dict(zip(self.facts["columns"], self.facts["mean"], strict=True))

    def watched(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Each column."""
        values_BF = self._stored(table.column("features").combine_chunks())
        return dict(zip(self.facts["columns"], values_BF.T, strict=True))

    def embeddings(self, model: Any, batch: Batch) -> Tensor | None:
        return model.encoder(batch.inputs["features"], batch.inputs["missing"])

    def baseline(self, train: pa.Table, other: pa.Table) -> Baseline | None:
        """Gradient boosting: the best of a few settings on `other`."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        (x, y), (x_other, y_other) = (
            (self._stored(table.column("features").combine_chunks()), table.column("label").to_numpy())
            for table in (train, other)
        )
        if len(np.unique(y)) < 2:
            return None
        found = []
        for settings in BOOSTING:
            model = HistGradientBoostingClassifier(**settings, random_state=self.recipe.seed).fit(x, y)
            probability_BC = np.zeros((len(x_other), len(self.facts["labels"])))
            probability_BC[:, model.classes_] = model.predict_proba(x_other)
            sums = {
                "accuracy": (probability_BC.argmax(1) == y_other).astype(np.float64),
                "loss": -np.log(np.maximum(probability_BC[np.arange(len(y_other)), y_other], np.finfo(float).tiny)),
                "weight": np.ones(len(y_other)),
            }
            found.append(Baseline("gradient boosting", sums, settings, model))
        return max(found, key=lambda each: (each.row_sums["accuracy"].sum(), -each.row_sums["loss"].sum()))


def _numeric(column: pa.ChunkedArray) -> bool:
    kind, types = column.type, pa.types
    return any(is_a(kind) for is_a in (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean))


def _float64(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, NaN where missing, with one kind of zero and one of NaN."""
    values = pc.cast(column, pa.float64(), safe=False).to_numpy()
    return np.where(np.isnan(values), np.nan, values + 0.0)


def _values(table: pa.Table, columns: list[str], where: str) -> np.ndarray:
    """(B, F) float64, NaN where missing. Raises Refused, naming the row, for what is no finite number."""
    values = np.full((table.num_rows, len(columns)), np.nan)
    for index, name in enumerate(columns):
        column = table.column(name)
        if _numeric(column):
            values[:, index] = _float64(column)
            wrong = np.isinf(values[:, index])
        else:
            wrong = column.is_valid().to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            said = f"{name!r} of {row_name(table, row, where)} is {column[row].as_py()!r}"
            raise Refused("data.feature_columns", f"{said}, not a number", "leave it empty where it is not known")
    return values


def _is_number(value: Any) -> bool:
    """Whether a request may hold it: NaN says, like null, that it is missing."""
    try:
        return isinstance(value, int | float) and not math.isinf(float(value))
    except OverflowError:
        return False
