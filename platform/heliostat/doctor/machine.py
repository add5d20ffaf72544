"""This machine: whether what is installed fits together and to its hardware, and what jobs would find taken."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from heliostat import installed
from heliostat.doctor.document import Document, Problem, Where
from heliostat.doctor.software import COMPARED
from heliostat.hardware import Machine, cannot_listen

PYTHON = installed.python_version()
CUDA_DRIVERS = {11: 450, 12: 525, 13: 580}
"""The oldest driver of Linux for CUDA's major versions (NVIDIA, CUDA Compatibility, "Minor Version Compatibility")."""
OBJECT_STORE_SHARE = 0.3
"""Of the memory, which Ray takes for objects unless told otherwise (`ray start --help`)."""
OBJECT_STORE_LEAST = 10**10
"""Up to so many bytes Ray does not shrink that to what /dev/shm has."""
RAY_PROCESSES = ("gcs_server", "raylet", "ray::", "haproxy")
"""What listens on these ports where a cluster runs already, which jobs join."""


def _here(field: str, problem: str, fix: str) -> Problem:
    return Problem(None, None, field, problem, fix)


def check_machine(machine: Machine) -> Iterator[Problem]:
    yield from _check_versions()
    yield from _check_cuda(machine)
    yield from _check_shared_memory(machine)


def _check_versions() -> Iterator[Problem]:
    """Against what the package asks for."""
    try:
        own = importlib.metadata.distribution("heliostat")
    except importlib.metadata.PackageNotFoundError:
        yield _here("heliostat", "the package is not installed", "pip install --no-deps -e .")
        return
    if (wanted := own.metadata["Requires-Python"]) and PYTHON not in SpecifierSet(wanted):
        yield _here("python", f"Python {PYTHON} is installed, {wanted} is needed", "make a new environment")
    for line in own.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name not in COMPARED:
            continue
        version = installed.version(requirement.name)
        if version is None:
            yield _here(requirement.name, "it is not installed", "pip install -r requirements.lock")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield _here(
                requirement.name,
                f"{version} is installed, {requirement.specifier} is needed",
                "pip install -r requirements.lock",
            )


def _check_cuda(machine: Machine) -> Iterator[Problem]:
    version, folder = installed.version("torch"), installed.folder("torch")
    if not machine.gpus or version is None or folder is None:
        return
    cuda = installed.literals(installed.assigned(installed.module(folder / "version.py").body)).get("cuda")
    if cuda is None:
        yield _here(
            "torch",
            f"{version} has no CUDA, and this machine has {machine.gpus} GPUs, which it cannot use",
            "pip install --force-reinstall torch from PyPI's index",
        )
        return
    needed = CUDA_DRIVERS.get(int(cuda.partition(".")[0]))
    driver = _driver()
    if needed and driver and driver < needed:
        yield _here(
            "torch",
            f"{version} is for CUDA {cuda}, which needs a driver from {needed} on; this machine has {driver}",
            "upgrade the driver, or take a wheel for an older CUDA",
        )


def _driver() -> int | None:
    """NVIDIA's major version."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d{3,})\.\d+", file.read_text()) if file.is_file() else None
    return int(found[1]) if found else None


def _check_shared_memory(machine: Machine) -> Iterator[Problem]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    room = psutil.disk_usage(str(shared)).total
    store = min(int(machine.memory_bytes * OBJECT_STORE_SHARE), max(OBJECT_STORE_LEAST, int(0.95 * room)))
    if store > room:
        yield _here(
            "/dev/shm",
            f"it has {room} bytes, and Ray's object store takes {store}: objects go to the disk",
            f"in a container: --shm-size={-(-store // (1 << 30)) + 1}g",
        )


def check_port(document: Document | None, where: Where, host: str, port: int) -> Iterator[Problem]:
    """Whether a server could listen here, or would find Ray's own. `document`: what asks for it."""
    reason = cannot_listen(host, port)
    name = _listener(port) if reason else ""
    if reason and not name.startswith(RAY_PROCESSES):
        problem = f"{host}:{port} cannot be used: {reason}" + (f" ({name})" if name else "")
        fix = "stop what listens there, or choose another port"
        yield document.problem(where, problem, fix) if document else _here(".".join(map(str, where)), problem, fix)


def _listener(port: int) -> str:
    """The name of the process that listens on a port; empty where it cannot be told."""
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return psutil.Process(each.pid).name()
    except psutil.Error:
        pass
    return ""
