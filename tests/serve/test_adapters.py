"""Adapters that were trained here behind one endpoint with the model they were trained on, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
import transformers

from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.models.load import build_model
from heliostat.recipe import Deploy, Recipe, Refused, build, override
from heliostat.tasks import get_task
from heliostat.train.loop import train
from serve.application import application, deploy
from tests.bundles import image_bundle
from tests.recipes import prepared, tiny_llama

NAME = "tiny"
TEXTS = ["sun salt mirror", "cloud", "noon shade steam " * 9]


@dataclass
class Made:
    base: Path
    adapters: dict[str, str]
    other: Path
    """Of the same architecture, with other weights."""


def base_bundle(recipe: Recipe, path: Path) -> Path:
    """As `pipelines.bundle` writes it."""
    data = prepared(recipe)
    task = get_task(override(recipe, {"model.lora.rank": 0}), data.facts)
    state = build_model(task).state_dict()
    return bundles.write(path, task, state, data.processor(), data={}, metrics={}, lineage={}).path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Trained by rows of other seeds, with a rank and targets of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    recipe = tiny_llama(folder, **{"schedule.max_steps": 6, "optimizer.lr": 5e-2, "optimizer.clip_norm": None})
    # So that the likeliest token is so by far.
    own = {**recipe.model.config, "initializer_range": 0.3, "max_position_embeddings": 256}
    pretrained, adapters = [], {}
    for seed in (5, 6):
        model = build_model(prepared(recipe).task(override(recipe, {"model.config": own, "seed": seed})))
        model.save_pretrained(folder / f"pretrained-{seed}")
        pretrained.append(override(recipe, {"model.name": str(folder / f"pretrained-{seed}"), "model.config": {}}))
    for name, rank, targets in (("red", 4, []), ("blue", 2, ["q_proj", "up_proj"])):
        lora = override(pretrained[0], {"model.lora.rank": rank, "model.lora.targets": targets, "seed": rank})
        adapters[name] = train(lora, prepared(lora).folder, folder / name)["bundle"]
    base, other = (base_bundle(each, folder / f"base-{i}") for i, each in enumerate(pretrained))
    return Made(base, adapters, other)


class Peft:
    """What peft makes of the base and each adapter by itself, in this process."""

    def __init__(self, made: Made) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(made.base)
        self.models: dict[str, Any] = {NAME: self.base(made)}
        for name, path in made.adapters.items():
            self.models[f"{NAME}:{name}"] = peft.PeftModel.from_pretrained(self.base(made), f"{path}/adapter").eval()

    def base(self, made: Made) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(made.base).eval()

    @torch.no_grad()
    def text(self, name: str, text: str) -> str:
        ids, end = torch.tensor([self.tokenizer(text)["input_ids"]]), self.tokenizer.eos_token_id
        options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": end, "pad_token_id": end}
        found = self.models[name].generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(made: Made) -> Peft:
    return Peft(made)


@pytest.fixture(scope="module")
def settings(made: Made) -> Deploy:
    return Deploy(port=free_port(), max_replicas=1, cache_tokens=4096, adapters=made.adapters)


@pytest.fixture(scope="module")
def url(ray_cluster: None, made: Made, settings: Deploy) -> Iterator[str]:
    from ray import serve

    yield deploy(made.base, "1", settings, NAME)
    serve.shutdown()


def test_models(url: str, reference: Peft) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:red", f"{NAME}:blue"]
    assert client.models.retrieve(f"{NAME}:red").id == f"{NAME}:red"
    for wrong in (f"{NAME}:green", "red", f"{NAME}:"):
        with pytest.raises(openai.NotFoundError, match="there is `tiny`, `tiny:red`, `tiny:blue`") as error:
            client.completions.create(model=wrong, prompt="sun")
        assert error.value.code == "model_not_found"


def test_all_at_once_are_each_alone(url: str, reference: Peft, made: Made) -> None:
    asked = [(name, text) for text in TEXTS for name in reference.models]

    async def one(client: openai.AsyncOpenAI, name: str, text: str) -> tuple[str, str | None]:
        found = await client.completions.create(model=name, prompt=text, max_tokens=16, temperature=0)
        assert found.model == name
        return found.choices[0].text, found.system_fingerprint

    async def ask() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, name, text) for name, text in asked))

    found = asyncio.run(ask())
    assert [text for text, _ in found] == [reference.text(name, text) for name, text in asked]
    assert len({text for text, _ in found[:3]}) == 3, "adapters that change nothing would show nothing"
    paths = [made.base, *map(Path, made.adapters.values())]
    assert [print_ for _, print_ in found[:3]] == [bundles.read(path).digest[:12] for path in paths]


def test_what_cannot_be_served_is_refused_before_it_starts(made: Made, tmp_path: Path) -> None:
    for path, settings, field, reason in (
        (made.other, Deploy(adapters=made.adapters), "deploy.adapters.red", "trained on other weights"),
        (made.base, Deploy(adapters={"it": str(made.base)}), "deploy.adapters.it", "was not trained with an adapter"),
        (made.base, Deploy(adapters={"it": str(tmp_path)}), "bundle", "is not a bundle"),
        (made.base, Deploy(adapters=made.adapters, engine="llama_cpp"), "deploy.adapters", "llama_cpp has none"),
        (image_bundle(tmp_path), Deploy(adapters=made.adapters), "deploy.adapters", "models that generate text"),
    ):
        with pytest.raises(Refused, match=reason) as caught:
            application(path, "1", settings)
        assert caught.value.field == field
    with pytest.raises(Refused, match=r"deploy\.adapters"):
        build({"name": "r", "task": "language_model", "deploy": {"adapters": {"a:b": "/x"}}})


def test_an_adapter_that_was_trained_again(url: str, made: Made, reference: Peft, settings: Deploy) -> None:
    """Last: another bundle in the red one's folder, here the blue one's, is served once it is deployed again."""
    shutil.rmtree(made.adapters["red"])
    shutil.copytree(made.adapters["blue"], made.adapters["red"])
    deploy(made.base, "1", settings, NAME)
    body = {"model": f"{NAME}:red", "prompt": TEXTS[0], "max_tokens": 16, "temperature": 0}
    found = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
    assert found["choices"][0]["text"] == reference.text(f"{NAME}:blue", TEXTS[0])
