"""vLLM's engine in its own environment, against transformers in this one. What it does behind the endpoint is tested
with the other engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from heliostat.generate import EngineFailed, Sampling, Token, vllm
from heliostat.generate.drawing import json_grammar
from heliostat.generate.vllm import VllmEngine
from heliostat.recipe import Refused
from tests.bundles import Reference, chat_bundle
from tests.generation import GREEDY, SCHEMA, answer, check_logprobs, generated, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the environment may have to be built


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(chat_bundle(tmp_path_factory.mktemp("vllm"), head_dim=32))


@pytest.fixture(scope="module")
def engine(llm_environment: Path, reference: Reference) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        command = vllm.command
        counting = lambda *words: [word for word in command(*words) if word != "--disable-log-stats"]  # noqa: E731
        patch.setattr(vllm, "command", counting)
        found = VllmEngine(
            llm_environment, reference.path, reference.model, reference.tokenizer, cache_tokens=8192, threads=2
        )
    yield found
    found.close()


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


async def answers(engine: VllmEngine, asked: list[list[int]], *samplings: Sampling) -> list[list[int]]:
    """To each prompt with each sampling, all at once."""
    each = (answer(engine, prompt, sampling) for prompt in asked for sampling in samplings)
    return [ids(tokens) for tokens in await asyncio.gather(*each)]


def test_greedy_answers_are_those_of_generate(engine: VllmEngine, reference: Reference) -> None:
    """Alone and sixteen at once, of mixed lengths."""
    assert engine.max_length == 1024
    asked = prompts(16, 60, engine.vocab_size)
    expected = [reference.generated(prompt, GREEDY.max_tokens) for prompt in asked]
    assert asyncio.run(answers(engine, asked[:1], GREEDY)) == expected[:1]
    assert asyncio.run(answers(engine, asked, GREEDY)) == expected


def test_seeds_repeat_and_differ(engine: VllmEngine) -> None:
    seeds = (3, 3, 4, -1, -(2**63))
    samplings = [Sampling(max_tokens=20, seed=seed, temperature=2) for seed in seeds]
    one, same, *others = asyncio.run(answers(engine, [[5, 6, 7]], *samplings))
    assert one == same
    assert len({tuple(each) for each in (one, *others)}) == 4
    assert asyncio.run(answers(engine, [[5, 6, 7]], *samplings[3:])) == others[1:]


def test_log_probabilities_are_the_models(engine: VllmEngine, reference: Reference) -> None:
    """Whatever bends what is drawn."""
    prompt = prompts(1, 30, engine.vocab_size)[0]
    sampling = Sampling(max_tokens=12, temperature=1.3, top_k=5, seed=1, logprobs=3, logit_bias={9: 3.0})

    async def ask() -> tuple[list[Token], list[Token], list[Token]]:
        drawn = await answer(engine, prompt, sampling)
        none = await answer(engine, prompt, Sampling(3, 0, logprobs=0))
        return drawn, await engine.score([*prompt, *ids(drawn)], 3), none

    drawn, scored, none = asyncio.run(ask())
    assert all(token.logprob is not None and token.top == () for token in none)
    whole = [*prompt, *ids(drawn)]
    check_logprobs(drawn, scored, prompt, whole, reference.logprobs(whole), abs=1e-3)


@pytest.mark.parametrize("fields", [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"logit_bias": {9: 30.0}}])
def test_what_bends_logits_does_so_as_in_the_closed_form(
    engine: VllmEngine, reference: Reference, fields: dict[str, Any]
) -> None:
    """Penalties count what was drawn, and not the prompt."""
    sampling = Sampling(max_tokens=24, temperature=0, ignore_end=True, **fields)
    prompt, drawn = [5, 6, 7, 5], list[int]()
    for _ in range(sampling.max_tokens):
        logits_V = reference.logprobs(prompt + drawn)[-1]
        for token, bias in sampling.logit_bias.items():
            logits_V[token] += bias
        for token in set(drawn):
            logits_V[token] -= sampling.frequency_penalty * drawn.count(token) + sampling.presence_penalty
        drawn.append(int(logits_V.argmax()))
    assert asyncio.run(answers(engine, [prompt], sampling)) == [drawn]


def test_repetition_is_penalised_as_generate_does(engine: VllmEngine, reference: Reference) -> None:
    sampling = replace(GREEDY, repetition_penalty=1.3)
    expected = generated(reference.model, [5, 6, 7, 5], sampling.max_tokens, repetition_penalty=1.3)
    assert asyncio.run(answers(engine, [[5, 6, 7, 5]], sampling)) == [expected]


def test_draws_leave_out_what_is_unlikely(engine: VllmEngine, reference: Reference) -> None:
    """`min_p`: whatever is drawn at this temperature is at least so much of the likeliest's probability."""
    samplings = [Sampling(1, temperature=2, min_p=0.5, seed=seed) for seed in range(40)]
    probs_V = (reference.logprobs([5, 6, 7])[-1] / 2).softmax(-1)
    kept = set((probs_V >= 0.5 * probs_V.max()).nonzero().flatten().tolist())
    assert {tokens[0] for tokens in asyncio.run(answers(engine, [[5, 6, 7]], *samplings))} == kept


