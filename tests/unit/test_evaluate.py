"""Confidence intervals against closed forms, and the gate's verdict on simulated models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.data.loader import open_split
from heliostat.evaluate import batches, confidence_interval, confusion, gain, row_sums, summarise
from heliostat.models.load import build_model
from heliostat.recipe import build
from heliostat.tasks import Task, get_task
from tests.recipes import prepared, tiny_bert

CLASSIFIER = get_task(build({"name": "r", "task": "text_classification"}))
LANGUAGE_MODEL = get_task(build({"name": "r", "task": "language_model"}))


def correct(rate: float, rows: int, seed: int) -> dict[str, np.ndarray]:
    right = (np.random.default_rng(seed).random(rows) < rate).astype(float)
    return {"accuracy": right, "weight": np.ones(rows)}


def test_interval_of_a_proportion_is_near_the_normal_one() -> None:
    right = correct(0.8, 1000, 0)["accuracy"]
    low, high = confidence_interval(right, np.ones(1000))
    half = 1.959964 * np.sqrt(right.mean() * (1 - right.mean()) / 1000)
    assert low == pytest.approx(right.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(right.mean() + half, abs=0.1 * half)


def test_interval_of_a_weighted_mean_is_near_the_delta_method() -> None:
    draw = np.random.default_rng(1)
    weight = draw.integers(1, 50, 2000).astype(float)
    value = weight * draw.normal(3.0, 0.5, 2000)
    ratio = value.sum() / weight.sum()
    half = 1.644854 * np.sqrt(((value - ratio * weight) ** 2).sum()) / weight.sum()
    low, high = confidence_interval(value, weight, level=0.9)
    assert low == pytest.approx(ratio - half, abs=0.1 * half)
    assert high == pytest.approx(ratio + half, abs=0.1 * half)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        low, high = confidence_interval(correct(0.7, 200, seed)["accuracy"], np.ones(200), resamples=300, seed=seed)
        covered += low <= 0.7 <= high
    assert 178 <= covered <= 200  # 190 expected; three standard deviations are 9


def test_equal_models_are_seldom_called_better() -> None:
    """One in twenty at 95 %: the gate's false alarms are bounded."""
    verdicts = [
        gain(CLASSIFIER, correct(0.8, 300, 2 * i), correct(0.8, 300, 2 * i + 1), 0.95, 300)["better"]
        for i in range(200)
    ]
    assert sum(verdicts) <= 20  # 10 expected; three standard deviations are 9


def test_a_clearly_better_model_is_called_better() -> None:
    verdicts = [
        gain(CLASSIFIER, correct(0.9, 300, 2 * i), correct(0.75, 300, 2 * i + 1), 0.95, 300)["better"]
        for i in range(50)
    ]
    assert sum(verdicts) >= 48
    assert not gain(CLASSIFIER, correct(0.75, 300, 0), correct(0.9, 300, 1), 0.95, 300)["better"]


def test_the_same_model_is_not_better_than_itself() -> None:
    same = correct(0.8, 300, 0)
    found = gain(CLASSIFIER, same, same, 0.95, 300)
    assert found["gain"] == found["lower_bound"] == 0
    assert found["better"] is False


def test_pairing_sees_a_small_gain_that_unpaired_rows_would_hide() -> None:
    champion = correct(0.8, 1000, 0)
    improved = champion["accuracy"].copy()
    improved[np.flatnonzero(improved == 0)[:12]] = 1
    found = gain(CLASSIFIER, champion | {"accuracy": improved}, champion, 0.95, 1000)
    assert found["better"] is True
    assert found["gain"] == pytest.approx(0.012)
    assert found["challenger"] - found["champion"] == pytest.approx(0.012)


@pytest.mark.parametrize(
    ("task", "metric", "better"),
    [
        (CLASSIFIER, "accuracy", True),
        (LANGUAGE_MODEL, "loss", False),
    ],
)
def test_the_direction_is_the_metrics(task: Task, metric: str, better: bool) -> None:
    weight = np.full(200, 10.0)
    low = {metric: np.random.default_rng(0).normal(20, 1, 200), "weight": weight}
    high = {metric: low[metric] + 3, "weight": weight}
    found = gain(task, high, low, 0.95, 300)
    assert found["better"] is better
    assert found["gain"] == pytest.approx(0.3 if better else -0.3)
    assert gain(task, low, high, 0.95, 300)["better"] is not better


def test_confusion() -> None:
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    assert confusion(labels, predicted, 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_rows_are_evaluated_once_and_in_their_places(tmp_path: Path) -> None:
    found = prepared(tiny_bert(tmp_path))
    task = found.task(tiny_bert(tmp_path))
    table = open_split(found.folder, "train")
    numbers = np.concatenate([rows for rows, _ in batches(task, table, 7)])
    assert sorted(numbers.tolist()) == list(range(table.num_rows))
    model = build_model(task).eval()
    rows, logits = row_sums(model, task, table, size=7)
    assert logits is not None
    labels = torch.tensor(table.column("label").to_pylist())
    texts = table.column("input_ids").to_pylist()
    with torch.inference_mode():
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    losses = torch.nn.functional.cross_entropy(alone, labels, reduction="none").numpy()
    assert rows["loss"] == pytest.approx(losses, rel=1e-4)
    assert rows["accuracy"].tolist() == (alone.argmax(-1) == labels).tolist()
    figures = summarise(task, rows)
    assert figures == pytest.approx({"loss": losses.mean(), "accuracy": rows["accuracy"].mean()}, rel=1e-4)
