"""The ready-made space: what is in it, that all of it can be tried, and what it leaves to the recipe's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from heliostat.launch.tune.auto import with_auto_space
from heliostat.launch.tune.space import check_space, draw, trial_recipe
from heliostat.models.load import build_model
from heliostat.recipe import Choice, LogUniform, Recipe, Refused, override
from heliostat.tasks import get_task
from pipelines.job import find_recipe
from tests.recipes import lora_head, prepared, tiny_bert, tiny_llama


def auto(recipe: Recipe) -> Recipe:
    return with_auto_space(recipe, get_task(recipe))


def drawn(recipe: Recipe, number: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw(study.ask(), recipe.tune.in_order()) for _ in range(number)]


def test_what_of_a_pretrained_model_is_trained(tmp_path: Path) -> None:
    """All of it, its head alone, or adapters; and what is drawn can be built and is what it says."""
    recipe = auto(lora_head(tmp_path, **{"model.lora.rank": 2}))
    check_space(recipe, get_task(recipe))
    data = prepared(recipe)
    found: dict[tuple[int, int | None], bool] = {}
    for values in drawn(recipe):
        trial = trial_recipe(recipe, values, rows=96)
        method = (values["model.lora.rank"], values.get("model.freeze_layers"))
        if method not in found:
            model = build_model(data.task(trial))
            names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            inside = {name for name in names if ".layer." in name}
            assert any(name.startswith("classifier.") for name in names)
            found[method] = bool(inside)
            assert all("lora_" in name for name in inside) == (method[0] > 0 or not inside)
    assert found == {(0, 0): True, (0, 2): False, (2, None): True}


def test_a_recipes_own_ranges_win(tmp_path: Path) -> None:
    own = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 2e-3}}
    space = auto(lora_head(tmp_path, **{"tune.space": own})).tune.space
    assert space["optimizer.lr"] == LogUniform(low=1e-3, high=2e-3)
    assert {"training.global_batch_size", "model.max_length", "model.lora.rank"} <= set(space)
    only = auto(lora_head(tmp_path, **{"tune.space": {"model.lora.rank": {"kind": "choice", "values": [2, 4]}}}))
    assert only.tune.space["model.lora.rank"] == Choice(values=[2, 4])
    assert "model.freeze_layers" not in only.tune.space, "it would never be drawn"


def test_one_that_excludes_adapters_is_refused(tmp_path: Path) -> None:
    frozen: dict[str, Any] = {"kind": "choice", "values": [0, 1]}
    recipe = lora_head(tmp_path, **{"model.lora.rank": 0})
    with pytest.raises(Refused, match="freeze_layers excludes adapters") as refused:
        auto(override(recipe, {"tune.space": {"model.freeze_layers": frozen}}))
    assert refused.value.field == "tune.space"
    frozen["when"] = {"model.lora.rank": [0]}
    both = {"model.lora.rank": {"kind": "choice", "values": [0, 4]}, "model.freeze_layers": frozen}
    assert auto(override(recipe, {"tune.space": both})).tune.space["model.freeze_layers"].when


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_a_model_from_scratch_is_trained_whole(make: Any, tmp_path: Path) -> None:
    space = auto(make(tmp_path)).tune.space
    assert not [path for path in space if path.startswith(("model.lora", "model.freeze"))]
    assert {"optimizer.lr", "schedule.shape", "training.global_batch_size"} <= set(space)


def test_only_batches_that_the_recipe_could_be_trained_with() -> None:
    """Batch normalisation over the global batch leaves no room for accumulation."""
    recipe = find_recipe("digits")
    sizes = auto(recipe).tune.space["training.global_batch_size"]
    assert sizes == Choice(values=[32, 64])
    assert auto(recipe).tune.space["data.augment"] == Choice(values=["none", "crop", "crop_flip"])


def test_pooling_is_searched_where_the_family_has_it(tmp_path: Path) -> None:
    path = "model.config.classifier_pooling"
    assert path not in auto(tiny_bert(tmp_path)).tune.space
    config = {"model_type": "modernbert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    recipe = auto(tiny_bert(tmp_path, **{"model.config": config}))
    assert recipe.tune.space[path] == Choice(values=["cls", "mean"])
    chosen = override(recipe, {path: "mean"})
    model = build_model(prepared(chosen).task(chosen))
    assert (type(model).__name__, model.config.classifier_pooling) == ("ModernBertForSequenceClassification", "mean")
