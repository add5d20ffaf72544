"""What scheduling policies decide: never more than there is, gangs whole, quotas, shares, and the best growth."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.scheduling.baselines import easy_backfill, fifo
from heliostat.scheduling.fair_share import fair_share
from heliostat.scheduling.room import Room
from heliostat.scheduling.shares import Shares, deserved
from heliostat.scheduling.speed import Amdahl, fit
from heliostat.scheduling.state import (
    Decision,
    Job,
    Node,
    Placement,
    Preempt,
    Resize,
    Rules,
    Shape,
    Start,
    State,
    Tenant,
    Wait,
)

GPU = Shape(1.0, 1.0)
NOW = 10_000.0


def job(name: str, workers: int, held: Placement | None = None, **fields: object) -> Job:
    sizes = {"min_workers": workers, "max_workers": workers, "shape": GPU, "submitted": 0.0} | fields
    return Job(name=name, workers=workers, held=held or {}, **sizes)  # type: ignore[arg-type]


def cluster(*gpus: int) -> list[Node]:
    return [Node(f"n{i}", float(count), float(count)) for i, count in enumerate(gpus)]


def state(nodes: list[Node], *jobs: Job, **tenants: Tenant) -> State:
    return State(NOW, nodes, list(jobs), tenants, Rules(min_run_s=100.0, restart_s=10.0))


def by_job(decisions: list[Decision]) -> dict[str, Decision]:
    assert len({each.job for each in decisions}) == len(decisions), "one decision for each job"
    return {each.job: each for each in decisions}


# Whatever the state, a decision is one that a cluster can follow.


@st.composite
def states(draw: st.DrawFn) -> State:
    nodes = [
        Node(f"n{i}", float(draw(st.integers(1, 16))), float(draw(st.integers(0, 8))))
        for i in range(draw(st.integers(1, 5)))
    ]
    room, jobs = Room(nodes), []
    for number in range(draw(st.integers(0, 12))):
        group = draw(st.sampled_from([1, 1, 2, 4]))
        shape = Shape(draw(st.sampled_from([0.5, 1.0, 3.0])), draw(st.sampled_from([0.0, 1.0])), group)
        step = group * draw(st.integers(1, 2))
        least = step * draw(st.integers(1, 3))
        sizes = [least + step * i for i in range(draw(st.integers(1, 4)))]
        each = Job(
            f"j{number}",
            draw(st.floats(0, NOW)),
            draw(st.sampled_from(sizes)),
            sizes[0],
            sizes[-1],
            shape,
            step,
            draw(st.sampled_from("abc")),
            draw(st.integers(0, 2)),
            Amdahl(draw(st.floats(0, 0.5))),
            draw(st.none() | st.floats(1, 1e5)),
        )
        size = draw(st.sampled_from(sizes))
        if draw(st.booleans()) and (placement := room.place(shape, size)):
            each.held, each.since = placement, draw(st.floats(0, NOW))
            room.take(placement, shape)
            each.stopping = draw(st.booleans())
            if each.stopping and draw(st.booleans()) and (more := room.place(shape, step)) and size < sizes[-1]:
                each.next = {name: placement.get(name, 0) + more.get(name, 0) for name in [*placement, *more]}
                room.take(more, shape)
        jobs.append(each)
    tenants = {
        name: Tenant(draw(st.floats(0.1, 10)), draw(st.none() | st.integers(0, 12)), draw(st.none() | st.floats(0, 30)))
        for name in draw(st.sets(st.sampled_from("abc")))
    }
    return State(NOW, nodes, jobs, tenants, Rules(draw(st.sampled_from([0.0, 600.0])), 60.0))


def left(room: Room) -> float:
    return min(*room.cpus, *room.gpus)


@given(states())
def test_decisions_can_be_followed(given_state: State) -> None:
    for policy in (fair_share, fifo, easy_backfill):
        decisions = by_job(policy(given_state))
        now, after = Room(given_state.nodes), Room(given_state.nodes)
        used: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        before: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for each in given_state.jobs:
            decision = decisions.get(each.name)
            placement = getattr(decision, "placement", each.next if each.stopping else each.held)
            placement = {} if isinstance(decision, Preempt) else placement
            if isinstance(decision, Start | Resize):
                size = sum(placement.values())
                assert each.min_workers <= size <= each.max_workers, "within its sizes"
                assert (size - each.min_workers) % each.step == 0 or size == each.workers
                assert all(count > 0 and count % each.shape.group == 0 for count in placement.values()), "groups whole"
            if isinstance(decision, Start):
                assert not each.held
            if isinstance(decision, Resize | Preempt):
                assert each.held
                assert not each.stopping
                assert given_state.now - each.since >= given_state.rules.min_run_s
            if not each.held:
                assert isinstance(decision, Start | Wait), "who waits is told why, or starts"
            for name in {*each.held, *placement}:
                now.take({name: max(each.held.get(name, 0), placement.get(name, 0))}, each.shape)
            after.take(placement, each.shape)
            for total, of in ((before, sum(each.kept.values())), (used, sum(placement.values()))):
                total[each.tenant][0] += of * each.shape.cpus
                total[each.tenant][1] += of * each.shape.gpus
        assert left(now) >= -1e-6, "no node has to hold more than it has, even before others have left"
        assert left(after) >= -1e-6
        if policy is fair_share:
            for name, tenant in given_state.tenants.items():
                for i, limit in enumerate((tenant.max_cpus, tenant.max_gpus)):
                    assert limit is None or used[name][i] <= max(limit, before[name][i]) + 1e-5


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.lists(st.sampled_from("abc"), max_size=20))
def test_nothing_is_idle_that_a_small_job_waits_for(gpus: list[int], tenants: list[str]) -> None:
    jobs = [job(f"j{i}", 1, tenant=tenant) for i, tenant in enumerate(tenants)]
    started = [each for each in fair_share(state(cluster(*gpus), *jobs)) if isinstance(each, Start)]
    assert len(started) == min(sum(gpus), len(jobs))


# Placement.


def test_gangs_are_packed() -> None:
    room = Room(cluster(8, 3, 8, 4))
    assert room.place(GPU, 3) == {"n1": 3}, "the smallest node that holds it"
    assert room.place(GPU, 4) == {"n3": 4}
    assert room.place(GPU, 10) == {"n0": 8, "n1": 2}, "as few nodes as can be, and the rest where it fits best"
    assert room.place(GPU, 24) is None
    assert room.place(Shape(1.0, 1.0, 4), 12) == {"n0": 8, "n3": 4}, "no group is split"
    assert room.place(Shape(1.0, 1.0, 8), 24) is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 8), st.sampled_from([1, 2]))
def test_a_gang_is_on_as_few_nodes_as_any_choice_of_them(free: list[int], groups: int, group: int) -> None:
    """Against all subsets of nodes."""
    placement = Room(cluster(*free)).place(Shape(1.0, 1.0, group), groups * group)
    holds = [count // group for count in free]
    subsets = (
        subset
        for count in range(1, len(free) + 1)
        for subset in itertools.combinations(holds, count)
        if sum(subset) >= groups
    )
    fewest = next(subsets, None)
    assert (placement is None) == (fewest is None)
    if placement is not None and fewest is not None:
        assert len(placement) == len(fewest)
        assert sum(placement.values()) == groups * group


# Shares, quotas, priorities.


def test_deserved_shares() -> None:
    """Max-min fairness by hand: who wants little leaves the rest to the others, by weight."""
    assert deserved({"a": 0.2, "b": 0.9, "c": 0.9}, {"a": 1, "b": 1, "c": 1}) == pytest.approx(
        {"a": 0.2, "b": 0.4, "c": 0.4}
    )
    assert deserved({"a": 0.5, "b": 0.9, "c": 0.05}, {"a": 2, "b": 1, "c": 1}) == pytest.approx(
        {"a": 0.5, "b": 0.45, "c": 0.05}
    )


def test_dominant_shares() -> None:
    """The example of Ghodsi et al. 2011: 9 CPUs, 18 of the other; tasks of (1, 4) and (3, 1) get 3 and 2."""
    many = [job(f"a{i}", 1, tenant="a", shape=Shape(1.0, 4.0)) for i in range(9)]
    many += [job(f"b{i}", 1, tenant="b", shape=Shape(3.0, 1.0)) for i in range(9)]
    started = [each.job[0] for each in fair_share(state([Node("n", 9.0, 18.0)], *many)) if isinstance(each, Start)]
    assert (started.count("a"), started.count("b")) == (3, 2)


def test_weights_share_the_cluster() -> None:
    many = [job(f"{tenant}{i}", 1, tenant=tenant) for tenant in ("a", "b") for i in range(40)]
    started = [each.job[0] for each in fair_share(state(cluster(8, 8, 8), *many, a=Tenant(2.0))) if type(each) is Start]
    assert (started.count("a"), started.count("b")) == (16, 8)


def test_a_quota_holds_though_the_rest_is_idle() -> None:
    jobs = [job("one", 3, tenant="a"), job("two", 2, tenant="a")]
    decisions = by_job(fair_share(state(cluster(8), *jobs, a=Tenant(max_gpus=4))))
    assert decisions["one"] == Start("one", {"n0": 3})
    assert decisions["two"] == Wait("two", "the quota of a is used")


def test_a_quota_goes_to_the_highest_priority() -> None:
    """Others have room to spare, and could be made to leave more; only its own tenant's quota helps `urgent`."""
    jobs = [
        job("low", 2, {"n0": 2}, since=1.0, tenant="a"),
        job("lower", 2, {"n0": 2}, since=0.0, tenant="a", priority=-1),
        job("lent", 1, {"n0": 2}, max_workers=3, tenant="b"),
        job("urgent", 1, tenant="a", priority=1),
    ]
    decisions = by_job(fair_share(state(cluster(8), *jobs, a=Tenant(max_gpus=4))))
    assert decisions["lower"] == Preempt("lower", "urgent takes its place")
    assert decisions["urgent"] == Wait("urgent", "its place is being freed")
    assert "low" not in decisions


