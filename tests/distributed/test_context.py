"""Sequences split over processes train like whole ones: the parts, the attention between them, families, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.loader import Coordinate, Cursor, Loader, open_split
from heliostat.parallel.context import (
    ATTENTION,
    check_task,
    padded_length,
    positions,
    refuse,
    split_batch,
    split_context,
)
from heliostat.parallel.mesh import make_layout
from heliostat.recipe import Parallelism, Refused, override
from heliostat.tasks import Batch, get_task
from heliostat.train.prove import PROFILED_STEP, make_data, parse_layouts, proof_recipe, prove
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.distributed.test_prove import family
from tests.recipes import prepared, tiny_bert, tiny_llama

# -- the parts


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_each_position_lies_on_one_rank_and_all_have_the_same_work(degree: int) -> None:
    length = padded_length(41, degree)
    by_rank = [positions(length, degree, rank) for rank in range(degree)]
    assert torch.equal(torch.cat(by_rank).sort().values, torch.arange(length))
    # Under a causal mask position p sees p + 1 keys.
    assert len({int((part + 1).sum()) for part in by_rank}) == 1


def test_parts_of_a_batch_make_it_whole() -> None:
    ids_BT = torch.randint(0, 100, (3, 24))
    lengths_B = torch.tensor([24, 9, 1])
    mask_BT = (torch.arange(24) < lengths_B[:, None]).long()
    batch = Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, {"labels": ids_BT + 1}, torch.ones(3))
    parts = [split_batch(batch, 3, rank) for rank in range(3)]
    back = torch.cat([positions(24, 3, rank) for rank in range(3)]).argsort()
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in parts], 1)[:, back], ids_BT)
    assert torch.equal(torch.cat([part.targets["labels"] for part in parts], 1)[:, back], ids_BT + 1)
    position_ids_BT = torch.cat([part.inputs["position_ids"] for part in parts], 1)[:, back]
    assert torch.equal(position_ids_BT, torch.arange(24) * mask_BT)
    assert all(torch.equal(part.inputs["attention_mask"], mask_BT) for part in parts)


def test_a_batch_without_padding_gets_a_mask() -> None:
    part = split_batch(Batch({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, {}, torch.ones(2)), 2, 0)
    assert torch.equal(part.inputs["attention_mask"], torch.ones(2, 8, dtype=torch.int64))


# -- attention

LENGTH = 24
LENGTHS = (24, 10)


def causal_lm(**config: Any) -> Any:
    """A causal language model without storage."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), num_hidden_layers=2, **config)
        )


def differences(degree: int, window: int | None) -> list[float]:
    """Worst differences of this rank's output and gradients of queries, keys and values from those of the whole, with
    two query heads for each of keys and values, and a row that is mostly padding."""
    layout = make_layout(Parallelism(workers=degree, context=degree))
    split_context(causal_lm(model_type="llama"), layout)
    module = nn.Module()
    module.num_key_value_groups = 2
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, LENGTH, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(2, 4, LENGTH, 8)
    inside_BT = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    distance_TT = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen_BTT = (distance_TT >= 0) & (distance_TT < (window or LENGTH)) & inside_BT[:, None] | (distance_TT == 0)
    query, key, value = whole[0], *(tensor.repeat_interleave(2, 1) for tensor in whole[1:])
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_BTT[:, None])
    (expected * upstream).sum().backward()

    mine = positions(LENGTH, degree, dist.get_rank())
    parts = [tensor.detach()[:, :, mine].requires_grad_() for tensor in whole]
    mask = transformers.AttentionMaskInterface()[ATTENTION](
        batch_size=2, q_length=len(mine), kv_length=LENGTH, attention_mask=inside_BT, device=torch.device("cpu"),
        mask_function=sliding_window_causal_mask_function(window) if window else causal_mask_function,
    )  # fmt: skip
    attention = transformers.AttentionInterface()[ATTENTION]
    got, _ = attention(module, *parts, mask, dropout=0.0, scaling=8**-0.5)
    (got.transpose(1, 2) * upstream[:, :, mine]).sum().backward()
    pairs = [(got.transpose(1, 2), expected[:, :, mine])]
    pairs += [(part.grad, tensor.grad[:, :, mine]) for part, tensor in zip(parts, whole, strict=True)]
    dropped, _ = attention(module, *parts, mask, dropout=0.5, scaling=8**-0.5)
    assert not torch.allclose(dropped, got)
    return [float((a - b).abs().max()) for a, b in pairs]


