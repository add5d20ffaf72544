"""What chats and completions share: choices drawn side by side, put together as they come or when all is there."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from heliostat.generate import Engine, Sampling, Token
from heliostat.generate.text import TextStream
from serve.openai.protocol import MAX_CHOICES, Generation, Problem, as_problem


@dataclass
class Piece:
    """What came at once of one choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """Those of the answer itself: not the one that ended it."""
    drawn: int = 0
    """Tokens drawn, the one that ended the answer among them."""
    finish: str | None = None


@dataclass(frozen=True)
class Question:
    """One choice to be made of one prompt."""

    prompt: list[int]
    sampling: Sampling
    stop: list[str] = field(default_factory=list)


async def pieces(engine: Engine, question: Question) -> AsyncGenerator[Piece, None]:
    """An answer as it comes; the last piece has `finish`. Closing the iterator gives the answer up."""
    text = TextStream(engine.tokenizer, question.prompt, question.stop)
    drawn = 0
    stream = engine.generate(question.prompt, question.sampling)
    try:
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
            yield piece
            if piece.finish is not None:
                return
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def merged(engine: Engine, questions: list[Question]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(choice, piece) of all questions as they come. A failure of one is raised, and ends all."""
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def one(index: int, question: Question) -> None:
        stream = pieces(engine, question)
        try:
            async for piece in stream:
                queue.put_nowait((index, piece))
        except Exception as error:  # noqa: BLE001 - raised again by who reads the queue
            queue.put_nowait((index, error))
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(one(index, question)) for index, question in enumerate(questions)]
    left = len(tasks)
    try:
        while left:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Answer:
    """A request and how it is answered. Made before anything is drawn: raises Problem or Refused for what cannot be."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]
    """`object` of a streamed part."""

    def __init__(self, engine: Engine, request: Generation, fingerprint: str) -> None:
        self.engine, self.request = engine, request
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

    def join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """A choice's parts in the form of a whole one."""
        raise NotImplementedError

    # -- what both do

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        stream = self.pieces()
        try:
            async for index, piece in stream:
                self.drawn += piece.drawn
                if self.drawn and self.first_token_s is None:
                    self.first_token_s = time.perf_counter() - self.begun
                yield self.part(index, piece)
        finally:
            await stream.aclose()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        stream = merged(self.engine, self.questions)
        try:
            async for found in stream:
                yield found
        finally:
            await stream.aclose()

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self.drawn, "total_tokens": prompt + self.drawn}

    async def whole(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self.questions]
        async for part in self.parts():
            parts[part["index"]].append(part)
        choices = [self.join(of_one) for of_one in parts]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events, `[DONE]` at the end. A failure on the way is an event too: the status has been sent."""
        options = self.request.stream_options
        last, each = (
            options is not None and options.include_usage,
            options is not None and options.continuous_usage_stats,
        )

        def event(choices: list[dict[str, Any]], usage: bool) -> str:
            data = {**self.head, "object": self.chunk, "choices": choices}
            if last or each:
                data["usage"] = self.usage() if usage else None
            return _event(data)

        stream = self.parts()
        try:
            for part in self.opening():
                yield event([part], each)
            async for part in stream:
                if any(part.get(name) for name in ("text", "delta", "logprobs", "finish_reason")):
                    yield event([part], each)
            if last:
                yield event([], True)
        except Exception as error:  # noqa: BLE001 - what the client must hear of
            yield _event(as_problem(error).body())
        finally:
            await stream.aclose()
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
            seed=request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=bias,
            logprobs=logprobs,
            grammar=grammar,
            ignore_end=request.ignore_eos and not grammar,
        )

    def room(self, prompt: list[int], asked: int | None, default: int | None, param: str) -> int:
        """Tokens that an answer may have. Raises Problem for what the context does not hold."""
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
        return asked or min(left, default or left)

    def token_text(self, token: int) -> str:
        return self.engine.tokenizer.decode([token])


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
