"""Endpoints that ask for keys, over real HTTP: who gets in, how often, how long, and with what; and what keeps nobody
else from being answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import hypothesis
import openai
import psutil
import pytest
import ray
import schemathesis
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from schemathesis.checks import not_a_server_error

from heliostat.hardware import free_port
from heliostat.recipe import Deploy, Refused
from serve import keys
from serve.application import application, deploy
from serve.limits import ACTOR, NAMESPACE, Buckets, Draws, Limits, Rate
from tests import needs
from tests.browser import tab
from tests.bundles import chat_bundle, tabular_bundle
from tests.slow_client import trickle

NAME = "tiny"
TIMEOUT_S, BODY_TIMEOUT_S = 6.0, 2.0
ROW = {"inputs": {"height": 0.5, "width": 3.0}}
LONG = {"model": NAME, "prompt": "sun", "max_tokens": 1000, "ignore_eos": True}
WRONG = "hs-wrong-key-that-nobody-was-given"


@dataclass
class Endpoint:
    """A language model in two replicas, and below `/rows` a classifier in one."""

    url: str
    file: Path
    key: str
    """Of a tenant without a limit."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def add(self, name: str, **limits: float) -> dict[str, str]:
        """Headers with the key of a new tenant, once the replicas know it."""
        headers = {"authorization": f"Bearer {keys.add(self.file, name, **limits)}"}
        self.known()
        return headers

    def known(self) -> None:
        """Once all replicas have read the file again."""
        time.sleep(2.5)

    def replicas(self, application: str) -> list[dict[str, Any]]:
        (deployment,) = _get_global_client().get_serve_details()["applications"][application]["deployments"].values()
        return deployment["replicas"]

    def ongoing(self, path: str = "", replicas: int = 2) -> int:
        """Requests of all replicas together."""
        found: dict[str, int] = {}
        while len(found) < replicas:
            health = httpx.get(f"{self.url}{path}/healthz", timeout=30)
            if health.status_code == 200:
                found[health.headers["x-replica"]] = health.json()["ongoing"]
        return sum(found.values())


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("keys")
    file = folder / "keys.json"
    key = keys.add(file, "free")
    common = {"port": free_port(), "keys_file": str(file), "body_timeout_s": BODY_TIMEOUT_S}
    two = {"min_replicas": 2, "max_replicas": 2, "max_ongoing_requests": 16, "max_queued_requests": 16}
    settings = Deploy(**common, **two, timeout_s=TIMEOUT_S, cache_tokens=8192)
    url = deploy(chat_bundle(folder), "1", settings, NAME)
    rows = Deploy(**common, max_replicas=1, max_inputs=20_000, max_batch_size=4)
    serve.run(application(tabular_bundle(folder), "1", rows), name="rows", route_prefix="/rows")
    yield Endpoint(url, file, key)
    serve.shutdown()


def raw(endpoint: Endpoint, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """A GET of exactly this path."""
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


# -- who gets in


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {WRONG}"},
        {"authorization": f"Basic {WRONG}"},
        {"authorization": "Bearer s\u00fcn"},
        {"x-api-key": WRONG},
        {"x-api-key": ""},
        {"api-key": WRONG},
    ],
)
def test_without_a_valid_key_nothing_is_answered(endpoint: Endpoint, headers: dict[str, str]) -> None:
    for path in (
        "/v1/models", "/v1/completions", "/predict", "/nothing", "/healthz/", "//healthz", "/healthz/../v1/models",
        "/docs/../predict", "/healthz%2f..%2fpredict", "/healthz;/v1/models", "/rows/predict", "/rows/", "/rows//",
        "/rows/healthz/x", "/v1/models?/healthz",
    ):  # fmt: skip
        if path == "/rows/":
            continue  # the page of the other application
        status, sent, body = raw(endpoint, path, {name: value.encode("latin-1") for name, value in headers.items()})
        assert status == 401, path
        assert sent["www-authenticate"].startswith('Bearer realm="heliostat"')
        found = json.loads(body)
        if path.startswith("/v1/"):
            assert found["error"]["code"] == "invalid_api_key"
            assert found["error"]["type"] == "invalid_request_error"
        else:
            assert "API key" in found["detail"]
        assert WRONG not in body.decode()
    posted = httpx.post(f"{endpoint.url}/rows/predict", json=ROW)
    assert posted.status_code == 401


