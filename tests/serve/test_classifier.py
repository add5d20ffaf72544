"""The deployment over real HTTP: answers, refusals, limits, and a swap under load."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Refused
from heliostat.train.loop import train
from serve.application import deploy
from serve.classifier import application, build
from tests import needs, recipes
from tests.browser import tab
from tests.bundles import image_bundle, tabular_bundle

TEXTS = ["sun salt mirror", "cloud", "noon shade steam cloud storage " * 7, "heat field ray", "Ünïcödé"]
INPUTS = [{"text": text} for text in TEXTS]
REPORTS_S = 11.0
"""Ray's processes report every 10 s."""


def trained(folder: Path, **overrides: object) -> Path:
    recipe = recipes.tiny_bert(folder, **overrides)
    return Path(train(recipe, recipes.prepared(recipe).folder, folder / f"run-{recipe.seed}")["bundle"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("serve")
    return [trained(folder, **{"seed": seed, "schedule.max_steps": 4}) for seed in (0, 1)]


@dataclass
class Endpoint:
    url: str
    settings: Deploy

    def post(self, body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", json=body, timeout=30)

    def send(self, content: str | Iterator[bytes]) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.url}/predict", content=content, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, paths: list[Path]) -> Iterator[Endpoint]:
    from ray import serve

    port = free_port()
    settings = Deploy(port=port, max_inputs=8, max_body_bytes=20_000, max_replicas=1)
    yield Endpoint(deploy(paths[0], "1", settings, "tiny"), settings)
    serve.shutdown()


def same(found: list[dict], expected: list[dict]) -> None:
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_predictor_keeps_the_order_of_inputs(paths: list[Path]) -> None:
    predictor = Predictor(bundles.read(paths[0]), threads=1)
    same(predictor.predict(INPUTS), [predictor.predict([item])[0] for item in INPUTS])
    assert predictor.predict([]) == []
    with pytest.raises(Refused, match=r"inputs\.1"):
        predictor.predict([{"text": "sun"}, {"text": ""}])
    with pytest.raises(Refused, match="Unicode"):
        predictor.predict([{"text": "\ud800"}])


def test_predictor_answers_one_to_one_for_packed_language_models(tmp_path: Path) -> None:
    recipe = recipes.tiny_llama(tmp_path, **{"data.pack": True, "schedule.max_steps": 1})
    path = Path(train(recipe, recipes.prepared(recipe).folder, tmp_path / "run")["bundle"])
    predictor = Predictor(bundles.read(path))
    together = predictor.predict(INPUTS)
    assert len(together) == len(INPUTS)
    for one, item in zip(together, INPUTS, strict=True):
        assert one["perplexity"] == pytest.approx(predictor.predict([item])[0]["perplexity"], rel=1e-4)


def test_predictor_refuses_a_changed_bundle(tmp_path: Path, paths: list[Path]) -> None:
    bundle = bundles.read(paths[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="missing"):
        Predictor(bundles.Bundle(tmp_path / "empty", bundle.card))


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS[:1], INPUTS[0]], ids=["many", "one", "single object"])
def test_answers_are_the_predictors(endpoint: Endpoint, paths: list[Path], inputs: object) -> None:
    answer = endpoint.post({"inputs": inputs})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    bundle = bundles.read(paths[0])
    same(body["predictions"], Predictor(bundle).predict(inputs if isinstance(inputs, list) else [inputs]))
    assert (body["bundle"], body["version"]) == (bundle.digest[:12], "1")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": [{"text": "sun"}, {"words": "sun"}]}, "inputs.1: each input is"),
        ({"inputs": {"text": 3}}, "inputs.0: each input is"),
        ({"inputs": [{"text": "\ud800"}]}, "Unicode"),
        ({"inputs": []}, "inputs: one input"),
        ({"inputs": "sun"}, "inputs: one input"),
        ({"text": "sun"}, "inputs: Field required"),
        ([1], "body: "),
    ],
)
def test_wrong_shapes_are_refused_with_the_reason(endpoint: Endpoint, body: object, reason: str) -> None:
    answer = endpoint.send(json.dumps(body))  # ASCII: half a surrogate pair travels as an escape
    assert answer.status_code == 422, answer.text
    assert reason in answer.json()["detail"]


