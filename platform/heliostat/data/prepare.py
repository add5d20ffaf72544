"""From source rows to prepared rows: Parquet by split, with a fingerprint, made once and then only read.

FOLDER/train/train-000-00000.parquet …   FOLDER/validation/…   FOLDER/test/…   FOLDER/processor/   FOLDER/meta.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.data.sources import Part, open_source
from heliostat.models.load import processor_facts
from heliostat.recipe import Recipe, Refused, nearest, write_atomically
from heliostat.tasks import ROW_NAME, Task, get_task

PREPARED_VERSION = 1
SPLITS = ("train", "validation", "test")
FIT_ROWS = 100_000
"""Rows that labels, channel means and tokenizers are learned from."""


class Origin(NamedTuple):
    """Where rows come from: the split a source is given for, and its number and name in a mixture."""

    split: str
    number: int = 0
    name: str = ""

    @property
    def field(self) -> str:
        return f"data.mixture.{self.name}.source" if self.name else f"data.{self.split}"


Sources = dict[Origin, list[Part]]
Scans = dict[Origin, list[tuple[np.ndarray, str]]]
RunParts = Callable[[Callable[[Any], Any], list[Any]], list[Any]]


@dataclass(frozen=True)
class Prepared:
    folder: Path
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.meta["facts"]

    def task(self, recipe: Recipe) -> Task:
        return get_task(recipe, self.facts)

    def processor(self) -> Any:
        import transformers

        folder = self.folder / "processor"
        return transformers.AutoTokenizer.from_pretrained(folder) if folder.is_dir() else None


def run_here(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    return [function(item) for item in items]


def open_sources(recipe: Recipe) -> Sources:
    """The parts of each source: the training sources, by name where there are several, then validation and test. Raises
    Refused for what can be told from the first part of each; jobs call it before they take a cluster."""
    task, data = get_task(recipe), recipe.data
    task.check()
    given = {Origin("train", i, name): data.mixture[name].source for i, name in enumerate(sorted(data.mixture))}
    given = given or {Origin("train"): data.train}
    given |= {Origin(split): spec for split in SPLITS[1:] if (spec := getattr(data, split))}
    sources = {origin: open_source(spec, origin.field) for origin, spec in given.items()}
    for origin, parts in sources.items():
        _check_columns(task, parts[0].read(), parts[0].name, origin.field)
    return sources


def prepare(recipe: Recipe, run_parts: RunParts = run_here, sources: Sources | None = None) -> tuple[Prepared, bool]:
    """Prepare the recipe's data, or find them prepared. Returns them and whether they were made now.

    The fingerprint covers the source's contents and everything in the recipe that shapes rows. `run_parts` maps
    a function over parts, in order; the launcher passes one that runs on the cluster. `sources`: the recipe's, where
    they are open."""
    task = get_task(recipe)
    sources = open_sources(recipe) if sources is None else sources
    scans = {origin: run_parts(_Scan(recipe, origin.field), parts) for origin, parts in sources.items()}
    fingerprint = _fingerprint(recipe, scans)
    folder = recipe.storage_path / "data" / f"{recipe.name}-{fingerprint}"
    if (folder / "meta.json").is_file():
        return read_prepared(folder), False

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        chosen = _choose_splits(recipe, scans)
        train_rows = _some_rows(task, sources, chosen)
        texts = (
            train_rows.column(recipe.data.text_column).to_pylist()
            if recipe.data.text_column in train_rows.column_names
            else None
        )
        processor = task.processor(texts)
        facts = task.fit(train_rows) | processor_facts(processor)
        beside.mkdir()
        if processor is not None:
            processor.save_pretrained(beside / "processor")
        jobs = [
            _Job(origin, index, part, chosen[origin][index])
            for origin, parts in sources.items()
            for index, part in enumerate(parts)
        ]
        counts = run_parts(_Write(recipe, facts, beside), jobs)
        rows = {split: sum(count.get(split, 0) for count in counts) for split in SPLITS}
        for split in SPLITS:
            if rows[split] == 0:
                raise Refused(
                    f"data.{split}",
                    f"no rows are left for the {split} split",
                    "name a source for it, or raise its fraction",
                )
        given = {origin: 0 for origin in sources if origin.name}
        for job, count in zip(jobs, counts, strict=True):
            if job.origin in given:
                given[job.origin] += count.get("train", 0)
        for origin, number in given.items():
            if number == 0:
                raise Refused(origin.field, "it gives no training rows", "leave it out, or lower the other fractions")
        meta = {
            "version": PREPARED_VERSION,
            "fingerprint": fingerprint,
            "recipe": recipe.name,
            "facts": facts,
            "rows": rows,
            "sources": {origin.name: number for origin, number in given.items()},
            "dropped_duplicates": sum(
                int((codes == DROPPED).sum()) for per_part in chosen.values() for codes in per_part
            ),
        }
        write_atomically(beside / "meta.json", json.dumps(meta, indent=2) + "\n")
        try:
            os.replace(beside, folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read_prepared(folder), True


def read_prepared(folder: Path) -> Prepared:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["version"] != PREPARED_VERSION:
        raise Refused("data", f"{folder} was prepared by another version of Heliostat", "remove it; it is made again")
    return Prepared(folder, meta)


def _check_columns(task: Task, table: pa.Table, name: str, field: str) -> None:
    for column in task.required_columns():
        if column not in table.column_names:
            raise Refused(
                field,
                f"{name} has no column {column!r}; it has {', '.join(table.column_names)}",
                nearest(column, table.column_names) or "set the columns of section data",
            )


class _Scan:
    """Content hashes (uint64) of a part's rows, and a digest of its labels."""

    def __init__(self, recipe: Recipe, field: str) -> None:
        self.recipe, self.field = recipe, field

    def __call__(self, part: Part) -> tuple[np.ndarray, str]:
        table = part.read()
        task = get_task(self.recipe)
        _check_columns(task, table, part.name, self.field)
        hashes = [
            int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            for content in task.content(table)
        ]
        label = self.recipe.data.label_column
        labels = table.column(label).to_pylist() if label in table.column_names else []
        return np.array(hashes, np.uint64), hashlib.sha256(repr(labels).encode()).hexdigest()


