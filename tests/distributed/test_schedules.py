"""Schedules with several stages a rank: they train, evaluate and resume like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from heliostat.parallel.plans import split_stages
from heliostat.planner.plans import local_stages
from heliostat.recipe import PipelineSchedule, Recipe, Refused, override
from heliostat.train.prove import parse_layouts, prove
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.distributed.test_prove import family
from tests.recipes import prepared, tiny_llama

SCHEDULES: tuple[PipelineSchedule, ...] = ("interleaved", "zbv")


def model_of(blocks: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def pipelined(recipe: Recipe, schedule: str, **fields: Any) -> Recipe:
    layout = {"parallelism.workers": 2, "parallelism.pipeline": 2, "parallelism.schedule": schedule}
    return override(recipe, layout | fields)


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 4), (2, 5), (4, 11)])
@pytest.mark.parametrize("schedule", ["1f1b", *SCHEDULES])
def test_stages_are_the_whole_model_once(schedule: PipelineSchedule, ranks: int, blocks: int) -> None:
    whole = model_of(blocks)
    ids = torch.arange(12).view(2, 6)
    expected = whole(input_ids=ids).logits
    models = [model_of(blocks) for _ in range(ranks)]
    parts = [part for rank, model in enumerate(models) for part in split_stages(model, schedule, rank, ranks)]
    names = [name for model in models for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    x = ids
    for part in sorted(parts, key=lambda part: part.index):
        held = [module for module in part.modules() if isinstance(module, type(whole.model.layers[0]))]
        assert held, "no stage is without a block"
        x = part(x)
    assert torch.equal(x, expected)


def test_who_holds_which_stage() -> None:
    assert [local_stages("interleaved", rank, 3) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [local_stages("zbv", rank, 3) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_stages_than_blocks_are_refused(schedule: PipelineSchedule) -> None:
    with pytest.raises(Refused, match=r"8 stages \(2 a rank\) for 7 blocks \(use pipeline ≤ 3\)"):
        split_stages(model_of(7), schedule, 0, 4)


def test_zbv_refuses_a_first_stage_that_trains_nothing() -> None:
    model = model_of(4)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    for rank in range(2):  # every rank says so, not only the one that holds it
        with pytest.raises(Refused, match="freeze_layers"):
            split_stages(model, "zbv", rank, 2)


def test_proof_on_two_processes(tmp_path: Path) -> None:
    layouts = "pipeline=2,schedule=interleaved;pipeline=2,schedule=zbv"
    for verdict in prove(family("llama", tmp_path), parse_layouts(layouts, 2), 2):
        assert verdict.status == "equal", verdict


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path, Any]:
    """Five blocks over four stages, trained by one process."""
    folder = tmp_path_factory.mktemp("schedules")
    recipe = tiny_llama(folder)
    recipe = override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": 5}})
    data = prepared(recipe).folder
    (outcome,) = run(1, train_here, recipe, data, folder / "one")
    return recipe, data, folder / "one", outcome


def assert_same_end(one: Path, expected: Any, outcome: Any) -> None:
    assert (outcome["status"], outcome["step"], outcome["best_step"]) == (
        "done",
        expected["step"],
        expected["best_step"],
    )
    assert outcome["best"] == pytest.approx(expected["best"], rel=1e-5)
    weights = load_file(one / "bundle/model.safetensors")
    weights_ = load_file(Path(outcome["bundle"]) / "model.safetensors")
    assert weights.keys() == weights_.keys()
    for name in weights:
        assert weights_[name].numpy() == pytest.approx(weights[name].numpy(), abs=2e-4), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_under_one_process_and_back(
    five_blocks: tuple[Recipe, Path, Path, Any], schedule: str, tmp_path: Path
) -> None:
    recipe, data, one, expected = five_blocks
    two = pipelined(recipe, schedule)
    for world, first, then in ((2, two, recipe), (1, recipe, two)):
        before, after = tmp_path / f"{world}-before", tmp_path / f"{world}-after"
        (stopped, *_) = run(world, train_here, first, data, before, 4)
        assert (stopped["status"], stopped["step"]) == ("interrupted", 4)
        (outcome, *_) = run(3 - world, train_here, then, data, after, None, before / "checkpoints")
        got = figures(before) + figures(after)
        for (loss, norm, weight), (loss_, norm_, weight_) in zip(figures(one), got, strict=True):
            assert weight_ == weight
            assert loss_ == pytest.approx(loss, rel=1e-5)
            assert norm_ == pytest.approx(norm, rel=1e-4)
        assert_same_end(one, expected, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_few_micro_batches(
    five_blocks: tuple[Recipe, Path, Path, Any], schedule: str, micro_batches: int, tmp_path: Path
) -> None:
    """As few as ranks, and one more: fewer than fill the pipeline."""
    recipe, data, one, expected = five_blocks
    size = -(-recipe.training.global_batch_size // micro_batches)
    two = pipelined(recipe, schedule, **{"training.micro_batch_size": size})
    (outcome, *_) = run(2, train_here, two, data, tmp_path / "two")
    for (loss, norm, _), (loss_, norm_, _) in zip(figures(one), figures(tmp_path / "two"), strict=True):
        assert (loss_, norm_) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    assert_same_end(one, expected, outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "fields"),
    [
        ("interleaved", {"model.freeze_layers": 1}),  # the whole first stage
        ("interleaved", {"training.precision": "bfloat16"}),
        ("zbv", {"training.precision": "bfloat16"}),
        ("interleaved", {"training.ema_decay": 0.9}),
        ("zbv", {"training.ema_decay": 0.9}),
    ],
)
def test_options(
    five_blocks: tuple[Recipe, Path, Path, Any], schedule: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    recipe, data, *_ = five_blocks
    recipe = override(recipe, fields)
    (expected,) = run(1, train_here, recipe, data, tmp_path / "one")
    (outcome, *_) = run(2, train_here, pipelined(recipe, schedule), data, tmp_path / "two")
    exact = recipe.training.precision == "float32"
    for (loss, norm, _), (loss_, norm_, _) in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert loss_ == pytest.approx(loss, rel=1e-5 if exact else 1e-3)
        assert norm_ == pytest.approx(norm, rel=1e-4 if exact else 1e-2)
    if exact:
        assert_same_end(tmp_path / "one", expected, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_hybrids_on_four_processes(name: str, tmp_path: Path) -> None:
    beside = ("fsdp=2", "tensor=2", "replicate=2")
    layouts = ";".join(f"pipeline=2,{axis},schedule={schedule}" for axis in beside for schedule in SCHEDULES)
    for verdict in prove(family(name, tmp_path), parse_layouts(layouts, 4), 4):
        assert verdict.status == "equal", verdict


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eight_stages_on_four_processes(schedule: str, tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path)
    recipe = override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": 9}})
    data = prepared(recipe).folder
    (expected,) = run(1, train_here, recipe, data, tmp_path / "one")
    four = pipelined(recipe, schedule, **{"parallelism.workers": 4, "parallelism.pipeline": 4})
    (outcome, *_) = run(4, train_here, four, data, tmp_path / "four")
    for (loss, norm, _), (loss_, norm_, _) in zip(figures(tmp_path / "one"), figures(tmp_path / "four"), strict=True):
        assert (loss_, norm_) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    assert_same_end(tmp_path / "one", expected, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "olmo", "phi", "mixtral", "qwen3_moe"])
def test_families_on_two_processes(name: str, tmp_path: Path) -> None:
    layouts = "pipeline=2,schedule=interleaved;pipeline=2,schedule=zbv"
    for verdict in prove(family(name, tmp_path), parse_layouts(layouts, 2), 2):
        assert verdict.status == "equal", verdict