def test_broken_json_is_refused(endpoint: Endpoint) -> None:
    answer = endpoint.send("{")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("body: JSON")


def test_a_bad_request_does_not_touch_its_neighbours(endpoint: Endpoint) -> None:
    def ask(body: object, into: list[int]) -> None:
        into.append(endpoint.post(body).status_code)

    good: list[int] = []
    bad: list[int] = []
    threads = [
        threading.Thread(target=ask, args=pair)
        for _ in range(8)
        for pair in (({"inputs": INPUTS}, good), ({"inputs": [{"text": ""}]}, bad))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (good, bad) == ([200] * 8, [422] * 8)


def test_limits(endpoint: Endpoint) -> None:
    many = endpoint.post({"inputs": INPUTS[:1] * 9})
    assert many.status_code == 413
    assert many.json()["detail"] == "inputs: 9 are more than the 8 of one request"
    for content in (json.dumps({"inputs": {"text": "x" * 30_000}}), iter([b'{"inputs": "', b"x" * 30_000])):
        large = endpoint.send(content)
        assert large.status_code == 413, large.text
        assert "20000 bytes" in large.json()["detail"]


def test_health_and_description(endpoint: Endpoint, paths: list[Path]) -> None:
    health = httpx.get(f"{endpoint.url}/healthz").json()
    digest = bundles.read(paths[0]).digest[:12]
    assert health == {"status": "ok", "bundle": digest, "version": "1", "precision": "float32", "ongoing": 0}
    described = httpx.get(f"{endpoint.url}/openapi.json").json()
    post = described["paths"]["/predict"]["post"]
    assert set(post["responses"]) == {"200", "413", "422"}
    assert [each["name"] for each in post.get("parameters", [])] == []
    schema = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    assert set(described["components"]["schemas"][schema]["properties"]) == {"inputs"}
    assert httpx.get(f"{endpoint.url}/docs").status_code == 200


def replicas() -> set[str]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"]["tiny"]["deployments"]["classifier"]
    return {replica["actor_id"] for replica in details["replicas"]}


@pytest.mark.parametrize("restart", [False, True], ids=["same settings", "other settings"])
def test_a_swap_fails_no_request(endpoint: Endpoint, paths: list[Path], restart: bool) -> None:
    """With the same settings in the same replica; with others in new ones, which start before the old stop."""
    before, after = ("2", "1") if restart else ("1", "2")
    path = dict(zip("12", paths, strict=True))
    settings = endpoint.settings.model_copy(update={"max_inputs": 7 if restart else 8})
    answers: list[httpx.Response | Exception] = []
    over = threading.Event()
    running = replicas()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not over.is_set():
                try:
                    answers.append(client.post(f"{endpoint.url}/predict", json={"inputs": INPUTS}))
                except httpx.HTTPError as error:
                    answers.append(error)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        time.sleep(0.5)
        deploy(path[after], after, settings, "tiny")
        time.sleep(0.5)
    finally:
        over.set()
        for asker in askers:
            asker.join()
    assert all(isinstance(each, httpx.Response) and each.status_code == 200 for each in answers), answers
    assert (replicas() & running == set()) == restart
    expected = {}
    for version in path:
        bundle = bundles.read(path[version])
        expected[version] = (bundle.digest[:12], Predictor(bundle).predict(INPUTS))
    for answer in answers:
        body = answer.json()
        digest, predictions = expected[body["version"]]
        assert body["bundle"] == digest
        same(body["predictions"], predictions)  # never half of one bundle and half of the other
    assert answers[0].json()["version"] == before
    last = endpoint.post({"inputs": INPUTS}).json()
    assert (last["bundle"], last["version"]) == (expected[after][0], after)


def test_what_prometheus_gets(endpoint: Endpoint) -> None:
    """Requests by outcome, their time, and batches, as the node's exporter tells them."""
    before = served()
    while (later := settled()) != before:
        before = later
    for inputs in ([{"text": "sun"}], [{"text": "sun"}] * 3, [{"text": ""}]):
        endpoint.post({"inputs": inputs})
    deadline = time.monotonic() + 60
    while (now := served()) == before and time.monotonic() < deadline:
        time.sleep(0.5)
    now = settled()
    grown = {name: value - before.get(name, 0.0) for name, value in now.items() if value != before.get(name, 0.0)}
    assert grown == {"requests answered": 2, "requests refused": 1, "latencies": 2, "batches": 2}


@needs.chromium
def test_a_page_to_try_texts_on(endpoint: Endpoint, tmp_path: Path) -> None:
    with tab(endpoint.url, tmp_path) as page:
        page.run("document.getElementById('text').focus()")
        page.type(TEXTS[0])
        page.press_enter()
        page.wait("document.getElementById('notes').textContent")
        shown = page.run("document.body.innerText")
        assert page.problems == []
    found = endpoint.post({"inputs": {"text": TEXTS[0]}}).json()
    (prediction,) = found["predictions"]
    best, other = sorted(prediction["scores"].items(), key=lambda pair: -pair[1])
    assert best[0] == prediction["label"]
    assert re.search(rf"{best[0]}\s+{best[0]}\s+{best[1]:.3f}\s+{other[0]}\s+{other[1]:.3f}", shown), shown
    assert re.search(rf"[\d.]+ s · version {found['version']} · replica \w+", shown)


@needs.chromium
def test_a_page_to_drop_images_on(endpoint: Endpoint, paths: list[Path], tmp_path: Path) -> None:
    """The bundle of another task is swapped in as any other."""
    bundle = bundles.read(image_bundle(tmp_path))
    deploy(bundle.path, "images", endpoint.settings, "tiny")
    image = bundle.task().example()["image"]
    drop = f"""(async () => {{
        const bytes = Uint8Array.from(atob("{image}"), each => each.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "image.png", {{type: "image/png"}}));
        document.dispatchEvent(new DragEvent("drop", {{dataTransfer: data}}));
    }})()"""
    with tab(endpoint.url, tmp_path / "browser") as page:
        page.run(drop)
        page.wait("document.querySelector('#shown img')?.naturalWidth === 8")
        page.run("document.querySelector('button').click()")
        page.wait("document.getElementById('notes').textContent")
        shown = page.run("document.body.innerText")
        assert page.problems == []
    deploy(paths[0], "texts", endpoint.settings, "tiny")
    (prediction,) = Predictor(bundle).predict([{"image": image}])
    assert f"{prediction['label']}\t" in shown
    assert "version images · replica" in shown


def test_images_come_in_forms(endpoint: Endpoint, paths: list[Path], tmp_path: Path) -> None:
    """As in JSON, in the order of the form's parts."""
    bundle = bundles.read(image_bundle(tmp_path))
    deploy(bundle.path, "images", endpoint.settings, "tiny")
    dark, bright = (image_file(shade) for shade in (10, 240))

    def post(*files: tuple[str, bytes], **options: Any) -> httpx.Response:
        parts = [(name, (f"{name}.png", content, "image/png")) for name, content in files]
        return httpx.post(f"{endpoint.url}/predict", files=parts or None, timeout=60, **options)

    try:
        answer = post(("image", dark), ("image", bright), ("image", dark))
        assert answer.status_code == 200, answer.text
        inputs = [{"image": base64.b64encode(content).decode()} for content in (dark, bright, dark)]
        same(answer.json()["predictions"], Predictor(bundle).predict(inputs))
        assert answer.json()["predictions"] == endpoint.post({"inputs": inputs}).json()["predictions"]
        assert answer.json()["predictions"][0] != answer.json()["predictions"][1]

        for refused, status, reason in [
            (post(("image", dark), ("image", b"no image")), 422, "inputs.1: not an image"),
            (post(("picture", dark)), 422, "inputs.0: each input is"),
            (post(("image", bytes(endpoint.settings.max_body_bytes))), 413, "body: more than"),
            (post(*[("image", dark)] * (endpoint.settings.max_inputs + 1)), 400, "Too many files"),
            (post(content=b"--", headers={"content-type": "multipart/form-data"}), 400, "Missing boundary"),
            (post(content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}), 422, "body: "),
        ]:
            assert refused.status_code == status, refused.text
            assert refused.json()["detail"].startswith(reason)
    finally:
        deploy(paths[0], "texts", endpoint.settings, "tiny")
    text = httpx.post(f"{endpoint.url}/predict", files={"text": (None, TEXTS[0])}, timeout=60).json()
    same(text["predictions"], endpoint.post({"inputs": {"text": TEXTS[0]}}).json()["predictions"])
    described = httpx.get(f"{endpoint.url}/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(described) == {"application/json", "multipart/form-data"}


def image_file(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


@needs.chromium
def test_a_page_to_try_a_row_of_numbers_on(endpoint: Endpoint, paths: list[Path], tmp_path: Path) -> None:
    bundle = bundles.read(tabular_bundle(tmp_path))
    deploy(bundle.path, "rows", endpoint.settings, "tiny")
    with tab(endpoint.url, tmp_path / "browser") as page:
        page.run("document.getElementById('text').focus()")
        page.run("document.getElementById('text').value = document.getElementById('text').value.replace('0.5', '')")
        page.press_enter()
        page.wait("document.querySelector('.problem')?.textContent.startsWith('not JSON')")
        page.run("document.getElementById('text').value = JSON.stringify({...SETTINGS.example, width: 7.5})")
        page.press_enter()
        page.wait("document.getElementById('notes').textContent")
        shown = page.run("document.body.innerText")
        assert page.problems == []
    deploy(paths[0], "texts", endpoint.settings, "tiny")
    (prediction,) = Predictor(bundle).predict([{"height": 0.5, "width": 7.5}])
    assert re.search(rf"{prediction['label']}\s+{prediction['score']:.3f}", shown), shown
    assert "version rows · replica" in shown


def test_another_port_than_serves_is_refused(endpoint: Endpoint, paths: list[Path]) -> None:
    other = endpoint.settings.model_copy(update={"port": endpoint.settings.port - 1})
    with pytest.raises(Refused, match=r"deploy\.port: Serve runs on port"):
        deploy(paths[0], "1", other, "tiny")


def test_gpus_that_the_cluster_lacks_are_refused(endpoint: Endpoint, paths: list[Path]) -> None:
    with pytest.raises(
        Refused, match=r"deploy\.gpus_per_replica: a replica asks for 0\.5 of a GPU, the cluster has none"
    ):
        deploy(paths[0], "1", Deploy(gpus_per_replica=0.5), "classifier")


def test_a_taken_port_is_refused(ray_cluster: None, paths: list[Path]) -> None:
    """Last: Serve must not be running, or its own port would be the question."""
    from ray import serve

    serve.shutdown()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=rf"deploy\.port: 127\.0\.0\.1:{port} cannot be used"):
            deploy(paths[0], "1", Deploy(port=port), "tiny")


def test_build_takes_a_bundle_and_a_version(paths: list[Path]) -> None:
    assert build({"bundle": str(paths[0]), "version": 3})
    with pytest.raises(Refused, match=r"args\.bundel.*did you mean bundle"):
        build({"bundel": str(paths[0])})
    with pytest.raises(Refused, match=r"args\.bundle"):
        build({})


def test_a_broken_bundle_is_refused_before_the_cluster_sees_it(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not a bundle"):
        application(tmp_path, "1", Deploy())


def test_the_yaml_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "classifier.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications[0].import_path == "serve.classifier:build"


def settled() -> dict[str, float]:
    """After the next report."""
    time.sleep(REPORTS_S)
    return served()


def served() -> dict[str, float]:
    """What the node's exporter has of endpoints, summed over replicas."""
    import ray

    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = {
                "ray_heliostat_serve_requests_total": f"requests {sample.labels.get('outcome')}",
                "ray_heliostat_serve_latency_s_count": "latencies",
                "ray_heliostat_serve_batch_size_count": "batches",
            }.get(sample.name)
            if name:
                sums[name] = sums.get(name, 0.0) + sample.value
    return sums
