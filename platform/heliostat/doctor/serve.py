"""A config file for `serve deploy`: fields that Serve does not know, settings that contradict each other, code and
bundles that are not there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heliostat import card, installed
from heliostat.doctor.document import Document, Problem, Where, against_schema
from heliostat.doctor.nodes import Cluster
from heliostat.recipe import Refused, nearest

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": ["number", "null"]}, {"type": ["integer", "null"]}
PORT_NUMBER = {"type": "integer", "minimum": 1, "maximum": 65535}
PORT, GRPC_PORT = 8000, 9000
"""Serve's, where the file names none."""
ARGUMENTS = "ARGUMENTS"
"""The constant in which a module of ours lists what its `build` takes."""


def check_serve(document: Document, clusters: list[Cluster], root: Path) -> tuple[list[Problem], dict[Where, int]]:
    """What is wrong, and the ports that Serve would listen on. `root`: the folder from which import paths are found."""
    problems, malformed = against_schema(document, schema())
    if malformed:
        return problems, {}
    ports = _ports(document)
    problems += _check_ports(document, ports, clusters)
    names: set[str] = set()
    routes: set[str | None] = set()
    for index, application in enumerate(document.data["applications"]):
        where: Where = ("applications", index)
        for field, seen, usual in (("name", names, "default"), ("route_prefix", routes, "/")):
            value = application.get(field, usual)
            if value is not None and value in seen:
                problems.append(
                    document.problem((*where, field), f"two applications have {field} {value!r}", "change one")
                )
            seen.add(value)
        problems += _check_code(document, where, root)
        for number in range(len(application.get("deployments") or ())):
            problems += _check_deployment(document, (*where, "deployments", number), clusters)
    return problems, ports


def schema() -> dict[str, Any]:
    """The fields of Serve's own classes, and the types of those that are looked at here."""
    found = _fields_of_classes()

    def mapping(kind: str, needed: tuple[str, ...] = (), /, **types: Any) -> dict[str, Any]:
        known: dict[str, Any] = {field: {} for field in found.get(kind, ())}
        return {
            "type": "object" if needed else ["object", "null"],
            "required": list(needed),
            "properties": known | types,
            "additionalProperties": not known,  # without Ray, any
        }

    scaling = mapping("AutoscalingConfig", min_replicas=WHOLE, max_replicas=WHOLE, initial_replicas=WHOLE)
    actor = mapping("RayActorOptionsSchema", num_cpus=NUMBER, num_gpus=NUMBER)
    deployment = mapping("DeploymentSchema", ("name",), name=TEXT, autoscaling_config=scaling, ray_actor_options=actor)
    application = mapping(
        "ServeApplicationSchema",
        ("import_path",),
        name=TEXT,
        route_prefix={"type": ["string", "null"]},
        import_path=TEXT,
        args={"type": "object"},
        deployments={"type": "array", "items": deployment},
    )
    return mapping(
        "ServeDeploySchema",
        ("applications",),
        http_options=mapping("HTTPOptionsSchema", port=PORT_NUMBER, host=TEXT),
        grpc_options=mapping("gRPCOptionsSchema", port=PORT_NUMBER),
        applications={"type": "array", "minItems": 1, "items": application},
    )


def _fields_of_classes() -> dict[str, list[str]]:
    """None where Ray is not installed."""
    folder = installed.folder("ray")
    if folder is None:
        return {}
    found = installed.classes(folder / "serve" / "schema.py") | installed.classes(folder / "serve" / "config.py")
    return {name: [field for field in body if field != "model_config"] for name, body in found.items()}


def _ports(document: Document) -> dict[Where, int]:
    found: dict[Where, int] = {("http_options", "port"): document.get("http_options", "port") or PORT}
    if document.get("grpc_options"):
        found["grpc_options", "port"] = document.get("grpc_options", "port") or GRPC_PORT
    return found


def _check_ports(document: Document, ports: dict[Where, int], clusters: list[Cluster]) -> Iterator[Problem]:
    taken: dict[int, str] = {}
    for where, port in ports.items():
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
    path: str = document.get(*where, "import_path")
    module, colon, name = path.rpartition(":" if ":" in path else ".")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
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
    try:
        body = installed.module(file).body
    except SyntaxError as error:
        problem = f"{file} is not Python: {error.msg} in line {error.lineno}"
        yield document.problem((*where, "import_path"), problem, "correct it")
        return
    assigned = installed.assigned(body)
    names = [*assigned, *(each.name for each in body if hasattr(each, "name"))]
    if name not in names:
        yield document.problem((*where, "import_path"), f"{file} has no {name!r}", nearest(name, names))
    elif known := _arguments(module, file, root):
        yield from _check_arguments(document, (*where, "args"), known)


def _arguments(module: str, file: Path, root: Path) -> list[str]:
    """What the module says that its applications take, or one beside it from which it imports; nothing where neither
    does."""
    body = installed.module(file).body
    package = module.partition(".")[0]
    imported = [each.module for each in body if isinstance(each, ast.ImportFrom) and not each.level and each.module]
    files = [file, *(_file_of(each, root) for each in imported if each.partition(".")[0] == package)]
    for each in files:
        if each and (known := installed.literals(installed.assigned(installed.module(each).body)).get(ARGUMENTS)):
            return list(known)
    return []


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
    least, most = (1 if scaling.get(name) is None else scaling[name] for name in ("min_replicas", "max_replicas"))
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
