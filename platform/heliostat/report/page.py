"""A story as one HTML page, which needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from heliostat.pages import page, plots, table
from heliostat.report.story import KILLED, LogText, Story, hide_all
from heliostat.train.ledger import CLASSES

POINTS = 2000
"""Of a curve that has more steps, so many are drawn."""
ROWS = 1000
"""Events that are listed."""
LINKS = ("folder", "bundle", "best_recipe", "report", "predictions", "data", "endpoint")
"""What of an answer says where something is."""
STYLE = """
.status { padding: .1rem .6rem; border-radius: .6rem; color: #fff; background: #777 }
.done { background: #2a7d2a } .running { background: #2660a4 } .failed, .killed, .different { background: #b02a2a }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; max-height: 32rem; font-size: 12px; margin: .3rem 0 }
summary { cursor: pointer } #search { width: 28rem; max-width: 100%; padding: .3rem }
"""
SEARCH = """
<script>
const logs = [...document.querySelectorAll("details.log")].map(details => {
  const pre = details.querySelector("pre");
  return {details, pre, found: details.querySelector(".found"), text: pre.textContent, lines: null};
});
function search() {
  const word = document.getElementById("search").value.toLowerCase();
  for (const log of logs) {
    log.lines ??= log.text.split("\\n");
    const matching = word ? log.lines.filter(line => line.toLowerCase().includes(word)) : log.lines;
    log.pre.textContent = word ? matching.join("\\n") : log.text;
    log.found.textContent = word ? ` — ${matching.length} found` : "";
    log.details.open = Boolean(word) && matching.length > 0;
  }
}
document.getElementById("search").addEventListener("input", search);
</script>
"""


def render(story: Story) -> str:
    """The page. Every text in it that comes from the run is escaped."""
    drawn = plots(_plots(story), height_px=360)
    parts = [_head(story), _run(story), drawn, _ledger(story), _failures(story), _events(story), _logs(story)]
    return page(f"Run {story.folder.name}", *parts, style=STYLE)


def _head(story: Story) -> str:
    status = html.escape(story.status)
    length = f"{story.ended - story.began:.1f} s"
    until = "last sign of life" if story.status == KILLED else "until"
    rows = [
        ("status", f'<span class="status {status}">{status}</span> {html.escape(hide_all(story.reason))}'),
        ("began", html.escape(_moment(story.began))),
        (until, f"{html.escape(_moment(story.ended))} ({length})"),
    ]
    if story.book:
        rows.append(("goodput", f"{story.book['goodput']:.1%}"))
    for name, text in {**story.result, "folder": story.home, "bundle": story.bundle}.items():
        if name in LINKS and isinstance(text, str) and text:
            rows.append((name, f"<code>{html.escape(hide_all(text))}</code>"))
    if story.checkpoints:
        newest = max(story.checkpoints, key=lambda event: (event["step"], event["time"]))
        count = len(story.checkpoints)
        where = f"{newest['folder']}: {count} published, the last of step {newest['step']}"
        rows.append(("checkpoints", html.escape(where)))
    cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"


def _run(story: Story) -> str:
    """What was run, by whom, on what."""
    begun = hide_all(story.begun)
    if not begun:
        return '<h2>What was run</h2><p class="absent">The job was not recorded.</p>'
    command = f"python -m pipelines.{begun['job']} {' '.join(begun['words'])}"
    said = [
        ("command", command),
        ("by", f"{begun['user']} on {begun['host']} in {begun['folder']}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in begun["versions"].items())),
        ("machine", ", ".join(f"{name} {value}" for name, value in begun["machine"].items())),
    ]
    changed = [(path, _short(old), _short(new)) for path, (old, new) in begun["changed"].items()]
    differs = table(("field", "in the recipe", "here"), changed) if changed else "<p>The recipe as it is.</p>"
    whole = html.escape(json.dumps(begun["recipe"], indent=2, ensure_ascii=False))
    return (
        f"<h2>What was run</h2>{table(('', ''), said)}{differs}"
        f"<details><summary>The whole recipe</summary><pre>{whole}</pre></details>"
    )


def _plots(story: Story) -> list[tuple[str, Callable[[], Any]]]:
    steps = [record for record in story.metrics if "validation" not in record]
    plots: list[tuple[str, Callable[[], Any]]] = [("Timeline", partial(_timeline, story))]
    if story.attempts:
        plots.append(("Where the time went", partial(_classes, story)))
    if steps:
        plots.append(("Loss", partial(_curve, story, "loss")))
        plots.append(("Gradient norm", partial(_curve, story, "grad_norm")))
        plots.append(("Learning rate", partial(_curve, story, "lr")))
    names = {name for record in story.metrics for name in record.get("validation", {})} - {"loss"}
    plots += [(f"Validation {name}", partial(_curve, story, name)) for name in sorted(names)]
    return plots


def _timeline(story: Story) -> Any:
    """Attempts and stages as bars, events as points, over seconds since the first event."""
    import plotly.graph_objects as go

    events = hide_all(story.events)
    if not events:
        raise ValueError("nothing was noted")
    start = float(events[0]["time"])
    bars = [
        (f"attempt {number}", each["started"] - start, each["ended"] - each["started"], f"{each['workers']} workers")
        for number, each in enumerate(story.attempts, 1)
    ]
    for event in events:
        if event["event"] == "stage_ended":
            bars.append((f"stage {event['stage']}", event["time"] - event["seconds"] - start, event["seconds"], ""))
    figure = go.Figure(layout={"xaxis_title": "seconds", "showlegend": False, "yaxis": {"autorange": "reversed"}})
    if bars:
        rows, begins, lengths, texts = zip(*bars, strict=True)
        figure.add_bar(y=rows, base=begins, x=lengths, text=texts, orientation="h")
    points = [event for event in events if event["event"] not in ("attempt", "stage_begun", "stage_ended", "worker")]
    figure.add_scatter(
        x=[event["time"] - start for event in points],
        y=[event["event"] for event in points],
        text=[html.escape(_facts(event)[:300]) for event in points],
        mode="markers",
        marker={"size": 9},
    )
    return figure


def _classes(story: Story) -> Any:
    """The ledger's classes, stacked, of each attempt and of all of the last job."""
    import plotly.graph_objects as go

    columns = [(f"attempt {number}", each["seconds"]) for number, each in enumerate(story.attempts, 1)]
    if story.book:
        columns.append(("the job", story.book["seconds"]))
    figure = go.Figure(layout={"barmode": "stack", "yaxis_title": "seconds"})
    for name in CLASSES:
        values = [seconds.get(name, 0.0) for _, seconds in columns]
        if any(values):
            figure.add_bar(name=name, x=[column for column, _ in columns], y=values)
    return figure


def _curve(story: Story, name: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": name})
    steps = [(each["step"], each[name]) for each in story.metrics if "validation" not in each and name in each]
    checks = [(each["step"], each["validation"][name]) for each in story.metrics if name in each.get("validation", {})]
    for label, points, mode in (("training", steps, "lines"), ("validation", checks, "lines+markers")):
        if points:
            every = -(-len(points) // POINTS)
            some = points[::-1][::every][::-1]  # the last one is among them
            figure.add_scatter(x=[x for x, _ in some], y=[y for _, y in some], name=label, mode=mode)
    if not figure.data:
        raise ValueError(f"no {name} was recorded")
    return figure


def _ledger(story: Story) -> str:
    if not story.book:
        return ""
    wall = story.book["wall_s"] or 1.0
    rows = [
        (name, f"{seconds:.2f}", f"{seconds / wall:.1%}", CLASSES.get(name, ""))
        for name, seconds in story.book["seconds"].items()
    ]
    return f"<h2>Ledger</h2>{table(('class', 'seconds', 'share', ''), rows)}"


def _failures(story: Story) -> str:
    said = []
    for event in story.events:
        if event["event"] == "failure":
            reasons = "\n\n".join(f"rank {rank}: {reason}" for rank, reason in hide_all(event["reasons"]).items())
            said.append(f"<h3>{html.escape(_moment(event['time']))}</h3><pre>{html.escape(reasons)}</pre>")
    for name, text in hide_all(story.stacks).items():
        said.append(f"<details><summary>Stacks: {html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    return f"<h2>Failures</h2>{''.join(said)}" if said else ""


def _events(story: Story) -> str:
    events = hide_all(story.events)
    kept = events if len(events) <= ROWS else [*events[: ROWS // 10], *events[-(ROWS - ROWS // 10) :]]
    rows = [(_moment(event["time"]), event["event"], event.get("host", ""), _facts(event)[:400]) for event in kept]
    more = f"<p>{len(events) - ROWS} of {len(events)} are left out.</p>" if len(events) > ROWS else ""
    return f"<h2>Events</h2>{table(('time (UTC)', 'event', 'host', ''), rows)}{more}"


def _logs(story: Story) -> str:
    if not story.logs:
        return ""
    logs = "".join(_log(story, log) for log in story.logs)
    return f'<h2>Logs</h2><input id="search" type="search" placeholder="lines that hold …">{logs}{SEARCH}'


def _log(story: Story, log: LogText) -> str:
    count = len(log.first) + len(log.last) + log.left_out
    name = f"{log.name} ({', '.join(log.titles)})" if log.titles else log.name
    gap = []
    if log.left_out:
        gap = [f"… {log.left_out} lines are left out: {story.home}/record/logs/{log.name} has them …"]
    text = html.escape(hide_all("\n".join([*log.first, *gap, *log.last])))
    return (
        f'<details class="log"><summary>{html.escape(name)}: {count} lines<span class="found"></span></summary>'
        f"<pre>\n{text}</pre></details>"
    )


def _facts(event: dict[str, Any]) -> str:
    """What an event says beside what, when and where."""
    left = {name: value for name, value in event.items() if name not in ("time", "event", "host", "pid", "recipe")}
    if event["event"] == "begun":
        left = {"job": event["job"], "words": " ".join(event["words"])}
    if event["event"] == "failure":
        ends = {rank: text.strip().splitlines()[-1] for rank, text in event["reasons"].items() if text.strip()}
        return "; ".join(f"rank {rank}: {text}" for rank, text in ends.items())
    return ", ".join(f"{name} {_short(value)}" for name, value in left.items() if value is not None)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
