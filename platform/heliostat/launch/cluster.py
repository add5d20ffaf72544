"""Connecting to Ray: a cluster on this machine for the length of a job, one that outlives it, or one that is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from heliostat.hardware import this_machine
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


KEPT_SESSION = "ray.session"
"""In the storage folder: the name of the Ray session that a kept cluster runs, for whoever ends it."""
KEPT_MARK = "kept_by_heliostat"
"""In the folder of a Ray session: that it was started here to be kept."""


def check_placement(recipe: Recipe, cpus: float, gpus: float, where: str) -> None:
    """Refuse what could never be placed."""
    parallelism = recipe.parallelism
    needed = parallelism.workers * parallelism.cpus_per_worker
    if parallelism.use_gpu and parallelism.workers > gpus:
        raise Refused(
            "parallelism.use_gpu",
            f"{parallelism.workers} GPUs are asked for, {where} has {gpus:g}",
            "set parallelism.use_gpu false, or fewer workers",
        )
    if needed > cpus:
        raise Refused(
            "parallelism.workers",
            f"{parallelism.workers} workers need {needed:g} CPUs, {where} has {cpus:g}",
            f"use ≤ {int(cpus // parallelism.cpus_per_worker)} workers",
        )


def logical_cpus() -> int:
    """What a cluster on this machine declares: workers of a tiny run may share cores, and drivers must not starve."""
    return max(8, 4 * this_machine().cpus)


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
            # "local": whatever other Ray runs here, or left its address behind when it died, is not this job's.
            # With the dashboard: Ray Train's own cleaner asks its state interface.
            ray.init(
                "local",
                num_cpus=logical_cpus(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                runtime_env={"env_vars": environment()},
                **options,
            )
        elif local:
            started = start_kept_cluster()
            ray.init(address="auto", runtime_env={"env_vars": environment()}, **options)
            node: Any = ray._private.worker._global_node  # Ray has no public name for its session
            session = Path(node.get_session_dir_path())
            if started:
                (session / KEPT_MARK).touch()
            if (session / KEPT_MARK).exists():  # and not somebody's own `ray start`, which `make stop` must not end
                recipe.storage_path.mkdir(parents=True, exist_ok=True)
                write_atomically(recipe.storage_path / KEPT_SESSION, session.name)
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

    file = storage / KEPT_SESSION
    if not file.is_file():
        return 0
    session = file.read_text().strip()
    roots = [p for p in psutil.process_iter(["cmdline"]) if any(session in word for word in p.info["cmdline"] or [])]
    processes = {child for root in roots for child in [root, *_children(root)] if child.pid != os.getpid()}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    file.unlink()
    return len(processes)


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
