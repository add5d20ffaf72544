"""The report of a search, opened in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heliostat.launch.tune.report import write_report
from heliostat.launch.tune.runner import DONE, INFEASIBLE, PRUNED
from heliostat.launch.tune.study import Study
from heliostat.recipe import Choice, Tune, Uniform
from tests import needs
from tests.browser import opened


def searched(folder: Path, objectives: dict[str, bool], trials: int) -> Study:
    space = {"optimizer.lr": Uniform(low=0, high=1), "model.<head>": Choice(values=["a", "b"])}
    study = Study(Tune(space=space, scheduler="none"), objectives, 0, "a <search>", folder)
    for _ in range(trials):
        number, values = study.ask()
        figures = {name: values["optimizer.lr"] ** (1 + at) for at, name in enumerate(objectives)}
        study.report(number, 1, figures)
        study.report(number, 2, figures)
        study.tell(number, DONE, figures)
    if trials:
        study.tell(study.ask()[0], INFEASIBLE, {}, "too <large>")
        number, _ = study.ask()
        study.report(number, 1, dict.fromkeys(objectives, 9.0))
        study.tell(number, PRUNED, dict.fromkeys(objectives, 9.0))
    return study


@needs.chromium
@pytest.mark.parametrize(
    ("objectives", "plots"),
    [
        ({"loss": False}, ["History", "Parallel coordinates", "Importance", "Learning curves"]),
        (
            {"accuracy": True, "seconds": False},
            ["Pareto front", *(f"{plot} of {name}" for name in ("accuracy", "seconds")
             for plot in ("History", "Parallel coordinates", "Importance")), "Learning curves"],
        ),
    ],
)  # fmt: skip
def test_a_browser_shows_it(objectives: dict[str, bool], plots: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(searched(tmp_path, objectives, 6), page)
    document, console = opened(page)
    assert console == ""
    assert re.findall(r"<h2>(.*?)</h2>", document) == [*plots, "Trials, best first"]
    # What plotly draws once its script has run in the page.
    assert len(re.findall(r'<svg class="main-svg"[^>]*>', document)) >= len(plots)
    assert "Not drawn" not in document
    assert "<h1>Search a &lt;search&gt;</h1>" in document
    assert document.count("<tr") == 1 + 8
    assert "too &lt;large&gt;" in document
    assert not re.search(r"<(script|img|link)[^>]* (src|href)=", document), "it loads nothing"


@needs.chromium
def test_a_search_without_trials_says_why_it_shows_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(searched(tmp_path, {"loss": False}, 0), page)
    document, console = opened(page)
    assert console == ""
    assert "no trial has ended" in document
    assert "Not drawn: " in document
