"""Parallel plans as data, from what a model declares of itself (`base_model_tp_plan`, `base_model_pp_plan`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from heliostat.models.blocks import blocks
from heliostat.parallel.conv1d import Conv1DColwise, Conv1DRowwise, Divided
from heliostat.parallel.sequence import FIELD as SEQUENCE
from heliostat.parallel.sequence import POSITIONS, GatherPositions
from heliostat.planner.plans import (
    CONV1D,
    CONV1D_COLWISE,
    CONV1D_QKV,
    CONV1D_ROWWISE,
    DIVIDED,
    EXPERT_PARAMETERS,
    EXPERTS,
    GRAD_SUM,
    TENSOR_PLANS,
    local_stages,
    pattern_of,
    stage_bounds,
)
from heliostat.recipe import Parallelism, PipelineSchedule, Refused


def tensor_plan(
    model: Any, degrees: Parallelism
) -> tuple[dict[str, ParallelStyle], dict[str, dict[str, str]], set[str]]:
    """Module pattern → style; pattern of modules of experts → parameter → transformers' name of its style; and the
    names of replicated parameters whose gradients tensor peers have to sum. Refuses, by name, what the model cannot be
    split into."""
    degree, sequence = degrees.tensor, degrees.sequence_parallel
    declared = getattr(model.config, "base_model_tp_plan", None) or TENSOR_PLANS.get(model.config.model_type)
    family = type(model).__name__
    if not declared:
        raise Refused("parallelism.tensor", f"{family} declares no tensor-parallel plan", "use tensor=1")
    for field in (
        "num_key_value_heads", "num_attention_heads", "intermediate_size", "moe_intermediate_size", "n_inner"
    ):  # fmt: skip
        value = getattr(model.config, field, None)
        if value is not None and value % degree:
            raise Refused(
                "parallelism.tensor", f"tensor={degree} does not divide {field}={value}", f"use a divisor of {value}"
            )
    styles: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=POSITIONS if sequence else Replicate()),
        CONV1D_COLWISE: Conv1DColwise(),
        CONV1D_QKV: Conv1DColwise(parts=3),
        CONV1D_ROWWISE: Conv1DRowwise(),
    }
    plan: dict[str, ParallelStyle] = {}
    prefix = model.base_model_prefix
    # Module pattern → the name that peft gave its one adapter.
    adapted = {pattern_of(name): next(iter(m.lora_A)) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    summed = {f"{prefix}.{pattern}" for pattern, style in declared.items() if style == GRAD_SUM}
    experts: dict[str, dict[str, str]] = {
        f"{prefix}.{pattern}": {} for pattern, style in declared.items() if style == EXPERTS
    }
    for pattern, style in declared.items():
        if style in (GRAD_SUM, EXPERTS):
            continue
        module, _, parameter = f"{prefix}.{pattern}".rpartition(".")
        if module in experts and style in EXPERT_PARAMETERS:
            experts[module][parameter] = style
            continue
        if style == DIVIDED:
            plan[module] = Divided(parameter)
            continue
        if style not in styles:
            raise Refused(
                "parallelism.tensor", f"{family} asks for the style {style!r}, which is not supported", "use tensor=1"
            )
        name = f"{prefix}.{pattern}"
        if style in CONV1D and sequence:
            raise Refused(SEQUENCE, f"{family} does not split {name} by positions, too", "set it false")
        if style in CONV1D and name in adapted:
            raise Refused("parallelism.tensor", f"{family} does not split {name} with adapters", "use tensor=1")
        if name in adapted:  # B is split as the columns of W are, A as its rows; the other one stays whole
            factor = "lora_B" if style == "colwise" else "lora_A"
            plan |= {f"{name}.{part}": styles[style] for part in ("base_layer", f"{factor}.{adapted[name]}")}
        else:
            plan[name] = styles[style]
    holders = {name: pattern_of(name).rpartition(".")[0] for name, _ in model.named_parameters()}
    # Biases of which each peer adds its part.
    parted = {f"{prefix}.{pattern}" for pattern, style in declared.items() if style in (CONV1D_COLWISE, CONV1D_QKV)}
    partial = {
        name for name, holder in holders.items() if holder in summed or (holder in parted and name.endswith(".bias"))
    }
    block = f"{blocks(model)[0]}.*."
    parents = _parents_of_split(model, declared)
    for parent in parents:
        # What is whole in there may see this rank's heads only, and nothing says so; adapters are known to be right.
        known = plan.keys() | summed | (set() if sequence else _inside(adapted, holders))
        whole = {holder for name, holder in holders.items() if name.startswith(f"{parent}.") and holder not in known}
        if whole:
            field = SEQUENCE if sequence else "parallelism.tensor"
            raise Refused(
                field, f"{family} does not split {min(whole)}", "set it false" if sequence else "use tensor=1"
            )
        if sequence and not pattern_of(parent).startswith(block):
            raise Refused(SEQUENCE, f"{family} splits {parent}, which is no part of a block", "set it false")
    if sequence and experts:
        raise Refused(SEQUENCE, f"{family} sums what its experts give over all positions", "set it false")
    if sequence:
        plan |= dict.fromkeys(map(pattern_of, parents), GatherPositions())
        # All else in a block sees this rank's positions only.
        partial |= {name for name, holder in holders.items() if holder.startswith(block) and holder not in plan}
    head = model.get_output_embeddings()
    whole_head = _whole_head(model, head, degree)
    if degrees.loss_parallel and whole_head:
        raise Refused("parallelism.loss_parallel", f"{family} {whole_head}", "set it false")
    if not whole_head:
        name = next(name for name, module in model.named_modules() if module is head)
        plan[name] = (
            ColwiseParallel(use_local_output=False)
            if degrees.loss_parallel
            else ColwiseParallel(output_layouts=Replicate())
        )
    return plan, experts, partial


def _parents_of_split(model: Any, declared: dict[str, str]) -> list[str]:
    """The names of the modules in which a batch first meets a split matrix."""
    styles = ("colwise", CONV1D_COLWISE, CONV1D_QKV)
    colwise = {f"{model.base_model_prefix}.{pattern}" for pattern, style in declared.items() if style in styles}
    return sorted({name.rpartition(".")[0] for name, _ in model.named_modules() if pattern_of(name) in colwise})


def _inside(modules: Iterable[str], holders: dict[str, str]) -> set[str]:
    return {holder for holder in holders.values() if any(holder.startswith(f"{module}.") for module in modules)}


def _whole_head(model: Any, head: Any, degree: int) -> str:
    """Why the output embeddings are not split over the vocabulary; empty where they are."""
    if head is None:
        return "has no logits over a vocabulary"
    if getattr(model.config, "tie_word_embeddings", False):
        return "ties its embeddings, which are not split over the vocabulary"
    size = head.weight.shape[0]
    return f"has a vocabulary of {size}, which tensor={degree} does not divide" if size % degree else ""


def pipeline_modules(model: Any) -> list[str]:
    """Names of the base model's children in the order in which a batch meets them."""
    declared = getattr(model.config, "base_model_pp_plan", None)
    if not declared:
        raise Refused("parallelism.pipeline", f"{type(model).__name__} declares no pipeline plan", "use pipeline=1")
    return list(declared)


