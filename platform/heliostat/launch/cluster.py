"""Connecting to Ray: a cluster on this machine for the length of a job, one that outlives it, or one that is there."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from heliostat.hardware import free_port, this_machine
from heliostat.launch.recording import recorded_workers
from heliostat.placement import Node, at_largest, check_placement, logical_cpus
from heliostat.recipe import Recipe, Refused, write_atomically

ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds platform/, pipelines/ and serve/."""
THREADS = {
    # Workers share cores: idle OpenMP threads must sleep, not spin.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Ray runs the loop on a thread, whose own arena of glibc's allocator gives activations back to the system and
    # faults them in again at every step: 7% of a small model's step on a CPU. One arena, and keep what was had.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""The environment of workers."""
NODES = "HELIOSTAT_NODES"
"""The variable by which the scheduler says where a run's workers go: their nodes' ids in Ray, with commas."""
GCS_PORT = "RAY_GCS_SERVER_PORT"
"""Ray's variable for the port of a cluster that `ray.init` starts."""
HEAD = "node:__internal_head__"
"""The resource that only a cluster's head has."""
AUTOSCALING = "--autoscaling-config="
KEPT_SESSION = "ray.session"
"""In the storage folder: the Ray session that a kept cluster runs and its address, for whoever ends it."""
SESSION_FLAG = "--session-dir="
"""Of the process that every head of a cluster has: the folder of its session."""
KEPT_PORTS = {
    "port": 6379,
    "dashboard-port": 8265,
    "dashboard-agent-listen-port": 52365,
    "ray-client-server-port": 10001,
}
"""Of a kept cluster, where they are free: those that Ray's own clients look for."""


def environment() -> dict[str, str]:
    """Variables that make the package, the jobs and the user's own modules importable on local workers."""
    paths = [str(ROOT), str(ROOT / "platform"), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return THREADS | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path))}


def runtime_env() -> dict[str, Any]:
    """For a cluster elsewhere: the code travels."""
    excludes = [".venv", ".venv-llm", ".git", "tests", "**/__pycache__"]
    return {
        "working_dir": str(ROOT),
        "py_modules": [str(ROOT / "platform" / "heliostat")],
        "excludes": excludes,
        "env_vars": THREADS,
    }


def starts_here(address: str) -> bool:
    """Whether a job with this `--address` starts Ray on this machine for itself."""
    return not address and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ


@contextmanager
def connect(recipe: Recipe, address: str = "", keep: bool = False) -> Iterator[None]:
    """Ray, connected for the time of the block. `keep`: on a cluster that outlives the job."""
    local = starts_here(address)
    if local:
        machine = this_machine()
        check_placement(recipe, logical_cpus(), machine.gpus, "this machine")
    import ray

    brought = False
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "WARNING"}
    try:
        if brought := ray.is_initialized():  # by a notebook or a test: theirs to end
            with recorded_workers():
                yield
            return
        if local and not keep:
            start_local_cluster(options)
        elif local:
            connect_to_kept_cluster(recipe.storage_path, options)
        elif address:
            ray.init(address=address, runtime_env=runtime_env(), **options)
        else:  # submitted: the job came with its address and environment
            ray.init(**options)
        if not local:
            most = capacity()
            where = "the cluster" if most == present() else "the cluster at its largest"
            check_placement(recipe, most.cpus, most.gpus, where)
        with recorded_workers():
            yield
    finally:
        if not brought and ray.is_initialized():
            ray.shutdown()


def connect_to_kept_cluster(storage: Path, options: dict[str, Any]) -> None:
    """To the one of this storage, which is started where it does not run. `options` are more of `ray.init`'s."""
    import ray

    address = kept_cluster(storage)
    env_vars = environment() | {"RAY_ADDRESS": address}  # as below: another Ray may run here
    ray.init(address=address, runtime_env={"env_vars": env_vars}, **options)
    node: Any = ray._private.worker._global_node  # Ray has no public name for its session
    storage.mkdir(parents=True, exist_ok=True)
    write_atomically(storage / KEPT_SESSION, f"{Path(node.get_session_dir_path()).name} {address}")


def present() -> Node:
    """What the nodes of the connected cluster have."""
    import ray

    resources = ray.cluster_resources()
    return Node(resources.get("CPU", 0), resources.get("GPU", 0))


def capacity() -> Node:
    """What the nodes of the connected cluster have or, where an autoscaler may add nodes, could have at most; infinite
    where that cannot be told."""
    import ray

    # Ray has no public name for an autoscaler's limits. They are in the file that it was started with, on the head.
    context = ray.get_runtime_context()
    (head,) = (node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])
    client = ray._private.worker._global_node is None  # it is elsewhere, though it is told the head's id
    if head["NodeID"] == context.get_node_id() and not client:
        running, config = _autoscaler(context.gcs_address)
    else:
        there = ray.remote(_autoscaler).options(num_cpus=0, resources={HEAD: 0.001})
        running, config = ray.get(there.remote(context.gcs_address))
    if not running:  # not there, but elsewhere, as on Kubernetes
        return Node(math.inf, math.inf)
    if config is None:
        return present()
    return at_largest(config, present(), sum(node["Alive"] for node in ray.nodes()))


