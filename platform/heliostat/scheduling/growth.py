"""What is idle goes to elastic runs, one step at a time to whom it adds the most."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from heliostat.scheduling.room import EPSILON, Room
from heliostat.scheduling.shares import Shares
from heliostat.scheduling.state import Job, State


def targets(growing: Iterable[tuple[Job, int]], room: Room, shares: Shares) -> dict[str, int]:
    """The sizes that jobs of these sizes should have, by numbers alone: each next step goes where it adds the most
    speed for its share of the cluster. Since speeds are concave, the sum of speeds is the largest that there is where
    all steps take the same."""
    sizes, most, heap = dict[str, int](), dict[str, int](), []
    for job, size in growing:
        sizes[job.name] = size
        more = int(min(job.max_workers - size, shares.quota_left(job.tenant, job.shape)))
        most[job.name] = size
        if more >= job.step and not room.cannot_hold(job.shape, job.step):
            most[job.name] += room.most(job.shape, more)
        heap.append((-_gain(job, size, shares), job.submitted, job.name, job))
    heapq.heapify(heap)
    cpus, gpus = room.free_cpus + EPSILON, room.free_gpus + EPSILON
    quotas: dict[str, tuple[float, float]] = {}
    while heap:
        *_, job = heapq.heappop(heap)
        size = sizes[job.name] + job.step
        takes = job.step * job.shape.cpus, job.step * job.shape.gpus
        quota = quotas.setdefault(job.tenant, shares.quota(job.tenant))
        if size > most[job.name] or takes[0] > min(cpus, quota[0]) or takes[1] > min(gpus, quota[1]):
            continue
        sizes[job.name] = size
        cpus, gpus = cpus - takes[0], gpus - takes[1]
        quotas[job.tenant] = quota[0] - takes[0], quota[1] - takes[1]
        heapq.heappush(heap, (-_gain(job, size, shares), job.submitted, job.name, job))
    return sizes


def pays(job: Job, workers: int, state: State) -> bool:
    """Whether a job that runs would save more by that size than a restart takes. Where nobody knows how long it will
    still run: as long as it has."""
    takes = job.takes_s(job.size)
    horizon = state.now - job.since if takes is None else takes
    return horizon * (1 - job.speed(job.size) / job.speed(workers)) > state.rules.restart_s


def _gain(job: Job, workers: int, shares: Shares) -> float:
    return (job.speed(workers + job.step) - job.speed(workers)) / (job.step * shares.of(job.shape))
