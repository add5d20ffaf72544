"""Adapters: peft's own training step for step, what is trained, what a bundle holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from heliostat.models import bundle
from heliostat.models.load import build_model
from heliostat.models.lora import add_adapters
from heliostat.recipe import Lora, Recipe, Refused, override
from heliostat.tasks import Batch
from heliostat.train.loop import Run, train
from tests.recipes import lora_head, prepared, tiny_bert, tiny_llama

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def language_model(family: str, folder: Path) -> Recipe:
    """A language model with adapters of rank 4 and, as one that was pre-trained, weights from a folder."""
    recipe = tiny_llama(folder, **{"model.lora.rank": 4, "schedule.max_steps": 4, "optimizer.lr": 1e-2})
    own = FAMILIES[family] if family == "gpt2" else recipe.model.config | FAMILIES[family]
    base = override(recipe, {"model.config": own, "model.lora.rank": 0, "seed": 5})
    build_model(prepared(base).task(base)).save_pretrained(folder / "base")
    return override(recipe, {"model.name": str(folder / "base"), "model.config": {}})


def recipe_of(kind: str, folder: Path) -> Recipe:
    if kind == "bert":
        return lora_head(folder, **{"model.lora.rank": 4, "schedule.max_steps": 4, "optimizer.lr": 1e-2})
    return language_model(kind, folder)


def base_model(recipe: Recipe) -> Any:
    """As peft's users load it: with a head that is not the one that was trained."""
    if recipe.task == "text_classification":
        return transformers.AutoModelForSequenceClassification.from_pretrained(recipe.model.name)
    return transformers.AutoModelForCausalLM.from_pretrained(recipe.model.name)


def loss_sum_and_weight(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch.targets["labels"].flatten()
    return cross_entropy(logits.flatten(0, -2), labels, reduction="sum"), (labels != -100).sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_it_trains_as_peft_does(kind: str, tmp_path: Path) -> None:
    """peft's model, PyTorch's AdamW and clipping, and the mean over all of a batch."""
    recipe = recipe_of(kind, tmp_path)
    ours = Run(recipe, prepared(recipe), tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in ours.parallel.model.state_dict().items()}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=r".*\.(layer|layers|h)\.\d+\..*(proj|query|key|value|dense|c_attn|c_fc)",
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = peft.get_peft_model(base_model(recipe), config)
    theirs.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in before.items()})
    head = [p for name, p in theirs.named_parameters() if ".classifier." in name]
    for parameter in head:
        parameter.requires_grad_()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.optimizer.weight_decay},
         {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    cursor = ours.progress.cursor
    ours.parallel.runs.train()
    theirs.train()
    for _ in range(4):
        batches = ours.batches(cursor)
        sums = [loss_sum_and_weight(theirs(**batch.inputs).logits, batch) for batch in batches]
        loss = sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures = ours.step(batches).figures()
        assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        cursor = ours.loader.next(cursor)
    after = ours.parallel.model.state_dict()
    assert {name for name in after if "lora_" in name}
    for name, tensor in after.items():
        changed = "lora_" in name or name.startswith("classifier.")
        assert torch.equal(tensor, before[name]) != changed, name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bert"])
def test_a_bundle_is_the_merged_model_and_holds_the_adapter(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(kind, tmp_path)
    outcome = train(recipe, prepared(recipe).folder, tmp_path / "run")
    found = bundle.read(Path(outcome["bundle"]))
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= found.card["files"].keys()
    plain = type(base_model(recipe)).from_pretrained(found.path)
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    adapted = peft.PeftModel.from_pretrained(base_model(recipe), str(found.path / "adapter")).eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.inference_mode():
        logits, before = plain(input_ids=ids).logits, base_model(recipe).eval()(input_ids=ids).logits
        assert adapted(input_ids=ids).logits.numpy() == pytest.approx(logits.numpy(), rel=1e-4, abs=1e-5)
        assert (logits - before).abs().max() > 1e-2, "a model that did not move would show nothing"
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(merged[name], tensor), name
    config = json.loads((found.path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model.name
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["modules_to_save"] == (["classifier"] if kind == "bert" else None)


def adapted_modules(recipe: Recipe) -> set[str]:
    model = build_model(prepared(recipe).task(recipe))
    return {name.partition(".lora_A.")[0] for name, p in model.named_parameters() if ".lora_A." in name}


def test_targets(tmp_path: Path) -> None:
    rank = {"model.lora.rank": 2}
    recipe = tiny_llama(tmp_path, **rank)
    found = adapted_modules(recipe)
    assert sorted({name.rpartition(".")[2] for name in found}) == LLAMA
    assert len(found) == 2 * len(LLAMA)
    found = adapted_modules(override(recipe, {"model.lora.targets": ["q_proj", "v_proj"]}))
    assert found == {f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in ("q_proj", "v_proj")}
    # The pooler's is outside the blocks.
    found = adapted_modules(tiny_bert(tmp_path, **rank, **{"model.lora.targets": ["dense"]}))
    assert len(found) == 2 * 3
    assert all(name.startswith("bert.encoder.layer.") for name in found)


def test_adapters_are_drawn_from_the_seed(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"model.lora.rank": 2})
    task = prepared(recipe).task(recipe)
    torch.manual_seed(1)
    one = build_model(task).state_dict()
    torch.manual_seed(2)
    two = build_model(task).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if "lora_A" in name)
    assert not any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    assert one["model.layers.0.self_attn.q_proj.lora_A.default.weight"].shape == (2, 32)


def refused(recipe: Recipe) -> Refused:
    with pytest.raises(Refused) as caught:
        build_model(prepared(recipe).task(recipe))
    return caught.value


def test_unknown_targets_are_refused(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"model.lora.rank": 2})
    error = refused(override(recipe, {"model.lora.targets": ["q_proj", "v_prj"]}))
    assert (error.field, error.suggestion) == ("model.lora.targets", "did you mean v_proj?")
    error = refused(override(recipe, {"model.lora.targets": ["classifier"]}))
    assert error.suggestion == f"there are: {', '.join(LLAMA)}"


def test_blocks_without_linear_modules_are_refused() -> None:
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    for targets in ([], ["q_proj"]):
        with pytest.raises(Refused, match="ResNetModel have no linear modules"):
            add_adapters(model, Lora(rank=2, targets=targets), set())


def test_blocks_that_the_checkpoint_lacks_are_refused(tmp_path: Path) -> None:
    recipe = override(language_model("llama", tmp_path), {"model.config": {"num_hidden_layers": 3}})
    assert "model.layers.2.self_attn.q_proj" in refused(recipe).reason


def test_frozen_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="freeze_layers"):
        tiny_llama(tmp_path, **{"model.lora.rank": 2, "model.freeze_layers": 1})
