"""The Recipe: one frozen tree that says everything about a run.

Every default lives in its sections and nowhere else. A recipe is composed in Python (`pipelines/recipes`), overridden
on the command line, saved as JSON beside every result, and loadable again.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import ErrorDetails

from heliostat.recipe.base import Refused, Section, Seed
from heliostat.recipe.searching import Choice, Integers, LogUniform, SearchRange, Tune, Uniform
from heliostat.recipe.sections import (
    SHARD_AXES,
    SHARD_OPTIONS,
    Checkpoint,
    Data,
    Energy,
    Lora,
    MixtureSource,
    Model,
    Optimizer,
    Parallelism,
    PipelineSchedule,
    Record,
    Recovery,
    Schedule,
    Tracking,
    Training,
)
from heliostat.recipe.serving import Deploy, Drift, Gate, GgufDtype, Rollout, SamplingDefaults, check_precision

__all__ = [
    "OPEN",
    "RECIPE_VERSION",
    "SHARD_AXES",
    "SHARD_OPTIONS",
    "TRAINED_TOKENIZER",
    "Choice",
    "Data",
    "Deploy",
    "Drift",
    "Energy",
    "GgufDtype",
    "Integers",
    "LogUniform",
    "Lora",
    "MixtureSource",
    "Model",
    "Optimizer",
    "Parallelism",
    "PipelineSchedule",
    "Recipe",
    "Record",
    "Recovery",
    "Refused",
    "Rollout",
    "SamplingDefaults",
    "Schedule",
    "SearchRange",
    "Training",
    "Uniform",
    "build",
    "check_precision",
    "field_paths",
    "load",
    "load_object",
    "nearest",
    "override",
    "refusal",
    "refusals",
    "sections",
    "write_atomically",
]

RECIPE_VERSION: Literal[1] = 1
TRAINED_TOKENIZER = "train:"
"""What `model.tokenizer` begins with where one is trained."""


OPEN = "model.config."
"""Below this, paths go on with names that are not the recipe's own, but transformers'."""


class Recipe(Section):
    version: Literal[1] = RECIPE_VERSION
    name: str
    task: str
    """`text_classification`, `image_classification`, `tabular_classification`, `language_model`, `text_embedding`, or
    `module:Class` of your own."""
    seed: Seed = 0
    storage: str = "~/heliostat"
    """Where data, runs, the registry and results live: a folder that every node sees."""
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    parallelism: Parallelism = Parallelism()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    tune: Tune = Tune()
    gate: Gate = Gate()
    deploy: Deploy = Deploy()
    rollout: Rollout = Rollout()
    drift: Drift = Drift()
    energy: Energy = Energy()
    tracking: Tracking = Tracking()
    record: Record = Record()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.name or self.name != Path(self.name).name or self.name.startswith("."):
            raise ValueError(f"name={self.name!r} must be usable as a folder's name")
        if self.model.lora.rank and self.model.freeze_layers:
            raise Refused(
                "model.freeze_layers",
                "with adapters (model.lora.rank) the weights of all blocks are frozen",
                "set one of the two to 0",
            )
        check_precision(self.deploy.precision, self.task)
        parallel, training = self.parallelism, self.training
        rows = training.micro_batch_size * parallel.data_parallel
        if parallel.pipeline > 1 and training.global_batch_size < rows * parallel.pipeline:
            raise Refused(
                "training.global_batch_size",
                f"{training.global_batch_size} rows are fewer micro-batches than pipeline stages "
                f"({rows} rows a micro-batch over all workers, {parallel.pipeline} stages)",
                f"use ≥ {rows * parallel.pipeline}, or a smaller training.micro_batch_size",
            )
        if parallel.pipeline > 1 and parallel.schedule == "interleaved":
            self._check_rounds(rows)
        if parallel.pipeline > 1 and parallel.schedule == "zbv" and training.compile:
            raise Refused(
                "training.compile",
                "zbv runs the backward pass in two parts, and a compiled block has one",
                "set it false, or use parallelism.schedule=interleaved",
            )
        if parallel.loss_parallel and training.label_smoothing:
            raise Refused(
                "training.label_smoothing",
                "PyTorch computes no smoothed loss from logits that are split over the vocabulary",
                "set it 0, or parallelism.loss_parallel false",
            )
        for path, spec in self.tune.space.items():
            values = spec.values if isinstance(spec, Choice) else [spec.low, spec.high]
            together = self._together(path, spec)
            for value in values:
                override(self, together | {path: value}, check_tune=False)
        return self

    def _together(self, path: str, spec: SearchRange) -> dict[str, Any]:
        """What goes with any value of a path of the space: its conditions are met, and what depends on it is out of the
        way."""
        defaults = {
            other: sections(Recipe)[other.rpartition(".")[0]].model_fields[other.rpartition(".")[2]].get_default()
            for other, each in self.tune.space.items()
            if path in each.when and "." in other and not other.startswith(OPEN)
        }
        return defaults | {condition: allowed[0] for condition, allowed in spec.when.items()}

    def _check_rounds(self, rows: int) -> None:
        """`rows`: those of one micro-batch over all workers. Interleaving goes through the stages in rounds of about
        as many micro-batches as there are pipeline ranks, and of equally many."""
        ranks, given = self.parallelism.pipeline, self.training.global_batch_size
        count = -(-given // rows)
        if count % max(1, count // ranks):
            lower = count // ranks * ranks
            raise Refused(
                "training.global_batch_size",
                f"{given} rows are {count} micro-batches ({rows} rows each over all workers), which "
                f"{count // ranks} rounds of an interleaved pipeline over {ranks} ranks cannot share evenly",
                f"use {rows * lower} or {rows * (lower + ranks)}",
            )

    @property
    def storage_path(self) -> Path:
        if "://" in self.storage and not self.storage.startswith("file://"):
            raise Refused(
                "storage",
                f"{self.storage} is an object store, which runs cannot be written to yet",
                "mount it, or use a folder that every node sees",
            )
        return Path(self.storage.removeprefix("file://")).expanduser().absolute()

    @property
    def record_storage(self) -> str:
        """Where records are shipped to; empty: nowhere."""
        checkpoints = self.checkpoint.storage
        return self.record.storage or (checkpoints if "://" in checkpoints else "")

    def digest(self, *sections: str) -> str:
        """A short hash of the named sections (or of all): equal exactly when they are equal."""
        tree = self.model_dump(mode="json")
        picked = {name: tree[name] for name in sections} if sections else tree
        return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def load(path: Path) -> Recipe:
    """Read a recipe that was saved as JSON. Raises Refused with the field that is wrong."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused("recipe", f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused("recipe", f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise Refused("recipe", f"{path} does not hold a JSON object")
    version = tree.get("version", RECIPE_VERSION)
    if isinstance(version, int | float) and version > RECIPE_VERSION:
        raise Refused("version", f"{path} was written by a newer Heliostat", "upgrade this one")
    return build(tree)


