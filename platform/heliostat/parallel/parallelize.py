"""From a model and a layout to what the training step runs, in a fixed order: context, pipeline split, tensor,
FSDP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import FORWARD, RECV_F, RESHARD, SEND_F, UNSHARD, PipelineScheduleMulti
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from heliostat.models.blocks import blocks
from heliostat.models.load import load_weights
from heliostat.parallel.batch_norm import GlobalBatchNorm2d, globalise
from heliostat.parallel.context import split_context
from heliostat.parallel.experts import expert_modules, shard_experts, slice_experts
from heliostat.parallel.loss import split_vocabulary
from heliostat.parallel.mesh import Layout
from heliostat.parallel.plans import PassThrough, Stage, split_stages, tensor_plan
from heliostat.parallel.recompute import set_recompute
from heliostat.parallel.sequence import split_positions
from heliostat.planner.plans import pattern_of
from heliostat.recipe import PipelineSchedule, Recipe, Refused
from heliostat.tasks import Batch

SCHEDULES: dict[PipelineSchedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}
FORWARD_ACTIONS = (UNSHARD, RECV_F, FORWARD, SEND_F, RESHARD)


class NumberedStage(PipelineStage):
    """Tells `on_forward` which micro-batch it begins to run, and None when it has. The pass that infers shapes is no
    micro-batch."""

    on_forward: Callable[[int | None], None]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.on_forward(fwd_chunk_id)
        try:
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        finally:
            self.on_forward(None)


@dataclass
class Parallel:
    """A model laid out over the mesh."""

    model: nn.Module
    """The transformers model (this rank's part of it): its parameters carry the whole model's names."""
    runs: nn.Module
    """What a forward pass calls: the model or its DDP wrapper. Pipelines: the list of this rank's stages."""
    layout: Layout
    batch_norms: list[GlobalBatchNorm2d] = field(default_factory=list)
    stages: dict[bool, list[NumberedStage]] = field(default_factory=dict)
    """Pipelines only: this rank's stages, by whether they train. A schedule sets up its stages' buffers for backward
    passes or for none, so evaluation has stages of its own around the same modules."""

    expert_parameters: set[str] = field(default_factory=set)
    """Their gradients come from the tokens of all ranks that share the experts, so are averaged over fewer ranks."""
    tensor_grad_sums: set[str] = field(default_factory=set)
    """Replicated parameters that saw this tensor rank's heads or positions only: the step sums their gradients over
    its peers."""
    batch: Batch | None = None
    """The micro-batch whose forward pass runs, for hooks in the model. None in a backward pass, recompute included."""

    def loss_context(self) -> AbstractContextManager[None]:
        """Where losses and their gradients are computed."""
        return split_vocabulary() if self.layout.parallelism.loss_parallel else nullcontext()

    def set_sync(self, sync: bool) -> None:
        """Whether the next backward pass reduces gradients over the data axes."""
        if isinstance(self.runs, DistributedDataParallel):
            self.runs.require_backward_grad_sync = sync
        elif isinstance(self.runs, FSDPModule):
            self.runs.set_requires_gradient_sync(sync)

    def reshard(self) -> None:
        """Free what FSDP gathered. A forward pass without a backward pass leaves some of it gathered, and the next one
        would take it for the parameters, whatever they have become since."""
        for module in self.runs.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def gradient_divisor(self) -> int:
        """DDP and FSDP average over the data axes, context among them; the step wants sums."""
        return self.layout.replicas * self.layout.parallelism.context

    def schedule(self, name: PipelineSchedule, num_micro_batches: int, loss_fn: Any) -> Any:
        """Without a loss: forward passes only."""
        stages, kind = self.stages[loss_fn is not None], SCHEDULES[name]
        if not issubclass(kind, PipelineScheduleMulti):
            return kind(stages[0], num_micro_batches, loss_fn=loss_fn, scale_grads=False)
        schedule = kind(stages, num_micro_batches, loss_fn=loss_fn, scale_grads=False)
        if loss_fn is None:  # its backward actions would run, and fail where two neighbours share a rank
            schedule.pipeline_order_with_comms = {
                rank: [action for action in actions if action.computation_type in FORWARD_ACTIONS]
                for rank, actions in schedule.pipeline_order_with_comms.items()
            }
        return schedule


def parallelize(model: Any, layout: Layout, recipe: Recipe) -> Parallel:
    """A deferred model is loaded as soon as it is laid out: each rank reads its share.

    Collective: every rank must call it, in the same order."""
    mesh, degrees = layout.mesh, layout.parallelism
    set_recompute(model, recipe)
    block_list = list(blocks(model)[1]) if recipe.training.compile or mesh is not None else []
    deferred = getattr(model, "weights", None) is not None
    if mesh is None:
        if deferred:
            load_weights(model, layout.device)
        model.to(layout.device)
        compile_blocks(block_list, recipe)
        return Parallel(model, model, layout)
    grad_sums: set[str] = set()
    if degrees.tensor > 1:  # the plan's refusals come before anything is changed
        plan, expert_plan, grad_sums = tensor_plan(model, degrees)
    experts = expert_modules(model, degrees.expert) if degrees.expert > 1 else {}
    if experts and degrees.tensor * degrees.context > 1:
        raise Refused(
            "parallelism.expert",
            "experts are not split by tensor or context, too",
            "use tensor=1 and context=1, or expert=1",
        )
    if degrees.context > 1:
        split_context(model, layout, recipe.data.isolate_documents)
    runs: nn.Module = model
    parts: list[Stage] = []
    if degrees.pipeline > 1:
        parts = split_stages(model, degrees.schedule, mesh["pipeline"].get_local_rank(), degrees.pipeline)
        runs = nn.ModuleList(parts)
        kept = set(model.modules())
        block_list = [block for block in block_list if block in kept]
        experts = {name: module for name, module in experts.items() if module in kept}
    roots: list[nn.Module] = [*parts] or [model]
    if not deferred:
        model.to(layout.device)
    if degrees.tensor > 1:
        present = {name for name, module in model.named_modules() if not isinstance(module, PassThrough)}
        present |= {pattern_of(name) for name in present}  # a plan may name kinds of layers it lacks
        parallelize_module(model, mesh["tensor"], {k: v for k, v in plan.items() if k in present})
        slice_experts(model, expert_plan, mesh["tensor"])
        if degrees.sequence_parallel:
            for root in roots:
                chain = [module for module in root.modules() if module in block_list]
                split_positions(chain[0], chain[-1], mesh["tensor"])
    if experts:
        shard_experts(list(experts.values()), mesh["expert"], mesh["tensor"])
    batch_norms = globalise(model, layout.batch_group) if recipe.model.sync_batch_norm else []
    compile_blocks(block_list, recipe)
    # Ranks over which gradients add up. One alone needs no wrapper, which would copy for nothing.
    peers = degrees.data_parallel * degrees.context
    ddp = degrees.shards == degrees.context
    if peers > 1 and not ddp:
        shard(list(experts.values()), block_list, roots, layout)
    if deferred:
        load_weights(model, torch.device("cpu") if degrees.cpu_offload else layout.device)
        for module in model.modules() if degrees.cpu_offload else ():
            module._buffers |= {
                name: each.to(layout.device) for name, each in module._buffers.items() if each is not None
            }
    if peers > 1 and ddp:
        ids = [layout.device.index] if layout.device.type == "cuda" else None
        runs = DistributedDataParallel(
            model,
            device_ids=ids,
            process_group=layout.data_group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # its successor would still send them at the start; ranks build them alike
        )
    stages = {}
    if parts:
        group = mesh["pipeline"].get_group()
        stages = {
            train: [NumberedStage(part, part.index, part.count, layout.device, group=group) for part in parts]
            for train in (True, False)
        }
    of_experts = {f"{name}.{each}" for name, module in experts.items() for each, _ in module.named_parameters()}
    return Parallel(model, runs, layout, batch_norms, stages, of_experts, grad_sums)


def shard(experts: list[nn.Module], block_list: list[nn.Module], roots: list[nn.Module], layout: Layout) -> None:
    """FSDP of each module of experts, each block and each root, from the inside outwards."""
    degrees = layout.parallelism
    options: dict[str, Any] = {
        # Schedules of several stages gather and free whole stages, and a split backward pass looks for its weights
        # before any hook of FSDP could gather them.
        "reshard_after_forward": degrees.reshard_after_forward and len(roots) < 2,
        "offload_policy": CPUOffloadPolicy(layout.device.type == "cuda") if degrees.cpu_offload else OffloadPolicy(),
    }
    for module in experts:
        fully_shard(module, mesh=layout.expert_shard_mesh, **options)
    for block in block_list:
        fully_shard(block, mesh=layout.shard_mesh, **options)
    for root in roots:
        fully_shard(root, mesh=layout.shard_mesh, **options | {"reshard_after_forward": False})


def compile_blocks(block_list: list[nn.Module], recipe: Recipe) -> None:
    """Compile each block in place: one graph serves all of a kind."""
    # With split matrices and a length that varies, PyTorch 2.13's compiler recurses without end; a length apart works.
    dynamic = False if recipe.parallelism.tensor > 1 else None
    if recipe.training.compile:
        for block in block_list:
            block.compile(dynamic=dynamic)


def full_state(parallel: Parallel) -> dict[str, torch.Tensor]:
    """The whole model's parameters and buffers on CPU, on rank 0 (elsewhere empty).

    Collective: every rank must call it, in the same order."""
    layout, state = parallel.layout, {}
    for name, tensor in parallel.model.state_dict().items():
        whole: Any = tensor
        if isinstance(tensor, DTensor):
            whole = whole.to(layout.device).full_tensor()  # an offloaded shard is where its group does not talk
        state[name] = whole.detach().to("cpu", copy=True)
    if parallel.stages:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, state)
        state = {name: tensor for part in parts for name, tensor in part.items()}
    return state if layout.is_first else {}
