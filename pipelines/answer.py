"""How every job ends: people have read stderr, and the last line of stdout is one JSON object, which is also written to
the run's folder. Imports nothing that takes long, for jobs that answer at once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heliostat.recipe import Refused, write_atomically

EXIT_CODES = {"failed": 1, "different": 1, "refused": 2, "problems": 2, "interrupted": 130}
"""By the answer's status; of all others 0."""


def answer(
    name: str,
    body: Callable[[], dict[str, Any]],
    run_dir: Callable[[], Path | None] = lambda: None,
    ended: Callable[[dict[str, Any]], None] = lambda answer: None,
) -> int:
    """Run a job's body and answer with what it returns; returns the exit code: 0 done, 1 failure, 2 refused input, 130
    interrupted. `run_dir`: the run's folder, asked once the body has ended. `ended` is told the answer once it is
    there."""
    started = time.time()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    with _json_stdout() as say:
        try:
            result = body()
        except Refused as error:
            result = {"status": "refused", "field": error.field, "reason": error.reason, "suggestion": error.suggestion}
            print(f"refused: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            result = {"status": "interrupted"}
        except Exception as error:
            logging.getLogger("heliostat").exception("%s failed", name)
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        whole: dict[str, Any] = {"job": name, "status": "done"}
        folder = run_dir()
        if folder is not None and folder.is_dir():
            whole |= {"run_dir": str(folder), "result": str(folder / "result.json")}
        whole |= {"seconds": round(time.time() - started, 3), "metrics": {}} | result
        text = json.dumps(whole)
        if "result" in whole:
            write_atomically(Path(whole["result"]), text + "\n")
        ended(whole)
        say(text)
    return EXIT_CODES.get(whole["status"], 0)


def end_on_signals() -> None:
    """For jobs that run until they are told: SIGTERM ends them as Ctrl-C does, and so does SIGINT where a shell that
    started them in the background had it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def _json_stdout() -> Any:
    """Everything that is printed goes to stderr; the function given back writes to the real stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        os.write(kept, (text + "\n").encode())

    try:
        yield say
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
