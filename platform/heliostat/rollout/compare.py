"""Two versions that answer the same traffic: which of them fails more, answers later, or answers worse.

Everything here may be looked at after every answer: what is said to happen with a chance of at most alpha does so over
the whole of a rollout, however often it is asked (Ville's inequality; Ramdas et al. 2023, "Game-Theoretic Statistics
and Safe Anytime-Valid Inference", Statistical Science 38(4)).

Harm is shown by betting. Where the router drew lots, an answer's outcome is bet to tell whose it is: under "the
candidate's outcomes are no worse", that game is lost or even on average, so wealth above 1 / alpha is evidence (Duan,
Ramdas & Wasserman 2022, "Interactive Rank Testing by Betting", arXiv:2009.05892; for errors it is the test of Lindon &
Malek 2022, "Anytime-Valid Inference for Multinomial Count Data", arXiv:2011.03567). It rests on the router's lots
alone: traffic may change, outcomes may depend on each other, and their tails may be as heavy as they like. Where both
versions answered the same request, the bet is on the difference (Waudby-Smith & Ramdas 2024, "Estimating Means of
Bounded Random Variables by Betting", JRSS-B 86(1)).

That there is no harm that matters is shown by time-uniform confidence intervals of each version's mean or median.

With the recipe's defaults, a candidate with 2 percentage points more errors (3% against 1%), or with 20% more latency
(log-normal, sigma 0.5), is rolled back within 8,000 requests of a canary in at least 95 of 100 rollouts
(tests/unit/test_rollout.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from heliostat.recipe import Rollout

Lots = Literal["drawn", "pairs", "in_turn"]
"""How requests came to the versions: the router drew one for each; both got each; or one after the other had."""
Verdict = Literal["harm", "harmless", "open"]
STAKES = np.geomspace(1 / 16, 4, 7)
"""How strongly outcomes are bet to tell the version: all at once, since the right one is not known."""
ENOUGH = 20
"""Answers that say what is usual."""
SHORTEST_S, BIN, BINS = 1e-6, 0.002, 13_000
"""Latencies are kept as counts in bins of a fifth of a percent, up to 2 days."""


@dataclass(frozen=True)
class Answers:
    """Answers to N requests, each by one version; arrays of length N."""

    candidate: np.ndarray
    """Whether it was the candidate's."""
    share: np.ndarray
    """The chance that it would be, when the lot was drawn."""
    failed: np.ndarray
    latency_s: np.ndarray
    """NaN: it failed."""
    score: np.ndarray
    """How good it was, from 0 to 1. NaN: nobody knows."""
    key: np.ndarray
    """A hash of what keeps a user with one version, 0 where each request has a lot of its own."""


@dataclass(frozen=True)
class Pairs:
    """What stable and candidate answered to the same N requests: arrays (N, 2), as in Answers."""

    failed: np.ndarray
    latency_s: np.ndarray
    score: np.ndarray


def mean_bounds(total: float, count: int, alpha: float) -> tuple[float, float]:
    """The mean of a stream of values from 0 to 1, by their sum and number: with a chance of at least 1 - alpha it is
    within these bounds at every time at once. Beta-binomial mixture (Robbins 1970; Howard et al. 2021, "Time-uniform,
    nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49(2))."""
    if count == 0:
        return 0.0, 1.0
    mixture = _log_beta(0.5 + total, 0.5 + count - total) - _log_beta(0.5, 0.5) + math.log(alpha)

    def excess(p: float) -> float:
        return mixture - total * math.log(p) - (count - total) * math.log1p(-p)

    least, most = 1e-12, 1 - 1e-12
    mean = min(max(total / count, least), most)
    low = brentq(excess, least, mean) if excess(least) > 0 else 0.0
    high = brentq(excess, mean, most) if excess(most) > 0 else 1.0
    return float(low), float(high)


class Bets:
    """Wealth from 1, at several stakes at once, that grows where the candidate's outcomes are worse."""

    def __init__(self) -> None:
        self.log_wealth = np.zeros(len(STAKES))

    @property
    def e_value(self) -> float:
        """At most 1 on average where the candidate is no worse, whenever it is looked at."""
        return math.exp(min(np.logaddexp.reduce(self.log_wealth) - math.log(len(STAKES)), 700.0))

    def on_lots(self, candidate: np.ndarray, share: np.ndarray, badness: np.ndarray) -> None:
        """One bet for each of N answers on whose it is. `badness` from -1 to 1, by a measure that was fixed before the
        answers came. Where the candidate's is stochastically no larger, a bet's mean is at most 1: the payoff
        exp(s b) / (1 - w + w exp(s b)) grows with b, and at equality the mean over the lot is 1."""
        odds = STAKES * badness[:, None]
        self.log_wealth += (candidate[:, None] * odds - np.log1p(share[:, None] * np.expm1(odds))).sum(0)

    def on_pairs(self, difference: np.ndarray) -> None:
        """One bet for each of N pairs: `difference` from -1 to 1, above 0 where the candidate is worse."""
        self.log_wealth += np.log1p(STAKES / (STAKES.max() + 1) * difference[:, None]).sum(0)