def _fingerprint(recipe: Recipe, scans: Scans) -> str:
    model, data = recipe.model, recipe.data
    shaping = {
        "version": PREPARED_VERSION,
        "task": recipe.task,
        "seed": recipe.seed,
        "model": [model.name, model.tokenizer, model.max_length, model.truncation],
        "data": [
            data.text_column,
            data.label_column,
            data.image_column,
            data.feature_columns,
            data.sequence_length,
            "isolated" if data.pack and data.isolate_documents else data.pack,
            data.validation_fraction,
            data.test_fraction,
        ],
    }
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
    for origin, parts in scans.items():
        for hashes, labels in parts:
            digest.update(f"{origin.split}{origin.name}".encode() + hashes.tobytes() + labels.encode())
    return digest.hexdigest()[:12]


DROPPED = -1


def _choose_splits(recipe: Recipe, scans: Scans) -> dict[Origin, list[np.ndarray]]:
    """For each source and part, the split of each row (index into SPLITS, or DROPPED).

    Carved splits are chosen by the row's content, so equal rows stay together; a row of an earlier split whose
    content a later one holds is dropped: train, validation and test are disjoint in content."""
    data = recipe.data
    salt = np.uint64(recipe.seed * 0x9E3779B97F4A7C15 % (1 << 64))
    later: dict[str, set[int]] = {"test": set(), "validation": set()}
    for split in ("test", "validation"):
        for hashes, _ in scans.get(Origin(split), []):
            later[split].update(hashes.tolist())
    codes: dict[Origin, list[np.ndarray]] = {}
    for origin, parts in scans.items():
        split, codes[origin] = origin.split, []
        for hashes, _ in parts:
            code = np.full(len(hashes), SPLITS.index(split), np.int8)
            if split == "train":
                with np.errstate(over="ignore"):  # a multiplicative hash wraps
                    mixed = (hashes ^ salt) * np.uint64(0xD6E8FEB86659FD93)
                uniform = ((mixed ^ (mixed >> np.uint64(32))) >> np.uint64(11)).astype(np.float64) / (1 << 53)
                test = 0.0 if data.test else data.test_fraction
                validation = 0.0 if data.validation else data.validation_fraction
                code[uniform < test + validation] = SPLITS.index("validation")
                code[uniform < test] = SPLITS.index("test")
            if split != "test":
                holders = later["test"] | (later["validation"] if split == "train" else set())
                if holders:
                    code[np.fromiter((h in holders for h in hashes.tolist()), bool, len(hashes))] = DROPPED
            codes[origin].append(code)
    return codes


