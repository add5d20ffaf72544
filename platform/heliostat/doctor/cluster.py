"""A cluster file for `ray up`: what Ray's own schema refuses, and what would only fail once the nodes are paid for."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from heliostat import installed
from heliostat.doctor.document import Document, Problem, Where, against_schema
from heliostat.doctor.nodes import Cluster, NodeType, node_types
from heliostat.doctor.software import check_software
from heliostat.recipe import nearest

RESOURCES = ["CPU", "GPU", "TPU", "memory", "object_store_memory"]
"""Names that Ray gives a meaning."""
HEAD_PORTS = {
    "--port": 6379,
    "--dashboard-port": 8265,
    "--ray-client-server-port": 10001,
    "--dashboard-agent-listen-port": 52365,
}
"""What the head listens on unless `ray start` is told otherwise (its --help)."""
WORKER_PORTS = {"--min-worker-port": 10002, "--max-worker-port": 19999}
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
TOKEN_MODE, TOKEN_FILE = "RAY_AUTH_MODE=token", "~/.ray/auth_token"
DOCKER_SHM_BYTES = 64 << 20
"""What docker gives a container without --shm-size."""
UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
"""Docker's."""


def schema() -> dict[str, Any] | None:
    """Ray's own; None where Ray is not installed."""
    folder = installed.folder("ray")
    path = folder / "autoscaler" / "ray-schema.json" if folder else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def check_cluster(document: Document) -> tuple[list[Problem], Cluster | None]:
    """What is wrong, and the cluster as far as it can be told; None where the file is malformed."""
    problems, malformed = against_schema(document, schema() or {})
    if malformed:
        return problems, None
    types = node_types(document)
    ports = _ports(_start(document, "head_start_ray_commands")[1])
    cluster = Cluster(
        document.file,
        types,
        document.get("max_workers") if document.get("max_workers") is not None else 2,
        str(document.get("provider", "region") or ""),
        ports,
    )
    problems += _check_types(document, types)
    problems += _check_ports(document, ports)
    problems += _check_token(document)
    problems += _check_mounts(document)
    problems += _check_object_store(document, types)
    problems += check_software(document, types)
    return problems, cluster


def _check_types(document: Document, types: list[NodeType]) -> Iterator[Problem]:
    bodies: dict[str, Any] = document.get("available_node_types") or {}
    head = document.get("head_node_type")
    if bodies and head not in bodies:
        yield document.problem(
            ("head_node_type",),
            "is missing" if head is None else f"there is no node type {head!r}",
            nearest(str(head), list(bodies)) or f"one of {', '.join(bodies)}",
        )
    limit = document.get("max_workers")
    least = sum(body.get("min_workers", 0) for body in bodies.values())
    if limit is not None and least > limit:
        yield document.problem(
            ("max_workers",), f"{limit} is below the {least} that min_workers of all types add up to", f"use ≥ {least}"
        )
    for each in types:
        body, where = bodies[each.name], ("available_node_types", each.name)
        if body.get("min_workers", 0) > body.get("max_workers", float("inf")):
            yield document.problem(
                (*where, "min_workers"), f"{body['min_workers']} is above max_workers={body['max_workers']}", "lower it"
            )
        for name in body["resources"]:
            right = {known.lower(): known for known in RESOURCES}.get(name.lower().rstrip("s"))
            if right and name != right:
                yield document.problem(
                    (*where, "resources", name), f"{name!r} is a resource that nothing asks for", f"write {right}"
                )
        if each.instance and each.gpus > each.instance.gpus:
            yield document.problem(
                (*where, "resources", "GPU"),
                f"{each.gpus} GPUs are declared, {each.instance_type} has {each.instance.gpus}",
                f"write {each.instance.gpus}, or take a larger instance",
            )


def _start_commands(document: Document) -> Iterator[tuple[Where, list[str]]]:
    """The `ray start` commands, as words."""
    for field in START_COMMANDS:
        where, words = _start(document, field)
        if words:
            yield where, words


def _start(document: Document, field: str) -> tuple[Where, list[str]]:
    for index, command in enumerate(document.get(field) or ()):
        words = _words(command)
        if any(Path(word).name == "ray" and after == "start" for word, after in pairwise(words)):
            return (field, index), words
    return (field,), []


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quote: the shell will say so
        return command.split()


def _flag(words: list[str], name: str) -> str | None:
    """What a command gives for a flag, as the next word or behind `=`."""
    for index, word in enumerate(words):
        if word == name:
            return next(iter(words[index + 1 :]), None)
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def _ports(words: list[str]) -> dict[str, int]:
    found = {name: _number(words, name, usual) for name, usual in HEAD_PORTS.items()}
    return {name: port for name, port in found.items() if port}  # 0: any that is free