def test_with_a_key_everything_is(endpoint: Endpoint) -> None:
    for headers in (endpoint.headers, {"authorization": f"bearer  {endpoint.key}"}, {"x-api-key": endpoint.key}):
        assert httpx.get(f"{endpoint.url}/v1/models", headers=headers).status_code == 200
        answer = httpx.post(f"{endpoint.url}/rows/predict", headers=headers, json=ROW, timeout=30)
        assert answer.status_code == 200, answer.text
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0)
    assert client.completions.create(model=NAME, prompt="sun", max_tokens=3).choices[0].text is not None
    with pytest.raises(openai.AuthenticationError, match="the API key is not valid"):
        client.with_options(api_key=WRONG).models.list()


@pytest.mark.parametrize("path", ["/", "/healthz", "/docs", "/openapi.json", "/rows/healthz", "/rows/", "/rows/docs"])
def test_pages_and_health_need_no_key(endpoint: Endpoint, path: str) -> None:
    assert httpx.get(f"{endpoint.url}{path}").status_code == 200


def test_a_revoked_key_ends_within_seconds_and_no_other_does(endpoint: Endpoint) -> None:
    headers = endpoint.add("leaving")
    again = endpoint.add("leaving")

    def statuses(headers: dict[str, str]) -> set[int]:
        paths = ["v1/models"] * 8 + ["rows/predict"]
        return {httpx.get(f"{endpoint.url}/{path}", headers=headers).status_code for path in paths}

    assert statuses(headers) == statuses(again) == {200, 405}
    keys.revoke(endpoint.file, "leaving", keys.digest(headers["authorization"].split()[1].encode())[:8])
    endpoint.known()
    assert statuses(headers) == {401}
    assert statuses(again) == statuses(endpoint.headers) == {200, 405}
    keys.revoke(endpoint.file, "leaving")
    endpoint.known()
    assert statuses(again) == {401}


def test_a_broken_file_shuts_nobody_out(endpoint: Endpoint, tmp_path: Path) -> None:
    whole = endpoint.file.read_text()
    endpoint.file.write_text(whole[:-9])
    try:
        endpoint.known()
        for _ in range(8):
            assert httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.headers).status_code == 200
        with pytest.raises(Refused, match=r"deploy\.keys_file"):
            deploy(tabular_bundle(tmp_path), "1", Deploy(keys_file=str(endpoint.file)), "rows")
    finally:
        endpoint.file.write_text(whole)
    assert "go on working" in logs()


def test_an_open_endpoint_beyond_loopback_is_warned_of(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bundle = tabular_bundle(tmp_path)
    for host, file, warned in (("0.0.0.0", "", 1), ("0.0.0.0", str(endpoint.file), 0), ("localhost", "", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "heliostat"), pytest.raises(Refused, match="Serve runs on port"):
            deploy(bundle, "1", Deploy(host=host, keys_file=file, port=free_port()), "rows")
        assert sum("asks for no keys" in record.getMessage() for record in caplog.records) == warned


# -- how often


@pytest.mark.parametrize(("per_minute", "burst"), [(60.0, 10), (1800.0, 5)])
def test_a_limit_holds_over_all_replicas(endpoint: Endpoint, per_minute: float, burst: int) -> None:
    """1800 a minute: replicas draw three at once."""
    headers = endpoint.add(f"limited-{per_minute:g}", requests_per_minute=per_minute, burst=burst)
    over = time.monotonic() + 4

    def ask(_: int) -> list[httpx.Response]:
        found = []
        with httpx.Client(timeout=30) as client:
            while time.monotonic() < over:
                found.append(client.get(f"{endpoint.url}/v1/models", headers=headers))
        return found

    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(ask, range(8)) for answer in found]
    seconds = time.monotonic() - begun
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    ahead = 2 * int(per_minute / 600)
    assert burst <= statuses[200] <= burst + ahead + seconds * per_minute / 60
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused)
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.headers).status_code == 200  # another tenant
    time.sleep(1.2)
    assert httpx.get(f"{endpoint.url}/v1/models", headers=headers).status_code == 200


