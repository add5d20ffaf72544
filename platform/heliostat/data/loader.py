"""The loader: a pure function (cursor, batch coordinate, size) → rows with their sample ids.

The order of samples depends on (seed, epoch, the data) alone: no rank count, no history (heliostat.data.order). The
cursor counts global batches; the coordinate says which share of one is whose.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.order import BATCHES, Order, Source, keys, permute
from heliostat.data.prepare import Prepared
from heliostat.data.rows import RowReader
from heliostat.recipe import Recipe, Refused
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


READ_BYTES = 1 << 24
"""Rows of several batches, about so many bytes, are read at once, and handed out as views."""
ORDER_ROWS = 1 << 16
"""So many positions of an epoch are found at once."""


@dataclass
class Loader:
    table: pa.Table
    seed: int
    global_batch_size: int
    fingerprint: str = ""
    bucket_batches: int = 0
    shuffle: bool = True
    sources: Sequence[Source] = ()
    """Of which consecutive rows of the table consist. None: it is one."""
    limit: int | None = None
    _ordered: tuple[int, int, np.ndarray] | None = field(default=None, init=False, repr=False)
    """The rows of some batches: their epoch, the first batch, and the row numbers."""
    _read: tuple[Coordinate, int, int, list[int], Rows] | None = field(default=None, init=False, repr=False)
    """What was read of them for a coordinate: epoch, first batch, where each batch starts (and the last ends), rows."""

    def __post_init__(self) -> None:
        if "sample_id" not in self.table.column_names:
            self.table = self.table.append_column("sample_id", pa.array(np.arange(self.table.num_rows)))
        self.order = Order(self.sources or [Source(self.table.num_rows)], self.seed, self.limit)
        self.reader = RowReader(self.table)
        self.lengths = RowReader(self.table.select(["length"])) if self.bucket_batches > 1 else self.reader
        self.row_bytes = max(1, self.table.nbytes // max(1, self.table.num_rows))

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.order.total // self.global_batch_size)

    def next(self, cursor: Cursor) -> Cursor:
        return self.advance(cursor, 1)

    def advance(self, cursor: Cursor, batches: int) -> Cursor:
        total = cursor.epoch * self.batches_per_epoch + cursor.batch + batches
        return Cursor(*divmod(total, self.batches_per_epoch))

    def batch_rows(self, cursor: Cursor) -> np.ndarray:
        """Row numbers of a global batch. The last of an epoch may be smaller; no row is dropped or repeated."""
        first, rows = self._order_from(cursor, 1)
        return rows[(cursor.batch - first) * self.global_batch_size :][: self.global_batch_size]

    def read(self, cursor: Cursor, coordinate: Coordinate, size: int, fill: bool = False) -> list[Rows]:
        """This coordinate's micro-batches of at most `size` rows. Every coordinate gets equally many; one that
        has no rows left gets a row of weight zero, so that collectives match. `fill`: with such rows, every
        global batch has as many micro-batches, and every one exactly `size` rows (pipelines)."""
        batch_size = min(self.global_batch_size, self.order.total - cursor.batch * self.global_batch_size)
        longest = -(-(self.global_batch_size if fill else batch_size) // coordinate.count)
        read, first, end = self._rows_of(cursor, coordinate)
        micro_batches = []
        for start in range(first, first + longest, size):
            rows = read.slice(start, max(start, min(start + size, end)))
            missing = (size if fill else 1) - len(rows.sample_ids)
            if missing > 0:
                filling = self.reader.take(np.repeat(self.batch_rows(cursor)[:1], missing))
                table = pa.concat_tables([rows.table, filling]).combine_chunks()
                weight = np.concatenate([rows.row_weight_B, np.zeros(missing, np.float32)])
                rows = Rows(table, table.column("sample_id").to_numpy(), weight)
            micro_batches.append(rows)
        return micro_batches

    def _rows_of(self, cursor: Cursor, coordinate: Coordinate) -> tuple[Rows, int, int]:
        """Rows among which are a coordinate's of a global batch, and where those start and end."""
        if self._read is not None and self._read[:2] == (coordinate, cursor.epoch):
            _, _, first, starts, read = self._read
            at = cursor.batch - first
            if 0 <= at < len(starts) - 1:
                return read, starts[at], starts[at + 1]
        share_bytes = self.row_bytes * -(-self.global_batch_size // coordinate.count)
        count = max(1, READ_BYTES // share_bytes)
        first, rows = self._order_from(cursor, max(count, ORDER_ROWS // self.global_batch_size))
        size, ahead = self.global_batch_size, cursor.batch - first
        rows = rows[ahead * size : (ahead + count) * size]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        shares = [batch[coordinate.index :: coordinate.count] for batch in batches]
        starts = [0, *itertools.accumulate(map(len, shares))]
        table = self.reader.take(np.concatenate(shares))
        read = Rows(table, table.column("sample_id").to_numpy(), np.ones(starts[-1], np.float32))
        self._read = (coordinate, cursor.epoch, cursor.batch, starts, read)
        return read, 0, starts[1]

    def _order_from(self, cursor: Cursor, batches: int) -> tuple[int, np.ndarray]:
        """The row numbers of this batch and others around it, and the first of these batches. `batches`: how many from
        this one on, where they are not known yet."""
        size = self.global_batch_size
        if self._ordered is not None and self._ordered[0] == cursor.epoch:
            _, first, rows = self._ordered
            if first <= cursor.batch < first + -(-len(rows) // size):
                return first, rows
        first = cursor.batch
        if self.shuffle and self.bucket_batches > 1:
            first, batches = first // self.bucket_batches * self.bucket_batches, self.bucket_batches
        start, stop = first * size, min((first + batches) * size, self.order.total)
        rows = self.order.rows(cursor.epoch, start, stop) if self.shuffle else np.arange(start, stop)
        if self.shuffle and self.bucket_batches > 1:
            rows = self._bucket(rows, keys(self.seed, BATCHES, first, cursor.epoch))
        self._ordered = (cursor.epoch, first, rows)
        return first, rows

    def _bucket(self, rows: np.ndarray, key: np.ndarray) -> np.ndarray:
        """A window's rows sorted by length, and its full batches shuffled: rows of like length share a batch."""
        length = self.lengths.take(rows).column(0).to_numpy()
        rows = rows[np.argsort(length, kind="stable")]
        count = len(rows) // self.global_batch_size
        batches = rows[: count * self.global_batch_size].reshape(count, self.global_batch_size)
        shuffled = batches[permute(np.arange(count), count, key)]
        return np.concatenate([shuffled.reshape(-1), rows[count * self.global_batch_size :]])


ORDER_VERSION = 3
"""Of the function from (seed, epoch, data) to an epoch's order."""


def training_loader(recipe: Recipe, prepared: Prepared) -> Loader:
    """The loader of a recipe's training rows. Its fingerprint covers all that decides which row comes when: the rows,
    and the names and weights of their sources."""
    data = recipe.data
    rows = prepared.meta["sources"] if data.mixture else {}
    order = [ORDER_VERSION, data.limit, data.bucket_batches, {name: data.mixture[name].weight for name in rows}]
    digest = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:8]
    return Loader(
        open_split(prepared.folder, "train"),
        recipe.seed,
        recipe.training.global_batch_size,
        f"{prepared.fingerprint}:{digest}",
        data.bucket_batches,
        sources=[Source(count, data.mixture[name].weight, name) for name, count in rows.items()],
        limit=data.limit,
    )


CHUNK_BYTES = 1 << 30
"""Up to about this size rows are kept as one chunk: taking them from several costs more."""


def open_split(folder: Path, split: str) -> pa.Table:
    """A prepared split, memory-mapped. Parquet is what is stored; a copy in Arrow's file format, made beside
    it at first use, lets rows be read at random without decoding."""
    files = sorted((folder / split).glob("*.parquet"))
    if not files:
        raise Refused("data", f"{folder} has no prepared split {split!r}", "prepare the data again")
    mapped = folder / f"{split}.arrow"
    if not mapped.exists():
        beside = mapped.with_name(f".{mapped.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, pq.read_schema(files[0])) as writer:
                for table in _tables(files):
                    writer.write_table(table)
            os.replace(beside, mapped)
        finally:
            beside.unlink(missing_ok=True)
    return pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()


def _tables(files: list[Path]) -> Iterator[pa.Table]:
    """The files' rows in few chunks, none of which is more than a process can hold."""
    tables, size = list[pa.Table](), 0
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        added = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        if tables and size + added > CHUNK_BYTES:
            yield pa.concat_tables(tables).combine_chunks()
            tables, size = [], 0
        tables.append(pq.read_table(file))
        size += added
    yield pa.concat_tables(tables).combine_chunks()


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
