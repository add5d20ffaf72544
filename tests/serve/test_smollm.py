"""A real model, from its package to conversations: SmolLM2-135M-Instruct."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from heliostat.hardware import free_port
from heliostat.recipe import Deploy
from pipelines.bundle import run
from pipelines.job import main
from serve.application import deploy
from tests.bundles import Reference

QUESTIONS = [
    "What is a heliostat?",
    "Name three planets.",
    "Write one sentence about the sea. " + "The sea is wide and the sky is high above it. " * 8,
    "How many days has a week?",
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"engine": "embedded"}, {"engine": "llama_cpp", "gguf_dtype": "f32"}])
def test_sixteen_conversations_at_once_are_those_of_generate(
    engine: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray import serve

    assert main("bundle", run, ["smollm", "--storage", str(tmp_path)]) == 0
    path = Path(json.loads(capfd.readouterr().out.splitlines()[-1])["bundle"])
    reference = Reference(path)
    asked = [[{"role": "user", "content": f"{question} {i}"}] for i in range(4) for question in QUESTIONS]
    settings = Deploy(port=free_port(), max_replicas=1, threads_per_replica=2, **engine)
    url = deploy(path, "1", settings, "smollm")

    async def one(client: openai.AsyncOpenAI, messages: list) -> str | None:
        found = await client.chat.completions.create(model="smollm", messages=messages, max_tokens=24, temperature=0)
        return found.choices[0].message.content

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=400) as client:
            return await asyncio.gather(*(one(client, messages) for messages in asked))

    try:
        assert asyncio.run(ask()) == [reference.text(reference.chat(messages), 24) for messages in asked]
    finally:
        serve.shutdown()
