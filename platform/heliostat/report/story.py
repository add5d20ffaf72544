"""What a run's folder says happened, whoever has written it: the recorder, the ledger, the loop, the job's end."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.curves import METRICS_FILE, read_all_metrics, read_metrics
from heliostat.record.events import ALIVE, RECORD, read_events
from heliostat.record.logs import DRIVER, LOGS, read_log
from heliostat.record.secrets import hider
from heliostat.train import ledger
from heliostat.train.folder import BUNDLE, LEDGER, OUTCOME_FILE, STACKS

SILENT_S = 20.0
"""The scribe gives a sign of life every 5 s. After so long without one its job's machine is gone too."""
LINES = 60_000
"""Of all logs that a page shows: each its first and its last ones."""
MOST_LINES, LEAST_LINES = 4000, 100
"""Of each."""
LINE_CHARACTERS = 2000
STACKS_SHOWN = 64
KILLED, RUNNING, UNKNOWN = "killed", "running", "unknown"


@dataclass(frozen=True)
class LogText:
    name: str
    """As the log's folder."""
    titles: list[str]
    """What its process was: Ray's names of its actors and tasks."""
    first: list[str]
    last: list[str]
    left_out: int
    """Lines between them."""


@dataclass(frozen=True)
class Story:
    """Of a run; what there is nothing of is empty."""

    folder: Path
    status: str
    """The answer's, or `killed` where the last job ended without one, `running`, `unknown`."""
    reason: str
    """How the status is known, or what went wrong."""
    begun: dict[str, Any]
    """What the last job on the run said of itself."""
    began: float
    """When it began (Unix time), and below when it ended or the last sign of life came."""
    ended: float
    events: list[dict[str, Any]]
    """Of all jobs on the run, with attempts and failures, in the order of time."""
    attempts: list[dict[str, Any]]
    """Of the ledger: started, ended, workers, seconds by class."""
    book: dict[str, Any]
    """The last job's ledger."""
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    """The last job's answer."""
    stacks: dict[str, str]
    logs: list[LogText]
    bundle: str
    checkpoints: list[dict[str, Any]]
    """Events of those that were published."""

    @property
    def home(self) -> str:
        """The run's own folder, of which this may be a copy."""
        return str(self.begun.get("run_dir") or self.folder)


def tell(folder: Path, now: float | None = None) -> Story:
    """Read a run's folder, or what was fetched of it."""
    said = read_events(folder)
    last_life = max([_alive(folder), *(float(event["time"]) for event in said)])
    begins = [event for event in said if event["event"] == "begun"]
    begun = begins[-1] if begins else {}
    result = _json(folder / "result.json")
    metrics = read_metrics(folder / METRICS_FILE)
    attempts = _attempts(folder)
    seen = [each["ended"] for each in attempts] + [record["time"] for record in metrics]
    last_life = max([last_life, *seen])
    began = float(begun.get("time", min((each["started"] for each in attempts), default=last_life)))
    mine = [event for event in said if event["time"] >= began]
    ending = next((event for event in reversed(mine) if event["event"] in ("ended", "gone")), None)
    status, reason = _status(bool(begun), ending, result, last_life, time.time() if now is None else now)
    if begun and (ending is None or ending["event"] != "ended"):
        result = {}  # of an earlier job on this run
    ended = float(ending["time"]) if ending else last_life
    events = said + _attempt_events(attempts) + _failures(folder)
    return Story(
        folder=folder,
        status=status,
        reason=reason,
        begun=begun,
        began=began,
        ended=ended,
        events=sorted(events, key=lambda event: float(event["time"])),
        attempts=attempts,
        book=result.get("ledger") or _book(folder, began, ended, bool(attempts)),
        metrics=metrics,
        result=result,
        stacks=_stacks(folder),
        logs=_logs(folder, said),
        bundle=result.get("bundle") or (str(folder / BUNDLE) if (folder / BUNDLE).is_dir() else ""),
        checkpoints=[event for event in said if event["event"] == "checkpoint"],
    )


def _status(
    recorded: bool, ending: dict[str, Any] | None, result: dict[str, Any], last_life: float, now: float
) -> tuple[str, str]:
    if not recorded:
        return str(result.get("status", UNKNOWN)), str(result.get("error", "")) or "the job was not recorded"
    if ending is None:
        if now - last_life < SILENT_S:
            return RUNNING, ""
        return KILLED, "there is no more sign of life, and no answer"
    if ending["event"] == "gone":
        return KILLED, str(ending["reason"])
    return str(ending["status"]), str(ending.get("error") or "")


def _book(folder: Path, began: float, ended: float, any_attempts: bool) -> dict[str, Any]:
    if not any_attempts:
        return {}
    made = [(each["time"], each["tokens"]) for each in read_all_metrics(folder / METRICS_FILE) if "tokens" in each]
    outcome = _json(folder / OUTCOME_FILE)
    speed = ledger.Speed(made, outcome.get("flops_per_token"), outcome.get("peak_flops"))
    return ledger.summarise(folder / LEDGER, began, ended, speed)


def _attempts(folder: Path) -> list[dict[str, Any]]:
    found = [_json(file) for file in sorted((folder / LEDGER).glob("attempt-*.json"))]
    return [attempt for attempt in found if attempt]


def _attempt_events(attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"time": each["started"], "event": "attempt", "number": number, "workers": each["workers"]}
        for number, each in enumerate(attempts, 1)
    ]


def _failures(folder: Path) -> list[dict[str, Any]]:
    found = ledger.failures(folder / LEDGER)
    return [{"time": each["time"], "event": "failure", "reasons": each["reasons"]} for each in found]


def _alive(folder: Path) -> float:
    with suppress(OSError, ValueError):
        return float((folder / RECORD / ALIVE).read_text())
    return 0.0


def _stacks(folder: Path) -> dict[str, str]:
    files = sorted((folder / STACKS).glob("*.txt"))[:STACKS_SHOWN]
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}


def _logs(folder: Path, said: list[dict[str, Any]]) -> list[LogText]:
    """The job's own first."""
    titles: dict[str, list[str]] = {}
    for event in said:
        if event["event"] == "worker":
            titles.setdefault(event["log"], []).append(event["name"])
    found = []
    logs = sorted((folder / RECORD / LOGS).glob("*/"), key=lambda path: (path.name != DRIVER, path.name))
    share = min(MOST_LINES, max(LEAST_LINES, LINES // max(1, len(logs))))
    for log in logs:
        first: list[str] = []
        last: deque[str] = deque(maxlen=share - share // 10)
        count = 0
        for line in read_log(log):
            count += 1
            (first if len(first) < share // 10 else last).append(line[:LINE_CHARACTERS])
        named = list(dict.fromkeys(titles.get(log.name, [])))
        found.append(LogText(log.name, named, first, list(last), count - len(first) - len(last)))
    return found


def _json(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def hide_all(value: Any, hide: Callable[[str], str] | None = None) -> Any:
    """The same with secrets hidden in all its texts: not all that is in a run's folder was written by the recorder."""
    hide = hide or hider()
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {key: hide_all(each, hide) for key, each in value.items()}
    if isinstance(value, list):
        return [hide_all(each, hide) for each in value]
    return value


def newest(runs: Path) -> Path | None:
    """The run whose record was written last."""
    found = list(runs.glob(f"*/{RECORD}/{ALIVE}"))
    return max(found, key=lambda file: file.stat().st_mtime).parents[1] if found else None
