"""Bad steps: a loss or a gradient that is not finite, or a loss that spikes, never reaches the weights unseen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heliostat.recipe import Recovery
from heliostat.record import say
from heliostat.tasks import Batch
from heliostat.train.errors import BadStep, Unrecoverable
from heliostat.train.faults import Injector
from heliostat.train.notes import note, read_notes
from heliostat.train.step import StepResult, TrainStep, Wishes

BAD_STEPS_FILE = "bad_steps.jsonl"
WINDOW = 32
"""Steps whose median loss a spike is measured against."""
ENOUGH = 8
"""Fewer of them have no median to speak of."""


class Guard:
    """Makes steps, and looks at each before the weights take it in.

    All ranks decide alike, since they look at global figures."""

    def __init__(self, step: TrainStep, recovery: Recovery, run_dir: Path, first: bool, faults: Injector) -> None:
        """`first`: whether this rank writes the run's list of bad steps. `faults`: those made on purpose."""
        self.step, self.recovery, self.file, self.first = step, recovery, run_dir / BAD_STEPS_FILE, first
        self.faults = faults
        self.losses: list[float] = []
        """Of the last good steps; a checkpoint remembers them, so that a resumed run decides the same."""
        earlier = read_bad_steps(run_dir)
        self.left_out = {record["step"] for record in earlier if record["action"] == "restart"}
        self.count = sum(record["cause"] == "data" for record in earlier)
        self.bad_steps = len(earlier)
        # Batch normalisation takes in a batch during the forward pass.
        self.statistics = [
            buffer
            for module in step.parallel.model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]

    def __call__(self, number: int, batches: list[Batch], seed: Callable[[], None], wishes: Wishes) -> StepResult:
        """Make step `number`; `seed` makes its random numbers what they are to be. Raises BadStep or Unrecoverable.

        Collective: every rank must call it, with equally many micro-batches."""
        before = [buffer.clone() for buffer in self.statistics]
        seed()
        result = self.step.gradients(self.faults.batches(number, batches), wishes)
        reason = self.reason(result)
        if number in self.left_out:
            self._forget(before)
        elif reason:
            self._forget(before)
            seed()
            again = self.step.gradients(batches, wishes)
            if self.reason(again):
                self._forget(before)
                self._data_fault(number, reason)
            else:
                self._note(number, reason, "hardware", "made again")
                result = again
                self._take(result)
        else:
            self._take(result)
        return result

    def reason(self, result: StepResult) -> str:
        """What is wrong with a step, or an empty string."""
        loss, norm = result.loss, float(result.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.6g}, gradient norm {norm:.6g}"
        factor = self.recovery.spike_factor
        if factor is not None and len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            if loss > factor * median:
                return f"loss {loss:.6g}, {loss / median:.1f} times the median of the last {len(self.losses)}"
        return ""

    def _take(self, result: StepResult) -> None:
        self.step.update()
        self.losses = [*self.losses, result.loss][-WINDOW:]

    def _forget(self, before: list[Any]) -> None:
        self.step.discard()
        for buffer, value in zip(self.statistics, before, strict=True):
            buffer.copy_(value)

    def _data_fault(self, number: int, reason: str) -> None:
        self.count += 1
        action = self.recovery.bad_step if self.count <= self.recovery.max_bad_steps else "stop"
        self._note(number, reason, "data", action)
        if action == "restart":
            raise BadStep(f"step {number}: {reason}, twice")
        if action == "stop":
            raise Unrecoverable(
                f"step {number}: {reason}, twice: the batch's fault, or the learning rate's. "
                f"It is the run's bad step number {self.count} (recovery.bad_step={self.recovery.bad_step}, "
                f"recovery.max_bad_steps={self.recovery.max_bad_steps})"
            )

    def _note(self, number: int, reason: str, cause: str, action: str) -> None:
        self.bad_steps += 1
        if self.first:
            note(self.file, {"step": number, "reason": reason, "cause": cause, "action": action})
            say("bad_step", step=number, reason=reason, cause=cause, action=action)


def read_bad_steps(run_dir: Path) -> list[dict[str, Any]]:
    """One record a bad step: step (the first is 1), reason, cause (data or hardware), action."""
    return read_notes(run_dir / BAD_STEPS_FILE)
