"""What reports are made of: pages in one file, which load nothing, and plotly's plots in them."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
.absent { color: #777 }
"""


BOLD = ' style="font-weight: 600"'
"""An attribute of a row that stands out."""


def page(title: str, *parts: str, style: str = "") -> str:
    """`title`: text; `parts`: HTML; `style`: more of it."""
    name, body = html.escape(title), "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}{style}</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""


def plots(drawn: Iterable[tuple[str, Callable[[], Any]]], height_px: int = 480) -> str:
    """Titles, and what makes the plotly figure below each, or says as ValueError or RuntimeError why there is none."""
    return "".join(_plot(title, draw, index == 0, height_px) for index, (title, draw) in enumerate(drawn))


def _plot(title: str, draw: Callable[[], Any], first: bool, height_px: int) -> str:
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
        body = figure.to_html(full_html=False, include_plotlyjs=first, default_height=f"{height_px}px")
    return f"<h2>{html.escape(title)}</h2>{body}"


def _code() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], attributes: Iterable[str] = ()) -> str:
    """Of texts. `attributes`: of each row in HTML."""
    each = iter(attributes)
    body = (f"<tr{next(each, '')}>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
