"""Bad steps: noticed before the weights take them in, made again, and dealt with as the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.loader import Cursor, Loader, open_split
from heliostat.recipe import Recipe, override
from heliostat.tasks import Batch
from heliostat.tasks.language_model import LanguageModel
from heliostat.train import checkpoint
from heliostat.train.errors import BadStep, Unrecoverable
from heliostat.train.faults import Fault
from heliostat.train.guard import read_bad_steps
from heliostat.train.loop import train
from tests.recipes import prepared, tiny_llama


class Poisoned(LanguageModel):
    """One row of the training data spoils every micro-batch that it is in."""

    def row_sums(self, outputs: torch.Tensor, batch: Batch, train: bool) -> dict[str, torch.Tensor]:
        sums = super().row_sums(outputs, batch, train)
        if train and POISON["id"] in batch.sample_ids:
            sums["loss"] = sums["loss"] * POISON["factor"]
        return sums


POISON: dict[str, Any] = {}


def poisoned(folder: Path, factor: float, **overrides: Any) -> tuple[Recipe, int]:
    """A recipe of ten steps, and the step that the poisoned row spoils."""
    recipe = tiny_llama(folder, **{"checkpoint.every_steps": 1, "checkpoint.keep": 20} | overrides)
    recipe = override(recipe, {"task": "tests.unit.test_guard:Poisoned", "schedule.shape": "constant"})
    table = open_split(prepared(recipe).folder, "train")
    loader = Loader(table, recipe.seed, recipe.training.global_batch_size)
    row = int(loader.batch_rows(Cursor(0, 3))[0])
    POISON.update(id=table.column("sample_id")[row].as_py(), factor=factor)
    return recipe, 4


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Model and optimizer as the checkpoint of a step holds them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = run_dir / f"{step}.pt"
    found = {each.manifest["step"]: each for each in checkpoint.complete(run_dir / "checkpoints")}
    dcp_to_torch_save(found[step].path, target)
    whole = torch.load(target, weights_only=False)
    return {f"{part}.{name}": value for part in ("model", "optimizer") for name, value in whole[part].items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


def test_a_fault_of_the_hardware_leaves_no_trace(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"model.dropout": 0.3})
    data = prepared(recipe).folder
    bundles = [
        train(recipe, data, tmp_path / "plain")["bundle"],
        train(recipe, data, tmp_path / "nan", fault=Fault("nan", 4))["bundle"],
    ]
    one, other = (load_file(Path(bundle) / "model.safetensors") for bundle in bundles)
    assert same(one, other)
    (record,) = read_bad_steps(tmp_path / "nan")
    assert (record["step"], record["cause"]) == (4, "hardware")
    assert not read_bad_steps(tmp_path / "plain")


def test_a_bad_batch_is_skipped_and_the_weights_stay(tmp_path: Path) -> None:
    recipe, bad = poisoned(tmp_path, float("inf"))
    train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    records = [(r["step"], r["cause"], r["action"]) for r in read_bad_steps(tmp_path / "run")]
    assert records[0] == (bad, "data", "skip")
    assert same(state(tmp_path / "run", bad), state(tmp_path / "run", bad - 1))
    assert not same(state(tmp_path / "run", bad), state(tmp_path / "run", bad + 1))
    lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    assert json.loads(lines[bad - 1])["loss"] is None
    assert "Infinity" not in "".join(lines)


def test_restarting_leaves_the_bad_batch_out(tmp_path: Path) -> None:
    recipe, _ = poisoned(tmp_path, float("nan"))
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "skip", write_bundle=False)
    again = override(recipe, {"recovery.bad_step": "restart"})
    attempts = 0
    while True:
        attempts += 1
        try:
            train(again, data, tmp_path / "restart", write_bundle=False)
            break
        except BadStep:
            assert attempts < 4
    spoilt = [record["step"] for record in read_bad_steps(tmp_path / "skip")]
    assert [record["step"] for record in read_bad_steps(tmp_path / "restart")] == spoilt
    assert attempts == 1 + len(spoilt)
    assert same(state(tmp_path / "restart", 10), state(tmp_path / "skip", 10))


def test_stopping_says_what_and_why(tmp_path: Path) -> None:
    recipe, bad = poisoned(tmp_path, float("nan"), **{"recovery.bad_step": "stop"})
    with pytest.raises(Unrecoverable, match=f"step {bad}: loss nan"):
        train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)


def test_more_bad_steps_than_allowed_stop_the_run(tmp_path: Path) -> None:
    recipe, _ = poisoned(tmp_path, float("nan"), **{"recovery.max_bad_steps": 0})
    with pytest.raises(Unrecoverable, match="max_bad_steps=0"):
        train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)


def test_a_spike_is_what_the_recipe_says_it_is(tmp_path: Path) -> None:
    steps = {"schedule.max_steps": 20, "recovery.spike_factor": 3.0}
    recipe, _ = poisoned(tmp_path, 100.0, **steps)
    train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in r}
    good: list[float] = []
    expected = []
    for step, loss in losses.items():
        if len(good) >= 8 and loss > 3 * np.median(good[-32:]):
            expected.append(step)
        else:
            good.append(loss)
    assert expected, "the row comes again after the first eight steps"
    assert [record["step"] for record in read_bad_steps(tmp_path / "run")] == expected


def test_a_resumed_run_judges_spikes_like_one_that_was_not(tmp_path: Path) -> None:
    steps = {"schedule.max_steps": 20, "recovery.spike_factor": 3.0}
    recipe, _ = poisoned(tmp_path, 100.0, **steps)
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "whole", write_bundle=False)
    asked = 0

    def stop_after_nine() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 9

    train(recipe, data, tmp_path / "parts", write_bundle=False, should_stop=stop_after_nine)
    train(recipe, data, tmp_path / "parts", write_bundle=False)
    assert read_bad_steps(tmp_path / "parts") == read_bad_steps(tmp_path / "whole")
    assert same(state(tmp_path / "parts", 20), state(tmp_path / "whole", 20))
