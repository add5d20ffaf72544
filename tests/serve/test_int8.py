"""A classifier in 8-bit integers over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from heliostat.hardware import free_port
from heliostat.models.bundle import Bundle
from heliostat.predictor import Predictor, loading
from heliostat.recipe import Deploy
from serve.application import deploy
from tests.bundles import reweighted, text_bundle

TEXTS = ["sun salt mirror", "cloud", "noon shade steam cloud storage " * 7, "heat field ray", "Ünïcödé"]
INPUTS = [{"text": text} for text in TEXTS]


@dataclass
class Endpoint:
    url: str
    bundle: Bundle
    settings: Deploy


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    folder = tmp_path_factory.mktemp("int8")
    taught = text_bundle(folder)
    state = taught.model().state_dict()
    # Away from the ends of the pooler's tanh, where answers are alike whatever rounds them.
    state |= {name: state[name] / 20 for name in state if "pooler" in name}
    state["classifier.weight"] *= 4
    bundle = reweighted(taught, folder / "soft", state)
    settings = Deploy(port=free_port(), max_replicas=1, precision="int8")
    yield Endpoint(deploy(bundle.path, "1", settings, "tiny-int8"), bundle, settings)
    serve.shutdown()


def test_health_says_in_what_it_computes(endpoint: Endpoint) -> None:
    assert httpx.get(f"{endpoint.url}/healthz", timeout=30).json()["precision"] == "int8"


def test_answers_are_the_predictors_alone_and_in_a_crowd(endpoint: Endpoint) -> None:
    expected = Predictor(endpoint.bundle, threads=1, load=loading(endpoint.settings)).predict(INPUTS)
    exact = Predictor(endpoint.bundle, threads=1).predict(INPUTS)

    def ask(place: int) -> float:
        """How far an answer is from float32's."""
        answer = httpx.post(f"{endpoint.url}/predict", json={"inputs": INPUTS[place]}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["bundle"] == endpoint.bundle.digest[:12]
        (found,) = answer.json()["predictions"]
        assert found["label"] == expected[place]["label"]
        assert found["scores"] == pytest.approx(expected[place]["scores"], abs=1e-5)
        return abs(found["score"] - exact[place]["score"])

    assert max(ask(place) for place in range(len(INPUTS))) > 2e-5  # so they cannot be both
    with ThreadPoolExecutor(16) as crowd:
        for each in [crowd.submit(ask, place % len(INPUTS)) for place in range(64)]:
            each.result()
