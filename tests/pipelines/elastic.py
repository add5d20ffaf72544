"""A run on a Ray cluster that is told of a node's end, loses it, and gets another. It prints one JSON line. A process
of its own, since it starts Ray with nodes of its own: `python -m tests.pipelines.elastic FOLDER`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.launch.cluster import environment
from heliostat.launch.train import fit
from heliostat.recipe import load
from heliostat.train import checkpoint
from heliostat.train.folder import LEDGER
from tests.recipes import prepared

GRACE_S = 12


def wait_for(condition: Any) -> None:
    while not condition():
        time.sleep(0.1)


def main(folder: Path) -> None:
    recipe, run_dir = load(folder / "recipe.json"), folder / "run"
    data = prepared(recipe).folder
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, runtime_env={"env_vars": environment()})
    outcome: dict[str, Any] = {}
    run = threading.Thread(target=lambda: outcome.update(fit(recipe, data, run_dir)))
    run.start()

    def step() -> int:
        return max((record["step"] for record in read_metrics(run_dir / METRICS_FILE)), default=0)

    def attempts() -> int:
        return len(list((run_dir / LEDGER).glob("attempt-*.json")))

    def exported() -> list[str]:
        """What the nodes tell Prometheus of the second attempt."""
        lines = []
        for node in ray.nodes():
            if node["Alive"]:
                with suppress(OSError):
                    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                    lines += urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
        return [line for line in lines if line.startswith("ray_heliostat_train") and 'attempt="2"' in line]

    def off_schedule() -> list[int]:
        every = recipe.checkpoint.every_steps
        return [found.step for found in checkpoint.complete(run_dir / "checkpoints") if found.step % every]

    wait_for(lambda: step() > 50)
    drain = ["drain-node", "--address", cluster.address, "--node-id", nodes[1].node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted elsewhere"]
    ray_command = str(Path(sys.executable).with_name("ray"))
    deadline = time.time() + GRACE_S
    subprocess.run([ray_command, *drain, "--deadline-remaining-seconds", str(GRACE_S)], check=True, stdout=sys.stderr)
    wait_for(off_schedule)
    noticed = off_schedule()[0]
    within_s = deadline - time.time()
    time.sleep(max(0.0, within_s))
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(lambda: attempts() == 2)
    reached = step()
    wait_for(lambda: step() > reached + 50)
    wait_for(exported)
    scraped = exported()
    cluster.add_node(num_cpus=1)
    run.join()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(outcome | {"noticed": noticed, "within_s": within_s, "exported": scraped}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
