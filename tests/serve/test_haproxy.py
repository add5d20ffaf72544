"""Replicas are killed and go while they are asked, and every request is answered; what an endpoint is made of listens
to this machine alone."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve
from ray.serve.context import _get_global_client

from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy
from serve import haproxy
from serve.application import deploy
from tests.bundles import tabular_bundle

NAME = "rows"
ROWS = [{"height": 0.01 * i, "width": 3.0} for i in range(300)]
REPLICA_PORTS = range(30000, 31000)
"""Of Ray's replicas behind HAProxy."""


@dataclass
class Endpoint:
    """A classifier in two replicas."""

    url: str
    settings: Deploy
    bundle: Path
    labels: list[str]
    """Of ROWS, by the predictor."""


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    bundle = tabular_bundle(tmp_path_factory.mktemp("haproxy"))
    labels = [each["label"] for each in Predictor(bundles.read(bundle)).predict(ROWS)]
    # Small batches, so that a request takes its time.
    settings = Deploy(port=free_port(), min_replicas=2, max_replicas=2, max_inputs=len(ROWS), max_batch_size=4)
    yield Endpoint(deploy(bundle, "1", settings, NAME), settings, bundle, labels)
    serve.shutdown()


class Load:
    """Clients who ask one request after the other, and never again for one that failed, for the time of a block."""

    def __init__(self, endpoint: Endpoint, clients: int) -> None:
        self.endpoint, self.clients = endpoint, clients
        self.replicas: list[str] = []
        """That answered, rightly."""
        self.lost: list[str] = []

    async def ask(self) -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            while not self.over.is_set():
                try:
                    answer = await client.post(f"{self.endpoint.url}/predict", json={"inputs": ROWS})
                except httpx.HTTPError as error:
                    self.lost.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.lost.append(f"{answer.status_code} {answer.text}")
                    continue
                assert [each["label"] for each in answer.json()["predictions"]] == self.endpoint.labels
                self.replicas.append(answer.headers["x-replica"])

    async def ask_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.clients):
                group.create_task(self.ask())

    def answered(self, count: int) -> None:
        """So many more."""
        more = len(self.replicas) + count
        wait(lambda: len(self.replicas) >= more)

    def __enter__(self) -> Load:
        self.over = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self.ask_all(),))
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def wait(until: Callable[[], bool]) -> None:
    limit = time.monotonic() + 200
    while not until():
        assert time.monotonic() < limit
        time.sleep(0.1)


def replicas() -> dict[str, int]:
    """The processes of those that run now."""
    found: dict[str, Any] = _get_global_client().get_serve_details()["applications"][NAME]["deployments"]["classifier"]
    return {each["replica_id"]: each["pid"] for each in found["replicas"] if each["state"] == "RUNNING"}


@pytest.mark.parametrize("victims", [1, 2], ids=["one of two", "both at once"])
def test_what_killed_replicas_had_begun_is_answered(endpoint: Endpoint, victims: int) -> None:
    before = replicas()
    killed = dict(list(before.items())[:victims])
    with Load(endpoint, clients=8) as load:
        load.answered(30)
        assert set(load.replicas) == set(before)  # each is busy: there are more clients than replicas
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        wait(lambda: len(replicas()) == 2 and not replicas().keys() & killed.keys())
        load.answered(30)
    assert load.lost == []


@pytest.mark.slow
def test_what_ending_replicas_had_begun_is_answered(endpoint: Endpoint) -> None:
    """Other settings replace both replicas; then there are two for as long as two are needed."""
    changed = {"min_replicas": 1, "target_ongoing_requests": 3.0, "upscale_delay_s": 0.0, "downscale_delay_s": 0.0}
    settings = endpoint.settings.model_copy(update=changed)
    before = replicas()
    try:
        with Load(endpoint, clients=1) as steady:
            with Load(endpoint, clients=8) as load:
                load.answered(10)
                deploy(endpoint.bundle, "2", settings, NAME)
                wait(lambda: len(replicas()) == 2 and not replicas().keys() & before.keys())
                wait(lambda: not any(map(psutil.pid_exists, before.values())))
                scaled = replicas()
                load.answered(30)
            wait(lambda: len(replicas()) == 1)
            (ended,) = scaled.keys() - replicas().keys()
            wait(lambda: not psutil.pid_exists(scaled[ended]))
            steady.answered(10)
        assert steady.lost + load.lost == []
    finally:
        deploy(endpoint.bundle, "1", endpoint.settings, NAME)
        wait(lambda: len(replicas()) == 2)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    return {each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}


def test_only_this_machine_is_heard(endpoint: Endpoint) -> None:
    children = psutil.Process().children(recursive=True)
    proxies = [each for each in children if each.name() == "haproxy"]
    assert {ip for each in proxies for ip, _ in listening(each)} == {"127.0.0.1"}
    assert endpoint.settings.port in {port for each in proxies for _, port in listening(each)}
    behind = [each for pid in replicas().values() for each in listening(psutil.Process(pid))]
    assert [ip for ip, port in behind if port in REPLICA_PORTS] == ["127.0.0.1"] * 2


def test_two_of_them_share_nothing(ray_cluster: None) -> None:
    first, second = (haproxy.variables(Deploy()) for _ in range(2))
    script = first.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
    assert os.access(script, os.X_OK)
    own = [name for name in first if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE"))]
    assert len(own) == 8
    assert {first[name] for name in own}.isdisjoint(second[name] for name in own)


def test_rays_proxy_can_be_had(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(haproxy.SWITCH, "0")
    assert haproxy.variables(Deploy()) == {}
