"""Bundles: any Hugging Face tool opens them, and none that was altered is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from heliostat.models import bundle
from heliostat.models.bundle import Bundle
from heliostat.models.load import build_model
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, Refused
from tests.recipes import prepared, tiny_bert, tiny_llama

AUTO: dict[str, Any] = {
    "text_classification": transformers.AutoModelForSequenceClassification,
    "language_model": transformers.AutoModelForCausalLM,
}


def written(recipe: Recipe, path: Path) -> tuple[Bundle, torch.nn.Module]:
    data = prepared(recipe)
    task = data.task(recipe)
    model = build_model(task).eval()
    state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    found = bundle.write(
        path,
        task,
        state,
        data.processor(),
        data={"fingerprint": data.fingerprint},
        metrics={"validation.loss": 1.5},
        lineage={"run": "r"},
    )
    return found, model


@pytest.fixture
def one(tmp_path: Path) -> Path:
    written(tiny_bert(tmp_path), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_alone_opens_it(make: Any, tied: bool, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    if tied and make is tiny_llama:
        recipe = make(tmp_path, **{"model.config": recipe.model.config | {"tie_word_embeddings": True}})
    found, model = written(recipe, tmp_path / "bundle")
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.path)
    plain = AUTO[recipe.task].from_pretrained(found.path).eval()
    ids = torch.tensor([tokenizer.encode("the mirror tracks the sun at noon")])
    weights, own = model.state_dict(), bundle.read(found.path).model()
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        for opened in (plain, own):
            assert opened.state_dict().keys() == weights.keys()
            assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.state_dict().items())
            # Where equal weights lie in memory decides on some processors which kernel multiplies them.
            assert torch.allclose(opened(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-7)
    assert found.card["num_parameters"] == sum(p.numel() for p in model.parameters())


def test_the_card_says_what_it_was_made_of(one: Path) -> None:
    found = bundle.read(one)
    assert found.recipe.task == found.card["task"] == "text_classification"
    assert found.task().facts["labels"] == ["bright", "dark"]
    assert found.card["lineage"]["run"] == "r"
    assert found.model().config.id2label == {0: "bright", 1: "dark"}
    assert not list(one.rglob("*.bin")) + list(one.rglob("*.pt"))
    assert [path.name for path in one.parent.iterdir() if path.name.startswith(".")] == []


def test_writing_again_replaces_it_whole(one: Path) -> None:
    (one / "leftover").touch()
    with pytest.raises(Refused):
        bundle.read(one)
    written(tiny_bert(one.parent), one)
    assert bundle.read(one).card["metrics"] == {"validation.loss": 1.5}


def test_a_failed_write_leaves_the_old_one(one: Path) -> None:
    before = bundle.read(one)
    with pytest.raises(RuntimeError):
        bundle.write(one, before.task(), {}, None, data={}, metrics={}, lineage={})
    assert bundle.read(one) == before
    assert [path.name for path in one.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("where", [0, -1])
def test_one_changed_byte_is_refused_naming_the_file(name: str, where: int, one: Path) -> None:
    content = bytearray((one / name).read_bytes())
    content[where] ^= 1
    (one / name).write_bytes(content)
    with pytest.raises(Refused, match=f"{name} was changed") as caught:
        bundle.read(one)
    assert caught.value.field == "bundle"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_missing_file_is_named(name: str, one: Path) -> None:
    (one / name).unlink()
    with pytest.raises(Refused, match=f"{name} is missing"):
        bundle.read(one)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "folder/card.json", "a.py"])
def test_an_extra_file_is_named(name: str, one: Path) -> None:
    (one / name).parent.mkdir(exist_ok=True)
    (one / name).write_text("x")
    with pytest.raises(Refused, match=f"{name} is not part"):
        bundle.read(one)


def test_a_folder_of_it_can_be_verified_alone(one: Path) -> None:
    (one / "adapter").mkdir()
    for name in ("kept", "lost"):
        (one / "adapter" / name).write_text(name)
    found = listed(one)
    (one / "model.safetensors").write_bytes(b"")
    bundle.verify(found, "adapter")
    (one / "adapter" / "more").touch()
    with pytest.raises(Refused, match="adapter/more is not part"):
        bundle.verify(found, "adapter")
    (one / "adapter" / "kept").write_text("changed")
    (one / "adapter" / "lost").unlink()
    with pytest.raises(Refused, match="adapter/kept was changed"):
        bundle.verify(found, "adapter")
    (one / "adapter" / "kept").write_text("kept")
    with pytest.raises(Refused, match="adapter/lost is missing"):
        bundle.verify(found, "adapter")


def alter(path: Path, **fields: Any) -> None:
    (path / "card.json").write_text(json.dumps(json.loads((path / "card.json").read_text()) | fields))


def test_a_newer_version_is_refused(one: Path) -> None:
    alter(one, version=bundle.BUNDLE_VERSION + 1, files="another layout")
    with pytest.raises(Refused, match="newer Heliostat"):
        bundle.read(one)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_card_that_is_none_is_refused(content: str, one: Path) -> None:
    (one / "card.json").write_text(content)
    with pytest.raises(Refused) as caught:
        bundle.read(one)
    assert caught.value.field == "bundle"


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a bundle"):
        bundle.read(tmp_path)


def test_metrics_are_added_to_the_card(one: Path) -> None:
    found = bundle.add_metrics(bundle.read(one), {"test.accuracy": 0.9})
    assert bundle.read(one) == found
    assert found.card["metrics"] == {"validation.loss": 1.5, "test.accuracy": 0.9}


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def listed(path: Path) -> Bundle:
    """The bundle with a card that lists its files as they are now: who can change the one can change the other."""
    alter(path, files=bundle.digests(path))
    return bundle.read(path, verify_files=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "folder/tokenizer.pkl"])
def test_a_pickle_is_never_read(name: str, one: Path, tmp_path: Path) -> None:
    """Neither beside the weights nor in their stead."""
    trace = tmp_path / "trace"
    (one / name).parent.mkdir(exist_ok=True)
    torch.save(Planted(trace), one / name)
    for weights in (True, False):
        if not weights:
            (one / "model.safetensors").unlink()
        found = listed(one)
        with pytest.raises(Refused, match=f"{name} may be a pickle"):
            Predictor(found)
        if weights:
            found.model()
        else:  # unverified, transformers finds no weights in it
            with pytest.raises(OSError, match="safetensors"):
                found.model()
        assert not trace.exists()
    torch.load(one / name, weights_only=False)
    assert trace.exists()  # had it been read


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../weights.safetensors", "/tmp/weights.safetensors"])
def test_weights_come_from_the_bundle_alone(shard: str, one: Path) -> None:
    (one / "model.safetensors").rename(one.parent / "weights.safetensors")
    (one / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"weight": shard}}))
    with pytest.raises(Refused, match=r"names .*, which is none of its weights"):
        bundle.verify(listed(one))
    (one / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(Refused, match="no index of weights"):
        bundle.verify(listed(one))


def test_code_in_a_bundle_is_not_run(one: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    config = json.loads((one / "config.json").read_text())
    config |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config", "AutoModel": "planted.Model"}}
    (one / "config.json").write_text(json.dumps(config))
    (one / "planted.py").write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()")
    found = listed(one)
    bundle.verify(found)
    with pytest.raises(ValueError, match="custom code"):
        found.model()
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "folder/../../outside.json"])
def test_a_card_lists_nothing_outside(name: str, one: Path) -> None:
    (one.parent / "outside.json").write_text("{}")
    files = json.loads((one / "card.json").read_text())["files"]
    alter(one, files=files | {name: "0" * 64})
    with pytest.raises(Refused, match="is missing"):
        bundle.read(one)
