"""What the planner says that a rank holds, against what it does hold once it has made a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from heliostat.data.prepare import read_prepared
from heliostat.parallel.loss import loss_sums
from heliostat.planner.memory import rank_memory
from heliostat.planner.shape import model_shape
from heliostat.recipe import Recipe, override
from heliostat.train.loop import Run
from heliostat.train.step import local
from tests.distributed.harness import run
from tests.recipes import prepared, tiny_llama

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"workers": 2},
    "fsdp3": {"workers": 3, "fsdp": 3},
    "fsdp2-tensor2": {"workers": 4, "fsdp": 2, "tensor": 2, "sequence_parallel": True},
    "pipeline2-fsdp2": {"workers": 4, "fsdp": 2, "pipeline": 2},
    "interleaved2": {"workers": 2, "pipeline": 2, "schedule": "interleaved"},
}


def held(recipe: Recipe, folder: Path, run_dir: Path) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state of this rank."""
    ranks = Run(recipe, read_prepared(folder), run_dir)
    ranks.step.gradients(ranks.batches(ranks.progress.cursor))
    parameters = list(ranks.parallel.model.parameters())
    gradients = sum(local(each.grad).nbytes for each in parameters if each.grad is not None)
    ranks.step.update()
    state = [value for each in ranks.optimizer.state.values() for value in each.values()]
    return sum(local(each).nbytes for each in parameters), gradients, sum(local(each).nbytes for each in state)


def accumulated(recipe: Recipe, folder: Path, run_dir: Path) -> int:
    """Bytes of the gradients of a micro-batch that is not the last."""
    ranks = Run(recipe, read_prepared(folder), run_dir)
    batch = ranks.batches(ranks.progress.cursor)[0]
    ranks.parallel.set_sync(False)
    loss_sums(ranks.task, ranks.task.outputs(ranks.parallel.runs, batch), batch, train=True).loss_sum.backward()
    groups = [
        module._get_fsdp_state()._fsdp_param_group
        for module in ranks.parallel.model.modules()
        if isinstance(module, FSDPModule)
    ]
    return sum(each.unsharded_param.grad.nbytes for group in groups if group for each in group.fsdp_params)


def planned(recipe: Recipe, vocabulary: int) -> Any:
    shape = model_shape(recipe.model.config | {"vocab_size": vocabulary}, recipe.task)
    assert shape is not None
    return rank_memory(shape, recipe)


def check(recipe: Recipe, layout: dict[str, Any], folder: Path) -> None:
    laid_out = override(recipe, {f"parallelism.{name}": value for name, value in layout.items()})
    # One micro-batch a step, or one a stage: accumulated gradients are another test's.
    rows = laid_out.parallelism.data_parallel * layout.get("pipeline", 1) * (2 if "schedule" in layout else 1)
    laid_out = override(laid_out, {"training.micro_batch_size": 1, "training.global_batch_size": rows})
    data = prepared(laid_out)
    ranks = run(layout["workers"], held, laid_out, data.folder, folder / "run")
    expected = planned(laid_out, data.facts["vocab_size"])
    largest = max(ranks, key=sum)
    assert largest[0] == expected.parameters_bytes
    assert largest[2] == expected.optimizer_bytes
    assert largest[1] == (expected.gradients_bytes if not expected.gradients_whole else expected.parameters_bytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_what_was_planned(layout: str, tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path)
    check(override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": 4}}), LAYOUTS[layout], tmp_path)


def test_experts(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"model.config": MIXTRAL})
    check(recipe, {"workers": 4, "expert": 2, "fsdp": 2}, tmp_path)
    check(recipe, {"workers": 2, "tensor": 2}, tmp_path / "tensor")


def test_transposed_matrices(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"model.config": GPT2})
    check(recipe, {"workers": 4, "fsdp": 2, "tensor": 2}, tmp_path)


def test_adapters(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"model.lora.rank": 4})
    laid_out = override(
        recipe,
        {
            "parallelism.workers": 4,
            "parallelism.fsdp": 2,
            "parallelism.tensor": 2,
            "training.global_batch_size": 2,
            "training.micro_batch_size": 1,
        },
    )
    data = prepared(laid_out)
    largest = max(run(4, held, laid_out, data.folder, tmp_path / "run"), key=sum)
    expected = planned(laid_out, data.facts["vocab_size"])
    assert largest == (expected.parameters_bytes, expected.gradients_bytes, expected.optimizer_bytes)


def test_accumulated_gradients_are_whole(tmp_path: Path) -> None:
    recipe = override(tiny_llama(tmp_path), {"parallelism.workers": 2, "parallelism.fsdp": 2})
    assert recipe.training.global_batch_size == 4 * recipe.training.micro_batch_size
    data = prepared(recipe)
    expected = planned(recipe, data.facts["vocab_size"])
    assert run(2, accumulated, recipe, data.folder, tmp_path / "run") == [expected.gradients_bytes] * 2
