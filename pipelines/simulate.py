"""`python -m pipelines.simulate TRACE [--gpus 2048] …`: a trace of jobs under the scheduler's policy, beside FIFO and
backfill. TRACE is an `.swf`, `.json` (Philly's) or `.csv` file, or `synthetic`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from heliostat.recipe import Refused
from heliostat.scheduling.baselines import easy_backfill, fifo
from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.simulate import Cluster, Outcome, simulate
from heliostat.scheduling.state import Policy
from heliostat.scheduling.traces import read, synthetic
from pipelines.answer import answer
from pipelines.schedule import TENANTS, tenants

POLICIES: dict[str, Policy] = {"fifo": fifo, "easy_backfill": easy_backfill, "fair_share": fair_share}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("trace")
    parser.add_argument("--gpus", type=int, default=2048)
    parser.add_argument("--gpus-per-node", type=int, default=Cluster.gpus_per_node)
    parser.add_argument("--start-s", type=float, default=Cluster.start_s, help="until a job makes steps")
    parser.add_argument("--checkpoint-s", type=float, default=Cluster.checkpoint_s, help="until its place is free")
    parser.add_argument("--min-run-s", type=float, default=Cluster.min_run_s, help="nobody is displaced earlier")
    parser.add_argument("--every-s", type=float, default=Cluster.decide_every_s, help="between two decisions")
    parser.add_argument("--tenants", type=Path, help=f"JSON: {TENANTS}")
    parser.add_argument("--days", type=float, default=1.0, help="of a synthetic trace")
    parser.add_argument("--load", type=float, default=0.9, help="of a synthetic trace: GPUs asked for, by those there")
    parser.add_argument("--elastic", type=float, default=0.3, help="of a synthetic trace: the share of elastic jobs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    for name in ("gpus", "gpus_per_node", "days", "load"):
        if getattr(options, name) <= 0:
            raise Refused(name, f"{getattr(options, name):g} is too little", "a number above 0")
    if options.trace == "synthetic":
        trace = synthetic(options.days, options.gpus, options.load, options.elastic, options.seed)
    else:
        trace = read(Path(options.trace).expanduser())
    cluster = Cluster(
        options.gpus,
        options.gpus_per_node,
        options.start_s,
        options.checkpoint_s,
        options.every_s,
        options.min_run_s,
    )
    of, outcomes = tenants(options.tenants), dict[str, dict[str, Any]]()
    for name, policy in POLICIES.items():
        print(f"{len(trace)} jobs on {options.gpus} GPUs under {name} …", flush=True)
        outcomes[name] = figures(simulate(trace, cluster, policy, of))
    table(outcomes)
    return {"jobs": len(trace), "gpus": options.gpus, "policies": outcomes}


def figures(outcome: Outcome) -> dict[str, Any]:
    slowest, mean = max(outcome.decide_s), sum(outcome.decide_s) / len(outcome.decide_s)
    kept = {name: value for name, value in vars(outcome).items() if isinstance(value, int | float)}
    kept |= {"mean_decision_ms": 1000 * mean, "slowest_decision_ms": 1000 * slowest}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}


def table(outcomes: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = Table("", *outcomes)
    for name in next(iter(outcomes.values())):
        rows.add_row(name, *(f"{each[name]:,.3f}".removesuffix(".000") for each in outcomes.values()))
    Console(stderr=True).print(rows)


def main(words: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if words is None else words)
    return answer("simulate", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
