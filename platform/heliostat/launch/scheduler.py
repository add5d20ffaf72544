"""The scheduler of one cluster: what the policy decides about the queue's jobs is done by Ray's jobs.

A decision is written into the queue before it is carried out, and each attempt of a job has a name of its own, under
which Ray starts it once. So a scheduler may be killed anywhere: the next one finds what was decided, and asks Ray what
became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from heliostat.curves import METRICS_FILE
from heliostat.recipe import Recipe, Refused, override
from heliostat.scheduling.queue import ENDED, Entry, Queue, Record, Status
from heliostat.scheduling.speed import fit
from heliostat.scheduling.state import Job, Node, Placement, Policy, Preempt, Resize, Rules, Shape, Start, State, Tenant

Stands = Literal["unknown", "running", "ended"]
TAIL_BYTES = 1 << 14
"""Of a run's metrics that are read to see how fast it is."""
FEWEST_STEPS = 10
"""That say how fast a run is; the first are slower."""


class Cluster(Protocol):
    """What the scheduler asks of a cluster."""

    def nodes(self, ours: Mapping[str, Mapping[str, float]]) -> list[Node]:
        """Those that are alive, with what is neither free nor `ours` (by node, by Ray's names) taken off."""

    def start(self, attempt: str, recipe: Path, run_name: str, placement: Placement) -> None:
        """Train by a recipe's file, each worker on its node; nothing where the attempt was started before."""

    def stop(self, attempt: str) -> None:
        """Have it write a checkpoint and end."""

    def stands(self, attempt: str) -> Stands: ...


