"""A trace of jobs replayed on a cluster that is not there, under a policy as it would run for real."""

from __future__ import annotations

import heapq
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from heliostat.recipe import Refused
from heliostat.scheduling.room import Room
from heliostat.scheduling.shares import deserved
from heliostat.scheduling.speed import Amdahl
from heliostat.scheduling.state import Job, Node, Placement, Policy, Preempt, Resize, Rules, Shape, Start, State, Tenant
from heliostat.scheduling.traces import Submitted

WORKER = Shape(cpus=1.0, gpus=1.0)


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpus_per_node: int = 8
    start_s: float = 30.0
    """From when a job has its place, until it makes steps; also after a checkpoint."""
    checkpoint_s: float = 15.0
    """From when a job is told to stop, until its place is free."""
    decide_every_s: float = 30.0
    """0: whenever something happened."""
    min_run_s: float = 600.0

    @property
    def nodes(self) -> list[Node]:
        whole, rest = divmod(self.gpus, self.gpus_per_node)
        sizes = [self.gpus_per_node] * whole + ([rest] if rest else [])
        return [Node(f"node-{i:04d}", float(size), float(size)) for i, size in enumerate(sizes)]

    @property
    def rules(self) -> Rules:
        return Rules(self.min_run_s, self.start_s + self.checkpoint_s)


@dataclass
class Outcome:
    """Times are in seconds; shares of the GPUs are those between the first submission and the last."""

    jobs: int
    utilisation: float
    """Of the GPUs, the share that jobs held."""
    goodput: float
    """The same of steps: what they would have taken with the GPUs that jobs ask for. More where jobs with fewer
    GPUs use them better."""
    mean_jct_s: float
    """Job completion time: from submission to the end."""
    median_jct_s: float
    p99_jct_s: float
    mean_wait_s: float
    """From submission to the first start."""
    fairness: float
    """Jain's index (Jain, Chiu and Hawe 1984) over tenants, of how much each had of the GPU time that it deserved; 1:
    all the same. What was lent beyond that harms nobody and does not count."""
    preemptions: int
    resizes: int
    makespan_s: float
    decisions: int
    started: dict[str, float] = field(repr=False, default_factory=dict)
    ended: dict[str, float] = field(repr=False, default_factory=dict)
    decide_s: list[float] = field(repr=False, default_factory=list)
    """What each decision took of this machine."""


def simulate(
    trace: list[Submitted], cluster: Cluster, policy: Policy, tenants: Mapping[str, Tenant] | None = None
) -> Outcome:
    """Every job of the trace, to its end. Raises Refused where one asks for more than there is, and RuntimeError where
    the policy leaves one waiting for ever."""
    for job in trace:
        if (job.min_gpus or job.gpus) > cluster.gpus or job.gpus > cluster.gpus:
            raise Refused("gpus", f"job {job.name} asks for {job.gpus}, there are {cluster.gpus}", "use more")
    return _Replay(trace, cluster, policy, tenants or {}).run()


class _Run:
    """A job and how far it is."""

    def __init__(self, of: Submitted) -> None:
        self.of = of
        self.job = Job(
            of.name,
            of.time,
            of.gpus,
            of.min_gpus or of.gpus,
            of.max_gpus or of.gpus,
            WORKER,
            tenant=of.tenant,
            priority=of.priority,
            speed=Amdahl(of.serial),
            estimate_s=of.estimate_s,
        )
        self.left_s = of.duration_s
        """Of work, in seconds with `gpus` of them."""
        self.rate = 0.0
        """Work done a second."""
        self.as_of = 0.0
        self.ready = 0.0
        """When it makes steps (again)."""
        self.version = 0
        """Events of an earlier one no longer happen."""

    def advance(self, now: float) -> None:
        self.left_s -= self.rate * (now - self.as_of)
        self.as_of = now

    def estimate(self, now: float) -> None:
        """What its owner's estimate leaves; nothing where it was too low."""
        if self.of.estimate_s is None:
            return
        left = self.of.estimate_s - (self.of.duration_s - self.left_s)
        if self.job.held and not self.job.stopping:
            left += max(0.0, self.ready - now) * self.full_rate
        self.job.estimate_s = left if left > 0 else None

    @property
    def full_rate(self) -> float:
        return self.job.speed(self.job.size) / self.job.speed(self.of.gpus)


