"""Policies to compare with. Both know neither tenants nor priorities, give each job the workers that it asks for, and
let it run to its end."""

from __future__ import annotations

from dataclasses import replace

from heliostat.scheduling.reservation import Reservation, reserve
from heliostat.scheduling.room import Room
from heliostat.scheduling.state import Decision, Job, Start, State, Wait


def fifo(state: State) -> list[Decision]:
    """In the order of submission; who does not fit keeps all behind it waiting."""
    return _in_order(state, backfill=False)


def easy_backfill(state: State) -> list[Decision]:
    """FIFO, and a later job may start where that does not delay the first that waits, by the estimates there are."""
    return _in_order(state, backfill=True)


def _in_order(state: State, backfill: bool) -> list[Decision]:
    free = Room(state.nodes)
    for job in state.jobs:
        free.take(job.kept, job.shape)
    decisions: list[Decision] = []
    reservation: Reservation | None = None
    blocked = False
    for job in sorted((each for each in state.jobs if not each.held), key=lambda each: (each.submitted, each.name)):
        placement = None
        if not blocked:
            placement = free.place(job.shape, job.workers)
        elif reservation is not None and not free.cannot_hold(job.shape, job.workers):
            short = _is_short(state, job, reservation)
            room = free if short else free.both(reservation.later)
            placement = room.place(job.shape, job.workers)
            if placement and not short:
                reservation.later.take(placement, job.shape)
        if placement:
            free.take(placement, job.shape)
            decisions.append(Start(job.name, placement))
            continue
        decisions.append(Wait(job.name, "no room"))
        if not blocked:
            blocked = True
            reservation = reserve(_with(state, decisions), free, job, job.workers) if backfill else None
    return decisions


def _is_short(state: State, job: Job, reservation: Reservation) -> bool:
    takes = job.takes_s(job.workers)
    return takes is not None and reservation.over_before(state.now + state.rules.restart_s + takes)


def _with(state: State, decisions: list[Decision]) -> State:
    """With what was started just now running."""
    placed = {each.job: each.placement for each in decisions if isinstance(each, Start)}
    jobs = [replace(job, held=placed[job.name], since=state.now) if job.name in placed else job for job in state.jobs]
    return replace(state, jobs=jobs)
