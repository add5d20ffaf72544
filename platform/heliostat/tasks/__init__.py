"""The Task protocol: what a kind of problem means. Training, tuning, evaluation, serving and explaining know
problems only through it, so a new kind of problem is one new file (docs/own_task.md writes one).

Shapes: B rows of a micro-batch, T tokens, C classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from heliostat.recipe import Recipe, Refused, load_object, nearest

BUILT_IN = {
    "text_classification": "heliostat.tasks.text_classification:TextClassification",
    "image_classification": "heliostat.tasks.image_classification:ImageClassification",
    "tabular_classification": "heliostat.tasks.tabular_classification:TabularClassification",
    "language_model": "heliostat.tasks.language_model:LanguageModel",
    "text_embedding": "heliostat.tasks.text_embedding:TextEmbedding",
}


class LossSums(NamedTuple):
    """Of one micro-batch on one rank. Sums, never means: the step divides once, by the global weight."""

    loss_sum: Tensor
    weight: Tensor
    metric_sums: dict[str, Tensor]


@dataclass
class Rows:
    """Prepared rows of one micro-batch. `row_weight_B` is 0 for rows that only fill a micro-batch up."""

    table: pa.Table
    sample_ids: np.ndarray
    row_weight_B: np.ndarray

    def slice(self, start: int, stop: int) -> Rows:
        """A view of some."""
        return Rows(self.table.slice(start, stop - start), self.sample_ids[start:stop], self.row_weight_B[start:stop])

    def column(self, name: str) -> pa.Array:
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


@dataclass
class Batch:
    """A micro-batch as tensors: what the model's forward takes, and what the loss takes."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    row_weight_B: Tensor
    sample_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def tokens(self) -> Tensor:
        """In rows of weight above zero, padding left out as far as a mask says; 0 where rows have none. Still on the
        device: reading it waits for the step."""
        counts_B = self.row_weight_B > 0
        ids_BT = self.inputs.get("input_ids")
        if ids_BT is None:
            return counts_B.new_zeros((), dtype=torch.int64)
        mask_BT = self.inputs.get("attention_mask")
        if mask_BT is not None and mask_BT.shape == ids_BT.shape:
            return (mask_BT.sum(-1) * counts_B).sum()
        return counts_B.sum() * ids_BT.shape[1]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(
            {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()},
            {k: v.to(device, non_blocking=True) for k, v in self.targets.items()},
            self.row_weight_B.to(device, non_blocking=True),
            self.sample_ids,
        )


@dataclass
class Baseline:
    """The simplest honest method for a task, fitted on some rows and tried on others."""

    name: str
    """What people call it."""
    row_sums: dict[str, np.ndarray]
    """Of the other rows: as `Task.row_sums`, the task's metric and `weight` at least."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those of the method that were chosen."""
    estimator: Any = None
    """What was fitted, where it is scikit-learn's."""

    def value(self, metric: str) -> float:
        return float(self.row_sums[metric].sum() / self.row_sums["weight"].sum())


