"""Sequence and loss parallelism: the same training, the traffic of the closed form, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import read_prepared
from heliostat.models.blocks import blocks
from heliostat.parallel.plans import tensor_plan
from heliostat.recipe import Parallelism, Recipe, Refused, override
from heliostat.train.loop import Run
from heliostat.train.prove import PROFILED_STEP, Verdict, _Bytes, parse_layouts, prove
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.distributed.test_prove import family
from tests.recipes import prepared, tiny_bert, tiny_llama

SEQUENCE, LOSS = "tensor=2,sequence_parallel=true", "tensor=2,loss_parallel=true"
BOTH = f"{SEQUENCE},loss_parallel=true"
TIED = "GemmaForCausalLM ties its embeddings"


def assert_equal(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        assert verdict.status == "equal", verdict


def fields(tensor: int, *flags: str) -> dict[str, Any]:
    return {"parallelism.workers": tensor, "parallelism.tensor": tensor} | dict.fromkeys(flags, True)


WITH_SEQUENCE, WITH_LOSS = "parallelism.sequence_parallel", "parallelism.loss_parallel"


# -- the same training


def test_llama_on_two_processes(tmp_path: Path) -> None:
    assert_equal(prove(family("llama", tmp_path), parse_layouts(BOTH, 2), 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "olmo", "phi"])
def test_families_on_two_processes(name: str, tmp_path: Path) -> None:
    for verdict in prove(family(name, tmp_path), parse_layouts(f"{SEQUENCE};{LOSS};{BOTH}", 2), 2):
        if name == "gemma" and "loss" in verdict.layout:
            assert (verdict.status, TIED in verdict.reason) == ("refused", True), verdict
        else:
            assert verdict.status == "equal", verdict


@pytest.mark.slow
def test_classifiers_on_two_processes(tmp_path: Path) -> None:
    """The norms of a BERT come after its blocks' sums; its classifier sees the first position only. The patches of an
    image and its class token are an odd number of positions."""
    bert = prove(family("bert", tmp_path), parse_layouts(SEQUENCE, 2), 2)
    assert_equal(bert)
    (vit,) = prove(family("vit", tmp_path), parse_layouts(SEQUENCE, 2), 2)
    assert vit.status == "refused"
    assert "17 positions are not shared evenly by tensor=2" in vit.reason


@pytest.mark.slow
def test_hybrids(tmp_path: Path) -> None:
    layouts = (
        "fsdp=2",
        "replicate=2",
        "context=2",
        "pipeline=2",
        *(f"pipeline=2,schedule={s}" for s in ("gpipe", "zbv")),
    )
    assert_equal(prove(family("llama", tmp_path), parse_layouts(";".join(f"{each},{BOTH}" for each in layouts), 4), 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recompute(kind: str, tmp_path: Path) -> None:
    assert_equal(prove(family("llama", tmp_path), parse_layouts(f"{BOTH},recompute={kind}", 2), 2))


@pytest.mark.slow
def test_a_vocabulary_that_peers_cannot_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head then stays whole."""
    monkeypatch.setattr("heliostat.train.prove.VOCABULARY", 257)
    sequence, loss = prove(family("llama", tmp_path), parse_layouts(f"{SEQUENCE};{LOSS}", 2), 2)
    assert sequence.status == "equal", sequence
    assert loss.status == "refused"
    assert "a vocabulary of 257, which tensor=2 does not divide" in loss.reason


def validation(run_dir: Path) -> list[dict[str, float]]:
    return [record["validation"] for record in read_metrics(run_dir / METRICS_FILE) if "validation" in record]


def assert_like_one_process(recipe: Recipe, data: Path, layout: dict[str, Any], folder: Path) -> None:
    run(1, train_here, recipe, data, folder / "one")
    run(layout["parallelism.workers"], train_here, override(recipe, layout), data, folder / "several")
    exact = recipe.training.precision == "float32"
    for (loss, norm, _), (loss_, norm_, _) in zip(figures(folder / "one"), figures(folder / "several"), strict=True):
        assert loss_ == pytest.approx(loss, rel=1e-5 if exact else 1e-3)
        assert norm_ == pytest.approx(norm, rel=1e-4 if exact else 1e-2)
    for expected, got in zip(validation(folder / "one"), validation(folder / "several"), strict=True):
        assert {"loss", "accuracy"} <= got.keys() == expected.keys()
        if exact:
            assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"training.compile": True}, {"training.precision": "bfloat16"}])
def test_options_and_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"training.evaluate_every_steps": 3})
    data = prepared(recipe).folder
    assert_like_one_process(override(recipe, options), data, fields(2, WITH_SEQUENCE, WITH_LOSS), tmp_path)


@pytest.mark.slow
def test_three_peers(tmp_path: Path) -> None:
    """Eight positions, to whose multiples rows are padded, are no three shares."""
    recipe = tiny_llama(tmp_path)
    recipe.model.config.update(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=96)
    assert_like_one_process(recipe, prepared(recipe).folder, fields(3, WITH_SEQUENCE), tmp_path)


# -- traffic


