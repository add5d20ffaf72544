"""Pre-trained weights go from files into the laid-out model: bitwise what transformers loads, and no rank holds all of
them on the way."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from heliostat.models.load import build_model
from heliostat.parallel.mesh import make_layout
from heliostat.parallel.parallelize import full_state, parallelize
from heliostat.recipe import Recipe, Refused, build, override
from heliostat.tasks import get_task
from tests.distributed.harness import run

SMALL: dict[str, dict[str, Any]] = {
    # Sizes that two and four ranks do not divide.
    "llama": {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 6, "tie_word_embeddings": False, "vocab_size": 51},
    "qwen3": {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 6, "tie_word_embeddings": True, "vocab_size": 51},
    # Files hold each expert by itself, gate and up apart.
    "mixtral": {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
                "num_local_experts": 4, "vocab_size": 51},
    "gpt2": {"n_embd": 24, "n_head": 4, "vocab_size": 51},
    "bert": {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4, "vocab_size": 51},
}  # fmt: skip
LAYOUTS = {
    "llama": (
        "",
        "replicate=2",
        "fsdp=4",
        "tensor=2",
        "fsdp=2,tensor=2",
        "replicate=2,fsdp=2",
        "pipeline=2,fsdp=2",
        "fsdp=2,cpu_offload=1",
    ),
    "qwen3": ("fsdp=2", "tensor=2,replicate=2"),
    "mixtral": ("fsdp=2", "expert=2", "expert=2,fsdp=2", "tensor=2", "fsdp=2,tensor=2", "expert=2,pipeline=2"),
    "gpt2": ("tensor=2", "fsdp=2,tensor=2"),
    "bert": ("replicate=2", "fsdp=2", "tensor=2"),
}
FACTS = {"padding_id": 0, "vocab_size": 51, "eos_token_id": 2, "bos_token_id": 1, "labels": ["a", "b", "c"]}


def recipe_for(folder: Path, task: str, axes: dict[str, int], **model: Any) -> Recipe:
    workers = torch.tensor([1, *axes.values()]).prod().item()
    parallelism = {"workers": workers} | {axis: degree for axis, degree in axes.items() if axis != "replicate"}
    return build({"name": "loading", "task": task, "model": {"name": str(folder), **model}, "parallelism": parallelism,
                  "training": {"global_batch_size": 64}})  # fmt: skip


def save(
    family: str,
    folder: Path,
    model_class: Any = transformers.AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    torch.manual_seed(1)
    own = {"num_hidden_layers": 2, "max_position_embeddings": 64} | SMALL.get(family, {}) | config
    model = model_class.from_config(transformers.AutoConfig.for_model(family, **own), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="40KB")  # several files
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def load(recipe: Recipe) -> tuple[dict[str, np.ndarray], set[str], set[str]]:
    """What the laid-out model holds, assembled on rank 0; names of new and of frozen parameters."""
    model = build_model(get_task(recipe, FACTS), defer=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    parallel = parallelize(model, make_layout(recipe.parallelism), recipe)
    frozen = {name for name, parameter in parallel.model.named_parameters() if not parameter.requires_grad}
    state = {name: tensor.numpy() for name, tensor in full_state(parallel).items()}
    return state, model.new_parameters, frozen


CASES = [
    pytest.param(
        family,
        layout,
        marks=[] if layout in ("", "fsdp=2,tensor=2", "expert=2") and family != "gpt2" else pytest.mark.slow,
    )
    for family, layouts in LAYOUTS.items()
    for layout in layouts
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_bitwise_what_transformers_loads(family: str, layout: str, tmp_path: Path) -> None:
    axes = {axis: int(degree) for axis, degree in (part.split("=") for part in layout.split(",") if part)}
    if family == "bert":
        save(family, tmp_path, transformers.AutoModelForMaskedLM)  # without the head that the task wants
        recipe = recipe_for(tmp_path, "text_classification", axes, freeze_layers=1)
        same = transformers.AutoModelForSequenceClassification
    else:
        save(family, tmp_path)
        recipe = recipe_for(tmp_path, "language_model", axes)
        same = transformers.AutoModelForCausalLM
    (state, new, frozen), *_ = run(recipe.parallelism.workers, load, recipe)
    expected = same.from_pretrained(tmp_path, dtype=torch.float32, num_labels=3) if family == "bert" else (
        same.from_pretrained(tmp_path, dtype=torch.float32)
    )  # fmt: skip
    heads = {name for name in expected.state_dict() if "pooler" in name or "classifier" in name}
    assert new == heads
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        if name not in heads:
            np.testing.assert_array_equal(state[name], tensor.numpy(), err_msg=name)
    assert any("layer.0." in name for name in frozen) == (family == "bert")
    if heads:  # drawn alike on every layout, from the seed
        ((alone, *_),) = run(1, load, recipe_for(tmp_path, "text_classification", {}))
        for name in heads:
            np.testing.assert_array_equal(state[name], alone[name], err_msg=name)
        weight = state["classifier.weight"]
        assert weight.std() == pytest.approx(expected.config.initializer_range, rel=0.5)
        assert not state["classifier.bias"].any()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("bert", "fsdp=2"), *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("llama", "fsdp=2,tensor=2"), ("llama", "pipeline=2,fsdp=2"), ("mixtral", "expert=2"),
                     ("bert", "tensor=2"))
    )],
)  # fmt: skip
def test_adapters_are_drawn_alike_around_what_is_loaded(family: str, layout: str, tmp_path: Path) -> None:
    axes = {axis: int(degree) for axis, degree in (part.split("=") for part in layout.split(","))}
    save(family, tmp_path, transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM)
    task = "text_classification" if family == "bert" else "language_model"
    lora = {"lora": {"rank": 2}}
    (state, new, frozen), *_ = run(
        torch.tensor([*axes.values()]).prod().item(), load, recipe_for(tmp_path, task, axes, **lora)
    )
    ((alone, new_, frozen_),) = run(1, load, recipe_for(tmp_path, task, {}, **lora))
    ((plain, *_),) = run(1, load, recipe_for(tmp_path, task, {}))
    assert state.keys() == alone.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, alone[name], err_msg=name)
        if "lora_" not in name:
            np.testing.assert_array_equal(array, plain[name.replace(".base_layer", "")], err_msg=name)
        elif "lora_A" in name:  # uniform within ±1 / √columns
            bound = array.shape[1] ** -0.5
            assert 0.8 * bound < abs(array).max() <= bound, name
        else:
            assert not array.any(), name
    assert len({array.tobytes() for name, array in state.items() if "lora_A" in name}) == sum(
        "lora_A" in name for name in state
    )
    if "pipeline" not in axes:  # else those of one stage
        assert (new, frozen) == (new_, frozen_)
    assert bool(new_) == (family == "bert")
    assert not {name for name in frozen if "lora_" in name or "classifier" in name}


def peak_growth(recipe: Recipe, defer: bool) -> tuple[int, int]:
    """Bytes by which this process's own memory grew at most while it built and laid out the model, and in the end.
    Pages of mapped files are the system's, not counted."""

    def anonymous() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    layout = make_layout(recipe.parallelism)
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    task = get_task(recipe, FACTS)
    model = build_model(task, defer=defer)
    task.check_model(model)
    parallel = parallelize(model, layout, recipe)
    done.set()
    thread.join()
    assert parallel.model is not None
    return max(seen), anonymous() - before


