"""The order of an epoch: which row stands at which position, a pure function of (seed, epoch, sources). Any position
is found without the others, so nothing that grows with the data is held.

Shapes: P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from heliostat.recipe import Refused

WINDOW = 1024
"""Positions within which sources are mixed at random; over whole windows each source keeps its share."""
ROUNDS = 12
GOLDEN = 0x9E3779B97F4A7C15
LIMIT, PATTERN, BATCHES = 1 << 32, (1 << 32) + 1, (1 << 32) + 2
"""What a key is for, where it is not the order of a source of that number."""


@dataclass(frozen=True)
class Source:
    """Consecutive rows of a table, and their share of an epoch relative to other sources."""

    rows: int
    weight: float = 1.0
    name: str = ""


class Order:
    """An epoch has as many positions as there are rows (or `limit`). Each source has its share of them and fills it
    from shuffled epochs of its own, which go on from one epoch of the whole to the next: at its share's k-th position
    of epoch e it is at row (e × share + k) of them."""

    def __init__(self, sources: Sequence[Source], seed: int, limit: int | None = None) -> None:
        """`limit`: a fixed random choice of so many rows, of each source in proportion to its rows."""
        self.seed = seed
        self.stored = [source.rows for source in sources]
        self.counts = self.stored
        if limit is not None and limit < sum(self.stored):
            self.counts = largest_remainder([Fraction(rows) for rows in self.stored], limit)
        self.total = sum(self.counts)
        self.shares = largest_remainder([Fraction(source.weight) for source in sources], self.total)
        for source, count, share in zip(sources, self.counts, self.shares, strict=True):
            if count == 0 or share == 0:
                raise Refused(
                    "data.limit" if count == 0 else "data.mixture",
                    f"of the {self.total} rows of an epoch, the source {source.name!r} would give none",
                    "raise its weight or the limit, or leave it out",
                )

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The row numbers at positions `start` to `stop` of an epoch, in its order."""
        first = start // WINDOW * WINDOW if len(self.shares) > 1 else start
        source_P = self._sources(epoch, first, stop)
        row_P = np.empty(len(source_P), np.int64)
        for source, given in enumerate(self._before(first)):
            mine = np.flatnonzero(source_P == source)
            if len(mine):
                row_P[mine] = self._source_rows(source, np.arange(len(mine)) + (given + epoch * self.shares[source]))
        return row_P[start - first : stop - first]

    def _sources(self, epoch: int, first: int, stop: int) -> np.ndarray:
        """The source of each position from `first`, where a window starts, to `stop` and the end of its window."""
        if len(self.shares) == 1:
            return np.zeros(stop - first, np.int64)
        ends = list(range(first, stop, WINDOW))
        ends.append(min(ends[-1] + WINDOW, self.total))
        draw_P = keys(self.seed, PATTERN, np.arange(first, ends[-1]), epoch)
        before_WS = np.array([self._before(end) for end in ends])
        # Where in its window, unshuffled, each source but the first begins.
        begins_WS = np.cumsum(before_WS[1:] - before_WS[:-1], axis=1)[:, :-1]
        whole = (ends[-1] - first) // WINDOW
        windows = []
        for width, draws, begins in (
            (WINDOW, draw_P[: whole * WINDOW], begins_WS[:whole]),
            (len(draw_P) % WINDOW, draw_P[whole * WINDOW :], begins_WS[whole:]),  # the last of the epoch
        ):
            if len(draws):
                # No two draws are equal: `mix` is a permutation.
                shuffled = np.argsort(draws.reshape(-1, width), axis=1)
                windows.append(sum(shuffled >= begin[:, None] for begin in begins.T).reshape(-1))
        return np.concatenate(windows)

    def _source_rows(self, source: int, number_P: np.ndarray) -> np.ndarray:
        """The rows that a source gives after so many others: consecutive numbers, counted over all epochs."""
        stored, count = self.stored[source], self.counts[source]
        own_epoch = number_P // count if number_P[0] // count < number_P[-1] // count else number_P[:1] // count
        row_P = permute(number_P - own_epoch * count, count, keys(self.seed, source, own_epoch))
        if count < stored:
            row_P = permute(row_P, stored, keys(self.seed, LIMIT, np.array([source])))
        return row_P + sum(self.stored[:source])

    def _before(self, position: int) -> list[int]:
        """How many of an epoch's first positions belong to each source: the first source is spread evenly over all,
        the second over what the first leaves, and so on."""
        found, left, total = [], position, self.total
        for share in self.shares:
            found.append(left * share // total)
            left, total = left - found[-1], total - share
        return found


def largest_remainder(weights: list[Fraction], total: int) -> list[int]:
    """`total` in whole parts proportional to the weights; what rounding down leaves goes to the largest remainders."""
    whole = sum(weights)
    exact = [weight * total / whole for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def keys(seed: int, purpose: int, number: np.ndarray | int, epoch: int = 0) -> np.ndarray:
    """A key (uint64) for each number, of this seed, purpose and epoch."""
    start = np.array([(seed * GOLDEN + purpose) % (1 << 64)], np.uint64)
    return mix(mix(mix(start) + np.uint64(epoch)) + np.asarray(number).astype(np.uint64))


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014), on uint64."""
    x = x + np.uint64(GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where pseudo-random permutations of range(`size`) take each index. `key` (uint64): which permutation, one for
    each index or one for all.

    A Feistel network over the next power of two, applied again to what falls outside (cycle walking): Black & Rogaway
    2002, "Ciphers with Arbitrary Finite Domains". Its round functions are drawn from a strongly universal family,
    multiply-add-shift: Dietzfelbinger 1996, for which words of twice a half's bits are enough. (Words of 32 bits take a
    third of the time of 64.)"""
    bits = max(2, (size - 1).bit_length())
    rounds = mix(key + mix(np.arange(2 * ROUNDS, dtype=np.uint64))[:, None])
    word: type[np.uint32] | type[np.uint64] = np.uint32 if bits <= 32 else np.uint64
    if word is np.uint32:
        rounds = rounds >> np.uint64(32)
    rounds, last = rounds.astype(word), word(max(size - 1, 0))
    x = _feistel(index.astype(word), bits, rounds)
    outside = np.flatnonzero(x > last)
    while len(outside):
        x[outside] = _feistel(x[outside], bits, rounds if len(key) == 1 else rounds[:, outside])
        outside = outside[x[outside] > last]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, rounds: np.ndarray) -> np.ndarray:
    """A permutation of range(2^bits) by an even number of rounds, of two keys each; with odd bits, the halves differ by
    one. `x`, `rounds`: unsigned, of at least 2 × `low` bits."""
    word, word_bits = x.dtype.type, x.dtype.itemsize * 8
    low, high = (bits + 1) // 2, bits // 2
    left, right = x >> word(low), x & word((1 << low) - 1)
    for number, (multiplier, addend) in enumerate(zip(rounds[::2], rounds[1::2], strict=True)):
        mixed = right * multiplier
        mixed += addend
        # The left half is `high` bits wide before even rounds, `low` before odd ones; the product's highest bits are
        # the random ones.
        mixed >>= word(word_bits - (low if number % 2 else high))
        mixed ^= left
        left, right = right, mixed
    return (left << word(low)) | right
