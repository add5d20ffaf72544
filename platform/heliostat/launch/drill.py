"""The drill: the same short run with each fault in turn, beside one that nothing disturbs."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.launch.plain import restart_s
from heliostat.launch.train import fit
from heliostat.recipe import Recipe, Refused, nearest, override
from heliostat.train import ledger
from heliostat.train.faults import KINDS, Fault, injected_at
from heliostat.train.folder import BUNDLE, LEDGER
from heliostat.train.samples import SAMPLES_FILE

STEPS = 48
EVERY_STEPS = 8
"""Between checkpoints."""
FAULT_STEP = 29
"""Two checkpoints and a few lost steps after which there is still something to do."""
SHORTEST_HANG_S = 5.0
KILLS = ("kill", "truncate")
UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Recovered:
    """What a fault cost (seconds), and what it left of the run."""

    fault: str
    detect_s: float
    """From the fault until it was noticed; 0 where the step itself noticed."""
    reschedule_s: float
    restore_s: float
    replay_s: float
    weights_equal: bool | None
    """Bitwise those of the undisturbed run; None where the number of workers changed."""
    sample_order_equal: bool
    lost: int
    repeated: int
    max_relative_loss_difference: float
    ledger_error: float
    """How far the ledger's sum is from the wall clock, relative."""

    @property
    def replacement_s(self) -> float:
        return self.detect_s + self.reschedule_s + self.restore_s

    @property
    def recovered(self) -> bool:
        exact = self.weights_equal if self.weights_equal is not None else self.max_relative_loss_difference <= 1e-5
        return exact and self.sample_order_equal and not self.lost and not self.repeated


def worst_replacement_s(recovered: list[Recovered]) -> float | None:
    """Of the faults that kill a worker, which Ray Train itself notices."""
    return max((each.replacement_s for each in recovered if each.fault in KILLS), default=None)


def plain_restart_s(recipe: Recipe, prepared: Path, folder: Path) -> float:
    """What Ray Train takes from the same kill until training goes on, in a loop that uses nothing of ours."""
    return restart_s(recipe, prepared, folder / "plain", steps=STEPS, every_steps=EVERY_STEPS, kill_step=FAULT_STEP)


def parse_faults(text: str) -> list[str]:
    faults = [word.strip() for word in text.split(",") if word.strip()] or list(KINDS)
    for fault in faults:
        if fault not in KINDS:
            raise Refused(
                "faults", f"no fault {fault!r}", nearest(fault, list(KINDS)) or f"there are {', '.join(KINDS)}"
            )
    return faults


def recipe_of_drill(recipe: Recipe, workers: int) -> Recipe:
    """A run as short as a drill needs, with the recipe's model, data and layout."""
    if workers % recipe.parallelism.shards:
        raise Refused(
            "workers",
            f"{workers} is not a multiple of the {recipe.parallelism.shards} workers that the layout takes",
            f"use {recipe.parallelism.shards}",
        )
    return override(
        recipe,
        {
            "parallelism.workers": workers,
            "schedule.max_steps": STEPS,
            "checkpoint.every_steps": EVERY_STEPS,
            "checkpoint.keep": 3,
            "training.keep_best": False,
            "training.evaluate_every_steps": STEPS,
            "training.early_stopping_patience": 0,
            "data.log_samples": True,
        },
    )


def drill(recipe: Recipe, prepared: Path, folder: Path, faults: list[str]) -> list[Recovered]:
    """Run the drill on the connected cluster. `recipe`: one of `recipe_of_drill`; `folder`: for the runs."""
    fit(recipe, prepared, folder / UNDISTURBED)
    hang_timeout_s = max(SHORTEST_HANG_S, 20 * median_step_s(folder / UNDISTURBED))
    recipe = override(recipe, {"recovery.hang_timeout_s": hang_timeout_s})
    return [_one(recipe, prepared, folder, kind) for kind in faults]


def _one(recipe: Recipe, prepared: Path, folder: Path, kind: str) -> Recovered:
    rank = recipe.parallelism.workers - 1
    run_dir, undisturbed = folder / kind, folder / UNDISTURBED
    outcome = fit(recipe, prepared, run_dir, fault=Fault(kind, FAULT_STEP, rank))
    injected = injected_at(run_dir)
    if injected is None:
        raise RuntimeError(f"the run ended before the fault {kind!r} was injected")
    noticed = [failure["time"] for failure in ledger.failures(run_dir / LEDGER)]
    book = outcome["ledger"]
    seconds = book["seconds"]
    same_workers = {attempt["workers"] for attempt in book["by_attempt"]} == {recipe.parallelism.workers}
    expected, got = committed(undisturbed), committed(run_dir)
    return Recovered(
        fault=kind,
        detect_s=round(min(noticed) - injected, 3) if noticed else 0.0,
        reschedule_s=seconds["rescheduling"],
        restore_s=seconds["restore"],
        replay_s=seconds["replay"],
        weights_equal=digest(run_dir) == digest(undisturbed) if same_workers else None,
        sample_order_equal=got == expected,
        lost=len(set(expected) - set(got)),
        repeated=len(got) - len(set(got)),
        max_relative_loss_difference=loss_difference(undisturbed, run_dir),
        ledger_error=abs(sum(seconds.values()) / book["wall_s"] - 1),
    )


def median_step_s(run_dir: Path) -> float:
    times = [record["time"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]
    return statistics.median(b - a for a, b in pairwise(times))


def committed(run_dir: Path) -> list[tuple[int, int, str, int]]:
    """(step, position, source, id) of every sample that is in the weights, in order."""
    rows = pq.read_table(run_dir / SAMPLES_FILE, filters=[("committed", "=", True)]).to_pylist()
    return sorted((row["step"], row["position"], row["source"], row["id"]) for row in rows)


def digest(run_dir: Path) -> str:
    hashed = hashlib.sha256()
    for file in sorted((run_dir / BUNDLE).glob("*.safetensors")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def loss_difference(one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    losses = [
        [record["loss"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]
        for run_dir in (one, other)
    ]
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(*losses, strict=True))


def as_json(recovered: list[Recovered]) -> list[dict[str, Any]]:
    return [asdict(each) for each in recovered]
