"""New versions beside one that serves, under load that never pauses: nothing that a client asks may be lost."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from heliostat import registry
from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.recipe import Recipe, Refused, override
from heliostat.train.loop import train
from pipelines.rollout import rollout
from serve.application import deploy
from tests import recipes
from tests.bundles import image_bundle
from tests.ports import free_port

SETTINGS = {
    "deploy.max_replicas": 1,
    "rollout.steps": [0.2, 0.5],
    "rollout.requests_per_step": 60,
    "rollout.error_increase": 0.3,
    "rollout.latency_increase": 2.0,
    "rollout.max_s": 120.0,
    "rollout.num_routers": 1,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipes.tiny_bert(tmp_path_factory.mktemp("rollout"), **SETTINGS, **{"deploy.port": free_port()})


def trained(recipe: Recipe, name: str, **overrides: Any) -> Bundle:
    recipe = override(recipe, overrides)
    return bundles.read(Path(train(recipe, recipes.prepared(recipe).folder, recipe.storage_path / name)["bundle"]))


@pytest.fixture(scope="module")
def first(recipe: Recipe) -> Bundle:
    return trained(recipe, "first", **{"schedule.max_steps": 30})


@pytest.fixture(scope="module")
def good(recipe: Recipe) -> Bundle:
    return trained(recipe, "good", **{"schedule.max_steps": 30, "seed": 1})


@dataclass
class Load:
    """Clients that ask all the time."""

    url: str
    answers: list[Any] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        words = random.Random(number)
        with httpx.Client(timeout=60) as client:
            while not self.over.is_set():
                inputs = [{"text": " ".join(words.choices(recipes.WORDS, k=4))}]
                try:
                    self.answers.append(client.post(f"{self.url}/predict", json={"inputs": inputs}))
                except httpx.HTTPError as error:
                    self.answers.append(error)

    def __enter__(self) -> Load:
        self.clients = [threading.Thread(target=self.ask, args=(number,)) for number in range(4)]
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *error: object) -> None:
        time.sleep(0.5)
        self.over.set()
        for client in self.clients:
            client.join()

    @property
    def versions(self) -> Counter[str]:
        """How many answers each version gave. Every request got a good one."""
        lost = [each for each in self.answers if not (isinstance(each, httpx.Response) and each.status_code == 200)]
        assert not lost, (len(lost), [getattr(each, "text", each) for each in lost[:3]])
        return Counter(each.json()["version"] for each in self.answers if isinstance(each, httpx.Response))


@pytest.fixture
def load(ray_cluster: None, recipe: Recipe, first: Bundle) -> Iterator[Load]:
    """On the first version, which serves and is champion."""
    version = registry.register(recipe, first, None)
    registry.promote(recipe, version)
    with Load(deploy(version.path, str(version.version), recipe.deploy, recipe.name)) as load:
        yield load


@pytest.fixture(scope="module", autouse=True)
def _after(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    yield
    serve.shutdown()


def applications() -> dict[str, Any]:
    from ray.serve.context import _get_global_client

    return _get_global_client().get_serve_details()["applications"]


def kill_replica(application: str, deployment: str) -> None:
    replica = applications()[application]["deployments"][deployment]["replicas"][0]
    os.kill(replica["pid"], signal.SIGKILL)


def test_a_good_canary_is_promoted_though_replicas_are_killed(recipe: Recipe, good: Bundle, load: Load) -> None:
    killed: list[str] = []
    champion = registry.champion(recipe)
    assert champion is not None
    before = str(champion.version)

    def kill() -> None:
        while not load.answers or load.answers[-1].json()["version"] == before:  # until there are two
            time.sleep(0.01)
        for application in (recipe.name, f"{recipe.name}-candidate"):
            kill_replica(application, "classifier")
            killed.append(application)
            time.sleep(5)

    killer = threading.Thread(target=kill)
    killer.start()
    result = rollout(override(recipe, {"rollout.requests_per_step": 400}), good, "canary")
    killer.join()
    assert result["decision"] == "promoted", result
    assert len(killed) == 2
    champion = registry.champion(recipe)
    assert champion is not None
    assert (champion.version, champion.tags["rollout.decision"]) == (result["version"], "promoted")
    assert json.loads(champion.tags["rollout.evidence"]) == result["evidence"]
    assert httpx.get(f"{load.url}/healthz").json()["version"] == str(result["version"])
    assert set(applications()) == {recipe.name}
    assert set(applications()[recipe.name]["deployments"]) == {"classifier"}
    load.over.set()
    assert set(load.versions) == {str(result["from"]), str(result["version"])}


@pytest.mark.parametrize("task", ["Failing", "Late"])
def test_a_bad_canary_is_rolled_back(recipe: Recipe, load: Load, task: str) -> None:
    bad = trained(recipe, task, task=f"tests.versions:{task}", **{"schedule.max_steps": 2})
    result = rollout(recipe, bad, "canary")
    assert result["decision"] == "rolled_back", result
    metric = {"Failing": "error_rate", "Late": "latency"}[task]
    assert result["evidence"][metric]["verdict"] == "harm"
    assert registry.get(recipe, result["version"]).tags["rollout.decision"] == "rolled_back"
    champion = registry.champion(recipe)
    assert champion is not None
    assert champion.version == result["from"]
    assert httpx.get(f"{load.url}/healthz").json()["version"] == str(result["from"])
    assert load.versions


def test_a_shadow_answers_nobody(recipe: Recipe, load: Load) -> None:
    """It would fail every third request."""
    bad = trained(recipe, "Shadow", task="tests.versions:Failing", **{"schedule.max_steps": 3})
    result = rollout(recipe, bad, "shadow")
    assert result["decision"] == "rolled_back", result
    assert result["evidence"]["answers"]["candidate"] == result["evidence"]["answers"]["stable"] > 0
    load.over.set()
    assert set(load.versions) == {str(result["from"])}


def test_blue_green_switches_back(recipe: Recipe, load: Load) -> None:
    """Nothing fails and nothing is late, but what was never trained is seldom right."""
    unfit = trained(recipe, "unfit", **{"schedule.max_steps": 1, "optimizer.lr": 1e-9, "seed": 5})
    judged = override(recipe, {"rollout.judge": "tests.versions:right", "rollout.quality_drop": 0.3})
    result = rollout(judged, unfit, "blue_green")
    assert result["decision"] == "rolled_back", result
    assert result["evidence"]["quality"]["verdict"] == "harm"
    load.over.set()
    time.sleep(1)
    served = [each.json()["version"] for each in load.answers]
    assert set(load.versions) == {str(result["from"]), str(result["version"])}
    assert served[-1] == str(result["from"])


def test_what_cannot_be_rolled_out_is_refused(recipe: Recipe, first: Bundle, good: Bundle, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has no champion to compare with"):
        rollout(override(recipe, {"name": "another"}), good, "canary")
    registry.promote(recipe, registry.register(recipe, first, None))
    with pytest.raises(Refused, match="is the champion"):
        rollout(recipe, first, "canary")
    with pytest.raises(Refused, match="an AutoModelForImageClassification"):
        rollout(recipe, bundles.read(image_bundle(tmp_path)), "canary")
    with pytest.raises(Refused, match="did you mean shadow"):
        rollout(recipe, good, "shadows")