def test_a_higher_priority_takes_the_youngest_of_the_lowest() -> None:
    jobs = [
        job("old", 4, {"n0": 4}, since=NOW - 900),
        job("young", 4, {"n0": 4}, since=NOW - 200),
        job("above", 4, {"n1": 4}, since=NOW - 150, priority=1),
        job("just started", 4, {"n1": 4}, since=NOW - 50),
        job("urgent", 4, priority=2),
    ]
    decisions = by_job(fair_share(state(cluster(8, 8), *jobs)))
    assert decisions == {
        "young": Preempt("young", "urgent takes its place"),
        "urgent": Wait("urgent", "its place is being freed"),
    }
    # While that one writes its checkpoint nobody else has to go; then its place is given to whom it was freed for.
    jobs[1].stopping = True
    small = job("small", 1, submitted=-1.0)
    decisions = by_job(fair_share(state(cluster(8, 8), *jobs, small)))
    assert isinstance(decisions["urgent"], Wait)
    assert isinstance(decisions["small"], Wait)
    assert len(decisions) == 2
    jobs[1].stopping, jobs[1].held = False, {}
    assert by_job(fair_share(state(cluster(8, 8), *jobs, small)))["urgent"] == Start("urgent", {"n0": 4})


def test_nobody_slips_into_a_place_that_is_being_freed() -> None:
    """Half of it is free already."""
    jobs = [job("low", 2, {"n0": 2}, stopping=True), job("urgent", 4, priority=1), job("small", 1)]
    decisions = by_job(fair_share(state(cluster(4), *jobs)))
    assert decisions["urgent"] == Wait("urgent", "its place is being freed")
    assert isinstance(decisions["small"], Wait)


