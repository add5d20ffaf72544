"""Parallel plans as data, from what a model declares of itself (`base_model_tp_plan`, `base_model_pp_plan`)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from heliostat.recipe import Refused

GRAD_SUM = "replicated_with_grad_allreduce"
"""transformers' name for replicated modules that see this rank's heads only: their gradients are summed."""


TENSOR_PLANS = {
    "bert": {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    },
    "vit": {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    },
}
"""By `model_type`, for families that declare none of their own."""


def tensor_plan(model: Any, degree: int) -> tuple[dict[str, ParallelStyle], set[str]]:
    """Module pattern → style, and the names of replicated parameters whose gradients tensor peers have to sum.
    Refuses, by name, what the model cannot be split into."""
    declared = getattr(model.config, "base_model_tp_plan", None) or TENSOR_PLANS.get(model.config.model_type)
    family = type(model).__name__
    if not declared:
        raise Refused("parallelism.tensor", f"{family} declares no tensor-parallel plan", "use tensor=1")
    for field in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        value = getattr(model.config, field, None)
        if value is not None and value % degree:
            raise Refused(
                "parallelism.tensor", f"tensor={degree} does not divide {field}={value}", f"use a divisor of {value}"
            )
    styles: dict[str, ParallelStyle] = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    plan: dict[str, ParallelStyle] = {}
    prefix = model.base_model_prefix
    summed = {f"{prefix}.{pattern}" for pattern, style in declared.items() if style == GRAD_SUM}
    for pattern, style in declared.items():
        if style == GRAD_SUM:
            continue
        if style not in styles:
            raise Refused(
                "parallelism.tensor", f"{family} asks for the style {style!r}, which is not supported", "use tensor=1"
            )
        plan[f"{prefix}.{pattern}"] = styles[style]
    head = model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if head is not None and not tied and head.weight.shape[0] % degree == 0:
        name = next(name for name, module in model.named_modules() if module is head)
        plan[name] = ColwiseParallel(output_layouts=Replicate())
    partial = {
        name for name, _ in model.named_parameters() if re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0] in summed
    }
    return plan, partial


def pipeline_modules(model: Any) -> list[str]:
    """Names of the base model's children in the order in which a batch meets them."""
    declared = getattr(model.config, "base_model_pp_plan", None)
    if not declared:
        raise Refused("parallelism.pipeline", f"{type(model).__name__} declares no pipeline plan", "use pipeline=1")
    return list(declared)


def split_stage(model: Any, stage: int, stages: int) -> nn.Module:
    """Keep what stage `stage` of `stages` runs; the rest is replaced by pass-through modules, so that parameter
    names (and checkpoints) stay those of the whole model."""
    base = model.base_model
    first, *_, last = pipeline_modules(model)
    block_name = next(name for name in pipeline_modules(model) if isinstance(getattr(base, name), nn.ModuleList))
    blocks = getattr(base, block_name)
    if stages > len(blocks):
        raise Refused(
            "parallelism.pipeline", f"{stages} stages for {len(blocks)} blocks", f"use pipeline ≤ {len(blocks)}"
        )
    if getattr(model.config, "tie_word_embeddings", False):
        raise Refused(
            "parallelism.pipeline",
            f"{type(model).__name__} ties its embeddings, whose ends lie on two stages",
            "set model.config tie_word_embeddings false, or use pipeline=1",
        )
    bounds = [round(i * len(blocks) / stages) for i in range(stages + 1)]
    for index in range(len(blocks)):
        if not bounds[stage] <= index < bounds[stage + 1]:
            blocks[index] = PassThrough()
    if stage > 0:
        setattr(base, first, PassThrough())
    if stage < stages - 1:
        setattr(base, last, PassThrough())
        model.set_output_embeddings(PassThrough())
    return Stage(model, is_first=stage == 0)


class PassThrough(nn.Module):
    """A module of another stage."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden


class Stage(nn.Module):
    """One pipeline stage: token ids or hidden states (B, T, D) in, hidden states or logits (B, T, V) out."""

    def __init__(self, model: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.model, self.is_first = model, is_first

    def forward(self, x: Any, **kwargs: Any) -> Any:
        key = "input_ids" if self.is_first else "inputs_embeds"
        return self.model(**{key: x}, use_cache=False, **kwargs).logits
