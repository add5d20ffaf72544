"""A search as one HTML page, which needs nothing else: its trials, and Optuna's own plots of them."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from heliostat.energy import ESTIMATED, JOULES_PER_KWH
from heliostat.launch.tune.runner import DONE
from heliostat.launch.tune.study import Study
from heliostat.launch.tune.watch import columns
from heliostat.pages import BOLD, page, plots, table
from heliostat.recipe import write_atomically

REPORT_FILE = "report.html"
ROWS = 500
"""Trials that are listed; the plots show all."""


def write_report(study: Study, path: Path, said: str = "") -> None:
    """Write the page, whatever there is to show. `said`: of the search's outcome, besides."""
    rows = study.rows()
    counts = Counter(row["state"] for row in rows)
    ended = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no trial has ended"
    write_atomically(
        path,
        page(
            f"Search {study.memory.study_name}",
            f"<p>{ended}; {study.seconds / 60:.1f} minutes, {study.joules / JOULES_PER_KWH:.2g} kWh ({ESTIMATED}).</p>",
            f"<p><strong>{html.escape(said)}</strong></p>" if said else "",
            plots(_plots(study)),
            "<h2>Trials, best first</h2>",
            _table(rows),
        ),
    )


def _plots(study: Study) -> list[tuple[str, Callable[[], Any]]]:
    from optuna import visualization

    memory, names = study.memory, list(study.objectives)
    several = len(names) > 1
    plots: list[tuple[str, Callable[[], Any]]] = []
    if several:
        plots.append(("Pareto front", partial(visualization.plot_pareto_front, memory, target_names=names)))
    for index, name in enumerate(names):

        def target(trial: optuna.trial.FrozenTrial, index: int = index) -> float:
            return trial.values[index]

        given: dict[str, Any] = {"target": target if several else None, "target_name": name}
        of = f" of {name}" if several else ""
        plots += [
            (f"History{of}", partial(visualization.plot_optimization_history, memory, **given)),
            (f"Parallel coordinates{of}", partial(visualization.plot_parallel_coordinate, memory, **given)),
            (f"Importance{of}", partial(visualization.plot_param_importances, memory, **given)),
        ]
    plots.append(("Learning curves", partial(_curves, study)))
    return plots


def _curves(study: Study) -> Any:
    """As Optuna's `plot_intermediate_values`, which takes no study of several objectives."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "evaluation", "yaxis_title": next(iter(study.objectives))})
    for trial in study.memory.get_trials(deepcopy=False):
        if curve := sorted(trial.intermediate_values.items()):
            figure.add_scatter(x=[at for at, _ in curve], y=[value for _, value in curve], name=f"{trial.number}")
    if not figure.data:
        raise ValueError("no trial has reported anything")
    return figure


def _table(trials: list[dict[str, Any]]) -> str:
    heads, rows = columns(trials[:ROWS])
    best = (BOLD if trial["pareto"] and trial["state"] == DONE else "" for trial in trials)
    more = f"<p>… and {len(trials) - ROWS} more.</p>" if len(trials) > ROWS else ""
    return table(heads, rows, best) + more
