"""A vector for a text, from an encoder that was trained elsewhere.

Shapes: B rows of a micro-batch, T tokens, H numbers of a vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from heliostat.models.load import load_tokenizer
from heliostat.models.pooling import declared, pooled, save
from heliostat.recipe import Refused
from heliostat.tasks import Batch, Rows, Task, row_name
from heliostat.tasks.text_classification import padded_texts, texts_of, tokenize


class TextEmbedding(Task):
    model_class = "AutoModel"
    unused = ("pooler.",)

    def check(self) -> None:
        raise Refused(
            "task", "text_embedding has no loss to be trained by", f"python -m pipelines.bundle {self.recipe.name}"
        )

    def pretrained_facts(self) -> dict[str, Any]:
        return declared(self.recipe.model)

    def processor(self, texts: list[str] | None = None) -> Any:
        return load_tokenizer(self.recipe.model, texts)

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        texts = table.column(self.recipe.data.text_column).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise Refused("data.text_column", f"{row_name(table, row, where)} holds {text!r}, not a text")
        return rows_of(tokenize(texts, processor, self.recipe.model.max_length, self.recipe.model.truncation))

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        inputs = padded_texts(rows, self.facts["padding_id"], length)
        return Batch(inputs, {}, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """(B, H)"""
        return pooled(model(**batch.inputs).last_hidden_state, batch.inputs["attention_mask"], self.facts)

    def embeddings(self, model: Any, batch: Batch) -> Tensor:
        return self.outputs(model, batch)

    def save(self, folder: Path, config: Any) -> None:
        save(folder, self.facts, config.get_text_config().hidden_size, self.recipe.model.max_length)

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        return texts_of(inputs, self.recipe.data.text_column)

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in outputs.tolist()]

    def example(self) -> dict[str, Any]:
        return {"text": "a short text"}


def rows_of(ids: list[list[int]]) -> pa.Table:
    """Texts' tokens as prepared rows."""
    lengths = pa.array([len(row) for row in ids], pa.int32())
    return pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "length": lengths})