def _some_rows(task: Task, sources: Sources, codes: dict[Origin, list[np.ndarray]]) -> pa.Table:
    """Training rows to learn labels, means and tokenizers from: the first FIT_ROWS, of each source equally many."""
    training = [origin for origin in sources if origin.split == "train"]
    tables = []
    for origin in training:
        total = 0
        for part, code in zip(sources[origin], codes[origin], strict=True):
            table = part.read()
            rows = _named_rows(table.select(task.read_columns(table)), part.name)
            tables.append(rows.filter(pa.array(code == SPLITS.index("train"))))
            total += tables[-1].num_rows
            if total >= FIT_ROWS // len(training):
                break
    if not any(table.num_rows for table in tables):
        raise Refused("data.train", "the training split holds no rows")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise Refused(training[-1].field, f"the columns of its rows differ in type: {error}") from error


def _named_rows(table: pa.Table, name: str) -> pa.Table:
    """With a column that says where each row came from: a row keeps its number when others are filtered out."""
    names = [f"row {row} of {name}" for row in range(table.num_rows)]
    return table.append_column(ROW_NAME, pa.array(names, pa.string()))


def first_id(split: str, origin: Origin, part: int) -> int:
    """The `sample_id` of row 0 of what a part gives to a split. Ids are unique over the whole data set: from the top, 2
    bits for the split, 8 for the number of the source, 20 for the part, 32 for the row. (No split has rows both of a
    source of its own and carved from others.)"""
    if part >= 1 << 20:
        raise Refused(origin.field, f"it has more than {1 << 20} parts", "make larger files or row groups")
    return (SPLITS.index(split) << 60) | (origin.number << 52) | (part << 32)


def source_number(sample_ids: np.ndarray) -> np.ndarray:
    """The number in its mixture of the source that each sample came from."""
    return (sample_ids >> 52) & 0xFF


@dataclass(frozen=True)
class _Job:
    origin: Origin
    index: int
    part: Part
    code: np.ndarray


class _Write:
    """Prepare one part and write its rows to their splits; returns rows by split."""

    def __init__(self, recipe: Recipe, facts: dict[str, Any], folder: Path) -> None:
        self.recipe, self.facts, self.folder = recipe, facts, folder

    def __call__(self, job: _Job) -> dict[str, int]:
        task = get_task(self.recipe, self.facts)
        processor = Prepared(self.folder, {}).processor()
        table = _named_rows(job.part.read(), job.part.name)
        written = {}
        for code, split in enumerate(SPLITS):
            chosen = table.filter(pa.array(job.code == code))
            if chosen.num_rows == 0:
                continue
            prepared = task.prepare(chosen, processor, job.part.name)
            first = first_id(split, job.origin, job.index)
            rows = (
                np.flatnonzero(job.code == code)
                if prepared.num_rows == chosen.num_rows
                else np.arange(prepared.num_rows)
            )
            prepared = prepared.append_column("sample_id", pc.add(pa.array(rows, pa.int64()), first))
            target = self.folder / split / f"{job.origin.split}-{job.origin.number:03d}-{job.index:05d}.parquet"
            target.parent.mkdir(exist_ok=True)
            pq.write_table(prepared, target)
            written[split] = prepared.num_rows
        return written


def describe(prepared: Prepared) -> Iterable[tuple[str, str]]:
    """Lines for people: what was prepared."""
    rows = prepared.meta["rows"]
    yield "rows", ", ".join(f"{rows[split]} {split}" for split in SPLITS)
    if labels := prepared.facts.get("labels"):
        yield "classes", str(len(labels))
    if columns := prepared.facts.get("columns"):
        yield "columns", f"{len(columns)}: {', '.join(columns)}"
    if dropped := prepared.meta["dropped_duplicates"]:
        yield "left out", f"{dropped} rows that a later split holds too"
