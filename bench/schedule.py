"""How long the scheduler's policy takes to decide, on a large cluster with many jobs: when all have just been
submitted, when the cluster is full, and when a tenth of what runs has ended. Prints milliseconds: the median of some
decisions, and the slowest.

    python -m bench.schedule [--gpus 4096] [--jobs 1000] [--repeats 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.simulate import WORKER, Cluster
from heliostat.scheduling.speed import Amdahl
from heliostat.scheduling.state import Job, Start, State
from heliostat.scheduling.traces import Submitted, synthetic


def job(of: Submitted) -> Job:
    least, most = of.min_gpus or of.gpus, of.max_gpus or of.gpus
    who: dict[str, Any] = {"tenant": of.tenant, "priority": of.priority}
    return Job(of.name, of.time, of.gpus, least, most, WORKER, **who, speed=Amdahl(of.serial), estimate_s=of.estimate_s)


def measure(state: State, repeats: int) -> dict[str, float]:
    took = []
    for _ in range(repeats):
        begun = time.perf_counter()
        fair_share(state)
        took.append(1000 * (time.perf_counter() - begun))
    return {"median_ms": round(statistics.median(took), 2), "slowest_ms": round(max(took), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    cluster = Cluster(options.gpus)
    # With the small ones, all of so many would run at once.
    trace = [each for each in synthetic(1.0, options.gpus, 1.0) if each.gpus >= 4][: options.jobs]
    new = State(trace[-1].time, cluster.nodes, [job(each) for each in trace], rules=cluster.rules)
    placed = {each.job: each.placement for each in fair_share(new) if isinstance(each, Start)}
    since = new.now - 2 * cluster.min_run_s
    jobs = [replace(each, held=placed.get(each.name, {}), since=since) for each in new.jobs]
    full = replace(new, jobs=jobs)
    running = [each for each in jobs if each.held]
    ended = {each.name for each in running[::10]}
    after = replace(full, jobs=[each for each in jobs if each.name not in ended])
    answer = {"gpus": options.gpus, "jobs": len(jobs), "running": len(running), "waiting": len(jobs) - len(running)}
    for name, state in (("all_new", new), ("full", full), ("a_tenth_ended", after)):
        answer[name] = measure(state, options.repeats)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
