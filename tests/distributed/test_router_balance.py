"""The router's auxiliary loss: over the global batch, whatever the micro-batches and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.loader import Cursor
from heliostat.data.prepare import read_prepared
from heliostat.models.load import build_model
from heliostat.recipe import Model, Recipe, Refused, override
from heliostat.tasks.language_model import IGNORED
from heliostat.train.loop import Run, train
from heliostat.train.prove import parse_layouts, proof_recipe, prove
from tests.distributed.harness import run
from tests.distributed.test_layouts import figures, train_here
from tests.recipes import prepared, tiny_llama

COEFFICIENT = 0.5
"""So large that a wrong term shows in every norm."""
FAMILIES = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def balanced(name: str, folder: Path, **fields: Any) -> Recipe:
    """A small model of a family, with the loss. 33 rows in batches of 8: an epoch's last batch has one row."""
    recipe = tiny_llama(folder)
    own = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    return override(recipe, {"model.config": recipe.model.config | FAMILIES[name] | own} | fields)


class Keep:
    """Stands where the optimizer stands, and keeps the gradients that a step hands to it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.grads: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self) -> None:
        self.model.zero_grad()


def whole_batch(ranks: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' own auxiliary loss of the first global batch in one forward pass, and the gradients of its own
    loss, which holds it."""
    rows = ranks.loader.read(Cursor(), ranks.layout.coordinate, ranks.recipe.training.global_batch_size)
    (batch,) = [ranks.task.collate(item, True) for item in rows]
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, IGNORED)
    model = build_model(ranks.task).train()
    outputs = model(**batch.inputs, labels=labels)
    outputs.loss.backward()
    return outputs.aux_loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [8, 2])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_loss_of_transformers(
    name: str, recompute: str, micro_batch_size: int, tmp_path: Path
) -> None:
    recipe = balanced(
        name,
        tmp_path,
        **{
            "training.micro_batch_size": micro_batch_size,
            "training.recompute": recompute,
            "optimizer.clip_norm": None,
        },
    )
    ranks = Run(recipe, read_prepared(prepared(recipe).folder), tmp_path)
    keep = Keep(ranks.parallel.model)
    ranks.step.optimizer = keep  # type: ignore[assignment]
    ranks.parallel.runs.train()
    result = ranks.step(ranks.batches(Cursor()))
    value, expected = whole_batch(ranks)
    assert result.figures()["router_aux_loss"] == pytest.approx(float(value), rel=1e-5)
    assert keep.grads.keys() == expected.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(keep.grads[parameter], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter: n + m)
    router = next(parameter for parameter in expected if "gate.weight" in parameter)
    assert expected[router].abs().max() > 1e-3, "a gradient of nothing would show nothing"


LAYOUTS = {
    "replicate2": {},
    "replicate2-one-micro-batch": {"training.micro_batch_size": 4},
    "fsdp2": {"parallelism.fsdp": 2},
    "fsdp2-recompute": {"parallelism.fsdp": 2, "training.recompute": "full"},
    "expert2": {"parallelism.expert": 2},
    "context2": {"parallelism.context": 2},
    "pipeline2": {"parallelism.pipeline": 2},
    "pipeline2-recompute": {"parallelism.pipeline": 2, "training.recompute": "full"},
    "pipeline2-interleaved": {"parallelism.pipeline": 2, "parallelism.schedule": "interleaved"},
    "pipeline2-zbv": {"parallelism.pipeline": 2, "parallelism.schedule": "zbv"},
}
FAST = ("replicate2", "pipeline2")


@pytest.fixture(scope="module")
def one_micro_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Path, Path]]:
    """Each family trained by one process that sees each global batch as a whole."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        recipe = balanced(name, folder, **{"training.micro_batch_size": 8})
        recipe = override(recipe, {"model.config": recipe.model.config | {"num_hidden_layers": 4}})
        data = prepared(recipe).folder
        run(1, train_here, recipe, data, folder / "one")
        found[name] = (recipe, data, folder / "one")
    return found


def values(run_dir: Path) -> list[float]:
    return [record["router_aux_loss"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(name, layout, marks=[] if name == "mixtral" and layout in FAST else pytest.mark.slow)
     for name in FAMILIES for layout in LAYOUTS],
)  # fmt: skip
def test_layouts_train_like_one_micro_batch(
    one_micro_batch: dict[str, tuple[Recipe, Path, Path]], name: str, layout: str, tmp_path: Path
) -> None:
    recipe, data, one = one_micro_batch[name]
    fields = {"parallelism.workers": 2, "training.micro_batch_size": 2} | LAYOUTS[layout]
    run(2, train_here, override(recipe, fields), data, tmp_path / "two")
    assert values(tmp_path / "two") == pytest.approx(values(one), rel=1e-5)
    for (loss, norm, weight), (loss_, norm_, weight_) in zip(figures(one), figures(tmp_path / "two"), strict=True):
        assert weight_ == weight
        assert loss_ == pytest.approx(loss, rel=1e-5)
        assert norm_ == pytest.approx(norm, rel=1e-4)


def test_balance_is_learned_where_asked_for(
    one_micro_batch: dict[str, tuple[Recipe, Path, Path]], tmp_path: Path
) -> None:
    recipe, data, one = one_micro_batch["mixtral"]
    hardly = override(recipe, {"model.config": recipe.model.config | {"router_aux_loss_coef": 1e-9}})
    train(hardly, data, tmp_path / "hardly", write_bundle=False)
    # The first steps' weights are nearly the same.
    assert sum(values(one)[5:]) < sum(values(tmp_path / "hardly")[5:])
    off = override(recipe, {"model.config": recipe.model.config | {"output_router_logits": False}})
    train(off, data, tmp_path / "off", write_bundle=False)
    assert not any("router_aux_loss" in record for record in read_metrics(tmp_path / "off" / METRICS_FILE))
    assert [norm for _, norm, _ in figures(tmp_path / "off")] != [norm for _, norm, _ in figures(one)]


@pytest.mark.slow
def test_the_proof_keeps_the_loss(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("mixtral", output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    config.save_pretrained(tmp_path / "mixtral")
    recipe = Recipe(name="m", task="language_model", model=Model(name=str(tmp_path / "mixtral"), pretrained=False))
    own = proof_recipe(recipe, tmp_path).model.config
    assert (own["output_router_logits"], own["router_aux_loss_coef"]) == (True, COEFFICIENT)
    (verdict,) = prove(recipe, parse_layouts("replicate=2", 2), 2)
    assert verdict.status == "equal", verdict
    assert verdict.routing_agreement == 1.0


def test_another_definition_is_refused(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"model.config": {"model_type": "doge", "hidden_size": 32, "num_hidden_layers": 1,
                                                      "output_router_logits": True}})  # fmt: skip
    with pytest.raises(Refused, match="in a way of its own"):
        Run(recipe, read_prepared(prepared(recipe).folder), tmp_path)