@pytest.mark.slow
def test_no_rank_holds_the_whole(tmp_path: Path) -> None:
    """A model of 400 MB, in bfloat16 files as most are, over four ranks: each grows by about a quarter of it, also with
    adapters, where it is drawn at random, and where it is tried on documents first. Loaded first and laid out then, by
    all of it."""
    size = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 14, "num_attention_heads": 16,
            "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": False}  # fmt: skip
    model = save("llama", tmp_path, dtype=torch.bfloat16, **size)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    del model
    recipe = recipe_for(tmp_path, "language_model", {"fsdp": 4})
    straight = [peak for peak, _ in run(4, peak_growth, recipe, True)]
    adapted = recipe_for(tmp_path, "language_model", {"fsdp": 4}, lora={"rank": 4})
    straight += [peak for peak, _ in run(4, peak_growth, adapted, True)]
    drawn = override(recipe, {"model.name": "", "model.config": size | {"model_type": "llama"}})
    tried = override(drawn, {"data.pack": True, "data.isolate_documents": True, "data.sequence_length": 64})
    for other in (drawn, tried):
        straight += [peak for peak, _ in run(4, peak_growth, other, True)]
    first_whole = [peak for peak, _ in run(4, peak_growth, recipe, False)]
    assert max(straight) < 0.45 * whole, (straight, whole)
    assert min(first_whole) > 0.95 * whole, (first_whole, whole)


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SMALL["llama"]).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"has no model\.safetensors"):
        build_model(get_task(recipe_for(tmp_path, "language_model", {}), FACTS))


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A head is drawn anew where it does not fit; a body that does not fit is no such model."""
    save("llama", tmp_path)
    recipe = recipe_for(tmp_path, "language_model", {}, config={"hidden_size": 32})
    with pytest.raises(Refused, match="does not fit"):
        build_model(get_task(recipe, FACTS))
