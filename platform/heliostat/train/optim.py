"""Optimizer, learning rate and moving average, each a plain function of the recipe and the step."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from heliostat.recipe import Recipe, Schedule


def total_steps(schedule: Schedule, batches_per_epoch: int) -> int:
    return schedule.max_steps or max(1, math.ceil(schedule.epochs * batches_per_epoch))


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """Multiple of the peak learning rate at `step` (from 0): linear warm-up, then the schedule's shape."""
    warmup = round(schedule.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    low = schedule.min_lr_fraction
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "linear":
        return low + (1 - low) * (1 - progress)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: torch.nn.Module, recipe: Recipe, new_parameters: set[str]) -> torch.optim.Optimizer:
    """AdamW. No weight decay on vectors (biases, norms); layer-wise and head rates as `lr_scale` of each group."""
    options = recipe.optimizer
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    depths = [int(found.group(1)) for name, _ in model.named_parameters() if (found := _block_number(name))]
    top = max(depths, default=0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name in new_parameters:
            scale = options.head_lr_scale
        elif options.layer_lr_decay < 1.0:
            found = _block_number(name)
            below = top - int(found.group(1)) if found else (top + 1 if "embed" in name else 0)
            scale = options.layer_lr_decay**below
        decay = options.weight_decay if parameter.ndim >= 2 else 0.0
        # Fused kernels take tensors of one mesh at a time.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = groups.setdefault((scale, decay, mesh), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()), lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def _block_number(name: str) -> re.Match[str] | None:
    return re.search(r"\.(\d+)\.", name)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class MovingAverage:
    """Exponential moving average of the trained parameters (shards stay shards)."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """With the usual warm-up, so that the first weights do not linger: min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights; a second call undoes it."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))