@pytest.mark.parametrize(("degree", "window"), [(2, None), (3, 4)])
def test_attention_is_that_of_the_whole_sequence(degree: int, window: int | None) -> None:
    for rank in run(degree, differences, degree, window):
        assert max(rank) < 1e-5, rank


# -- training


def test_sliding_windows_padding_and_evaluation(tmp_path: Path) -> None:
    """Three ranks need lengths that one process does not; the window is shorter than a rank's part."""
    llama = tiny_llama(tmp_path)
    recipe = override(llama, {"model.config": llama.model.config | {"model_type": "mistral", "sliding_window": 5}})
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, tmp_path / "one")
    split = override(recipe, {"parallelism.workers": 3, "parallelism.context": 3})
    run(3, train_here, split, data, tmp_path / "three")
    np.testing.assert_allclose(figures(tmp_path / "three"), figures(tmp_path / "one"), rtol=1e-5)
    one, three = (
        [row["validation"] for row in read_metrics(tmp_path / name / METRICS_FILE) if "validation" in row]
        for name in ("one", "three")
    )
    assert one
    for expected, got in zip(one, three, strict=True):
        for name in ("loss", "accuracy"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow)
                for name in ("qwen3", "gemma", "olmo", "phi", "gpt2", "mixtral", "qwen3_moe"))],
)  # fmt: skip
def test_families_on_two_processes(name: str, tmp_path: Path) -> None:
    (verdict,) = prove(family(name, tmp_path), parse_layouts("context=2", 2), 2)
    assert verdict.status == "equal", verdict
    if name == "llama":
        assert_closed_form(verdict.bytes_by_collective, tmp_path)


def assert_closed_form(sent: dict[str, int], folder: Path) -> None:
    """Every layer gathers keys and values of every position once; the way back hands over a gradient for each rank's
    copy of them; DDP does the rest."""
    recipe = proof_recipe(family("llama", folder), folder)
    make_data(folder / "data")
    loader = Loader(
        open_split(folder / "data", "train"),
        recipe.seed,
        recipe.training.global_batch_size,
        "",
        recipe.data.bucket_batches,
    )
    micro_batches = loader.read(Cursor(0, PROFILED_STEP - 1), Coordinate(), recipe.training.micro_batch_size)
    tokens = sum(
        rows.table.num_rows * padded_length(max(rows.column("length").to_pylist()), 2) for rows in micro_batches
    )
    layers, heads, size = (recipe.model.config[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    assert sent["all_gather"] == 2 * layers * tokens * heads * size * 4
    assert sent["reduce_scatter"] == 2 * sent["all_gather"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "layouts"),
    [
        (4, "context=2,fsdp=2;context=2,tensor=2;context=4;context=2,replicate=2"),
        (4, "context=2,pipeline=2;context=2,pipeline=2,schedule=gpipe"),
        (8, "context=2,tensor=2,replicate=2;context=2,fsdp=2,replicate=2"),
    ],
)
def test_hybrids(workers: int, layouts: str, tmp_path: Path) -> None:
    for verdict in prove(family("llama", tmp_path), parse_layouts(layouts, workers), workers):
        assert verdict.status == "equal", verdict


# -- refusals


def test_a_task_without_a_loss_for_each_position_is_refused(tmp_path: Path) -> None:
    check_task(get_task(tiny_llama(tmp_path)), 2)
    check_task(get_task(tiny_bert(tmp_path)), 1)
    with pytest.raises(Refused, match="text_classification") as caught:
        check_task(get_task(tiny_bert(tmp_path)), 2)
    assert caught.value.field == "parallelism.context"


@pytest.mark.parametrize(
    ("config", "word"),
    [({"model_type": "gemma2"}, "interface"), ({"model_type": "bloom"}, "interface"),
     ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "of kind conv"),
     ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "of kind linear_attention"),
     ({"model_type": "falcon_h1"}, "hybrid|state|convolves"),
     ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "dynamic")],
)  # fmt: skip
def test_a_model_that_mixes_positions_in_another_way_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused, match=word) as caught:
        refuse(causal_lm(**config))
    assert caught.value.field == "parallelism.context"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gpt2", "phi", "olmo", "mistral"])
def test_models_with_attention_alone_are_not(model_type: str) -> None:
    refuse(causal_lm(model_type=model_type))
