"""Packed documents that see only themselves: a row is the sum of its documents, each run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from heliostat.data.loader import open_split
from heliostat.data.prepare import prepare
from heliostat.evaluate import row_sums
from heliostat.models import bundle as bundles
from heliostat.models.load import build_model
from heliostat.predictor import Predictor
from heliostat.recipe import Refused, override
from heliostat.tasks import Rows, Task, get_task
from heliostat.tasks.language_model import DOCUMENTS, cut_lengths
from heliostat.train.loop import train
from heliostat.train.prove import proof_recipe
from tests.distributed.test_prove import family
from tests.recipes import prepared, tiny_llama

FACTS = {"padding_id": 0, "vocab_size": 256, "eos_token_id": 2, "bos_token_id": 1}
ISOLATED = {"data.pack": True, "data.isolate_documents": True, "data.sequence_length": 24}
# End-of-text tokens (2) within documents, documents of one token, and a row that is padded.
ROWS = [
    [[5, 2, 9, 7, 2], [3, 2], [8, 8, 4, 2, 6, 2, 11], [2], [20, 21, 40, 41, 42, 43, 44, 45, 2]],
    [[9, 8, 7, 6, 5, 4, 3, 2], [12], [13, 2]],
]


def rows_of(documents: list[list[list[int]]], weights: list[float]) -> Rows:
    ids = [[token for document in row for token in document] for row in documents]
    lengths = [[len(document) for document in row] for row in documents]
    table = pa.table(
        {
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(row) for row in ids], pa.int32()),
            DOCUMENTS: pa.array(lengths, pa.list_(pa.int32())),
        }
    )
    return Rows(table, np.arange(len(ids)), np.array(weights, np.float32))


def without_documents(rows: Rows) -> Rows:
    return Rows(rows.table.drop_columns([DOCUMENTS]), rows.sample_ids, rows.row_weight_B)


def task_and_model(folder: Path, name: str, **config: Any) -> tuple[Task, Any]:
    """A small model of a family in float32, and the task that isolates documents."""
    recipe = proof_recipe(family(name, folder), folder)
    recipe = override(recipe, ISOLATED | {"model.config": recipe.model.config | config})
    task = get_task(recipe, FACTS)
    return task, build_model(task)


# -- rows


def test_prepared_rows_know_their_documents(tmp_path: Path) -> None:
    """The stream is that of packing; documents are those of the source, cut where rows end."""
    plain = tiny_llama(tmp_path, **ISOLATED | {"data.isolate_documents": False})
    recipe = override(plain, ISOLATED)
    made = prepared(recipe)
    rows, others = open_split(made.folder, "train"), open_split(prepared(plain).folder, "train")
    assert rows.column("input_ids").to_pylist() == others.column("input_ids").to_pylist()
    assert DOCUMENTS not in others.column_names
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "processor")
    texts = [json.loads(line)["text"] for line in Path(recipe.data.train).read_text().splitlines()]
    ends = np.cumsum([len(tokenizer.encode(text)) + 1 for text in texts]).tolist()
    lengths = rows.column(DOCUMENTS).to_pylist()
    assert [sum(row) for row in lengths] == rows.column("length").to_pylist()
    found = np.cumsum([length for row in lengths for length in row]).tolist()
    assert set(found) == {end for end in [*ends, *range(24, ends[-1], 24)] if end <= found[-1]}
    assert max(end - start for start, end in zip([0, *ends], ends, strict=False)) > 24, "no document fills a row"


def test_isolated_rows_have_another_fingerprint_and_no_others(tmp_path: Path) -> None:
    """Unpacked rows are isolated anyway."""
    base = tiny_llama(tmp_path)
    found = {
        (pack, isolate): prepare(override(base, {"data.pack": pack, "data.isolate_documents": isolate}))[0].fingerprint
        for pack in (True, False)
        for isolate in (True, False)
    }
    assert found[False, True] == found[False, False]
    assert len(set(found.values())) == 3


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 12))
def test_lengths_are_cut_where_rows_end(lengths: list[int], row_length: int) -> None:
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = [numbers[start : start + row_length] for start in range(0, len(numbers), row_length)]
    assert cut_lengths(lengths, row_length) == [[row.count(number) for number in sorted(set(row))] for row in rows]


@pytest.mark.parametrize("start", [0, 1])
def test_positions_start_anew_and_first_tokens_are_not_predicted(tmp_path: Path, start: int) -> None:
    task = get_task(tiny_llama(tmp_path, **ISOLATED), FACTS)
    rows = rows_of(ROWS, [1, 1])
    sliced = Rows(rows.table.slice(start), rows.sample_ids[start:], rows.row_weight_B[start:])
    batch = task.collate(sliced, train=True, length=32)
    assert batch.inputs.keys() == {"input_ids", "position_ids"}
    for documents, positions, labels in zip(
        ROWS[start:], batch.inputs["position_ids"].tolist(), batch.targets["labels"].tolist(), strict=True
    ):
        padding = 32 - sum(map(len, documents))
        assert positions == [place for document in documents for place in range(len(document))] + [0] * padding
        assert labels == [label for each in documents for label in [*each[1:], -100]] + [-100] * padding


# -- a row is the sum of its documents


def alone(task: Task, model: Any) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Loss, predicted tokens and gradients over the documents, each in a forward pass of its own."""
    model.zero_grad()
    loss, weight = 0.0, 0
    for document in (document for row in ROWS for document in row if len(document) > 1):
        ids_1T = torch.tensor([document])
        logits_1TV = model(input_ids=ids_1T, use_cache=False).logits
        part = torch.nn.functional.cross_entropy(logits_1TV[0, :-1], ids_1T[0, 1:], reduction="sum")
        part.backward()
        loss, weight = loss + part.item(), weight + len(document) - 1
    return loss, weight, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, {}) for name in ("llama", "qwen3", "gemma", "gpt2", "olmo", "phi", "mixtral", "qwen3_moe")]
    + [("mistral", {"sliding_window": 3})],
)
def test_a_packed_row_is_the_sum_of_its_documents(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    task, model = task_and_model(tmp_path, name, **config)
    assert model.config._attn_implementation == "sdpa"
    task.check_model(model)
    model.train()
    loss, weight, gradients = alone(task, model)
    norm = torch.nn.utils.get_total_norm(gradients.values())
    model.zero_grad()
    rows = rows_of(ROWS, [1, 1])
    batch = task.collate(rows, train=True)
    sums = task.loss(task.outputs(model, batch), batch)
    sums.loss_sum.backward()
    assert sums.weight == weight
    assert sums.loss_sum.item() == pytest.approx(loss, rel=1e-5)
    for key, p in model.named_parameters():
        if p.grad is None:
            assert key not in gradients
        else:
            assert float((p.grad - gradients[key]).norm()) <= 1e-4 * float(norm), key

    evaluated, _ = row_sums(model, task, rows.table)
    assert evaluated["loss"].sum() == pytest.approx(loss, rel=1e-5)
    assert evaluated["weight"].sum() == weight

    across = task.collate(without_documents(rows), train=True)
    joined = task.loss(task.outputs(model.train(), across), across)
    assert joined.weight > weight
    # On the same labels, too, seeing other documents changes the loss, by more than ten times what is allowed above.
    seen = task.loss(task.outputs(model, across), batch).loss_sum.item()
    assert abs(seen / loss - 1) > 1e-4


def test_the_baseline_predicts_what_the_model_does(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **ISOLATED)
    found = prepared(recipe)
    task = found.task(recipe)
    table = open_split(found.folder, "validation")
    evaluated, _ = row_sums(build_model(task), task, table)
    baseline = task.baseline(open_split(found.folder, "train"), table)
    assert baseline is not None
    assert baseline.row_sums["weight"].tolist() == evaluated["weight"].tolist()


# -- what is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bloom"}, "BloomForCausalLM takes no position_ids"),
        ({"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}, "OPTForCausalLM does not keep"),
        ({"model_type": "bert", "is_decoder": True}, "BertLMHeadModel does not keep"),
        (
            {"model_type": "lfm2", "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            "Lfm2ForCausalLM does not keep",
        ),
        ({"model_type": "mamba"}, "MambaForCausalLM takes no position_ids"),
    ],
)
def test_a_model_that_sees_other_documents_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 256}
    if config["model_type"] != "mamba":
        small |= {"num_attention_heads": 4}
    recipe = override(tiny_llama(tmp_path), ISOLATED | {"model.config": small | config})
    model = build_model(get_task(recipe, FACTS))
    with pytest.raises(Refused, match=words) as caught:
        get_task(recipe, FACTS).check_model(model)
    assert caught.value.field == "data.isolate_documents"
    get_task(override(recipe, {"data.isolate_documents": False}), FACTS).check_model(model)


def test_training_refuses_before_its_first_step(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **ISOLATED)
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(Refused, match="BloomForCausalLM"):
        train(override(recipe, {"model.config": config}), prepared(recipe).folder, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- rows without documents


def test_requests_are_single_documents(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **ISOLATED, **{"schedule.max_steps": 1})
    predictor = Predictor(bundles.read(Path(train(recipe, prepared(recipe).folder, tmp_path / "run")["bundle"])))
    inputs = [{"text": "sun salt"}, {"text": "noon shade steam cloud turbine storage"}]
    assert predictor.rows(inputs).column_names == ["input_ids", "length"]
    for one, item in zip(predictor.predict(inputs), inputs, strict=True):
        assert one["perplexity"] == pytest.approx(predictor.predict([item])[0]["perplexity"], rel=1e-4)
        (ids,) = predictor.rows([item]).column("input_ids").to_pylist()
        model = transformers.AutoModelForCausalLM.from_pretrained(predictor.bundle.path)
        with torch.inference_mode():
            logits_TV = model(torch.tensor([ids])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]), reduction="sum")
        assert one["log_probability"] == pytest.approx(-expected.item(), rel=1e-4)
