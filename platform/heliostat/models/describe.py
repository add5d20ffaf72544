"""From a recipe to its model's configuration, without a library that could load it and without asking a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heliostat.models.packaged import PREFIX, packaged_config
from heliostat.recipe import TRAINED_TOKENIZER, Recipe, Refused


def configuration(recipe: Recipe) -> dict[str, Any] | None:
    """The model's `config.json` with the recipe's fields over it; None where it is not on this machine. Raises Refused
    for a folder or package that has none."""
    model = recipe.model
    own = dict(model.config)
    if model.name:
        path = _config_file(model.name)
        if path is None:
            return None
        try:
            own = json.loads(path.read_text(encoding="utf-8")) | own
        except ValueError as error:
            raise Refused("model.name", f"{path} is not JSON: {error}") from error
    elif model.tokenizer.startswith(TRAINED_TOKENIZER):
        own["vocab_size"] = int(model.tokenizer.removeprefix(TRAINED_TOKENIZER))
    if model.image_size and recipe.task == "image_classification":
        own["image_size"] = model.image_size
    return own


def _config_file(name: str) -> Path | None:
    if name.startswith(PREFIX):
        return packaged_config(name.removeprefix(PREFIX))
    if (folder := model_folder(name)) is not None:
        return folder / "config.json" if (folder / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise Refused("model.name", f"{name!r} is neither a folder nor a hub id") from None
    return Path(found) if isinstance(found, str) else None


def model_folder(name: str) -> Path | None:
    """The directory that a model's name means; None where it is a hub id. Raises Refused for a path without a model."""
    path = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) and not (path / "config.json").is_file():
        raise Refused("model.name", f"{path} is not a model in Hugging Face format: it has no config.json")
    return path if path.is_dir() else None
