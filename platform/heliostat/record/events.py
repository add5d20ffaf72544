"""What happened in a run, one JSON object a line, in a file of each process that says it: on a network's file system
only one process can append to a file."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from heliostat.record.secrets import hider

RECORD = "record"
"""In a run's folder."""
EVENTS = "events"
"""In the record's."""
ALIVE = "alive"
"""In the record's too: the Unix time when the scribe last looked."""

_folder: Path | None = None


def attend(run_dir: Path | None) -> None:
    """From now on what this process says goes to the record of this run, or to that of the run it is a part of; nowhere
    where neither is recorded, or for None."""
    global _folder
    folders = [] if run_dir is None else [run / RECORD / EVENTS for run in (run_dir, run_dir.parent)]
    _folder = next((folder for folder in folders if folder.is_dir()), None)


def say(event: str, /, **facts: Any) -> None:
    """Note what happened, now. A record that cannot be written stops nobody."""
    if _folder is None:
        return
    host, pid = socket.gethostname(), os.getpid()
    record = {"time": time.time(), "event": event, "host": host, "pid": pid, **facts}
    line = hider()(json.dumps(record, default=str, ensure_ascii=False))
    # One write: a process that is killed leaves the whole line or none of it.
    with suppress(OSError):
        file = os.open(_folder / f"{host}-{pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (line + "\n").encode())
        finally:
            os.close(file)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Those of all processes, in the order of their time. A line cut by a crash is left out."""
    found = []
    for file in (run_dir / RECORD / EVENTS).glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                found.append(json.loads(line))
    return sorted(found, key=lambda event: float(event["time"]))
