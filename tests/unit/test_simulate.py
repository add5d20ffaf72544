"""The simulator against closed forms, and what policies do to whole traces."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.recipe import Refused
from heliostat.scheduling.baselines import easy_backfill, fifo
from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.simulate import Cluster, Outcome, simulate
from heliostat.scheduling.state import Decision, Policy, Start, State, Tenant
from heliostat.scheduling.traces import DAILY_SWING, MEDIAN_S, SIZES, Submitted, read, synthetic

POLICIES: list[Policy] = [fifo, easy_backfill, fair_share]


def ideal(gpus: int, gpus_per_node: int = 8) -> Cluster:
    """Where nothing takes time but the jobs."""
    return Cluster(gpus, gpus_per_node, start_s=0.0, checkpoint_s=0.0, decide_every_s=0.0, min_run_s=0.0)


def waits(outcome: Outcome, trace: list[Submitted]) -> list[float]:
    return [outcome.started[each.name] - each.time for each in trace]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("servers", [1, 3])
def test_a_queue_of_single_gpus(policy: Policy, servers: int) -> None:
    """The waits of G/G/c, by Kiefer and Wolfowitz' recursion (1955): a job begins when the first server is free."""
    draw, at, trace = random.Random(servers), 0.0, []
    for number in range(400):
        at += draw.expovariate(servers / 110)
        trace.append(Submitted(f"{number:03d}", at, 1, draw.uniform(50, 150)))
    free = [0.0] * servers
    expected = []
    for each in trace:
        begins = max(each.time, heapq.heappop(free))
        expected.append(begins - each.time)
        heapq.heappush(free, begins + each.duration_s)
    outcome = simulate(trace, ideal(servers), policy)
    assert waits(outcome, trace) == pytest.approx(expected, abs=1e-6)
    assert outcome.mean_jct_s == pytest.approx(
        statistics.fmean(expected) + statistics.fmean(j.duration_s for j in trace)
    )
    busy = sum(
        max(0.0, min(outcome.ended[j.name], trace[-1].time) - outcome.started[j.name])
        for j in trace
        if outcome.started[j.name] < trace[-1].time
    )
    window = servers * (trace[-1].time - trace[0].time)
    assert outcome.utilisation == pytest.approx(busy / window)
    assert outcome.goodput == pytest.approx(busy / window)


def test_mean_wait_of_an_m_d_1_queue() -> None:
    """Pollaczek and Khinchine: ρ / (2 (1 - ρ)) of the service time."""
    draw, at, trace = random.Random(5), 0.0, []
    for number in range(8000):
        at += draw.expovariate(0.6 / 10)
        trace.append(Submitted(f"{number:04d}", at, 1, 10.0))
    assert simulate(trace, ideal(1), fifo).mean_wait_s == pytest.approx(10 * 0.6 / (2 * 0.4), rel=0.1)


