"""One optimizer step: forward and backward over micro-batches, one division by the global weight, clip, step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from heliostat.models.precision import computes_in_bfloat16
from heliostat.parallel.loss import loss_sums
from heliostat.parallel.parallelize import Parallel
from heliostat.parallel.pipeline import PipelineRunner
from heliostat.parallel.router_balance import router_balance
from heliostat.recipe import Recipe
from heliostat.tasks import Batch, LossSums, Task


class Wishes(NamedTuple):
    """What a rank wants done after the step."""

    stop: bool = False
    checkpoint: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True)
class StepResult:
    """Global figures of one step, still on the device: reading them waits for the step."""

    sums: Tensor
    """loss_sum, weight, tokens, the task's metrics by name, then stop requests and checkpoint requests."""
    grad_norm: Tensor
    metric_names: tuple[str, ...]
    router_aux_loss: Tensor | None = None

    @cached_property
    def values(self) -> list[float]:
        """`sums`, once: each reading is a transfer of its own."""
        return self.sums.tolist()

    @property
    def loss(self) -> float:
        return self.values[0] / max(self.values[1], 1e-12)

    def figures(self) -> dict[str, float]:
        """Means over the global batch, its weight, and the gradient's norm before clipping. The router's auxiliary
        loss stands beside `loss`, which does not hold it, and without its coefficient."""
        loss_sum, weight, tokens, *metrics, _, _ = self.values
        divisor = max(weight, 1e-12)
        means = {name: value / divisor for name, value in zip(self.metric_names, metrics, strict=True)}
        own = {"loss": loss_sum / divisor, "weight": weight, "tokens": tokens, "grad_norm": float(self.grad_norm)}
        if self.router_aux_loss is not None:
            own["router_aux_loss"] = float(self.router_aux_loss)
        return own | means

    @property
    def stop_requested(self) -> bool:
        return self.values[-2] > 0

    @property
    def checkpoint_requested(self) -> bool:
        return self.values[-1] > 0