def build(tree: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise refusal(error) from error


def override(recipe: Recipe, values: dict[str, Any], check_tune: bool = True) -> Recipe:
    """The recipe with fields replaced by dotted path: `override(r, {"optimizer.lr": 3e-4})`. `model.config.FIELD` lays
    one more field over the model's configuration."""
    tree = recipe.model_dump(mode="json")
    if not check_tune:
        tree["tune"]["space"] = {}
    for path, value in values.items():
        if path not in field_paths() and not path.startswith(OPEN):
            raise Refused(path, "no such field in a recipe", nearest(path))
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[leaf] = value
    return build(tree)


def sections(section: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """Dotted paths of the sections within one, at any depth."""
    found: dict[str, type[BaseModel]] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= {f"{prefix}{name}": info.annotation} | sections(info.annotation, f"{prefix}{name}.")
    return found


def field_paths(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted paths of all leaves, in order of declaration."""
    return list(_walk(section, prefix))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nearest(path: str, among: list[str] | None = None) -> str:
    """`did you mean …` for a mistyped name, or an empty string."""
    names = field_paths() if among is None else among
    match = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    if not match:  # the leaf's name alone: `--lr` for `--optimizer.lr`
        match = [name for name in names if name.split(".")[-1] == path.split(".")[-1]][:1]
    return f"did you mean {match[0]}?" if match else ""


def load_object(path: str, field_name: str) -> Any:
    """`module:name`, imported."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Refused(
            field_name, f"cannot import {module_name!r}: {error}", "start the job in the folder that holds it"
        ) from error
    if not hasattr(module, name):
        raise Refused(field_name, f"{module_name!r} has no {name!r}", nearest(name, dir(module)))
    return getattr(module, name)


def refusal(error: ValidationError) -> Refused:
    """The first mistake that pydantic found, in words."""
    return refusals(error)[0]


def refusals(error: ValidationError) -> list[Refused]:
    """All of them."""
    return [_in_words(each) for each in error.errors(include_url=False)]


def _in_words(mistake: ErrorDetails) -> Refused:
    field = ".".join(str(part) for part in mistake["loc"]) or "recipe"
    cause = mistake.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        return cause
    if mistake["type"] == "extra_forbidden":
        return Refused(field, "no such field in a recipe", nearest(field))
    reason = mistake["msg"].removeprefix("Value error, ")
    given = mistake.get("input")
    if isinstance(given, str | int | float | bool):
        reason += f", got {given!r}"
    return Refused(field, reason)
