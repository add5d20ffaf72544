"""The Bundle: a trained model as a directory that any Hugging Face tool can open, with `card.json` beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform as python_platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import heliostat
from heliostat.models.load import auto_class, transformers_config
from heliostat.recipe import Recipe, Refused, build, write_atomically
from heliostat.tasks import Task, get_task

BUNDLE_VERSION = 1
CARD = "card.json"


@dataclass(frozen=True)
class Bundle:
    """A bundle's directory and its card, read but not loaded."""

    path: Path
    card: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return build(self.card["recipe"])

    @property
    def digest(self) -> str:
        return self.card["digest"]

    def task(self) -> Task:
        return get_task(self.recipe, self.card["facts"])

    def processor(self) -> Any:
        if not (self.path / "tokenizer_config.json").is_file():
            return None
        return transformers.AutoTokenizer.from_pretrained(self.path)

    def model(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """On CPU, in evaluation mode. Safetensors only: no pickle is ever read."""
        return auto_class(self.task()).from_pretrained(self.path, dtype=dtype, use_safetensors=True).eval()


def write(
    path: Path,
    task: Task,
    state: dict[str, Tensor],
    processor: Any,
    *,
    data: dict[str, Any],
    metrics: dict[str, Any],
    lineage: dict[str, Any],
    new_parameters: set[str] = frozenset(),  # type: ignore[assignment]
) -> Bundle:
    """Write a bundle beside, then rename it to `path`. `state`: the whole model's parameters and buffers; adapters
    among them are merged into it, and written by themselves together with `new_parameters`."""
    lora, adapted = task.recipe.model.lora, None
    config = transformers_config(task.recipe.model, **task.model_config())
    with torch.device("meta"):
        model = auto_class(task).from_config(config, dtype=torch.float32)
        if lora.rank:
            from heliostat.models.lora import FOLDER, add_adapters, save_adapter

            adapted = add_adapters(model, lora, set())
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        if adapted is not None:
            save_adapter(adapted, task.recipe.model.name, new_parameters, beside / FOLDER)
            model = adapted.merge_and_unload()
        model.save_pretrained(beside)
        if processor is not None:
            processor.save_pretrained(beside)
        files = digests(beside)
        card = {
            "version": BUNDLE_VERSION,
            "task": task.recipe.task,
            "recipe": task.recipe.model_dump(mode="json"),
            "facts": task.facts,
            "data": data,
            "metrics": metrics,
            "lineage": lineage
            | {
                "heliostat": heliostat.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": python_platform.python_version(),
            },
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "files": files,
            "digest": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        }
        write_atomically(beside / CARD, json.dumps(card, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Bundle(path, card)


def read(path: Path, verify_files: bool = True) -> Bundle:
    """Open a bundle; refuse one whose files are not those its card lists."""
    card_path = path / CARD
    if not card_path.is_file():
        raise Refused("bundle", f"{path} is not a bundle: it has no {CARD}", "name the folder that training wrote")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused("bundle", f"{card_path} is not JSON: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("version"), int):
        raise Refused("bundle", f"{card_path} is not a bundle's card")
    if card["version"] > BUNDLE_VERSION:
        raise Refused("bundle", f"{path} was written by a newer Heliostat", "upgrade this one")
    bundle = Bundle(path, card)
    if verify_files:
        verify(bundle)
    return bundle


def verify(bundle: Bundle) -> None:
    """Raise Refused naming the first file that is missing, changed or not listed."""
    found = digests(bundle.path)
    for name, digest in bundle.card["files"].items():
        if name not in found:
            raise Refused("bundle", f"{bundle.path}: {name} is missing", "restore it, or train again")
        if found[name] != digest:
            raise Refused(
                "bundle",
                f"{bundle.path}: {name} was changed after the bundle was written",
                "restore it, or train again",
            )
    if extra := set(found) - set(bundle.card["files"]):
        raise Refused("bundle", f"{bundle.path}: {min(extra)} is not part of the bundle", "remove it")


def add_metrics(bundle: Bundle, metrics: dict[str, Any]) -> Bundle:
    """Record what evaluation found on the card."""
    card = bundle.card | {"metrics": bundle.card["metrics"] | metrics}
    write_atomically(bundle.path / CARD, json.dumps(card, indent=2) + "\n")
    return Bundle(bundle.path, card)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file but the card, by relative name."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / CARD:
            with file.open("rb") as stream:
                found[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
