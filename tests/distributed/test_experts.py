"""Experts on several ranks: the same training, the tokens that travel, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.models.load import transformers_config
from heliostat.train.prove import parse_layouts, proof_recipe, prove
from tests.distributed.test_prove import family


@pytest.mark.slow
def test_two_ranks_train_like_one_and_send_each_token_to_its_experts(tmp_path: Path) -> None:
    recipe = family("mixtral", tmp_path)
    config = transformers_config(proof_recipe(recipe, tmp_path).model)
    layouts = parse_layouts("expert=2;expert=2,pipeline=2,schedule=gpipe,micro_batches=4", 4)
    plain, pipeline = prove(recipe, layouts, 4)
    assert plain.status == pipeline.status == "equal", (plain, pipeline)
    # In a pipeline every row has its full length. A token goes to its experts and comes back, and so do its gradients;
    # before that, each rank tells the others how many tokens each expert gets.
    tokens, micro_batches, ranks = 16 * 32, 4, 2
    travels = tokens * config.num_experts_per_tok * config.hidden_size * 4
    counts = config.num_local_experts * micro_batches * ranks
    assert pipeline.bytes_by_collective["all_to_all"] == config.num_hidden_layers * 4 * (travels + counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_hybrids(name: str, tmp_path: Path) -> None:
    recipe = family(name, tmp_path)
    for workers, layouts in (
        (4, "expert=2,fsdp=2;expert=2,replicate=2;expert=4;expert=2,pipeline=2,schedule=zbv;expert=2,recompute=full"),
        (8, "expert=2,fsdp=2,pipeline=2"),
    ):
        for verdict in prove(recipe, parse_layouts(layouts, workers), workers):
            assert verdict.status == "equal", verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_slices_of_every_expert(name: str, tmp_path: Path) -> None:
    layouts = ";".join(
        f"tensor=2,{beside}"
        for beside in ("fsdp=2", "replicate=2", "context=2", "pipeline=2", "pipeline=2,schedule=zbv",
                       "fsdp=2,recompute=full")
    )  # fmt: skip
    for verdict in prove(family(name, tmp_path), parse_layouts(layouts, 4), 4):
        assert verdict.status == "equal", verdict
        assert verdict.routing_agreement == 1.0


def test_refused_by_name(tmp_path: Path) -> None:
    (verdict,) = prove(family("llama", tmp_path), parse_layouts("expert=2", 2), 2)
    assert verdict.status == "refused"
    assert "LlamaForCausalLM declares no expert-parallel plan" in verdict.reason
    recipe = family("mixtral", tmp_path)
    recipe.model.config["num_local_experts"] = 4
    for layout, words in (("expert=3", "expert=3 does not divide 4 experts"), ("expert=2,tensor=2", "tensor")):
        workers = 3 if layout == "expert=3" else 4
        (verdict,) = prove(recipe, parse_layouts(layout, workers), workers)
        assert verdict.status == "refused"
        assert words in verdict.reason
