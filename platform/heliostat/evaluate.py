"""How good a model is: sums over a split, confidence intervals, and whether one beats another by more than noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from heliostat.data.loader import Coordinate, Cursor, Loader, open_split
from heliostat.data.prepare import prepare, read_prepared
from heliostat.models.bundle import Bundle
from heliostat.recipe import Refused
from heliostat.tasks import Batch, Task

ROWS_PER_BATCH = 64


def batches(
    task: Task, table: pa.Table, size: int = ROWS_PER_BATCH, tokens: int | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The table's rows once, in batches of like length, with their row numbers. `size`: rows of a batch, at most;
    `tokens`: padding among them, if it is not one row."""
    lengths = table.column("length").to_numpy()
    order, begins = np.argsort(lengths, kind="stable"), [0]
    for place, length in enumerate(lengths[order].tolist()):
        count = place - begins[-1]
        if count == size or (tokens is not None and count and (count + 1) * length > tokens):
            begins.append(place)
    for numbers in np.split(order, begins[1:]) if len(order) else []:
        loader = Loader(table.take(pa.array(numbers)), seed=0, global_batch_size=len(numbers), shuffle=False)
        yield numbers, task.collate(loader.read(Cursor(), Coordinate(), len(numbers))[0], train=False)


def prepared_rows(bundle: Bundle, storage: str, split: str = "validation") -> pa.Table:
    """A split of what the bundle was made of: by its validation rows it was chosen, it was not trained on them, and
    expects such as they are. They stay where they were prepared, so that no bundle carries rows of its data; where they
    are gone, they are prepared again, in `storage`. Raises Refused where they cannot be had."""
    data = bundle.card["data"]
    if "fingerprint" not in data:
        raise Refused("bundle", f"{bundle.path} does not say on what it was validated", "name one that was trained")
    if (folder := Path(data.get("folder", ""))).name and (folder / "meta.json").is_file():
        prepared = read_prepared(folder)
    else:
        prepared, _ = prepare(bundle.recipe.model_copy(update={"storage": storage}))
    if prepared.fingerprint != data["fingerprint"]:
        raise Refused("bundle", f"the rows that {bundle.path} was validated on are gone", "train again")
    return open_split(prepared.folder, split)


@torch.inference_mode()
def row_sums(
    model: torch.nn.Module, task: Task, table: pa.Table, bfloat16: bool = False, size: int = ROWS_PER_BATCH
) -> tuple[dict[str, np.ndarray], torch.Tensor | None]:
    """Per row of the table: what `task.row_sums` gives; and, for classifiers, the logits (N, C)."""
    model.eval()
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    rows: dict[str, np.ndarray] = {}
    logits: torch.Tensor | None = None
    for numbers, batch in batches(task, table, size):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs = task.outputs(model, batch.to(device))
        for name, values in task.row_sums(outputs, batch, train=False).items():
            rows.setdefault(name, np.zeros(table.num_rows))[numbers] = values.double().cpu().numpy()
        if outputs.ndim == 2:
            if logits is None:
                logits = torch.zeros(table.num_rows, outputs.shape[1])
            logits[torch.from_numpy(numbers)] = outputs.float().cpu()
    return rows, logits


def summarise(task: Task, rows: dict[str, np.ndarray]) -> dict[str, float]:
    sums = {name: float(values.sum()) for name, values in rows.items()}
    return task.metrics(sums.pop("loss"), sums.pop("weight"), sums)


def confidence_interval(
    value: np.ndarray, weight: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of `value.sum() / weight.sum()` over rows (Efron & Tibshirani 1993, chapter 13)."""
    ratios = _resampled(value, weight, resamples, seed)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def gain(
    task: Task, challenger: dict[str, np.ndarray], champion: dict[str, np.ndarray], confidence: float, resamples: int
) -> dict[str, Any]:
    """The challenger's gain in the task's metric on the same rows, and the one-sided lower bound of a paired
    bootstrap. `better` says that the bound is above zero."""
    sign = 1.0 if task.higher_is_better else -1.0
    weight = challenger["weight"]
    difference = sign * (challenger[task.metric] - champion[task.metric])
    bound = float(np.quantile(_resampled(difference, weight, resamples, 0), 1 - confidence))
    return {
        "metric": task.metric,
        "challenger": float(challenger[task.metric].sum() / weight.sum()),
        "champion": float(champion[task.metric].sum() / weight.sum()),
        "gain": float(difference.sum() / weight.sum()),
        "lower_bound": bound,
        "confidence": confidence,
        "better": bound > 0,
    }


def _resampled(value: np.ndarray, weight: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(seed))
    ratios = np.empty(resamples)
    for i in range(resamples):
        chosen = random.integers(0, len(value), len(value))
        ratios[i] = value[chosen].sum() / weight[chosen].sum()
    return ratios


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> list[list[int]]:
    """Rows: true classes; columns: predicted ones."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, -1).tolist()
