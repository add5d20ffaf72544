"""Data parallelism: two workers with micro-batches of 8 train like one with micro-batches of 16, in every task;
and batch normalisation over ranks against PyTorch's own over the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import nn

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.packaged import packaged_table
from heliostat.parallel.batch_norm import GlobalBatchNorm2d, globalise
from heliostat.recipe import Recipe, build, override
from heliostat.train.loop import train
from tests.distributed.harness import run
from tests.recipes import TINY_RESNET, prepared, text_file, tiny_bert, tiny_llama

STEPS = 20


def tiny_resnet(folder: Path, **overrides: Any) -> Recipe:
    """A ResNet of two blocks with batch normalisation, on handwritten digits."""
    digits = packaged_table("digits/all", "data.train")
    digits = digits.take(torch.randperm(digits.num_rows, generator=torch.Generator().manual_seed(0)).numpy())
    folder.mkdir(parents=True, exist_ok=True)
    for split, start, rows in (("train", 0, 160), ("validation", 160, 40), ("test", 200, 40)):
        pq.write_table(digits.slice(start, rows), folder / f"{split}.parquet")
    recipe = build(
        {
            "name": "digits",
            "task": "image_classification",
            "storage": str(folder / "storage"),
            "model": {
                "sync_batch_norm": True,
                "config": TINY_RESNET,
            },
            "data": {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
            | {"augment": "crop"},
        }
    )
    return override(recipe, overrides)


def recipe_of(task: str, folder: Path) -> Recipe:
    training = {
        "training.global_batch_size": 16,
        "training.micro_batch_size": 16,
        "training.precision": "float32",
        "optimizer.lr": 1e-3,
        "schedule.max_steps": STEPS,
        "model.dropout": 0.0,
    }
    if task == "language_model":  # 100 documents: the last batch of an epoch has 4
        return tiny_llama(folder, **training, **{"data.train": str(text_file(folder / "source", 100))})
    return {"text_classification": tiny_bert, "image_classification": tiny_resnet}[task](folder, **training)


def train_here(recipe: Recipe, folder: Path, run_dir: Path) -> Any:
    return train(recipe, folder, run_dir)


@pytest.mark.parametrize("task", ["text_classification", "language_model", "image_classification"])
def test_two_workers_equal_one(task: str, tmp_path: Path) -> None:
    recipe = recipe_of(task, tmp_path)
    data = prepared(recipe).folder
    run(1, train_here, recipe, data, tmp_path / "one")
    halved = override(recipe, {"parallelism.workers": 2, "training.micro_batch_size": 8})
    run(2, train_here, halved, data, tmp_path / "two")
    one, two = read_metrics(tmp_path / "one" / METRICS_FILE), read_metrics(tmp_path / "two" / METRICS_FILE)
    losses, losses_ = ([record["loss"] for record in records if "loss" in record] for records in (one, two))
    assert len(losses) == STEPS
    half = STEPS // 2  # a single step's loss says more about its rows than about the model
    assert sum(losses[half:]) < sum(losses[:half]), "a model that does not learn would show nothing"
    assert losses_ == pytest.approx(losses, rel=1e-5)
    figures, figures_ = ([r["validation"] for r in records if "validation" in r] for records in (one, two))
    assert len(figures) == len(figures_) > 0
    for before, after in zip(figures, figures_, strict=True):
        assert after == pytest.approx(before, rel=1e-4)


def inputs(rows: int, mean: float = 4.0) -> torch.Tensor:
    """In float64, so that rounding hides nothing."""
    return torch.randn(rows, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + mean


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    model.double()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
            norm.bias.uniform_(-1, 1)  # type: ignore[operator, union-attr]
    return model


def passes(model: nn.Sequential, x: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two training steps' worth of forward passes; outputs and gradients of the second."""
    model.train()
    model(x)
    x = x.clone().requires_grad_()
    y = model(x)
    target = torch.linspace(-1, 1, y[0].numel()).view_as(y[0])
    (((y - target) ** 3).flatten(1).sum(1) * real).sum().backward()
    assert x.grad is not None
    return (
        {"y": y.detach(), "x.grad": x.grad}
        | {f"{n}.grad": p.grad for n, p in model.named_parameters()}
        | {name: buffer.clone() for name, buffer in model.named_buffers()}
    )


def on_rank(shares: list[list[int]], fill: int) -> dict[str, Any]:
    """This rank's rows; a rank without any runs a fill row of weight zero."""
    model, rank = network(), dist.get_rank()
    norms = globalise(model, dist.group.WORLD)
    assert [type(norm) for norm in norms] == [GlobalBatchNorm2d] * 2
    mine = shares[rank]
    for norm in norms:
        norm.contributes = bool(mine)
    x = inputs(12)[mine or [fill]]
    found = passes(model, x, torch.full((len(x),), float(bool(mine)), dtype=x.dtype))
    for name, tensor in found.items():
        if name.endswith(".grad") and name != "x.grad":
            dist.all_reduce(tensor)
    return {name: tensor.numpy().copy() for name, tensor in found.items()}


@pytest.mark.parametrize(
    "shares",
    [
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [10]],
        [[0, 1, 2, 3, 4], []],
    ],
    ids=["equal", "uneven", "one-rank-has-none"],
)
def test_global_batch_norm_equals_the_whole_batch(shares: list[list[int]]) -> None:
    rows = [row for share in shares for row in share]
    expected = passes(network(), inputs(12)[rows], torch.ones(len(rows)))
    ranks = run(2, on_rank, shares, 11)
    for rank, share in zip(ranks, shares, strict=True):
        for name, tensor in expected.items():
            if name in ("y", "x.grad"):
                at = [rows.index(row) for row in share]
                want = tensor[at].numpy()
                got = rank[name] if share else rank[name][:0]
            else:
                want, got = tensor.numpy(), rank[name]
            assert got == pytest.approx(want, rel=1e-9, abs=1e-9), name
        if not share:
            assert not rank["x.grad"].any(), "a row of weight zero must not move anything"


def test_global_batch_norm_evaluates_and_saves_like_the_plain_one() -> None:
    plain, model = network(), network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm2d
    passes(plain, inputs(6), torch.ones(6))
    model.load_state_dict(plain.state_dict())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.eval()(inputs(6)), plain.eval()(inputs(6)))
