"""Every layout trains like one process: the seam of task, loader and step, driven through the real loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, override
from heliostat.train.loop import train
from tests.distributed.harness import run
from tests.recipes import prepared, tiny_llama

LAYOUTS = {
    "ddp": {"parallelism.workers": 4},
    "fsdp2-tensor2": {"parallelism.workers": 4, "parallelism.fsdp": 2, "parallelism.tensor": 2},
    "pipeline2-fsdp2": {"parallelism.workers": 4, "parallelism.pipeline": 2, "parallelism.fsdp": 2},
    "pipeline2-gpipe-replicate2": {
        "parallelism.workers": 4,
        "parallelism.pipeline": 2,
        "parallelism.schedule": "gpipe",
    },
}


def train_here(
    recipe: Recipe, folder: Path, run_dir: Path, stop_after: int | None = None, resume: Path | None = None
) -> Any:
    steps = iter(range(1_000_000))
    return train(
        recipe,
        folder,
        run_dir,
        resume=resume,
        should_stop=lambda: stop_after is not None and next(steps) + 1 >= stop_after,
    )


def figures(run_dir: Path) -> list[tuple[float, float, float]]:
    return [(r["loss"], r["grad_norm"], r["weight"]) for r in read_metrics(run_dir / METRICS_FILE) if "loss" in r]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """33 rows in batches of 8: the fifth batch has one row, so three of four ranks run a micro-batch of weight zero."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = tiny_llama(folder)
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, folder / "one")
    return recipe, data, folder / "one"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(reference: tuple[Recipe, Path, Path], layout: str, tmp_path: Path) -> None:
    recipe, data, one = reference
    run(4, train_here, override(recipe, LAYOUTS[layout]), data, tmp_path / "run")
    expected, got = figures(one), figures(tmp_path / "run")
    assert len(expected) == len(got) == 10
    assert len({weight for _, _, weight in expected}) > 2, (
        "the weights of batches must differ for this to mean anything"
    )
    for (loss, norm, weight), (loss_, norm_, weight_) in zip(expected, got, strict=True):
        assert weight_ == weight
        assert loss_ == pytest.approx(loss, rel=1e-5)
        assert norm_ == pytest.approx(norm, rel=1e-4)
    weights, weights_ = (
        load_file(one / "bundle/model.safetensors"),
        load_file(tmp_path / "run/bundle/model.safetensors"),
    )
    assert weights.keys() == weights_.keys()
    for name in weights:
        assert weights_[name].numpy() == pytest.approx(weights[name].numpy(), abs=2e-4), name


def test_resume_on_fewer_workers(reference: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    recipe, data, one = reference
    two = override(recipe, {"parallelism.workers": 2})
    outcomes = run(2, train_here, two, data, tmp_path / "two", 4)
    assert outcomes[0]["status"] == "interrupted"
    assert outcomes[0]["step"] == 4
    run(1, train_here, recipe, data, tmp_path / "then-one", None, tmp_path / "two" / "checkpoints")
    expected = figures(one)
    got = figures(tmp_path / "two") + figures(tmp_path / "then-one")
    assert [loss for loss, *_ in got] == pytest.approx([loss for loss, *_ in expected], rel=1e-5)
