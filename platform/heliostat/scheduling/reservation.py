"""Room that is held for the first job that cannot start, so that those behind it do not keep it waiting (EASY: Lifka
1995, "The ANL/IBM SP Scheduling System"), by nodes instead of by numbers, since gangs are placed on nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heliostat.scheduling.room import Room
from heliostat.scheduling.state import Job, Placement, State


@dataclass
class Reservation:
    job: str
    start: float
    """When the last of the jobs that are in its way will have ended. Infinite where that is not known."""
    placement: Placement
    later: Room
    """What is free then, beside it."""
    counted: set[str]
    """Whose room is in that."""

    def over_before(self, end: float) -> bool:
        """Whether who ends then is out of the way. Where nobody knows when that is, nobody is."""
        return end <= self.start < math.inf


def ends(state: State, job: Job) -> float:
    """When a job that runs is expected to end."""
    restart = state.rules.restart_s if job.stopping else 0.0
    takes = job.takes_s(sum(job.after.values()))
    return math.inf if takes is None else state.now + restart + takes


def reserve(state: State, soon: Room, job: Job, workers: int) -> Reservation | None:
    """The earliest place for so many workers of a job, in what is free `soon` and what running jobs leave; None where
    not even an empty cluster has one.

    Of jobs whose end is not known the oldest are counted on first. Others that start meanwhile are younger, so the
    number of jobs in the way only falls."""
    running = sorted((ends(state, each), each.since, each.name, each) for each in state.jobs if each.after)
    later, start, counted = soon.copy(), state.now, set[str]()
    placement = later.place(job.shape, workers)
    for end, _, _, each in running:
        if placement is not None:
            break
        later.give(each.after, each.shape)
        counted.add(each.name)
        start = end
        placement = later.place(job.shape, workers)
    if placement is None:
        return None
    later.take(placement, job.shape)
    return Reservation(job.name, start, placement, later, counted)
