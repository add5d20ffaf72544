"""FLOPs by the model's arithmetic, against PyTorch's own count of a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from heliostat.models.flops import flops_per_token, peak_flops
from heliostat.tasks import Batch

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def counted(model: Any, ids_BT: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_as_pytorch_counts(family: str) -> None:
    # Attention as plain matrix products, which are counted as they are.
    config = transformers.AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else TINY))
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids_BT = torch.randint(0, 128, (3, 24))
    assert flops_per_token(model, 24) * ids_BT.numel() == counted(model, ids_BT)


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    config = transformers.LlamaConfig(**TINY)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for block in model.model.layers:
        block.mlp.requires_grad_(False)
    ids_BT = torch.randint(0, 128, (3, 24))
    assert flops_per_token(model, 24) * ids_BT.numel() == counted(model, ids_BT)


def test_a_token_pays_for_the_experts_it_is_sent_to() -> None:
    sizes = TINY | {"num_local_experts": 8, "sliding_window": None}
    one, two = (
        flops_per_token(
            transformers.AutoModelForCausalLM.from_config(
                transformers.MixtralConfig(**sizes, num_experts_per_tok=experts)
            ),
            24,
        )
        for experts in (1, 2)
    )
    assert two - one == 6 * 2 * 3 * 32 * 64  # an expert's three matrices in each of two blocks


def test_peak_is_what_products_reach() -> None:
    torch.set_num_threads(1)
    peak, known = peak_flops(torch.device("cpu"), torch.float32)
    assert known == "measured"
    assert 1e9 < peak < 1e13


def test_tokens_of_a_batch(tmp_path: Path) -> None:
    ids_BT = torch.ones(3, 8, dtype=torch.int64)
    batch = Batch({"input_ids": ids_BT}, {}, torch.tensor([1.0, 1.0, 0.0]))
    assert batch.tokens == 16
    mask_BT = torch.ones(3, 8, dtype=torch.int64)
    mask_BT[0, 5:] = 0
    assert dataclasses.replace(batch, inputs={"input_ids": ids_BT, "attention_mask": mask_BT}).tokens == 13
    assert Batch({"pixel_values": torch.ones(3, 1, 4, 4)}, {}, torch.ones(3)).tokens == 0
