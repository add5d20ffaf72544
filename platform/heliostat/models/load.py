"""From a recipe to a transformers model and tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import transformers

from heliostat.models.blocks import blocks
from heliostat.models.describe import model_folder
from heliostat.models.packaged import PREFIX, packaged_model
from heliostat.models.weights import Weights
from heliostat.recipe import TRAINED_TOKENIZER, Model, Refused, load_object

if TYPE_CHECKING:
    from heliostat.tasks import Task

OWN_FAMILIES = {"tabular_resnet": "heliostat.models.tabular:TabularForClassification"}
"""By `model_type`: architectures that transformers has not."""
END_OF_TEXT = "<|endoftext|>"


def resolve(name: str) -> str:
    """The directory (or hub id) behind a model's name."""
    if name.startswith(PREFIX):
        return str(packaged_model(name.removeprefix(PREFIX)))
    return str(model_folder(name) or name)


def transformers_config(model: Model, **fields: Any) -> transformers.PretrainedConfig:
    """The model's configuration: its own, then the recipe's, then `fields` of the task."""
    own = dict(model.config)
    model_type = own.pop("model_type", None)
    _know_own_families()
    try:
        if model.name:
            config = transformers.AutoConfig.from_pretrained(resolve(model.name))
        elif model_type:
            config = transformers.AutoConfig.for_model(model_type)
        else:
            raise Refused(
                "model.name",
                "neither a model's name nor a model_type in model.config is given",
                "name a hub id or a directory",
            )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, Refused):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise Refused(
            "model.name",
            f"no model {model.name or model_type!r} can be loaded: {first_line}",
            "a hub id, a directory in Hugging Face format, or packaged:NAME",
        ) from error
    unknown = [key for key in own if not hasattr(config, key)]
    if unknown:
        raise Refused(f"model.config.{unknown[0]}", f"{type(config).__name__} has no such field")
    if model.name:
        # Backbones derive these from `depths`; the model's would not fit another depth.
        derived = ("stage_names", "out_features", "out_indices")
        own = {key: value for key, value in config.to_dict().items() if key not in derived} | own
    # Without a name nothing is inherited: a default that follows from others (`head_dim`) must follow from these.
    config = type(config).from_dict(own | fields)
    if model.dropout is not None:
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(config, key, model.dropout)
    return config


def on_meta(task: Task) -> torch.nn.Module:
    """The task's model without storage: its structure, shapes and counts."""
    with torch.device("meta"):
        return auto_class(task).from_config(transformers_config(task.recipe.model))


def auto_class(task: Task) -> Any:
    _know_own_families()
    return getattr(transformers, task.model_class)


def _know_own_families() -> None:
    """transformers' Auto classes find them from here on, without code from a model's folder."""
    for model_type, path in OWN_FAMILIES.items():
        kind = load_object(path, "model.config")
        transformers.AutoConfig.register(model_type, kind.config_class, exist_ok=True)
        transformers.AutoModel.register(kind.config_class, kind, exist_ok=True)


def build_model(task: Task, defer: bool = False) -> Any:
    """The model on CPU in float32, pre-trained where the recipe says so; all else is drawn from the recipe's seed,
    alike on every rank. `model.new_parameters` names what no checkpoint held of a pre-trained model.

    `defer`: the model stays on meta, and `model.weights` will give it values once it is laid out."""
    recipe = task.recipe
    config = transformers_config(recipe.model, **task.model_config())
    pretrained = bool(recipe.model.name and recipe.model.pretrained)
    with torch.device("meta"):
        model = auto_class(task).from_config(config, dtype=torch.float32)
    model.weights = Weights(resolve(recipe.model.name) if pretrained else "", model, recipe.seed)
    model.new_parameters = model.weights.lacking() if pretrained and recipe.model.lora.rank else set()
    if recipe.model.lora.rank:
        from heliostat.models.lora import add_adapters

        add_adapters(model, recipe.model.lora, model.new_parameters, recipe.seed)
    # Models make a cache for generation by default; each layer's would be a graph of its own to the compiler, and after
    # eight of a kind it gives up.
    model.config.get_text_config().use_cache = False
    freeze(model, recipe.model.freeze_layers)
    if not defer:
        load_weights(model, torch.device("cpu"))
    return model


def load_weights(model: Any, device: torch.device) -> None:
    """Give a deferred model its weights."""
    weights = model.weights
    if any(hasattr(module, "lora_A") for module in model.modules()):
        from heliostat.models.lora import draw_adapters, without_adapters

        with without_adapters(model):
            model.new_parameters = weights.load_into(model, device)
        draw_adapters(model, weights.seed, device)
    else:
        model.new_parameters = weights.load_into(model, device)
    model.weights = None


def freeze(model: torch.nn.Module, layers: int) -> None:
    """Stop training the embeddings and the lowest `layers` blocks."""
    if not layers:
        return
    _, block_list = blocks(model)
    if layers > len(block_list):
        raise Refused("model.freeze_layers", f"{layers} of {len(block_list)} blocks", f"use ≤ {len(block_list)}")
    base: Any = model.base_model
    for module in base.children():
        if isinstance(module, torch.nn.Embedding) or "Embedding" in type(module).__name__:
            module.requires_grad_(False)
    for block in block_list[:layers]:
        block.requires_grad_(False)


def load_tokenizer(model: Model, texts: list[str] | None = None) -> Any:
    """The recipe's tokenizer. `train:SIZE` trains a byte-level BPE on `texts`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    source = model.tokenizer or model.name
    if source.startswith(TRAINED_TOKENIZER):
        if texts is None:
            raise Refused("model.tokenizer", "it is trained when the data are prepared", "prepare them first")
        return train_tokenizer(texts, int(source.removeprefix(TRAINED_TOKENIZER)))
    try:
        return transformers.AutoTokenizer.from_pretrained(resolve(source))
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(
            "model.tokenizer", f"no tokenizer {source!r} can be loaded: {str(error).splitlines()[0]}"
        ) from error


def train_tokenizer(texts: list[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text in texts if isinstance(text, str)), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def processor_facts(processor: Any) -> dict[str, Any]:
    """What tasks need of a tokenizer once rows are token ids."""
    if processor is None:
        return {}
    padding = processor.pad_token_id if processor.pad_token_id is not None else processor.eos_token_id
    return {
        "padding_id": padding or 0,
        "vocab_size": len(processor),
        "eos_token_id": processor.eos_token_id,
        "bos_token_id": processor.bos_token_id,
    }
