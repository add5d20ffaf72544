"""A recipe against the machines it is meant for: whether its workers can be placed, and what they hold fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from heliostat.doctor.document import Document, Problem
from heliostat.doctor.nodes import Cluster
from heliostat.hardware import Machine, gpu_memory_bytes
from heliostat.installed import check_engine, check_precision
from heliostat.placement import check_placement, logical_cpus
from heliostat.planner.memory import RankMemory, rank_memory
from heliostat.planner.shape import ModelShape, model_shape
from heliostat.recipe import RECIPE_VERSION, Recipe, Refused, override, refusals

Configuration = Callable[[Recipe], dict[str, Any] | None]
"""The content of a model's `config.json`, where it is known here."""


def build_recipe(document: Document) -> Recipe | list[Problem]:
    """The recipe that a JSON file holds, or all that is wrong with it."""
    if not isinstance(document.data, dict):
        return [document.problem((), "does not hold a JSON object")]
    version = document.data.get("version", RECIPE_VERSION)
    if isinstance(version, int) and version > RECIPE_VERSION:
        return [document.problem(("version",), "was written by a newer Heliostat", "upgrade this one")]
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        return [in_document(document, each) for each in refusals(error)]


def in_document(document: Document, error: Refused) -> Problem:
    """A refusal at the place of its field, which may itself have dots (`tune.space`)."""
    where: list[str | int] = []
    rest = error.field.split(".")
    value = document.data
    while rest:
        for length in range(len(rest), 0, -1):
            key: Any = ".".join(rest[:length])
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                key = int(key)
            elif not isinstance(value, dict) or key not in value:
                continue
            where.append(key)
            value, rest = value[key], rest[length:]
            break
        else:
            break
    if not where:  # a search range is called by the field it is of
        where = list(next((path for path in document.lines if path[-1:] == (error.field,)), ()))
    return Problem(document.file, document.line(tuple(where)), error.field, error.reason, error.suggestion)


def check_recipe(
    recipe: Recipe, document: Document, clusters: list[Cluster], machine: Machine, configuration: Configuration
) -> Iterator[Problem]:
    """`clusters`: those it may run on; none of them: this machine."""
    shape = None
    for check in (check_engine, check_precision):
        try:
            check(recipe.deploy)
        except Refused as error:
            yield in_document(document, error)
    try:
        config = configuration(recipe)
        shape = model_shape(config, recipe.task) if config else None
    except Refused as error:
        yield in_document(document, error)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass  # a configuration that its own family would not take: loading says what is wrong
    if not clusters:
        try:
            check_placement(recipe, logical_cpus(), machine.gpus, "this machine")
        except Refused as error:
            yield in_document(document, error)
        else:
            if shape:
                yield from _check_memory(document, recipe, shape, _here(recipe, machine))
    for cluster in clusters:
        unplaced = list(_check_placement_on(document, recipe, cluster))
        yield from unplaced
        yield from _check_port(document, recipe, cluster)
        if shape and not unplaced:
            yield from _check_memory(document, recipe, shape, _there(recipe, cluster))


# -- placement


def _uses_gpu(recipe: Recipe, gpus: float) -> bool:
    wanted, parallelism = recipe.parallelism.use_gpu, recipe.parallelism
    return gpus >= (parallelism.min_workers or parallelism.workers) if wanted is None else wanted


def _cluster_uses_gpu(recipe: Recipe, cluster: Cluster) -> bool:
    return _uses_gpu(recipe, sum(count * each.gpus for each, count in cluster.largest()))


def _capacity(recipe: Recipe, cluster: Cluster, use_gpu: bool) -> int:
    """Workers that fit on the cluster at its largest."""
    each_holds = {each.name: each.node.workers(recipe.parallelism.cpus_per_worker, use_gpu) for each in cluster.types}
    found = sum(each_holds[each.name] for each in cluster.types if each.is_head)
    left = cluster.max_workers
    for each in sorted(cluster.types, key=lambda each: -each_holds[each.name]):
        count = min(left, each.max_count - each.is_head)
        found, left = found + count * each_holds[each.name], left - count
    return found


