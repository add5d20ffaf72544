"""Sequence parallelism (Korthikanti et al. 2022): between the matrices that tensor peers share, each peer holds a share
of the positions instead of a copy of all. Where a copy took an all-reduce, a share takes a reduce-scatter before and
an all-gather after.

Shapes: B rows, T positions, t = T / degree of them on this rank, D features.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from heliostat.recipe import Refused

FIELD = "parallelism.sequence_parallel"
POSITIONS = Shard(1)


class GatherPositions(ParallelStyle):
    """The first argument of a module that holds split matrices, (B, t, D), is gathered once for all of them, (B, T, D).
    They see a DTensor, so that their gradients are added up before the reduce-scatter."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = next(iter(inspect.signature(module.forward).parameters))

        def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            whole = move(args[0] if args else kwargs[name], device_mesh, POSITIONS, Replicate())
            return ((whole, *args[1:]), kwargs) if args else (args, kwargs | {name: whole})

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


def split_positions(first: nn.Module, last: nn.Module, mesh: DeviceMesh) -> None:
    """Split the hidden states (B, T, D) along T where they enter a chain of blocks, and gather them where they leave
    it. All around the blocks (embeddings, masks, final norm, head, pipeline stages) sees the whole sequence."""

    def split(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        length = args[0].shape[1]
        if length % mesh.size():
            raise Refused(FIELD, f"{length} positions are not shared evenly by tensor={mesh.size()}", "set it false")
        return (move(args[0], mesh, Replicate(), POSITIONS).to_local(), *args[1:])

    def gather(block: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        # A view would not do: pipelines detach what a stage gives in place, and FSDP warns of it.
        return move(hidden, mesh, POSITIONS, Replicate()).to_local().clone()

    first.register_forward_pre_hook(split)
    last.register_forward_hook(gather)


def move(tensor: Tensor, mesh: DeviceMesh, held: Placement, wanted: Placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [held]).redistribute(placements=[wanted])
