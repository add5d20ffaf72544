"""What this machine has. Asked without torch, so that a plan or a refusal costs nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""By any of these names, Linux says that a processor multiplies in bfloat16."""


@dataclass(frozen=True)
class Machine:
    cpus: int
    memory_bytes: int
    gpus: int
    bfloat16: bool
    """Whether the processors have instructions for matrix products in it."""


def this_machine() -> Machine:
    """Processors this process may use, physical memory, and NVIDIA GPUs that the driver shows."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia").exists() else 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # empty: none
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(len(os.sched_getaffinity(0)), memory, gpus, not BFLOAT16_FLAGS.isdisjoint(_processor_flags()))


def _processor_flags() -> set[str]:
    """Of x86, or of Arm; none where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def gpu_memory_bytes() -> int | None:
    """Of the NVIDIA GPU that has the least; None where the driver's tool does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.split()
    return min((int(mib) << 20 for mib in said if mib.isdigit()), default=None)


def cannot_listen(host: str, port: int) -> str:
    """Why no server could listen there now; empty where one could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do no harm
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def free_port(preferred: int = 0) -> int:
    """A port that nothing listens on now: the preferred one where it is free."""
    if preferred and not cannot_listen("0.0.0.0", preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])
