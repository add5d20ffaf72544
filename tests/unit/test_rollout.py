"""The comparison of two versions by simulated traffic, and the steps that it leads through."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from heliostat.recipe import Refused, Rollout, override
from heliostat.rollout.compare import Answers, Bets, Comparison, Latencies, Mean, Pairs, mean_bounds
from heliostat.rollout.outcomes import Outcome, Seen, compared
from heliostat.rollout.schedule import Schedule, Strategy, Traffic, lot, parse_strategy
from tests.recipes import tiny_llama

BATCH = 800
ROLLOUTS: dict[Strategy, int] = {"canary": 200, "shadow": 60, "blue_green": 60}
CAUGHT_WITHIN: dict[Strategy, int] = {"canary": 8_000, "shadow": 4_000, "blue_green": 15_000}
"""Requests, as docs/serving.md says."""


class Traffics:
    """Requests to two versions with log-normal latencies around 50 ms."""

    def __init__(self, seed: int, errors: tuple[float, float] = (0.01, 0.01), slower: float = 1.0) -> None:
        self.random = np.random.default_rng(seed)
        self.errors, self.slower = errors, slower

    def latency_s(self, candidate: np.ndarray, failed: np.ndarray) -> np.ndarray:
        found = 0.05 * self.random.lognormal(0.0, 0.5, candidate.shape) * np.where(candidate, self.slower, 1.0)
        return np.where(failed, math.nan, found)

    def answers(self, share: float, size: int = BATCH) -> Answers:
        candidate = self.random.random(size) < share
        failed = self.random.random(size) < np.where(candidate, self.errors[1], self.errors[0])
        nothing = np.full(size, math.nan)
        latency_s = self.latency_s(candidate, failed)
        return Answers(candidate, np.full(size, share), failed, latency_s, nothing, np.zeros(size, np.uint64))

    def pairs(self, size: int = BATCH) -> Pairs:
        candidate = np.tile([False, True], (size, 1))
        failed = self.random.random((size, 2)) < self.errors
        return Pairs(failed, self.latency_s(candidate, failed), np.full((size, 2), math.nan))


def rolled_out(
    traffic: Traffics, strategy: Strategy = "canary", settings: Rollout | None = None
) -> tuple[str | None, int]:
    """The decision, and after how many requests."""
    schedule = Schedule(settings or Rollout(max_requests=30_000), strategy)
    while schedule.decision is None:
        to_send = schedule.traffic
        schedule.add(traffic.pairs() if to_send.copied else traffic.answers(to_send.share))
    return schedule.decision, schedule.requests


@pytest.mark.parametrize("strategy", ROLLOUTS)
def test_a_version_that_is_the_same_is_seldom_rolled_back(strategy: Strategy) -> None:
    decisions = [rolled_out(Traffics(seed), strategy)[0] for seed in range(ROLLOUTS[strategy])]
    assert decisions.count("rolled_back") <= 0.05 * ROLLOUTS[strategy]
    assert decisions.count("promoted") >= 0.9 * ROLLOUTS[strategy]


@pytest.mark.parametrize(
    ("errors", "slower"), [((0.01, 0.03), 1.0), ((0.01, 0.01), 1.2)], ids=["2 points more errors", "20% later"]
)
@pytest.mark.parametrize("strategy", ROLLOUTS)
def test_harm_is_caught(strategy: Strategy, errors: tuple[float, float], slower: float) -> None:
    found = [rolled_out(Traffics(1000 + seed, errors, slower), strategy) for seed in range(ROLLOUTS[strategy])]
    caught = [n for decision, n in found if decision == "rolled_back" and n <= CAUGHT_WITHIN[strategy]]
    assert len(caught) >= 0.95 * len(found)


def test_an_outage_of_both_rolls_nothing_back() -> None:
    """While the candidate has half of the traffic, ten times as many requests fail as while it had little."""
    rolled_back = 0
    for seed in range(50):
        traffic, schedule = Traffics(seed), Schedule(Rollout(), "canary")
        for _ in range(20):
            rate = 0.1 if schedule.traffic.share == 0.5 else 0.01
            traffic.errors = (rate, rate)
            schedule.add(traffic.answers(schedule.traffic.share))
        rolled_back += schedule.decision == "rolled_back"
    assert rolled_back <= 2


def every_lot(share: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """All ways that lots can fall, and their probabilities."""
    lots = [np.array(each) for each in itertools.product([False, True], repeat=len(share))]
    return [(lot_, float(np.where(lot_, share, 1 - share).prod())) for lot_ in lots]


def test_bets_on_lots_are_fair() -> None:
    """The mean over every lot, weighed by its probability, of outcomes that do not depend on it: exactly 1."""
    random = np.random.default_rng(0)
    share, badness = random.choice([0.01, 0.25, 0.5], 8), random.uniform(-1, 1, 8)
    mean = 0.0
    for candidate, probability in every_lot(share):
        bets = Bets()
        bets.on_lots(candidate, share, badness)
        mean += probability * bets.e_value
    assert mean == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("better", "worth"), [(0.3, "less"), (-0.3, "more")])
def test_bets_on_lots_are_lost_by_who_is_no_worse(better: float, worth: str) -> None:
    """Outcomes that depend on the lot: the candidate's badness is lower, or higher, by so much."""
    share, badness = np.full(8, 0.4), np.linspace(-0.5, 0.5, 8)
    mean = 0.0
    for candidate, probability in every_lot(share):
        bets = Bets()
        bets.on_lots(candidate, share, badness - better * candidate)
        mean += probability * bets.e_value
    assert mean < 1 if worth == "less" else mean > 1


