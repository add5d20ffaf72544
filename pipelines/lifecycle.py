"""`python -m pipelines.lifecycle RECIPE [--keep] [--fresh] [--full]`: prepare → tune → train → evaluate → gate →
register → deploy → ask. Stages whose inputs have not changed are not done again."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heliostat
from heliostat.data.loader import open_split
from heliostat.data.prepare import Prepared, open_sources, prepare
from heliostat.evaluate import gain
from heliostat.launch.batch import run_on_ray
from heliostat.launch.cluster import connect, dashboard
from heliostat.launch.train import fit
from heliostat.launch.tune import STUDY_FILE
from heliostat.launch.tune.search import search
from heliostat.launch.tune.space import row_settings
from heliostat.models import bundle as bundles
from heliostat.recipe import Recipe, build, override, write_atomically
from heliostat.record import say
from heliostat.registry import champion, promote, register
from heliostat.tracking import log_run, start_server, tracking_uri
from pipelines.evaluate import as_trained, evaluate_split
from pipelines.job import Job, main
from pipelines.tune import check_search
from serve.application import check_gpus, deploy

SHAPING = ("task", "seed", "model", "data", "optimizer", "schedule", "training", "parallelism")
"""Sections of a recipe that shape the trained weights."""


class Stages:
    """Runs stages in turn, keeps their seconds, and remembers their results by what went in."""

    def __init__(self, recipe: Recipe, fresh: bool) -> None:
        self.folder = recipe.storage_path / "stages"
        self.fresh, self.rows = fresh, list[dict[str, Any]]()

    def __call__(self, name: str, do: Callable[[], dict[str, Any]], key: str = "") -> dict[str, Any]:
        """`key`: a digest of the inputs; empty: always done."""
        started = time.perf_counter()
        say("stage_begun", stage=name)
        memo = self.folder / f"{name}-{heliostat.__version__}-{key}.json"
        done = key and not self.fresh and memo.is_file()
        result = json.loads(memo.read_text()) if done else do()
        if done and "bundle" in result and not Path(result["bundle"]).is_dir():
            done, result = False, do()
        if key and not done and result.get("status") != "interrupted":
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(memo, json.dumps(result))
        seconds = time.perf_counter() - started
        self.rows.append(
            {
                "stage": name,
                "seconds": round(seconds, 1),
                "unchanged": bool(done),
                "compute_s": None if done else result.get("compute_s"),
            }
        )
        plain = {key: value for key, value in result.items() if isinstance(value, str | int | float | bool)}
        say("stage_ended", stage=name, seconds=round(seconds, 3), unchanged=bool(done), result=plain)
        print(f"{name}: {'unchanged, not done again' if done else f'{seconds:.0f} s'}", flush=True)
        return result


def run(job: Job) -> dict[str, Any]:
    recipe, options = job.recipe, job.options
    if options.full:
        recipe = override(
            recipe,
            {
                "model.freeze_layers": 0,
                "schedule.epochs": 2 * recipe.schedule.epochs,
                "tune.num_trials": 3 * recipe.tune.num_trials,
                "tune.limit": recipe.tune.limit and 4 * recipe.tune.limit,
                "tune.validation_limit": None,
            },
        )
    if recipe.tune.space:
        check_search(job)
    sources = open_sources(recipe)
    stages = Stages(recipe, options.fresh)
    kept: list[Prepared] = []

    def do_prepare() -> dict[str, Any]:
        prepared, made = prepare(recipe, run_on_ray, sources)
        kept.append(prepared)
        return {"folder": str(prepared.folder), "made": made, "rows": prepared.meta["rows"]}

    def do_tune() -> dict[str, Any]:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        return search(recipe, kept[0], job.run_dir, resume=(job.run_dir / STUDY_FILE).exists())

    def do_train() -> dict[str, Any]:
        outcome = fit(best, kept[0].folder, job.run_dir)
        seconds = outcome.get("ledger", {}).get("seconds", {})
        return outcome | {"compute_s": round(seconds.get("step", 0.0) + seconds.get("evaluation", 0.0), 1)}

    def do_evaluate() -> dict[str, Any]:
        metrics, _ = evaluate_split(bundle, kept[0], "validation", bfloat16)
        metrics |= evaluate_split(bundle, kept[0], "test", bfloat16)[0]
        bundles.add_metrics(bundle, metrics)
        return {"metrics": metrics}

    with connect(recipe, options.address, options.keep):
        connected = time.perf_counter()
        check_gpus(recipe.deploy)
        stages("prepare", do_prepare)
        inputs = kept[0].fingerprint
        best = recipe
        if recipe.tune.space:
            best = build(stages("tune", do_tune, f"{inputs}-{recipe.digest()}")["best_recipe"])
            if row_settings(best) != row_settings(recipe):
                kept[0], _ = prepare(best, run_on_ray)  # as they were for the trial
                inputs = kept[0].fingerprint
        trained = stages(
            "train",
            do_train,
            f"{inputs}-{best.digest(*SHAPING)}",
        )
        if trained["status"] in ("failed", "interrupted"):
            return trained
        bundle = bundles.read(Path(trained["bundle"]))
        bfloat16 = as_trained(recipe)
        metrics = stages("evaluate", do_evaluate, bundle.digest[:12])["metrics"]
        log_id: list[str | None] = []
        decision = stages("gate", lambda: gate(recipe, bundle, kept[0], bfloat16))
        version = stages("register", lambda: do_register(recipe, bundle, decision, metrics, job.run_dir, log_id))
        served = champion(recipe)
        endpoint, answers, pages = None, [], {"mlflow": tracking_uri(recipe)}
        if served is not None:
            stages("deploy", lambda: {"endpoint": deploy(served.path, str(served.version), recipe.deploy, recipe.name)})
            endpoint = f"http://{recipe.deploy.host}:{recipe.deploy.port}"
            answers = stages("ask", lambda: ask(endpoint, bundle))["answers"]
        if options.keep:
            pages |= {"mlflow": page(recipe), "dashboard": dashboard()}
    table(stages.rows, metrics, decision, endpoint, answers, pages, options.keep)
    return {
        "status": "done",
        "promoted": decision["better"],
        "gate": decision,
        "version": version["version"],
        "champion": served.version if served else None,
        "endpoint": endpoint if options.keep else None,
        "answers": answers,
        "stages": stages.rows,
        "bundle": str(bundle.path),
        "metrics": metrics,
        "best_recipe": best.model_dump(mode="json"),
        "compute_s": trained.get("compute_s"),
        "connected_s": round(time.perf_counter() - connected, 1),
    }


def gate(recipe: Recipe, bundle: bundles.Bundle, prepared: Prepared, bfloat16: bool) -> dict[str, Any]:
    """Against the champion, or for the first model against the task's baseline, on the validation split."""
    _, challenger = evaluate_split(bundle, prepared, "validation", bfloat16)
    task, current = bundle.task(), champion(recipe)
    if current is not None and bundles.read(current.path).digest == bundle.digest:
        return {"against": f"champion version {current.version}", "better": True, "same": True}
    if current is not None:
        against = f"champion version {current.version}"
        _, other = evaluate_split(bundles.read(current.path), prepared, "validation", bfloat16)
    else:
        found = task.baseline(open_split(prepared.folder, "train"), open_split(prepared.folder, "validation"))
        if found is None:
            return {"against": "nothing", "better": True}
        other, against = found.row_sums, f"baseline ({found.name})"
    return {"against": against, "same": False} | gain(
        task, challenger, other, recipe.gate.confidence, recipe.gate.resamples
    )


