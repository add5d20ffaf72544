"""llama.cpp in this process, a step for all requests at once: the fast engine on CPUs.

Tokens are drawn as the embedded engine draws them (`drawing`), from llama.cpp's logits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heliostat.generate import EngineFailed, Sampling, Token, gguf_file
from heliostat.generate.drawing import Draw, Grammars, draw, end_ids, report
from heliostat.generate.llama_api import STEP_TOKENS, Llama
from heliostat.generate.parity import LONG_TOKENS, Parity, parity
from heliostat.recipe import GgufDtype, Refused

logger = logging.getLogger("heliostat")
REQUESTS = 32
"""Answers in progress; more wait for their turn."""
SHARE_TOKENS = 256
"""Of an answer: for so many its place in the cache is sure, then it takes its turn again where others have the rest.
Otherwise a request that does not say how long its answer may be would keep the whole context."""
WORTH_TOKENS = 64
"""Of a former text: fewer are as soon read again as copied."""
SCORED_TOKENS = 64
"""Of a text, in one step: each needs a row of logits."""
LIMITS: dict[GgufDtype, tuple[float, float]] = {"f32": (1e-3, 1e-2), "f16": (1e-2, 1e-1), "q8_0": (0.1, 1.0)}
"""The mean and the worst difference of log-probabilities that a type explains, in units of their spread. f32 differs in
the order of sums (4e-5 and 1e-4 were measured), f16 rounds weights to 1 in 2048 (2e-3 and 3e-2), q8_0 to 1 in 254 of
the largest of 32 (4e-2 and 0.4 in models that were never trained, which round worst). A tensor in the wrong place makes
differences like the spread itself."""


@dataclass(eq=False)
class Request:
    """An answer to be drawn, or a text to be scored. The engine's thread has it, but for what is told to its reader."""

    ids: list[int]
    """The prompt, then what was drawn; or the text."""
    length: int
    """At which it ends."""
    ends: frozenset[int] = frozenset()
    """Tokens at which it ends before."""
    draw: Draw | None = None
    """None: it is scored."""
    first: int = 0
    """Of a text: the first token that is scored."""
    top: int = 0
    sequence: int = -1
    held: int = 0
    """Of its tokens, from the first on, keys and values are in the cache."""
    room: int = 0
    """Tokens that the cache keeps for it."""
    left: bool = False
    """By its reader."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    some: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: list[Token] = field(default_factory=list)
    ended: bool = False
    error: str = ""

    @property
    def wanted(self) -> range:
        """Positions behind which logits are wanted."""
        return range(len(self.ids) - 1, len(self.ids)) if self.draw else range(self.first - 1, len(self.ids) - 1)

    @property
    def unread(self) -> int:
        """Tokens that the model has to read before it says something new."""
        return self.wanted.stop - self.held

    def take(self, tokens: list[Token]) -> bool:
        """What the model said behind what it has read. Whether it has come to its end."""
        if self.draw is None:
            return self.unread == 0
        self.ids += [token.id for token in tokens]
        return len(self.ids) >= self.length or tokens[-1].id in self.ends

    def arrive(self, tokens: list[Token], ended: bool, error: str) -> None:
        """In the reader's loop."""
        self.arrived += tokens
        self.ended, self.error = ended, error
        self.some.set()


