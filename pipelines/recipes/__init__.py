"""The built-in recipes by name: functions that return a complete Recipe."""

BUILT_IN = {
    "sentiment": "pipelines.recipes.language:sentiment",
    "topics": "pipelines.recipes.language:topics",
    "smollm": "pipelines.recipes.language:smollm",
    "tiny_lm": "pipelines.recipes.language:tiny_lm",
    "digits": "pipelines.recipes.vision:digits",
    "fashion": "pipelines.recipes.vision:fashion",
    "cifar10": "pipelines.recipes.vision:cifar10",
}
