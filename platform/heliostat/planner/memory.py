"""What training holds on each rank, in bytes, by the shapes of a model's parameters and a layout.

Everything is float32, whatever the precision of products: bfloat16 is autocast. AdamW keeps two moments a parameter
(Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101), so that a trained one takes 16 bytes in
all (as Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1, count it, less their second copy of the weights),
and a frozen one 4. Layouts split them as `parallel/` does: tensor and expert axes by the plans that a family declares,
pipeline stages by blocks, FSDP along the first dimension of what is left.

Activations are not counted, nor buffers, which are small: what is found here is the least that a run needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from heliostat.planner.plans import (
    CONV1D,
    CONV1D_ROWWISE,
    EXPERT_SHARD,
    local_stages,
    pattern_of,
    stage_bounds,
)
from heliostat.planner.shape import ModelShape, Parameter, size
from heliostat.recipe import Parallelism, Recipe

VALUE_BYTES = 4
MOMENTS = 2


@dataclass(frozen=True)
class RankMemory:
    """Of the pipeline rank, and of its rank of FSDP, that holds the most."""

    parameters_bytes: int
    gradients_bytes: int
    """While micro-batches accumulate, FSDP keeps them whole."""
    optimizer_bytes: int
    average_bytes: int
    """The moving average of the weights."""
    gathered_bytes: int
    """Parameters that FSDP gathers beside its shards: those outside of blocks and the largest block, or all."""
    staged_bytes: int
    """In the CPU's memory: the copy that a checkpoint is written from while training goes on."""
    offloaded: bool
    gradients_whole: bool

    @property
    def device_bytes(self) -> int:
        """What must fit into the memory of a GPU."""
        if self.offloaded:
            return self.gathered_bytes + (self.gradients_bytes if self.gradients_whole else 0)
        return self.held_bytes

    @property
    def held_bytes(self) -> int:
        """On device and CPU together, without the checkpoint's copy."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.average_bytes
            + self.gathered_bytes
        )


@dataclass(frozen=True)
class _Held:
    """A parameter as a rank holds it once tensor and expert axes have split it, and FSDP has not."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    shards: int
    """Ranks of FSDP that share it, along its first dimension."""

    @property
    def whole(self) -> int:
        return size(self.shape)

    @property
    def own(self) -> int:
        """Of the first rank, which has the most: FSDP cuts into pieces of ⌈rows / ranks⌉."""
        if self.shards == 1:
            return self.whole
        return -(-self.shape[0] // self.shards) * size(self.shape[1:])


def rank_memory(shape: ModelShape, recipe: Recipe) -> RankMemory:
    """Raises nothing: a layout that does not divide a model is refused elsewhere, and rounded up here."""
    parallelism = recipe.parallelism
    ranks = (_on_rank(shape, recipe, rank) for rank in range(parallelism.pipeline))
    return max(ranks, key=lambda memory: memory.device_bytes)


def with_adapters(shape: ModelShape, recipe: Recipe) -> list[tuple[Parameter, bool]]:
    """The parameters of the model that trains, adapters among them, and whether each is trained."""
    lora, frozen_blocks = recipe.model.lora, recipe.model.freeze_layers
    if not lora.rank:
        kept = {f"{shape.blocks}.{index}." for index in range(frozen_blocks)}
        kept |= {f"{name}." for name in shape.embeddings if frozen_blocks}
        return [(each, not each.name.startswith(tuple(kept))) for each in shape.parameters]
    linear = {
        each.name.removesuffix(".weight")
        for each in shape.parameters
        if each.linear and each.name.startswith(f"{shape.blocks}.")
    }
    adapted = {name for name in linear if not lora.targets or name.rpartition(".")[2] in lora.targets}
    # Of a pre-trained model, what the checkpoint has not (a head that classifies) is trained.
    new_head = "classifier" if recipe.model.name and recipe.model.pretrained else ""
    found: list[tuple[Parameter, bool]] = []
    for each in shape.parameters:
        module, _, leaf = each.name.rpartition(".")
        if module not in adapted:
            found.append((each, module == new_head))
            continue
        found.append((replace(each, name=f"{module}.base_layer.{leaf}"), False))
        if each.linear:
            inputs, outputs = each.linear
            found.append((Parameter(f"{module}.lora_A.default.weight", (lora.rank, inputs)), True))
            found.append((Parameter(f"{module}.lora_B.default.weight", (outputs, lora.rank)), True))
    return found


def _on_rank(shape: ModelShape, recipe: Recipe, rank: int) -> RankMemory:
    parallelism = recipe.parallelism
    held = list(_held(shape, recipe, rank))
    trained = [each for each in held if each.trained]
    own, own_trained = sum(each.own for each in held), sum(each.own for each in trained)
    wrapped = _wrapped_by_fsdp(parallelism)
    accumulates = wrapped and recipe.training.global_batch_size > (
        recipe.training.micro_batch_size * parallelism.data_parallel
    )
    average = own_trained if recipe.training.ema_decay else 0
    optimizer_bytes = MOMENTS * VALUE_BYTES * own_trained + VALUE_BYTES * len(trained)  # and a step's number each
    return RankMemory(
        parameters_bytes=VALUE_BYTES * own,
        gradients_bytes=VALUE_BYTES * (sum(each.whole for each in trained) if accumulates else own_trained),
        optimizer_bytes=optimizer_bytes,
        average_bytes=VALUE_BYTES * average,
        gathered_bytes=VALUE_BYTES * _gathered(shape, parallelism, held) if wrapped else 0,
        staged_bytes=VALUE_BYTES * (own + average) + optimizer_bytes if recipe.checkpoint.asynchronous else 0,
        offloaded=parallelism.cpu_offload,
        gradients_whole=accumulates,
    )


def _held(shape: ModelShape, recipe: Recipe, rank: int) -> Iterator[_Held]:
    parallelism = recipe.parallelism
    stages = local_stages(parallelism.schedule, rank, parallelism.pipeline) if parallelism.pipeline > 1 else [0]
    count = parallelism.pipeline * len(stages)
    bounds = stage_bounds(shape.num_blocks, count)
    for parameter, trained in with_adapters(shape, recipe):
        if _stage_of(shape, parameter.name, bounds) not in stages:
            continue
        local, of_experts = _split(shape, parameter, parallelism)
        shards = 1
        if _wrapped_by_fsdp(parallelism):
            shards = parallelism.fsdp if of_experts else parallelism.fsdp * parallelism.expert * parallelism.context
        yield _Held(parameter.name, local, trained, shards)


def _stage_of(shape: ModelShape, name: str, bounds: list[int]) -> int:
    if name.startswith(f"{shape.blocks}."):
        index = int(name.removeprefix(f"{shape.blocks}.").partition(".")[0])
        return next(stage for stage, upper in enumerate(bounds[1:]) if index < upper)
    return 0 if name.startswith(tuple(f"{each}." for each in shape.embeddings)) else len(bounds) - 2


def _split(shape: ModelShape, parameter: Parameter, parallelism: Parallelism) -> tuple[tuple[int, ...], bool]:
    """The shape of a rank's part, and whether it is of experts that an expert axis shares."""
    module, _, leaf = parameter.name.rpartition(".")
    lora = next((part for part in ("lora_A", "lora_B") if f".{part}." in parameter.name), "")
    module = module.partition(".lora_")[0].removesuffix(".base_layer")
    of_experts = (
        parallelism.expert > 1
        and shape.expert_plan.get(pattern_of(f"{module}.{leaf}").removeprefix(f"{shape.base}.")) == EXPERT_SHARD
    )
    if of_experts:
        return _divided(parameter.shape, 0, parallelism.expert), True
    if parallelism.tensor == 1:
        return parameter.shape, False
    if module == shape.head:
        whole = parameter.shape[0] % parallelism.tensor
        return parameter.shape if whole else _divided(parameter.shape, 0, parallelism.tensor), False
    pattern = pattern_of(module).removeprefix(f"{shape.base}.")
    style = shape.tensor_plan.get(pattern)
    if len(parameter.shape) == 3:  # stacked experts, each sliced
        style = shape.tensor_plan.get(f"{pattern}.{leaf}")
        axis = {"colwise": 1, "packed_colwise": 1, "rowwise": 2}.get(style or "")
    elif style == "colwise":
        axis = None if lora == "lora_A" else 0
    elif style == "rowwise":
        axis = None if lora == "lora_B" or len(parameter.shape) == 1 else 1
    elif style in CONV1D and len(parameter.shape) == 2:
        axis = 0 if style == CONV1D_ROWWISE else 1
    else:
        axis = None
    return (parameter.shape if axis is None else _divided(parameter.shape, axis, parallelism.tensor)), False


def _divided(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], -(-shape[axis] // count), *shape[axis + 1 :])


def _wrapped_by_fsdp(parallelism: Parallelism) -> bool:
    """Peers with whole models and nothing else to share are DDP's; a rank without any needs neither."""
    peers = parallelism.data_parallel * parallelism.context
    return peers > 1 and parallelism.shards != parallelism.context


def _gathered(shape: ModelShape, parallelism: Parallelism, held: list[_Held]) -> int:
    """Values that FSDP holds whole at once, at least: what belongs to no block, for the whole of a step, and the block
    that runs; all where they are kept after the forward pass. Nothing where nobody shares."""
    shared = [each for each in held if each.shards > 1]
    two_stages = parallelism.pipeline > 1 and len(local_stages(parallelism.schedule, 0, parallelism.pipeline)) > 1
    if not parallelism.reshard_after_forward or two_stages:
        return sum(each.whole for each in shared)
    by_block: dict[str, int] = {}
    outside = 0
    for each in shared:
        if each.name.startswith(f"{shape.blocks}."):
            index = each.name.removeprefix(f"{shape.blocks}.").partition(".")[0]
            by_block[index] = by_block.get(index, 0) + each.whole
        else:
            outside += each.whole
    return outside + max(by_block.values(), default=0)