def test_one_bucket_serves_all_endpoints_of_a_file(endpoint: Endpoint) -> None:
    headers = endpoint.add("both", requests_per_minute=1, burst=4)
    urls = [f"{endpoint.url}/v1/models", f"{endpoint.url}/rows/predict"] * 3
    answers = [httpx.get(url, headers=headers) for url in urls]
    assert [answer.status_code for answer in answers] == [200, 405, 200, 405, 429, 429]
    assert "limit of requests" in answers[5].json()["detail"]
    assert 50 < int(answers[5].headers["retry-after"]) <= 60


def test_draws_of_many_replicas_are_no_more_than_the_limit(ray_cluster: None) -> None:
    limits = Limits(Rate(50.0, 20), None)

    async def replica(seconds: float) -> int:
        draws, admitted = Draws("tests"), 0
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            wait_s = await draws.take("sun", limits)
            admitted += not wait_s
            await asyncio.sleep(min(wait_s, 0.02))
        return admitted

    async def all_of(replicas: int, seconds: float) -> int:
        await Draws("tests").stay()
        return sum(await asyncio.gather(*(replica(seconds) for _ in range(replicas))))

    begun = time.monotonic()
    admitted = asyncio.run(all_of(8, 3.0))
    assert 20 + 50 * 2 < admitted <= 20 + 50 * (time.monotonic() - begun)


def test_an_actor_that_died_is_replaced(ray_cluster: None) -> None:
    async def ask() -> list[float]:
        draws, limits = Draws("tests"), Limits(Rate(0.01, 2), None)
        first = [await draws.take("salt", limits) for _ in range(3)]
        ray.kill(ray.get_actor(ACTOR, NAMESPACE))
        return [*first, await Draws("tests").take("salt", limits)]

    one, two, three, after = asyncio.run(ask())
    assert (one, two, after) == (0.0, 0.0, 0.0)
    assert three == pytest.approx(100, rel=0.2)


def test_the_actor_ends_when_nobody_asks(ray_cluster: None) -> None:
    actor = ray.remote(Buckets).remote(idle_s=1.0)
    assert ray.get(actor.take.remote("sun", Limits(Rate(1.0, 3), None), 3)) == (3, 0.0)
    begun = time.monotonic()

    def ended() -> bool:
        try:
            ray.get(actor.__ray_ready__.remote())  # which asks for nothing
        except RayActorError:
            return True
        return False

    until(ended)
    assert time.monotonic() - begun > 2  # its bucket was full after 3 s


def test_tokens_are_charged_when_an_answer_ends(endpoint: Endpoint) -> None:
    headers = endpoint.add("reader", tokens_per_minute=1200)  # 20 a second

    def ask(stream: bool) -> httpx.Response:
        body = {**LONG, "max_tokens": 100, "n": 7, "stream": stream}
        return httpx.post(f"{endpoint.url}/v1/completions", headers=headers, json=body, timeout=30)

    answers = [ask(stream) for stream in (False, True)]
    assert [answer.status_code for answer in answers] == [200, 200]
    time.sleep(0.5)
    late = ask(False)  # 1400 and more of the 1200 are used
    assert late.status_code == 429
    assert 1 <= int(late.headers["retry-after"]) <= 12
    time.sleep(int(late.headers["retry-after"]) + 0.5)
    assert ask(False).status_code == 200


# -- how long, and with how much


