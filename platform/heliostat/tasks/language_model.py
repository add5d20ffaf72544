"""The next token of a text.

Shapes: B rows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from heliostat.models.blocks import one_of_each_kind
from heliostat.models.load import load_tokenizer
from heliostat.recipe import Refused
from heliostat.tasks import Baseline, Batch, Rows, Task, pad_lists, padded_lists, row_name

IGNORED = -100
DOCUMENTS = "document_lengths"
"""A column of prepared rows whose documents are to be isolated: how many tokens each of them has."""


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
        """Documents end with the end-of-text token, where there is one. Packed, a row is `sequence_length` consecutive
        tokens, with the lengths of its documents where they are to be isolated."""
        texts = table.column(self.recipe.data.text_column).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise Refused("data.text_column", f"{row_name(table, row, where)} holds {text!r}, not a text")
        data, end = self.recipe.data, [token for token in [processor.eos_token_id] if token is not None]
        length = data.sequence_length
        documents = [[*ids, *end] for ids in processor(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        if data.pack:
            stream = [token for ids in documents for token in ids]
            rows = [stream[start : start + length] for start in range(0, len(stream), length)]
        else:
            rows = [ids[:length] for ids in documents]
        # A row of one token predicts nothing.
        rows = [row for row in rows if len(row) > 1]
        columns = {
            "input_ids": pa.array(rows, pa.list_(pa.int32())),
            "length": pa.array([len(row) for row in rows], pa.int32()),
        }
        if data.pack and data.isolate_documents:
            lengths = cut_lengths([len(ids) for ids in documents], length)[: len(rows)]
            columns[DOCUMENTS] = pa.array(lengths, pa.list_(pa.int32()))
        return pa.table(columns)

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        # The label of position t is token t + 1; a document's last has none. Both are views of one tensor as long as
        # no other label is masked out: a copy would cost as much as reading the rows.
        tokens_BT1, lengths_B = padded_lists(rows.column("input_ids"), self.facts["padding_id"], length, spare=1)
        tokens_BT1[:, -1] = IGNORED
        ids_BT, labels_BT = torch.from_numpy(tokens_BT1[:, :-1]), torch.from_numpy(tokens_BT1[:, 1:])
        inputs = {"input_ids": ids_BT}
        isolated = rows.table.schema.get_field_index(DOCUMENTS) >= 0
        padded = lengths_B.min() < ids_BT.shape[1]
        if isolated or padded:
            labels_BT = labels_BT.clone()
        if isolated:
            # No mask: without one, transformers finds the documents in their positions. Each padded position is a
            # document of its own, so that none sees nothing.
            positions_BT = document_positions(rows.column("input_ids"), rows.column(DOCUMENTS), ids_BT.shape[1])
            inputs["position_ids"] = positions_BT
            labels_BT[:, :-1].masked_fill_(positions_BT[:, 1:] == 0, IGNORED)
        elif padded:
            inside_BT = torch.arange(ids_BT.shape[1]) < torch.from_numpy(lengths_B)[:, None]
            inputs["attention_mask"] = inside_BT.long()
            labels_BT[:, :-1].masked_fill_(~inside_BT[:, 1:], IGNORED)
        return Batch(inputs, {"labels": labels_BT}, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def model_config(self) -> dict[str, Any]:
        tokens = {"pad_token_id": self.facts["padding_id"]}
        if not self.recipe.model.name:
            tokens |= {key: self.facts[key] for key in ("vocab_size", "eos_token_id", "bos_token_id")}
        return tokens

    def check_model(self, model: Any) -> None:
        """A packed model must give a document what it gives it alone: tried on documents of one token, with one block
        of each kind."""
        if not (self.recipe.data.pack and self.recipe.data.isolate_documents):
            return
        reason = ""
        if "position_ids" not in inspect.signature(model.forward).parameters:
            reason = "takes no position_ids"
        elif not isolates_documents(one_of_each_kind(model)):
            reason = "does not keep documents apart by their position_ids"
        if reason:
            raise Refused("data.isolate_documents", f"{type(model).__name__} {reason}", "set it false")

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        # With a cache, which models make by default, transformers takes a row for one document.
        options = {"use_cache": False} if "position_ids" in batch.inputs else {}
        return model(**batch.inputs, **options).logits

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

    def baseline(self, train: pa.Table, other: pa.Table) -> Baseline:
        """A unigram model with add-one smoothing."""
        vocabulary = self.facts["vocab_size"]
        counts = np.bincount(train.column("input_ids").combine_chunks().values.to_numpy(), minlength=vocabulary) + 1.0
        log_probability = np.log(counts / counts.sum())
        rows = other.column("input_ids").to_pylist()
        isolated = DOCUMENTS in other.column_names
        documents = other.column(DOCUMENTS).to_pylist() if isolated else [[len(row)] for row in rows]
        # A document's first token is not predicted.
        rows = [np.delete(row, np.cumsum([0, *lengths[:-1]])) for row, lengths in zip(rows, documents, strict=True)]
        sums = {
            "loss": np.array([-log_probability[row].sum() for row in rows]),
            "weight": np.array([len(row) for row in rows], np.float64),
        }
        return Baseline("unigrams", sums)


def cut_lengths(lengths: list[int], row_length: int) -> list[list[int]]:
    """The lengths of the documents, or of their parts, in each row of `row_length` tokens that they fill."""
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts = np.union1d(ends, np.arange(row_length, sum(lengths), row_length))
    rows: list[list[int]] = [[] for _ in range(0, sum(lengths), row_length)]
    for end, length in zip(cuts.tolist(), np.diff(cuts, prepend=0).tolist(), strict=True):
        rows[(end - 1) // row_length].append(length)
    return rows


def document_positions(ids: pa.Array, documents: pa.Array, width: int) -> Tensor:
    """The (B, `width`) position of each token in its document; 0 for padding. `ids`, `documents`: list columns of the
    rows' tokens and of their documents' lengths."""
    lengths = documents.flatten().to_numpy()
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    offsets = ids.offsets.to_numpy()
    positions = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), pa.array(np.arange(len(starts)) - starts))
    return pad_lists(positions, 0, width)


@torch.no_grad()
def isolates_documents(model: Any) -> bool:
    """Whether a token gets the same logits behind another document, behind its like, and at a row's start."""
    model.eval()
    ids_BT = torch.tensor([[0, 1], [1, 1]])
    logits_BTV = model(input_ids=ids_BT, position_ids=torch.zeros_like(ids_BT), use_cache=False).logits
    alone_1V = logits_BTV[1, :1]
    return torch.allclose(logits_BTV[:, 1], alone_1V.expand(2, -1), rtol=1e-4, atol=1e-5)
