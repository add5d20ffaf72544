"""Every built-in recipe but `sentiment` (the lifecycle's) on its real data, for a few steps in one process."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import prepare
from heliostat.data.sources import open_source
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, override
from heliostat.train.loop import train
from pipelines.job import parse
from pipelines.recipes import find_recipe
from tests import needs

STEPS = 3


def few_steps(recipe: str | Recipe, folder: Path, **overrides: Any) -> Recipe:
    return override(
        find_recipe(recipe) if isinstance(recipe, str) else recipe,
        {
            "storage": str(folder / "storage"),
            "parallelism.workers": 1,
            "data.limit": 64,
            "schedule.max_steps": STEPS,
            "training.global_batch_size": 8,
            "training.micro_batch_size": 8,  # batch normalisation and accumulation exclude each other
        }
        | overrides,
    )


def train_and_ask(recipe: Recipe, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """The losses of a short training, and what its bundle answers to the task's example."""
    prepared, _ = prepare(recipe)
    (folder / "run").mkdir()
    outcome = train(recipe, prepared.folder, folder / "run")
    assert outcome["status"] == "done"
    records = read_metrics(folder / "run" / METRICS_FILE)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses)), losses
    predictor = Predictor(bundles.read(Path(outcome["bundle"])))
    return losses, predictor.predict([predictor.task.example()])[0]


def few_rows(name: str, rows: int, folder: Path) -> dict[str, str]:
    """Rows from all over the recipe's sources, as sources of their own: validation and test take all that there are."""
    data, found = find_recipe(name).data, {}
    for split in ("train", "test"):
        if source := getattr(data, split):
            whole = pa.concat_tables([part.read() for part in open_source(source)])
            file = folder / f"{split}.parquet"
            pq.write_table(whole.take(np.linspace(0, whole.num_rows - 1, rows, dtype=np.int64)), file)
            found[f"data.{split}"] = str(file)
    return found


def check_classes(losses: list[float], answer: dict[str, Any], classes: int) -> None:
    assert len(answer["scores"]) == classes
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-4)
    assert losses[0] == pytest.approx(math.log(classes), rel=0.5), "an untrained head knows nothing"


def colour_images(file: Path, rows: int) -> str:
    """Noise on ten colours, 32×32 PNG files as the hub stores them: a struct of bytes and path."""
    from PIL import Image

    random = np.random.default_rng(rows)
    images = []
    for row in range(rows):
        pixels = random.integers(0, 64, (32, 32, 3)) + np.array([19 * (row % 10), 96, 0])
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": f"{row}.png"})
    pq.write_table(pa.table({"img": images, "label": [row % 10 for row in range(rows)]}), file)
    return str(file)


def test_topics(tmp_path: Path) -> None:
    losses, answer = train_and_ask(few_steps("topics", tmp_path, **few_rows("topics", 300, tmp_path)), tmp_path)
    check_classes(losses, answer, 20)


def test_digits(tmp_path: Path) -> None:
    losses, answer = train_and_ask(few_steps("digits", tmp_path), tmp_path)
    check_classes(losses, answer, 10)


@needs.fashion
def test_fashion(tmp_path: Path) -> None:
    losses, answer = train_and_ask(few_steps("fashion", tmp_path, **few_rows("fashion", 300, tmp_path)), tmp_path)
    check_classes(losses, answer, 10)


def test_cifar10(tmp_path: Path) -> None:
    """On images made here, given as a person gives their own."""
    train, test = colour_images(tmp_path / "train.parquet", 120), colour_images(tmp_path / "test.parquet", 20)
    recipe, _ = parse(["cifar10", "--data.train", train, "--data.test", test])
    losses, answer = train_and_ask(few_steps(recipe, tmp_path), tmp_path)
    check_classes(losses, answer, 10)


@pytest.mark.parametrize("name", ["breast_cancer", "credit"])
def test_tables(name: str, tmp_path: Path) -> None:
    first, answer = [], {}
    for seed in range(3):  # some draws prefer a class: it is on average that a head knows nothing
        folder = tmp_path / str(seed)
        folder.mkdir()
        losses, answer = train_and_ask(few_steps(name, folder, seed=seed), folder)
        first.append(losses[0])
    check_classes([sum(first) / len(first)], answer, 2)


def test_tiny_lm(tmp_path: Path) -> None:
    losses, answer = train_and_ask(few_steps("tiny_lm", tmp_path, **few_rows("tiny_lm", 300, tmp_path)), tmp_path)
    assert losses[0] == pytest.approx(math.log(4096), rel=0.05), "an untrained model knows nothing"
    assert losses[-1] < losses[0]
    assert answer["tokens"] > 0
    assert math.isfinite(answer["perplexity"])


@pytest.mark.slow
def test_smollm(tmp_path: Path) -> None:
    losses, answer = train_and_ask(few_steps("smollm", tmp_path, **few_rows("smollm", 80, tmp_path)), tmp_path)
    assert max(losses) < 0.5 * math.log(49152), "a pre-trained model knows Python"
    assert answer["tokens"] > 0
    assert math.isfinite(answer["perplexity"])