def split_stages(model: Any, schedule: PipelineSchedule, rank: int, ranks: int) -> list[Stage]:
    """The stages of pipeline rank `rank` of `ranks`, which share the model's modules. In the model itself, what none
    of them runs is replaced by pass-through modules, so that parameter names (and checkpoints) stay those of the
    whole model. Refuses what cannot be split."""
    mine = local_stages(schedule, rank, ranks)
    count = ranks * len(mine)
    first, *_, last = pipeline_modules(model)
    block_name = next(
        name for name in pipeline_modules(model) if isinstance(getattr(model.base_model, name), nn.ModuleList)
    )
    blocks = getattr(model.base_model, block_name)
    if count > len(blocks):
        raise Refused(
            "parallelism.pipeline",
            f"{count} stages ({len(mine)} a rank) for {len(blocks)} blocks",
            f"use pipeline ≤ {len(blocks) // len(mine)}",
        )
    if getattr(model.config, "tie_word_embeddings", False):
        raise Refused(
            "parallelism.pipeline",
            f"{type(model).__name__} ties its embeddings, which the first and the last stage would both hold",
            "set model.config tie_word_embeddings false, or use pipeline=1",
        )
    bounds = stage_bounds(len(blocks), count)
    if schedule == "zbv":
        _check_first_stage([getattr(model.base_model, first), *blocks[: bounds[1]]])

    def keep(part: Any, stages: list[int]) -> None:
        base = part.base_model
        part_blocks = getattr(base, block_name)
        kept = {index for stage in stages for index in range(bounds[stage], bounds[stage + 1])}
        for index in range(len(blocks)):
            if index not in kept:
                part_blocks[index] = PassThrough()
        if 0 not in stages:
            setattr(base, first, PassThrough())
        if count - 1 not in stages:
            setattr(base, last, PassThrough())
            part.set_output_embeddings(PassThrough())

    parts = []
    for stage in mine:
        part = _view(model)
        setattr(part, model.base_model_prefix, _view(model.base_model))
        setattr(part.base_model, block_name, _view(blocks))
        keep(part, [stage])
        parts.append(Stage(part, stage, count))
    keep(model, mine)
    return parts


def _check_first_stage(modules: list[nn.Module]) -> None:
    """Where the first stage trains nothing, the second one's inputs need no gradient; a backward pass that starts
    from the inputs' side then finds none of the second's weights, and leaves them untrained without a word."""
    if not any(p.requires_grad for module in modules for p in module.parameters()):
        raise Refused(
            "parallelism.schedule",
            "zbv needs a parameter to train in the pipeline's first stage, and all of them are frozen",
            "use interleaved, or a smaller model.freeze_layers",
        )


def _view(module: Any) -> Any:
    """A second container of the same children: what is replaced in one stays in the other."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


class PassThrough(nn.Module):
    """A module of another stage."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden


class Stage(nn.Module):
    """One pipeline stage: token ids or hidden states (B, T, D) in, hidden states or logits (B, T, V) out."""

    def __init__(self, model: nn.Module, index: int, count: int) -> None:
        super().__init__()
        self.model, self.index, self.count = model, index, count

    def forward(self, x: Any, **kwargs: Any) -> Any:
        inputs = {"input_ids" if self.index == 0 else "inputs_embeds": x, "use_cache": False, **kwargs}
        if self.index == self.count - 1:
            return self.model(**inputs).logits
        # Without the head, which would return a view of the hidden states: a split backward pass detaches them.
        base: Any = self.model.base_model
        return base(**inputs).last_hidden_state