@pytest.mark.parametrize(
    ("path", "says"),
    [("/v1/completions", '"error":{"message":"body: not here after 2 s'), ("/rows/predict", '"detail":"body')],
)
def test_who_sends_byte_by_byte_is_not_waited_for(endpoint: Endpoint, path: str, says: str) -> None:
    found, seconds = trickle(endpoint.url, path, endpoint.headers)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert says in found.decode()
    assert BODY_TIMEOUT_S <= seconds < BODY_TIMEOUT_S + 5
    found, seconds = trickle(endpoint.url, path, {})  # a stranger's body is not read at all
    assert found.startswith(b"HTTP/1.1 401 ")
    assert seconds < BODY_TIMEOUT_S


def test_a_deadline_ends_the_work(endpoint: Endpoint) -> None:
    begun = time.monotonic()
    late = httpx.post(f"{endpoint.url}/v1/completions", headers=endpoint.headers, json={**LONG, "n": 100}, timeout=60)
    assert late.status_code == 504, late.text
    assert late.json()["error"] == {
        "message": "not answered within 6 s", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip
    body = {**LONG, "n": 100, "stream": True}
    with httpx.stream(
        "POST", f"{endpoint.url}/v1/completions", headers=endpoint.headers, json=body, timeout=60
    ) as late:
        lines = [line for line in late.iter_lines() if line]
    assert late.status_code == 200
    assert len(lines) > 10
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "not answered within 6 s"
    assert lines[-1] == "data: [DONE]"
    assert 2 * TIMEOUT_S <= time.monotonic() - begun < 2 * TIMEOUT_S + 15
    until(lambda: endpoint.ongoing() == 0, 10)


def test_a_client_may_set_a_shorter_one(endpoint: Endpoint) -> None:
    headers = {**endpoint.headers, "x-request-timeout-seconds": "1"}
    begun = time.monotonic()
    late = httpx.post(f"{endpoint.url}/v1/completions", headers=headers, json={**LONG, "n": 100}, timeout=60)
    assert (late.status_code, time.monotonic() - begun < TIMEOUT_S) == (408, True)
    until(lambda: endpoint.ongoing() == 0, 10)


def test_a_classifier_stops_when_its_client_leaves(endpoint: Endpoint) -> None:
    """20000 inputs take long; the replica computes no more soon after nobody waits for them."""
    (replica,) = endpoint.replicas("rows")
    process = psutil.Process(replica["pid"])

    def busy(seconds: float) -> float:
        """Processors that it uses."""
        before = process.cpu_times()
        time.sleep(seconds)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / seconds

    body = {"inputs": [ROW["inputs"]] * 20_000}
    left: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(f"{endpoint.url}/rows/predict", headers=endpoint.headers, json=body, timeout=4)
        except httpx.ReadTimeout as error:
            left.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: endpoint.ongoing("/rows", 1) == 1)
    working = busy(1.5)
    asking.join()
    assert left  # it was not answered before
    until(lambda: endpoint.ongoing("/rows", 1) == 0, 5)
    until(lambda: busy(1) < working / 3, 5)


