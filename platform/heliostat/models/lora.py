"""Low-rank adapters through peft. An adapted module W holds W itself, frozen, as `base_layer`, and adds
alpha / rank · B A to it; B starts at zero, so that training starts from the model as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from heliostat.models.blocks import blocks
from heliostat.models.weights import drawn_from, nothing_loaded, place
from heliostat.recipe import Lora, Refused, nearest

ADAPTER = "default"
"""peft's name for the one adapter that a module has."""


def add_adapters(model: Any, lora: Lora, new_parameters: set[str], seed: int = 0) -> LoraModel:
    """Give the model's blocks adapters, in place, drawn from the seed; train nothing but these and what no checkpoint
    held. Those of a model on meta stay there, for `draw_adapters`. Raises Refused for targets that the blocks do not
    have, and for new weights that would be frozen as they were drawn."""
    names = target_modules(model, lora.targets)
    if fresh := [name for name in names if f"{name}.weight" in new_parameters]:
        raise Refused("model.lora", f"the checkpoint has no weights of {fresh[0]}, which would stay untrained")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    on_meta = next(model.parameters()).is_meta
    with torch.device("meta" if on_meta else "cpu"):
        adapted = LoraModel(model, config, ADAPTER)
    if not on_meta:
        draw_adapters(model, seed, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if name in new_parameters:
            parameter.requires_grad_()
    return adapted


def draw_adapters(model: Any, seed: int, device: torch.device) -> None:
    """Give adapters their values, each rank its part of them: A as peft draws it (Kaiming, uniform, a = √5), B zero.
    Module by module, each from a seed of its own: the same on every layout."""
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for factor in ("lora_A", "lora_B"):
            name = f"{path}.{factor}.{ADAPTER}.weight"
            whole = torch.zeros(model.get_parameter(name).shape)
            if factor == "lora_A":
                with drawn_from(seed, name):
                    nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            place(model, name, whole, device, nothing_loaded(set()))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Until it ends each adapted module is the one it adapts, under that one's own name."""
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]

    def put(what: list[tuple[str, Any]]) -> None:
        for name, module in what:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent)._modules[own] = module

    put([(name, module.base_layer) for name, module in adapted])
    try:
        yield
    finally:
        put(adapted)


def target_modules(model: Any, targets: list[str]) -> list[str]:
    """The names of the linear modules of the model's blocks that are called as one of `targets`, or of all."""
    prefix, block_list = blocks(model)
    linear = [
        f"{prefix}.{name}" for name, module in block_list.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    if not linear:
        raise Refused("model.lora", f"the blocks of {type(model).__name__} have no linear modules", "set rank 0")
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if target not in known:
            raise Refused(
                "model.lora.targets",
                f"the blocks of {type(model).__name__} have no linear module {target!r}",
                nearest(target, known) or f"there are: {', '.join(known)}",
            )
    return [name for name in linear if not targets or name.rpartition(".")[2] in targets]


def save_adapter(adapted: LoraModel, base: str, new_parameters: set[str], folder: Path) -> None:
    """Write the adapter, and the new parameters beside it, as `PeftModel.from_pretrained` reads them."""
    model: Any = adapted.model
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state |= {name: parameter for name, parameter in model.named_parameters() if name in new_parameters}
    config: Any = adapted.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set is written in any order
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in new_parameters}) or None
    config.save_pretrained(folder)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
