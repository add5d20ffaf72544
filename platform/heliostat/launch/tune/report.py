"""A search as one HTML page, which needs nothing else: its trials, and Optuna's own plots of them."""

from __future__ import annotations

import html
import warnings
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
from heliostat.recipe import write_atomically

REPORT_FILE = "report.html"
ROWS = 500
"""Trials that are listed; the plots show all."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
.absent { color: #777 }
"""


def write_report(study: Study, path: Path) -> None:
    """Write the page, whatever there is to show."""
    rows = study.rows()
    plots = [_plot(title, draw, first=index == 0) for index, (title, draw) in enumerate(_plots(study))]
    counts = Counter(row["state"] for row in rows)
    said = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no trial has ended"
    name = html.escape(study.memory.study_name)
    write_atomically(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Search {name}</title><style>{STYLE}</style></head><body>
<h1>Search {name}</h1>
<p>{said}; {study.seconds / 60:.1f} minutes, {study.joules / JOULES_PER_KWH:.2g} kWh ({ESTIMATED}).</p>
{"".join(plots)}
<h2>Trials, best first</h2>
{_table(rows)}
</body></html>
""",
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


def _plot(title: str, draw: Callable[[], Any], first: bool) -> str:
    """The plot, or why there is none. `first`: it brings plotly's code."""
    try:
        with warnings.catch_warnings(action="ignore"):
            figure = draw()
    except (ValueError, RuntimeError) as error:
        # Too few trials, or no value that differs.
        body = f'<p class="absent">Not drawn: {html.escape(str(error))}</p>'
        if first:
            body += _code()
    else:
        body = figure.to_html(full_html=False, include_plotlyjs=first, default_height="480px")
    return f"<h2>{html.escape(title)}</h2>{body}"


def _code() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _table(trials: list[dict[str, Any]]) -> str:
    heads, rows = columns(trials[:ROWS])
    body = []
    for trial, row in zip(trials, rows, strict=False):
        weight = ' style="font-weight: 600"' if trial["pareto"] and trial["state"] == DONE else ""
        body.append(f"<tr{weight}>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    more = f"<p>… and {len(trials) - ROWS} more.</p>" if len(trials) > ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{more}"
