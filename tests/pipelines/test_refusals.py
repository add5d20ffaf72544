"""Bad input is answered with the field, the reason and what to do, by exit code 2, before Ray starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.jobs import ROOT, run

CASES = {
    "unknown recipe": (["sentimant"], "recipe", "did you mean sentiment?"),
    "unknown field": (["sentiment", "--optimizer.lrr", "1"], "optimizer.lrr", "optimizer.lr"),
    "wrong type": (["sentiment", "--optimizer.lr", "fast"], "optimizer.lr", ""),
    "out of range": (["sentiment", "--optimizer.lr", "-1"], "optimizer.lr", ""),
    "unknown choice": (["sentiment", "--training.precision", "fp8"], "training.precision", "bfloat16"),
    "no such tier": (["smollm", "--deploy.precision", "int8"], "deploy.precision", "float32 or bfloat16"),
    "missing file": (["sentiment", "--data.train", "/nowhere.csv"], "data.train", "check the path"),
    "missing column": (["sentiment", "--data.label-column", "labels"], "data.train", "did you mean label?"),
    "no GPU": (["sentiment", "--parallelism.use-gpu", "True"], "parallelism.use_gpu", "false"),
    "too many workers": (["sentiment", "--parallelism.workers", "1000"], "parallelism.workers", "use ≤"),
    "record to nowhere": (["sentiment", "--record.storage", "nowhere://folder"], "record.storage", ""),
    "nothing to resume": (["sentiment", "--resume", "last"], "resume", "without --resume"),
}


ALL = """
import json, sys
import ray
from pipelines.job import main
from pipelines.train import run

begun, init = [], ray.init
ray.init = lambda *args, **settings: begun.append(settings) or init(*args, **settings)
codes = [main("train", run, words) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, len(begun)]))
"""
"""One process for all of them: most of what one takes is imports."""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, dict[str, Any]]]:
    """Exit code and answer by case."""
    storage = tmp_path_factory.mktemp("refused") / "storage"
    asked = [[*words, "--storage", str(storage)] for words, _, _ in CASES.values()]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    command = [sys.executable, "-c", ALL, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    *answers, (codes, begun) = map(json.loads, done.stdout.splitlines())
    assert begun == 0, "Ray has not been started for any"
    assert not [*storage.rglob("bundle"), *storage.rglob("*.parquet")], "nothing may be half-written"
    assert not list(storage.glob("runs/*")), "a job that is refused leaves no record"
    return dict(zip(CASES, zip(codes, answers, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, refused: dict[str, tuple[int, dict[str, Any]]]) -> None:
    _, field, suggestion = CASES[case]
    code, answer = refused[case]
    assert code == 2
    assert answer["status"] == "refused"
    assert answer["field"] == field
    assert answer["reason"]
    assert suggestion in answer["suggestion"]


def test_a_job_ends_with_its_answer(tmp_path: Path) -> None:
    done = run("train", "sentimant", "--storage", str(tmp_path / "storage"))
    assert done.code == 2, done.stderr[-2000:]
    assert (done.answer["field"], done.answer["suggestion"]) == ("recipe", "did you mean sentiment?")
    assert len(done.stdout.strip().splitlines()) == 1
