"""The device mesh of a run, and which ranks share what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from heliostat.data.loader import Coordinate
from heliostat.recipe import Parallelism, Refused


@dataclass(frozen=True)
class Layout:
    """Axes, outermost first: pipeline, replicate, fsdp, expert, context, tensor. Tensor peers are neighbours, since
    they talk most."""

    device: torch.device
    mesh: DeviceMesh | None
    parallelism: Parallelism
    coordinate: Coordinate
    """This rank's share of every global batch."""
    batch_group: dist.ProcessGroup | None
    """Ranks with different rows (and equal parameters or shards of them)."""
    shard_mesh: DeviceMesh | None = None
    """What FSDP shards over, (shards) or (replicate, shards). To the parameters that all share, expert and context are
    more axes of fsdp."""
    expert_shard_mesh: DeviceMesh | None = None
    """The same for the experts that this rank holds."""
    is_first: bool = True
    """Rank 0: the one that writes."""
    context_group: dist.ProcessGroup | None = None
    """Ranks with the same rows and other positions of them."""
    context_rank: int = 0
    data_group: dist.ProcessGroup | None = None
    """Ranks over which gradients add up: batch × context."""
    tensor_rank: int = 0
    """Ranks with the same rows and positions: what is counted of them is counted on the first."""

    @property
    def replicas(self) -> int:
        return self.coordinate.count

    def counted_once(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over this rank's tokens, ready to be added up over all ranks: zeros where a tensor peer counts them."""
        return torch.zeros_like(sums) if self.tensor_rank else sums

    def add_up(self, sums: torch.Tensor) -> None:
        """In place, over all ranks; over batch × context × pipeline axes for what is `counted_once`.

        Collective: every rank must call it, in the same order."""
        if self.mesh is not None:
            dist.all_reduce(sums)


def this_device() -> torch.device:
    """What this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_layout(parallelism: Parallelism) -> Layout:
    """Collective: every rank must call it, in the same order. Without a process group: a single process."""
    device = this_device()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if parallelism.workers > 1:
            raise Refused("parallelism.workers", f"{parallelism.workers} workers, but one process runs")
        return Layout(device, None, parallelism, Coordinate(), None)
    world = dist.get_world_size()
    if world != parallelism.workers:
        raise Refused("parallelism.workers", f"{parallelism.workers} workers, but {world} processes run")
    mesh = init_device_mesh(
        device.type,
        (
            parallelism.pipeline,
            parallelism.replicate,
            parallelism.fsdp,
            parallelism.expert,
            parallelism.context,
            parallelism.tensor,
        ),
        mesh_dim_names=("pipeline", "replicate", "fsdp", "expert", "context", "tensor"),
    )
    batch = mesh["replicate", "fsdp", "expert"]._flatten("batch")
    data = mesh["replicate", "fsdp", "expert", "context"]._flatten("data")
    shards = mesh["fsdp", "expert", "context"]._flatten("shards")
    replicated = parallelism.replicate > 1
    return Layout(
        device,
        mesh,
        parallelism,
        Coordinate(batch.get_local_rank(), batch.size()),
        batch.get_group(),
        shard_mesh=DeviceMesh._concatenate([mesh["replicate"], shards]) if replicated else shards,
        expert_shard_mesh=mesh["replicate", "fsdp"] if replicated else mesh["fsdp"],
        is_first=dist.get_rank() == 0,
        context_group=mesh["context"].get_group(),
        context_rank=mesh["context"].get_local_rank(),
        data_group=data.get_group(),
        tensor_rank=mesh["tensor"].get_local_rank(),
    )
