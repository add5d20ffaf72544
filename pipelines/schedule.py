"""`python -m pipelines.schedule submit RECIPE [--tenant NAME] [--priority N] [--field value …]`, `list`, `cancel NAME`:
the queue of a cluster. `run` works it off: as a job of Ray's, on a machine of the cluster with `--address auto`, or
without it on a cluster on this machine, which `make stop` ends."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.recipe import Recipe, Refused
from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.queue import Queue, Status, entry_of
from heliostat.scheduling.state import Rules, Tenant
from pipelines.answer import answer, end_on_signals

TENANTS = '{"NAME": {"weight": 2, "max_gpus": 64}, …}'
"""A file of them."""


def parse(words: list[str]) -> tuple[argparse.Namespace, Recipe | None]:
    """What is to be done, and for `submit` the recipe with its overrides. Raises Refused."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit", allow_abbrev=False, help="a recipe to train")
    submit.add_argument("--tenant", default="default")
    submit.add_argument("--priority", type=int, default=0, help="among the tenant's jobs; higher ones go first")
    submit.add_argument("--estimate-s", type=float, help="what it takes, where somebody knows")
    cancel = commands.add_parser("cancel", allow_abbrev=False, help="a job that waits, or runs: it writes a checkpoint")
    cancel.add_argument("name")
    run = commands.add_parser("run", allow_abbrev=False, help="until Ctrl-C; jobs that run go on")
    run.add_argument("--address", default="", help="of the Ray cluster; a submitted job knows it")
    run.add_argument("--tenants", type=Path, help=f"JSON: {TENANTS}")
    run.add_argument("--every-s", type=float, default=5.0, help="between two decisions")
    run.add_argument("--min-run-s", type=float, default=Rules.min_run_s, help="nobody is displaced earlier")
    run.add_argument("--restart-s", type=float, default=Rules.restart_s, help="to grow must save a run more than this")
    run.add_argument("--grace-s", type=int, default=300, help="for a checkpoint; then a job is killed")
    run.add_argument("--until-empty", action="store_true", help="end when no job is left")
    for each in (commands.add_parser("list", allow_abbrev=False, help="all jobs"), cancel, run):
        each.add_argument("--storage", default=Recipe.model_fields["storage"].default)
    if words[:1] != ["submit"] or {"-h", "--help"} & set(words[1:2]):
        return parser.parse_args(words), None
    from pipelines.job import Options
    from pipelines.job import parse as parse_recipe

    own, rest = parser.parse_known_args(words)
    recipe, options = parse_recipe(rest)
    if options != Options(run_name=options.run_name):
        raise Refused("arguments", f"{options} is not for jobs of the queue", "fields of the recipe, and --run-name")
    own.name = options.run_name
    return own, recipe


def tenants(file: Path | None) -> dict[str, Tenant]:
    """Raises Refused."""
    if file is None:
        return {}
    try:
        read = {str(name): Tenant(**given) for name, given in json.loads(file.read_text()).items()}
        wrong = [name for name, tenant in read.items() if not tenant.weight > 0]
    except OSError as error:
        raise Refused("tenants", f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused("tenants", f"{file}: {error}", TENANTS) from error
    if wrong:
        raise Refused("tenants", f"{wrong[0]} has no weight", "a number above 0")
    return read


def submit(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    queue = Queue(recipe.storage_path)
    entry = entry_of(recipe, options.name, options.tenant, options.priority, options.estimate_s)
    queue.submit(recipe, entry)
    print(f"{entry.name} waits in {queue.folder}")
    return {"name": entry.name, "queue": str(queue.folder)}


def show(queue: Queue) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "tenant", "priority", "status", "workers", "starts", "reason")
    jobs = []
    for entry in queue.entries():
        record = queue.record(entry.name)
        workers = sum(record.held.values())
        table.add_row(
            entry.name,
            entry.tenant,
            str(entry.priority),
            record.status,
            str(workers or ""),
            str(record.attempt),
            record.reason,
        )
        jobs.append(
            {"name": entry.name, "tenant": entry.tenant, "priority": entry.priority, "workers": workers}
            | {name: getattr(record, name) for name in ("status", "reason", "attempt", "preemptions", "resizes")}
        )
    Console(stderr=True).print(table)
    return {"jobs": jobs}


def work(options: argparse.Namespace, queue: Queue) -> dict[str, Any]:
    of, rules = tenants(options.tenants), Rules(options.min_run_s, options.restart_s)
    import ray

    from heliostat.launch.cluster import connect_to_kept_cluster, starts_here
    from heliostat.launch.ray_jobs import RayJobs
    from heliostat.launch.scheduler import Scheduler

    with queue.alone():
        quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
        if starts_here(options.address):
            connect_to_kept_cluster(queue.folder.parent, quietly)
        else:
            ray.init(address=options.address or None, **quietly)
        scheduler = Scheduler(queue, RayJobs(options.grace_s), fair_share, of, rules)
        shown: dict[str, tuple[Status, str]] = {}
        while True:
            try:
                records = scheduler.turn()
            except (RuntimeError, OSError) as error:  # a turn that is made again does nothing twice
                print(f"it will be tried again: {error}", flush=True)
            else:
                stands = {name: (record.status, record.reason) for name, record in records.items()}
                for name, (status, reason) in stands.items():
                    if shown.get(name) != (status, reason):
                        print(f"{name}: {status}" + (f", {reason}" if reason else ""), flush=True)
                shown = stands
                if options.until_empty and not records:
                    return show(queue)
            time.sleep(options.every_s)


def run(words: list[str]) -> dict[str, Any]:
    options, recipe = parse(words)
    if recipe is not None:
        return submit(options, recipe)
    queue = Queue(Path(options.storage).expanduser().absolute())
    if options.command == "list":
        return show(queue)
    if options.command == "cancel":
        was = queue.cancel(options.name)
        return {"name": options.name, "was": was.status}
    return work(options, queue)


def main(words: list[str] | None = None) -> int:
    end_on_signals()
    return answer("schedule", lambda: run(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
