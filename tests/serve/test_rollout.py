"""New versions beside one that serves, under load that never pauses: nothing that a client asks may be lost."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client

from heliostat import registry
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.recipe import Recipe, Refused, override
from heliostat.train.loop import train
from pipelines.rollout import rollout
from serve.application import deploy
from serve.rollout import ROUTER
from tests import recipes
from tests.bundles import image_bundle, write
from tests.versions import LABELLED

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


@pytest.fixture(scope="module")
def first(recipe: Recipe) -> Bundle:
    trained = override(recipe, {"schedule.max_steps": 60})
    return bundles.read(Path(train(trained, recipes.prepared(trained).folder, recipe.storage_path / "first")["bundle"]))


def untrained(recipe: Recipe, first: Bundle, seed: int, task: str = "text_classification") -> Bundle:
    recipe = override(recipe, {"seed": seed, "task": task})
    return bundles.read(
        write(recipe.storage_path / f"untrained-{seed}", recipe, first.processor(), first.card["facts"])
    )


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
                inputs = [{"text": " ".join(words.choices(words.choice(LABELLED), k=4))}]
                try:
                    self.answers.append(client.post(f"{self.url}/predict", json={"inputs": inputs}))
                except httpx.HTTPError as error:
                    self.answers.append(error)

    def __enter__(self) -> Load:
        self.clients = [threading.Thread(target=self.ask, args=(number,)) for number in range(3)]
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *error: object) -> None:
        time.sleep(0.5)
        self.over.set()
        for client in self.clients:
            client.join()

    @property
    def last(self) -> str:
        """Whose the last answer was."""
        return self.answers[-1].json()["version"] if self.answers else ""

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
    yield
    serve.shutdown()


def applications() -> dict[str, Any]:
    return _get_global_client().get_serve_details()["applications"]


def wait(until: Callable[[], bool]) -> None:
    limit = time.monotonic() + 200
    while not until():
        assert time.monotonic() < limit
        time.sleep(0.02)


def kill_replica(application: str) -> None:
    replica = applications()[application]["deployments"]["classifier"]["replicas"][0]
    os.kill(replica["pid"], signal.SIGKILL)


@dataclass
class Killer:
    """While two versions live, both lose their replicas: the old one's dies once it is behind the router, and the new
    one's once it answers, or where it only gets copies, right after."""

    recipe: Recipe
    load: Load
    shadow: bool = False
    killed: list[str] = field(default_factory=list)

    def kill(self) -> None:
        controller = _get_global_client()._controller
        wait(lambda: ROUTER in {each.name for each in ray.get(controller.get_all_endpoints.remote())})
        time.sleep(1)  # what was sent past the router is answered
        before = self.load.last
        kill_replica(self.recipe.name)
        self.killed.append("old")
        if not self.shadow:
            wait(lambda: self.load.last != before)
        kill_replica(f"{self.recipe.name}-candidate")
        self.killed.append("new")

    def __enter__(self) -> Killer:
        self.thread = threading.Thread(target=self.kill)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.join()
        assert self.killed == ["old", "new"]


def served(url: str) -> str:
    return httpx.get(f"{url}/healthz", timeout=60).json()["version"]


def champion(recipe: Recipe) -> registry.Version:
    found = registry.champion(recipe)
    assert found is not None
    return found


@pytest.mark.slow
def test_a_good_canary_is_promoted_though_replicas_are_killed(recipe: Recipe, first: Bundle, load: Load) -> None:
    with Killer(recipe, load):
        result = rollout(override(recipe, {"rollout.requests_per_step": 400}), untrained(recipe, first, 1), "canary")
    assert result["decision"] == "promoted", result
    now = champion(recipe)
    assert (now.version, now.tags["rollout.decision"]) == (result["version"], "promoted")
    assert json.loads(now.tags["rollout.evidence"]) == result["evidence"]
    assert served(load.url) == str(result["version"])
    assert set(applications()) == {recipe.name}
    assert set(applications()[recipe.name]["deployments"]) == {"classifier"}
    assert set(load.versions) == {str(result["from"]), str(result["version"])}


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "task"), [("error_rate", "Failing"), ("latency", "Late")])
def test_a_bad_canary_is_rolled_back(recipe: Recipe, first: Bundle, load: Load, metric: str, task: str) -> None:
    bad = untrained(recipe, first, 2 if task == "Late" else 3, f"tests.versions:{task}")
    result = rollout(recipe, bad, "canary")
    assert result["decision"] == "rolled_back", result
    assert result["evidence"][metric]["verdict"] == "harm", result
    assert registry.get(recipe, result["version"]).tags["rollout.decision"] == "rolled_back"
    assert champion(recipe).version == result["from"]
    assert served(load.url) == str(result["from"])
    assert load.versions


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["shadow", "blue_green"])
def test_a_good_version_is_promoted(recipe: Recipe, first: Bundle, load: Load, strategy: str) -> None:
    result = rollout(recipe, untrained(recipe, first, 6 if strategy == "shadow" else 7), strategy)
    assert result["decision"] == "promoted", result
    assert champion(recipe).version == result["version"]
    assert served(load.url) == str(result["version"])
    wait(lambda: load.last == str(result["version"]))
    assert set(load.versions) == {str(result["from"]), str(result["version"])}
    assert set(applications()[recipe.name]["deployments"]) == {"classifier"}


@pytest.mark.slow
def test_a_shadow_answers_nobody(recipe: Recipe, first: Bundle, load: Load) -> None:
    """It would fail every third request. Copies also wait while its replica is replaced: not the point."""
    bad = untrained(recipe, first, 4, "tests.versions:Failing")
    patient = override(recipe, {"rollout.requests_per_step": 400, "rollout.latency_increase": 1000.0})
    with Killer(recipe, load, shadow=True):
        result = rollout(patient, bad, "shadow")
    assert result["decision"] == "rolled_back", result
    assert result["evidence"]["error_rate"]["verdict"] == "harm", result
    assert result["evidence"]["answers"]["candidate"] == result["evidence"]["answers"]["stable"] > 0
    assert served(load.url) == str(result["from"])
    assert set(load.versions) == {str(result["from"])}


@pytest.mark.slow
def test_blue_green_switches_back(recipe: Recipe, first: Bundle, load: Load) -> None:
    """Nothing fails and nothing is late, but what was never trained is seldom right."""
    judged = override(recipe, {"rollout.judge": "tests.versions:right", "rollout.quality_drop": 0.2})
    with Killer(recipe, load):
        result = rollout(judged, untrained(recipe, first, 5), "blue_green")
    assert result["decision"] == "rolled_back", result
    assert result["evidence"]["quality"]["verdict"] == "harm", result
    assert set(load.versions) == {str(result["from"]), str(result["version"])}
    assert served(load.url) == load.last == str(result["from"])


def test_what_cannot_be_rolled_out_is_refused(recipe: Recipe, first: Bundle, tmp_path: Path) -> None:
    good = untrained(recipe, first, 1)
    with pytest.raises(Refused, match="has no champion to compare with"):
        rollout(override(recipe, {"name": "another"}), good, "canary")
    registry.promote(recipe, registry.register(recipe, first, None))
    with pytest.raises(Refused, match="is the champion"):
        rollout(recipe, first, "canary")
    with pytest.raises(Refused, match="an AutoModelForImageClassification"):
        rollout(recipe, bundles.read(image_bundle(tmp_path)), "canary")
    with pytest.raises(Refused, match="did you mean shadow"):
        rollout(recipe, good, "shadows")
