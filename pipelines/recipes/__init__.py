"""The built-in recipes by name: functions that return a complete Recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from heliostat.recipe import Model, Recipe, Refused, load, load_object, nearest

BUILT_IN = {
    "sentiment": "pipelines.recipes.language:sentiment",
    "topics": "pipelines.recipes.language:topics",
    "smollm": "pipelines.recipes.language:smollm",
    "minilm": "pipelines.recipes.language:minilm",
    "tiny_lm": "pipelines.recipes.language:tiny_lm",
    "digits": "pipelines.recipes.vision:digits",
    "fashion": "pipelines.recipes.vision:fashion",
    "cifar10": "pipelines.recipes.vision:cifar10",
    "breast_cancer": "pipelines.recipes.tabular:breast_cancer",
    "credit": "pipelines.recipes.tabular:credit",
}


def find_recipe(name: str) -> Recipe:
    """A built-in recipe's name, a recipe's or a Hugging Face configuration's JSON file, or `module:function`."""
    if name.endswith(".json"):
        path = Path(name).expanduser().absolute()
        if is_model_config(path):  # a language model of its architecture
            model = Model(name=str(path.parent if path.name == "config.json" else path), pretrained=False)
            return Recipe(name=path.parent.name or "model", task="language_model", model=model)
        return load(path)
    where = BUILT_IN.get(name, name)
    if ":" not in where:
        raise Refused(
            "recipe", f"no recipe {name!r}", nearest(name, list(BUILT_IN)) or f"there are: {', '.join(BUILT_IN)}"
        )
    sys.path.insert(0, os.getcwd())  # a recipe of the user's own lies where the job was started
    recipe = load_object(where, "recipe")()
    if not isinstance(recipe, Recipe):
        raise Refused("recipe", f"{name} returned {type(recipe).__name__}, not a Recipe")
    return recipe


def is_model_config(path: Path) -> bool:
    """Whether a JSON file is Hugging Face's configuration of a model, and no recipe."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return '"model_type"' in text and '"task"' not in text
