"""A ready-made space for any recipe: how the model is trained, and what its task leaves open."""

from __future__ import annotations

from typing import Any

from heliostat.models.blocks import blocks
from heliostat.models.load import on_meta
from heliostat.models.lora import target_modules
from heliostat.recipe import Choice, LogUniform, Recipe, Refused, SearchRange, override
from heliostat.tasks import Task, get_task

RANK, FROZEN, BATCH = "model.lora.rank", "model.freeze_layers", "training.global_batch_size"
USUAL_RANK = 8
LR_FACTOR, ADAPTERS_LR_FACTOR = 5.0, 20.0
"""How far learning rates go below and above the recipe's; adapters take higher ones than the model's own weights."""


def with_auto_space(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with a space of learning rate, schedule and batch size, of training a pre-trained model's own weights,
    its head alone, or adapters, and of the task's `choices`. What its own space searches stays as that says. Refuses an
    own range that excludes one of these."""
    given, lr = recipe.tune.space, recipe.optimizer.lr
    methods = {path: spec for path, spec in _methods(recipe, task).items() if path not in given}
    if RANK in methods and FROZEN in given and RANK not in given[FROZEN].when:
        raise Refused(
            "tune.space",
            f"{FROZEN} excludes adapters, which --auto tries",
            f'add "when": {{"{RANK}": [0]}} to it, or search {RANK}, too',
        )
    highest = lr * (ADAPTERS_LR_FACTOR if RANK in methods else LR_FACTOR)
    choices: dict[str, list[Any]] = {
        "schedule.shape": ["cosine", "linear", "constant"],
        BATCH: _batch_sizes(recipe),
        **task.choices(),
    }
    space: dict[str, SearchRange] = {
        "optimizer.lr": LogUniform(low=lr / LR_FACTOR, high=highest),
        **{path: Choice(values=list(dict.fromkeys(values))) for path, values in choices.items()},
        **methods,
    }
    # The space says what is trained: a recipe's own adapters or frozen blocks would meet the others.
    base: dict[str, Any] = {RANK: 0, FROZEN: 0} if methods else {}
    dump = {path: spec.model_dump(mode="json") for path, spec in (space | given).items()}
    return override(recipe, base | {"tune.space": dump})


def _batch_sizes(recipe: Recipe) -> list[int]:
    """Half, once and twice the recipe's, as far as it could be trained with them."""
    size = recipe.training.global_batch_size
    found = [size]
    for other in (max(1, size // 2), 2 * size):
        try:
            get_task(override(recipe, {BATCH: other})).check()
        except Refused:
            continue
        found.append(other)
    return sorted(found)


def _methods(recipe: Recipe, task: Task) -> dict[str, SearchRange]:
    """What of a pre-trained model is trained."""
    if not (recipe.model.name and recipe.model.pretrained):
        return {}
    model = on_meta(task)
    frozen: list[Any] = [0, len(blocks(model)[1])]
    try:
        target_modules(model, recipe.model.lora.targets)
    except Refused:
        return {FROZEN: Choice(values=frozen)}
    adapters = recipe.tune.space.get(RANK) or Choice(values=[0, recipe.model.lora.rank or USUAL_RANK])
    if 0 not in (adapters.values if isinstance(adapters, Choice) else [adapters.low]):
        return {}  # always adapters
    return {RANK: adapters, FROZEN: Choice(values=frozen, when={RANK: [0]})}
