"""The watchdog of one process: where it makes no progress it saves the stacks of its threads and ends it, so that
whoever started it can start it again."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path

EXIT_CODE = 86
PEERS_S = 3.0
"""Peers wait for the same step, and notice within moments of each other. Ending one ends the others: not before they
have saved their stacks."""

logger = logging.getLogger("heliostat")


class Watchdog:
    """Watches from the first `beat`, which every bit of progress repeats."""

    def __init__(self, timeout_s: float, file: Path) -> None:
        """`file`: for the stacks; made when there are some."""
        self.timeout_s, self.file = timeout_s, file
        self._beat: float | None = None
        self._armed = 0.0
        self._stopped = threading.Event()

    def beat(self) -> None:
        now = time.monotonic()
        if self._beat is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self._beat = now
        if now - self._armed > 1.0:  # it starts a thread each time
            self._armed = now
            # For a thread that holds Python's lock: this one needs no lock, and says it on the standard error.
            faulthandler.dump_traceback_later(self.timeout_s + 2 * PEERS_S, exit=True)

    def stop(self) -> None:
        if self._beat is not None:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout_s / 10)):
            assert self._beat is not None
            if time.monotonic() - self._beat < self.timeout_s:
                continue
            with self.file.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            logger.error("no progress for %g s: stacks are in %s; the process ends", self.timeout_s, self.file)
            time.sleep(PEERS_S)
            os._exit(EXIT_CODE)
