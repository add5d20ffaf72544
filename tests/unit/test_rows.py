"""Rows by number, against Arrow's own `take`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.rows import RowReader


def lists(lengths: list[int], random: np.random.Generator) -> pa.Array:
    return pa.array([random.integers(0, 1000, n).tolist() for n in lengths], pa.list_(pa.int32()))


KINDS: dict[str, Callable[[int, np.random.Generator], pa.Array]] = {
    "packed": lambda n, random: lists([16] * (n - 1) + [5], random),
    "uneven": lambda n, random: lists(random.integers(0, 9, n).tolist(), random),
    "empty": lambda n, random: lists([0] * n, random),
    "nulls": lambda n, random: pa.array([None if i % 3 else [i] for i in range(n)], pa.list_(pa.int32())),
    "texts": lambda n, random: pa.array([f"row {i}" for i in range(n)], pa.large_string()),
    "pixels": lambda n, random: pa.FixedSizeListArray.from_arrays(pa.array(random.integers(0, 255, 6 * n)), 6),
    "numbers": lambda n, random: pa.array(random.integers(0, 1 << 60, n)),
}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(0, 300), st.integers(0, 99), st.booleans())
def test_equals_arrow(chunks: list[int], wanted: int, seed: int, sliced: bool) -> None:
    random = np.random.default_rng(seed)
    table = pa.concat_tables([pa.table({kind: make(n, random) for kind, make in KINDS.items()}) for n in chunks])
    if sliced:  # offsets that do not start at zero
        table = table.slice(table.num_rows // 3)
    rows = random.integers(0, table.num_rows, wanted)
    taken = RowReader(table).take(rows)
    assert taken.equals(table.take(pa.array(rows)))
    assert taken.schema == table.schema
    assert all(column.num_chunks <= 1 for column in taken.columns)
