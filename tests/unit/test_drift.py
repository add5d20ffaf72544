"""How samples are compared: effects against closed forms, p-values against chance, and the page."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from heliostat.monitor.drift import EMBEDDINGS, Finding, Observed, compare, holm, mmd_test, psi
from heliostat.monitor.drift_report import render
from heliostat.recipe import Drift
from tests import needs
from tests.browser import opened

SHIFT = 0.4


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def of(findings: list[Finding], name: str) -> Finding:
    (found,) = (each for each in findings if each.name == name)
    return found


# -- the population stability index


def test_psi_of_shifted_normals_is_the_square_of_their_shift(random: np.random.Generator) -> None:
    """The symmetric divergence of two normal distributions of equal width, which fine bins come close to."""
    rows = 200_000
    found = psi(random.normal(size=rows), random.normal(SHIFT, size=rows), bins=200)
    assert found == pytest.approx(SHIFT**2, rel=0.05)


@pytest.mark.parametrize("bins", [5, 10])
def test_psi_without_drift_is_what_theory_expects(bins: int, random: np.random.Generator) -> None:
    """(bins - 1) (1/N + 1/M) on average: Yurdakul & Naranjo 2020."""
    n, m = 500, 1000
    found = [psi(random.normal(size=n), random.normal(size=m), bins) for _ in range(400)]
    assert np.mean(found) == pytest.approx((bins - 1) * (1 / n + 1 / m), rel=0.1)


def test_psi_by_hand() -> None:
    """A feature of two values: shares of 1/4 and 3/4 become 3/4 and 1/4 (with half a row more in each)."""
    low, high = 100.5 / 401, 300.5 / 401
    expected = 2 * (high - low) * math.log(high / low)
    few, many = np.repeat([0.0, 1.0], [300, 100]), np.repeat([0.0, 1.0], [100, 300])
    assert psi(few, many) == pytest.approx(expected)


@pytest.mark.parametrize("moved", [-1e-9, 1e-9])
def test_a_constant_that_changes_is_seen_in_either_direction(moved: float) -> None:
    constant = np.full(200, 3.5)
    assert psi(constant, constant) == 0.0
    assert psi(constant, constant + moved) > 5


# -- the maximum mean discrepancy


def test_mmd_is_the_estimator_of_the_paper(random: np.random.Generator) -> None:
    """Term by term (Gretton et al. 2012, equation 3)."""
    x, y = random.normal(size=(7, 3)), random.normal(1.0, size=(5, 3))
    rows = [*x, *y]
    width = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)])

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-(np.linalg.norm(a - b) ** 2) / (2 * width**2))

    within = [sum(kernel(a, b) for a, b in itertools.permutations(side, 2)) for side in (x, y)]
    between = sum(kernel(a, b) for a in x for b in y)
    expected = within[0] / (7 * 6) + within[1] / (5 * 4) - 2 * between / (7 * 5)
    assert mmd_test(x, y, 1, random)[0] == pytest.approx(expected)


def test_mmd_of_shifted_normals(random: np.random.Generator) -> None:
    """The kernel's means are known in closed form, and the estimator is unbiased."""
    dims, rows, found, expected = 6, 200, [], []
    for _ in range(40):
        x, y = random.normal(size=(rows, dims)), random.normal(SHIFT, size=(rows, dims))
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations([*x[:100], *y[:100]], 2)]
        width2 = np.median(distances) ** 2
        scale = (width2 / (width2 + 2)) ** (dims / 2)
        expected.append(2 * scale * (1 - math.exp(-dims * SHIFT**2 / (2 * (width2 + 2)))))
        found.append(mmd_test(x, y, 1, random)[0])
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=4 * np.std(found) / math.sqrt(len(found)))


def test_embeddings_that_are_all_the_same(random: np.random.Generator) -> None:
    same = np.ones((50, 4))
    assert mmd_test(same, same, 99, random) == (pytest.approx(0, abs=1e-12), 1.0)
    # Apart by the median distance.
    assert mmd_test(same, same + 1, 99, random) == (pytest.approx(2 - 2 * math.exp(-0.5)), 0.01)


# -- p-values


def test_holm() -> None:
    """Step by step, and what R's `p.adjust(…, "holm")` gives."""
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.04]) == pytest.approx([0.5, 0.003, 0.08])
    assert holm([]) == []


def test_kolmogorov_smirnov(random: np.random.Generator) -> None:
    """The largest difference of the empirical distributions, and its limit distribution."""
    x, y = random.normal(size=3000), random.normal(0.1, size=2000)
    (found,) = compare(Observed({"x": x}), Observed({"x": y}), Drift())
    at = np.concatenate([x, y])
    largest = np.abs((x[:, None] <= at).mean(0) - (y[:, None] <= at).mean(0)).max()
    assert found.distance == pytest.approx(largest)
    assert found.p == pytest.approx(stats.kstwobign.sf(largest * math.sqrt(3000 * 2000 / 5000)), rel=0.1)


def test_two_categories_are_counted_exactly() -> None:
    """Fisher's test: the hypergeometric chances of all tables no likelier than this one."""
    few, many = np.repeat(["a", "b"], [95, 5]), np.repeat(["a", "b"], [45, 15])
    (found,) = compare(Observed({"x": few}), Observed({"x": many}), Drift())
    chances = stats.hypergeom(160, 20, 60).pmf(np.arange(21))
    assert found.p == pytest.approx(chances[chances <= chances[15] * (1 + 1e-9)].sum())
    assert (found.test, found.distance) == ("Fisher", pytest.approx(0.2))


