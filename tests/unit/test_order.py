"""The order of an epoch: permutations that look random, and sources that each go through their rows exactly."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from heliostat.data.order import WINDOW, Order, Source, keys, largest_remainder, permute
from heliostat.recipe import Refused

seeds = st.integers(0, 2**31 - 1)


@given(st.integers(1, 3000), seeds, st.integers(0, 1000))
def test_permute_is_a_permutation(size: int, seed: int, number: int) -> None:
    taken = permute(np.arange(size), size, keys(seed, 0, number))
    assert sorted(taken.tolist()) == list(range(size))


def test_permute_takes_a_key_for_each_index_and_any_size() -> None:
    size, index = 10**14 + 7, np.arange(50) * 10**12
    key = keys(3, 0, np.arange(50))
    together = permute(index, size, key)
    assert together.tolist() == [int(permute(index[[i]], size, key[[i]])[0]) for i in range(50)]
    assert together.min() >= 0
    assert together.max() < size
    assert len(set(together.tolist())) == 50


@pytest.mark.parametrize("size", [2, 3, 16, 37, 64])
def test_every_row_is_equally_likely_everywhere(size: int) -> None:
    """Chi-square over many epochs of how often a row stood at a position, and of which row followed which."""
    epochs = 40_000
    order = permute(np.tile(np.arange(size), epochs), size, np.repeat(keys(7, 0, np.arange(epochs)), size))
    order = order.reshape(epochs, size)
    assert (np.sort(order, axis=1) == np.arange(size)).all()
    at = np.stack([np.bincount(order[:, position], minlength=size) for position in range(size)])
    statistic = float(((at - epochs / size) ** 2 / (epochs / size)).sum())
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-3
    if size > 3:
        step = (order[:, 1:] - order[:, :-1]) % size
        follow = np.bincount(step.reshape(-1), minlength=size)[1:]
        assert stats.chisquare(follow).pvalue > 1e-3


def test_epochs_show_no_common_pattern() -> None:
    size = 20_000
    orders = [permute(np.arange(size), size, keys(11, 0, epoch)) for epoch in range(4)]
    for one in range(4):
        assert abs(np.corrcoef(np.arange(size), orders[one])[0, 1]) < 4 / math.sqrt(size)
        for other in range(one):
            assert abs(np.corrcoef(orders[one], orders[other])[0, 1]) < 4 / math.sqrt(size)
            distance = (orders[one] - orders[other]) % size
            assert stats.chisquare(np.bincount(distance * 50 // size, minlength=50)).pvalue > 1e-3
            # As many rows stay where they were as chance lets: a Poisson number of mean 1.
            assert np.count_nonzero(orders[one] == orders[other]) < 8


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 10**6))
def test_largest_remainder(weights: list[float], total: int) -> None:
    fractions = [Fraction(weight) for weight in weights]
    parts = largest_remainder(fractions, total)
    assert sum(parts) == total
    assert all(abs(part - weight * total / sum(fractions)) < 1 for part, weight in zip(parts, fractions, strict=True))


@st.composite
def mixtures(draw: st.DrawFn) -> list[Source]:
    rows = draw(st.lists(st.integers(20, 1500), min_size=1, max_size=4))
    return [Source(count, draw(st.floats(0.2, 5.0)), str(i)) for i, count in enumerate(rows)]


@given(mixtures(), seeds, st.integers(1, 3))
def test_sources_keep_their_share_and_go_through_their_own_epochs(
    sources: list[Source], seed: int, epochs: int
) -> None:
    order = Order(sources, seed)
    assert order.total == sum(source.rows for source in sources)
    whole = np.concatenate([order.rows(epoch, 0, order.total) for epoch in range(epochs)])
    weights = sum(source.weight for source in sources)
    first = 0
    for source in sources:
        mine = whole[(whole >= first) & (whole < first + source.rows)] - first
        assert abs(len(mine) - epochs * order.total * source.weight / weights) < epochs
        for start in range(0, len(mine), source.rows):
            own_epoch = mine[start : start + source.rows].tolist()
            assert len(set(own_epoch)) == len(own_epoch)
            assert max(own_epoch) < source.rows
        inside = np.cumsum((whole >= first) & (whole < first + source.rows))
        ends = np.arange(WINDOW, order.total, WINDOW)
        assert all(abs(inside[end - 1] - end * source.weight / weights) < len(sources) + 1 for end in ends.tolist())
        first += source.rows


@given(mixtures(), seeds, st.data())
def test_a_part_is_found_without_the_rest(sources: list[Source], seed: int, data: st.DataObject) -> None:
    order, epoch = Order(sources, seed), data.draw(st.integers(0, 5))
    whole = order.rows(epoch, 0, order.total)
    start = data.draw(st.integers(0, order.total - 1))
    stop = data.draw(st.integers(start + 1, order.total))
    assert Order(sources, seed).rows(epoch, start, stop).tolist() == whole[start:stop].tolist()


def test_sources_are_interleaved_at_random() -> None:
    """Which source is where differs between epochs, and no stretch is of one source alone."""
    order = Order([Source(5000, 2.0), Source(5000, 1.0), Source(5000, 1.0)], 3)
    one, two = (order.rows(epoch, 0, order.total) // 5000 for epoch in (0, 1))
    assert 0.3 < np.mean(one == two) < 0.45  # 1/4 + 1/16 + 1/16 by chance
    assert max(len(list(run)) for run in np.split(one, np.flatnonzero(np.diff(one)) + 1)) < 30


@given(mixtures(), seeds, st.integers(300, 6000))
def test_a_limit_is_a_fixed_choice_from_each_source(sources: list[Source], seed: int, limit: int) -> None:
    even = [Source(source.rows) for source in sources]
    order = Order([Source(s.rows, o.rows) for s, o in zip(even, sources, strict=True)], seed, limit)
    assert order.total == min(limit, sum(source.rows for source in sources))
    visited = [Counter(order.rows(epoch, 0, order.total).tolist()) for epoch in range(3)]
    # With weights proportional to rows each epoch is one of every source.
    assert len(visited[0]) == order.total
    assert visited[0] == visited[1] == visited[2]


def test_a_source_that_would_give_nothing_is_refused() -> None:
    with pytest.raises(Refused, match="'small'") as caught:
        Order([Source(100, 1.0, "large"), Source(100, 1e-4, "small")], 0)
    assert caught.value.field == "data.mixture"
    with pytest.raises(Refused) as caught:
        Order([Source(1000, 1.0, "large"), Source(10, 1.0, "small")], 0, limit=5)
    assert caught.value.field == "data.limit"
