"""Grafana's dashboards, as what they ask of Prometheus.

`python -m heliostat.monitor.dashboards deploy/grafana` writes them as files.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh

from heliostat.recipe import write_atomically

HEIGHT, WIDTH = 8, 8
"""Of a panel, on Grafana's grid of 24 columns."""
SOURCE = DataSourceRef("prometheus", "${source}")


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """As Grafana calls it."""
    queries: dict[str, str]
    """PromQL by the legend of its series."""
    about: str = ""
    stacked: bool = False
    total: bool = False
    """A number over the range of time that is shown, in place of a curve."""
    needs_gpu: bool = False
    """A cluster without GPUs has nothing to show here."""


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    rows: dict[str, list[Panel]]
    choices: dict[str, str]
    """What one can narrow it down to, by the metric that has it as a label."""
    prices: tuple[str, ...] = ()
    """Numbers to be given; unknown until they are."""


def shares(metric: str, selected: str, by: str) -> dict[str, str]:
    """The median of a histogram's last five minutes, and what one in a hundred exceeds."""
    counts = f"sum by ({by}, le) (rate({metric}_bucket{{{selected}}}[5m]))"
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return {f"{legend} p{share * 100:.0f}": f"histogram_quantile({share}, {counts})" for share in (0.5, 0.99)}


RUN, SEARCH, ENDPOINT = 'run=~"$run"', 'search=~"$search"', 'application=~"$application"'
ATTEMPT, GPU = "{{run}} attempt {{attempt}}", "{{instance}} GPU {{GpuIndex}}"


def of_attempts(metric: str) -> dict[str, str]:
    return {ATTEMPT: f"max by (run, attempt) (ray_heliostat_train_{metric}{{{RUN}}})"}


TRAINING = Dashboard(
    "training",
    "Heliostat: training",
    {
        "Progress": [
            Panel("Optimizer step", "none", of_attempts("step")),
            Panel("Loss", "none", of_attempts("loss"), "Of the last step; bad steps have none."),
            Panel("Gradient norm", "none", of_attempts("grad_norm"), "Before clipping."),
            Panel(
                "Bad steps",
                "none",
                {"{{run}}": f"max by (run) (ray_heliostat_train_bad_steps{{{RUN}}})"},
                "Steps of the run that were not finite, or spiked.",
            ),
            Panel(
                "Age of the last checkpoint",
                "s",
                {"{{run}}": f"time() - max by (run) (ray_heliostat_train_last_checkpoint_time_s{{{RUN}}})"},
                "What a failure now would lose.",
            ),
        ],
        "Speed": [
            Panel("Tokens a second", "none", {ATTEMPT: f"heliostat:train_tokens_per_s{{{RUN}}}"}),
            Panel(
                "Model FLOPs utilization",
                "percentunit",
                {ATTEMPT: f"heliostat:train_mfu{{{RUN}}}"},
                "Of the GPUs' published peak.",
                needs_gpu=True,
            ),
            Panel(
                "Where the time goes",
                "percentunit",
                {"{{run}} {{class}}": f"heliostat:train_share{{{RUN}}}"},
                "By the ledger's classes, of the last half hour.",
                stacked=True,
            ),
        ],
        "Nodes": [
            Panel("Processors busy", "percent", {"{{instance}}": "ray_node_cpu_utilization"}),
            Panel("Memory used", "percentunit", {"{{instance}}": "ray_node_mem_used / ray_node_mem_total"}),
            Panel(
                "CPUs taken by tasks and actors",
                "percentunit",
                {"": 'sum(ray_resources{Name="CPU",State="USED"}) / sum(ray_resources{Name="CPU"})'},
            ),
            Panel("GPUs busy", "percent", {GPU: "ray_node_gpus_utilization"}, needs_gpu=True),
            Panel(
                "GPU memory used",
                "percentunit",
                {GPU: "ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available)"},
                needs_gpu=True,
            ),
        ],
    },
    {"run": "ray_heliostat_train_step"},
)

