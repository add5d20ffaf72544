"""The ledger of several attempts against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.train.ledger import CLASSES, FAILURES_FILE, Ledger, Speed, figures, summarise


def attempt(folder: Path, number: int, started: float, seconds: dict[str, float], workers: int = 2) -> None:
    record = {"started": started, "ended": started + sum(seconds.values()), "workers": workers, "seconds": seconds}
    (folder / f"attempt-{number:03d}.json").write_text(json.dumps(record))


def test_every_second_is_in_one_class(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1010.0, {"start_up": 2.0, "step": 20.0, "checkpoint": 1.0})  # until 1033
    (tmp_path / FAILURES_FILE).write_text(json.dumps({"time": 1035.5, "reasons": {"1": "gone"}}) + "\n")
    attempt(tmp_path, 2, 1042.0, {"restore": 3.0, "replay": 4.0, "step": 5.0, "input": 1.0}, workers=1)  # until 1055
    book = summarise(tmp_path, 1000.0, 1060.0)
    expected = dict.fromkeys(CLASSES, 0.0) | {
        "start_up": 12.0,
        "step": 25.0,
        "checkpoint": 1.0,
        "detection": 2.5,
        "rescheduling": 6.5,
        "restore": 3.0,
        "replay": 4.0,
        "input": 1.0,
        "idle": 5.0,
    }
    assert book["seconds"] == expected
    assert sum(book["seconds"].values()) == book["wall_s"] == 60.0
    assert book["goodput"] == pytest.approx(25 / 60)
    assert [each["workers"] for each in book["by_attempt"]] == [2, 1]


def test_throughput_is_that_of_stepping(tmp_path: Path) -> None:
    """100 steps of 512 tokens in 10 s on two workers, then 30 in 6 s on one."""
    for number, (started, seconds, workers) in enumerate([(0.0, 10.0, 2), (20.0, 6.0, 1)], 1):
        record = {"started": started, "ended": started + seconds, "workers": workers, "seconds": {"step": seconds}}
        if number == 2:
            record["seconds"] = {"replay": 2.0, "step": seconds - 2.0}
        (tmp_path / f"attempt-{number:03d}.json").write_text(json.dumps(record))
    made = [(0.1 * step, 512.0) for step in range(1, 101)] + [(20 + 0.2 * step, 512.0) for step in range(1, 31)]
    book = summarise(tmp_path, 0.0, 26.0, Speed(made, flops_per_token=1e6, peak_flops=1e10))
    assert book["tokens_per_s"] == pytest.approx(130 * 512 / 16)
    assert [each["tokens_per_s"] for each in book["by_attempt"]] == pytest.approx([5120, 30 * 512 / 6])
    assert [each["mfu"] for each in book["by_attempt"]] == pytest.approx([5120e6 / 2e10, 2560e6 / 1e10])
    assert book["mfu"] == pytest.approx(130 * 512 * 1e6 / ((2 * 10 + 6) * 1e10))
    assert summarise(tmp_path, 0.0, 26.0)["mfu"] is None
    assert figures(book)["ledger.mfu"] == book["mfu"]
    assert figures(book)["ledger.replay_s"] == 2.0


def test_a_gap_that_nobody_noticed_is_rescheduling(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0.0, {"step": 10.0})
    attempt(tmp_path, 2, 15.0, {"step": 5.0})
    seconds = summarise(tmp_path, 0.0, 20.0)["seconds"]
    assert (seconds["detection"], seconds["rescheduling"]) == (0.0, 5.0)


def test_spans_are_exclusive_and_the_first_class_is_that_of_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("heliostat.train.ledger.time.perf_counter", lambda: now)

    def spend(book: Ledger, name: str, seconds: float, inner: Any = None) -> None:
        nonlocal now
        with book(name):
            now += seconds
            if inner:
                inner()

    for first in ("start_up", "restore"):
        book = Ledger(tmp_path)
        now += 1.0
        spend(book, "step", 2.0, lambda b=book: spend(b, "input", 0.5))
        now += 0.25
        book.save()
        assert book.seconds == {first: 1.25, "step": 2.0, "input": 0.5}
