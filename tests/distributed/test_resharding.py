"""What one layout saved, every other loads, exactly: parameters and the optimizer's state. A bundle is the same file
whichever layout wrote it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from heliostat.data.prepare import read_prepared
from heliostat.models import bundle
from heliostat.parallel.parallelize import full_state
from heliostat.recipe import Recipe, override
from heliostat.train import checkpoint
from heliostat.train.loop import Run, train
from tests.distributed.harness import run
from tests.recipes import prepared, tiny_llama

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
LAYOUTS = {
    "llama": (
        "fsdp=2",
        "tensor=2",
        "pipeline=2",
        "fsdp=2,tensor=2",
        "tensor=2,pipeline=2",
        "fsdp=2,tensor=2,pipeline=2",
        "tensor=2,sequence_parallel=true,loss_parallel=true",
    ),
    "lora": ("fsdp=2,tensor=2", "tensor=2", "pipeline=2", "tensor=2,pipeline=2"),
    "gpt2": ("fsdp=2,tensor=2", "tensor=2"),
    "mixtral": (
        "expert=2",
        "expert=2,fsdp=2",
        "expert=2,pipeline=2",
        "expert=4",
        "tensor=2",
        "fsdp=2,tensor=2",
        "tensor=2,pipeline=2",
    ),
}
CASES = [
    pytest.param(family, layout, marks=[] if layout == "fsdp=2,tensor=2" else pytest.mark.slow)
    for family, layouts in LAYOUTS.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Path, Path]]:
    """Each family's recipe, data, and the run of one process that stopped at a checkpoint after three steps."""
    found = {}
    for family in LAYOUTS:
        folder = tmp_path_factory.mktemp(family)
        recipe = tiny_llama(folder, **{"schedule.max_steps": 3})
        if family == "mixtral":
            recipe.model.config.update(MIXTRAL)
        if family == "gpt2":
            recipe = override(recipe, {"model.config": GPT2})
        if family == "lora":
            recipe = override(recipe, {"model.lora.rank": 4})
        data = prepared(recipe).folder
        run(1, train, recipe, data, folder / "run")
        found[family] = (recipe, data, folder / "run")
    return found


def load_and_save(recipe: Recipe, data: Path, source: Path, target: Path) -> None:
    """Resume from a checkpoint on this layout and, with no step made, write another and a bundle."""
    ranks = Run(recipe, read_prepared(data), target / "run", resume=source)
    parallel = ranks.parallel
    checkpoint.save(
        target / "checkpoints",
        3,
        ranks.progress.as_dict(ranks.loader, ranks.guard.losses),
        parallel.model,
        ranks.optimizer,
        None,
    )
    state = full_state(parallel)
    if ranks.first:
        bundle.write(target / "bundle", ranks.task, state, None, data={}, metrics={}, lineage={})


def whole(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, assembled by PyTorch's own converter."""
    found = checkpoint.newest(folder)
    assert found is not None
    dcp_to_torch_save(found.path, scratch)
    tree = torch.load(scratch, weights_only=False)
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{prefix}/{key}", each)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", tree)
    return flat


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_exactly_the_same_on_any_layout(
    trained: dict[str, tuple[Recipe, Path, Path]], family: str, layout: str, tmp_path: Path
) -> None:
    recipe, data, one = trained[family]
    axes: dict[str, int] = {key: json.loads(value) for key, value in (part.split("=") for part in layout.split(","))}
    workers = math.prod(axes.values())
    laid_out = override(recipe, {f"parallelism.{k}": v for k, v in (axes | {"workers": workers}).items()})
    run(workers, load_and_save, laid_out, data, one / "checkpoints", tmp_path / "there")
    run(1, load_and_save, recipe, data, tmp_path / "there" / "checkpoints", tmp_path / "back")
    before = whole(one / "checkpoints", tmp_path / "before.pt")
    assert any("exp_avg_sq" in name for name in before)
    for folder in ("there", "back"):
        after = whole(tmp_path / folder / "checkpoints", tmp_path / f"{folder}.pt")
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), (folder, name)
    files = {folder: bundle.digests(tmp_path / folder / "bundle") for folder in ("there", "back")}
    assert files["there"] == files["back"]
    assert files["there"].items() <= bundle.digests(one / "bundle").items()  # which has a tokenizer, too
    assert "model.safetensors" in files["there"]
    assert (family == "lora") == ("adapter/adapter_model.safetensors" in files["there"])
