"""The parameters of a model by name and shape, from its configuration alone: no model is built.

Shapes are those of transformers' modules; what a configuration leaves out, and how layouts split a family, is read from
the installed transformers' own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from heliostat import installed
from heliostat.planner.plans import TENSOR_PLANS


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    linear: tuple[int, int] | None = None
    """Inputs and outputs of a linear module, of its matrix: adapters may attach to it."""


@dataclass(frozen=True)
class ModelShape:
    parameters: list[Parameter]
    """In no order. Tied ones once."""
    base: str
    """The name of the model without its head."""
    blocks: str
    """The name of the list of its repeated blocks."""
    num_blocks: int
    embeddings: tuple[str, ...]
    """Names of the modules in front of the blocks."""
    head: str = ""
    """The module that gives logits over the vocabulary with a matrix of its own."""
    tensor_plan: Mapping[str, str] = field(default_factory=dict)
    expert_plan: Mapping[str, str] = field(default_factory=dict)
    """transformers' style by pattern, below `base`. Empty: the family declares none."""

    @property
    def num_parameters(self) -> int:
        return sum(size(each.shape) for each in self.parameters)


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def model_shape(config: dict[str, Any], task: str) -> ModelShape | None:
    """The model that a task makes of a configuration (the content of a `config.json`). None for families and tasks that
    are not described here, and for sizes that are none. Raises KeyError, TypeError, ValueError or ZeroDivisionError for
    configurations that the family itself would not take."""
    declared = declarations(config.get("model_type", ""))
    family = FAMILIES.get((config.get("model_type", ""), task))
    if declared is None or family is None:
        return None
    other_names: dict[str, str] = declared.get("attribute_map", {})
    own = {other_names.get(name, name): value for name, value in declared.items()}
    own |= {other_names.get(name, name): value for name, value in config.items()}
    plan = declared.get("base_model_tp_plan") or TENSOR_PLANS.get(config["model_type"], {})
    shape = family(own, plan, declared.get("base_model_ep_plan") or {})
    numbers = (length for each in shape.parameters for length in each.shape)
    return shape if all(isinstance(length, int) and length > 0 for length in numbers) else None


def declarations(model_type: str) -> dict[str, Any] | None:
    """What transformers' configuration class of a family says of itself: the defaults of its fields, its plans. None
    for families that it does not have."""
    root = installed.folder("transformers")
    path = root / "models" / model_type / f"configuration_{model_type}.py" if root and model_type else None
    if path is None or not path.is_file():
        return None
    for body in installed.classes(path).values():
        found = installed.literals(body)
        if found.get("model_type") == model_type:
            return found
    return None


def _linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs), linear=(inputs, outputs))
    if bias:
        yield Parameter(f"{name}.bias", (outputs,))


def _conv1d(name: str, inputs: int, outputs: int) -> Iterator[Parameter]:
    """GPT-2's linear module, which holds its matrix the other way round."""
    yield Parameter(f"{name}.weight", (inputs, outputs), linear=(inputs, outputs))
    yield Parameter(f"{name}.bias", (outputs,))


def _norm(name: str, width: int) -> Iterator[Parameter]:
    yield from (Parameter(f"{name}.{each}", (width,)) for each in ("weight", "bias"))


def _decoder(
    config: dict[str, Any], tensor_plan: dict[str, str], expert_plan: dict[str, str], **kind: Any
) -> ModelShape:
    """Llama (Touvron et al. 2023, arXiv:2302.13971) and what came of it. `kind`: `qkv_bias` where the family has them
    whatever its configuration says, `qk_norm`, `experts` (the field that says how wide they are)."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_width = config.get("head_dim") or width // heads
    bias = config.get("attention_bias", False)

    def block(name: str, index: int) -> Iterator[Parameter]:
        attention = f"{name}.self_attn"
        for part, outputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield from _linear(
                f"{attention}.{part}_proj", width, outputs * head_width, bias or kind.get("qkv_bias", False)
            )
        yield from _linear(f"{attention}.o_proj", heads * head_width, width, bias)
        if kind.get("qk_norm"):
            yield from (Parameter(f"{attention}.{part}_norm.weight", (head_width,)) for part in ("q", "k"))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Parameter(f"{name}.{norm}.weight", (width,))
        if "experts" in kind and _has_experts(config, index):
            count, inner = config["num_local_experts"], config[kind["experts"]]
            yield Parameter(f"{name}.mlp.gate.weight", (count, width))
            yield Parameter(f"{name}.mlp.experts.gate_up_proj", (count, 2 * inner, width))
            yield Parameter(f"{name}.mlp.experts.down_proj", (count, width, inner))
            return
        inner, mlp_bias = config["intermediate_size"], config.get("mlp_bias", False)
        yield from _linear(f"{name}.mlp.gate_proj", width, inner, mlp_bias)
        yield from _linear(f"{name}.mlp.up_proj", width, inner, mlp_bias)
        yield from _linear(f"{name}.mlp.down_proj", inner, width, mlp_bias)

    parameters = [Parameter("model.embed_tokens.weight", (config["vocab_size"], width))]
    for index in range(layers):
        parameters += block(f"model.layers.{index}", index)
    parameters.append(Parameter("model.norm.weight", (width,)))
    tied = config.get("tie_word_embeddings", False)
    if not tied:
        parameters.append(Parameter("lm_head.weight", (config["vocab_size"], width)))
    return ModelShape(
        parameters,
        base="model",
        blocks="model.layers",
        num_blocks=layers,
        embeddings=("model.embed_tokens",),
        head="" if tied else "lm_head",
        tensor_plan=tensor_plan,
        expert_plan=expert_plan,
    )


def _has_experts(config: dict[str, Any], index: int) -> bool:
    """Qwen's mixtures may have dense blocks, too."""
    return (
        config["num_local_experts"] > 0
        and index not in (config.get("mlp_only_layers") or ())
        and (index + 1) % config.get("decoder_sparse_step", 1) == 0
    )


