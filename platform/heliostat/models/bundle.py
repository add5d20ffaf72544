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
from heliostat import card as cards
from heliostat.card import BUNDLE_VERSION, CARD, digests
from heliostat.models.adapters import FOLDER
from heliostat.models.load import auto_class, transformers_config
from heliostat.recipe import Recipe, build, write_atomically
from heliostat.tasks import Task, get_task


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
        return transformers.AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def model(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """On CPU, in evaluation mode. Safetensors only: no pickle is ever read, and no code of the folder is run."""
        kind, safe = auto_class(self.task()), {"use_safetensors": True, "trust_remote_code": False}
        return kind.from_pretrained(self.path, dtype=dtype, **safe).eval()


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
            from heliostat.models.lora import add_adapters, save_adapter

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
        task.save(beside, config)
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
    bundle = Bundle(path, cards.read(path))
    if verify_files:
        verify(bundle)
    return bundle


def verify(bundle: Bundle, folder: str = "") -> None:
    """Raise Refused naming the first file that is missing, changed or not listed: of the whole, or in its `folder`."""
    cards.verify(bundle.path, bundle.card, folder)


def add_metrics(bundle: Bundle, metrics: dict[str, Any]) -> Bundle:
    """Record what evaluation found on the card."""
    card = bundle.card | {"metrics": bundle.card["metrics"] | metrics}
    write_atomically(bundle.path / CARD, json.dumps(card, indent=2) + "\n")
    return Bundle(bundle.path, card)
