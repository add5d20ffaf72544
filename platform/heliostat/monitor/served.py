"""What an endpoint was asked and what it answered: a share of it, written to Parquet behind the requests' back, and
read again.

FOLDER/BUNDLE/TIME-RANDOM.parquet: BUNDLE is the beginning of its digest, TIME when the file was written (Unix, in ms).
Whoever writes also removes what is too old or too much.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.recipe import Deploy, Recipe, Refused

if TYPE_CHECKING:
    from heliostat.models.bundle import Bundle

VERSION = b"1"
SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("version", pa.string()),
        ("input", pa.large_string()),  # JSON, as is the next
        ("prediction", pa.large_string()),
    ],
    {b"heliostat.served": VERSION},
)
WAITING_ROWS, WAITING_BYTES = 4096, 32 << 20
"""What waits to be written at most. Where a disk does not keep up, more is dropped."""
SOON_ROWS = WAITING_ROWS // 4
"""So many are written at once, without waiting for the time."""
FILES = "[0-9]" * 15 + "-*.parquet"
"""Neither those that are being written, which begin with a dot, nor somebody else's."""
LEFT_OVER_S = 3600.0
"""A file that was begun so long ago is nobody's any more."""
KEPT, DROPPED = "kept", "dropped"


def folder_of(bundle: Bundle, settings: Deploy) -> Path:
    """Where rows of a bundle are kept. Others of its recipe's have their folders beside it."""
    recipe: Recipe = bundle.recipe
    beside = Path(settings.sample_folder or recipe.storage_path / "served" / recipe.name)
    return beside.expanduser().absolute() / bundle.digest[:12]


class _Row(NamedTuple):
    bundle: Bundle
    time_s: float
    version: str
    input: dict[str, Any]
    prediction: dict[str, Any]