def _number(words: list[str], name: str, otherwise: int) -> int:
    """Of a flag; `otherwise` without it, or where only the shell knows."""
    value = _flag(words, name)
    return int(value) if value and value.isdigit() else otherwise


def _check_ports(document: Document, ports: dict[str, int]) -> Iterator[Problem]:
    where, words = _start(document, "head_start_ray_commands")
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if port in taken:
            yield document.problem(where, f"{name} and {taken[port]} are both port {port}", f"give {name} another port")
        taken[port] = name
    low, high = (_number(words, name, usual) for name, usual in WORKER_PORTS.items())
    for name, port in ports.items():
        if low <= port <= high:
            yield document.problem(
                where, f"{name}={port} lies among the ports of workers, {low} to {high}", f"use one below {low}"
            )


def _check_token(document: Document) -> Iterator[Problem]:
    """A head asks for a token where it is told to, or finds one; workers and clients send theirs where told to."""
    mounts: dict[str, str] = document.get("file_mounts") or {}
    everywhere = TOKEN_MODE in str(document.get("setup_commands"))  # in the shell's profile
    (head, head_words), (worker, worker_words) = (_start(document, field) for field in START_COMMANDS)
    told = everywhere or TOKEN_MODE in head_words
    if not told and TOKEN_FILE not in mounts:
        yield document.problem(
            head,
            "Ray starts without its token: whoever reaches the head's ports can run code on it",
            f'put {TOKEN_MODE} in front of `ray start`, and add "{TOKEN_FILE}": "{TOKEN_FILE}" to file_mounts',
        )
        return
    if TOKEN_FILE not in mounts:
        problem = "Ray is to start with a token, and none is sent to the nodes"
        fix = f'add "{TOKEN_FILE}": "{TOKEN_FILE}" to file_mounts'
        yield Problem(document.file, document.line(head), "file_mounts", problem, fix)
    elif not Path(str(mounts[TOKEN_FILE])).expanduser().is_file():
        yield document.problem(
            ("file_mounts", TOKEN_FILE), f"{mounts[TOKEN_FILE]} does not exist here", "ray get-auth-token --generate"
        )
    if not everywhere and TOKEN_MODE not in worker_words:
        yield document.problem(
            worker,
            "a worker would not send the token that the head asks for, and could not join",
            f"put {TOKEN_MODE} in front of `ray start`",
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        yield document.problem(
            head, "the cluster will ask for the token, and `ray job` in this shell would not send it",
            f"export {TOKEN_MODE}",
        )  # fmt: skip


def _check_mounts(document: Document) -> Iterator[Problem]:
    for remote, local in (document.get("file_mounts") or {}).items():
        if remote != TOKEN_FILE and not Path(str(local)).expanduser().exists():
            yield document.problem(("file_mounts", remote), f"{local} does not exist here", "check the path")


def _check_object_store(document: Document, types: list[NodeType]) -> Iterator[Problem]:
    """Ray keeps objects in /dev/shm, and on the disk where they do not fit."""
    detection = ("docker", "disable_shm_size_detection")
    sizes = {role: _docker_shm(document, role) for role in ("head", "worker")}
    for where, words in _start_commands(document):
        heads = where[0] == "head_start_ray_commands"
        shm = sizes["head" if heads else "worker"]
        store = _number(words, "--object-store-memory", 0)
        if shm is not None and store > shm:
            yield document.problem(
                where,
                f"--object-store-memory={store} is more than the container's /dev/shm of {shm}: objects would go to "
                "the disk",
                f"add --shm-size={-(-store // UNITS['g']) + 1}g to docker.run_options",
            )
        for each in types:
            if each.is_head == heads and each.instance and store > each.instance.memory_bytes:
                yield document.problem(
                    where,
                    f"--object-store-memory={store} is more than the memory of {each.instance_type}, "
                    f"{each.instance.memory_bytes}",
                    "leave it out: Ray takes 30% of the memory",
                )
    if document.get(*detection) and DOCKER_SHM_BYTES in sizes.values():
        yield document.problem(
            detection, "the container's /dev/shm is docker's 64 MiB: objects would go to the disk",
            "leave disable_shm_size_detection out, or add --shm-size to docker.run_options",
        )  # fmt: skip


def _docker_shm(document: Document, role: str) -> int | None:
    """The size of a container's /dev/shm, where the file decides it."""
    found = None
    for field in ("run_options", f"{role}_run_options"):
        for option in document.get("docker", field) or ():
            if said := re.search(r"--shm-size[= ]['\"]?(\d+(?:\.\d+)?)([bkmgt]?)b?\b", str(option), re.IGNORECASE):
                found = int(float(said[1]) * UNITS[said[2].lower()])  # the last counts
    if found is None and document.get("docker", "disable_shm_size_detection"):
        return DOCKER_SHM_BYTES
    return found
