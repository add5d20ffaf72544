"""A config file for `serve deploy`: fields that Serve does not know, settings that contradict each other, code and
bundles that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heliostat import card, installed
from heliostat.doctor.document import Document, Problem, Where
from heliostat.doctor.nodes import Cluster
from heliostat.recipe import Refused, nearest

SCHEMAS = {
    (): "ServeDeploySchema",
    ("http_options",): "HTTPOptionsSchema",
    ("grpc_options",): "gRPCOptionsSchema",
    ("applications", "*"): "ServeApplicationSchema",
    ("applications", "*", "deployments", "*"): "DeploymentSchema",
    ("applications", "*", "deployments", "*", "ray_actor_options"): "RayActorOptionsSchema",
    ("applications", "*", "deployments", "*", "autoscaling_config"): "AutoscalingConfig",
}
"""Ray's class for each mapping of the file."""
PORT, GRPC_PORT = 8000, 9000
"""Serve's, where the file names none."""
ARGUMENTS = "ARGUMENTS"
"""The constant in which a module of ours lists what its `build` takes."""


def check_serve(document: Document, clusters: list[Cluster], root: Path) -> Iterator[Problem]:
    """`root`: the folder from which import paths are found."""
    yield from _unknown_fields(document)
    yield from _check_ports(document, clusters)
    names: dict[Any, Where] = {}
    routes: dict[Any, Where] = {}
    applications = document.get("applications")
    if not isinstance(applications, list) or not applications:
        yield document.problem(("applications",), "no application is listed", "add one")
        return
    for index in range(len(applications)):
        where: Where = ("applications", index)
        for field, seen, default in (("name", names, "default"), ("route_prefix", routes, "/")):
            value = document.get(*where, field) if field in (document.get(*where) or {}) else default
            if value is not None and value in seen:
                yield document.problem((*where, field), f"two applications have {field} {value!r}", "change one")
            seen[value] = where
        yield from _check_code(document, where, root)
        deployments = document.get(*where, "deployments") or ()
        for number in range(len(deployments)):
            yield from _check_deployment(document, (*where, "deployments", number), clusters)


def _unknown_fields(document: Document) -> Iterator[Problem]:
    schemas = _fields_of_schemas()
    for pattern, name in SCHEMAS.items():
        for where in _matching(document.data, pattern):
            value = document.get(*where)
            if not isinstance(value, dict):
                yield document.problem(where, "is not a mapping", "")
            elif name in schemas:
                yield from document.unknown(where, schemas[name])


def _fields_of_schemas() -> dict[str, list[str]]:
    """Of Serve's own classes; none where Ray is not installed."""
    folder = installed.folder("ray")
    if folder is None:
        return {}
    found = installed.classes(folder / "serve" / "schema.py") | installed.classes(folder / "serve" / "config.py")
    return {name: [field for field in body if field != "model_config"] for name, body in found.items()}


def _matching(value: Any, pattern: tuple[str, ...]) -> Iterator[Where]:
    """The paths in `value` that fit the pattern; `*`: every item of a list."""
    if not pattern:
        yield ()
        return
    first, *rest = pattern
    inner: list[tuple[str | int, Any]]
    if first == "*":
        inner = list(enumerate(value)) if isinstance(value, list) else []
    else:
        inner = [(first, value[first])] if isinstance(value, dict) and value.get(first) is not None else []
    for key, each in inner:
        for where in _matching(each, tuple(rest)):
            yield (key, *where)


def _asked_ports(document: Document) -> dict[Where, Any]:
    asked: dict[Where, Any] = {("http_options", "port"): document.get("http_options", "port") or PORT}
    if document.get("grpc_options"):
        asked["grpc_options", "port"] = document.get("grpc_options", "port") or GRPC_PORT
    return asked


def ports(document: Document) -> dict[Where, int]:
    """Those that Serve would listen on."""
    return {where: port for where, port in _asked_ports(document).items() if _is_port(port)}


