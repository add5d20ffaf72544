"""The queue of a cluster, in a folder that people and the scheduler share. Every file has one writer: a job is written
by who submits it and never again, a cancellation by who cancels, and how a job stands by the scheduler. Each is written
beside and renamed, so that whoever is killed leaves no half of one."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heliostat.recipe import Recipe, Refused, load, write_atomically

QUEUE_VERSION = 1
Status = Literal["waiting", "running", "stopping", "done", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Entry:
    """What was submitted. Its recipe lies beside."""

    name: str
    submitted: float
    """Unix time."""
    tenant: str = "default"
    priority: int = 0
    estimate_s: float | None = None
    """What it takes with all its workers, as its owner thinks."""
    version: int = QUEUE_VERSION


@dataclass
class Record:
    """How a job stands."""

    status: Status = "waiting"
    reason: str = ""
    """Why it waits, or stops, or failed."""
    attempt: int = 0
    """How often it was started."""
    held: dict[str, int] = field(default_factory=dict)
    """Workers by node."""
    next: dict[str, int] = field(default_factory=dict)
    """What it goes on with after `stopping`. Empty: it waits."""
    since: float = 0.0
    preemptions: int = 0
    resizes: int = 0
    rates: dict[int, float] = field(default_factory=dict)
    """Steps a second, by the number of workers."""
    ended: float | None = None


class Queue:
    def __init__(self, storage: Path) -> None:
        self.folder = storage / "queue"

    def submit(self, recipe: Recipe, entry: Entry) -> None:
        """Raises Refused where a job of the name was submitted before."""
        folder = self.folder / entry.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            raise Refused("run_name", f"{entry.name} was submitted before", "choose another name") from None
        recipe.save(folder / "recipe.json")
        write_atomically(folder / "job.json", json.dumps(dataclasses.asdict(entry)))

    def cancel(self, name: str) -> Record:
        """Ask for a job's end; returns how it stands now. Raises Refused where there is none, or it has ended."""
        if not (self.folder / name / "job.json").is_file():
            raise Refused("name", f"no job {name!r} in {self.folder}", "`list` shows them")
        record = self.record(name)
        if record.status in ENDED:
            raise Refused("name", f"{name} is {record.status} already")
        (self.folder / name / "cancel").touch()
        return record

    def cancelled(self, name: str) -> bool:
        return (self.folder / name / "cancel").exists()

    def entries(self, without: Container[str] = ()) -> list[Entry]:
        """In the order of submission."""
        files = [file for file in self.folder.glob("*/job.json") if file.parent.name not in without]
        found = [_entry(json.loads(file.read_text())) for file in files]
        return sorted(found, key=lambda entry: (entry.submitted, entry.name))

    def recipe(self, name: str) -> Recipe:
        return load(self.folder / name / "recipe.json")

    def record(self, name: str) -> Record:
        file = self.folder / name / "state.json"
        if not file.is_file():
            return Record()
        written: dict[str, Any] = json.loads(file.read_text())
        return Record(**written | {"rates": {int(size): rate for size, rate in written["rates"].items()}})

    def save(self, name: str, record: Record) -> None:
        """The scheduler's alone."""
        write_atomically(self.folder / name / "state.json", json.dumps(dataclasses.asdict(record)))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Held by the one scheduler of a queue; ends with its process, however that ends. Raises Refused where another
        has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused("storage", f"another scheduler works on {self.folder}", "stop that one") from None
            yield


def entry_of(recipe: Recipe, name: str, tenant: str, priority: int, estimate_s: float | None) -> Entry:
    """Raises Refused."""
    if not tenant:
        raise Refused("tenant", "it has no name")
    if estimate_s is not None and estimate_s <= 0:
        raise Refused("estimate_s", f"{estimate_s:g} is no time", "leave it out where nobody knows")
    name = name or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
    if name != Path(name).name or name.startswith("."):
        raise Refused("run_name", f"{name!r} is not a folder's name")
    return Entry(name, time.time(), tenant, priority, estimate_s)


def _entry(written: dict[str, Any]) -> Entry:
    if written.get("version", 0) > QUEUE_VERSION:
        raise Refused("storage", f"{written['name']} was submitted by a newer version", "update this one")
    return Entry(**written)
