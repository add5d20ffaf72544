"""The embedded engine against `generate` and closed forms: one process, no server."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
import transformers

from heliostat.generate import EngineFailed, Sampling, Token
from heliostat.generate.drawing import Draw, draw, json_grammar
from heliostat.generate.embedded import PAGE_TOKENS, STEP_TOKENS
from heliostat.generate.text import TextStream
from heliostat.models.load import train_tokenizer
from heliostat.recipe import Refused
from tests.generation import (
    FAMILIES,
    GREEDY,
    SCHEMA,
    SIZES,
    answer,
    check_logprobs,
    generated,
    model_of,
    prompts,
    running,
    tiny_tokenizer,
)
from tests.recipes import WORDS


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str, tokenizer: Any) -> None:
    """Alone and sixteen at once, of mixed lengths."""
    model = model_of(family, tokenizer)
    asked = prompts(16, 60, len(tokenizer))

    async def ask() -> tuple[list[Token], list[list[Token]]]:
        async with running(model, tokenizer) as engine:
            alone = await answer(engine, asked[0], GREEDY)
            return alone, await asyncio.gather(*(answer(engine, prompt, GREEDY) for prompt in asked))

    alone, together = asyncio.run(ask())
    expected = [generated(model, prompt, GREEDY.max_tokens) for prompt in asked]
    assert [[token.id for token in tokens] for tokens in together] == expected
    assert [token.id for token in alone] == expected[0]


def test_long_prompts_and_a_cache_that_is_too_small_for_all(tokenizer: Any) -> None:
    """Prompts of several steps; answers whose keys and values are dropped on the way and made again."""
    model = model_of("llama", tokenizer)
    asked = [[*prompt, 7, 8, 9] for prompt in prompts(8, 90, len(tokenizer))]
    asked[0] = prompts(1, 1, len(tokenizer))[0] * (STEP_TOKENS["cpu"] + 40)
    sampling = Sampling(max_tokens=60, temperature=0, logprobs=0)

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer, cache_tokens=22 * PAGE_TOKENS) as engine:
            assert engine.max_length == 21 * PAGE_TOKENS
            return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in asked))

    found = asyncio.run(ask())
    assert [[token.id for token in tokens] for tokens in found] == [generated(model, p, 60) for p in asked]


def test_a_model_without_an_end_goes_on_to_the_limit() -> None:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 320)
    tokenizer.eos_token = None
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, **SIZES)
    )

    async def ask() -> list[Token]:
        async with running(model.eval(), tokenizer) as engine:
            assert engine.end_ids == frozenset()
            return await answer(engine, [1, 2, 3], GREEDY)

    assert len(asyncio.run(ask())) == GREEDY.max_tokens


def test_log_probabilities_are_the_models(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    prompt = prompts(1, 30, len(tokenizer))[0]
    sampling = Sampling(max_tokens=12, temperature=1.3, top_k=5, seed=1, logprobs=3, ignore_end=True)

    async def ask() -> tuple[list[Token], list[Token]]:
        async with running(model, tokenizer) as engine:
            drawn = await answer(engine, prompt, sampling)
            return drawn, await engine.score([*prompt, *(token.id for token in drawn)], 3)

    drawn, scored = asyncio.run(ask())
    ids = torch.tensor([[*prompt, *(token.id for token in drawn)]])
    with torch.no_grad():
        logprobs_TV = model(ids).logits[0].log_softmax(-1)
    check_logprobs(drawn, scored, prompt, ids[0].tolist(), logprobs_TV, abs=1e-4)


def frequencies(sampling: Sampling, logits_V: torch.Tensor, draws: int) -> Counter[int]:
    """Of first tokens: each of another request."""
    logits_RV = logits_V.expand(draws, -1)
    seeded = [Draw(replace(sampling, seed=seed), None) for seed in range(draws)]
    return Counter(draw(seeded, logits_RV).tolist())


DRAWS = 4000
DRAWN = pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # squared
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.3, "temperature": 0.5}, [16 / 25, 9 / 25, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"min_p": 0.4, "top_p": 0.95, "top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.8, "temperature": 0.5}, [16 / 25, 9 / 25, 0, 0]),
        ({"logit_bias": {3: 1.3862943611198906}}, [0.4 / 1.3, 0.3 / 1.3, 0.2 / 1.3, 0.4 / 1.3]),  # times four
    ],
)


@DRAWN
def test_draws_follow_the_closed_form(fields: dict[str, Any], expected: list[float]) -> None:
    check_draws(torch.device("cpu"), fields, expected)


def check_draws(device: torch.device, fields: dict[str, Any], expected: list[float]) -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log() + 3
    found = frequencies(Sampling(max_tokens=1, seed=0, **fields), logits_V, DRAWS)
    for token, probability in enumerate(expected):
        # Five standard deviations of a binomial's share.
        margin = 5 * (probability * (1 - probability) / DRAWS) ** 0.5
        assert found[token] / DRAWS == pytest.approx(probability, abs=margin)


def test_requests_of_a_step_are_drawn_each_by_itself() -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_k": 2},
        {"top_p": 0.7, "temperature": 3.0},
        {},
        {"logit_bias": {5: 9.0}},
        {"temperature": 0, "presence_penalty": 1.0, "logprobs": 2},
        {"repetition_penalty": 1.5, "min_p": 0.1},
    ]
    logits_RV = torch.randn(len(settings), 64, generator=torch.Generator().manual_seed(0))
    asked = [Sampling(max_tokens=9, seed=7, **fields) for fields in settings]
    together, alone = ([Draw(sampling, None) for sampling in asked] for _ in range(2))
    for _ in range(20):
        found = [int(draw([each], logits_V[None])) for each, logits_V in zip(alone, logits_RV, strict=True)]
        assert draw(together, logits_RV).tolist() == found
    assert together[5].reports == alone[5].reports


def test_penalties_count_what_was_drawn() -> None:
    sampling = Sampling(max_tokens=9, temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    request = Draw(sampling, None)
    # The first token's score falls 1 → 0.25 → -0.25 → -0.75, the others' 0.4 → -0.35 and 0.3 → -0.45.
    assert [int(draw([request], torch.tensor([[1.0, 0.4, 0.3]]))) for _ in range(6)] == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_is_penalised_as_generate_does(tokenizer: Any, penalty: float) -> None:
    model = model_of("llama", tokenizer)
    prompt = prompts(1, 30, len(tokenizer))[0]
    sampling = replace(GREEDY, repetition_penalty=penalty)

    async def ask() -> list[Token]:
        async with running(model, tokenizer) as engine:
            return await answer(engine, prompt, sampling)

    found = [token.id for token in asyncio.run(ask())]
    assert found == generated(model, prompt, GREEDY.max_tokens, repetition_penalty=penalty)
    assert found != generated(model, prompt, GREEDY.max_tokens)


def test_seeds_repeat_and_differ(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)

    async def ask(*seeds: int) -> list[list[int]]:
        async with running(model, tokenizer) as engine:
            asked = (answer(engine, [5, 6, 7], Sampling(max_tokens=20, seed=seed, temperature=2)) for seed in seeds)
            return [[token.id for token in tokens] for tokens in await asyncio.gather(*asked)]

    one, same, other = asyncio.run(ask(3, 3, 4))
    assert one == same != other
    assert asyncio.run(ask(3)) == [one]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_is_followed_by_a_model_that_knows_none(tokenizer: Any, temperature: float) -> None:
    model = model_of("llama", tokenizer)
    sampling = Sampling(max_tokens=200, temperature=temperature, seed=0, grammar=json_grammar(SCHEMA))

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer) as engine:
            return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in prompts(4, 9, len(tokenizer))))

    for tokens in asyncio.run(ask()):
        text = tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_grammar_that_is_none_is_refused(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)

    async def ask() -> None:
        async with running(model, tokenizer) as engine:
            engine.check_grammar(json_grammar({"type": "object"}))
            with pytest.raises(Refused, match="grammar"):
                engine.check_grammar(json_grammar({"type": "no such type"}))

    asyncio.run(ask())


def test_a_request_that_is_given_up_is_forgotten_and_a_closed_engine_says_so(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)

    async def ask() -> None:
        async with running(model, tokenizer) as engine:
            endless = Sampling(max_tokens=1500, temperature=0, ignore_end=True)
            async with aclosing(engine.generate([1, 2, 3], endless)) as stream:
                assert len(await anext(stream)) > 0
            scheduler = engine._manager.batch_processor.scheduler
            for _ in range(200):
                if not scheduler.has_pending_requests():
                    break
                await asyncio.sleep(0.05)
            assert not scheduler.has_pending_requests()
            assert engine._manager.output_router.result_handlers == {}
            engine.check()
            assert len(await answer(engine, [1, 2, 3], GREEDY)) > 0
        with pytest.raises(EngineFailed):
            engine.check()
        with pytest.raises(EngineFailed):
            await answer(engine, [1, 2, 3], GREEDY)

    asyncio.run(ask())


# -- text


def shown(tokenizer: Any, ids: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, [], stop)
    texts = []
    for token in ids:
        texts.append(stream.push(token))
        if stream.stopped:
            return texts, stream
    return [*texts, stream.rest()], stream


def test_text_comes_in_whole_characters(tokenizer: Any) -> None:
    text = "sun ☀ über 日光 🌞 steam"
    texts, _ = shown(tokenizer, tokenizer(text)["input_ids"], [])
    assert "".join(texts) == text
    assert not any("\ufffd" in each for each in texts)


@pytest.fixture(params=range(20))
def stop_case(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    random_ = random.Random(request.param)
    text = "".join(random_.choices("ab ", k=40))
    return text, ["".join(random_.choices("ab ", k=random_.randint(1, 6))) for _ in range(2)]


def test_text_ends_before_the_first_stop_string(tokenizer: Any, stop_case: tuple[str, list[str]]) -> None:
    text, stops = stop_case
    ids = tokenizer(text)["input_ids"]
    texts, stream = shown(tokenizer, ids, stops)
    expected, stopped = text, False
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:count])
        if places := [so_far.find(stop) for stop in stops if stop in so_far]:
            expected, stopped = so_far[: min(places)], True
            break
    assert ("".join(texts), stream.stopped) == (expected, stopped)


def test_texts_are_scored_beside_answers(tokenizer: Any) -> None:
    """Each on its own thread, while the engine's steps go on: as a plain forward pass scores them."""
    model = model_of("llama", tokenizer)
    texts = prompts(12, 40, len(tokenizer))
    expected = []
    for ids in texts:
        with torch.inference_mode():
            logprobs_TV = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        expected.append([logprobs_TV[i, token].item() for i, token in enumerate(ids[1:])])

    async def ask() -> list[list[list[Token]]]:
        async with running(model, tokenizer) as engine:
            answers = [asyncio.create_task(answer(engine, ids, GREEDY)) for ids in texts]
            rounds = [await asyncio.gather(*(engine.score(ids, 1) for ids in texts)) for _ in range(3)]
            await asyncio.gather(*answers)
            return rounds

    for scored in asyncio.run(ask()):
        for tokens, logprobs in zip(scored, expected, strict=True):
            assert [token.logprob for token in tokens[1:]] == pytest.approx(logprobs, abs=1e-3)


def test_requests_that_were_given_up_leave_their_room(tokenizer: Any) -> None:
    """More of them than the cache holds: what is asked next is answered."""
    model = model_of("llama", tokenizer)
    long = replace(GREEDY, max_tokens=400, ignore_end=True)
    texts = prompts(60, 40, len(tokenizer))

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer, cache_tokens=2048) as engine:
            found = []
            for _ in range(3):
                given_up = [asyncio.create_task(answer(engine, ids, long)) for ids in texts]
                await asyncio.sleep(1.0)
                for task in given_up:
                    task.cancel()
                await asyncio.gather(*given_up, return_exceptions=True)
                found.append(await asyncio.wait_for(answer(engine, texts[0], replace(GREEDY, max_tokens=2)), 30))
            return found

    expected = generated(model, texts[0], 2)
    assert [[token.id for token in tokens] for tokens in asyncio.run(ask())] == [expected] * 3
