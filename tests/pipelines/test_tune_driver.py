"""The driver of a search on a real cluster: how trials end, die and go on, and what they take of the cluster."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.study import Study
from heliostat.recipe import Choice, Integers, Tune, Uniform
from tests.pipelines.trials import Said

pytestmark = pytest.mark.usefixtures("ray_cluster")


def searched(folder: Path, space: dict[str, Any], seconds: float = 0.2, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a search, by number."""
    tune = Tune(**({"space": space, "scheduler": "none"} | settings))
    study = Study(tune, {"loss": False}, 0, "search", folder)
    told: list[dict[str, Any]] = []
    Driver(study, Said(folder, seconds), tune.max_concurrent, told.append).run()
    rows = sorted(study.rows(), key=lambda row: row["number"])
    assert sorted(row["number"] for row in told) == [row["number"] for row in rows], "each is told of once"
    return rows


def test_how_trials_end(tmp_path: Path) -> None:
    ways = ["well", "refused", "raises", "too large", "nan", "dies", "dies once"]
    rows = searched(tmp_path, {"what": Choice(values=ways)}, algorithm="grid", num_trials=99, max_failures=1)
    ends = {row["values"]["what"]: (row["state"], row["error"], row["loss"]) for row in rows}
    assert ends["well"] == ends["dies once"] == ("done", None, 1.0)
    assert ends["refused"] == ("infeasible", "what: cannot be", None)
    assert ends["too large"] == ("infeasible", "MemoryError: a terabyte", None)
    assert ends["raises"] == ("failed", "ValueError: no good", None)
    assert ends["nan"] == ("failed", "loss is nan", None)
    state, error, loss = ends["dies"]
    assert (state, loss) == ("failed", None)
    assert error.startswith("its process died 2 times, at last: ")
    attempts = {name: len(list(tmp_path.glob(f"{number}-*.begun"))) for number, name in enumerate(ways)}
    assert attempts == {
        "well": 1, "refused": 0, "raises": 1, "too large": 1, "nan": 1, "dies": 2, "dies once": 2
    }  # fmt: skip


def test_trials_take_no_more_than_there_is(tmp_path: Path) -> None:
    """On eight CPUs, trials of one to eight of them: all that fit run at once, and never more."""
    rows = searched(tmp_path, {"cpus": Choice(values=[1, 8, 3, 5, 2, 4])}, 1.0, algorithm="grid", num_trials=6)
    assert [row["state"] for row in rows] == ["done"] * 6
    spans = [tuple(map(float, file.read_text().split())) for file in tmp_path.glob("*.ended")]
    in_use = [sum(cpus for begun, ended, cpus in spans if begun <= at < ended) for at, *_ in spans]
    assert max(in_use) == 8
    assert len(spans) == 6


def test_a_spent_budget_ends_what_runs_and_starts_no_more(tmp_path: Path) -> None:
    rows = searched(tmp_path, {"x": Uniform(low=0, high=2)}, 3.0, num_trials=1000, hours=1.0 / 3600, max_concurrent=2)
    assert 1 <= len(rows) <= 4
    assert {(row["state"], row["error"]) for row in rows if row["number"] == rows[-1]["number"]} == {
        ("pruned", "tune.hours=0.000277778 is spent")
    }


def test_no_more_at_once_than_asked(tmp_path: Path) -> None:
    rows = searched(tmp_path, {"n": Integers(low=1, high=4)}, 0.3, algorithm="grid", num_trials=4, max_concurrent=1)
    assert len(rows) == 4
    spans = sorted(tuple(map(float, file.read_text().split()[:2])) for file in tmp_path.glob("*.ended"))
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))
