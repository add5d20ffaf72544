"""What chats and completions share: choices drawn side by side, told of as they come or when all is there."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from heliostat.generate import Engine, Sampling, Token
from heliostat.generate.text import TextStream
from heliostat.recipe import SamplingDefaults
from serve.openai.protocol import MAX_CHOICES, Generation, Problem, as_problem

TOLD = ("text", "delta", "logprobs", "finish_reason")
"""A streamed part in which all of these are empty is not sent."""
DRAWN_BY = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a request may leave to the defaults of its server, beside the length of its answer."""


def sampling_defaults(model: Any, own: SamplingDefaults) -> SamplingDefaults:
    """What the recipe does not say is as the bundle's generation_config.json says, whether that samples or not."""
    config = model.generation_config
    theirs = {} if config is None else config.to_diff_dict()
    found = {name: theirs.get(name) for name in DRAWN_BY}
    found["max_tokens"] = theirs.get("max_new_tokens")
    return SamplingDefaults(**(found | own.model_dump(exclude_none=True)))


@dataclass
class Piece:
    """What came at once of one choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """Those of the answer itself: not the one that ended it."""
    drawn: int = 0
    """Tokens drawn, the one that ended the answer among them."""
    finish: str | None = None

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.drawn += later.drawn
        self.finish = later.finish


@dataclass(frozen=True)
class Question:
    """One choice to be made of one prompt."""

    prompt: list[int]
    sampling: Sampling
    stop: list[str] = field(default_factory=list)


Take = Callable[[int, Piece], None]
"""Is told of a choice, by its number, what came of it."""


async def draw(engine: Engine, question: Question, take: Callable[[Piece], None]) -> None:
    """Draw a choice to its end: the last piece has `finish`."""
    text, drawn = TextStream(engine.tokenizer, question.prompt, question.stop), 0
    async with aclosing(engine.generate(question.prompt, question.sampling)) as stream:
        async for tokens in stream:
            piece = Piece()
            for token in tokens:
                piece.drawn += 1
                if token.id in engine.end_ids and not question.sampling.ignore_end:
                    piece.finish = "stop"
                    break
                piece.tokens.append(token)
                piece.text += text.push(token.id)
                if text.stopped:
                    piece.finish = "stop"
                    break
            drawn += piece.drawn
            if piece.finish is None and drawn >= question.sampling.max_tokens:
                piece.finish = "length"
            if piece.finish is not None:
                piece.text += text.rest()
            take(piece)
            if piece.finish is not None:
                return


class Answer:
    """A request and how it is answered. Made before anything is drawn: raises Problem or Refused for what cannot be."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]
    """`object` of a streamed part."""

    def __init__(
        self,
        engine: Engine,
        request: Generation,
        fingerprint: str,
        defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 - nobody changes it
    ) -> None:
        """`defaults`: for what the request does not say."""
        unsaid = {name: value for name, value in defaults if name in DRAWN_BY and getattr(request, name) is None}
        self.engine, self.request, self.defaults = engine, request.model_copy(update=unsaid), defaults
        self.begun = time.perf_counter()
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }
        self.prompts, drawing = self.drawing()
        engine.check_sampling(drawing)
        if len(self.prompts) * (request.n or 1) > MAX_CHOICES:
            raise Problem(400, f"n: more than {MAX_CHOICES} choices of all prompts together", "n")
        # A seed gives each choice another stream of random numbers.
        self.questions = [
            Question(prompt, replace(drawing, seed=None if drawing.seed is None else drawing.seed + i), request.stops)
            for prompt in self.prompts
            for i in range(request.n or 1)
        ]
        self.drawn = 0
        self.first_token_s: float | None = None
        """From the beginning to the first token that was drawn."""

    # -- what each kind says

    def drawing(self) -> tuple[list[list[int]], Sampling]:
        """The prompts, and how the answers to each are drawn."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece in the form of a streamed choice."""
        raise NotImplementedError

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece that is all of an answer, in the form of a whole choice."""
        return self.part(index, piece)

    # -- what both do

    async def draw(self, take: Take) -> None:
        """All choices, side by side, to their ends. The failure of one is raised, and ends all."""

        def counted(index: int, piece: Piece) -> None:
            self.drawn += piece.drawn
            if self.drawn and self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self.begun
            take(index, piece)

        choices = enumerate(self.questions)
        tasks = [asyncio.create_task(draw(self.engine, each, partial(counted, index))) for index, each in choices]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self.drawn, "total_tokens": prompt + self.drawn}

    async def whole(self) -> dict[str, Any]:
        pieces = [Piece() for _ in self.questions]
        await self.draw(lambda index, piece: pieces[index].add(piece))
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    async def events(self, every_s: float = 0.0) -> AsyncGenerator[str, None]:
        """Server-sent events, `[DONE]` at the end: the first as soon as there is something, more no sooner than
        `every_s` later with all that has come meanwhile. A failure on the way is an event too: the status has been
        sent."""
        options = self.request.stream_options
        last = options is not None and options.include_usage
        each = options is not None and options.continuous_usage_stats

        def event(choices: list[dict[str, Any]], usage: bool) -> str:
            data = {**self.head, "object": self.chunk, "choices": choices}
            if last or each:
                data["usage"] = self.usage() if usage else None
            return _event(data)

        waiting: dict[int, Piece] = {}
        some = asyncio.Event()

        def take(index: int, piece: Piece) -> None:
            waiting.setdefault(index, Piece()).add(piece)
            some.set()

        # What is drawn does not wait for its reader: it would keep its place in the engine's cache.
        drawing = asyncio.create_task(self.draw(take))
        drawing.add_done_callback(lambda _: some.set())
        try:
            if opening := "".join(event([part], each) for part in self.opening()):
                yield opening
            while waiting or not drawing.done():
                await some.wait()
                some.clear()
                parts = [self.part(index, piece) for index, piece in waiting.items()]
                waiting.clear()
                told = [part for part in parts if any(part.get(name) for name in TOLD)]
                if told:
                    yield "".join(event([part], each) for part in told)
                    if every_s:
                        await asyncio.wait([drawing], timeout=every_s)
            await drawing  # which raises what went wrong
            if last:
                yield event([], True)
        except Exception as error:  # noqa: BLE001 - what the client must hear of
            yield _event(as_problem(error).body())
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
        yield "data: [DONE]\n\n"

    # -- for the kinds

    def sampling(self, max_tokens: int, logprobs: int | None, grammar: str = "") -> Sampling:
        request = self.request
        bias = request.logit_bias or {}
        if wrong := [token for token in bias if not 0 <= token < self.engine.vocab_size]:
            raise Problem(400, f"logit_bias: there is no token {wrong[0]}", "logit_bias")
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            seed=request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            logit_bias=bias,
            logprobs=logprobs,
            grammar=grammar,
            ignore_end=request.ignore_eos and not grammar,
        )

    def room(self, prompt: list[int], asked: int | None, param: str, default: int | None = None) -> int:
        """Tokens that an answer may have. `default`: where neither the request nor `defaults` say (None: what the
        context holds). Raises Problem for what the context does not hold."""
        limit = self.engine.max_length
        if len(prompt) + (asked or 1) > limit:
            raise Problem(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + (asked or 1)} tokens ({len(prompt)} in the {param}, {asked or 1} in the completion).",
                param,
                "context_length_exceeded",
            )
        left = limit - len(prompt)
        return asked or min(left, self.defaults.max_tokens or default or left)

    def token_text(self, token: int) -> str:
        return self.engine.tokenizer.decode([token])


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
