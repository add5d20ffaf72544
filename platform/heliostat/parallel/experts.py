"""Mixtures of experts over ranks, by the plans that a model declares of itself. Expert parallelism
(`base_model_ep_plan`): each rank holds some of the experts, and every token travels to the ranks of the experts it was
routed to and back (all-to-all). Tensor parallelism (`base_model_tp_plan`): each rank holds a slice of every expert."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from heliostat.planner.plans import EXPERT_MODULE, EXPERT_SHARD, pattern_of
from heliostat.recipe import Refused


def expert_modules(model: Any, degree: int) -> dict[str, nn.Module]:
    """Name → module that holds experts. Refuses, by name, what the model cannot be split into."""
    family = type(model).__name__
    declared = getattr(model.config, "base_model_ep_plan", None)
    if not declared:
        raise Refused("parallelism.expert", f"{family} declares no expert-parallel plan", "use expert=1")
    for style in declared.values():
        if style not in (EXPERT_SHARD, EXPERT_MODULE):
            raise Refused(
                "parallelism.expert", f"{family} asks for the style {style!r}, which is not supported", "use expert=1"
            )
    patterns = {f"{model.base_model_prefix}.{name}" for name, style in declared.items() if style == EXPERT_MODULE}
    found = {name: module for name, module in model.named_modules() if pattern_of(name) in patterns}
    if not found:
        raise Refused("parallelism.expert", f"this {family} has no layer of experts", "use expert=1")
    for module in found.values():
        experts: Any = module.num_experts
        if experts % degree:
            raise Refused(
                "parallelism.expert",
                f"expert={degree} does not divide {experts} experts",
                f"use a divisor of {experts}",
            )
    return found


def shard_experts(modules: list[nn.Module], expert_mesh: DeviceMesh, tensor_mesh: DeviceMesh) -> None:
    """Keep this rank's experts of each module, and let its forward pass exchange tokens over `expert_mesh`."""
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    shard, dispatch = ALL_PARALLEL_STYLES[EXPERT_SHARD], EpDispatchExpertsParallel()
    for module in modules:
        for name, _ in list(module.named_parameters(recurse=False)):
            shard.shard_param(module, name, expert_mesh)
        dispatch.install_forward(module, expert_mesh, tp_mesh=tensor_mesh, ep_implementation="all_to_all")


def slice_experts(model: nn.Module, plan: dict[str, dict[str, str]], tensor_mesh: DeviceMesh) -> None:
    """Keep this rank's slice of every expert, and sum outputs over tensor peers. `plan`: as of `tensor_plan`."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import MoeExpertsParallel

    for name, module in model.named_modules():
        if (styles := plan.get(pattern_of(name))) is not None:
            for parameter, style in styles.items():
                ALL_PARALLEL_STYLES[style].shard_param(module, parameter, tensor_mesh)
            MoeExpertsParallel().install_forward(module, tensor_mesh)