def traffic(recipe: Recipe, folder: Path, run_dir: Path) -> tuple[int, int, dict[str, int]]:
    """Rows and positions of one micro-batch, and what this rank hands to collectives in a step of it."""
    ranks = Run(recipe, read_prepared(folder), run_dir)
    batches = ranks.batches(ranks.progress.cursor)[:1]
    sent = _Bytes()
    sent.step = PROFILED_STEP - 1
    sent.at_each_step()
    ranks.step(batches)
    sent.at_each_step()
    return *batches[0].inputs["input_ids"].shape, sent.by_collective


def test_bytes_are_those_of_the_closed_form(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path)
    data = prepared(recipe).folder
    peers, layers, hidden = 2, 2, 32
    vocabulary = read_prepared(data).meta["facts"]["vocab_size"]
    (copies, *_), (shares, *_), (losses, *_) = (
        run(peers, traffic, override(recipe, fields(peers, *flags)), data, tmp_path / str(len(flags)))
        for flags in ((), (WITH_SEQUENCE,), (WITH_SEQUENCE, WITH_LOSS))
    )
    rows, positions, plain = copies
    assert shares[:2] == losses[:2] == (rows, positions)
    states, tokens = rows * positions * hidden * 4, rows * positions * 4
    logits = tokens * vocabulary // peers
    # A block gathers and scatters twice, and twice on the way back. The blocks' states are gathered where they leave
    # the last of them, and their gradients where they leave the first.
    assert shares[2]["reduce_scatter"] == 4 * layers * states
    assert shares[2]["all_gather"] == (4 * layers + 2) * states // peers + logits
    assert plain["all_gather"] == logits
    # Two sums of a block's outputs, and one of the gradients of each of its five inputs; norms are summed instead.
    norms = 2 * layers * hidden * 4
    assert plain["all_reduce"] - shares[2]["all_reduce"] == 7 * layers * states - norms
    # Of each token the largest logit, the sum of all, and the right one.
    assert losses[2]["all_gather"] == shares[2]["all_gather"] - logits
    assert losses[2]["all_reduce"] == shares[2]["all_reduce"] + 3 * tokens


# -- refusals


def causal_lm(model_type: str, **config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                model_type, num_hidden_layers=2, num_attention_heads=4, hidden_size=64, **config
            )
        )


def test_positions_are_gathered_where_split_matrices_begin() -> None:
    model = causal_lm("phi")
    _, _, partial = tensor_plan(model, Parallelism(workers=2, tensor=2, sequence_parallel=True))
    # All that is not split, but for the biases that are added to whole sums.
    kept = {name for name, _ in blocks(model)[1][0].named_parameters() if "norm" in name}
    assert partial == {f"model.layers.{i}.{name}" for i in range(2) for name in kept}


@pytest.mark.parametrize(
    ("config", "flag", "words"),
    [
        ({"model_type": "gemma"}, "loss_parallel", TIED),
        ({"model_type": "llama", "vocab_size": 257}, "loss_parallel", "a vocabulary of 257"),
        ({"model_type": "mixtral"}, "sequence_parallel", "sums what its experts give"),
        ({"model_type": "gpt2"}, "sequence_parallel", "does not split transformer.h.*.attn.c_attn by positions"),
        (
            {"model_type": "phi", "qk_layernorm": True},
            "sequence_parallel",
            "does not split model.layers.*.self_attn.k_layernorm",
        ),
    ],
)
def test_models_are_refused_by_name(config: dict[str, Any], flag: str, words: str) -> None:
    with pytest.raises(Refused) as caught:
        tensor_plan(causal_lm(**config), Parallelism.model_validate({"workers": 2, "tensor": 2, flag: True}))
    assert caught.value.field == f"parallelism.{flag}"
    assert words in caught.value.reason


def test_a_norm_of_heads_that_no_plan_names_is_refused() -> None:
    """It would see its rank's heads only, and its copies would drift apart."""
    with pytest.raises(Refused, match=r"does not split model\.layers\.\*\.self_attn\.k_layernorm") as caught:
        tensor_plan(causal_lm("phi", qk_layernorm=True), Parallelism(workers=2, tensor=2))
    assert caught.value.field == "parallelism.tensor"


def test_classifiers_have_no_vocabulary(tmp_path: Path) -> None:
    (verdict,) = prove(family("bert", tmp_path), parse_layouts(LOSS, 2), 2)
    assert (verdict.status, verdict.reason) == (
        "refused",
        "BertForSequenceClassification has no logits over a vocabulary (set it false)",
    )


def test_recipes_are_refused(tmp_path: Path) -> None:
    for recipe, given, field in (
        (tiny_bert(tmp_path), {WITH_SEQUENCE: True}, WITH_SEQUENCE),
        (tiny_llama(tmp_path), {WITH_LOSS: True}, WITH_LOSS),
        (tiny_llama(tmp_path), fields(2, WITH_LOSS) | {"training.label_smoothing": 0.1}, "training.label_smoothing"),
    ):
        with pytest.raises(Refused) as caught:
            override(recipe, given)
        assert caught.value.field == field
