"""What serving costs around a model: one tiny BERT behind `/predict`, on each of

    heliostat   serve/classifier.py on Ray Serve, one replica
    unbatched   the same with `deploy.max_batch_size=1` and `deploy.batch_wait_s=0`
    serve       a bare Ray Serve deployment: the predictor called in the handler, no batching, no limits
    uvicorn     the same bare application in a process of its own: no Ray at all

and then what it costs without one, by a route that does nothing:

    trivial     `/healthz` of that application, which asks for keys
    bare        the same of a bare Ray Serve deployment

Requests a second, latency, and CPU time of a request in the processes that it passes (proxy and replica, or uvicorn),
in interleaved blocks (A B C D D C B A …), with one keep-alive client process for all. Each request to a model holds one
text. All on Ray Serve have the same proxy, which each line names: HAProxy, or with RAY_SERVE_ENABLE_HA_PROXY=0 Ray's
own. Prints medians, and ratios paired by round, one line for each number of connections. Client and servers share the
machine's cores: read rates and latencies only beside each other.

    python -m bench.serve_overhead [--seconds 5] [--rounds 3]
"""

# Annotations are not postponed: FastAPI reads those of a handler that is made in a function.
import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import uvicorn
from fastapi import FastAPI
from ray import serve

import heliostat.launch.cluster as cluster
from heliostat.data.prepare import prepare
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, build
from heliostat.train.loop import train
from serve import keys
from serve.application import Answer, Health, Question, deploy
from serve.classifier import application

HOST = "127.0.0.1"
CONNECTIONS = (1, 16)
TEXT = "the mirrors of the field follow the sun and send its heat to the tower"


@dataclass
class Way:
    name: str
    port: int
    path: str
    processes: list[psutil.Process]
    asks: bool = True
    """The model, and not only for the path."""

    def cpu_seconds(self) -> float:
        times = [each.cpu_times() for each in self.processes]
        return sum(each.user + each.system for each in times)


def tiny_bundle(folder: Path) -> Path:
    """A BERT of two blocks, trained for two steps."""
    rows = folder / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{TEXT} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(32)))
    recipe = build(
        {
            "name": "bench-serve",
            "task": "text_classification",
            "storage": str(folder / "storage"),
            "model": {
                "tokenizer": "train:300",
                "config": {
                    "model_type": "bert",
                    "vocab_size": 300,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 64,
                },
                "max_length": 48,
            },
            "data": {"train": str(rows)},
            "schedule": {"max_steps": 2},
            "training": {"global_batch_size": 8, "micro_batch_size": 8},
        }
    )
    return Path(train(recipe, prepare(recipe)[0].folder, folder / "run")["bundle"])


def bare_answer(predictor: Predictor, question: Question) -> Answer:
    inputs = question.inputs if isinstance(question.inputs, list) else [question.inputs]
    return Answer(predictions=predictor.predict(inputs), bundle=predictor.bundle.digest[:12], version="1")


def bare_health(predictor: Predictor) -> Health:
    return Health(status="ok", bundle=predictor.bundle.digest[:12], version="1", precision="float32", ongoing=0)


def bare_api(bundle_path: Path) -> FastAPI:
    """The least that answers as the classifier does."""
    api = FastAPI()
    predictor = Predictor(bundles.read(bundle_path), threads=1)

    @api.post("/predict")
    async def predict(question: Question) -> Answer:
        return bare_answer(predictor, question)

    @api.get("/healthz")
    async def healthz() -> Health:
        return bare_health(predictor)

    return api


def run_uvicorn(bundle_path: Path, port: int) -> None:
    torch.set_num_threads(1)
    uvicorn.run(bare_api(bundle_path), host=HOST, port=port, log_level="warning")


def bare_serve(bundle_path: Path, settings: Deploy) -> serve.Application:
    """The same, as Ray's documentation writes a deployment with FastAPI."""
    api = FastAPI()

    @serve.deployment(
        max_ongoing_requests=settings.max_ongoing_requests, ray_actor_options={"num_cpus": settings.cpus_per_replica}
    )
    @serve.ingress(api)
    class Bare:
        def __init__(self) -> None:
            self.predictor = Predictor(bundles.read(bundle_path), threads=1)

        @api.post("/predict")
        async def predict(self, question: Question) -> Answer:
            return bare_answer(self.predictor, question)

        @api.get("/healthz")
        async def healthz(self) -> Health:
            return bare_health(self.predictor)

    return Bare.bind()  # type: ignore[attr-defined]  # the decorators' doing


def processes(*titles: str) -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if " ".join(each.cmdline()).startswith(titles)]


def haproxies() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name() == "haproxy"]