class Sampler:
    """Keeps some of what passes by. Its thread does all that may take time."""

    def __init__(self, settings: Deploy, count: Callable[[str, int], None], seed: int | None = None) -> None:
        """`count` is told how many rows were kept, and how many dropped, by any thread."""
        self.settings, self.count, self.random = settings, count, random.Random(seed)
        self.lock, self.wake = threading.Lock(), threading.Event()
        self.waiting: list[_Row] = []
        self.waiting_bytes, self.closed = 0, False
        self.thread = threading.Thread(target=self._write_on, name="samples", daemon=True)
        self.thread.start()

    def offer(self, bundle: Bundle, version: str, asked: list[dict[str, Any]], answered: list[dict[str, Any]]) -> None:
        """A request's inputs and their predictions. Takes its share of them, never waits."""
        share, now, dropped = self.settings.sample_share, time.time(), 0
        for item, prediction in zip(asked, answered, strict=True):
            if self.random.random() >= share:
                continue
            size = sum(len(value) for value in item.values() if isinstance(value, str))
            with self.lock:  # held for as long as it takes to hand the rows over
                full = len(self.waiting) >= WAITING_ROWS or self.waiting_bytes + size > WAITING_BYTES
                if not full:
                    self.waiting.append(_Row(bundle, now, version, item, prediction))
                    self.waiting_bytes += size
            dropped += full
        if len(self.waiting) >= SOON_ROWS or self.waiting_bytes > WAITING_BYTES // 4:
            self.wake.set()
        if dropped:
            self.count(DROPPED, dropped)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, if the disk lets it be written in time."""
        self.closed = True
        self.wake.set()
        self.thread.join(timeout_s)

    def _write_on(self) -> None:
        last = False
        while not last:
            self.wake.wait(self.settings.sample_every_s)
            self.wake.clear()
            last = self.closed  # looked at before the rows are taken: none that was offered earlier is left
            with self.lock:
                rows, self.waiting, self.waiting_bytes = self.waiting, [], 0
            for bundle in {row.bundle.digest: row.bundle for row in rows}.values():
                of_bundle = [row for row in rows if row.bundle.digest == bundle.digest]
                folder = folder_of(bundle, self.settings)
                try:
                    _write(folder, of_bundle)
                    _tidy(folder.parent, self.settings)
                except (OSError, pa.ArrowException) as error:
                    logging.getLogger(__name__).warning("samples cannot be kept in %s: %s", folder, error)
                    self.count(DROPPED, len(of_bundle))
                else:
                    self.count(KEPT, len(of_bundle))


def _write(folder: Path, rows: list[_Row]) -> None:
    columns = [
        pa.array([round(1e6 * row.time_s) for row in rows], SCHEMA.field("time").type),
        pa.array([row.version for row in rows]),
        pa.array([json.dumps(row.input) for row in rows], pa.large_string()),
        pa.array([json.dumps(row.prediction) for row in rows], pa.large_string()),
    ]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # for its owner alone: clients' data
    # Later than all of its rows.
    path = folder / f"{time.time_ns() // 1_000_000 + 1:015d}-{uuid.uuid4().hex[:12]}.parquet"
    beside = path.with_name(f".{path.name}")
    try:
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), beside, compression="zstd")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _tidy(folder: Path, settings: Deploy) -> None:
    """Remove files that are too old, and the oldest where there are too many bytes. Others may do so, too."""
    now, held = time.time(), 0
    for path in sorted(folder.glob(f"*/{FILES}"), key=lambda path: path.name, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            held += path.stat().st_size
            if held > settings.sample_bytes or now - _written_s(path) > 86_400 * settings.sample_days:
                path.unlink()
    for path in folder.glob(f"*/.{FILES}"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink()


def _written_s(path: Path) -> float:
    return int(path.name.partition("-")[0]) / 1000


@dataclass
class Served:
    """Rows that were kept."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    """Of which these are some."""
    first_s: float = 0.0
    last_s: float = 0.0
    """Unix times of the first and the last of all."""


def bundles_of(folder: Path) -> list[str]:
    """Of which there are rows: the beginnings of their digests."""
    return sorted({path.parent.name for path in folder.glob(f"*/{FILES}")})


def read(folder: Path, since_s: float, max_rows: int, seed: int = 0) -> Served:
    """What was answered since a time (Unix), a random choice of `max_rows` where it is more. `folder`: a bundle's."""
    paths = [path for path in sorted(folder.glob(FILES)) if _written_s(path) >= since_s]
    tables = {path: table.column("time").to_numpy() for path, table in _opened(paths, ["time"])}
    times = {path: (column - np.datetime64(0, "us")) / np.timedelta64(1, "s") for path, column in tables.items()}
    chosen = {path: np.flatnonzero(column >= since_s) for path, column in times.items()}
    total = sum(len(rows) for rows in chosen.values())
    if not total:
        return Served()
    found = Served(total=total)
    picked = np.random.default_rng(seed).permutation(total)[:max_rows]
    marked = np.zeros(total, bool)
    marked[picked] = True
    marks = dict(zip(chosen, np.split(marked, np.cumsum([len(rows) for rows in chosen.values()])[:-1]), strict=True))
    for path, table in _opened([path for path, mark in marks.items() if mark.any()], ["input", "prediction"]):
        rows = table.take(pa.array(chosen[path][marks[path]]))
        found.inputs += [json.loads(text) for text in rows.column("input").to_pylist()]
        found.predictions += [json.loads(text) for text in rows.column("prediction").to_pylist()]
    all_times = np.concatenate([times[path][rows] for path, rows in chosen.items()])
    found.first_s, found.last_s = float(all_times.min()), float(all_times.max())
    return found


def _opened(paths: list[Path], columns: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """One by one, but those that have been removed meanwhile."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            with pq.ParquetFile(path) as file:
                if (file.schema_arrow.metadata or {}).get(b"heliostat.served") != VERSION:
                    raise Refused("deploy.sample_folder", f"{path} was written by another Heliostat", "remove it")
                table = file.read(columns)
            yield path, table
