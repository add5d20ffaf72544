"""An endpoint under load: one tiny BERT behind `/predict`.

    step      a client asks with one connection, then with 32, of one replica that may become three: seconds until the
              second and the third answer, and what requests took before, meanwhile and after
    batching  16 connections ask one replica that computes requests together and one that does not
              (`deploy.max_batch_size=1`), in interleaved blocks (A B A B …): medians, and ratios paired by round
    wake      one request is sent to an endpoint that has given all of its replicas back (`deploy.min_replicas=0`):
              seconds until it is answered
    soak      eight connections ask two replicas for a while, of which one is killed every minute (SIGKILL): requests
              that failed, seconds until two answer again, and how the memory of controller and proxy grows

Clients and servers share the machine's cores. Prints a line of JSON for each.

    python -m bench.serve_load [--only wake soak] [--minutes 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import torch
from ray import serve
from ray.serve._private.common import ReplicaState

import heliostat.launch.cluster as cluster
from bench.serve_overhead import TEXT, spread, tiny_bundle
from heliostat.hardware import free_port
from heliostat.recipe import Deploy
from serve.application import deploy
from serve.classifier import application

NAME, ALONE = "load", "unbatched"
KINDS = ("ServeController", "HAProxyManager", "ProxyActor", "ServeReplica")
LOADS = ("step", "batching", "wake", "soak")
FEW, MANY, STEADY, TOGETHER = 1, 32, 8, 16
ROUNDS, BLOCK_S = 5, 5.0
SOAKED = 2
"""Replicas."""
STEP_S = 90.0
KILL_EVERY_S, BACK_S = 60.0, 25.0
"""The last kill leaves time for being replaced."""
WATCH_S = 0.25
SETTLED_S = 3.0
"""After a replica has gone."""


async def ask(url: str, until: float, seen: list[tuple[float, float, int]]) -> None:
    """(when it was asked, seconds, status or 0) of one connection's requests, one after the other."""
    async with httpx.AsyncClient(timeout=30) as client:
        while (begun := time.time()) < until:
            try:
                status = (await client.post(f"{url}/predict", json={"inputs": [{"text": TEXT}]})).status_code
            except httpx.HTTPError:
                status = 0
            seen.append((begun, time.time() - begun, status))


def load(url: str, connections: int, until: float) -> list[tuple[float, float, int]]:
    """In the client's process."""
    seen: list[tuple[float, float, int]] = []

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(ask(url, until, seen))

    asyncio.run(all_of_them())
    return seen


def replicas() -> int:
    """That answer now."""
    (deployment,) = serve.status().applications[NAME].deployments.values()
    return deployment.replica_states.get(ReplicaState.RUNNING, 0)


def processes(kind: str) -> list[psutil.Process]:
    """Of Serve that are of one kind: ServeController, ProxyActor, or ServeReplica."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if " ".join(each.cmdline()).startswith(f"ray::{kind}"):
                found.append(each)
    return found


def megabytes(kind: str) -> float:
    total = 0.0
    for each in processes(kind):
        with suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss / 1e6
    return total


def figures(seen: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Without times where less than two were answered."""
    seconds = [took for _, took, status in seen if status == 200]
    failed = {str(status): count for status, count in Counter(each[2] for each in seen).items() if status != 200}
    found: dict[str, Any] = {"answered": len(seconds), "failed": failed}
    if len(seconds) < 2:
        return found
    length = max(begun + took for begun, took, _ in seen) - min(begun for begun, _, _ in seen)
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return found | {
        "requests_per_s": round(len(seconds) / length, 1),
        "p50_ms": round(1000 * percentiles[49], 1),
        "p99_ms": round(1000 * percentiles[98], 1),
    }


def step(client: ProcessPoolExecutor, bundle: Path, settings: Deploy, seconds: float) -> dict[str, Any]:
    url = deploy(bundle, "1", settings, NAME)
    client.submit(load, url, FEW, time.time() + 2).result()  # warm-up
    before = client.submit(load, url, FEW, time.time() + 10).result()
    stepped, reached = time.time(), dict[int, float]()
    asked = client.submit(load, url, MANY, stepped + seconds)
    while not asked.done():
        reached.setdefault(replicas(), round(time.time() - stepped, 1))
        time.sleep(WATCH_S)
    seen = asked.result()
    last = stepped + max(reached.values())
    return {
        "load": "step",
        "connections": [FEW, MANY],
        "seconds_to_replicas": reached,
        "before": figures(before),
        "meanwhile": figures([each for each in seen if each[0] < last]),
        "after": figures([each for each in seen if each[0] >= last]),
    }


