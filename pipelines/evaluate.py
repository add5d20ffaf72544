"""`python -m pipelines.evaluate RECIPE [--bundle FOLDER]`: metrics on validation and test, with intervals."""

import sys
from typing import Any

import numpy as np
import torch

from heliostat.data.loader import open_split
from heliostat.data.prepare import prepare
from heliostat.evaluate import confidence_interval, confusion, row_sums, summarise
from heliostat.hardware import this_machine
from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.models.precision import computes_in_bfloat16
from heliostat.recipe import Recipe, Refused
from pipelines.job import Job, main
from pipelines.register import chosen_bundle


def evaluate_split(
    bundle: Bundle, prepared: Any, split: str, bfloat16: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of a split with a 95% bootstrap interval of the task's metric; and the sums behind them, by row."""
    torch.set_num_threads(this_machine().cpus)
    task, table = bundle.task(), open_split(prepared.folder, split)
    rows, logits = row_sums(bundle.model(), task, table, bfloat16)
    figures: dict[str, Any] = {f"{split}.{name}": value for name, value in summarise(task, rows).items()}
    low, high = confidence_interval(rows[task.metric], rows["weight"])
    figures[f"{split}.{task.metric}.ci95"] = [low, high]
    if logits is not None and "label" in table.column_names:
        figures[f"{split}.confusion"] = confusion(
            table.column("label").to_numpy(), logits.argmax(-1).numpy(), logits.shape[1]
        )
    return figures, rows


def as_trained(recipe: Recipe) -> bool:
    """Whether a bundle, which is evaluated on processors, is to compute in bfloat16."""
    return computes_in_bfloat16(recipe.training.precision, torch.device("cpu"))


def check_same_data(recipe: Recipe, bundle: Bundle, fingerprint: str) -> None:
    if bundle.card["facts"].get("labels") and bundle.card["data"]["fingerprint"] != fingerprint:
        raise Refused(
            "bundle",
            f"{bundle.path} was trained on data {bundle.card['data']['fingerprint']}, this recipe's are "
            f"{fingerprint}: their splits may overlap",
            "evaluate it with the recipe it was trained with",
        )


def run(job: Job) -> dict[str, Any]:
    bundle = bundles.read(chosen_bundle(job))
    prepared, _ = prepare(bundle.recipe.model_copy(update={"storage": job.recipe.storage}))
    check_same_data(job.recipe, bundle, prepared.fingerprint)
    metrics: dict[str, Any] = {}
    for split in ("validation", "test"):
        metrics |= evaluate_split(bundle, prepared, split, as_trained(bundle.recipe))[0]
    bundles.add_metrics(bundle, metrics)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    return {"bundle": str(bundle.path), "metrics": metrics}


if __name__ == "__main__":
    sys.exit(main("evaluate", run))
