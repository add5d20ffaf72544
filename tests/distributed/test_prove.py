"""The proof, run on families of transformers by their own declared plans, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.models.load import transformers_config
from heliostat.recipe import Model, Recipe, Refused, override
from heliostat.train.prove import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    STEPS,
    _run,
    make_data,
    parse_layouts,
    proof_recipe,
    prove,
    routing_agreement,
)
from tests.pipelines.jobs import run

TWO = "fsdp=2;tensor=2;pipeline=2,schedule=gpipe"
REFUSED = {
    # What a family cannot do is said by name.
    "gemma": {"pipeline=2,schedule=gpipe": "GemmaForCausalLM ties its embeddings"},
    "gpt2": {"pipeline=2,schedule=gpipe": "GPT2LMHeadModel declares no pipeline plan"},
    "bert": {"pipeline=2,schedule=gpipe": "BertForSequenceClassification declares no pipeline plan"},
    "vit": {"pipeline=2,schedule=gpipe": "ViTForImageClassification declares no pipeline plan"},
}  # fmt: skip


def family(name: str, folder: Path) -> Recipe:
    """A recipe for a family's default configuration, read from a config.json as a user's would be."""
    transformers.AutoConfig.for_model(name).save_pretrained(folder / name)
    return Recipe(name=name, task="language_model", model=Model(name=str(folder / name), pretrained=False))


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow)
                for name in ("qwen3", "gemma", "olmo", "phi", "gpt2", "mixtral", "qwen3_moe", "bert", "vit"))],
)  # fmt: skip
def test_families_on_two_processes(name: str, tmp_path: Path) -> None:
    refused = REFUSED.get(name, {})
    for verdict in prove(family(name, tmp_path), parse_layouts(TWO, 2), 2):
        if verdict.layout in refused:
            assert verdict.status == "refused", verdict
            assert refused[verdict.layout] in verdict.reason
            continue
        assert verdict.status == "equal", verdict
        assert verdict.loss_difference is not None
        assert verdict.loss_difference <= LOSS_TOLERANCE
        assert verdict.grad_norm_difference is not None
        assert verdict.grad_norm_difference <= GRAD_NORM_TOLERANCE
        assert verdict.routing_agreement == (1.0 if name in ("mixtral", "qwen3_moe") else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_hybrids_on_four_and_eight_processes(name: str, tmp_path: Path) -> None:
    recipe = family(name, tmp_path)
    for workers, layouts in (
        (4, "fsdp=2,tensor=2;pipeline=2,tensor=2;pipeline=4,micro_batches=4;replicate=2,fsdp=2"),
        (8, "fsdp=2,tensor=2,pipeline=2"),
    ):
        for verdict in prove(recipe, parse_layouts(layouts, workers), workers):
            assert verdict.status == "equal", verdict


@pytest.mark.slow
def test_transposed_matrices_beside_other_axes(tmp_path: Path) -> None:
    """GPT-2's are kept as (inputs, outputs), its query, key and value in one."""
    beside = ("fsdp=2", "replicate=2", "context=2", "fsdp=2,recompute=full")
    layouts = ";".join(["tensor=4", *(f"tensor=2,{axis}" for axis in beside)])
    for verdict in prove(family("gpt2", tmp_path), parse_layouts(layouts, 4), 4):
        assert verdict.status == "equal", verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_recompute_changes_nothing(name: str, tmp_path: Path) -> None:
    layouts = "replicate=2,recompute=full;fsdp=2,recompute=selective;pipeline=2,schedule=gpipe,recompute=selective"
    for verdict in prove(family(name, tmp_path), parse_layouts(layouts, 2), 2):
        assert verdict.status == "equal", verdict


def test_offloading_changes_nothing(tmp_path: Path) -> None:
    (verdict,) = prove(family("llama", tmp_path), parse_layouts("fsdp=2,cpu_offload=true", 2), 2)
    assert verdict.status == "equal", verdict


