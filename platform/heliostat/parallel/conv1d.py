"""Tensor parallelism of matrices that are kept as (inputs, outputs), transformers' `Conv1D`, for which PyTorch has no
styles. One matrix may hold several side by side, as GPT-2's query, key and value.

Biases stay whole: a peer of `Conv1DColwise` adds its part of them, so that their gradients have to be summed over
tensor peers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, _StridedShard


class Conv1DColwise(ParallelStyle):
    """Each peer has some of the outputs: of each of `parts` matrices side by side, the same ones."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, Shard(1) if self.parts == 1 else _StridedShard(1, split_factor=self.parts))
        module.forward = partial(self._forward, module, device_mesh)
        return module

    def _forward(self, module: Any, mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
        # Each peer's gradient of the inputs comes from its outputs alone.
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        bias = module.bias.view(self.parts, mesh.size(), -1)[:, mesh.get_local_rank()].flatten()
        out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), module.weight.to_local())
        return out.view(*x.shape[:-1], -1)


class Conv1DRowwise(ParallelStyle):
    """Each peer has some of the inputs; what they give is summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, Shard(0))
        module.forward = partial(self._forward, module, device_mesh)
        return module

    def _forward(self, module: Any, mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
        out = x.reshape(-1, x.shape[-1]) @ module.weight.to_local()
        whole = DTensor.from_local(out, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return (whole.to_local() + module.bias).view(*x.shape[:-1], -1)


class Divided(ParallelStyle):
    """An attribute that counts what each peer has a share of."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        setattr(module, self.attribute, getattr(module, self.attribute) // device_mesh.size())
        return module


def _split(module: Any, mesh: DeviceMesh, placement: Placement) -> None:
    weight = module.weight
    split = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
    module.weight = nn.Parameter(split, requires_grad=weight.requires_grad)
