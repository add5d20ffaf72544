"""The router that stands in front of two versions of a model while both of them live.

It is told the shares of the traffic, sends each request to one version (or a copy of it to the other), and keeps what
became of it until it is asked. Nobody waits for the new version's failures: the old one is asked instead.
"""

import asyncio
import contextvars
import math
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from heliostat.recipe import Recipe
from heliostat.rollout.outcomes import Outcome, Seen
from heliostat.rollout.schedule import Traffic, lot

SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
"""What of a request is forwarded beside its body."""
LEASE_S = 60.0
"""A router that has not been told the shares for so long sends everything to the old version: nobody watches."""
ATTEMPTS = 4
"""How often the old version is asked where the replica that was busy with the request died."""
MAX_COPIES = 64
"""On their way to the new version. What comes meanwhile is not copied, so that a slow version heaps nothing up."""
MAX_SEEN = 100_000


class NoAnswerError(RayServeException):
    """A version's answer ended before it began."""


FAILURES = (RayError, RayServeException, TimeoutError)
"""What asking a version raises: its replica's death, its own error, a full queue, or that it takes too long."""


@dataclass
class Begun:
    """An answer whose first bytes have come."""

    status: int
    headers: list[tuple[bytes, bytes]]
    latency_s: float
    first: bytes
    rest: Any
    """A generator of further messages, None where `first` is all."""

    @property
    def outcome(self) -> Outcome:
        latency_s = self.latency_s if self.status < 400 else math.nan
        return Outcome(self.status >= 500, latency_s, self.first if self.rest is None else b"")

    def drop(self) -> None:
        if self.rest is not None:
            self.rest.cancel()


@dataclass
class Asked:
    """A request, as it is forwarded."""

    scope: dict[str, Any]
    body: bytes
    key: str
    seen: Seen = field(default_factory=lambda: Seen(0.0))


