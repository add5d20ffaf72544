"""When a checkpoint is due: by Daly's model, by the clock, and when machines are to be taken away."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from heliostat.recipe import Checkpoint, Refused, build
from heliostat.train.interval import FIRST_S, LONGEST_S, Interval, daly_interval_s
from heliostat.train.ledger import note_failure
from tests.recipes import tiny_llama


def expected_s(interval_s: np.ndarray, cost_s: float, mtbf_s: float) -> np.ndarray:
    """Wall clock of a second of work where failures come by a Poisson process, restarts for nothing: each interval and
    its checkpoint is tried until it passes."""
    return mtbf_s * np.expm1((interval_s + cost_s) / mtbf_s) / interval_s


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.1, 3600), (5, 3600), (60, 3600), (300, 3600), (2, 1e6)])
def test_the_formula_finds_the_model_s_optimum(cost_s: float, mtbf_s: float) -> None:
    grid = np.geomspace(cost_s / 10, 10 * mtbf_s, 200_000)
    best = float(expected_s(grid, cost_s, mtbf_s).min())
    ours = daly_interval_s(cost_s, mtbf_s)
    assert float(expected_s(np.array(ours), cost_s, mtbf_s)) == pytest.approx(best, rel=1e-3)
    for other in (ours / 4, ours * 4):
        assert float(expected_s(np.array(other), cost_s, mtbf_s)) > best


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def attempt(folder: Path, started: float) -> Path:
    folder.mkdir()
    (folder / "attempt-001.json").write_text(json.dumps({"started": started, "ended": started, "seconds": {}}))
    return folder


def test_auto_learns_cost_and_failures(tmp_path: Path) -> None:
    clock = Clock()
    book = attempt(tmp_path / "ledger", clock.now)
    interval = Interval(Checkpoint(), 512, book, clock=clock)
    clock.now += FIRST_S - 1
    assert not interval.wanted()
    clock.now += 1
    assert interval.wanted()
    interval.saved(2.0, 20.0)
    assert not interval.wanted()
    assert interval.every_s == pytest.approx(daly_interval_s(2.0, 50_000 * 3600 / 512))
    clock.now += interval.every_s
    assert interval.wanted()
    for _ in range(4):
        note_failure(book, {0: "lost"})
    clock.now = 1_000_000.0 + 4 * 3600
    interval.saved(2.0, 20.0)
    assert interval.every_s == pytest.approx(daly_interval_s(2.0, 3600))
    interval.saved(0.01, 200.0)
    assert interval.every_s == pytest.approx(200.01), "one is there before the next is begun"
    alone = Interval(Checkpoint(), 1, attempt(tmp_path / "other", clock.now), clock=clock)
    alone.saved(2.0, 20.0)
    assert alone.every_s == LONGEST_S


def test_by_seconds_or_by_steps(tmp_path: Path) -> None:
    clock = Clock()
    book = attempt(tmp_path / "ledger", clock.now)
    seconds = Interval(Checkpoint(every_s=5.0), 2, book, clock=clock)
    steps = Interval(Checkpoint(every_steps=7), 2, book, clock=clock)
    other_rank = Interval(Checkpoint(every_s=5.0), 2, None, clock=clock)
    clock.now += 5
    assert [each.wanted() for each in (seconds, steps, other_rank)] == [True, False, False]
    seconds.saved(0.1, 0.1)
    assert not seconds.wanted()
    clock.now += 5
    assert seconds.wanted()


def test_machines_that_are_taken_away(tmp_path: Path) -> None:
    """On any rank: at once, and once more when there is just time for it."""
    clock = Clock()
    deadline: list[float | None] = [None]
    interval = Interval(Checkpoint(every_steps=1000), 2, None, lambda: deadline[0], clock)
    interval.saved(0.5, 4.5)
    assert not interval.wanted()
    deadline[0] = clock.now + 120
    assert [interval.wanted(), interval.wanted()] == [True, False]
    clock.now += 120 - 13.1
    assert not interval.wanted()
    clock.now += 0.2
    assert [interval.wanted(), interval.wanted()] == [True, False]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    tree = tiny_llama(tmp_path).model_dump(mode="json")
    for value in (0.0, -1.0, "often"):
        with pytest.raises(Refused, match="every_s"):
            build(tree | {"checkpoint": {"every_s": value}})