def test_no_more_is_taken_than_needed() -> None:
    """Three small ones would do, or a large one; of an elastic one, two workers are enough."""
    jobs = [job(f"s{i}", 1, {"n0": 1}, since=float(i)) for i in range(4)]
    jobs.append(job("elastic", 4, {"n0": 4}, min_workers=1, since=5.0))
    decisions = by_job(fair_share(state(cluster(8), *jobs, job("urgent", 2, priority=1))))
    assert decisions["elastic"] == Resize("elastic", {"n0": 2}, "urgent takes its place")
    assert len(decisions) == 2


def test_a_tenant_claims_back_what_it_deserves_and_no_more() -> None:
    greedy = [job(f"g{i}", 2, {f"n{i // 4}": 2}, tenant="greedy", since=float(i)) for i in range(8)]
    poor = [job(f"p{i}", 2, tenant="poor") for i in range(8)]
    decisions = by_job(fair_share(state(cluster(8, 8), *greedy, *poor)))
    assert sorted(name for name, each in decisions.items() if isinstance(each, Preempt)) == ["g4", "g5", "g6", "g7"]
    # At equal shares nobody takes anything, whatever the priority.
    for each in poor[:4]:
        each.held, each.since = {"n1": 2}, NOW - 900
    for each in greedy[4:]:
        each.held = {}
    for each in greedy:
        each.priority = 5
    assert all(isinstance(each, Wait) for each in fair_share(state(cluster(8, 8), *greedy, *poor)))


