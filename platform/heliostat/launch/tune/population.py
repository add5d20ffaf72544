"""Population based training: a trial that falls behind goes on from the weights of one in front, with values near its.

Jaderberg et al. 2017, Population Based Training of Neural Networks: truncation selection, and perturbing or resampling.
"""

from __future__ import annotations

import math
import random
from typing import Any

from heliostat.recipe import Choice, Integers, LogUniform, SearchRange

QUANTILE = 0.25
"""The worst share of the population goes on from the best share."""
RESAMPLED = 0.25
"""How often a value is drawn anew instead of changed a little."""
FACTORS = (0.8, 1.25)
CHANGEABLE = ("optimizer.", "training.label_smoothing", "model.dropout", "data.augment")
"""Beginnings of the paths whose values may change in mid-training: neither the weights nor the order of rows depend on
them."""


def source(values: dict[int, float], number: int, more_is_better: bool, draw: random.Random) -> int | None:
    """Which trial `number` is to go on from, or None: it goes on as it is. `values`: what trials that are still in the
    population reported at the same report, by number."""
    ordered = sorted(values, key=lambda each: (-values[each] if more_is_better else values[each], each))
    few = max(1, math.floor(len(ordered) * QUANTILE))
    if len(ordered) < 2 or number not in ordered[-few:]:
        return None
    return draw.choice(ordered[:few])


def explored(values: dict[str, Any], space: dict[str, SearchRange], draw: random.Random) -> dict[str, Any]:
    """Values near these, within their ranges."""
    return {path: _near(value, space[path], draw) for path, value in values.items()}


def _near(value: Any, spec: SearchRange, draw: random.Random) -> Any:
    anew = draw.random() < RESAMPLED
    if isinstance(spec, Choice):
        return draw.choice(spec.values) if anew else value
    if isinstance(spec, Integers):
        if anew:
            return draw.randint(spec.low, spec.high)
        step = max(1, round(abs(value) * (FACTORS[1] - 1)))
        return min(max(value + draw.choice((-step, step)), spec.low), spec.high)
    if anew:
        if isinstance(spec, LogUniform):
            return math.exp(draw.uniform(math.log(spec.low), math.log(spec.high)))
        return draw.uniform(spec.low, spec.high)
    return min(max(value * draw.choice(FACTORS), spec.low), spec.high)
