"""The planner's parameters against the models that transformers builds, and its bytes against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from heliostat.models.load import freeze, transformers_config
from heliostat.models.lora import add_adapters
from heliostat.planner.memory import RankMemory, rank_memory, with_adapters
from heliostat.planner.plans import TENSOR_PLANS
from heliostat.planner.shape import FAMILIES, ModelShape, model_shape
from heliostat.recipe import Lora, Model, Recipe, build, override

CLASSES: dict[str, Any] = {
    "language_model": transformers.AutoModelForCausalLM,
    "text_classification": transformers.AutoModelForSequenceClassification,
    "image_classification": transformers.AutoModelForImageClassification,
}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = BLOCKS | {"vocab_size": 100, "max_position_embeddings": 64}
TINY = TEXT | {"num_key_value_heads": 2}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [TINY, TINY | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}],
    "mistral": [TINY],
    "qwen2": [TINY | {"tie_word_embeddings": True}],
    "qwen3": [TINY | {"head_dim": 16, "attention_bias": True}],
    "mixtral": [TINY | {"num_local_experts": 4}],
    "qwen3_moe": [
        TINY | {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
        TINY | {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
    ],
    "gpt2": [
        {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "tie_word_embeddings": False},
    ],
    "bert": [TEXT, TEXT | {"type_vocab_size": 3, "id2label": {0: "a", 1: "b", 2: "c"}}],
    "vit": [BLOCKS | {"image_size": 32, "patch_size": 8, "num_channels": 1}, BLOCKS | {"qkv_bias": False}],
}
CASES = [(kind, config) for kind, variants in VARIANTS.items() for config in [*variants, {}]]


def task_of(model_type: str) -> str:
    return next(task for kind, task in FAMILIES if kind == model_type)


def built(config: dict[str, Any]) -> Any:
    """On meta, by the project's own loading."""
    with torch.device("meta"):
        return CLASSES[task_of(config["model_type"])].from_config(transformers_config(Model(config=config)))


def described(config: dict[str, Any]) -> ModelShape:
    shape = model_shape(config, task_of(config["model_type"]))
    assert shape is not None
    return shape


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_parameters_are_those_of_the_model(model_type: str, fields: dict[str, Any]) -> None:
    """By name and shape; without fields, of the family's own defaults. A saved configuration says the same."""
    config = {"model_type": model_type, **fields}
    model = built(config)
    shape = described(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {each.name: each.shape for each in shape.parameters} == expected
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.base == model.base_model_prefix
    assert len(model.get_submodule(shape.blocks)) == shape.num_blocks
    saved = described(model.config.to_dict())
    assert {each.name: each.shape for each in saved.parameters} == expected


@pytest.mark.parametrize("model_type", VARIANTS)
def test_plans_are_those_of_the_model(model_type: str) -> None:
    shape, config = described({"model_type": model_type}), transformers.AutoConfig.for_model(model_type)
    assert shape.tensor_plan == (config.base_model_tp_plan or TENSOR_PLANS.get(model_type, {}))
    assert shape.expert_plan == (config.base_model_ep_plan or {})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "vit", "mixtral"])
@pytest.mark.parametrize("targets", [[], ["last"]])
def test_adapters(model_type: str, targets: list[str]) -> None:
    config = {"model_type": model_type, **VARIANTS[model_type][0]}
    model, shape = built(config), described(config)
    if targets:
        linear = [each.name.split(".")[-2] for each in shape.parameters if each.linear and shape.blocks in each.name]
        targets = [linear[-1]]
    add_adapters(model, Lora(rank=4, targets=targets), set())
    found = with_adapters(shape, recipe(**{"model.lora.rank": 4, "model.lora.targets": targets}))
    assert {each.name: (each.shape, trained) for each, trained in found} == {
        name: (tuple(parameter.shape), parameter.requires_grad) for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "vit"])