def _gpt2(config: dict[str, Any], tensor_plan: dict[str, str], expert_plan: dict[str, str]) -> ModelShape:
    width, layers = config["n_embd"], config["n_layer"]
    inner = config.get("n_inner") or 4 * width
    parameters = [
        Parameter("transformer.wte.weight", (config["vocab_size"], width)),
        Parameter("transformer.wpe.weight", (config["n_positions"], width)),
        *_norm("transformer.ln_f", width),
    ]
    for index in range(layers):
        name = f"transformer.h.{index}"
        parameters += [
            *_norm(f"{name}.ln_1", width),
            *_conv1d(f"{name}.attn.c_attn", width, 3 * width),
            *_conv1d(f"{name}.attn.c_proj", width, width),
            *_norm(f"{name}.ln_2", width),
            *_conv1d(f"{name}.mlp.c_fc", width, inner),
            *_conv1d(f"{name}.mlp.c_proj", inner, width),
        ]
    tied = config.get("tie_word_embeddings", True)
    if not tied:
        parameters.append(Parameter("lm_head.weight", (config["vocab_size"], width)))
    return ModelShape(
        parameters,
        base="transformer",
        blocks="transformer.h",
        num_blocks=layers,
        embeddings=("transformer.wte", "transformer.wpe"),
        head="" if tied else "lm_head",
        tensor_plan=tensor_plan,
        expert_plan=expert_plan,
    )


def _bert(config: dict[str, Any], tensor_plan: dict[str, str], expert_plan: dict[str, str]) -> ModelShape:
    """With a pooler and a head that classifies."""
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    embeddings = "bert.embeddings"
    parameters = [
        Parameter(f"{embeddings}.word_embeddings.weight", (config["vocab_size"], width)),
        Parameter(f"{embeddings}.position_embeddings.weight", (config["max_position_embeddings"], width)),
        Parameter(f"{embeddings}.token_type_embeddings.weight", (config["type_vocab_size"], width)),
        *_norm(f"{embeddings}.LayerNorm", width),
        *_linear("bert.pooler.dense", width, width, bias=True),
        *_linear("classifier", width, _num_labels(config), bias=True),
    ]
    for index in range(layers):
        name = f"bert.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            parameters += _linear(f"{name}.attention.self.{part}", width, width, bias=True)
        parameters += [
            *_linear(f"{name}.attention.output.dense", width, width, bias=True),
            *_norm(f"{name}.attention.output.LayerNorm", width),
            *_linear(f"{name}.intermediate.dense", width, inner, bias=True),
            *_linear(f"{name}.output.dense", inner, width, bias=True),
            *_norm(f"{name}.output.LayerNorm", width),
        ]
    return ModelShape(
        parameters,
        base="bert",
        blocks="bert.encoder.layer",
        num_blocks=layers,
        embeddings=(embeddings,),
        tensor_plan=tensor_plan,
        expert_plan=expert_plan,
    )


def _vit(config: dict[str, Any], tensor_plan: dict[str, str], expert_plan: dict[str, str]) -> ModelShape:
    """With a head that classifies."""
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    (height, across), (patch_height, patch_across) = _pair(config["image_size"]), _pair(config["patch_size"])
    patches = (height // patch_height) * (across // patch_across)
    embeddings = "vit.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    parameters = [
        Parameter(f"{embeddings}.cls_token", (1, 1, width)),
        Parameter(f"{embeddings}.position_embeddings", (1, patches + 1, width)),
        Parameter(f"{projection}.weight", (width, config["num_channels"], patch_height, patch_across)),
        Parameter(f"{projection}.bias", (width,)),
        *_norm("vit.layernorm", width),
        *_linear("classifier", width, _num_labels(config), bias=True),
    ]
    for index in range(layers):
        name = f"vit.layers.{index}"
        for part in ("q", "k", "v"):
            parameters += _linear(f"{name}.attention.{part}_proj", width, width, config["qkv_bias"])
        parameters += [
            *_linear(f"{name}.attention.o_proj", width, width, bias=True),
            *_norm(f"{name}.layernorm_before", width),
            *_linear(f"{name}.mlp.fc1", width, inner, bias=True),
            *_linear(f"{name}.mlp.fc2", inner, width, bias=True),
            *_norm(f"{name}.layernorm_after", width),
        ]
    return ModelShape(
        parameters,
        base="vit",
        blocks="vit.layers",
        num_blocks=layers,
        embeddings=(embeddings,),
        tensor_plan=tensor_plan,
        expert_plan=expert_plan,
    )


def _num_labels(config: dict[str, Any]) -> int:
    """transformers' default is two."""
    return len(config.get("id2label") or ()) or config.get("num_labels", 2)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _decoder_with(**kind: Any) -> Callable[..., ModelShape]:
    return lambda *args: _decoder(*args, **kind)


FAMILIES: dict[tuple[str, str], Callable[..., ModelShape]] = {
    ("llama", "language_model"): _decoder,
    ("mistral", "language_model"): _decoder,
    ("qwen2", "language_model"): _decoder_with(qkv_bias=True),
    ("qwen3", "language_model"): _decoder_with(qk_norm=True),
    ("mixtral", "language_model"): _decoder_with(experts="intermediate_size"),
    ("qwen3_moe", "language_model"): _decoder_with(qk_norm=True, experts="moe_intermediate_size"),
    ("gpt2", "language_model"): _gpt2,
    ("bert", "text_classification"): _bert,
    ("vit", "image_classification"): _vit,
}
"""By `model_type` and task."""
