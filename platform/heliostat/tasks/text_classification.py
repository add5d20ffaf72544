"""One label for a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from heliostat.models.load import load_tokenizer, transformers_config
from heliostat.recipe import Refused
from heliostat.tasks import (
    Baseline,
    Batch,
    Rows,
    Task,
    class_predictions,
    classification_sums,
    encode_labels,
    labels_of,
    last_hidden_state,
    pad_lists,
    row_name,
)

POOLING = "classifier_pooling"
"""What families call it that can classify by the first token or by the mean of all (ModernBERT)."""


class TextClassification(Task):
    model_class = "AutoModelForSequenceClassification"
    metric = "accuracy"
    higher_is_better = True
    train_metrics = ("accuracy",)

    def choices(self) -> dict[str, list[Any]]:
        model = self.recipe.model
        found: dict[str, list[Any]] = {
            "model.max_length": [max(1, model.max_length // 2), model.max_length],
            "model.truncation": ["head", "head_tail"],
        }
        if hasattr(transformers_config(model), POOLING):
            found[f"model.config.{POOLING}"] = ["cls", "mean"]
        return found

    def required_columns(self) -> list[str]:
        return [self.recipe.data.text_column, self.recipe.data.label_column]

    def processor(self, texts: list[str] | None = None) -> Any:
        return load_tokenizer(self.recipe.model, texts)

    def content(self, table: pa.Table) -> list[bytes]:
        return [str(text).encode() for text in table.column(self.recipe.data.text_column).to_pylist()]

    def fit(self, table: pa.Table) -> dict[str, Any]:
        column = self.recipe.data.label_column
        return {"labels": labels_of(table.column(column), "data.label_column")}

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        data = self.recipe.data
        texts = table.column(data.text_column).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise Refused("data.text_column", f"{row_name(table, row, where)} holds {text!r}, not a text")
        ids = tokenize(texts, processor, self.recipe.model.max_length, self.recipe.model.truncation)
        columns = {
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(row) for row in ids], pa.int32()),
            "text": pa.array(texts, pa.large_string()),
        }
        if data.label_column in table.column_names:
            columns["label"] = encode_labels(table, data.label_column, self.facts["labels"], "data.label_column", where)
        return pa.table(columns)

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        inputs = padded_texts(rows, self.facts["padding_id"], length)
        targets = {}
        if "label" in rows.table.column_names:
            targets["labels"] = torch.from_numpy(rows.column("label").to_numpy().astype(np.int64))
        return Batch(inputs, targets, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def model_config(self) -> dict[str, Any]:
        labels = self.facts["labels"]
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "pad_token_id": self.facts["padding_id"],
        }

    def row_sums(self, outputs: Tensor, batch: Batch, train: bool) -> dict[str, Tensor]:
        smoothing = self.recipe.training.label_smoothing if train else 0.0
        return classification_sums(outputs, batch.targets["labels"], smoothing)

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        return texts_of(inputs, self.recipe.data.text_column)

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return class_predictions(outputs, self.facts["labels"])

    def example(self) -> dict[str, Any]:
        return {"text": "a short text"}

    def watched(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Length, and tokens a word: words that the vocabulary does not have are cut into more of them. Not known of a
        text that was cut."""
        tokens = table.column("length").to_numpy().astype(np.float64)
        words = np.array([len(text.split()) for text in table.column("text").to_pylist()], np.float64)
        cut = tokens >= self.recipe.model.max_length
        return {"length": tokens, "tokens a word": np.where(cut, np.nan, tokens / np.maximum(words, 1))}

    def embeddings(self, model: Any, batch: Batch) -> Tensor | None:
        """The mean over a text's tokens."""
        hidden_BTH, mask_BT = last_hidden_state(model, batch), batch.inputs["attention_mask"]
        if hidden_BTH is None:
            return None
        return (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)

    def baseline(self, train: pa.Table, other: pa.Table) -> Baseline:
        """TF-IDF of words and word pairs, then logistic regression."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000, C=10.0)
        )
        model.fit(train.column("text").to_pylist(), train.column("label").to_numpy())
        correct = model.predict(other.column("text").to_pylist()) == other.column("label").to_numpy()
        sums = {"accuracy": correct.astype(np.float64), "weight": np.ones(len(correct))}
        return Baseline("TF-IDF and logistic regression", sums, estimator=model)


def tokenize(texts: list[str], tokenizer: Any, max_length: int, truncation: str) -> list[list[int]]:
    """Token ids with the tokenizer's special tokens, at most `max_length` of them. `head_tail` keeps the first
    and the last half of a longer text (Sun et al. 2019, arXiv:1905.05583, section 5.3)."""
    if truncation == "head":
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    tail = max_length // 2
    return [ids if len(ids) <= max_length else ids[: max_length - tail] + ids[-tail:] for ids in whole]


def texts_of(inputs: list[dict[str, Any]], column: str) -> pa.Table:
    """A request's texts as source rows. Raises Refused for what is none."""
    for i, item in enumerate(inputs):
        if set(item) != {"text"} or not isinstance(item["text"], str) or not item["text"].strip():
            raise Refused(f"inputs.{i}", 'each input is {"text": "…"} with a text that is not empty')
    return pa.table({column: pa.array([item["text"] for item in inputs], pa.large_string())})


def padded_texts(rows: Rows, padding_id: int, length: int | None = None) -> dict[str, Tensor]:
    """What an encoder takes of prepared texts, (B, T) each."""
    ids_BT = pad_lists(rows.column("input_ids"), padding_id, length)
    lengths_B = torch.from_numpy(rows.column("length").to_numpy().astype(np.int64))
    return {"input_ids": ids_BT, "attention_mask": (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()}
