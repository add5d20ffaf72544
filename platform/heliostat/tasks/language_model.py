"""The next token of a text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from heliostat.models.load import load_tokenizer
from heliostat.recipe import Refused
from heliostat.tasks import Batch, Rows, Task, pad_lists, row_name

IGNORED = -100


class LanguageModel(Task):
    model_class = "AutoModelForCausalLM"
    splits_sequences = True
    metric = "loss"
    higher_is_better = False

    def required_columns(self) -> list[str]:
        return [self.recipe.data.text_column]

    def processor(self, texts: list[str] | None = None) -> Any:
        return load_tokenizer(self.recipe.model, texts)

    def content(self, table: pa.Table) -> list[bytes]:
        return [str(text).encode() for text in table.column(self.recipe.data.text_column).to_pylist()]

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        """Documents end with the end-of-text token. Packed, a row is `sequence_length` consecutive tokens."""
        texts = table.column(self.recipe.data.text_column).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise Refused("data.text_column", f"{row_name(table, row, where)} holds {text!r}, not a text")
        length, end = self.recipe.data.sequence_length, processor.eos_token_id
        documents = [[*ids, end] for ids in processor(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        if self.recipe.data.pack:
            stream = [token for ids in documents for token in ids]
            rows = [stream[start : start + length] for start in range(0, len(stream), length)]
        else:
            rows = [ids[:length] for ids in documents]
        # A row of one token predicts nothing.
        rows = [row for row in rows if len(row) > 1]
        return pa.table(
            {
                "input_ids": pa.array(rows, pa.list_(pa.int32())),
                "length": pa.array([len(row) for row in rows], pa.int32()),
            }
        )

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        ids_BT = pad_lists(rows.column("input_ids"), self.facts["padding_id"], length)
        lengths = torch.from_numpy(rows.column("length").to_numpy().astype(np.int64))
        inside_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
        # The label of position t is token t + 1; the last has none.
        labels_BT = torch.full_like(ids_BT, IGNORED)
        labels_BT[:, :-1] = ids_BT[:, 1:].masked_fill(~inside_BT[:, 1:], IGNORED)
        inputs = {"input_ids": ids_BT}
        if not bool(inside_BT.all()):
            inputs["attention_mask"] = inside_BT.long()
        return Batch(inputs, {"labels": labels_BT}, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def model_config(self) -> dict[str, Any]:
        tokens = {"pad_token_id": self.facts["padding_id"]}
        if not self.recipe.model.name:
            tokens |= {key: self.facts[key] for key in ("vocab_size", "eos_token_id", "bos_token_id")}
        return tokens

    def row_sums(self, outputs: Tensor, batch: Batch, train: bool) -> dict[str, Tensor]:
        labels_BT = batch.targets["labels"]
        smoothing = self.recipe.training.label_smoothing if train else 0.0
        loss_BT = torch.nn.functional.cross_entropy(
            outputs.float().flatten(0, 1),
            labels_BT.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=smoothing,
        ).view_as(labels_BT)
        valid_BT = labels_BT != IGNORED
        sums = {"loss": loss_BT.sum(-1), "weight": valid_BT.sum(-1).float()}
        if not train:  # an argmax over the vocabulary at every step would only be paid for
            sums["accuracy"] = ((outputs.argmax(-1) == labels_BT) & valid_BT).sum(-1).float()
        return sums

    def metrics(self, loss_sum: float, weight: float, metric_sums: dict[str, float]) -> dict[str, float]:
        figures = super().metrics(loss_sum, weight, metric_sums)
        return figures | {"perplexity": math.exp(min(figures["loss"], 700.0))}

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        for i, item in enumerate(inputs):
            if set(item) != {"text"} or not isinstance(item["text"], str) or not item["text"]:
                raise Refused(f"inputs.{i}", 'each input is {"text": "…"} with a text that is not empty')
        return pa.table({self.recipe.data.text_column: pa.array([item["text"] for item in inputs], pa.large_string())})

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """How well the model expects each text: total log-probability and perplexity a token."""
        sums = self.row_sums(outputs, batch, train=False)
        return [
            {"log_probability": -loss, "tokens": int(weight), "perplexity": math.exp(min(loss / max(weight, 1), 700))}
            for loss, weight in zip(sums["loss"].tolist(), sums["weight"].tolist(), strict=True)
        ]

    def example(self) -> dict[str, Any]:
        return {"text": "a short text"}

    def baseline(self, train: pa.Table, other: pa.Table) -> dict[str, np.ndarray]:
        """A unigram model with add-one smoothing."""
        vocabulary = self.facts["vocab_size"]
        counts = np.bincount(train.column("input_ids").combine_chunks().values.to_numpy(), minlength=vocabulary) + 1.0
        log_probability = np.log(counts / counts.sum())
        rows = [np.asarray(ids[1:]) for ids in other.column("input_ids").to_pylist()]
        return {
            "loss": np.array([-log_probability[row].sum() for row in rows]),
            "weight": np.array([len(row) for row in rows], np.float64),
        }
