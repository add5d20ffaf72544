"""The loader against plain counting: every row once, whatever the share and the size."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.loader import Coordinate, Cursor, Loader, check_resume
from heliostat.data.order import Source
from heliostat.recipe import Refused

seeds = st.integers(0, 2**31 - 1)
numbers = st.integers(1, 9)


def table(rows: int, seed: int = 0) -> pa.Table:
    length = np.random.default_rng(seed).integers(1, 200, rows).astype(np.int32)
    return pa.table({"length": length, "sample_id": np.arange(rows) * 3 + 100})


@st.composite
def loaders(draw: st.DrawFn) -> Loader:
    rows, size, seed = draw(st.integers(1, 60)), draw(st.integers(1, 20)), draw(seeds)
    return Loader(table(rows, seed), seed, size, "f", draw(st.integers(0, 4)), draw(st.booleans()))


def kept(loader: Loader, cursor: Cursor, count: int, size: int, fill: bool = False) -> Counter[int]:
    """Sample ids of weight one over all coordinates."""
    return Counter(
        int(sample)
        for index in range(count)
        for rows in loader.read(cursor, Coordinate(index, count), size, fill)
        for sample, weight in zip(rows.sample_ids, rows.row_weight_B, strict=True)
        if weight == 1
    )


@given(loaders(), st.integers(0, 3), numbers, numbers, st.booleans())
def test_an_epoch_visits_every_row_once_whatever_the_count(
    loader: Loader, epoch: int, count: int, size: int, fill: bool
) -> None:
    visited: Counter[int] = Counter()
    for batch in range(loader.batches_per_epoch):
        cursor = Cursor(epoch, batch)
        shared = kept(loader, cursor, count, size, fill)
        assert shared == kept(loader, cursor, 1, loader.global_batch_size)
        last = batch == loader.batches_per_epoch - 1
        rest = loader.table.num_rows - batch * loader.global_batch_size
        assert shared.total() == (rest if last else loader.global_batch_size)
        visited += shared
    assert visited == Counter(range(100, 100 + 3 * loader.table.num_rows, 3))


@given(loaders(), numbers, numbers)
def test_micro_batches_are_equally_many_and_fill_only_where_rows_are_missing(
    loader: Loader, count: int, size: int
) -> None:
    for batch in range(loader.batches_per_epoch):
        shares = [loader.read(Cursor(0, batch), Coordinate(i, count), size) for i in range(count)]
        assert len({len(share) for share in shares}) == 1
        for share in shares:
            for rows in share:
                assert len(rows.row_weight_B) == len(rows.sample_ids) == rows.table.num_rows <= size
                assert set(rows.row_weight_B.tolist()) in ({1.0}, {0.0})
                if rows.row_weight_B[0] == 0:  # nothing was left for it
                    assert rows.table.num_rows == 1
            real = [rows.row_weight_B[0] == 1 for rows in share]
            assert real == sorted(real, reverse=True)


@given(loaders(), numbers, numbers)
def test_fill_gives_micro_batches_of_one_shape_and_number(loader: Loader, count: int, size: int) -> None:
    expected = math.ceil(math.ceil(loader.global_batch_size / count) / size)
    for batch in range(loader.batches_per_epoch):
        for index in range(count):
            share = loader.read(Cursor(0, batch), Coordinate(index, count), size, fill=True)
            assert len(share) == expected
            weights = np.concatenate([rows.row_weight_B for rows in share])
            assert all(rows.table.num_rows == len(rows.sample_ids) == size for rows in share)
            assert weights.tolist() == sorted(weights.tolist(), reverse=True)
            assert set(weights.tolist()) <= {0.0, 1.0}


@given(loaders(), st.integers(0, 5))
def test_rows_and_ids_belong_together(loader: Loader, epoch: int) -> None:
    ids, lengths = (loader.table.column(name).to_pylist() for name in ("sample_id", "length"))
    by_id = dict(zip(ids, lengths, strict=True))
    for rows in loader.read(Cursor(epoch, 0), Coordinate(0, 2), 3):
        assert [by_id[sample] for sample in rows.sample_ids.tolist()] == rows.column("length").to_pylist()


def order(loader: Loader, epoch: int) -> list[int]:
    return np.concatenate([loader.batch_rows(Cursor(epoch, b)) for b in range(loader.batches_per_epoch)]).tolist()


@given(st.integers(0, 4), seeds, st.lists(st.integers(0, 5), max_size=4))
def test_order_depends_on_seed_and_epoch_not_on_history(buckets: int, seed: int, before: list[int]) -> None:
    used = Loader(table(64), seed, 8, "f", buckets)
    for epoch in before:
        order(used, epoch)
    fresh = Loader(table(64), seed, 8, "f", buckets)
    assert order(used, 2) == order(fresh, 2)
    assert order(fresh, 2) != order(fresh, 3)
    assert order(fresh, 2) != order(Loader(table(64), seed + 1, 8, "f", buckets), 2)


def test_without_shuffling_rows_come_in_their_order() -> None:
    assert order(Loader(table(30), 5, 7, shuffle=False), 4) == list(range(30))


@given(seeds, st.integers(4, 16))
def test_buckets_bring_rows_of_like_length_together(seed: int, buckets: int) -> None:
    def spread(bucket_batches: int) -> float:
        loader = Loader(table(512, seed), seed, 16, "f", bucket_batches)
        return float(
            np.mean(
                [
                    np.ptp(loader.table.column("length").to_numpy()[loader.batch_rows(Cursor(0, b))])
                    for b in range(loader.batches_per_epoch)
                ]
            )
        )

    assert spread(buckets) < 0.6 * spread(0)


@given(loaders(), st.integers(0, 4), st.integers(0, 40))
def test_advance_is_next_repeated(loader: Loader, epoch: int, batches: int) -> None:
    stepped = Cursor(epoch, loader.batches_per_epoch - 1)
    jumped = loader.advance(stepped, batches)
    for _ in range(batches):
        stepped = loader.next(stepped)
    assert stepped == jumped
    assert 0 <= jumped.batch < loader.batches_per_epoch


def test_resume_returns_the_cursor() -> None:
    saved = {"fingerprint": "f", "global_batch_size": 8, "cursor": Cursor(3, 2).as_dict()}
    assert check_resume(saved, Loader(table(64), 0, 8, "f")) == Cursor(3, 2)


@pytest.mark.parametrize(("fingerprint", "size", "named"), [("g", 8, "fingerprint"), ("f", 4, "global_batch_size")])
def test_resume_refuses_other_data_and_other_batches(fingerprint: str, size: int, named: str) -> None:
    saved = {"fingerprint": "f", "global_batch_size": 8, "cursor": Cursor(3, 2).as_dict()}
    with pytest.raises(Refused, match=named) as caught:
        check_resume(saved, Loader(table(64), 0, size, fingerprint))
    assert caught.value.field == "resume"


@given(st.integers(1, 50), st.integers(1, 60), seeds, st.integers(0, 3))
def test_a_limit_is_a_fixed_choice(rows: int, limit: int, seed: int, buckets: int) -> None:
    loader = Loader(table(rows), seed, 7, "f", buckets, limit=limit)
    chosen = sorted(order(loader, 0))
    assert len(set(chosen)) == len(chosen) == min(rows, limit)
    assert sorted(order(loader, 5)) == chosen


@given(seeds, st.integers(0, 4), numbers, numbers, st.integers(0, 2))
def test_what_is_read_does_not_depend_on_what_was_read_before(
    seed: int, buckets: int, count: int, size: int, epoch: int
) -> None:
    """Reading goes ahead, several batches at a time: jumps between cursors and coordinates must not show."""
    mixture = [Source(31, 0.5, "a"), Source(64, 2.0, "b"), Source(5, 1.0, "c")]
    used = Loader(table(100, seed), seed, 8, "f", buckets, sources=mixture)
    random = np.random.default_rng(seed)
    for _ in range(6):
        cursor = Cursor(epoch + int(random.integers(2)), int(random.integers(used.batches_per_epoch)))
        coordinate = Coordinate(int(random.integers(count)), count)
        fresh = Loader(table(100, seed), seed, 8, "f", buckets, sources=mixture)
        for got, expected in zip(
            used.read(cursor, coordinate, size), fresh.read(cursor, coordinate, size), strict=True
        ):
            assert got.table.equals(expected.table)
            assert got.sample_ids.tolist() == expected.sample_ids.tolist()
            assert got.row_weight_B.tolist() == expected.row_weight_B.tolist()
