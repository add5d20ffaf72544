"""Versions of a model: MLflow's registered model of the recipe's name, its bundles in the storage folder.

A version's bundle is a copy, named by what it holds, so that runs may be cleaned away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.recipe import Recipe, Refused
from heliostat.tracking import client, in_database, locked, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION = "champion"
DIGEST_TAG = "heliostat.digest"
PROMOTED_TAG = "promoted"
"""Whether a version was ever promoted; the alias says which one is champion now."""


@dataclass(frozen=True)
class Version:
    """A registered bundle; `path` is the registry's copy of it."""

    name: str
    version: int
    path: Path
    metrics: dict[str, Any]
    tags: dict[str, str]


def register(recipe: Recipe, bundle: Bundle, run_id: str | None, tags: Mapping[str, str] = {}) -> Version:
    """Make a version of a bundle, or find the one that holds the same files. `run_id`: MLflow's.

    Raises Refused where the bundle's files are not its card's, tracking.Away where the server is away.
    """
    folder = recipe.storage_path / "registry" / recipe.name
    # Two who register the same files at once would both find no version of them.
    with client(recipe) as mlflow, locked(folder / ".lock"):
        found = [
            version
            for version in mlflow.search_model_versions(f"tag.`{DIGEST_TAG}` = '{bundle.digest}'")
            if version.name == recipe.name
        ]
        path = _copy(bundle, _path(recipe, bundle.digest))
        if found:
            return _version(recipe, min(found, key=lambda version: int(version.version)))
        if _model(mlflow, recipe) is None:
            mlflow.create_registered_model(recipe.name)
        made = mlflow.create_model_version(
            recipe.name,
            _source(recipe, path),
            run_id,
            tags={PROMOTED_TAG: "false", **tags, DIGEST_TAG: bundle.digest},
        )
        return _version(recipe, made)


def promote(recipe: Recipe, version: Version | int) -> Version:
    """Make a version the champion. Raises Refused where there is none of that number."""
    number = version.version if isinstance(version, Version) else version
    get(recipe, number)
    with client(recipe) as mlflow:
        mlflow.set_model_version_tag(recipe.name, str(number), PROMOTED_TAG, "true")
        mlflow.set_registered_model_alias(recipe.name, CHAMPION, str(number))
    return get(recipe, number)


def tag(recipe: Recipe, version: Version, tags: Mapping[str, str]) -> None:
    """Write down what became of a version."""
    with client(recipe) as mlflow:
        for name, value in tags.items():
            mlflow.set_model_version_tag(recipe.name, str(version.version), name, value)


def champion(recipe: Recipe) -> Version | None:
    """The version that is served, None before the first promotion."""
    with client(recipe) as mlflow:
        model = _model(mlflow, recipe)
        if model is None or CHAMPION not in model.aliases:
            return None
    return get(recipe, CHAMPION)


def get(recipe: Recipe, alias_or_version: str | int) -> Version:
    """A version by its number or alias. Raises Refused naming those that exist."""
    wanted = str(alias_or_version)
    with client(recipe) as mlflow:
        model = _model(mlflow, recipe)
        if model is None:
            raise Refused("version", f"no version of {recipe.name} is registered", "train and register one")
        versions = {int(each.version): each for each in mlflow.search_model_versions(f"name = {quoted(recipe.name)}")}
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
    number = int(wanted) if wanted.isdecimal() else aliases.get(wanted)
    if number not in versions:
        there = ", ".join([*map(str, sorted(versions)), *sorted(aliases)]) or "none"
        kind = "version" if wanted.isdecimal() else "alias"
        raise Refused("version", f"{recipe.name} has no {kind} {wanted!r}", f"there are: {there}")
    return _version(recipe, versions[number])


def _model(mlflow: MlflowClient, recipe: Recipe) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_registered_model(recipe.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _version(recipe: Recipe, found: ModelVersion) -> Version:
    """Raises Refused where this storage does not hold the version's bundle."""
    path = _path(recipe, found.tags.get(DIGEST_TAG, "unknown"))  # unknown: registered by other means
    if not path.is_dir():
        raise Refused(
            "version",
            f"the bundle of {found.name} version {found.version} is not at {path}",
            f"it was registered as {found.source}; use the storage that it was trained in",
        )
    card = bundles.read(path, verify_files=False).card
    return Version(found.name, int(found.version), path, card["metrics"], dict(found.tags))


def _path(recipe: Recipe, digest: str) -> Path:
    """Found by digest, not by what MLflow recorded: the storage may be mounted elsewhere here."""
    return recipe.storage_path / "registry" / recipe.name / digest[:12]


def _source(recipe: Recipe, path: Path) -> str:
    """What MLflow records as the version's place. Its servers refuse a local path outside a run's artifacts,
    and any with links in it, whatever the scheme; so they are told the place within the storage."""
    if in_database(recipe):
        return str(path)
    return f"heliostat:/{path.relative_to(recipe.storage_path)}"


def _copy(bundle: Bundle, path: Path) -> Path:
    """Copy a bundle beside `path`, check the copy, rename it."""
    if path.is_dir():
        return path
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(bundle.path, beside)
        bundles.verify(Bundle(beside, bundle.card))
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return path
