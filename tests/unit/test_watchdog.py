"""A process that hangs: its stacks are saved, and it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from heliostat.train.watchdog import EXIT_CODE

SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from heliostat.train.watchdog import Watchdog

def stuck_in_python():
    while True:
        time.sleep(0.1)

def stuck_in_c():
    ctypes.PyDLL(None).sleep(100)  # keeps Python's lock

dog = Watchdog(0.5, Path(sys.argv[1]))
for _ in range(10):
    dog.beat()
    time.sleep(0.2)
if sys.argv[2] == "end":
    dog.stop()
    time.sleep(2)
else:
    globals()[sys.argv[2]]()
"""


def run(file: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), how], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_hang_saves_the_stacks_and_ends_the_process(tmp_path: Path) -> None:
    done = run(tmp_path / "stacks" / "rank.txt", "stuck_in_python")
    assert done.returncode == EXIT_CODE
    assert "stuck_in_python" in (tmp_path / "stacks" / "rank.txt").read_text()


def test_a_thread_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    done = run(tmp_path / "rank.txt", "stuck_in_c")
    assert done.returncode != 0
    assert "stuck_in_c" in done.stderr


def test_progress_and_an_end_leave_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "rank.txt", "end")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "rank.txt").exists()
