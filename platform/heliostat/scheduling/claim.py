"""Room for a job that others have to leave: whose, and how little of it will do."""

from __future__ import annotations

from collections.abc import Iterator

from heliostat.scheduling.reservation import Reservation
from heliostat.scheduling.room import EPSILON, Room
from heliostat.scheduling.shares import Shares
from heliostat.scheduling.state import Job, Placement, State


class Claim:
    """What would be free for a job if some were displaced. Changes nothing outside."""

    def __init__(
        self, job: Job, workers: int, soon: Room, reservation: Reservation | None, quota: tuple[float, float]
    ) -> None:
        """`quota`: CPUs and GPUs that its tenant may still have."""
        self.job, self.workers, self.reservation = job, workers, reservation
        self.cpus, self.gpus = quota
        self.soon = soon.copy()
        self.later = reservation.later.copy() if reservation else None
        self.left: dict[str, tuple[Job, Placement]] = {}
        """Who is displaced, and what is left to them."""

    def place(self) -> dict[str, int] | None:
        shape = self.job.shape
        if self.workers * shape.cpus > self.cpus or self.workers * shape.gpus > self.gpus:
            return None
        if self.soon.cannot_hold(shape, self.workers):
            return None
        return (self.soon.both(self.later) if self.later else self.soon).place(shape, self.workers)

    def displace(self, victim: Job, after: Placement) -> None:
        before = self.left[victim.name][1] if victim.name in self.left else victim.held
        for room in rooms_of(victim, self.soon, self.later, self.reservation):
            room.give(before, victim.shape)
            room.take(after, victim.shape)
        if victim.tenant == self.job.tenant:
            fewer_workers = sum(before.values()) - sum(after.values())
            self.cpus += fewer_workers * victim.shape.cpus
            self.gpus += fewer_workers * victim.shape.gpus
        self.left[victim.name] = victim, after

    def relax(self) -> None:
        """Leave to those who are displaced as much as can be, the last first."""
        for name in reversed(list(self.left)):
            victim, least = self.left[name]
            sizes = [*range(victim.min_workers, victim.size, victim.step), victim.size]
            choices = [least, *(fewer(victim.held, size) for size in sizes if size > sum(least.values()))]
            low, high = 0, len(choices) - 1
            while low < high:
                middle = (low + high + 1) // 2
                self.displace(victim, choices[middle])
                low, high = (middle, high) if self.place() is not None else (low, middle - 1)
            self.displace(victim, choices[low])
            if sum(choices[low].values()) == victim.size:
                del self.left[name]


def rooms_of(victim: Job, soon: Room, later: Room | None, reservation: Reservation | None) -> Iterator[Room]:
    """What has more room when a job that runs leaves, unless that was counted on already."""
    yield soon
    if later is not None and reservation is not None and victim.name not in reservation.counted:
        yield later


def victims(
    job: Job, workers: int, running: list[Job], state: State, shares: Shares
) -> Iterator[tuple[Job, Placement]]:
    """Who may be displaced for a job, and what is left to it, in the order in which they are."""
    used = dict(shares.used)
    after = used.get(job.tenant, 0.0) + workers * shares.of(job.shape)
    within = after <= shares.deserved.get(job.tenant, 0.0) + EPSILON

    def over(tenant: str) -> bool:
        return within and tenant != job.tenant and used[tenant] > shares.deserved[tenant] + EPSILON

    candidates = [each for each in running if state.now - each.since >= state.rules.min_run_s]
    candidates.sort(key=lambda each: (each.priority, -each.since, each.name))
    left = {each.name: each.size for each in candidates}

    def shrink(victim: Job, to: int) -> tuple[Job, Placement]:
        used[victim.tenant] -= (left[victim.name] - to) * shares.of(victim.shape)
        left[victim.name] = to
        return victim, fewer(victim.held, to)

    for each in candidates:  # what was lent to them
        if (asked := valid_size(each, each.workers)) < each.size:
            yield shrink(each, asked)
    for each in candidates:
        own = each.tenant == job.tenant and each.priority <= job.priority
        if each.min_workers < left[each.name] and (own or over(each.tenant)):
            yield shrink(each, each.min_workers)
    for each in candidates:
        if (each.tenant == job.tenant and each.priority < job.priority) or over(each.tenant):
            yield shrink(each, 0)


def valid_size(job: Job, workers: int) -> int:
    """The largest that a job can have and that is no more than `workers`, or its smallest."""
    return job.min_workers + max(0, workers - job.min_workers) // job.step * job.step


def fewer(held: Placement, workers: int) -> dict[str, int]:
    """So many of those who are there; nodes with the fewest are left first."""
    kept, leaving = dict(held), sum(held.values()) - workers
    for name in sorted(held, key=lambda name: (held[name], name)):
        gone = min(leaving, kept[name])
        kept[name] -= gone
        leaving -= gone
    return {name: count for name, count in kept.items() if count}
