"""llama.cpp's engine against `generate`, transformers' log-probabilities and closed forms: one process, no network."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from heliostat import installed
from heliostat.generate import EngineFailed, Sampling, Token, gguf_file, llama_api, llama_cpp
from heliostat.generate.drawing import json_grammar
from heliostat.generate.llama_api import Llama
from heliostat.generate.llama_cpp import LlamaCppEngine, check_parity, converted
from heliostat.recipe import Deploy, GgufDtype, Refused
from tests.generation import GREEDY, SCHEMA, answer, check_logprobs, generated, model_of, prompts, tiny_tokenizer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3's positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "llama, positions scaled": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return model_of("llama", tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def file_of(model: Any, tokenizer: Any, dtype: GgufDtype = "f32", digest: str = "0") -> Path:
    return converted(digest, model, tokenizer, dtype, threads=1)


@asynccontextmanager
async def running(model: Any, tokenizer: Any, digest: str = "0", cache_tokens: int = 8192) -> AsyncIterator[Any]:
    file = await asyncio.to_thread(file_of, model, tokenizer, digest=digest)
    engine = LlamaCppEngine(file, "f32", model, tokenizer, cache_tokens=cache_tokens, threads=1)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


# -- answers


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_generate(name: str, tokenizer: Any) -> None:
    """Alone and several at once, of mixed lengths; most tokens of this vocabulary are parts of characters."""
    family, fields = FAMILIES[name]
    model = model_of(family, tokenizer, **fields)
    asked = prompts(16 if name == "llama" else 4, 60, len(tokenizer))

    async def ask() -> tuple[list[Token], list[list[Token]]]:
        async with running(model, tokenizer, digest=name) as engine:
            alone = await answer(engine, asked[0], GREEDY)
            return alone, await asyncio.gather(*(answer(engine, prompt, GREEDY) for prompt in asked))

    alone, together = asyncio.run(ask())
    expected = [generated(model, prompt, GREEDY.max_tokens) for prompt in asked]
    assert [ids(tokens) for tokens in together] == expected
    assert ids(alone) == expected[0]


def test_answers_of_several_shares_and_a_cache_that_is_too_small_for_all(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "SHARE_TOKENS", 16)
    asked = prompts(4, 60, len(tokenizer))
    sampling = Sampling(max_tokens=60, temperature=0, ignore_end=True)

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer, cache_tokens=128) as engine:
            assert engine.max_length == 128
            return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in asked))

    found = asyncio.run(ask())
    assert [ids(tokens) for tokens in found] == [generated(model, prompt, 60, eos_token_id=None) for prompt in asked]


def test_an_answer_may_fill_the_context_and_go_on_behind_its_end(model: Any, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    sampling = Sampling(max_tokens=500, temperature=0, logit_bias={end: 50.0})

    async def ask() -> tuple[list[Token], list[Token], list[Token]]:
        async with running(model, tokenizer, cache_tokens=512) as engine:
            ended = await answer(engine, [5, 6, 7], sampling)
            behind = await answer(engine, [5, 6, 7], Sampling(9, 0, logit_bias={end: 50.0}, ignore_end=True))
            return ended, behind, await answer(engine, list(range(12)), Sampling(500, 0, ignore_end=True))

    ended, behind, full = asyncio.run(ask())
    assert (ids(ended), ids(behind), len(full)) == ([end], [end] * 9, 500)


def test_log_probabilities_are_the_models(model: Any, tokenizer: Any) -> None:
    prompt = prompts(1, 30, len(tokenizer))[0]
    sampling = Sampling(max_tokens=12, temperature=1.3, top_k=5, seed=1, logprobs=3, logit_bias={9: 3.0})

    async def ask() -> tuple[list[Token], list[Token]]:
        async with running(model, tokenizer) as engine:
            drawn = await answer(engine, prompt, sampling)
            assert all(len(token.top) == 0 for token in await answer(engine, prompt, Sampling(3, 0, logprobs=0)))
            return drawn, await engine.score([*prompt, *ids(drawn), tokenizer.eos_token_id], 3)

    drawn, scored = asyncio.run(ask())
    whole = torch.tensor([[*prompt, *ids(drawn), tokenizer.eos_token_id]])
    with torch.no_grad():
        logprobs_TV = model(whole).logits[0].log_softmax(-1)
    check_logprobs(drawn, scored, prompt, whole[0].tolist(), logprobs_TV, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.4, "top_k": 4},
        {"temperature": 1.4, "top_p": 0.6},
        {"logit_bias": {9: 4.0, 11: -100.0}},
    ],
)
def test_draws_follow_the_closed_form(model: Any, tokenizer: Any, fields: dict[str, Any]) -> None:
    prompt, draws = [5, 6, 7], 300

    async def ask() -> Counter[int]:
        async with running(model, tokenizer) as engine:
            each = (answer(engine, prompt, Sampling(1, seed=seed, **fields)) for seed in range(draws))
            return Counter(tokens[0].id for tokens in await asyncio.gather(*each))

    found = asyncio.run(ask())
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].tolist()
    logits = [value + fields.get("logit_bias", {}).get(token, 0) for token, value in enumerate(logits)]
    weights = torch.tensor(logits).div(fields.get("temperature", 1.0)).softmax(-1).tolist()
    likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept, mass = [], 0.0
    for token in likeliest[: fields.get("top_k", len(weights))]:
        if mass < fields.get("top_p", 1.0):
            kept.append(token)
        mass += weights[token]
    total = sum(weights[token] for token in kept)
    assert set(found) <= set(kept)
    for token in kept[:10]:
        share = weights[token] / total
        # Five standard deviations of a binomial's share.
        assert found[token] / draws == pytest.approx(share, abs=5 * (share * (1 - share) / draws) ** 0.5)


def test_seeds_repeat_and_differ(model: Any, tokenizer: Any) -> None:
    async def ask(*seeds: int) -> list[list[int]]:
        async with running(model, tokenizer) as engine:
            each = (answer(engine, [5, 6, 7], Sampling(max_tokens=20, seed=seed, temperature=2)) for seed in seeds)
            return [ids(tokens) for tokens in await asyncio.gather(*each)]

    one, same, other, far = asyncio.run(ask(3, 3, 4, -(2**63)))
    assert one == same
    assert len({tuple(each) for each in (one, other, far)}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_is_followed_by_a_model_that_knows_none(model: Any, tokenizer: Any, temperature: float) -> None:
    sampling = Sampling(max_tokens=200, temperature=temperature, seed=0, grammar=json_grammar(SCHEMA))

    async def ask() -> list[list[Token]]:
        async with running(model, tokenizer) as engine:
            return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in prompts(4, 9, len(tokenizer))))

    for tokens in asyncio.run(ask()):
        text = tokenizer.decode(ids(tokens), skip_special_tokens=True)
        jsonschema.validate(json.loads(text), SCHEMA)


def test_repetition_is_penalised_as_generate_does(model: Any, tokenizer: Any) -> None:
    async def ask() -> list[Token]:
        async with running(model, tokenizer) as engine:
            return await answer(engine, [5, 6, 7], replace(GREEDY, repetition_penalty=1.3))

    assert ids(asyncio.run(ask())) == generated(model, [5, 6, 7], GREEDY.max_tokens, repetition_penalty=1.3)


def test_penalties_count_what_was_drawn(model: Any, tokenizer: Any) -> None:
    prompt, sampling = [5, 6, 7], Sampling(12, temperature=0, frequency_penalty=1.5, presence_penalty=0.5)

    async def ask() -> list[Token]:
        async with running(model, tokenizer) as engine:
            engine.check_sampling(sampling)
            return await answer(engine, prompt, sampling)

    drawn: list[int] = []
    while len(drawn) < sampling.max_tokens:
        with torch.no_grad():
            logits_V = model(torch.tensor([prompt + drawn])).logits[0, -1]
        for token, times in Counter(drawn).items():
            logits_V[token] -= 1.5 * times + 0.5
        drawn.append(int(logits_V.argmax()))
    assert ids(asyncio.run(ask())) == drawn


def test_what_is_no_grammar_is_refused(model: Any, tokenizer: Any) -> None:
    async def ask() -> list[Token]:
        async with running(model, tokenizer) as engine:
            with pytest.raises(Refused, match="grammar"):
                engine.check_grammar(json_grammar({"type": "no such type"}))
            # Of these characters the vocabulary has only parts.
            grammar = json_grammar({"enum": ["日光"]})
            engine.check_grammar(grammar)
            return await answer(engine, [5, 6, 7], Sampling(40, grammar=grammar))

    assert json.loads(tokenizer.decode(ids(asyncio.run(ask())), skip_special_tokens=True)) == "日光"


def slowed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each step takes 10 ms longer. How many tokens the model reads, in one number for each time that it is told."""
    read: list[int] = []
    step, add = Llama.step, Llama.add

    def slow_step(llama: Llama) -> torch.Tensor:
        time.sleep(0.01)
        return step(llama)

    def counted(llama: Llama, sequence: int, begin: int, tokens: list[int], asked: range) -> None:
        read.append(len(tokens))
        add(llama, sequence, begin, tokens, asked)

    monkeypatch.setattr(Llama, "step", slow_step)
    monkeypatch.setattr(Llama, "add", counted)
    return read


