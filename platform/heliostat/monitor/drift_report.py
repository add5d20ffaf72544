"""What was compared, and how both sides look, as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from heliostat.monitor.drift import EMBEDDINGS, Finding, Observed
from heliostat.pages import BOLD, page, plots, table

HEADS = ("", "drifted", "PSI", "distance", "test", "p", "p (Holm)")
PLOTS = 12
"""Columns that are drawn, those that differ most."""
BARS = 30
SIDES = ("validation", "served")


def cells(finding: Finding) -> list[str]:
    """A finding as texts, below `HEADS`."""
    index = "" if finding.psi is None else f"{finding.psi:.3f}"
    numbers = [index, f"{finding.distance:.3f}", finding.test, f"{finding.p:.2g}", f"{finding.adjusted_p:.2g}"]
    return [finding.name, "yes" if finding.drifted else "no", *numbers]


def render(title: str, said: str, findings: Sequence[Finding], reference: Observed, served: Observed) -> str:
    """`said`: what there is to say in a sentence. The page holds no row, but its plots hold their values."""
    drawn: list[tuple[str, Callable[[], Any]]] = []
    for finding in findings:
        if finding.name in reference.columns and len(drawn) < PLOTS:
            sides = reference.columns[finding.name], served.columns[finding.name]
            drawn.append((finding.name, partial(_numbers if sides[0].dtype.kind == "f" else _categories, *sides)))
    if reference.embeddings is not None and served.embeddings is not None:
        drawn.append((EMBEDDINGS, partial(_plane, reference.embeddings, served.embeddings)))
    rows = table(HEADS, map(cells, findings), (BOLD if finding.drifted else "" for finding in findings))
    return page(title, f"<p><strong>{html.escape(said)}</strong></p>", rows, plots(drawn))


def _figure(**layout: Any) -> Any:
    import plotly.graph_objects as go

    return go.Figure(layout={"bargap": 0, **layout})


def _numbers(*sides: np.ndarray) -> Any:
    """Shares of rows, by value."""
    values = [side[~np.isnan(side)] for side in sides]
    edges = np.histogram_bin_edges(np.concatenate(values), BARS)
    figure = _figure(barmode="overlay", yaxis_tickformat=".0%")
    for name, each in zip(SIDES, values, strict=True):
        shares = np.histogram(each, edges)[0] / max(1, len(each))
        figure.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=shares, width=np.diff(edges), name=name, opacity=0.6)
    return figure


def _categories(*sides: np.ndarray) -> Any:
    """Shares of rows, the most frequent first."""
    names, counts = np.unique(np.concatenate(sides), return_counts=True)
    shown = names[np.argsort(-counts, kind="stable")][:BARS]
    figure = _figure(barmode="group", bargap=0.2, yaxis_tickformat=".0%", xaxis_type="category")
    for name, each in zip(SIDES, sides, strict=True):
        figure.add_bar(x=shown, y=[(each == category).mean() for category in shown], name=name)
    return figure


def _plane(*sides: np.ndarray) -> Any:
    """The plane in which the validation rows are spread most (their first two principal components)."""
    center = sides[0].mean(0)
    _, _, axes = np.linalg.svd(sides[0] - center, full_matrices=False)
    figure = _figure(xaxis_title="first principal component", yaxis_title="second")
    for name, each in zip(SIDES, sides, strict=True):
        x, y = ((each - center) @ axes[:2].T).T
        figure.add_scatter(x=x, y=y, mode="markers", name=name, opacity=0.6)
    return figure
