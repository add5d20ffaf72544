"""A language model behind OpenAI's protocol, asked by OpenAI's own client over real HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import yaml

from heliostat.hardware import free_port
from heliostat.models.load import processor_facts
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Refused, override
from serve.application import application, deploy
from tests import needs
from tests.browser import tab
from tests.bundles import Reference, chat_bundle, image_bundle, write
from tests.generation import tiny_tokenizer
from tests.recipes import tiny_llama

CHAT: list[Any] = [{"role": "user", "content": "sun salt mirror"}]
NAME = "tiny"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    folder = tmp_path_factory.mktemp("language-model")
    return [Reference(chat_bundle(folder, seed, head_dim=32)) for seed in (0, 1)]  # vLLM has none of 8


@pytest.fixture(scope="module")
def reference(references: list[Reference]) -> Reference:
    return references[0]


BUILT = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the environment, too


@pytest.fixture(scope="module", params=["embedded", "llama_cpp", pytest.param("vllm", marks=BUILT)])
def settings(request: pytest.FixtureRequest) -> Deploy:
    common: dict[str, Any] = {"max_replicas": 1, "max_body_bytes": 100_000, "max_inputs": 4, "cache_tokens": 8192}
    common["stream_interval_s"] = 0.0  # tiny models would have ended before much was sent
    if request.param == "vllm":
        common |= {"llm_environment": str(request.getfixturevalue("llm_environment")), "threads_per_replica": 2}
    return Deploy(port=free_port(), engine=request.param, gguf_dtype="f32", **common)


@pytest.fixture(scope="module")
def url(ray_cluster: None, references: list[Reference], settings: Deploy) -> Iterator[str]:
    from ray import serve

    yield deploy(references[0].path, "1", settings, NAME)
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is `tiny`") as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_completions(client: openai.OpenAI, reference: Reference) -> None:
    prompts = ["sun salt", "cloud"]
    found = client.completions.create(model=NAME, prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in found.choices] == [reference.text(prompt, 20) for prompt in prompts]
    lengths = [len(reference.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    drawn = [len(reference.generated(reference.tokenizer(prompt)["input_ids"], 20)) for prompt in prompts]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (sum(lengths), sum(drawn))
    assert found.usage.total_tokens == sum(lengths) + sum(drawn)
    assert [choice.finish_reason for choice in found.choices] == ["length" if n == 20 else "stop" for n in drawn]
    as_tokens = client.completions.create(
        model=NAME, prompt=[reference.tokenizer(p)["input_ids"] for p in prompts], max_tokens=20, temperature=0
    )
    assert [choice.text for choice in as_tokens.choices] == [choice.text for choice in found.choices]
    assert len(client.completions.create(model=NAME, prompt="", extra_body={"ignore_eos": True}).choices) == 1


def test_chats_whole_and_streamed(client: openai.OpenAI, reference: Reference) -> None:
    ids = reference.chat(CHAT)
    expected = reference.text(ids, 30)
    whole = client.chat.completions.create(model=NAME, messages=CHAT, max_completion_tokens=30, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": "sun salt "}, {"type": "text", "text": "mirror"}]
    split: Any = [{"role": "user", "content": parts}]
    assert (
        client.chat.completions.create(model=NAME, messages=split, max_tokens=30, temperature=0).choices[0].message
        == whole.choices[0].message
    )
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=CHAT,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_comes_as_it_is_drawn(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt="sun", max_tokens=300, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert sum(1 for _ in stream) > 10  # an engine that is faster than its reader gives several tokens at once


def test_many_at_once_async_and_streamed(url: str, reference: Reference) -> None:
    texts = ["sun " * n + "cloud" for n in range(1, 17)]

    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.completions.create(model=NAME, prompt=text, max_tokens=24, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, text) for text in texts))

    assert asyncio.run(ask()) == [reference.text(text, 24) for text in texts]


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        found = client.chat.completions.create(
            model=NAME, messages=CHAT, n=3, seed=seed, max_tokens=12, temperature=1.5, logit_bias={"0": -100}
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    assert ask(5) == ask(5)
    assert len(set(ask(5))) == 3
    assert ask(5) != ask(9)


def test_stop(client: openai.OpenAI, reference: Reference) -> None:
    text = reference.text("sun salt", 40)
    stop = text[7:10]
    found = client.completions.create(model=NAME, prompt="sun salt", max_tokens=40, temperature=0, stop=[stop, "☀"])
    assert found.choices[0].text == text[: text.find(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens < 40


def test_log_probabilities_of_a_chat(client: openai.OpenAI, reference: Reference) -> None:
    found = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    ids = reference.chat(CHAT)
    drawn = [token for token in reference.generated(ids, 6) if token != reference.tokenizer.eos_token_id]
    expected_TV = reference.logprobs(ids + drawn)[len(ids) - 1 :]
    assert len(logprobs.content) == len(drawn)
    for entry, token, expected_V in zip(logprobs.content, drawn, expected_TV, strict=False):
        assert entry.token == reference.tokenizer.decode([token])
        assert entry.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(
            expected_V.topk(3).values.tolist(), abs=1e-4
        )
    spelled = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert spelled.decode("utf-8", "replace") == found.choices[0].message.content


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_log_probabilities(client: openai.OpenAI, reference: Reference, max_tokens: int) -> None:
    """What evaluation harnesses ask for."""
    ids = reference.tokenizer("sun salt mirror tower")["input_ids"]
    found = client.completions.create(
        model=NAME, prompt=[ids], max_tokens=max_tokens, temperature=0, echo=True, logprobs=2
    ).choices[0]
    drawn = reference.generated(ids, max_tokens) if max_tokens else []
    assert found.text == reference.tokenizer.decode(ids + drawn, skip_special_tokens=True)
    assert found.logprobs is not None
    values = found.logprobs.token_logprobs or []
    tops: Any = found.logprobs.top_logprobs
    expected_TV = reference.logprobs(ids + drawn)
    assert values[0] is None
    assert values[1:] == pytest.approx(
        [float(expected_TV[i, token]) for i, token in enumerate((ids + drawn)[1:])], abs=1e-4
    )
    assert max(tops[1].values()) == pytest.approx(float(expected_TV[0].max()), abs=1e-4)
    tokens, offsets = found.logprobs.tokens or [], found.logprobs.text_offset or []
    assert tokens == [reference.tokenizer.decode([token]) for token in ids + drawn]
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_fill_in_the_middle(client: openai.OpenAI, reference: Reference) -> None:
    tokenizer = reference.tokenizer
    spelled = "<fim_prefix>sun <fim_suffix> tower<fim_middle>"
    found = client.completions.create(model=NAME, prompt="sun ", suffix=" tower", max_tokens=12, temperature=0)
    assert found.choices[0].text == reference.text(tokenizer(spelled)["input_ids"], 12)


class Plant(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    towers: int = pydantic.Field(ge=1, le=9)


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model=NAME, messages=CHAT, response_format=Plant, max_tokens=200, seed=1)
    assert isinstance(found.choices[0].message.parsed, Plant)
    free = client.chat.completions.create(
        model=NAME, messages=CHAT, response_format={"type": "json_object"}, max_tokens=600, seed=1
    )
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"angle": {"type": "integer", "minimum": 0, "maximum": 90}},
                "required": ["angle"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("turn", "fold")
]


def test_tools(client: openai.OpenAI, reference: Reference) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": CHAT, "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    choice = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in ("turn", "fold")
    assert 0 <= json.loads(call.function.arguments)["angle"] <= 90
    named: Any = {"type": "function", "function": {"name": "fold"}}
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [each.function.name for each in streamed] == ["fold"]
    # The call and its result go back into the prompt, as the template writes them.
    result = {"role": "tool", "tool_call_id": call.id, "content": "turned"}
    history: Any = [*CHAT, choice.message.model_dump(exclude_none=True), result]
    arguments = json.loads(call.function.arguments)
    spelled = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": call.function.name, "arguments": arguments}}],
    }
    expected = reference.chat([*CHAT, spelled, result], tools=TOOLS)
    answer = client.chat.completions.create(**{**asked, "messages": history, "tool_choice": "auto", "max_tokens": 20})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected)
    assert answer.choices[0].message.content == reference.text(expected, 20)


@pytest.mark.parametrize(
    ("route", "body", "param", "message"),
    [
        ("completions", {"prompt": "sun", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ("completions", {"prompt": "sun", "temperature": 3}, "temperature", "less than or equal to 2"),
        ("completions", {"prompt": "sun", "max_tokns": 3}, "max_tokns", "Unrecognized request argument"),
        ("completions", {"prompt": "sun " * 2000}, "prompt", "maximum context length is 1024 tokens"),
        ("completions", {"prompt": [99999]}, "prompt", "no token 99999"),
        ("completions", {"prompt": []}, "prompt", "empty list"),
        ("completions", {"prompt": ["sun"] * 40, "n": 4}, "n", "more than 128 choices"),
        ("completions", {"prompt": "sun", "logit_bias": {"99999": 1}}, "logit_bias", "no token 99999"),
        ("completions", {"prompt": "sun", "best_of": 4}, "best_of", "only the value of n"),
        ("completions", {}, "prompt", "Field required"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "sun", "content": ""}]}, "messages.0.role", "Input should be"),
        ("chat/completions", {"messages": [{"role": "tool", "content": ""}]}, "messages", "refuses them: no tools"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "reads text only",
        ),
        (
            "chat/completions",
            {"messages": CHAT, "chat_template_kwargs": {"tokenize": False}},
            "chat_template_kwargs",
            "tokenize is not the template's",
        ),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"messages": CHAT, "tool_choice": "required"}, "tool_choice", "names no tool"),
        (
            "chat/completions",
            {
                "messages": CHAT,
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "sun"}}},
            },
            "response_format",
            "sun",
        ),
    ],
)
def test_refusals_in_the_protocols_shape(url: str, route: str, body: dict, param: str, message: str) -> None:
    for stream in (False, True):  # neither begins an answer
        found = httpx.post(f"{url}/v1/{route}", json={"model": NAME, "stream": stream, **body}, timeout=30)
        assert found.status_code == 400, found.text
        error = found.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert message in error["message"]


def test_other_refusals(url: str) -> None:
    headers = {"content-type": "application/json"}
    broken = httpx.post(f"{url}/v1/completions", content="{", headers=headers)
    assert (broken.status_code, broken.json()["error"]["message"][:10]) == (400, "body: JSON")
    other = httpx.post(f"{url}/v1/completions", json={"model": "other", "prompt": "sun"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    large = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "x" * 200_000})
    assert (large.status_code, "more than 100000 bytes" in large.json()["error"]["message"]) == (413, True)
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found"


def ongoing(client: httpx.Client, url: str) -> int:
    return client.get(f"{url}/healthz", timeout=30).json()["ongoing"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_worked_for(url: str, stream: bool) -> None:
    body = {"model": NAME, "prompt": "sun", "max_tokens": 1000, "ignore_eos": True, "stream": stream, "n": 8}
    with httpx.Client(timeout=None if stream else 0.5) as client:
        assert ongoing(client, url) == 0
        if stream:
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()  # kept: an iterator that is let go of closes the connection
                assert "error" not in next(lines)
                assert ongoing(client, url) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/completions", json=body)
        limit = time.monotonic() + 10
        while ongoing(client, url) and time.monotonic() < limit:
            time.sleep(0.1)
        assert ongoing(client, url) == 0


def test_predict_as_every_deployment(url: str, reference: Reference) -> None:
    inputs = [{"text": "sun salt"}, {"text": "cloud"}]
    found = httpx.post(f"{url}/predict", json={"inputs": inputs}, timeout=30).json()
    expected = Predictor(reference.bundle).predict(inputs)
    assert found["bundle"] == reference.bundle.digest[:12]
    for one, other in zip(found["predictions"], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@needs.chromium
def test_a_page_to_chat_on(url: str, reference: Reference, tmp_path: Path) -> None:
    said = "[...document.querySelectorAll('.said')].map(box => box.textContent)"
    with tab(url, tmp_path) as page:
        assert page.run("document.title") == "Heliostat"
        page.run("document.getElementById('text').focus()")
        for turn, text in enumerate(["sun <b>salt</b>", "cloud"]):
            page.type(text)
            page.press_enter()
            page.wait("document.querySelector('button').disabled")
            page.wait(f"!document.querySelector('button').disabled && {said}.length === {2 * turn + 2}")
            assert page.run(said)[2 * turn] == text
            assert page.run(said)[2 * turn + 1]
        # As it came: what was said before went along, and there was something to see before all was there.
        first, whole = re.fullmatch(
            rf"([\d.]+) s \(first token ([\d.]+) s\) · version {reference.bundle.digest[:12]} · replica \w+",
            page.run("document.getElementById('notes').textContent"),
        ).group(2, 1)
        assert float(first) < float(whole)
        assert page.run("messages.map(message => message.role)") == ["user", "assistant"] * 2
        assert page.problems == []


def test_penalties_are_taken(url: str) -> None:
    body = {"model": NAME, "prompt": "sun", "max_tokens": 5, "frequency_penalty": 0.5}
    for streamed in (False, True):
        assert httpx.post(f"{url}/v1/completions", json={**body, "stream": streamed}).status_code == 200


def test_an_engine_that_cannot_serve_a_bundle_is_refused_before_it_starts(tmp_path: Path) -> None:
    settings = Deploy(engine="llama_cpp")
    with pytest.raises(Refused, match="for models that generate text"):
        application(image_bundle(tmp_path), "1", settings)
    recipe, tokenizer = tiny_llama(tmp_path), tiny_tokenizer()
    recipe = override(recipe, {"model.config": {**recipe.model.config, "hidden_act": "gelu"}})
    path = write(tmp_path / "gelu", recipe, tokenizer, processor_facts(tokenizer))
    with pytest.raises(Refused, match="has no gelu"):
        application(path, "1", settings)


def test_another_bundle_while_answers_are_on_their_way(
    client: openai.OpenAI, url: str, references: list[Reference], settings: Deploy
) -> None:
    """Last but one: what was begun ends as it began; what begins later is the new bundle's."""
    stream = client.completions.create(
        model=NAME, prompt="sun", max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    deploy(references[1].path, "2", settings, NAME)
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.system_fingerprint for chunk in chunks} == {references[0].bundle.digest[:12]}
    after = client.completions.create(model=NAME, prompt="sun", max_tokens=20, temperature=0)
    assert after.system_fingerprint == references[1].bundle.digest[:12]
    assert after.choices[0].text == references[1].text("sun", 20) != references[0].text("sun", 20)
    assert httpx.get(f"{url}/healthz", timeout=30).json()["ongoing"] == 0


def test_the_yaml_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "language_model.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications[0].import_path == "serve.language_model:build"
