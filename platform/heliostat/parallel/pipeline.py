"""Running micro-batches through a pipeline schedule with the task's own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heliostat.parallel.loss import loss_sums
from heliostat.parallel.parallelize import Parallel
from heliostat.recipe import PipelineSchedule
from heliostat.tasks import Batch, LossSums, Task


class PipelineRunner:
    """PyTorch's schedules chunk one tensor; ours gives them lists of micro-batches, since targets are dictionaries
    and a weight belongs to each. Every micro-batch has the same shape."""

    def __init__(self, parallel: Parallel, task: Task, schedule: PipelineSchedule) -> None:
        self.parallel, self.task, self.name = parallel, task, schedule
        self._schedules: dict[tuple[int, bool], Any] = {}
        self._sums: list[LossSums] = []
        self._batches: list[Batch] = []

    def run(self, batches: list[Batch], train: bool) -> list[LossSums]:
        """Forward (and, training, backward) over all micro-batches; sums on the ranks that hold the last stage
        (the first ones, under zbv), nothing elsewhere.

        Collective: every rank must call it, in the same order."""
        stages = self.parallel.stages[train]
        self._sums, self._batches = [], batches
        schedule = self._schedule(len(batches), train)
        for stage in stages:
            stage.has_backward = train
            stage.on_forward = self._on_forward
            stage.clear_runtime_states()
        holds_first = any(stage.is_first for stage in stages)
        last = next((stage for stage in stages if stage.is_last), None)
        extra = [{k: v for k, v in batch.inputs.items() if k != "input_ids"} for batch in batches]
        ids = [(batch.inputs["input_ids"],) for batch in batches] if holds_first else [()] * len(batches)
        # A target must be a tensor: it is the micro-batch's number.
        numbers = [torch.tensor(number) for number in range(len(batches))] if last else None
        schedule._step_microbatches(ids, extra, numbers, [] if train else None)
        if last is None:
            return []
        if not train:
            self._sums = [
                loss_sums(self.task, out, batch, train=False)
                for out, batch in zip(last.output_chunks, batches, strict=True)
            ]
        return self._sums[-len(batches) :]  # the first run infers the shapes of gradients with a loss of its own

    def _schedule(self, count: int, train: bool) -> Any:
        if (count, train) not in self._schedules:
            loss_fn = self._loss if train else None
            self._schedules[count, train] = self.parallel.schedule(self.name, count, loss_fn)
        return self._schedules[count, train]

    def _on_forward(self, number: int | None) -> None:
        self.parallel.batch = None if number is None else self._batches[number]

    def _loss(self, outputs: Tensor, number: Tensor) -> Tensor:
        sums = loss_sums(self.task, outputs, self._batches[int(number)], train=True)
        self._sums.append(LossSums(sums.loss_sum.detach(), sums.weight, sums.metric_sums))
        return sums.loss_sum