def test_bets_on_pairs_are_fair() -> None:
    """Differences are as likely to be of either sign where the versions are the same."""
    sizes, found = np.linspace(0.1, 1, 8), []
    for signs in itertools.product([-1, 1], repeat=8):
        bets = Bets()
        bets.on_pairs(np.array(signs) * sizes)
        found.append(bets.e_value)
    assert np.mean(found) == pytest.approx(1.0, abs=1e-12)


def test_wealth_exceeds_its_limit_as_seldom_as_ville_says() -> None:
    random, share, above = np.random.default_rng(1), np.full(25, 0.5), 0
    for _ in range(400):
        bets, most = Bets(), 0.0
        for _ in range(60):
            bets.on_lots(random.random(25) < 0.5, share, random.choice([-1.0, 1.0], 25))
            most = max(most, bets.e_value)
        above += most >= 10
    assert 0 < above <= scipy.stats.binom.ppf(0.999, 400, 0.1)


@pytest.mark.parametrize(("total", "count"), [(3, 100), (0, 50), (50, 50), (12.5, 40)])
def test_bounds_of_a_mean_are_where_the_mixture_says(total: float, count: int) -> None:
    """Against the integral of the likelihood ratio over Jeffreys' prior."""

    def mixture(p: float) -> float:
        def ratio(q: float) -> float:
            return (q / p) ** total * ((1 - q) / (1 - p)) ** (count - total) * scipy.stats.beta.pdf(q, 0.5, 0.5)

        return float(scipy.integrate.quad(ratio, 0, 1, limit=500)[0])

    low, high = mean_bounds(total, count, 0.05)
    assert low <= total / count <= high
    for bound in {low, high} - {0.0, 1.0}:
        assert mixture(bound) == pytest.approx(20, rel=1e-4)
    assert (low == 0.0, high == 1.0) == (total == 0, total == count)


def test_bounds_hold_at_every_time_at_once() -> None:
    random, missed = np.random.default_rng(2), {"mean": 0, "median": 0}
    for _ in range(100):
        mean, latencies, out = Mean(), Latencies(), {"mean": False, "median": False}
        for _ in range(40):
            mean.add(random.random(20) < 0.02)
            latencies.add(0.01 * (1 + random.pareto(0.5, 20)))  # which has no mean
            low, high = mean.bounds(0.1)
            out["mean"] |= not low <= 0.02 <= high
            low, high = latencies.bounds(0.1)
            out["median"] |= not low <= 0.04 <= high
        missed = {name: missed[name] + out[name] for name in missed}
    assert all(count <= scipy.stats.binom.ppf(0.999, 100, 0.1) for count in missed.values())


def test_quantiles_of_latencies() -> None:
    values = np.random.default_rng(3).lognormal(-3, 1, 5000)
    latencies = Latencies()
    assert latencies.quantile(0.5) is None
    latencies.add(values)
    for fraction in (0.5, 0.95, 0.99):
        assert latencies.quantile(fraction) == pytest.approx(np.quantile(values, fraction), rel=0.01)


def answers(candidate: list[bool], failed: list[bool], key: list[int], score: float = math.nan) -> Answers:
    size = len(candidate)
    latency_s, scores = np.full(size, 0.1), np.full(size, score)
    return Answers(
        np.array(candidate), np.full(size, 0.5), np.array(failed), latency_s, scores, np.array(key, np.uint64)
    )


def test_a_user_is_one_lot() -> None:
    """A thousand errors of one who has the candidate say no more than one."""
    one, many = (Comparison(Rollout(), "drawn", judged=False) for _ in range(2))
    one.add(answers([True], [True], [7]))
    for _ in range(10):
        many.add(answers([True] * 100, [True] * 100, [7] * 100))
    assert many.evidence()["error_rate"]["e_value"] == one.evidence()["error_rate"]["e_value"] < 60
    assert many.evidence()["answers"] == {"stable": 0, "candidate": 1000}
    assert not many.harmful()
    users = list(range(100, 200))
    many.add(answers([user % 2 == 0 for user in users], [user % 2 == 0 for user in users], users))
    assert many.harmful()


