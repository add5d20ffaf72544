"""`python -m pipelines.drill RECIPE --faults kill,hang,nan,disk_full,truncate --workers 2`: what each fault costs on
this cluster, and whether the run ends as if nothing had happened."""

import sys
from typing import Any

from heliostat.data.prepare import open_sources, prepare
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect
from heliostat.launch.drill import (
    Recovered,
    as_json,
    drill,
    parse_faults,
    plain_restart_s,
    recipe_of_drill,
    worst_replacement_s,
)
from pipelines.job import Job, main


def run(job: Job) -> dict[str, Any]:
    faults = parse_faults(job.options.faults)
    recipe = recipe_of_drill(job.recipe, job.options.workers)
    sources = open_sources(recipe)
    with connect(recipe, job.options.address):
        prepared, _ = prepare(recipe, run_on_ray, sources)
        recovered = drill(recipe, prepared.folder, job.run_dir, faults)
        worst = worst_replacement_s(recovered)
        plain = plain_restart_s(recipe, prepared.folder, job.run_dir) if worst is not None else None
    table(recovered, worst, plain)
    status = "done" if all(each.recovered for each in recovered) else "different"
    replaced = {"worst_replacement_s": worst, "plain_ray_restart_s": plain}
    return {"status": status, "faults": as_json(recovered)} | replaced


def table(recovered: list[Recovered], worst: float | None, plain: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("fault", "detect", "reschedule", "restore", "replay", "weights", "samples", "lost", "repeated")
    rows = Table(*columns, title="Against the undisturbed run (times in seconds)")
    equal = {True: "equal", False: "different", None: "more or fewer workers"}
    for each in recovered:
        seconds = (each.detect_s, each.reschedule_s, each.restore_s, each.replay_s)
        exact = (equal[each.weights_equal], equal[each.sample_order_equal], str(each.lost), str(each.repeated))
        rows.add_row(each.fault, *(f"{value:.2f}" for value in seconds), *exact)
    console = Console(stderr=True)
    console.print(rows)
    if worst is not None:
        console.print(
            f"A killed worker was replaced in {worst:.2f} s at worst; a plain loop under Ray Train took {plain:.2f} s."
        )


if __name__ == "__main__":
    sys.exit(main("drill", run))