def serve_processes(application: str) -> list[psutil.Process]:
    """Beside HAProxy are its manager, and Ray's proxy for endpoints without a replica."""
    replicas = processes(f"ray::ServeReplica:{application}:")
    assert len(replicas) == 1, replicas
    return [*haproxies(), *processes("ray::HAProxyManager", "ray::ProxyActor"), *replicas]


@contextmanager
def endpoints(bundle_path: Path) -> Iterator[list[Way]]:
    """Each way to serve the bundle, all of them up."""
    settings = Deploy(port=free_port(), max_replicas=1)  # a second replica would only contend for the cores
    keys_file = bundle_path.parent / "keys.json"
    keys.add(keys_file, "bench")
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=run_uvicorn, args=(bundle_path, port), daemon=True)
    process.start()
    # Its CPUs are slots, not processors.
    environment = cluster.environment() | {"OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        deploy(bundle_path, "1", settings, "heliostat")
        gated = settings.model_copy(update={"keys_file": str(keys_file)})
        serve.run(application(bundle_path, "1", gated), name="gated", route_prefix="/gated")
        unbatched = settings.model_copy(update={"max_batch_size": 1, "batch_wait_s": 0.0})
        serve.run(application(bundle_path, "1", unbatched), name="unbatched", route_prefix="/unbatched")
        serve.run(bare_serve(bundle_path, settings), name="serve", route_prefix="/serve")
        while len(haproxies()) > 1:  # one with the routes of before is to end
            time.sleep(0.1)
        yield [
            Way("heliostat", settings.port, "/predict", serve_processes("heliostat")),
            Way("unbatched", settings.port, "/unbatched/predict", serve_processes("unbatched")),
            Way("serve", settings.port, "/serve/predict", serve_processes("serve")),
            Way("uvicorn", port, "/predict", [psutil.Process(process.pid)]),
            Way("trivial", settings.port, "/gated/healthz", serve_processes("gated"), asks=False),
            Way("bare", settings.port, "/serve/healthz", serve_processes("serve"), asks=False),
        ]
    finally:
        ray.shutdown()
        process.terminate()
        process.join()


def request(path: str, asks: bool) -> bytes:
    if not asks:
        return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    body = json.dumps({"inputs": [{"text": TEXT}]})
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


async def ask(port: int, path: str, asks: bool, until: float, seconds: list[float]) -> None:
    """One connection: the same question again and again. Plain streams: an HTTP library would take more of the cores
    than the server."""
    question = request(path, asks)
    reader, writer = await asyncio.open_connection(HOST, port)
    while (started := time.perf_counter()) < until:
        writer.write(question)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not answer.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{path} on port {port}: {answer.decode()}")
        await reader.readexactly(int(answer.split(b"content-length:")[1].split(b"\r\n")[0]))
        seconds.append(time.perf_counter() - started)
    writer.close()


def load(port: int, path: str, asks: bool, connections: int, duration: float) -> list[float]:
    """In the client's process: the seconds that each request took, for `duration` seconds."""
    seconds: list[float] = []
    until = time.perf_counter() + duration

    async def all_of_them() -> None:
        async with asyncio.timeout(duration + 30), asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(ask(port, path, asks, until, seconds))

    asyncio.run(all_of_them())
    return seconds


def block(client: ProcessPoolExecutor, way: Way, connections: int, duration: float) -> dict[str, float]:
    before = way.cpu_seconds()
    seconds = client.submit(load, way.port, way.path, way.asks, connections, duration).result()
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "requests_per_s": len(seconds) / duration,
        "p50_ms": 1000 * percentiles[49],
        "p99_ms": 1000 * percentiles[98],
        "cpu_ms": 1000 * (way.cpu_seconds() - before) / len(seconds),
    }


def measure(
    client: ProcessPoolExecutor, ways: list[Way], connections: int, rounds: int, duration: float
) -> dict[str, Any]:
    """`ways`: the first is compared with the others."""
    for way in ways:
        block(client, way, connections, 2.0)  # warm-up
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 else reversed(ways):  # none always comes after the same
            found[way.name].append(block(client, way, connections, duration))
    ours = found.pop(ways[0].name)
    return {
        "proxy": "HAProxy" if haproxies() else "Ray",
        "connections": connections,
        "rounds": rounds,
        "seconds": duration,
        "medians": {
            name: {key: round(statistics.median(each[key] for each in rows), 2) for key in rows[0]}
            for name, rows in [(ways[0].name, ours), *found.items()]
        },
    } | {
        f"over_{other}": {key: spread([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]) for key in ours[0]}
        for other, theirs in found.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of one block")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        endpoints(tiny_bundle(Path(folder))) as ways,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
    ):
        for asks, connections in itertools.product((True, False), CONNECTIONS):
            compared = [way for way in ways if way.asks == asks]
            line = measure(client, compared, connections, options.rounds, options.seconds)
            print(json.dumps(line), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
