"""What Ray exports to Prometheus of a run, each name with `ray_` before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from heliostat.energy import joules
from heliostat.recipe import Recipe
from heliostat.train.pulse import Pulse

AGAIN_S = 5.0
"""After so long without a pulse the last one is told again."""


@contextmanager
def exported(run: str, recipe: Recipe, on_gpus: bool, peak_flops: float | None) -> Iterator[Callable[[Pulse], None]]:
    """What the loop calls with each pulse, for the time of the block. `recipe`: with the workers there are;
    `peak_flops`: a second, of all of them; None where it is not published.

    Ray forgets what was not set for 20 s. In a step, an evaluation or a hang that takes longer the last pulse is told
    again: an alert on a run that makes no steps needs to see that it makes none.
    """
    tell = _gauges(run, recipe, on_gpus, peak_flops)
    last: list[Pulse] = []
    told, ended = threading.Event(), threading.Event()

    def observe(pulse: Pulse) -> None:
        last[:] = [pulse]
        told.set()
        tell(pulse)

    def repeat() -> None:
        while not ended.wait(AGAIN_S):
            if last and not told.is_set():
                tell(last[0])
            told.clear()

    thread = threading.Thread(target=repeat, daemon=True, name="gauges")
    thread.start()
    try:
        yield observe
    finally:
        ended.set()
        thread.join()


def _gauges(run: str, recipe: Recipe, on_gpus: bool, peak_flops: float | None) -> Callable[[Pulse], None]:
    from ray.util.metrics import Gauge

    labels, workers = ("run", "attempt"), recipe.parallelism.workers

    def gauge(name: str, of: str, *more: str) -> Gauge:
        return Gauge(f"heliostat_train_{name}", of, (*labels, *more))

    seconds_by_class = gauge("seconds", "Of an attempt, by the ledger's class", "class")
    reached = gauge("step", "The optimizer step an attempt has reached")
    tokens = gauge("tokens", "Of an attempt's steps so far")
    loss = gauge("loss", "Mean over the last global batch; not a number where the step was bad")
    grad_norm = gauge("grad_norm", "Of the last step, before clipping")
    checkpoint = gauge("last_checkpoint_time_s", "When the last checkpoint was complete, else the attempt's beginning")
    bad_steps = gauge("bad_steps", "Steps of the run whose loss or gradient was not finite, or whose loss spiked")
    energy = gauge("joules", "Estimated, of all workers in the loop, from what the first one has taken")
    flops_per_token = gauge("flops_per_token", "Of the forward and the backward pass")
    peak = gauge("peak_flops_per_s", "Of all workers, as published")

    def observe(pulse: Pulse) -> None:
        tags = {"run": run, "attempt": str(pulse.attempt)}
        reached.set(pulse.step, tags)
        for name, value in pulse.seconds.items():
            seconds_by_class.set(value, tags | {"class": name})
        checkpoint.set(pulse.checkpoint, tags)
        bad_steps.set(pulse.bad_steps, tags)
        energy.set(workers * joules(recipe.energy, pulse.loop_cpu_s, pulse.loop_s * on_gpus), tags)
        if pulse.figures:
            loss.set(pulse.figures["loss"], tags)
            grad_norm.set(pulse.figures["grad_norm"], tags)
            tokens.set(pulse.tokens, tags)
        if pulse.flops_per_token and peak_flops:
            flops_per_token.set(pulse.flops_per_token, tags)
            peak.set(peak_flops, tags)

    return observe