def test_who_has_less_than_it_deserves_is_left_alone() -> None:
    """Each of three deserves a third of 9; `b` has a job of the lowest priority, and the youngest."""
    jobs = [job(f"c{i}", 1, {"n0": 1}, tenant="c", priority=5, since=0.0) for i in range(7)]
    jobs += [job("b", 2, {"n0": 2}, tenant="b", since=NOW - 200), job("b more", 7, tenant="b")]
    decisions = by_job(fair_share(state(cluster(9), *jobs, job("a", 3, tenant="a"))))
    assert len([name for name, each in decisions.items() if isinstance(each, Preempt) and name[0] == "c"]) == 3
    assert "b" not in decisions


def test_who_lost_a_node_starts_elsewhere() -> None:
    here = state(cluster(4, 4), job("gang", 4, {"n1": 2, "n2": 2}, since=NOW - 5))
    assert fair_share(here) == [Preempt("gang", "a node is gone")]
    here.jobs[0].held = {}
    assert isinstance(fair_share(here)[0], Start)


# Room for large gangs.


def test_who_waits_for_a_large_place_is_not_passed_for_ever() -> None:
    """Ends of running jobs are not known. Small ones come all the time; the places that come free go to the gang."""
    nodes, now = cluster(2, 2), NOW
    running = [job(f"r{i}", 1, {f"n{i // 2}": 1}, since=float(i)) for i in range(4)]
    gang = job("gang", 4, submitted=1.0)
    for round_ in range(4):
        small = [job(f"s{round_}-{i}", 1, submitted=2.0 + i) for i in range(3)]
        decisions = by_job(fair_share(replace(state(nodes, *running, gang, *small), now=now)))
        assert not any(isinstance(each, Start) for each in decisions.values())
        running.pop(round_ % len(running))
        now += 100
    decisions = by_job(fair_share(state(nodes, gang, *small)))
    assert decisions["gang"] == Start("gang", {"n0": 2, "n1": 2})


def test_backfill_only_beside_the_reservation() -> None:
    """`wide` can start in 500 s on the node of `first`. What ends before may run there, and anything on the other."""
    jobs = [
        job("first", 2, {"n0": 2}, estimate_s=500.0, since=0.0),
        job("second", 1, {"n1": 1}, estimate_s=5000.0, since=0.0),
        job("wide", 4, submitted=1.0, estimate_s=100.0, shape=Shape(1.0, 1.0, 4)),
        job("long", 2, submitted=2.0, estimate_s=9000.0),
        job("short", 2, submitted=3.0, estimate_s=400.0),
    ]
    for policy in (fair_share, easy_backfill):
        assert by_job(policy(state(cluster(4, 2), *jobs)))["short"] == Start("short", {"n0": 2})
        assert isinstance(by_job(policy(state(cluster(4, 2), *jobs)))["long"], Wait)
        assert by_job(policy(state(cluster(4, 3), *jobs)))["long"] == Start("long", {"n1": 2})
    assert all(isinstance(each, Wait) for each in fifo(state(cluster(4, 3), *jobs)))


