"""The recording of a job, in its own process. Whatever happens to it, the job goes on: it warns once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import heliostat
from heliostat.record.events import EVENTS, RECORD, attend, say
from heliostat.record.logs import DRAWN, DRIVER, LOGS, TRAIN_WORKER, Log, Once, log_name
from heliostat.record.secrets import hider

RAYS_PRINTER = "ray_print_logs"
"""Ray's thread that prints what workers print. The record has that by worker."""
PATIENCE_S = 15.0
"""For the scribe's end, and below where it has something to ship."""
SHIPPING_S = 40.0

logger = logging.getLogger("heliostat")
_recording: Recording | None = None


def recording() -> Recording | None:
    """The one of this process's job."""
    return _recording


class Recording:
    """From now until `end`, what this process prints and logs, and what it and its workers `say`, is recorded."""

    def __init__(self, run_dir: Path, storage: str, max_bytes: int, begun: dict[str, Any]) -> None:
        """`storage`: where the record is shipped to, besides; empty: nowhere. `begun`: what is said of the job."""
        global _recording
        self.run_dir, self.folder, self.storage, self.max_bytes = run_dir, run_dir / RECORD, storage, max_bytes
        self.made = not run_dir.exists()
        self._warned = False
        self._scribe: subprocess.Popen[bytes] | None = None
        self._workers: dict[str, Log] = {}
        self._once: dict[str, Once] = {}
        self._named: set[tuple[str, str]] = set()
        self._handler = logging.StreamHandler(Heard(None, Lines(self)))
        self._streams = {name: Heard(getattr(sys, name), Lines(self), name) for name in ("stdout", "stderr")}
        try:
            (self.folder / EVENTS).mkdir(parents=True, exist_ok=True)
            self.driver = Log(self.folder / LOGS / DRIVER, hider(), max_bytes)
            attend(run_dir)
            say("begun", run_dir=str(run_dir), **begun)
            self._start_scribe()
        except OSError as error:
            self._fail(str(error))
            return
        _recording = self
        self._handler.setLevel(logging.WARNING)
        self._handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        for name, stream in self._streams.items():
            setattr(sys, name, stream)

    def _start_scribe(self) -> None:
        paths = [str(Path(heliostat.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "heliostat.record.scribe", str(self.run_dir)]
        command += [f"--parent={os.getpid()}", f"--max-bytes={self.max_bytes}", f"--storage={self.storage}"]
        with (self.folder / "scribe.err").open("ab") as errors:
            self._scribe = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd="/",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # what is sent to the job's group is not for it
            )

    def follow(self, session_logs: Path, job: str, ip: str) -> None:
        """Record what the workers of a Ray job print on this machine, out of Ray's files."""
        self._tell({"follow": {"logs": str(session_logs), "job": job, "ip": ip}})

    def worker(self, ip: str, pid: int | str, name: str, lines: list[str], error: bool) -> None:
        """Record what a worker elsewhere has printed; `error`: on its standard error."""
        log = log_name(ip, pid)
        if name == TRAIN_WORKER:
            lines = self._once.setdefault(log, Once()).take(lines, error)
        try:
            if log not in self._workers:
                self._workers[log] = Log(self.folder / LOGS / log, hider())
            self._workers[log].write(lines)
        except OSError as error:
            self._fail(str(error))
        if name and (log, name) not in self._named:
            self._named.add((log, name))
            say("worker", log=log, name=name)

    def heard(self, lines: list[str]) -> None:
        """This process has printed."""
        try:
            self.driver.write(lines)
        except OSError as error:
            self._fail(str(error))

    def end(self, **facts: Any) -> None:
        """The job has ended, with these facts; returns once all is on storage, or that takes too long."""
        say("ended", **facts)
        self._end("ended")

    def discard(self) -> None:
        """The job was refused: nothing is left of it, unless there was a run before."""
        if _recording is not self or not self.made or {path.name for path in self.run_dir.iterdir()} != {RECORD}:
            return
        self._end("discard")
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _end(self, how: str) -> None:
        global _recording
        if _recording is not self:
            return
        _recording = None
        logging.getLogger().removeHandler(self._handler)
        for name, stream in self._streams.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.stream)
            stream.lines.end()
        attend(None)
        assert self._scribe is not None
        assert self._scribe.stdin is not None
        self._tell({"ended": how})
        with suppress(OSError):
            self._scribe.stdin.close()
        try:
            code = self._scribe.wait(SHIPPING_S if self.storage else PATIENCE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._fail("not all of it is on storage yet; a process goes on with that")
        else:
            if code:
                self._fail(f"its process ended with {code}, see {self.folder / 'scribe.err'}")

    def _tell(self, said: dict[str, Any]) -> None:
        if self._scribe is None or self._scribe.stdin is None:
            return
        try:
            self._scribe.stdin.write(json.dumps(said).encode() + b"\n")
            self._scribe.stdin.flush()
        except OSError as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("the record of %s is not whole: %s", self.run_dir.name, reason)


def _stream(name: str) -> Any:
    return getattr(sys, name)


class Lines:
    """Makes lines of what is written bit by bit, and leaves out what only a terminal understands."""

    def __init__(self, to: Recording) -> None:
        self.to: Recording | None = to
        self._rest = ""
        self._lock = threading.RLock()

    def take(self, text: str) -> None:
        if self.to is None or DRAWN.search(text) or threading.current_thread().name == RAYS_PRINTER:
            return
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self.to.heard(lines)

    def end(self) -> None:
        """What was not ended by a line's end, and then nothing more."""
        if self.to is not None and self._rest:
            self.to.heard([self._rest])
        self.to = None


class Heard:
    """A stream that somebody listens to; to all who ask it is the stream itself, a terminal if that is one."""

    def __init__(self, stream: TextIO | None, lines: Lines, name: str = "stderr") -> None:
        """`name`: what `sys` calls it."""
        self.stream, self.lines, self._name = stream, lines, name

    def __reduce__(self) -> tuple[Any, ...]:
        return _stream, (self._name,)  # sent to another process, it is that one's

    def write(self, text: str) -> int:
        if self.stream is not None:
            self.stream.write(text)
        self.lines.take(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.stream is not None:
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
