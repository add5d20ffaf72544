"""The queue and the scheduler that works it off, which may be killed anywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from heliostat.launch.scheduler import Scheduler, Stands, shape_of
from heliostat.recipe import Recipe, Refused, build, load
from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.queue import Queue, Record, entry_of
from heliostat.scheduling.state import Node, Placement, Rules, Shape
from pipelines.schedule import parse, tenants


class Killed(BaseException):
    """As if by SIGKILL: nobody catches it."""


class Machine:
    """A cluster of one node whose jobs end when a test says so. `kill_at`: the scheduler dies at so many-eth call of
    it, before the call has had an effect or just after."""

    def __init__(self, storage: Path, cpus: int = 4) -> None:
        self.storage, self.cpus = storage, cpus
        self.started: list[str] = []
        self.running: dict[str, Placement] = {}
        self.stopped: set[str] = set()
        self.calls, self.kill_at, self.after_effect = 0, -1, False

    def dies(self, after: bool) -> bool:
        return self.calls == self.kill_at and after == self.after_effect

    def call(self) -> Iterator[None]:
        self.calls += 1
        if self.dies(after=False):
            raise Killed
        yield
        if self.dies(after=True):
            raise Killed

    def nodes(self, ours: Mapping[str, Mapping[str, float]]) -> list[Node]:
        return [Node("n", self.cpus)]

    def start(self, attempt: str, recipe: Path, run_name: str, placement: Placement) -> None:
        for _ in self.call():
            assert sum(map(len, [self.running, self.stopped])) <= self.cpus
            assert load(recipe).parallelism.workers == sum(placement.values())
            if attempt not in self.started:
                self.started.append(attempt)
                self.running[attempt] = placement

    def stop(self, attempt: str) -> None:
        for _ in self.call():
            self.stopped |= {attempt} & self.running.keys()

    def stands(self, attempt: str) -> Stands:
        for _ in self.call():
            return "running" if attempt in self.running else "ended" if attempt in self.started else "unknown"
        raise AssertionError

    def end(self, attempt: str, **answer: Any) -> None:
        del self.running[attempt]
        self.stopped.discard(attempt)
        run_dir = self.storage / "runs" / attempt.rpartition("-")[0]
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "result.json").write_text(json.dumps(answer))


def recipe(storage: Path, workers: int, **parallelism: Any) -> Recipe:
    sizes = {"workers": workers, **parallelism}
    return build({"name": "tiny", "task": "language_model", "storage": str(storage), "parallelism": sizes})


def submit(queue: Queue, name: str, workers: int, priority: int = 0, **parallelism: Any) -> None:
    given = recipe(queue.folder.parent, workers, **parallelism)
    queue.submit(given, entry_of(given, name, "a", priority, None))


class Bench:
    """A queue with a scheduler that is started again where it was killed."""

    def __init__(self, storage: Path, cpus: int = 4) -> None:
        self.queue, self.machine, self.time = Queue(storage), Machine(storage, cpus), 1000.0
        self.scheduler = self.new()

    def new(self) -> Scheduler:
        return Scheduler(self.queue, self.machine, fair_share, {}, Rules(0.0, 10.0), lambda: self.time)

    def turn(self) -> None:
        self.time += 1
        try:
            self.scheduler.turn()
        except Killed:
            self.scheduler = self.new()
            self.scheduler.turn()

    def stands(self, name: str) -> Record:
        return self.queue.record(name)


def play(bench: Bench) -> None:
    """`low` gives way to `high` and goes on after it."""
    submit(bench.queue, "low", 4)
    bench.turn()
    submit(bench.queue, "high", 3, priority=1)
    bench.turn()
    assert bench.stands("low").status == "stopping"
    assert bench.stands("low").reason == "high takes its place"
    assert bench.machine.stopped == {"low-001"}
    assert bench.stands("high").status == "waiting"
    bench.machine.end("low-001", status="interrupted", step=7)
    bench.turn()
    bench.turn()
    assert (bench.stands("low").status, bench.stands("high").status) == ("waiting", "running")
    bench.machine.end("high-001", status="done")
    bench.turn()
    bench.turn()
    assert bench.stands("high").status == "done"
    assert bench.stands("low").status == "running"
    bench.machine.end("low-002", status="done")
    bench.turn()
    bench.turn()
    low = bench.stands("low")
    assert (low.status, low.attempt, low.preemptions, low.held) == ("done", 2, 1, {})
    assert bench.machine.started == ["low-001", "high-001", "low-002"]
    assert not bench.machine.running


def test_a_scheduler_that_is_killed_anywhere_loses_and_repeats_nothing(tmp_path: Path) -> None:
    undisturbed = Bench(tmp_path / "undisturbed")
    play(undisturbed)
    assert undisturbed.machine.calls > 8
    for kill_at in range(1, undisturbed.machine.calls + 1):
        for after_effect in (False, True):
            bench = Bench(tmp_path / f"{kill_at}-{after_effect}")
            bench.machine.kill_at, bench.machine.after_effect = kill_at, after_effect
            play(bench)


def test_an_elastic_run_shrinks_and_grows(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    submit(bench.queue, "elastic", 4, min_workers=1)
    bench.turn()
    assert bench.machine.running == {"elastic-001": {"n": 4}}
    submit(bench.queue, "other", 2)
    bench.turn()
    assert bench.stands("elastic").next == {"n": 2}
    bench.machine.end("elastic-001", status="interrupted")
    bench.turn()
    bench.turn()
    assert bench.machine.running == {"elastic-002": {"n": 2}, "other-001": {"n": 2}}
    smaller = load(tmp_path / "queue" / "elastic" / "attempt-002.json").parallelism
    assert (smaller.workers, smaller.min_workers) == (2, None)
    bench.machine.end("other-001", status="done")
    bench.time += 100  # in which it has run long enough for growth to pay
    bench.turn()
    assert bench.stands("elastic").next == {"n": 4}
    bench.machine.end("elastic-002", status="interrupted")
    bench.turn()
    assert bench.machine.running == {"elastic-003": {"n": 4}}
    assert (bench.stands("elastic").resizes, bench.stands("elastic").preemptions) == (2, 0)


def test_speed_is_measured_and_says_what_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    submit(bench.queue, "run", 2)
    file = tmp_path / "queue" / "run" / "recipe.json"
    file.write_text(file.read_text().replace('"max_steps": null', '"max_steps": 100'))
    bench.turn()
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0, "time": bench.time + 0.5 * step}) for step in range(1, 41)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 41, "lo')
    bench.time += 20
    record = bench.scheduler.turn()["run"]
    assert record.rates == pytest.approx({2: 2.0})
    (job,) = [bench.scheduler._job(entry, record) for entry in bench.queue.entries()]
    assert job.estimate_s == pytest.approx((100 - 40) / 2.0)


def test_cancelled(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    submit(bench.queue, "runs", 4)
    submit(bench.queue, "waits", 4)
    bench.turn()
    for name in ("runs", "waits"):
        bench.queue.cancel(name)
    bench.turn()
    assert bench.stands("waits").status == "cancelled"
    assert bench.machine.stopped == {"runs-001"}
    bench.machine.end("runs-001", status="interrupted")
    bench.turn()
    assert (bench.stands("runs").status, bench.stands("runs").preemptions) == ("cancelled", 0)
    with pytest.raises(Refused, match="cancelled already"):
        bench.queue.cancel("runs")
    with pytest.raises(Refused, match="no job 'other'"):
        bench.queue.cancel("other")


def test_what_fails_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for name, answer in {"bad": {"status": "failed", "error": "no luck"}, "lost": {}}.items():
        submit(bench.queue, name, 1)
        bench.turn()
        bench.machine.end(f"{name}-001", **answer)
        bench.turn()
    assert bench.stands("bad").reason == "no luck"
    assert bench.stands("lost").reason == "it ended without an answer"
    assert {bench.stands(name).status for name in ("bad", "lost")} == {"failed"}


def test_a_recipe_that_cannot_be_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    submit(bench.queue, "newer", 1)
    submit(bench.queue, "good", 1)
    file = tmp_path / "queue" / "newer" / "recipe.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    bench.turn()
    assert bench.stands("newer").status == "failed"
    assert "version" in bench.stands("newer").reason
    assert bench.stands("good").status == "running"


def test_a_job_is_submitted_once(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    submit(queue, "one", 1)
    with pytest.raises(Refused, match="submitted before"):
        submit(queue, "one", 2)
    assert queue.recipe("one").parallelism.workers == 1
    with pytest.raises(Refused, match="not a folder's name"):
        submit(queue, "../one", 1)


HOLD = """
import sys
from pathlib import Path
from heliostat.scheduling.queue import Queue

