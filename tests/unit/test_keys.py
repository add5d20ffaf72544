"""Keys and their file, and token buckets, without an endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.recipe import Refused
from pipelines.keys import parse, run
from serve import keys
from serve.keys import Tenant
from serve.limits import MAX_PENDING, Bucket, Buckets, Limits, Rate


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "keys.json"


def job(command: str, file: Path) -> dict[str, Any]:
    return run(parse([*command.split(), "--file", str(file)]))


def test_a_key_is_its_tenants_until_it_is_revoked(file: Path) -> None:
    first = job("add sun --requests-per-minute 60", file)
    second = job("add sun", file)
    other = job("add salt.2", file)
    tenants = keys.read(str(file))
    assert [keys.whose(tenants, each["key"].encode()) for each in (first, second, other)] == ["sun", "sun", "salt.2"]
    assert tenants["sun"].requests_per_minute == 60
    assert tenants["salt.2"].requests_per_minute is None
    for wrong in (
        b"",
        b"hs-",
        first["key"].encode()[:-1],
        first["key"].encode() + b" ",
        first["digest"].encode(),
        b"\xff",
    ):
        assert keys.whose(tenants, wrong) is None
    assert job(f"revoke sun --digest {first['digest']}", file)["revoked"] == 1
    tenants = keys.read(str(file))
    assert [keys.whose(tenants, each["key"].encode()) for each in (first, second)] == [None, "sun"]
    assert tenants["sun"].requests_per_minute == 60
    assert job("revoke sun", file)["revoked"] == 1
    assert list(keys.read(str(file))) == ["salt.2"]
    job("revoke salt.2", file)
    assert keys.read(str(file)) == {}


def test_only_digests_are_written(file: Path) -> None:
    made = [job(f"add {name}", file)["key"] for name in ("sun", "salt")]
    assert len(set(made)) == 2
    text = "".join(path.read_text() for path in file.parent.iterdir())
    for key in made:
        assert len(key) > 40
        assert key.removeprefix("hs-") not in text
        assert hashlib.sha256(key.encode()).hexdigest() in text
    assert file.stat().st_mode & 0o777 == 0o600
    shown = json.dumps(job("list", file))
    assert not any(each in shown for each in made)
    assert hashlib.sha256(made[0].encode()).hexdigest()[:8] in shown


def test_keys_that_are_made_at_once_are_all_kept(file: Path) -> None:
    makers = [threading.Thread(target=keys.add, args=(file, f"t{i % 3}")) for i in range(12)]
    for each in makers:
        each.start()
    for each in makers:
        each.join()
    assert sum(len(tenant.sha256) for tenant in keys.read(str(file)).values()) == 12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"sun": {"sha256": []}}', "sun.sha256: List should have at least 1 item"),
        ('{"sun": {"sha256": ["hs-a-key-not-its-digest"]}}', "sun.sha256.0: String should match"),
        ('{"sun": {"sha256": ["%s"], "request_per_minute": 3}}' % ("0" * 64), "sun.request_per_minute: Extra inputs"),
        ('{"sun": {"sha256": ["%s"], "requests_per_minute": 0}}' % ("0" * 64), "greater than 0"),
        ('{"su/n": {"sha256": ["%s"]}}' % ("0" * 64), "String should match"),
    ],
)
def test_a_file_that_is_none_is_refused(file: Path, text: str, reason: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    for action in (lambda: keys.read(str(file)), lambda: keys.add(file, "salt")):
        with pytest.raises(Refused, match=reason) as refused:
            action()
        assert refused.value.field == "deploy.keys_file"
        assert "a-key-not-its-digest" not in str(refused.value)
    assert file.read_text() == text


def test_what_cannot_be_a_source_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"cannot read .*No such file"):
        keys.check(str(file))
    with pytest.raises(Refused, match="another file on every node"):
        keys.check("keys.json")
    with pytest.raises(Refused, match="no environment variable SUN_KEYS"):
        keys.check("env:SUN_KEYS")
    key = keys.add(file, "sun")
    monkeypatch.setenv("SUN_KEYS", file.read_text())
    keys.check("env:SUN_KEYS")
    assert keys.whose(keys.read("env:SUN_KEYS"), key.encode()) == "sun"
    keys.check("")
    with pytest.raises(Refused, match="String should match"):
        keys.add(file, "../sun")
    with pytest.raises(Refused, match="there are: sun"):
        keys.revoke(file, "salt")
    with pytest.raises(Refused, match="no key of sun begins with zz"):
        keys.revoke(file, "sun", "zz")


@pytest.mark.parametrize(
    ("given", "limits", "ahead"),
    [
        ({"requests_per_minute": 600}, Limits(Rate(10.0, 60), None), 1),
        ({"requests_per_minute": 3}, Limits(Rate(0.05, 1), None), 1),
        ({"requests_per_minute": 6000, "burst": 5}, Limits(Rate(100.0, 5), None), 10),
        ({"tokens_per_minute": 30}, Limits(None, Rate(0.5, 30)), 1),
        ({"requests_per_minute": 6000, "tokens_per_minute": 30}, Limits(Rate(100.0, 600), Rate(0.5, 30)), 1),
        ({}, None, None),
    ],
)
def test_a_tenants_limits(given: dict[str, float], limits: Limits | None, ahead: int | None) -> None:
    found = Limits.of(Tenant.model_validate({"sha256": ["0" * 64], **given}))
    assert found == limits
    assert found is None or found.ahead == ahead


STEPS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 10)), max_size=60)


@given(per_s=st.floats(0.01, 100), burst=st.integers(1, 50), steps=STEPS)
def test_a_bucket_gives_its_burst_and_its_rate_and_no_more(per_s: float, burst: int, steps: list) -> None:
    """In every window of t seconds at most burst + rate × t; and whoever is told to wait finds a token then."""
    now, bucket = 0.0, Bucket(Rate(per_s, burst), 0.0)
    given_at: list[tuple[float, int]] = []
    for pause, wanted in steps:
        now += pause
        taken, wait_s = bucket.take(wanted, now)
        assert 0 <= taken <= wanted
        if taken:
            given_at.append((now, taken))
        else:
            assert 0 < wait_s <= 1 / per_s + 1e-9
            now += wait_s * (1 + 1e-6) + 1e-6
            assert bucket.take(1, now)[0] == 1
            given_at.append((now, 1))
    for first in range(len(given_at)):
        for last in range(first, len(given_at)):
            t = given_at[last][0] - given_at[first][0]
            assert sum(taken for _, taken in given_at[first : last + 1]) <= burst + per_s * t + 1e-6


def test_a_bucket_that_is_always_asked_gives_its_rate() -> None:
    bucket = Bucket(Rate(7.0, 3), 0.0)
    taken = sum(bucket.take(1, i / 1000)[0] for i in range(60_001))
    assert taken == pytest.approx(3 + 7 * 60, abs=1)
    assert not bucket.full(60.1)
    assert bucket.full(60.1 + 3 / 7)


def test_another_limit_keeps_what_was_spent() -> None:
    bucket = Bucket(Rate(1.0, 10), 0.0)
    assert bucket.take(10, 0.0) == (10, 0.0)
    bucket.change(Rate(1.0, 100), 0.0)
    taken, wait_s = bucket.take(1, 0.0)
    assert (taken, math.isclose(wait_s, 1.0)) == (0, True)
    bucket.change(Rate(1.0, 2), 50.0)
    assert bucket.take(10, 50.0)[0] == 2


def test_what_was_used_is_owed() -> None:
    """Tokens: charged behind, so that a bucket may be overdrawn, and then nothing is had until it is paid."""
    bucket = Bucket(Rate(2.0, 10), 0.0)
    assert bucket.debt_s(0.0) == 0
    bucket.spend(30, 0.0)
    assert bucket.debt_s(0.0) == pytest.approx(10)
    assert bucket.debt_s(4.0) == pytest.approx(6)
    assert bucket.take(1, 4.0) == (0, pytest.approx(6.5))
    assert bucket.debt_s(10.0) == 0
    bucket.spend(1, 11.0)
    assert bucket.debt_s(11.0) == 0


@pytest.mark.parametrize("steps", ["spend forgive", "forgive spend"])
def test_what_is_forgiven_is_not_owed(steps: str) -> None:
    """Whichever is heard of first; and nothing is remembered of it."""
    buckets, rate = Buckets(), Rate(1.0, 10)
    limits = Limits(None, rate)

    async def waits() -> list[float]:
        for step in steps.split():
            await (buckets.spend("sun", rate, 30, "a") if step == "spend" else buckets.forgive("sun", rate, "a"))
        _, before = await buckets.take("sun", limits, 1)
        await buckets.spend("sun", rate, 30, "b")
        await buckets.spend("sun", rate, 30)
        return [before, (await buckets.take("sun", limits, 1))[1]]

    assert asyncio.run(waits()) == pytest.approx([0, 50], abs=1)
    assert set(buckets.pending) == {"b"}


def test_charges_that_nobody_forgives_are_not_kept_for_ever() -> None:
    buckets = Buckets()

    async def spend() -> None:
        for number in range(MAX_PENDING + 5):
            await buckets.spend("sun", Rate(1.0, 10), 1, str(number))

    asyncio.run(spend())
    assert len(buckets.pending) == MAX_PENDING
    assert min(map(int, buckets.pending)) == 5
