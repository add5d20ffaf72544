"""The embedded engine on a GPU, against `generate` there, closed forms and the CPU."""

from __future__ import annotations

import asyncio
import copy
import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from heliostat.generate import Sampling, Token
from heliostat.generate.drawing import json_grammar
from tests.unit import test_generate as here
from tests.unit.test_generate import answer, generated, model_of, prompts, running, tokenizer

__all__ = ["tokenizer"]
GPU = torch.device("cuda")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_greedy_answers_are_those_of_generate(family: str, tokenizer: Any) -> None:
    model = model_of(family, tokenizer).to(GPU)
    asked = prompts(16, 60, len(tokenizer))

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer) as engine:
            return await asyncio.gather(*(answer(engine, prompt, here.GREEDY) for prompt in asked))

    expected = [generated(model, prompt, here.GREEDY.max_tokens) for prompt in asked]
    assert [[token.id for token in tokens] for tokens in asyncio.run(ask())] == expected


@here.DRAWN
def test_draws_follow_the_closed_form(fields: dict[str, Any], expected: list[float]) -> None:
    here.check_draws(GPU, fields, expected)


def test_seeds_repeat_whoever_shares_the_step(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer).to(GPU)
    sampling = Sampling(max_tokens=20, temperature=1.5, top_p=0.9, seed=3, frequency_penalty=0.5, logprobs=2)

    async def ask(others: int) -> list[int]:
        async with running(model, tokenizer) as engine:
            more = (
                answer(engine, prompt, replace(sampling, seed=i)) for i, prompt in enumerate(prompts(others, 9, 99))
            )
            found = await asyncio.gather(answer(engine, [5, 6, 7], sampling), *more)
            return [token.id for token in found[0]]

    assert asyncio.run(ask(0)) == asyncio.run(ask(9))


def test_log_probabilities_are_those_of_the_cpu(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    ids = prompts(1, 60, len(tokenizer))[0]

    async def ask(model: Any) -> list[Token]:
        async with running(model, tokenizer) as engine:
            return await engine.score(ids, 2)

    on_gpu, on_cpu = asyncio.run(ask(copy.deepcopy(model).to(GPU))), asyncio.run(ask(model))
    for one, other in zip(on_gpu[1:], on_cpu[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_grammar_is_followed_in_bfloat16(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer).to(GPU, torch.bfloat16)
    sampling = Sampling(max_tokens=200, temperature=1.5, seed=0, grammar=json_grammar(here.SCHEMA))

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer) as engine:
            return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in prompts(4, 9, 99)))

    for tokens in asyncio.run(ask()):
        text = tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)
        jsonschema.validate(json.loads(text), here.SCHEMA)
