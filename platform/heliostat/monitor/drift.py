"""Whether two samples of rows come from one distribution, column by column and as embeddings: how much they differ, and
whether chance would do that. Both are asked, since with many rows every difference is more than chance, and with few
rows chance alone looks like much.

Shapes: N rows of the reference, M served ones, D embedding dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from heliostat.recipe import Drift

BINS = 10
EMBEDDED_ROWS = 500
"""Of each side are enough for the MMD, whose kernel matrix grows with their square."""
EXPECTED = 5
"""Categories of which fewer rows are expected on a side are taken together: below it the chi-squared distribution is a
poor approximation (Cochran 1954)."""
EMBEDDINGS = "embeddings"
CHUNK = 512
"""Permutations that are computed at once."""


@dataclass(frozen=True)
class Observed:
    """What is compared of some rows."""

    columns: dict[str, np.ndarray]
    """By name: numbers (float64, NaN where missing) or categories (str)."""
    embeddings: np.ndarray | None = None
    """(N, D)"""


@dataclass(frozen=True)
class Finding:
    """Of one column, or of the embeddings."""

    name: str
    test: str
    p: float
    """The chance of a difference like this, or a larger one, between samples of one distribution."""
    distance: float
    """Numbers: the largest difference of the cumulative distributions (Kolmogorov–Smirnov). Categories: half the sum of
    the differences of shares (total variation). Embeddings: the squared MMD."""
    psi: float | None
    """None for embeddings."""
    adjusted_p: float = 1.0
    """By Holm's method, over all findings of a comparison."""
    drifted: bool = False


def compare(reference: Observed, served: Observed, settings: Drift, seed: int = 0) -> list[Finding]:
    """All that both sides have; what drifted is first, the larger before the smaller. A column with missing values
    counts as two: its values, and whether it has one. `seed`: of the permutations."""
    found: list[Finding] = []
    for name in (name for name in reference.columns if name in served.columns):
        sides = reference.columns[name], served.columns[name]
        if sides[0].dtype.kind != "f":
            found.append(_categories(name, *sides))
            continue
        missing = [np.isnan(side) for side in sides]
        values = [side[~none] for side, none in zip(sides, missing, strict=True)]
        if all(len(each) for each in values):
            found.append(_numbers(name, *values))
        if any(none.any() for none in missing):
            found.append(_categories(f"{name} (missing)", *(np.where(none, "missing", "there") for none in missing)))
    if reference.embeddings is not None and served.embeddings is not None:
        # So many that the smallest p there can be is small enough for Holm's method.
        permutations = int(np.ceil(2 * (len(found) + 1) / settings.false_alarms))
        random = np.random.default_rng(seed)
        distance, p = mmd_test(reference.embeddings, served.embeddings, permutations, random)
        found.append(Finding(EMBEDDINGS, "MMD", p, distance, None))
    judged = [
        _judged(finding, adjusted, settings)
        for finding, adjusted in zip(found, holm([finding.p for finding in found]), strict=True)
    ]
    return sorted(judged, key=lambda each: (not each.drifted, -(each.psi or 0.0), each.name))


def _judged(finding: Finding, adjusted_p: float, settings: Drift) -> Finding:
    matters = finding.distance >= settings.mmd if finding.psi is None else finding.psi >= settings.psi
    drifted = bool(matters and adjusted_p <= settings.false_alarms)
    return replace(finding, adjusted_p=adjusted_p, drifted=drifted)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that may each be compared with the chance of any false rejection among all of them (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


# -- numbers


def _numbers(name: str, reference: np.ndarray, served: np.ndarray) -> Finding:
    found: Any = stats.ks_2samp(reference, served)
    return Finding(name, "KS", float(found.pvalue), float(found.statistic), psi(reference, served))


def psi(reference: np.ndarray, served: np.ndarray, bins: int = BINS) -> float:
    """The population stability index of numbers without missing ones: the symmetric Kullback-Leibler divergence of two
    histograms, whose bins hold equal shares of the reference. Of N and M rows of one distribution it is about
    (bins - 1) (1/N + 1/M) on average (Yurdakul & Naranjo 2020, Journal of Risk Model Validation)."""
    edges = np.quantile(reference, np.arange(1, bins) / bins, method="inverted_cdf")
    # A value that more than a bin's share of rows have is a bin of its own.
    repeated = edges[1:][edges[1:] == edges[:-1]]
    edges = np.unique(np.concatenate([edges, np.nextafter(repeated, np.inf)]))
    places = (np.searchsorted(edges, side, "right") for side in (reference, served))
    return _divergence(*(np.bincount(place, minlength=len(edges) + 1) for place in places))


def _divergence(reference: np.ndarray, served: np.ndarray) -> float:
    """Of counts by bin. Half a row is added to each bin, so that one that is empty on one side weighs no more than the
    rows that there are can tell."""
    filled = (reference + served) > 0
    shares = [(side[filled] + 0.5) / (side[filled] + 0.5).sum() for side in (reference, served)]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())


# -- categories


def _categories(name: str, reference: np.ndarray, served: np.ndarray) -> Finding:
    names, codes = np.unique(np.concatenate([reference, served]), return_inverse=True)
    table = np.stack([np.bincount(side, minlength=len(names)) for side in np.split(codes, [len(reference)])])
    shares = table / table.sum(1, keepdims=True)
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return Finding(name, *_homogeneity(table), distance, _divergence(*table))


def _homogeneity(table: np.ndarray) -> tuple[str, float]:
    """The test and its p-value. `table`: (2, categories) counts."""
    expected = table.sum(0) * (table.sum(1) / table.sum())[:, None]
    rare = expected.min(0) < EXPECTED
    if rare.sum() > 1:
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    if table.shape[1] == 1:
        return "chi-squared", 1.0
    if table.shape[1] == 2:
        return "Fisher", float(stats.fisher_exact(table)[1])
    return "chi-squared", float(stats.chi2_contingency(table)[1])


# -- embeddings


def mmd_test(x_ND: np.ndarray, y_MD: np.ndarray, permutations: int, random: np.random.Generator) -> tuple[float, float]:
    """The squared maximum mean discrepancy of a Gaussian kernel, unbiased (so it may be below zero), and its p-value by
    permutation (Gretton et al. 2012, jmlr.org/papers/v13/gretton12a.html, lemma 6). The kernel's width is the median
    distance between all rows (section 8)."""
    distances = pdist(np.concatenate([x_ND, y_MD]).astype(np.float64))
    width = float(np.median(distances)) or float(distances.mean()) or 1.0
    kernel = squareform(np.exp(-((distances / width) ** 2) / 2))  # its diagonal is left 0: no row is paired with itself
    first = np.zeros((len(kernel), 1))
    first[: len(x_ND)] = 1.0
    (observed,) = _mmd2(kernel, first)
    as_large = 0
    for start in range(0, permutations, CHUNK):
        drawn = np.repeat(first, min(CHUNK, permutations - start), 1)
        as_large += int((_mmd2(kernel, random.permuted(drawn, axis=0)) >= observed - 1e-12).sum())
    return float(observed), (1 + as_large) / (1 + permutations)


def _mmd2(kernel: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of each of P ways to part the rows. `kernel`: their matrix, 0 on the diagonal; `first`: (rows, P), 1 for those of
    the first part."""
    rows, n = len(kernel), first[:, 0].sum()
    m = rows - n
    within = (first * (kernel @ first)).sum(0)
    touching = kernel.sum(0) @ first
    between = touching - within
    rest = kernel.sum() - 2 * touching + within
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / (n * m)
