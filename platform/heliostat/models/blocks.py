"""The repeated blocks of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch

from heliostat.recipe import Refused


def blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the model's repeated blocks: its longest ModuleList of one kind."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not found:
        raise Refused("model.name", f"{type(model).__name__} has no list of blocks")
    return max(found, key=lambda item: len(item[1]))


def one_of_each_kind(model: Any) -> Any:
    """A copy on CPU of a model, which may be on meta, with the first of its blocks of each kind and random weights: for
    checks that take a forward pass and must not take the whole model. Blocks of several classes are all kept."""
    whole = copy.deepcopy(model).to("meta")
    try:
        path, block_list = blocks(whole)
    except Refused:
        pass
    else:
        config = whole.config.get_text_config()
        by_block = {k: v for k, v in config.to_dict().items() if isinstance(v, list) and len(v) == len(block_list)}
        kinds = [
            str(
                (
                    [each[i] for each in by_block.values()],
                    [(name, type(module)) for name, module in block.named_modules()],
                )
            )
            for i, block in enumerate(block_list)
        ]
        kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        for name, each in by_block.items():
            setattr(config, name, [each[i] for i in kept])
        config.num_hidden_layers = len(kept)
        parent, _, own = path.rpartition(".")
        setattr(whole.get_submodule(parent), own, torch.nn.ModuleList(block_list[i] for i in kept))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        whole.to_empty(device="cpu").apply(whole._init_weights)
        for parameter in whole.parameters():  # many families draw them so small that a block changes next to nothing
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return whole
