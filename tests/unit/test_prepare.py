"""From sources of every format to prepared rows: what comes out, what is refused, and what is made again."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer

from heliostat.data.loader import open_split
from heliostat.data.packaged import packaged_table
from heliostat.data.prepare import SPLITS, Prepared, prepare
from heliostat.data.sources import open_source
from heliostat.models.load import processor_facts, train_tokenizer
from heliostat.recipe import Recipe, Refused, build, override
from heliostat.tasks import get_task
from tests.recipes import WORDS, tiny_bert, tiny_llama


def source_rows(count: int = 60, seed: int = 0) -> pa.Table:
    """Distinct texts with quotes, commas and line breaks."""
    draw = random.Random(seed)
    texts = [f'{i} "{" ".join(draw.choices(WORDS, k=draw.randint(1, 9)))}",\nnext é' for i in range(count)]
    return pa.table({"text": texts, "label": [["dark", "bright"][i % 2] for i in range(count)]})


def write(table: pa.Table, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=25)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pyarrow.feather.write_feather(table, path)
    return str(path)


def recipe_for(folder: Path, source: str, **overrides: Any) -> Recipe:
    return tiny_bert(
        folder,
        **{
            "data.train": source,
            "data.validation": "",
            "data.test": "",
            "data.validation_fraction": 0.2,
            "data.test_fraction": 0.2,
        }
        | overrides,
    )


def rows_of(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("text", "label", "input_ids")}
        for row in open_split(prepared.folder, split).to_pylist()
    ]


def refused(recipe: Recipe) -> Refused:
    """Preparing is refused, and leaves nothing in storage."""
    with pytest.raises(Refused) as caught:
        prepare(recipe)
    left = [path for path in recipe.storage_path.rglob("*") if path.is_file() or path.parent.name == "data"]
    assert left == []
    return caught.value


def make_source(kind: str, folder: Path) -> str:
    table = source_rows()
    if kind == "folder":
        for i in range(3):
            write(table.slice(20 * i, 20), folder / "parts" / f"{i}.parquet")
        (folder / "parts" / "_SUCCESS").touch()
        return str(folder / "parts")
    if kind == "glob":
        for i in range(3):
            write(table.slice(20 * i, 20), folder / f"rows-{i}.csv")
        write(source_rows(5, 9), folder / "other.csv")
        return str(folder / "rows-*.csv")
    if kind == "uri":
        return Path(write(table, folder / "rows.jsonl")).as_uri()
    return write(table, folder / f"rows.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow", "folder", "glob", "uri"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    expected = source_rows().to_pylist()
    source = make_source(kind, tmp_path / "source")
    parts = open_source(source)
    assert [row for part in parts for row in part.read().to_pylist()] == expected
    prepared, made = prepare(recipe_for(tmp_path, source))
    assert made
    rows = {split: rows_of(prepared, split) for split in SPLITS}
    assert {split: len(rows[split]) for split in SPLITS} == prepared.meta["rows"]
    labels = prepared.facts["labels"]
    assert labels == ["bright", "dark"]
    got = sorted((row["text"], labels[row["label"]]) for split in SPLITS for row in rows[split])
    assert got == sorted((row["text"], row["label"]) for row in expected)


def test_missing_file(tmp_path: Path) -> None:
    error = refused(recipe_for(tmp_path, str(tmp_path / "absent.csv")))
    assert error.field == "data.train"
    assert "does not exist" in error.reason


@pytest.mark.parametrize("pattern", ["absent-*.csv", "absent/*.csv", "*.docx"])
def test_glob_without_files(pattern: str, tmp_path: Path) -> None:
    assert refused(recipe_for(tmp_path, str(tmp_path / pattern))).field == "data.train"


def test_no_source(tmp_path: Path) -> None:
    assert refused(recipe_for(tmp_path, "")).field == "data.train"


def test_missing_validation_file_is_called_that(tmp_path: Path) -> None:
    train = write(source_rows(), tmp_path / "a.csv")
    error = refused(recipe_for(tmp_path, train, **{"data.validation": str(tmp_path / "absent.csv")}))
    assert error.field == "data.validation"


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    source = write(source_rows().rename_columns(["texts", "label"]), tmp_path / "a.csv")
    error = refused(recipe_for(tmp_path, source))
    assert error.field == "data.train"
    assert "'text'" in error.reason
    assert error.suggestion == "did you mean texts?"


def test_missing_column_in_a_later_file_names_the_file(tmp_path: Path) -> None:
    write(source_rows(), tmp_path / "parts" / "0.csv")
    write(source_rows(9, 1).rename_columns(["text", "labels"]), tmp_path / "parts" / "1.csv")
    error = refused(recipe_for(tmp_path, str(tmp_path / "parts")))
    assert "1.csv" in error.reason
    assert error.suggestion == "did you mean labels?"


def test_files_may_differ_in_columns_that_are_not_used(tmp_path: Path) -> None:
    write(source_rows().append_column("more", pa.array(range(60))), tmp_path / "parts" / "0.csv")
    write(source_rows(9, 1), tmp_path / "parts" / "1.csv")
    prepared, _ = prepare(recipe_for(tmp_path, str(tmp_path / "parts")))
    assert sum(prepared.meta["rows"].values()) == 69


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow"])
def test_no_rows(kind: str, tmp_path: Path) -> None:
    source = write(source_rows(0), tmp_path / f"empty.{kind}")
    assert refused(recipe_for(tmp_path, source)).field == "data.train"


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow"])
def test_damaged_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(b'\x00"\xff{{' * 40)
    assert refused(recipe_for(tmp_path, str(path))).field == "data.train"


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    """The footer is whole, so opening succeeds and reading does not."""
    path = tmp_path / "damaged.parquet"
    pq.write_table(source_rows(2000), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:4000] = bytes(3996)
    path.write_bytes(content)
    error = refused(recipe_for(tmp_path, str(path)))
    assert error.field == "data.train"
    assert "damaged.parquet" in error.reason


def test_one_class_only(tmp_path: Path) -> None:
    rows = source_rows().set_column(1, "label", pa.array(["dark"] * 60))
    error = refused(recipe_for(tmp_path, write(rows, tmp_path / "a.csv")))
    assert error.field == "data.label_column"
    assert "dark" in error.reason


def spoiled(column: str, row: int, value: Any) -> pa.Table:
    rows = source_rows().to_pylist()
    rows[row][column] = value
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("column", "value"), [("text", None), ("label", None)])
@pytest.mark.parametrize("row", [0, 17, 59])
def test_a_bad_row_is_named_by_its_number_in_the_file(column: str, value: Any, row: int, tmp_path: Path) -> None:
    source = write(spoiled(column, row, value), tmp_path / "a.jsonl")
    error = refused(recipe_for(tmp_path, source))
    assert error.field == f"data.{column}_column"
    assert f"row {row} of {source} " in error.reason


def test_a_label_that_training_lacks(tmp_path: Path) -> None:
    train = write(source_rows(), tmp_path / "a.csv")
    rows = source_rows(20, 5).set_column(1, "label", pa.array(["dark"] * 13 + ["grey"] + ["bright"] * 6))
    test = write(rows, tmp_path / "b.csv")
    error = refused(recipe_for(tmp_path, train, **{"data.test": test}))
    assert "grey" in error.reason
    assert "row 13 of " in error.reason


def picture(value: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, 255 - value, value // 2)).save(stream, "PNG")
    return stream.getvalue()


def image_recipe(folder: Path, source: str) -> Recipe:
    return build(
        {
            "name": "pictures",
            "task": "image_classification",
            "storage": str(folder / "storage"),
            "model": {"config": {"model_type": "resnet"}},
            "data": {"train": source, "validation_fraction": 0.2, "test_fraction": 0.2},
        }
    )


@pytest.mark.parametrize("row", [0, 23, 39])
@pytest.mark.parametrize("damage", [b"no image", b"", None, picture(1)[:50]])
def test_damaged_image_is_named_by_its_row(row: int, damage: bytes | None, tmp_path: Path) -> None:
    images: list[bytes | None] = [picture(4 * i) for i in range(40)]
    images[row] = damage
    table = pa.table({"image": pa.array(images, pa.binary()), "label": [f"{i % 2}" for i in range(40)]})
    source = write(table, tmp_path / "images.arrow")
    error = refused(image_recipe(tmp_path, source))
    assert error.field == "data.image_column"
    assert f"row {row} of {source} " in error.reason


def test_a_column_that_holds_no_images(tmp_path: Path) -> None:
    source = write(source_rows().rename_columns(["image", "label"]), tmp_path / "a.csv")
    assert refused(image_recipe(tmp_path, source)).field == "data.image_column"


def test_images_are_stored_as_they_were(tmp_path: Path) -> None:
    images = [{"bytes": picture(6 * i), "path": f"{i}.png"} for i in range(40)]
    source = write(pa.table({"image": images, "label": [i % 2 for i in range(40)]}), tmp_path / "images.parquet")
    prepared, _ = prepare(image_recipe(tmp_path, source))
    assert prepared.facts["image_shape"] == [3, 8, 8]
    stored = [bytes(row["pixels"]) for split in SPLITS for row in open_split(prepared.folder, split).to_pylist()]
    plain = [bytes([6 * i] * 64 + [255 - 6 * i] * 64 + [6 * i // 2] * 64) for i in range(40)]
    assert sorted(stored) == sorted(plain)


def test_splits_are_disjoint_and_duplicates_stay_together(tmp_path: Path) -> None:
    rows = source_rows(80)
    source = write(pa.concat_tables([rows, rows.slice(0, 50), rows.slice(20, 30)]), tmp_path / "a.parquet")
    prepared, _ = prepare(recipe_for(tmp_path, source))
    texts = {split: [row["text"] for row in rows_of(prepared, split)] for split in SPLITS}
    assert all(texts.values())
    assert sum(map(len, texts.values())) == 160
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(texts[one]) & set(texts[other])
    ids = [row["sample_id"] for split in SPLITS for row in open_split(prepared.folder, split).to_pylist()]
    assert len(set(ids)) == 160


def test_rows_of_a_named_split_are_kept_out_of_the_earlier_ones(tmp_path: Path) -> None:
    rows = source_rows(60)
    train = write(rows, tmp_path / "train.csv")
    validation = write(rows.slice(0, 20), tmp_path / "validation.csv")
    test = write(rows.slice(10, 20), tmp_path / "test.csv")
    prepared, _ = prepare(recipe_for(tmp_path, train, **{"data.validation": validation, "data.test": test}))
    everything = rows.column("text").to_pylist()
    got = {split: sorted(row["text"] for row in rows_of(prepared, split)) for split in SPLITS}
    expected = {"test": everything[10:30], "validation": everything[:10], "train": everything[30:]}
    assert got == {split: sorted(texts) for split, texts in expected.items()}
    assert prepared.meta["dropped_duplicates"] == 40


def test_the_same_input_is_not_made_again(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, write(source_rows(), tmp_path / "a.parquet"))
    first, made = prepare(recipe)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again, made_again = prepare(override(recipe, {"optimizer.lr": 1e-2, "training.global_batch_size": 4}))
    assert (made, made_again) == (True, False)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


@pytest.mark.parametrize("change", ["text", "label", "order", "more", "max_length", "seed"])
def test_a_change_that_shapes_rows_gives_another_fingerprint(change: str, tmp_path: Path) -> None:
    rows = source_rows()
    recipe = recipe_for(tmp_path, write(rows, tmp_path / "a.parquet"))
    first, _ = prepare(recipe)
    changed = {
        "text": spoiled("text", 31, "another"),
        "label": spoiled("label", 31, "dark"),
        "order": rows.take(pa.array([1, 0, *range(2, 60)])),
        "more": source_rows(61),
    }
    assert change not in changed or changed[change] != rows
    write(changed.get(change, rows), tmp_path / "a.parquet")
    fields = {"max_length": {"model.max_length": 9}, "seed": {"seed": 1}}.get(change, {})
    other, made = prepare(override(recipe, fields))
    assert made
    assert other.fingerprint != first.fingerprint
    assert (first.folder / "meta.json").is_file()


def test_packing_reproduces_the_token_stream(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"data.pack": True, "data.sequence_length": 16})
    prepared, _ = prepare(recipe)
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "processor")
    texts = [json.loads(line)["text"] for line in Path(recipe.data.train).read_text().splitlines()]
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    rows = open_split(prepared.folder, "train").column("input_ids").to_pylist()
    assert {len(row) for row in rows[:-1]} == {16}
    packed = [token for row in rows for token in row]
    assert packed == (stream[:-1] if len(stream) % 16 == 1 else stream)
    assert tokenizer.decode(packed).split(tokenizer.eos_token)[: len(texts) - 1] == texts[:-1]


def test_documents_of_a_vocabulary_without_an_end_have_none(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([" ".join(WORDS)], 280)
    tokenizer.eos_token = None
    task = get_task(tiny_llama(tmp_path), processor_facts(tokenizer))
    rows = task.prepare(pa.table({"text": ["sun salt", "mirror"]}), tokenizer)
    assert tokenizer.batch_decode(rows.column("input_ids").to_pylist()) == ["sun salt", "mirror"]


def test_unpacked_rows_are_documents(tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path)
    prepared, _ = prepare(recipe)
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "processor")
    texts = [json.loads(line)["text"] for line in Path(recipe.data.train).read_text().splitlines()]
    rows = open_split(prepared.folder, "train")
    assert rows.column("input_ids").to_pylist() == [
        [*tokenizer.encode(text), tokenizer.eos_token_id][:48] for text in texts
    ]
    assert rows.column("length").to_pylist() == [len(row) for row in rows.column("input_ids").to_pylist()]


@pytest.mark.parametrize(("truncation", "max_length"), [("head", 8), ("head_tail", 8), ("head_tail", 9)])
def test_truncation(truncation: str, max_length: int, tmp_path: Path) -> None:
    source = write(source_rows(), tmp_path / "a.csv")
    prepared, _ = prepare(
        recipe_for(tmp_path, source, **{"model.truncation": truncation, "model.max_length": max_length})
    )
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "processor")
    cut = 0
    for row in rows_of(prepared, "train"):
        whole = tokenizer.encode(row["text"])
        if len(whole) <= max_length:
            assert row["input_ids"] == whole
            continue
        cut += 1
        tail = max_length // 2 if truncation == "head_tail" else 0
        assert row["input_ids"] == whole[: max_length - tail] + whole[len(whole) - tail :]
        assert len(row["input_ids"]) == max_length
    assert cut > 5


@pytest.mark.parametrize(
    ("name", "rows", "classes"),
    [
        ("reviews/train", 4000, 2),
        ("reviews/test", 1000, 2),
        ("digits/all", 5000, 10),
        ("newsgroups/train", 11293, 20),
        ("newsgroups/test", 7528, 20),
        ("breast_cancer/all", 569, 2),
        ("credit/all", 4454, 2),
    ],
)
def test_packaged_sets(name: str, rows: int, classes: int) -> None:
    table = packaged_table(name, "data.train")
    assert table.num_rows == rows == sum(part.read().num_rows for part in open_source(f"packaged:{name}"))
    assert len(table.column("label").unique()) == classes
    assert table.column("label").null_count == 0


def test_packaged_functions_are_functions_with_docstrings() -> None:
    texts = packaged_table("stdlib/functions", "data.train").column("text").to_pylist()
    assert len(texts) > 3000
    assert all(text.lstrip().startswith("def ") for text in texts)
    assert sum('"""' in text or "'''" in text for text in texts) > 0.9 * len(texts)


def test_unknown_packaged_set_names_the_nearest() -> None:
    with pytest.raises(Refused) as caught:
        open_source("packaged:review/train", "data.test")
    assert caught.value.field == "data.test"
    assert caught.value.suggestion == "did you mean reviews/train?"
