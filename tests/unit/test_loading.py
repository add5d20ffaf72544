"""A job says that it loads before it imports what takes seconds; to people, not to programs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = [sys.executable, "-m", "pipelines.keys", "--help"]


def test_on_a_terminal_something_is_said_at_once() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(WORDS, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as screen:
            assert screen.read(100).decode().startswith("heliostat: loading")


def test_elsewhere_nothing_is() -> None:
    ran = subprocess.run(WORDS, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "loading" not in ran.stderr + ran.stdout
