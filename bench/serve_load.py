"""An endpoint under load: one tiny BERT behind `/predict`, from one replica to three.

    step   a client asks with one connection, then with 32: seconds until the second and the third replica answer, and
           what requests took before, meanwhile and after
    soak   eight connections for a while, in which a replica is killed every minute (SIGKILL): requests that failed,
           seconds until as many replicas answer again, and how the memory of controller, proxy and replicas grows

Clients and servers share the machine's cores. Prints a line of JSON for each.

    python -m bench.serve_load [--minutes 10]
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
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import torch
from ray import serve

import heliostat.launch.cluster as cluster
from bench.serve_overhead import TEXT, tiny_bundle
from heliostat.hardware import free_port
from heliostat.recipe import Deploy
from serve.application import deploy

NAME = "load"
FEW, MANY, STEADY = 1, 32, 8
KILL_EVERY_S = 60.0
WATCH_S = 0.25


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
    return deployment.replica_states.get("RUNNING", 0)


def processes() -> list[psutil.Process]:
    """Of Serve: controller, proxies, replicas."""
    titles = ("ray::ServeController", "ray::HAProxyManager", "ray::ProxyActor", f"ray::ServeReplica:{NAME}:")
    return [each for each in psutil.Process().children(recursive=True) if " ".join(each.cmdline()).startswith(titles)]


def figures(seen: list[tuple[float, float, int]]) -> dict[str, Any]:
    seconds = sorted(took for _, took, status in seen if status == 200)
    length = max(begun for begun, _, _ in seen) - min(begun for begun, _, _ in seen)
    return {
        "requests_per_s": round(len(seen) / length, 1),
        "p50_ms": round(1000 * statistics.median(seconds), 1),
        "p99_ms": round(1000 * seconds[int(0.99 * (len(seconds) - 1))], 1),
        "failed": {str(status): count for status, count in Counter(each[2] for each in seen).items() if status != 200},
    }


def step(client: ProcessPoolExecutor, url: str, seconds: float) -> dict[str, Any]:
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


def soak(client: ProcessPoolExecutor, url: str, seconds: float) -> dict[str, Any]:
    begun = time.time()
    asked = client.submit(load, url, STEADY, begun + seconds)
    memory, back, kill_at = list[tuple[float, dict[str, float]]](), list[float](), begun + KILL_EVERY_S / 2
    while not asked.done():
        now, by_kind = time.time(), Counter[str]()
        for each in processes():
            by_kind[each.cmdline()[0].split("::")[1].split(":")[0]] += each.memory_info().rss / 1e6
        memory.append((now - begun, by_kind))
        if now > kill_at and now < begun + seconds - KILL_EVERY_S / 2:
            kill_at, count = now + KILL_EVERY_S, replicas()
            victim = next(each for each in processes() if "ServeReplica" in each.cmdline()[0])
            os.kill(victim.pid, signal.SIGKILL)
            while replicas() >= count:
                time.sleep(WATCH_S)
            while replicas() < count:
                time.sleep(WATCH_S)
            back.append(round(time.time() - now, 1))
        time.sleep(1)
    # Replicas are new after each kill; what lives all the time shows whether it grows.
    settled = [(at, by_kind) for at, by_kind in memory if at > seconds / 4]
    growth = {
        kind: round(60 * float(np.polyfit([at for at, _ in settled], [each[kind] for _, each in settled], 1)[0]), 3)
        for kind in ("ServeController", "HAProxyManager", "ProxyActor")
    }
    return {
        "load": "soak",
        "connections": STEADY,
        "minutes": seconds / 60,
        "killed": len(back),
        "seconds_until_back": back,
        "grows_mb_a_minute": growth,
        "mb": {kind: round(value, 1) for kind, value in memory[-1][1].items()},
        **figures(asked.result()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
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
            url = deploy(bundle, "1", settings, NAME)
            client.submit(load, url, FEW, time.time() + 2).result()  # warm-up
            for line in (step(client, url, 90), soak(client, url, 60 * options.minutes)):
                print(json.dumps(line), file=sys.stdout, flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
