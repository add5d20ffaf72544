"""The router that stands in front of two versions of a model while both of them live.

It lets requests in, in the versions' stead: one that both of them get counts once. It is told the shares of the
traffic, sends each request to one version (or a copy of it to the other), and keeps what became of it until it is
asked. Nobody waits for the new version's failures: the old one is asked instead.
"""

import asyncio
import contextvars
import json
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from heliostat.recipe import Recipe
from heliostat.rollout.outcomes import Outcome, Seen
from heliostat.rollout.schedule import Traffic, lot
from serve.gate import ADMITTED, REQUEST, Gate, late, path_of, refusal

SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server", ADMITTED,
)  # fmt: skip
"""What of a request is forwarded beside its body."""
LEASE_S = 60.0
"""A router that has not been told the shares for so long sends everything to the old version: nobody watches."""
AGAIN_S = (0.1, 0.2, 0.4)
"""When the old version is asked again, where the replica that was busy with the request died."""
MAX_COPIES = 64
"""On their way to the new version. What comes meanwhile is not copied, so that a slow version heaps nothing up."""
MAX_SEEN = 100_000
JSON = [(b"content-type", b"application/json")]


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
        refused = 400 <= self.status < 500
        latency_s = self.latency_s if self.status < 400 else math.nan
        return Outcome(self.status >= 500, refused, latency_s, self.first if self.rest is None else b"")

    def drop(self) -> None:
        if self.rest is not None:
            self.rest.cancel()


@dataclass
class Asked:
    """A request, as it is forwarded."""

    scope: dict[str, Any]
    body: bytes
    key: str


class Router:
    def __init__(self, stable: DeploymentHandle, candidate: tuple[str, str], salt: str, recipe: str) -> None:
        """`candidate`: names of its deployment and application. `salt`: of this rollout's lots. `recipe`: JSON."""
        settings = Recipe.model_validate_json(recipe)
        self.settings, self.deploy = settings.rollout, settings.deploy
        self.gate = Gate(self.deploy.keys_file) if self.deploy.keys_file else None
        self.stable = stable.options(method_name="forward", stream=True)
        self.candidate = serve.get_deployment_handle(*candidate).options(method_name="forward", stream=True)
        self.salt, self.traffic, self.heard = salt, Traffic(0.0), time.monotonic()
        self.seen: list[Seen] = []
        self.copies: set[asyncio.Task[Outcome]] = set()

    async def exchange(self, traffic: Traffic) -> list[Seen]:
        """Send traffic so from now on; returns what was seen since the last time."""
        self.traffic, self.heard = traffic, time.monotonic()
        seen, self.seen = self.seen, []
        return seen

    async def __call__(self, request: Request) -> Response:
        if self.gate is not None and (refused := await self.gate.admit(request.scope)) is not None:
            return refused
        try:
            async with asyncio.timeout(self.deploy.body_timeout_s):
                asked = await self._read(request)
        except TimeoutError:
            return refusal(path_of(request.scope), 408, late(self.deploy.body_timeout_s), connection="close")
        if request.method != "POST":  # pages, and what models there are
            return self._respond(await self._stable(asked))
        traffic = self.traffic if time.monotonic() - self.heard < LEASE_S else Traffic(0.0)
        seen = Seen(traffic.share, key=_number(asked.key), body=asked.body if self.settings.judge else b"")
        drawn = lot(self.salt, asked.key) if asked.key else random.random()
        if drawn < traffic.share:
            return await self._candidate_else_stable(asked, seen)
        copy = self._copy(asked) if traffic.copied else None

        def over(stable: Outcome) -> None:
            seen.stable = stable
            if copy is None:
                self._keep(seen)
            else:
                copy.add_done_callback(both_over)

        def both_over(copy: "asyncio.Task[Outcome]") -> None:
            seen.candidate = copy.result().beside(seen.stable)
            self._keep(seen)

        return self._respond(await self._stable(asked), over)

    async def _read(self, request: Request) -> Asked:
        """The body is read as far as its limit and a bit: the version that gets it refuses it in its own words."""
        parts, length = [], 0
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            if length > self.deploy.max_body_bytes:
                break
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        return Asked(scope, b"".join(parts), request.headers.get(self.settings.key_header, ""))

    async def _stable(self, asked: Asked) -> Begun:
        """Asks again where a replica died with the request. A full queue is status 503, as it is without a router."""
        for wait_s in (*AGAIN_S, None):
            try:
                return await _begin(self.stable, asked)
            except BackPressureError as error:
                headers = [*JSON, (b"retry-after", b"%d" % math.ceil(error.retry_after_s or 0))]
                return Begun(503, headers, math.nan, json.dumps({"detail": error.message}).encode(), None)
            except RayActorError:
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
        raise AssertionError

    async def _candidate_else_stable(self, asked: Asked, seen: Seen) -> Response:
        """The old version answers what the new one fails to, or refuses; and is paid for it alone."""
        number = uuid.uuid4().hex

        def over(candidate: Outcome) -> None:
            seen.candidate = candidate
            self._keep(seen)

        outcome = Outcome(failed=True)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                begun = await _begin(self.candidate, replace(asked, scope={**asked.scope, REQUEST: number}))
            if begun.status < 400:
                return self._respond(begun, over)
            outcome = begun.outcome
            begun.drop()
        except FAILURES:
            pass
        if self.gate is not None:
            self.gate.forgive(asked.scope[ADMITTED], number)
        begun = await self._stable(asked)
        over(outcome.beside(begun.outcome))
        return self._respond(begun)

    def _copy(self, asked: Asked) -> "asyncio.Task[Outcome] | None":
        """Ask the new version, too."""
        if len(self.copies) >= MAX_COPIES:
            return None
        asked = replace(asked, scope={**asked.scope, ADMITTED: ""})  # who asked once is charged once
        # In a context of its own: the copy is no part of the request, and does not end with it.
        task = asyncio.create_task(self._copied(asked), context=contextvars.Context())
        self.copies.add(task)
        task.add_done_callback(self.copies.discard)
        return task

    async def _copied(self, asked: Asked) -> Outcome:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                begun = await _begin(self.candidate, asked)
            if begun.rest is not None:
                async for _ in begun.rest:
                    pass
        except FAILURES:
            return Outcome(failed=True)
        return begun.outcome

    def _respond(self, begun: Begun, over: Callable[[Outcome], None] | None = None) -> Response:
        """`over` is told what became of the answer."""
        if begun.rest is not None:
            response: Response = StreamingResponse(_all(begun, over), begun.status)
        else:
            response = Response(begun.first, begun.status)
            if over is not None:
                over(begun.outcome)
        response.raw_headers = begun.headers
        return response

    def _keep(self, seen: Seen) -> None:
        if len(self.seen) < MAX_SEEN:  # where nobody asks, there is an end to it
            self.seen.append(seen)


async def _all(begun: Begun, over: Callable[[Outcome], None] | None) -> AsyncIterator[bytes]:
    outcome = begun.outcome
    try:
        yield begun.first
        async for messages in begun.rest:
            for message in messages:
                yield message.get("body", b"")
    except FAILURES:
        outcome.failed = True
        raise
    finally:
        begun.drop()
        if over is not None:
            over(outcome)


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


def _number(key: str) -> int:
    return 1 + int(lot("", key) * 2**53) if key else 0