TUNING = Dashboard(
    "tuning",
    "Heliostat: search",
    {
        "Search": [
            Panel(
                "Trials by state",
                "none",
                {"{{search}} {{state}}": f"max by (search, state) (ray_heliostat_tune_trials{{{SEARCH}}})"},
                stacked=True,
            ),
            Panel(
                "Best value",
                "none",
                {"{{search}} {{metric}}": f"max by (search, metric) (ray_heliostat_tune_best_value{{{SEARCH}}})"},
                "Of the first objective, over trials that are done.",
            ),
            Panel(
                "Trials an hour",
                "none",
                {
                    "{{search}}": "3600 * sum by (search) "
                    f'(rate(ray_heliostat_tune_trials{{{SEARCH},state!="running"}}[10m]))'
                },
                "That ended, however they did.",
            ),
        ]
    },
    {"search": "ray_heliostat_tune_trials"},
)

SERVING = Dashboard(
    "serving",
    "Heliostat: endpoints",
    {
        "Requests": [
            Panel(
                "Requests a second",
                "reqps",
                {
                    "{{application}} {{outcome}}": "sum by (application, outcome) "
                    f"(rate(ray_heliostat_serve_requests_total{{{ENDPOINT}}}[2m]))"
                },
                "By outcome: answered, refused (4xx), failed.",
            ),
            Panel(
                "Latency",
                "s",
                shares("ray_heliostat_serve_latency_s", ENDPOINT, "application"),
                "Of requests that were answered, to their last byte.",
            ),
            Panel(
                "Share of requests that failed",
                "percentunit",
                {"": "heliostat:serve_errors:share5m or 0 * sum(rate(ray_heliostat_serve_requests_total[5m]))"},
                "Of those that were not refused, in the last five minutes.",
            ),
        ],
        "Load": [
            Panel(
                "Requests in work",
                "none",
                {
                    "{{application}} {{deployment}}": "sum by (application, deployment) "
                    f"(ray_serve_replica_processing_queries{{{ENDPOINT}}})"
                },
            ),
            Panel(
                "Requests that wait for a replica",
                "none",
                {
                    "{{application}} {{deployment}}": "sum by (application, deployment) "
                    f"(ray_serve_deployment_queued_queries{{{ENDPOINT}}})"
                },
            ),
            Panel(
                "Replicas that are healthy",
                "none",
                {
                    "{{application}} {{deployment}}": "sum by (application, deployment) "
                    f"(ray_serve_deployment_replica_healthy{{{ENDPOINT}}})"
                },
            ),
            Panel(
                "Time until a replica is ready",
                "s",
                {
                    "{{application}} {{deployment}}": "sum by (application, deployment) "
                    f"(ray_serve_replica_startup_latency_ms_sum{{{ENDPOINT}}}) / 1000 / "
                    "sum by (application, deployment) "
                    f"(ray_serve_replica_startup_latency_ms_count{{{ENDPOINT}}})"
                },
                "From its being wanted until its model has answered: the mean of all that were started.",
            ),
            Panel(
                "Inputs of a forward pass",
                "none",
                shares("ray_heliostat_serve_batch_size", ENDPOINT, "application"),
                "Of endpoints that batch requests.",
            ),
        ],
        "Language models": [
            Panel(
                "Tokens a second",
                "none",
                {
                    "{{application}} {{kind}}": "sum by (application, kind) "
                    f"(rate(ray_heliostat_serve_tokens_total{{{ENDPOINT}}}[2m]))"
                },
                "Of prompts and of completions, counted as answers end.",
            ),
            Panel("Time to the first token", "s", shares("ray_heliostat_serve_first_token_s", ENDPOINT, "application")),
        ],
        "Drift": [
            Panel(
                "Samples a second",
                "none",
                {
                    "{{application}} {{outcome}}": "sum by (application, outcome) "
                    f"(rate(ray_heliostat_serve_samples_total{{{ENDPOINT}}}[2m]))"
                },
                "Of inputs, for the job drift: kept, or dropped where the disk does not keep up.",
            ),
            Panel(
                "Population stability index",
                "none",
                {"{{model}} {{feature}}": "max by (model, feature) (ray_heliostat_drift_psi)"},
                "Of what is served against validation rows.",
            ),
            Panel(
                "Distance of embeddings",
                "none",
                {"{{model}}": "max by (model) (ray_heliostat_drift_mmd)"},
                "The squared maximum mean discrepancy from validation rows.",
            ),
            Panel(
                "Features that have drifted",
                "none",
                {"{{model}}": "sum by (model) (max by (model, feature) (ray_heliostat_drift_found))"},
            ),
        ],
    },
    {"application": "ray_heliostat_serve_requests_total"},
)

