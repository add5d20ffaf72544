"""A report as one HTML page, which needs nothing else: text, plots of plotly's, tables."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
.absent { color: #777 }
"""


def page(title: str, *parts: str) -> str:
    """`title` is text, the parts are HTML."""
    title = html.escape(title)
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def plots(drawn: Sequence[tuple[str, Callable[[], Any]]]) -> str:
    """Titles, and what makes the plotly figure below; or says, as ValueError or RuntimeError, why there is none."""
    return "".join(_plot(title, draw, first=index == 0) for index, (title, draw) in enumerate(drawn))


def _plot(title: str, draw: Callable[[], Any], first: bool) -> str:
    """`first`: it brings plotly's code."""
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


def table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """Each row's texts, and whether it stands out."""
    body = []
    for texts, stands_out in rows:
        weight = ' style="font-weight: 600"' if stands_out else ""
        body.append(f"<tr{weight}>{''.join(f'<td>{html.escape(text)}</td>' for text in texts)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
