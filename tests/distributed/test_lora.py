"""Adapters on every kind of layout: the same training as one process, and nothing else that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from heliostat.data.prepare import read_prepared
from heliostat.parallel.parallelize import full_state
from heliostat.recipe import Recipe, override
from heliostat.train.loop import Run
from heliostat.train.prove import parse_layouts, prove
from heliostat.train.step import local
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.distributed.test_prove import family
from tests.recipes import lora_head, prepared, tiny_llama


def assert_proven(name: str, folder: Path, layouts: str, workers: int, **lora: Any) -> None:
    recipe = override(family(name, folder), {"model.lora.rank": 4} | {f"model.lora.{k}": v for k, v in lora.items()})
    for verdict in prove(recipe, parse_layouts(layouts, workers), workers):
        assert verdict.status == "equal", verdict


@pytest.mark.slow
def test_proof_on_two_processes(tmp_path: Path) -> None:
    assert_proven("llama", tmp_path, "replicate=2;fsdp=2;tensor=2;pipeline=2,schedule=gpipe", 2)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"]])
def test_some_targets(targets: list[str], tmp_path: Path) -> None:
    assert_proven("llama", tmp_path, "tensor=2;pipeline=2,schedule=zbv", 2, targets=targets)


@pytest.mark.slow
def test_schedules_and_recompute(tmp_path: Path) -> None:
    layouts = (
        "pipeline=2,schedule=interleaved;pipeline=2,schedule=zbv;fsdp=2,recompute=selective;tensor=2,recompute=full"
    )
    assert_proven("llama", tmp_path, layouts, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("llama", "fsdp=2,tensor=2;pipeline=2,fsdp=2;context=2,replicate=2;pipeline=2,tensor=2;context=2,tensor=2"),
        ("qwen3", "fsdp=2,tensor=2;pipeline=2,fsdp=2;context=2,replicate=2"),
        ("gpt2", "fsdp=4;context=2,replicate=2"),
        ("bert", "fsdp=2,tensor=2;replicate=2,fsdp=2"),
        ("mixtral", "expert=2,fsdp=2;expert=2,pipeline=2,schedule=gpipe;context=2,replicate=2"),
    ],
)
def test_hybrids_on_four_processes(name: str, layouts: str, tmp_path: Path) -> None:
    assert_proven(name, tmp_path, layouts, 4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """A classifier whose head is new: it is trained beside the adapters."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = lora_head(
        folder, **{"training.micro_batch_size": 4, "schedule.max_steps": 8, "optimizer.head_lr_scale": 3}
    )
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, folder / "one")
    return recipe, data, folder / "one"


@pytest.mark.parametrize(
    "layout", ["fsdp", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("replicate", "tensor"))]
)
def test_a_new_head_is_trained_on_any_layout(reference: tuple[Recipe, Path, Path], layout: str, tmp_path: Path) -> None:
    recipe, data, one = reference
    axis = {} if layout == "replicate" else {f"parallelism.{layout}": 2}
    run(2, train_here, override(recipe, {"parallelism.workers": 2} | axis), data, tmp_path / "run")
    expected, got = figures(one), figures(tmp_path / "run")
    assert len(expected) == len(got) == 8
    for (loss, norm, _), (loss_, norm_, _) in zip(expected, got, strict=True):
        assert loss_ == pytest.approx(loss, rel=1e-5)
        assert norm_ == pytest.approx(norm, rel=1e-4)


def steps(recipe: Recipe, folder: Path, run_dir: Path) -> dict[str, Any]:
    """Three steps: the whole state before and after, and this rank's parameters that are not split by tensor."""
    ranks = Run(recipe, read_prepared(folder), run_dir)
    before = full_state(ranks.parallel)
    ranks.parallel.runs.train()
    cursor = ranks.progress.cursor
    for _ in range(3):
        ranks._seed()
        ranks.step(ranks.batches(cursor))
        cursor = ranks.loader.next(cursor)
    after = full_state(ranks.parallel)
    whole = {name: local(p).detach() for name, p in ranks.parallel.model.named_parameters()
             if ("_proj.lora_A" in name) != any(f".{row}.lora_" in name for row in ("o_proj", "down_proj"))
             and "lora_" in name}  # fmt: skip
    return {
        "before": {name: tensor.numpy() for name, tensor in before.items()},
        "after": {name: tensor.numpy() for name, tensor in after.items()},
        "whole": {name: tensor.numpy().copy() for name, tensor in whole.items()},
        "rank": dist.get_rank(),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_adapters_move_and_replicated_ones_stay_equal(dropout: float, tmp_path: Path) -> None:
    """With dropout, tensor peers must drop the same of what they both hold."""
    lora = {"model.lora.rank": 4, "model.lora.dropout": dropout}
    recipe = tiny_llama(tmp_path, **lora, **{"parallelism.workers": 2, "parallelism.tensor": 2, "optimizer.lr": 1e-2})
    first, second = run(2, steps, recipe, prepared(recipe).folder, tmp_path / "run")
    assert len(first["after"]) > 2 * 7 * 3
    for name, tensor in first["after"].items():
        assert np.array_equal(tensor, first["before"][name]) != ("lora_" in name), name
    assert len(first["whole"]) == 2 * 7
    for name, tensor in first["whole"].items():
        assert tensor.shape == first["after"][name].shape, name
        assert np.array_equal(tensor, second["whole"][name]), name
