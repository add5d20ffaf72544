"""The loader: a pure function (cursor, batch coordinate, size) → rows with their sample ids.

The order of samples depends on (seed, epoch, the data) alone: no rank count, no history. The cursor counts
global batches; the coordinate says which share of one is whose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.recipe import Refused
from heliostat.tasks import Rows


@dataclass(frozen=True)
class Cursor:
    """The next global batch."""

    epoch: int = 0
    batch: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}


@dataclass(frozen=True)
class Coordinate:
    """Share `index` of `count` of each global batch. Peers in tensor and pipeline groups have the same one."""

    index: int = 0
    count: int = 1


@dataclass
class Loader:
    table: pa.Table
    seed: int
    global_batch_size: int
    fingerprint: str = ""
    bucket_batches: int = 0
    shuffle: bool = True
    _kept: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)  # one epoch's order

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.table.num_rows // self.global_batch_size)

    def next(self, cursor: Cursor) -> Cursor:
        if cursor.batch + 1 < self.batches_per_epoch:
            return Cursor(cursor.epoch, cursor.batch + 1)
        return Cursor(cursor.epoch + 1, 0)

    def advance(self, cursor: Cursor, batches: int) -> Cursor:
        total = cursor.epoch * self.batches_per_epoch + cursor.batch + batches
        return Cursor(*divmod(total, self.batches_per_epoch))

    def batch_rows(self, cursor: Cursor) -> np.ndarray:
        """Row numbers of a global batch. The last of an epoch may be smaller; no row is dropped or repeated."""
        start = cursor.batch * self.global_batch_size
        return self._order(cursor.epoch)[start : start + self.global_batch_size]

    def read(self, cursor: Cursor, coordinate: Coordinate, size: int, fill: bool = False) -> list[Rows]:
        """This coordinate's micro-batches of at most `size` rows. Every coordinate gets equally many; one that
        has no rows left gets a row of weight zero, so that collectives match. `fill`: with such rows, every
        global batch has as many micro-batches, and every one exactly `size` rows (pipelines)."""
        batch = self.batch_rows(cursor)
        mine = batch[coordinate.index :: coordinate.count]
        longest = -(-(self.global_batch_size if fill else len(batch)) // coordinate.count)
        micro_batches = []
        for start in range(0, longest, size):
            rows = mine[start : start + size]
            weight = np.ones(len(rows), np.float32)
            missing = (size if fill else 1) - len(rows)
            if missing > 0:
                rows = np.concatenate([rows, np.repeat(batch[:1], missing)])
                weight = np.concatenate([weight, np.zeros(missing, np.float32)])
            table = self.table.take(pa.array(rows))
            ids = table.column("sample_id").to_numpy() if "sample_id" in table.column_names else rows
            micro_batches.append(Rows(table, ids, weight))
        return micro_batches

    def _order(self, epoch: int) -> np.ndarray:
        if self._kept and self._kept[0] == epoch:
            return self._kept[1]
        order = np.arange(self.table.num_rows)
        if self.shuffle:
            random = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64)))
            order = random.permutation(order)
            if self.bucket_batches > 1:
                order = self._bucket(order, random)
        self._kept = (epoch, order)
        return order

    def _bucket(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sort by length within windows, then shuffle the full batches: rows of like length share a batch."""
        length = self.table.column("length").to_numpy()
        window = self.bucket_batches * self.global_batch_size
        pieces = [order[start : start + window] for start in range(0, len(order), window)]
        ordered = np.concatenate([piece[np.argsort(length[piece], kind="stable")] for piece in pieces])
        full = len(ordered) // self.global_batch_size * self.global_batch_size
        batches = ordered[:full].reshape(-1, self.global_batch_size)
        return np.concatenate([batches[random.permutation(len(batches))].reshape(-1), ordered[full:]])


ONE_CHUNK_BYTES = 1 << 30
"""Up to this size a split is kept as one chunk: taking rows from several costs forty times as much."""


def open_split(folder: Path, split: str) -> pa.Table:
    """A prepared split, memory-mapped. Parquet is what is stored; a copy in Arrow's file format, made beside
    it at first use, lets rows be read at random without decoding."""
    files = sorted((folder / split).glob("*.parquet"))
    if not files:
        raise Refused("data", f"{folder} has no prepared split {split!r}", "prepare the data again")
    mapped = folder / f"{split}.arrow"
    if not mapped.exists():
        beside = mapped.with_name(f".{mapped.name}.{os.getpid()}")
        try:
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, pq.read_schema(files[0])) as writer:
                for table in _tables(files):
                    writer.write_table(table)
            os.replace(beside, mapped)
        finally:
            beside.unlink(missing_ok=True)
    return pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()


def _tables(files: list[Path]) -> Iterator[pa.Table]:
    """The files' rows: as one chunk where they are few, else file by file, so that no process holds the whole."""
    sizes = [group.total_byte_size for file in files for group in _row_groups(pq.ParquetFile(file).metadata)]
    if sum(sizes) <= ONE_CHUNK_BYTES:
        yield pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
    else:
        yield from (pq.read_table(file) for file in files)


def _row_groups(metadata: pq.FileMetaData) -> list[pq.RowGroupMetaData]:
    return [metadata.row_group(i) for i in range(metadata.num_row_groups)]


def subset(table: pa.Table, limit: int | None, seed: int) -> pa.Table:
    """At most `limit` rows, chosen by seed, in their order."""
    if limit is None or limit >= table.num_rows:
        return table
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(table.num_rows)[:limit]
    return table.take(pa.array(np.sort(chosen)))


def check_resume(saved: dict[str, Any], loader: Loader) -> Cursor:
    """The cursor of a checkpoint. Refuses other data, or another batch size, than it was counted in."""
    for name, now in (("fingerprint", loader.fingerprint), ("global_batch_size", loader.global_batch_size)):
        if saved[name] != now:
            raise Refused(
                "resume",
                f"the checkpoint's {name} is {saved[name]!r}, this run's is {now!r}",
                "resume with the data and batch size it was made with, or start a new run",
            )
    return Cursor(**saved["cursor"])