with Queue(Path(sys.argv[1])).alone():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_scheduler_for_a_queue_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refused, match="another scheduler"), Queue(tmp_path).alone():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Queue(tmp_path).alone():
            pass


def test_tensor_peers_share_a_node(tmp_path: Path) -> None:
    one = recipe(tmp_path, 8, tensor=4, cpus_per_worker=2.0)
    assert shape_of(one, has_gpus=True) == Shape(2.0, 1.0, 4)
    assert shape_of(one, has_gpus=False) == Shape(2.0, 0.0, 4)


def test_commands(tmp_path: Path) -> None:
    options, given = parse(["submit", "tiny_lm", "--priority", "3", "--tenant", "vision", "--optimizer.lr", "0.5"])
    assert (options.priority, options.tenant) == (3, "vision")
    assert given is not None
    assert given.optimizer.lr == 0.5
    with pytest.raises(Refused, match="did you mean tiny_lm"):
        parse(["submit", "tiny_ml"])
    with pytest.raises(Refused, match=r"optimizer\.lrr"):
        parse(["submit", "tiny_lm", "--optimizer.lrr", "1"])
    file = tmp_path / "tenants.json"
    file.write_text('{"vision": {"weight": 2, "max_gpus": 8}}')
    assert tenants(file)["vision"].max_gpus == 8
    for text in ('{"vision": {"wait": 2}}', '{"vision": {"weight": 0}}', "[1]", "{"):
        file.write_text(text)
        with pytest.raises(Refused, match="tenants"):
            tenants(file)