class Scheduler:
    def __init__(
        self,
        queue: Queue,
        cluster: Cluster,
        policy: Policy,
        tenants: Mapping[str, Tenant],
        rules: Rules,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.queue, self.cluster, self.policy, self.now = queue, cluster, policy, now
        self.tenants, self.rules = tenants, rules
        self.recipes: dict[str, Recipe] = {}
        self.ended: set[str] = set()
        self.has_gpus = False

    def turn(self) -> dict[str, Record]:
        """Look what became of the jobs, decide, and carry it out; returns all that have not ended."""
        entries = {each.name: each for each in self.queue.entries(without=self.ended)}
        records = {name: self.queue.record(name) for name in entries}
        for name, record in records.items():
            try:
                self._look(name, record)
                self._cancel(name, record)
            except Refused as error:  # as where a later version wrote its recipe
                self._end(name, record, "failed", str(error))
        self.ended |= {name for name, record in records.items() if record.status in ENDED}
        records = {name: record for name, record in records.items() if name not in self.ended}
        nodes = self.cluster.nodes(self._ours(records))
        self.has_gpus = any(node.gpus for node in nodes)
        jobs = [self._job(entries[name], record) for name, record in records.items()]
        for decision in self.policy(State(self.now(), nodes, jobs, self.tenants, self.rules)):
            record = records[decision.job]
            if isinstance(decision, Start):
                self._start(decision.job, record, decision.placement)
            elif isinstance(decision, Preempt | Resize):
                after = decision.placement if isinstance(decision, Resize) else {}
                self._stop(decision.job, record, after, decision.reason)
            elif record.reason != decision.reason:
                record.reason = decision.reason
                self.queue.save(decision.job, record)
        return records

    # What became of jobs.

    def _look(self, name: str, record: Record) -> None:
        self._recipe(name)
        if record.status not in ("running", "stopping"):
            return
        attempt = _attempt(name, record)
        stands = self.cluster.stands(attempt)
        if stands == "running":
            if record.status == "stopping":
                self.cluster.stop(attempt)  # whoever decided it may have been killed before
            self._measure(name, record)
        elif stands == "unknown" and record.status == "running":
            # It was decided and not done, or the cluster is another one.
            self._submit(name, record)
        else:
            self._has_ended(name, record)

    def _has_ended(self, name: str, record: Record) -> None:
        answer = self._answer(name)
        if answer.get("status") == "done":
            self._end(name, record, "done")
        elif self.queue.cancelled(name):
            self._end(name, record, "cancelled")
        elif record.status == "stopping" and record.next:
            self._start(name, record, record.next)
        elif record.status == "stopping":
            record.status, record.held = "waiting", {}
            self.queue.save(name, record)
        elif answer.get("status") == "interrupted":
            self._end(name, record, "cancelled", "it was stopped by somebody else")
        else:
            why = answer.get("error") or answer.get("reason") or "it ended without an answer"
            self._end(name, record, "failed", str(why))

    def _end(self, name: str, record: Record, status: Status, reason: str = "") -> None:
        record.status, record.reason, record.held, record.next = status, reason, {}, {}
        record.ended = self.now()
        self.queue.save(name, record)

    def _answer(self, name: str) -> dict[str, object]:
        file = self._run_dir(name) / "result.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _cancel(self, name: str, record: Record) -> None:
        if record.status in ENDED or not self.queue.cancelled(name):
            return
        if record.status == "waiting":
            self._end(name, record, "cancelled")
        elif record.status == "running" or record.next:
            self._stop(name, record, {}, "it was cancelled")

    def _measure(self, name: str, record: Record) -> None:
        times = [time_ for time_, _ in _last_steps(self._run_dir(name)) if time_ > record.since]
        if len(times) > FEWEST_STEPS and times[-1] > times[FEWEST_STEPS // 2]:
            counted = times[FEWEST_STEPS // 2 :]
            record.rates[sum(record.held.values())] = (len(counted) - 1) / (counted[-1] - counted[0])

    # What is to become of them.

    def _start(self, name: str, record: Record, placement: Placement) -> None:
        record.status, record.reason, record.attempt = "running", "", record.attempt + 1
        record.held, record.next, record.since = dict(placement), {}, self.now()
        self.queue.save(name, record)
        self._submit(name, record)

    def _submit(self, name: str, record: Record) -> None:
        file = self.queue.folder / name / f"attempt-{record.attempt:03d}.json"
        sizes = {"parallelism.workers": sum(record.held.values()), "parallelism.min_workers": None}
        override(self._recipe(name), sizes).save(file)
        (self._run_dir(name) / "result.json").unlink(missing_ok=True)  # an earlier attempt's
        self.cluster.start(_attempt(name, record), file, name, record.held)

    def _stop(self, name: str, record: Record, after: Placement, reason: str) -> None:
        record.resizes += bool(after)
        record.preemptions += not after and not self.queue.cancelled(name)
        record.status, record.reason, record.next = "stopping", reason, dict(after)
        self.queue.save(name, record)
        self.cluster.stop(_attempt(name, record))

    # The state, as the policy sees it.

    def _recipe(self, name: str) -> Recipe:
        if name not in self.recipes:
            self.recipes[name] = self.queue.recipe(name)
        return self.recipes[name]

    def _run_dir(self, name: str) -> Path:
        return self._recipe(name).storage_path / "runs" / name

    def _shape(self, name: str) -> Shape:
        return shape_of(self._recipe(name), self.has_gpus)

    def _job(self, entry: Entry, record: Record) -> Job:
        parallelism = self._recipe(entry.name).parallelism
        job = Job(
            entry.name,
            entry.submitted,
            parallelism.workers,
            parallelism.min_workers or parallelism.workers,
            parallelism.workers,
            self._shape(entry.name),
            parallelism.shards,
            entry.tenant,
            entry.priority,
            fit(record.rates),
            held=record.held,
            since=record.since,
            stopping=record.status == "stopping",
            next=record.next,
        )
        job.estimate_s = self._estimate_s(entry, record, job)
        return job

    def _estimate_s(self, entry: Entry, record: Record, job: Job) -> float | None:
        """By the steps that are left, where their number and pace are known; else what its owner thinks, until it has
        been displaced."""
        most, steps = self._recipe(entry.name).schedule.max_steps, _last_steps(self._run_dir(entry.name))
        if most is not None and steps and record.rates:
            size, rate = max(record.rates.items())
            return max(1.0, (most - steps[-1][1]) / rate * job.speed(size) / job.speed(job.workers))
        if entry.estimate_s is None or record.attempt > 1:
            return None
        ran_s = (self.now() - record.since) * job.speed(job.size) / job.speed(job.workers) if job.held else 0.0
        return entry.estimate_s - ran_s if ran_s < entry.estimate_s else None

    def _ours(self, records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
        """What the jobs hold, by node."""
        ours: dict[str, dict[str, float]] = {}
        for name, record in records.items():
            shape = self._shape(name)
            for node, workers in record.held.items():
                on_it = ours.setdefault(node, {"CPU": 0.0, "GPU": 0.0})
                on_it["CPU"] += workers * shape.cpus
                on_it["GPU"] += workers * shape.gpus
        return ours


def shape_of(recipe: Recipe, has_gpus: bool) -> Shape:
    """Of a worker. Tensor-parallel peers share a node."""
    parallelism = recipe.parallelism
    takes = parallelism.worker_resources(has_gpus if parallelism.use_gpu is None else parallelism.use_gpu)
    return Shape(takes["CPU"], takes.get("GPU", 0.0), parallelism.tensor)


def _attempt(name: str, record: Record) -> str:
    return f"{name}-{record.attempt:03d}"


def _last_steps(run_dir: Path) -> list[tuple[float, int]]:
    """(Unix time, step) of the last steps that a run recorded."""
    file = run_dir / METRICS_FILE
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        lines = stream.read().splitlines()
    steps = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut at either end
            continue
        if "loss" in record:
            steps.append((float(record["time"]), int(record["step"])))
    return steps