def test_a_request_that_is_given_up_is_forgotten_and_a_closed_engine_says_so(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        async with running(model, tokenizer, cache_tokens=512) as engine:
            slowed(monkeypatch)
            endless = Sampling(max_tokens=500, temperature=1.0, seed=0, ignore_end=True)  # five seconds
            async with aclosing(engine.generate([1, 2, 3], endless)) as stream:
                assert len(await anext(stream)) > 0
                waiting = asyncio.create_task(answer(engine, list(range(300)), GREEDY))
                await asyncio.sleep(0.2)
                assert not waiting.done()
            assert len(await asyncio.wait_for(waiting, 2)) > 0
            engine.check()
        with pytest.raises(EngineFailed, match="has stopped"):
            engine.check()
        with pytest.raises(EngineFailed, match="has stopped"):
            await answer(engine, [1, 2, 3], GREEDY)

    asyncio.run(ask())


def test_who_waits_longest_is_next_and_short_ones_do_not_overtake(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> list[int]:
        order: list[int] = []

        async def use(engine: LlamaCppEngine, length: int) -> None:
            async with aclosing(engine.generate([length] * length, Sampling(4, 0, ignore_end=True))) as stream:
                async for _ in stream:
                    if length not in order:
                        order.append(length)

        async with running(model, tokenizer, cache_tokens=512) as engine:
            slowed(monkeypatch)
            await asyncio.gather(*(use(engine, length) for length in (300, 301, 20, 302)))
        return order

    assert asyncio.run(ask()) == [300, 301, 20, 302]


def test_a_beginning_that_was_read_before_is_not_read_again(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By requests in progress, and by former ones as long as there is room."""
    begin, *others = prompts(6, 200, len(tokenizer))
    begin = (begin * 200)[:200]
    asked = [begin + other[:9] for other in others[:3]]
    sampling = Sampling(10, 0, ignore_end=True)

    async def ask() -> tuple[list[list[Token]], list[int]]:
        async with running(model, tokenizer, cache_tokens=1024) as engine:
            read, found, counts = slowed(monkeypatch), [], []

            async def count(*texts: list[int]) -> None:
                read.clear()
                found.extend(await asyncio.gather(*(answer(engine, text, sampling) for text in texts)))
                counts.append(sum(read))

            await count(asked[0])
            await count(asked[1], asked[2])
            await count(asked[0])
            assert ids(await engine.score(asked[0], 1)) == asked[0]
            await answer(engine, [1] * 900, sampling)  # of former texts there are as many tokens as the cache has
            await count(asked[0])
            return found, counts

    found, counts = asyncio.run(ask())
    expected = [generated(model, text, 10, eos_token_id=None) for text in asked]
    assert [ids(tokens) for tokens in found] == [expected[i] for i in (0, 1, 2, 0, 0)]
    first, *others = (len(text) for text in asked)
    assert counts == [
        first + 9,  # the last token that is drawn is not read
        sum(others) - 2 * 200 + 2 * 9,
        1 + 9,  # what is said behind its last token is not kept
        first + 9,
    ]


def test_a_step_that_fails_ends_all_requests(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> list[Any]:
        async with running(model, tokenizer) as engine:
            with pytest.raises(EngineFailed, match="2049 tokens are more than the 2048"):
                await answer(engine, [1], Sampling(2048))
            monkeypatch.setattr(engine._llama._library, "llama_decode", lambda *_: -3)
            found = await asyncio.gather(*(answer(engine, [1, i], GREEDY) for i in range(40)), return_exceptions=True)
            with pytest.raises(EngineFailed):
                engine.check()
            return found

    found = asyncio.run(ask())
    assert all(isinstance(error, EngineFailed) and "llama_decode: -3" in str(error) for error in found), found


def test_another_layout_of_parameters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama_api.DEFAULTS, "n_batch", 4096)
    with pytest.raises(EngineFailed, match=r"\(at n_batch\).*requirements.lock"):
        llama_api.library.__wrapped__()


# -- conversion


def test_a_bundle_is_converted_once(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(model, tokenizer, digest="once")
    monkeypatch.setattr(gguf_file, "write", lambda *arguments: pytest.fail("written again"))
    assert file_of(model, tokenizer, digest="once") == path
    with pytest.raises(pytest.fail.Exception):
        file_of(model, tokenizer, dtype="q8_0", digest="once")


@pytest.mark.parametrize(("dtype", "initializer_range"), [("f32", 0.3), ("f16", 0.02), ("q8_0", 0.02)])
def test_a_file_with_a_spoiled_tensor_is_refused(
    tokenizer: Any, cache: Path, dtype: GgufDtype, initializer_range: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is not the model that it is compared with."""
    model = model_of("llama", tokenizer, initializer_range=initializer_range)
    write, spoiled = gguf_file.write, copy.deepcopy(model)
    monkeypatch.setattr(gguf_file, "write", lambda path, model, *rest: write(path, spoiled, *rest))
    digest = f"spoiled-{initializer_range}"
    assert file_of(model, tokenizer, dtype, digest).is_file()  # nothing is yet
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"):
        tensor = spoiled.get_submodule(name).weight
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor[: len(tensor) // 2] *= -1
        with pytest.raises(Refused, match=f"as {dtype}, llama.cpp does not answer as the bundle does"):
            file_of(model, tokenizer, dtype, f"{digest}-{name}")
        with torch.no_grad():
            tensor.copy_(kept)
    with torch.no_grad():
        spoiled.model.norm.weight[0] = torch.nan
    with pytest.raises(Refused, match="does not answer as the bundle does"):
        file_of(model, tokenizer, dtype, f"{digest}-model.norm")
    assert not list(cache.rglob(f"*{digest}-*model*"))
    assert not list(cache.rglob(".*"))


def test_heads_in_the_wrong_order_and_wrong_positions_are_refused(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, _ = gguf_file.FAMILIES["llama"]
    monkeypatch.setitem(gguf_file.FAMILIES, "llama", (architecture, False))
    with pytest.raises(Refused, match="does not answer as the bundle does"):
        file_of(model, tokenizer, "q8_0", "unordered")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "broken").write_bytes(b"GGUF")
    with pytest.raises(Refused, match="does not start with"):
        check_parity(tmp_path / "broken", "f32", model, tokenizer, 1)
    slower = model_of("llama", tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    with pytest.raises(Refused, match="does not answer as the bundle does"):
        check_parity(file_of(model, tokenizer, "f32"), "f32", slower, tokenizer, 1)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gpt2", {}, "family gpt2"),
        ("mistral", {"sliding_window": 64, "num_key_value_heads": 2}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "no gelu"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 1024,
                }
            },
            "yarn",
        ),
    ],
)
def test_a_model_that_is_not_converted_is_refused_by_name(
    family: str, fields: dict[str, Any], reason: str, tokenizer: Any, cache: Path
) -> None:
    with pytest.raises(Refused, match=reason) as error:
        file_of(model_of(family, tokenizer, **fields), tokenizer, digest="unknown")
    assert error.value.field == "deploy.engine"
    assert not list(cache.rglob("*unknown*"))


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed.check_engine(Deploy(engine="llama_cpp"))
    installed.check_engine(Deploy(engine="embedded"))
    monkeypatch.setitem(installed.ENGINES, "llama_cpp", ("no-such-package",))
    with pytest.raises(Refused, match="no-such-package") as error:
        installed.check_engine(Deploy(engine="llama_cpp"))
    assert error.value.field == "deploy.engine"
