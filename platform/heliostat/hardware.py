"""What this machine has. Asked without torch, so that a plan or a refusal costs nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    cpus: int
    memory_bytes: int
    gpus: int


def this_machine() -> Machine:
    """Processors this process may use, physical memory, and NVIDIA GPUs that the driver shows."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia").exists() else 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # empty: none
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cpus=len(os.sched_getaffinity(0)), memory_bytes=memory, gpus=gpus)
