"""What is wrong with a cluster file, a recipe, a Serve config or this machine, found before money is spent: nothing is
started, no cloud is asked, and neither Ray nor torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.doctor.cluster import check_cluster
from heliostat.doctor.document import Document, Problem, read
from heliostat.doctor.machine import check_machine, check_port
from heliostat.doctor.nodes import Cluster
from heliostat.doctor.recipes import Configuration, build_recipe, check_recipe, in_document
from heliostat.doctor.serve import check_serve
from heliostat.hardware import this_machine
from heliostat.recipe import Deploy, Recipe, Refused, override

__all__ = ["Findings", "Problem", "examine", "examine_machine"]

CLUSTER_FIELDS = {"cluster_name", "provider", "available_node_types", "head_node_type", "auth", "file_mounts"}
SERVE_FIELDS = {"applications", "http_options", "grpc_options", "proxy_location"}
"""Fields by which a YAML file is known."""


@dataclass(frozen=True)
class Findings:
    problems: list[Problem]
    usd_per_hour: dict[str, dict[str, float]]
    """By cluster file: on demand, `idle` and with the `most` nodes. Without those whose prices are not known here."""


def examine(
    subjects: Mapping[str, Recipe | None],
    configuration: Configuration,
    overrides: dict[str, Any] | None = None,
    root: Path = Path(),
) -> Findings:
    """Check files, each by itself and against the others: recipes and Serve configs are meant for the clusters among
    them, or for this machine where there is none.

    `subjects`: by name; None: the name is a file's. `overrides`: of recipes, by dotted path. `root`: where import paths
    of Serve configs begin."""
    problems: list[Problem] = []
    clusters: list[Cluster] = []
    served: list[Document] = []
    recipes: list[tuple[Recipe, Document]] = []
    for name, recipe in subjects.items():
        if recipe is not None:
            recipes.append((recipe, Document(name, recipe.model_dump(mode="json"))))
            continue
        document = read(Path(name).expanduser(), name)
        if isinstance(document, Problem):
            problems.append(document)
            continue
        problems += document.repetitions()
        match kind_of(document):
            case "cluster":
                found, cluster = check_cluster(document)
                problems += found
                clusters += [cluster] if cluster else []
            case "serve":
                served.append(document)
            case "recipe":
                built = build_recipe(document)
                if isinstance(built, Recipe):
                    recipes.append((built, document))
                else:
                    problems += built
            case _:
                problems.append(document.problem((), "is neither a cluster file, a Serve config nor a recipe"))
    for recipe, document in recipes:
        try:
            recipe = override(recipe, overrides or {})
        except Refused as error:
            problems.append(in_document(document, error))
            continue
        problems += check_recipe(recipe, document, clusters, this_machine(), configuration)
    for document in served:
        found, ports = check_serve(document, clusters, root)
        problems += found
        for where, port in ports.items() if not clusters else ():
            host = document.get("http_options", "host") or "127.0.0.1"
            problems += check_port(document, where, str(host), port)
    prices = {cluster.file: price for cluster in clusters if (price := cluster.usd_per_hour())}
    return Findings(problems, prices)


def examine_machine() -> list[Problem]:
    """Of this machine, for jobs that start Ray here."""
    problems = list(check_machine(this_machine()))
    deploy = Deploy()
    return problems + list(check_port(None, ("deploy", "port"), deploy.host, deploy.port))


def kind_of(document: Document) -> str:
    if document.file.endswith(".json"):
        return "recipe"
    fields = set(document.data) if isinstance(document.data, dict) else set()
    if fields & SERVE_FIELDS:
        return "serve"
    return "cluster" if fields & CLUSTER_FIELDS else ""