class TrainStep:
    def __init__(self, parallel: Parallel, task: Task, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        """Collective: every rank must make one."""
        self.parallel, self.task, self.optimizer = parallel, task, optimizer
        self.clip_norm = recipe.optimizer.clip_norm
        self.pipeline = PipelineRunner(parallel, task, recipe.parallelism.schedule) if parallel.stages else None
        self.balance = router_balance(parallel)
        self.router_aux_loss: Tensor | None = None
        self.bfloat16 = self._agreed(computes_in_bfloat16(recipe.training.precision, parallel.layout.device))
        self.parameters = [p for p in parallel.model.parameters() if p.requires_grad]
        named = [(name, p) for name, p in parallel.model.named_parameters() if p.requires_grad]
        self.expert_parameters = [p for name, p in named if name in parallel.expert_parameters]
        self.tensor_grad_sums = [p for name, p in named if name in parallel.tensor_grad_sums]

    def _agreed(self, able: bool) -> bool:
        """Whether every rank is."""
        cannot = torch.tensor(float(not able), device=self.parallel.layout.device)
        self.parallel.layout.add_up(cannot)
        return not cannot.item()

    def autocast(self) -> torch.autocast | nullcontext[None]:
        device = self.parallel.layout.device.type
        return torch.autocast(device, torch.bfloat16) if self.bfloat16 else nullcontext()

    def __call__(self, batches: list[Batch]) -> StepResult:
        """Collective: every rank must call it, with equally many micro-batches."""
        result = self.gradients(batches)
        self.update()
        return result

    def gradients(self, batches: list[Batch], wishes: Wishes = NO_WISHES) -> StepResult:
        """Leave the clipped gradient of the global batch's mean loss in the parameters, for `update` or `discard`.
        What any rank wishes, every rank learns.

        Collective: every rank must call it, with equally many micro-batches."""
        if self.balance is not None:
            self.balance.start()
            if len(batches) > 1:
                self._count_routing(batches)
        micro = self._pipelined(batches) if self.pipeline else self._plain(batches)
        names = self.task.train_metrics
        sums = self.global_sums(micro, names, wishes, batches)
        with torch.no_grad():
            self._average_expert_grads()
            self._sum_tensor_grads()
            grad_norm = self._scale_and_clip(sums[1])
        return StepResult(sums, grad_norm, names, self.router_aux_loss)

    def update(self) -> None:
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def _plain(self, batches: list[Batch]) -> list[LossSums]:
        micro = []
        for index, batch in enumerate(batches):
            self.parallel.set_sync(index == len(batches) - 1)
            for norm in self.parallel.batch_norms:
                norm.contributes = bool(batch.row_weight_B.any())
            with self.parallel.loss_context():
                with self.autocast():
                    sums = loss_sums(self.task, self._outputs(self.parallel.runs, batch), batch, train=True)
                if self.balance is not None and len(batches) == 1:
                    self.router_aux_loss = self.balance.finish(sums.weight)
                sums.loss_sum.backward()
            micro.append(LossSums(sums.loss_sum.detach(), sums.weight, sums.metric_sums))
        return micro

    def _pipelined(self, batches: list[Batch]) -> list[LossSums]:
        assert self.pipeline is not None
        with self.autocast(), self.parallel.loss_context():
            return self.pipeline.run(batches, train=True)

    def _outputs(self, model: Any, batch: Batch) -> Tensor:
        self.parallel.batch = batch
        outputs = self.task.outputs(model, batch)
        self.parallel.batch = None
        return outputs

    @torch.no_grad()
    def forward_only(self, batches: list[Batch]) -> list[LossSums]:
        """The sums of each micro-batch without a backward pass, as evaluation has them; on the last pipeline stage.

        Collective: every rank must call it, in the same order."""
        with self.autocast(), self.parallel.loss_context():
            if self.pipeline:
                return self.pipeline.run(batches, train=False)
            return [
                loss_sums(self.task, self._outputs(self.parallel.model, batch), batch, train=False) for batch in batches
            ]

    def metric_names(self, micro: list[LossSums]) -> tuple[str, ...]:
        """The metrics that evaluation gives. Pipeline stages without outputs learn them from the last one.

        Collective: every rank must call it, in the same order."""
        names = tuple(micro[0].metric_sums) if micro else ()
        if self.pipeline:
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, names)
            names = max(every, key=len)
        return names

    def _count_routing(self, batches: list[Batch]) -> None:
        """A forward pass of its own, with the dropout that training will see."""
        assert self.balance is not None
        device = self.parallel.layout.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            micro = self.forward_only(batches)
        self.parallel.reshard()
        weight = torch.zeros((), device=device)
        self.router_aux_loss = self.balance.finish(sum((sums.weight for sums in micro), weight))

    def global_sums(
        self,
        micro: list[LossSums],
        names: tuple[str, ...],
        wishes: Wishes = NO_WISHES,
        batches: Sequence[Batch] = (),
    ) -> Tensor:
        """One all-reduce carries loss, weight, the number of the batches' tokens, metrics and wishes. Pipeline stages
        without a loss add zeros."""
        layout = self.parallel.layout
        if micro:
            own = [[each.loss_sum, each.weight, *(each.metric_sums[name] for name in names)] for each in micro]
            loss_sum, weight, *metrics = (sum(values[1:], values[0].double()) for values in zip(*own, strict=True))
            tokens = sum((batch.tokens for batch in batches), torch.zeros_like(weight))
            sums = torch.stack([loss_sum, weight, tokens, *metrics])
        else:
            sums = torch.zeros(3 + len(names), dtype=torch.float64, device=layout.device)
        wished = torch.tensor(wishes, dtype=torch.float64).to(layout.device, non_blocking=True)
        sums = torch.cat([layout.counted_once(sums), wished])  # any rank's wishes count
        layout.add_up(sums)
        return sums

    def _average_expert_grads(self) -> None:
        """FSDP averaged them over the ranks with the same experts; all others over the batch group."""
        grads = [local(p.grad) for p in self.expert_parameters if p.grad is not None]
        if grads:
            torch._foreach_div_(grads, self.parallel.layout.parallelism.expert)

    def _sum_tensor_grads(self) -> None:
        mesh = self.parallel.layout.mesh
        for parameter in self.tensor_grad_sums:
            assert mesh is not None
            if parameter.grad is not None:
                grad = local(parameter.grad)
                summed = grad.to(self.parallel.layout.device)  # from where it was offloaded to; else itself
                dist.all_reduce(summed, group=mesh["tensor"].get_group())
                if summed is not grad:
                    grad.copy_(summed)

    def _scale_and_clip(self, weight: Tensor) -> Tensor:
        """Gradients of the loss sum, averaged over the data axes, become gradients of the global mean; the norm
        of the whole is clipped in the same pass."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = self.parallel.gradient_divisor / weight.clamp(min=1e-12)
        norm = self._total_norm(grads) * scale
        if self.clip_norm is not None:
            scale = scale * (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        # Local shards: multiplying them is elementwise, so no mesh enters.
        torch._foreach_mul_([local(grad) for grad in grads], scale.float().to(grads[0].device))
        return norm

    def _total_norm(self, grads: list[Tensor]) -> Tensor:
        """2-norm over all parameters of all ranks. Shards of one mesh are summed over that mesh; replicated ones
        count once."""
        square = torch.zeros((), dtype=torch.float64, device=self.parallel.layout.device)
        by_mesh: dict[Any, list[Tensor]] = {}
        for grad in grads:
            key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
            by_mesh.setdefault(key, []).append(grad)
        for group in by_mesh.values():
            norms = torch.stack(torch._foreach_norm([local(grad) for grad in group]))
            partial = norms.double().square().sum().to(square.device)
            one = group[0]
            if isinstance(one, DTensor):
                for axis, placement in enumerate(one.placements):
                    if not placement.is_replicate():  # strided shards are no Shard
                        dist.all_reduce(partial, group=one.device_mesh.get_group(axis))
            square += partial
        if self.pipeline:
            assert self.parallel.layout.mesh is not None
            dist.all_reduce(square, group=self.parallel.layout.mesh["pipeline"].get_group())
        return square.sqrt()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
