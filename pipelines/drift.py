"""`python -m pipelines.drift RECIPE [--bundle FOLDER] [--since 24h] [--every-s 3600] [--on-drift retrain]`: whether
what an endpoint is asked and answers differs from the validation rows of its bundle."""

import dataclasses
import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.data.prepare import prepare
from heliostat.evaluate import prepared_rows
from heliostat.hardware import cannot_listen, this_machine
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect, starts_here
from heliostat.models import bundle as bundles
from heliostat.monitor.drift import EMBEDDED_ROWS, Finding, Observed, compare
from heliostat.monitor.drift_report import HEADS, cells, render
from heliostat.monitor.served import Served, bundles_of, folder_of, read
from heliostat.predictor import Predictor, loading
from heliostat.recipe import Recipe, Refused, write_atomically
from pipelines import lifecycle
from pipelines.answer import end_on_signals
from pipelines.job import Job, main
from pipelines.register import chosen_bundle

REPORT, PAGE = "report.json", "report.html"
UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86_400.0}
TOLD_S = 5.0
"""Ray forgets a gauge that it has not heard of for 20 s."""
SHOWN = 20
"""Rows of the table that people read; the page has all."""


def since_s(text: str) -> float:
    """The time (Unix) that `--since` names. Raises Refused for none."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text):
        return time.time() - float(found[1]) * UNITS_S[found[2]]
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError as error:
        raise Refused("since", f"{text!r} is no time", "24h, 7d, or 2026-01-31T08:00") from error


def observed(predictor: Predictor, rows: pa.Table, predictions: list[dict[str, Any]], seed: int) -> Observed:
    """What is compared of prepared rows and their predictions."""
    columns = dict(predictor.task.watched(rows))
    for name, value in predictions[0].items():
        kind: Any = np.str_ if isinstance(value, str) else np.float64
        if isinstance(value, str | int | float):
            columns[f"predicted_{name}"] = np.array([prediction[name] for prediction in predictions], kind)
    some = np.random.default_rng(seed).permutation(rows.num_rows)[:EMBEDDED_ROWS]
    return Observed(columns, predictor.embeddings(rows.take(pa.array(some))))


def look(job: Job) -> dict[str, Any]:
    """Compare once, and write what was found to the run's folder."""
    recipe, settings = job.recipe, job.recipe.drift
    bundle = bundles.read(chosen_bundle(job))
    folder = folder_of(bundle, recipe.deploy)
    validation = prepared_rows(bundle, recipe.storage)
    served = read(folder, since_s(job.options.since), settings.max_rows, recipe.seed)
    drift: bool | None = None
    findings: list[Finding] = []
    sides = (Observed({}), Observed({}))
    if served.total < settings.min_rows:
        others = ", ".join(name for name in bundles_of(folder.parent) if name != folder.name)
        said = f"{served.total} rows are kept in {folder}, {settings.min_rows} are needed"
        said += f"; there are some of bundles {others}" if others else "; is deploy.sample_share above 0?"
    elif validation.num_rows < settings.min_rows:
        said = f"the bundle has {validation.num_rows} validation rows, {settings.min_rows} are needed"
    else:
        sides = both_sides(recipe, bundle, validation, served)
        findings = compare(*sides, settings, recipe.seed)
        drifted = [finding.name for finding in findings if finding.drifted]
        drift, said = bool(drifted), f"{len(drifted)} of {len(findings)} features have drifted"
        said += f": {', '.join(drifted[:SHOWN])}" if drifted else ""
    found = {
        "drift": drift,
        "said": said,
        "bundle": str(bundle.path),
        "rows": {"validation": validation.num_rows, "served": served.total},
        "from": _iso(served.first_s) if served.total else None,
        "to": _iso(served.last_s) if served.total else None,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    title = f"Drift of {recipe.name}, bundle {bundle.digest[:12]}"
    job.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(job.run_dir / REPORT, json.dumps(found, indent=2) + "\n")
    write_atomically(job.run_dir / PAGE, render(title, said, findings, *sides))
    show(title, said, findings)
    return found | {"report": str(job.run_dir / PAGE)}


def both_sides(
    recipe: Recipe, bundle: bundles.Bundle, validation: pa.Table, served: Served
) -> tuple[Observed, Observed]:
    """The validation rows as a replica would answer them, and the served ones as they were answered."""
    settings = recipe.deploy
    bfloat16, load = settings.precision == "bfloat16", loading(settings)
    predictor = Predictor(bundle, threads=this_machine().cpus, bfloat16=bfloat16, load=load)
    chosen = np.random.default_rng(recipe.seed).permutation(validation.num_rows)[: recipe.drift.max_rows]
    reference = validation.take(pa.array(np.sort(chosen)))
    return (
        observed(predictor, reference, predictor.predict_rows(reference), recipe.seed),
        observed(predictor, predictor.rows(served.inputs), served.predictions, recipe.seed),
    )


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


def show(title: str, said: str, findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    if findings:
        table = Table(*HEADS, title=title)
        for finding in findings[:SHOWN]:
            table.add_row(*cells(finding))
        console.print(table)
    console.print(f"{title}: {said}", highlight=False, soft_wrap=True)


class Gauges:
    """What Ray exports to Prometheus of a model's drift, each name with `ray_` before it."""

    def __init__(self, model: str) -> None:
        from ray.util.metrics import Gauge

        self.model = {"model": model}
        self.rows = Gauge("heliostat_drift_rows", "Served rows that were kept and looked at", ("model",))
        self.psi = Gauge("heliostat_drift_psi", "Population stability index", ("model", "feature"))
        self.mmd = Gauge("heliostat_drift_mmd", "Squared maximum mean discrepancy of embeddings", ("model",))
        self.found = Gauge("heliostat_drift_found", "1: it has drifted", ("model", "feature"))

    def tell(self, found: dict[str, Any]) -> None:
        """What `look` has found. Ray has to hear of it again and again."""
        self.rows.set(found["rows"]["served"], self.model)
        for finding in found["findings"]:
            tags = self.model | {"feature": finding["name"]}
            self.found.set(float(finding["drifted"]), tags)
            if finding["psi"] is None:
                self.mmd.set(finding["distance"], self.model)
            else:
                self.psi.set(finding["psi"], tags)


def retrain(job: Job, found: dict[str, Any], number: int) -> dict[str, Any]:
    """The lifecycle again, in a run of its own: what it trains replaces the champion if it passes the gate. Not without
    new rows, of which the same model would come."""
    prepared, _ = prepare(job.recipe, run_on_ray)
    bundle = bundles.read(Path(found["bundle"]), verify_files=False)
    if prepared.fingerprint == bundle.card["data"]["fingerprint"]:
        print(f"not trained again: the rows of {job.recipe.name} are those that its model was trained on", flush=True)
        return {"status": "no new rows"}
    run_dir = job.run_dir.with_name(f"{job.run_dir.name}-retrain-{number}")
    outcome = lifecycle.run(dataclasses.replace(job, run_dir=run_dir))
    kept = ("status", "promoted", "gate", "version", "champion", "bundle", "metrics")
    return {name: outcome[name] for name in kept if name in outcome} | {"run_dir": str(run_dir)}


def watch(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Go on from what was found first: retrain where that is asked for, and with `--every-s` look again, until Ctrl-C.
    Returns what was found last, and what became of the last retraining."""
    gauges, number, retrained = Gauges(job.recipe.name), 0, dict[str, Any]()
    end_on_signals()
    try:
        while True:
            if found["drift"] and job.options.on_drift == "retrain":
                number += 1
                retrained = {"retrain": retrain(job, found, number)}
                if (status := retrained["retrain"]["status"]) in ("failed", "interrupted"):
                    return found | retrained | {"status": status}
            if not job.options.every_s:
                return found | retrained
            again = time.monotonic() + job.options.every_s
            while (left := again - time.monotonic()) > 0:
                gauges.tell(found)
                time.sleep(min(TOLD_S, left))
            found = look(job)
    except KeyboardInterrupt:
        return found | retrained


def check(job: Job) -> None:
    """Refuse what could not be done in the end, before anything is."""
    options, deploy = job.options, job.recipe.deploy
    since_s(options.since)
    if options.every_s < 0:
        raise Refused("every_s", f"{options.every_s:g} is below 0", "0: look once")
    if options.on_drift != "retrain":
        return
    if not deploy.sample_share:
        reason = "a new model would be deployed without samples of what it is asked"
        raise Refused("deploy.sample_share", reason, "give it here, too")
    import ray

    here = starts_here(options.address) and not options.keep and not ray.is_initialized()
    if here and (reason := cannot_listen(deploy.host, deploy.port)):
        raise Refused(
            "deploy.port",
            f"{deploy.host}:{deploy.port} is where a new model would be deployed, and cannot be used: {reason}",
            "name the cluster that the endpoint is on by --address, or by --keep if it was kept",
        )


def run(job: Job) -> dict[str, Any]:
    check(job)
    found = look(job)  # before Ray starts: it may not be needed
    if job.options.every_s or (found["drift"] and job.options.on_drift == "retrain"):
        with connect(job.recipe, job.options.address, job.options.keep):
            found = watch(job, found)
    drifted = sum(finding["drifted"] for finding in found["findings"])
    return found | {"metrics": {"served_rows": found["rows"]["served"], "drifted": drifted}}


if __name__ == "__main__":
    sys.exit(main("drift", run))