@pytest.mark.slow
def test_offloading_beside_other_axes(tmp_path: Path) -> None:
    beside = ("pipeline=2", "replicate=2", "tensor=2,sequence_parallel=true")
    layouts = ";".join(f"fsdp=2,cpu_offload=true,{axis}" for axis in beside)
    for verdict in prove(family("llama", tmp_path), parse_layouts(layouts, 4), 4):
        assert verdict.status == "equal", verdict


@pytest.mark.slow
def test_bytes_are_those_of_the_closed_form(tmp_path: Path) -> None:
    """DDP hands every gradient to one all-reduce; a pipeline sends each micro-batch's hidden states forwards and their
    gradients back."""
    recipe = family("llama", tmp_path)
    small = proof_recipe(recipe, tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers_config(small.model))
    parameters = sum(p.numel() for p in model.parameters())
    ddp, pipeline = prove(recipe, parse_layouts("replicate=2;pipeline=2,schedule=gpipe", 2), 2)
    sums = 5 * 4  # loss, weight, stop and checkpoint requests, tokens
    assert ddp.bytes_by_collective == {"all_reduce": 2 * (4 * parameters + sums)}
    rows, length, hidden = 16, 32, model.config.hidden_size
    assert pipeline.bytes_by_collective["send"] == 2 * rows * length * hidden * 4


def test_a_difference_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order differ in the last bits, so a tolerance of zero must be exceeded."""
    monkeypatch.setattr("heliostat.train.prove.LOSS_TOLERANCE", 0.0)
    (verdict,) = prove(family("llama", tmp_path), parse_layouts("replicate=2", 2), 2)
    assert verdict.status == "different"
    assert verdict.loss_difference is not None
    assert 0 < verdict.loss_difference < 1e-6


@pytest.mark.slow
def test_routing_that_differs_is_said(tmp_path: Path) -> None:
    """Of each token of the last step every layer's choices are counted once, and other weights choose otherwise."""
    recipe = proof_recipe(family("mixtral", tmp_path), tmp_path / "storage")
    make_data(tmp_path / "data")
    for name, lr in (("one", 1e-3), ("other", 2e-3)):
        _run(override(recipe, {"optimizer.lr": lr}), 1, tmp_path, name)
    choices = json.loads((tmp_path / "one" / "rank-0.json").read_text())["routing"]
    last = read_metrics(tmp_path / "one" / METRICS_FILE)[STEPS - 1]
    tokens = last["weight"] + recipe.training.global_batch_size  # each row's last token has no label
    layers, top_k = 4, 2
    assert len(choices) == layers * top_k * tokens
    assert routing_agreement(tmp_path / "one", tmp_path / "one") == 1.0
    agreement = routing_agreement(tmp_path / "one", tmp_path / "other")
    assert agreement is not None
    assert 0.5 < agreement < 1.0  # choosing two of four at random would agree on half


def test_what_cannot_be_proven_is_refused(tmp_path: Path) -> None:
    for name, words in (("resnet", "no attention heads"), ("vits", "classifies neither")):
        with pytest.raises(Refused, match=words):
            proof_recipe(family(name, tmp_path), tmp_path)


def test_mistakes_in_layouts_are_refused() -> None:
    for text, word in (
        ("fdsp=2", "fsdp"),
        ("fsdp=two", "number"),
        ("fsdp=3", "divide"),
        ("pipeline=2,schedule=interleave", "did you mean interleaved"),
        ("tensor=2,loss_parallel=yes", "not true"),
        ("", "layout"),
    ):
        with pytest.raises(Refused, match=word):
            parse_layouts(text, 4)


def test_the_job_takes_a_configuration_file(tmp_path: Path) -> None:
    family("llama", tmp_path)
    done = run("prove", str(tmp_path / "llama" / "config.json"), "--layouts", "fsdp=2;pipeline=2,micro_batches=1")
    assert done.code == 2, done.stderr[-3000:]
    assert done.answer["status"] == "refused"
    equal, refused = done.answer["layouts"]
    assert (equal["status"], refused["status"]) == ("equal", "refused")
    assert "micro-batches" in refused["reason"]
    assert json.dumps(done.answer["tolerance"]) == json.dumps({"loss": 1e-05, "grad_norm": 0.0001})
