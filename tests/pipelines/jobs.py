"""Runs jobs as a person does: a process, its exit code, its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    answer: dict[str, Any]
    stdout: str
    stderr: str


def start(job: str, *words: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(
        [sys.executable, "-m", f"pipelines.{job}", *words],
        cwd=cwd,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> Done:
    stdout, stderr = process.communicate(timeout=timeout_s)
    lines = stdout.strip().splitlines()
    assert lines, f"nothing on stdout; stderr ends:\n{stderr[-3000:]}"
    return Done(process.returncode, json.loads(lines[-1]), stdout, stderr)


def run(job: str, *words: str, cwd: Path = ROOT, **env: str) -> Done:
    return finish(start(job, *words, cwd=cwd, **env))
