"""The loop in one process: accumulation, early stopping, averaging, compilation, the schedule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, Refused, Schedule, override
from heliostat.train.checkpoint import complete
from heliostat.train.loop import train
from heliostat.train.optim import MovingAverage, lr_factor
from tests.recipes import prepared, tiny_bert, tiny_llama


def losses(recipe: Recipe, run_dir: Path) -> list[float]:
    train(recipe, prepared(recipe).folder, run_dir, write_bundle=False)
    return [record["loss"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    """Rows of uneven length: a mean of means would differ at once."""
    recipe = tiny_llama(tmp_path)
    whole = losses(override(recipe, {"training.micro_batch_size": 8}), tmp_path / "whole")
    parts = losses(override(recipe, {"training.micro_batch_size": 3}), tmp_path / "parts")
    assert parts == pytest.approx(whole, rel=1e-5)


def test_learning_rate_follows_the_closed_form() -> None:
    schedule = Schedule(warmup_fraction=0.1, min_lr_fraction=0.2)
    rates = [lr_factor(schedule, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert lr_factor(schedule, 100, 100) == pytest.approx(0.2)
    assert lr_factor(Schedule(shape="constant", warmup_fraction=0.0), 7, 10) == 1.0


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """At a learning rate that changes nothing no evaluation is better than the first."""
    recipe = tiny_bert(
        tmp_path,
        **{"optimizer.lr": 1e-12, "schedule.max_steps": 50, "training.evaluate_every_steps": 2,
           "training.early_stopping_patience": 2},
    )  # fmt: skip
    outcome = train(recipe, prepared(recipe).folder, tmp_path / "run")
    assert outcome["status"] == "stopped_early"
    assert outcome["step"] == 6
    assert outcome["best_step"] == 2
    assert json.loads((Path(outcome["bundle"]) / "card.json").read_text())["lineage"]["step"] == 2


def test_moving_average_against_its_definition() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    average = MovingAverage(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    average.swap()
    assert torch.allclose(model.weight, expected)


def test_old_checkpoints_go_and_broken_ones_are_passed_over(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"checkpoint.every_steps": 2, "checkpoint.keep": 3})
    train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    folder = tmp_path / "run" / "checkpoints"
    assert [found.manifest["step"] for found in complete(folder)] == [6, 8, 10]
    newest = complete(folder)[-1].path
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [found.manifest["step"] for found in complete(folder)] == [6, 8]


def test_other_data_are_refused_on_resume(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"schedule.max_steps": 2})
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "run", write_bundle=False)
    changed = override(recipe, {"data.limit": 16, "schedule.max_steps": 4})
    with pytest.raises(Refused, match="fingerprint"):
        train(changed, data, tmp_path / "run", write_bundle=False)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"training.micro_batch_size": 8})
    plain = losses(recipe, tmp_path / "plain")
    compiled = losses(override(recipe, {"training.compile": True}), tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_blocks_share_their_graphs(tmp_path: Path) -> None:
    """The compiler gives up on a block after eight graphs of it: more blocks must not make more graphs."""
    graphs = []
    for count in (2, 10):
        recipe = tiny_llama(tmp_path, **{"training.compile": True, "schedule.max_steps": 1})
        deep = override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": count}})
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        losses(deep, tmp_path / f"{count}-blocks")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_evaluating_does_not_change_training(tmp_path: Path) -> None:
    """A pre-trained model is loaded in evaluation mode: with dropout, a run that evaluates at every step would differ
    from one that never does if either trained in the wrong mode."""
    first = tiny_bert(tmp_path, **{"schedule.max_steps": 2})
    bundle = train(first, prepared(first).folder, tmp_path / "first")["bundle"]
    recipe = tiny_bert(
        tmp_path,
        **{
            "model.name": bundle,
            "model.config": {},
            "model.tokenizer": "",
            "model.dropout": 0.5,
            "schedule.max_steps": 6,
        },
    )
    never = losses(override(recipe, {"training.evaluate_every_steps": 1000}), tmp_path / "never")
    always = losses(override(recipe, {"training.evaluate_every_steps": 1}), tmp_path / "always")
    assert always == never
    without = losses(override(recipe, {"model.dropout": 0.0}), tmp_path / "without")
    assert without != never, "dropout must be at work"