def test_full_queues_say_when_to_come_again(endpoint: Endpoint) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, headers=endpoint.headers) as client:
            asked = [client.post(f"{endpoint.url}/v1/completions", json=LONG) for _ in range(80)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    full = [answer for answer in answers if answer.status_code == 503]
    assert full
    assert {answer.headers["retry-after"] for answer in full} == {"1"}
    assert {answer.status_code for answer in answers} <= {200, 503, 504}
    until(lambda: endpoint.ongoing() == 0, 20)


# -- whatever is asked


@pytest.mark.parametrize("path", ["", "/rows"])
def test_no_request_makes_an_endpoint_fail(endpoint: Endpoint, path: str) -> None:
    """What schemathesis makes of the description, valid and not."""
    described = httpx.get(f"{endpoint.url}{path}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described)
    asked: Counter[int] = Counter()
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/predict", "/healthz"}
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @hypothesis.settings(max_examples=25, database=None, derandomize=True,
                                 suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and "model" in case.body:
                    # So that requests get further than the name, and are soon done.
                    case.body = {**case.body, "model": NAME, "max_tokens": 2, "n": None}
                answer = case.call(base_url=f"{endpoint.url}{path}", headers=endpoint.headers)
                asked[answer.status_code] += 1
                case.validate_response(answer, checks=[not_a_server_error])

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # what takes nothing cannot be asked wrongly
                ask()
    assert asked[200]
    assert sum(asked[status] for status in (400, 422)), asked
    assert not [status for status in asked if status >= 500]


def nested(depth: int, name: str = "items", inner: str = "{}") -> str:
    return f'{{"{name}": ' * depth + inner + "}" * depth


SCHEMA = nested(1, "schema", nested(400))
CHAT = f'"model": "{NAME}", "max_tokens": 2, "messages": [{{"role": "user", "content": "sun"}}]'


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[" * 100_000, b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"inputs": {"height": NaN}}',
        b'{"inputs": {"height": 1e999, "width": -1e999}}', b'{"inputs": {"height": ' + b"9" * 5000 + b', "width": 1}}',
        b'{"inputs": {"height": ' + b"9" * 400 + b', "width": 1}}', b'\xff\xfe{"inputs": []}', b'{"inputs": "\\ud800"}',
        b'\xef\xbb\xbf{"inputs": {}}', b'{"inputs": {"\\u0000": "\\u0000"}}', b'{"inputs": [[], {}, null]}',
        f'{{{CHAT}, "response_format": {nested(900)}}}'.encode(),
        f'{{{CHAT}, "response_format": {{"type": "json_schema", "json_schema": {SCHEMA}}}}}'.encode(),
        f'{{{CHAT}, "chat_template_kwargs": {nested(900)}}}'.encode(),
        f'{{{CHAT}, "seed": {"9" * 400}}}'.encode(), f'{{{CHAT}, "max_tokens": {"9" * 400}}}'.encode(),
        f'{{{CHAT}, "logit_bias": {{"{"9" * 400}": 1}}}}'.encode(), f'{{{CHAT}, "stop": ["\\ud800"]}}'.encode(),
        f'{{"model": "{NAME}", "max_tokens": 2, "prompt": [{"9" * 40}]}}'.encode(),
        f'{{"model": "{NAME}", "max_tokens": 2, "prompt": "\\ud800\\u0000"}}'.encode(),
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)  # fmt: skip
def test_no_body_makes_an_endpoint_fail(endpoint: Endpoint, body: bytes) -> None:
    headers = {**endpoint.headers, "content-type": "application/json"}
    for path in ("/rows/predict", "/predict", "/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(f"{endpoint.url}{path}", headers=headers, content=body, timeout=30)
        assert answer.status_code in (200, 400, 422), (path, answer.text)


@needs.chromium
def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(endpoint: Endpoint, tmp_path: Path) -> None:
    with tab(endpoint.url, tmp_path) as page:
        assert page.run("document.getElementById('asks').hidden")
        page.run("document.getElementById('text').focus()")
        page.type("sun")
        page.press_enter()
        page.wait("document.querySelector('.problem')?.textContent.startsWith('no API key')")
        assert not page.run("document.getElementById('asks').hidden")
        page.run("document.getElementById('key').focus()")
        page.type(endpoint.key)
        page.run("document.getElementById('text').focus()")
        page.type("sun")
        page.press_enter()
        page.wait("document.getElementById('notes').textContent.includes('replica')")
        assert page.run("document.getElementById('answers').innerText.split('API key').length") == 2
        page.run("window.before = true")  # until another document has taken this one's place
        page.run("location.reload()")
        page.wait("!window.before && document.getElementById('key')?.value")
        assert page.run("document.getElementById('key').value") == endpoint.key
        assert page.run("Object.keys(localStorage).length + document.cookie.length") == 0


def logs() -> str:
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any("replica" in file.name for file in files)
    return "".join(file.read_text(errors="replace") for file in files)


def test_no_key_is_written_to_a_log(endpoint: Endpoint) -> None:
    """Last: after all the refusals, failures and warnings before it."""
    text = logs()
    assert "/v1/models" in text  # requests are
    for key in (endpoint.key, WRONG):
        assert key not in text
        assert keys.digest(key.encode()) not in text
