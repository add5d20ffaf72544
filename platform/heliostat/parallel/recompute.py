"""Activation recompute: what a block computed in the forward pass is thrown away, and computed again for the backward
pass. More arithmetic, less memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from heliostat.recipe import Recipe, Refused

ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "efficient_attention",
        "flash_attention",
        "flash_attention_for_cpu",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
}
MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class EverySecondProduct:
    """What selective recompute keeps of a block: attention, which costs most for its size, and every second matrix
    product (as torchtitan does). The forward pass and its repetition count for themselves, so that they agree."""

    def __init__(self) -> None:
        self.seen = {False: 0, True: 0}

    def __call__(self, ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in MATRIX_PRODUCTS:
            self.seen[ctx.is_recompute] += 1
            kept = self.seen[ctx.is_recompute] % 2 == 0
        else:
            kept = operator in ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> Any:
    """The pair of contexts of one pass through one block."""
    return create_selective_checkpoint_contexts(EverySecondProduct())


def set_recompute(model: Any, recipe: Recipe) -> None:
    """Make each block of `model` recompute as the recipe says. Raises Refused for what cannot."""
    kind = recipe.training.recompute
    if kind == "none":
        return
    family = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise Refused("training.recompute", f"{family} does not support it", "set training.recompute none")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Refused(
            "training.recompute",
            f"{family} has batch norms, whose running statistics a second forward pass would update again",
            "set training.recompute none",
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = selective_contexts
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
