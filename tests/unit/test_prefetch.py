"""Input made in advance: the same items, at most so many, errors where they are due, and nothing left running."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, override
from heliostat.tasks.text_classification import TextClassification
from heliostat.train.loop import Run, train
from heliostat.train.prefetch import Prefetcher
from tests.recipes import prepared, tiny_bert


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_items_in_order_and_never_more_than_allowed(ahead: int) -> None:
    used, most = 0, 0

    def keys() -> Iterator[int]:
        nonlocal most
        for key in range(50):
            most = max(most, key - used)
            yield key

    items = Prefetcher(lambda key: key * key, keys(), ahead)
    for number in range(50):
        assert next(items) == number * number
        used = number + 1
    assert most <= ahead
    with pytest.raises(StopIteration):
        next(items)
    items.close()
    assert threads() == []


def test_an_error_is_raised_where_its_item_was_due() -> None:
    items = Prefetcher(lambda key: 6 // key, [3, 2, 0, 1], 3)
    assert [next(items), next(items)] == [2, 3]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(items)
    items.close()
    assert threads() == []


def test_closing_drops_what_was_made() -> None:
    items = Prefetcher(lambda key: key, iter(int, 1), 4)  # endless
    assert next(items) == 0
    items.close()
    assert threads() == []


def test_a_read_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import threading\n"
        "from heliostat.train.prefetch import Prefetcher\n"
        "Prefetcher(lambda key: threading.Event().wait(), [1], 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def losses(recipe: Recipe, run_dir: Path) -> list[float]:
    train(recipe, prepared(recipe).folder, run_dir, write_bundle=False)
    return [record["loss"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]


def test_training_is_bitwise_the_same(tmp_path: Path) -> None:
    """With dropout, whose draws come from the generator that a thread must not touch."""
    recipe = tiny_bert(tmp_path, **{"model.dropout": 0.3, "training.evaluate_every_steps": 7, "data.prefetch": 0})
    without = losses(recipe, tmp_path / "without")
    for ahead in (1, 3):
        assert losses(override(recipe, {"data.prefetch": ahead}), tmp_path / f"ahead-{ahead}") == without
    assert threads() == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_in_collating_reaches_the_loop(ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_bert(tmp_path, **{"data.prefetch": ahead})
    collate, calls = TextClassification.collate, []

    def failing(self: Any, rows: Any, train: bool, *args: Any) -> Any:
        calls.extend([train] if train else [])
        if len(calls) > 4:  # two micro-batches a step
            raise OSError("the disk is gone")
        return collate(self, rows, train, *args)

    monkeypatch.setattr(TextClassification, "collate", failing)
    attempt = Run(recipe, prepared(recipe), tmp_path / "run", write_bundle=False)
    with pytest.raises(OSError, match="the disk is gone"):
        attempt.train()
    assert attempt.progress.step == 2
    assert threads() == []


def test_the_cursor_is_that_of_what_was_trained_on(tmp_path: Path) -> None:
    recipe = tiny_bert(tmp_path, **{"data.prefetch": 4, "schedule.max_steps": 6})
    found = []

    def at_each_step() -> bool:
        found.append(attempt.progress.cursor)
        return len(found) == 4

    attempt = Run(recipe, prepared(recipe), tmp_path / "run", should_stop=at_each_step, write_bundle=False)
    assert attempt.train()["status"] == "interrupted"
    first = Run(recipe, prepared(recipe), tmp_path / "other").loader
    assert found == [first.advance(found[0], step) for step in range(4)]
    resumed = Run(recipe, prepared(recipe), tmp_path / "run")
    assert resumed.progress.cursor == first.advance(found[0], 4)
