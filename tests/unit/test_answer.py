"""How answers are told of as they come, drawn by the embedded engine in this process."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from heliostat.generate import Sampling
from heliostat.recipe import SamplingDefaults
from serve.openai.answer import sampling_defaults
from serve.openai.chat import ChatAnswer
from serve.openai.completion import CompletionAnswer
from serve.openai.protocol import ChatRequest, CompletionRequest
from tests.generation import model_of, running, tiny_tokenizer

EVERY_S = 0.2
REQUEST = {
    "model": "tiny",
    "prompt": ["the mirrors", "of the sun"],
    "n": 2,
    "max_tokens": 200,
    "temperature": 0,
    "logprobs": 1,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = tiny_tokenizer()
    found.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return found


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return model_of("llama", tokenizer)


def data(event: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in event.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(events: list[str]) -> list[dict[str, Any]]:
    """The choices of a stream, put together as a client does."""
    choices: dict[int, dict[str, Any]] = {}
    for each in events:
        for chunk in data(each):
            for part in chunk["choices"]:
                whole = choices.setdefault(part["index"], {**part, "text": "", "logprobs": {}})
                whole["text"] += part["text"]
                whole["finish_reason"] = part["finish_reason"]
                for name, values in part["logprobs"].items():
                    whole["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("every_s", [0.0, EVERY_S])
def test_a_stream_tells_what_a_whole_answer_does(model: Any, tokenizer: Any, every_s: float) -> None:
    async def ask() -> tuple[dict[str, Any], list[str], list[float]]:
        async with running(model, tokenizer) as engine:
            request = CompletionRequest.model_validate(REQUEST)
            whole = await CompletionAnswer(engine, request, "").whole()
            events, times = [], []
            async for event in CompletionAnswer(engine, request, "").events(every_s):
                events.append(event)
                times.append(time.perf_counter())
            return whole, events, times

    whole, events, times = asyncio.run(ask())
    for choice, expected in zip(joined(events), whole["choices"], strict=True):
        # The order of sums depends on who shares a step.
        values, expected_values = (each["logprobs"].pop("token_logprobs") for each in (choice, expected))
        assert values == pytest.approx(expected_values, abs=1e-4)
        for each in (choice, expected):
            each["logprobs"]["top_logprobs"] = [list(top) for top in each["logprobs"]["top_logprobs"]]
        assert choice == expected
    assert data(events[-2])[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 4 * 200
    assert events[-1] == "data: [DONE]\n\n"
    if every_s:  # but what comes last, and the usage and the end behind it
        gaps = [later - earlier for earlier, later in pairwise(times)][:-3]
        assert gaps
        assert min(gaps) > 0.99 * every_s  # a timer may be early by its clock's resolution


def test_each_token_is_told_alone_where_nothing_holds_it(model: Any, tokenizer: Any) -> None:
    async def ask() -> list[str]:
        async with running(model, tokenizer) as engine:
            request = CompletionRequest.model_validate({**REQUEST, "prompt": "the mirrors", "n": 1, "max_tokens": 30})
            return [event async for event in CompletionAnswer(engine, request, "").events()]

    told = [
        len(part["logprobs"]["tokens"]) for event in asyncio.run(ask()) for c in data(event) for part in c["choices"]
    ]
    assert sum(told) == 30
    assert len(told) > 3  # held back as above, they would be two


def test_a_reader_who_leaves_ends_the_drawing(model: Any, tokenizer: Any) -> None:
    async def ask() -> tuple[int, int]:
        async with running(model, tokenizer) as engine:
            request = CompletionRequest.model_validate({**REQUEST, "max_tokens": 1000})
            answer = CompletionAnswer(engine, request, "")
            async with aclosing(answer.events(EVERY_S)) as events:
                await anext(events)
            drawn = answer.drawn
            await asyncio.sleep(EVERY_S)
            return drawn, answer.drawn

    left, later = asyncio.run(ask())
    assert 0 < left == later < 4000


def test_a_chat_begins_with_its_role_at_once(model: Any, tokenizer: Any) -> None:
    async def ask() -> list[str]:
        async with running(model, tokenizer) as engine:
            messages = [{"role": "user", "content": "the mirrors"}]
            request = ChatRequest.model_validate({"model": "tiny", "messages": messages, "max_tokens": 20, "seed": 1})
            return [event async for event in ChatAnswer(engine, request, "").events(EVERY_S)]

    first, *rest = asyncio.run(ask())
    assert [part["delta"] for chunk in data(first) for part in chunk["choices"]] == [
        {"role": "assistant", "content": ""}
    ]
    last = [part for event in rest for chunk in data(event) for part in chunk["choices"]][-1]
    assert last["finish_reason"] in ("stop", "length")


def test_a_request_that_does_not_say_is_drawn_as_the_recipe_and_else_the_bundle_say(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    saved = copy.deepcopy(model)
    saved.generation_config.update(do_sample=True, temperature=0.5, top_k=9, repetition_penalty=1.2, max_new_tokens=40)
    saved.save_pretrained(tmp_path)
    bundle = type(model).from_pretrained(tmp_path)

    async def ask(own: SamplingDefaults, **said: float) -> tuple[Sampling, Sampling]:
        async with running(bundle, tokenizer) as engine:
            defaults = sampling_defaults(bundle, own)
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "the mirrors"}], **said}
            text = {"model": "tiny", "prompt": "the mirrors", **said}
            answers = (
                ChatAnswer(engine, ChatRequest.model_validate(chat), "", defaults),
                CompletionAnswer(engine, CompletionRequest.model_validate(text), "", defaults),
            )
            return tuple(answer.questions[0].sampling for answer in answers)

    def asked(own: SamplingDefaults, **said: float) -> Sampling:
        one, other = asyncio.run(ask(own, **said))
        assert one == other
        return one

    theirs = Sampling(40, temperature=0.5, top_k=9, repetition_penalty=1.2)
    own = SamplingDefaults(temperature=0)
    assert asked(SamplingDefaults()) == theirs
    assert asked(own.model_copy(update={"top_p": 0.9})) == replace(theirs, temperature=0, top_p=0.9)
    assert asked(own, temperature=1, max_tokens=50) == replace(theirs, temperature=1, max_tokens=50)
    assert asked(own, min_p=0.2, repetition_penalty=1) == replace(
        theirs, temperature=0, min_p=0.2, repetition_penalty=1
    )
    chat, text = asyncio.run(ask(SamplingDefaults(max_tokens=10**6)))
    assert 2000 < chat.max_tokens < text.max_tokens < 2048  # what the context holds behind the prompt