class Task:
    """Derive from this; the methods that raise NotImplementedError are the ones to write.

    `facts` is what `fit` learned from the training rows (labels, channel means …); it is stored with the
    prepared data and in every bundle, as JSON.
    """

    model_class: ClassVar[str]
    """A transformers Auto class, e.g. `AutoModelForSequenceClassification`."""
    gathers_features: ClassVar[bool] = False
    """True: `loss` may communicate over the batch group (contrastive losses). Otherwise it never does."""
    splits_sequences: ClassVar[bool] = False
    """True: every tensor of a batch is (B, T), a row's `length` counts its positions, and `row_sums` of some of the
    positions are these positions' share of the sums, so that context parallelism may split along T."""
    metric: ClassVar[str] = "loss"
    """What is compared between models: by early stopping, search and gate."""
    higher_is_better: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    """What the names of parameters begin with that `outputs` does not depend on: a checkpoint may lack them."""
    train_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that `row_sums` gives in training too; evaluation reports all it gives."""

    def __init__(self, recipe: Recipe, facts: dict[str, Any] | None = None) -> None:
        self.recipe = recipe
        self.facts = facts or {}

    # -- before anything runs

    def check(self) -> None:
        """Raise Refused for a recipe that this task cannot run. Cheap: no data, no weights."""

    def check_model(self, model: Any) -> None:
        """Raise Refused for a model that cannot do what the recipe asks of this task. `model`: whole, on meta, before
        it is laid out (models.blocks.one_of_each_kind makes one of it that runs)."""

    def choices(self) -> dict[str, list[Any]]:
        """Fields beside those of all tasks that a ready-made search tries, by path, with their values: preprocessing,
        or what the model's family leaves open. Cheap: no data, no weights."""
        return {}

    def pretrained_facts(self) -> dict[str, Any]:
        """Facts of the pre-trained model that the recipe names, where it is served as it is. Raises Refused for one
        that the task cannot serve."""
        return {}

    # -- from source rows to prepared rows

    def required_columns(self) -> list[str]:
        """Of every source."""
        raise NotImplementedError

    def read_columns(self, table: pa.Table) -> list[str]:
        """Which of a source's columns are read, where more are than are required."""
        return self.required_columns()

    def processor(self, texts: list[str] | None = None) -> Any:
        """The tokenizer, or None. Anything with `save_pretrained`. `texts`: training rows, to train one from."""
        return None

    def content(self, table: pa.Table) -> list[bytes]:
        """What makes a row the same row: equal contents never land in two splits."""
        raise NotImplementedError

    def fit(self, table: pa.Table) -> dict[str, Any]:
        """Facts of the training rows. Raises Refused where they cannot be trained on."""
        return {}

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        """Source rows as stored rows, one to one unless the task packs: then `sample_id` is the first's.
        The result has `length` (int32), the unit of work of a row. Raises Refused, naming the row."""
        raise NotImplementedError

    # -- from prepared rows to losses

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        """`length` fixes the padded length (pipelines need equal micro-batches). Runs on a thread beside a step, so
        what is random must come from (seed, epoch, sample), never from a generator that others draw from."""
        raise NotImplementedError

    def model_config(self) -> dict[str, Any]:
        """Fields this task sets in the transformers configuration."""
        return {}

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """One forward pass. A pipeline's last stage returns the same."""
        return model(**batch.inputs).logits

    def row_sums(self, outputs: Tensor, batch: Batch, train: bool) -> dict[str, Tensor]:
        """Per row, each (B,): `loss` (summed over what the row holds), `weight` (what the loss is divided
        by), and any metric's numerator. `train`: with label smoothing and the like."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, batch: Batch, train: bool = True) -> LossSums:
        """Never communicates, unless `gathers_features`."""
        sums = {name: (rows * batch.row_weight_B).sum() for name, rows in self.row_sums(outputs, batch, train).items()}
        return LossSums(sums.pop("loss"), sums.pop("weight").detach(), {k: v.detach() for k, v in sums.items()})

    def metrics(self, loss_sum: float, weight: float, metric_sums: dict[str, float]) -> dict[str, float]:
        """Global sums as the figures people read."""
        weight = max(weight, 1e-12)
        return {"loss": loss_sum / weight} | {name: value / weight for name, value in metric_sums.items()}

    # -- serving

    def save(self, folder: Path, config: Any) -> None:
        """Write into a bundle what other tools want to know beside the model. `config`: transformers' of the model."""

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        """A request's inputs as source rows (without labels). Raises Refused, naming the input."""
        raise NotImplementedError

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """What a caller gets for each row."""
        raise NotImplementedError

    def example(self) -> dict[str, Any]:
        """A valid input: asked once before a replica says that it is ready."""
        raise NotImplementedError

    # -- what is watched for drift, of prepared rows; beside it the predictions are

    def watched(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Of each row, by what a report calls it: numbers (float64, NaN where missing) or categories (str)."""
        return {"length": table.column("length").to_numpy().astype(np.float64)}

    def embeddings(self, model: Any, batch: Batch) -> Tensor | None:
        """(B, H): what the model makes of a row before it decides. None: nothing that could be compared."""
        return None

    # -- what it has to beat

    def baseline(self, train: pa.Table, other: pa.Table) -> Baseline | None:
        """The simplest honest method, fitted on `train` and tried on `other` (prepared rows)."""
        return None


def get_task(recipe: Recipe, facts: dict[str, Any] | None = None) -> Task:
    path = BUILT_IN.get(recipe.task, recipe.task)
    if ":" not in path:
        raise Refused(
            "task",
            f"no task {recipe.task!r}",
            nearest(recipe.task, list(BUILT_IN)) or f"built in: {', '.join(BUILT_IN)}; your own: module:Class",
        )
    return load_object(path, "task")(recipe, facts)


ROW_NAME = "__row__"
"""A column that preparing adds to source rows, for error messages."""


def row_name(table: pa.Table, row: int, where: str) -> str:
    """What an error message calls a source row."""
    return table.column(ROW_NAME)[row].as_py() if ROW_NAME in table.column_names else f"row {row} of {where}"


PADDING_MULTIPLE = 8
"""Rows are padded to a multiple of so many tokens."""


def pad_lists(column: pa.Array, fill: int, length: int | None = None) -> Tensor:
    """A list column as a (B, T) int64 tensor, padded on the right to a multiple of 8 tokens (or to `length`)."""
    return torch.from_numpy(padded_lists(column, fill, length)[0])


def padded_lists(
    column: pa.Array, fill: int, length: int | None = None, spare: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The same as an array, padded by `spare` more; and how long each of the B lists is. (Arrays, since PyTorch takes
    several times as long as NumPy over each operation on a batch of tokens.)"""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy()[offsets[0] : offsets[-1]]
    lengths = offsets[1:] - offsets[:-1]
    width = length or -(-int(lengths.max(initial=1)) // PADDING_MULTIPLE) * PADDING_MULTIPLE
    if len(values) == len(lengths) * width:  # nothing to pad
        padded = np.empty((len(lengths), width + spare), np.int64)
        padded[:, :width] = values.reshape(-1, width)
        padded[:, width:] = fill
    else:
        padded = np.full((len(lengths), width + spare), fill, np.int64)
        padded[np.arange(width + spare) < lengths[:, None]] = values
    return padded, lengths


def labels_of(column: pa.ChunkedArray, field_name: str) -> list[str]:
    """The classes in a label column, sorted. Refuses fewer than two."""
    labels = sorted({str(value) for value in column.unique().to_pylist() if value is not None})
    if len(labels) < 2:
        raise Refused(field_name, f"the training rows hold one class only: {labels}", "check the column and the rows")
    return labels


def encode_labels(table: pa.Table, column: str, labels: list[str], field_name: str, where: str) -> pa.Array:
    index = {label: i for i, label in enumerate(labels)}
    codes = []
    for row, value in enumerate(table.column(column).to_pylist()):
        if value is None or str(value) not in index:
            raise Refused(
                field_name,
                f"{row_name(table, row, where)} has the label {value!r}, which no training row has",
                "remove the row, or name the right column",
            )
        codes.append(index[str(value)])
    return pa.array(codes, pa.int32())


def classification_sums(logits_BC: Tensor, labels_B: Tensor, smoothing: float) -> dict[str, Tensor]:
    logits_BC = logits_BC.float()
    loss_B = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=smoothing)
    correct_B = (logits_BC.argmax(-1) == labels_B).float()
    return {"loss": loss_B, "weight": torch.ones_like(loss_B), "accuracy": correct_B}


def last_hidden_state(model: Any, batch: Batch) -> Tensor | None:
    """Of a transformers model below its head: (B, T, H), or (B, H, …) of a convolutional one. None where its family
    names none."""
    return getattr(model.base_model(**batch.inputs), "last_hidden_state", None)


def class_predictions(logits_BC: Tensor, labels: list[str]) -> list[dict[str, Any]]:
    """The most probable class of each row, and the probability of every class."""
    probabilities_BC = logits_BC.float().softmax(-1)
    scores, best = probabilities_BC.max(-1)
    return [
        {"label": labels[b], "score": s, "scores": dict(zip(labels, row, strict=True))}
        for b, s, row in zip(best.tolist(), scores.tolist(), probabilities_BC.tolist(), strict=True)
    ]