def _is_port(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 65536


def _check_ports(document: Document, clusters: list[Cluster]) -> Iterator[Problem]:
    taken: dict[int, str] = {}
    for where, port in _asked_ports(document).items():
        if not _is_port(port):
            yield document.problem(where, f"{port!r} is not a port", "use 1 to 65535")
            continue
        if port in taken:
            yield document.problem(where, f"{port} is the port of {taken[port]}, too", "give one of them another")
        taken[port] = str(where[0])
        for cluster in clusters:
            for flag, other in cluster.head_ports.items():
                if other == port:
                    yield document.problem(
                        where, f"{port} is the head's {flag} in {cluster.file}, too", "give one of them another"
                    )


def _check_code(document: Document, where: Where, root: Path) -> Iterator[Problem]:
    path = document.get(*where, "import_path")
    if path is None:
        yield document.problem((*where, "import_path"), "is missing", "write module:application")
        return
    module, colon, name = str(path).rpartition(":" if ":" in str(path) else ".")
    if not colon or not module or not name:
        yield document.problem((*where, "import_path"), f"{path!r} names no object", "write module:application")
        return
    file = _file_of(module, root)
    if file is None:
        yield document.problem(
            (*where, "import_path"),
            f"there is no module {module!r}",
            nearest(module, _modules_beside(module, root)) or "start `serve deploy` in the folder that holds it",
        )
        return
    body = installed.module(file).body
    assigned = installed.assigned(body)
    names = [*assigned, *(each.name for each in body if hasattr(each, "name"))]
    if name not in names:
        yield document.problem((*where, "import_path"), f"{file} has no {name!r}", nearest(name, names))
    elif known := installed.literals(assigned).get(ARGUMENTS):
        yield from _check_arguments(document, (*where, "args"), list(known))


def _file_of(module: str, root: Path) -> Path | None:
    """The source of a module in `root` or among what is installed; None where there is none."""
    package = installed.folder(module.partition(".")[0])
    path = Path(*module.split("."))
    for base in (root, package.parent) if package else (root,):
        for file in (base / path.with_suffix(".py"), base / path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _modules_beside(module: str, root: Path) -> list[str]:
    folder = (root / Path(*module.split("."))).parent
    return [".".join(each.relative_to(root).with_suffix("").parts) for each in folder.glob("*.py")]


def _check_arguments(document: Document, where: Where, known: list[str]) -> Iterator[Problem]:
    given = document.get(*where) or {}
    for name in given:
        if name not in known:
            yield document.problem((*where, name), f"the application takes no argument {name!r}", nearest(name, known))
    if "bundle" not in given:
        yield document.problem((*where, "bundle"), "no bundle is named", "name the folder that training wrote")
        return
    path = Path(str(given["bundle"])).expanduser()
    try:
        card.verify(path, card.read(path))
    except Refused as error:
        yield document.problem((*where, "bundle"), error.reason, error.suggestion)


def _check_deployment(document: Document, where: Where, clusters: list[Cluster]) -> Iterator[Problem]:
    scaling: dict[str, Any] = document.get(*where, "autoscaling_config") or {}
    replicas = document.get(*where, "num_replicas")
    if scaling and isinstance(replicas, int):
        yield document.problem(
            (*where, "num_replicas"), f"{replicas} replicas are asked for, and autoscaling too", "leave one of them out"
        )
    elif not isinstance(replicas, int | None) and replicas != "auto":
        yield document.problem((*where, "num_replicas"), f"{replicas!r} is neither a number nor auto", "write a number")
    least, most = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
    first = scaling.get("initial_replicas")
    if least > most:
        yield document.problem(
            (*where, "autoscaling_config", "min_replicas"), f"{least} is above max_replicas={most}", f"use ≤ {most}"
        )
    elif first is not None and not least <= first <= most:
        yield document.problem(
            (*where, "autoscaling_config", "initial_replicas"),
            f"{first} is not between min_replicas={least} and max_replicas={most}",
            "",
        )
    options: dict[str, Any] = document.get(*where, "ray_actor_options") or {}
    cpus, gpus = options.get("num_cpus", 1) or 0, options.get("num_gpus", 0) or 0
    for cluster in clusters:
        if cluster.types and not any(each.node.cpus >= cpus and each.node.gpus >= gpus for each in cluster.types):
            yield document.problem(
                (*where, "ray_actor_options"),
                f"a replica needs {cpus:g} CPUs and {gpus:g} GPUs, and no node of {cluster.file} has both",
                "ask for less, or take a larger instance",
            )
