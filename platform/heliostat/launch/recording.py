"""What the workers of a cluster print goes to the record of the job that is connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heliostat.record import recording, say

HANDLER = "heliostat_record"


@contextmanager
def recorded_workers() -> Iterator[None]:
    """For the time of the block, while Ray is connected. Those on this machine are read from Ray's files, which outlive
    the cluster; of others there is what Ray forwards."""
    import ray
    from ray._private.ray_constants import LOG_PREFIX_EVENT_SUMMARY as SUMMARY
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as forwarded

    record = recording()
    node: Any = ray._private.worker._global_node  # Ray has no public name for its session
    if record is None or node is None:  # a client of a cluster elsewhere has no node
        yield
        return
    session, ip, job = Path(node.get_session_dir_path()), node.node_ip_address, ray.get_runtime_context().get_job_id()
    record.follow(session / "logs", job, ip)
    nodes = [each for each in ray.nodes() if each["Alive"]]
    say("connected", session=session.name, ray_job=job, nodes=len(nodes), resources=ray.cluster_resources())

    def take(data: dict[str, Any]) -> None:
        pid, lines = data["pid"], data["lines"]
        if pid == "autoscaler":  # it also says every few seconds that there is nothing to do
            lines = [line.partition(SUMMARY)[2] for line in lines if SUMMARY in line]
        elsewhere = data["ip"] != ip or not str(pid).isdigit()  # by name: Ray's own processes
        if elsewhere and lines:
            name = data.get("actor_name") or data.get("task_name") or ""
            record.worker(data["ip"], pid, name, lines, data["is_err"])

    forwarded.add_handler(HANDLER, take)
    try:
        yield
    finally:
        forwarded.remove_handler(HANDLER)
