"""A language model's streams through the router, to either of two versions, for those who have a key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from heliostat import registry
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.recipe import Recipe, override
from heliostat.rollout.outcomes import Seen
from heliostat.rollout.schedule import Traffic
from pipelines.rollout import rollout
from serve import keys
from serve.application import deploy
from serve.rollout import Served, Split, split
from tests.bundles import Reference, chat_bundle
from tests.slow_client import trickle

pytestmark = pytest.mark.slow


LIMITS = {
    "free": {},
    "slow": {"requests_per_minute": 1, "burst": 3},
    "reader": {"tokens_per_minute": 60},
    "patient": {"tokens_per_minute": 60},
}
"""Of tenants, whose keys are called as they are."""


@contextmanager
def two_versions(folder: Path, **changes: Any) -> Iterator[Split]:
    paths = [chat_bundle(folder, seed) for seed in (0, 1)]
    file = folder / "keys.json"
    file.write_text(
        json.dumps({name: {"sha256": [keys.digest(name.encode())], **limits} for name, limits in LIMITS.items()})
    )
    settings = {
        "deploy.port": free_port(),
        "deploy.max_replicas": 1,
        "deploy.keys_file": str(file),
        "deploy.body_timeout_s": 2.0,
        "rollout.num_routers": 1,
        **changes,
    }
    recipe = override(bundles.read(paths[0]).recipe, settings)
    with split(recipe, Served(paths[0], "1"), Served(paths[1], "2")) as found:
        yield found
    serve.shutdown()


@pytest.fixture(scope="module")
def versions(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    with two_versions(tmp_path_factory.mktemp("router")) as found:
        yield found


def url(versions: Split) -> str:
    return f"http://127.0.0.1:{versions.recipe.deploy.port}"


def ask(versions: Split, tenant: str, **given: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "sun", "max_tokens": 12, "ignore_eos": True, **given}
    headers = {"authorization": f"Bearer {tenant}"}
    return httpx.post(f"{url(versions)}/v1/completions", json=body, headers=headers, timeout=30)


def streamed(recipe: Recipe, **headers: str) -> tuple[str, set[str | None]]:
    """The text that was streamed, and the fingerprints of the bundle that made it."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{recipe.deploy.port}/v1", api_key="free", max_retries=0)
    chunks = list(
        client.completions.create(
            model="tiny", prompt="sun salt", max_tokens=12, temperature=0, stream=True, extra_headers=headers
        )
    )
    return "".join(chunk.choices[0].text for chunk in chunks), {chunk.system_fingerprint for chunk in chunks}


def exchanged(versions: Split, traffic: Traffic) -> list[Seen]:
    """What the routers saw, once they have: an answer has reached its client before its stream is over."""
    limit = time.monotonic() + 30
    while not (seen := versions.exchange(traffic)):
        assert time.monotonic() < limit
        time.sleep(0.1)
    return seen


def test_a_whole_rollout_under_streams(ray_cluster: None, tmp_path: Path) -> None:
    """Each answer is one version's from its first token to its last, and nobody loses one."""
    settings = {
        "name": "tiny",
        "storage": str(tmp_path),
        "deploy.port": free_port(),
        "deploy.max_replicas": 1,
        "rollout.steps": [0.5],
        "rollout.requests_per_step": 40,
        "rollout.num_routers": 1,
        "rollout.error_increase": 0.3,
        "rollout.latency_increase": 2.0,
        "rollout.max_s": 200.0,
    }
    old, new = (bundles.read(chat_bundle(tmp_path, seed)) for seed in (0, 1))
    recipe = override(old.recipe, settings)
    version = registry.register(recipe, old, None)
    registry.promote(recipe, version)
    deploy(version.path, str(version.version), recipe.deploy, recipe.name)
    found: list[tuple[str, set[str | None]]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            found.append(streamed(recipe))

    with ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask) for _ in range(2)]
        try:
            result = rollout(recipe, new, "canary")
        finally:
            over.set()
        for each in asking:
            each.result()  # which raises what a client met
    assert result["decision"] == "promoted", result
    texts = {bundle.digest[:12]: Reference(bundle.path).text("sun salt", 12) for bundle in (old, new)}
    assert {(text, *fingerprints) for text, fingerprints in found} == {(text, name) for name, text in texts.items()}
    assert streamed(recipe) == (texts[new.digest[:12]], {new.digest[:12]})
    serve.shutdown()


