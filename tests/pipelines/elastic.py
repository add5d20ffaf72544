"""A run on a Ray cluster that loses a node and gets another: `python -m tests.pipelines.elastic FOLDER`. It prints one
JSON line. A process of its own, since it starts Ray with nodes of its own."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.launch.cluster import environment
from heliostat.launch.train import fit
from heliostat.recipe import load
from heliostat.train.loop import LEDGER
from tests.recipes import prepared


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

    wait_for(lambda: step() > 50)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(lambda: attempts() == 2)
    reached = step()
    wait_for(lambda: step() > reached + 50)
    cluster.add_node(num_cpus=1)
    run.join()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
