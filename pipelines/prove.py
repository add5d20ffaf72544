"""`python -m pipelines.prove RECIPE_OR_CONFIG --layouts "fsdp=2;pipeline=2" --workers 2`: does a layout train like one
process? On this machine, without Ray, with a small model of the same kind."""

import sys
from typing import Any

from heliostat.train.prove import Verdict, as_json, parse_layouts, prove
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    layouts = parse_layouts(job.options.layouts, job.options.workers)
    verdicts = prove(job.recipe, layouts, job.options.workers)
    table(verdicts)
    statuses = {verdict.status for verdict in verdicts}
    status = next((status for status in ("different", "refused") if status in statuses), "done")
    return {"status": status} | as_json(verdicts)


def table(verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("layout", "", "loss", "gradient norm", "routing", "peak MiB a rank", "bytes a step")
    rows = Table(*columns, title="Against one process")
    for verdict in verdicts:
        if verdict.status == "refused":
            rows.add_row(verdict.layout, "refused", "", "", "", "", verdict.reason)
            continue
        sent = ", ".join(f"{kind} {count}" for kind, count in verdict.bytes_by_collective.items())
        differences = (f"{verdict.loss_difference:.1e}", f"{verdict.grad_norm_difference:.1e}")
        agreement = "" if verdict.routing_agreement is None else f"{verdict.routing_agreement:.2%}"
        peak = str(max(verdict.peak_bytes) >> 20)
        rows.add_row(verdict.layout, verdict.status, *differences, agreement, peak, sent)
    Console(stderr=True).print(rows)


if __name__ == "__main__":
    sys.exit(main("prove", run))
