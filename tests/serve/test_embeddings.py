"""A pre-trained encoder, from its package to vectors, asked by OpenAI's own client over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
import yaml

from heliostat.hardware import free_port
from heliostat.models.packaged import packaged_model
from heliostat.recipe import Deploy, Refused
from pipelines.bundle import run
from pipelines.job import main
from serve.application import application, deploy
from tests import needs
from tests.browser import tab

NAME = "minilm"
TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    assert main("bundle", run, [NAME, "--storage", str(folder), "--run-name", "run"]) == 0
    return folder / "runs" / "run" / "bundle"


@pytest.fixture(scope="module")
def url(ray_cluster: None, path: Path) -> Iterator[str]:
    from ray import serve

    settings = Deploy(port=free_port(), max_replicas=1, max_inputs=20, max_batch_size=4, max_body_bytes=100_000)
    yield deploy(path, "1", settings, NAME)
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


class Published:
    """The package's model as sentence-transformers describes it: the mean over a text's tokens, at length one."""

    def __init__(self) -> None:
        folder = packaged_model("minilm")
        self.model: Any = transformers.AutoModel.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def vector(self, given: str | list[int]) -> np.ndarray:
        ids = self.tokenizer(given)["input_ids"] if isinstance(given, str) else given
        hidden_TH = self.model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        mean_H = hidden_TH.mean(0)
        return mean_H / np.linalg.norm(mean_H)


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


def vectors(found: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [each.index for each in found.data] == list(range(len(found.data)))
    return np.array([each.embedding for each in found.data])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).model_extra == {"max_model_len": 256}
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="other", input="sun")
    assert error.value.code == "model_not_found"


def test_similarities_are_those_that_its_makers_print(client: openai.OpenAI) -> None:
    """The example on the front page of sentence-transformers (sbert.net)."""
    found = vectors(client.embeddings.create(model=NAME, input=TEXTS))
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert found @ found.T == pytest.approx(np.array(expected), abs=6e-5)


@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_texts_and_tokens(client: openai.OpenAI, published: Published, encoding: Any) -> None:
    tokens = [published.tokenizer(text)["input_ids"] for text in TEXTS]
    given: list[Any] = [TEXTS[0], TEXTS, tokens[0], tokens]
    for one in given:
        found = client.embeddings.create(model=NAME, input=one, encoding_format=encoding, user="me")
        several = one if isinstance(one[0], str | list) and not isinstance(one, str) else [one]
        if encoding == "base64":  # who asks for it gets it
            rows = [np.frombuffer(base64.b64decode(str(each.embedding)), "<f4") for each in found.data]
        else:
            rows = list(vectors(found))
        assert np.array(rows) == pytest.approx(np.array([published.vector(each) for each in several]), abs=1e-6)
        count = sum(len(published.tokenizer(each)["input_ids"] if isinstance(each, str) else each) for each in several)
        assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == (NAME, count, count)


def test_many_at_once(url: str, published: Published) -> None:
    """Requests share batches, and of a request with more inputs than one there are several."""
    asked = [[f"{'sun ' * (n % 7)}and salt {n}"] for n in range(12)] + [[f"mirror {n} " * n for n in range(1, 11)]]

    async def ask() -> list[np.ndarray]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            found = await asyncio.gather(*(client.embeddings.create(model=NAME, input=texts) for texts in asked))
        return [vectors(each) for each in found]

    for texts, found in zip(asked, asyncio.run(ask()), strict=True):
        assert found == pytest.approx(np.array([published.vector(text) for text in texts]), abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": ""}, "input", "empty text"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["sun", ""]}, "input", "empty text"),
        ({"input": [[5], []]}, "input", "empty text"),
        ({"input": ["sun"] * 21}, "input", "21 are more than the 20"),
        ({"input": [5, 30522]}, "input", "no token 30522"),
        ({"input": ["sun", "sun " * 255]}, "input", "input.1 has 257"),
        ({"input": {"text": "sun"}}, "input", "valid"),
        ({}, "input", "required"),
        ({"input": "sun", "dimensions": 128}, "dimensions", "have 384"),
        ({"input": "sun", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "sun", "dimension": 3}, "dimension", "Unrecognized request argument"),
    ],
)
def test_refusals_in_the_protocols_shape(url: str, body: dict[str, Any], param: str, message: str) -> None:
    found = httpx.post(f"{url}/v1/embeddings", json={"model": NAME, **body}, timeout=30)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_the_longest_text_and_all_dimensions(client: openai.OpenAI, published: Published) -> None:
    text = "sun " * 254
    found = client.embeddings.create(model=NAME, input=text, dimensions=384)
    assert found.usage.prompt_tokens == 256
    assert vectors(found)[0] == pytest.approx(published.vector(text), abs=1e-6)


def test_each_path_has_the_refusals_of_its_protocol(url: str) -> None:
    large = {"model": NAME, "input": "x" * 200_000}
    found = httpx.post(f"{url}/v1/embeddings", json=large)
    assert (found.status_code, "100000 bytes" in found.json()["error"]["message"]) == (413, True)
    found = httpx.post(f"{url}/predict", json={"inputs": large})
    assert (found.status_code, "100000 bytes" in found.json()["detail"]) == (413, True)
    for body in ({"inputs": [{"text": ""}]}, {"texts": []}):
        found = httpx.post(f"{url}/predict", json=body)
        assert (found.status_code, "inputs" in found.json()["detail"]) == (422, True)
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found"


def test_predict_as_every_deployment(url: str, published: Published) -> None:
    found = httpx.post(f"{url}/predict", json={"inputs": [{"text": text} for text in TEXTS]}, timeout=30).json()
    rows = np.array([each["embedding"] for each in found["predictions"]])
    assert rows == pytest.approx(np.array([published.vector(text) for text in TEXTS]), abs=1e-6)
    assert found["version"] == "1"


@needs.chromium
def test_a_page_to_compare_texts_on(url: str, tmp_path: Path) -> None:
    with tab(url, tmp_path) as page:
        page.run(f"document.getElementById('text').value = {json.dumps(chr(10).join(TEXTS))}")
        page.run("document.querySelector('button').click()")
        page.wait("document.getElementById('notes').textContent")
        shown = page.run("document.body.innerText")
        assert page.problems == []
    assert f"{TEXTS[0]}: a vector of 384" in shown
    assert re.search(rf"{re.escape(TEXTS[1])}\s+0\.666\s+{re.escape(TEXTS[2])}\s+0\.105", shown), shown
    assert re.search(r"[\d.]+ s · version 1 · replica \w+", shown)


def test_what_it_is_asked_is_not_kept(path: Path) -> None:
    with pytest.raises(Refused, match="only what classifiers are asked"):
        application(path, "1", Deploy(sample_share=0.5))


def test_the_yaml_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    file = Path(__file__).parents[2] / "serve" / "embeddings.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert schema.applications[0].import_path == "serve.embeddings:build"
