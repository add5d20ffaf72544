"""llama.cpp's server in this process, asked over a socket in a folder of its own: the fast engine on CPUs.

It gets token ids and gives token ids. What it would do otherwise than `Sampling` says is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import xllamacpp

from heliostat.generate import EngineFailed, Sampling, Token, gguf_file
from heliostat.generate.drawing import Grammars, end_ids
from heliostat.generate.parity import LONG_TOKENS, Parity, parity
from heliostat.recipe import GgufDtype, Refused

REQUESTS = 32
"""Answers in progress; more wait for their turn."""
SHARE_TOKENS = 256
"""Of an answer: for so many its place in the cache is sure, then it takes its turn again. Otherwise a request that
does not say how long its answer may be would keep the whole context."""
FORCE = 1e9
"""Added to a logit, so that its token is drawn."""
LIMITS: dict[GgufDtype, tuple[float, float]] = {"f32": (1e-3, 1e-2), "f16": (1e-2, 1e-1), "q8_0": (0.1, 1.0)}
"""The mean and the worst difference of log-probabilities that a type explains, in units of their spread. f32 differs in
the order of sums (4e-5 and 1e-4 were measured), f16 rounds weights to 1 in 2048 (2e-3 and 3e-2), q8_0 to 1 in 254 of
the largest of 32 (4e-2 and 0.4 in models that were never trained, which round worst). A tensor in the wrong place makes
differences like the spread itself."""
NO_LIMIT = aiohttp.ClientTimeout(total=None)
SEEDS = 2**32 - 1
"""The last one stands for a random seed."""


class LlamaCppEngine:
    """Greedy answers of an f32 file are those of `model.generate`."""

    def __init__(
        self, file: Path, dtype: GgufDtype, model: Any, tokenizer: Any, *, cache_tokens: int, threads: int | None = None
    ) -> None:
        """`file`: written from the model, see `converted`. `cache_tokens`: keys and values kept, of all requests
        together. `threads`: processors of the engine (None: llama.cpp's choice)."""
        config = model.config.get_text_config()
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.max_length = min(config.max_position_embeddings, cache_tokens)
        self.end_ids = end_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self.vocab_size, self.end_ids)
        self._cache = Cache(cache_tokens, REQUESTS)
        self._folder = tempfile.TemporaryDirectory(prefix="llama-cpp-")  # only this user may enter it
        self._socket = f"{self._folder.name}/server.sock"
        try:
            self._server: Any = xllamacpp.Server(_parameters(file, dtype, self._socket, cache_tokens, threads))
        except RuntimeError as error:
            raise EngineFailed(f"llama.cpp does not start with {file}") from error

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[Token], None]:
        self.check()
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        # What cannot go on from its tokens alone keeps its place to the end.
        whole = matcher is not None or (sampling.seed is not None and sampling.temperature > 0)
        ends = frozenset[int]() if sampling.ignore_end else self.end_ids
        ids, last = list(prompt), len(prompt) + sampling.max_tokens
        # llama.cpp also ends a share where it takes a token for an end that is none here.
        while len(ids) < last:
            begun, share = len(ids), last - len(ids) if whole else min(SHARE_TOKENS, last - len(ids))
            body = _body(sampling, share, begun - len(prompt))
            async with (
                self._cache.room(begun + share),
                aclosing(self._drawn(ids, body, sampling.logprobs or 0)) as parts,
            ):
                async for tokens in parts:
                    ended = next((i + 1 for i, token in enumerate(tokens) if token.id in ends), None)
                    tokens = tokens[:ended]
                    if matcher is not None and not all(matcher.consume_token(token.id) for token in tokens):
                        raise EngineFailed("llama.cpp left the grammar")
                    ids += [token.id for token in tokens]
                    yield tokens
                    if ended:
                        return
            if len(ids) == begun:
                raise EngineFailed("llama.cpp drew nothing")

    async def _drawn(self, prompt: list[int], body: dict[str, Any], top: int) -> AsyncGenerator[list[Token], None]:
        """Together what came while the tokens before were dealt with."""
        address, count, rest = "http://llama.cpp/completion", 0, b""
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._socket), timeout=NO_LIMIT) as session,
                session.post(address, json={"prompt": prompt, **body}) as response,
            ):
                if response.status != 200:
                    raise EngineFailed(await response.text())
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    events = [event for line in lines if (event := _event(line))]
                    tokens = [token for event in events for token in _tokens(event, top)]
                    count += len(tokens)
                    if events and events[-1]["tokens_predicted"] != count:
                        raise EngineFailed("llama.cpp kept a token back")
                    if tokens:
                        yield tokens
        except aiohttp.ClientError as error:
            raise EngineFailed(f"llama.cpp does not answer: {error!r}") from error

    async def score(self, ids: list[int], top: int) -> list[Token]:
        return [Token(ids[0]), *await self.score_from(ids, 1, top)]

    async def score_from(self, ids: list[int], first: int, top: int) -> list[Token]:
        """Of the tokens from `first` on: each is made the likeliest, and llama.cpp says how likely it was."""
        self.check()
        body = _body(Sampling(1, temperature=0, logprobs=top), 1, 0)
        found = []
        async with self._cache.room(len(ids)):
            for i in range(first, len(ids)):
                async with aclosing(self._drawn(ids[:i], {**body, "logit_bias": [[ids[i], FORCE]]}, top)) as parts:
                    found += [token async for tokens in parts for token in tokens]
        return found

    def check_sampling(self, sampling: Sampling) -> None:
        for field in ("frequency_penalty", "presence_penalty"):
            if getattr(sampling, field):
                raise Refused(field, "llama.cpp would count the prompt's tokens too", "leave it out")

    def check_grammar(self, grammar: str) -> None:
        self._grammars.matcher(grammar)
        if not self.end_ids:
            raise Refused("grammar", "this model has no token at which an answer could end")
        if unknown := [each for each in grammar if not each.isascii() and each not in self._characters]:
            raise Refused("grammar", f"llama.cpp is given no token that spells {unknown[0]!r}")

    @cached_property
    def _characters(self) -> frozenset[str]:
        texts = (gguf_file.text(self.token_bytes(token)) for token in range(self.vocab_size))
        return frozenset("".join(text for text in texts if text))

    def token_bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)

    def check(self) -> None:
        # Where llama.cpp itself fails, it ends the process.
        if self._server is None:
            raise EngineFailed("the engine has stopped")

    def close(self) -> None:
        self._server = None
        self._folder.cleanup()


