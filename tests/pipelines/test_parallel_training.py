"""Each kind of parallelism through the job that people start: four workers of Ray Train, and the losses of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.recipe import Recipe
from tests.pipelines.jobs import run
from tests.recipes import tiny_llama

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
KINDS = {
    "llama": (
        "",
        "--parallelism.fsdp 4",
        "--parallelism.tensor 2",
        "--parallelism.pipeline 2 --parallelism.fsdp 2",
        "--parallelism.context 2 --parallelism.fsdp 2",
    ),
    "mixtral": ("--parallelism.expert 2",),
}


def losses(file: Path, *arguments: str) -> list[float]:
    done = run("train", str(file), *arguments)
    assert done.code == 0, done.stderr[-3000:]
    found: list[float] = done.answer["losses"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_four_workers_train_like_one(family: str, tmp_path: Path) -> None:
    recipe: Recipe = tiny_llama(tmp_path, **{"schedule.max_steps": 4})
    if family == "mixtral":
        recipe.model.config.update(MIXTRAL)
    recipe.save(tmp_path / "recipe.json")
    expected = losses(tmp_path / "recipe.json")
    assert len(expected) == 4
    for kind in KINDS[family]:
        got = losses(tmp_path / "recipe.json", "--parallelism.workers", "4", *kind.split())
        assert got == pytest.approx(expected, rel=1e-5), kind