@pytest.mark.parametrize("strategy", ["canary", "shadow"])
def test_worse_answers_are_harm(strategy: Strategy) -> None:
    """Nothing fails and nothing is late, but 80% of the candidate's answers are right, not 90%."""
    traffic, schedule = Traffics(5), Schedule(Rollout(max_requests=30_000), strategy, judged=True)
    while schedule.decision is None:
        found = traffic.pairs() if schedule.traffic.copied else traffic.answers(schedule.traffic.share)
        candidate = np.tile([False, True], (BATCH, 1)) if isinstance(found, Pairs) else found.candidate
        right = traffic.random.random(candidate.shape) < np.where(candidate, 0.8, 0.9)
        schedule.add(type(found)(**{**vars(found), "score": right.astype(float)}))
    evidence = schedule.evidence()
    assert schedule.decision == "rolled_back"
    assert (evidence["quality"]["verdict"], evidence["error_rate"]["verdict"]) == ("harm", "open")
    assert evidence["quality"]["candidate"] < 0.85 < evidence["quality"]["stable"]
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence


def test_a_canary_goes_step_by_step() -> None:
    schedule = Schedule(Rollout(steps=[0.1, 0.5], requests_per_step=500, error_increase=0.1), "canary")
    traffic, shares = Traffics(6), []
    while schedule.decision is None:
        shares.append(schedule.traffic.share)
        schedule.add(traffic.answers(schedule.traffic.share, 250))
    assert shares[:3] == [0.1, 0.1, 0.5]
    assert schedule.decision == "promoted"
    assert schedule.traffic == Traffic(1.0)
    schedule.add(traffic.answers(1.0))
    assert schedule.evidence()["requests"] == 250 * len(shares)


def test_blue_green_is_one_switch_and_one_back() -> None:
    schedule = Schedule(Rollout(requests_per_step=500), "blue_green")
    traffic, shares = Traffics(7, (0.01, 0.2)), []
    while schedule.decision is None:
        shares.append(schedule.traffic.share)
        schedule.add(traffic.answers(schedule.traffic.share, 250))
    assert [share for share, _ in itertools.groupby(shares)] == [0.0, 1.0]
    assert schedule.decision == "rolled_back"
    assert schedule.traffic == Traffic(0.0)


def test_what_is_not_decided_in_time_is_called_off() -> None:
    schedule = Schedule(Rollout(max_requests=1000), "shadow")
    while schedule.decision is None:
        schedule.add(Traffics(8).answers(0.0))  # of which there was no copy
        schedule.add(Traffics(8).pairs())
    assert (schedule.decision, schedule.requests) == ("undecided", 2 * BATCH)
    late = Schedule(Rollout(), "canary")
    late.give_up()
    assert (late.decision, late.traffic) == ("undecided", Traffic(0.0))


def test_lots_are_even_and_the_users_own() -> None:
    lots = [lot("a rollout", f"user {number}") for number in range(2000)]
    assert scipy.stats.kstest(lots, "uniform").pvalue > 0.001
    assert lots == [lot("a rollout", f"user {number}") for number in range(2000)]
    assert abs(np.corrcoef(lots, [lot("another", f"user {number}") for number in range(2000)])[0, 1]) < 0.1


def test_what_was_seen_becomes_arrays() -> None:
    def judge(request: dict, answer: dict) -> float | None:
        return None if request["label"] is None else float(request["label"] == answer["label"])

    request, right, wrong = b'{"label": "sun"}', b'{"label": "sun"}', b'{"label": "salt"}'
    seen = [
        Seen(0.25, 9, stable=Outcome(latency_s=0.1, body=right), body=request),
        Seen(0.25, candidate=Outcome(failed=True), body=request),
        Seen(0.25, candidate=Outcome(latency_s=0.3, body=right), body=b'{"label": null}'),
        Seen(
            0.0, stable=Outcome(latency_s=0.1, body=right), candidate=Outcome(latency_s=0.2, body=wrong), body=request
        ),
    ]
    pairs, single = compared(seen, judge)
    assert isinstance(pairs, Pairs)
    assert isinstance(single, Answers)
    assert (pairs.latency_s.tolist(), pairs.score.tolist()) == ([[0.1, 0.2]], [[1.0, 0.0]])
    assert (single.candidate.tolist(), single.failed.tolist()) == ([False, True, True], [False, True, False])
    assert single.key.tolist() == [9, 0, 0]
    np.testing.assert_equal(single.latency_s, [0.1, math.nan, 0.3])
    np.testing.assert_equal(single.score, [1.0, math.nan, math.nan])
    assert all(np.isnan(each.score).all() for each in compared(seen, None))
    assert list(compared([], judge)) == []


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="did you mean canary"):
        parse_strategy("canery")
    with pytest.raises(Refused, match=r"rollout\.steps: .* do not rise"):
        override(tiny_llama(tmp_path), {"rollout.steps": [0.5, 0.25]})
