"""Bad input is answered with the field, the reason and what to do, by exit code 2, before Ray starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.jobs import run
from tests.recipes import text_file, tiny_bert

CASES = {
    "unknown recipe": (["sentimant"], "recipe", "did you mean sentiment?"),
    "unknown field": (["sentiment", "--optimizer.lrr", "1"], "optimizer.lrr", "optimizer.lr"),
    "wrong type": (["sentiment", "--optimizer.lr", "fast"], "optimizer.lr", ""),
    "out of range": (["sentiment", "--optimizer.lr", "-1"], "optimizer.lr", ""),
    "unknown choice": (["sentiment", "--training.precision", "fp8"], "training.precision", "bfloat16"),
    "missing file": (["sentiment", "--data.train", "/nowhere.csv"], "data.train", "check the path"),
    "no GPU": (["sentiment", "--parallelism.use-gpu", "True"], "parallelism.use_gpu", "false"),
    "too many workers": (["sentiment", "--parallelism.workers", "1000"], "parallelism.workers", "use ≤"),
    "nothing to resume": (["sentiment", "--resume", "last"], "resume", "without --resume"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    words, field, suggestion = CASES[case]
    done = run("train", *words, "--storage", str(tmp_path / "storage"))
    assert done.code == 2, done.stderr[-2000:]
    assert done.answer["status"] == "refused"
    assert done.answer["field"] == field
    assert done.answer["reason"]
    assert suggestion in done.answer["suggestion"]
    assert len(done.stdout.strip().splitlines()) == 1
    assert "Started a local Ray instance" not in done.stderr
    assert not list((tmp_path / "storage").rglob("bundle")), "nothing may be half-written"


def test_wrong_column_leaves_nothing(tmp_path: Path) -> None:
    recipe = tiny_bert(tmp_path)
    recipe.save(tmp_path / "recipe.json")
    done = run(
        "prepare",
        "--recipe",
        str(tmp_path / "recipe.json"),
        "--data.label-column",
        "labels",
        "--data.train",
        str(text_file(tmp_path / "source", 96)),
    )
    assert done.code == 2
    assert done.answer["field"] == "data.train"
    assert done.answer["suggestion"] == "did you mean label?"
    assert not list((tmp_path / "storage").rglob("*.parquet"))