def _autoscaler(address: str) -> tuple[bool, dict[str, Any] | None]:
    """On the head: whether the cluster's monitor runs here, and what it was told about nodes that it may add."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={address}" in words and any(Path(word).name == "monitor.py" for word in words):
            for word in words:
                if word.startswith(AUTOSCALING):
                    return True, yaml.safe_load(Path(word.removeprefix(AUTOSCALING)).expanduser().read_text())
            return True, None
    return False, None


def start_local_cluster(options: dict[str, Any]) -> None:
    """A cluster on this machine that ends with this process. `options` are more of `ray.init`'s."""
    import ray

    # "local" and RAY_ADDRESS: another Ray that runs here, or whose address file outlived it, is not this job's. Ray's
    # own actors look clusters up by that file too, and one that asks a stranger about its trainer's controller hears
    # that it is dead, and ends the run. The address is known beforehand because the port is chosen here.
    port = free_port()
    env_vars = environment() | {"RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    before = os.environ.get(GCS_PORT)
    os.environ[GCS_PORT] = str(port)
    try:
        # With the dashboard: Ray Train's cleaner asks its state interface.
        ray.init(
            "local",
            num_cpus=logical_cpus(),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            runtime_env={"env_vars": env_vars},
            **options,
        )
    finally:
        os.environ.pop(GCS_PORT) if before is None else os.environ.update({GCS_PORT: before})


def dashboard() -> str:
    """Where the connected cluster has it."""
    import ray

    url = ray._private.worker.get_dashboard_url()  # only `ray.init` tells it publicly, to who called it
    return f"http://{url}"


def kept_cluster(storage: Path) -> str:
    """The address of the cluster that was kept with this storage; where none runs, `ray start --head` on loopback."""
    if (kept := _kept(storage)) and any("gcs_server" in process.info["cmdline"][0] for process in kept.processes):
        return kept.address
    ray_command = str(Path(sys.executable).with_name("ray"))
    # Submitted jobs say `python` and mean this environment's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = os.environ | environment() | {"RAY_AUTH_MODE": "token", "PATH": path}
    env.pop("RAY_ADDRESS", None)  # of another cluster
    ports = {name: free_port(port) for name, port in KEPT_PORTS.items()}
    command = [
        ray_command,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        *(f"--{name}={port}" for name, port in ports.items()),
        "--min-worker-port=0",  # any: another Ray on this machine has those that are usual
        "--max-worker-port=0",
        f"--num-cpus={logical_cpus()}",
        "--disable-usage-stats",
    ]
    started = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if started.returncode:
        raise RuntimeError(f"ray start failed: {started.stderr.strip()[-500:]}")
    return f"127.0.0.1:{ports['port']}"


class Kept(NamedTuple):
    session: str
    address: str
    processes: list[Any]
    """Of the session that run still, without their children."""


def _kept(storage: Path) -> Kept | None:
    """The cluster that was kept with this storage, as far as it is known of."""
    import psutil

    file = storage / KEPT_SESSION
    if not file.is_file():
        return None
    session, address = file.read_text().split()
    found = [p for p in psutil.process_iter(["cmdline"]) if any(session in word for word in p.info["cmdline"] or [])]
    return Kept(session, address, found)


def stop_kept_cluster(storage: Path) -> int:
    """End the processes of the cluster that was kept with this storage, and no other Ray; returns how many."""
    import psutil
    from ray._common.utils import reset_ray_address
    from ray._private.utils import read_ray_address

    kept = _kept(storage)
    if kept is None:
        return 0
    processes = {child for root in kept.processes for child in [root, *_children(root)] if child.pid != os.getpid()}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    if read_ray_address() == kept.address:  # as `ray stop` does: Ray would go on looking for the cluster there
        reset_ray_address()
    (storage / KEPT_SESSION).unlink()
    return len(processes)


def nodes_file(storage: Path) -> Path:
    """Where Ray lists the metrics ports of its nodes, for Prometheus: of the cluster kept with this storage, else of
    the one that was started last on this machine. Raises Refused where none runs."""
    import psutil
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    commands = [process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])]
    words = [word for command in commands if command[0].endswith("/gcs_server") for word in command]
    sessions = [Path(word.removeprefix(SESSION_FLAG)) for word in words if word.startswith(SESSION_FLAG)]
    lists = [session / PROMETHEUS_SERVICE_DISCOVERY_FILE for session in sessions if session.is_dir()]
    if not lists:
        raise Refused("cluster", "no Ray runs on this machine", "start one by `ray start --head`, or a job by --keep")
    kept = _kept(storage)
    # Sessions have the time in their names.
    found = max(lists, key=lambda path: (kept and path.parent.name == kept.session, path.is_file(), path.parent.name))
    if not found.is_file():
        raise Refused("cluster", f"{found.parent.name} has no list of its nodes", "start it with its dashboard")
    return found


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
