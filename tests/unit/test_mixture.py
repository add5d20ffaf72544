"""Several sources with weights, from the recipe to the order of rows, in every task."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.loader import Coordinate, Cursor, open_split, training_loader
from heliostat.data.packaged import packaged_table
from heliostat.data.prepare import SPLITS, prepare, source_number
from heliostat.data.sources import open_source
from heliostat.recipe import Recipe, Refused, build, override
from heliostat.train.loop import train
from pipelines.job import parse
from tests.recipes import mixed, prepared, tiny_bert, tiny_llama

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def texts_of(source: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]


def test_each_source_is_packed_by_itself(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_llama(tmp_path), **{"data.pack": True, "data.sequence_length": 16})
    found = prepared(recipe)
    tokenizer = AutoTokenizer.from_pretrained(found.folder / "processor")
    table = open_split(found.folder, "train")
    numbers = source_number(table.column("sample_id").to_numpy())
    assert (np.diff(numbers) >= 0).all()
    assert list(found.meta["sources"]) == sorted(recipe.data.mixture)
    for number, (name, source) in enumerate(sorted(recipe.data.mixture.items())):
        rows = table.filter(pa.array(numbers == number)).column("input_ids").to_pylist()
        assert len(rows) == found.meta["sources"][name]
        packed = [token for row in rows for token in row]
        stream = [t for text in texts_of(source.source) for t in [*tokenizer.encode(text), tokenizer.eos_token_id]]
        assert packed == (stream[:-1] if len(stream) % 16 == 1 else stream)
        assert {len(row) for row in rows[:-1]} == {16}


def test_splits_are_carved_from_all_sources_and_disjoint(tmp_path: Path) -> None:
    carved = {"data.validation": "", "data.test": "", "data.validation_fraction": 0.2, "data.test_fraction": 0.2}
    recipe = mixed(tmp_path, tiny_bert(tmp_path), **carved)
    with Path(recipe.data.mixture["short"].source).open("a") as stream:  # rows that another source has, too
        stream.writelines(Path(recipe.data.mixture["long"].source).read_text().splitlines(keepends=True)[:40])
    found = prepared(recipe)
    tables = {split: open_split(found.folder, split) for split in SPLITS}
    texts = {split: table.column("text").to_pylist() for split, table in tables.items()}
    assert sum(map(len, texts.values())) == 60 + 41 + 17 + 40
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(texts[one]) & set(texts[other])
    ids = np.concatenate([table.column("sample_id").to_numpy() for table in tables.values()])
    assert len(set(ids.tolist())) == len(ids)
    for table in tables.values():
        assert set(source_number(table.column("sample_id").to_numpy()).tolist()) == {0, 1, 2}
    named = override(recipe, {"data.test": recipe.data.mixture["middle"].source})
    with pytest.raises(Refused, match="no training rows") as caught:  # all of it is test data now
        prepare(named)
    assert caught.value.field == "data.mixture.middle.source"


def test_ids_of_packed_rows_are_unique_over_all_splits(tmp_path: Path) -> None:
    carved = {"data.validation": "", "data.validation_fraction": 0.2, "data.pack": True, "data.sequence_length": 16}
    found = prepared(mixed(tmp_path, tiny_llama(tmp_path), **carved))
    ids = np.concatenate([open_split(found.folder, split).column("sample_id").to_numpy() for split in SPLITS])
    assert len(set(ids.tolist())) == len(ids) == sum(found.meta["rows"].values())


def test_labels_of_every_source_are_learned(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_bert(tmp_path))
    path = Path(recipe.data.mixture["short"].source)
    path.write_text(path.read_text().replace('"dark"', '"grey"'))
    assert prepared(recipe).facts["labels"] == ["bright", "dark", "grey"]


def tiny_vit(folder: Path) -> Recipe:
    digits = packaged_table("digits/all", "data.train").take(pa.array(np.arange(0, 5000, 20)))
    for i in range(3):
        pq.write_table(digits.slice(80 * i, 80), folder / f"{i}.parquet")
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build(
        {
            "name": "digits",
            "task": "image_classification",
            "storage": str(folder / "storage"),
            "model": {"config": config | {"intermediate_size": 32, "image_size": 28, "patch_size": 7}},
            "data": {
                "mixture": {f"part {i}": {"source": str(folder / f"{i}.parquet"), "weight": i + 1} for i in range(3)},
                "augment": "crop_flip",
            },
            "training": {"global_batch_size": 16, "micro_batch_size": 8},
        }
    )


@pytest.mark.parametrize("task", ["language_model", "text_classification", "image_classification"])
def test_every_task_trains_on_a_mixture(task: str, tmp_path: Path) -> None:
    tiny = {"language_model": tiny_llama, "text_classification": tiny_bert}
    recipe = mixed(tmp_path, tiny[task](tmp_path)) if task in tiny else tiny_vit(tmp_path)
    recipe = override(recipe, {"schedule.max_steps": 12})
    outcome = train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    assert (outcome["status"], outcome["step"]) == ("done", 12)


def test_an_epoch_holds_each_source_by_its_weight(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_llama(tmp_path))
    loader = training_loader(recipe, prepared(recipe))
    ids = [
        loader.read(loader.advance(Cursor(), batch), Coordinate(), 100)[0].sample_ids
        for batch in range(3 * loader.batches_per_epoch)
    ]
    share = np.bincount(source_number(np.concatenate(ids)), minlength=3)
    assert share.tolist() == [3 * 59, 3 * 35, 3 * 24]  # of 118 rows, 0.5, 0.3 and 0.2 by largest remainder


def test_the_fingerprint_covers_names_weights_and_contents(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_llama(tmp_path))

    def fingerprint(mixture: dict[str, Any]) -> str:
        changed = override(recipe, {"data.mixture": mixture})
        return training_loader(changed, prepared(changed)).fingerprint

    mixture = {name: source.model_dump() for name, source in recipe.data.mixture.items()}
    first = fingerprint(mixture)
    assert fingerprint(dict(reversed(mixture.items()))) == first
    found = {first}
    found.add(fingerprint(mixture | {"short": mixture["short"] | {"weight": 0.21}}))
    found.add(fingerprint({{"short": "brief"}.get(name, name): source for name, source in mixture.items()}))
    path = Path(mixture["short"]["source"])
    path.write_text(path.read_text().replace("0 ", "00 ", 1))
    found.add(fingerprint(mixture))
    assert len(found) == 4


def test_a_changed_mixture_is_refused_on_resume(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_llama(tmp_path), **{"schedule.max_steps": 2})
    train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    more = override(recipe, {"schedule.max_steps": 4})
    reweighted = {
        name: source.model_dump() | {"weight": source.weight + (name == "long")}
        for name, source in recipe.data.mixture.items()
    }
    changed = override(more, {"data.mixture": reweighted})
    with pytest.raises(Refused, match="fingerprint"):
        train(changed, prepared(changed).folder, tmp_path / "run", write_bundle=False)
    path = Path(recipe.data.mixture["middle"].source)
    before = path.read_text()
    path.write_text(before.replace("1 ", "11 ", 1))
    with pytest.raises(Refused, match="fingerprint"):
        train(more, prepared(more).folder, tmp_path / "run", write_bundle=False)
    path.write_text(before)
    assert train(more, prepared(more).folder, tmp_path / "run", write_bundle=False)["step"] == 4


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"train": "a.csv", "mixture": {"a": {"source": "a.csv", "weight": 1.0}}}, "data.mixture"),
        ({"mixture": {"a": {"source": "a.csv", "weight": 0.0}}}, "data.mixture.a.weight"),
        ({"mixture": {"a": {"source": "a.csv"}}}, "data.mixture.a.weight"),
        ({"mixture": {"": {"source": "a.csv", "weight": 1.0}}}, "data.mixture"),
    ],
)
def test_refused(data: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as caught:
        build({"name": "r", "task": "language_model", "data": data})
    assert caught.value.field == field


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, tiny_llama(tmp_path))
    Path(recipe.data.mixture["short"].source).unlink()
    with pytest.raises(Refused, match="does not exist") as caught:
        prepare(recipe)
    assert caught.value.field == "data.mixture.short.source"


def test_on_the_command_line() -> None:
    mixture = {"a": {"source": "a.csv", "weight": 0.7}, "b": {"source": "b.csv", "weight": 0.3}}
    recipe, _ = parse(["tiny_lm", "--data.train", "", "--data.mixture", json.dumps(mixture)])
    assert {name: source.model_dump() for name, source in recipe.data.mixture.items()} == mixture


@pytest.mark.slow
def test_the_page_s_example_trains(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    recipe: Recipe = names["recipe"]()
    few = {}
    for name, part in recipe.data.mixture.items():
        pq.write_table(open_source(part.source)[0].read().select(["text"]).slice(0, 60), tmp_path / f"{name}.parquet")
        few[name] = {"source": str(tmp_path / f"{name}.parquet"), "weight": part.weight}
    short = {"schedule.max_steps": 4, "parallelism.workers": 1, "training.micro_batch_size": 16}
    recipe = override(recipe, {"storage": str(tmp_path / "storage"), "data.mixture": few} | short)
    train(recipe, prepared(recipe).folder, tmp_path / "run", write_bundle=False)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in record]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