class Cache:
    """Keys and values of requests in progress, and copies of former ones for texts that begin as they did. These are
    apart, since attention looks through all places that are taken, whose ever they are."""

    def __init__(self, llama: Llama, tokens: int, requests: int) -> None:
        self._llama, self._tokens, self._free = llama, tokens, tokens
        self._unused = list(range(requests))
        self._active: list[Request] = []
        self._former: dict[tuple[int, ...], np.ndarray] = {}
        """By its tokens, the one that ended last at the end; as many tokens as the cache has."""

    def enter(self, request: Request, room: int) -> bool:
        """Whether there was room for so many tokens. Those with which another text begins, too, are held then."""
        if room > self._free:
            return False
        request.sequence, request.room, request.held = self._unused.pop(), 0, 0
        # What the model says behind the last token that is held is not known any more.
        last = request.wanted.start
        shared = {other: min(last, other.held, _shared(other.ids, request.ids)) for other in self._active}
        former = {ids: min(last, _shared(ids, request.ids)) for ids in self._former}
        beside, before = max(shared.values(), default=0), max(former.values(), default=0)
        if beside and beside >= before:
            other = next(each for each, count in shared.items() if count == beside)
            self._llama.share(other.sequence, request.sequence, beside)
            request.held = beside
        elif before >= WORTH_TOKENS:
            ids = next(each for each, count in former.items() if count == before)
            if self._llama.restore(request.sequence, self._former[ids], before):
                request.held = before
            if before == len(ids):
                del self._former[ids]  # it will be kept as the beginning of this one
        self._active.append(request)
        return self.grow(request, room)

    def grow(self, request: Request, tokens: int) -> bool:
        """Whether there was room for so many more."""
        if tokens > self._free:
            return False
        self._free -= tokens
        request.room += tokens
        return True

    def leave(self, request: Request) -> None:
        self._free += request.room
        self._active.remove(request)
        if request.held >= WORTH_TOKENS:
            self._former[tuple(request.ids[: request.held])] = self._llama.copy(request.sequence)
            while sum(map(len, self._former)) > self._tokens:
                del self._former[next(iter(self._former))]
        self._llama.forget(request.sequence)
        self._unused.append(request.sequence)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class LlamaCppEngine:
    """Greedy answers of an f32 file are those of `model.generate`."""

    def __init__(
        self, file: Path, dtype: GgufDtype, model: Any, tokenizer: Any, *, cache_tokens: int, threads: int | None = None
    ) -> None:
        """`file`: written from the model, see `converted`. `cache_tokens`: keys and values kept, of all requests
        together. `threads`: processors of the engine (None: all). Raises EngineFailed."""
        config = model.config.get_text_config()
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.max_length = min(config.max_position_embeddings, cache_tokens)
        self.end_ids = end_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self.vocab_size, self.end_ids)
        self._llama = Llama(file, dtype, self.vocab_size, tokens=cache_tokens, sequences=REQUESTS, threads=threads)
        self._cache = Cache(self._llama, cache_tokens, REQUESTS)
        self._waiting: deque[Request] = deque()
        self._changed, self._closing, self._failed = threading.Condition(), False, ""
        self._thread = threading.Thread(target=self._run, name="llama.cpp", daemon=True)
        self._thread.start()

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[Token], None]:
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        ends = frozenset[int]() if sampling.ignore_end else self.end_ids
        request = Request(list(prompt), len(prompt) + sampling.max_tokens, ends, Draw(sampling, matcher, prompt))
        async with contextlib.aclosing(self._told(request)) as told:
            async for tokens in told:
                yield tokens

    async def score(self, ids: list[int], top: int) -> list[Token]:
        return [Token(ids[0]), *await self.score_from(ids, 1, top)]

    async def score_from(self, ids: list[int], first: int, top: int) -> list[Token]:
        """Of the tokens from `first` on."""
        if first >= len(ids):
            return []
        request = Request(list(ids), len(ids), first=first, top=top)
        return [token async for tokens in self._told(request) for token in tokens]

    async def _told(self, request: Request) -> AsyncGenerator[list[Token], None]:
        if request.length > self.max_length:
            raise EngineFailed(f"{request.length} tokens are more than the {self.max_length} of the context")
        with self._changed:
            self.check()
            self._waiting.append(request)
            self._changed.notify()
        try:
            while not request.ended:
                await request.some.wait()
                request.some.clear()
                tokens, request.arrived = request.arrived, []
                if tokens:
                    yield tokens
                if request.error:
                    raise EngineFailed(request.error)
        finally:
            request.left = True

    def check_sampling(self, sampling: Sampling) -> None:
        pass

    def check_grammar(self, grammar: str) -> None:
        self._grammars.matcher(grammar)

    def token_bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)

    def check(self) -> None:
        if self._failed or self._closing:
            raise EngineFailed(self._failed or "the engine has stopped")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._llama.close()

    # -- in the engine's own thread

    def _run(self) -> None:
        torch.set_num_threads(1)  # logits are few, and threads that rest between them are in the way of llama.cpp's
        active: list[Request] = []
        told: list[tuple[Request, list[Token], bool]] = []
        try:
            while not self._closing:
                active = self._admitted(active)
                rows = self._added(active)
                # Now, since who hears it takes the interpreter, which the step itself does without.
                _tell(told)
                if active:
                    found = self._drawn(rows, self._llama.step())
                    told = [(request, tokens, request.take(tokens)) for request, tokens in found.items()]
                    active = self._staying(active, {request for request, _, ended in told if ended})
                else:
                    told = []
                    self._wait()
        except Exception as error:
            self._failed = f"the engine has stopped: {error}"
            logger.exception("llama.cpp's thread has stopped")
        finally:
            with self._changed:
                self._closing = True
                stranded = [*active, *self._waiting]
            _tell([(request, [], True) for request in stranded], self._failed or "the engine has stopped")

    def _wait(self) -> None:
        """Until there is something to do."""
        with self._changed:
            while not (self._waiting or self._closing):
                self._changed.wait()

    def _admitted(self, active: list[Request]) -> list[Request]:
        """Those in progress, and of those that wait as many as there is room for: first come, first served."""
        here = [request for request in active if not request.left]
        for request in active:
            if request.left:
                self._cache.leave(request)
        while self._waiting and len(here) < REQUESTS:
            request = self._waiting[0]
            if not request.left:
                if not self._cache.enter(request, min(request.length, len(request.ids) + SHARE_TOKENS)):
                    break
                here.append(request)
            self._waiting.popleft()
        return here

    def _added(self, active: list[Request]) -> list[tuple[Request, int]]:
        """What is wanted of the next step, in the order of its logits: of whom, and behind which place."""
        left, rows = STEP_TOKENS, []
        for request in sorted(active, key=lambda each: each.unread > 1):  # answers do not wait for prompts
            count = min(request.unread, left, STEP_TOKENS if request.draw else SCORED_TOKENS)
            if count == 0:
                break
            begin, end, wanted = request.held, request.held + count, request.wanted
            self._llama.add(request.sequence, begin, request.ids[begin:end], wanted)
            request.held, left = end, left - count
            rows += [(request, place) for place in range(max(begin, wanted.start), end)]
        return rows

    def _drawn(self, rows: list[tuple[Request, int]], logits_OV: Tensor) -> dict[Request, list[Token]]:
        """What each request hears of the logits behind its places."""
        found: dict[Request, list[Token]] = {}
        drawing = [(row, request, request.draw) for row, (request, _) in enumerate(rows) if request.draw]
        if drawing:
            theirs_RV = logits_OV if len(drawing) == len(rows) else logits_OV[[row for row, *_ in drawing]]
            tokens = draw([each for *_, each in drawing], theirs_RV).tolist()
            for token, (_, request, each) in zip(tokens, drawing, strict=True):
                found[request] = [each.reports.pop() if each.reports else Token(token)]
        for row, (request, place) in enumerate(rows):
            if request.draw is None:
                scored = report(logits_OV[row].log_softmax(-1), request.ids[place + 1], request.top)
                found.setdefault(request, []).append(scored)
        return found

    def _staying(self, active: list[Request], ended: set[Request]) -> list[Request]:
        """Where an answer outgrows its room and there is no more, it waits for its turn."""
        staying = []
        for request in active:
            more = min(SHARE_TOKENS, request.length - request.room)
            if request not in ended and (len(request.ids) <= request.room or self._cache.grow(request, more)):
                staying.append(request)
                continue
            self._cache.leave(request)
            if request not in ended:
                self._waiting.append(request)
        return staying


