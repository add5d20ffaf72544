"""Documents that see only themselves do so on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.parallel.context import positions, split_batch
from heliostat.recipe import Recipe, override
from heliostat.tasks import Batch
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.recipes import prepared, tiny_llama

ISOLATED = {"data.pack": True, "data.isolate_documents": True, "data.sequence_length": 24}


def packed(folder: Path, **config: Any) -> Recipe:
    """Rows that cut documents, the last one short; four blocks, so that two stages a rank are possible."""
    recipe = tiny_llama(folder, **ISOLATED)
    return override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": 4} | config})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    folder = tmp_path_factory.mktemp("documents")
    recipe = packed(folder)
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, folder / "one")
    return recipe, data, folder / "one"


def assert_equal(one: Path, other: Path) -> None:
    expected, got = figures(one), figures(other)
    assert len(expected) == len(got) == 10
    for (loss, norm, weight), (loss_, norm_, weight_) in zip(expected, got, strict=True):
        assert weight_ == weight
        assert loss_ == pytest.approx(loss, rel=1e-5)
        assert norm_ == pytest.approx(norm, rel=1e-4)
    evaluated, evaluated_ = (
        [row["validation"] for row in read_metrics(run_dir / METRICS_FILE) if "validation" in row]
        for run_dir in (one, other)
    )
    assert evaluated
    for figures_, figures__ in zip(evaluated, evaluated_, strict=True):
        assert figures__["loss"] == pytest.approx(figures_["loss"], rel=1e-5)
        assert figures__["accuracy"] == pytest.approx(figures_["accuracy"], rel=1e-5)


def layout(text: str) -> dict[str, Any]:
    """`fsdp=2,workers=2` as overrides."""
    pairs = (item.split("=") for item in text.split(","))
    return {f"parallelism.{key}": int(value) if value.isdecimal() else value for key, value in pairs}


@pytest.mark.parametrize(
    "axes",
    ["fsdp=2", "tensor=2", "pipeline=2", "context=2",
     *(pytest.param(axes, marks=pytest.mark.slow)
       for axes in ("pipeline=2,schedule=gpipe", "pipeline=2,schedule=interleaved", "pipeline=2,schedule=zbv"))],
)  # fmt: skip
def test_two_processes_train_like_one(reference: tuple[Recipe, Path, Path], axes: str, tmp_path: Path) -> None:
    recipe, data, one = reference
    run(2, train_here, override(recipe, layout(f"workers=2,{axes}")), data, tmp_path / "two")
    assert_equal(one, tmp_path / "two")


def test_the_option_changes_training(reference: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    """Otherwise the layouts could be equal in not isolating."""
    recipe, _, one = reference
    across = override(recipe, {"data.isolate_documents": False})
    run(1, train_here, across, prepared(across).folder, tmp_path / "across")
    steps = list(zip(figures(one), figures(tmp_path / "across"), strict=True))
    assert all(isolated[2] < not_isolated[2] for isolated, not_isolated in steps)
    # In some step by far more than what the layouts may differ by.
    loss, norm = (max(abs(not_isolated[i] / isolated[i] - 1) for isolated, not_isolated in steps) for i in (0, 1))
    assert loss > 1e-3
    assert norm > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", ["context=2,fsdp=2", "context=2,tensor=2", "context=2,pipeline=2", "context=4", "fsdp=2,tensor=2"]
)
def test_four_processes_train_like_one(reference: tuple[Recipe, Path, Path], axes: str, tmp_path: Path) -> None:
    recipe, data, one = reference
    run(4, train_here, override(recipe, layout(f"workers=4,{axes}")), data, tmp_path / "four")
    assert_equal(one, tmp_path / "four")


@pytest.mark.slow
def test_sliding_windows_over_three_processes(tmp_path: Path) -> None:
    """Three ranks need lengths that one process does not; a window ends where its document begins."""
    recipe = packed(tmp_path, model_type="mistral", sliding_window=5)
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, tmp_path / "one")
    run(3, train_here, override(recipe, layout("workers=3,context=3")), data, tmp_path / "three")
    assert_equal(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["expert=2", "context=2", "pipeline=2"])
def test_experts(axes: str, tmp_path: Path) -> None:
    recipe = packed(tmp_path, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, tmp_path / "one")
    run(2, train_here, override(recipe, layout(f"workers=2,{axes}")), data, tmp_path / "two")
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_gpt2_over_two_contexts(tmp_path: Path) -> None:
    """Its positions are learned, and it reshapes the attention mask that it is given."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    recipe = override(packed(tmp_path), {"model.config": config, "model.dropout": 0.0})
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, tmp_path / "one")
    run(2, train_here, override(recipe, layout("workers=2,context=2")), data, tmp_path / "two")
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_parts_of_a_batch_know_the_documents_of_the_whole() -> None:
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 0, 0, 0]])
    batch = Batch({"input_ids": torch.arange(16).view(2, 8), "position_ids": positions_BT}, {}, torch.ones(2))
    for rank in range(2):
        part, mine = split_batch(batch, 2, rank), positions(8, 2, rank)
        assert torch.equal(part.inputs["position_ids"], positions_BT[:, mine])
        assert part.inputs["attention_mask"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 4], [1, 1, 1, 1, 1, 2, 3, 4]]