def _check_placement_on(document: Document, recipe: Recipe, cluster: Cluster) -> Iterator[Problem]:
    if not cluster.types:  # a cluster of machines that are there already
        return
    parallelism = recipe.parallelism
    use_gpu = _cluster_uses_gpu(recipe, cluster)
    capacity = _capacity(recipe, cluster, use_gpu)
    each = f"{parallelism.cpus_per_worker:g} CPUs" + (" and a GPU" if use_gpu else "")
    asked = [(("parallelism", "workers"), parallelism.min_workers or parallelism.workers)]
    if recipe.tune.space:
        asked.append((("tune", "workers_per_trial"), recipe.tune.workers_per_trial))
    for where, workers in asked:
        if workers > capacity:
            yield document.problem(
                where,
                f"{workers} workers of {each} can never be placed: {cluster.file} has room for {capacity} at most",
                f"raise max_workers in {cluster.file}" + (f", or use ≤ {capacity}" if capacity else ""),
            )


def _check_port(document: Document, recipe: Recipe, cluster: Cluster) -> Iterator[Problem]:
    for flag, port in cluster.head_ports.items():
        if port == recipe.deploy.port:
            yield document.problem(
                ("deploy", "port"), f"{port} is the head's {flag} in {cluster.file}, too", "choose another"
            )


# -- memory


@dataclass(frozen=True)
class Room:
    """Where workers run, and how much memory each has."""

    bytes: int
    where: str
    on_gpu: bool

    def needed(self, memory: RankMemory) -> int:
        return memory.device_bytes if self.on_gpu else memory.held_bytes + memory.staged_bytes


def _here(recipe: Recipe, machine: Machine) -> list[Room]:
    if _uses_gpu(recipe, machine.gpus) and machine.gpus:
        memory = gpu_memory_bytes()
        return [Room(memory, "a GPU of this machine", True)] if memory else []
    workers = recipe.parallelism.workers
    return [Room(machine.memory_bytes // workers, "a worker's share of this machine", False)]


def _there(recipe: Recipe, cluster: Cluster) -> list[Room]:
    """Of each type of node that may get a worker."""
    use_gpu = _cluster_uses_gpu(recipe, cluster)
    rooms = []
    for each, count in cluster.largest():
        if not count or each.instance is None or not each.node.workers(recipe.parallelism.cpus_per_worker, use_gpu):
            continue
        if use_gpu:
            rooms.append(Room(each.instance.gpu_memory_bytes, f"a GPU of {each.name} ({each.instance_type})", True))
        else:
            rooms.append(Room(each.instance.memory_bytes, f"{each.name} ({each.instance_type})", False))
    return rooms


def _check_memory(document: Document, recipe: Recipe, shape: ModelShape, rooms: list[Room]) -> Iterator[Problem]:
    if not rooms:
        return
    room = min(rooms, key=lambda each: each.bytes)
    memory = rank_memory(shape, recipe)
    if room.needed(memory) <= room.bytes:
        return
    parts = {
        "parameters": memory.parameters_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer state": memory.optimizer_bytes,
        "moving average": memory.average_bytes,
        "parameters gathered by FSDP": memory.gathered_bytes,
        "the checkpoint's copy": 0 if room.on_gpu else memory.staged_bytes,
    }
    said = ", ".join(f"{_gib(value)} of {name}" for name, value in parts.items() if value)
    yield document.problem(
        ("parallelism",),
        f"a worker holds at least {_gib(room.needed(memory))} ({said}) before any activation, and {room.where} has "
        f"{_gib(room.bytes)}",
        _what_fits(recipe, shape, room),
    )


def _what_fits(recipe: Recipe, shape: ModelShape, room: Room) -> str:
    """The first of the usual ways that is enough."""
    parallelism = recipe.parallelism
    others = parallelism.shards // parallelism.fsdp
    tries: list[dict[str, Any]] = [
        {"parallelism.fsdp": fsdp}
        for fsdp in range(parallelism.fsdp + 1, parallelism.workers // others + 1)
        if parallelism.workers % (fsdp * others) == 0
    ]
    if room.on_gpu and parallelism.fsdp > 1:
        tries.append({"parallelism.cpu_offload": True})
    if not recipe.model.lora.rank:
        tries.append({"model.lora.rank": 8})
    for fields in tries:
        try:
            changed = override(recipe, fields)
        except Refused:
            continue
        if room.needed(rank_memory(shape, changed)) <= room.bytes:
            return " ".join(f"--{name} {json.dumps(value)}" for name, value in fields.items())
    return "take more workers with parallelism.fsdp, larger GPUs, or a smaller model"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
