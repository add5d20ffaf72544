"""Connecting to Ray: a cluster on this machine for the length of a job, one that outlives it, or one that is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from heliostat.hardware import this_machine
from heliostat.placement import check_placement, logical_cpus
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
GCS_PORT = "RAY_GCS_SERVER_PORT"
"""Ray's variable for the port of a cluster that `ray.init` starts."""
KEPT_SESSION = "ray.session"
"""In the storage folder: the Ray session that a kept cluster runs and its address, for whoever ends it."""
SESSION_FLAG = "--session-dir="
"""Of the process that every head of a cluster has: the folder of its session."""
KEPT_MARK = "kept_by_heliostat"
"""In the folder of a Ray session: that it was started here to be kept."""


def environment() -> dict[str, str]:
    """Variables that make the package, the jobs and the user's own modules importable on local workers."""
    paths = [str(ROOT), str(ROOT / "platform"), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return THREADS | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path))}


def runtime_env() -> dict[str, Any]:
    """For a cluster elsewhere: the code travels."""
    excludes = [".venv", ".git", "tests", "**/__pycache__"]
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
            yield
            return
        if local and not keep:
            start_local_cluster(options)
        elif local:
            started = start_kept_cluster()
            ray.init(address="auto", runtime_env={"env_vars": environment()}, **options)
            node: Any = ray._private.worker._global_node  # Ray has no public name for its session
            session = Path(node.get_session_dir_path())
            if started:
                (session / KEPT_MARK).touch()
            if (session / KEPT_MARK).exists():  # and not somebody's own `ray start`, which `make stop` must not end
                recipe.storage_path.mkdir(parents=True, exist_ok=True)
                address = ray.get_runtime_context().gcs_address
                write_atomically(recipe.storage_path / KEPT_SESSION, f"{session.name} {address}")
        elif address:
            ray.init(address=address, runtime_env=runtime_env(), **options)
        else:  # submitted: the job came with its address and environment
            ray.init(**options)
        if not local:
            resources = ray.cluster_resources()
            check_placement(recipe, resources.get("CPU", 0), resources.get("GPU", 0), "the cluster")
        yield
    finally:
        if not brought and ray.is_initialized():
            ray.shutdown()


def start_local_cluster(options: dict[str, Any]) -> None:
    """A cluster on this machine that ends with this process. `options` are more of `ray.init`'s."""
    import ray

    # "local" and RAY_ADDRESS: another Ray that runs here, or whose address file outlived it, is not this job's. Ray's
    # own actors look clusters up by that file too, and one that asks a stranger about its trainer's controller hears
    # that it is dead, and ends the run. The address is known beforehand because the port is chosen here.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def start_kept_cluster() -> bool:
    """`ray start --head` on loopback, unless one runs; whether it was needed."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    # Submitted jobs say `python` and mean this environment's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = os.environ | environment() | {"RAY_AUTH_MODE": "token", "PATH": path}
    if subprocess.run([ray_command, "status"], env=env, capture_output=True, check=False).returncode == 0:
        return False
    command = [
        ray_command,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--num-cpus={logical_cpus()}",
        "--disable-usage-stats",
    ]
    started = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if started.returncode:
        raise RuntimeError(f"ray start failed: {started.stderr.strip()[-500:]}")
    return True


def stop_kept_cluster(storage: Path) -> int:
    """End the processes of the cluster that was kept with this storage, and no other Ray; returns how many."""
    import psutil
    from ray._common.utils import reset_ray_address
    from ray._private.utils import read_ray_address

    file = storage / KEPT_SESSION
    if not file.is_file():
        return 0
    session, address = file.read_text().split()
    roots = [p for p in psutil.process_iter(["cmdline"]) if any(session in word for word in p.info["cmdline"] or [])]
    processes = {child for root in roots for child in [root, *_children(root)] if child.pid != os.getpid()}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    if read_ray_address() == address:  # as `ray stop` does: Ray would go on looking for the cluster there
        reset_ray_address()
    file.unlink()
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
    file = storage / KEPT_SESSION
    kept = file.read_text().split()[0] if file.is_file() else ""
    # Sessions have the time in their names.
    found = max(lists, key=lambda path: (path.parent.name == kept, path.is_file(), path.parent.name))
    if not found.is_file():
        raise Refused("cluster", f"{found.parent.name} has no list of its nodes", "start it with its dashboard")
    return found


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
