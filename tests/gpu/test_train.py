"""Training on a GPU, against the same on the CPU. Collected only where PyTorch finds a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.loader import open_split
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, override
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Place, Writer
from heliostat.train.loop import train
from tests.recipes import mixed, prepared, tiny_bert, tiny_llama


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]


@pytest.fixture
def deterministic() -> Any:
    """Sums in the same order each time, which CUDA does not promise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_losses_are_those_of_the_cpu(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Recipe = make(tmp_path, **{"schedule.max_steps": 10})
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(recipe, data, tmp_path / "cpu")
    on_gpu, on_cpu = steps(tmp_path / "gpu"), steps(tmp_path / "cpu")
    assert len(on_gpu) == len(on_cpu) == 10
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_ends_bitwise_like_an_undisturbed_one(precision: str, tmp_path: Path) -> None:
    overrides = {"training.precision": precision, "checkpoint.every_steps": 2, "data.pack": True}
    recipe = mixed(tmp_path, tiny_llama(tmp_path, **overrides))
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "whole")
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls >= 5

    first = train(recipe, data, tmp_path / "parts", should_stop=stop)
    assert (first["status"], first["step"]) == ("interrupted", 5)
    assert train(recipe, data, tmp_path / "parts")["status"] == "done"
    weights = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_checkpoint_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    """Staged in pinned memory: what training does to the GPU's afterwards does not reach it."""
    model = torch.nn.Linear(2048, 2048).cuda()
    writer = Writer(Place.at(tmp_path), keep=2)
    for step in (1, 2, 3):
        expected = model.weight.detach().cpu().clone()
        writer.save(step, {}, model)
        with torch.no_grad():
            model.weight.add_(1)
        writer.settle()
        found = checkpoint.newest(tmp_path)
        assert found is not None
        other = torch.nn.Linear(2048, 2048).cuda()
        checkpoint.load(found, other, None, None)
        assert torch.equal(other.weight.cpu(), expected)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_in_bfloat16(recompute: str, tmp_path: Path) -> None:
    overrides = {"training.precision": "bfloat16", "training.recompute": recompute}
    plain = tiny_llama(tmp_path, **overrides)
    data = prepared(plain).folder
    train(plain, data, tmp_path / "plain")
    train(override(plain, {"training.compile": True}), data, tmp_path / "compiled")
    for one, other in zip(steps(tmp_path / "compiled"), steps(tmp_path / "plain"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_predictions_are_those_of_the_cpu(make: Any, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    data = prepared(recipe).folder
    bundle = bundles.read(Path(train(recipe, data, tmp_path / "run")["bundle"]))
    rows = open_split(data, "validation")
    on_gpu = Predictor(bundle, device=torch.device("cuda"))
    for one, other in zip(on_gpu.predict_rows(rows), Predictor(bundle).predict_rows(rows), strict=True):
        assert one.get("label") == other.get("label")
        for name in set(one) - {"label", "scores"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert on_gpu.latency_s(rows) > 0