def do_register(
    recipe: Recipe,
    bundle: bundles.Bundle,
    decision: dict[str, Any],
    metrics: dict[str, Any],
    run_dir: Path,
    log_id: list[str | None],
) -> dict[str, Any]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    run_id = log_run(recipe, bundle.path.parent, metrics=numbers)
    version = register(recipe, bundle, run_id, {"promoted": str(decision["better"]).lower()})
    if decision["better"]:
        promote(recipe, version)
        say("promoted", version=version.version, bundle=str(version.path))
    return {"version": version.version}


def ask(endpoint: str, bundle: bundles.Bundle) -> dict[str, Any]:
    import httpx

    task = bundle.task()
    sentences = ["What a wonderful surprise, I would buy it again.", "It broke after a day and nobody answered."]
    inputs = [{"text": text} for text in sentences] if set(task.example()) == {"text"} else [task.example()]
    answer = httpx.post(f"{endpoint}/predict", json={"inputs": inputs}, timeout=60)
    answer.raise_for_status()
    return {
        "answers": [
            {"input": str(next(iter(item.values())))[:60], **{k: v for k, v in prediction.items() if k != "scores"}}
            for item, prediction in zip(inputs, answer.json()["predictions"], strict=True)
        ]
    }


def page(recipe: Recipe) -> str:
    """MLflow's page on a port of its own; its process id is kept for `make stop`."""
    if recipe.tracking.uri:
        return recipe.tracking.uri
    port = recipe.deploy.port + 1
    process = start_server(recipe, port)
    write_atomically(recipe.storage_path / "mlflow.pid", str(process.pid))
    return f"http://127.0.0.1:{port}"


def table(
    rows: list[dict[str, Any]],
    metrics: dict[str, Any],
    decision: dict[str, Any],
    endpoint: str | None,
    answers: list[dict[str, Any]],
    pages: dict[str, str],
    keep: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    stages = Table("stage", "seconds", "of these compute", title="Lifecycle")
    for row in rows:
        compute = "" if row["compute_s"] is None else str(row["compute_s"])
        stages.add_row(row["stage"], "unchanged" if row["unchanged"] else str(row["seconds"]), compute)
    console.print(stages)
    for name, value in metrics.items():
        if not name.endswith("confusion"):
            console.print(f"{name}: {value}")
    console.print(
        f"gate: {'promoted' if decision['better'] else 'not promoted'} against {decision['against']} {decision}"
    )
    for answer in answers:
        console.print(str(answer))
    console.print(f"MLflow: {pages['mlflow']}")
    if keep:
        console.print(
            f"endpoint: {endpoint}/docs\nRay dashboard: {pages['dashboard']} (asks for the token that "
            "`ray get-auth-token` prints)\n`make stop` ends all of it"
        )


if __name__ == "__main__":
    sys.exit(main("lifecycle", run))