class Cache:
    """Who may use how much of it: first come, first served."""

    def __init__(self, tokens: int, requests: int) -> None:
        self._tokens, self._requests = tokens, requests
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, tokens: int) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._tokens, self._requests = self._tokens + tokens, self._requests + 1
            else:
                turn.cancel()
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            tokens, turn = self._waiting[0]
            if not turn.done():
                if tokens > self._tokens or not self._requests:
                    return
                self._tokens, self._requests = self._tokens - tokens, self._requests - 1
                turn.set_result(None)
            self._waiting.popleft()


def _parameters(file: Path, dtype: GgufDtype, socket: str, cache_tokens: int, threads: int | None) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.hostnames = [socket]
    parameters.n_ctx, parameters.n_parallel, parameters.kv_unified = cache_tokens, REQUESTS, True
    parameters.fit_params = False  # it would choose another length
    parameters.cache_ram_mib, parameters.cache_idle_slots = 0, False  # no second cache
    parameters.ui, parameters.verbosity = False, 0
    if threads:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    if dtype == "f32":
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Its fused attention computes in half precision.
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


def _body(sampling: Sampling, count: int, drawn: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "n_predict": count,
        "stream": True,
        "return_tokens": True,
        # Those that are named are used, in this order: `Sampling`'s.
        "samplers": ["temperature", "top_k", "top_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "n_probs": 0 if sampling.logprobs is None else max(1, sampling.logprobs),
    }
    if sampling.seed is not None:
        body["seed"] = (sampling.seed + drawn) % SEEDS
    if sampling.grammar:
        body["grammar"] = f"%llguidance {{}}\n{sampling.grammar}"
    return body


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line of the stream tells, if anything."""
    name, _, data = line.partition(b": ")
    if name not in (b"data", b"error"):
        return None
    event = json.loads(data)
    if "tokens" not in event:
        raise EngineFailed(data.decode())
    return event


def _tokens(event: dict[str, Any], top: int) -> list[Token]:
    ids = event["tokens"]
    reports = event.get("completion_probabilities")
    if not reports:
        return [Token(token) for token in ids]
    return [
        Token(token, each["logprob"], tuple((one["id"], one["logprob"]) for one in each["top_logprobs"][:top]))
        for token, each in zip(ids, reports, strict=False)
    ]


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
