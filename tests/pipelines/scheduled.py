"""Two runs that fill a Ray cluster, and a third that matters more; the scheduler is killed while that one runs, and
started again. Prints one JSON line. A process of its own, since it starts Ray:
`python -m tests.pipelines.scheduled FOLDER`, with `recipe.json` in the folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.hardware import free_port
from heliostat.recipe import load, override
from heliostat.scheduling.queue import Queue, entry_of
from tests.pipelines.jobs import ROOT, run, start

WAIT_S = 300


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def main(folder: Path) -> None:
    recipe = load(folder / "recipe.json")
    queue = Queue(recipe.storage_path)
    words = ["--recipe", str(folder / "recipe.json")]
    submitted = run("schedule", "submit", *words, "--run-name", "low")
    assert submitted.code == 0, submitted.stderr[-2000:]
    queue.submit(recipe, entry_of(recipe, "undisturbed", "default", 1, None))
    port = free_port()
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    head["dashboard_agent_listen_port"] = free_port()  # another Ray may run here
    cluster = Cluster(initialize_head=True, head_node_args=head)
    work = ["run", "--storage", recipe.storage, "--every-s", "0.5", "--min-run-s", "0"]
    scheduler = start("schedule", *work, "--address", cluster.address)
    try:
        steps = recipe.storage_path / "runs" / "low" / METRICS_FILE
        wait_for(lambda: len(read_metrics(steps)) > 30, "the first steps")
        short = override(recipe, {"schedule.max_steps": 20})
        queue.submit(short, entry_of(short, "high", "default", 2, None))
        wait_for(lambda: queue.record("high").status == "running", "the preemption")
        made = [record["step"] for record in read_metrics(steps) if "loss" in record]
        scheduler.kill()
        # The next one is a job itself. Ray would tell it the address of any Ray on this machine.
        ray_command = str(Path(sys.executable).with_name("ray"))
        command = [ray_command, "job", "submit", "--address", f"http://127.0.0.1:{port}"]
        command += ["--runtime-env", "runtime_env.yaml", "--working-dir", ".", "--"]
        command += ["env", f"RAY_ADDRESS={cluster.address}", sys.executable, "-m", "pipelines.schedule"]
        command += [*work, "--until-empty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    finally:
        scheduler.kill()
        print(scheduler.communicate()[1][-3000:], file=sys.stderr)
        cluster.shutdown()
    (answer,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job": "schedule"')]
    print(json.dumps(answer | {"made": made}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
