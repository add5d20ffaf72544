"""Recomputed activations change what is computed twice, and not one bit of a gradient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from heliostat.parallel.mesh import make_layout
from heliostat.parallel.parallelize import parallelize
from heliostat.recipe import Refused, override
from tests.recipes import tiny_llama

BLOCKS = 2
PRODUCTS = 7
"""Matrix products of a Llama block: queries, keys, values, output, gate, up, down."""
IDS_BT = torch.arange(24).view(2, 12)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gradients(folder: Path, recompute: str) -> tuple[Counter[str], dict[str, torch.Tensor]]:
    """Of a Llama with dropout in its attention; the operators that ran, and each parameter's gradient."""
    recipe = override(tiny_llama(folder), {"training.recompute": recompute})
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, attention_dropout=0.2, **recipe.model.config)
    model = transformers.LlamaForCausalLM(config).train()
    parallel = parallelize(model, make_layout(recipe.parallelism), recipe)
    torch.manual_seed(1)
    with Count() as count:
        parallel.runs(input_ids=IDS_BT, use_cache=False).logits.square().sum().backward()
    return count.calls, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_bitwise_those_without(tmp_path: Path) -> None:
    calls, plain = gradients(tmp_path, "none")
    full_calls, full = gradients(tmp_path, "full")
    selective_calls, selective = gradients(tmp_path, "selective")
    assert plain
    for name, expected in plain.items():
        assert torch.equal(full[name], expected), name
        assert torch.equal(selective[name], expected), name
    # A block's last product is not made again, since nothing of the backward pass needs what it gives. Of the seven,
    # the second, fourth and sixth are kept.
    assert full_calls["mm"] - calls["mm"] == BLOCKS * (PRODUCTS - 1)
    assert selective_calls["mm"] - calls["mm"] == BLOCKS * 3


def test_attention_is_kept(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"training.recompute": "selective"})
    config = transformers.LlamaConfig(vocab_size=64, **recipe.model.config)
    for recompute, times in (("none", 1), ("selective", 1), ("full", 2)):
        model = transformers.LlamaForCausalLM(config).train()
        recipe = override(recipe, {"training.recompute": recompute})
        parallel = parallelize(model, make_layout(recipe.parallelism), recipe)
        with Count() as count:
            parallel.runs(input_ids=IDS_BT, use_cache=False).logits.sum().backward()
        assert count.calls["_scaled_dot_product_flash_attention_for_cpu"] == BLOCKS * times, recompute


def test_batch_norms_are_refused(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"training.recompute": "full"})
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    with pytest.raises(Refused, match="ResNet"):
        parallelize(transformers.ResNetForImageClassification(config), make_layout(recipe.parallelism), recipe)
