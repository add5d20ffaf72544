"""Models drawn at random part by part have the distributions that transformers draws them from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heliostat.models.load import auto_class, build_model, transformers_config
from heliostat.recipe import build
from heliostat.tasks import get_task
from tests.recipes import TINY_RESNET, TINY_TABULAR

FACTS = {"padding_id": 0, "vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1, "labels": ["a", "b", "c"],
         "image_shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "columns": ["height", "width"],
         "may_be_missing": []}  # fmt: skip
HEADS = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("language_model", HEADS | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "gemma": ("language_model", HEADS | {"num_key_value_heads": 2, "head_dim": 16}),  # tied
    "mixtral": ("language_model", HEADS | {"num_key_value_heads": 2, "num_local_experts": 4}),
    # It draws the last matrix of each half of a block anew, by the number of blocks.
    "gpt2": ("language_model", {"n_embd": 64, "n_layer": 3, "n_head": 4}),
    "bert": ("text_classification", HEADS),
    "vit": ("image_classification", HEADS | {"image_size": 32, "patch_size": 8}),
    "resnet": ("image_classification", TINY_RESNET | {"embedding_size": 32, "hidden_sizes": [32, 64]}),
    "tabular_resnet": ("tabular_classification", TINY_TABULAR),
}


@pytest.mark.parametrize("family", MODELS)
def test_drawn_as_transformers_draws(family: str) -> None:
    name, config = MODELS[family]
    recipe = build({"name": "drawn", "task": name, "model": {"config": {**config, "model_type": family}}})
    task = get_task(recipe, FACTS)
    ours = build_model(task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = auto_class(task).from_config(transformers_config(recipe.model, **task.model_config()))
    assert type(ours) is type(theirs)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.unique().numel() == 1:  # zeros and ones, and counts
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0, msg=key)
            continue
        # Six standard errors, of normal or uniform values.
        count, std = tensor.numel(), tensor.std().item()
        assert abs(state[key].std().item() / std - 1) < 6 * (2 / count) ** 0.5, key
        assert abs(state[key].mean().item() - tensor.mean().item()) < 6 * std * (2 / count) ** 0.5, key
        assert not torch.equal(state[key], tensor), key
    for (key, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, msg=key)  # rotary frequencies and the like
    assert all(parameter.requires_grad for parameter in ours.parameters())
    again = build_model(task).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_blocks_differ_and_the_seed_decides() -> None:
    recipe = build(
        {"name": "drawn", "task": "language_model", "model": {"config": {**MODELS["llama"][1], "model_type": "llama"}}}
    )
    states = [build_model(get_task(recipe.model_copy(update={"seed": seed}), FACTS)).state_dict() for seed in (0, 1)]
    drawn = [tensor for state in states for tensor in state.values() if tensor.unique().numel() > 1]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == len(drawn)
