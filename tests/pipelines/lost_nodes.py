"""A search on a Ray cluster whose nodes go and come. What came of it is in FOLDER/said.json, since Ray prints, too. A
process of its own, since it starts Ray with nodes of its own: `python -m tests.pipelines.lost_nodes FOLDER TRIALS
resume|begin`."""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from heliostat.launch.cluster import environment
from heliostat.launch.tune.driver import Driver
from heliostat.launch.tune.study import Study
from heliostat.recipe import Tune, Uniform
from tests.pipelines.trials import Said


def main(folder: Path, trials: int, resume: bool) -> None:
    # Ray takes a node that does not answer for lost after half a minute; here after some seconds.
    quick = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, runtime_env={"env_vars": environment()}, log_to_driver=False)
    tune = Tune(
        space={"x": Uniform(low=0, high=2)}, algorithm="random", scheduler="none", num_trials=trials, max_failures=9
    )
    study = Study(tune, {"loss": False}, 0, "search", folder, resume)
    ended: list[int] = []

    def say(row: dict[str, int]) -> None:
        ended.append(row["number"])
        print(row["number"], file=sys.stderr, flush=True)

    search = threading.Thread(target=Driver(study, Said(folder, 1.0), ended=say).run)
    search.start()
    # By how many trials have ended, not by the clock, so that on fast machines too something is lost before the end.
    lost, draw = 0, random.Random(trials)
    moments = sorted(draw.sample(range(trials // 3), 3))
    while search.is_alive():
        search.join(draw.uniform(0, 0.5))
        if search.is_alive() and lost < 3 and len(ended) >= moments[lost]:
            cluster.remove_node(nodes.pop(draw.randrange(len(nodes))), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=2))
            lost += 1
    (folder / "said.json").write_text(json.dumps({"rows": study.rows(), "ended": ended, "lost": lost}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume")
