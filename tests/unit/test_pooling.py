"""What becomes of an encoder's tokens is what the files beside it say, and what a bundle of it says again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from heliostat.data.prepare import prepare
from heliostat.models import bundle as bundles
from heliostat.models.load import processor_facts
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, Refused, build, override
from pipelines.bundle import run
from pipelines.job import Job, Options
from tests.bundles import write
from tests.generation import tiny_tokenizer
from tests.recipes import tiny_bert

TEXTS = ["sun salt mirror", "noon", "cloud shade steam turbine storage " * 2]
FIELDS = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}


def encoder(folder: Path, family: str = "bert", kind: Any = transformers.AutoModel) -> Path:
    """A folder as anyone saves a model that was never trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def declare(folder: Path, *modules: str, **pooling: Any) -> Path:
    """As sentence-transformers declares it."""
    listed = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    return folder


def recipe(source: Path, folder: Path, **model: Any) -> Recipe:
    return build({
        "name": "vectors", "task": "text_embedding", "storage": str(folder),
        "model": {"name": str(source), "max_length": 48, **model},
    })  # fmt: skip


def bundle_of(source: Path, folder: Path, **model: Any) -> bundles.Bundle:
    return bundles.read(Path(run(Job("bundle", recipe(source, folder, **model), Options(), folder))["bundle"]))


def embedded(bundle: bundles.Bundle) -> torch.Tensor:
    found = Predictor(bundle).predict([{"text": text} for text in TEXTS])
    return torch.tensor([each["embedding"] for each in found])


@torch.no_grad()
def by_hand(folder: Path, mode: str, normalize: bool) -> torch.Tensor:
    """One text at a time, without padding."""
    model: Any = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        hidden_TH = model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        row = {"mean": hidden_TH.mean(0), "cls": hidden_TH[0], "max": hidden_TH.max(0)[0], "lasttoken": hidden_TH[-1]}
        rows.append(row[mode] / row[mode].norm() if normalize else row[mode])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", FIELDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_bundle_pools_as_declared(mode: str, normalize: bool, tmp_path: Path) -> None:
    modules = ["Transformer", "Pooling", *["Normalize"] * normalize]
    fields = {f"pooling_mode_{field}": name == mode for name, field in FIELDS.items()}
    source = declare(encoder(tmp_path / "source"), *modules, **fields)
    found = bundle_of(source, tmp_path / "one")
    assert embedded(found) == pytest.approx(by_hand(source, mode, normalize), abs=1e-6)
    # The bundle declares it as its source did: a bundle of the bundle is the same model.
    again = bundle_of(found.path, tmp_path / "two")
    assert again.card["facts"] == found.card["facts"]
    written = json.loads((found.path / "1_Pooling" / "config.json").read_text())
    assert {name: written[name] for name in fields} == fields
    assert written["word_embedding_dimension"] == 16


@pytest.mark.parametrize(("pooling", "mode"), [({"pooling_mode": "cls"}, "cls"), ({}, "mean")])
def test_other_forms_of_a_declaration(pooling: dict[str, Any], mode: str, tmp_path: Path) -> None:
    source = declare(encoder(tmp_path / "source"), "Transformer", "Pooling", **pooling)
    assert embedded(bundle_of(source, tmp_path / "one")) == pytest.approx(by_hand(source, mode, False), abs=1e-6)


def test_the_mean_where_nothing_is_declared(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    assert embedded(bundle_of(source, tmp_path / "one")) == pytest.approx(by_hand(source, "mean", False), abs=1e-6)


def test_the_encoder_of_a_classifiers_bundle(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    own = tiny_bert(tmp_path)
    own = override(own, {"model.config": own.model.config | {"vocab_size": len(tokenizer)}})
    source = write(tmp_path / "classifier", own, tokenizer, processor_facts(tokenizer) | {"labels": ["a", "b"]})
    assert embedded(bundle_of(source, tmp_path / "one")) == pytest.approx(by_hand(source, "mean", False), abs=1e-6)


def test_a_pooler_is_not_missed_but_a_block_is(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", "roberta", transformers.AutoModelForMaskedLM)
    assert embedded(bundle_of(source, tmp_path / "one")).isfinite().all()
    with pytest.raises(Refused, match=r"encoder\.layer\.2\.\S+ is not among its weights"):
        bundle_of(source, tmp_path / "two", config={"num_hidden_layers": 3})


@pytest.mark.parametrize(
    ("modules", "pooling", "reason"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "a module Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_weightedmean_tokens": True}, "pools by weightedmean_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls and max"),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean", "weightedmean"]}, "mean and weightedmean"),
    ],
)
def test_what_is_not_done_is_refused(modules: list[str], pooling: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = declare(encoder(tmp_path / "source"), *modules, **pooling)
    with pytest.raises(Refused, match=reason):
        bundle_of(source, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_texts_longer_than_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has 66 positions"):
        bundle_of(encoder(tmp_path / "source"), tmp_path / "one", max_length=67)


def test_lower_casing_is_refused(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    (source / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(Refused, match="lower-cased"):
        bundle_of(source, tmp_path / "one")


def test_training_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no loss to be trained by") as caught:
        prepare(recipe(encoder(tmp_path / "source"), tmp_path))
    assert caught.value.suggestion == "python -m pipelines.bundle vectors"
