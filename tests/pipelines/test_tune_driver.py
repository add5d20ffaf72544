"""The driver of a search on a real cluster: how trials end, die and go on, and what they take of the cluster."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.energy import JOULES_PER_KWH
from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.runner import PRUNED
from heliostat.launch.tune.space import row_settings
from heliostat.launch.tune.study import Study
from heliostat.launch.tune.trial import Training
from heliostat.recipe import Choice, Integers, LogUniform, Tune, Uniform
from heliostat.train.samples import collect
from tests.pipelines.jobs import ROOT
from tests.pipelines.trials import JOULES_A_REPORT, Said
from tests.recipes import prepared, tiny_bert

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


def test_energy_is_a_budget_also_over_sessions(tmp_path: Path) -> None:
    """Seven reports' worth: the fourth trial is ended at its first, and no fifth begins, now or when resumed."""
    tune = Tune(
        space={"x": Uniform(low=0, high=2)}, scheduler="none", num_trials=9, kwh=7 * JOULES_A_REPORT / JOULES_PER_KWH
    )
    study = Study(tune, {"loss": False}, 0, "search", tmp_path)
    assert Driver(study, Said(tmp_path, 0.02), max_concurrent=1).run() == "tune.kwh=1.94444"
    rows = {row["number"]: (row["state"], row["evaluations"], row["error"]) for row in study.rows()}
    assert rows == dict.fromkeys(range(3), ("done", 2, None)) | {3: ("pruned", 1, "tune.kwh=1.94444 is spent")}
    assert study.joules == 7 * JOULES_A_REPORT
    again = Study(tune, {"loss": False}, 0, "search", tmp_path, resume=True)
    assert Driver(again, Said(tmp_path, 0.02)).run() == "tune.kwh=1.94444"
    assert len(again.rows()) == 4


def test_what_ends_a_search_of_which_no_budget_is_spent(tmp_path: Path) -> None:
    for number, expected in ((2, "tune.num_trials=2"), (9, "tune.space, 3 combinations")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tune = Tune(
            space={"n": Integers(low=1, high=3)}, algorithm="grid", scheduler="none", num_trials=number, hours=1
        )
        study = Study(tune, {"loss": False}, 0, "search", folder)
        assert Driver(study, Said(folder, 0.02)).run() == expected


def test_no_more_at_once_than_asked(tmp_path: Path) -> None:
    rows = searched(tmp_path, {"n": Integers(low=1, high=4)}, 0.3, algorithm="grid", num_trials=4, max_concurrent=1)
    assert len(rows) == 4
    spans = sorted(tuple(map(float, file.read_text().split()[:2])) for file in tmp_path.glob("*.ended"))
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))


def test_pbt_goes_on_from_a_better_trials_weights_and_rows(tmp_path: Path) -> None:
    """A trial that takes another's place makes its first step on the very weights, rows and random numbers of its
    origin's step of that number."""
    space = {"optimizer.lr": LogUniform(low=1e-6, high=1e-1)}
    settings = {"tune.space": space, "tune.scheduler": "pbt", "tune.num_trials": 5, "tune.reports": 5, "tune.epochs": 5}
    recipe = tiny_bert(tmp_path, **{"model.dropout": 0.1, "data.log_samples": True} | settings)
    data = prepared(recipe)
    study = Study(recipe.tune, {"loss": False}, 0, "search", tmp_path)
    training = Training(recipe, {row_settings(recipe): data}, tmp_path / "trials", use_gpu=False)
    Driver(study, training, max_concurrent=1).run()  # one after the other: no matter of who is faster
    rows = {row["number"]: row for row in study.rows()}
    successors = {number: study.origin(number) for number in rows if study.origin(number) is not None}
    assert successors, rows
    assert set(rows) == set(range(5 + len(successors)))
    assert sum(row["state"] == PRUNED for row in rows.values()) == len(successors)

    def steps(number: int) -> dict[int, dict[str, float]]:
        records = read_metrics(tmp_path / "trials" / f"{number:05d}" / METRICS_FILE)
        return {record["step"]: record for record in records if "loss" in record}

    def fed(number: int, step: int) -> list[int]:
        table = pq.read_table(collect(tmp_path / "trials" / f"{number:05d}", recipe))
        return table.filter(pc.equal(table["step"], step)).sort_by("position")["id"].to_pylist()

    for number, origin in successors.items():
        assert origin is not None
        own, others = steps(number), steps(origin.trial)
        first = min(own)
        assert first > 1
        assert (own[first]["loss"], own[first]["grad_norm"]) == (others[first]["loss"], others[first]["grad_norm"])
        assert fed(number, first) == fed(origin.trial, first)
        assert rows[number]["values"] != rows[origin.trial]["values"]
        assert own[first]["lr"] != others[first]["lr"]


@pytest.mark.slow
def test_nodes_and_driver_are_lost_and_no_trial_is(tmp_path: Path) -> None:
    """Nodes are killed at random moments; then the driver is, and goes on, and nodes are killed again."""
    trials = 36

    def start(how: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "tests.pipelines.lost_nodes", str(tmp_path), str(trials), how]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("begin")
    assert first.stderr is not None
    told = [line for line, _ in zip(numbers(first.stderr), range(trials // 2), strict=False)]
    first.kill()
    first.communicate(timeout=60)
    second = start("resume")
    _, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["lost"] == 3
    rows = {row["number"]: row for row in said["rows"]}
    assert sorted(rows) == list(range(trials))
    assert {row["state"] for row in rows.values()} == {"done"}
    for row in rows.values():
        assert row["loss"] == pytest.approx((row["values"]["x"] - 1) ** 2)
    assert not set(told) & set(said["ended"]), "what had ended is not made again"
    # Of those that were running when something was lost, and of no other, there is more than one attempt.
    attempts = [len(list(tmp_path.glob(f"{number}-*.begun"))) for number in rows]
    assert 1 <= sum(attempt > 1 for attempt in attempts) <= 6 * 2 + 4


def numbers(lines: Iterable[str]) -> Iterator[int]:
    """Of the trials that have ended, among what else is said."""
    return (int(line) for line in lines if line.strip().isdecimal())
