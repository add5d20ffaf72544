"""Batch normalisation over the global batch: statistics combined by our own collective, since PyTorch's
SyncBatchNorm refuses CPU tensors. Shapes: N rows, C channels, * positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the same parameters and buffers (so the same bundle), over all ranks of `group`."""

    group: dist.ProcessGroup | None = None
    contributes: bool = True
    """False while this rank runs a micro-batch of weight zero: its rows stay out of the statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.group is None:
            return super().forward(x)
        y, mean_C, var_C, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group, self.contributes)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean_C, momentum)
            self.running_var.lerp_(var_C * (count / (count - 1).clamp(min=1)), momentum)
        return y


class _Normalise(torch.autograd.Function):
    """Means and squared deviations of the ranks are combined pairwise-exactly (Chan et al. 1979), not as
    E[x²] − E[x]², which cancels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, group: Any, contributes: bool
    ) -> Any:
        dims = [0, *range(2, x.dim())]
        var_C, mean_C = torch.var_mean(x, dims, correction=0)
        count = float(x.numel() // x.shape[1]) if contributes else 0.0
        local = torch.cat([mean_C, var_C, mean_C.new_full((1,), count)])
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, local, group=group)
        stats = torch.stack(ranks)
        means_RC, vars_RC, counts_R1 = stats[:, : len(mean_C)], stats[:, len(mean_C) : -1], stats[:, -1:]
        total = counts_R1.sum()
        mean_C = (means_RC * counts_R1).sum(0) / total
        var_C = ((vars_RC + (means_RC - mean_C) ** 2) * counts_R1).sum(0) / total
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse_C = torch.rsqrt(var_C + eps)
        normal = (x - mean_C.view(shape)) * inverse_C.view(shape)
        ctx.save_for_backward(normal, weight_C, inverse_C, total)
        ctx.group, ctx.dims, ctx.shape, ctx.contributes = group, dims, shape, contributes
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return normal * weight_C.view(shape) + bias_C.view(shape), mean_C, var_C, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        normal, weight_C, inverse_C, total = ctx.saved_tensors
        grad_bias_C = grad.sum(ctx.dims)
        grad_weight_C = (grad * normal).sum(ctx.dims)
        both = torch.cat([grad_bias_C, grad_weight_C])
        dist.all_reduce(both, group=ctx.group)
        if ctx.contributes:  # otherwise the statistics do not depend on these rows
            mean_grad_C, mean_slope_C = (both / total).chunk(2)
            grad = grad - mean_grad_C.view(ctx.shape) - normal * mean_slope_C.view(ctx.shape)
        grad_x = grad * (weight_C * inverse_C).view(ctx.shape)
        return grad_x, grad_weight_C, grad_bias_C, None, None, None


def globalise(model: nn.Module, group: dist.ProcessGroup | None) -> list[GlobalBatchNorm2d]:
    """Give the model's BatchNorm2d modules statistics over `group`; returns them."""
    changed = []
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and group is not None and dist.get_world_size(group) > 1:
            module.__class__ = GlobalBatchNorm2d
            module.group = group  # type: ignore[assignment]
            changed.append(module)
    return changed  # type: ignore[return-value]
