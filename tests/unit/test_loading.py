"""A job says that it loads before it imports what takes seconds; to people, not to programs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from pipelines import WITH_RECIPE

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


def test_wrong_words_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for package in ("ray", "torch", "transformers"):
        (tmp_path / f"{package}.py").write_text("raise AssertionError('loaded')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'platform'}"}

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.train", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    wrong = ran("sentiment", "--optimiser.lr", "1e-4")
    assert wrong.returncode == 2
    assert json.loads(wrong.stdout.splitlines()[-1])["suggestion"].endswith("optimizer.lr?")
    assert wrong.stderr.splitlines() == [
        "refused: optimiser.lr: no such field in a recipe (did you mean optimizer.lr?)"
    ]
    assert "loaded" in ran("sentiment", "--optimizer.lr", "1e-4").stderr


def test_every_job_with_a_recipe_does_so() -> None:
    jobs = {path.stem for path in (ROOT / "pipelines").glob("*.py") if f'main("{path.stem}", run)' in path.read_text()}
    assert jobs == WITH_RECIPE
