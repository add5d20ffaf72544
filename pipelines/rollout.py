"""`python -m pipelines.rollout RECIPE --to BUNDLE --strategy shadow|canary|blue_green [--keep]`: a new version takes
over from the champion where it does no harm, and is rolled back where it does."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.launch.cluster import connect
from heliostat.models import bundle as bundles
from heliostat.recipe import Recipe, Refused
from heliostat.record import say
from heliostat.registry import Version, champion, promote, register, tag
from heliostat.rollout.outcomes import Judge, compared
from heliostat.rollout.schedule import Schedule, parse_strategy
from heliostat.tasks import load_object
from pipelines.answer import end_on_signals
from pipelines.job import Job, main
from serve import keys
from serve.rollout import Served, Split, split

EXCHANGE_S = 1.0


def decide(schedule: Schedule, versions: Split, judge: Judge | None, max_s: float) -> None:
    """Send traffic as the schedule says until it has decided."""
    started, step = time.monotonic(), -1
    while schedule.decision is None:
        if schedule.step != step:
            step = schedule.step
            say("rollout_step", step=step + 1, of=len(schedule.steps), traffic=str(schedule.traffic))
            print(f"step {step + 1} of {len(schedule.steps)}: {schedule.traffic}", flush=True)
        seen = versions.exchange(schedule.traffic)
        for answers in compared(seen, judge):
            schedule.add(answers)
        if time.monotonic() - started > max_s:
            schedule.give_up()
        time.sleep(EXCHANGE_S)


def check(recipe: Recipe, to: bundles.Bundle, strategy: str) -> tuple[Version, Schedule, Judge | None]:
    """The champion, and what decides whether `to` takes over from it. Raises Refused where there is no champion, it is
    `to`, or it is of another kind."""
    chosen = parse_strategy(strategy)
    stable = champion(recipe)
    if stable is None:
        command = f"python -m pipelines.register {recipe.name}"
        raise Refused("to", f"{recipe.name} has no champion to compare with", command)
    now = bundles.read(stable.path, verify_files=False)
    if now.digest == to.digest:
        raise Refused("to", f"{to.path} is the champion, version {stable.version}", "name another bundle")
    before, after = (each.task().model_class for each in (now, to))
    if before != after:
        raise Refused("to", f"the champion is an {before}, {to.path} an {after}", "deploy it under another name")
    judge = load_object(recipe.rollout.judge, "rollout.judge") if recipe.rollout.judge else None
    return stable, Schedule(recipe.rollout, chosen, judged=judge is not None), judge


def rollout(recipe: Recipe, to: bundles.Bundle, strategy: str) -> dict[str, Any]:
    """Between the champion and `to`, which is registered, on the cluster that Ray is connected to. Raises Refused as
    `check` does."""
    stable, schedule, judge = check(recipe, to, strategy)
    candidate = register(recipe, to, None)
    served = [Served(each.path, str(each.version)) for each in (stable, candidate)]
    with split(recipe, *served) as versions:
        print(f"version {candidate.version} beside {stable.version} at {versions.endpoint}", flush=True)
        decide(schedule, versions, judge, recipe.rollout.max_s)
        evidence = schedule.evidence()
        say("rollout_decided", decision=schedule.decision, version=candidate.version, before=stable.version)
        tags = {"decision": str(schedule.decision), "strategy": strategy, "evidence": json.dumps(evidence)}
        tag(recipe, candidate, {f"rollout.{name}": value for name, value in tags.items()})
        if schedule.decision == "promoted":
            promote(recipe, candidate)
            versions.winner = versions.candidate
    return {
        "decision": schedule.decision,
        "strategy": strategy,
        "from": stable.version,
        "version": candidate.version,
        "evidence": evidence,
    }


def run(job: Job) -> dict[str, Any]:
    recipe, options = job.recipe, job.options
    if not options.to:
        raise Refused("to", "no new version is named", "--to FOLDER, a bundle that training wrote")
    to = bundles.read(Path(options.to).expanduser().absolute())
    check(recipe, to, options.strategy)  # before Ray starts
    keys.check(recipe.deploy.keys_file)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with connect(recipe, options.address, options.keep):
        end_on_signals()  # or the router stays
        result = rollout(recipe, to, options.strategy)
    print(f"{result['decision']}: {json.dumps(result['evidence'])}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main("rollout", run))