def _tell(told: list[tuple[Request, list[Token], bool]], error: str = "") -> None:
    """Each in its own loop, all of a loop at once."""

    def arrive(loop: asyncio.AbstractEventLoop) -> None:
        for request, tokens, ended in told:
            if request.loop is loop:
                request.arrive(tokens, ended, error)

    for loop in {request.loop for request, *_ in told}:
        with contextlib.suppress(RuntimeError):  # it has ended, and nobody listens
            loop.call_soon_threadsafe(arrive, loop)


def converted(digest: str, model: Any, tokenizer: Any, dtype: GgufDtype, threads: int | None = None) -> Path:
    """The file of a bundle, which has this digest, this model in float32 and this tokenizer: kept in the user's cache,
    written where it is not there. Raises Refused for a model that is not converted, and for a file whose answers are
    not the bundle's."""
    path = _cache_folder() / f"{digest[:32]}-{dtype}-{gguf_file.VERSION}.gguf"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = end_ids(model, tokenizer)
    spelled = Grammars(tokenizer, model.config.vocab_size, ends).token_bytes
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends, default=None)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        gguf_file.write(beside, model, dtype, spelled, end, special)
        check_parity(beside, dtype, model, tokenizer, threads)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def check_parity(file: Path, dtype: GgufDtype, model: Any, tokenizer: Any, threads: int | None = None) -> Parity:
    """Raises Refused for a file whose answers are not those of the model, as far as its type allows."""
    length = min(model.config.max_position_embeddings, LONG_TOKENS)
    try:
        engine = LlamaCppEngine(file, dtype, model, tokenizer, cache_tokens=length, threads=threads)
    except EngineFailed as error:
        raise Refused("deploy.engine", str(error), gguf_file.INSTEAD) from error
    try:
        found = parity(engine, model, tokenizer)
    finally:
        engine.close()
    mean, worst = LIMITS[dtype]
    if not (found.mean <= mean and found.worst <= worst and found.top <= 2 * worst):  # not numbers are not, either
        raise Refused(
            "deploy.engine",
            f"as {dtype}, llama.cpp does not answer as the bundle does: its log-probabilities are off by "
            f"{found.mean:.2g} on average and {found.worst:.2g} at most, in units of their spread "
            f"(allowed: {mean:g} and {worst:g})",
            gguf_file.INSTEAD,
        )
    return found


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heliostat" / "gguf"