def test_a_version_that_fails_is_not_paid(ray_cluster: None, tmp_path: Path) -> None:
    """It has read the prompt and drawn tokens, when its time is over and the other one is asked."""
    with two_versions(tmp_path, **{"rollout.timeout_s": 0.5}) as versions:
        versions.exchange(Traffic(1.0))
        begun = time.monotonic()
        answer = ask(versions, "patient", prompt="sun " * 100, max_tokens=700, n=4)
        (seen,) = settled(versions)
        late = ask(versions, "patient")
    assert answer.status_code == 200, answer.text
    assert answer.json()["system_fingerprint"] == bundles.read(versions.stable.bundle).digest[:12]
    assert seen.candidate is not None
    assert seen.candidate.failed
    # The seconds until it may ask again are the tokens that it owes: it has 60, and one more each second.
    used = answer.json()["usage"]["total_tokens"]
    assert used - 60 - (time.monotonic() - begun) <= int(late.headers["retry-after"]) <= used - 60


def test_streams_come_from_the_version_whose_turn_it_is(versions: Split) -> None:
    versions.exchange(Traffic(0.0))
    old, fingerprints = streamed(versions.recipe)
    assert fingerprints == {bundles.read(versions.stable.bundle).digest[:12]}
    (seen,) = exchanged(versions, Traffic(1.0))
    new, fingerprints = streamed(versions.recipe)
    assert fingerprints == {bundles.read(versions.candidate.bundle).digest[:12]}
    assert old != new
    (other,) = exchanged(versions, Traffic(0.0, copied=True))
    assert (seen.share, other.share) == (0.0, 1.0)
    assert seen.stable is not None
    assert other.candidate is not None
    assert 0 < seen.stable.latency_s < 30
    assert streamed(versions.recipe) == (old, {bundles.read(versions.stable.bundle).digest[:12]})
    pairs = exchanged(versions, Traffic(0.0))
    assert pairs[0].stable is not None
    assert pairs[0].candidate is not None
    assert not pairs[0].stable.failed
    assert not pairs[0].candidate.failed


def test_a_user_stays_with_one_version(versions: Split) -> None:
    versions.exchange(Traffic(0.5))
    found = {user: [streamed(versions.recipe, **{"x-user": user})[0] for _ in range(3)] for user in "abcdefghij"}
    assert all(len(set(texts)) == 1 for texts in found.values())
    assert len({texts[0] for texts in found.values()}) == 2
    versions.exchange(Traffic(0.0))


def test_what_both_refuse_is_the_clients_mistake(versions: Split) -> None:
    versions.exchange(Traffic(1.0))
    client = httpx.Client(base_url=url(versions), headers={"x-api-key": "free"}, timeout=30)
    refused = client.post("/v1/completions", json={"model": "tiny", "prompt": 3})
    assert refused.status_code == 400
    assert "prompt" in refused.json()["error"]["message"]
    (seen,) = versions.exchange(Traffic(0.0))
    assert seen.candidate is not None
    assert not seen.candidate.failed
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    large = client.post("/predict", content=b"x" * (versions.recipe.deploy.max_body_bytes + 1))
    assert large.status_code == 413


@pytest.mark.parametrize("traffic", [Traffic(0.0), Traffic(1.0), Traffic(0.0, copied=True)], ids=str)
def test_only_those_with_a_key_reach_a_version(versions: Split, traffic: Traffic) -> None:
    versions.exchange(traffic)
    assert ask(versions, "nobody").status_code == 401
    assert httpx.get(f"{url(versions)}/v1/models").status_code == 401
    assert httpx.get(f"{url(versions)}/healthz", timeout=30).status_code == 200
    assert ask(versions, "free").status_code == 200
    assert len(settled(versions)) == 1


def test_who_asks_both_versions_once_is_charged_once(versions: Split) -> None:
    versions.exchange(Traffic(0.0, copied=True))
    assert [ask(versions, "slow").status_code for _ in range(4)] == [200, 200, 200, 429]
    # 12 tokens and the prompt's of an answer: twice that five times would be more than the 60.
    length = ask(versions, "free").json()["usage"]["total_tokens"]
    begun, answered = time.monotonic(), 0
    while ask(versions, "reader").status_code == 200:
        answered += 1
        time.sleep(0.3)  # for what was charged to be heard of
    most = 60 + (time.monotonic() - begun)
    assert most - length <= answered * length <= most + length
    assert len(settled(versions)) == 4 + answered
    # What the router let in is not counted again behind it either.
    versions.exchange(Traffic(1.0))
    assert ask(versions, "slow").status_code == 429
    assert settled(versions) == []


def test_the_router_waits_for_no_body_either(versions: Split) -> None:
    found, seconds = trickle(url(versions), "/v1/completions", {"x-api-key": "free"})
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b'"error":{"message":"body: not here after 2 s' in found
    assert seconds < 8


def settled(versions: Split) -> list[Seen]:
    """What was seen, once copies have been answered."""
    time.sleep(2)
    return versions.exchange(Traffic(0.0))