class Router:
    def __init__(self, stable: DeploymentHandle, candidate: tuple[str, str], salt: str, recipe: str) -> None:
        """`candidate`: names of its deployment and application. `salt`: of this rollout's lots. `recipe`: JSON."""
        settings = Recipe.model_validate_json(recipe)
        self.settings, self.max_body_bytes = settings.rollout, settings.deploy.max_body_bytes
        self.stable = stable.options(method_name="forward", stream=True)
        self.candidate = serve.get_deployment_handle(*candidate).options(method_name="forward", stream=True)
        self.salt, self.traffic, self.heard = salt, Traffic(0.0), time.monotonic()
        self.seen: list[Seen] = []
        self.copies: set[asyncio.Task[None]] = set()

    async def exchange(self, traffic: Traffic) -> list[Seen]:
        """Send traffic so from now on; returns what was seen since the last time."""
        self.traffic, self.heard = traffic, time.monotonic()
        seen, self.seen = self.seen, []
        return seen

    async def __call__(self, request: Request) -> Response:
        asked = await self._read(request)
        try:
            return await self._answer(request.method, asked)
        except BackPressureError as error:
            return JSONResponse({"detail": error.message}, 503)

    async def _answer(self, method: str, asked: Asked) -> Response:
        """Raises BackPressureError where the old version's queue is full."""
        if method != "POST":  # pages, and what models there are
            return self._respond(await self._stable(asked), None)
        traffic = self.traffic if time.monotonic() - self.heard < LEASE_S else Traffic(0.0)
        asked.seen.share = traffic.share
        drawn = lot(self.salt, asked.key) if asked.key else random.random()
        if drawn < traffic.share:
            return self._respond(await self._candidate_else_stable(asked), asked.seen)
        copy = self._copy(asked) if traffic.copied else None
        try:
            begun = await self._stable(asked)
        except BackPressureError:
            asked.seen.stable = Outcome(failed=True)
            self._keep(asked.seen)
            raise
        if copy is not None:
            if not copy.done():  # or it waited too long
                copy.set_result(begun.outcome)
            return self._respond(begun, None)
        asked.seen.stable = begun.outcome
        return self._respond(begun, asked.seen)

    async def _read(self, request: Request) -> Asked:
        """The body is read as far as its limit and a bit: the version that gets it refuses it in its own words."""
        parts, length = [], 0
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            if length > self.max_body_bytes:
                break
        body = b"".join(parts)
        key = request.headers.get(self.settings.key_header, "")
        asked = Asked({name: request.scope[name] for name in SCOPE if name in request.scope}, body, key)
        if self.settings.judge:
            asked.seen.body = body
        if key:
            asked.seen.key = 1 + int(lot("", key) * 2**53)
        return asked

    async def _stable(self, asked: Asked) -> Begun:
        for attempt in range(ATTEMPTS):
            try:
                return await _begin(self.stable, asked)
            except RayActorError:
                if attempt + 1 == ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
        raise AssertionError

    async def _candidate_else_stable(self, asked: Asked) -> Begun:
        """The old version answers what the new one fails to, and decides whether what that refuses is wrong."""
        refused = False
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                begun = await _begin(self.candidate, asked)
            if begun.status < 400:
                asked.seen.candidate = begun.outcome
                return begun
            refused = begun.status < 500
            begun.drop()
        except FAILURES:
            pass
        begun = await self._stable(asked)
        asked.seen.candidate = Outcome(failed=not refused or begun.status < 400)
        return begun

    def _copy(self, asked: Asked) -> "asyncio.Future[Outcome] | None":
        """Ask the new version, too; the future is to be told what the old one answered."""
        if len(self.copies) >= MAX_COPIES:
            return None
        stable: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        # In a context of its own: the copy is no part of the request, and does not end with it.
        task = asyncio.create_task(self._compare(asked, stable), context=contextvars.Context())
        self.copies.add(task)
        task.add_done_callback(self.copies.discard)
        return stable

    async def _compare(self, asked: Asked, stable: "asyncio.Future[Outcome]") -> None:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                begun = await _begin(self.candidate, asked)
                outcome, refused = begun.outcome, 400 <= begun.status < 500
                if begun.rest is not None:
                    async for _ in begun.rest:
                        pass
        except FAILURES:
            outcome, refused = Outcome(failed=True), False
        try:
            async with asyncio.timeout(2 * self.settings.timeout_s):
                answered = await stable
        except TimeoutError:  # the old version failed, or its client left: there is no pair
            return
        if refused:  # which is the client's mistake where the old version refuses, too
            outcome.failed = not math.isnan(answered.latency_s)
        asked.seen.stable, asked.seen.candidate = answered, outcome
        self._keep(asked.seen)

    def _respond(self, begun: Begun, seen: Seen | None) -> Response:
        if begun.rest is None:
            response = Response(begun.first, begun.status)
            if seen is not None:
                self._keep(seen)
        else:
            response = StreamingResponse(self._rest(begun, seen), begun.status)
        response.raw_headers = begun.headers
        return response

    async def _rest(self, begun: Begun, seen: Seen | None) -> AsyncIterator[bytes]:
        try:
            yield begun.first
            async for messages in begun.rest:
                for message in messages:
                    yield message.get("body", b"")
        except FAILURES:
            if seen is not None:
                answered = seen.candidate or seen.stable
                assert answered is not None
                answered.failed = True
            raise
        finally:
            begun.drop()
            if seen is not None:
                self._keep(seen)

    def _keep(self, seen: Seen) -> None:
        if len(self.seen) < MAX_SEEN:  # where nobody asks, there is an end to it
            self.seen.append(seen)


async def _begin(version: DeploymentHandle, asked: Asked) -> Begun:
    """Ask a version, and wait for its answer's first bytes. Raises FAILURES."""
    started = time.perf_counter()
    rest: Any = version.remote(asked.scope, asked.body)
    start: dict[str, Any] | None = None
    first, more = b"", True
    try:
        async for messages in rest:
            for message in messages:
                if message["type"] == "http.response.start":
                    start = message
                elif message["type"] == "http.response.body":
                    first, more = first + message.get("body", b""), message.get("more_body", False)
            if start is not None and (first or not more):
                headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
                return Begun(start["status"], headers, time.perf_counter() - started, first, rest if more else None)
    except BaseException:
        rest.cancel()
        raise
    raise NoAnswerError
