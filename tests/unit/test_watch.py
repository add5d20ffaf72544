"""What a terminal shows of a search, and what a file gets."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from heliostat.launch.tune import watch
from heliostat.launch.tune.runner import DONE, FAILED
from heliostat.launch.tune.study import Study
from heliostat.recipe import Tune, Uniform


def searched(folder: Path, console: Console) -> None:
    """Three trials end, the second the best, the third failing; a fourth has reported and runs."""
    study = Study(Tune(space={"x": Uniform(low=0, high=1)}, num_trials=9), {"accuracy": True}, 0, "search", folder)
    with watch.Watch(study, console) as watching:
        for accuracy in (0.25, 0.875, None):
            number, _ = study.ask()
            if accuracy is None:
                study.tell(number, FAILED, {}, "it broke")
            else:
                study.report(number, 1, {"accuracy": accuracy})
                study.tell(number, DONE, {"accuracy": accuracy})
            watching.ended(study.row(number))
        number, _ = study.ask()
        study.report(number, 1, {"accuracy": 0.5})
        watching.reported()


def test_a_terminal_shows_a_table_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    shown = io.StringIO()
    searched(tmp_path, Console(file=shown, force_terminal=True, width=120, color_system=None))
    last = shown.getvalue().rpartition("3 of 9 trials have ended, 1 run")[2]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in last.splitlines() if line.startswith("│")]
    by_column = list(zip(*rows, strict=True))
    for column in (
        ("done", "done", "failed", "running"),
        ("0.875", "0.25", "", "0.5"),
        ("1", "1", "0", "1"),
        ("", "", "it broke", ""),
    ):
        assert column in by_column


def test_it_is_not_drawn_more_often_than_eyes_follow(tmp_path: Path) -> None:
    shown = io.StringIO()
    searched(tmp_path, Console(file=shown, force_terminal=True, width=120, color_system=None))
    assert "1 of 9 trials have ended" in shown.getvalue()
    assert "2 of 9 trials have ended" not in shown.getvalue()


def test_a_file_gets_a_line_for_each_that_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    searched(tmp_path, Console(file=shown))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"trial {i} of 9" for i in (1, 2, 3)]
    assert [line.rpartition("), 1 evaluation: ")[2] for line in lines[:2]] == ["accuracy 0.25", "accuracy 0.875"]
    assert lines[2].endswith("0 evaluations: failed: it broke")
    assert shown.getvalue() == ""
