"""What a run tells those who watch it."""

from __future__ import annotations

from typing import NamedTuple


class Pulse(NamedTuple):
    """Of one attempt, on its first rank, a few times a second."""

    attempt: int
    step: int
    seconds: dict[str, float]
    """By the ledger's class."""
    figures: dict[str, float]
    """Of the last step whose figures were read: loss, grad_norm and so on; empty before there was one."""
    tokens: float
    """Of all steps whose figures were read."""
    flops_per_token: float | None
    """None where rows have no tokens."""
    checkpoint: float
    """When the last checkpoint was complete (Unix time); before there was one, when the attempt began."""
    bad_steps: int
    """Of all attempts."""
    loop_s: float
    """That this process has been in the loop."""
    loop_cpu_s: float
    """And its processors' time."""