@st.composite
def traces(draw: st.DrawFn, exact: bool = False) -> list[Submitted]:
    made, at = [], 0.0
    for number in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from([0.0, 1.0, 40.0, 300.0]))
        gpus = draw(st.sampled_from([1, 1, 2, 4, 7, 16]))
        duration = float(draw(st.integers(1, 2000)))
        estimate = duration if exact else draw(st.none() | st.floats(1, 5000))
        elastic = not exact and draw(st.booleans())
        made.append(
            Submitted(
                f"{number:02d}",
                at,
                gpus,
                duration,
                "a" if exact else draw(st.sampled_from("abc")),
                0 if exact else draw(st.integers(0, 2)),
                max(1, gpus // 2) if elastic else None,
                min(16, 3 * gpus) if elastic else None,
                estimate,
            )
        )
    return made


@given(traces(), st.sampled_from([0.0, 30.0]), st.sampled_from([{}, {"a": Tenant(3.0)}, {"b": Tenant(max_gpus=16)}]))
@settings(max_examples=60)
def test_every_job_ends(trace: list[Submitted], every_s: float, tenants: dict[str, Tenant]) -> None:
    """On whatever trace; and none is faster than its work, or is given what others hold (the simulator checks)."""
    cluster = Cluster(16, 4, start_s=5.0, checkpoint_s=3.0, decide_every_s=every_s, min_run_s=60.0)
    for policy in POLICIES:
        outcome = simulate(trace, cluster, policy, tenants)
        for each in trace:
            fastest = each.duration_s * each.gpus / (each.max_gpus or each.gpus)
            assert outcome.ended[each.name] - outcome.started[each.name] >= min(fastest, each.duration_s) - 1e-6


@given(traces(exact=True))
@settings(max_examples=60)
def test_backfill_never_delays_the_first_that_waits(trace: list[Submitted]) -> None:
    """By exact estimates, on one node: once a job is the first that waits, it begins no later than what runs then, and
    ends as known, would leave it room."""
    promised: dict[str, float] = {}

    def watched(state: State) -> list[Decision]:
        decisions = easy_backfill(state)
        started = {each.job: sum(each.placement.values()) for each in decisions if isinstance(each, Start)}
        waiting = [each for each in state.jobs if not each.held and each.name not in started]
        if waiting:
            head = min(waiting, key=lambda each: (each.submitted, each.name))
            before = [each for each in state.jobs if each.held]
            before += [
                e for e in state.jobs if e.name in started and (e.submitted, e.name) < (head.submitted, head.name)
            ]
            free, at = 16 - sum(each.workers for each in before), state.now
            for each in sorted(before, key=lambda each: each.estimate_s or 0.0):
                if free >= head.workers:
                    break
                free, at = free + each.workers, state.now + (each.estimate_s or 0.0)
            promised.setdefault(head.name, at)
        return decisions

    outcome = simulate(trace, ideal(16, 16), watched)
    for name, at in promised.items():
        assert outcome.started[name] <= at + 1e-6


@given(traces(exact=True))
@settings(max_examples=60)
def test_one_tenant_without_priorities_has_backfill(trace: list[Submitted]) -> None:
    expected, found = (simulate(trace, ideal(16, 4), policy) for policy in (easy_backfill, fair_share))
    assert found.started == pytest.approx(expected.started)


def test_preemption_by_hand() -> None:
    """At 100 s `high` comes; 10 s for the checkpoint, 20 s to start each time, and no step is lost."""
    trace = [Submitted("low", 0.0, 4, 1000.0, priority=0), Submitted("high", 100.0, 4, 200.0, priority=1)]
    cluster = Cluster(4, 4, start_s=20.0, checkpoint_s=10.0, decide_every_s=0.0, min_run_s=60.0)
    outcome = simulate(trace, cluster, fair_share)
    assert outcome.preemptions == 1
    assert outcome.started["high"] == 110.0
    assert outcome.ended["high"] == 110 + 20 + 200
    assert outcome.ended["low"] == 330 + 20 + 1000 - (100 - 20)


def test_growth_by_hand() -> None:
    """A run that doubles with no loss: 100 s at 2 GPUs, of which 20 to start, then told to restart with 4."""
    trace = [
        Submitted("other", 0.0, 2, 80.0),
        Submitted("run", 0.0, 2, 1000.0, min_gpus=2, max_gpus=4, serial=0.0),
    ]
    cluster = Cluster(4, 4, start_s=20.0, checkpoint_s=10.0, decide_every_s=0.0, min_run_s=60.0)
    outcome = simulate(trace, cluster, fair_share)
    assert outcome.resizes == 1
    assert outcome.ended["run"] == 100 + 10 + 20 + (1000 - 80) / 2


def test_shares_over_time_follow_weights() -> None:
    """Two tenants that always have jobs waiting; the one of six times the weight gets six times as much."""
    trace = [
        Submitted(f"{tenant}{number:03d}", float(number), 1, 100.0, tenant) for number in range(240) for tenant in "ab"
    ]
    cluster = replace(ideal(28), decide_every_s=5.0)
    had = dict.fromkeys("ab", 0)

    def watched(state: State) -> list[Decision]:
        decisions = fair_share(state)
        if 100 < state.now < 240:
            for each in state.jobs:
                had[each.tenant] += each.size
        return decisions

    outcome = simulate(trace, cluster, watched, {"a": Tenant(6.0)})
    assert had["a"] / had["b"] == pytest.approx(6.0, rel=0.05)
    assert outcome.fairness > 0.99
    # Who comes first is served first: half each, of which the first deserved 6/7.
    half, whole = 3.5 / 6, 1.0
    jain = (half + whole) ** 2 / (2 * (half**2 + whole**2))
    assert simulate(trace, cluster, fifo, {"a": Tenant(6.0)}).fairness == pytest.approx(jain, abs=0.01)


def test_the_same_trace_gives_the_same_outcome() -> None:
    def figures() -> list[object]:
        found = simulate(synthetic(0.2, 32, 1.0, seed=3), Cluster(32), fair_share)
        return [value for name, value in vars(found).items() if name != "decide_s"]

    assert figures() == figures()


def test_synthetic_traces_are_as_described() -> None:
    trace = synthetic(1.0, 1024, 0.8, seed=1)
    assert statistics.median(each.duration_s for each in trace) == pytest.approx(MEDIAN_S, rel=0.1)
    expected = sum(size * share for size, share in SIZES.items())
    assert expected == pytest.approx(3.72, rel=0.05), "GPUs of a job in Helios"
    assert statistics.fmean(each.gpus for each in trace) == pytest.approx(expected, rel=0.1)
    asked = sum(each.gpus * each.duration_s for each in trace)
    assert asked / (86400 * 1024) == pytest.approx(0.8, rel=0.02)
    assert all(a.time <= b.time for a, b in itertools.pairwise(trace))
    by_day = sum(each.time < 43200 for each in trace)
    assert by_day / len(trace) == pytest.approx(0.5 + DAILY_SWING / math.pi, abs=0.02), "the integral of the cycle"


def test_traces_are_read(tmp_path: Path) -> None:
    swf = tmp_path / "log.swf"
    swf.write_text(
        "; Version: 2.2\n; MaxProcs: 128\n"
        "1 100 5 60 4 -1 -1 8 90 -1 1 7 3 -1 1 -1 -1 -1\n"
        "2 90 0 30 2 -1 -1 -1 -1 -1 1 7 -1 -1 1 -1 -1 -1\n"
        "3 110 0 -1 2 -1 -1 2 -1 -1 5 7 -1 -1 1 -1 -1 -1\n"
    )
    assert read(swf) == [Submitted("2", 0.0, 2, 30.0, "7"), Submitted("1", 10.0, 8, 60.0, "3", estimate_s=90.0)]
    philly = tmp_path / "cluster_job_log.json"
    ran = {"start_time": "2017-10-07 01:12:09", "end_time": "2017-10-07 01:13:23"}
    detail = [{"ip": "m37", "gpus": ["gpu0", "gpu1"]}, {"ip": "m38", "gpus": ["gpu4"]}]
    never: dict[str, object] = {"start_time": None, "end_time": None, "detail": []}
    philly.write_text(
        json.dumps(
            [
                {
                    "status": "Pass",
                    "vc": "ee9e8c",
                    "jobid": "one",
                    "attempts": [ran | {"detail": detail}],
                    "submitted_time": "2017-10-07 01:11:00",
                    "user": "ce2f4d",
                },
                {"vc": "ee9e8c", "jobid": "two", "attempts": [never], "submitted_time": "2017-10-07 01:00:00"},
            ]
        )
    )
    assert read(philly) == [Submitted("one", 0.0, 3, 74.0, "ee9e8c")]
    table = tmp_path / "jobs.csv"
    table.write_text("time,gpus,duration_s,tenant,min_gpus,max_gpus\n5,4,100,a,2,8\n0,1,7.5,b,,\n")
    assert read(table) == [Submitted("1", 0.0, 1, 7.5, "b"), Submitted("0", 5.0, 4, 100.0, "a", 0, 2, 8)]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("jobs.csv", "time,gpus,duration\n0,1,5\n", "no column duration"),
        ("jobs.csv", "time,gpus,duration_s\n0,one,5\n", "no trace"),
        ("jobs.csv", "time,gpus,duration_s,min_gpus\n0,1,5,2\n", "line 2"),
        ("jobs.csv", "name,time,gpus,duration_s\na,0,1,5\na,1,1,5\n", "same name"),
        ("jobs.swf", "; nothing\n", "no job that ran"),
        ("jobs.txt", "", "one of .swf"),
        ("jobs.json", "[{}]", "no trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match=reason):
        read(tmp_path / name)


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(Refused, match="asks for 9"):
        simulate([Submitted("1", 0.0, 9, 1.0)], ideal(8), fifo)