def test_an_answer_ends_at_its_end_and_may_go_on_behind_it(engine: VllmEngine) -> None:
    (end,) = engine.end_ids
    bias = {"logit_bias": {end: 60.0}, "temperature": 0}
    samplings = Sampling(50, **bias), Sampling(9, ignore_end=True, **bias)
    assert asyncio.run(answers(engine, [[5, 6, 7]], *samplings)) == [[end], [end] * 9]
    full = Sampling(engine.max_length - 12, 0, ignore_end=True)
    assert len(asyncio.run(answer(engine, list(range(12)), full))) == full.max_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_is_followed_by_a_model_that_knows_none(
    engine: VllmEngine, reference: Reference, temperature: float
) -> None:
    sampling = Sampling(max_tokens=200, temperature=temperature, seed=0, grammar=json_grammar(SCHEMA))
    engine.check_grammar(sampling.grammar)
    for tokens in asyncio.run(answers(engine, prompts(4, 9, engine.vocab_size), sampling)):
        assert tokens[-1] in engine.end_ids
        jsonschema.validate(json.loads(reference.tokenizer.decode(tokens, skip_special_tokens=True)), SCHEMA)


def test_what_it_would_do_otherwise_is_refused(engine: VllmEngine) -> None:
    for temperature in (0.0, 0.01, 2.0):
        engine.check_sampling(Sampling(3, temperature))
    with pytest.raises(Refused, match=r"at 0\.01 at least") as error:
        engine.check_sampling(Sampling(3, 0.005))
    assert error.value.field == "temperature"
    with pytest.raises(Refused, match="grammar"):
        engine.check_grammar(json_grammar({"type": "no such type"}))


def test_requests_that_are_given_up_are_forgotten(engine: VllmEngine) -> None:
    endless = Sampling(max_tokens=900, temperature=1.0, seed=0, ignore_end=True)

    async def running() -> float:
        async with engine._session() as session, session.get("http://vllm/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    async def until(count: float) -> None:
        async with asyncio.timeout(10):
            while await running() != count:
                await asyncio.sleep(0.1)

    async def ask() -> None:
        async with (
            aclosing(engine.generate([1, 2, 3], endless)) as one,
            aclosing(engine.generate([3, 2, 1], endless)) as other,
        ):
            assert len(await anext(one)) > 0
            assert len(await anext(other)) > 0
            await until(2)
        await until(0)

    asyncio.run(ask())


def test_a_model_that_vllm_does_not_load(llm_environment: Path, reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="vLLM does not start"):
        VllmEngine(llm_environment, tmp_path, reference.model, reference.tokenizer, cache_tokens=1024)


def test_an_engine_that_has_ended_says_so(engine: VllmEngine) -> None:
    """Last. Where one of its processes dies, all end."""

    def members() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == engine._group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    server = next(each for each in members() if "serve" in each.cmdline() and each.name() != "sh")
    engine.check()
    server.send_signal(signal.SIGKILL)
    limit = time.monotonic() + 30
    while members() and time.monotonic() < limit:
        time.sleep(0.2)
    assert members() == []
    with pytest.raises(EngineFailed):
        engine.check()
    with pytest.raises(EngineFailed):
        asyncio.run(answer(engine, [1, 2, 3], GREEDY))
