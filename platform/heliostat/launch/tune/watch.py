"""What people see of a search: on a terminal a table of its trials, best first, that follows them; elsewhere a line for
each that has ended."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from heliostat.energy import ESTIMATED
from heliostat.launch.tune.study import Study

SHOWN = 20
"""Trials at most, while the search runs."""
EVERY_S = 0.5


class Watch:
    """The driver tells it of reports and ends while the context lasts."""

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self.study = study
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.drawn = 0.0

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def ended(self, row: dict[str, Any]) -> None:
        """A trial has ended; `row`: as the study lists it."""
        if self.console.is_terminal:
            self.reported()
        else:
            self.say(row)

    def reported(self) -> None:
        """A trial has reported."""
        if self.console.is_terminal and time.monotonic() - self.drawn >= EVERY_S:
            self.drawn = time.monotonic()
            running = self.study.running()
            rows = self.study.rows()
            shown = rows[: max(0, SHOWN - len(running))] + running[:SHOWN]
            title = f"{len(rows)} of {self.study.number} trials have ended, {len(running)} run"
            self.live.update(trials_table(shown, title), refresh=True)

    def say(self, row: dict[str, Any]) -> None:
        """A line on stderr."""
        values = ", ".join(f"{path}={short(value)}" for path, value in row["values"].items())
        metric = next(iter(self.study.objectives))
        result = f"{row['state']}: {row['error']}" if row["error"] else f"{metric} {short(row[metric])}"
        evaluations = f"{row['evaluations']} evaluation{'' if row['evaluations'] == 1 else 's'}"
        count = f"trial {self.study.ended} of {self.study.number}"
        print(f"{count} ({values}), {evaluations}: {result}", file=sys.stderr, flush=True)


def trials_table(trials: list[dict[str, Any]], title: str) -> Table:
    """`trials`: as the study lists them, at least one."""
    heads, rows = columns(trials)
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def columns(trials: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What a table of trials has at its head, and a row for each: the values that were searched, the figures, and last
    why one failed."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial["values"]))
    others = list(dict.fromkeys(name for trial in trials for name in trial if name not in ("values", "curve", "error")))
    cells = [
        [trial["values"].get(path) for path in paths] + [trial.get(name) for name in (*others, "error")]
        for trial in trials
    ]
    heads = [*paths, *(f"{name} ({ESTIMATED})" if name == "joules" else name for name in others), "error"]
    return heads, [["" if cell is None else short(cell) for cell in row] for row in cells]


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