def test_more_categories_those_that_are_rare_together(random: np.random.Generator) -> None:
    names = np.array(["a", "b", "c", "rare", "rarer"])
    counts = np.array([[60, 30, 28, 1, 1], [50, 35, 25, 0, 0]])
    sides = [Observed({"x": np.repeat(names, row)}) for row in counts]
    (found,) = compare(*sides, Drift())
    table = np.column_stack([counts[:, :3], counts[:, 3:].sum(1)])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert found.p == pytest.approx(stats.chi2(3).sf(((table - expected) ** 2 / expected).sum()))


def rows(random: np.random.Generator, count: int, shift: float = 0.0) -> Observed:
    numbers = random.normal(size=(count, 3))
    numbers[random.random(count) < 0.1, 1] = np.nan
    labels = random.choice(["a", "b", "c"], p=[0.7, 0.25, 0.05], size=count)
    columns = {"moving": numbers[:, 0] + shift, "missing": numbers[:, 1], "whole": np.floor(2 * numbers[:, 2])}
    return Observed(columns | {"label": labels}, random.normal(size=(count, 4)))


def test_false_alarms_are_as_rare_as_they_are_asked_to_be(random: np.random.Generator) -> None:
    """Of all six features together, where the least effect would count."""
    settings, repeats = Drift(false_alarms=0.1, psi=1e-9, mmd=1e-9), 150
    alarms = 0
    for seed in range(repeats):
        findings = compare(rows(random, 60), rows(random, 80), settings, seed)
        assert len(findings) == 6
        alarms += any(finding.drifted for finding in findings)
    assert alarms <= stats.binom(repeats, 0.1).ppf(0.999)


def test_what_drifts_is_found_and_named(random: np.random.Generator) -> None:
    found = [compare(rows(random, 150), rows(random, 150, 0.9), Drift(), seed) for seed in range(5)]
    assert [[each.name for each in findings if each.drifted] for findings in found] == [["moving"]] * 5
    assert all(findings[0].name == "moving" for findings in found)


def test_what_is_certain_but_small_is_no_drift(random: np.random.Generator) -> None:
    x, y = random.normal(size=20_000), random.normal(0.1, size=20_000)
    (found,) = compare(Observed({"x": x}), Observed({"x": y}), Drift())
    assert found.adjusted_p < 1e-6
    assert not found.drifted


def test_what_is_large_but_chance_is_no_drift(random: np.random.Generator) -> None:
    x, y = random.normal(size=15), random.normal(0.4, size=15)
    (found,) = compare(Observed({"x": x}), Observed({"x": y}), Drift())
    assert found.psi is not None
    assert found.psi > 0.2
    assert not found.drifted


@pytest.mark.parametrize("now", [0.6, 1.0])
def test_values_that_go_missing(now: float, random: np.random.Generator) -> None:
    before, after = random.normal(size=300), random.normal(size=300)
    after[: round(300 * now)] = np.nan
    findings = compare(Observed({"x": before}), Observed({"x": after}), Drift())
    assert of(findings, "x (missing)").drifted
    assert [each.name for each in findings if each.drifted] == ["x (missing)"]


def test_a_label_that_was_never_predicted_before() -> None:
    before, after = np.repeat(["a", "b"], 100), np.repeat(["a", "b", "c"], [80, 80, 40])
    (found,) = compare(Observed({"x": before}), Observed({"x": after}), Drift())
    assert found.drifted
    assert found.distance == pytest.approx(0.2)


def test_embeddings_that_move_where_no_column_does(random: np.random.Generator) -> None:
    """Each dim by itself stays as it was; only together they differ."""
    x, together = random.normal(size=(300, 8)), random.normal(size=(300, 1))
    y = 0.1 * random.normal(size=(300, 8)) + together
    sides = [Observed({str(dim): each[:, dim] for dim in range(8)}, each) for each in (x, y)]
    findings = compare(*sides, Drift())
    assert [each.name for each in findings if each.drifted] == [EMBEDDINGS]


# -- the page


@needs.chromium
def test_a_browser_shows_both_sides(random: np.random.Generator, tmp_path: Path) -> None:
    sides = [rows(random, 100), rows(random, 120, 1.0)]
    sides = [Observed({"<b>": each.columns["moving"], **each.columns}, each.embeddings) for each in sides]
    findings = compare(*sides, Drift())
    page = tmp_path / "report.html"
    page.write_text(render("Drift of <m>", "it has drifted", findings, *sides))
    document, console = opened(page)
    assert console == ""
    assert "<h1>Drift of &lt;m&gt;</h1>" in document
    drawn = re.findall(r"<h2>(.*?)</h2>", document)
    assert set(drawn) == {"&lt;b&gt;", "moving", "missing", "whole", "label", "embeddings"}
    assert len(re.findall(r'<svg class="main-svg"[^>]*>', document)) >= len(drawn)
    assert "Not drawn" not in document
    assert document.count("<tr") == 1 + len(findings)
    assert not re.search(r"<(script|img|link)[^>]* (src|href)=", document), "it loads nothing"
