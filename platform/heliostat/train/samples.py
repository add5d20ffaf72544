"""Which rows each step was fed: a log of every rank, on disk before the checkpoint that counts them, and at the end of
a run one table, `samples.parquet`, that says which of them are in the surviving weights.

RUN/samples/attempt-001-share-00000.bin: fixed-size records, first the step that the attempt started from.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from heliostat.data.loader import Coordinate
from heliostat.data.prepare import source_number
from heliostat.parallel.mesh import Layout
from heliostat.recipe import Recipe, Refused
from heliostat.tasks import Batch
from heliostat.train import checkpoint
from heliostat.train.guard import read_bad_steps
from heliostat.train.ledger import Ledger

FOLDER = "samples"
SAMPLES_FILE = "samples.parquet"
RECORD = np.dtype([("step", "<i8"), ("position", "<i8"), ("id", "<i8")])
START = -1
"""In place of a position: the record that holds the step an attempt started from."""
ROWS_AT_ONCE = 1 << 20
SCHEMA = pa.schema(
    {
        "attempt": pa.int32(),
        "step": pa.int64(),
        "position": pa.int64(),
        "source": pa.dictionary(pa.int16(), pa.string()),
        "id": pa.int64(),
        "committed": pa.bool_(),
    }
)


class SampleLog:
    """One attempt's log of one share of the global batches."""

    def __init__(self, run_dir: Path, attempt: int, coordinate: Coordinate, start: int) -> None:
        """`start`: the step of the checkpoint that the attempt goes on from."""
        self.coordinate = coordinate
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = (folder / f"attempt-{attempt:03d}-share-{coordinate.index:05d}.bin").open("wb")
        self._write(start, np.array([START]), np.array([0]))
        self.flush()

    def step(self, step: int, batches: list[Batch]) -> None:
        """The rows of weight above zero that this share's micro-batches hold."""
        if any(len(batch.sample_ids) != len(batch.row_weight_B) for batch in batches):
            raise Refused("data.log_samples", "the task's batches have no sample_ids", "set it false, or give them")
        ids = [batch.sample_ids[batch.row_weight_B.numpy() > 0] for batch in batches]
        fed = np.concatenate(ids)
        # Share i of n is every n-th row of the global batch from its i-th on.
        self._write(step, self.coordinate.index + self.coordinate.count * np.arange(len(fed)), fed)

    def _write(self, step: int, position: np.ndarray, ids: np.ndarray) -> None:
        records = np.empty(len(ids), RECORD)
        records["step"], records["position"], records["id"] = step, position, ids
        self.stream.write(records.tobytes())

    def flush(self) -> None:
        """Hand what was logged to the system: from now on a kill of this process loses none of it."""
        self.stream.flush()


def open_log(recipe: Recipe, run_dir: Path, layout: Layout, ledger: Ledger, start: int) -> SampleLog | None:
    """This rank's log, where the recipe asks for one; of peers with the same rows, one keeps it. The attempt's number
    is that of rank 0's ledger.

    Collective: every rank must call it, in the same order."""
    if not recipe.data.log_samples:
        return None
    if layout.mesh is None:
        return SampleLog(run_dir, ledger.attempt, layout.coordinate, start)
    numbers = [ledger.attempt if layout.is_first else 0]
    dist.broadcast_object_list(numbers, src=0, device=layout.device)
    peers = ("pipeline", "context", "tensor")
    if any(layout.mesh.get_local_rank(axis) for axis in peers):
        return None
    return SampleLog(run_dir, numbers[0], layout.coordinate, start)


def collect(run_dir: Path, recipe: Recipe) -> Path:
    """Write a run's `samples.parquet` from its logs: the rows of every step of every attempt, in order. `committed`
    says that the newest checkpoint, by itself and those it goes back to, holds what the row taught; rows of a step that
    was left out as bad taught nothing.

    The run must not be training."""
    newest = checkpoint.newest(checkpoint.folder_of(recipe, run_dir))
    names = sorted(recipe.data.mixture) or ["train"]
    left_out = [record["step"] for record in read_bad_steps(run_dir) if record["cause"] == "data"]
    return write_samples(run_dir, newest.step if newest else 0, names, left_out)


def write_samples(run_dir: Path, surviving: int, names: Sequence[str], left_out: Sequence[int] = ()) -> Path:
    """As `collect`; `surviving`: the step of the newest checkpoint, `names`: of the sources by number, `left_out`: bad
    steps."""
    logs: dict[int, list[np.ndarray]] = {}
    for file in sorted((run_dir / FOLDER).glob("attempt-*.bin")):
        # A record that a kill cut short is left out.
        whole = file.stat().st_size // RECORD.itemsize
        if not whole:
            continue
        log = np.memmap(file, RECORD, "r", shape=whole)
        logs.setdefault(int(file.name.split("-")[1]), []).append(log)
    # An attempt's steps count up to where the next attempt, or in the end a reader of the weights, went on from.
    committed_to, until = surviving, dict[int, int]()
    for attempt in sorted(logs, reverse=True):
        until[attempt] = committed_to
        committed_to = min(committed_to, *(int(records["step"][0]) for records in logs[attempt]))
    target = run_dir / SAMPLES_FILE
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(beside, SCHEMA) as writer:
            for attempt in sorted(logs):
                for records in _in_order(logs[attempt]):
                    writer.write_table(_table(attempt, records, until[attempt], names, left_out))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def _in_order(logs: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The records of one attempt's logs by step and position, some steps at a time."""
    logs = [records[1:] for records in logs]
    filled = [records for records in logs if len(records)]
    if not filled:
        return
    first = min(int(records["step"][0]) for records in filled)
    last = max(int(records["step"][-1]) for records in filled)
    steps = max(1, ROWS_AT_ONCE * (last - first + 1) // sum(map(len, filled)))
    for start in range(first, last + 1, steps):
        pieces = []
        for records in filled:
            low, high = (bisect.bisect_left(records, end, key=lambda r: r["step"]) for end in (start, start + steps))
            pieces.append(records[low:high])
        together = np.concatenate(pieces)
        yield together[np.lexsort((together["position"], together["step"]))]


def _table(attempt: int, records: np.ndarray, until: int, names: Sequence[str], left_out: Sequence[int]) -> pa.Table:
    source = pa.DictionaryArray.from_arrays(
        pa.array(source_number(records["id"]), pa.int16()), pa.array(names, pa.string())
    )
    columns = [
        pa.array(np.full(len(records), attempt, np.int32)),
        pa.array(records["step"]),
        pa.array(records["position"]),
        source,
        pa.array(records["id"]),
        pa.array((records["step"] <= until) & ~np.isin(records["step"], left_out)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
