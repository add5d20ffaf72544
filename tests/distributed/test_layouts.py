"""Every layout trains like one process: the seam of task, loader and step, driven through the real loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor.debug import CommDebugMode

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import read_prepared
from heliostat.recipe import Recipe, override
from heliostat.train.loop import Run, train
from tests.distributed.harness import run
from tests.recipes import prepared, tiny_llama

LAYOUTS = {
    "ddp": {"parallelism.workers": 4},
    "fsdp2-tensor2": {"parallelism.workers": 4, "parallelism.fsdp": 2, "parallelism.tensor": 2},
    "fsdp4-kept-after-forward": {
        "parallelism.workers": 4,
        "parallelism.fsdp": 4,
        "parallelism.reshard_after_forward": False,
    },
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


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            layout,
            marks=pytest.mark.slow if layout in ("fsdp4-kept-after-forward", "pipeline2-gpipe-replicate2") else [],
        )
        for layout in LAYOUTS
    ],
)
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


@pytest.mark.parametrize("reshard", [pytest.param(True, marks=pytest.mark.slow), False])
def test_averaged_weights_are_evaluated_and_not_trained_on(
    reference: tuple[Recipe, Path, Path], reshard: bool, tmp_path: Path
) -> None:
    """Gathered parameters that outlive an evaluation would be trained on in place of those it swapped away."""
    recipe, data, _ = reference
    averaged = override(
        recipe,
        {
            "training.ema_decay": 0.5,
            "training.evaluate_every_steps": 2,
            "training.keep_best": False,
            "checkpoint.every_steps": 9,
        },
    )
    run(1, train_here, averaged, data, tmp_path / "one")
    sharded = {"parallelism.workers": 2, "parallelism.fsdp": 2, "parallelism.reshard_after_forward": reshard}
    run(2, train_here, override(averaged, sharded), data, tmp_path / "two")
    expected, got = ([loss for loss, *_ in figures(tmp_path / name)] for name in ("one", "two"))
    assert got == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"parallelism.fsdp": 2},
        {"parallelism.tensor": 2, "parallelism.sequence_parallel": True, "parallelism.loss_parallel": True},
        {"parallelism.pipeline": 2},
    ],
)
def test_compiled_blocks(reference: tuple[Recipe, Path, Path], fields: dict[str, Any], tmp_path: Path) -> None:
    """Rows of several lengths, so that graphs are made anew."""
    recipe, data, _ = reference
    short = override(recipe, {"schedule.max_steps": 4})
    run(1, train_here, short, data, tmp_path / "plain")
    run(2, train_here, override(short, {"parallelism.workers": 2, "training.compile": True} | fields), data,
        tmp_path / "run")  # fmt: skip
    for (loss, norm, weight), (loss_, norm_, weight_) in zip(
        figures(tmp_path / "plain"), figures(tmp_path / "run"), strict=True
    ):
        assert weight_ == weight
        assert loss_ == pytest.approx(loss, rel=1e-5)
        assert norm_ == pytest.approx(norm, rel=1e-4)


def gathers(recipe: Recipe, folder: Path, run_dir: Path) -> int:
    """All-gathers of one training step."""
    ranks = Run(recipe, read_prepared(folder), run_dir)
    ranks.step(ranks.batches(ranks.progress.cursor)[:1])  # the first sets FSDP up
    with CommDebugMode() as comm:
        ranks.step(ranks.batches(ranks.progress.cursor)[:1])
    return comm.get_comm_counts()[torch.ops.c10d._allgather_base_]


def test_kept_parameters_are_gathered_once(reference: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    """ZeRO-3 gathers each of the two blocks for the forward and for the backward pass and the rest once; ZeRO-2 all
    once."""
    recipe, data, _ = reference
    for reshard, expected in ((True, 2 * 2 + 1), (False, 2 + 1)):
        sharded = {"parallelism.workers": 2, "parallelism.fsdp": 2, "parallelism.reshard_after_forward": reshard}
        assert run(2, gathers, override(recipe, sharded), data, tmp_path / str(reshard)) == [expected, expected]