NODE_HOURS = "sum_over_time(count(ray_node_cpu_count)[$__range:15s]) * 15 / 3600"
IN_RANGE = "In the range of time that is shown."
ESTIMATE = "Estimated from the time that processors and GPUs were busy and the watts declared in the recipe."
COST = Dashboard(
    "cost",
    "Heliostat: cost and energy",
    {
        "Energy": [
            Panel(
                "Power of runs (estimated)",
                "watt",
                {"{{run}}": f"sum by (run) (rate(ray_heliostat_train_joules{{{RUN}}}[2m]))"},
                ESTIMATE,
                stacked=True,
            ),
            Panel(
                "Energy of runs (estimated)",
                "joule",
                {"{{run}}": f"sum by (run) (last_over_time(ray_heliostat_train_joules{{{RUN}}}[$__range]))"},
                ESTIMATE,
                total=True,
            ),
            Panel(
                "Energy of a token (estimated)",
                "joule",
                {
                    "{{run}}": f"sum by (run) (rate(ray_heliostat_train_joules{{{RUN}}}[2m])) "
                    "/ sum by (run) (heliostat:train_tokens_per_s > 0)"
                },
                "In training.",
            ),
            Panel(
                "Energy of searches (estimated)",
                "joule",
                {"{{search}}": "max by (search) (last_over_time(ray_heliostat_tune_joules[$__range]))"},
                ESTIMATE,
                total=True,
            ),
            Panel(
                "Power of GPUs (measured)",
                "watt",
                {GPU: "ray_node_gpu_power_milliwatts / 1000"},
                "As the driver tells it.",
                needs_gpu=True,
            ),
        ],
        "Machines": [
            Panel("Nodes", "none", {"": "count(ray_node_cpu_count)"}),
            Panel("Node hours", "none", {"": NODE_HOURS}, IN_RANGE, total=True),
            Panel(
                "GPU hours",
                "none",
                {"": "sum_over_time(sum(ray_node_gpus_available)[$__range:15s]) * 15 / 3600"},
                IN_RANGE,
                total=True,
                needs_gpu=True,
            ),
            Panel(
                "Cost of nodes",
                "currencyUSD",
                {"": f"{NODE_HOURS} * $usd_per_node_hour"},
                f"{IN_RANGE} Give the price above; the doctor tells list prices of a cluster file.",
                total=True,
            ),
        ],
    },
    {"run": "ray_heliostat_train_step"},
    ("usd_per_node_hour",),
)

DASHBOARDS = (TRAINING, TUNING, SERVING, COST)


def render(board: Dashboard) -> str:
    """A dashboard as Grafana imports it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(f"heliostat-{board.name}")
        .tags(["heliostat"])
        .time("now-1h", "now")
        .refresh("10s")
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for label, metric in board.choices.items():
        built.with_variable(
            dashboard.QueryVariable(label)
            .datasource(SOURCE)
            .query(f"label_values({metric}, {label})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
            .current(VariableOption(text="All", value="$__all"))
        )
    for price in board.prices:
        built.with_variable(dashboard.TextBoxVariable(price).default_value("NaN"))
    number = itertools.count(1)
    for title, panels in board.rows.items():
        built.with_row(dashboard.Row(title).id(next(number)))
        for panel in panels:
            built.with_panel(_panel(panel).id(next(number)))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.total:
        built = stat.Panel()
    else:
        below = common.VizLegendOptions().show_legend(True)
        below = below.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        built = timeseries.Panel().legend(below)
        if panel.stacked:
            built.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    built.title(panel.title).description(panel.about).unit(panel.unit)
    built.datasource(SOURCE).height(HEIGHT).span(WIDTH)
    for letter, (legend, query) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        asked = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(letter).datasource(SOURCE)
        built.with_target(asked.instant() if panel.total else asked.range())
    return built


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for board in DASHBOARDS:
        write_atomically(folder / f"{board.name}.json", render(board))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