class _Replay:
    def __init__(self, trace: list[Submitted], cluster: Cluster, policy: Policy, tenants: Mapping[str, Tenant]) -> None:
        self.cluster, self.policy, self.tenants = cluster, policy, tenants
        self.nodes = cluster.nodes
        self.trace = trace
        self.active: dict[str, _Run] = {}
        self.events: list[tuple[float, int, str, _Run | None, int]] = []
        self.number = 0
        self.now = self.counted = trace[0].time
        self.last = trace[-1].time
        self.next_decision = math.inf
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.preemptions = self.resizes = 0
        self.decide_s: list[float] = []
        self.held, self.working = 0, 0.0
        self.held_by: dict[str, int] = defaultdict(int)
        self.wanted_by: dict[str, int] = defaultdict(int)
        self.held_time = self.working_time = 0.0
        self.had: dict[str, float] = defaultdict(float)
        self.deserved: dict[str, float] = defaultdict(float)
        self.room = Room(self.nodes)
        """To find a policy out that gives away what is held."""

    def run(self) -> Outcome:
        for of in self.trace:
            self._at(of.time, "submit", _Run(of))
        while self.events:
            self._count(self.events[0][0])
            self.now = self.events[0][0]
            while self.events and self.events[0][0] <= self.now:
                _, _, kind, run, version = heapq.heappop(self.events)
                if kind == "decide":
                    self.next_decision = math.inf
                elif run is not None and (kind == "submit" or version == run.version):
                    self._happen(kind, run)
            self._decide_when_due(kind)
        if self.active:
            raise RuntimeError(f"{len(self.active)} jobs wait for ever, {next(iter(self.active))} among them")
        return self._outcome()

    def _at(self, when: float, kind: str, run: _Run | None) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, kind, run, run.version if run else 0))

    def _happen(self, kind: str, run: _Run) -> None:
        job = run.job
        if kind == "submit":
            self.active[job.name] = run
            self.wanted_by[job.tenant] += run.of.gpus
        elif kind == "ready":
            run.as_of, run.rate = self.now, run.full_rate
            self.working += run.rate * run.of.gpus
            run.version += 1
            self._at(self.now + run.left_s / run.rate, "end", run)
        elif kind == "stopped":
            after = job.next
            self._hold(run, {})
            job.stopping, job.next = False, {}
            if after:
                self._go(run, after)
        elif kind == "end":
            self._rest(run)
            self._hold(run, {})
            self.wanted_by[job.tenant] -= run.of.gpus
            self.ended[job.name] = self.now
            del self.active[job.name]

    def _decide_when_due(self, kind: str) -> None:
        every = self.cluster.decide_every_s
        if every and kind != "decide":
            if self.next_decision == math.inf:
                self.next_decision = math.ceil(self.now / every) * every
                self._at(self.next_decision, "decide", None)
            return
        self._decide()
        waiting = any(not run.job.held for run in self.active.values())
        lively = any(run.job.min_workers < run.job.max_workers for run in self.active.values())
        if every and (waiting or lively) and (self.events or any(run.job.held for run in self.active.values())):
            self.next_decision = self.now + every
            self._at(self.next_decision, "decide", None)

    def _decide(self) -> None:
        for run in self.active.values():
            run.advance(self.now)
            run.estimate(self.now)
        jobs = [run.job for run in self.active.values()]
        state = State(self.now, self.nodes, jobs, self.tenants, self.cluster.rules)
        begun = time.perf_counter()
        decisions = self.policy(state)
        self.decide_s.append(time.perf_counter() - begun)
        for decision in decisions:
            run = self.active[decision.job]
            if isinstance(decision, Start):
                self.started.setdefault(decision.job, self.now)
                self._go(run, decision.placement)
            elif isinstance(decision, Preempt):
                self.preemptions += 1
                self._stop(run, {})
            elif isinstance(decision, Resize):
                self.resizes += 1
                self._stop(run, decision.placement)

    def _go(self, run: _Run, placement: Placement) -> None:
        self._hold(run, placement)
        run.job.since, run.ready = self.now, self.now + self.cluster.start_s
        run.version += 1
        self._at(run.ready, "ready", run)

    def _stop(self, run: _Run, after: Placement) -> None:
        self._rest(run)
        run.job.stopping, run.job.next = True, after
        self._hold(run, run.job.kept)
        run.version += 1
        self._at(self.now + self.cluster.checkpoint_s, "stopped", run)

    def _rest(self, run: _Run) -> None:
        run.advance(self.now)
        self.working -= run.rate * run.of.gpus
        run.rate = 0.0

    def _hold(self, run: _Run, placement: Placement) -> None:
        job = run.job
        before = job.size
        self.room.give(job.held, job.shape)
        job.held = placement
        self.room.take(placement, job.shape)
        if any(self.room.gpus[self.room.index[name]] < 0 for name in placement):
            raise RuntimeError(f"{job.name} was given GPUs that others hold")
        self.held += job.size - before
        self.held_by[job.tenant] += job.size - before

    def _count(self, until: float) -> None:
        """What was held since then, as long as jobs were still submitted."""
        passed = min(until, self.last) - self.counted
        self.counted = max(self.counted, min(until, self.last))
        if passed <= 0:
            return
        self.held_time += passed * self.held
        self.working_time += passed * self.working
        wanted = {name: gpus / self.cluster.gpus for name, gpus in self.wanted_by.items() if gpus}
        weights = {name: (self.tenants.get(name) or Tenant()).weight for name in wanted}
        for name, share in deserved(wanted, weights).items():
            self.deserved[name] += passed * share * self.cluster.gpus
            self.had[name] += passed * min(share * self.cluster.gpus, self.held_by[name])

    def _outcome(self) -> Outcome:
        submitted = {each.name: each.time for each in self.trace}
        took = sorted(self.ended[name] - at for name, at in submitted.items())
        window = max(self.last - self.trace[0].time, 1e-9) * self.cluster.gpus
        had = [self.had[name] / share for name, share in self.deserved.items() if share > 0]
        return Outcome(
            jobs=len(took),
            utilisation=self.held_time / window,
            goodput=self.working_time / window,
            mean_jct_s=statistics.fmean(took),
            median_jct_s=statistics.median(took),
            p99_jct_s=took[math.ceil(0.99 * len(took)) - 1],
            mean_wait_s=statistics.fmean(self.started[name] - at for name, at in submitted.items()),
            fairness=sum(had) ** 2 / (len(had) * sum(x * x for x in had)) if any(had) else 1.0,
            preemptions=self.preemptions,
            resizes=self.resizes,
            makespan_s=max(self.ended.values()) - self.trace[0].time,
            decisions=len(self.decide_s),
            started=self.started,
            ended=self.ended,
            decide_s=self.decide_s,
        )
