"""What stands before an endpoint's routes: who may ask, how often, how long, and with how much."""

# Annotations are not postponed here, as in all that replicas get.
import asyncio
import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from typing import Any

from fastapi import HTTPException
from ray.serve import metrics
from starlette.responses import JSONResponse, Response

from heliostat.recipe import Refused
from serve.keys import read, whose
from serve.limits import Draws, Limits, UnreachableError
from serve.openai.protocol import Problem

logger = logging.getLogger("heliostat")
OPEN = frozenset({"/", "/healthz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""Paths that need no key: pages, the description, and what load balancers ask."""
ADMITTED = "heliostat.admitted"
"""In the scope of a request that was let in, its tenant; empty where nobody is charged for it. No server lets a client
set it."""
REQUEST = "heliostat.request"
"""In the scope of a request that may be forgiven, its number."""
SPEND = "heliostat.spend"
"""In the scope, what charges the tenant: it is called with a number of tokens."""
READ_S, STAY_S = 1.0, 60.0
"""How often keys are read again, and the limits' actor is told to stay."""
DONE = b"data: [DONE]\n\n"


def refusal(path: str, status: int, message: str, code: str | None = None, **headers: str) -> Response:
    """In the form of the protocol that the path belongs to."""
    body = Problem(status, message, code=code).body() if path.startswith("/v1/") else {"detail": message}
    return JSONResponse(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def path_of(scope: Mapping[str, Any]) -> str:
    """The path below where the application is."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


class Gate:
    """Lets requests in by their keys and their tenants' limits."""

    def __init__(self, source: str) -> None:
        """`source`: of the keys. Raises Refused for one that cannot be read."""
        self.source, self.tenants, self.draws = source, read(source), Draws(source)
        self.watching: asyncio.Task[None] | None = None
        self.spending: set[asyncio.Task[None]] = set()
        self.counted = metrics.Counter(
            "heliostat_serve_admissions",
            "Requests by tenant and outcome: admitted, limited",
            ("tenant", "outcome"),  # type: ignore[arg-type]  # Ray means any tuple of them
        )
        self.strangers = metrics.Counter("heliostat_serve_unauthorized", "Requests without a key that is valid")

    def watch(self) -> None:
        """Follow the source from now on."""
        if self.watching is None:
            self.watching = asyncio.create_task(self._watch())

    async def admit(self, scope: MutableMapping[str, Any]) -> Response | None:
        """None, and the scope says for whom, or the refusal of a request, of which nothing but its head was read."""
        self.watch()
        path = path_of(scope)
        if path in OPEN:
            scope[ADMITTED] = ""
            return None
        key = _key(scope["headers"])
        tenant = whose(self.tenants, key) if key else None
        if tenant is None:
            self.strangers.inc()
            message = "the API key is not valid" if key else "no API key: send it as `Authorization: Bearer KEY`"
            error = ', error="invalid_token"' if key else ""
            return refusal(path, 401, message, "invalid_api_key", www_authenticate=f'Bearer realm="heliostat"{error}')
        limits = Limits.of(self.tenants[tenant])
        if limits is not None:
            try:
                wait_s = await self.draws.take(tenant, limits)
            except UnreachableError:
                return refusal(path, 503, "requests cannot be counted just now", retry_after="1")
            if wait_s:
                self.counted.inc(1, {"tenant": tenant, "outcome": "limited"})
                message = "the tenant's limit of requests or tokens a minute is reached"
                retry_after = str(math.ceil(round(wait_s, 3)))
                return refusal(path, 429, message, "rate_limit_exceeded", retry_after=retry_after)
        self.counted.inc(1, {"tenant": tenant, "outcome": "admitted"})
        scope[ADMITTED] = tenant
        return None

    def spend(self, tenant: str, tokens: int, request: str = "") -> None:
        """Charge a tenant, without waiting; for a `request` that may be forgiven, by its number."""
        self._charge(self.draws.spend, tenant, tokens, request)

    def forgive(self, tenant: str, request: str) -> None:
        """Take the charge of a request back, or the one to come, without waiting."""
        self._charge(self.draws.forgive, tenant, request)

    def _charge(self, change: Callable[..., Any], tenant: str, *arguments: Any) -> None:
        known = self.tenants.get(tenant)
        limits = None if known is None else Limits.of(known)
        if limits is not None and limits.tokens is not None:
            task = asyncio.create_task(_heard(change(tenant, limits, *arguments)))
            self.spending.add(task)  # the loop would forget it
            task.add_done_callback(self.spending.discard)

    async def _watch(self) -> None:
        """What cannot be read any more goes on as it was: a slip of the pen must not shut everyone out."""
        complaint, stayed = "", -math.inf
        while True:
            try:
                self.tenants, complaint = await asyncio.to_thread(read, self.source), ""
            except Refused as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.warning("%s; the keys that were read before go on working", complaint)
            limited = any(Limits.of(tenant) is not None for tenant in self.tenants.values())
            if limited and time.monotonic() - stayed > STAY_S:
                try:
                    await self.draws.stay()
                    stayed = time.monotonic()
                except UnreachableError:
                    logger.warning("the actor that counts requests does not answer: tenants with limits get status 503")
            await asyncio.sleep(READ_S)


async def _heard(asked: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(UnreachableError):  # in which case the next request is not let in
        await asked


def _key(headers: list[tuple[bytes, bytes]]) -> bytes:
    """As OpenAI's clients send it, or as others do. Empty where there is none."""
    sent = dict(reversed(headers))
    scheme, _, key = sent.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        return key.strip()
    return sent.get(b"x-api-key", b"").strip()


class Gated:
    """A gate in front of an application, but for what another gate let in."""

    def __init__(self, app: Any, source: str) -> None:
        self.app, self.gate = app, Gate(source)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self.gate.watch()
        elif scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        else:
            if ADMITTED not in scope and (refused := await self.gate.admit(scope)) is not None:
                await refused(scope, receive, send)
                return
            scope[SPEND] = functools.partial(self.gate.spend, scope[ADMITTED], request=scope.get(REQUEST, ""))
        await self.app(scope, receive, send)


class BodyLimit:
    """Stops reading a request's body once it is longer than `max_body_bytes` (413), or not there after `timeout_s`
    (408)."""

    def __init__(self, app: Any, max_body_bytes: int, timeout_s: float) -> None:
        self.app, self.max_body_bytes, self.timeout_s = app, max_body_bytes, timeout_s

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read, until = 0, asyncio.get_running_loop().time() + self.timeout_s
        whole = False

        async def counted() -> dict[str, Any]:
            nonlocal read, whole
            try:
                async with asyncio.timeout_at(None if whole else until):  # behind it, who waits for the client to go
                    message = await receive()
            except TimeoutError:
                # The rest of it is not waited for either.
                raise HTTPException(408, late(self.timeout_s), {"connection": "close"}) from None
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413, f"body: more than {self.max_body_bytes} bytes")
            whole = not message.get("more_body", False)
            return message

        await self.app(scope, counted, send)


def late(timeout_s: float) -> str:
    return f"body: not here after {timeout_s:g} s"


class Deadline:
    """Ends the work on a request that is not answered after `timeout_s`: 504, or where an answer has begun to stream,
    an event that says so."""

    def __init__(self, app: Any, timeout_s: float) -> None:
        self.app, self.timeout_s = app, timeout_s

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun: dict[str, Any] | None = None

        async def noted(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = begun or message
            await send(message)

        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                await self.app(scope, receive, noted)
        except TimeoutError:
            if not deadline.expired():
                raise
            message = f"not answered within {self.timeout_s:g} s"
            if begun is None:
                await refusal(path_of(scope), 504, message)(scope, receive, send)
                return
            if not dict(begun["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise
            problem = json.dumps(Problem(504, message).body())
            await send({"type": "http.response.body", "body": f"data: {problem}\n\n".encode() + DONE})