def batching(client: ProcessPoolExecutor, bundle: Path, settings: Deploy) -> dict[str, Any]:
    one = settings.model_copy(update={"max_replicas": 1})
    alone = one.model_copy(update={"max_batch_size": 1, "batch_wait_s": 0.0})
    batched = deploy(bundle, "1", one, NAME)
    serve.run(application(bundle, "1", alone), name=ALONE, route_prefix=f"/{ALONE}")
    urls = {"batched": batched, ALONE: f"{batched}/{ALONE}"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
    for number in range(1 + ROUNDS):
        for name, url in urls.items():
            seen = client.submit(load, url, TOGETHER, time.time() + BLOCK_S).result()
            if number:  # the first is for warming up
                found[name].append(figures(seen))
    serve.delete(ALONE)
    keys = ("requests_per_s", "p50_ms", "p99_ms")
    return {
        "load": "batching",
        "connections": TOGETHER,
        "rounds": ROUNDS,
        "medians": {
            name: {key: statistics.median(row[key] for row in rows) for key in keys} for name, rows in found.items()
        },
        "batched_over_unbatched": {
            key: spread([a[key] / b[key] for a, b in zip(found["batched"], found[ALONE], strict=True)]) for key in keys
        },
        "failed": sum(sum(row["failed"].values()) for rows in found.values() for row in rows),
    }


def wake(client: ProcessPoolExecutor, bundle: Path, settings: Deploy) -> dict[str, Any]:
    none = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1.0}
    url = deploy(bundle, "1", settings.model_copy(update=none), NAME)
    client.submit(load, url, FEW, 0.0).result()  # asks nothing: the client's process is there then
    seen = []
    for _ in range(ROUNDS):
        while replicas():
            time.sleep(WATCH_S)
        time.sleep(SETTLED_S)
        seen.append(client.submit(load, url, FEW, time.time() + WATCH_S).result()[0])
    return {
        "load": "wake",
        "rounds": ROUNDS,
        "seconds_to_answer": spread([took for _, took, _ in seen]),
        "failed": sum(status != 200 for _, _, status in seen),
    }


def soak(client: ProcessPoolExecutor, bundle: Path, settings: Deploy, seconds: float) -> dict[str, Any]:
    url = deploy(bundle, "1", settings.model_copy(update={"min_replicas": SOAKED, "max_replicas": SOAKED}), NAME)
    while replicas() != SOAKED:
        time.sleep(WATCH_S)
    begun = time.time()
    asked = client.submit(load, url, STEADY, begun + seconds)
    memory, back, killed, kill_at = list[dict[str, float]](), list[float](), 0, begun + min(KILL_EVERY_S, seconds) / 2
    while not asked.done():
        memory.append({"at": time.time() - begun} | {kind: megabytes(kind) for kind in KINDS})
        if kill_at < time.time() < begun + seconds - BACK_S:
            kill_at, now, killed = kill_at + KILL_EVERY_S, time.time(), killed + 1
            os.kill(processes("ServeReplica")[0].pid, signal.SIGKILL)
            for wanted in (False, True):  # Serve notices, and has replaced it
                while (replicas() == SOAKED) is not wanted and not asked.done():
                    time.sleep(WATCH_S)
            if not asked.done():
                back.append(round(time.time() - now, 1))
        time.sleep(1)
    # Replicas are new after each kill; what lives all the time shows whether it grows.
    settled = [each for each in memory if each["at"] > seconds / 4]
    growth = {
        kind: round(60 * float(np.polyfit([each["at"] for each in settled], [each[kind] for each in settled], 1)[0]), 3)
        for kind in ("ServeController", "HAProxyManager", "ProxyActor")
    }
    return {
        "load": "soak",
        "connections": STEADY,
        "minutes": seconds / 60,
        "killed": killed,
        "seconds_until_back": back,
        "grows_mb_a_minute": growth,
        "mb": {kind: [round(memory[0][kind], 1), round(memory[-1][kind], 1)] for kind in KINDS},
        **figures(asked.result()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    parser.add_argument("--only", nargs="+", choices=LOADS, default=LOADS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Deploy(port=free_port(), min_replicas=1, max_replicas=3, target_ongoing_requests=8, upscale_delay_s=2)
    # Its CPUs are slots, not processors.
    environment = cluster.environment() | {"OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
    ):
        bundle = tiny_bundle(Path(folder))
        ray.init(
            "local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
        )
        try:
            measure = {
                "step": lambda: step(client, bundle, settings, STEP_S),
                "batching": lambda: batching(client, bundle, settings),
                "wake": lambda: wake(client, bundle, settings),
                "soak": lambda: soak(client, bundle, settings, 60 * options.minutes),
            }
            for name in options.only:
                print(json.dumps(measure[name]()), file=sys.stdout, flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
