"""How often a tenant may ask, and for how many tokens, over all replicas together.

One actor of the cluster holds each tenant's buckets; replicas draw requests from them, a tenth of a second's worth at
once. So frequent requests seldom wait for the actor, and rare ones, which are drawn singly, are counted one by one. A
language model's tokens are charged when an answer has ended, since only then it is known how many there were.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from serve.keys import Tenant

ACTOR, NAMESPACE = "heliostat-limits", "heliostat"
AHEAD_S = 0.1
"""A replica draws what the tenant may ask in this time, at least one."""
IDLE_S = 300.0
"""The actor ends when it was not asked, or told to stay, for so long and its buckets are full: it knows nothing then
that another would not."""
ASK_S, ATTEMPTS, AGAIN_S = 5.0, 3, 0.2
MAX_PENDING = 10_000
"""Requests of which it is remembered what they were charged, or that they were forgiven."""


class UnreachableError(Exception):
    """The actor does not answer."""


@dataclass(frozen=True)
class Rate:
    per_s: float
    burst: float


@dataclass(frozen=True)
class Limits:
    """A tenant's."""

    requests: Rate | None
    tokens: Rate | None

    @classmethod
    def of(cls, tenant: Tenant) -> Limits | None:
        """None where there are none."""
        requests, tokens = tenant.requests_per_minute, tenant.tokens_per_minute
        if requests is None and tokens is None:
            return None
        burst = tenant.burst or max(1, math.floor((requests or 0) / 10))
        return cls(
            None if requests is None else Rate(requests / 60, burst),
            None if tokens is None else Rate(tokens / 60, tokens),
        )

    @property
    def ahead(self) -> int:
        """Requests that a replica draws at once. One at a time where each is to be asked about the tokens, too."""
        if self.requests is None or self.tokens is not None:
            return 1
        return max(1, math.floor(self.requests.per_s * AHEAD_S))


class Bucket:
    """A token bucket. Times are of any one clock, in seconds."""

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self.left, self.filled = rate, rate.burst, now

    def take(self, wanted: int, now: float) -> tuple[int, float]:
        """As many as there are, up to `wanted`; where there is none, the seconds until there is one."""
        self._fill(now)
        taken = min(wanted, max(0, math.floor(self.left)))
        self.left -= taken
        return taken, 0.0 if taken else (1 - self.left) / self.rate.per_s

    def spend(self, amount: int, now: float) -> None:
        """Take more than there is, too: it has been used."""
        self._fill(now)
        self.left -= amount

    def debt_s(self, now: float) -> float:
        """Seconds until there is anything."""
        self._fill(now)
        return max(0.0, -self.left / self.rate.per_s)

    def full(self, now: float) -> bool:
        self._fill(now)
        return self.left >= self.rate.burst

    def change(self, rate: Rate, now: float) -> None:
        if rate != self.rate:
            self._fill(now)
            self.rate, self.left = rate, min(self.left, rate.burst)

    def _fill(self, now: float) -> None:
        self.left = min(self.rate.burst, self.left + (now - self.filled) * self.rate.per_s)
        self.filled = now


