"""From `ray up` to the end of a job's second training step on a cluster of three hosts, for `pipelines.train` and for a
plain Ray Train script of the same model with random tokens (bench/plain_ray_train.py), in interleaved pairs. Each time
the hosts are new: Linux namespaces on this machine, with the environment installed, a worker each on two of them. Needs
root, and what tests/apt.txt has for `ray up`. Prints one JSON line: seconds, and paired ratios.

    python -m bench.cluster_start [--pairs 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.train_overhead import recipe_for, spread
from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import override
from tests.cluster.lab import SUBMIT, Lab, lab


class Start(NamedTuple):
    up_s: float
    """Until `ray up` has returned: the head runs, and starts the others."""
    first_step_s: float
    """Until the end of the second step (ours records each while the next one runs)."""


def start(there: Lab, words: list[str | Path], stepped: Callable[[], float | None]) -> Start:
    """`stepped`: when the second step ended, once it has."""
    began = time.time()
    there.up()
    up_s = time.time() - began
    with there.tunnel():
        job = there.start(*SUBMIT, "--", *words)
        job.wait_for(stepped, "a step", within_s=600)
    ended = stepped()
    assert ended is not None
    return Start(up_s, ended - began)


def ours() -> Start:
    with lab() as there:
        recipe = override(recipe_for("tiny", there.room.shared, 20), {"parallelism.workers": 2})
        recipe = override(recipe, {"training.micro_batch_size": 2})
        file = there.room.shared / "recipe.json"
        recipe.save(file)
        steps = recipe.storage_path / "runs" / "run" / METRICS_FILE
        words: list[str | Path] = ["python", "-m", "pipelines.train", file, "--run-name", "run"]
        return start(there, words, lambda: next((each["time"] for each in read_metrics(steps) if "loss" in each), None))


def plain() -> Start:
    with lab() as there:
        config = there.room.shared / "config.json"
        config.write_text(json.dumps(recipe_for("tiny", there.room.shared, 20).model.config))
        noted = there.room.shared / "second_step"
        words: list[str | Path] = ["python", "bench/plain_ray_train.py", config, noted, "eth0"]
        return start(there, words, lambda: float(noted.read_text()) if noted.is_file() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    pairs = [(ours(), plain()) for _ in range(options.pairs)]
    answer: dict[str, object] = {"hosts": 3, "workers": 2, "pairs": options.pairs}
    for figure in Start._fields:
        a, b = zip(*((getattr(mine, figure), getattr(other, figure)) for mine, other in pairs), strict=True)
        answer[figure] = {
            "heliostat": round(statistics.median(a), 1),
            "ray": round(statistics.median(b), 1),
            "ratio": spread([x / y for x, y in zip(a, b, strict=True)]),
        }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
