"""Ray's jobs, as the scheduler uses them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from heliostat.launch.cluster import NODES, environment
from heliostat.launch.scheduler import Stands
from heliostat.scheduling.state import Node, Placement

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's variable for what a submitted job came with."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's variable for the seconds that a job has to end by itself after SIGTERM; read where the job is supervised."""


class RayJobs:
    """On the cluster that Ray is connected to. `grace_s`: for a checkpoint, from SIGTERM to SIGKILL."""

    def __init__(self, grace_s: int) -> None:
        import ray
        from ray.job_submission import JobSubmissionClient

        self.address = ray.get_runtime_context().gcs_address
        self.client = JobSubmissionClient(self.address)
        own = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {})
        own = {name: value for name, value in own.items() if not name.startswith("_")}
        # Jobs get what the scheduler was submitted with, or what makes its code importable on this machine.
        self.runtime_env: dict[str, Any] = own or {"env_vars": environment()}
        self.grace_s = grace_s

    def nodes(self, ours: Mapping[str, Mapping[str, float]]) -> list[Node]:
        import ray
        from ray._private.state import available_resources_per_node

        available, found = available_resources_per_node(), []
        for node in ray.nodes():
            name, total = node["NodeID"], node["Resources"]
            if not node["Alive"]:
                continue
            free, left = available.get(name, total), {}
            for kind in ("CPU", "GPU"):
                used = total.get(kind, 0.0) - free.get(kind, 0.0)
                others = max(0.0, used - ours.get(name, {}).get(kind, 0.0))
                left[kind] = total.get(kind, 0.0) - others
            found.append(Node(name, left["CPU"], left["GPU"]))
        return sorted(found, key=lambda node: node.name)

    def start(self, attempt: str, recipe: Path, run_name: str, placement: Placement) -> None:
        # Ray tells a job the address of any Ray on its machine.
        words = ["env", f"RAY_ADDRESS={self.address}", sys.executable, "-m", "pipelines.train"]
        words += ["--recipe", str(recipe), "--run-name", run_name]
        nodes = ",".join(name for name, workers in sorted(placement.items()) for _ in range(workers))
        variables = {NODES: nodes, STOP_WAIT: str(self.grace_s), "RAY_ADDRESS": self.address}
        variables = self.runtime_env.get("env_vars", {}) | variables
        if self.stands(attempt) == "unknown":
            self.client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=attempt,
                runtime_env=self.runtime_env | {"env_vars": variables},
            )

    def stop(self, attempt: str) -> None:
        with suppress(RuntimeError):  # Ray does not know it: it was not started, or has ended long ago
            self.client.stop_job(attempt)

    def stands(self, attempt: str) -> Stands:
        try:
            status = self.client.get_job_status(attempt)
        except RuntimeError as error:
            if "404" in str(error):
                return "unknown"
            raise
        return "ended" if status.is_terminal() else "running"