class Buckets:
    """The actor."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self.buckets: dict[tuple[str, str], Bucket] = {}
        self.pending: dict[str, int | None] = {}
        """What requests were charged that may yet be forgiven; None: one that was, and was not charged before."""
        self.idle_s = idle_s
        self.asked = time.monotonic()
        self.ending: asyncio.Task[None] | None = None

    async def take(self, name: str, limits: Limits, wanted: int) -> tuple[int, float]:
        """How many of the `wanted` requests a tenant may make now; where it is none, the seconds to wait."""
        await self.stay()
        now = time.monotonic()
        if limits.tokens is not None and (wait_s := self._bucket(name, "tokens", limits.tokens, now).debt_s(now)):
            return 0, wait_s
        if limits.requests is None:
            return wanted, 0.0
        return self._bucket(name, "requests", limits.requests, now).take(wanted, now)

    async def spend(self, name: str, tokens: Rate, amount: int, request: str = "") -> None:
        """`request`: one that may be forgiven, by its number."""
        if request and request in self.pending:
            del self.pending[request]
            return
        self._remember(request, amount)
        now = time.monotonic()
        self._bucket(name, "tokens", tokens, now).spend(amount, now)

    async def forgive(self, name: str, tokens: Rate, request: str) -> None:
        """A request is not charged for: neither what it was, nor what it will be."""
        amount = self.pending.pop(request, None)
        if amount is None:
            self._remember(request, None)
            return
        now = time.monotonic()
        self._bucket(name, "tokens", tokens, now).spend(-amount, now)

    def _remember(self, request: str, amount: int | None) -> None:
        if request:
            self.pending[request] = amount
            if len(self.pending) > MAX_PENDING:
                del self.pending[next(iter(self.pending))]

    def _bucket(self, name: str, kind: str, rate: Rate, now: float) -> Bucket:
        bucket = self.buckets.setdefault((name, kind), Bucket(rate, now))
        bucket.change(rate, now)
        return bucket

    async def stay(self) -> None:
        self.asked = time.monotonic()
        if self.ending is None:
            self.ending = asyncio.create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        while True:
            await asyncio.sleep(self.idle_s / 5)
            now = time.monotonic()
            if now - self.asked > self.idle_s and all(bucket.full(now) for bucket in self.buckets.values()):
                ray.kill(ray.get_runtime_context().current_actor)


@dataclass
class Drawn:
    """What a replica has drawn for a tenant and not used."""

    limits: Limits
    requests: int = 0
    none_before: float = 0.0
    """There was none to draw, and there will be none before this time."""


class Draws:
    """A replica's side. `source`: of the keys. A tenant has one bucket, whichever of the source's endpoints it asks."""

    def __init__(self, source: str) -> None:
        self.source, self.actor = source, None
        self.drawn: dict[str, Drawn] = {}
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, tenant: str, limits: Limits) -> float:
        """0 where the tenant may make a request now, else the seconds until it may. Raises UnreachableError."""
        async with self.locks[tenant]:  # so that one call draws for those who wait
            held = self.drawn.get(tenant)
            if held is None or held.limits != limits:
                held = self.drawn[tenant] = Drawn(limits)
            now = time.monotonic()
            if not held.requests and now >= held.none_before:
                held.requests, wait_s = await self._ask("take", self._name(tenant), limits, limits.ahead)
                held.none_before = now + wait_s
            if not held.requests:
                return max(held.none_before - now, 0.001)
            held.requests -= 1
            return 0.0

    async def spend(self, tenant: str, limits: Limits, tokens: int, request: str = "") -> None:
        """Charge what an answer took; that to a `request`, by its number, may be forgiven. Raises UnreachableError."""
        if limits.tokens is not None:
            await self._ask("spend", self._name(tenant), limits.tokens, tokens, request)

    async def forgive(self, tenant: str, limits: Limits, request: str) -> None:
        """Take the charge of a request back, also one that is still to come. Raises UnreachableError."""
        if limits.tokens is not None:
            await self._ask("forgive", self._name(tenant), limits.tokens, request)

    def _name(self, tenant: str) -> str:
        return f"{self.source} {tenant}"

    async def stay(self) -> None:
        """Keep the actor (and start it): its first start takes a second, which no request should wait for."""
        await self._ask("stay")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(ASK_S):
                    actor: Any = self.actor or await asyncio.to_thread(_actor)
                    self.actor = actor
                    return await getattr(actor, method).remote(*arguments)
            except (RayError, TimeoutError, ValueError):  # it died, or its name is still a dead one's
                self.actor = None
                await asyncio.sleep(AGAIN_S * attempt)
        raise UnreachableError


def _actor() -> Any:
    """It belongs to no replica, since none must take the others' counts along when it ends."""
    options = {"name": ACTOR, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached", "num_cpus": 0}
    return ray.remote(Buckets).options(**options).remote()
