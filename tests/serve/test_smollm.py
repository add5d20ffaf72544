"""A real model, from its package to conversations: SmolLM2-135M-Instruct."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
from ray import serve

from heliostat.hardware import free_port
from heliostat.recipe import Deploy
from pipelines import bundle, train
from pipelines.job import main
from serve.application import deploy
from tests.bundles import Reference

QUESTIONS = [
    "What is a heliostat?",
    "Name three planets.",
    "Write one sentence about the sea. " + "The sea is wide and the sky is high above it. " * 8,
    "How many days has a week?",
]


def greedy(url: str, asked: list[tuple[str, list]]) -> list[str | None]:
    """What models say to conversations, all of them at once."""

    async def one(client: openai.AsyncOpenAI, model: str, messages: list) -> str | None:
        found = await client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
        return found.choices[0].message.content

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=400) as client:
            return await asyncio.gather(*(one(client, model, messages) for model, messages in asked))

    try:
        return asyncio.run(ask())
    finally:
        serve.shutdown()


@pytest.fixture
def written(ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The model's bundle."""
    assert main("bundle", bundle.run, ["smollm", "--storage", str(tmp_path)]) == 0
    return Path(json.loads(capfd.readouterr().out.splitlines()[-1])["bundle"])


CONVERSATIONS = [[{"role": "user", "content": f"{question} {i}"}] for i in range(4) for question in QUESTIONS]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"engine": "embedded"}, {"engine": "llama_cpp", "gguf_dtype": "f32"}])
def test_sixteen_conversations_at_once_are_those_of_generate(written: Path, engine: dict[str, Any]) -> None:
    reference = Reference(written)
    settings = Deploy(port=free_port(), max_replicas=1, threads_per_replica=2, **engine)
    found = greedy(deploy(written, "1", settings, "smollm"), [("smollm", each) for each in CONVERSATIONS])
    assert found == [reference.text(reference.chat(each), 24) for each in CONVERSATIONS]


@pytest.mark.slow
def test_conversations_with_an_adapter_beside_those_without(
    written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that was trained here, on Python functions, against peft's."""
    changes = {
        "model.lora.rank": 8,
        "optimizer.lr": 2e-3,
        "schedule.max_steps": 6,
        "data.limit": 60,
        "data.validation_limit": 8,
        "data.sequence_length": 64,
        "training.global_batch_size": 4,
        "parallelism.workers": 1,
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    assert main("train", train.run, ["smollm", "--storage", str(tmp_path), *words]) == 0
    adapter = Path(json.loads(capfd.readouterr().out.splitlines()[-1])["bundle"])
    settings = Deploy(port=free_port(), max_replicas=1, threads_per_replica=2, adapters={"python": str(adapter)})
    asked = [(model, each) for each in CONVERSATIONS[:4] for model in ("smollm", "smollm:python")]
    found = greedy(deploy(written, "1", settings, "smollm"), asked)

    plain, other = Reference(written), Reference(written)
    other.model = peft.PeftModel.from_pretrained(other.model, adapter / "adapter").eval()
    expected = [each.text(each.chat(messages), 24) for messages in CONVERSATIONS[:4] for each in (plain, other)]
    assert found == expected
    assert expected[::2] != expected[1::2], "an adapter that changes nothing would show nothing"
