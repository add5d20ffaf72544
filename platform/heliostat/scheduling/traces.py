"""What was submitted to a cluster, and when: read from a file, or drawn."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from heliostat.recipe import Refused

DAY_S = 86400.0


@dataclass(frozen=True)
class Submitted:
    """A job of a trace; each worker takes one GPU."""

    name: str
    time: float
    gpus: int
    duration_s: float
    """With `gpus` of them, undisturbed."""
    tenant: str = "default"
    priority: int = 0
    min_gpus: int | None = None
    """None: as many as `gpus`; so is `max_gpus`."""
    max_gpus: int | None = None
    estimate_s: float | None = None
    """Of its duration, as its owner gave it."""
    serial: float = 0.01
    """See `Amdahl`."""


def read(path: Path) -> list[Submitted]:
    """`.swf` (Standard Workload Format), `.json` (Microsoft's Philly trace, `cluster_job_log`), or `.csv` with the
    columns `time`, `gpus` and `duration_s`, and any others of `Submitted`. Jobs that never ran are left out. Raises
    Refused."""
    readers = {".swf": _swf, ".json": _philly, ".csv": _csv}
    if path.suffix not in readers:
        raise Refused("trace", f"no trace is read from {path.name}", f"one of {', '.join(readers)}, or `synthetic`")
    try:
        jobs = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused("trace", f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Refused("trace", f"{path} is no trace: {type(error).__name__}: {error}") from error
    jobs = [job for job in jobs if job.duration_s > 0 and job.gpus > 0]
    if not jobs:
        raise Refused("trace", f"{path} has no job that ran")
    first = min(job.time for job in jobs)
    if len({job.name for job in jobs}) < len(jobs):
        raise Refused("trace", f"{path} has jobs of the same name", "name each differently, or none of them")
    return sorted((replace(job, time=job.time - first) for job in jobs), key=lambda job: job.time)


def _swf(text: str) -> list[Submitted]:
    """https://www.cs.huji.ac.il/labs/parallel/workload/swf.html: fields 1 number, 2 submit, 4 run time, 5 processors,
    8 requested processors, 9 requested time, 12 user, 13 group; -1 where unknown. Processors count as GPUs; tenants
    are groups, or users where no group is known."""
    jobs = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(";"):
            continue
        fields = line.split()
        number, submitted, duration = fields[0], float(fields[1]), float(fields[3])
        processors, requested, estimate = int(fields[4]), int(fields[7]), float(fields[8])
        tenant = fields[12] if fields[12] != "-1" else fields[11]
        jobs.append(
            Submitted(
                number,
                submitted,
                requested if requested > 0 else processors,
                duration,
                tenant,
                estimate_s=max(estimate, duration) if estimate > 0 else None,
            )
        )
    return jobs


def _philly(text: str) -> list[Submitted]:
    """https://github.com/msr-fiddle/philly-traces: all of a job's attempts count as one, on the GPUs of the last."""
    jobs = []
    for each in json.loads(text):
        attempts = [a for a in each["attempts"] if a["start_time"] and a["end_time"]]
        if attempts:
            duration = sum(_time(attempt["end_time"]) - _time(attempt["start_time"]) for attempt in attempts)
            gpus = sum(len(server["gpus"]) for server in attempts[-1]["detail"])
            jobs.append(Submitted(each["jobid"], _time(each["submitted_time"]), gpus, duration, each["vc"]))
    return jobs


def _time(text: str) -> float:
    return datetime.fromisoformat(text + "+00:00").timestamp()


def _csv(text: str) -> list[Submitted]:
    kinds: dict[str, Any] = {
        "name": str,
        "time": float,
        "gpus": int,
        "duration_s": float,
        "tenant": str,
        "priority": int,
        "min_gpus": int,
        "max_gpus": int,
        "estimate_s": float,
        "serial": float,
    }
    jobs = []
    for number, row in enumerate(csv.DictReader(text.splitlines())):
        if unknown := set(row) - set(kinds):
            raise Refused("trace", f"no column {', '.join(map(str, unknown))}", f"there are: {', '.join(kinds)}")
        given = {name: kinds[name](value) for name, value in row.items() if value}
        job = Submitted(**({"name": str(number)} | given))
        if not (job.min_gpus or job.gpus) <= job.gpus <= (job.max_gpus or job.gpus):
            raise Refused("trace", f"line {number + 2}: gpus={job.gpus} is not between min_gpus and max_gpus")
        jobs.append(job)
    return jobs


SIZES = {1: 0.619, 2: 0.10, 4: 0.10, 8: 0.13, 16: 0.03, 32: 0.015, 64: 0.005, 128: 0.001}
"""Shares of jobs by GPUs: most take one and few more than a node's eight, and 3.7 on average, as in Helios (Hu et al.
2021, arXiv:2109.01313); the shares of single sizes are assumed."""
MEDIAN_S, MEAN_S, LONGEST_S = 206.0, 6652.0, 3 * DAY_S
"""Of durations, the first two as in Helios; log-normal. Longer ones than three days (one in 300) are drawn again, so
that some thousand jobs load a cluster steadily."""
DAILY_SWING = 0.5
"""Of the rate of submissions around its mean, in the course of a day (assumed)."""
TENANTS = 8
"""Their shares of the jobs fall as 1/n (Zipf's law, assumed); their weights are the same."""
PRIORITIES = {0: 0.8, 1: 0.15, 2: 0.05}
"""Assumed."""
OVERESTIMATED = 4.0
"""Owners' estimates are uniform between the duration and (1 + this) times it, as Mu'alem and Feitelson (2001,
"Utilization, Predictability, Workloads, and User Runtime Estimates") model them."""
EFFICIENCY = (0.6, 0.9)
"""Of twice the workers that are asked for, uniform (assumed)."""


def synthetic(days: float, gpus: int, load: float, elastic: float = 0.3, seed: int = 0) -> list[Submitted]:
    """Submissions as a Poisson process with a daily cycle, as many as ask for `load` × `gpus` on average. `elastic`:
    the share of jobs that also run with a quarter to four times the GPUs that they ask for."""
    draw, span = random.Random(seed), days * DAY_S
    sigma = math.sqrt(2 * math.log(MEAN_S / MEDIAN_S))
    sizes, durations, asked = list[int](), list[float](), 0.0
    while asked < load * gpus * span:
        size = min(gpus, draw.choices(list(SIZES), list(SIZES.values()))[0])
        duration = draw.lognormvariate(math.log(MEDIAN_S), sigma)
        if duration <= LONGEST_S:
            sizes.append(size)
            durations.append(duration)
            asked += size * duration
    jobs, times = len(sizes), list[float]()
    while len(times) < jobs:  # given their number, a Poisson process's times are independent draws of its rate
        at = draw.uniform(0, span)
        if draw.uniform(0, 1 + DAILY_SWING) <= 1 + DAILY_SWING * math.sin(2 * math.pi * at / DAY_S):
            times.append(at)
    times.sort()
    tenants = draw.choices(range(TENANTS), [1 / (n + 1) for n in range(TENANTS)], k=jobs)
    made = []
    for number in range(jobs):
        size, duration = sizes[number], durations[number]
        may_vary = draw.random() < elastic
        efficiency = draw.uniform(*EFFICIENCY)
        made.append(
            Submitted(
                str(number),
                times[number] - times[0],
                size,
                duration,
                f"tenant-{tenants[number]}",
                draw.choices(list(PRIORITIES), list(PRIORITIES.values()))[0],
                max(1, size // 4) if may_vary else None,
                min(4 * size, gpus) if may_vary else None,
                duration * draw.uniform(1, 1 + OVERESTIMATED),
                (1 / efficiency - 1) / (2 * size - 1),
            )
        )
    return made
