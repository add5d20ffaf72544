"""The policy: weighted fair shares with quotas and priorities, preemption by checkpoint, gangs placed whole, room held
for the first that waits, and what is idle to elastic runs by what it adds.

Between tenants, who has least for its weight is next; among a tenant's jobs priority decides, then the order of
submission. Who finds no room may take it, in this order, from
- what elastic runs have beyond what they asked for, which was lent to them;
- elastic runs down to their smallest size: of its own tenant with no higher priority, or of tenants that have more than
  they deserve as long as its own has not;
- whole jobs: of its own tenant with a lower priority, or of such tenants.
Lower priorities go first, then the youngest. Who is displaced is checkpointed, and waits where it was in the queue.
Nobody is who was started or resized within `rules.min_run_s`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

from heliostat.scheduling.claim import Claim, rooms_of, victims
from heliostat.scheduling.growth import pays, targets
from heliostat.scheduling.reservation import Reservation, reserve
from heliostat.scheduling.room import EPSILON, Room
from heliostat.scheduling.shares import Shares
from heliostat.scheduling.state import Decision, Job, Placement, Preempt, Resize, Shape, Start, State, Wait


def fair_share(state: State) -> list[Decision]:
    return _Turn(state).decide()


class _Turn:
    """One decision, taken job by job."""

    def __init__(self, state: State) -> None:
        self.state, self.shares = state, Shares(state)
        self.free = Room(state.nodes)
        """What nobody holds now."""
        self.soon = self.free.copy()
        """And what is free once those that were told to have stopped."""
        self.reservation: Reservation | None = None
        self.spare: Room | None = None
        """What is free and will not be missed by who has the reservation."""
        self.running = {job.name: job for job in state.jobs if job.held and not job.stopping}
        """Who may still be displaced or grow."""
        self.kept: dict[str, tuple[Placement, str]] = {}
        """What is left to those who are displaced, and why they are."""
        self.started: dict[str, Placement] = {}
        self.grown: dict[str, Placement] = {}
        self.waits: dict[str, str] = {}
        self.no_room: dict[tuple[bool, Shape], int] = {}
        """The fewest workers that were found not to fit, in what is spare or all that is free."""
        self.hopeless: dict[tuple[str, int, Shape], int] = {}
        """The fewest that others would not make room for, by tenant and priority."""
        for job in state.jobs:
            self.free.take(job.kept, job.shape)
            self.soon.take(job.after, job.shape)

    def decide(self) -> list[Decision]:
        for job in list(self.running.values()):
            if any(name not in self.free.index for name in job.held):
                self._displace(job, {}, "a node is gone")
        queues = self._queues()
        heap = [(self.shares.by_weight(tenant), tenant) for tenant in queues]
        heapq.heapify(heap)
        while heap:
            _, tenant = heapq.heappop(heap)
            if (waiting := next(queues[tenant], None)) is not None:
                self._consider(waiting)
                heapq.heappush(heap, (self.shares.by_weight(tenant), tenant))
        self._grow()
        return [
            *(Resize(name, kept, why) if kept else Preempt(name, why) for name, (kept, why) in self.kept.items()),
            *(Start(name, placement) for name, placement in self.started.items()),
            *(Resize(name, placement, "idle workers are lent to it") for name, placement in self.grown.items()),
            *(Wait(name, why) for name, why in self.waits.items()),
        ]

    def _queues(self) -> dict[str, Iterator[Job]]:
        waiting: dict[str, list[Job]] = {}
        for job in self.state.jobs:
            if not job.held:
                waiting.setdefault(job.tenant, []).append(job)
        return {
            tenant: iter(sorted(jobs, key=lambda job: (-job.priority, job.submitted, job.name)))
            for tenant, jobs in waiting.items()
        }

    def _consider(self, job: Job) -> None:
        has_quota = job.min_workers <= self.shares.quota_left(job.tenant, job.shape)
        if has_quota and self._start(job):
            return
        if self._claim(job):
            self.waits[job.name] = "its place is being freed"
        elif not has_quota:
            self.waits[job.name] = f"the quota of {job.tenant} is used"
        elif self.reservation is not None:
            self.waits[job.name] = f"no room beside what is held for {self.reservation.job}"
        elif found := reserve(self._as_decided(), self.soon, job, job.min_workers):
            self.waits[job.name] = f"room for {job.min_workers} workers is held for it as it comes free"
            self.reservation, self.spare = found, self.free.both(found.later)
        else:
            self.waits[job.name] = f"the cluster has no place for {job.min_workers} of its workers, were it empty"

    def _start(self, job: Job) -> bool:
        """At its smallest size; it may grow at once."""
        takes, rules = job.takes_s(job.min_workers), self.state.rules
        over = None if takes is None else self.state.now + rules.restart_s + takes
        short = self.reservation is not None and over is not None and self.reservation.over_before(over)
        beside = self.reservation is not None and not short
        if job.min_workers >= self.no_room.get((beside, job.shape), job.min_workers + 1):
            return False
        room = self.spare if beside and self.spare else self.free
        placement = room.place(job.shape, job.min_workers)
        if placement is None:
            self.no_room[beside, job.shape] = job.min_workers
            return False
        self.started[job.name] = placement
        self.shares.add(job.tenant, job.shape, job.min_workers)
        self._take(job, placement, beyond=not short)
        return True

    def _take(self, job: Job, placement: Placement, beyond: bool) -> None:
        """`beyond`: the job may still run when the reservation begins."""
        self.free.take(placement, job.shape)
        self.soon.take(placement, job.shape)
        if self.reservation is not None:
            if beyond:
                self.reservation.later.take(placement, job.shape)
            self.spare = self.free.both(self.reservation.later)

    def _as_decided(self) -> State:
        """The state with what was decided in this turn."""
        changed = []
        for job in self.state.jobs:
            if job.name in self.started:
                job = replace(job, held=self.started[job.name], since=self.state.now)
            elif job.name in self.kept:
                job = replace(job, stopping=True, next=self.kept[job.name][0])
            changed.append(job)
        return replace(self.state, jobs=changed)

    def _claim(self, job: Job) -> bool:
        """Have others make room, as few and as little as will do; it may be on its way already."""
        key, workers = (job.tenant, job.priority, job.shape), job.min_workers
        if workers >= self.hopeless.get(key, workers + 1):
            return False
        claim = Claim(job, workers, self.soon, self.reservation, self.shares.quota(job.tenant))
        if claim.place() is None:
            for victim, left in victims(job, workers, list(self.running.values()), self.state, self.shares):
                claim.displace(victim, left)
                if claim.place() is not None:
                    break
            else:
                self.hopeless[key] = workers
                return False
            claim.relax()
        placement = claim.place()
        assert placement is not None
        for victim, left in claim.left.values():
            self._displace(victim, left, f"{job.name} takes its place")
        self.soon.take(placement, job.shape)
        self.shares.add(job.tenant, job.shape, workers)
        self.free = self.free.both(self.soon)
        if self.reservation is not None:
            self.reservation.later.take(placement, job.shape)
            self.spare = self.free.both(self.reservation.later)
        return True

    def _displace(self, victim: Job, left: Placement, why: str) -> None:
        later = self.reservation.later if self.reservation else None
        for room in rooms_of(victim, self.soon, later, self.reservation):
            room.give(victim.held, victim.shape)
            room.take(left, victim.shape)
        self.shares.add(victim.tenant, victim.shape, sum(left.values()) - victim.size)
        self.kept[victim.name] = left, why
        del self.running[victim.name]
        self.hopeless.clear()

    def _grow(self) -> None:
        room = self.free if self.spare is None else self.spare
        if room.free_cpus < EPSILON:
            return
        jobs = {job.name: job for job in self.state.jobs}
        growing = [(jobs[name], sum(placement.values())) for name, placement in self.started.items()]
        settled = [job for job in self.running.values() if self.state.now - job.since >= self.state.rules.min_run_s]
        growing += [(job, job.size) for job in settled]
        growing = [(job, size) for job, size in growing if size + job.step <= job.max_workers]
        sizes = targets(growing, room, self.shares)
        # Whom it would not pay gets nothing, and the others get that.
        growing = [(job, size) for job, size in growing if not job.held or pays(job, sizes[job.name], self.state)]
        sizes = targets(growing, room, self.shares)
        for job, size in growing:
            self._grow_one(job, size, sizes[job.name])

    def _grow_one(self, job: Job, size: int, target: int) -> None:
        room = self.free if self.spare is None else self.spare
        held = job.held or self.started[job.name]
        more = room.most(job.shape, target - size) // job.step * job.step
        if not more or (job.held and not pays(job, size + more, self.state)):
            return
        placement = room.place(job.shape, more, near=held)
        assert placement is not None
        grown = {name: held.get(name, 0) + placement.get(name, 0) for name in [*held, *placement]}
        (self.grown if job.held else self.started)[job.name] = grown
        self.shares.add(job.tenant, job.shape, more)
        self._take(job, placement, beyond=True)
