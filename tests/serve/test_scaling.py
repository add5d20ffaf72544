"""A language model's replicas come and go with its tokens, and nobody loses an answer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import openai
import pytest

from heliostat.hardware import free_port
from heliostat.recipe import Deploy
from serve.application import deploy
from tests.bundles import Reference, chat_bundle

pytestmark = pytest.mark.slow


def replicas(name: str) -> int:
    """That run now."""
    from ray import serve

    (deployment,) = serve.status().applications[name].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait(name: str, count: int, within_s: float) -> None:
    limit = time.monotonic() + within_s
    while replicas(name) != count:
        assert time.monotonic() < limit, replicas(name)
        time.sleep(0.2)


def test_from_none_to_two_and_back(ray_cluster: None, tmp_path: Path) -> None:
    from ray import serve

    reference = Reference(chat_bundle(tmp_path))
    settings = Deploy(
        port=free_port(), min_replicas=0, max_replicas=2, upscale_delay_s=0, downscale_delay_s=2, cache_tokens=8192,
        target_ongoing_requests=1000, target_queued_tokens=100_000, target_first_token_s=0.5,
        stage_folder=str(tmp_path / "node"),
    )  # fmt: skip
    url = deploy(reference.path, "1", settings, "tiny")
    # Its storage is away from now on: replicas start from their node's copy.
    (reference.path / "model.safetensors").unlink()
    prompt, expected = "sun salt " * 60, reference.text("sun salt " * 60, 200)

    async def ask(count: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            found = [
                client.completions.create(model="tiny", prompt=prompt, max_tokens=200, temperature=0)
                for _ in range(count)
            ]
            return [each.choices[0].text for each in await asyncio.gather(*found)]

    async def under_load() -> None:
        """Many requests at once: few by the target, but their first tokens are late."""
        asking = asyncio.create_task(ask(120))
        try:
            await asyncio.to_thread(wait, "tiny", 2, 200)
        finally:
            assert await asking == [expected] * 120

    try:
        wait("tiny", 0, 60)
        assert asyncio.run(ask(1)) == [expected]  # who waits for the first replica
        asyncio.run(under_load())
        wait("tiny", 0, 120)
    finally:
        serve.shutdown()