def test_backfill_leaves_the_reservation_room_together() -> None:
    """Two GPUs are free, and one of them is not needed later: of two long jobs one may start."""
    jobs = [job("first", 2, {"n0": 2}, estimate_s=500.0, since=0.0), job("head", 3, submitted=1.0)]
    jobs += [job(f"long{i}", 1, submitted=2.0 + i, estimate_s=9000.0) for i in range(2)]
    for policy in (fair_share, easy_backfill):
        decisions = by_job(policy(state(cluster(4), *jobs)))
        assert [name for name, each in decisions.items() if isinstance(each, Start)] == ["long0"]


def test_priorities_hold_within_a_tenant_beside_a_reservation() -> None:
    """`gang` waits for both nodes, nobody knows how long. It counts on `old`; the place of `low` is not its own."""
    jobs = [
        job("old", 2, {"n0": 2}, since=0.0, tenant="a"),
        job("low", 2, {"n1": 2}, since=5.0, tenant="b"),
        job("gang", 4, tenant="a"),
        job("urgent", 2, tenant="b", priority=1),
    ]
    decisions = by_job(fair_share(state(cluster(2, 4), *jobs, a=Tenant(10.0))))
    assert decisions["gang"] == Wait("gang", "room for 4 workers is held for it as it comes free")
    assert decisions["low"] == Preempt("low", "urgent takes its place")


# Growth.


@given(
    st.lists(st.tuples(st.floats(0, 0.6), st.integers(1, 2), st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(1, 9),
)
def test_growth_is_the_best_there_is(runs: list[tuple[float, int, int]], gpus: int) -> None:
    """Against all ways to share a node among new runs that fit at their smallest."""
    least = sum(low for _, low, _ in runs)
    jobs = [
        job(f"j{i}", low, max_workers=low + more, speed=Amdahl(serial)) for i, (serial, low, more) in enumerate(runs)
    ]
    if least > gpus:
        return
    decisions = by_job(fair_share(state(cluster(gpus), *jobs)))
    found = sum(each.speed(sum(decisions[each.name].placement.values())) for each in jobs)  # type: ignore[union-attr]
    ranges = [range(low, low + more + 1) for _, low, more in runs]
    best = max(
        sum(each.speed(size) for each, size in zip(jobs, sizes, strict=True))
        for sizes in itertools.product(*ranges)
        if sum(sizes) <= gpus
    )
    assert found == pytest.approx(best)


def test_runs_grow_within_their_tenants_quota() -> None:
    runs = [job(f"r{i}", 1, max_workers=4, tenant="a") for i in range(3)]
    decisions = fair_share(state(cluster(16), *runs, a=Tenant(max_gpus=7)))
    assert sum(sum(each.placement.values()) for each in decisions if isinstance(each, Start)) == 7


def test_a_run_grows_where_that_pays() -> None:
    def grown(**fields: object) -> list[Decision]:
        run = job("run", 2, {"n0": 2}, max_workers=4, speed=Amdahl(0.0), since=NOW - 300, **fields)
        return fair_share(state(cluster(8), run))

    assert grown() == [Resize("run", {"n0": 4}, "idle workers are lent to it")]
    assert grown(estimate_s=21.0) == [Resize("run", {"n0": 4}, "idle workers are lent to it")]
    assert grown(estimate_s=19.0) == [], "half of that is less than the 10 s of a restart"


def test_what_was_lent_is_taken_back_from_anyone() -> None:
    lent = job("lent", 2, {"n0": 8}, min_workers=1, max_workers=8, tenant="a", priority=9, since=0.0)
    other = job("other", 3, tenant="b")
    decisions = by_job(fair_share(state(cluster(8), lent, other)))
    assert decisions["lent"] == Resize("lent", {"n0": 5}, "other takes its place")


def test_speed_is_found_from_two_sizes() -> None:
    true = Amdahl(0.03)
    assert fit({4: 7 * true(4), 32: 7 * true(32)}).serial == pytest.approx(0.03)
    assert fit({1: 5.0, 2: 5.0}).serial == 1.0
    assert fit({8: 3.0}) == Amdahl()


def test_shares_count_where_a_job_will_be() -> None:
    stopping = job("s", 4, {"n0": 4}, stopping=True, next={"n0": 1}, tenant="a")
    assert Shares(state(cluster(8), stopping)).used["a"] == pytest.approx(1 / 8)
