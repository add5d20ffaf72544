"""What a scheduling policy sees, and what it may decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from heliostat.scheduling.speed import UNMEASURED, Amdahl

Placement = Mapping[str, int]
"""How many workers are on each node, by the node's name."""


class Shape(NamedTuple):
    """What one worker takes, and how many workers must be on one node."""

    cpus: float = 1.0
    gpus: float = 0.0
    group: int = 1
    """Workers of one tensor-parallel group, say: a node holds whole groups."""


ONE_CPU = Shape()


@dataclass(frozen=True)
class Node:
    name: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Tenant:
    weight: float = 1.0
    """Its share of the cluster beside the other tenants' that have jobs, and what it may claim back from them."""
    max_gpus: float | None = None
    """That its jobs hold together, even where more are idle. None: no limit."""
    max_cpus: float | None = None


@dataclass(slots=True)
class Job:
    """One job as it stands. Policies read it and change nothing."""

    name: str
    submitted: float
    """In seconds; so are all times, from any common origin."""
    workers: int
    """As it was asked for."""
    min_workers: int
    max_workers: int
    shape: Shape = ONE_CPU
    step: int = 1
    """Between two sizes that it can have: `min_workers`, `min_workers` + `step` …"""
    tenant: str = "default"
    priority: int = 0
    """Among the jobs of its tenant; higher ones go first, and may take the place of lower ones."""
    speed: Amdahl = UNMEASURED
    estimate_s: float | None = None
    """What it would still take with `workers` of them, where that is known."""
    held: Placement = field(default_factory=dict)
    """Empty: it waits."""
    since: float = 0.0
    """When it was given what it holds."""
    stopping: bool = False
    """It was told to checkpoint, and holds its place until it has."""
    next: Placement = field(default_factory=dict)
    """What it will hold after `stopping`. Empty: it will wait."""

    @property
    def size(self) -> int:
        return sum(self.held.values())

    @property
    def kept(self) -> Placement:
        """What is its own until it has stopped: what it holds and what it will hold."""
        if not self.stopping or not self.next:
            return self.held
        names = {**self.held, **self.next}
        return {name: max(self.held.get(name, 0), self.next.get(name, 0)) for name in names}

    @property
    def after(self) -> Placement:
        """What it will hold once it has stopped."""
        return self.next if self.stopping else self.held

    def takes_s(self, workers: int) -> float | None:
        """What it would still take with so many workers, where that is known."""
        if self.estimate_s is None:
            return None
        return self.estimate_s * self.speed(self.workers) / self.speed(workers)


@dataclass(frozen=True)
class Rules:
    """What a policy may not do, whatever it would gain."""

    min_run_s: float = 600.0
    """A job that was started or resized is let alone for so long."""
    restart_s: float = 60.0
    """What it takes to checkpoint, start again and restore; a resize must save more."""


@dataclass
class State:
    now: float
    nodes: list[Node]
    jobs: list[Job]
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    """Those not named have the defaults."""
    rules: Rules = Rules()


@dataclass(frozen=True)
class Start:
    job: str
    placement: Placement


@dataclass(frozen=True)
class Resize:
    """Checkpoint, and go on with this placement."""

    job: str
    placement: Placement
    reason: str


@dataclass(frozen=True)
class Preempt:
    """Checkpoint, and wait until there is room again."""

    job: str
    reason: str


@dataclass(frozen=True)
class Wait:
    job: str
    reason: str


Decision = Start | Resize | Preempt | Wait
Policy = Callable[[State], list[Decision]]
