"""The scribe of a job, a process beside it: copies what workers on this machine print out of Ray's files, ships the
record to an object store, and notes when the job is gone. It outlives the job, even where that is killed, until the
last line is on storage.

`python -m heliostat.record.scribe RUN_DIR …`: the job says on its standard input what to follow, and that it has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from heliostat.record.events import ALIVE, RECORD, attend, say
from heliostat.record.logs import LOGS, TRAIN_WORKER, Log, Once, Rotation, Tail, log_name
from heliostat.record.secrets import hider

TICK_S = 0.2
SHIP_S = 0.25
"""Between parts; with a tick and the time that a part takes, what a lost machine takes with it."""
ROTATE_S = 2.0
ALIVE_S = 5.0
LINGER_S = 2.0
"""Workers may print until they notice that the job is gone."""
LAST_S = 30.0
"""For an object store that takes nothing, at the end."""
WORKER_FILE = re.compile(r"worker-[0-9a-f]+-(?P<job>[0-9a-f]+)-(?P<pid>\d+)\.(?:out|err)")
NO_JOB = "ffffffff"
"""In the name of a worker's file: it was started before a job had asked for it."""
NAMES = (":actor_name:", ":task_name:")
"""How Ray begins a worker's line that says what it is, and below, for whom."""
JOB = ":job_id:"
BAR = "__ray_tqdm_magic_token__"
"""In a line by which Ray draws a progress bar."""


class Worker:
    """One of a worker's two files."""

    def __init__(self, file: Path, job: str) -> None:
        self.tail, self.job = Tail(file), job


class Workers:
    """Copies what the workers of a Ray job print on this machine."""

    def __init__(self, session_logs: Path, job: str, ip: str, folder: Path) -> None:
        """`ip`: this node's, by which Ray knows it. `folder`: for the logs."""
        self.session_logs, self.job, self.ip, self.folder = session_logs, job, ip, folder
        self.hide = hider()
        self._files: dict[Path, Worker] = {}
        self._logs: dict[str, Log] = {}
        self._named: set[tuple[str, str]] = set()
        self._once: dict[str, Once] = {}

    def copy(self, last: bool = False) -> None:
        for file in self.session_logs.glob("worker-*"):
            match = WORKER_FILE.fullmatch(file.name)
            if match and file not in self._files and match["job"] in (self.job, NO_JOB):
                self._files[file] = Worker(file, match["job"])
        for file, worker in self._files.items():
            lines = self._mine(file, worker, worker.tail.lines(last))
            if (file.stem, TRAIN_WORKER) in self._named:
                lines = self._once.setdefault(file.stem, Once()).take(lines, file.suffix == ".err")
            if lines:
                self._log(file).write(lines)

    def _mine(self, file: Path, worker: Worker, lines: list[str]) -> list[str]:
        """What its worker printed for this job, without Ray's own remarks."""
        mine = []
        for line in lines:
            if line.startswith(JOB):
                worker.job = line.removeprefix(JOB)
            elif line.startswith(NAMES):
                name = line[1:].partition(":")[2]
                if worker.job == self.job and (file.stem, name) not in self._named:
                    self._named.add((file.stem, name))
                    say("worker", log=self._name(file), name=name)
            elif worker.job == self.job and BAR not in line:
                mine.append(line)
        return mine

    def _name(self, file: Path) -> str:
        return log_name(self.ip, file.stem.rpartition("-")[2])

    def _log(self, file: Path) -> Log:
        name = self._name(file)
        if name not in self._logs:
            self._logs[name] = Log(self.folder / name, self.hide)
        return self._logs[name]


class Scribe:
    def __init__(self, run_dir: Path, parent: int, most_bytes: int, storage: str) -> None:
        self.run_dir, self.parent, self.storage = run_dir, parent, storage
        self.record = run_dir / RECORD
        self.rotation = Rotation(self.record / LOGS, most_bytes)
        self.workers: Workers | None = None
        self.ended = self.discarded = False
        self._said = b""
        self._alive = self._rotated = 0.0

    def run(self) -> None:
        attend(self.run_dir)
        settled = threading.Event()
        shipping = threading.Thread(target=self._ship, args=(settled,), name="ship", daemon=True)
        if self.storage:
            shipping.start()
        while self._listen():
            self._step()
        if not self.ended:
            say("gone", reason="the job's process is gone, and has not said why")
            end = time.monotonic() + LINGER_S
            while time.monotonic() < end:
                self._step()
                time.sleep(TICK_S)
        if not self.discarded:
            self._step(last=True)
        settled.set()
        if self.storage:
            shipping.join(LAST_S)

    def _listen(self) -> bool:
        """Wait a tick for what the job says; False once there is no more."""
        if not select.select([0], [], [], TICK_S)[0]:
            # Its standard input may outlive it in a process that it has forked.
            return os.getppid() == self.parent
        data = os.read(0, 65536)
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(data) and not self.ended

    def _obey(self, said: dict[str, Any]) -> None:
        self.ended = self.ended or "ended" in said
        self.discarded = self.discarded or said.get("ended") == "discard"
        if follow := said.get("follow"):
            self._step()  # of another cluster, before
            self.workers = Workers(Path(follow["logs"]), follow["job"], follow["ip"], self.record / LOGS)

    def _step(self, last: bool = False) -> None:
        now = time.monotonic()
        with suppress(OSError):  # a full disk: there may be room again
            if self.workers is not None:
                self.workers.copy(last)
            if last or now - self._alive >= ALIVE_S:
                self._alive = now
                (self.record / ALIVE).write_text(f"{time.time()}\n")
            if now - self._rotated >= ROTATE_S:
                self._rotated = now
                files, size = self.rotation.turn()
                if files:
                    say("rotated", files=files, bytes=size, reason="record.max_bytes")

    def _ship(self, settled: threading.Event) -> None:
        from heliostat.place import Place
        from heliostat.recipe import Refused
        from heliostat.record.parts import Shipper

        try:
            place = Place.at(self.storage, "record.storage") / self.run_dir.name / RECORD
        except Refused as error:
            say("not_shipped", reason=str(error))
            return
        shipper, failed = Shipper(self.run_dir, place, hider()), False
        while True:
            last = settled.wait(SHIP_S)  # what comes after this is in the last part
            try:
                if last and self.discarded:
                    shipper.withdraw()
                    return
                shipper.ship()
                if last:
                    shipper.fold()
                    shipper.settle()
                    return
            except OSError as error:
                if not failed:
                    say("not_shipped", reason=str(error))
                failed = True
                if last:
                    time.sleep(1.0)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--storage", default="")
    options = parser.parse_args(words)
    Scribe(options.run_dir, options.parent, options.max_bytes, options.storage).run()


if __name__ == "__main__":
    main(sys.argv[1:])