class Mean:
    """One version's mean of values from 0 to 1."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)

    @property
    def estimate(self) -> float | None:
        return self.total / self.count if self.count else None

    def bounds(self, alpha: float) -> tuple[float, float]:
        return mean_bounds(self.total, self.count, alpha)


class Latencies:
    """One version's latencies, in seconds."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, latency_s: np.ndarray) -> None:
        bins = np.log(np.maximum(latency_s, SHORTEST_S) / SHORTEST_S) / BIN
        np.add.at(self.counts, np.minimum(bins.astype(int), BINS - 1), 1)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def quantile(self, fraction: float) -> float | None:
        return self._at(fraction * self.count, 0.5) if self.count else None

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Of the median, at every time at once with a chance of at least 1 - alpha: the order statistics whose share of
        smaller values `mean_bounds` cannot tell from a half (Howard & Ramdas 2022, "Sequential estimation of quantiles
        with applications to A/B testing and best-arm identification", Bernoulli 28(3))."""
        count = self.count

        def excess(rank: float) -> float:
            mixture = _log_beta(0.5 + rank, 0.5 + count - rank) - _log_beta(0.5, 0.5)
            return mixture + count * math.log(2) + math.log(alpha)

        if count == 0 or excess(0.0) <= 0:
            return 0.0, math.inf
        rank = math.floor(brentq(excess, 0.0, count / 2))
        return self._at(rank, 0.0), self._at(count - rank + 1, 1.0)

    def _at(self, rank: float, within: float) -> float:
        """Of the rank-th smallest, the lower edge of its bin (within=0), the upper (1), or the middle (0.5)."""
        place = int(np.searchsorted(np.cumsum(self.counts), min(max(rank, 1), self.count)))
        return float(SHORTEST_S * math.exp(BIN * (place + within)))


class Scale:
    """What is usual among outcomes so far, to measure the next ones by."""

    def __init__(self) -> None:
        self.centre, self.spread, self.seen = 0.0, 0.0, 0

    def badness(self, values: np.ndarray) -> np.ndarray:
        """(N,) from -1 to 1; 0, on which nothing is bet, before anything is known."""
        if self.seen < ENOUGH:
            return np.zeros(len(values))
        return np.tanh((values - self.centre) / self.spread)

    def learn(self, values: np.ndarray) -> None:
        if not len(values):
            return
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        weight = len(values) / (self.seen + len(values))
        self.centre += weight * (float(middle) - self.centre)
        self.spread += weight * (max(float(high - low) / 2, 1e-3) - self.spread)
        self.seen += len(values)


class Comparison:
    """What is known of two versions. Answers come in batches, as they were made."""

    def __init__(self, settings: Rollout, lots: Lots, judged: bool) -> None:
        """`judged`: whether there will be scores."""
        self.settings, self.lots = settings, lots
        self.harms = {"error_rate": settings.error_increase, "latency": settings.latency_increase}
        if judged:
            self.harms["quality"] = settings.quality_drop
        self.bets = {name: Bets() for name in self.harms}
        self.scale, self.usual_errors, self.usual_quality = Scale(), Mean(), Mean()
        self.keys: set[int] = set()
        self.answers = [0, 0]
        """Of stable and of the candidate."""
        self.start()

    def start(self) -> None:
        """Forget what the intervals are made of: from here on the versions' shares of the traffic are others, and one
        that got more of a bad hour would look the worse for it. What was bet is kept."""
        self.errors, self.qualities = (Mean(), Mean()), (Mean(), Mean())
        self.latencies = Latencies(), Latencies()

    def add(self, answers: Answers | Pairs) -> None:
        if isinstance(answers, Pairs):
            self._add_pairs(answers)
        else:
            self._add_answers(answers)

    def harmful(self) -> bool:
        """Whether the candidate is worse, and not by less than matters. One that is no worse is called so with a chance
        of at most `false_roll_back` in the whole of the rollout."""
        return any(self._worse(name) and not self._harmless(name) for name in self.harms)

    def harmless(self) -> bool:
        """Whether it is worse by less than matters, if at all. One that does harm is called so with a chance of at most
        `false_roll_back`."""
        return all(self._harmless(name) for name in self.harms)

    def baseline_known(self) -> bool:
        """Whether the bounds of what stable alone does are closer than the increase that matters."""
        alpha = self.settings.false_roll_back / 2
        (low, high), (soon, late) = self.errors[0].bounds(alpha), self.latencies[0].bounds(alpha)
        return high - low < self.settings.error_increase and late < soon * (1 + self.settings.latency_increase)

    def evidence(self) -> dict[str, Any]:
        """What the verdict rests on, for people and the registry."""
        found: dict[str, Any] = {"answers": dict(zip(("stable", "candidate"), self.answers, strict=True))}
        for name, harm in self.harms.items():
            low, high = self._increase(name, self.settings.false_roll_back)
            stable, candidate = self._estimates(name)
            found[name] = {
                "stable": stable,
                "candidate": candidate,
                "increase": [_finite(low), _finite(high)],
                "harm": harm,
                "e_value": None if self.lots == "in_turn" else self.bets[name].e_value,
                "e_value_of_harm": None if self.lots == "in_turn" else 1 / self._alpha,
                "verdict": self._verdict(name),
            }
        return found

    @property
    def _alpha(self) -> float:
        """Of one metric: any of them may raise a false alarm."""
        return self.settings.false_roll_back / len(self.harms)

    def _verdict(self, name: str) -> Verdict:
        if self._harmless(name):
            return "harmless"
        return "harm" if self._worse(name) else "open"

    def _worse(self, name: str) -> bool:
        if self.lots == "in_turn":
            return self._increase(name, self._alpha)[0] > 0
        return self.bets[name].e_value >= 1 / self._alpha

    def _harmless(self, name: str) -> bool:
        return self._increase(name, self.settings.false_roll_back)[1] < self.harms[name]

    def _increase(self, name: str, alpha: float) -> tuple[float, float]:
        """Bounds of what the candidate has more of: error rate, median latency (relative), or less of: quality."""
        if name == "latency":
            stable, candidate = (each.bounds(alpha / 2) for each in self.latencies)
            return candidate[0] / stable[1] - 1, candidate[1] / stable[0] - 1 if stable[0] else math.inf
        if name == "error_rate":
            stable, candidate = (each.bounds(alpha / 2) for each in self.errors)
        else:
            candidate, stable = (each.bounds(alpha / 2) for each in self.qualities)
        return candidate[0] - stable[1], candidate[1] - stable[0]

    def _estimates(self, name: str) -> list[Any]:
        if name == "latency":
            names = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99}
            return [{key: each.quantile(at) for key, at in names.items()} for each in self.latencies]
        return [each.estimate for each in (self.errors if name == "error_rate" else self.qualities)]

    def _add_answers(self, found: Answers) -> None:
        for version in (0, 1):
            self.answers[version] += int((found.candidate == version).sum())
        once = self._first_of_their_key(found.key)
        candidate, share, failed = found.candidate[once], found.share[once], found.failed[once]
        latency_s, score = found.latency_s[once], found.score[once]
        answered = ~np.isnan(latency_s)
        slowness = np.log(latency_s[answered]) - self._grace * candidate[answered]
        self.bets["error_rate"].on_lots(candidate, share, failed - (self.usual_errors.estimate or 0.0))
        self.bets["latency"].on_lots(candidate[answered], share[answered], self.scale.badness(slowness))
        if "quality" in self.harms:
            judged = ~np.isnan(score)
            usual = self.usual_quality.estimate
            if usual is not None:
                self.bets["quality"].on_lots(candidate[judged], share[judged], usual - score[judged])
            self.usual_quality.add(score[judged])
        self.scale.learn(slowness)
        self.usual_errors.add(failed)
        for version in (0, 1):
            self._add_version(version, *(values[candidate == version] for values in (failed, latency_s, score)))

    def _add_pairs(self, found: Pairs) -> None:
        self.answers = [count + len(found.failed) for count in self.answers]
        answered = ~np.isnan(found.latency_s).any(1)
        slower = np.diff(np.log(found.latency_s[answered]))[:, 0] - self._grace
        # Fixed beforehand at nothing but its width: a difference's sign is what counts.
        spread = max(self.scale.spread, 0.1)
        self.bets["error_rate"].on_pairs(np.diff(found.failed.astype(float))[:, 0])
        self.bets["latency"].on_pairs(np.tanh(slower / spread))
        self.scale.learn(slower)
        if "quality" in self.harms:
            judged = ~np.isnan(found.score).any(1)
            self.bets["quality"].on_pairs(-np.diff(found.score[judged])[:, 0])
        for version in (0, 1):
            self._add_version(version, found.failed[:, version], found.latency_s[:, version], found.score[:, version])

    def _add_version(self, version: int, failed: np.ndarray, latency_s: np.ndarray, score: np.ndarray) -> None:
        self.errors[version].add(failed)
        self.latencies[version].add(latency_s[~np.isnan(latency_s)])
        self.qualities[version].add(score[~np.isnan(score)])

    @property
    def _grace(self) -> float:
        """Log of how much slower is no harm: a candidate's caches are colder, its copies come second. Half of what
        matters."""
        return math.log1p(self.settings.latency_increase / 2)

    def _first_of_their_key(self, keys: np.ndarray) -> np.ndarray:
        """A user's lot is drawn once, so only the first answer can be bet on."""
        first = np.ones(len(keys), bool)
        for place in np.flatnonzero(keys):
            first[place] = int(keys[place]) not in self.keys
            self.keys.add(int(keys[place]))
        return first


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
