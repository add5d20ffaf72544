"""Rows of a memory-mapped table by number, at the cost of the rows alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class RowReader:
    def __init__(self, table: pa.Table) -> None:
        self.schema = table.schema
        chunks = [chunk for chunk in table.to_batches() if chunk.num_rows]
        self.chunks = [[_column(column) for column in chunk.columns] for chunk in chunks]
        self.starts = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])

    def take(self, rows: np.ndarray) -> pa.Table:
        """These rows, copied, in this order, as one chunk. (Arrow's own `take` first makes one chunk of the table.)"""
        if len(self.chunks) == 1 or not len(rows):
            return self._table([column.take(rows) for column in self.chunks[0]])
        chunk_of = np.searchsorted(self.starts, rows, side="right") - 1
        by_chunk = np.argsort(chunk_of, kind="stable")
        touched, firsts = np.unique(chunk_of[by_chunk], return_index=True)
        pieces = [
            [column.take(rows[at] - self.starts[number]) for column in self.chunks[number]]
            for number, at in zip(touched.tolist(), np.split(by_chunk, firsts[1:]), strict=True)
        ]
        back = np.empty_like(by_chunk)
        back[by_chunk] = np.arange(len(rows))
        return self._table([_column(pa.concat_arrays(column)).take(back) for column in zip(*pieces, strict=True)])

    def _table(self, columns: list[pa.Array]) -> pa.Table:
        return pa.Table.from_arrays(columns, schema=self.schema)


class _Column:
    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def take(self, rows: np.ndarray) -> pa.Array:
        return self.array.take(pa.array(rows))


class _Numbers(_Column):
    def __init__(self, array: pa.Array) -> None:
        self.array, self.values = array, array.to_numpy()

    def take(self, rows: np.ndarray) -> pa.Array:
        return _array(self.values[rows], self.array.type)


class _Lists(_Column):
    """Lists of numbers. Where nearly all that are taken have one length, as packed rows do, they are copied as rows of
    a matrix, in which the rows of the table may overlap."""

    def __init__(self, array: pa.ListArray) -> None:
        self.array, self.offsets, self.values = array, array.offsets.to_numpy(), array.values.to_numpy()
        self.matrix = self.values[:0].reshape(-1, 1)

    def take(self, rows: np.ndarray) -> pa.Array:
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        width = int(length.max(initial=0))
        odd = np.flatnonzero(length != width).tolist()
        if width == 0 or len(odd) > 1 + len(rows) // 64:
            return super().take(rows)
        if self.matrix.shape[1] != width or not len(self.matrix):
            self.matrix = np.lib.stride_tricks.sliding_window_view(self.values, width)
        pieces, first = [], 0
        for each in odd:
            pieces += [
                self.matrix[start[first:each]].reshape(-1),
                self.values[start[each] : start[each] + length[each]],
            ]
            first = each + 1
        pieces.append(self.matrix[start[first:]].reshape(-1))
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(length, out=offsets[1:])
        flat = np.concatenate(pieces) if odd else pieces[0]
        return pa.ListArray.from_arrays(
            _array(offsets, pa.int32()), _array(flat, self.array.type.value_type), type=self.array.type
        )


def _column(array: pa.Array) -> _Column:
    kind = array.type
    if _is_number(kind) and not array.null_count:
        return _Numbers(array)
    if pa.types.is_list(kind) and _is_number(kind.value_type) and not array.null_count and not array.values.null_count:
        return _Lists(array)
    return _Column(array)


def _array(numbers: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Not `pa.array`, which looks for pandas' types for as long as a batch is copied."""
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