def test_frozen_blocks(model_type: str) -> None:
    config = {"model_type": model_type, **VARIANTS[model_type][0]}
    model, shape = built(config), described(config)
    freeze(model, 2)
    found = with_adapters(shape, recipe(**{"model.freeze_layers": 2}))
    assert {each.name: trained for each, trained in found} == {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    }


def test_families_that_are_not_described() -> None:
    assert model_shape({"model_type": "t5"}, "language_model") is None
    assert model_shape({"model_type": "llama"}, "text_classification") is None
    assert model_shape({"model_type": "no_such_family"}, "language_model") is None
    assert model_shape({}, "language_model") is None


def recipe(**fields: Any) -> Recipe:
    base = build({"name": "r", "task": "language_model", "training": {"global_batch_size": 8, "micro_batch_size": 1}})
    return override(base, fields)


LLAMA = described({"model_type": "llama", **TINY})


def memory(**fields: Any) -> RankMemory:
    return rank_memory(LLAMA, recipe(**fields))


def test_one_process_holds_sixteen_bytes_a_parameter() -> None:
    found, count = memory(), LLAMA.num_parameters
    assert (found.parameters_bytes, found.gradients_bytes) == (4 * count, 4 * count)
    assert found.optimizer_bytes == 8 * count + 4 * len(LLAMA.parameters)
    assert found.average_bytes == found.gathered_bytes == 0
    assert found.held_bytes == found.device_bytes == 16 * count + 4 * len(LLAMA.parameters)
    assert found.staged_bytes == found.parameters_bytes + found.optimizer_bytes
    assert memory(**{"checkpoint.asynchronous": False}).staged_bytes == 0


def test_average_is_one_more_copy() -> None:
    assert memory(**{"training.ema_decay": 0.9}).average_bytes == 4 * LLAMA.num_parameters


def test_replicas_are_whole() -> None:
    assert memory(**{"parallelism.workers": 8}) == memory()


def test_fsdp_shares_all_but_what_it_gathers() -> None:
    one, found = memory(), memory(**{"parallelism.workers": 8, "parallelism.fsdp": 8})
    assert found.parameters_bytes * 8 == pytest.approx(
        one.parameters_bytes, rel=0.03
    )  # a hundred rows over eight ranks
    assert found.gradients_bytes == found.parameters_bytes
    block = sum(torch.Size(each.shape).numel() for each in LLAMA.parameters if ".layers.0." in each.name)
    outside = (2 * TINY["vocab_size"] + 1) * TINY["hidden_size"]
    assert found.gathered_bytes == 4 * (block + outside)
    kept = memory(**{"parallelism.workers": 8, "parallelism.fsdp": 8, "parallelism.reshard_after_forward": False})
    assert kept.gathered_bytes == one.parameters_bytes


def test_accumulated_gradients_are_whole_under_fsdp() -> None:
    fields = {"parallelism.workers": 4, "parallelism.fsdp": 4}
    assert memory(**fields).gradients_bytes == memory().gradients_bytes
    assert memory(**fields, **{"training.global_batch_size": 4}).gradients_bytes < memory().gradients_bytes / 3.5


def test_offloaded_state_is_not_the_gpus() -> None:
    fields = {"parallelism.workers": 8, "parallelism.fsdp": 8, "parallelism.cpu_offload": True}
    found = memory(**fields)
    assert found.device_bytes == found.gathered_bytes
    assert found.held_bytes == memory(**fields | {"parallelism.cpu_offload": False}).held_bytes


def test_a_billion_parameters_as_the_paper_counts_them() -> None:
    """Llama 2 7B (6.74 billion parameters by its paper, table 1 and the released checkpoint) in float32 with Adam."""
    shape = described({"model_type": "llama"})
    assert shape.num_parameters == 6_738_415_616
    assert rank_memory(shape, recipe()).held_bytes == pytest.approx(16 * 6_738_415_616, rel=1e-6)
